use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use proptest::prelude::*;
use vireo_packet::{Backend, MacAddress, Offloads};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{device::feature::*, *};
use crate::virtio::{
    VirtioDevice,
    fake_driver::{F_EVENT_IDX, Heap, PATIENCE, Piece, Ring},
};

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const ALL: Offloads = Offloads { checksum_in: true, checksum_out: true, segmentation_in: true, segmentation_out: true };

/// A wire whose other end the test holds.
struct Wire {
    offers: Offloads,
    to_guest: Mutex<VecDeque<Vec<u8>>>,
    from_guest: Mutex<Vec<Vec<u8>>>,
    negotiated: Mutex<Option<Offloads>>,
    readable: EventFd,
}

impl Wire {
    fn new(offers: Offloads) -> Arc<Self> {
        Arc::new(Self {
            offers,
            to_guest: Mutex::default(),
            from_guest: Mutex::default(),
            negotiated: Mutex::default(),
            readable: EventFd::new(EFD_NONBLOCK).unwrap(),
        })
    }

    fn feed(&self, frame: Vec<u8>) {
        let mut queue = self.to_guest.lock().unwrap();
        queue.push_back(frame);
        self.readable.write(1).unwrap();
    }
}

impl Backend for Wire {
    fn send(&self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        self.from_guest.lock().unwrap().push(frame.iter().flat_map(|piece| piece.to_vec()).collect());
        Ok(())
    }
    fn recv(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
        let mut queue = self.to_guest.lock().unwrap();
        let Some(frame) = queue.pop_front() else { return Ok(None) };
        if queue.is_empty() {
            self.readable.read().unwrap();
        }
        buffers[0][..frame.len()].copy_from_slice(&frame);
        Ok(Some(frame.len()))
    }
    fn readable(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.readable.as_raw_fd()) }
    }
    fn offloads(&self) -> Offloads {
        self.offers
    }
    fn set_offloads(&self, negotiated: Offloads) {
        *self.negotiated.lock().unwrap() = Some(negotiated);
    }
    fn mtu(&self) -> Option<u16> {
        Some(9000)
    }
}

struct Bench {
    heap: Arc<Heap>,
    wire: Arc<Wire>,
    device: Net,
    rx: Ring,
    tx: Ring,
    control: Ring,
}

fn bench(features: u64) -> Bench {
    let heap = Heap::new(16 << 20);
    let wire = Wire::new(ALL);
    let mut device = Net::new("net0", MAC, wire.clone());
    let ring = |size| Ring::new(&heap, size, features);
    let (rx, tx, control) = (ring(64), ring(64), ring(16));
    for (index, ring) in [&rx, &tx, &control].into_iter().enumerate() {
        device.start_queue(index, ring.resources(None)).unwrap();
    }
    Bench { heap, wire, device, rx, tx, control }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend((0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed));
    frame
}

impl Bench {
    fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.wire.from_guest.lock().unwrap())
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        let (command, ack) = (self.heap.filled(bytes), self.heap.empty(1));
        assert_eq!(self.control.run(&[command, ack]), 1);
        self.heap.bytes(ack)[0]
    }
}

#[test]
fn frames_go_out_as_they_are() {
    for features in [0, F_EVENT_IDX] {
        let mut bench = bench(features);
        for len in [14, 60, 1514, 9014] {
            let frame = frame(len, 1);
            let whole = bench.heap.filled(&frame);
            assert_eq!(bench.tx.run(&[whole]), 0);
            // in pieces that cut the header
            let part = |at: u64, len| Piece { gpa: whole.gpa + at, len, write: false };
            assert_eq!(bench.tx.run(&[part(0, 5), part(5, 8), part(13, len as u32 - 1)]), 0);
            assert!(bench.sent() == [frame.clone(), frame]);
        }
    }
}

