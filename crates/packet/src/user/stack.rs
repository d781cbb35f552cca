//! The router's thread: takes frames and events, and hands them to the part that knows what to do.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Gauges, UserNetConfig,
    config::Addresses,
    dhcp::{self, DhcpServer},
    forward::{Forwards, Listener},
    fragment::Reassembly,
    icmp,
    link::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Link, PACKET_START},
    neighbor::Advertisement,
    packet::{self, Packet},
    ping::PingTable,
    poller::{Poller, Readiness, Token},
    queues::Queues,
    resolver::Resolver,
    route::Policy,
    shared::{FlowKey, Shared},
    tcp::TcpTable,
    udp::UdpTable,
};
use crate::{MacAddress, NetError, virtio_header};

const RESOLV_CONF: &str = "/etc/resolv.conf";
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// RFC 4861, section 6.2.1 allows up to this.
const ADVERTISE_EVERY: Duration = Duration::from_secs(1800);
/// A guest is answered at most this often; it solicits three times when its interface comes up.
const ADVERTISE_PAUSE: Duration = Duration::from_millis(100);

pub(crate) struct Stack {
    queues: Arc<Queues>,
    gauges: Arc<Gauges>,
    shared: Shared,
    tcp: TcpTable,
    udp: UdpTable,
    ping: PingTable,
    forwards: Forwards,
    dhcp: DhcpServer,
    reassembly: Reassembly,
    ipv6: bool,
    last_advertised: Option<Instant>,
    next_sweep: Option<Instant>,
    inbound: VecDeque<Vec<u8>>,
    events: Vec<(Token, Readiness)>,
}

impl Stack {
    pub(crate) fn new(
        config: UserNetConfig,
        listeners: Vec<Listener>,
        queues: Arc<Queues>,
        gauges: Arc<Gauges>,
    ) -> Result<Self, NetError> {
        let setup = |what| move |source| NetError::Setup { what, source };
        let addresses = Addresses::of(&config);
        let policy = Policy::of(&config);
        let outside = policy.outside_allowed();
        let poller = Poller::new().map_err(setup("creating an epoll instance"))?;
        poller.watch_input(queues.wake_event(), Token::Wake).map_err(setup("watching for frames of the guest"))?;
        let link = Link::new(queues.clone(), addresses, config.gateway_mac, config.mtu);
        let resolver = Resolver::new(PathBuf::from(RESOLV_CONF), config.dns_servers, config.search_domains);
        let mut shared = Shared { link, poller, policy, resolver, now: Instant::now() };
        let forwards = Forwards::new(listeners);
        forwards.watch(&shared).map_err(setup("watching the forwarded ports"))?;
        Ok(Self {
            tcp: TcpTable::new(&mut shared).map_err(setup("getting random numbers"))?,
            queues,
            gauges,
            shared,
            udp: UdpTable::new(),
            ping: PingTable::new(),
            forwards,
            dhcp: DhcpServer::new(addresses, config.hostname, config.mtu, outside),
            reassembly: Reassembly::default(),
            ipv6: config.ipv6,
            last_advertised: None,
            next_sweep: None,
            inbound: VecDeque::new(),
            events: Vec::new(),
        })
    }

    /// Until the queues are told to stop.
    pub(crate) fn run(mut self) {
        while !self.queues.stopping() {
            // A panic here would be a bug, and a guest may have found it: it costs the flow at fault, not the VM.
            if catch_unwind(AssertUnwindSafe(|| self.round())).is_err() {
                self.shared.now = Instant::now();
                self.tcp.recover(&mut self.shared);
            }
        }
    }

    fn round(&mut self) {
        self.sleep();
        self.shared.now = Instant::now();
        if let Some(offloads) = self.queues.changed_offloads() {
            self.shared.link.offloads = offloads;
            self.tcp.offloads_changed(&mut self.shared);
        }
        self.handle_events();
        if self.inbound.is_empty() {
            self.queues.take_inbound(&mut self.inbound);
        }
        while let Some(frame) = self.inbound.pop_front() {
            self.receive(&frame);
        }
        self.tcp.fire_timers(self.shared.now);
        self.forwards.fire_timers(&mut self.tcp, &mut self.shared);
        self.tcp.serve_queued(&mut self.shared);
        if self.has_stalled() && self.shared.link.has_room() {
            self.udp.serve_stalled(&mut self.shared);
            self.tcp.serve_stalled(&mut self.shared);
        }
        self.sweep();
    }

    fn has_stalled(&self) -> bool {
        self.tcp.has_stalled() || self.udp.has_stalled()
    }

    /// Waits for events, and collects them; does not wait if there is work.
    fn sleep(&mut self) {
        // In this order: whoever makes room looks whether we sleep.
        let busy = !self.inbound.is_empty()
            || !self.queues.fall_asleep()
            || (self.has_stalled() && !self.queues.wait_for_room());
        let timeout = match self.next_timer() {
            _ if busy => Some(Duration::ZERO),
            Some(at) => Some(at.saturating_duration_since(Instant::now())),
            None => None,
        };
        if self.shared.poller.wait(timeout, &mut self.events).is_err() {
            // Cannot be, with a valid epoll instance; if it is, it must not spin.
            std::thread::sleep(Duration::from_millis(10));
        }
        self.queues.wake_up();
    }

    fn next_timer(&self) -> Option<Instant> {
        let advertise = self.last_advertised.map(|last| last + ADVERTISE_EVERY);
        [self.tcp.next_timer(), self.forwards.next_timer(), self.next_sweep, advertise].into_iter().flatten().min()
    }

