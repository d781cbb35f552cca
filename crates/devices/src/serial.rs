//! A serial port: 16550A (National Semiconductor PC16550D data sheet) with FIFOs.
//!
//! Speed and frame format are kept and ignored. No call from a vCPU ever waits for the host: output goes to a
//! buffer that a thread of its own empties; while the buffer is full the transmitter says that it is busy, as a
//! slow line would, so nothing is lost of a guest that looks. Input comes from any thread and waits likewise.

mod uart;

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::{bus::BytePorts, interrupt::InterruptLine, saved::BadState};
use uart::Uart;

pub use uart::SavedSerial;

/// Output that waits for the host at most, in bytes.
const OUTPUT_BYTES: usize = 64 << 10;
/// Input that waits for the guest at most, in bytes, besides the FIFO.
const INPUT_BYTES: usize = 4 << 10;
/// A guest writes byte by byte: waiting this long makes one write of many.
const GATHER: Duration = Duration::from_millis(2);
/// With so much to write there is nothing to wait for.
const GATHERED_BYTES: usize = 4 << 10;
/// How long dropping the port waits for its output to get out.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub struct Serial {
    port: Arc<Port>,
}

/// The host's end of the receive line. Clones are the same line.
#[derive(Clone)]
pub struct SerialInput {
    port: Arc<Port>,
}

struct Port {
    state: Mutex<State>,
    /// There is output, or the port closes.
    work: Condvar,
    /// All output is written.
    written: Condvar,
    /// Input was taken, or the port closes.
    room: Condvar,
}

struct State {
    uart: Uart,
    line: InterruptLine,
    /// What `line` was last told: most accesses change nothing.
    level: Option<bool>,
    input: VecDeque<u8>,
    output: Output,
    closed: bool,
}

#[derive(Default)]
struct Output {
    buffer: Vec<u8>,
    /// Whether anyone takes what is in the buffer.
    connected: bool,
    /// Whether the thread has bytes in its hands.
    busy: bool,
}

impl Output {
    fn is_full(&self) -> bool {
        self.buffer.len() >= OUTPUT_BYTES
    }
}

impl Serial {
    pub const PORTS: u16 = 8;

    /// What the guest sends goes to `output`, if there is one.
    pub fn new(line: InterruptLine, output: Option<Box<dyn Write + Send>>) -> io::Result<Self> {
        Self::build(Uart::default(), VecDeque::new(), line, output)
    }

    pub fn restore(
        line: InterruptLine,
        output: Option<Box<dyn Write + Send>>,
        saved: SavedSerial,
    ) -> Result<Self, RestoreError> {
        let (uart, input) = Uart::restore(saved)?;
        if input.len() > INPUT_BYTES {
            return Err(BadState::new("serial port", format!("{} bytes of input", input.len())).into());
        }
        Ok(Self::build(uart, input.into(), line, output)?)
    }

    fn build(
        uart: Uart,
        input: VecDeque<u8>,
        line: InterruptLine,
        output: Option<Box<dyn Write + Send>>,
    ) -> io::Result<Self> {
        let connected = output.is_some();
        let output_state = Output { connected, ..Output::default() };
        let state = State { uart, line, level: None, input, output: output_state, closed: false };
        let (work, written, room) = Default::default();
        let port = Arc::new(Port { state: Mutex::new(state), work, written, room });
        port.lock().settle();
        if let Some(writer) = output {
            let port = port.clone();
            thread::Builder::new().name("vireo-serial".into()).spawn(move || port.write_out(writer))?;
        }
        Ok(Self { port })
    }

    /// Registers, FIFO and input that waits. What the guest sent is the host's already and not part of it.
    pub fn save(&self) -> SavedSerial {
        let state = self.port.lock();
        state.uart.save(&state.input)
    }

    pub fn input(&self) -> SerialInput {
        SerialInput { port: self.port.clone() }
    }

    /// Waits until all output is written; `false` if that takes longer than `timeout`.
    pub fn flush(&self, timeout: Duration) -> bool {
        self.port.flush(timeout)
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.port.lock().closed = true;
        self.port.work.notify_all();
        self.port.room.notify_all();
        // A terminal that takes nothing must not keep the process; its thread then ends with it.
        self.port.flush(LAST_WORDS);
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    State(#[from] BadState),
    #[error("cannot start the serial port's thread")]
    Thread(#[from] io::Error),
}

impl SerialInput {
    /// Takes as much of `data` as there is room for now; returns how much.
    pub fn offer(&self, data: &[u8]) -> usize {
        let mut state = self.port.lock();
        state.take_input(data)
    }

    /// Waits until the guest has room for all of `data`; `false` if the port is gone before.
    pub fn send(&self, mut data: &[u8]) -> bool {
        let mut state = self.port.lock();
        while !state.closed {
            data = &data[state.take_input(data)..];
            if data.is_empty() {
                return true;
            }
            state = self.port.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        false
    }
}

impl Port {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while state.output.connected && (state.output.busy || !state.output.buffer.is_empty()) {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return false;
            };
            state = self.written.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The output thread.
    fn write_out(&self, mut writer: Box<dyn Write + Send>) {
        let mut bytes = Vec::new();
        let mut state = self.lock();
        loop {
            if state.output.buffer.is_empty() {
                self.written.notify_all();
                if state.closed {
                    return;
                }
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if !state.closed && state.output.buffer.len() < GATHERED_BYTES {
                state = self.gather(state);
            }
            std::mem::swap(&mut bytes, &mut state.output.buffer);
            state.output.busy = true;
            // The buffer is empty now: a transmitter that was busy is ready.
            state.settle();
            drop(state);
            let result = writer.write_all(&bytes).and_then(|()| writer.flush());
            bytes.clear();
            state = self.lock();
            state.output.busy = false;
            if result.is_err() {
                // Nobody listens any more; the guest need not know.
                state.output = Output::default();
                state.settle();
                self.written.notify_all();
                return;
            }
        }
    }

    /// Gives the guest a moment to write more.
    fn gather<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let more = |state: &mut State| !state.closed && state.output.buffer.len() < GATHERED_BYTES;
        self.work.wait_timeout_while(state, GATHER, more).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl State {
    fn take_input(&mut self, data: &[u8]) -> usize {
        let len = data.len().min(INPUT_BYTES - self.input.len().min(INPUT_BYTES));
        self.input.extend(&data[..len]);
        self.settle();
        len
    }

    /// Moves what can move and sets the interrupt line accordingly.
    fn settle(&mut self) {
        while self.uart.can_receive()
            && let Some(byte) = self.input.pop_front()
        {
            self.uart.receive(byte);
        }
        self.uart.set_transmitter_ready(!self.output.is_full());
        let level = self.uart.interrupts();
        if self.level.replace(level) != Some(level) {
            self.line.set_level(level);
        }
    }
}

impl BytePorts for Serial {
    fn read_port(&self, offset: u16) -> u8 {
        let mut state = self.port.lock();
        let waiting = state.input.len();
        let value = state.uart.read(offset);
        state.settle();
        if state.input.len() < waiting {
            self.port.room.notify_all();
        }
        value
    }

    fn write_port(&self, offset: u16, value: u8) {
        let mut state = self.port.lock();
        let sent = state.uart.write(offset, value);
        if let Some(byte) = sent
            && state.output.connected
            && !state.output.is_full()
        {
            state.output.buffer.push(byte);
            let len = state.output.buffer.len();
            if len == 1 || len == GATHERED_BYTES {
                self.port.work.notify_one();
            }
        }
        state.settle();
    }
}

#[cfg(test)]
mod tests;
