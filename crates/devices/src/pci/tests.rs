use std::sync::Mutex;

use super::*;
use crate::{
    bus::{DeviceBus, PortIo},
    conformance::{self, Op, Subject},
    fake_engine::FakeEngine,
    power::PowerEvent,
    saved::BadState,
};
use vireo_cpu::Bus;

const MMIO32: std::ops::Range<u64> = 0xc000_0000..0xc010_0000;
const MMIO64: std::ops::Range<u64> = 0x80_0000_0000..0x80_4000_0000;
const ECAM: u64 = 0xe000_0000;

/// A function with a 4 KiB 32-bit BAR 0 and a 1 MiB 64-bit BAR 2, both of RAM bytes that repeat.
struct Memory {
    config: Mutex<ConfigSpace>,
    contents: Mutex<[u8; 256]>,
    moves: Mutex<Vec<(u8, Option<u64>)>>,
}

fn space() -> ConfigSpace {
    let mut config = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1234,
        subsystem_vendor: 1,
        subsystem: 2,
        class: 0x05_80_00,
        revision: 3,
    });
    config.add_bar(0, 0x1000, BarKind::Memory32);
    config.add_bar(2, 0x10_0000, BarKind::Memory64);
    config.add_capability(9, &[1, 2, 3, 4, 5, 6, 7], &[0, 0xff]);
    config.add_capability(5, &[8; 2], &[]);
    config
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self { config: Mutex::new(space()), contents: Mutex::new([0; 256]), moves: Mutex::default() })
    }
}

impl PciFunction for Memory {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap().write(offset, data);
    }
    fn bars(&self) -> Vec<Bar> {
        self.config.lock().unwrap().bars()
    }
    fn set_bar(&self, index: u8, address: u64) {
        self.config.lock().unwrap().set_bar(index, address);
    }
    fn bar_moved(&self, index: u8, address: Option<u64>) {
        self.moves.lock().unwrap().push((index, address));
    }
    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) {
        let contents = self.contents.lock().unwrap();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = contents[(offset as usize + i + usize::from(index)) % 256];
        }
    }
    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) {
        let mut contents = self.contents.lock().unwrap();
        for (i, byte) in data.iter().enumerate() {
            contents[(offset as usize + i + usize::from(index)) % 256] = *byte;
        }
    }
}

struct Rig {
    bus: DeviceBus,
    bridge: Arc<HostBridge>,
    memory: Arc<Memory>,
    ports: Arc<ConfigPorts>,
    power: Arc<Mutex<Vec<PowerEvent>>>,
}

impl Rig {
    fn build(bridge: HostBridge, saved_ports: SavedConfigPorts, memory: Arc<Memory>, restored: bool) -> Self {
        let root = Arc::new(PciRoot::new(Windows { mmio32: MMIO32, mmio64: MMIO64 }));
        let bridge = Arc::new(bridge);
        root.add(0, bridge.clone()).unwrap();
        let add = if restored { PciRoot::add_restored } else { PciRoot::add };
        add(&root, root.free_slot().unwrap(), memory.clone()).unwrap();
        let mut bus = DeviceBus::default();
        root.attach(&mut bus, ECAM..ECAM + (1 << 20)).unwrap();
        let power = Arc::new(Mutex::new(Vec::new()));
        let log = power.clone();
        let callback = Arc::new(move |event| log.lock().unwrap().push(event));
        let ports = Arc::new(ConfigPorts::restore(root, callback, saved_ports));
        bus.add_ports(0xcf8..=0xcff, ports.clone()).unwrap();
        Self { bus, bridge, memory, ports, power }
    }

    fn new() -> Self {
        Self::build(HostBridge::default(), SavedConfigPorts::default(), Memory::new(), false)
    }

