//! Ports of the host that lead to the guest.

use std::{
    collections::HashMap,
    io::{self, ErrorKind},
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

use super::{
    config::{Addresses, Forward, Protocol, UserNetConfig},
    packet,
    poller::Token,
    route::Route,
    shared::{FlowKey, Shared},
    tcp::TcpTable,
};
use crate::NetError;

/// How often a guest that did not speak yet is asked for while somebody waits for it.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Connections wait here while the guest boots.
const BACKLOG: i32 = 128;
const ACCEPT_BURST: usize = 32;
const DATAGRAM_BURST: usize = 64;
const MAX_CLIENTS: usize = 256;
const CLIENT_IDLE: Duration = Duration::from_secs(300);

pub(crate) struct Listener {
    pub forward: Forward,
    guest: SocketAddr,
    socket: Socket,
    /// There may be something to take.
    ready: bool,
    /// Of UDP: who is behind an address that the guest sees.
    clients: HashMap<SocketAddr, Client>,
}

struct Client {
    address: SocketAddr,
    last_active: Instant,
}

pub(crate) struct Forwards {
    listeners: Vec<Listener>,
    /// When to look again at those that could not go on.
    retry: Option<Instant>,
    scratch: Vec<MaybeUninit<u8>>,
}

/// Binds all ports of the configuration.
pub(crate) fn bind_all(config: &UserNetConfig) -> Result<Vec<Listener>, NetError> {
    let addresses = Addresses::of(config);
    config.forwards.iter().map(|forward| bind(forward, &addresses)).collect()
}

fn bind(forward: &Forward, addresses: &Addresses) -> Result<Listener, NetError> {
    let guest_ip = forward.guest_ip.unwrap_or(IpAddr::V4(addresses.guest));
    let guest = SocketAddr::new(guest_ip, forward.guest_port);
    let (socket, address) = listen(forward).map_err(|source| explain(*forward, source))?;
    let forward = Forward { host_port: address.port(), ..*forward };
    Ok(Listener { forward, guest, socket, ready: false, clients: HashMap::new() })
}

fn listen(forward: &Forward) -> io::Result<(Socket, SocketAddr)> {
    let address = SocketAddr::new(forward.host_ip, forward.host_port);
    let kind = match forward.protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), None)?;
    if address.is_ipv6() {
        // `[::]` is not to take the IPv4 port too, or a second forward for that would be refused.
        socket.set_only_v6(true)?;
    }
    if forward.protocol == Protocol::Tcp {
        // Connections of a VM that ended a moment ago do not keep the port; listening sockets still do.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if forward.protocol == Protocol::Tcp {
        socket.listen(BACKLOG)?;
    }
    let bound = socket.local_addr()?.as_socket().ok_or(ErrorKind::AddrNotAvailable)?;
    Ok((socket, bound))
}

fn explain(forward: Forward, source: io::Error) -> NetError {
    let port = forward.host_port;
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => NetError::PortBusy { port, forward, source },
        Some(libc::EACCES | libc::EPERM) => NetError::PortPrivileged { port, forward, source },
        Some(libc::EADDRNOTAVAIL) => NetError::NoSuchHostAddress { forward, source },
        _ => NetError::Forward { forward, source },
    }
}

impl Forwards {
    pub(crate) fn new(listeners: Vec<Listener>) -> Self {
        Self { listeners, retry: None, scratch: vec![MaybeUninit::uninit(); 65536] }
    }

    pub(crate) fn watch(&self, shared: &Shared) -> io::Result<()> {
        self.listeners
            .iter()
            .enumerate()
            .try_for_each(|(index, listener)| shared.poller.watch_edges(&listener.socket, Token::Forward(index)))
    }

