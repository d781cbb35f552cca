//! The chipset as a whole under a guest that does anything, anywhere.

use std::sync::Arc;

use proptest::prelude::*;
use vireo_cpu::{Bus, Engine};
use vireo_memory::GuestMemory;

use crate::{
    bus::DeviceBus,
    fake_engine::FakeEngine,
    interrupt::InterruptLine,
    ioapic::{self, Ioapic},
    pci::{ConfigPorts, HostBridge, PciRoot, Windows},
    power::{KeyboardReset, PanicPort, PowerCallback, ResetPort, SleepPorts},
    rtc::Rtc,
    serial::Serial,
    virtio::{VirtioDevice, pci::VirtioPci, rng::Rng},
};

const RAM: u64 = 1 << 16;
const IOAPIC: u64 = 0xfec0_0000;
const ECAM: u64 = 0xe000_0000;
const MMIO32: u64 = 0xc000_0000;
const MMIO64: u64 = 0x80_0000_0000;

struct Chipset {
    bus: DeviceBus,
    memory: GuestMemory,
}

fn chipset() -> Chipset {
    let engine: Arc<dyn Engine> = FakeEngine::new();
    let memory = GuestMemory::new(RAM, RAM).unwrap();
    let power: PowerCallback = Arc::new(|_| ());
    let mut bus = DeviceBus::default();
    let ioapic = Arc::new(Ioapic::new(&*engine).unwrap());
    bus.add_mmio(IOAPIC, ioapic::MMIO_BYTES, ioapic.clone()).unwrap();
    bus.set_eoi(ioapic.clone());
    let serial = Serial::new(InterruptLine::new(ioapic.clone(), 4), Some(Box::new(std::io::sink()))).unwrap();
    bus.add_ports(0x3f8..=0x3ff, Arc::new(serial)).unwrap();
    bus.add_ports(0x70..=0x71, Arc::new(Rtc::new(InterruptLine::new(ioapic, 8)))).unwrap();
    bus.add_ports(0x600..=0x601, Arc::new(SleepPorts::new(5, power.clone()))).unwrap();
    bus.add_ports(0x604..=0x604, Arc::new(ResetPort::new(1, power.clone()))).unwrap();
    bus.add_ports(0x64..=0x64, Arc::new(KeyboardReset::new(power.clone()))).unwrap();
    bus.add_ports(0x505..=0x505, Arc::new(PanicPort::new(power.clone()))).unwrap();
    let windows = Windows { mmio32: MMIO32..MMIO32 + (1 << 29), mmio64: MMIO64..MMIO64 + (1 << 36) };
    let root = Arc::new(PciRoot::new(windows));
    root.attach(&mut bus, ECAM..ECAM + (1 << 20)).unwrap();
    root.add(0, Arc::new(HostBridge::default())).unwrap();
    for _ in 0..2 {
        let device: Box<dyn VirtioDevice> = Box::new(Rng::new("rng"));
        let function = VirtioPci::new(device, memory.clone(), engine.clone()).unwrap();
        root.add(root.free_slot().unwrap(), function).unwrap();
    }
    bus.add_ports(0xcf8..=0xcff, Arc::new(ConfigPorts::new(root, power))).unwrap();
    Chipset { bus, memory }
}

fn ports() -> impl Strategy<Value = u64> {
    const FIRST: [u64; 8] = [0x3f6, 0x6f, 0x600, 0x603, 0x64, 0x505, 0xcf6, 0xfffc];
    prop_oneof![8 => (0..FIRST.len(), 0..12u64).prop_map(|(i, n)| FIRST[i] + n), 1 => 0..0x1_0000u64]
}

