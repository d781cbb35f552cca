//! The user-mode network from both sides: a guest's stack here, sockets on the host's loopback there.

mod guest;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use guest::{ALL_OFFLOADS, Guest, NO_OFFLOADS, Setup, pattern};
use smoltcp::{
    socket::{dhcpv4, icmp, tcp::State},
    wire::{Icmpv4Packet, Icmpv4Repr, IpCidr},
};
use socket2::{Domain, Socket, Type};
use vireo_packet::{NetError, Offloads, UserNet, UserNetConfig};

fn net(config: UserNetConfig) -> Arc<UserNet> {
    UserNet::new(config).unwrap()
}

fn plain() -> Arc<UserNet> {
    net(UserNetConfig::default())
}

/// A server on loopback, and its address as the guest sees it.
fn server(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream.unwrap()));
        }
    });
    SocketAddr::new(Ipv4Addr::new(10, 0, 2, 2).into(), port)
}

/// A TCP port that nobody listens on, and that nobody takes meanwhile.
fn dead_tcp() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// A UDP port that takes nothing from anybody but itself.
fn dead_udp() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    socket.connect(address).unwrap();
    (socket, address)
}

/// A port for both protocols, with an echo behind each.
fn echo_by_both() -> SocketAddr {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let Ok(udp) = UdpSocket::bind(address) else { continue };
        thread::spawn(move || tcp.incoming().for_each(|stream| echo(stream.unwrap())));
        echo_datagrams(udp);
        return address;
    }
}

fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 65536];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 || stream.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
}

/// Sends and reads at the same time.
fn exchange(guest: &mut Guest, handle: smoltcp::iface::SocketHandle, data: &[u8]) -> Vec<u8> {
    let (mut left, mut back) = (data, Vec::new());
    guest.until("the echo", |guest| {
        let sent = guest.tcp(handle).send_slice(left).unwrap();
        left = &left[sent..];
        guest.read(handle, &mut back);
        (back.len() >= data.len()).then_some(())
    });
    back
}

#[test]
fn dhcp_configures_the_guest() {
    let net = net(UserNetConfig {
        search_domains: Some(vec!["lan.example".into()]),
        hostname: Some("one".into()),
        ..Default::default()
    });
    let mut guest = Guest::with(net, Setup { addresses: vec![], ..Setup::default() });
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let (address, router, dns) =
        guest.until("a lease", |guest| match guest.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
            Some(dhcpv4::Event::Configured(config)) => Some((config.address, config.router, config.dns_servers)),
            _ => None,
        });
    assert_eq!(address, "10.0.2.15/24".parse().unwrap());
    assert_eq!(router, Some(Ipv4Addr::new(10, 0, 2, 2)));
    assert_eq!(dns.first(), Some(&Ipv4Addr::new(10, 0, 2, 3)));
}

#[test]
fn tcp_both_ways_with_and_without_offloads() {
    let to = server(echo);
    let checksums = Offloads { checksum_in: true, checksum_out: true, ..NO_OFFLOADS };
    for (offloads, mtu) in
        [(NO_OFFLOADS, 1500), (checksums, 1500), (ALL_OFFLOADS, 1500), (ALL_OFFLOADS, 65520), (NO_OFFLOADS, 65520)]
    {
        let mut guest = Guest::with(plain(), Setup { offloads, mtu, ..Setup::default() });
        let handle = guest.connect(to);
        guest.established(handle);
        let data = pattern(3_000_000, mtu as u32);
        assert!(exchange(&mut guest, handle, &data) == data, "{offloads:?} {mtu}");
        let cut = guest.nic.segmented > 0;
        assert_eq!(
            cut,
            offloads.segmentation_out && mtu == 1500,
            "large frames exactly where the driver cuts them: {offloads:?} {mtu}"
        );
        guest.tcp(handle).close();
        guest.until("the end", |guest| (!guest.tcp(handle).is_active()).then_some(()));
    }
}

#[test]
fn half_close_by_the_guest() {
    let to = server(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        stream.write_all(b"!").unwrap();
    });
    let mut guest = Guest::new(plain());
    let handle = guest.connect(to);
    guest.established(handle);
    let data = pattern(500_000, 1);
    guest.send_all(handle, &data);
    guest.tcp(handle).close();
    let back = guest.read_all(handle, usize::MAX);
    assert!(back == [&data[..], b"!"].concat());
    guest.until("the end", |guest| matches!(guest.tcp(handle).state(), State::Closed | State::TimeWait).then_some(()));
}

