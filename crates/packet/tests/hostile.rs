//! Frames that no honest guest sends: the network neither panics nor hangs nor grows, and goes on to serve.
//!
//! With root all of it runs in a network namespace of its own, so that what gets through reaches nobody; without,
//! all destinations are denied.
#![allow(unsafe_code)]

mod guest;

use std::{
    io::{IoSlice, IoSliceMut},
    net::UdpSocket,
    sync::{
        Arc, Once,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use guest::{HEADER, MAC, private};
use proptest::prelude::*;
use vireo_packet::{Backend, UserNet, UserNetConfig};

const ARP: &[u8] = &[
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 8, 6, // Ethernet
    0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2,
];

/// Panics of the network's threads; it survives them, but they are bugs.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().name() == Some("net-user") {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
}

/// The network, and whether what it sends stays within a namespace of this test.
fn net(test: &str) -> (Arc<UserNet>, bool) {
    count_panics();
    let mut config = UserNetConfig {
        forwards: vec!["tcp:0:80".parse().unwrap(), "udp:0:80".parse().unwrap()],
        ..Default::default()
    };
    config.dns_servers = Some(vec!["127.0.0.1:9".parse().unwrap()]);
    let contained = private::enter(&format!("{test} (its outside half)"));
    if !contained {
        config.deny = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        config.host_loopback = false;
    }
    (UserNet::new(config).unwrap(), contained)
}

fn send(net: &UserNet, header: [u8; HEADER], ethernet: &[u8]) {
    net.send(&[IoSlice::new(&header), IoSlice::new(ethernet)]).unwrap();
}

fn drain(net: &UserNet) -> Vec<Vec<u8>> {
    let (mut frames, mut buffer) = (Vec::new(), vec![0; 70_000]);
    while let Some(length) = net.recv(&mut [IoSliceMut::new(&mut buffer)]).unwrap() {
        frames.push(buffer[HEADER..length].to_vec());
    }
    frames
}

/// It still answers who it is.
#[track_caller]
fn is_alive(net: &UserNet) {
    let deadline = Instant::now() + Duration::from_secs(10);
    send(net, [0; HEADER], ARP);
    while !drain(net).iter().any(|frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2]) {
        assert!(Instant::now() < deadline, "no answer");
        guest::wait_readable(net, Duration::from_millis(50));
    }
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
    assert!(net.stats().tcp_connections <= 1024 && net.stats().udp_flows <= 512);
}

fn checksum_v4(frame: &mut [u8]) {
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
    if ip.check_len().is_ok() {
        ip.fill_checksum();
    }
}

fn ethernet(kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&[0x52, 0x55, 10, 0, 2, 2], &MAC.0[..], &kind, payload].concat()
}

fn ipv4(protocol: u8, to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len()) as u16;
    let [high, low] = length.to_be_bytes();
    let header = [0x45, 0, high, low, 0, 7, 0x40, 0, 64, protocol, 0, 0, 10, 0, 2, 15, to[0], to[1], to[2], to[3]];
    let mut frame = ethernet([8, 0], &[&header[..], payload].concat());
    checksum_v4(&mut frame);
    frame
}

fn ipv6(next: u8, to: u16, payload: &[u8]) -> Vec<u8> {
    let [high, low] = (payload.len() as u16).to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, high, low, next, 255];
    header.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x15]);
    header.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    header.extend(to.to_be_bytes());
    ethernet([0x86, 0xdd], &[&header[..], payload].concat())
}

