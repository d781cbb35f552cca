use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use vmm_sys_util::epoll::Epoll;

use super::{
    host::Listeners,
    muxer::Muxer,
    packet::{HEADER_BYTES, Header, op},
    *,
};
use crate::virtio::{
    Queue, VirtioDevice,
    fake_driver::{F_EVENT_IDX, Heap, PATIENCE, Piece, Ring},
};

const CID: u64 = 7;
const BUFFER: usize = 4096;
const MOMENT: Duration = Duration::from_millis(30);
/// What the device grants the first connections.
const GRANTED: u32 = 256 << 10;

/// A guest's socket layer, as far as the tests need one.
struct Guest {
    heap: Arc<Heap>,
    device: Vsock,
    host: VsockHost,
    rx: Ring,
    tx: Ring,
    event: Ring,
    buffers: HashMap<u16, Piece>,
    spare: Vec<Piece>,
    outgoing: Piece,
    buf_alloc: u32,
    fwd_cnt: u32,
}

fn guest(features: u64) -> Guest {
    guest_with_buffers(features, 32)
}

fn guest_with_buffers(features: u64, buffers: u16) -> Guest {
    let heap = Heap::new(8 << 20);
    let mut device = Vsock::new("vsock0", CID as u32).unwrap();
    let ring = |size| Ring::new(&heap, size, features);
    let (rx, tx, event) = (ring(buffers), ring(32), ring(4));
    for (index, ring) in [&rx, &tx, &event].into_iter().enumerate() {
        device.start_queue(index, ring.resources(None)).unwrap();
    }
    let mut guest = Guest {
        host: device.host(),
        spare: (0..buffers).map(|_| heap.empty(BUFFER)).collect(),
        outgoing: heap.filled(&[0; HEADER_BYTES + (64 << 10)]),
        heap,
        device,
        rx,
        tx,
        event,
        buffers: HashMap::new(),
        buf_alloc: 256 << 10,
        fwd_cnt: 0,
    };
    guest.refill();
    guest
}

fn ports(host: u32, guest: u32) -> Header {
    Header { src_cid: CID, dst_cid: 2, src_port: guest, dst_port: host, kind: 1, ..Header::default() }
}

impl Guest {
    fn refill(&mut self) {
        while let Some(buffer) = self.spare.pop() {
            self.buffers.insert(self.rx.add(&[buffer]), buffer);
        }
        self.rx.publish();
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        self.heap.memory.write(self.outgoing.gpa, bytes).unwrap();
        self.tx.run(&[Piece { len: bytes.len() as u32, ..self.outgoing }]);
    }

    fn send(&mut self, to: Header, op: u16, flags: u32, payload: &[u8]) {
        let (buf_alloc, fwd_cnt) = (self.buf_alloc, self.fwd_cnt);
        let header = Header { op, flags, len: payload.len() as u32, buf_alloc, fwd_cnt, ..to };
        self.send_raw(&[&header.to_bytes(), payload].concat());
    }

