//! `--net user`: the guest reaches servers of the test on the host's loopback, and the test a server in the guest.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use crate::{
    images::{Image, RELEASES, State},
    process::{Guard, TIMEOUT},
};

/// Answers every HTTP request with the same megabyte.
fn http_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                request.push(byte[0]);
            }
            let code = if request.starts_with(b"GET /file HTTP/1.0\r\n") { "200 OK" } else { "404 Not Found" };
            let body = vec![b'z'; 1 << 20];
            let head = format!("HTTP/1.0 {code}\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).unwrap();
        }
    });
    address
}

/// Sends every datagram back, backwards.
fn udp_server() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            buffer[..len].reverse();
            socket.send_to(&buffer[..len], from).unwrap();
        }
    });
    address
}

#[test]
fn a_guest_reaches_the_host() {
    let (http, udp) = (http_server(), udp_server());
    for image in RELEASES {
        let Some(state) = State::with(image, "a_guest_reaches_the_host") else { return };
        let script = format!(
            "exec 3<>/dev/tcp/10.0.2.2/{}; printf 'GET /file HTTP/1.0\\r\\n\\r\\n' >&3
             head -n 1 <&3 | tr -d '\\r'
             exec 3<>/dev/udp/10.0.2.2/{}; printf 'drawer' >&3; head -c 6 <&3; echo
             exec 3<>/dev/tcp/10.0.2.2/{}; printf 'GET /file HTTP/1.0\\r\\n\\r\\n' >&3; wc -c <&3
             ping -q -c 2 -W 5 10.0.2.2 | grep -o ' 0% packet loss'
             ip -4 -o address show scope global | grep -o 'eth0 *inet [0-9./]*'
             # systemd-networkd may just be taking over what the initrd has set up.
             for i in $(seq 50); do ip -4 route show default | grep -o 'via [0-9.]*' && break; sleep 0.2; done
             grep -c ^nameserver /etc/resolv.conf",
            http.port(),
            udp.port(),
            http.port()
        );
        // At once, before systemd is done: a command must not have to wait for its network.
        let ended = state.run(&[], &["bash", "-euc", &script], b"");
        let wanted = "HTTP/1.0 200 OK\nreward\n1048620\n 0% packet loss\neth0    inet 10.0.2.15/24\nvia 10.0.2.2\n1\n";
        assert_eq!((ended.code, ended.text().as_str()), (Some(0), wanted), "{}", ended.stderr);
    }
}

/// What the guest's own network configuration makes of it, once the system is up.
#[test]
fn addresses_routes_and_name_servers_come_by_dhcp_and_advertisement() {
    for image in RELEASES {
        let test = "addresses_routes_and_name_servers_come_by_dhcp_and_advertisement";
        let Some(state) = State::with(image, test) else { return };
        let script = "systemctl is-system-running --wait
            for i in $(seq 100); do networkctl status eth0 | grep -q 'DHCPv\\?4 via' && ip -6 route show default | grep -q via && break; sleep 0.2; done
            networkctl status eth0 | grep -o '10.0.2.15 (DHCPv\\?4 via 10.0.2.2)' | sed s/DHCPv4/DHCP4/
            ip -6 -o address show dev eth0 scope global | grep -o 'inet6 fd00:' | head -n 1
            ip -6 route show default | grep -o 'via fe80::[0-9a-f]*' | head -n 1
            resolvectl dns eth0 | grep -o '10.0.2.3'
            ping -6 -q -c 1 -W 5 fd00::2 | grep -o ' 0% packet loss'
            getent ahostsv4 localhost | head -n 1 | cut -d ' ' -f 1";
        let wanted =
            "running\n10.0.2.15 (DHCP4 via 10.0.2.2)\ninet6 fd00:\nvia fe80::2\n10.0.2.3\n 0% packet loss\n127.0.0.1\n";
        assert_eq!(state.script(&["--cpus", "2"], script), wanted);
    }
}

#[test]
fn the_host_reaches_a_guest_through_a_forwarded_port() {
    let Some(state) = State::with(Image::Bookworm, "the_host_reaches_a_guest_through_a_forwarded_port") else { return };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = "use IO::Socket::INET; $| = 1;
        my $server = IO::Socket::INET->new(LocalPort => 8080, Listen => 5, ReuseAddr => 1) or die $!;
        while (my $client = $server->accept) { my $line = <$client>; print $client \"guest got $line\"; close $client; exit 6 if $line =~ /end/; }";
    let net = format!("user,fwd=tcp:127.0.0.1:{port}:8080");
    let mut command = state.run_command(&["--net", &net], &["perl", "-e", server]);
    let mut child = Guard(command.stdin(Stdio::null()).spawn().unwrap());
    for word in ["hello", "the end"] {
        let wanted = format!("guest got {word}\n");
        let start = Instant::now();
        while ask(port, word) != wanted {
            assert!(start.elapsed() < TIMEOUT, "no answer through port {port}");
            assert_eq!(child.0.try_wait().unwrap(), None);
            thread::sleep(Duration::from_millis(100));
        }
    }
    assert_eq!(child.wait(), Some(6));
}

/// What a server says to a line; nothing where it does not answer.
fn ask(port: u16, line: &str) -> String {
    let mut answer = String::new();
    if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let _ = stream.write_all(format!("{line}\n").as_bytes());
        let _ = stream.read_to_string(&mut answer);
    }
    answer
}

#[test]
fn without_a_network_there_is_none() {
    let Some(state) = State::with(Image::Bookworm, "without_a_network_there_is_none") else { return };
    let script = "ls /sys/class/net; systemctl is-system-running --wait";
    assert_eq!(state.script(&["--net", "none"], script), "lo\nrunning\n");
}
