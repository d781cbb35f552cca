//! A guest to test against: a client TCP/IP stack on the other side of a backend, as a driver would use it.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "each test binary uses its part of it")]

pub mod linux;
pub mod private;

use std::{
    io::{IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{self, Checksum, Device, DeviceCapabilities, Medium},
    socket::{tcp, udp},
    wire::{EthernetAddress, HardwareAddress, IpCidr, IpEndpoint},
};
use vireo_packet::{Backend, MacAddress, Offloads};

pub const HEADER: usize = 12;
pub const NO_OFFLOADS: Offloads =
    Offloads { checksum_in: false, checksum_out: false, segmentation_in: false, segmentation_out: false };
pub const ALL_OFFLOADS: Offloads =
    Offloads { checksum_in: true, checksum_out: true, segmentation_in: true, segmentation_out: true };
pub const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const PATIENCE: Duration = Duration::from_secs(20);

/// The NIC of the guest.
pub struct Nic {
    pub backend: Arc<dyn Backend>,
    mtu: usize,
    /// Whether checksums are looked at; off to measure throughput.
    strict: bool,
    partial_checksums: bool,
    buffer: Vec<u8>,
    /// Ethernet frames, checksums completed and segments cut.
    received: std::collections::VecDeque<Vec<u8>>,
    pub segmented: usize,
}

impl Nic {
    fn fill(&mut self) {
        if !self.received.is_empty() {
            return;
        }
        let length = self.backend.recv(&mut [IoSliceMut::new(&mut self.buffer)]).unwrap();
        let Some(length) = length else { return };
        let frame = &self.buffer[..length];
        if self.strict {
            let frames = as_a_driver_would(frame);
            self.segmented += usize::from(frames.len() > 1);
            self.received.extend(frames);
        } else {
            self.received.push_back(frame[HEADER..].to_vec());
        }
    }
}

/// What a network stack sees of a frame: complete checksums, and segments no longer than the MTU.
pub fn as_a_driver_would(frame: &[u8]) -> Vec<Vec<u8>> {
    let word = |at: usize| usize::from(u16::from_le_bytes([frame[at], frame[at + 1]]));
    let (flags, kind, headers, size, start, offset) = (frame[0], frame[1], word(2), word(4), word(6), word(8));
    assert_eq!(word(10), 1, "num_buffers");
    let ethernet = &frame[HEADER..];
    if flags & 1 == 0 {
        assert_eq!(kind, 0, "segmentation needs a partial checksum (virtio 1.2, 5.1.6.2.2)");
        return vec![ethernet.to_vec()];
    }
    let mut frames = Vec::new();
    if kind == 0 {
        frames.push(ethernet.to_vec());
    } else {
        assert_eq!(kind, if ethernet[12..14] == [8, 0] { 1 } else { 4 });
        for (index, data) in ethernet[headers..].chunks(size).enumerate() {
            frames.push(segment(ethernet, headers, start, index * size, data));
        }
    }
    for frame in &mut frames {
        if kind != 0 {
            // The sum of the pseudo header had the length of the whole before it was cut.
            let partial = pseudo_header(frame, start);
            frame[start + offset..start + offset + 2].copy_from_slice(&partial.to_be_bytes());
        }
        let sum = !sum(&frame[start..]);
        frame[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    }
    frames
}

/// RFC 1071, the slow and obvious way.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let total = words.fold(0u32, |total, word| {
        let next = total + word;
        (next & 0xffff) + (next >> 16)
    });
    total as u16
}

/// Of a TCP packet whose header starts there.
fn pseudo_header(ethernet: &[u8], start: usize) -> u16 {
    let addresses = if ethernet[14] >> 4 == 4 { &ethernet[26..34] } else { &ethernet[22..54] };
    let length = ((ethernet.len() - start) as u32).to_be_bytes();
    sum(&[addresses, &length, &[0, 6]].concat())
}

