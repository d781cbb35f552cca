//! COM1 and the thread that feeds it.

use std::{
    fs::File,
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::OwnedFd,
    sync::Arc,
    thread::{self, JoinHandle},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use vireo_devices::{
    interrupt::InterruptLine,
    serial::{Serial, SerialInput},
};

use super::Board;
use crate::{
    error::MachineError,
    layout::{COM1_PIN, COM1_PORT},
};

/// What is read for the guest in one go; lost if the machine ends before the guest takes it.
const PIECE_BYTES: usize = 256;

pub(super) fn com1(board: &mut Board<'_>) -> Result<(), MachineError> {
    let failed = |source| MachineError::Stream { device: "serial port", source };
    let stream = board.config.serial.as_ref();
    let output = stream.map(|stream| Box::new(stream.output()) as Box<dyn Write + Send>);
    let line = InterruptLine::new(board.ioapic.clone(), COM1_PIN as u8);
    let serial = Serial::new(line, output).map_err(failed)?;
    if let Some(input) = stream.map(|stream| stream.input()).transpose().map_err(failed)?.flatten() {
        board.serial_input = Some(SerialReader::start(input, serial.input()).map_err(failed)?);
    }
    board.bus.add_ports(COM1_PORT..=COM1_PORT + (Serial::PORTS - 1), Arc::new(serial))?;
    Ok(())
}

/// Moves bytes from a descriptor to the serial port, until it is dropped or there are no more. The port must be gone
/// by then, or have room.
pub(crate) struct SerialReader {
    /// Closing it ends the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl SerialReader {
    fn start(from: OwnedFd, to: SerialInput) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let body = move || {
            // At the end of the input, or when it fails, the guest gets no more.
            let _ = feed(from.into(), &to, &stopped);
        };
        let thread = thread::Builder::new().name("vireo-com1-in".into()).spawn(body)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for SerialReader {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn feed(mut from: File, to: &SerialInput, stopped: &PipeReader) -> io::Result<()> {
    let mut piece = [0; PIECE_BYTES];
    loop {
        let mut ready = [PollFd::new(&from, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut ready, None) {
            Err(Errno::INTR) => continue,
            result => result?,
        };
        if !ready[1].revents().is_empty() {
            return Ok(());
        }
        let len = from.read(&mut piece)?;
        if len == 0 || !to.send(&piece[..len]) {
            return Ok(());
        }
    }
}
