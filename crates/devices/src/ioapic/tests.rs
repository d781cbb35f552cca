use super::*;
use crate::{
    conformance::{self, Op, Subject},
    fake_engine::FakeEngine,
};

struct Rig {
    engine: Arc<FakeEngine>,
    ioapic: Ioapic,
}

impl Rig {
    fn new() -> Self {
        let engine = FakeEngine::new();
        Self { ioapic: Ioapic::new(&*engine).unwrap(), engine }
    }

    fn write(&self, register: u8, value: u32) {
        Mmio::write(&self.ioapic, INDEX, &[register]);
        Mmio::write(&self.ioapic, DATA, &value.to_le_bytes());
    }

    fn read(&self, register: u8) -> u32 {
        Mmio::write(&self.ioapic, INDEX, &[register]);
        let mut data = [0; 4];
        Mmio::read(&self.ioapic, DATA, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_entry(&self, pin: u8, entry: u64) {
        self.write(0x11 + 2 * pin, (entry >> 32) as u32);
        self.write(0x10 + 2 * pin, entry as u32);
    }

    fn sent(&self) -> Vec<(u64, u32)> {
        self.engine.take_sent().iter().map(|m| (m.address, m.data)).collect()
    }
}

#[test]
fn registers_read_as_the_datasheet_says() {
    let rig = Rig::new();
    assert_eq!(rig.read(REG_VERSION), 0x0017_0020);
    rig.write(REG_ID, u32::MAX);
    assert_eq!((rig.read(REG_ID), rig.read(REG_ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
    assert_eq!((rig.read(0x10), rig.read(0x3f), rig.read(0x40)), (0x1_0000, 0, 0));
    rig.set_entry(23, u64::MAX);
    assert_eq!((rig.read(0x3e), rig.read(0x3f)), (0x1_afff, 0xff00_0000));
}

#[test]
fn edges_are_sent_once_and_lost_while_masked() {
    let rig = Rig::new();
    rig.ioapic.set_pin(4, true);
    rig.ioapic.set_pin(4, false);
    rig.set_entry(4, 3 << 56 | 1 << 11 | 1 << 8 | 0x31);
    assert_eq!(rig.sent(), []);
    rig.ioapic.set_pin(4, true);
    rig.ioapic.set_pin(4, true);
    assert_eq!(rig.sent(), [(0xfee0_3004, 0x131)]);
    rig.ioapic.set_pin(4, false);
    rig.ioapic.set_pin(4, true);
    assert_eq!(rig.sent().len(), 1);
    // neither does unmasking make an edge
    rig.set_entry(4, MASKED | 0x31);
    rig.set_entry(4, 0x31);
    assert_eq!(rig.sent(), []);
    rig.ioapic.set_pin(99, true);
}

#[test]
fn levels_wait_for_the_end_of_interrupt() {
    let rig = Rig::new();
    rig.set_entry(9, LEVEL | 0x55);
    rig.ioapic.set_pin(9, true);
    assert_eq!(rig.sent(), [(0xfee0_0000, 0xc055)]);
    assert_eq!(rig.read(0x10 + 18) & REMOTE_IRR as u32, REMOTE_IRR as u32);
    rig.ioapic.set_pin(9, false);
    rig.ioapic.set_pin(9, true);
    assert_eq!(rig.sent(), []);
    rig.ioapic.eoi(0x54);
    assert_eq!(rig.sent(), []);
    rig.ioapic.eoi(0x55);
    assert_eq!(rig.sent(), [(0xfee0_0000, 0xc055)]);
    rig.ioapic.set_pin(9, false);
    Mmio::write(&rig.ioapic, EOI, &0x55u32.to_le_bytes());
    assert_eq!((rig.sent(), rig.read(0x10 + 18)), (vec![], 0x8055));
    // asserted while masked: sent when unmasked
    rig.set_entry(9, MASKED | LEVEL | 0x55);
    rig.ioapic.set_pin(9, true);
    assert_eq!(rig.sent(), []);
    rig.set_entry(9, LEVEL | 0x55);
    assert_eq!(rig.sent().len(), 1);
    // a trip through edge mode drops remote IRR
    rig.set_entry(9, MASKED | 0x55);
    rig.set_entry(9, LEVEL | 0x55);
    assert_eq!(rig.sent().len(), 1);
}

impl Subject for Rig {
    type Saved = SavedIoapic;

    fn fresh() -> Self {
        Self::new()
    }

    fn poke(&self, op: Op) -> Vec<u8> {
        let mut seen = match op.kind % 8 {
            0 => {
                self.ioapic.set_pin(op.address as u8 % 25, op.value & 1 != 0);
                vec![]
            }
            1 => {
                self.ioapic.eoi(op.value as u8);
                vec![]
            }
            // mostly entries, with vectors that `eoi` meets
            2 | 3 => {
                self.write(0x10 + op.address as u8 % 50, op.value as u32);
                vec![]
            }
            4 => self.read(op.address as u8).to_le_bytes().to_vec(),
            _ => {
                op.access(|at, data| Mmio::read(&self.ioapic, at, data), |at, data| Mmio::write(&self.ioapic, at, data))
            }
        };
        for (address, data) in self.sent() {
            seen.extend(address.to_le_bytes());
            seen.extend(data.to_le_bytes());
        }
        seen
    }

    fn save(&self) -> SavedIoapic {
        self.ioapic.save()
    }

    fn restored(saved: SavedIoapic) -> Result<Self, String> {
        let engine = FakeEngine::new();
        let ioapic = Ioapic::restore(&*engine, saved).map_err(|e| e.to_string())?;
        Ok(Self { engine, ioapic })
    }
}

#[test]
fn conformance() {
    conformance::check::<Rig>();
}
