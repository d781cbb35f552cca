//! UDP: a connected socket of the host for each pair of ends, so that only the peer can answer.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read},
    net::SocketAddr,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

use super::{
    icmp::Unreachable,
    packet::{self, Packet},
    poller::{Readiness, Token},
    route::Route,
    shared::{FlowKey, Shared},
    slots::{SlotId, Slots},
};

pub(crate) const MAX_FLOWS: usize = 512;
/// RFC 4787, REQ-5 wants 2 minutes and recommends 5.
const IDLE: Duration = Duration::from_secs(300);
/// A question that nobody answered.
const UNANSWERED: Duration = Duration::from_secs(60);
/// A DNS question, answered or not.
const DNS_IDLE: Duration = Duration::from_secs(20);
/// Datagrams read from one socket before the others get their turn.
const BURST: usize = 64;

struct Flow {
    key: FlowKey,
    host: Socket,
    /// The DNS server that the host's socket leads to, if it is one.
    dns: Option<SocketAddr>,
    /// Something came back since the guest last sent.
    answered: bool,
    ever_answered: bool,
    readable: bool,
    last_active: Instant,
}

pub(crate) struct UdpTable {
    flows: Slots<Flow>,
    by_key: HashMap<FlowKey, SlotId>,
    stalled: Vec<SlotId>,
    scratch: Vec<u8>,
}

impl UdpTable {
    pub(crate) fn new() -> Self {
        Self { flows: Slots::default(), by_key: HashMap::new(), stalled: Vec::new(), scratch: vec![0; 65536] }
    }

    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// A datagram of the guest that is for nobody on its own network.
    pub(crate) fn receive(&mut self, packet: &Packet<'_>, key: FlowKey, data: &[u8], shared: &mut Shared) {
        if let Some(id) = self.by_key.get(&key).copied() {
            let silent = self.flows.get_mut(id).filter(|flow| !flow.answered).and_then(|flow| flow.dns);
            let Some(server) = silent else { return self.send(id, packet, data, shared) };
            // The guest asks again because the server did not answer.
            self.remove(id);
            shared.resolver.failed(server, shared.now);
        }
        let (target, is_dns) = match shared.policy.route(packet.destination) {
            Route::Dns if key.remote.port() == 53 && shared.policy.dns_allowed() => {
                (shared.resolver.servers(shared.now).first().copied(), true)
            }
            Route::Nobody => return shared.link.send_unreachable(packet.bytes, Unreachable::Host),
            Route::Prohibited => return shared.link.send_unreachable(packet.bytes, Unreachable::Prohibited),
            Route::Ignored => return,
            _ => (shared.policy.host_target(key.remote), false),
        };
        let Some(target) = target else { return shared.link.send_unreachable(packet.bytes, Unreachable::Port) };
        match open(target) {
            Ok(host) => {
                if let Some(id) = self.insert(key, host, is_dns.then_some(target), shared) {
                    self.send(id, packet, data, shared);
                }
            }
            Err(error) => report(&error, packet.bytes, shared),
        }
    }

    fn insert(&mut self, key: FlowKey, host: Socket, dns: Option<SocketAddr>, shared: &Shared) -> Option<SlotId> {
        if self.flows.len() >= MAX_FLOWS
            && let Some(oldest) = self.flows.iter().min_by_key(|(_, flow)| flow.last_active).map(|(id, _)| id)
        {
            self.remove(oldest);
        }
        let flow =
            Flow { key, host, dns, answered: true, ever_answered: false, readable: false, last_active: shared.now };
        let id = self.flows.insert(flow);
        self.by_key.insert(key, id);
        let flow = self.flows.get_mut(id)?;
        if shared.poller.watch_edges(&flow.host, Token::Udp(id)).is_err() {
            self.remove(id);
            return None;
        }
        Some(id)
    }

    fn send(&mut self, id: SlotId, packet: &Packet<'_>, data: &[u8], shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.last_active = shared.now;
        flow.answered = false;
        if let Err(error) = flow.host.send(data) {
            // A full send buffer loses datagrams here as it does everywhere. The error may be that of an earlier one.
            report(&error, packet.bytes, shared);
        }
    }

    /// The socket of a flow has something to read.
    pub(crate) fn host_event(&mut self, id: SlotId, readiness: Readiness, shared: &mut Shared) {
        if let Some(flow) = self.flows.get_mut(id) {
            flow.readable |= readiness.readable;
        }
        self.serve(id, shared);
    }

    pub(crate) fn serve_stalled(&mut self, shared: &mut Shared) {
        for id in std::mem::take(&mut self.stalled) {
            self.serve(id, shared);
        }
    }

    pub(crate) fn has_stalled(&self) -> bool {
        !self.stalled.is_empty()
    }

    fn serve(&mut self, id: SlotId, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        for _ in 0..BURST {
            if !flow.readable {
                return;
            }
            if !shared.link.has_room() {
                break;
            }
            match { &flow.host }.read(&mut self.scratch) {
                Ok(length) => {
                    flow.last_active = shared.now;
                    flow.answered = true;
                    flow.ever_answered = true;
                    if let Some(bytes) = packet::build_udp(flow.key.remote, flow.key.guest, &self.scratch[..length]) {
                        shared.link.send_packet(&bytes);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => flow.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let key = flow.key;
                    report_for(&error, key, shared);
                    if let Some(server) = flow.dns {
                        shared.resolver.failed(server, shared.now);
                        return self.remove(id);
                    }
                }
            }
        }
        // There may be more; it is not to starve the others.
        if !self.stalled.contains(&id) {
            self.stalled.push(id);
        }
    }

    pub(crate) fn expire(&mut self, shared: &mut Shared) {
        let now = shared.now;
        let patience = |flow: &Flow| match (flow.dns, flow.ever_answered) {
            (Some(_), _) => DNS_IDLE,
            (None, true) => IDLE,
            (None, false) => UNANSWERED,
        };
        let old: Vec<_> =
            self.flows.iter().filter(|(_, flow)| flow.last_active + patience(flow) < now).map(|(id, _)| id).collect();
        for id in old {
            if let Some(server) = self.flows.get_mut(id).filter(|flow| !flow.answered).and_then(|flow| flow.dns) {
                shared.resolver.failed(server, now);
            }
            self.remove(id);
        }
    }

    fn remove(&mut self, id: SlotId) {
        if let Some(flow) = self.flows.remove(id) {
            self.by_key.remove(&flow.key);
        }
    }
}

fn open(target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::DGRAM.nonblocking().cloexec(), None)?;
    socket.connect(&target.into())?;
    Ok(socket)
}

fn report(error: &io::Error, original: &[u8], shared: &mut Shared) {
    if let Some(why) = Unreachable::from_error(error) {
        shared.link.send_unreachable(original, why);
    }
}

/// As [`report`], for a datagram that is gone; its header is all that the guest needs.
fn report_for(error: &io::Error, key: FlowKey, shared: &mut Shared) {
    if let Some(original) = packet::build_udp(key.guest, key.remote, &[]) {
        report(error, &original, shared);
    }
}