#[test]
fn half_close_by_the_server() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let to = server(move |mut stream| {
        stream.write_all(b"all I have").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        sender.send(all).unwrap();
    });
    let mut guest = Guest::new(plain());
    let handle = guest.connect(to);
    assert_eq!(guest.read_all(handle, usize::MAX), b"all I have");
    assert_eq!(guest.tcp(handle).state(), State::CloseWait);
    let data = pattern(700_000, 2);
    guest.send_all(handle, &data);
    guest.tcp(handle).close();
    guest.until("the end", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
    assert!(receiver.recv_timeout(Duration::from_secs(10)).unwrap() == data);
}

#[test]
fn a_server_that_is_done_before_the_guest_hears_of_it() {
    let to = server(|mut stream| {
        stream.write_all(b"all I have").unwrap();
    });
    let mut guest = Guest::new(plain());
    for _ in 0..200 {
        let handle = guest.connect(to);
        assert_eq!(guest.read_all(handle, usize::MAX), b"all I have");
        guest.tcp(handle).close();
        guest.until("the end", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
        guest.sockets.remove(handle);
    }
}

#[test]
fn a_reset_of_the_server_reaches_the_guest() {
    let to = server(|mut stream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        // Unread data makes the kernel send a reset on close.
    });
    let mut guest = Guest::new(plain());
    let handle = guest.connect(to);
    guest.established(handle);
    guest.send_all(handle, &[1; 1000]);
    guest.until("the reset", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
}

#[test]
fn a_reset_of_the_guest_reaches_the_server() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let to = server(move |mut stream| sender.send(stream.read(&mut [0; 10]).map_err(|error| error.kind())).unwrap());
    let net = plain();
    let mut guest = Guest::new(net.clone());
    let handle = guest.connect(to);
    guest.established(handle);
    guest.tcp(handle).abort();
    guest.poll();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(10)).unwrap(), Err(std::io::ErrorKind::ConnectionReset));
    guest.until("an empty table", |_| (net.stats().tcp_connections == 0).then_some(()));
}

