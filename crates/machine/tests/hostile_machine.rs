//! Guests that abuse devices: whole machines on the software engine whose guest writes rubbish into every register
//! and ring it can reach, for ever. The run ends when it is told to, no thread of ours panics, and the process has
//! no more threads, descriptors and memory afterwards than before.
//!
//! `VIREO_HOSTILE_SEED` (default 1) chooses other guests, `VIREO_HOSTILE_CASES` how many.

mod support;

use std::{
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use support::{elf_kernel, write};
use vireo_api::ByteSize;
use vireo_machine::{
    Control, Outcome,
    config::{Accel, BootConfig, ConsoleConfig, DiskConfig, MachineConfig, NicConfig, Stream, VsockConfig},
    run,
};

const CASES: u64 = 40;
/// How long a guest is let loose.
const LOOSE: Duration = Duration::from_millis(120);
/// How long a run may take to end. It takes milliseconds; the rest is for hosts that do other things too.
const MOST_TO_STOP: Duration = Duration::from_secs(10);
const MOST_GROWTH_KB: u64 = 100 << 10;

const RAM: u64 = 16 << 20;
const ECAM: u64 = 0xe000_0000;
const BARS: u64 = 0xc000_0000;
const BAR_BYTES: u64 = 0x8000;
/// Rings and buffers, in RAM.
const RINGS: u64 = 0x20_0000;
const RING_BYTES: u64 = 0x8000;
const RING_COUNT: u64 = 24;
/// The guest's code begins here, and the kernel's file with it.
const LOAD: u64 = 0x10_0000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A guest-physical address: in RAM, at its edges, in devices, or nowhere.
    fn address(&mut self) -> u64 {
        match self.below(10) {
            0 => self.next(),
            1 => RAM - self.below(64),
            2 => self.pick(&[0, 0xc000_0000, 0xfec0_0000, 0xfee0_0000, 1 << 32, 1 << 46, u64::MAX - 8]),
            _ => RINGS + self.below(RAM - RINGS),
        }
    }
}

/// Machine code that touches devices.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn address(&mut self, at: u64) {
        self.0.extend([0x48, 0xbf]);
        self.0.extend(at.to_le_bytes());
    }

    /// A store of 1, 2, 4 or 8 bytes.
    fn store(&mut self, at: u64, value: u64, bytes: u64) {
        self.address(at);
        self.0.extend([0x48, 0xb8]);
        self.0.extend(value.to_le_bytes());
        self.0.extend(match bytes {
            1 => &[0x88, 0x07][..],
            2 => &[0x66, 0x89, 0x07],
            4 => &[0x89, 0x07],
            _ => &[0x48, 0x89, 0x07],
        });
    }

    fn load(&mut self, at: u64, bytes: u64) {
        self.address(at);
        self.0.extend(match bytes {
            1 => &[0x8a, 0x07][..],
            2 => &[0x66, 0x8b, 0x07],
            4 => &[0x8b, 0x07],
            _ => &[0x48, 0x8b, 0x07],
        });
    }

    /// `rep stosb`, `stosd` or their like: one store after the other.
    fn fill(&mut self, at: u64, value: u64, count: u32, opcode: u8) {
        self.store(RINGS, value, 8);
        self.address(at);
        self.0.push(0xb9);
        self.0.extend(count.to_le_bytes());
        self.0.extend([0xf3, opcode]);
    }

    fn port(&mut self, port: u16, value: u32, opcode: &[u8]) {
        self.0.extend([0x66, 0xba]);
        self.0.extend(port.to_le_bytes());
        self.0.push(0xb8);
        self.0.extend(value.to_le_bytes());
        self.0.extend(opcode);
    }
}

fn bar(slot: u64) -> u64 {
    BARS + slot * BAR_BYTES
}

fn ring(slot: u64, queue: u64) -> u64 {
    RINGS + (slot * 5 + queue) % RING_COUNT * RING_BYTES
}

