use std::{
    collections::{HashMap, VecDeque},
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
    time::Instant,
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    connection::{Answer, Connection, FromHost, Phase, due},
    host::Listeners,
    packet::{HEADER_BYTES, HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op},
};
use crate::virtio::{DescriptorChain, Reader};

/// Each takes a descriptor here and one of whoever holds its other end.
pub const MAX_CONNECTIONS: usize = 256;
/// Room for what the guest sends on one connection: much for the first few, less for the others, so that all
/// of them together stay below 12 MiB even if nobody reads.
const LARGE_BUFFER: u32 = 256 << 10;
const SMALL_BUFFER: u32 = 32 << 10;
const LARGE_BUFFERS: usize = 16;
/// Answers to strays that the guest has not fetched yet; the transmit queue waits while there are this many.
const MAX_RESETS: usize = 512;
/// The most that is read from a connection before the others get their turn, and the largest packet.
const MAX_PAYLOAD: usize = 64 << 10;
/// Where the ports of connections start that the host opens.
const FIRST_LOCAL_PORT: u32 = 1 << 30;
/// Tokens below this are the thread's own.
pub const FIRST_TOKEN: u64 = 16;

/// Host port and guest port.
type Ports = (u32, u32);

/// All connections of one device: takes packets from the guest and makes those for it.
pub struct Muxer {
    guest_cid: u64,
    epoll: Arc<Epoll>,
    listeners: Listeners,
    connections: HashMap<u64, Connection>,
    /// Tokens of the connections that the guest knows.
    tokens: HashMap<Ports, u64>,
    next_token: u64,
    next_port: u32,
    large_buffers: usize,
    /// Connections that have something for the guest, in turn.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    /// What was read from a connection and not sent yet: there is only one such at any time.
    payload: Box<[u8]>,
    unsent: Option<(u64, Range<usize>)>,
    /// No connection's deadline is earlier.
    next_deadline: Option<Instant>,
}

impl Muxer {
    pub fn new(guest_cid: u64, epoll: Arc<Epoll>, listeners: Listeners) -> Self {
        Self {
            guest_cid,
            epoll,
            listeners,
            connections: HashMap::new(),
            tokens: HashMap::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_LOCAL_PORT,
            large_buffers: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            payload: vec![0; MAX_PAYLOAD].into(),
            unsent: None,
            next_deadline: None,
        }
    }

    // ---- the host's side