#[test]
fn a_refused_port_is_refused_at_once() {
    let (_held, dead) = dead_tcp();
    let mut guest = Guest::new(plain());
    let start = Instant::now();
    let handle = guest.connect(SocketAddr::new([10, 0, 2, 2].into(), dead.port()));
    guest.until("the refusal", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_restarted_guest_may_use_the_same_ports_again() {
    let to = server(echo);
    let net = plain();
    for round in 0..3 {
        let mut guest = Guest::new(net.clone());
        let handle = guest.add_tcp(65536);
        guest.connect_with(handle, to);
        guest.established(handle);
        let data = pattern(5000, round);
        assert!(exchange(&mut guest, handle, &data) == data);
    }
    assert_eq!(net.stats().tcp_connections, 1);
}

#[test]
fn two_hundred_connections_at_once() {
    let to = server(echo);
    let net = plain();
    let mut guest = Guest::with(net.clone(), Setup { offloads: ALL_OFFLOADS, mtu: 65520, ..Setup::default() });
    let handles: Vec<_> = (0..200)
        .map(|_| {
            let handle = guest.add_tcp(16384);
            guest.connect_with(handle, to);
            handle
        })
        .collect();
    let expected: Vec<_> = (0..200).map(|i| pattern(20_000, i)).collect();
    let mut sent = vec![0; 200];
    let mut back = vec![Vec::new(); 200];
    guest.until("all echoes", |guest| {
        for (i, handle) in handles.iter().enumerate() {
            if guest.tcp(*handle).may_send() {
                sent[i] += guest.tcp(*handle).send_slice(&expected[i][sent[i]..]).unwrap();
            }
            guest.read(*handle, &mut back[i]);
        }
        back.iter().all(|data| data.len() == 20_000).then_some(())
    });
    assert!(back == expected);
    assert_eq!(net.stats().tcp_connections, 200);
    handles.iter().for_each(|handle| guest.tcp(*handle).close());
    guest.until("an empty table", |_| (net.stats().tcp_connections == 0).then_some(()));
}

#[test]
fn a_slow_reader_on_either_side_stops_the_writer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddr::new([10, 0, 2, 2].into(), listener.local_addr().unwrap().port());
    let mut guest = Guest::with(plain(), Setup { mtu: 65520, ..Setup::default() });
    let handle = guest.connect(to);
    guest.established(handle);
    let (mut stream, _) = listener.accept().unwrap();

    // Nobody reads outside: what the guest can get rid of is bounded.
    let data = pattern(32 << 20, 5);
    let (mut sent, mut last_progress) = (0, Instant::now());
    while last_progress.elapsed() < Duration::from_millis(500) {
        let now = guest.tcp(handle).send_slice(&data[sent..]).unwrap();
        if now > 0 {
            last_progress = Instant::now();
        }
        sent += now;
        guest.poll();
        guest.wait(Duration::from_millis(1));
    }
    assert!(sent > 100_000 && sent < 16 << 20, "{sent}");
    stream.set_nonblocking(true).unwrap();
    let (mut received, mut buffer) = (Vec::new(), vec![0; 1 << 20]);
    guest.until("the rest", |_| {
        while let Ok(length) = stream.read(&mut buffer) {
            received.extend_from_slice(&buffer[..length]);
        }
        (received.len() >= sent).then_some(())
    });
    assert!(received == data[..sent]);

    // The guest does not read: the host's writer blocks, and all arrives when it does.
    let (mut written, mut last_progress) = (0, Instant::now());
    while last_progress.elapsed() < Duration::from_millis(500) {
        if let Ok(now) = stream.write(&data[written..]) {
            written += now;
            last_progress = Instant::now();
        }
        guest.poll();
        guest.wait(Duration::from_millis(1));
    }
    assert!(written > 65_536 && written < 24 << 20, "{written}");
    let back = guest.read_all(handle, written);
    assert!(back == data[..written]);
}

#[test]
fn a_forward_reaches_the_guest_even_if_it_boots_later() {
    for forward in ["tcp:0:80", "tcp:[::1]:0:80"] {
        let net = net(UserNetConfig { forwards: vec![forward.parse().unwrap()], ..Default::default() });
        let address = SocketAddr::new(net.forwards()[0].host_ip, net.forwards()[0].host_port);
        assert_ne!(address.port(), 0);
        let mut client = TcpStream::connect(address).unwrap();
        thread::sleep(Duration::from_millis(200));
        let mut guest = Guest::new(net);
        let handle = guest.add_tcp(65536);
        guest.tcp(handle).listen(80).unwrap();
        guest.established(handle);
        assert_eq!(guest.tcp(handle).remote_endpoint().unwrap().addr, smoltcp::wire::IpAddress::v4(10, 0, 2, 2));
        client.write_all(b"from outside").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.read_all(handle, usize::MAX), b"from outside");
        guest.send_all(handle, b"from inside");
        guest.tcp(handle).close();
        guest.until("the end", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"from inside");
    }
}

#[test]
fn a_forward_to_a_closed_port_resets_the_client() {
    let net = net(UserNetConfig { forwards: vec!["tcp:0:81".parse().unwrap()], ..Default::default() });
    let address = SocketAddr::new([127, 0, 0, 1].into(), net.forwards()[0].host_port);
    let mut guest = Guest::new(net);
    let client = thread::spawn(move || TcpStream::connect(address).unwrap().read(&mut [0; 1]).unwrap_err().kind());
    guest.until("the reset", |_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn udp_forward() {
    let net = net(UserNetConfig { forwards: vec!["udp:0:7000".parse().unwrap()], ..Default::default() });
    let address = SocketAddr::new([127, 0, 0, 1].into(), net.forwards()[0].host_port);
    let mut guest = Guest::new(net);
    let handle = guest.add_udp();
    guest.udp(handle).close();
    guest.udp(handle).bind(7000).unwrap();
    let clients: Vec<_> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (i, client) in clients.iter().enumerate() {
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.send_to(&[i as u8; 100], address).unwrap();
        let (data, from) = guest.receive_from(handle);
        assert_eq!(data, [i as u8; 100]);
        guest.send_to(handle, &data[..50], &from.to_string());
    }
    for (i, client) in clients.iter().enumerate() {
        let mut buffer = [0; 200];
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&[i as u8; 50][..], address));
    }
}

