//! PCI: one bus with configuration by ports (mechanism 1) and by memory (ECAM), and BARs that the guest may move.
//!
//! Functions are conventional, single-function devices with 256 bytes of configuration space.

mod config;
mod host_bridge;
mod msix;
mod ports;
mod root;

use std::sync::Arc;

pub use config::{BarKind, ConfigSpace, Identity};
pub use host_bridge::{HostBridge, SavedHostBridge};
pub use msix::{MAX_VECTORS, Msix, RestoreError as MsixRestoreError, SavedMsix};
pub use ports::{ConfigPorts, SavedConfigPorts};
pub use root::{Ecam, PciError, PciRoot, SLOTS, Windows};

/// A base address register as the function has it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    pub index: u8,
    /// A power of two.
    pub bytes: u64,
    pub kind: BarKind,
    pub address: u64,
    /// Whether the function answers there (memory space enable).
    pub decoded: bool,
}

/// A PCI function on the bus. It locks itself; several vCPUs may call at once.
pub trait PciFunction: Send + Sync {
    /// `offset + data.len()` is at most 4096.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    fn config_write(&self, offset: u16, data: &[u8]);

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }
    /// Moves BAR `index` as the guest could.
    fn set_bar(&self, _index: u8, _address: u64) {}
    /// Where accesses to BAR `index` arrive from now on; `None` for nowhere.
    fn bar_moved(&self, _index: u8, _address: Option<u64>) {}

    /// The access lies within the BAR.
    fn bar_read(&self, _index: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _index: u8, _offset: u64, _data: &[u8]) {}
}

/// What [`PciRoot`] shows on the buses.
type Function = Arc<dyn PciFunction>;

#[cfg(test)]
mod tests;
