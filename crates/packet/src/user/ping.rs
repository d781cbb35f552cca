//! Echo requests to the outside: ping sockets where the kernel lets us have them, else raw ones.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{
    checksum,
    icmp::Unreachable,
    packet::{self, Packet},
    poller::{Readiness, Token},
    route::Route,
    shared::Shared,
    slots::{SlotId, Slots},
};

const MAX_FLOWS: usize = 64;
const IDLE: Duration = Duration::from_secs(30);
const BURST: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: IpAddr,
    remote: IpAddr,
    identifier: u16,
}

struct Flow {
    key: Key,
    host: Socket,
    /// A raw socket shows whole packets of all ICMP from the peer; a ping socket only our messages.
    raw: bool,
    last_active: Instant,
}

pub(crate) struct PingTable {
    flows: Slots<Flow>,
    by_key: HashMap<Key, SlotId>,
    scratch: Vec<u8>,
}

impl PingTable {
    pub(crate) fn new() -> Self {
        Self { flows: Slots::default(), by_key: HashMap::new(), scratch: vec![0; 65536] }
    }

    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// An echo request of the guest.
    pub(crate) fn receive(&mut self, packet: &Packet<'_>, shared: &mut Shared) {
        let remote = match shared.policy.route(packet.destination) {
            Route::Gateway | Route::Dns => {
                return shared.link.send_echo_reply(packet.destination, packet.source, packet.payload);
            }
            Route::Outside(ip) => ip,
            Route::Nobody => return shared.link.send_unreachable(packet.bytes, Unreachable::Host),
            Route::Prohibited => return shared.link.send_unreachable(packet.bytes, Unreachable::Prohibited),
            Route::Ignored => return,
        };
        let identifier = u16::from_be_bytes([packet.payload[4], packet.payload[5]]);
        let key = Key { guest: packet.source, remote, identifier };
        let sent = self.flow(key, shared).and_then(|id| self.send(id, packet.payload, shared.now));
        if let Err(error) = sent
            && error.kind() != ErrorKind::WouldBlock
        {
            // Without the right to ping there is nobody who could say more than this.
            let why = Unreachable::from_error(&error).unwrap_or(Unreachable::Host);
            shared.link.send_unreachable(packet.bytes, why);
        }
    }

    fn flow(&mut self, key: Key, shared: &Shared) -> io::Result<SlotId> {
        if let Some(id) = self.by_key.get(&key) {
            return Ok(*id);
        }
        if self.flows.len() >= MAX_FLOWS
            && let Some(oldest) = self.flows.iter().min_by_key(|(_, flow)| flow.last_active).map(|(id, _)| id)
        {
            self.remove(oldest);
        }
        let (host, raw) = open(key.remote)?;
        let id = self.flows.insert(Flow { key, host, raw, last_active: shared.now });
        self.by_key.insert(key, id);
        let watched = match self.flows.get_mut(id) {
            Some(flow) => shared.poller.watch_input(&flow.host, Token::Ping(id)),
            None => Err(ErrorKind::NotFound.into()),
        };
        if watched.is_err() {
            self.remove(id);
        }
        watched.map(|()| id)
    }

    fn send(&mut self, id: SlotId, request: &[u8], now: Instant) -> io::Result<()> {
        let Some(flow) = self.flows.get_mut(id) else { return Ok(()) };
        flow.last_active = now;
        let mut message = request.to_vec();
        if flow.raw && flow.key.remote.is_ipv4() {
            // On the others the kernel fills it.
            message[2..4].fill(0);
            let sum = !checksum::sum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        flow.host.send(&message).map(|_| ())
    }

    pub(crate) fn host_event(&mut self, id: SlotId, readiness: Readiness, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(id).filter(|_| readiness.readable) else { return };
        for _ in 0..BURST {
            let length = match { &flow.host }.read(&mut self.scratch) {
                Ok(length) => length,
                // Level-triggered: what is left comes again.
                Err(_) => return,
            };
            let message = self.scratch.get(..length).and_then(|bytes| echo_reply(bytes, flow.raw, &flow.key));
            if let Some(message) = message {
                flow.last_active = shared.now;
                if let Some(bytes) = packet::build_icmp(flow.key.remote, flow.key.guest, 64, &message)
                    && shared.link.has_room()
                {
                    shared.link.send_packet(&bytes);
                }
            }
        }
    }

    pub(crate) fn expire(&mut self, now: Instant) {
        let old: Vec<_> =
            self.flows.iter().filter(|(_, flow)| flow.last_active + IDLE < now).map(|(id, _)| id).collect();
        for id in old {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: SlotId) {
        if let Some(flow) = self.flows.remove(id) {
            self.by_key.remove(&flow.key);
        }
    }
}

/// A socket to ping this address with, and whether it is a raw one.
fn open(remote: IpAddr) -> io::Result<(Socket, bool)> {
    let (domain, protocol) = match remote {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let make = |kind: Type| -> io::Result<Socket> {
        let socket = Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol))?;
        socket.connect(&SocketAddr::new(remote, 0).into())?;
        Ok(socket)
    };
    // The first is for the groups in net.ipv4.ping_group_range, the second for root.
    match make(Type::DGRAM) {
        Ok(socket) => Ok((socket, false)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {
            make(Type::RAW).map(|socket| (socket, true))
        }
        Err(error) => Err(error),
    }
}

/// The guest's echo reply in what a socket gave, with the identifier that the guest chose.
fn echo_reply(bytes: &[u8], raw: bool, key: &Key) -> Option<Vec<u8>> {
    let v4 = key.remote.is_ipv4();
    let message = match raw && v4 {
        true => {
            Packet::parse(bytes)
                .filter(|packet| packet.source == key.remote && packet.protocol == packet::ICMP)?
                .payload
        }
        false => bytes,
    };
    let kind = if v4 { 0 } else { 129 };
    let identifier = u16::from_be_bytes([*message.get(4)?, *message.get(5)?]);
    if message.len() < 8 || message[0] != kind || (raw && identifier != key.identifier) {
        return None;
    }
    let mut message = message.to_vec();
    message[4..6].copy_from_slice(&key.identifier.to_be_bytes());
    Some(message)
}
