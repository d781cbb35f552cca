use std::{
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use vmm_sys_util::epoll::EventSet;

use crate::virtio::{
    QueueError, QueueResources, QueueState, VirtioError,
    serve::Served,
    worker::{Signals, Worker},
};

const PIECE_BYTES: usize = 4096;

/// A descriptor that the guest's input is read from when `epoll` says that it has some.
pub(super) struct Input {
    file: std::fs::File,
}

impl Input {
    pub fn new(fd: OwnedFd) -> Self {
        Self { file: fd.into() }
    }
}

pub(super) fn spawn(
    name: String,
    resources: QueueResources,
    input: Arc<Input>,
) -> Result<Worker<QueueState>, VirtioError> {
    let served = Served::new(&resources)?;
    Worker::spawn(name, resources.kick, move |signals| {
        let mut receive = Receive { served, signals, polled: false, awaited: false, ended: false, input };
        if receive.run().is_err() {
            receive.served.give_up();
            receive.end();
            while !receive.signals.wait(None).stop {}
        }
        receive.served.queue.state()
    })
}

struct Receive {
    served: Served,
    signals: Signals,
    /// Regular files cannot be polled, and need not be: they are always ready.
    polled: bool,
    /// Whether we asked to be woken when there is input.
    awaited: bool,
    ended: bool,
    input: Arc<Input>,
}

impl Receive {
    fn run(&mut self) -> Result<(), QueueError> {
        self.polled = self.signals.add_source(self.input.file.as_fd()).is_ok();
        self.served.queue.disable_notification()?;
        let mut has_buffers = false;
        loop {
            has_buffers = has_buffers || self.wait_for_buffer()?;
            let wanted = has_buffers && !self.ended;
            let always = wanted && !self.polled;
            self.set_awaited(wanted && self.polled);
            let wake = self.signals.wait(always.then_some(std::time::Duration::ZERO));
            if wake.stop {
                return Ok(());
            }
            if wanted && (wake.source || always) {
                has_buffers = self.receive()?;
                self.served.signal()?;
            } else if wake.source && !has_buffers {
                // Nothing but a hang-up comes unasked for; without buffers it would come again and again.
                self.signals.remove_source(self.input.file.as_fd());
                self.polled = false;
            }
        }
    }

    /// Whether the driver has given us a buffer; if not, it will notify us when it does.
    fn wait_for_buffer(&mut self) -> Result<bool, QueueError> {
        self.served.queue.enable_notification()
    }

    /// Passes on what can be read now, as far as one buffer goes; returns whether it had a buffer.
    fn receive(&mut self) -> Result<bool, QueueError> {
        let Some(chain) = self.served.queue.pop()? else { return Ok(false) };
        let room = chain.writable_bytes().min(PIECE_BYTES as u64) as usize;
        let mut bytes = [0; PIECE_BYTES];
        if room == 0 {
            return self.served.queue.push(chain, 0).map(|()| true);
        }
        match (&self.input.file).read(&mut bytes[..room]) {
            Ok(len @ 1..) => {
                let written = chain.writer().write(&bytes[..len]);
                self.served.queue.push(chain, written as u32)?;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                self.served.queue.unpop(chain);
            }
            Ok(0) | Err(_) => {
                self.served.queue.unpop(chain);
                self.end();
            }
        }
        Ok(true)
    }

    fn set_awaited(&mut self, awaited: bool) {
        if self.polled && self.awaited != awaited {
            let events = if awaited { EventSet::IN } else { EventSet::empty() };
            let _ = self.signals.await_source(self.input.file.as_fd(), events);
            self.awaited = awaited;
        }
    }

    fn end(&mut self) {
        self.ended = true;
        self.polled = false;
        self.signals.remove_source(self.input.file.as_fd());
    }
}
