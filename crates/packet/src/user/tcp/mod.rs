//! All TCP connections of the guest, out and in.

mod connection;
mod device;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use smoltcp::{
    iface::{Config, Interface, SocketSet},
    phy::ChecksumCapabilities,
    socket::tcp::State,
    wire::{HardwareAddress, IpAddress, TcpPacket, TcpRepr},
};
use socket2::{Domain, Socket, Type};

use self::{
    connection::{Connection, Step},
    device::FlowDevice,
};
use super::{
    config::LARGEST_MTU,
    icmp::Unreachable,
    packet::{self, Packet},
    poller::{Readiness, Token},
    route::Route,
    shared::{FlowKey, Shared},
    slots::{SlotId, Slots},
};

pub(crate) const MAX_FLOWS: usize = 1024;
/// What is idle this long makes room for a new connection if there is none.
const IDLE_UNDER_PRESSURE: Duration = Duration::from_secs(300);
/// The kernel gives up a connect after about two minutes.
const CONNECT_PATIENCE: Duration = Duration::from_secs(180);
/// RFC 9293, section 3.7.1.
const DEFAULT_SEGMENT: usize = 536;
/// Smaller ones are not believed; the stack has the same floor.
const SMALLEST_SEGMENT: usize = 48;

enum Phase {
    /// The host's socket is connecting; the SYN waits for the outcome.
    Connecting {
        syn: Vec<u8>,
        alternatives: Vec<SocketAddr>,
    },
    Open(Box<Connection>),
}

struct Flow {
    key: FlowKey,
    host: Socket,
    phase: Phase,
    /// Sequence number of the guest's SYN.
    first_sequence: Option<u32>,
    segment: usize,
    last_active: Instant,
    /// It is in the list of flows to be served.
    queued: bool,
    /// It is in the list of flows that wait for room in the queue to the guest.
    stalled: bool,
    /// When the earliest of its timers in the heap fires.
    armed: Option<Instant>,
}

pub(crate) struct TcpTable {
    flows: Slots<Flow>,
    by_key: HashMap<FlowKey, SlotId>,
    /// All flows share it: it holds no state of theirs.
    interface: Interface,
    epoch: Instant,
    queued: Vec<SlotId>,
    stalled: Vec<SlotId>,
    timers: BinaryHeap<Reverse<(Instant, SlotId)>>,
    buffer_bytes: usize,
    /// The flow that is being worked on, to be dropped if that goes wrong.
    current: Option<SlotId>,
    next_port: u16,
}

fn make_interface(shared: &mut Shared, now: smoltcp::time::Instant) -> io::Result<Interface> {
    let mut seed = [0; 8];
    super::random_bytes(&mut seed)?;
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = u64::from_ne_bytes(seed);
    let mut device = FlowDevice { link: &mut shared.link, packet: None, segment: 0 };
    let mut interface = Interface::new(config, &mut device, now);
    interface.set_any_ip(true);
    Ok(interface)
}

