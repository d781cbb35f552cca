use std::{
    io::Write,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    input::{self, Input},
    output::{self, PIECE_BYTES, SharedOutput},
    saved::SavedConsole,
};
use crate::virtio::{QueueResources, QueueState, VirtioDevice, VirtioError, config, saved, worker::Worker};

const DEVICE_TYPE: u16 = 3;
const QUEUE_SIZES: [u16; 2] = [64, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Feature bits, virtio 1.2, 5.3.3.
const F_SIZE: u64 = 1 << 0;
const F_EMERG_WRITE: u64 = 1 << 2;
/// `emerg_wr` in `struct virtio_console_config` (virtio 1.2, 5.3.4).
const CONFIG_EMERG_WRITE: u64 = 8;

#[derive(Default)]
struct Size {
    columns: u16,
    rows: u16,
    /// Present while a queue runs.
    config_changed: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// The size of a console's window, to be set by whoever owns the terminal. Cheap to clone.
#[derive(Clone, Default)]
pub struct ConsoleSize(Arc<Mutex<Size>>);

impl ConsoleSize {
    fn lock(&self) -> MutexGuard<'_, Size> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the size and tells the guest if it is another.
    pub fn set(&self, columns: u16, rows: u16) {
        let mut size = self.lock();
        if (size.columns, size.rows) == (columns, rows) {
            return;
        }
        (size.columns, size.rows) = (columns, rows);
        let tell = size.config_changed.clone();
        drop(size);
        if let Some(tell) = tell {
            tell();
        }
    }

    fn get(&self) -> (u16, u16) {
        let size = self.lock();
        (size.columns, size.rows)
    }
}

/// A virtio console with one port.
pub struct Console {
    name: String,
    size: ConsoleSize,
    input: Option<Arc<Input>>,
    output: SharedOutput,
    workers: [Option<Worker<QueueState>>; 2],
}

impl Console {
    /// `name` becomes part of the threads' names, for example `con0`. `input` is read when it is readable; at its
    /// end, or without one, the guest gets no input. `output` may block or say `WouldBlock`: the guest then waits.
    pub fn new(name: &str, input: Option<OwnedFd>, output: Box<dyn Write + Send>) -> Self {
        Self {
            name: name.into(),
            size: ConsoleSize::default(),
            input: input.map(|fd| Arc::new(Input::new(fd))),
            output: SharedOutput::new(output),
            workers: [None, None],
        }
    }

    pub fn size(&self) -> ConsoleSize {
        self.size.clone()
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.size.get();
        let mut space = [0; 12];
        space[..2].copy_from_slice(&columns.to_le_bytes());
        space[2..4].copy_from_slice(&rows.to_le_bytes());
        // max_nr_ports, of no meaning without MULTIPORT
        space[4] = 1;
        config::read(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_EMERG_WRITE, [character, ..]) = (offset, data) {
            self.output.emergency(*character);
        }
    }

    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), VirtioError> {
        let name = |direction| format!("vireo-{}-{direction}", self.name);
        let config_changed = resources.config_changed.clone();
        let worker = match (index, &self.input) {
            (RECEIVE, Some(input)) => input::spawn(name("rx"), resources, input.clone())?,
            // Nothing to receive: a queue that only waits.
            (RECEIVE, None) => {
                let queue = crate::virtio::Queue::new(&resources)?;
                Worker::spawn(name("rx"), resources.kick, move |signals| {
                    while !signals.wait(None).stop {}
                    queue.state()
                })?
            }
            (TRANSMIT, _) => output::spawn(name("tx"), resources, self.output.clone())?,
            _ => return Err(VirtioError::BadRing),
        };
        self.workers[index] = Some(worker);
        self.size.lock().config_changed = Some(config_changed);
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        let state = self.workers.get_mut(index)?.take()?.stop();
        if self.workers.iter().all(Option::is_none) {
            self.size.lock().config_changed = None;
        }
        state
    }

    fn reset(&mut self) {}

    fn save(&self) -> Vec<u8> {
        let (columns, rows) = self.size.get();
        saved::encode(&SavedConsole { columns, rows, unwritten: self.output.unwritten() })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), VirtioError> {
        let saved: SavedConsole = saved::decode("console", bytes)?;
        if saved.unwritten.len() > PIECE_BYTES {
            return Err(VirtioError::BadState { device: "console", why: "too much unwritten output".into() });
        }
        self.size.set(saved.columns, saved.rows);
        self.output.set_unwritten(saved.unwritten);
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        for index in 0..self.workers.len() {
            self.stop_queue(index);
        }
    }
}
