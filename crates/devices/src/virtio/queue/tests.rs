use std::{sync::mpsc, thread, time::Duration};

use proptest::prelude::*;
use vireo_memory::GuestSlice;

use super::{driver::Driver, *};
use crate::virtio::{Reader, ShortChain, Writer};

const RAM: u64 = 1 << 20;
const DATA: u64 = 0x8000;

fn driver(size: u16) -> Driver {
    Driver::new(&GuestMemory::new(RAM, RAM).unwrap(), 0x1000, size)
}

fn queue(driver: &Driver) -> Queue {
    Queue::new(&driver.resources(None)).unwrap()
}

#[test]
fn rings_must_lie_in_memory() {
    let driver = driver(8);
    let broken: [fn(&mut QueueResources); 6] = [
        |r| r.size = 0,
        |r| r.size = 7,
        |r| r.descriptors += 8,
        |r| r.driver = u64::MAX - 1,
        |r| r.device = RAM - 4,
        |r| r.descriptors = RAM,
    ];
    for change in broken {
        let mut resources = driver.resources(None);
        change(&mut resources);
        assert!(matches!(Queue::new(&resources), Err(VirtioError::BadRing)));
    }
}

#[test]
fn chains_come_in_order_and_go_back_used() {
    let mut driver = driver(8);
    let mut queue = queue(&driver);
    assert!(queue.pop().unwrap().is_none());
    driver.memory.write(DATA, b"hello world").unwrap();
    // more rounds than the ring has entries
    for round in 0..20u64 {
        let head = driver.offer(&[(DATA, 5, false), (DATA + 5, 6, false), (DATA + 0x1000, 16, true)]);
        let other = driver.offer_indirect(DATA + 0x800, &[(DATA, 1, false), (DATA + 0x2000, 2, true)]);
        let first = queue.pop().unwrap().unwrap();
        let second = queue.pop().unwrap().unwrap();
        assert!(queue.pop().unwrap().is_none());
        assert_eq!((first.head(), second.head()), (head, other));
        assert_eq!((first.readable().len(), first.readable_bytes(), first.writable_bytes()), (2, 11, 16));
        assert_eq!((second.readable_bytes(), second.writable_bytes()), (1, 2));
        let mut text = [0; 11];
        first.reader().read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello world");
        first.writer().write_pod(round).unwrap();
        queue.push(second, 0).unwrap();
        queue.push(first, 8).unwrap();
        assert_eq!(driver.memory.read_pod::<u64>(DATA + 0x1000).unwrap(), round);
        assert_eq!((driver.used(), driver.used(), driver.used()), (Some((other, 0)), Some((head, 8)), None));
    }
    assert_eq!(queue.state(), QueueState { next_avail: 40, next_used: 40 });
    assert_eq!(queue.spare.len(), 2, "chains are used again");
}

#[test]
fn a_queue_goes_on_from_its_state() {
    let mut driver = driver(4);
    let mut first = queue(&driver);
    driver.offer(&[(DATA, 1, true)]);
    let second_head = driver.offer(&[(DATA, 1, true)]);
    let chain = first.pop().unwrap().unwrap();
    first.push(chain, 1).unwrap();
    let chain = first.pop().unwrap().unwrap();
    first.unpop(chain);
    let mut second = Queue::new(&driver.resources(Some(first.state()))).unwrap();
    let chain = second.pop().unwrap().unwrap();
    assert_eq!(chain.head(), second_head);
    second.push(chain, 0).unwrap();
    assert_eq!((driver.used().map(|u| u.1), driver.used()), (Some(1), Some((second_head, 0))));
}

#[test]
fn published_together() {
    let mut driver = driver(4);
    let mut queue = queue(&driver);
    driver.offer(&[(DATA, 1, true)]);
    driver.offer(&[(DATA, 1, true)]);
    for _ in 0..2 {
        let chain = queue.pop().unwrap().unwrap();
        queue.add_used(chain, 1).unwrap();
        assert_eq!(driver.used(), None);
    }
    queue.publish().unwrap();
    assert!(driver.used().is_some() && driver.used().is_some());
}