    fn try_recv(&mut self, timeout: Duration) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.wait_used(timeout)?;
        let buffer = self.buffers.remove(&head).unwrap();
        let bytes = self.heap.bytes(buffer);
        self.spare.push(buffer);
        self.refill();
        let mut header = bytes[..HEADER_BYTES].to_vec();
        let slice = [vireo_memory::GuestSlice::from_host(&mut header)];
        let header = Header::read(&mut crate::virtio::Reader::new(&slice)).unwrap();
        // the reset of a stray has the stray's addresses
        assert!(header.op == op::RST || (header.src_cid, header.kind) == (2, 1), "{header:?}");
        assert_eq!(header.dst_cid, CID);
        assert_eq!(header.len as usize, len as usize - HEADER_BYTES);
        Some((header, bytes[HEADER_BYTES..len as usize].to_vec()))
    }

    fn recv(&mut self) -> (Header, Vec<u8>) {
        self.try_recv(PATIENCE).expect("a packet from the host")
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, payload) = self.recv();
        assert_eq!((header.op, payload.len()), (op, 0), "{header:?}");
        header
    }

    fn quiet(&mut self) {
        assert_eq!(self.try_recv(MOMENT), None);
    }

    /// Takes data (and passes over credit updates) until there are `len` bytes.
    fn recv_data(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            let (header, payload) = self.recv();
            assert!([op::RW, op::CREDIT_UPDATE].contains(&header.op), "{header:?}");
            data.extend(payload);
        }
        data
    }

    /// The guest connects to a listener on the host.
    fn dial(&mut self, listener: &VsockListener, guest_port: u32) -> (Header, UnixStream) {
        let to = ports(listener.port(), guest_port);
        self.send(to, op::REQUEST, 0, &[]);
        let header = loop {
            let (header, _) = self.recv();
            if header.op != op::CREDIT_UPDATE {
                break header;
            }
        };
        assert_eq!(header.op, op::RESPONSE);
        assert_eq!((header.src_port, header.dst_port), (listener.port(), guest_port));
        (to, accepted(listener))
    }

    fn shutdown_by_host(&mut self, to: Header) {
        loop {
            let header = self.recv().0;
            if header.op == op::SHUTDOWN && header.flags == 3 {
                break;
            }
        }
        self.send(to, op::RST, 0, &[]);
    }
}

fn accepted(listener: &VsockListener) -> UnixStream {
    let stream = listener.accept(PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(13) ^ (i >> 8) as u8 ^ seed).collect()
}

#[test]
fn the_host_connects() {
    for features in [0, F_EVENT_IDX] {
        let mut guest = guest(features);
        let host = guest.host.clone();
        let client = thread::spawn(move || host.connect(1024, PATIENCE));
        let request = guest.expect(op::REQUEST);
        assert_eq!(request.dst_port, 1024);
        let to = ports(request.src_port, 1024);
        guest.send(to, op::RESPONSE, 0, &[]);
        let mut stream = client.join().unwrap().unwrap();
        stream.write_all(b"hello guest").unwrap();
        assert_eq!(guest.recv_data(11), b"hello guest");
        guest.send(to, op::RW, 0, b"hello host");
        let mut text = [0; 10];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello host");
        drop(stream);
        guest.shutdown_by_host(to);
        guest.send(to, op::RW, 0, b"?");
        assert_eq!(guest.expect(op::RST).dst_port, 1024);
    }
}

#[test]
fn a_connection_can_fail() {
    let mut guest = guest(0);
    let host = guest.host.clone();
    let client = thread::spawn(move || host.connect(1, PATIENCE).unwrap_err().kind());
    let request = guest.expect(op::REQUEST);
    guest.send(ports(request.src_port, 1), op::RST, 0, &[]);
    assert_eq!(client.join().unwrap(), io::ErrorKind::ConnectionRefused);

    let host = guest.host.clone();
    let client = thread::spawn(move || host.connect(1, Duration::from_secs(1)).unwrap_err().kind());
    let request = guest.expect(op::REQUEST);
    assert_eq!(client.join().unwrap(), io::ErrorKind::TimedOut);
    assert_eq!(guest.expect(op::RST).src_port, request.src_port);
    guest.send(ports(request.src_port, 1), op::RESPONSE, 0, &[]);
    guest.expect(op::RST);

    let host = guest.host.clone();
    drop(guest);
    assert_eq!(host.connect(1, PATIENCE).unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[test]
fn a_connection_waits_for_the_driver() {
    let mut guest = guest(0);
    let states: Vec<_> = (0..3).map(|index| guest.device.stop_queue(index)).collect();
    let host = guest.host.clone();
    let client = thread::spawn(move || host.connect(5, PATIENCE).is_ok());
    thread::sleep(MOMENT);
    for (index, ring) in [&guest.rx, &guest.tx, &guest.event].into_iter().enumerate() {
        guest.device.start_queue(index, ring.resources(states[index])).unwrap();
    }
    let request = guest.expect(op::REQUEST);
    guest.send(ports(request.src_port, 5), op::RESPONSE, 0, &[]);
    assert!(client.join().unwrap());
}

#[test]
fn the_guest_connects() {
    let mut guest = guest(F_EVENT_IDX);
    let listener = guest.host.listen(99).unwrap();
    assert_eq!(guest.host.listen(99).err().unwrap().kind(), io::ErrorKind::AddrInUse);
    let (to, mut stream) = guest.dial(&listener, 3000);
    guest.send(to, op::RW, 0, b"ping");
    let mut text = [0; 4];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"ping");
    // nobody there, and nobody there any more
    guest.send(ports(98, 3000), op::REQUEST, 0, &[]);
    guest.expect(op::RST);
    drop(listener);
    guest.send(ports(99, 3001), op::REQUEST, 0, &[]);
    guest.expect(op::RST);
    // the connection outlives its listener
    stream.write_all(b"pong").unwrap();
    assert_eq!(guest.recv_data(4), b"pong");
    assert!(guest.host.listen(99).is_ok());
}

#[test]
fn strays_are_reset() {
    let mut guest = guest(0);
    let to = ports(50, 60);
    for op in [op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, 0xffff] {
        guest.send(to, op, 0, b"");
        let reset = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (50, 60));
    }
    guest.send(to, op::RST, 0, &[]);
    // from somebody else, too short, longer than it is
    guest.send(Header { src_cid: CID + 1, ..to }, op::RW, 0, &[]);
    guest.send_raw(&[0; HEADER_BYTES - 1]);
    guest.send_raw(&Header { op: op::RW, len: 1, ..to }.to_bytes());
    guest.quiet();
}

