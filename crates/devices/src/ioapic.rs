//! The I/O APIC (82093AA datasheet, and the EOI register of version 0x20): 24 pins to messages.
//!
//! Each pin owns a [`MsiLine`] and tells it the pin's redirection entry as a message, level trigger included: that
//! is how an engine knows for which vectors it must report the end of the interrupt.

use std::sync::{Arc, Mutex, MutexGuard};

use minicbor::{Decode, Encode};
use vireo_cpu::{CpuError, Engine, MsiLine, MsiMessage};

use crate::{
    bus::{EndOfInterrupt, Mmio},
    interrupt::InterruptPins,
    saved::BadState,
};

pub const PINS: usize = 24;
/// Bytes of the register window that are decoded.
pub const MMIO_BYTES: u64 = 0x1000;

const INDEX: u64 = 0x00;
const DATA: u64 = 0x10;
const EOI: u64 = 0x40;

const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_ENTRIES: u8 = 0x10;
/// Version 0x20 has the EOI register; bits 23:16 are the highest entry.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
/// Vector, mode, polarity, trigger, mask and destination (82093AA, 3.2.4).
const DEFINED: u64 = 0xff00_0000_0001_ffff;

/// What a snapshot keeps of an [`Ioapic`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedIoapic {
    #[n(0)]
    pub id: u32,
    #[n(1)]
    pub index: u8,
    #[n(2)]
    pub entries: Vec<u64>,
    /// One bit for each pin that is asserted.
    #[n(3)]
    pub levels: u32,
}

pub struct Ioapic {
    state: Mutex<State>,
}

struct State {
    id: u32,
    index: u8,
    pins: Vec<Pin>,
}

struct Pin {
    entry: u64,
    level: bool,
    line: Arc<dyn MsiLine>,
    /// What `line` was last told.
    told: Option<MsiMessage>,
}

impl Ioapic {
    pub fn new(engine: &dyn Engine) -> Result<Self, CpuError> {
        let pin = |_| Ok(Pin { entry: MASKED, level: false, line: engine.msi_line()?, told: None });
        let pins = (0..PINS).map(pin).collect::<Result<_, CpuError>>()?;
        Ok(Self { state: Mutex::new(State { id: 0, index: 0, pins }) })
    }

    pub fn restore(engine: &dyn Engine, saved: SavedIoapic) -> Result<Self, RestoreError> {
        if saved.entries.len() != PINS {
            let why = format!("{} entries instead of {PINS}", saved.entries.len());
            return Err(BadState::new("IOAPIC", why).into());
        }
        let ioapic = Self::new(engine)?;
        let mut state = ioapic.lock();
        (state.id, state.index) = (saved.id & 0x0f00_0000, saved.index);
        for (i, (pin, entry)) in state.pins.iter_mut().zip(saved.entries).enumerate() {
            pin.entry = entry & (DEFINED | REMOTE_IRR);
            pin.level = saved.levels >> i & 1 != 0;
            // An interrupt under way keeps its route, masked or not: the engine watches for its end.
            if pin.entry & MASKED == 0 || pin.entry & REMOTE_IRR != 0 {
                pin.tell();
            }
        }
        drop(state);
        Ok(ioapic)
    }