    pub(crate) fn host_event(&mut self, index: usize, tcp: &mut TcpTable, shared: &mut Shared) {
        if let Some(listener) = self.listeners.get_mut(index) {
            listener.ready = true;
            self.serve(index, tcp, shared);
        }
    }

    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.retry
    }

    pub(crate) fn fire_timers(&mut self, tcp: &mut TcpTable, shared: &mut Shared) {
        if self.retry.is_none_or(|at| at > shared.now) {
            return;
        }
        self.retry = None;
        for index in 0..self.listeners.len() {
            self.serve(index, tcp, shared);
        }
    }

    /// A guest was heard for the first time: whoever waits for it need not wait for the timer.
    pub(crate) fn guest_appeared(&mut self, tcp: &mut TcpTable, shared: &mut Shared) {
        self.retry = self.retry.map(|_| shared.now);
        self.fire_timers(tcp, shared);
    }

    fn serve(&mut self, index: usize, tcp: &mut TcpTable, shared: &mut Shared) {
        let Some(listener) = self.listeners.get_mut(index).filter(|listener| listener.ready) else { return };
        let guest = listener.guest.ip();
        if !shared.link.knows(guest) {
            // Until the guest is there connections wait in the kernel's backlog rather than fail.
            shared.link.ask_for(guest);
            self.retry = Some(shared.now + ASK_EVERY);
            return;
        }
        let more = match listener.forward.protocol {
            Protocol::Tcp => listener.accept(tcp, shared),
            Protocol::Udp => listener.receive(&mut self.scratch, shared),
        };
        if more {
            self.retry = Some(shared.now + Duration::from_millis(10));
        }
    }

    /// A datagram of the guest. True if it was the answer to a client of a forward.
    pub(crate) fn answer(&mut self, key: FlowKey, data: &[u8], now: Instant) -> bool {
        for listener in self.listeners.iter_mut().filter(|listener| listener.guest == key.guest) {
            if let Some(client) = listener.clients.get_mut(&key.remote) {
                client.last_active = now;
                let _ = listener.socket.send_to(data, &client.address.into());
                return true;
            }
        }
        false
    }

    pub(crate) fn expire(&mut self, now: Instant) {
        for listener in &mut self.listeners {
            listener.clients.retain(|_, client| client.last_active + CLIENT_IDLE > now);
        }
    }

    pub(crate) fn clients(&self) -> usize {
        self.listeners.iter().map(|listener| listener.clients.len()).sum()
    }
}

impl Listener {
    /// Takes what waits; true if some may be left.
    fn accept(&mut self, tcp: &mut TcpTable, shared: &mut Shared) -> bool {
        for _ in 0..ACCEPT_BURST {
            match self.socket.accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) {
                Ok((socket, client)) => {
                    if let Some(client) = client.as_socket() {
                        tcp.open_to_guest(socket, self.guest, client, shared);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.ready = false;
                    return false;
                }
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                // Out of file descriptors or memory: later.
                Err(_) => return true,
            }
        }
        true
    }

    fn receive(&mut self, scratch: &mut [MaybeUninit<u8>], shared: &mut Shared) -> bool {
        for _ in 0..DATAGRAM_BURST {
            if !shared.link.has_room() {
                return true;
            }
            match self.socket.recv_from(scratch) {
                Ok((length, client)) => {
                    // SAFETY: recv_from initialised this many bytes at the start.
                    let data = unsafe { scratch.get(..length).unwrap_or_default().assume_init_ref() };
                    if let Some(remote) = client.as_socket().and_then(|client| self.remember(client, shared))
                        && let Some(bytes) = packet::build_udp(remote, self.guest, data)
                    {
                        shared.link.send_packet(&bytes);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.ready = false;
                    return false;
                }
                // The error of an answer that did not arrive.
                Err(_) => {}
            }
        }
        true
    }

    /// The address under which the guest sees this client.
    fn remember(&mut self, client: SocketAddr, shared: &Shared) -> Option<SocketAddr> {
        if let Some((remote, known)) = self.clients.iter_mut().find(|(_, known)| known.address == client) {
            known.last_active = shared.now;
            return Some(*remote);
        }
        if self.clients.len() >= MAX_CLIENTS
            && let Some(oldest) =
                self.clients.iter().min_by_key(|(_, client)| client.last_active).map(|(remote, _)| *remote)
        {
            self.clients.remove(&oldest);
        }
        let ip = match shared.policy.route(client.ip()) {
            Route::Outside(ip) if ip.is_ipv4() == self.guest.is_ipv4() => ip,
            _ => shared.link.addresses.gateway_like(self.guest.ip()),
        };
        let free = |port: &u16| *port != 0 && !self.clients.contains_key(&SocketAddr::new(ip, *port));
        let port = (0..=u16::MAX).map(|i| client.port().wrapping_add(i)).find(free)?;
        let remote = SocketAddr::new(ip, port);
        self.clients.insert(remote, Client { address: client, last_active: shared.now });
        Some(remote)
    }
}