fn addresses() -> impl Strategy<Value = u64> {
    const FIRST: [(u64, u64); 10] = [
        (IOAPIC, 0x50),
        (ECAM, 0x100),
        (ECAM + 0x8000, 0x100),
        (ECAM + 0x1_0000, 0x100),
        (ECAM, 1 << 20),
        (MMIO32, 0x40),
        (MMIO32, 0x8000),
        (MMIO32 + 0x8000, 0x8008),
        (MMIO64, 0x1000),
        (0, RAM),
    ];
    prop_oneof![
        12 => (0..FIRST.len(), any::<u64>()).prop_map(|(i, n)| FIRST[i].0 + n % FIRST[i].1),
        1 => any::<u64>(),
    ]
}

#[derive(Clone, Debug)]
enum Access {
    Port {
        port: u64,
        size: usize,
        write: bool,
        value: u64,
    },
    Memory {
        gpa: u64,
        size: usize,
        write: bool,
        value: u64,
    },
    Eoi(u8),
    /// The guest writes its own RAM, where rings may be.
    Ram {
        gpa: u64,
        value: u64,
    },
    /// A driver begins: memory space on, features agreed, a queue in RAM enabled, DRIVER_OK, a notification.
    Drive {
        rings: u64,
    },
}

fn access() -> impl Strategy<Value = Access> {
    let size = || prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let value = || prop_oneof![0..0x100u64, any::<u64>(), 0..RAM];
    prop_oneof![
        6 => (ports(), size(), any::<bool>(), value())
            .prop_map(|(port, size, write, value)| Access::Port { port, size: size.min(4), write, value }),
        10 => (addresses(), size(), any::<bool>(), value())
            .prop_map(|(gpa, size, write, value)| Access::Memory { gpa, size, write, value }),
        1 => any::<u8>().prop_map(Access::Eoi),
        4 => (0..RAM, value()).prop_map(|(gpa, value)| Access::Ram { gpa, value }),
        1 => (0..RAM).prop_map(|rings| Access::Drive { rings: rings & !15 }),
    ]
}

impl Chipset {
    fn run(&self, access: Access) {
        match access {
            Access::Port { port, size, write, value } => {
                let mut data = value.to_le_bytes();
                match write {
                    true => self.bus.pio_write(port as u16, &data[..size]),
                    false => self.bus.pio_read(port as u16, &mut data[..size]),
                }
            }
            Access::Memory { gpa, size, write, value } => {
                let mut data = value.to_le_bytes();
                match write {
                    true => self.bus.mmio_write(gpa, &data[..size]),
                    false => self.bus.mmio_read(gpa, &mut data[..size]),
                }
            }
            Access::Eoi(vector) => self.bus.eoi(vector),
            Access::Ram { gpa, value } => drop(self.memory.write(gpa, &value.to_le_bytes())),
            Access::Drive { rings } => self.drive(rings),
        }
    }

    fn drive(&self, rings: u64) {
        let put = |gpa: u64, size: usize, value: u64| self.bus.mmio_write(gpa, &value.to_le_bytes()[..size]);
        put(ECAM + 0x8010, 4, MMIO32);
        put(ECAM + 0x8004, 2, 6);
        for status in [0, 1, 3] {
            put(MMIO32 + 20, 1, status);
        }
        put(MMIO32 + 8, 4, 1);
        put(MMIO32 + 12, 4, 1);
        put(MMIO32 + 20, 1, 11);
        put(MMIO32 + 22, 2, 0);
        for (register, offset) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
            put(MMIO32 + register, 8, rings + offset);
        }
        put(MMIO32 + 28, 2, 1);
        put(MMIO32 + 20, 1, 15);
        put(MMIO32 + 0x3000, 2, 0);
    }
}

/// `usual` cases, and as many times more as `PROPTEST_CASES` asks for (its own default is 256).
pub(crate) fn cases(usual: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = (u64::from(usual) * u64::from(default.cases) / 256).clamp(1, u64::from(u32::MAX)) as u32;
    ProptestConfig { cases, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn no_access_hurts(accesses in prop::collection::vec(access(), 0..300)) {
        let chipset = chipset();
        for access in accesses {
            chipset.run(access);
        }
    }
}