    pub fn save(&self) -> SavedIoapic {
        let state = self.lock();
        let level = |(i, pin): (usize, &Pin)| u32::from(pin.level) << i;
        SavedIoapic {
            id: state.id,
            index: state.index,
            entries: state.pins.iter().map(|pin| pin.entry).collect(),
            levels: state.pins.iter().enumerate().map(level).sum(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    State(#[from] BadState),
    #[error("no interrupt lines for the IOAPIC")]
    Lines(#[from] CpuError),
}

impl Pin {
    /// The entry as a message (Intel SDM vol. 3, 11.11.1 and 11.11.2): the fields only sit elsewhere.
    fn message(&self) -> MsiMessage {
        let destination = self.entry >> 56;
        let logical = self.entry >> 11 & 1;
        let (vector_and_mode, trigger) = (self.entry as u32 & 0x7ff, self.entry as u32 & LEVEL as u32);
        // Level-triggered messages also say "assert" (bit 14).
        let data = vector_and_mode | trigger | trigger >> 1;
        MsiMessage { address: 0xfee0_0000 | destination << 12 | logical << 2, data }
    }

    /// Tells the line its message, if it does not know: that may be dear.
    fn tell(&mut self) {
        let message = Some(self.message());
        if self.told != message {
            self.line.set(message);
            self.told = message;
        }
    }

    fn send(&mut self) {
        self.tell();
        self.line.trigger();
    }

    fn is_level(&self) -> bool {
        self.entry & LEVEL != 0
    }

    fn set_level(&mut self, level: bool) {
        let rising = level && !self.level;
        self.level = level;
        if self.is_level() {
            self.service();
        } else if rising && self.entry & MASKED == 0 {
            // Edges at a masked pin are lost (82093AA, 3.2.4, interrupt mask).
            self.send();
        }
    }

    /// Sends a level-triggered interrupt that is due and not being serviced yet.
    fn service(&mut self) {
        if self.is_level() && self.level && self.entry & (MASKED | REMOTE_IRR) == 0 {
            self.entry |= REMOTE_IRR;
            self.send();
        }
    }

    fn write(&mut self, entry: u64) {
        self.entry = entry & DEFINED & !READ_ONLY | self.entry & REMOTE_IRR;
        if !self.is_level() {
            // Drivers clear a stuck remote IRR by way of edge mode, as hardware does.
            self.entry &= !REMOTE_IRR;
        }
        if self.entry & MASKED == 0 {
            self.tell();
        }
        self.service();
    }
}

impl State {
    fn read(&self, register: u8) -> u32 {
        match register {
            REG_ID | REG_ARBITRATION => self.id,
            REG_VERSION => VERSION,
            _ => match self.entry_of(register) {
                Some((pin, shift)) => (self.pins[pin].entry >> shift) as u32,
                None => 0,
            },
        }
    }

    fn write(&mut self, register: u8, value: u32) {
        if register == REG_ID {
            self.id = value & 0x0f00_0000;
        } else if let Some((pin, shift)) = self.entry_of(register) {
            let pin = &mut self.pins[pin];
            let kept = pin.entry & !(u64::from(u32::MAX) << shift);
            pin.write(kept | u64::from(value) << shift);
        }
    }

    /// Pin and bit offset of one half of a redirection entry.
    fn entry_of(&self, register: u8) -> Option<(usize, u32)> {
        let half = usize::from(register.checked_sub(REG_ENTRIES)?);
        (half / 2 < self.pins.len()).then_some((half / 2, 32 * (half as u32 % 2)))
    }

    fn eoi(&mut self, vector: u8) {
        for pin in &mut self.pins {
            if pin.entry as u8 == vector && pin.entry & REMOTE_IRR != 0 {
                pin.entry &= !REMOTE_IRR;
                pin.service();
            }
        }
    }
}

impl InterruptPins for Ioapic {
    fn set_pin(&self, pin: u8, level: bool) {
        if let Some(pin) = self.lock().pins.get_mut(usize::from(pin)) {
            pin.set_level(level);
        }
    }
}

impl EndOfInterrupt for Ioapic {
    fn eoi(&self, vector: u8) {
        self.lock().eoi(vector);
    }
}

/// Registers are 32 bits wide; reads of other widths get the bytes around, writes are taken by their low bytes.
impl Mmio for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset & !3 {
            INDEX => u32::from(state.index),
            DATA => state.read(state.index),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get((offset & 3) as usize + i).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        let len = data.len().min(4);
        bytes[..len].copy_from_slice(&data[..len]);
        let value = u32::from_le_bytes(bytes);
        let mut state = self.lock();
        match offset {
            INDEX => state.index = value as u8,
            DATA => {
                let register = state.index;
                state.write(register, value);
            }
            EOI => state.eoi(value as u8),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
