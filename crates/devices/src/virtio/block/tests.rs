use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;
use vireo_block::{Disk, DiskError};
use vireo_memory::GuestSlice;

use super::*;
use crate::virtio::{
    VirtioDevice,
    fake_driver::{F_EVENT_IDX, F_INDIRECT_DESC, Heap, PATIENCE, Piece, Ring},
};

const DISK_BYTES: usize = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;

/// A disk in memory that counts what it is asked for.
struct TestDisk {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
    /// Reads and writes that touch this byte fail.
    bad_byte: Option<u64>,
    transfers: AtomicU64,
    flushes: AtomicU64,
    discards: Mutex<Vec<(u64, u64)>>,
    zeroes: Mutex<Vec<(u64, u64, bool)>>,
    delay: Duration,
}

impl TestDisk {
    fn new() -> Self {
        Self {
            bytes: Mutex::new((0..DISK_BYTES).map(|i| (i / 512) as u8 ^ i as u8).collect()),
            read_only: false,
            bad_byte: None,
            transfers: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            discards: Mutex::default(),
            zeroes: Mutex::default(),
            delay: Duration::ZERO,
        }
    }

    fn transfer(
        &self,
        offset: u64,
        buffers: &[GuestSlice<'_>],
        each: impl Fn(&mut [u8], &GuestSlice<'_>),
    ) -> Result<(), DiskError> {
        self.transfers.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(self.delay);
        let len: usize = buffers.iter().map(GuestSlice::len).sum();
        let range = offset..offset + len as u64;
        assert!(range.end <= DISK_BYTES as u64, "the device checks bounds");
        if self.bad_byte.is_some_and(|bad| range.contains(&bad)) {
            return Err(DiskError::Corrupt("here".into()));
        }
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buffer in buffers {
            each(&mut bytes[at..at + buffer.len()], buffer);
            at += buffer.len();
        }
        Ok(())
    }
}

impl Disk for TestDisk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        self.transfer(offset, buffers, |bytes, buffer| {
            buffer.copy_from(bytes);
        })
    }
    fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        assert!(!self.read_only, "the device refuses writes");
        self.transfer(offset, buffers, |bytes, buffer| {
            buffer.copy_to(bytes);
        })
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.discards.lock().unwrap().push((offset, len));
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.zeroes.lock().unwrap().push((offset, len, unmap));
        Ok(())
    }
}

struct Bench {
    heap: Arc<Heap>,
    disk: Arc<TestDisk>,
    device: Block,
    ring: Ring,
}

impl Bench {
    fn new(disk: TestDisk, features: u64) -> Self {
        let heap = Heap::new(16 << 20);
        let disk = Arc::new(disk);
        let config = BlockConfig { name: "blk9".into(), serial: "serial-of-a-disk-longer-than-20".into(), queues: 2 };
        let mut device = Block::new(disk.clone(), config);
        let ring = Ring::new(&heap, 64, features);
        device.start_queue(0, ring.resources(None)).unwrap();
        Self { heap, disk, device, ring }
    }

    fn header(&self, kind: u32, sector: u64) -> Piece {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&sector.to_le_bytes());
        self.heap.filled(&raw)
    }

    /// Runs a request with readable `data` and `room` writable bytes; returns the status and the writable bytes.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (u8, Vec<u8>) {
        let mut pieces = vec![self.header(kind, sector)];
        if !data.is_empty() {
            pieces.push(self.heap.filled(data));
        }
        let buffer = (room > 0).then(|| self.heap.empty(room));
        pieces.extend(buffer);
        let status = self.heap.filled(&[0xee]);
        pieces.push(Piece { write: true, ..status });
        self.ring.run(&pieces);
        (self.heap.bytes(status)[0], buffer.map(|b| self.heap.bytes(b)).unwrap_or_default())
    }
}

fn bench() -> Bench {
    Bench::new(TestDisk::new(), FLUSH | F_EVENT_IDX | F_INDIRECT_DESC)
}

