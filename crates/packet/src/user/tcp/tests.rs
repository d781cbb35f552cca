//! Connections over hours, on a clock of our own.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    sync::Arc,
};

use smoltcp::wire::{TcpControl, TcpSeqNumber};

use super::*;
use crate::{
    MacAddress,
    user::{
        config::{Addresses, UserNetConfig},
        link::{Link, PACKET_START},
        poller::Poller,
        queues::Queues,
        resolver::Resolver,
        route::Policy,
    },
};

const GUEST: (IpAddr, u16) = (IpAddr::V4(Ipv4Addr::new(10, 0, 2, 15)), 4000);
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));

struct World {
    table: TcpTable,
    shared: Shared,
    queues: Arc<Queues>,
    host: TcpStream,
    port: u16,
    /// What the guest sends and expects next.
    sequence: i32,
    expected: i32,
}

#[derive(Debug, PartialEq, Eq)]
struct Segment {
    control: TcpControl,
    sequence: i32,
    data: Vec<u8>,
}

impl World {
    /// With one connection of the guest to a server on loopback.
    fn connected() -> Self {
        let config = UserNetConfig::default();
        let queues = Arc::new(Queues::new().unwrap());
        let mut link = Link::new(queues.clone(), Addresses::of(&config), config.gateway_mac, config.mtu);
        link.learn(GUEST.0, MacAddress([2, 0, 0, 0, 0, 1]));
        let resolver = Resolver::new(PathBuf::from("/dev/null"), None, None);
        let mut shared =
            Shared { link, poller: Poller::new().unwrap(), policy: Policy::of(&config), resolver, now: Instant::now() };
        let mut table = TcpTable::new(&mut shared).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let host = std::thread::spawn(move || listener.accept().unwrap().0);
        let mut parts = Parts { table: &mut table, shared: &mut shared, queues: &queues, port };
        parts.send(TcpControl::Syn, 99, None, b"");
        let syn = parts.until_segment();
        assert_eq!(syn.control, TcpControl::Syn);
        let host = host.join().unwrap();
        host.set_nonblocking(true).unwrap();
        let mut world =
            Self { table, shared, queues, host, port, sequence: 100, expected: syn.sequence.wrapping_add(1) };
        world.send(TcpControl::None, b"");
        world
    }

    fn parts(&mut self) -> Parts<'_> {
        Parts { table: &mut self.table, shared: &mut self.shared, queues: &self.queues, port: self.port }
    }

    fn send(&mut self, control: TcpControl, data: &[u8]) {
        let (sequence, expected) = (self.sequence, self.expected);
        self.parts().send(control, sequence, Some(expected), data);
        self.sequence = self.sequence.wrapping_add(data.len() as i32 + i32::from(control == TcpControl::Fin));
    }

    /// The next segment of the network that has data or a flag.
    fn segment(&mut self) -> Segment {
        let segment = self.parts().until_segment();
        self.expected =
            segment.sequence.wrapping_add(segment.data.len() as i32 + i32::from(segment.control == TcpControl::Fin));
        segment
    }

    /// Time passes, and timers fire as they would.
    fn sleep(&mut self, time: Duration) {
        let end = self.shared.now + time;
        while let Some(at) = self.table.next_timer().filter(|at| *at <= end) {
            self.shared.now = at;
            self.table.fire_timers(at);
            self.table.serve_queued(&mut self.shared);
        }
        self.shared.now = end;
        self.table.expire(end);
        self.table.serve_queued(&mut self.shared);
    }
}

struct Parts<'a> {
    table: &'a mut TcpTable,
    shared: &'a mut Shared,
    queues: &'a Queues,
    port: u16,
}