    fn read(&self, gpa: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.mmio_read(gpa, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, gpa: u64, value: u32) {
        self.bus.mmio_write(gpa, &value.to_le_bytes());
    }

    fn port_read(&self, address: u32) -> u32 {
        self.bus.pio_write(0xcf8, &address.to_le_bytes());
        let mut data = [0; 4];
        self.bus.pio_read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }
}

/// ECAM address of a register of the function in slot 1.
fn slot1(register: u64) -> u64 {
    ECAM + (1 << 15) + register
}

#[test]
fn both_ways_lead_to_the_same_configuration() {
    let rig = Rig::new();
    assert_eq!(rig.read(ECAM), 0x0008_1b36);
    assert_eq!(rig.read(ECAM + 8) >> 8, 0x06_00_00);
    assert_eq!(rig.port_read(0x8000_0000), 0x0008_1b36);
    assert_eq!(rig.port_read(0x8000_0800), 0x1234_1af4);
    assert_eq!(rig.read(slot1(0x2c)), 0x0002_0001);
    // no such function, slot, bus; mechanism off
    for address in [0x8000_0900, 0x8000_1000, 0x8001_0000, 0x0000_0000] {
        assert_eq!(rig.port_read(address), u32::MAX, "{address:#x}");
    }
    assert_eq!(rig.read(slot1(0x1000)), u32::MAX);
    assert_eq!(rig.read(slot1(0x100)), 0, "no extended capabilities");
    // bytes within the data port
    rig.bus.pio_write(0xcf8, &0x8000_0800u32.to_le_bytes());
    let mut data = [0; 2];
    rig.bus.pio_read(0xcfe, &mut data);
    assert_eq!(data, [0x34, 0x12]);
    // identity is not writable
    rig.write(slot1(0), 0);
    assert_eq!(rig.read(slot1(0)), 0x1234_1af4);
}

#[test]
fn capabilities_form_a_list() {
    let rig = Rig::new();
    assert_eq!(rig.read(slot1(4)) >> 16, 1 << 4);
    assert_eq!((rig.read(slot1(0x34)), rig.read(slot1(0x40)), rig.read(slot1(0x4c))), (0x40, 0x0201_4c09, 0x0808_0005));
    rig.write(slot1(0x40), 0);
    assert_eq!(rig.read(slot1(0x40)), 0x0001_4c09, "only the byte that may be written");
}

#[test]
fn bars_are_sized_and_moved() {
    let rig = Rig::new();
    let (low, high) =
        (rig.read(slot1(0x10)), u64::from(rig.read(slot1(0x18))) | u64::from(rig.read(slot1(0x1c))) << 32);
    assert_eq!((u64::from(low), high), (MMIO32.start, MMIO64.start | 4));
    assert_eq!(rig.read(MMIO32.start), u32::MAX, "not decoded yet");
    rig.write(slot1(4), 2);
    rig.write(MMIO32.start, 0x0403_0201);
    assert_eq!(rig.read(MMIO64.start + 254), 0x0403_0201, "BAR 2 is off by two");
    let sizes: Vec<u32> =
        [0x10, 0x18, 0x1c, 0x14].map(|bar| (rig.write(slot1(bar), u32::MAX), rig.read(slot1(bar))).1).into();
    assert_eq!(sizes, [0xffff_f000, 0xfff0_0004, u32::MAX, 0]);
    assert_eq!(rig.read(MMIO32.start), u32::MAX, "gone while sizing");
    rig.write(slot1(0x10), 0xc001_0123);
    assert_eq!((rig.read(slot1(0x10)), rig.read(0xc001_0000)), (0xc001_0000, 0x0403_0201));
    // outside of the windows it is nowhere
    rig.write(slot1(0x10), 0xfec0_0000);
    assert_eq!(rig.read(0xfec0_0000), u32::MAX);
    let moves = rig.memory.moves.lock().unwrap().clone();
    assert_eq!(
        moves.iter().filter(|m| m.0 == 0).map(|m| m.1).collect::<Vec<_>>(),
        [Some(MMIO32.start), None, Some(0xc001_0000), None]
    );
}

#[test]
fn bars_get_places_of_their_own_until_there_are_none() {
    let root = PciRoot::new(Windows { mmio32: 0xc000_0000..0xc000_3000, mmio64: MMIO64 });
    let functions: Vec<_> = (0..4).map(|_| Memory::new()).collect();
    for (slot, function) in functions.iter().enumerate().take(3) {
        root.add(slot as u8, function.clone()).unwrap();
        let [low, high] = function.bars().try_into().unwrap();
        assert_eq!(low.address, 0xc000_0000 + 0x1000 * slot as u64);
        assert_eq!(high.address, MMIO64.start + 0x10_0000 * slot as u64);
    }
    assert!(matches!(root.add(3, functions[3].clone()), Err(PciError::NoRoom(0x1000))));
    assert!(matches!(root.add(2, functions[3].clone()), Err(PciError::BadSlot(2))));
    assert!(matches!(root.add(32, functions[3].clone()), Err(PciError::BadSlot(32))));
}

#[test]
fn reset_control_shares_the_address_port() {
    let rig = Rig::new();
    rig.bus.pio_write(0xcf8, &0x8000_0804u32.to_le_bytes());
    rig.bus.pio_write(0xcf9, &[0x02]);
    assert!(rig.power.lock().unwrap().is_empty());
    rig.bus.pio_write(0xcf9, &[0x06]);
    assert_eq!(*rig.power.lock().unwrap(), [PowerEvent::Reset]);
    let mut data = [0; 4];
    rig.bus.pio_read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0804);
    rig.bus.pio_read(0xcf9, &mut data[..1]);
    assert_eq!(data[0], 6);
}

