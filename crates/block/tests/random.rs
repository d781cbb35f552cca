//! Random requests against a vector, on every kind of disk.

mod model;

use std::{path::Path, sync::Arc};

use model::{Action, RO, RW, apply, as_format, assert_disk, cases, have_qemu, open_rw, pattern, qemu_img, str};
use proptest::prelude::*;
use vireo_block::{Disk, Format, Overlay, check, create_qcow2, open};

const MIB: usize = 1 << 20;

fn action(sectors: u64) -> impl Strategy<Value = Action> {
    let len = prop_oneof![4 => 1u64..16, 4 => 1u64..300, 1 => 1u64..3000];
    // often at the same few places, and at their borders
    let at = prop_oneof![0..sectors, (0u64..12).prop_map(|n| n * 128), (0u64..12).prop_map(|n| (n * 128).max(3) - 3)];
    (at, len, any::<u64>(), 0..20u8).prop_map(|(at, len, seed, kind)| match kind {
        0..7 => Action::Write { at, len, seed },
        7..12 => Action::Read { at, len },
        12..14 => Action::Discard { at, len },
        14..17 => Action::Zero { at, len, unmap: seed & 1 != 0 },
        17..19 => Action::Flush,
        _ => Action::Reopen,
    })
}

fn actions(bytes: usize) -> impl Strategy<Value = Vec<Action>> {
    prop::collection::vec(action(bytes as u64 / 512), 1..60)
}

fn run(path: &Path, format: Format, mut model: Vec<u8>, actions: &[Action]) -> Vec<u8> {
    let mut disk = open(path, as_format(format, false)).unwrap();
    for action in actions {
        if matches!(action, Action::Reopen) {
            drop(disk);
            disk = open(path, as_format(format, false)).unwrap();
        }
        apply(&*disk, &mut model, *action);
    }
    assert_disk(&*disk, &model, "at the end");
    drop(disk);
    assert_disk(&*open(path, as_format(format, true)).unwrap(), &model, "opened again");
    model
}

fn sound(path: &Path) {
    let report = check(path).unwrap();
    assert_eq!((report.corruptions, report.leaked), (0, 0), "{report:?}");
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn raw(actions in actions(3 * MIB)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let model = pattern(1, 3 * MIB);
        std::fs::write(&path, &model).unwrap();
        run(&path, Format::Raw, model, &actions);
    }

    #[test]
    fn qcow2(actions in actions(3 * MIB + 512)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        create_qcow2(&path, 3 * MIB as u64 + 512, None).unwrap();
        run(&path, Format::Qcow2, vec![0; 3 * MIB + 512], &actions);
        sound(&path);
    }

    #[test]
    fn qcow2_over_a_shorter_raw_file(actions in actions(3 * MIB)) {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base.raw"), dir.path().join("disk.qcow2"));
        let mut model = pattern(2, 2 * MIB + 512);
        std::fs::write(&base, &model).unwrap();
        model.resize(3 * MIB, 0);
        create_qcow2(&path, 3 * MIB as u64, Some((Path::new("base.raw"), Format::Raw))).unwrap();
        run(&path, Format::Qcow2, model, &actions);
        sound(&path);
        assert!(std::fs::read(&base).unwrap() == pattern(2, 2 * MIB + 512), "the base is untouched");
    }

    #[test]
    fn overlay(actions in actions(2 * MIB + 512)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let mut model = pattern(3, 2 * MIB + 512);
        std::fs::write(&path, &model).unwrap();
        let disk = Overlay::new(open(&path, as_format(Format::Raw, true)).unwrap(), dir.path()).unwrap();
        for action in actions {
            apply(&disk, &mut model, action);
        }
        assert_disk(&disk, &model, "overlay");
        assert!(std::fs::read(&path).unwrap() == pattern(3, 2 * MIB + 512), "the base is untouched");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the overlay has no name");
    }
}