fn segment(whole: &[u8], headers: usize, tcp: usize, offset: usize, data: &[u8]) -> Vec<u8> {
    let mut frame = [&whole[..headers], data].concat();
    let length = (frame.len() - 14) as u16;
    if frame[14] >> 4 == 4 {
        let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.set_total_len(length);
        ip.fill_checksum();
    } else {
        frame[18..20].copy_from_slice(&(length - 40).to_be_bytes());
    }
    let sequence = u32::from_be_bytes(frame[tcp + 4..tcp + 8].try_into().unwrap()).wrapping_add(offset as u32);
    frame[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
    if headers + offset + data.len() < whole.len() {
        frame[tcp + 13] &= !0x09;
    }
    frame
}

fn tcp_start(ethernet: &[u8]) -> Option<usize> {
    match (ethernet.get(12..14)?, ethernet.get(23), ethernet.get(20)) {
        ([8, 0], Some(6), _) => Some(34),
        ([0x86, 0xdd], _, Some(6)) => Some(54),
        _ => None,
    }
}

pub struct Received(Vec<u8>);
pub struct Transmit<'a>(&'a Nic);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        let mut header = [0; HEADER];
        if let Some(start) = self.0.partial_checksums.then(|| tcp_start(&frame)).flatten() {
            header[0] = 1;
            header[6..8].copy_from_slice(&(start as u16).to_le_bytes());
            header[8] = 16;
            let partial = pseudo_header(&frame, start);
            frame[start + 16..start + 18].copy_from_slice(&partial.to_be_bytes());
        }
        self.0.backend.send(&[IoSlice::new(&header), IoSlice::new(&frame)]).unwrap();
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = Received;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Transmit<'_>)> {
        self.fill();
        let frame = self.received.pop_front()?;
        Some((Received(frame), Transmit(self)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Transmit<'_>> {
        Some(Transmit(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        if !self.strict {
            capabilities.checksum.tcp = Checksum::None;
            capabilities.checksum.ipv4 = Checksum::Tx;
        } else if self.partial_checksums {
            capabilities.checksum.tcp = Checksum::Rx;
        }
        capabilities
    }
}

pub struct Guest {
    pub nic: Nic,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    start: Instant,
    next_port: u16,
}

pub struct Setup {
    pub offloads: Offloads,
    pub mtu: usize,
    pub strict: bool,
    pub slaac: bool,
    /// Without DHCP.
    pub addresses: Vec<IpCidr>,
}

impl Default for Setup {
    fn default() -> Self {
        let addresses = vec!["10.0.2.15/24".parse().unwrap()];
        Self { offloads: NO_OFFLOADS, mtu: 1500, strict: true, slaac: false, addresses }
    }
}

impl Guest {
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self::with(backend, Setup::default())
    }

    pub fn with(backend: Arc<dyn Backend>, setup: Setup) -> Self {
        backend.set_offloads(setup.offloads);
        let start = Instant::now() - Duration::from_secs(1);
        let mut nic = Nic {
            backend,
            mtu: setup.mtu,
            strict: setup.strict,
            partial_checksums: setup.offloads.checksum_in,
            buffer: vec![0; 70_000],
            received: Default::default(),
            segmented: 0,
        };
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC.0)));
        config.random_seed = 1;
        config.slaac = setup.slaac;
        let mut interface = Interface::new(config, &mut nic, smoltcp::time::Instant::from_secs(1));
        interface.update_ip_addrs(|list| setup.addresses.iter().for_each(|address| list.push(*address).unwrap()));
        interface.routes_mut().add_default_ipv4_route([10, 0, 2, 2].into()).unwrap();
        Self { nic, interface, sockets: SocketSet::new(Vec::new()), start, next_port: 40_000 }
    }

    pub fn poll(&mut self) {
        let now = smoltcp::time::Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.nic, &mut self.sockets);
    }

    /// Runs the guest until something is there.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if let Some(value) = found(self) {
                self.poll();
                return value;
            }
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            self.wait(Duration::from_millis(2));
        }
    }

    /// Runs the guest for a while.
    pub fn run_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.poll();
            self.wait(Duration::from_millis(2));
        }
    }

    pub fn wait(&self, time: Duration) {
        wait_readable(&*self.nic.backend, time);
    }

    pub fn port(&mut self) -> u16 {
        self.next_port += 1;
        self.next_port
    }

    pub fn add_tcp(&mut self, buffer: usize) -> SocketHandle {
        let mut socket =
            tcp::Socket::new(tcp::SocketBuffer::new(vec![0; buffer]), tcp::SocketBuffer::new(vec![0; buffer]));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        let handle = self.add_tcp(65_536);
        self.connect_with(handle, to);
        handle
    }

    pub fn connect_with(&mut self, handle: SocketHandle, to: SocketAddr) {
        let port = self.port();
        let socket = self.sockets.get_mut::<tcp::Socket<'static>>(handle);
        socket.connect(self.interface.context(), IpEndpoint::from(to), port).unwrap();
    }

    pub fn established(&mut self, handle: SocketHandle) {
        self.until("the connection", |guest| guest.tcp(handle).may_send().then_some(()));
    }

    /// Sends all of it, reading nothing.
    pub fn send_all(&mut self, handle: SocketHandle, mut data: &[u8]) {
        self.until("room to send", |guest| {
            let sent = guest.tcp(handle).send_slice(data).expect("the connection is open");
            data = &data[sent..];
            data.is_empty().then_some(())
        });
    }

    pub fn read(&mut self, handle: SocketHandle, into: &mut Vec<u8>) {
        let socket = self.tcp(handle);
        while socket.can_recv() {
            socket
                .recv(|data| {
                    into.extend_from_slice(data);
                    (data.len(), ())
                })
                .unwrap();
        }
    }

    /// Reads up to so many bytes, or to the end.
    pub fn read_all(&mut self, handle: SocketHandle, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        self.until("data", |guest| {
            guest.read(handle, &mut all);
            let socket = guest.tcp(handle);
            let opening = matches!(socket.state(), tcp::State::SynSent | tcp::State::SynReceived | tcp::State::Listen);
            (all.len() >= length || (!opening && !socket.may_recv())).then_some(())
        });
        all
    }

    pub fn add_udp(&mut self) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 200_000]);
        let port = self.port();
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn send_to(&mut self, handle: SocketHandle, data: &[u8], to: &str) {
        let to: SocketAddr = to.parse().unwrap();
        self.udp(handle).send_slice(data, IpEndpoint::from(to)).unwrap();
        self.poll();
    }

    pub fn receive_from(&mut self, handle: SocketHandle) -> (Vec<u8>, SocketAddr) {
        self.until("a datagram", |guest| {
            let (data, meta) = guest.udp(handle).recv().ok()?;
            Some((data.to_vec(), SocketAddr::new(IpAddr::from(meta.endpoint.addr), meta.endpoint.port)))
        })
    }
}

pub fn wait_readable(backend: &dyn Backend, time: Duration) -> bool {
    let mut poll = libc::pollfd { fd: backend.readable().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, which outlives the call.
    unsafe { libc::poll(&raw mut poll, 1, time.as_millis() as i32) == 1 }
}

/// Bytes that differ from place to place.
pub fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2654435761) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}
