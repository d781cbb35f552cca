use std::{
    io::IoSliceMut,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use vmm_sys_util::epoll::EventSet;

use super::{
    device::feature::MRG_RXBUF,
    header::{self, HEADER_BYTES, MAX_FRAME_BYTES},
    link::Shared,
};
use crate::virtio::{
    DescriptorChain, QueueError, QueueResources, QueueState, VirtioError,
    serve::Served,
    worker::{Signals, Worker},
};

/// Frames that may wait for one interrupt while more come in.
const BATCH: usize = 64;
/// How long to stay away from a backend that fails.
const AFTER_FAILURE: Duration = Duration::from_millis(20);

pub(super) fn spawn(
    name: String,
    resources: QueueResources,
    shared: Arc<Shared>,
) -> Result<Worker<QueueState>, VirtioError> {
    let served = Served::new(&resources)?;
    let readable = shared.backend.readable().try_clone_to_owned().map_err(VirtioError::Thread)?;
    let mergeable = resources.features & MRG_RXBUF != 0;
    Worker::spawn(name, resources.kick, move |signals| {
        let frame = vec![0; MAX_FRAME_BYTES].into();
        let mut receive =
            Receive { served, shared, readable, signals, mergeable, frame, waiting: None, chains: Vec::new() };
        let served = receive.run();
        receive.put_back();
        if served.is_err() {
            receive.served.give_up();
            receive.signals.remove_source(receive.readable.as_fd());
            while !receive.signals.wait(None).stop {}
        }
        receive.served.queue.state()
    })
}

/// What the thread does next.
#[derive(PartialEq, Eq)]
enum Next {
    Frame,
    WaitForFrame,
    WaitForBuffers,
    /// Something failed on the host: later.
    Rest,
}

struct Receive {
    served: Served,
    shared: Arc<Shared>,
    readable: OwnedFd,
    signals: Signals,
    mergeable: bool,
    frame: Box<[u8]>,
    /// Length of the frame in `frame` that the driver has no room for yet.
    waiting: Option<usize>,
    /// Buffers for the next frame, as far as they have been popped.
    chains: Vec<DescriptorChain>,
}

impl Receive {
    fn run(&mut self) -> Result<(), QueueError> {
        let polled = self.signals.add_source(self.readable.as_fd()).is_ok();
        let mut awaited = false;
        self.served.queue.disable_notification()?;
        loop {
            let next = self.receive_batch()?;
            self.served.signal()?;
            if next == Next::WaitForBuffers && self.served.queue.enable_notification()? {
                continue;
            }
            let wanted = next == Next::WaitForFrame;
            if polled && awaited != wanted {
                let events = if wanted { EventSet::IN } else { EventSet::empty() };
                awaited = self.signals.await_source(self.readable.as_fd(), events).is_ok() && wanted;
            }
            let timeout = match next {
                Next::Frame => Some(Duration::ZERO),
                Next::Rest => Some(AFTER_FAILURE),
                Next::WaitForFrame | Next::WaitForBuffers => None,
            };
            if self.signals.wait(timeout).stop {
                return Ok(());
            }
            self.served.queue.disable_notification()?;
        }
    }

    fn receive_batch(&mut self) -> Result<Next, QueueError> {
        for _ in 0..BATCH {
            let len = match self.waiting.take() {
                Some(len) => len,
                None => match self.next_frame()? {
                    Ok(len) => len,
                    Err(next) => return Ok(next),
                },
            };
            if !self.deliver(len)? {
                self.waiting = Some(len);
                return Ok(Next::WaitForBuffers);
            }
        }
        Ok(Next::Frame)
    }

    /// Takes a frame from the backend if the driver has any room at all: until then the backend may keep it.
    fn next_frame(&mut self) -> Result<Result<usize, Next>, QueueError> {
        if self.chains.is_empty() {
            let Some(chain) = self.served.queue.pop()? else { return Ok(Err(Next::WaitForBuffers)) };
            self.chains.push(chain);
        }
        Ok(match self.shared.backend.recv(&mut [IoSliceMut::new(&mut self.frame)]) {
            Ok(Some(len)) => Ok(len.min(self.frame.len())),
            Ok(None) => Err(Next::WaitForFrame),
            Err(_) => Err(Next::Rest),
        })
    }

    /// Hands the first `len` bytes of `frame` to the driver; `false` if there is no room for them yet.
    fn deliver(&mut self, len: usize) -> Result<bool, QueueError> {
        if len < HEADER_BYTES || !self.shared.up.load(Ordering::Acquire) {
            return Ok(true);
        }
        match self.gather(len)? {
            Room::Enough => self.fill(len)?,
            Room::TooLittle => return Ok(false),
            // The frame is lost: waiting would not help it.
            Room::Never => self.put_back(),
        }
        Ok(true)
    }

    /// Pops buffers until `len` bytes fit (virtio 1.2, 5.1.6.3.2). Those that do not suffice are kept: a
    /// notification only comes for buffers behind what was popped.
    fn gather(&mut self, len: usize) -> Result<Room, QueueError> {
        let mut room: u64 = self.chains.iter().map(DescriptorChain::writable_bytes).sum();
        let most = if self.mergeable { usize::from(self.served.queue.size()) } else { 1 };
        while room < len as u64 {
            if self.chains.len() >= most {
                return Ok(Room::Never);
            }
            let Some(chain) = self.served.queue.pop()? else { return Ok(Room::TooLittle) };
            room += chain.writable_bytes();
            self.chains.push(chain);
        }
        Ok(Room::Enough)
    }

    fn put_back(&mut self) {
        while let Some(chain) = self.chains.pop() {
            self.served.queue.unpop(chain);
        }
    }

    fn fill(&mut self, len: usize) -> Result<(), QueueError> {
        header::set_buffers(&mut self.frame, self.chains.len() as u16);
        let mut rest = &self.frame[..len];
        for chain in self.chains.drain(..) {
            let written = chain.writer().write(rest);
            rest = &rest[written..];
            self.served.queue.add_used(chain, written as u32)?;
        }
        // All at once: the driver takes the first buffer of a frame for a sign that the others are there.
        self.served.queue.publish()
    }
}

#[derive(PartialEq, Eq)]
enum Room {
    Enough,
    TooLittle,
    /// Not even with all buffers that there can be.
    Never,
}