/// Configuration by ports and ECAM of a bridge and a function with BARs.
#[derive(Debug, PartialEq, minicbor::Encode, minicbor::Decode)]
#[cbor(map)]
struct SavedRig {
    #[n(0)]
    bridge: SavedHostBridge,
    #[n(1)]
    ports: SavedConfigPorts,
    #[cbor(n(2), with = "minicbor::bytes")]
    config: Vec<u8>,
}

impl Subject for Rig {
    type Saved = SavedRig;

    fn fresh() -> Self {
        Self::new()
    }

    fn poke(&self, op: Op) -> Vec<u8> {
        let read = |at, data: &mut [u8]| self.bus.mmio_read(at, data);
        let write = |at, data: &[u8]| self.bus.mmio_write(at, data);
        let within = |start: u64, len: u64| Op { address: start + op.address % len, ..op };
        match op.kind % 16 / 2 {
            0 => within(ECAM, 0x40).access(read, write),
            1 => within(slot1(0), 0x40).access(read, write),
            2 => within(ECAM, 1 << 20).access(read, write),
            3 => within(0xcf8, 8).access(
                |at, data| PortIo::read(&*self.ports, (at - 0xcf8) as u16, data),
                |at, data| self.bus.pio_write(at as u16, data),
            ),
            4 => {
                // a configuration access as drivers make it
                self.bus.pio_write(0xcf8, &(0x8000_0800 | op.address as u32 & 0x7c).to_le_bytes());
                within(0xcfc, 4).access(
                    |at, data| self.bus.pio_read(at as u16, data),
                    |at, data| self.bus.pio_write(at as u16, data),
                )
            }
            // a BAR to a place inside a window, and decoding on
            5 => {
                self.write(slot1(0x10), (MMIO32.start + op.value % 0x10_0000) as u32);
                self.write(slot1(4), 2);
                vec![]
            }
            6 => {
                let at = self.memory.bars()[0].address;
                let mut data = vec![0; op.size];
                read(at.wrapping_add(op.address % 0x1008), &mut data);
                data
            }
            _ => op.access(read, |_, _| ()),
        }
    }

    fn save(&self) -> SavedRig {
        SavedRig {
            bridge: self.bridge.save(),
            ports: self.ports.save(),
            config: self.memory.config.lock().unwrap().save(),
        }
    }

