//! Guests for tests: a few bytes of machine code as an ELF kernel, and Linux with a busybox initramfs.
#![allow(dead_code)] // not every test uses every guest

pub mod cpio;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use vireo_api::ByteSize;
use vireo_machine::{
    Control, Report,
    config::{Accel, BootConfig, MachineConfig, Stream},
    run,
};

/// Where a tiny kernel is loaded and entered, in 64-bit mode.
const LOAD_ADDRESS: u64 = 0x10_0000;

/// An ELF kernel of this code, which is entered at its first byte.
pub fn elf_kernel(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    file.extend(LOAD_ADDRESS.to_le_bytes()); // entry
    file.extend(64u64.to_le_bytes()); // program headers
    file.extend([0; 12]);
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // load
    file.extend(7u32.to_le_bytes());
    for field in [120, LOAD_ADDRESS, LOAD_ADDRESS, code.len() as u64, code.len() as u64, 16] {
        file.extend(field.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

/// `out port, value` for one byte.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Writes a text to COM1, a byte at a time.
pub fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

pub fn power_off() -> Vec<u8> {
    out(0x600, 5 << 2 | 1 << 5)
}

pub fn reset() -> Vec<u8> {
    out(0x604, 1)
}

pub fn report_panic() -> Vec<u8> {
    out(0x505, 1)
}

/// `cli`, then `hlt` for ever.
pub fn halt() -> Vec<u8> {
    vec![0xfa, 0xf4, 0xeb, 0xfd]
}

/// `ud2`: the boot state has no interrupt table, so that this is a triple fault.
pub fn crash() -> Vec<u8> {
    vec![0x0f, 0x0b]
}

/// The engines that this host can test, with a note on each that it cannot.
pub fn engines(test: &str) -> Vec<Accel> {
    let mut engines = vec![Accel::Soft];
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok() {
        engines.push(Accel::Kvm);
    } else {
        println!("SKIPPED: {test} on KVM: /dev/kvm cannot be opened");
    }
    engines
}

/// A serial port whose output ends up here.
#[derive(Clone, Default)]
pub struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    pub fn stream(&self) -> Stream {
        Stream::new(None, self.clone())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Kernels to boot: `VIREO_TEST_KERNELS`, paths between colons.
pub fn linux_kernels() -> Vec<PathBuf> {
    let list = std::env::var_os("VIREO_TEST_KERNELS").unwrap_or_default();
    std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect()
}

/// A static busybox: `VIREO_TEST_BUSYBOX`, or the host's.
pub fn busybox() -> Option<Vec<u8>> {
    let path = std::env::var_os("VIREO_TEST_BUSYBOX").map_or_else(|| PathBuf::from("/bin/busybox"), PathBuf::from);
    std::fs::read(path).ok()
}

/// An initramfs whose `/init` is this script for busybox's shell, with other programs in `/bin` besides.
pub fn initramfs(busybox: &[u8], script: &str, programs: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = cpio::Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp"] {
        archive = archive.directory(folder);
    }
    for (name, program) in [("busybox", busybox)].iter().chain(programs) {
        archive = archive.file(&format!("bin/{name}"), 0o755, program);
    }
    archive
        .character_device("dev/console", 5, 1)
        .character_device("dev/null", 1, 3)
        .file("init", 0o755, format!("#!/bin/busybox sh\n{script}").as_bytes())
        .finish()
}

/// Boots Linux on the software engine, with these arguments for the kernel besides: what came of it, and what was
/// written to its console.
pub fn boot_linux(kernel: &Path, initramfs: &[u8], vcpus: u32, arguments: &str) -> (Report, String) {
    let folder = tempfile::tempdir().unwrap();
    let boot = BootConfig {
        kernel: kernel.to_owned(),
        initrd: Some(write(folder.path(), "initrd", initramfs)),
        cmdline: format!("console=ttyS0 panic=-1 {arguments}"),
        decompressor: None,
    };
    let serial = Captured::default();
    let config = MachineConfig {
        vcpus,
        accel: Accel::Soft,
        memory: ByteSize(256 << 20),
        serial: Some(serial.stream()),
        reboot: false,
        ..MachineConfig::new(boot)
    };
    let report = run(&config, &Control::default(), |_| {}).unwrap();
    (report, serial.text())
}

pub fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}
