use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::virtio::{
    DescriptorChain, QueueError, QueueResources, QueueState, VirtioError,
    serve::Served,
    worker::{Signals, Worker},
};

/// Bytes taken from the driver before the other end has taken them.
pub const PIECE_BYTES: usize = 16 << 10;
/// Bytes that are written, if the other end takes them, before the order to stop is looked for.
const UNINTERRUPTED: u64 = 64 << 10;
/// How soon a full output is tried again.
const RETRY: Duration = Duration::from_millis(2);

/// Where the guest's output goes. It outlives the queue's thread.
pub(super) struct Output {
    writer: Box<dyn Write + Send>,
    /// At most [`PIECE_BYTES`].
    unwritten: Vec<u8>,
}

#[derive(Clone)]
pub(super) struct SharedOutput(Arc<Mutex<Output>>);

impl SharedOutput {
    pub fn new(writer: Box<dyn Write + Send>) -> Self {
        Self(Arc::new(Mutex::new(Output { writer, unwritten: Vec::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn unwritten(&self) -> Vec<u8> {
        self.lock().unwritten.clone()
    }

    pub fn set_unwritten(&self, bytes: Vec<u8>) {
        self.lock().unwritten = bytes;
    }

    /// The one character of an emergency write (virtio 1.2, 5.3.4); lost if there is no room for it.
    pub fn emergency(&self, character: u8) {
        let mut output = self.lock();
        if output.flush() && matches!(output.writer.write(&[character]), Ok(1)) {
            let _ = output.writer.flush();
        }
    }
}

impl Output {
    /// Writes what is left over; `false` if the other end is full. An end that is gone swallows everything.
    fn flush(&mut self) -> bool {
        let mut done = 0;
        while done < self.unwritten.len() {
            match self.writer.write(&self.unwritten[done..]) {
                Ok(0) => done = self.unwritten.len(),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => done = self.unwritten.len(),
            }
        }
        self.unwritten.drain(..done);
        self.unwritten.is_empty()
    }
}

pub(super) fn spawn(
    name: String,
    resources: QueueResources,
    output: SharedOutput,
) -> Result<Worker<QueueState>, VirtioError> {
    let served = Served::new(&resources)?;
    Worker::spawn(name, resources.kick, move |signals| {
        let mut transmit = Transmit { served, output, signals };
        if transmit.run().is_err() {
            transmit.served.give_up();
            while !transmit.signals.wait(None).stop {}
        }
        transmit.served.queue.state()
    })
}

struct Transmit {
    served: Served,
    output: SharedOutput,
    signals: Signals,
}

impl Transmit {
    fn run(&mut self) -> Result<(), QueueError> {
        loop {
            self.served.queue.disable_notification()?;
            let mut since_look = 0;
            for _ in 0..self.served.queue.size() {
                if !self.drain_output()? || (since_look >= UNINTERRUPTED && self.signals.stopped()) {
                    return Ok(());
                }
                since_look %= UNINTERRUPTED;
                let Some(chain) = self.served.queue.pop()? else { break };
                since_look += chain.readable_bytes();
                let stop = !self.write(&chain)?;
                self.served.queue.push(chain, 0)?;
                if stop {
                    return self.served.signal();
                }
            }
            let _ = self.output.lock().writer.flush();
            self.served.signal()?;
            let more = self.served.queue.enable_notification()?;
            if self.signals.wait(more.then_some(Duration::ZERO)).stop {
                return Ok(());
            }
        }
    }

    /// Passes a chain on; `false` if the thread shall stop. What has not been written by then waits in the output,
    /// and of a chain longer than that (no driver sends one) the rest is lost.
    fn write(&mut self, chain: &DescriptorChain) -> Result<bool, QueueError> {
        let mut reader = chain.reader();
        while reader.remaining() > 0 {
            let long = reader.position() > 0 && reader.position().is_multiple_of(UNINTERRUPTED);
            if !self.drain_output()? || (long && self.signals.stopped()) {
                return Ok(false);
            }
            let mut output = self.output.lock();
            let len = reader.remaining().min(PIECE_BYTES as u64) as usize;
            output.unwritten.resize(len, 0);
            reader.read(&mut output.unwritten);
            output.flush();
        }
        Ok(true)
    }

    /// Waits until all that was taken is written; `false` if the thread shall stop first.
    fn drain_output(&mut self) -> Result<bool, QueueError> {
        while !self.output.lock().flush() {
            self.served.signal()?;
            if self.signals.wait(Some(RETRY)).stop {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
