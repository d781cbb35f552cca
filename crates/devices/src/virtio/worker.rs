use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    thread::{self, JoinHandle},
    time::Duration,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::VirtioError;

const STOP: u64 = 0;
const KICK: u64 = 1;
const SOURCE: u64 = 2;

/// What woke a worker; none of them if time ran out or a signal came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wake {
    pub stop: bool,
    pub kick: bool,
    pub source: bool,
}

/// What a worker sleeps on: the order to stop, the driver's notifications and at most one other descriptor.
pub(super) struct Signals {
    epoll: Epoll,
    // Kept open for as long as epoll watches them.
    _stop: EventFd,
    _kick: EventFd,
}

impl Signals {
    fn new(stop: EventFd, kick: EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        // Edge-triggered: every write to an eventfd is an edge, so that a wake-up costs no read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), EpollEvent::new(edge, KICK))?;
        Ok(Self { epoll, _stop: stop, _kick: kick })
    }

    /// Adds the descriptor of the other end, not awaited yet.
    pub fn add_source(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::empty(), SOURCE))
    }

    /// From now on [`Self::wait`] returns (again and again) while `fd` is ready for `events`; empty for not at all.
    pub fn await_source(&self, fd: BorrowedFd<'_>, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd.as_raw_fd(), EpollEvent::new(events, SOURCE))
    }

    /// An epoll descriptor always reports hang-ups; this forgets a source that has ended.
    pub fn remove_source(&self, fd: BorrowedFd<'_>) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default());
    }

    pub fn wait(&self, timeout: Option<Duration>) -> Wake {
        let millis = timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
        let mut events = [EpollEvent::default(); 3];
        let ready = self.epoll.wait(millis, &mut events).unwrap_or(0);
        let mut wake = Wake::default();
        for event in &events[..ready] {
            match event.data() {
                STOP => wake.stop = true,
                KICK => wake.kick = true,
                _ => wake.source = true,
            }
        }
        wake
    }

    pub fn stopped(&self) -> bool {
        self.wait(Some(Duration::ZERO)).stop
    }
}

/// A thread that serves a virtqueue until it is told to stop, and then gives back a `T`.
pub(super) struct Worker<T> {
    stop: EventFd,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// The kernel keeps 15 bytes of `name`.
    pub fn spawn(
        name: String,
        kick: EventFd,
        serve: impl FnOnce(Signals) -> T + Send + 'static,
    ) -> Result<Self, VirtioError> {
        Self::try_spawn(name, kick, serve).map_err(VirtioError::Thread)
    }

    fn try_spawn(name: String, kick: EventFd, serve: impl FnOnce(Signals) -> T + Send + 'static) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let signals = Signals::new(stop.try_clone()?, kick)?;
        let thread = thread::Builder::new().name(name).spawn(move || serve(signals))?;
        Ok(Self { stop, thread })
    }

    /// Waits for the thread to end; `None` if it panicked.
    pub fn stop(self) -> Option<T> {
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}
