//! Virtio devices that need little, and the way onto the PCI bus for all of them.

use vireo_devices::virtio::{VirtioDevice, pci::VirtioPci, rng::Rng, vsock::Vsock};

use super::Board;
use crate::error::MachineError;

impl Board<'_> {
    /// Plugs a virtio device into the next free slot.
    pub(super) fn plug(&mut self, device: impl VirtioDevice + 'static) -> Result<(), MachineError> {
        let function = VirtioPci::new(Box::new(device), self.memory.clone(), self.engine.clone())?;
        self.pci.add(self.pci.free_slot()?, function)?;
        Ok(())
    }
}

pub(super) fn rng(board: &mut Board<'_>) -> Result<(), MachineError> {
    if board.config.rng { board.plug(Rng::new("rng0")) } else { Ok(()) }
}

pub(super) fn vsock(board: &mut Board<'_>) -> Result<(), MachineError> {
    let Some(config) = board.config.vsock else { return Ok(()) };
    let vsock = Vsock::new("vsock0", config.guest_cid).map_err(MachineError::Thread)?;
    board.handles.vsock = Some(vsock.host());
    board.plug(vsock)
}