#[test]
fn what_is_not_offered_is_reset() {
    let mut guest = guest(0);
    let _listener = guest.host.listen(50).unwrap();
    // SEQPACKET, and a packet to another machine: the reset says so
    for to in [Header { kind: 2, ..ports(50, 60) }, Header { dst_cid: 9, ..ports(50, 60) }] {
        guest.send(to, op::REQUEST, 0, &[]);
        let (head, _) = guest.rx.wait_used(PATIENCE).unwrap();
        let bytes = guest.heap.bytes(guest.buffers[&head]);
        assert_eq!(bytes[..8], to.dst_cid.to_le_bytes());
        assert_eq!((bytes[28], bytes[30]), (to.kind as u8, op::RST as u8));
    }
}

#[test]
fn the_guest_closes_one_way_and_then_the_other() {
    let mut guest = guest(F_EVENT_IDX);
    let listener = guest.host.listen(1).unwrap();
    let (to, mut stream) = guest.dial(&listener, 2);
    guest.send(to, op::RW, 0, b"question");
    guest.send(to, op::SHUTDOWN, 2, &[]);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.recv_data(6), b"answer");
    guest.send(to, op::SHUTDOWN, 1, &[]);
    loop {
        if guest.recv().0.op == op::RST {
            break;
        }
    }
    assert_eq!(stream.write(b"too late").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn the_host_closes_one_way_and_then_the_other() {
    let mut guest = guest(F_EVENT_IDX);
    let listener = guest.host.listen(1).unwrap();
    let (to, mut stream) = guest.dial(&listener, 2);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.recv_data(8), b"question");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 2);
    guest.send(to, op::RW, 0, b"answer");
    let mut text = [0; 6];
    stream.read_exact(&mut text).unwrap();
    drop(stream);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 3);
    guest.send(to, op::RST, 0, &[]);
    guest.quiet();
}

#[test]
fn data_before_a_close_arrives() {
    let mut guest = guest(F_EVENT_IDX);
    let listener = guest.host.listen(1).unwrap();
    let (to, mut stream) = guest.dial(&listener, 2);
    // more than the socket takes, so that some waits in the device; then the guest is gone
    let data = pattern(GRANTED as usize, 1);
    for part in data.chunks(60_000) {
        guest.send(to, op::RW, 0, part);
    }
    guest.send(to, op::SHUTDOWN, 3, &[]);
    guest.send(to, op::RST, 0, &[]);
    let (again, mut second) = guest.dial(&listener, 2);
    guest.send(again, op::RW, 0, b"the ports are free");
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert!(received == data);
    let mut text = [0; 18];
    second.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"the ports are free");
}