/// Virtio's way from reset to `DRIVER_OK`, with slips.
fn start_device(random: &mut Random, code: &mut Code, slot: u64) {
    let base = bar(slot);
    code.store(ECAM | slot << 15 | 0x10, base, 4);
    code.store(ECAM | slot << 15 | 4, 6, 2);
    code.store(base + 20, 0, 1);
    if random.chance(70) {
        for vector in 0..4 {
            let address = if random.chance(80) { 0xfee0_0000 | random.below(0x1000) << 4 } else { random.next() };
            let data = random.next() & if random.chance(90) { 0xc0ff } else { 0xffff_ffff };
            code.store(base + 0x4000 + vector * 16, address, 8);
            code.store(base + 0x4008 + vector * 16, data, 8);
        }
        // MSI-X control: the capability is the first one.
        code.store(ECAM | slot << 15 | 0x42, 0x8000, 2);
    }
    code.store(base + 20, 3, 1);
    for (select, features) in [(0, random.next() as u32), (1, 1 | random.next() as u32 & 0xff)] {
        let wanted = if random.chance(50) { u32::MAX } else { features };
        code.store(base + 8, select, 4);
        code.store(base + 12, u64::from(wanted & if random.chance(30) { 0x3100_0000 } else { u32::MAX }), 4);
    }
    if random.chance(80) {
        // Exactly what every device here has.
        code.store(base + 8, 0, 4);
        code.store(base + 12, 0x3000_0000, 4);
        code.store(base + 8, 1, 4);
        code.store(base + 12, 1, 4);
    }
    code.store(base + 20, 11, 1);
    for queue in 0..4 {
        let at = ring(slot, queue);
        let size = random.pick(&[4u64, 16, 64, 64, 64, 256, 512, 0, 3, 32768]);
        code.store(base + 22, queue, 2);
        code.store(base + 24, size, 2);
        code.store(base + 26, random.pick(&[0, 1, 2, 0xffff, 77]), 2);
        for (offset, part) in [(32, 0), (40, 0x2000), (48, 0x4000)] {
            let address = if random.chance(95) { at + part } else { random.address() };
            code.store(base + offset, address, 8);
            code.store(base + offset + 4, address >> 32, 4);
            code.store(base + offset, address, 4);
        }
        code.store(base + 28, 1, 2);
    }
    code.store(base + 20, 15, 1);
    for queue in 0..4 {
        code.store(base + 0x3000 + queue * 4, queue, 2);
    }
}

/// Anything to any device.
fn disturb(random: &mut Random, code: &mut Code) {
    let slot = 1 + random.below(7);
    let base = bar(slot);
    let bytes = random.pick(&[1, 2, 4, 8]);
    match random.below(16) {
        0 => code.store(base + random.below(BAR_BYTES), random.next(), bytes),
        1 => code.load(base + random.below(BAR_BYTES), bytes),
        2 => code.store(base + random.below(64), random.next(), bytes),
        3 => code.store(base + 0x2000 + random.below(80), random.next(), bytes),
        4 => code.store(base + 0x4000 + random.below(128), random.next(), bytes),
        5 | 6 => {
            // More in the ring, as much as it holds or more than that.
            let queue = random.below(4);
            let avail = ring(slot, queue) + 0x2000;
            code.store(avail + 2, random.pick(&[1, 3, 8, 60, 0x8000, 0xffff]), 2);
            code.store(base + 0x3000 + queue * 4, queue, 2);
        }
        7 => code.fill(base + 0x3000, random.next(), 64 + random.below(2000) as u32, random.pick(&[0xaa, 0xab])),
        8 => {
            // A BAR over RAM, ECAM, the IOAPIC, another BAR, or back where it was.
            let places = [0, RAM - 0x8000, ECAM, 0xfec0_0000, 0xfee0_0000, bar(1), 0xdfff_8000, 0xffff_ffff, base];
            code.store(ECAM | slot << 15 | 0x10, random.pick(&places), 4);
            code.store(bar(1) + 20, random.next(), 1);
            code.store(ECAM | slot << 15 | 0x10, base, 4);
        }
        9 => code.store(ECAM | slot << 15 | random.below(0x100), random.next(), bytes),
        10 => code.load(ECAM + random.below(1 << 20), bytes),
        11 => {
            code.store(0xfec0_0000, 0x10 + random.below(0x32), 4);
            code.store(0xfec0_0010, random.next() & random.pick(&[0xa8ff, 0x1_a8ff, 0xffff_ffff]), 4);
        }
        12 => {
            let port = random.pick(&[0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x70, 0x71, 0x71, 0xcf8, 0xcfc, 0xcfe, 0x505]);
            code.port(
                port,
                random.next() as u32,
                random.pick(&[&[0xee][..], &[0x66, 0xef], &[0xef], &[0xec], &[0xed]]),
            );
        }
        13 => {
            // The window into the BAR in configuration space, also onto itself.
            let at = ECAM | slot << 15;
            code.store(at + 0x60 + random.below(0x60), random.next() & 0x7fff, 4);
            code.load(at + 0x60 + random.below(0x60), 4);
        }
        14 => code.store(0xfee0_0000 + random.below(0x40) * 16, random.next() & random.pick(&[0xff, 0xc_08ff]), 4),
        // A reset in the middle of it all.
        _ => code.store(base + 20, random.pick(&[0, 0, 15, 0x80]), 1),
    }
    if random.chance(1) && random.chance(10) {
        code.port(random.pick(&[0x600, 0x604, 0xcf9, 0x64]), random.next() as u32, &[0xee]);
    }
}