#[test]
fn what_was_not_agreed_is_not_sent() {
    let cases: [(&[u8], usize, u64, bool); 12] = [
        (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7], 60, 0, true),
        (&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], 60, CSUM, true),
        (&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], 60, 0, false),
        (&[1, 0, 0, 0, 0, 0, 34, 0, 25, 0, 0, 0], 60, CSUM, false),
        (&[1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0], 60, CSUM, false),
        (&[1, 1, 0, 0, 180, 5, 34, 0, 16, 0, 0, 0], 9000, CSUM | HOST_TSO4, true),
        (&[1, 4, 0, 0, 180, 5, 34, 0, 16, 0, 0, 0], 9000, CSUM | HOST_TSO4, false),
        (&[1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], 9000, CSUM | HOST_TSO4, false),
        (&[0, 1, 0, 0, 180, 5, 34, 0, 16, 0, 0, 0], 9000, CSUM | HOST_TSO4, false),
        (&[1, 3, 0, 0, 180, 5, 34, 0, 16, 0, 0, 0], 9000, CSUM | HOST_TSO4 | HOST_TSO6, false),
        (&[0; 12], 13, 0, false),
        (&[0; 12], 70000, 0, false),
    ];
    for (header, len, features, passes) in cases {
        let mut bench = bench(features);
        let bytes = [header, &vec![9; len]].concat();
        let piece = bench.heap.filled(&bytes);
        bench.tx.run(&[piece]);
        let sent = bench.sent();
        assert_eq!(sent.len(), usize::from(passes), "{header:?} {len}");
        if let Some(frame) = sent.first() {
            assert_eq!((&frame[..10], &frame[10..12], frame.len()), (&header[..10], &[0, 0][..], len + 12));
        }
    }
}

#[test]
fn a_large_frame_spreads_over_buffers() {
    for features in [MRG_RXBUF, MRG_RXBUF | F_EVENT_IDX] {
        let mut bench = bench(features);
        let frame = frame(60_000, 2);
        bench.wire.feed(frame.clone());
        // the first few do not suffice; the frame waits
        let buffers: Vec<Piece> = (0..41).map(|_| bench.heap.empty(1536)).collect();
        for buffer in &buffers[..10] {
            bench.rx.add(&[*buffer]);
        }
        bench.rx.publish();
        assert!(bench.rx.wait_used(Duration::from_millis(20)).is_none());
        for buffer in &buffers[10..] {
            bench.rx.add(&[*buffer]);
        }
        bench.rx.publish();
        let mut received: Vec<u8> = Vec::new();
        let mut count = 0;
        while received.len() < frame.len() {
            let (_, len) = bench.rx.wait_used(PATIENCE).unwrap();
            received.extend(&bench.heap.bytes(buffers[count])[..len as usize]);
            count += 1;
        }
        assert_eq!(received[10..12], (count as u16).to_le_bytes());
        assert_eq!(count, 60_012usize.div_ceil(1536));
        assert!(received[12..] == frame[12..]);
        // the rest of the buffers is still the driver's to be filled
        bench.wire.feed(self::frame(60, 3));
        assert_eq!(bench.rx.wait_used(PATIENCE).unwrap().1, 72);
        assert_eq!(bench.heap.bytes(buffers[count])[10..12], [1, 0]);
    }
}

#[test]
fn without_merging_a_frame_fits_or_is_lost() {
    let mut bench = bench(0);
    let (small, large) = (bench.heap.empty(100), bench.heap.empty(1536));
    bench.rx.add(&[small]);
    bench.rx.add(&[large]);
    bench.rx.publish();
    bench.wire.feed(frame(1000, 1));
    bench.wire.feed(frame(88, 2));
    bench.wire.feed(frame(1000, 3));
    assert_eq!(bench.rx.wait_used(PATIENCE).unwrap().1, 100);
    assert_eq!(bench.rx.wait_used(PATIENCE).unwrap().1, 1012);
    assert!(bench.heap.bytes(large)[12..1012] == frame(1000, 3)[12..]);
    assert_eq!(bench.heap.bytes(large)[10..12], [1, 0]);
}

