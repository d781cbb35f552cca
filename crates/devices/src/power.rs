//! How a guest powers off, resets or says that it crashed.
//!
//! * Hardware-reduced ACPI: sleep control and status (ACPI 6.5, 4.8.3.7) and the reset register (4.8.3.6).
//! * What old software tries: port 0xcf9 (in [`crate::pci::ConfigPorts`], which owns that port) and the
//!   keyboard controller's reset command, 0xfe to port 0x64.
//! * `pvpanic` on port 0x505, which Linux binds to as ACPI device `QEMU0001`; it needs no PCI slot.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use minicbor::{Decode, Encode};

use crate::bus::BytePorts;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    PowerOff,
    Reset,
    /// The guest's kernel panicked. It runs on, and may still reset or power off.
    Panic,
}

/// Is called on the vCPU's thread, within the guest's instruction: it must only take note.
pub type PowerCallback = Arc<dyn Fn(PowerEvent) + Send + Sync>;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE: u8 = 7 << SLEEP_TYPE_SHIFT;
const WAKE_STATUS: u8 = 1 << 7;

/// `SLEEP_CONTROL_REG` and, one port up, `SLEEP_STATUS_REG`.
pub struct SleepPorts {
    control: AtomicU8,
    status: AtomicU8,
    power_off_type: u8,
    callback: PowerCallback,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedSleepPorts {
    #[n(0)]
    pub control: u8,
    #[n(1)]
    pub status: u8,
}

impl SleepPorts {
    pub const COUNT: u16 = 2;

    /// `power_off_type` is the `SLP_TYP` that the DSDT gives for `\_S5`.
    pub fn new(power_off_type: u8, callback: PowerCallback) -> Self {
        Self::restore(power_off_type, callback, SavedSleepPorts::default())
    }

    pub fn restore(power_off_type: u8, callback: PowerCallback, saved: SavedSleepPorts) -> Self {
        let control = AtomicU8::new(saved.control & SLEEP_TYPE);
        Self { control, status: AtomicU8::new(saved.status & WAKE_STATUS), power_off_type, callback }
    }

    pub fn save(&self) -> SavedSleepPorts {
        let load = |register: &AtomicU8| register.load(Ordering::Relaxed);
        SavedSleepPorts { control: load(&self.control), status: load(&self.status) }
    }
}

impl BytePorts for SleepPorts {
    fn read_port(&self, offset: u16) -> u8 {
        match offset {
            0 => self.control.load(Ordering::Relaxed),
            _ => self.status.load(Ordering::Relaxed),
        }
    }

    fn write_port(&self, offset: u16, value: u8) {
        if offset == 0 {
            self.control.store(value & SLEEP_TYPE, Ordering::Relaxed);
            let sleep_type = (value & SLEEP_TYPE) >> SLEEP_TYPE_SHIFT;
            if value & SLEEP_ENABLE != 0 && sleep_type == self.power_off_type {
                (self.callback)(PowerEvent::PowerOff);
            }
        } else {
            // Writing one clears the wake status.
            self.status.fetch_and(!(value & WAKE_STATUS), Ordering::Relaxed);
        }
    }
}

/// `RESET_REG`: one value, written to one port, resets. Stateless.
pub struct ResetPort {
    value: u8,
    callback: PowerCallback,
}

impl ResetPort {
    pub fn new(value: u8, callback: PowerCallback) -> Self {
        Self { value, callback }
    }
}

impl BytePorts for ResetPort {
    fn read_port(&self, _: u16) -> u8 {
        0
    }

    fn write_port(&self, _: u16, value: u8) {
        if value == self.value {
            (self.callback)(PowerEvent::Reset);
        }
    }
}

/// Port 0x64 of a keyboard controller that is not there: reads are all ones, which drivers take for "no
/// controller", but its reset command works, as boards without one emulate it. Stateless.
pub struct KeyboardReset {
    callback: PowerCallback,
}

impl KeyboardReset {
    pub const PORT: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;

    pub fn new(callback: PowerCallback) -> Self {
        Self { callback }
    }
}

impl BytePorts for KeyboardReset {
    fn read_port(&self, _: u16) -> u8 {
        0xff
    }

    fn write_port(&self, _: u16, value: u8) {
        if value == Self::PULSE_RESET {
            (self.callback)(PowerEvent::Reset);
        }
    }
}

/// `pvpanic` (QEMU's `docs/specs/pvpanic`): reads say which events are understood, writes report one. Stateless.
pub struct PanicPort {
    callback: PowerCallback,
}

impl PanicPort {
    pub const PORT: u16 = 0x505;
    /// Its ACPI `_HID`.
    pub const ACPI_ID: &'static str = "QEMU0001";
    const PANICKED: u8 = 1;

    pub fn new(callback: PowerCallback) -> Self {
        Self { callback }
    }
}

impl BytePorts for PanicPort {
    fn read_port(&self, _: u16) -> u8 {
        Self::PANICKED
    }

    fn write_port(&self, _: u16, value: u8) {
        if value & Self::PANICKED != 0 {
            (self.callback)(PowerEvent::Panic);
        }
    }
}

#[cfg(test)]
mod tests;
