use std::{
    collections::VecDeque,
    io::{self, Read},
    net::Shutdown,
    num::Wrapping,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::mpsc::SyncSender,
    time::Instant,
};

use vireo_memory::GuestSlice;

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::virtio::Reader;

/// `UIO_MAXIOV`
const MAX_IOVECS: usize = 1024;

/// Packets without payload that a connection has to send; a set, so it cannot grow.
pub mod due {
    pub const REQUEST: u8 = 1;
    pub const RESPONSE: u8 = 2;
    pub const CREDIT_UPDATE: u8 = 4;
    pub const CREDIT_REQUEST: u8 = 8;
    pub const SHUTDOWN: u8 = 16;
}

pub type Answer = SyncSender<io::Result<UnixStream>>;

pub enum Phase {
    /// The guest has not answered yet; the host's end is handed out when it does.
    Connecting {
        answer: Answer,
        host_end: UnixStream,
    },
    Open,
    /// The guest has gone, after it said that it would send no more: only what it sent before still has to
    /// reach the host.
    Orphaned,
}

/// The guest broke the protocol of a connection, which is reset then.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation;

pub enum FromHost {
    Data(usize),
    End,
    /// Nothing to read, or the guest has no room for it.
    Nothing,
}

/// One direction is open or not, at either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    pub sends: bool,
    pub receives: bool,
}

const BOTH: Side = Side { sends: true, receives: true };

pub struct Connection {
    pub stream: UnixStream,
    pub phase: Phase,
    host_port: u32,
    guest_port: u32,
    pub due: u8,
    /// Whether it stands in the line of those that have something to send.
    pub queued: bool,
    /// When to give up on an answer to our request.
    pub deadline: Option<Instant>,
    pub guest: Side,
    host: Side,
    /// `epoll` said so, and no read has come back empty since.
    pub readable: bool,
    /// The guest was asked for credit and has given none yet.
    asked: bool,
    /// What the host's end had no room for; at most `buf_alloc` bytes.
    backlog: VecDeque<u8>,

    // Credit (virtio 1.2, 5.10.6.3): what the guest may send us …
    buf_alloc: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told: Wrapping<u32>,
    // … and what we may send the guest.
    sent: Wrapping<u32>,
    peer_buf_alloc: u32,
    peer_forwarded: Wrapping<u32>,
}

impl Connection {
    pub fn new(stream: UnixStream, phase: Phase, host_port: u32, guest_port: u32, buf_alloc: u32) -> Self {
        Self {
            stream,
            phase,
            host_port,
            guest_port,
            due: 0,
            queued: false,
            deadline: None,
            guest: BOTH,
            host: BOTH,
            readable: false,
            asked: false,
            backlog: VecDeque::new(),
            buf_alloc,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            peer_buf_alloc: 0,
            peer_forwarded: Wrapping(0),
        }
    }

    /// Every packet from the guest carries its credit.
    pub fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// Bytes that the guest has room for. A guest that counts wrongly gets nothing.
    pub fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    pub fn ports(&self) -> (u32, u32) {
        (self.host_port, self.guest_port)
    }

    pub fn buffer_bytes(&self) -> u32 {
        self.buf_alloc
    }

    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether there is something for the guest right now.
    pub fn wants_to_send(&self) -> bool {
        let alive = !matches!(self.phase, Phase::Orphaned);
        alive && (self.due != 0 || (self.may_read() && self.readable && self.credit() > 0))
    }

    fn may_read(&self) -> bool {
        matches!(self.phase, Phase::Open) && self.host.sends && self.guest.receives
    }

    /// The guest sent the next `header.len` bytes of `reader`.
    pub fn receive(&mut self, len: u32, reader: Reader<'_>) -> Result<(), Violation> {
        let room = self.buf_alloc.saturating_sub((self.received - self.forwarded).0);
        if !self.guest.sends || len > room {
            return Err(Violation);
        }
        self.received += len;
        let mut written = 0;
        if self.backlog.is_empty() && self.host.receives {
            let mut slices = Vec::new();
            reader.clone().take(u64::from(len), &mut slices).map_err(|_| Violation)?;
            written = self.write(&slices).min(len as usize);
        }
        if self.host.receives {
            let mut rest = vec![0; len as usize - written];
            let mut reader = reader;
            reader.skip(written as u64).and_then(|()| reader.read_exact(&mut rest)).map_err(|_| Violation)?;
            self.backlog.extend(rest);
            self.forward(written as u32);
        } else {
            self.forward(len);
        }
        Ok(())
    }