/// Descriptor tables and available rings: chains of devices' requests, loops, tables within themselves, wild buffers.
fn fill_ring(random: &mut Random, at: u64, ring: &mut [u8]) {
    for i in 0..512usize {
        let (mut gpa, mut len) = (RINGS + random.below(RAM - RINGS), random.pick(&[16u64, 1, 44, 512, 4096, 70_000]));
        let mut flags = random.below(4);
        match random.below(20) {
            0 => gpa = random.address(),
            1 => len = random.next() & 0xffff_ffff,
            2 => (gpa, len, flags) = (at, 16 * random.pick(&[1, 4, 512, 0x1000]), 4),
            3 => flags = random.below(8),
            4 => (gpa, len) = (LOAD, RAM - LOAD),
            _ => {}
        }
        let next = if random.chance(80) { (i as u64 + 1) % 16 } else { random.next() & 0xffff };
        let raw = u128::from(gpa) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        ring[i * 16..][..16].copy_from_slice(&raw.to_le_bytes());
    }
    for i in 0..515usize {
        let value = match i {
            0 => random.below(2),
            1 => random.pick(&[1, 2, 4, 16, 60]),
            _ if random.chance(98) => random.below(16),
            _ => random.next() & 0xffff,
        };
        ring[0x2000 + i * 2..][..2].copy_from_slice(&(value as u16).to_le_bytes());
    }
}

fn guest(random: &mut Random) -> Vec<u8> {
    let mut code = Code::default();
    code.0.push(0xfa); // cli
    for slot in 1..=7 {
        start_device(random, &mut code, slot);
    }
    for _ in 0..300 {
        if random.chance(6) {
            let slot = 1 + random.below(7);
            start_device(random, &mut code, slot);
        } else {
            disturb(random, &mut code);
        }
    }
    let back = -(code.0.len() as i32 + 5);
    code.0.push(0xe9);
    code.0.extend(back.to_le_bytes());
    let mut image = code.0;
    assert!((image.len() as u64) < RINGS - LOAD);
    image.resize((RINGS - LOAD + RING_COUNT * RING_BYTES) as usize, 0);
    for i in 0..RING_COUNT {
        let at = RINGS + i * RING_BYTES;
        fill_ring(random, at, &mut image[(at - LOAD) as usize..][..RING_BYTES as usize]);
    }
    // Requests for the disk and packets for vsock where buffers are.
    for _ in 0..2000 {
        let at = (RINGS - LOAD + random.below(RING_COUNT * RING_BYTES - 64)) as usize;
        if image[at] == 0 {
            let header = random.below(14) | random.next() << 32;
            image[at..at + 8].copy_from_slice(&header.to_le_bytes());
        }
    }
    image
}

