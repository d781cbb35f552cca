//! epoll, with names for what was registered instead of numbers.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::slots::SlotId;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Wake,
    Tcp(SlotId),
    Udp(SlotId),
    Ping(SlotId),
    Forward(usize),
}

/// The socket may have become readable or writable; an error or hang-up counts as both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Readiness {
    pub readable: bool,
    pub writable: bool,
    /// There is an end of stream or an error to be read after the data.
    pub hang_up: bool,
}

impl Token {
    fn to_bits(self) -> u64 {
        let (kind, value) = match self {
            Self::Wake => (0, 0),
            Self::Tcp(id) => (1, id.to_bits()),
            Self::Udp(id) => (2, id.to_bits()),
            Self::Ping(id) => (3, id.to_bits()),
            Self::Forward(index) => (4, index as u64),
        };
        kind << 60 | value
    }

    fn from_bits(bits: u64) -> Option<Self> {
        let value = bits & ((1 << 60) - 1);
        Some(match bits >> 60 {
            0 => Self::Wake,
            1 => Self::Tcp(SlotId::from_bits(value)),
            2 => Self::Udp(SlotId::from_bits(value)),
            3 => Self::Ping(SlotId::from_bits(value)),
            4 => Self::Forward(value as usize),
            _ => return None,
        })
    }
}

pub(crate) struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, events: vec![EpollEvent::default(); 64] })
    }

    /// Level-triggered, for what is always emptied at once.
    pub(crate) fn watch_input(&self, socket: &impl AsRawFd, token: Token) -> io::Result<()> {
        self.add(socket.as_raw_fd(), EventSet::IN, token)
    }

    /// Edge-triggered: the flow remembers what it has not used up yet. Closing the socket ends it.
    pub(crate) fn watch_edges(&self, socket: &impl AsRawFd, token: Token) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.add(socket.as_raw_fd(), events, token)
    }

    fn add(&self, fd: RawFd, events: EventSet, token: Token) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token.to_bits()))
    }

    /// Waits until something happens or the time is over, and lists what happened in `out`.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<(Token, Readiness)>) -> io::Result<()> {
        // Rounded up, or the last millisecond before a deadline would be spent spinning.
        let timeout = timeout.map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let count = match self.epoll.wait(timeout, &mut self.events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for event in self.events.iter().take(count) {
            let Some(token) = Token::from_bits(event.data()) else { continue };
            let events = event.event_set();
            let broken = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
            let hang_up = broken || events.contains(EventSet::READ_HANG_UP);
            let readable = hang_up || events.contains(EventSet::IN);
            let writable = broken || events.contains(EventSet::OUT);
            out.push((token, Readiness { readable, writable, hang_up }));
        }
        Ok(())
    }
}