    /// `bytes` more have left our hands; tells the guest before it runs out of credit.
    fn forward(&mut self, bytes: u32) {
        self.forwarded += bytes;
        let left = self.buf_alloc.saturating_sub((self.received - self.told).0);
        if left < self.buf_alloc / 2 && self.told != self.forwarded && self.guest.sends {
            self.due |= due::CREDIT_UPDATE;
        }
    }

    /// Writes what the host's end takes now.
    fn write(&mut self, slices: &[GuestSlice<'_>]) -> usize {
        let mut iovecs: Vec<libc::iovec> = slices.iter().take(MAX_IOVECS).map(GuestSlice::as_iovec).collect();
        match send(&self.stream, &mut iovecs) {
            Ok(written) => written,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.host_stops_receiving();
                0
            }
        }
    }

    /// The host's end has room again, or has gone.
    pub fn flush(&mut self) {
        while self.host.receives && !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_mut_slices();
            let mut iovec = [libc::iovec { iov_base: front.as_mut_ptr().cast(), iov_len: front.len() }];
            match send(&self.stream, &mut iovec) {
                Ok(written) => {
                    self.backlog.drain(..written);
                    self.forward(written as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_stops_receiving(),
            }
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
            if !self.guest.sends {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
    }

    /// Nobody on the host will read what comes.
    pub fn host_stops_receiving(&mut self) {
        if self.host.receives {
            self.host.receives = false;
            self.due |= due::SHUTDOWN;
            let dropped = self.backlog.len() as u32;
            self.backlog = VecDeque::new();
            self.forward(dropped);
        }
    }

    /// Reads what the guest has room for.
    pub fn read(&mut self, buffer: &mut [u8]) -> FromHost {
        if !self.may_read() || !self.readable {
            return FromHost::Nothing;
        }
        let len = buffer.len().min(self.credit() as usize);
        if len == 0 {
            return FromHost::Nothing;
        }
        match self.stream.read(&mut buffer[..len]) {
            Ok(0) => self.host_stops_sending(),
            Ok(len) => FromHost::Data(len),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                FromHost::Nothing
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => FromHost::Nothing,
            Err(_) => self.host_stops_sending(),
        }
    }

    fn host_stops_sending(&mut self) -> FromHost {
        self.host.sends = false;
        self.readable = false;
        self.due |= due::SHUTDOWN;
        FromHost::End
    }

    /// Asks for credit, once, if there is data that waits for it.
    pub fn ask_for_credit(&mut self) {
        let starved = self.credit() == 0;
        if starved && !self.asked && self.may_read() && self.readable {
            self.due |= due::CREDIT_REQUEST;
        }
        self.asked = starved && (self.asked || self.due & due::CREDIT_REQUEST != 0);
    }

    /// The guest shut down one or both directions.
    pub fn guest_shuts_down(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest.receives = false;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest.sends = false;
            self.flush();
        }
    }

    /// Whether both sides are through with it.
    pub fn is_done(&self) -> bool {
        self.guest == (Side { sends: false, receives: false }) && self.backlog.is_empty()
    }

    /// Whether the host has closed its end.
    pub fn host_is_gone(&self) -> bool {
        !self.host.sends && !self.host.receives
    }

    /// The next packet without payload.
    pub fn next_control(&mut self) -> Option<(u16, u32)> {
        let shutdown =
            if self.host.sends { 0 } else { SHUTDOWN_SEND } | if self.host.receives { 0 } else { SHUTDOWN_RECEIVE };
        let table = [
            (due::REQUEST, op::REQUEST, 0),
            (due::RESPONSE, op::RESPONSE, 0),
            (due::CREDIT_UPDATE, op::CREDIT_UPDATE, 0),
            (due::CREDIT_REQUEST, op::CREDIT_REQUEST, 0),
            (due::SHUTDOWN, op::SHUTDOWN, shutdown),
        ];
        let (bit, op, flags) = table.into_iter().find(|(bit, ..)| self.due & bit != 0)?;
        self.due &= !bit;
        Some((op, flags))
    }

    /// The header of a packet to the guest, which tells our credit on the way.
    pub fn header(&mut self, op: u16, flags: u32, len: u32) -> Header {
        self.told = self.forwarded;
        self.due &= !due::CREDIT_UPDATE;
        self.sent += len;
        Header {
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded.0,
            ..Header::default()
        }
    }
}

/// Writes to a socket without waiting and without `SIGPIPE`.
fn send(stream: &UnixStream, iovecs: &mut [libc::iovec]) -> io::Result<usize> {
    loop {
        // SAFETY: an all-zero msghdr is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        message.msg_iovlen = iovecs.len();
        // SAFETY: the iovecs describe guest RAM that its chain keeps mapped, or a buffer that the caller borrows
        // for as long as this call; the kernel only reads them.
        let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
