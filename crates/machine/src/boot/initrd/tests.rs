use std::io::Write;

use proptest::prelude::*;

use super::*;

#[path = "../../../tests/support/cpio.rs"]
mod cpio;
use cpio::Archive;

const START: u64 = 0x20_0000;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn archive(name: &str, bytes: usize) -> Vec<u8> {
    let content: Vec<u8> = (0..bytes).map(|i| ((i * i) >> 7) as u8).collect();
    Archive::default().directory("etc").file(name, 0o644, &content).finish()
}

fn run(file: &[u8], room: u64) -> Result<(LoadedInitrd, Vec<u8>), InitrdFault> {
    let memory = GuestMemory::new(16 << 20, 1 << 31).unwrap();
    let mut on_disk = tempfile::tempfile().unwrap();
    on_disk.write_all(file).unwrap();
    on_disk.seek(SeekFrom::Start(0)).unwrap();
    let loaded = load(&memory, &mut on_disk, Room { start: START, end: START + room })?;
    let mut out = vec![0; loaded.bytes as usize];
    memory.read(START, &mut out).unwrap();
    Ok((loaded, out))
}

const ROOM: u64 = 8 << 20;

#[test]
fn a_plain_archive_goes_in_unchanged() {
    let plain = [archive("a", 5000), vec![0; 512], archive("b", 3)].concat();
    let (loaded, bytes) = run(&plain, ROOM).unwrap();
    assert!(!loaded.decompressed);
    assert!(bytes == plain);
}

#[test]
fn microcode_first_then_compressed() {
    let early = archive("kernel/x86/microcode/AuthenticAMD.bin", 999);
    let main = archive("init", 300_000);
    let second = archive("etc/extra", 10);
    let zstd = zstd::stream::encode_all(&main[..], 3).unwrap();
    let file = [early.clone(), vec![0; 8], zstd, gzip(&second)].concat();
    let (loaded, bytes) = run(&file, ROOM).unwrap();
    assert!(loaded.decompressed);
    assert!(bytes == [early, vec![0; 8], main, second].concat());
}

#[test]
fn a_plain_archive_behind_a_compressed_one_stays_aligned() {
    let main = archive("init", 1234);
    let last = archive("last", 20);
    let mut file = gzip(&main);
    file.resize(file.len().next_multiple_of(4), 0);
    file.extend_from_slice(&last);
    let (_, bytes) = run(&file, ROOM).unwrap();
    assert!(bytes.starts_with(&main));
    assert!(bytes.ends_with(&last));
    assert!((bytes.len() - last.len()).is_multiple_of(4));
}

#[test]
fn what_is_not_understood_goes_in_as_it_is() {
    let bzip2 = b"BZh91AY&SY and more".to_vec();
    let ramdisk = gzip(&[0x55; 5000]);
    let tail = [archive("a", 100), b"garbage behind the trailer".to_vec()].concat();
    for file in [bzip2, ramdisk, tail, vec![b'0', b'7']] {
        match run(&file, ROOM) {
            Ok((loaded, bytes)) => assert!(!loaded.decompressed && bytes == file),
            Err(fault) => assert!(file.len() == 2, "{fault:?}"),
        }
    }
}

#[test]
fn linux_takes_what_it_knows() {
    let mut ext2 = vec![1; 4096];
    ext2[1080..1082].copy_from_slice(&[0x53, 0xef]);
    let known: [&[u8]; 6] = [&archive("init", 10), &gzip(&[1; 50]), b"BZh91AY&SY", &[0; 512], b"hsqs", &ext2];
    for head in known {
        assert!(suits_linux(head), "{:?}", &head[..4]);
    }
    for head in [&b"#!/bin/sh\n"[..], &[0xa5; 4096], b"\x7fELF", b"070707 old"] {
        assert!(!suits_linux(head), "{head:?}");
    }
}

#[test]
fn what_would_grow_too_large_goes_in_compressed() {
    let file = gzip(&archive("zeroes", 6 << 20));
    let (loaded, bytes) = run(&file, ROOM).unwrap();
    assert!(!loaded.decompressed);
    assert!(bytes == file);
    assert!(matches!(run(&file, 4096), Err(InitrdFault::TooLarge)));
    // No room at all, at the end of memory.
    let (memory, end) = (GuestMemory::new(16 << 20, 1 << 31).unwrap(), 16 << 20);
    let mut on_disk = tempfile::tempfile().unwrap();
    on_disk.write_all(&archive("init", 9)).unwrap();
    on_disk.rewind().unwrap();
    assert!(matches!(load(&memory, &mut on_disk, Room { start: end, end }), Err(InitrdFault::TooLarge)));
}

#[test]
fn truncation_and_damage_are_found() {
    let main = archive("init", 300_000);
    let plain_cut = &main[..main.len() / 2];
    assert!(matches!(run(plain_cut, ROOM), Err(InitrdFault::Fault(Fault::Truncated(why))) if why.contains("'init'")));
    let packed = gzip(&main);
    let cut = &packed[..packed.len() / 2];
    assert!(matches!(run(cut, ROOM), Err(InitrdFault::Fault(Fault::Truncated(_) | Fault::Corrupt(_)))));
    let mut damaged = packed.clone();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 64].fill(0xff);
    assert!(matches!(run(&damaged, ROOM), Err(InitrdFault::Fault(Fault::Truncated(_) | Fault::Corrupt(_)))));
    assert!(matches!(run(b"", ROOM), Err(InitrdFault::Fault(Fault::Truncated(_)))));
}

proptest! {
    #[test]
    fn hostile_archives_never_panic(
        edits in prop::collection::vec((0usize..2000, any::<u8>()), 0..20),
        cut in 0usize..2000,
        pack in any::<bool>(),
    ) {
        let mut file = archive("init", 1500);
        for (at, value) in edits {
            file[at % 2000 % 1700] = value;
        }
        file.truncate(cut.max(1));
        let file = if pack { gzip(&file) } else { file };
        let _ = run(&file, ROOM);
    }
}
