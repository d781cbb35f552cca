use std::io::Write;

use tempfile::NamedTempFile;
use vireo_cpu::CpuState;

use super::*;
use crate::layout::{LOW_RAM_LIMIT, PVH_START_INFO, ZERO_PAGE};

const RSDP: u64 = 0xe_0000;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn source(kernel: &NamedTempFile, cmdline: &str) -> BootSource {
    BootSource {
        kernel: kernel.path().to_owned(),
        initrd: None,
        cmdline: cmdline.into(),
        decompressor: Decompressor::Host,
    }
}

fn memory(bytes: u64) -> GuestMemory {
    GuestMemory::new(bytes, LOW_RAM_LIMIT).unwrap()
}

fn vmlinux() -> Vec<u8> {
    elf::tests::elf(0x20_0000, &[elf::tests::Part::load(0x20_0000, &[0xf4; 3000], 0x4000)])
}

fn bzimage() -> NamedTempFile {
    file(&bzimage::tests::bzimage(&bzimage::tests::gzip(&vmlinux())))
}

#[test]
fn a_bzimage_finds_its_boot_params() {
    let kernel = bzimage();
    let initrd = file(b"hsqs a kind of ramdisk");
    let source = BootSource { initrd: Some(initrd.path().to_owned()), ..source(&kernel, "console=ttyS0") };
    let memory = memory(16 << 20);
    let loaded = load(&memory, &source, RSDP).unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { rip: 0x20_0000 });
    assert!(loaded.how.contains("gzip"), "{}", loaded.how);
    let (start, bytes) = loaded.initrd.unwrap();
    assert!(start >= 0x20_4000 && start.is_multiple_of(4096));
    assert_eq!(bytes, 22);
    let at32 = |offset: u64| memory.read_pod::<u32>(ZERO_PAGE + offset).unwrap();
    assert_eq!(u64::from(at32(0x218)), start);
    assert_eq!(at32(0x21c), 22);
    assert_eq!(memory.read_pod::<u64>(ZERO_PAGE + 0x70).unwrap(), RSDP);
    assert_eq!(memory.read_pod::<[u8; 4]>(ZERO_PAGE + 0x202).unwrap(), *b"HdrS");
    assert_eq!(memory.read_pod::<u8>(ZERO_PAGE + 0x210).unwrap(), 0xff);
    let cmdline = u64::from(at32(0x228));
    assert_eq!(&memory.read_pod::<[u8; 14]>(cmdline).unwrap(), b"console=ttyS0\0");
    assert_eq!(memory.read_pod::<u8>(ZERO_PAGE + 0x1e8).unwrap(), 5);

    let mut state = CpuState::reset();
    loaded.entry.apply(&mut state);
    assert_eq!((state.rip, state.gpr[6]), (0x20_0000, ZERO_PAGE));
    assert_eq!(state.efer & 0x500, 0x500);
}

#[test]
fn the_guest_may_decompress_it_itself() {
    let kernel = bzimage();
    let source = BootSource { decompressor: Decompressor::Guest, ..source(&kernel, "") };
    let loaded = load(&memory(16 << 20), &source, RSDP).unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { rip: 0x10_0200 });
}

#[test]
fn an_elf_with_a_pvh_note_finds_its_start_info() {
    let note = elf::tests::pvh_note(0x20_0010);
    let mut bytes = elf::tests::elf(
        0x20_0000,
        &[
            elf::tests::Part::load(0x20_0000, &note, 0x4000),
            elf::tests::Part { kind: 4, ..elf::tests::Part::load(0x20_0000, &note, 0) },
        ],
    );
    let first: [u8; 8] = bytes[64 + 8..64 + 16].try_into().unwrap();
    bytes[64 + 56 + 8..64 + 56 + 16].copy_from_slice(&first);
    let kernel = file(&bytes);
    let initrd = file(b"ramdisk");
    let source = BootSource { initrd: Some(initrd.path().to_owned()), ..source(&kernel, "hi") };
    let memory = memory(16 << 20);
    let loaded = load(&memory, &source, RSDP).unwrap();
    assert_eq!(loaded.entry, Entry::Pvh32 { rip: 0x20_0010 });
    assert_eq!(memory.read_pod::<u32>(PVH_START_INFO).unwrap(), 0x336e_c578);
    assert_eq!(memory.read_pod::<u32>(PVH_START_INFO + 12).unwrap(), 1);
    let modules = memory.read_pod::<u64>(PVH_START_INFO + 16).unwrap();
    assert_eq!(memory.read_pod::<u64>(modules).unwrap(), loaded.initrd.unwrap().0);
    assert_eq!(memory.read_pod::<u64>(modules + 8).unwrap(), 7);
    assert_eq!(memory.read_pod::<u64>(PVH_START_INFO + 32).unwrap(), RSDP);
}

#[test]
fn a_bare_elf_gets_a_minimal_setup_header() {
    let kernel = file(&vmlinux());
    let memory = memory(16 << 20);
    let loaded = load(&memory, &source(&kernel, ""), RSDP).unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { rip: 0x20_0000 });
    assert_eq!(memory.read_pod::<u16>(ZERO_PAGE + 0x1fe).unwrap(), 0xaa55);
}

#[test]
fn errors_name_the_file_and_what_to_do() {
    let kernel = bzimage();
    let text = file(b"just some notes\n");
    let error = |source: &BootSource, bytes| load(&memory(bytes), source, RSDP).unwrap_err().to_string();
    let no_kernel = error(&source(&text, ""), 16 << 20);
    assert!(no_kernel.contains("a text file") && no_kernel.contains(text.path().to_str().unwrap()), "{no_kernel}");
    let small = error(&source(&kernel, ""), 2 << 20);
    assert!(small.contains("--memory 3M"), "{small}");
    let long = error(&source(&kernel, &"x".repeat(3000)), 16 << 20);
    assert!(long.contains("2047"), "{long}");
    let nul = error(&source(&kernel, "a\0b"), 16 << 20);
    assert!(nul.contains("NUL"), "{nul}");
    let missing = BootSource { initrd: Some("/nonexistent/initrd".into()), ..source(&kernel, "") };
    let missing = load(&memory(16 << 20), &missing, RSDP).unwrap_err();
    assert!(matches!(missing, BootError::Read { what: BootFile::Initrd, .. }));
    let directory = BootSource { kernel: "/".into(), ..source(&kernel, "") };
    assert!(matches!(load(&memory(16 << 20), &directory, RSDP), Err(BootError::Read { .. })));
    let garbage = file(&[0xa5; 5000]);
    let garbage = error(&BootSource { initrd: Some(garbage.path().to_owned()), ..source(&kernel, "") }, 16 << 20);
    assert!(garbage.contains("which Linux does not take"), "{garbage}");
    let large = file(&[b"BZh".to_vec(), vec![0xa5; 15 << 20]].concat());
    let large = BootSource { initrd: Some(large.path().to_owned()), ..source(&kernel, "") };
    let large = error(&large, 16 << 20);
    assert!(large.contains("does not fit"), "{large}");
}
