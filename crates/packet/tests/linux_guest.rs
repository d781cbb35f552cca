//! The user-mode network with the kernel's own stack as the guest. Skipped by name without root.
#![allow(unsafe_code)]

mod guest;

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use guest::{ALL_OFFLOADS, NO_OFFLOADS, linux, pattern, private};
use vireo_packet::{UserNet, UserNetConfig};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// The world outside, in a namespace of the calling thread.
fn world(test: &str, config: UserNetConfig) -> Option<Arc<UserNet>> {
    if !private::enter(test) {
        return None;
    }
    private::add_v4("lo:1", OUTSIDE, Ipv4Addr::BROADCAST);
    Some(UserNet::new(config).unwrap())
}

fn echo_server(address: &str) -> u16 {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut reader = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut reader, &mut stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

fn exchange(stream: TcpStream, length: usize) {
    let (mut writer, mut reader) = (stream.try_clone().unwrap(), stream);
    let data = pattern(length, 8);
    let sent = data.clone();
    let sender = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    reader.read_to_end(&mut back).unwrap();
    sender.join().unwrap();
    assert!(back == data);
}

#[test]
fn tcp_of_all_kinds() {
    for (offloads, mtu) in [(NO_OFFLOADS, 1500), (ALL_OFFLOADS, 1500), (ALL_OFFLOADS, 65520), (NO_OFFLOADS, 65520)] {
        let config = UserNetConfig { forwards: vec!["tcp:0:80".parse().unwrap()], ..Default::default() };
        let Some(net) = world("linux_guest::tcp_of_all_kinds", config) else { return };
        let ports = (echo_server("127.0.0.1:0"), echo_server("198.51.100.1:0"), echo_server("[::1]:0"));
        let forward = SocketAddr::new([127, 0, 0, 1].into(), net.forwards()[0].host_port);
        let (listening, listens) = mpsc::channel();
        let client = thread::spawn(move || {
            listens.recv().unwrap();
            exchange(TcpStream::connect(forward).unwrap(), 3_000_000);
        });
        linux::run(net.clone(), offloads, mtu, || {
            let listener = TcpListener::bind("0.0.0.0:80").unwrap();
            listening.send(()).unwrap();
            exchange(TcpStream::connect(("10.0.2.2", ports.0)).unwrap(), 20_000_000);
            exchange(TcpStream::connect((OUTSIDE, ports.1)).unwrap(), 1_000_000);
            // The address comes by router advertisement and duplicate address detection.
            let six = SocketAddr::new("fd00::2".parse().unwrap(), ports.2);
            exchange(patiently(|| TcpStream::connect(six)), 3_000_000);

            let error = TcpStream::connect("10.0.2.2:1").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            let start = Instant::now();
            let error = TcpStream::connect("203.0.113.1:1").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
            let error = TcpStream::connect("169.254.169.254:80").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::HostUnreachable, "denied by default");
            let error = TcpStream::connect("[2001:db8::1]:1").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
            assert!(start.elapsed() < Duration::from_secs(1));

            let (stream, peer) = listener.accept().unwrap();
            assert_eq!(peer.ip(), Ipv4Addr::new(10, 0, 2, 2));
            let mut reader = stream.try_clone().unwrap();
            std::io::copy(&mut reader, &mut { stream }).unwrap();
            reader.shutdown(Shutdown::Write).unwrap();
            thread::sleep(Duration::from_millis(100));
        });
        client.join().unwrap();
        assert_eq!(net.stats().frames_lost_to_guest + net.stats().frames_lost_from_guest, 0);
    }
}

fn patiently<T>(mut attempt: impl FnMut() -> std::io::Result<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[test]
fn udp_of_all_sizes_in_fragments() {
    // With an MTU of 1500 on both sides both cut, and both put together.
    for mtu in [1500, 65520] {
        let Some(net) =
            world("linux_guest::udp_of_all_sizes_in_fragments", UserNetConfig { mtu, ..Default::default() })
        else {
            return;
        };
        let servers = ["127.0.0.1:0", "[::1]:0"].map(|address| {
            let socket = UdpSocket::bind(address).unwrap();
            let port = socket.local_addr().unwrap().port();
            thread::spawn(move || {
                let mut buffer = vec![0; 70_000];
                while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    socket.send_to(&buffer[..length], from).unwrap();
                }
            });
            port
        });
        linux::run(net, NO_OFFLOADS, mtu, || {
            for (own, to, port) in [("0.0.0.0:0", "10.0.2.2", servers[0]), ("[::]:0", "fd00::2", servers[1])] {
                let socket = UdpSocket::bind(own).unwrap();
                patiently(|| socket.connect((to, port)));
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut buffer = vec![0; 70_000];
                for length in [0, 1, 1452, 1453, 1473, 5000, 30_000, 65_400] {
                    let data = pattern(length, length as u32);
                    assert_eq!(socket.send(&data).unwrap(), length);
                    let back = socket
                        .recv(&mut buffer)
                        .unwrap_or_else(|error| panic!("{length} bytes to {to}, MTU {mtu}: {error}"));
                    assert!(buffer[..back] == data, "{length}");
                }
            }
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("10.0.2.2:1").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.send(b"nobody there").unwrap();
            assert_eq!(socket.recv(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        });
    }
}

#[test]
fn a_killed_server_and_a_killed_client() {
    let Some(net) = world("linux_guest::a_killed_server_and_a_killed_client", UserNetConfig::default()) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        thread::sleep(Duration::from_millis(100));
        // What was not read makes it a reset.
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 100];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(error.kind()),
            }
        }
    });
    linux::run(net.clone(), ALL_OFFLOADS, 65520, || {
        let mut stream = TcpStream::connect(("10.0.2.2", port)).unwrap();
        stream.write_all(b"never read").unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let stream = TcpStream::connect(("10.0.2.2", port)).unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        drop(stream);
        thread::sleep(Duration::from_millis(100));
    });
    assert_eq!(server.join().unwrap(), Err(ErrorKind::ConnectionReset));
    assert_eq!(net.stats().tcp_connections, 0);
}