/// TCP with these flags, to the port of a server that listens.
fn tcp(port: u16, source: u16, sequence: u32, acknowledged: u32, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = [source.to_be_bytes(), port.to_be_bytes()].concat();
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(acknowledged.to_be_bytes());
    let options = &options[..options.len() / 4 * 4];
    bytes.extend([(((20 + options.len()) / 4) << 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(options);
    bytes.extend(data);
    bytes
}

fn valid_frames(port: u16) -> Vec<Vec<u8>> {
    let syn = tcp(port, 1000, 7, 0, 2, &[2, 4, 5, 0xb4, 3, 3, 7, 0], b"");
    let mut dhcp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    dhcp.resize(28, 0);
    dhcp.extend(MAC.0);
    dhcp.resize(236, 0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 1, 55, 3, 1, 3, 6, 255]);
    let dhcp = [&[0, 68, 0, 67, ((dhcp.len() + 8) >> 8) as u8, (dhcp.len() + 8) as u8, 0, 0], &dhcp[..]].concat();
    vec![
        ARP.to_vec(),
        ipv4(6, [10, 0, 2, 2], &syn),
        ipv4(6, [10, 0, 2, 3], &tcp(53, 1001, 7, 0, 2, &[], b"")),
        ipv4(6, [198, 51, 100, 1], &syn),
        ipv4(17, [255, 255, 255, 255], &dhcp),
        ipv4(17, [10, 0, 2, 3], &[0, 99, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]),
        ipv4(17, [10, 0, 2, 2], &[0, 99, 0, 9, 0, 12, 0, 0, 1, 2, 3, 4]),
        ipv4(1, [10, 0, 2, 2], &[8, 0, 0, 0, 0, 1, 0, 1, 5, 6, 7]),
        ipv4(1, [198, 51, 100, 1], &[8, 0, 0, 0, 0, 1, 0, 1, 5, 6, 7]),
        ipv6(6, 2, &syn),
        ipv6(17, 3, &[0, 99, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]),
        ipv6(58, 2, &[128, 0, 0, 0, 0, 1, 0, 1, 5]),
        ipv6(58, 2, &[133, 0, 0, 0, 0, 0, 0, 0]),
        ipv6(
            58,
            2,
            &[135, 0, 0, 0, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 1, 2, 2, 2, 2, 2, 2],
        ),
        ipv6(44, 2, &[17, 0, 0, 1, 0, 0, 0, 9, 0, 99, 0, 53, 0, 12, 0, 0]),
    ]
}

/// An eighth of `PROPTEST_CASES`, which is 256 if it is not set.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = (default.cases / 8).max(1);
    ProptestConfig { cases, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_bytes(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..200)) {
        let (net, _) = net("hostile::random_bytes");
        for frame in &frames {
            net.send(&[IoSlice::new(frame)]).unwrap();
        }
        is_alive(&net);
    }

    #[test]
    fn mutated_frames(
        changes in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), any::<prop::sample::Index>(), any::<bool>(), any::<[u8; HEADER]>()),
            1..400,
        ),
    ) {
        let (net, _) = net("hostile::mutated_frames");
        let valid = valid_frames(9);
        for (which, mutations, cut, whole, header) in &changes {
            let mut frame = which.get(&valid).clone();
            for (place, value) in mutations {
                let place = place.index(frame.len());
                frame[place] = *value;
            }
            if !whole {
                frame.truncate(cut.index(frame.len()).max(14));
            }
            if frame[12..14] == [8, 0] {
                checksum_v4(&mut frame);
            }
            send(&net, *header, &frame);
        }
        is_alive(&net);
    }

    /// Segments with any flags, sequence numbers and options around a connection that really exists.
    #[test]
    fn wild_tcp(
        segments in prop::collection::vec((0u16..4, any::<u8>(), -70_000i64..70_000, -70_000i64..70_000, prop::collection::vec(any::<u8>(), 0..40), 0usize..3000), 1..300),
        offloads: bool,
    ) {
        let (net, contained) = net("hostile::wild_tcp");
        if offloads {
            net.set_offloads(guest::ALL_OFFLOADS);
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        listener.set_nonblocking(true).unwrap();
        let mut ours = [1u32, 0x7fff_fff0, 0xffff_fff0, 5];
        let mut theirs = [0u32; 4];
        for (source, sequence) in ours.iter().enumerate() {
            send(&net, [0; HEADER], &ipv4(6, [10, 0, 2, 2], &tcp(port, source as u16 + 1, *sequence, 0, 2, &[2, 4, 0xff, 0, 3, 3, 14, 0], b"")));
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut accepted = Vec::new();
        while contained && theirs.contains(&0) {
            prop_assert!(Instant::now() < deadline, "no SYN-ACK");
            guest::wait_readable(&*net, Duration::from_millis(20));
            note(&drain(&net), &mut theirs);
            accepted.extend(listener.accept().map(|(stream, _)| stream));
        }
        // Complete half of the handshakes.
        for at in [0, 1] {
            let segment = tcp(port, at as u16 + 1, ours[at].wrapping_add(1), theirs[at].wrapping_add(1), 0x10, &[], b"");
            send(&net, [0; HEADER], &ipv4(6, [10, 0, 2, 2], &segment));
        }
        for (which, flags, sequence, acknowledged, options, length) in &segments {
            let at = usize::from(*which);
            let sequence = ours[at].wrapping_add(1).wrapping_add(*sequence as u32);
            let acknowledged = theirs[at].wrapping_add(1).wrapping_add(*acknowledged as u32);
            let segment = tcp(port, which + 1, sequence, acknowledged, *flags, options, &vec![3; *length]);
            send(&net, [0; HEADER], &ipv4(6, [10, 0, 2, 2], &segment));
            if flags & 0x10 != 0 && flags & 7 == 0 && *length > 0 {
                ours[at] = ours[at].wrapping_add(if sequence == ours[at].wrapping_add(1) { *length as u32 } else { 0 });
            }
            for stream in &mut accepted {
                let _ = stream.set_nonblocking(true);
                let _ = std::io::Write::write(stream, &[9; 5000]);
            }
            note(&drain(&net), &mut theirs);
        }
        is_alive(&net);
    }
}

/// Remembers the sequence numbers of the network's segments.
fn note(frames: &[Vec<u8>], theirs: &mut [u32; 4]) {
    for frame in frames.iter().filter(|frame| frame.len() >= 54 && frame[12..14] == [8, 0] && frame[23] == 6) {
        let port = usize::from(u16::from_be_bytes([frame[36], frame[37]]));
        if frame[47] & 2 != 0 && (1..=4).contains(&port) {
            theirs[port - 1] = u32::from_be_bytes(frame[38..42].try_into().unwrap());
        }
    }
}

#[test]
fn a_flood_of_flows_stays_within_its_limits() {
    let (net, contained) = net("hostile::a_flood_of_flows_stays_within_its_limits");
    let quiet = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let before = resident_kib();
    for source in 1..=5000u16 {
        send(&net, [0; HEADER], &ipv4(6, [10, 0, 2, 2], &tcp(port, source, 1, 0, 2, &[], b"")));
        let [high, low] = quiet.port().to_be_bytes();
        let [from_high, from_low] = source.to_be_bytes();
        send(&net, [0; HEADER], &ipv4(17, [10, 0, 2, 2], &[from_high, from_low, high, low, 0, 12, 0, 0, 1, 2, 3, 4]));
        if source % 100 == 0 {
            is_alive(&net);
            drop(
                (0..100)
                    .map_while(|_| {
                        listener.set_nonblocking(true).unwrap();
                        listener.accept().ok()
                    })
                    .collect::<Vec<_>>(),
            );
        }
    }
    is_alive(&net);
    let stats = net.stats();
    assert!(!contained || stats.udp_flows == 512, "{stats:?}");
    let grown = resident_kib().saturating_sub(before);
    assert!(grown < 60 * 1024, "{grown} KiB more than before");
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
