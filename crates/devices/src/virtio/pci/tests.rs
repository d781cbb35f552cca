use minicbor::{Decode, Encode};
use vireo_cpu::Bus;

use super::*;
use crate::{
    bus::DeviceBus,
    conformance::{self, Op, Subject},
    fake_engine::FakeEngine,
    pci::{PciRoot, Windows},
    virtio::{Queue, QueueState},
};

const MMIO32: std::ops::Range<u64> = 0xc000_0000..0xc010_0000;
const ECAM: u64 = 0xe000_0000;
const RAM: u64 = 0x2000;
const QUEUE_SIZES: [u16; 2] = [8, 4];
const FEATURE: u64 = 1 << 5;
/// Rings of queue 0 and of queue 1, then data.
const RINGS: [u64; 2] = [0x0, 0x400];
const DATA: u64 = 0x800;

type Running = Arc<Mutex<[Option<(Queue, QueueResources)>; 2]>>;

/// Answers each request with its own bytes, when told to serve; its config space is four bytes.
struct Echo {
    running: Running,
    config: [u8; 4],
}

#[derive(Encode, Decode)]
struct SavedEcho(#[n(0)] [u8; 4]);

impl VirtioDevice for Echo {
    fn device_type(&self) -> u16 {
        4
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            if let Some(byte) = self.config.get_mut(offset as usize + i) {
                *byte = *value;
            }
        }
    }
    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), VirtioError> {
        let queue = Queue::new(&resources)?;
        let before = self.running.lock().unwrap()[index].replace((queue, resources));
        assert!(before.is_none(), "started twice");
        Ok(())
    }
    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        Some(self.running.lock().unwrap()[index].take()?.0.state())
    }
    fn reset(&mut self) {
        assert!(self.running.lock().unwrap().iter().all(Option::is_none), "reset while a queue runs");
        self.config = [1, 2, 3, 4];
    }
    fn save(&self) -> Vec<u8> {
        crate::saved::encode(&SavedEcho(self.config))
    }
    fn restore(&mut self, saved: &[u8]) -> Result<(), VirtioError> {
        let bad = |error: BadState| VirtioError::BadState { device: "echo", why: error.to_string() };
        self.config = crate::saved::decode::<SavedEcho>("echo", saved).map_err(bad)?.0;
        Ok(())
    }
}

struct Rig {
    engine: Arc<FakeEngine>,
    memory: GuestMemory,
    running: Running,
    function: Arc<VirtioPci>,
    bus: DeviceBus,
}

impl Rig {
    fn new() -> Self {
        Self::with_engine(FakeEngine::new())
    }

    fn with_engine(engine: Arc<FakeEngine>) -> Self {
        let memory = GuestMemory::new(RAM, RAM).unwrap();
        let running = Running::default();
        let echo = Box::new(Echo { running: running.clone(), config: [1, 2, 3, 4] });
        let function = VirtioPci::new(echo, memory.clone(), engine.clone()).unwrap();
        Self::plug(engine, memory, running, function, false)
    }

    fn plug(
        engine: Arc<FakeEngine>,
        memory: GuestMemory,
        running: Running,
        function: Arc<VirtioPci>,
        restored: bool,
    ) -> Self {
        let root = Arc::new(PciRoot::new(Windows { mmio32: MMIO32, mmio64: 0..0 }));
        let add = if restored { PciRoot::add_restored } else { PciRoot::add };
        add(&root, 0, function.clone()).unwrap();
        let mut bus = DeviceBus::default();
        root.attach(&mut bus, ECAM..ECAM + 0x10_0000).unwrap();
        Self { engine, memory, running, function, bus }
    }

    fn restore(saved: SavedVirtioPci, memory: GuestMemory) -> Result<Self, String> {
        let (engine, running) = (FakeEngine::new(), Running::default());
        let echo = Box::new(Echo { running: running.clone(), config: [0; 4] });
        let function = VirtioPci::restore(echo, memory.clone(), engine.clone(), saved).map_err(|e| e.to_string())?;
        let rig = Self::plug(engine, memory, running, function, true);
        rig.function.resume();
        Ok(rig)
    }

