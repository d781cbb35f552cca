use crate::saved::BadState;

use super::Bar;

pub const BYTES: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR_0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const HEADER_END: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory space, bus master, parity and SERR responses; high byte: SERR, INTx disable.
const COMMAND_WRITABLE: [u8; 2] = [0x46, 0x05];
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a function says it is (PCI local bus 3.0, 6.2.1).
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
    /// Base class, subclass and programming interface: 24 bits.
    pub class: u32,
    pub revision: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    Memory32,
    /// Takes two registers.
    Memory64,
}

/// A type 0 configuration space: bytes, and which bits of them the guest may write. BAR sizing comes of that
/// by itself: address bits below the size are not writable.
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    bars: Vec<(u8, u64, BarKind)>,
    /// Where the next capability goes.
    end: usize,
    /// Where the pointer to it is.
    link: usize,
}

impl ConfigSpace {
    pub fn new(identity: Identity) -> Self {
        let mut space =
            Self { bytes: [0; BYTES], writable: [0; BYTES], bars: Vec::new(), end: HEADER_END, link: CAPABILITIES };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE);
        space.writable[CACHE_LINE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds a memory BAR. `bytes` is a power of two, at least 16, and below 4 GiB for [`BarKind::Memory32`].
    ///
    /// # Panics
    /// If the BAR is impossible: the device's code is wrong.
    pub fn add_bar(&mut self, index: u8, bytes: u64, kind: BarKind) {
        assert!(bytes.is_power_of_two() && bytes >= 16 && index < 6, "impossible BAR {index} of {bytes} bytes");
        let at = BAR_0 + 4 * usize::from(index);
        let mask = (!(bytes - 1)).to_le_bytes();
        match kind {
            BarKind::Memory32 => self.writable[at..at + 4].copy_from_slice(&mask[..4]),
            BarKind::Memory64 => {
                assert!(index < 5, "a 64-bit BAR takes two registers");
                self.writable[at..at + 8].copy_from_slice(&mask);
                self.bytes[at] = 0b100;
            }
        }
        self.bars.push((index, bytes, kind));
    }

    /// Appends a capability: `body` is what follows the id and the link, `writable` its writable bits (zeroes
    /// where it is shorter). Returns where the capability begins.
    ///
    /// # Panics
    /// If there is no room: the device's code is wrong.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.end;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        assert!(end <= BYTES && writable.len() <= body.len(), "no room for capability {id:#x}");
        self.bytes[self.link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[at] = id;
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        (self.link, self.end) = (at + 1, end);
        at as u16
    }

    /// Bytes past the end are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    pub fn read_u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    pub fn read_u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn bars(&self) -> Vec<Bar> {
        let decoded = self.bytes[COMMAND] & COMMAND_MEMORY != 0;
        let bar = |&(index, bytes, kind): &(u8, u64, BarKind)| {
            let at = (BAR_0 + 4 * usize::from(index)) as u16;
            let high = if kind == BarKind::Memory64 { self.read_u32(at + 4) } else { 0 };
            let address = (u64::from(high) << 32 | u64::from(self.read_u32(at))) & !(bytes - 1);
            Bar { index, bytes, kind, address, decoded }
        };
        self.bars.iter().map(bar).collect()
    }

    pub fn set_bar(&mut self, index: u8, address: u64) {
        if let Some((_, _, kind)) = self.bars.iter().find(|bar| bar.0 == index) {
            let len = if *kind == BarKind::Memory64 { 8 } else { 4 };
            self.write((BAR_0 + 4 * usize::from(index)) as u16, &address.to_le_bytes()[..len]);
        }
    }

    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over what the guest wrote; everything else must be as it was.
    pub fn restore(&mut self, device: &'static str, saved: &[u8]) -> Result<(), BadState> {
        if saved.len() != BYTES {
            return Err(BadState::new(device, format!("a configuration space of {} bytes", saved.len())));
        }
        let fixed =
            |bytes: &[u8]| bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & !mask).collect::<Vec<_>>();
        if fixed(saved) != fixed(&self.bytes) {
            return Err(BadState::new(device, "it is of another kind of PCI function"));
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }
}