fn echo_datagrams(socket: UdpSocket) {
    thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

#[test]
fn udp_of_all_sizes() {
    let to = format!("10.0.2.2:{}", echo_by_both().port());
    let mut guest = Guest::with(plain(), Setup { mtu: 65520, ..Setup::default() });
    let handle = guest.add_udp();
    for length in [0, 1, 100, 1472, 1473, 9000, 65520 - 28] {
        let data = pattern(length, length as u32);
        guest.send_to(handle, &data, &to);
        let (back, from) = guest.receive_from(handle);
        assert!(back == data, "{length}");
        assert_eq!(from.to_string(), to);
    }
}

#[test]
fn dns_by_udp_and_tcp_and_failover() {
    let ((_held, dead), alive) = (dead_udp(), echo_by_both());
    let net = net(UserNetConfig { dns_servers: Some(vec![dead, alive]), ..Default::default() });
    let mut guest = Guest::with(
        net,
        Setup { addresses: vec!["10.0.2.15/24".parse().unwrap(), "fd00::15/64".parse().unwrap()], ..Setup::default() },
    );
    let handle = guest.add_udp();
    // The first server refuses; like any resolver the guest asks again.
    guest.send_to(handle, b"question", "10.0.2.3:53");
    guest.run_for(Duration::from_millis(100));
    guest.send_to(handle, b"question", "10.0.2.3:53");
    assert_eq!(guest.receive_from(handle), (b"question".to_vec(), "10.0.2.3:53".parse().unwrap()));
    // Another socket goes to the right one at once; also by IPv6.
    let handle = guest.add_udp();
    guest.send_to(handle, b"six", "[fd00::3]:53");
    assert_eq!(guest.receive_from(handle), (b"six".to_vec(), "[fd00::3]:53".parse().unwrap()));
    let handle = guest.connect("10.0.2.3:53".parse().unwrap());
    guest.established(handle);
    guest.send_all(handle, b"long question");
    assert_eq!(guest.read_all(handle, 13), b"long question");
}

#[test]
fn dns_by_tcp_tries_the_next_server() {
    let ((_held, dead), alive) = (dead_tcp(), echo_by_both());
    let servers = vec![dead, alive];
    let mut guest = Guest::new(net(UserNetConfig { dns_servers: Some(servers), ..Default::default() }));
    let handle = guest.connect("10.0.2.3:53".parse().unwrap());
    guest.established(handle);
    guest.send_all(handle, b"question");
    assert_eq!(guest.read_all(handle, 8), b"question");
}

fn ping(guest: &mut Guest, to: Ipv4Addr, data: &[u8]) -> Vec<u8> {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 70_000]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let handle = guest.sockets.add(socket);
    let checksums = smoltcp::phy::ChecksumCapabilities::default();
    let request = Icmpv4Repr::EchoRequest { ident: 77, seq_no: 9, data };
    let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
    let buffer = socket.send(request.buffer_len(), to.into()).unwrap();
    request.emit(&mut Icmpv4Packet::new_unchecked(buffer), &checksums);
    guest.until("the pong", |guest| {
        let (bytes, from) = guest.sockets.get_mut::<icmp::Socket>(handle).recv().ok()?;
        assert_eq!(from, to.into());
        match Icmpv4Repr::parse(&Icmpv4Packet::new_checked(bytes).unwrap(), &checksums).unwrap() {
            Icmpv4Repr::EchoReply { ident: 77, seq_no: 9, data } => Some(data.to_vec()),
            other => panic!("{other:?}"),
        }
    })
}

#[test]
fn the_gateway_answers_pings() {
    let mut guest = Guest::with(plain(), Setup { mtu: 9000, ..Setup::default() });
    for length in [0, 56, 8000] {
        let data = pattern(length, 3);
        assert!(ping(&mut guest, Ipv4Addr::new(10, 0, 2, 2), &data) == data);
    }
    assert_eq!(ping(&mut guest, Ipv4Addr::new(10, 0, 2, 3), b"dns"), b"dns");
}