    fn restored(saved: SavedRig) -> Result<Self, String> {
        let text = |error: BadState| error.to_string();
        let bridge = HostBridge::restore(&saved.bridge).map_err(text)?;
        let memory = Memory::new();
        memory.config.lock().unwrap().restore("memory", &saved.config).map_err(text)?;
        Ok(Self::build(bridge, saved.ports, memory, true))
    }
}

#[test]
fn conformance() {
    conformance::check::<Rig>();
}

/// An MSI-X table with its control word.
struct Table {
    engine: Arc<FakeEngine>,
    msix: Mutex<Msix>,
}

const VECTORS: u16 = 5;

impl Table {
    fn set_entry(&self, vector: u64, address: u64, data: u32, masked: bool) {
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend(data.to_le_bytes());
        raw.extend(u32::from(masked).to_le_bytes());
        self.msix.lock().unwrap().write_table(16 * vector, &raw);
    }

    fn sent(&self) -> Vec<(u64, u32)> {
        self.engine.take_sent().iter().map(|m| (m.address, m.data)).collect()
    }
}

#[test]
fn vectors_are_held_back_while_masked() {
    let table = Table::fresh();
    let trigger = |vector| table.msix.lock().unwrap().trigger(vector);
    let pending = || {
        let mut data = [0; 8];
        table.msix.lock().unwrap().read_pending(0, &mut data);
        u64::from_le_bytes(data)
    };
    table.set_entry(1, 0xfee0_1000, 0x41, false);
    trigger(1);
    assert_eq!((table.sent(), pending()), (vec![], 0), "lost: MSI-X is off");
    table.msix.lock().unwrap().set_control(0xc000);
    trigger(1);
    trigger(1);
    trigger(2);
    assert_eq!((table.sent(), pending()), (vec![], 0b110));
    table.msix.lock().unwrap().set_control(0x8000);
    assert_eq!((table.sent(), pending()), (vec![(0xfee0_1000, 0x41)], 0b100));
    trigger(1);
    assert_eq!(table.sent().len(), 1);
    table.set_entry(2, 0xfee0_2000, 0x42, false);
    assert_eq!((table.sent(), pending()), (vec![(0xfee0_2000, 0x42)], 0));
    table.set_entry(2, 0xfee0_2000, 0x43, true);
    trigger(2);
    table.set_entry(2, 0xfee0_2000, 0x43, true);
    assert_eq!((table.sent(), pending()), (vec![], 0b100));
    trigger(5);
    trigger(0xffff);
}

impl Subject for Table {
    type Saved = SavedMsix;

    fn fresh() -> Self {
        let engine = FakeEngine::new();
        Self { msix: Mutex::new(Msix::new(&*engine, VECTORS).unwrap()), engine }
    }

    fn poke(&self, op: Op) -> Vec<u8> {
        let mut msix = self.msix.lock().unwrap();
        let mut seen = vec![0; op.size];
        match op.kind % 8 {
            0 => msix.read_table(op.address, &mut seen),
            1 => msix.read_pending(op.address, &mut seen),
            2 | 3 => msix.write_table(op.address, &op.bytes()),
            4 => msix.set_control((op.value as u16) << 12),
            _ => msix.trigger(op.address as u16 % 8),
        }
        seen.extend(
            self.engine
                .take_sent()
                .iter()
                .flat_map(|m| [m.address.to_le_bytes(), u64::from(m.data).to_le_bytes()])
                .flatten(),
        );
        seen
    }

    fn save(&self) -> SavedMsix {
        self.msix.lock().unwrap().save()
    }

    fn restored(saved: SavedMsix) -> Result<Self, String> {
        let engine = FakeEngine::new();
        let msix = Msix::restore(&*engine, VECTORS, "table", &saved).map_err(|error| error.to_string())?;
        Ok(Self { msix: Mutex::new(msix), engine })
    }
}

#[test]
fn msix_conformance() {
    conformance::check::<Table>();
}