    /// Opens a connection to the guest.
    pub fn connect(&mut self, guest_port: u32, deadline: Instant, answer: Answer) {
        let ports = (self.free_port(guest_port), guest_port);
        let added = UnixStream::pair().and_then(|(ours, host_end)| {
            let phase = Phase::Connecting { answer: answer.clone(), host_end };
            self.add(ours, phase, ports)
        });
        match added {
            Ok(token) => self.with(token, |connection| {
                connection.due |= due::REQUEST;
                connection.deadline = Some(deadline);
            }),
            Err(error) => {
                let _ = answer.try_send(Err(error));
            }
        }
        self.note_deadline(deadline);
    }

    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port >= u32::MAX - 1 { FIRST_LOCAL_PORT } else { port + 1 };
            // There are far more ports than connections, so this ends soon.
            if !self.tokens.contains_key(&(port, guest_port)) && !self.listeners.has(port) {
                return port;
            }
        }
    }

    fn add(&mut self, stream: UnixStream, phase: Phase, ports: Ports) -> io::Result<u64> {
        if self.connections.len() >= MAX_CONNECTIONS && !self.make_room() {
            return Err(io::Error::other("too many vsock connections"));
        }
        stream.set_nonblocking(true)?;
        let token = self.next_token;
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(interest(false), token))?;
        self.next_token += 1;
        let large = self.large_buffers < LARGE_BUFFERS;
        self.large_buffers += usize::from(large);
        let buffer = if large { LARGE_BUFFER } else { SMALL_BUFFER };
        self.connections.insert(token, Connection::new(stream, phase, ports.0, ports.1, buffer));
        self.tokens.insert(ports, token);
        Ok(token)
    }

    /// Closes the oldest connection that the host has closed already. The guest may take its time to acknowledge
    /// that, since there may be data that it has not read yet; but not at the cost of others.
    fn make_room(&mut self) -> bool {
        let gone = self.connections.iter().filter(|(_, c)| c.host_is_gone());
        let oldest = gone.map(|(token, _)| *token).min();
        if let Some(token) = oldest {
            self.close(token, true);
        }
        oldest.is_some()
    }

    /// `epoll` reported something about a connection.
    pub fn event(&mut self, token: u64, events: EventSet) {
        self.with(token, |connection| {
            if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
                connection.readable = true;
            }
            if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                connection.host_stops_receiving();
            } else if events.contains(EventSet::OUT) {
                connection.flush();
            }
        });
    }

    /// Does `act` to a connection and then what follows from its new state.
    fn with(&mut self, token: u64, act: impl FnOnce(&mut Connection)) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let had_backlog = connection.has_backlog();
        act(connection);
        self.settle(token, had_backlog);
    }

    fn settle(&mut self, token: u64, had_backlog: bool) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if connection.is_done() {
            self.close(token, !matches!(self.connections[&token].phase, Phase::Orphaned));
            return;
        }
        connection.ask_for_credit();
        if connection.has_backlog() != had_backlog {
            let event = EpollEvent::new(interest(connection.has_backlog()), token);
            let _ = self.epoll.ctl(ControlOperation::Modify, connection.stream.as_raw_fd(), event);
        }
        if connection.wants_to_send() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    /// Forgets a connection; its other end sees the end of the stream.
    fn close(&mut self, token: u64, tell_guest: bool) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        let _ = self.epoll.ctl(ControlOperation::Delete, connection.stream.as_raw_fd(), EpollEvent::default());
        self.forget(connection.ports(), token);
        if connection.queued {
            self.ready.retain(|other| *other != token);
        }
        if tell_guest {
            let header = connection.header(op::RST, 0, 0);
            self.resets.push_back(self.addressed(header));
        }
        self.large_buffers -= usize::from(connection.buffer_bytes() == LARGE_BUFFER);
        if let Phase::Connecting { answer, .. } = connection.phase {
            let _ = answer.try_send(Err(io::ErrorKind::ConnectionRefused.into()));
        }
    }

    /// The guest knows the connection no more, and may use its ports for another.
    fn forget(&mut self, ports: Ports, token: u64) {
        if self.tokens.get(&ports) == Some(&token) {
            self.tokens.remove(&ports);
        }
        if self.unsent.as_ref().is_some_and(|(owner, _)| *owner == token) {
            self.unsent = None;
        }
    }

    /// The guest's driver has started anew: it knows of no connection.
    pub fn reset(&mut self) {
        self.resets.clear();
        // Requests that it has not seen can still be made.
        let known = |c: &Connection| !matches!(c.phase, Phase::Connecting { .. }) || c.due & due::REQUEST == 0;
        let tokens: Vec<u64> = self.connections.iter().filter(|(_, c)| known(c)).map(|(token, _)| *token).collect();
        for token in tokens {
            self.guest_has_gone(token);
        }
    }

    /// The guest will send nothing more on this connection and wants nothing more of it.
    fn guest_has_gone(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if !connection.has_backlog() {
            return self.close(token, false);
        }
        connection.phase = Phase::Orphaned;
        connection.guest_shuts_down(SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        let ports = connection.ports();
        self.forget(ports, token);
        self.settle(token, true);
    }

    // ---- deadlines

    fn note_deadline(&mut self, deadline: Instant) {
        self.next_deadline = Some(self.next_deadline.map_or(deadline, |next| next.min(deadline)));
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.next_deadline
    }

    /// Gives up on what the guest has not answered by `now`.
    pub fn expire(&mut self, now: Instant) {
        if self.next_deadline.is_none_or(|next| now < next) {
            return;
        }
        let late = |c: &Connection| c.deadline.is_some_and(|deadline| deadline <= now);
        let tokens: Vec<u64> = self.connections.iter().filter(|(_, c)| late(c)).map(|(token, _)| *token).collect();
        for token in tokens {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            // The guest has not heard of a request that was not sent.
            let heard = connection.due & due::REQUEST == 0;
            if let Phase::Connecting { answer, .. } = &connection.phase {
                let _ = answer.try_send(Err(io::ErrorKind::TimedOut.into()));
            }
            self.close(token, heard);
        }
        self.next_deadline = self.connections.values().filter_map(|c| c.deadline).min();
    }

    // ---- packets from the guest

    /// Whether another packet may be taken from the guest now.
    pub fn accepts(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes a packet from the guest. What makes no sense is dropped or reset.
    pub fn receive(&mut self, chain: &DescriptorChain) {
        let mut reader = chain.reader();
        let Ok(header) = Header::read(&mut reader) else { return };
        if header.src_cid != self.guest_cid || u64::from(header.len) > reader.remaining() {
            return;
        }
        let token = self.tokens.get(&(header.dst_port, header.src_port)).copied();
        match token {
            _ if header.dst_cid != HOST_CID || header.kind != STREAM => self.refuse(header),
            Some(token) => self.receive_for(token, header, reader),
            None if header.op == op::REQUEST => self.accept(header),
            None => self.refuse(header),
        }
    }

    fn refuse(&mut self, header: Header) {
        // Never a reset for a reset.
        if header.op != op::RST {
            self.resets.push_back(header.reset_of());
        }
    }

    /// The guest opens a connection.
    fn accept(&mut self, header: Header) {
        let ports = (header.dst_port, header.src_port);
        if !self.listeners.has(header.dst_port) {
            return self.refuse(header);
        }
        let added = UnixStream::pair().and_then(|(ours, host_end)| Ok((self.add(ours, Phase::Open, ports)?, host_end)));
        let Ok((token, host_end)) = added else { return self.refuse(header) };
        if !self.listeners.offer(header.dst_port, host_end) {
            return self.close(token, true);
        }
        self.with(token, |connection| {
            connection.update_credit(&header);
            connection.due |= due::RESPONSE;
        });
    }

    fn receive_for(&mut self, token: u64, header: Header, reader: Reader<'_>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let had_backlog = connection.has_backlog();
        connection.update_credit(&header);
        let connecting = matches!(connection.phase, Phase::Connecting { .. });
        let accepted = match header.op {
            op::RST => return self.guest_has_gone(token),
            op::RESPONSE if connecting && connection.due & due::REQUEST == 0 => established(connection),
            _ if connecting => false,
            op::RW => connection.receive(header.len, reader).is_ok(),
            op::SHUTDOWN => {
                connection.guest_shuts_down(header.flags);
                true
            }
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                connection.due |= due::CREDIT_UPDATE;
                true
            }
            _ => false,
        };
        if accepted {
            self.settle(token, had_backlog);
        } else {
            self.close(token, true);
        }
    }

    // ---- packets to the guest

    /// Whether there is a packet for the guest; reads from a connection to find out.
    pub fn has_packet(&mut self) -> bool {
        if !self.resets.is_empty() || self.unsent.is_some() {
            return true;
        }
        while let Some(&token) = self.ready.front() {
            let Some(connection) = self.connections.get_mut(&token) else {
                self.ready.pop_front();
                continue;
            };
            if connection.due != 0 && connection.wants_to_send() {
                return true;
            }
            self.ready.pop_front();
            connection.queued = false;
            if let FromHost::Data(len) = connection.read(&mut self.payload) {
                self.unsent = Some((token, 0..len));
                return true;
            }
            // The end of the stream, or nothing: `settle` puts it in the line again if there is more to say.
            self.with(token, |_| ());
        }
        false
    }

    /// Writes the next packet to `chain`; returns its length, 0 if the chain is too short for any.
    pub fn send(&mut self, chain: &DescriptorChain) -> u32 {
        let mut writer = chain.writer();
        if writer.remaining() < HEADER_BYTES as u64 {
            return 0;
        }
        let room = (writer.remaining() - HEADER_BYTES as u64).min(MAX_PAYLOAD as u64) as usize;
        let Some((header, payload)) = self.next_packet(room) else { return 0 };
        writer.write(&header.to_bytes());
        writer.write(&self.payload[payload]);
        self.requeue_sender();
        writer.position() as u32
    }

    fn next_packet(&mut self, room: usize) -> Option<(Header, Range<usize>)> {
        if let Some(header) = self.resets.pop_front() {
            return Some((header, 0..0));
        }
        if let Some((token, range)) = &mut self.unsent {
            let len = range.len().min(room);
            if len == 0 {
                return None;
            }
            let header = self.connections.get_mut(token)?.header(op::RW, 0, len as u32);
            let part = range.start..range.start + len;
            range.start += len;
            return Some((self.addressed(header), part));
        }
        let connection = self.connections.get_mut(self.ready.front()?)?;
        let (op, flags) = connection.next_control()?;
        let header = connection.header(op, flags, 0);
        Some((self.addressed(header), 0..0))
    }

    /// After a packet: whose data is all sent stands at the end of the line again if there may be more.
    fn requeue_sender(&mut self) {
        if let Some((token, range)) = &self.unsent
            && range.is_empty()
        {
            let token = *token;
            self.unsent = None;
            self.with(token, |_| ());
        }
    }

    /// Packets and connections that wait for the guest to take something.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.resets.len() + self.ready.len()
    }

    fn addressed(&self, header: Header) -> Header {
        Header { src_cid: HOST_CID, dst_cid: self.guest_cid, kind: STREAM, ..header }
    }
}

/// The guest accepted our request: the host gets its end.
fn established(connection: &mut Connection) -> bool {
    connection.deadline = None;
    match std::mem::replace(&mut connection.phase, Phase::Open) {
        // Whoever asked may have lost patience.
        Phase::Connecting { answer, host_end } => answer.try_send(Ok(host_end)).is_ok(),
        _ => false,
    }
}

/// Edge-triggered. Room is only of interest while something waits for it, since every read at the other end
/// makes some.
fn interest(room: bool) -> EventSet {
    let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room { always | EventSet::OUT } else { always }
}