impl TcpTable {
    pub(crate) fn new(shared: &mut Shared) -> io::Result<Self> {
        // Not zero: the stack takes instant 0 for "now".
        let epoch = shared.now.checked_sub(Duration::from_secs(1)).unwrap_or(shared.now);
        let interface = make_interface(shared, smoltcp::time::Instant::from_secs(1))?;
        Ok(Self {
            flows: Slots::default(),
            by_key: HashMap::new(),
            interface,
            epoch,
            queued: Vec::new(),
            stalled: Vec::new(),
            timers: BinaryHeap::new(),
            buffer_bytes: 0,
            current: None,
            next_port: 49152,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    fn stack_time(&self, now: Instant) -> smoltcp::time::Instant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    /// The driver negotiated other offloads.
    pub(crate) fn offloads_changed(&mut self, shared: &mut Shared) {
        if let Ok(interface) = make_interface(shared, self.stack_time(shared.now)) {
            self.interface = interface;
        }
    }

    /// After a panic: the flow at fault goes, and the interface with whatever was half done in it.
    pub(crate) fn recover(&mut self, shared: &mut Shared) {
        if let Some(id) = self.current.take() {
            self.remove(id, false);
        }
        self.offloads_changed(shared);
        // Which of the others were in a list that is lost is not known.
        self.queued.clear();
        self.stalled.clear();
        self.queued.extend(self.flows.iter_mut().map(|(id, flow)| {
            (flow.queued, flow.stalled) = (true, false);
            id
        }));
    }

    /// A packet of the guest.
    pub(crate) fn receive(&mut self, packet: &Packet<'_>, shared: &mut Shared) {
        let Ok(tcp) = TcpPacket::new_checked(packet.payload) else { return };
        let key = FlowKey {
            guest: SocketAddr::new(packet.source, tcp.src_port()),
            remote: SocketAddr::new(packet.destination, tcp.dst_port()),
        };
        if key.guest.port() == 0 || key.remote.port() == 0 || packet.source.is_unspecified() {
            return;
        }
        let sequence = tcp.seq_number().0 as u32;
        let opens = tcp.syn() && !tcp.ack() && !tcp.rst();
        let segment = tcp.syn().then(|| segment_size(&tcp, packet));
        if let Some(id) = self.by_key.get(&key).copied() {
            if !self.is_stale(id, opens, sequence) {
                return self.receive_for(id, packet, tcp.rst(), segment, shared);
            }
            // The guest restarted, or reuses a port: the old connection is none any more.
            self.remove(id, false);
        }
        if opens {
            self.open(key, packet, sequence, segment.unwrap_or(DEFAULT_SEGMENT), shared);
        } else {
            self.reset(packet, shared);
        }
    }

    /// Whether a SYN shows that the guest knows nothing of the flow. The wire keeps the order, so once the guest has
    /// acknowledged our SYN no older one of its own can come.
    fn is_stale(&mut self, id: SlotId, opens: bool, sequence: u32) -> bool {
        let Some(flow) = self.flows.get_mut(id) else { return true };
        let another = flow.first_sequence != Some(sequence);
        let state = match &mut flow.phase {
            Phase::Open(connection) => connection.state(),
            Phase::Connecting { .. } => State::SynReceived,
        };
        opens
            && match state {
                // Both open at the same time.
                State::SynSent => false,
                State::Listen | State::SynReceived => another,
                _ => true,
            }
    }

    fn receive_for(
        &mut self,
        id: SlotId,
        packet: &Packet<'_>,
        reset: bool,
        segment: Option<usize>,
        shared: &mut Shared,
    ) {
        let now = self.stack_time(shared.now);
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.segment = segment.unwrap_or(flow.segment);
        let Phase::Open(connection) = &mut flow.phase else {
            if reset {
                self.remove(id, false);
            }
            return;
        };
        self.current = Some(id);
        flow.last_active = shared.now;
        let mut device = FlowDevice { link: &mut shared.link, packet: Some(packet.bytes), segment: flow.segment };
        connection.receive(&mut self.interface, &mut device, now);
        self.current = None;
        self.queue(id);
    }

    /// Answers a packet that belongs to no flow: the stack knows how.
    fn reset(&mut self, packet: &Packet<'_>, shared: &mut Shared) {
        let now = self.stack_time(shared.now);
        let mut device = FlowDevice { link: &mut shared.link, packet: Some(packet.bytes), segment: 0 };
        let mut nothing = SocketSet::new(Vec::new());
        self.interface.poll_ingress_single(now, &mut device, &mut nothing);
    }

    fn open(&mut self, key: FlowKey, packet: &Packet<'_>, sequence: u32, segment: usize, shared: &mut Shared) {
        let mut targets = match shared.policy.route(packet.destination) {
            Route::Dns if key.remote.port() == 53 && shared.policy.dns_allowed() => shared.resolver.servers(shared.now),
            Route::Nobody => return shared.link.send_unreachable(packet.bytes, Unreachable::Host),
            Route::Prohibited => return shared.link.send_unreachable(packet.bytes, Unreachable::Prohibited),
            Route::Ignored => return,
            _ => match shared.policy.host_target(key.remote) {
                Some(target) => vec![target],
                None => return self.reset(packet, shared),
            },
        };
        if !self.make_room(shared.now) {
            return;
        }
        targets.reverse();
        match connect_any(&mut targets) {
            Ok(host) => {
                // A SYN may carry data (RFC 7413), which is sent again with the first acknowledgement.
                let phase = Phase::Connecting { syn: packet.bytes.to_vec(), alternatives: targets };
                self.insert(key, host, phase, Some(sequence), segment, shared);
            }
            Err(error) => self.refuse(packet.bytes, &error, shared),
        }
    }

    /// A connection from outside that is to go to the guest. False if there is no room for it.
    pub(crate) fn open_to_guest(
        &mut self,
        host: Socket,
        guest: SocketAddr,
        client: SocketAddr,
        shared: &mut Shared,
    ) -> bool {
        if !self.make_room(shared.now) {
            return false;
        }
        let Some(key) = self.key_for_client(guest, client, shared) else { return false };
        let _ = host.set_tcp_nodelay(true);
        match Connection::connecting(&mut self.interface, guest, key.remote, self.buffer_bytes) {
            Ok(connection) => {
                self.buffer_bytes += connection.buffer_bytes;
                let phase = Phase::Open(Box::new(connection));
                if let Some(id) = self.insert(key, host, phase, None, DEFAULT_SEGMENT, shared) {
                    self.queue(id);
                }
                true
            }
            Err(_no_memory) => false,
        }
    }

    /// The client as the guest sees it: at its own address if the guest can answer there, else at the gateway's.
    fn key_for_client(&mut self, guest: SocketAddr, client: SocketAddr, shared: &Shared) -> Option<FlowKey> {
        let ip = match shared.policy.route(client.ip()) {
            Route::Outside(ip) if ip.is_ipv4() == guest.is_ipv4() => ip,
            _ => shared.link.addresses.gateway_like(guest.ip()),
        };
        let is_free = |port: &u16| !self.by_key.contains_key(&FlowKey { guest, remote: SocketAddr::new(ip, *port) });
        let port = std::iter::once(client.port())
            .chain((0..=16383).map(|i| 49152 | (self.next_port.wrapping_add(i) & 16383)))
            .find(is_free)?;
        self.next_port = self.next_port.wrapping_add(1);
        Some(FlowKey { guest, remote: SocketAddr::new(ip, port) })
    }

    fn insert(
        &mut self,
        key: FlowKey,
        host: Socket,
        phase: Phase,
        first_sequence: Option<u32>,
        segment: usize,
        shared: &Shared,
    ) -> Option<SlotId> {
        let flow = Flow {
            key,
            host,
            phase,
            first_sequence,
            segment,
            last_active: shared.now,
            queued: false,
            stalled: false,
            armed: None,
        };
        let id = self.flows.insert(flow);
        self.by_key.insert(key, id);
        let watched = self.flows.get_mut(id).map(|flow| shared.poller.watch_edges(&flow.host, Token::Tcp(id)));
        if !matches!(watched, Some(Ok(()))) {
            self.remove(id, false);
            return None;
        }
        Some(id)
    }

    /// False if there are too many connections and none that could go.
    fn make_room(&mut self, now: Instant) -> bool {
        if self.flows.len() < MAX_FLOWS {
            return true;
        }
        let idlest = self.flows.iter().min_by_key(|(_, flow)| flow.last_active);
        match idlest.filter(|(_, flow)| flow.last_active + IDLE_UNDER_PRESSURE < now).map(|(id, _)| id) {
            Some(id) => {
                self.remove(id, false);
                true
            }
            None => false,
        }
    }

    fn refuse(&mut self, syn: &[u8], error: &io::Error, shared: &mut Shared) {
        let Some(packet) = Packet::parse(syn) else { return };
        match Unreachable::from_error(error) {
            Some(Unreachable::Port) => self.reset(&packet, shared),
            Some(why) => shared.link.send_unreachable(syn, why),
            None if matches!(error.raw_os_error(), Some(libc::ECONNRESET)) => self.reset(&packet, shared),
            // Out of file descriptors, memory or ports: the guest sends its SYN again.
            None => {}
        }
    }

    /// Something happened to the host's socket of a flow.
    pub(crate) fn host_event(&mut self, id: SlotId, readiness: Readiness, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        match &mut flow.phase {
            Phase::Open(connection) => {
                connection.note(readiness);
                flow.last_active = shared.now;
                self.queue(id);
            }
            Phase::Connecting { .. } if readiness.writable => self.connect_finished(id, readiness, shared),
            Phase::Connecting { .. } => {}
        }
    }

    fn connect_finished(&mut self, id: SlotId, readiness: Readiness, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Phase::Connecting { syn, alternatives } = &mut flow.phase else { return };
        let outcome = match flow.host.take_error() {
            Ok(None) => flow.host.peer_addr().map(|_| ()),
            Ok(Some(error)) | Err(error) => Err(error),
        };
        let (syn, mut alternatives) = (std::mem::take(syn), std::mem::take(alternatives));
        let (key, sequence, segment) = (flow.key, flow.first_sequence, flow.segment);
        match outcome {
            Ok(()) => self.accept(id, &syn, readiness, shared),
            Err(error) => {
                self.remove(id, false);
                match connect_any(&mut alternatives) {
                    Ok(host) => {
                        let phase = Phase::Connecting { syn, alternatives };
                        self.insert(key, host, phase, sequence, segment, shared);
                    }
                    Err(_) => self.refuse(&syn, &error, shared),
                }
            }
        }
    }

    /// The other end is there: now the guest's SYN can be answered.
    fn accept(&mut self, id: SlotId, syn: &[u8], readiness: Readiness, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let segment = flow.segment;
        let (Ok(mut connection), Some(packet)) =
            (Connection::listening(flow.key.remote, self.buffer_bytes), Packet::parse(syn))
        else {
            self.remove(id, false);
            return;
        };
        // The peer may have said all it has to say by now, and the edge that tells so does not come twice.
        connection.note(readiness);
        self.buffer_bytes += connection.buffer_bytes;
        flow.phase = Phase::Open(Box::new(connection));
        self.receive_for(id, &packet, false, Some(segment), shared);
    }

    fn queue(&mut self, id: SlotId) {
        if let Some(flow) = self.flows.get_mut(id)
            && !flow.queued
        {
            flow.queued = true;
            self.queued.push(id);
        }
    }

    /// Serves all flows to which something happened.
    pub(crate) fn serve_queued(&mut self, shared: &mut Shared) {
        while let Some(id) = self.queued.pop() {
            self.serve(id, shared);
        }
    }

    /// The queue to the guest has room again.
    pub(crate) fn serve_stalled(&mut self, shared: &mut Shared) {
        for id in std::mem::take(&mut self.stalled) {
            if let Some(flow) = self.flows.get_mut(id) {
                flow.stalled = false;
            }
            self.queue(id);
        }
        self.serve_queued(shared);
    }

    pub(crate) fn has_stalled(&self) -> bool {
        !self.stalled.is_empty()
    }

    fn serve(&mut self, id: SlotId, shared: &mut Shared) {
        let now = self.stack_time(shared.now);
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.queued = false;
        let Phase::Open(connection) = &mut flow.phase else { return };
        self.current = Some(id);
        let mut device = FlowDevice { link: &mut shared.link, packet: None, segment: flow.segment };
        let step = connection.service(&flow.host, &mut self.interface, &mut device, now);
        self.current = None;
        match step {
            Step::Wait(None) => {}
            Step::Wait(Some(at)) => self.arm(id, self.epoch + Duration::from_micros(at.total_micros().unsigned_abs())),
            Step::Stalled if flow.stalled => {}
            Step::Stalled => {
                flow.stalled = true;
                self.stalled.push(id);
            }
            Step::Over { in_order } => self.remove(id, in_order),
        }
    }

    fn arm(&mut self, id: SlotId, at: Instant) {
        if let Some(flow) = self.flows.get_mut(id)
            && flow.armed.is_none_or(|armed| at < armed)
        {
            flow.armed = Some(at);
            self.timers.push(Reverse((at, id)));
        }
    }

    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    pub(crate) fn fire_timers(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied().filter(|Reverse((at, _))| *at <= now) {
            self.timers.pop();
            if let Some(flow) = self.flows.get_mut(id)
                && flow.armed == Some(at)
            {
                flow.armed = None;
                self.queue(id);
            }
        }
    }

    /// Ends what was idle for too long.
    pub(crate) fn expire(&mut self, now: Instant) {
        let limit = |flow: &mut Flow| match &mut flow.phase {
            Phase::Connecting { .. } => CONNECT_PATIENCE,
            Phase::Open(connection) => connection.idle_limit(),
        };
        let old: Vec<_> = self
            .flows
            .iter_mut()
            .filter_map(|(id, flow)| (flow.last_active + limit(flow) < now).then_some(id))
            .collect();
        for id in old {
            match self.flows.get_mut(id).map(|flow| &mut flow.phase) {
                Some(Phase::Open(connection)) => {
                    connection.abort();
                    self.queue(id);
                }
                _ => self.remove(id, false),
            }
        }
    }

    fn remove(&mut self, id: SlotId, in_order: bool) {
        let Some(flow) = self.flows.remove(id) else { return };
        self.by_key.remove(&flow.key);
        if let Phase::Open(connection) = &flow.phase {
            self.buffer_bytes -= connection.buffer_bytes;
        }
        if !in_order {
            // Closing then resets the connection, which is what happened to it.
            let _ = flow.host.set_linger(Some(Duration::ZERO));
        }
    }
}

#[cfg(test)]
mod tests;

/// How much payload the guest takes in one segment: its MSS, as far as ours allows.
fn segment_size(tcp: &TcpPacket<&[u8]>, packet: &Packet<'_>) -> usize {
    let (source, destination) = (IpAddress::from(packet.source), IpAddress::from(packet.destination));
    let repr = TcpRepr::parse(tcp, &source, &destination, &ChecksumCapabilities::ignored());
    let offered = repr.ok().and_then(|repr| repr.max_seg_size).filter(|size| *size != 0);
    let largest = usize::from(LARGEST_MTU) - packet::header_len(packet.source) - 20;
    offered.map_or(DEFAULT_SEGMENT, |size| usize::from(size).max(SMALLEST_SEGMENT)).min(largest)
}

/// Starts to connect to the last of the targets that lets itself be tried, and removes it and those that do not.
fn connect_any(targets: &mut Vec<SocketAddr>) -> io::Result<Socket> {
    let mut last = io::Error::from_raw_os_error(libc::ECONNREFUSED);
    while let Some(target) = targets.pop() {
        match connect(target) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect(target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM.nonblocking().cloexec(), None)?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error),
        Ok(()) => Ok(socket),
    }
}