impl Parts<'_> {
    fn send(&mut self, control: TcpControl, sequence: i32, acknowledged: Option<i32>, data: &[u8]) {
        let repr = TcpRepr {
            src_port: GUEST.1,
            dst_port: self.port,
            control,
            seq_number: TcpSeqNumber(sequence),
            ack_number: acknowledged.map(TcpSeqNumber),
            window_len: 65535,
            window_scale: None,
            max_seg_size: (control == TcpControl::Syn).then_some(1460),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: data,
        };
        let mut bytes = packet::build(GUEST.0, GATEWAY, packet::TCP, 64, repr.buffer_len()).unwrap();
        let mut segment = TcpPacket::new_unchecked(&mut bytes[packet::IPV4_HEADER..]);
        repr.emit(&mut segment, &GUEST.0.into(), &GATEWAY.into(), &ChecksumCapabilities::default());
        self.table.receive(&Packet::parse(&bytes).unwrap(), self.shared);
        self.table.serve_queued(self.shared);
    }

    fn until_segment(&mut self) -> Segment {
        let (mut events, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(5));
        loop {
            if let Some(segment) = self.pop() {
                return segment;
            }
            assert!(Instant::now() < deadline, "no segment came");
            self.shared.poller.wait(Some(Duration::from_millis(10)), &mut events).unwrap();
            for (token, readiness) in events.drain(..) {
                if let Token::Tcp(id) = token {
                    self.table.host_event(id, readiness, self.shared);
                }
            }
            self.table.serve_queued(self.shared);
        }
    }

    fn pop(&mut self) -> Option<Segment> {
        let mut frame = vec![0; 70_000];
        loop {
            let length = self.queues.pop_outbound(&mut [std::io::IoSliceMut::new(&mut frame)])?;
            let packet = Packet::parse(&frame[PACKET_START..length]).unwrap();
            let tcp = TcpPacket::new_checked(packet.payload).unwrap();
            let repr =
                TcpRepr::parse(&tcp, &GATEWAY.into(), &GUEST.0.into(), &ChecksumCapabilities::default()).unwrap();
            if repr.control != TcpControl::None || !repr.payload.is_empty() {
                return Some(Segment {
                    control: repr.control,
                    sequence: repr.seq_number.0,
                    data: repr.payload.to_vec(),
                });
            }
        }
    }
}

#[test]
fn an_idle_connection_lives_for_two_hours_and_then_ends_with_a_reset() {
    let mut world = World::connected();
    for _ in 0..3 {
        world.sleep(Duration::from_secs(2 * 3600));
        world.send(TcpControl::Psh, b"still here");
        let mut buffer = [0; 100];
        assert_eq!(world.host.read(&mut buffer).unwrap(), 10);
        world.sleep(Duration::from_secs(3600));
        world.host.write_all(b"so am I").unwrap();
        assert_eq!(world.segment().data, b"so am I");
        world.send(TcpControl::None, b"");
    }
    world.sleep(Duration::from_secs(2 * 3600 + 600));
    assert_eq!(world.segment().control, TcpControl::Rst);
    assert_eq!(world.table.len(), 0);
    world.host.set_nonblocking(false).unwrap();
    assert!(world.host.read(&mut [0; 1]).is_err(), "the peer sees a reset");
}

#[test]
fn a_connection_ends_in_order_after_a_long_silence() {
    let mut world = World::connected();
    world.sleep(Duration::from_secs(2 * 3600));
    world.host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(world.segment().control, TcpControl::Fin);
    world.send(TcpControl::None, b"");
    world.sleep(Duration::from_secs(3600));
    world.send(TcpControl::Fin, b"the last word");
    let mut all = Vec::new();
    world.host.set_nonblocking(false).unwrap();
    world.host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"the last word");
    assert_eq!(world.table.len(), 0);
}

#[test]
fn a_guest_that_is_gone_is_given_up_after_a_quarter_of_an_hour() {
    let mut world = World::connected();
    world.host.write_all(b"anybody?").unwrap();
    assert_eq!(world.segment().data, b"anybody?");
    world.sleep(Duration::from_secs(14 * 60));
    assert_eq!(world.table.len(), 1);
    let again = world.segment();
    assert_eq!(again.data, b"anybody?", "it was sent again meanwhile");
    world.sleep(Duration::from_secs(2 * 60));
    assert_eq!(world.table.len(), 0);
}
