//! Damaged and hostile images: any bytes in header and tables give errors at worst. Never a panic, a hang, or more
//! memory than a healthy image takes.

mod model;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use model::{as_format, cases, have_qemu, qemu_img, str};
use proptest::prelude::*;
use vireo_block::{Disk, Format, check, create_qcow2, open};

/// Counts what is allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator and only counts.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time, so that memory can be counted.
static ONE: Mutex<()> = Mutex::new(());

const MOST_BYTES: usize = 96 << 20;
const MOST_TIME: Duration = Duration::from_secs(20);

/// Does with an image what a guest could, within bounds.
fn use_disk(disk: &Arc<dyn Disk>, at: u64) {
    let size = disk.size_bytes();
    for start in [0, at % size, size.saturating_sub(300 << 10), size / 2] {
        let start = start / 512 * 512;
        let len = (256 << 10).min(size - start) / 512 * 512;
        let _ = model::read(&**disk, start, len as usize);
        let _ = model::write(&**disk, start, &[0x5a; 1024][..1024.min(len as usize)]);
        let _ = disk.discard(start, len);
        let _ = disk.write_zeroes(start, len, at & 1 == 0);
        let _ = model::write(&**disk, start, &vec![0xa5; len as usize]);
    }
    let _ = disk.flush();
    let _ = model::read(&**disk, 0, 4096.min(size as usize));
}

fn survive(path: &Path, at: u64) {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let start = Instant::now();
    let _ = check(path);
    for read_only in [true, false] {
        if let Ok(disk) = open(path, as_format(Format::Qcow2, read_only)) {
            use_disk(&disk, at);
        }
    }
    let _ = check(path);
    let (took, peak) = (start.elapsed(), PEAK.load(Ordering::Relaxed) - before);
    assert!(took < MOST_TIME, "took {took:?}");
    assert!(peak < MOST_BYTES, "allocated {peak} bytes");
}

/// Healthy images of several kinds, and offsets in them where it hurts.
fn healthy(dir: &Path) -> Vec<PathBuf> {
    let plain = dir.join("plain");
    create_qcow2(&plain, 2 << 20, None).unwrap();
    let disk = open(&plain, as_format(Format::Qcow2, false)).unwrap();
    for n in 0..8 {
        model::write(&*disk, (n * 200) << 10, &model::pattern(n, 70 << 10)).unwrap();
    }
    disk.write_zeroes(64 << 10, 128 << 10, false).unwrap();
    drop(disk);
    let mut all = vec![plain.clone()];
    if have_qemu("part of the hostile images") {
        let (packed, small, old) = (dir.join("packed"), dir.join("small"), dir.join("old"));
        qemu_img(&["convert", "-c", "-O", "qcow2", str(&plain), str(&packed)]);
        qemu_img(&["convert", "-O", "qcow2", "-o", "cluster_size=512", str(&plain), str(&small)]);
        qemu_img(&["snapshot", "-c", "one", str(&small)]);
        qemu_img(&["convert", "-O", "qcow2", "-o", "compat=0.10,cluster_size=4k", str(&plain), str(&old)]);
        qemu_img(&["snapshot", "-c", "one", str(&old)]);
        let zstd = dir.join("zstd");
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", str(&plain), str(&zstd)]);
        all.extend([packed, small, old, zstd]);
    }
    all
}

/// Places worth damaging: header, tables that it points to, tables that those point to.
fn places(image: &[u8]) -> Vec<usize> {
    let word = |at: usize| image.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()) as usize);
    let mut all: Vec<usize> = (0..112).collect();
    for table in [word(40), word(48), word(64)] {
        all.extend(table..table + 128);
        for entry in 0..16 {
            let inner = word(table + entry * 8) & 0x00ff_ffff_ffff_fe00;
            all.extend(inner..inner + 128);
        }
    }
    all.retain(|at| *at + 8 <= image.len());
    all
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Byte(u8),
    Word(u64),
    /// Another word of the image: aliases and loops.
    Copy(usize),
}

fn damage() -> impl Strategy<Value = (usize, Damage)> {
    let what = prop_oneof![
        any::<u8>().prop_map(Damage::Byte),
        any::<u64>().prop_map(Damage::Word),
        (0..64u32).prop_map(|n| Damage::Word(1 << n)),
        (0..40u64).prop_map(|n| Damage::Word(1 << 63 | n << 16)),
        (0..u64::MAX).prop_map(|n| Damage::Word(1 << 62 | n)),
        Just(Damage::Word(u64::MAX)),
        Just(Damage::Word(0)),
        any::<usize>().prop_map(Damage::Copy),
    ];
    (any::<usize>(), what)
}

proptest! {
    #![proptest_config(cases(150))]

    #[test]
    fn damaged_images_do_no_harm(damages in prop::collection::vec(damage(), 1..6), at in any::<u64>(), cut in any::<usize>()) {
        let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
        static HEALTHY: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
        let mut images = HEALTHY.lock().unwrap_or_else(|e| e.into_inner());
        if images.is_empty() {
            let dir = tempfile::tempdir().unwrap();
            *images = healthy(dir.path()).iter().map(|path| fs::read(path).unwrap()).collect();
        }
        let dir = tempfile::tempdir().unwrap();
        for image in images.iter() {
            let mut image = image.clone();
            let places = places(&image);
            for (place, damage) in &damages {
                let place = places[place % places.len()];
                match *damage {
                    Damage::Byte(byte) => image[place] = byte,
                    Damage::Word(word) => image[place & !7..][..8].copy_from_slice(&word.to_be_bytes()),
                    Damage::Copy(from) => {
                        let from = places[from % places.len()] & !7;
                        image.copy_within(from..from + 8, place & !7);
                    }
                }
            }
            if cut % 8 == 0 {
                image.truncate(cut / 8 % image.len());
            }
            let path = dir.path().join("damaged");
            fs::write(&path, image).unwrap();
            survive(&path, at);
        }
    }
}

/// A header that is all that a header may be at most: tables of the largest sizes, all in a sparse file.
#[test]
fn the_largest_tables_are_bounded() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    create_qcow2(&path, 1 << 20, None).unwrap();
    let mut image = fs::read(&path).unwrap();
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(24, &(1u64 << 50).to_be_bytes());
    put(36, &(4u32 << 20).to_be_bytes());
    put(40, &(1u64 << 30).to_be_bytes());
    put(48, &(1u64 << 31).to_be_bytes());
    put(56, &128u32.to_be_bytes());
    fs::write(&path, image).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let disk = open(&path, as_format(Format::Qcow2, true)).unwrap();
    use_disk(&disk, 12345);
    drop(disk);
    let peak = PEAK.load(Ordering::Relaxed) - before;
    assert!(peak < 200 << 20, "allocated {peak} bytes");
}