    fn handle_events(&mut self) {
        while let Some((token, readiness)) = self.events.pop() {
            match token {
                Token::Wake => drop(self.queues.wake_event().read()),
                Token::Tcp(id) => self.tcp.host_event(id, readiness, &mut self.shared),
                Token::Udp(id) => self.udp.host_event(id, readiness, &mut self.shared),
                Token::Ping(id) => self.ping.host_event(id, readiness, &mut self.shared),
                Token::Forward(index) => self.forwards.host_event(index, &mut self.tcp, &mut self.shared),
            }
        }
    }

    /// A frame of the guest, virtio header first.
    fn receive(&mut self, frame: &[u8]) {
        let Some(ethernet) = frame.get(virtio_header::LEN..PACKET_START) else { return };
        let Ok(ethernet) = <[u8; 14]>::try_from(ethernet) else { return };
        let [a, b, c, d, e, f, g, h, i, j, k, l, kind @ ..] = ethernet;
        let (to, from) = (MacAddress([a, b, c, d, e, f]), MacAddress([g, h, i, j, k, l]));
        if from.is_multicast() || (to != self.shared.link.mac && !to.is_multicast()) {
            return;
        }
        let payload = &frame[PACKET_START..];
        match u16::from_be_bytes(kind) {
            ETHERTYPE_ARP => {
                self.shared.link.receive_arp(payload);
                self.forwards.guest_appeared(&mut self.tcp, &mut self.shared);
            }
            ETHERTYPE_IPV4 if payload.first().is_some_and(|byte| byte >> 4 == 4) => self.receive_packet(payload, from),
            ETHERTYPE_IPV6 if self.ipv6 && payload.first().is_some_and(|byte| byte >> 4 == 6) => {
                self.receive_packet(payload, from)
            }
            _ => {}
        }
    }

    fn receive_packet(&mut self, bytes: &[u8], from: MacAddress) {
        let Some(packet) = Packet::parse(bytes) else { return };
        self.learn(packet.source, from);
        if packet.piece.is_none() {
            return self.receive_whole(&packet, from);
        }
        if let Some(whole) = self.reassembly.add(&packet, self.shared.now)
            && let Some(packet) = Packet::parse(&whole)
        {
            self.receive_whole(&packet, from);
        }
    }

    fn learn(&mut self, address: IpAddr, mac: MacAddress) {
        let known = self.shared.link.knows(address);
        self.shared.link.learn(address, mac);
        if !known && self.shared.link.knows(address) {
            self.forwards.guest_appeared(&mut self.tcp, &mut self.shared);
        }
    }

    fn receive_whole(&mut self, packet: &Packet<'_>, from: MacAddress) {
        // Only addresses that a guest may have: nothing is to be sent to the outside in somebody else's name, and
        // nothing to us in our own.
        let link = &self.shared.link.addresses;
        let from_guest = link.on_link(packet.source) && !link.is_own(packet.source);
        match packet.protocol {
            packet::UDP if from_guest || packet.source.is_unspecified() => self.receive_udp(packet, from_guest),
            packet::TCP if from_guest => self.tcp.receive(packet, &mut self.shared),
            packet::ICMP | packet::ICMPV6 if from_guest && icmp::is_echo_request(packet) => {
                self.ping.receive(packet, &mut self.shared)
            }
            packet::ICMPV6 if packet.source.is_ipv6() && self.shared.link.receive_neighbor_discovery(packet, from) => {
                self.advertise()
            }
            _ => {}
        }
    }

    fn receive_udp(&mut self, packet: &Packet<'_>, from_guest: bool) {
        let Some((from, to, data)) = packet::parse_udp(packet.payload) else { return };
        let addresses = &self.shared.link.addresses;
        let own = addresses.is_own(packet.destination) || packet.destination == IpAddr::V4([255; 4].into());
        if to == dhcp::SERVER_PORT && own && packet.source.is_ipv4() {
            let domains = self.shared.resolver.search_domains(self.shared.now);
            if let Some(reply) = self.dhcp.handle(data, &domains) {
                self.shared.link.send_packet_to(reply.mac, &reply.packet);
            }
            return;
        }
        if !from_guest || from == 0 || to == 0 {
            return;
        }
        let key =
            FlowKey { guest: SocketAddr::new(packet.source, from), remote: SocketAddr::new(packet.destination, to) };
        if !self.forwards.answer(key, data, self.shared.now) {
            self.udp.receive(packet, key, data, &mut self.shared);
        }
    }

    fn advertise(&mut self) {
        let now = self.shared.now;
        if self.last_advertised.is_some_and(|last| now < last + ADVERTISE_PAUSE) {
            return;
        }
        self.last_advertised = Some(now);
        let offer = Advertisement {
            default_route: self.shared.policy.outside_allowed(),
            dns: self.shared.policy.dns_allowed(),
            search_domains: self.shared.resolver.search_domains(now),
        };
        self.shared.link.advertise_router(&offer);
    }

    fn sweep(&mut self) {
        let now = self.shared.now;
        if self.last_advertised.is_some_and(|last| last + ADVERTISE_EVERY <= now) {
            self.advertise();
        }
        self.gauges.set(self.tcp.len(), self.udp.len());
        if self.next_sweep.is_some_and(|at| at <= now) {
            self.next_sweep = None;
            self.tcp.expire(now);
            self.tcp.serve_queued(&mut self.shared);
            self.udp.expire(&mut self.shared);
            self.ping.expire(now);
            self.forwards.expire(now);
        }
        // An idle VM is not woken for nothing.
        let anything = self.tcp.len() + self.udp.len() + self.ping.len() + self.forwards.clients() > 0;
        self.next_sweep = self.next_sweep.or_else(|| anything.then(|| now + SWEEP_EVERY));
    }
}
