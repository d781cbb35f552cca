//! One TCP connection: the guest's end in the stack, the other in a socket of the host, and the bytes between them.

use std::{
    io::{self, ErrorKind, Read},
    net::{Shutdown, SocketAddr},
    time::Duration,
};

use smoltcp::{
    iface::{Interface, PollResult, SocketHandle, SocketSet},
    socket::tcp::{self, State},
    time::Instant,
    wire::IpEndpoint,
};
use socket2::Socket;

use super::device::FlowDevice;
use crate::user::{
    buffer::{self, Region},
    poller::Readiness,
};

/// How long the guest may leave data unacknowledged, as long as Linux waits with `tcp_retries2`.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// RFC 5382, REQ-5: open connections, and those of which only an acknowledgement of the end is missing.
const IDLE_LIMIT: Duration = Duration::from_secs(2 * 3600 + 4 * 60);
const CLOSING_LIMIT: Duration = Duration::from_secs(4 * 60);
/// How long it may take to answer a SYN.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(75);

pub(crate) struct Connection {
    // Declared before the regions that its buffers live in: fields are dropped in this order.
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    _regions: [Region; 2],
    pub buffer_bytes: usize,
    established: bool,
    /// The host's socket may have something to read, or room to write.
    readable: bool,
    writable: bool,
    hang_up: bool,
    /// The peer outside sends no more, and we told it that the guest does not.
    host_finished: bool,
    host_told: bool,
    guest_finished: bool,
    /// A socket error ended it.
    broken: bool,
}

/// What a connection needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing before the deadline, if there is one, or an event.
    Wait(Option<Instant>),
    /// To go on as soon as the queue to the guest has room.
    Stalled,
    /// It is over; if not in good order, the peer outside should see a reset.
    Over { in_order: bool },
}