#[test]
fn interrupts_follow_the_event_index() {
    let mut driver = driver(8);
    let mut queue = queue(&driver);
    let mut serve = |driver: &mut Driver, count| {
        for _ in 0..count {
            driver.offer(&[(DATA, 1, true)]);
            let chain = queue.pop().unwrap().unwrap();
            queue.push(chain, 1).unwrap();
        }
        queue.needs_interrupt().unwrap()
    };
    assert!(serve(&mut driver, 1), "always after a start");
    assert!(!serve(&mut driver, 0), "nothing new");
    driver.set_used_event(3);
    assert!(!serve(&mut driver, 1));
    assert!(!serve(&mut driver, 1));
    assert!(serve(&mut driver, 1));
    assert!(!serve(&mut driver, 5), "not asked for again");
    driver.set_used_event(8);
    driver.set_used_event(10);
    assert!(serve(&mut driver, 5));
}

#[test]
fn interrupts_and_notifications_follow_the_flags() {
    let mut driver = driver(8);
    driver.features = features_without_events();
    let mut queue = queue(&driver);
    for (flags, wanted) in [(0u16, true), (1, false), (0, true)] {
        driver.memory.write_pod(driver.driver(), flags).unwrap();
        driver.offer(&[(DATA, 1, true)]);
        let chain = queue.pop().unwrap().unwrap();
        queue.push(chain, 1).unwrap();
        assert_eq!(queue.needs_interrupt().unwrap(), wanted);
    }
    queue.disable_notification().unwrap();
    assert_eq!(driver.memory.read_pod::<u16>(driver.device()).unwrap(), 1);
    assert!(!queue.enable_notification().unwrap());
    assert_eq!(driver.memory.read_pod::<u16>(driver.device()).unwrap(), 0);
    driver.offer(&[(DATA, 1, true)]);
    assert!(queue.enable_notification().unwrap());
}

fn features_without_events() -> u64 {
    crate::virtio::features::TRANSPORT & !RING_EVENT_IDX
}

#[test]
fn notifications_follow_the_event_index() {
    let mut driver = driver(8);
    let mut queue = queue(&driver);
    for expected in 1..4 {
        driver.offer(&[(DATA, 1, true)]);
        assert!(queue.enable_notification().unwrap());
        let chain = queue.pop().unwrap().unwrap();
        queue.push(chain, 1).unwrap();
        queue.disable_notification().unwrap();
        assert_eq!(driver.avail_event(), expected - 1);
        assert!(!queue.enable_notification().unwrap());
        assert_eq!(driver.avail_event(), expected);
    }
}

