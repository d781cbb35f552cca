use vireo_devices::virtio::block::{Block, BlockConfig};

use super::Board;
use crate::error::MachineError;

/// More queues than this only cost threads.
const MAX_QUEUES: u16 = 8;

pub(super) fn disks(board: &mut Board<'_>) -> Result<(), MachineError> {
    let queues = u16::try_from(board.config.vcpus).unwrap_or(MAX_QUEUES).min(MAX_QUEUES);
    for (index, open) in board.disks.iter().enumerate() {
        let name = format!("blk{index}");
        let serial = open.serial.clone().unwrap_or_else(|| format!("vireo-{index}"));
        board.plug(Block::new(open.disk.clone(), BlockConfig { name, serial, queues }))?;
    }
    Ok(())
}
