use std::sync::{Mutex, MutexGuard};

use minicbor::{Decode, Encode};

use super::{ConfigSpace, Identity, PciFunction};
use crate::saved::BadState;

/// The function at 00:00.0. Operating systems look for it to believe in a PCI bus, and do nothing with it.
///
/// It carries the id that Red Hat gave to the generic host bridge for virtual machines (1b36:0008): a name in every
/// `lspci`, and none of the quirks that kernels apply to the chipsets whose ids other VMMs borrow.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedHostBridge {
    #[cbor(n(0), with = "minicbor::bytes")]
    pub config: Vec<u8>,
}

const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x06_00_00,
    revision: 0,
};

impl Default for HostBridge {
    fn default() -> Self {
        Self { config: Mutex::new(ConfigSpace::new(IDENTITY)) }
    }
}

impl HostBridge {
    pub fn restore(saved: &SavedHostBridge) -> Result<Self, BadState> {
        let bridge = Self::default();
        bridge.lock().restore("PCI host bridge", &saved.config)?;
        Ok(bridge)
    }

    pub fn save(&self) -> SavedHostBridge {
        SavedHostBridge { config: self.lock().save() }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset, data);
    }
}