#[test]
fn a_slow_host_holds_the_guest_back() {
    let mut guest = guest(F_EVENT_IDX);
    let listener = guest.host.listen(1).unwrap();
    let (to, mut stream) = guest.dial(&listener, 2);
    let total = 4 << 20;
    let data = pattern(total, 2);
    let reader = thread::spawn(move || {
        let mut received: Vec<u8> = Vec::new();
        let mut part = vec![0; 100_000];
        while received.len() < total {
            let len = stream.read(&mut part).unwrap();
            assert!(len > 0);
            received.extend(&part[..len]);
            thread::sleep(Duration::from_millis(1));
        }
        (stream, received)
    });
    // `RESPONSE` granted this much; every update grants more
    let (mut sent, mut limit) = (0, GRANTED as usize);
    while sent < total {
        while sent < limit.min(total) {
            let len = (limit.min(total) - sent).min(60_000);
            guest.send(to, op::RW, 0, &data[sent..sent + len]);
            sent += len;
        }
        if sent < total {
            let update = guest.expect(op::CREDIT_UPDATE);
            assert_eq!(update.buf_alloc, GRANTED);
            limit = update.fwd_cnt as usize + GRANTED as usize;
        }
    }
    let (_stream, received) = reader.join().unwrap();
    assert!(received == data);
}

#[test]
fn too_much_is_a_violation() {
    let mut guest = guest(0);
    let listener = guest.host.listen(1).unwrap();
    let (to, _stream) = guest.dial(&listener, 2);
    // nobody reads: the socket takes some, and then as much as was granted
    let mut reset = false;
    for _ in 0..40 {
        guest.send(to, op::RW, 0, &[5; 60_000]);
        while let Some((header, _)) = guest.try_recv(Duration::from_millis(1)) {
            reset |= header.op == op::RST;
        }
        if reset {
            break;
        }
    }
    assert!(reset);
}

#[test]
fn a_slow_guest_holds_the_host_back() {
    let mut guest = guest(F_EVENT_IDX);
    guest.buf_alloc = 1000;
    let listener = guest.host.listen(1).unwrap();
    let (to, mut stream) = guest.dial(&listener, 2);
    let data = pattern(50_000, 3);
    let copy = data.clone();
    let writer = thread::spawn(move || {
        stream.write_all(&copy).unwrap();
        stream
    });
    let mut received: Vec<u8> = Vec::new();
    while received.len() < data.len() {
        let more = guest.recv_data(1000);
        assert_eq!(more.len(), 1000);
        received.extend(more);
        if received.len() == data.len() {
            break;
        }
        // asked for once, and not again by an update that gives nothing
        guest.expect(op::CREDIT_REQUEST);
        if received.len() < 5000 {
            guest.send(to, op::CREDIT_UPDATE, 0, &[]);
            guest.quiet();
        }
        guest.fwd_cnt = received.len() as u32;
        guest.send(to, op::CREDIT_UPDATE, 0, &[]);
    }
    assert!(received == data);
    writer.join().unwrap();
    guest.send(to, op::CREDIT_REQUEST, 0, &[]);
    loop {
        if guest.recv().0.op == op::CREDIT_UPDATE {
            break;
        }
    }
}