    fn get(&self, gpa: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.mmio_read(gpa, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn put(&self, gpa: u64, len: usize, value: u64) {
        self.bus.mmio_write(gpa, &value.to_le_bytes()[..len]);
    }

    fn config(&self, register: u64) -> u32 {
        self.get(ECAM + register, 4) as u32
    }

    /// Address of a structure, as drivers find it: the BAR and the capability.
    fn structure(&self, cfg_type: u8) -> u64 {
        let mut at = u64::from(self.config(0x34) as u8);
        while at != 0 {
            let head = self.config(at).to_le_bytes();
            if head[0] == 9 && head[3] == cfg_type {
                return u64::from(self.config(0x10) & !15) + u64::from(self.config(at + 8));
            }
            at = u64::from(head[1]);
        }
        panic!("no capability of type {cfg_type}");
    }

    fn capability(&self, id: u8) -> u64 {
        let mut at = u64::from(self.config(0x34) as u8);
        while self.config(at) as u8 != id {
            at = u64::from((self.config(at) >> 8) as u8);
            assert_ne!(at, 0);
        }
        at
    }

    fn common(&self) -> u64 {
        self.structure(1)
    }

    fn status(&self) -> u64 {
        self.get(self.common() + 20, 1)
    }

    fn set_status(&self, status: u64) {
        self.put(self.common() + 20, 1, status);
    }

    fn negotiate(&self, wanted: u64) -> bool {
        let common = self.common();
        self.set_status(0);
        self.set_status(1 | 2);
        for half in 0..2 {
            self.put(common + 8, 4, half);
            self.put(common + 12, 4, wanted >> (32 * half) & 0xffff_ffff);
        }
        self.set_status(1 | 2 | 8);
        self.status() & 8 != 0
    }

    /// Sets vectors and rings of a queue and enables it.
    fn enable_queue(&self, index: u64, rings: u64) {
        let common = self.common();
        let size = u64::from(QUEUE_SIZES[index as usize]);
        self.put(common + 22, 2, index);
        self.put(common + 26, 2, index + 1);
        for (register, value) in [(32, rings), (40, rings + 16 * size), (48, (rings + 18 * size + 6) & !3)] {
            self.put(common + register, 4, value & 0xffff_ffff);
            self.put(common + register + 4, 4, value >> 32);
        }
        self.put(common + 28, 2, 1);
    }

    /// All that a driver does before it uses the device.
    fn drive(&self, rings: [u64; 2]) {
        self.put(ECAM + 4, 2, 6);
        let table = u64::from(self.config(0x10) & !15) + u64::from(self.config(self.capability(0x11) + 4) & !7);
        for vector in 0..3 {
            self.put(table + 16 * vector, 8, 0xfee0_0000);
            self.put(table + 16 * vector + 8, 8, 0x40 + vector);
        }
        self.put(ECAM + self.capability(0x11) + 2, 2, 0x8000);
        assert!(self.negotiate(FEATURE | features::TRANSPORT));
        self.put(self.common() + 16, 2, 0);
        self.enable_queue(0, rings[0]);
        self.enable_queue(1, rings[1]);
        self.set_status(1 | 2 | 4 | 8);
    }

    /// One request of 4 bytes in and out on queue 0.
    fn request(&self, number: u16) {
        let avail = RINGS[0] + 16 * 8;
        self.memory.write(DATA, &[number as u8; 4]).unwrap();
        let raw = |gpa: u64, flags: u128, next: u128| u128::from(gpa) | 4 << 64 | flags << 96 | next << 112;
        self.memory.write_pod(RINGS[0], raw(DATA, 1, 1)).unwrap();
        self.memory.write_pod(RINGS[0] + 16, raw(DATA + 8, 2, 0)).unwrap();
        self.memory.write_pod(avail + 4 + 2 * u64::from(number % 8), 0u16).unwrap();
        self.memory.write_pod(avail + 2, number + 1).unwrap();
        self.memory.write_pod(avail + 4 + 16, number).unwrap();
        self.put(self.structure(2), 2, 0);
    }

    fn answer(&self) -> [u8; 4] {
        self.memory.read_pod(DATA + 8).unwrap()
    }

    /// What the queues' threads would do.
    fn serve(&self) {
        let mut running = self.running.lock().unwrap();
        for slot in running.iter_mut() {
            let Some((queue, resources)) = slot else { continue };
            if resources.kick.read().is_ok() && Self::drain(queue, resources).is_err() {
                (resources.broken)();
            }
        }
    }

    fn drain(queue: &mut Queue, resources: &QueueResources) -> Result<(), crate::virtio::QueueError> {
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else { break };
            let mut data = [0; 64];
            let len = chain.reader().read(&mut data);
            let written = chain.writer().write(&data[..len]);
            queue.push(chain, written as u32)?;
        }
        if queue.needs_interrupt()? {
            (resources.interrupt)();
        }
        Ok(())
    }

    fn vectors(&self) -> Vec<u32> {
        self.engine.take_sent().iter().map(|message| message.data).collect()
    }
}

#[test]
fn a_driver_finds_and_uses_the_device() {
    let rig = Rig::new();
    assert_eq!(rig.config(0), 0x1044_1af4);
    rig.drive(RINGS);
    assert_eq!(rig.status(), 15);
    assert_eq!(rig.get(rig.common() + 18, 2), 2);
    assert_eq!(rig.get(rig.structure(4), 4), 0x0403_0201);
    assert!(rig.running.lock().unwrap().iter().all(Option::is_some));
    for number in 0..20 {
        rig.request(number);
        rig.serve();
        assert_eq!(rig.answer(), [number as u8; 4]);
        assert_eq!(rig.vectors(), [0x41]);
    }
    assert_eq!((rig.get(rig.structure(3), 1), rig.get(rig.structure(3), 1)), (1, 0), "reading the ISR clears it");
    rig.set_status(0);
    assert_eq!(rig.status(), 0);
    assert!(rig.running.lock().unwrap().iter().all(Option::is_none));
    assert_eq!(rig.get(rig.common() + 26, 2), 0xffff);
    rig.drive(RINGS);
    assert_eq!(rig.running.lock().unwrap()[0].as_ref().unwrap().0.state(), QueueState::default());
}

#[test]
fn features_must_be_offered_and_modern() {
    let rig = Rig::new();
    rig.put(ECAM + 4, 2, 6);
    let offered = [0, 1].map(|half| {
        rig.put(rig.common(), 4, half);
        rig.get(rig.common() + 4, 4)
    });
    assert_eq!(offered[0] | offered[1] << 32, FEATURE | features::TRANSPORT);
    assert!(rig.negotiate(features::VERSION_1 | FEATURE));
    assert!(!rig.negotiate(FEATURE));
    assert!(!rig.negotiate(features::VERSION_1 | 1 << 6));
    // no start without agreement
    rig.enable_queue(0, 0);
    rig.set_status(15);
    assert_eq!(rig.status() & 12, 0);
    assert!(rig.running.lock().unwrap()[0].is_none());
    assert!(rig.negotiate(features::VERSION_1));
    rig.put(rig.common() + 12, 4, 0xff);
    assert_eq!(rig.function.lock().registers.driver_features, features::VERSION_1, "fixed by FEATURES_OK");
}

#[test]
fn broken_queues_ask_for_a_reset() {
    let rig = Rig::new();
    rig.drive(RINGS);
    assert_eq!(rig.vectors(), []);
    let generation = rig.get(rig.common() + 21, 1);
    rig.memory.write_pod(RINGS[0] + 16 * 8 + 2, 99u16).unwrap();
    rig.put(rig.structure(2), 2, 0);
    rig.serve();
    assert_eq!(rig.status(), 15 | 64);
    assert_eq!(rig.vectors(), [0x40]);
    assert_ne!(rig.get(rig.common() + 21, 1), generation);
    assert_eq!(rig.get(rig.structure(3), 1), 2);
    // rings outside of memory: the same
    rig.drive([RAM, RAM]);
    assert_eq!(rig.status(), 15 | 64);
    rig.set_status(0);
    assert_eq!(rig.status(), 0);
}

#[test]
fn one_queue_is_reset_alone() {
    let rig = Rig::new();
    rig.drive(RINGS);
    rig.request(0);
    rig.serve();
    rig.put(rig.common() + 22, 2, 0);
    rig.put(rig.common() + 58, 2, 1);
    assert_eq!((rig.get(rig.common() + 58, 2), rig.get(rig.common() + 28, 2)), (0, 0));
    let started = || rig.running.lock().unwrap().iter().map(Option::is_some).collect::<Vec<_>>();
    assert_eq!(started(), [false, true]);
    rig.put(rig.common() + 24, 2, 4);
    rig.put(rig.common() + 24, 2, 3);
    rig.put(rig.common() + 24, 2, 16);
    assert_eq!(rig.get(rig.common() + 24, 2), 4, "a smaller power of two, nothing else");
    rig.enable_queue(0, 0x1000);
    assert_eq!(started(), [true, true]);
}

#[test]
fn short_cuts_follow_the_bar() {
    let engine = Arc::new(FakeEngine { short_cuts: true, ..FakeEngine::default() });
    let rig = Rig::with_engine(engine.clone());
    let places = || engine.ioeventfds.lock().unwrap().clone();
    assert_eq!(places(), []);
    rig.put(ECAM + 4, 2, 2);
    assert_eq!(places(), [(0xc000_3000, 2), (0xc000_3004, 2)]);
    rig.put(ECAM + 0x10, 4, 0xc008_0000);
    assert_eq!(places(), [(0xc008_3000, 2), (0xc008_3004, 2)]);
    drop(rig);
    assert_eq!(places(), []);
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let rig = Rig::new();
    rig.put(ECAM + 4, 2, 2);
    let mut at = u64::from(rig.config(0x34) as u8);
    while rig.config(at).to_le_bytes()[3] != 5 {
        at = u64::from(rig.config(at).to_le_bytes()[1]);
    }
    let point = |offset: u64, len: u64| {
        rig.put(ECAM + at + 4, 1, 0);
        rig.put(ECAM + at + 8, 4, offset);
        rig.put(ECAM + at + 12, 4, len);
    };
    point(0x2000, 4);
    assert_eq!(rig.config(at + 16), 0x0403_0201);
    rig.put(ECAM + at + 16, 4, 0x0807_0605);
    assert_eq!(rig.get(rig.structure(4), 4), 0x0807_0605);
    point(0x14, 1);
    rig.put(ECAM + at + 16, 1, 1);
    assert_eq!(rig.status(), 1);
    for (offset, len) in [(0x8000, 4), (u64::MAX, 4), (0, 3), (0, u64::MAX)] {
        point(offset, len);
        rig.config(at + 16);
        rig.put(ECAM + at + 16, 4, 1);
    }
}

#[test]
fn a_restored_device_goes_on_with_its_requests() {
    let rig = Rig::new();
    rig.drive(RINGS);
    rig.request(0);
    rig.serve();
    // asked for, not yet served, and never notified again
    rig.request(1);
    rig.function.pause();
    assert!(rig.running.lock().unwrap().iter().all(Option::is_none));
    let saved = rig.function.save();
    let twin = Rig::restore(saved.clone(), rig.memory.clone()).unwrap();
    twin.serve();
    assert_eq!(twin.answer(), [1; 4]);
    assert_eq!(twin.vectors(), [0x41]);
    twin.request(2);
    twin.serve();
    assert_eq!(twin.answer(), [2; 4]);

    let refused: [fn(&mut SavedVirtioPci); 8] = [
        |s| s.device_type = 1,
        |s| _ = s.queues.pop(),
        |s| s.driver_features |= 1 << 60,
        |s| s.queues[0].size = 7,
        |s| s.queues[0].vector = 3,
        |s| s.config[0] ^= 1,
        |s| s.msix.control = 0,
        |s| s.device.clear(),
    ];
    for change in refused {
        let mut saved = saved.clone();
        change(&mut saved);
        assert!(Rig::restore(saved, rig.memory.clone()).is_err());
    }
}

#[derive(Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
struct SavedRig {
    #[n(0)]
    function: SavedVirtioPci,
    #[cbor(n(1), with = "minicbor::bytes")]
    memory: Vec<u8>,
}

impl Subject for Rig {
    type Saved = SavedRig;

