use std::sync::{Arc, Mutex, MutexGuard};

use minicbor::{Decode, Encode};

use super::PciRoot;
use crate::{
    bus::PortIo,
    power::{PowerCallback, PowerEvent},
};

const ADDRESS_BYTES: u16 = 4;
const ENABLE: u32 = 1 << 31;
/// Reset control, in the middle of the address register: byte accesses to port 0xcf9 are not configuration's.
const RESET_CONTROL: u16 = 1;
const RESET_CPU: u8 = 1 << 2;
const RESET_WRITABLE: u8 = 0x0e;

/// Configuration mechanism 1 on ports 0xcf8..=0xcff (PCI local bus 3.0, 3.2.2.3.2), with the reset control
/// register of PCI chipsets at 0xcf9.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    power: PowerCallback,
    state: Mutex<SavedConfigPorts>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedConfigPorts {
    #[n(0)]
    pub address: u32,
    #[n(1)]
    pub reset_control: u8,
}

impl ConfigPorts {
    pub const FIRST: u16 = 0xcf8;
    pub const COUNT: u16 = 8;

    pub fn new(root: Arc<PciRoot>, power: PowerCallback) -> Self {
        Self::restore(root, power, SavedConfigPorts::default())
    }

    pub fn restore(root: Arc<PciRoot>, power: PowerCallback, saved: SavedConfigPorts) -> Self {
        Self { root, power, state: Mutex::new(saved) }
    }

    pub fn save(&self) -> SavedConfigPorts {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, SavedConfigPorts> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Bus, device and function, and the register that `offset` in the data port stands for.
    fn target(&self, offset: u16) -> Option<(u16, u16)> {
        let address = self.lock().address;
        let function = (address >> 8) as u16;
        let register = (address & 0xfc) as u16 + (offset - ADDRESS_BYTES);
        (address & ENABLE != 0).then_some((function, register))
    }

    fn write_reset(&self, value: u8) {
        let before = std::mem::replace(&mut self.lock().reset_control, value & RESET_WRITABLE);
        // The transition resets (Intel ICH9 datasheet, 13.7.5).
        if value & RESET_CPU != 0 && before & RESET_CPU == 0 {
            (self.power)(PowerEvent::Reset);
        }
    }
}

impl PortIo for ConfigPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= ADDRESS_BYTES {
            if let Some((function, register)) = self.target(offset) {
                self.root.config_read(function, register, data);
            }
        } else if offset == RESET_CONTROL && data.len() == 1 {
            data[0] = self.lock().reset_control;
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.lock().address.to_le_bytes());
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if offset >= ADDRESS_BYTES {
            if let Some((function, register)) = self.target(offset) {
                self.root.config_write(function, register, data);
            }
        } else if offset == RESET_CONTROL && data.len() == 1 {
            self.write_reset(data[0]);
        } else if let (0, Ok(address)) = (offset, data.try_into()) {
            self.lock().address = u32::from_le_bytes(address);
        }
    }
}