/// Many frames, few interrupts, all in order, with the ring refilled all the time.
#[test]
fn a_stream_of_frames() {
    let mut bench = bench(MRG_RXBUF | F_EVENT_IDX);
    let mut by_head = [None; 64];
    let mut spare: Vec<Piece> = (0..64).map(|_| bench.heap.empty(1536)).collect();
    let wire = bench.wire.clone();
    let feeder = std::thread::spawn(move || {
        for i in 0..2000u32 {
            wire.feed(frame(200 + i as usize % 1200, i as u8));
        }
    });
    for i in 0..2000u32 {
        while bench.rx.free() > 0 {
            let buffer = spare.pop().unwrap();
            by_head[usize::from(bench.rx.add(&[buffer]))] = Some(buffer);
        }
        bench.rx.publish();
        let (head, len) = bench.rx.wait_used(PATIENCE).expect("a frame is missing");
        let buffer = by_head[usize::from(head)].take().unwrap();
        spare.push(buffer);
        let bytes = bench.heap.bytes(buffer);
        assert!(bytes[12..len as usize] == frame(200 + i as usize % 1200, i as u8)[12..], "frame {i}");
    }
    feeder.join().unwrap();
}

#[test]
fn offloads_are_agreed_with_the_backend() {
    let negotiated = |bench: &Bench| bench.wire.negotiated.lock().unwrap().unwrap();
    let none = Offloads::default();
    assert_eq!(negotiated(&bench(0)), none);
    assert_eq!(negotiated(&bench(CSUM)), Offloads { checksum_in: true, ..none });
    assert_eq!(negotiated(&bench(GUEST_CSUM | GUEST_TSO4)), Offloads { checksum_out: true, ..none });
    let guest = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6;
    let mut bench = bench(CSUM | HOST_TSO4 | HOST_TSO6 | guest | CTRL_GUEST_OFFLOADS);
    assert_eq!(negotiated(&bench), ALL);
    assert_eq!(bench.command(&[&[5, 0][..], &0u64.to_le_bytes()].concat()), 0);
    assert_eq!(negotiated(&bench), Offloads { checksum_in: true, segmentation_in: true, ..none });
    assert_eq!(bench.command(&[&[5, 0][..], &(1u64 << 10).to_le_bytes()].concat()), 1);
    let saved = bench.device.save();
    assert_eq!(bench.command(&[&[5, 0][..], &guest.to_le_bytes()].concat()), 0);
    assert_eq!(negotiated(&bench), ALL);
    bench.device.restore(&saved).unwrap();
    bench.device.stop_queue(1);
    bench.device.start_queue(1, bench.tx.resources(None)).unwrap();
    assert_eq!(negotiated(&bench), Offloads { checksum_in: true, segmentation_in: true, ..none });
}

#[test]
fn features_follow_the_backend() {
    let device = |offers| Net::new("net0", MAC, Wire::new(offers));
    let plain = device(Offloads::default()).features();
    assert_eq!(plain & (CSUM | GUEST_CSUM | HOST_TSO4 | HOST_TSO6 | GUEST_TSO4 | GUEST_TSO6), 0);
    assert_eq!(plain & (MTU | MRG_RXBUF | STATUS), MTU | MRG_RXBUF | STATUS);
    let all = CSUM | GUEST_CSUM | HOST_TSO4 | HOST_TSO6 | GUEST_TSO4 | GUEST_TSO6;
    assert_eq!(device(ALL).features() & all, all);
}