    fn fresh() -> Self {
        Self::new()
    }

    fn poke(&self, op: Op) -> Vec<u8> {
        let read = |at, data: &mut [u8]| self.bus.mmio_read(at, data);
        let write = |at, data: &[u8]| self.bus.mmio_write(at, data);
        let bar = self.function.bars()[0].address;
        let at = |start: u64, len: u64| Op { address: start.wrapping_add(op.address % len), ..op };
        let mut seen = match op.kind % 24 / 2 {
            0 | 1 => at(bar, 0x40).access(read, write),
            2 => at(bar.wrapping_add(0x1000), 0x1010).access(read, write),
            3 => at(bar.wrapping_add(0x3000), 8).access(read, write),
            4 => at(bar.wrapping_add(0x4000), 0x30).access(read, write),
            5 => at(bar, 0x8008).access(read, write),
            6 => at(ECAM, 0x100).access(read, write),
            7 => at(ECAM + 0x40, 0x80).access(read, write),
            // the guest writes memory
            8 | 9 => {
                let _ = self.memory.write(op.address % RAM, &op.bytes());
                vec![]
            }
            10 => {
                self.put(ECAM + 0x10, 4, MMIO32.start);
                self.put(ECAM + 4, 2, 6);
                self.drive([op.address, op.value].map(|at| (at % (2 * RAM)) & !3));
                vec![]
            }
            _ => {
                self.function.pause();
                self.function.resume();
                vec![]
            }
        };
        self.serve();
        seen.extend(self.vectors().iter().flat_map(|vector| vector.to_le_bytes()));
        seen
    }

    fn save(&self) -> SavedRig {
        let mut memory = vec![0; RAM as usize];
        self.memory.read(0, &mut memory).unwrap();
        SavedRig { function: self.function.save(), memory }
    }

    fn restored(saved: SavedRig) -> Result<Self, String> {
        let memory = GuestMemory::new(RAM, RAM).unwrap();
        memory.write(0, &saved.memory).map_err(|error| error.to_string())?;
        Self::restore(saved.function, memory)
    }
}

#[test]
fn conformance() {
    conformance::check::<Rig>();
}
