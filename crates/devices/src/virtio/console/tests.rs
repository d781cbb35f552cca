use std::{
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::Console;
use crate::virtio::{
    VirtioDevice,
    fake_driver::{F_EVENT_IDX, Heap, PATIENCE, Ring},
};

/// An output that can be full.
#[derive(Clone, Default)]
struct Terminal {
    bytes: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
}

impl Terminal {
    fn text(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl Write for Terminal {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // a few bytes at a time
        let len = data.len().min(1000);
        self.bytes.lock().unwrap().extend(&data[..len]);
        Ok(len)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    heap: Arc<Heap>,
    terminal: Terminal,
    keyboard: Option<UnixStream>,
    device: Console,
    rx: Ring,
    tx: Ring,
}

fn bench(features: u64) -> Bench {
    let heap = Heap::new(4 << 20);
    let terminal = Terminal::default();
    let (keyboard, input) = UnixStream::pair().unwrap();
    let mut device = Console::new("con0", Some(OwnedFd::from(input)), Box::new(terminal.clone()));
    let (rx, tx) = (Ring::new(&heap, 16, features), Ring::new(&heap, 16, features));
    device.start_queue(0, rx.resources(None)).unwrap();
    device.start_queue(1, tx.resources(None)).unwrap();
    Bench { heap, terminal, keyboard: Some(keyboard), device, rx, tx }
}

impl Bench {
    fn type_in(&mut self, text: &[u8]) {
        self.keyboard.as_mut().unwrap().write_all(text).unwrap();
    }
}

#[test]
fn output_arrives_in_order() {
    for features in [0, F_EVENT_IDX] {
        let mut bench = bench(features);
        let mut expected = Vec::new();
        for round in 0..50u8 {
            let text = vec![round; 1 + usize::from(round) * 97];
            let (a, b) = text.split_at(text.len() / 2);
            let (a, b) = (bench.heap.filled(a), bench.heap.filled(b));
            bench.tx.run(&[a, b]);
            expected.extend(text);
        }
        assert!(bench.terminal.text() == expected);
    }
}

#[test]
fn input_waits_for_buffers_and_buffers_for_input() {
    for features in [0, F_EVENT_IDX] {
        let mut bench = bench(features);
        bench.type_in(b"typed before");
        std::thread::sleep(Duration::from_millis(10));
        let buffer = bench.heap.empty(5);
        assert_eq!(bench.rx.run(&[buffer]), 5);
        assert_eq!(bench.heap.bytes(buffer), b"typed");
        let (buffer, next) = (bench.heap.empty(100), bench.heap.empty(100));
        assert_eq!(bench.rx.run(&[buffer]), 7);
        bench.rx.add(&[next]);
        bench.rx.publish();
        assert!(bench.rx.wait_used(Duration::from_millis(20)).is_none());
        bench.type_in(b"after");
        assert_eq!(bench.rx.wait_used(PATIENCE).unwrap().1, 5);
        assert_eq!(bench.heap.bytes(next)[..5], *b"after");
    }
}

#[test]
fn the_end_of_input_is_quiet() {
    let mut bench = bench(0);
    bench.type_in(b"last");
    drop(bench.keyboard.take());
    std::thread::sleep(Duration::from_millis(10));
    let buffer = bench.heap.empty(64);
    assert_eq!(bench.rx.run(&[buffer]), 4);
    bench.rx.add(&[buffer]);
    bench.rx.publish();
    assert!(bench.rx.wait_used(Duration::from_millis(20)).is_none());
    // a thread that spins on the hang-up would use all of this time
    let before = thread_cpu();
    std::thread::sleep(Duration::from_millis(200));
    assert!(thread_cpu() - before < Duration::from_millis(150));
    // the buffer that is left is not lost
    let state = bench.device.stop_queue(0).unwrap();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
}

/// CPU time of the whole process: other tests run beside, so only a bound in one direction is safe.
fn thread_cpu() -> Duration {
    let stat = std::fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        let path = task.ok()?.path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let stat = std::fs::read_to_string(path.join("schedstat")).ok()?;
        let nanos = stat.split(' ').next()?.parse().ok()?;
        (name.trim() == "vireo-con0-rx").then_some(Duration::from_nanos(nanos))
    });
    stat.max().unwrap_or_default()
}

#[test]
fn a_full_terminal_holds_the_guest_back() {
    let mut bench = bench(F_EVENT_IDX);
    bench.terminal.full.store(true, Ordering::Relaxed);
    let text = bench.heap.filled(b"important");
    bench.tx.add(&[text]);
    bench.tx.add(&[text]);
    bench.tx.publish();
    assert!(bench.tx.wait_used(PATIENCE).is_some(), "the device takes some output");
    assert!(bench.tx.wait_used(Duration::from_millis(50)).is_none(), "but not all");
    let started = Instant::now();
    let state = bench.device.stop_queue(1).unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    // pause, snapshot, and a new device: nothing is lost or doubled
    let saved = bench.device.save();
    let mut device = Console::new("con0", None, Box::new(bench.terminal.clone()));
    device.restore(&saved).unwrap();
    bench.terminal.full.store(false, Ordering::Relaxed);
    device.start_queue(1, bench.tx.resources(Some(state))).unwrap();
    bench.tx.add(&[text]);
    bench.tx.publish();
    assert!(bench.tx.wait_used(PATIENCE).is_some() && bench.tx.wait_used(PATIENCE).is_some());
    device.stop_queue(1);
    assert_eq!(bench.terminal.text(), b"importantimportantimportant");
}

#[test]
fn a_new_size_is_told() {
    let mut bench = bench(0);
    let size = bench.device.size();
    size.set(80, 25);
    size.set(80, 25);
    assert_eq!(bench.tx.config_changes.count() + bench.rx.config_changes.count(), 1);
    let mut config = [0; 16];
    bench.device.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bench.device.stop_queue(0);
    bench.device.stop_queue(1);
    size.set(81, 25);
    assert_eq!(bench.tx.config_changes.count() + bench.rx.config_changes.count(), 1);
}

#[test]
fn an_emergency_needs_no_queue() {
    let terminal = Terminal::default();
    let mut device = Console::new("con0", None, Box::new(terminal.clone()));
    for character in b"panic" {
        device.write_config(8, &u32::from(*character).to_le_bytes());
    }
    assert_eq!(terminal.text(), b"panic");
}

#[test]
fn a_file_is_an_input_too() {
    let mut file = tempfile();
    file.write_all(b"from a file").unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let heap = Heap::new(1 << 20);
    let mut device = Console::new("con0", Some(file.into()), Box::new(Terminal::default()));
    let mut rx = Ring::new(&heap, 16, 0);
    device.start_queue(0, rx.resources(None)).unwrap();
    let buffer = heap.empty(64);
    assert_eq!(rx.run(&[buffer]), 11);
    assert_eq!(&heap.bytes(buffer)[..11], b"from a file");
}

fn tempfile() -> std::fs::File {
    // SAFETY: the name is a C string; the descriptor is checked by `from_raw_fd`'s owner below.
    let fd = unsafe { libc::memfd_create(c"console-input".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new and ours.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}

#[test]
fn bad_state_is_refused() {
    let mut device = bench(0).device;
    let saved = device.save();
    device.restore(&saved).unwrap();
    assert!(device.restore(&saved[1..]).is_err());
    let huge = super::saved::SavedConsole { columns: 1, rows: 1, unwritten: vec![0; 1 << 20] };
    assert!(device.restore(&crate::virtio::saved::encode(&huge)).is_err());
}

proptest! {
    #![proptest_config(crate::tests::cases(48))]
    #[test]
    fn garbage_descriptors_do_no_harm(
        raw in prop::collection::vec(any::<[u8; 16]>(), 16),
        heads in prop::collection::vec(any::<u16>(), 1..40),
    ) {
        let mut bench = bench(0);
        bench.type_in(&[b'x'; 1000]);
        for ring in [&mut bench.rx, &mut bench.tx] {
            for (index, raw) in raw.iter().enumerate() {
                let mut raw = *raw;
                raw[3..8].fill(0);
                raw[10..12].fill(0);
                raw[13..16].fill(0);
                ring.scribble(index as u16, raw);
            }
            for head in &heads {
                ring.offer(head % 20);
            }
            ring.publish();
            ring.kick();
        }
        std::thread::sleep(Duration::from_millis(1));
        prop_assert!(bench.device.stop_queue(0).is_some());
        prop_assert!(bench.device.stop_queue(1).is_some());
    }
}

#[test]
fn input_survives_a_pause() {
    let mut bench = bench(0);
    let state = bench.device.stop_queue(0);
    bench.type_in(b"while paused");
    bench.device.start_queue(0, bench.rx.resources(state)).unwrap();
    let buffer = bench.heap.empty(64);
    assert_eq!(bench.rx.run(&[buffer]), 12);
    let mut rest = [0; 1];
    bench.keyboard.as_ref().unwrap().set_nonblocking(true).unwrap();
    assert!(bench.keyboard.as_mut().unwrap().read(&mut rest).is_err(), "nothing comes back");
}