#[test]
fn the_control_queue() {
    let mut bench = bench(0);
    assert_eq!(bench.command(&[0, 0, 1]), 0);
    assert_eq!(bench.command(&[0, 1, 1]), 0);
    assert_eq!(bench.command(&[0, 0, 2]), 1);
    assert_eq!(bench.command(&[0, 0]), 1);
    assert_eq!(bench.command(&[0]), 1);
    assert_eq!(bench.command(&[77, 0]), 1);
    let table = [&[1, 0][..], &1u32.to_le_bytes(), &[1; 6], &2u32.to_le_bytes(), &[2; 12]].concat();
    assert_eq!(bench.command(&table), 0);
    assert_eq!(bench.command(&table[..table.len() - 1]), 1);
    assert_eq!(bench.command(&[&[1, 0][..], &[0xff; 4]].concat()), 1);
    assert_eq!(bench.command(&[1, 1, 2, 3, 4, 5, 6, 7]), 0);
    let mut config = [0; 16];
    bench.device.read_config(0, &mut config);
    assert_eq!(config, [2, 3, 4, 5, 6, 7, 1, 0, 1, 0, 0x28, 0x23, 0, 0, 0, 0]);
    bench.device.reset();
    bench.device.read_config(0, &mut config);
    assert_eq!(config[..6], MAC.0);
}

#[test]
fn an_unplugged_cable_carries_nothing() {
    let mut bench = bench(0);
    let link = bench.device.link();
    link.set_up(false);
    assert_eq!(bench.control.config_changes.count(), 1);
    let mut status = [9; 2];
    bench.device.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    let piece = bench.heap.filled(&frame(60, 0));
    bench.tx.run(&[piece]);
    assert!(bench.sent().is_empty());
    link.set_up(true);
    bench.tx.run(&[piece]);
    assert_eq!(bench.sent().len(), 1);
}

#[test]
fn threads_stop_at_once_and_state_comes_back() {
    let mut bench = bench(MRG_RXBUF);
    bench.wire.feed(frame(1000, 0));
    let started = Instant::now();
    let states: Vec<_> = (0..3).map(|i| bench.device.stop_queue(i).unwrap()).collect();
    assert!(started.elapsed() < Duration::from_secs(5));
    bench.device.start_queue(0, bench.rx.resources(Some(states[0]))).unwrap();
    let buffer = bench.heap.empty(1536);
    assert_eq!(bench.rx.run(&[buffer]), 1012);
    assert!(bench.device.restore(b"junk").is_err());
}

proptest! {
    #![proptest_config(crate::tests::cases(48))]
    #[test]
    fn garbage_does_no_harm(
        raw in prop::collection::vec(any::<[u8; 16]>(), 16),
        heads in prop::collection::vec(any::<u16>(), 1..40),
        data in prop::collection::vec(any::<u8>(), 4096),
        features in any::<u32>(),
    ) {
        let mut bench = bench(u64::from(features) & !(1 << 28));
        bench.heap.memory.write(0, &data[..16]).unwrap();
        bench.heap.memory.write(1 << 20, &data).unwrap();
        for i in 0..20 {
            bench.wire.feed(frame(i * 100, 0));
        }
        for ring in [&mut bench.rx, &mut bench.tx, &mut bench.control] {
            for (index, raw) in raw.iter().enumerate() {
                let mut raw = *raw;
                raw[2] = 0x10;
                raw[3..8].fill(0);
                raw[10..12].fill(0);
                raw[12] &= 3;
                raw[13..16].fill(0);
                ring.scribble(index as u16, raw);
            }
            for head in &heads {
                ring.offer(head % 17);
            }
            ring.publish();
            ring.kick();
        }
        std::thread::sleep(Duration::from_millis(1));
        for index in 0..3 {
            prop_assert!(bench.device.stop_queue(index).is_some(), "queue {} panicked", index);
        }
        // whatever passed is a frame with a clean header
        for frame in bench.sent() {
            prop_assert!(frame.len() >= 26 && frame[10..12] == [0, 0]);
        }
    }

    #[test]
    fn any_command_is_answered(bytes in prop::collection::vec(any::<u8>(), 1..80), class in 0u8..7, command in 0u8..7) {
        let mut bench = bench(CTRL_GUEST_OFFLOADS | GUEST_CSUM);
        prop_assert!(bench.command(&bytes) <= 1);
        prop_assert!(bench.command(&[&[class, command][..], &bytes].concat()) <= 1);
    }
}