/// Several streams at once in both directions, mixed; everything arrives, in order.
#[test]
fn many_connections_at_once() {
    let mut guest = guest(F_EVENT_IDX);
    let listener = guest.host.listen(1).unwrap();
    guest.buf_alloc = u32::MAX;
    const EACH: usize = 300_000;
    let mut echoes = Vec::new();
    let mut connections = HashMap::new();
    for port in 0..20u32 {
        let (to, mut stream) = guest.dial(&listener, port);
        connections.insert(port, (to, Vec::<u8>::new(), 0usize, 30_000usize));
        echoes.push(thread::spawn(move || {
            let mut part = [0; 10_000];
            let mut left = EACH;
            while left > 0 {
                let len = stream.read(&mut part).unwrap();
                stream.write_all(&part[..len]).unwrap();
                left -= len;
            }
            stream
        }));
    }
    let deadline = Instant::now() + PATIENCE;
    while connections.values().any(|c| c.1.len() < EACH) {
        assert!(Instant::now() < deadline);
        for port in 0..20 {
            let (to, _, sent, limit) = connections[&port].clone();
            let len = (limit - sent).min(9_000).min(EACH - sent);
            if len > 0 {
                guest.send(to, op::RW, 0, &pattern(EACH, port as u8)[sent..sent + len]);
                connections.get_mut(&port).unwrap().2 += len;
            }
        }
        while let Some((header, payload)) = guest.try_recv(Duration::from_millis(1)) {
            let connection = connections.get_mut(&header.dst_port).unwrap();
            connection.1.extend(payload);
            connection.3 = header.fwd_cnt as usize + header.buf_alloc as usize;
        }
    }
    for (port, (_, received, ..)) in &connections {
        assert!(*received == pattern(EACH, *port as u8), "connection {port}");
    }
    for echo in echoes {
        echo.join().unwrap();
    }
}

#[test]
fn connections_are_limited_and_come_back() {
    let mut guest = guest(0);
    let listener = guest.host.listen(1).unwrap();
    let mut streams: Vec<_> = (0..256).map(|port| guest.dial(&listener, port)).collect();
    guest.send(ports(1, 1000), op::REQUEST, 0, &[]);
    guest.expect(op::RST);
    assert!(guest.host.connect(1, PATIENCE).is_err());
    // one that the host has closed makes room, even if the guest is slow to say that it knows
    drop(streams.remove(3));
    assert_eq!(guest.expect(op::SHUTDOWN).flags & 1, 1);
    while guest.try_recv(MOMENT).is_some() {}
    guest.send(ports(1, 1000), op::REQUEST, 0, &[]);
    assert_eq!(guest.expect(op::RST).dst_port, 3);
    guest.expect(op::RESPONSE);
}

#[test]
fn a_pause_keeps_connections_and_a_reset_ends_them() {
    let mut guest = guest(0);
    let listener = guest.host.listen(1).unwrap();
    let (to, mut stream) = guest.dial(&listener, 2);
    let states: Vec<_> = (0..3).map(|index| guest.device.stop_queue(index)).collect();
    stream.write_all(b"while paused").unwrap();
    for (index, ring) in [&guest.rx, &guest.tx, &guest.event].into_iter().enumerate() {
        guest.device.start_queue(index, ring.resources(states[index])).unwrap();
    }
    assert_eq!(guest.recv_data(12), b"while paused");
    guest.device.reset();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    guest.send(to, op::RW, 0, b"?");
    guest.expect(op::RST);
}

#[test]
fn a_restored_guest_hears_of_the_reset() {
    let mut guest = guest(0);
    let saved = guest.device.save();
    guest.device.stop_queue(2);
    guest.device.restore(&saved).unwrap();
    let buffer = guest.heap.filled(&[0xff; 4]);
    let buffer = Piece { write: true, ..buffer };
    guest.device.start_queue(2, guest.event.resources(None)).unwrap();
    assert_eq!(guest.event.run(&[buffer]), 4);
    assert_eq!(guest.heap.bytes(buffer), [0; 4]);
    guest.event.add(&[buffer]);
    guest.event.publish();
    assert!(guest.event.wait_used(MOMENT).is_none(), "only once");
    assert!(guest.device.restore(&saved[..saved.len() - 1]).is_err());
}