#[test]
fn ipv6_configures_itself_and_reaches_the_host() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || listener.incoming().for_each(|stream| echo(stream.unwrap())));
    for offloads in [NO_OFFLOADS, ALL_OFFLOADS] {
        let setup = Setup {
            slaac: true,
            offloads,
            addresses: vec!["fe80::5054:ff:fe12:3456/64".parse().unwrap()],
            ..Setup::default()
        };
        let mut guest = Guest::with(plain(), setup);
        let is_ours =
            |cidr: &IpCidr| matches!(cidr.address(), smoltcp::wire::IpAddress::Ipv6(ip) if ip.segments()[0] == 0xfd00);
        guest.until("an address", |guest| guest.interface.ip_addrs().iter().any(is_ours).then_some(()));
        let handle = guest.connect(format!("[fd00::2]:{port}").parse().unwrap());
        guest.established(handle);
        let data = pattern(1_000_000, 6);
        assert!(exchange(&mut guest, handle, &data) == data);
        assert_eq!(guest.nic.segmented > 0, offloads.segmentation_out);
    }
}

#[test]
fn a_restricted_guest_reaches_nothing_but_is_reached() {
    let to = server(echo);
    let net = net(UserNetConfig { restrict: true, forwards: vec!["tcp:0:80".parse().unwrap()], ..Default::default() });
    let address = SocketAddr::new([127, 0, 0, 1].into(), net.forwards()[0].host_port);
    let mut guest = Guest::new(net);
    let handle = guest.connect(to);
    guest.until("the refusal", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
    let handle = guest.add_tcp(65536);
    guest.tcp(handle).listen(80).unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    guest.established(handle);
    client.write_all(b"hello").unwrap();
    assert_eq!(guest.read_all(handle, 5), b"hello");
}

#[test]
fn without_host_loopback_the_gateway_is_only_a_gateway() {
    let to = server(echo);
    let mut guest = Guest::new(net(UserNetConfig { host_loopback: false, ..Default::default() }));
    let handle = guest.connect(to);
    guest.until("the refusal", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
    assert_eq!(ping(&mut guest, Ipv4Addr::new(10, 0, 2, 2), b"x"), b"x");
}

#[test]
fn a_busy_port_is_told_by_name() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let forwards = vec![format!("tcp:{port}:80").parse().unwrap()];
    let error = UserNet::new(UserNetConfig { forwards, ..Default::default() }).err().unwrap();
    assert!(matches!(error, NetError::PortBusy { .. }));
    assert!(error.to_string().starts_with(&format!("port {port} is busy: ")), "{error}");
    let forwards = vec!["tcp:192.0.2.1:0:80".parse().unwrap()];
    assert!(matches!(
        UserNet::new(UserNetConfig { forwards, ..Default::default() }),
        Err(NetError::NoSuchHostAddress { .. })
    ));
}

#[test]
fn dropping_it_closes_everything() {
    let net = net(UserNetConfig { forwards: vec!["tcp:0:80".parse().unwrap()], ..Default::default() });
    let port = net.forwards()[0].host_port;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddr::new([10, 0, 2, 2].into(), listener.local_addr().unwrap().port());
    let mut guest = Guest::new(net.clone());
    let handle = guest.connect(to);
    guest.established(handle);
    let (mut stream, _) = listener.accept().unwrap();
    drop(guest);
    assert_eq!(Arc::strong_count(&net), 1);
    drop(net);
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    TcpListener::bind(("127.0.0.1", port)).expect("the port is free again");
}

#[test]
fn it_is_not_slow() {
    let to = server(|mut stream| {
        let buffer = vec![7; 1 << 20];
        for _ in 0..64 {
            if stream.write_all(&buffer).is_err() {
                return;
            }
        }
    });
    let mut guest =
        Guest::with(plain(), Setup { offloads: ALL_OFFLOADS, mtu: 65520, strict: false, ..Setup::default() });
    let handle = guest.add_tcp(1 << 20);
    guest.connect_with(handle, to);
    guest.established(handle);
    let start = Instant::now();
    let mut count = 0;
    guest.until("64 MiB", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            count += socket.recv(|data| (data.len(), data.len())).unwrap();
        }
        (count == 64 << 20).then_some(())
    });
    let rate = 64.0 / start.elapsed().as_secs_f64();
    assert!(rate > 50.0, "{rate} MiB/s even for a loaded machine is far too little");
}
