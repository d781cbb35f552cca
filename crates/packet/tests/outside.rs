//! What leads beyond the gateway, to addresses that a private network namespace makes up. Skipped by name without root.
#![allow(unsafe_code)]

mod guest;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    thread,
    time::Duration,
};

use guest::{Guest, Setup, private};
use smoltcp::{
    phy::ChecksumCapabilities,
    socket::icmp,
    wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress, Ipv6Address},
};
use vireo_packet::{UserNet, UserNetConfig};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OUTSIDE6: Ipv6Address = Ipv6Address::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const OWN6: Ipv6Address = Ipv6Address::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x15);

fn enter(test: &str) -> Option<Guest> {
    if !private::enter(test) {
        return None;
    }
    private::add_v4("lo:1", OUTSIDE, Ipv4Addr::BROADCAST);
    private::add_v6("lo", OUTSIDE6, 128);
    // The kernel takes its time with a new IPv6 address.
    while UdpSocket::bind((OUTSIDE6, 0)).is_err() {
        thread::sleep(Duration::from_millis(5));
    }
    let net = UserNet::new(UserNetConfig::default()).unwrap();
    let addresses = vec!["10.0.2.15/24".parse().unwrap(), "fd00::15/64".parse().unwrap()];
    let mut guest = Guest::with(net, Setup { addresses, mtu: 9000, ..Setup::default() });
    guest.interface.routes_mut().add_default_ipv6_route("fd00::2".parse().unwrap()).unwrap();
    Some(guest)
}

fn bind(guest: &mut Guest) -> smoltcp::iface::SocketHandle {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 70_000]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(0x1234)).unwrap();
    guest.sockets.add(socket)
}

fn answered_pings(guest: &mut Guest) {
    let checksums = ChecksumCapabilities::default();
    let handle = bind(guest);
    for (sequence, length) in [(1, 56), (2, 0), (3, 4000)] {
        let data = guest::pattern(length, 1);
        let request = Icmpv4Repr::EchoRequest { ident: 0x1234, seq_no: sequence, data: &data };
        let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
        let buffer = socket.send(request.buffer_len(), OUTSIDE.into()).unwrap();
        request.emit(&mut Icmpv4Packet::new_unchecked(buffer), &checksums);
        guest.until("the pong", |guest| {
            let (bytes, from) = guest.sockets.get_mut::<icmp::Socket>(handle).recv().ok()?;
            assert_eq!(from, IpAddress::Ipv4(OUTSIDE));
            let reply = Icmpv4Repr::parse(&Icmpv4Packet::new_checked(bytes).unwrap(), &checksums).unwrap();
            assert_eq!(reply, Icmpv4Repr::EchoReply { ident: 0x1234, seq_no: sequence, data: &data });
            Some(())
        });
        let request = Icmpv6Repr::EchoRequest { ident: 0x1234, seq_no: sequence, data: &data };
        let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
        let buffer = socket.send(request.buffer_len(), OUTSIDE6.into()).unwrap();
        request.emit(&OWN6, &OUTSIDE6, &mut Icmpv6Packet::new_unchecked(buffer), &checksums);
        guest.until("the pong", |guest| {
            let (bytes, from) = guest.sockets.get_mut::<icmp::Socket>(handle).recv().ok()?;
            assert_eq!(from, IpAddress::Ipv6(OUTSIDE6));
            let reply =
                Icmpv6Repr::parse(&OUTSIDE6, &OWN6, &Icmpv6Packet::new_checked(bytes).unwrap(), &checksums).unwrap();
            assert_eq!(reply, Icmpv6Repr::EchoReply { ident: 0x1234, seq_no: sequence, data: &data });
            Some(())
        });
    }
}

#[test]
fn pings_by_raw_sockets() {
    if let Some(mut guest) = enter("outside::pings_by_raw_sockets") {
        answered_pings(&mut guest);
    }
}

#[test]
fn pings_by_ping_sockets() {
    if let Some(mut guest) = enter("outside::pings_by_ping_sockets") {
        private::allow_ping_sockets();
        answered_pings(&mut guest);
    }
}

#[test]
fn tcp_by_both_families_and_where_nothing_is() {
    let Some(mut guest) = enter("outside::tcp_by_both_families_and_where_nothing_is") else { return };
    for address in [SocketAddr::new(OUTSIDE.into(), 7), SocketAddr::new(OUTSIDE6.into(), 7)] {
        let listener = TcpListener::bind(address).unwrap();
        let server = thread::spawn(move || listener.accept().unwrap().1);
        let handle = guest.connect(address);
        guest.established(handle);
        assert_eq!(server.join().unwrap().ip(), address.ip());
        guest.tcp(handle).abort();
    }
    // No route: the guest is told at once (its stack does not look at ICMP, so this looks at the frames).
    guest.connect("203.0.113.1:7".parse().unwrap());
    guest.poll();
    let mut buffer = vec![0; 70_000];
    loop {
        assert!(guest::wait_readable(&*guest.nic.backend, Duration::from_secs(5)), "nothing was said of it");
        let length = guest.nic.backend.recv(&mut [std::io::IoSliceMut::new(&mut buffer)]).unwrap().unwrap();
        let frame = &buffer[guest::HEADER..length];
        if frame[12..14] == [8, 0] && frame[23] == 1 {
            assert_eq!(frame[34..36], [3, 0], "network unreachable");
            break;
        }
    }
}

#[test]
fn a_client_of_a_forward_is_seen_by_its_own_address() {
    if enter("outside::a_client_of_a_forward_is_seen_by_its_own_address").is_none() {
        return;
    }
    let forwards = vec!["tcp:198.51.100.1:0:80".parse().unwrap()];
    let net = UserNet::new(UserNetConfig { forwards, ..Default::default() }).unwrap();
    let address = SocketAddr::new(OUTSIDE.into(), net.forwards()[0].host_port);
    let mut guest = Guest::new(net);
    let handle = guest.add_tcp(65536);
    guest.tcp(handle).listen(80).unwrap();
    let client = thread::spawn(move || {
        let stream = std::net::TcpStream::connect(address).unwrap();
        thread::sleep(Duration::from_millis(300));
        stream.local_addr().unwrap()
    });
    guest.established(handle);
    let seen = guest.tcp(handle).remote_endpoint().unwrap();
    let client = client.join().unwrap();
    assert_eq!((seen.addr, seen.port), (IpAddress::from(client.ip()), client.port()));
}