#[test]
fn broken_rings_are_errors() {
    type Break = fn(&mut Driver);
    let cases: [(Break, QueueError); 12] = [
        (|d| d.memory.write_pod(d.driver() + 2, 9u16).unwrap(), QueueError::TooManyAvailable(9)),
        (|d| d.offer_head(8), QueueError::BadIndex(8)),
        (|d| _ = d.offer(&[(RAM - 4, 5, false)]), QueueError::BadAddress { gpa: RAM - 4, len: 5 }),
        (|d| _ = d.offer(&[(0, 1, true), (0, 1, false)]), QueueError::ReadableAfterWritable),
        (
            |d| {
                d.write_descriptor(d.descriptors(), 0, DATA, 1, 1, 0);
                d.offer_head(0);
            },
            QueueError::ChainTooLong,
        ),
        (
            |d| {
                d.write_descriptor(d.descriptors(), 0, DATA, 1, 1, 99);
                d.offer_head(0);
            },
            QueueError::BadIndex(99),
        ),
        (
            |d| {
                d.write_descriptor(d.descriptors(), 0, DATA, 15, 4, 0);
                d.offer_head(0);
            },
            QueueError::BadIndirect,
        ),
        (
            |d| {
                d.write_descriptor(d.descriptors(), 0, DATA, 0, 4, 0);
                d.offer_head(0);
            },
            QueueError::BadIndirect,
        ),
        (
            |d| {
                d.write_descriptor(d.descriptors(), 0, DATA, 16, 4 | 1, 0);
                d.offer_head(0);
            },
            QueueError::BadIndirect,
        ),
        (
            // an indirect table inside an indirect table
            |d| {
                d.write_descriptor(d.descriptors(), 0, DATA, 16, 4, 0);
                d.write_descriptor(DATA, 0, DATA, 16, 4, 0);
                d.offer_head(0);
            },
            QueueError::BadIndirect,
        ),
        (
            // a loop in an indirect table
            |d| {
                d.write_descriptor(d.descriptors(), 0, DATA, 32, 4, 0);
                d.write_descriptor(DATA, 0, 0, 1, 1, 1);
                d.write_descriptor(DATA, 1, 0, 1, 1, 0);
                d.offer_head(0);
            },
            QueueError::ChainTooLong,
        ),
        (
            |d| {
                d.write_descriptor(d.descriptors(), 0, RAM - 16, 32, 4, 0);
                d.offer_head(0);
            },
            QueueError::BadAddress { gpa: RAM - 16, len: 32 },
        ),
    ];
    for (breaks, expected) in cases {
        let mut driver = driver(8);
        let mut queue = queue(&driver);
        breaks(&mut driver);
        assert_eq!(queue.pop().err(), Some(expected));
    }
}

#[test]
fn indirect_tables_need_their_feature() {
    let mut driver = driver(8);
    driver.features &= !INDIRECT_DESC;
    let mut queue = queue(&driver);
    driver.offer_indirect(DATA, &[(0, 1, false)]);
    assert_eq!(queue.pop().err(), Some(QueueError::BadIndirect));
}

#[test]
fn no_more_in_flight_than_the_queue_holds() {
    let mut driver = driver(4);
    let mut queue = queue(&driver);
    let mut held = Vec::new();
    for _ in 0..4 {
        driver.offer(&[(DATA, 1, true)]);
        held.push(queue.pop().unwrap().unwrap());
    }
    driver.offer(&[(DATA, 1, true)]);
    assert_eq!(queue.pop().err(), Some(QueueError::TooManyInFlight));
    queue.push(held.pop().unwrap(), 0).unwrap();
    assert!(queue.pop().unwrap().is_some());
}

#[test]
fn what_a_device_writes_is_reported() {
    use std::sync::{Arc, Mutex};
    #[derive(Default)]
    struct Pages(Mutex<Vec<u64>>);
    impl vireo_memory::PageWatch for Pages {
        fn page_written(&self, gpa: u64, _: u64) {
            self.0.lock().unwrap().push(gpa >> 12);
        }
    }
    let mut driver = driver(4);
    let mut queue = queue(&driver);
    let pages = Arc::new(Pages::default());
    driver.memory.set_watch(pages.clone());
    for page in [0x8000, 0x9000, 0xa000] {
        driver.memory.watch_page(page);
    }
    driver.offer(&[(0x8000, 8, false), (0x9ff8, 16, true)]);
    let chain = queue.pop().unwrap().unwrap();
    chain.writer().write_all(&[1; 16]).unwrap();
    assert!(pages.0.lock().unwrap().is_empty());
    queue.push(chain, 16).unwrap();
    assert_eq!(*pages.0.lock().unwrap(), [9, 10]);
}