proptest! {
    #![proptest_config(cases(6))]

    /// Images of QEMU's making, in all variants; afterwards QEMU must find them sound and of the same contents.
    #[test]
    fn qcow2_of_qemu(actions in actions(3 * MIB)) {
        if !have_qemu("qcow2_of_qemu") {
            return Ok(());
        }
        for options in [
            "cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M", "compat=0.10",
            "preallocation=metadata", "preallocation=full", "refcount_bits=1", "refcount_bits=64,cluster_size=1k",
            "lazy_refcounts=on",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (path, raw) = (dir.path().join("disk.qcow2"), dir.path().join("model.raw"));
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, str(&path), "3M"]);
            let model = run(&path, Format::Qcow2, vec![0; 3 * MIB], &actions);
            sound(&path);
            std::fs::write(&raw, &model).unwrap();
            qemu_img(&["check", "-q", "-f", "qcow2", str(&path)]);
            qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", str(&path), str(&raw)]);
        }
    }

    /// Over a compressed image over a raw one, with snapshots in between, old version and new.
    #[test]
    fn qcow2_chain_of_qemu(actions in actions(3 * MIB)) {
        if !have_qemu("qcow2_chain_of_qemu") {
            return Ok(());
        }
        for (compat, compression) in [("0.10", "zlib"), ("1.1", "zlib"), ("1.1", "zstd")] {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            let mut model = pattern(4, 2 * MIB);
            model[MIB..MIB + MIB / 2].fill(7);
            std::fs::write(at("base.raw"), &model).unwrap();
            let options = if compat == "1.1" { format!("compression_type={compression}") } else { "compat=0.10".into() };
            qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, str(&at("base.raw")), str(&at("mid.qcow2"))]);
            model.resize(3 * MIB, 0);
            let top = at("top.qcow2");
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", &format!("compat={compat},cluster_size=32k"),
                       "-b", "mid.qcow2", "-F", "qcow2", str(&top), "3M"]);
            let model = run(&top, Format::Qcow2, model, &actions[..actions.len() / 2]);
            qemu_img(&["snapshot", "-c", "before", str(&top)]);
            std::fs::write(at("before.raw"), &model).unwrap();
            let model = run(&top, Format::Qcow2, model, &actions[actions.len() / 2..]);
            std::fs::write(at("after.raw"), &model).unwrap();
            sound(&top);
            qemu_img(&["check", "-q", "-f", "qcow2", str(&top)]);
            qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", str(&top), str(&at("after.raw"))]);
            // the snapshot has what was there then
            qemu_img(&["convert", "-l", "before", "-O", "raw", str(&top), str(&at("snapshot.raw"))]);
            assert!(std::fs::read(at("snapshot.raw")).unwrap() == std::fs::read(at("before.raw")).unwrap());
        }
    }

    /// Compressed clusters in the image that is written.
    #[test]
    fn compressed_clusters_are_replaced(actions in actions(3 * MIB)) {
        if !have_qemu("compressed_clusters_are_replaced") {
            return Ok(());
        }
        for options in ["cluster_size=64k", "cluster_size=4k,compression_type=zstd", "compat=0.10,cluster_size=2M"] {
            let dir = tempfile::tempdir().unwrap();
            let (raw, path) = (dir.path().join("model.raw"), dir.path().join("disk.qcow2"));
            let mut model = pattern(5, 3 * MIB);
            for chunk in model.chunks_mut(5000) {
                let half = chunk.len() / 2;
                chunk[..half].fill(9);
            }
            std::fs::write(&raw, &model).unwrap();
            qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, str(&raw), str(&path)]);
            assert_disk(&*open(&path, RO).unwrap(), &model, options);
            let model = run(&path, Format::Qcow2, model, &actions);
            sound(&path);
            std::fs::write(&raw, &model).unwrap();
            qemu_img(&["check", "-q", "-f", "qcow2", str(&path)]);
            qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", str(&path), str(&raw)]);
        }
    }
}

/// Several threads, each with its own stripes of sectors, on clusters that they share.
fn hammer(disk: Arc<dyn Disk>, bytes: usize) -> Vec<u8> {
    const THREADS: u64 = 4;
    let parts: Vec<_> = (0..THREADS)
        .map(|thread| {
            let disk = disk.clone();
            std::thread::spawn(move || {
                let mut mine = vec![0u8; bytes];
                let mut seed = thread + 1;
                for round in 0..800 {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // sectors whose number is `thread` modulo THREADS
                    let sector = (seed >> 33) % (bytes as u64 / 512 / THREADS) * THREADS + thread;
                    let at = sector * 512;
                    let range = at as usize..at as usize + 512;
                    match seed >> 60 {
                        0..10 => {
                            let data = pattern(seed, 512);
                            model::write(&*disk, at, &data).unwrap();
                            mine[range].copy_from_slice(&data);
                        }
                        10 => {
                            disk.write_zeroes(at, 512, round & 1 == 0).unwrap();
                            mine[range].fill(0);
                        }
                        11 if round % 8 == 0 => disk.flush().unwrap(),
                        _ => {
                            assert!(model::read(&*disk, at, 512).unwrap() == mine[range], "thread {thread} at {at:#x}")
                        }
                    }
                }
                mine
            })
        })
        .collect();
    let parts: Vec<Vec<u8>> = parts.into_iter().map(|t| t.join().unwrap()).collect();
    (0..bytes).map(|n| parts[n / 512 % THREADS as usize][n]).collect()
}