#[test]
fn the_configuration_space_holds_the_cid() {
    let device = Vsock::new("vsock0", 1234).unwrap();
    let mut config = [0; 10];
    device.read_config(0, &mut config);
    assert_eq!(config, [0xd2, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
    for cid in [0, 1, 2, u32::MAX] {
        assert!(Vsock::new("vsock0", cid).is_err());
    }
}

/// A round trip through both queues and two threads; shown, with a generous bound.
#[test]
fn no_delay_on_the_way() {
    let mut guest = guest(F_EVENT_IDX);
    let listener = guest.host.listen(1).unwrap();
    let (to, mut stream) = guest.dial(&listener, 2);
    let echo = thread::spawn(move || {
        let mut byte = [0];
        while stream.read(&mut byte).unwrap() > 0 {
            stream.write_all(&byte).unwrap();
        }
    });
    let round = || {
        let started = Instant::now();
        guest.send(to, op::RW, 0, b"x");
        guest.recv_data(1);
        started.elapsed()
    };
    // The fastest, since the host may be busy; a timer on the way would slow them all.
    let fastest = std::iter::repeat_with(round).take(200).min().unwrap();
    println!("fastest round trip: {fastest:?}");
    assert!(fastest < Duration::from_millis(5), "{fastest:?}");
    guest.send(to, op::SHUTDOWN, 3, &[]);
    echo.join().unwrap();
}

/// A guest that does not fetch answers is not served any more, until it does.
#[test]
fn a_guest_that_fetches_late_gets_all_answers() {
    for (features, buffers) in [(0, 32), (F_EVENT_IDX, 32), (F_EVENT_IDX, 1024)] {
        let mut guest = guest_with_buffers(features, buffers);
        let header = Header { op: op::RW, ..ports(1, 2) };
        guest.heap.memory.write(guest.outgoing.gpa, &header.to_bytes()).unwrap();
        let piece = Piece { len: HEADER_BYTES as u32, ..guest.outgoing };
        // as many as there are buffers for answers, and those that the device keeps
        let taken = 512 + usize::from(buffers);
        for _ in 0..taken {
            while guest.tx.free() > 0 {
                guest.tx.add(&[piece]);
            }
            guest.tx.publish();
            guest.tx.wait_used(PATIENCE).expect("the device still takes packets");
        }
        assert!(guest.tx.wait_used(MOMENT).is_none(), "the device takes too many");
        let sent = taken + 32 - guest.tx.free();
        // all buffers come back at once, with one notification
        let mut answers = 0;
        while answers < sent {
            let (head, len) = guest.rx.wait_used(PATIENCE).expect("an answer");
            assert_eq!(len as usize, HEADER_BYTES);
            answers += 1;
            guest.spare.push(guest.buffers.remove(&head).unwrap());
            if guest.spare.len() == usize::from(buffers) {
                guest.refill();
            }
        }
        assert!(guest.rx.try_used().is_none());
        while guest.tx.try_used().is_some() {}
        assert_eq!(guest.tx.free(), 32);
    }
}

/// Connections that come and go while the guest takes nothing leave nothing behind but their bounded answers.
#[test]
fn what_waits_for_the_guest_is_bounded() {
    let heap = Heap::new(1 << 20);
    let mut ring = Ring::new(&heap, 8, 0);
    let mut queue = Queue::new(&ring.resources(None)).unwrap();
    let commands = Vsock::new("vsock1", 9).unwrap();
    let listener = commands.host().listen(1).unwrap();
    let listeners: Listeners = commands.host().listeners;
    let mut muxer = Muxer::new(CID, Arc::new(Epoll::new().unwrap()), listeners);
    for _ in 0..1000 {
        for op in [op::REQUEST, op::RST] {
            ring.add(&[heap.filled(&Header { op, ..ports(1, 2) }.to_bytes())]);
            ring.publish();
            let chain = queue.pop().unwrap().unwrap();
            assert!(muxer.accepts());
            muxer.receive(&chain);
            queue.push(chain, 0).unwrap();
            ring.try_used().unwrap();
        }
        listener.accept(Duration::ZERO).unwrap();
    }
    assert_eq!(muxer.waiting(), 0);
}

fn hostile_header() -> impl Strategy<Value = (Header, usize)> {
    let port = || prop_oneof![4 => 1u32..4, 1 => any::<u32>()];
    let cid = prop_oneof![8 => Just(2u64), 1 => any::<u64>()];
    let op = prop_oneof![9 => 0u16..9, 1 => any::<u16>()];
    let len = prop_oneof![0u32..100, 0u32..70_000, any::<u32>()];
    let numbers = (any::<u32>(), prop_oneof![0u32..4, any::<u32>()], any::<u32>());
    (port(), port(), cid, op, len, numbers, 0usize..60_000, any::<bool>()).prop_map(
        |(host, guest, dst_cid, op, len, (buf_alloc, flags, fwd_cnt), payload, honest)| {
            let len = if honest { payload as u32 } else { len };
            (Header { dst_cid, op, len, flags, buf_alloc, fwd_cnt, ..ports(host, guest) }, payload)
        },
    )
}

proptest! {
    #![proptest_config(crate::tests::cases(48))]

    /// Any sequence of packets, with host code that reads, writes and hangs up: the device goes on working.
    #[test]
    fn any_packets_do_no_harm(packets in prop::collection::vec((hostile_header(), 0u8..8), 1..60)) {
        let mut guest = guest(F_EVENT_IDX);
        let listener = guest.host.listen(1).unwrap();
        let mut streams = Vec::new();
        for ((header, payload), act) in packets {
            guest.send_raw(&[&header.to_bytes()[..], &vec![1; payload]].concat());
            if let Ok(stream) = listener.accept(Duration::ZERO) {
                stream.set_nonblocking(true).unwrap();
                streams.push(stream);
            }
            match (act, streams.last_mut()) {
                (0, Some(stream)) => drop(stream.write(&[7; 5000])),
                (1, Some(stream)) => drop(stream.read(&mut [0; 30_000])),
                (2, _) => drop(streams.pop()),
                (3, Some(stream)) => drop(stream.shutdown(Shutdown::Write)),
                _ => (),
            }
            while let Some((header, _)) = guest.try_recv(Duration::ZERO) {
                prop_assert!(header.op <= 7);
            }
        }
        drop(streams);
        prop_assert_eq!(guest.tx.broken.count(), 0);
        guest.device.reset();
        while guest.try_recv(Duration::from_millis(2)).is_some() {}
        while listener.accept(Duration::ZERO).is_ok() {}
        let (to, mut stream) = guest.dial(&listener, 77);
        guest.send(to, op::RW, 0, b"alive");
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        prop_assert_eq!(&text, b"alive");
    }

    #[test]
    fn garbage_descriptors_do_no_harm(
        raw in prop::collection::vec(any::<[u8; 16]>(), 32),
        heads in prop::collection::vec(any::<u16>(), 1..60),
    ) {
        let mut guest = guest(0);
        let _listener = guest.host.listen(1).unwrap();
        for ring in [&mut guest.rx, &mut guest.tx, &mut guest.event] {
            for (index, raw) in raw.iter().enumerate() {
                let mut raw = *raw;
                raw[3..8].fill(0);
                raw[10..12].fill(0);
                raw[13..16].fill(0);
                if index < usize::from(ring.size) {
                    ring.scribble(index as u16, raw);
                }
            }
            for head in &heads {
                ring.offer(head % 34);
            }
            ring.publish();
            ring.kick();
        }
        thread::sleep(Duration::from_millis(1));
        for index in 0..3 {
            prop_assert!(guest.device.stop_queue(index).is_some(), "the thread panicked");
        }
    }

    /// A guest that connects and resets for ever and never looks at the answers.
    #[test]
    fn answers_that_nobody_fetches_are_bounded(ops in prop::collection::vec(0u16..9, 8)) {
        let mut guest = guest(0);
        let _listener = guest.host.listen(1).unwrap();
        guest.device.stop_queue(0);
        let mut accepted = 0;
        'all: for round in 0..2000u32 {
            for op in &ops {
                let header = Header { op: *op, ..ports(1 + round % 2, round % 50) };
                guest.heap.memory.write(guest.outgoing.gpa, &header.to_bytes()).unwrap();
                guest.tx.add(&[Piece { len: HEADER_BYTES as u32, ..guest.outgoing }]);
                guest.tx.publish();
                if guest.tx.wait_used(MOMENT).is_none() {
                    break 'all;
                }
                accepted += 1;
            }
        }
        // each packet made at most one answer, and 512 of them are kept
        let silent = ops.iter().filter(|op| **op == op::RST || **op == op::REQUEST).count();
        if silent == 0 {
            prop_assert!(accepted <= 1100, "{}", accepted);
        }
        prop_assert!(guest.device.stop_queue(1).is_some());
    }
}
