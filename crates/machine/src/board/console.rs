use vireo_devices::virtio::console::Console;

use super::Board;
use crate::error::MachineError;

pub(super) fn console(board: &mut Board<'_>) -> Result<(), MachineError> {
    let Some(config) = &board.config.console else { return Ok(()) };
    let input = config.stream.input().map_err(|source| MachineError::Stream { device: "console", source })?;
    let console = Console::new("con0", input, Box::new(config.stream.output()));
    if let Some((columns, rows)) = config.size {
        console.size().set(columns, rows);
    }
    board.handles.console_size = Some(console.size());
    board.plug(console)
}