#[test]
fn threads_share_clusters() {
    const BYTES: usize = 4 * MIB;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    create_qcow2(&path, BYTES as u64, None).unwrap();
    let disk = open_rw(&path);
    let model = hammer(disk.clone(), BYTES);
    assert_disk(&*disk, &model, "qcow2");
    drop(disk);
    assert_disk(&*open(&path, RO).unwrap(), &model, "qcow2 opened again");
    sound(&path);

    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![0; BYTES]).unwrap();
    let overlay = Arc::new(Overlay::new(open(&base, RO).unwrap(), dir.path()).unwrap());
    let model = hammer(overlay.clone(), BYTES);
    assert_disk(&*overlay, &model, "overlay");
    drop(overlay);

    let raw = open(&base, as_format(Format::Raw, false)).unwrap();
    let model = hammer(raw.clone(), BYTES);
    assert_disk(&*raw, &model, "raw");
}

/// Whole-cluster discards and rewrites by several threads: freed clusters are used again, never by two.
#[test]
fn freed_clusters_are_used_again() {
    const CLUSTER: u64 = 64 << 10;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    create_qcow2(&path, 64 * CLUSTER, None).unwrap();
    let disk = open_rw(&path);
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let disk = disk.clone();
            std::thread::spawn(move || {
                for round in 0..60u64 {
                    let at = (thread * 16 + round % 16) * CLUSTER;
                    let data = pattern(thread << 32 | round, CLUSTER as usize);
                    model::write(&*disk, at, &data).unwrap();
                    assert!(model::read(&*disk, at, CLUSTER as usize).unwrap() == data);
                    if round % 3 == 0 {
                        disk.discard(at, CLUSTER).unwrap();
                        assert!(model::read(&*disk, at, CLUSTER as usize).unwrap().iter().all(|b| *b == 0));
                    }
                    if round % 7 == 0 {
                        disk.flush().unwrap();
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    drop(disk);
    sound(&path);
    let size = std::fs::metadata(&path).unwrap().len();
    assert!(size < 110 * CLUSTER, "{} clusters for 64", size / CLUSTER);
}

#[test]
fn a_large_disk_grows_its_tables() {
    // with clusters of 512 bytes a refcount block counts 256 of them: many blocks, and the table must grow
    if !have_qemu("a_large_disk_grows_its_tables") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("disk.qcow2"), dir.path().join("model.raw"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", str(&path), "48M"]);
    let disk = open(&path, RW).unwrap();
    let model = pattern(6, 48 * MIB);
    for (n, chunk) in model.chunks(MIB).enumerate() {
        model::write(&*disk, (n * MIB) as u64, chunk).unwrap();
        if n % 16 == 0 {
            disk.flush().unwrap();
        }
    }
    drop(disk);
    sound(&path);
    std::fs::write(&raw, &model).unwrap();
    qemu_img(&["check", "-q", "-f", "qcow2", str(&path)]);
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", str(&path), str(&raw)]);
}

/// More L2 tables than are kept in memory: each strip of 512 MiB has its own.
#[test]
fn tables_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    create_qcow2(&path, 1 << 40, None).unwrap();
    let disk = open_rw(&path);
    let place = |n: u64| (n * 7 % 200) * (512 << 20) + n * 4096;
    for n in 0..400 {
        model::write(&*disk, place(n), &pattern(n, 4096)).unwrap();
        if n >= 100 {
            assert!(model::read(&*disk, place(n - 100), 4096).unwrap() == pattern(n - 100, 4096), "{n}");
        }
    }
    drop(disk);
    sound(&path);
    let disk = open(&path, RO).unwrap();
    for n in (0..400).rev() {
        assert!(model::read(&*disk, place(n), 4096).unwrap() == pattern(n, 4096), "{n}");
    }
}
