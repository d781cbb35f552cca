//! A disk as a plain vector, to compare real ones with.
#![allow(dead_code)]

use std::{path::Path, process::Command, sync::Arc};

use proptest::test_runner::Config as ProptestConfig;
use vireo_block::{Disk, DiskError, Format, OpenOptions, open};
use vireo_memory::GuestSlice;

pub const RW: OpenOptions = OpenOptions { format: None, read_only: false };
pub const RO: OpenOptions = OpenOptions { format: None, read_only: true };

pub fn as_format(format: Format, read_only: bool) -> OpenOptions {
    OpenOptions { format: Some(format), read_only }
}

/// `usual` cases, and as many times more as `PROPTEST_CASES` asks for (its own default is 256).
pub fn cases(usual: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = (u64::from(usual) * u64::from(default.cases) / 256).clamp(1, u64::from(u32::MAX)) as u32;
    ProptestConfig { cases, failure_persistence: None, ..default }
}

pub fn read(disk: &dyn Disk, offset: u64, len: usize) -> Result<Vec<u8>, DiskError> {
    // in three pieces, one of them empty: as scattered as a guest's
    let mut out = vec![0xa5; len];
    let (head, tail) = out.split_at_mut(len / 3);
    disk.read(offset, &[GuestSlice::from_host(head), GuestSlice::from_host(&mut []), GuestSlice::from_host(tail)])?;
    Ok(out)
}

pub fn write(disk: &dyn Disk, offset: u64, data: &[u8]) -> Result<(), DiskError> {
    let mut data = data.to_vec();
    let split = offset as usize % (data.len() + 1);
    let (head, tail) = data.split_at_mut(split);
    disk.write(offset, &[GuestSlice::from_host(head), GuestSlice::from_host(tail)])
}

/// Bytes that tell where they are.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

/// One thing that a guest does; sizes in sectors.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    Read { at: u64, len: u64 },
    Write { at: u64, len: u64, seed: u64 },
    Discard { at: u64, len: u64 },
    Zero { at: u64, len: u64, unmap: bool },
    Flush,
    Reopen,
}

/// Does it to both and compares. `Reopen` is the caller's.
pub fn apply(disk: &dyn Disk, model: &mut [u8], action: Action) {
    let sectors = model.len() as u64 / 512;
    let fit = |at: u64, len: u64| {
        let at = at % sectors;
        (at * 512, len.min(sectors - at) * 512)
    };
    match action {
        Action::Read { at, len } => {
            let (at, len) = fit(at, len);
            assert_same(&read(disk, at, len as usize).unwrap(), &model[at as usize..(at + len) as usize], at, action);
        }
        Action::Write { at, len, seed } => {
            let (at, len) = fit(at, len);
            let data = pattern(seed, len as usize);
            write(disk, at, &data).unwrap();
            model[at as usize..(at + len) as usize].copy_from_slice(&data);
        }
        Action::Zero { at, len, unmap } => {
            let (at, len) = fit(at, len);
            disk.write_zeroes(at, len, unmap).unwrap();
            model[at as usize..(at + len) as usize].fill(0);
        }
        Action::Discard { at, len } => {
            let (at, len) = fit(at, len);
            disk.discard(at, len).unwrap();
            // each byte is as before or zero; which, the disk decides
            let now = read(disk, at, len as usize).unwrap();
            let part = &mut model[at as usize..(at + len) as usize];
            let wrong = now.iter().zip(part.iter()).position(|(new, old)| new != old && *new != 0);
            assert_eq!(wrong, None, "{action:?} changed data");
            part.copy_from_slice(&now);
        }
        Action::Flush => disk.flush().unwrap(),
        Action::Reopen => {}
    }
}

pub fn assert_same(got: &[u8], want: &[u8], at: u64, what: impl std::fmt::Debug) {
    assert_eq!(got.len(), want.len());
    if let Some(n) = got.iter().zip(want).position(|(g, w)| g != w) {
        panic!("{what:?}: byte {:#x} is {:#x}, not {:#x}", at + n as u64, got[n], want[n]);
    }
}

/// The whole disk, read in odd pieces.
pub fn assert_disk(disk: &dyn Disk, model: &[u8], what: &str) {
    assert_eq!(disk.size_bytes(), model.len() as u64, "{what}");
    let mut at = 0;
    for len in [512, 4096, 65_536, 1_000_448].into_iter().cycle() {
        let len = len.min(model.len() - at);
        if len == 0 {
            break;
        }
        assert_same(&read(disk, at as u64, len).unwrap(), &model[at..at + len], at as u64, what);
        at += len;
    }
}

/// Runs a tool; `None` where it is not installed.
pub fn tool(name: &str, args: &[&str]) -> Option<(bool, String)> {
    let out = Command::new(name).args(args).output().ok()?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Some((out.status.success(), text))
}

/// Whether qemu-img and qemu-io are there; says so by name where they are not.
pub fn have_qemu(test: &str) -> bool {
    let have = ["qemu-img", "qemu-io"].iter().all(|t| tool(t, &["--version"]).is_some());
    if !have {
        eprintln!("SKIPPED {test}: qemu-img and qemu-io are not installed (package qemu-utils)");
    }
    have
}

pub fn qemu_img(args: &[&str]) -> String {
    let (good, text) = tool("qemu-img", args).expect("qemu-img is there");
    assert!(good, "qemu-img {args:?}: {text}");
    text
}

pub fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn open_rw(path: &Path) -> Arc<dyn Disk> {
    open(path, RW).unwrap_or_else(|e| panic!("{e}"))
}