#[test]
fn cursors_cross_slices() {
    let (mut a, mut b, mut c) = ([1u8, 2, 3], [4u8], [5u8, 6, 7, 8]);
    let slices = [GuestSlice::from_host(&mut a), GuestSlice::from_host(&mut b), GuestSlice::from_host(&mut c)];
    let mut reader = Reader::new(&slices);
    assert_eq!((reader.read_pod::<u16>().unwrap(), reader.remaining()), (0x0201, 6));
    reader.skip(1).unwrap();
    let mut rest = Vec::new();
    reader.clone().take(3, &mut rest).unwrap();
    assert_eq!(rest.iter().map(GuestSlice::len).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(reader.read_pod::<u32>().unwrap(), 0x0706_0504);
    assert_eq!(reader.read_pod::<u16>(), Err(ShortChain { wanted: 2, left: 1 }));
    let mut writer = Writer::new(&slices);
    writer.write_pod(0xddcc_bbaau32).unwrap();
    writer.fill(0, 3).unwrap();
    assert_eq!((writer.write(&[9, 9]), writer.position()), (1, 8));
    let mut all = [0; 8];
    Reader::new(&slices).read_exact(&mut all).unwrap();
    assert_eq!(all, [0xaa, 0xbb, 0xcc, 0xdd, 0, 0, 0, 9]);
}

/// Driver and device on two threads that sleep whenever the other's wish allows it: a lost wake-up is a time-out.
#[test]
fn no_wake_up_is_lost() {
    const PATIENCE: Duration = Duration::from_secs(20);
    const REQUESTS: usize = 100_000;
    let mut driver = driver(8);
    let mut queue = queue(&driver);
    let (kick, kicked) = mpsc::channel();
    let (interrupt, interrupted) = mpsc::channel();
    let device = thread::spawn(move || {
        let mut served = 0;
        while served < REQUESTS {
            queue.disable_notification().unwrap();
            while let Some(chain) = queue.pop().unwrap() {
                queue.push(chain, 1).unwrap();
                served += 1;
                if served % 3 == 0 && queue.needs_interrupt().unwrap() {
                    interrupt.send(()).unwrap();
                }
            }
            if queue.needs_interrupt().unwrap() {
                interrupt.send(()).unwrap();
            }
            if served < REQUESTS && !queue.enable_notification().unwrap() {
                kicked.recv_timeout(PATIENCE).expect("a notification was lost");
            }
        }
    });
    let (mut offered, mut finished) = (0, 0);
    while finished < REQUESTS {
        let before = driver.next_avail();
        // batches of different sizes
        let most = 1 + offered % 8;
        for _ in 0..most.min(8 - (offered - finished)).min(REQUESTS - offered) {
            driver.offer(&[(DATA, 1, true)]);
            offered += 1;
        }
        if driver.wants_kick(before) {
            kick.send(()).unwrap();
        }
        match driver.used_or_event() {
            Some(_) => finished += 1,
            None => interrupted.recv_timeout(PATIENCE).expect("an interrupt was lost"),
        }
    }
    device.join().unwrap();
}

proptest! {
    /// Garbage in rings, descriptors and indirect tables: errors or chains within memory, in bounded time.
    #[test]
    fn garbage_is_survived(
        words in prop::collection::vec(prop_oneof![any::<u64>(), 0..0x40u64, 0..RAM], 128),
        size_bits in 0u32..6,
        rounds in 1usize..40,
    ) {
        let memory = GuestMemory::new(RAM, RAM).unwrap();
        let driver = Driver::new(&memory, 0, 1 << size_bits);
        let mut queue = queue(&driver);
        for (i, word) in words.iter().enumerate() {
            memory.write_pod(8 * i as u64, *word).unwrap();
        }
        for round in 0..rounds {
            match queue.pop() {
                Ok(Some(chain)) => {
                    prop_assert!(chain.readable().len() + chain.writable().len() <= 1024);
                    let mut writer = chain.writer();
                    let len = writer.write(&[0xa5; 64]) as u32;
                    queue.push(chain, len).unwrap();
                }
                Ok(None) => { queue.enable_notification().unwrap(); }
                Err(_) => {}
            }
            queue.needs_interrupt().unwrap();
            // the driver goes on breaking things
            let word = words[round % words.len()];
            memory.write_pod(word % 0x300, word).unwrap();
        }
        prop_assert!(queue.spare.len() <= usize::from(queue.size()) + 1);
    }
}