fn machine(folder: &Path, image: &[u8], vcpus: u32) -> MachineConfig {
    let kernel = write(folder, "kernel", &elf_kernel(image));
    let disk = folder.join("disk");
    fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let boot = BootConfig { kernel, initrd: None, cmdline: String::new(), decompressor: None };
    let sink = || Stream::new(None, io::sink());
    MachineConfig {
        vcpus,
        accel: Accel::Soft,
        memory: ByteSize(RAM),
        serial: Some(sink()),
        console: Some(ConsoleConfig { stream: sink(), size: Some((80, 25)) }),
        vsock: Some(VsockConfig { guest_cid: 3 }),
        nics: vec![NicConfig::parse("user").unwrap().unwrap()],
        disks: vec![DiskConfig::new(&disk)],
        reboot: false,
        ..MachineConfig::new(boot)
    }
}

/// Threads, descriptors, and KiB of memory of this process.
fn resources() -> (usize, usize, u64) {
    let count = |folder: &str| fs::read_dir(folder).unwrap().count();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    (count("/proc/self/task"), count("/proc/self/fd"), line.trim().trim_end_matches(" kB").parse().unwrap())
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn guests_that_abuse_devices_are_stopped_and_leave_nothing_behind() {
    // A device's thread that panics would only be missed by its guest.
    let panics = Arc::new(AtomicUsize::new(0));
    let (counted, report) = (panics.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        counted.fetch_add(1, Ordering::SeqCst);
        report(info);
    }));
    let (seed, cases) = (number("VIREO_HOSTILE_SEED", 1), number("VIREO_HOSTILE_CASES", CASES));
    let first = number("VIREO_HOSTILE_FIRST", 0);
    let (mut before, mut slowest) = (None, Duration::ZERO);
    let ends = Mutex::new(std::collections::BTreeMap::<String, u32>::new());
    for case in first..first + cases {
        let mut random = Random(seed << 32 ^ case);
        let folder = tempfile::tempdir().unwrap();
        let vcpus = random.pick(&[1, 1, 2]);
        let config = machine(folder.path(), &guest(&mut random), vcpus);
        let control = Control::default();
        let (tell, ended) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let report = run(&config, &control, |_| {}).unwrap();
                let end = match report.outcome {
                    Outcome::Crash(info) => format!("crash: {}", info.reason),
                    other => format!("{other:?}"),
                };
                *ends.lock().unwrap().entry(end).or_default() += 1;
                let _ = tell.send(());
            });
            thread::sleep(LOOSE);
            let stopped = Instant::now();
            control.stop();
            if ended.recv_timeout(MOST_TO_STOP).is_err() {
                eprintln!("case {case} of seed {seed} does not end");
                std::process::abort();
            }
            slowest = slowest.max(stopped.elapsed());
        });
        assert_eq!(panics.load(Ordering::SeqCst), 0, "case {case} of seed {seed}");
        // What the process keeps for good it has after the first; the last thread may still be on its way out.
        let settled = Instant::now() + Duration::from_secs(5);
        let mut now = resources();
        let first = *before.get_or_insert(now);
        while (now.0 > first.0 || now.1 > first.1) && Instant::now() < settled {
            thread::sleep(Duration::from_millis(5));
            now = resources();
        }
        assert!(now.0 <= first.0, "{} threads after case {case} of seed {seed}", now.0);
        assert!(now.1 <= first.1, "{} descriptors after case {case} of seed {seed}", now.1);
        assert!(now.2 < first.2 + MOST_GROWTH_KB, "{} KiB after case {case} of seed {seed}", now.2);
    }
    println!(
        "{cases} guests, the slowest took {slowest:?} to stop, memory {before:?} then {:?}: {ends:#?}",
        resources()
    );
}
