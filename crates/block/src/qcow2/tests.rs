//! Crashes of the host: whatever part of what was not synced reached the disk, the image is sound and has all that
//! was flushed.

use std::{collections::BTreeSet, path::Path, process::Command};

use vireo_memory::GuestSlice;

use super::*;
use crate::{
    Disk,
    file::{Change, HostFile},
};

const SECTOR: usize = 512;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

/// The disk as of a flush, and where the guest wrote since. `ops` is the journal's length at the flush's end.
struct Flushed {
    ops: usize,
    model: Vec<u8>,
}

fn put(image: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let end = at as usize + bytes.len();
    image.resize(image.len().max(end), 0);
    image[at as usize..end].copy_from_slice(bytes);
}

/// The file after a crash when `cut` changes were made: all up to the last sync, and of the later ones some sectors.
fn crashed(start: &[u8], journal: &[Change], cut: usize, random: &mut Random) -> Vec<u8> {
    let mut image = start.to_vec();
    let synced = journal[..cut].iter().rposition(|c| matches!(c, Change::Sync)).unwrap_or(0);
    for (n, change) in journal[..cut].iter().enumerate() {
        match change {
            Change::Sync => {}
            Change::Write(at, bytes) if n < synced => put(&mut image, *at, bytes),
            Change::Zero(at, len) if n < synced || random.below(2) == 0 => {
                let end = ((at + len) as usize).min(image.len());
                image[*at as usize..end].fill(0);
            }
            Change::Zero(..) => {}
            Change::Write(at, bytes) => {
                // The file is as long as if it were all there; a kernel orders its size with the data.
                image.resize(image.len().max(*at as usize + bytes.len()), 0);
                let some = random.below(4);
                let mut from = 0;
                while from < bytes.len() {
                    let sector_end = (at + from as u64) as usize / SECTOR * SECTOR + SECTOR - *at as usize;
                    let end = sector_end.min(bytes.len());
                    if some == 0 || (some < 3 && random.below(2) == 0) {
                        put(&mut image, at + from as u64, &bytes[from..end]);
                    }
                    from = end;
                }
            }
        }
    }
    image
}

fn torture(path: &Path, bytes: usize, seed: u64) {
    let start = std::fs::read(path).unwrap();
    let mut random = Random(seed | 1);
    let disk = Qcow2::open(HostFile::open(path, false).unwrap(), false, &mut Vec::new()).unwrap();
    let mut model = vec![0; bytes];
    disk.read(0, &[GuestSlice::from_host(&mut model)]).unwrap();
    let mut flushes = vec![Flushed { ops: 0, model: model.clone() }];
    // (journal length before, sectors that were touched)
    let mut touched: Vec<(usize, std::ops::Range<usize>)> = Vec::new();
    for _ in 0..120 {
        let sectors = (bytes / SECTOR) as u64;
        let at = random.below(sectors) as usize;
        let most = if random.below(4) == 0 { 600 } else { 20 };
        let len = (1 + random.below(most) as usize).min(sectors as usize - at);
        let range = at * SECTOR..(at + len) * SECTOR;
        touched.push((disk.journal().len(), range.clone()));
        match random.below(10) {
            0..6 => {
                let mut data: Vec<u8> = (0..range.len()).map(|_| random.next() as u8 | 1).collect();
                disk.write(range.start as u64, &[GuestSlice::from_host(&mut data)]).unwrap();
                model[range].copy_from_slice(&data);
            }
            6 => {
                disk.write_zeroes(range.start as u64, range.len() as u64, random.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            7 => {
                disk.discard(range.start as u64, range.len() as u64).unwrap();
                disk.read(range.start as u64, &[GuestSlice::from_host(&mut model[range])]).unwrap();
            }
            _ => {
                disk.flush().unwrap();
                flushes.push(Flushed { ops: disk.journal().len(), model: model.clone() });
            }
        }
    }
    let journal = disk.journal();
    drop(disk);
    let dir = tempfile::tempdir().unwrap();
    let after = dir.path().join("after.qcow2");
    for _ in 0..60 {
        let cut = random.below(journal.len() as u64 + 1) as usize;
        std::fs::write(&after, crashed(&start, &journal, cut, &mut random)).unwrap();
        let report = check(&after).unwrap_or_else(|e| panic!("cut {cut} of {}: {e}", journal.len()));
        assert_eq!(report.corruptions, 0, "cut {cut} of {}: {report:?}", journal.len());
        // what was flushed and not touched since is there
        let flushed = flushes.iter().rev().find(|f| f.ops <= cut).unwrap();
        let changed: BTreeSet<usize> = touched
            .iter()
            .filter(|(ops, _)| *ops >= flushed.ops && *ops <= cut)
            .flat_map(|(_, range)| range.start / SECTOR..range.end / SECTOR)
            .collect();
        let disk = Qcow2::open(HostFile::open(&after, true).unwrap(), true, &mut Vec::new()).unwrap();
        let mut now = vec![0; bytes];
        disk.read(0, &[GuestSlice::from_host(&mut now)]).unwrap();
        for sector in (0..bytes / SECTOR).filter(|s| !changed.contains(s)) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            assert!(now[range.clone()] == flushed.model[range], "cut {cut}: flushed sector {sector:#x} is lost");
        }
    }
}

#[test]
fn a_crash_leaks_at_worst() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 1..6 {
        let path = dir.path().join(format!("{seed}.qcow2"));
        create_qcow2(&path, 4 << 20, None).unwrap();
        torture(&path, 4 << 20, seed * 7919);
    }
}

/// Small clusters: many L2 tables, refcount blocks that are added and a refcount table that moves. A snapshot:
/// tables and clusters that are shared.
#[test]
fn a_crash_leaks_at_worst_in_images_of_qemu() {
    let qemu = |args: &[&str]| Command::new("qemu-img").args(args).output().ok().map(|out| out.status.success());
    if qemu(&["--version"]).is_none() {
        eprintln!("SKIPPED a_crash_leaks_at_worst_in_images_of_qemu: qemu-img is not installed (package qemu-utils)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (seed, options) in [(11, "cluster_size=512"), (12, "cluster_size=4k,compat=0.10"), (13, "cluster_size=512")] {
        let path = dir.path().join(format!("{seed}.qcow2"));
        let name = path.to_str().unwrap();
        assert_eq!(qemu(&["create", "-q", "-f", "qcow2", "-o", options, name, "2M"]), Some(true));
        torture(&path, 2 << 20, seed * 104_729);
        assert_eq!(qemu(&["snapshot", "-c", "one", name]), Some(true));
        torture(&path, 2 << 20, seed * 1_299_709);
        assert_eq!(qemu(&["check", "-q", name]), Some(true));
    }
}