impl Connection {
    fn new(buffer_bytes: usize) -> io::Result<Self> {
        // SAFETY: the regions live in this object as long as the socket that gets the slices, and are dropped after it.
        let (receive_region, receive) = unsafe { Region::new(buffer_bytes) }?;
        // SAFETY: as above.
        let (send_region, send) = unsafe { Region::new(buffer_bytes) }?;
        let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(receive), tcp::SocketBuffer::new(send));
        // Nagle's algorithm has run already, at the sender; acknowledgements are cheap here, and waiting for them is not.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(HANDSHAKE_PATIENCE.into()));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Ok(Self {
            sockets,
            handle,
            _regions: [receive_region, send_region],
            buffer_bytes: 2 * buffer_bytes,
            established: false,
            readable: true,
            writable: true,
            hang_up: false,
            host_finished: false,
            host_told: false,
            guest_finished: false,
            broken: false,
        })
    }

    /// The passive end for a SYN of the guest, which has yet to be given to [`Self::receive`].
    pub(crate) fn listening(remote: SocketAddr, used: usize) -> io::Result<Self> {
        let mut connection = Self::new(buffer::size_for(used))?;
        let local = IpEndpoint::from(remote);
        connection.socket().listen(local).map_err(|_| ErrorKind::InvalidInput)?;
        Ok(connection)
    }

    /// The active end of a connection to the guest.
    pub(crate) fn connecting(
        interface: &mut Interface,
        guest: SocketAddr,
        remote: SocketAddr,
        used: usize,
    ) -> io::Result<Self> {
        let mut connection = Self::new(buffer::size_for(used))?;
        let (peer, local) = (IpEndpoint::from(guest), IpEndpoint::from(remote));
        connection.socket().connect(interface.context(), peer, local).map_err(|_| ErrorKind::InvalidInput)?;
        Ok(connection)
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    pub(crate) fn state(&mut self) -> State {
        self.socket().state()
    }

    pub(crate) fn note(&mut self, readiness: Readiness) {
        self.readable |= readiness.readable;
        self.writable |= readiness.writable;
        self.hang_up |= readiness.hang_up;
    }

    /// A packet of the guest, which the device holds.
    pub(crate) fn receive(&mut self, interface: &mut Interface, device: &mut FlowDevice<'_>, now: Instant) {
        interface.poll_ingress_single(now, device, &mut self.sockets);
        // From Closed it can no longer be told whether the guest had finished.
        self.guest_finished |=
            matches!(self.state(), State::CloseWait | State::Closing | State::LastAck | State::TimeWait);
    }

    /// Ends it with a reset to the guest.
    pub(crate) fn abort(&mut self) {
        self.broken = true;
        self.socket().abort();
    }

    /// Moves what can be moved, both ways.
    pub(crate) fn service(
        &mut self,
        host: &Socket,
        interface: &mut Interface,
        device: &mut FlowDevice<'_>,
        now: Instant,
    ) -> Step {
        self.established |= self.socket().may_send();
        if let Err(_error) = self.guest_to_host(host).and_then(|()| self.host_to_guest(host)) {
            // The peer is gone, whatever the reason; all that TCP has to tell the guest is a reset.
            self.abort();
        }
        self.set_timeout();
        while interface.poll_egress(now, device, &mut self.sockets) == PollResult::SocketStateChanged {}
        self.next_step(interface, device, now)
    }

    /// The stack's timeout ends idle connections too, so it is only set while the guest owes an acknowledgement of data.
    fn set_timeout(&mut self) {
        let established = self.established;
        let socket = self.socket();
        let timeout = match (established, socket.send_queue()) {
            (false, _) => Some(HANDSHAKE_PATIENCE),
            (true, 0) => None,
            (true, _) => Some(PATIENCE),
        };
        socket.set_timeout(timeout.map(Into::into));
    }

    /// How long nothing may happen before it is given up.
    pub(crate) fn idle_limit(&mut self) -> Duration {
        match self.state() {
            State::FinWait1 | State::Closing | State::LastAck | State::TimeWait | State::Closed => CLOSING_LIMIT,
            _ => IDLE_LIMIT,
        }
    }

    fn guest_to_host(&mut self, host: &Socket) -> io::Result<()> {
        while self.writable && !self.broken {
            let socket = self.sockets.get_mut::<tcp::Socket<'static>>(self.handle);
            if !socket.can_recv() {
                break;
            }
            let written = socket.recv(|data| match host.send(data) {
                Ok(count) => (count, Ok(())),
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(Ok(())) => {}
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_not_open) => break,
            }
        }
        if self.guest_finished && !self.host_told && !self.broken && !self.socket().can_recv() {
            self.host_told = true;
            match host.shutdown(Shutdown::Write) {
                Err(error) if error.kind() != ErrorKind::NotConnected => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn host_to_guest(&mut self, host: &Socket) -> io::Result<()> {
        while self.readable && !self.host_finished && !self.broken {
            let hang_up = self.hang_up;
            let socket = self.sockets.get_mut::<tcp::Socket<'static>>(self.handle);
            if !socket.can_send() {
                break;
            }
            // How much was read and whether there may be more.
            let read = socket.send(|room| match { host }.read(room) {
                Ok(count) => (count, Ok((count, count == room.len() || hang_up))),
                Err(error) => (0, Err(error)),
            });
            match read {
                Ok(Ok((0, _))) => {
                    self.host_finished = true;
                    self.socket().close();
                }
                Ok(Ok((_, more))) => self.readable = more,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_not_open) => break,
            }
        }
        Ok(())
    }

    fn next_step(&mut self, interface: &mut Interface, device: &FlowDevice<'_>, now: Instant) -> Step {
        let socket = self.socket();
        let (state, waits_for_host) = (socket.state(), socket.can_recv());
        let quiet = socket.remote_endpoint().is_none();
        let in_order = self.guest_finished && self.host_finished && !self.broken;
        match state {
            // The peer outside has yet to take the last bytes.
            State::TimeWait | State::Closed if waits_for_host && self.guest_finished && !self.broken => {
                return Step::Wait(None);
            }
            // Nothing is lost on this wire, so nobody needs us to linger in TIME-WAIT.
            State::TimeWait | State::Listen => return Step::Over { in_order },
            State::Closed if quiet => return Step::Over { in_order },
            _ => {}
        }
        match interface.poll_at(now, &self.sockets) {
            Some(at) if at <= now && !device.link.has_room() => Step::Stalled,
            // Never at once, whatever the stack says: a millisecond is nothing for what should not happen.
            at => Step::Wait(at.map(|at| at.max(now + smoltcp::time::Duration::from_millis(1)))),
        }
    }
}