fn extent(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn reads_and_writes() {
    for features in [0, FLUSH, FLUSH | F_EVENT_IDX] {
        let mut bench = Bench::new(TestDisk::new(), features);
        let original = bench.disk.bytes.lock().unwrap().clone();
        for sector in [0u64, 8, 2040] {
            let at = sector as usize * 512;
            assert!(bench.request(0, sector, &[], 4096) == (OK, original[at..at + 4096].to_vec()));
            let data: Vec<u8> = (0..4096).map(|i| (i * 7) as u8).collect();
            assert_eq!(bench.request(1, sector, &data, 0).0, OK);
            assert!(bench.request(0, sector, &[], 4096) == (OK, data));
        }
    }
}

#[test]
fn any_cut_of_a_request_will_do() {
    let mut bench = bench();
    let expected = bench.disk.bytes.lock().unwrap()[1024..2048].to_vec();
    let header = bench.header(0, 2);
    let part = |gpa, len, write| Piece { gpa, len, write };
    let buffer = bench.heap.empty(1025);
    let pieces = [
        part(header.gpa, 3, false),
        part(header.gpa + 3, 13, false),
        part(buffer.gpa, 1, true),
        part(buffer.gpa + 1, 700, true),
        part(buffer.gpa + 701, 324, true),
    ];
    assert_eq!(bench.ring.run(&pieces), 1025);
    let bytes = bench.heap.bytes(buffer);
    assert_eq!((&bytes[..1024], bytes[1024]), (&expected[..], OK));
    bench.ring.add_indirect(&pieces);
    bench.ring.publish();
    assert_eq!(bench.ring.wait_used(PATIENCE).unwrap().1, 1025);
}

#[test]
fn malformed_requests_get_a_status() {
    let mut bench = bench();
    let end = DISK_BYTES as u64 / 512;
    let last = bench.disk.bytes.lock().unwrap()[DISK_BYTES - 512..].to_vec();
    assert_eq!(bench.request(0, end - 1, &[], 512), (OK, last));
    for (kind, sector, data, room, status) in [
        (0, end, 0, 512, IOERR),
        (0, end - 1, 0, 1024, IOERR),
        (0, 0, 0, 511, IOERR),
        (0, u64::MAX, 0, 512, IOERR),
        (0, u64::MAX / 512 + 1, 0, 512, IOERR),
        (1, end, 512, 0, IOERR),
        (1, 0, 100, 0, IOERR),
        (2, 0, 0, 0, UNSUPP),
        (14, 0, 16, 0, UNSUPP),
        (0xffff_ffff, 0, 0, 0, UNSUPP),
        (11, 0, 0, 0, IOERR),
        (11, 0, 15, 0, IOERR),
        (13, 0, 17 * 16, 0, IOERR),
    ] {
        assert_eq!(bench.request(kind, sector, &vec![0; data], room).0, status, "{kind} {sector} {data} {room}");
    }
    // a header that is too short, and no byte for the status
    let header = bench.header(0, 0);
    let status = bench.heap.empty(1);
    assert_eq!(bench.ring.run(&[Piece { len: 15, ..header }, status]), 1);
    assert_eq!(bench.heap.bytes(status), [IOERR]);
    assert_eq!(bench.ring.run(&[header]), 0);
    assert_eq!(bench.ring.run(&[status]), 1);
    assert_eq!(bench.ring.broken.count(), 0);
}

#[test]
fn flush_and_the_cache_mode() {
    let mut bench = bench();
    let flushes = |bench: &Bench| bench.disk.flushes.load(Ordering::Relaxed);
    assert_eq!(bench.request(1, 0, &[1; 512], 0).0, OK);
    assert_eq!(flushes(&bench), 0);
    assert_eq!(bench.request(4, 0, &[], 0).0, OK);
    assert_eq!(flushes(&bench), 1);

    // no FLUSH: write-through
    let mut bench = Bench::new(TestDisk::new(), 0);
    assert_eq!(bench.request(1, 0, &[1; 512], 0).0, OK);
    assert_eq!(flushes(&bench), 1);

    let mut bench = Bench::new(TestDisk::new(), FLUSH | CONFIG_WCE);
    assert_eq!(bench.request(1, 0, &[1; 512], 0).0, OK);
    assert_eq!(flushes(&bench), 0);
    bench.device.write_config(32, &[0]);
    assert_eq!(bench.request(1, 0, &[1; 512], 0).0, OK);
    assert_eq!(flushes(&bench), 1);
    let mut mode = [9; 2];
    bench.device.read_config(32, &mut mode);
    assert_eq!(mode, [0, 0]);
}

#[test]
fn discard_and_write_zeroes() {
    let mut bench = bench();
    let two = [extent(8, 16, 0), extent(100, 1, 0)].concat();
    assert_eq!(bench.request(11, 0, &two, 0).0, OK);
    assert_eq!(*bench.disk.discards.lock().unwrap(), [(4096, 8192), (51200, 512)]);
    let two = [extent(8, 16, 1), extent(100, 1, 0)].concat();
    assert_eq!(bench.request(13, 0, &two, 0).0, OK);
    assert_eq!(*bench.disk.zeroes.lock().unwrap(), [(4096, 8192, true), (51200, 512, false)]);
    // flags, size and place that are not allowed; nothing of the request is done then
    for (kind, bad, status) in [
        (11, extent(0, 1, 1), UNSUPP),
        (13, extent(0, 1, 2), UNSUPP),
        (13, extent(0, u32::MAX, 0), IOERR),
        (11, extent(2047, 2, 0), IOERR),
        (11, extent(u64::MAX, 1, 0), IOERR),
    ] {
        assert_eq!(bench.request(kind, 0, &[extent(0, 8, 0), bad].concat(), 0).0, status);
    }
    assert_eq!(bench.disk.discards.lock().unwrap().len() + bench.disk.zeroes.lock().unwrap().len(), 4);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let disk = TestDisk { read_only: true, ..TestDisk::new() };
    let mut bench = Bench::new(disk, FLUSH);
    assert_eq!(bench.device.features() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(bench.request(1, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(bench.request(11, 0, &extent(0, 1, 0), 0).0, IOERR);
    assert_eq!(bench.request(13, 0, &extent(0, 1, 0), 0).0, IOERR);
    assert_eq!(bench.request(0, 0, &[], 512).0, OK);
}

#[test]
fn the_serial_number() {
    let mut bench = bench();
    assert_eq!(bench.request(8, 0, &[], 20), (OK, b"serial-of-a-disk-lon".to_vec()));
    assert_eq!(bench.request(8, 0, &[], 4), (OK, b"seri".to_vec()));
}

#[test]
fn the_configuration_space() {
    let bench = bench();
    let mut space = [0xaa; 64];
    bench.device.read_config(0, &mut space);
    assert_eq!(space[..8], (DISK_BYTES as u64 / 512).to_le_bytes());
    assert_eq!(space[8..12], (128u32 << 10).to_le_bytes());
    assert_eq!(space[12..16], 510u32.to_le_bytes());
    assert_eq!(space[20..24], 512u32.to_le_bytes());
    assert_eq!((space[32], space[34]), (1, 2));
    assert_eq!(space[60..], [0; 4]);
    let mut far = [1; 8];
    bench.device.read_config(u64::MAX, &mut far);
    assert_eq!(far, [0; 8]);
}

/// Many neighbouring requests at once: fewer calls and interrupts than requests, and all data in place.
#[test]
fn a_full_ring_is_served_in_few_calls() {
    let mut bench = bench();
    let expected = bench.disk.bytes.lock().unwrap()[..16 * 512].to_vec();
    bench.device.stop_queue(0).unwrap();
    let buffers: Vec<(u16, Piece)> = (0..16)
        .map(|sector| {
            let buffer = bench.heap.empty(513);
            (bench.ring.add_indirect(&[bench.header(0, sector), buffer]), buffer)
        })
        .collect();
    bench.ring.publish();
    bench.device.start_queue(0, bench.ring.resources(None)).unwrap();
    for (head, buffer) in buffers.iter().enumerate() {
        assert_eq!(bench.ring.wait_used(PATIENCE).unwrap(), (buffer.0, 513));
        let bytes = bench.heap.bytes(buffer.1);
        assert_eq!((&bytes[..512], bytes[512]), (&expected[head * 512..][..512], OK));
    }
    assert_eq!(bench.disk.transfers.load(Ordering::Relaxed), 1);
    bench.device.stop_queue(0).unwrap();
    assert!(bench.ring.interrupts.count() <= 2, "{}", bench.ring.interrupts.count());
}

/// Requests that only look like neighbours: each gets its own sector.
#[test]
fn a_mixed_ring_is_not_mixed_up() {
    let mut bench = bench();
    let disk = bench.disk.bytes.lock().unwrap().clone();
    bench.device.stop_queue(0).unwrap();
    let sectors = [0u64, 1, 3, 2, 2, 3, 9, 10, 11, 0];
    let buffers: Vec<Piece> = sectors
        .iter()
        .enumerate()
        .map(|(index, sector)| {
            // a write and a flush in between
            if index == 4 {
                let data = bench.heap.filled(&[0x5a; 512]);
                bench.ring.add_indirect(&[bench.header(1, 100), data, bench.heap.empty(1)]);
                bench.ring.add_indirect(&[bench.header(4, 0), bench.heap.empty(1)]);
            }
            let buffer = bench.heap.empty(513);
            bench.ring.add_indirect(&[bench.header(0, *sector), buffer]);
            buffer
        })
        .collect();
    bench.ring.publish();
    bench.device.start_queue(0, bench.ring.resources(None)).unwrap();
    for _ in 0..sectors.len() + 2 {
        bench.ring.wait_used(PATIENCE).unwrap();
    }
    for (sector, buffer) in sectors.iter().zip(buffers) {
        let bytes = bench.heap.bytes(buffer);
        assert!(bytes[..512] == disk[*sector as usize * 512..][..512], "sector {sector}");
        assert_eq!(bytes[512], OK);
    }
    assert!(bench.disk.bytes.lock().unwrap()[100 * 512..101 * 512] == [0x5a; 512]);
    assert_eq!(bench.disk.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn one_bad_sector_fails_one_request() {
    let mut bench = Bench::new(TestDisk { bad_byte: Some(5 * 512), ..TestDisk::new() }, F_INDIRECT_DESC);
    bench.device.stop_queue(0).unwrap();
    let buffers: Vec<Piece> = (0..10)
        .map(|sector| {
            let buffer = bench.heap.empty(513);
            bench.ring.add_indirect(&[bench.header(0, sector), buffer]);
            buffer
        })
        .collect();
    bench.ring.publish();
    bench.device.start_queue(0, bench.ring.resources(None)).unwrap();
    for (sector, buffer) in buffers.iter().enumerate() {
        bench.ring.wait_used(PATIENCE).unwrap();
        assert_eq!(bench.heap.bytes(*buffer)[512], if sector == 5 { IOERR } else { OK });
    }
}

/// Stops and resumes under load; every request is answered once, in whatever order.
#[test]
fn stopping_loses_nothing() {
    let mut bench = Bench::new(TestDisk { delay: Duration::from_micros(200), ..TestDisk::new() }, F_EVENT_IDX);
    let mut outstanding = 0;
    for round in 0..40u64 {
        while bench.ring.free() >= 2 {
            // far apart, so that they are not merged
            let buffer = bench.heap.empty(513);
            bench.ring.add(&[bench.header(0, outstanding * 37 % 2000 + round % 7), buffer]);
            outstanding += 1;
        }
        bench.ring.publish();
        let started = Instant::now();
        let stopped = bench.device.stop_queue(0).unwrap();
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(bench.device.stop_queue(0).is_none());
        bench.device.start_queue(0, bench.ring.resources(Some(stopped))).unwrap();
        while bench.ring.wait_used(Duration::from_millis(2)).is_some() {
            outstanding -= 1;
        }
    }
    while outstanding > 0 {
        bench.ring.wait_used(PATIENCE).expect("a request was lost");
        outstanding -= 1;
    }
}

#[test]
fn queues_work_side_by_side() {
    let mut bench = bench();
    let mut second = Ring::new(&bench.heap, 16, F_EVENT_IDX);
    bench.device.start_queue(1, second.resources(None)).unwrap();
    assert!(bench.device.start_queue(2, second.resources(None)).is_err());
    for sector in 0..50 {
        let buffer = bench.heap.empty(513);
        assert_eq!(second.run(&[bench.header(0, sector), buffer]), 513);
        assert_eq!(bench.request(0, sector, &[], 512), (OK, bench.heap.bytes(buffer)[..512].to_vec()));
    }
}

#[test]
fn state_is_saved_and_must_fit() {
    let mut bench = bench();
    bench.device.write_config(32, &[0]);
    let saved = bench.device.save();
    bench.device.reset();
    bench.device.restore(&saved).unwrap();
    let mut mode = [9];
    bench.device.read_config(32, &mut mode);
    assert_eq!(mode, [0]);
    let mut other = Bench::new(TestDisk { read_only: true, ..TestDisk::new() }, 0).device;
    assert!(other.restore(&saved).is_err());
    assert!(bench.device.restore(&[&saved[..], &[0]].concat()).is_err());
    for cut in 0..saved.len() {
        assert!(bench.device.restore(&saved[..cut]).is_err());
    }
}

fn hostile_piece() -> impl Strategy<Value = (u64, u32, bool)> {
    let gpa = prop_oneof![0..(4u64 << 20), any::<u64>()];
    let len = prop_oneof![0..64u32, Just(512), Just(1024), any::<u32>()];
    (gpa, len, any::<bool>())
}

proptest! {
    #![proptest_config(crate::tests::cases(64))]

    /// Well-formed chains with any header: always answered, never out of bounds (the disk asserts that).
    #[test]
    fn any_header_is_answered(
        requests in prop::collection::vec((prop_oneof![0u32..16, any::<u32>()],
            prop_oneof![0u64..2100, any::<u64>()], prop::collection::vec(any::<u8>(), 0..100), 0usize..3000), 1..12)
    ) {
        let mut bench = bench();
        for (kind, sector, data, room) in requests {
            let (status, _) = bench.request(kind, sector, &data, room);
            prop_assert!(status <= UNSUPP);
        }
        prop_assert_eq!(bench.ring.broken.count(), 0);
    }

    /// Any bytes in the descriptor table: the device stops at once when told, whatever it met.
    #[test]
    fn garbage_descriptors_do_no_harm(
        pieces in prop::collection::vec((hostile_piece(), any::<u16>(), any::<u16>()), 1..32),
        heads in prop::collection::vec(any::<u16>(), 1..80),
    ) {
        let mut bench = bench();
        for (index, ((gpa, len, _), flags, next)) in pieces.iter().enumerate() {
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&gpa.to_le_bytes());
            raw[8..12].copy_from_slice(&len.to_le_bytes());
            raw[12..14].copy_from_slice(&(flags & 7).to_le_bytes());
            raw[14..].copy_from_slice(&(next % 40).to_le_bytes());
            bench.ring.scribble(index as u16, raw);
        }
        for head in heads {
            bench.ring.offer(head % 70);
        }
        bench.ring.publish();
        bench.ring.kick();
        std::thread::sleep(Duration::from_millis(1));
        let started = Instant::now();
        prop_assert!(bench.device.stop_queue(0).is_some(), "the thread panicked");
        prop_assert!(started.elapsed() < Duration::from_secs(5));
    }
}
