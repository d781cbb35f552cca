//! `boot_params`, the structure that a 64-bit Linux kernel finds through RSI
//! (Linux `Documentation/arch/x86/zero-page.rst`).

use vireo_memory::{GuestMemory, MemoryError};

use super::e820;
use crate::layout::{CMDLINE_START, ZERO_PAGE};

const ZERO_PAGE_BYTES: usize = 4096;
const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const E820_ENTRIES: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;

/// "Undefined boot loader": none of the registered numbers is ours.
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1 << 0;

/// What the zero page tells the kernel.
pub(super) struct BootParams<'a> {
    /// The setup header of a bzImage; a bare `vmlinux` gets a minimal one.
    pub setup_header: Option<&'a [u8]>,
    /// Address and length of the initrd.
    pub initrd: Option<(u64, u64)>,
    pub rsdp: u64,
}

pub(super) fn write(memory: &GuestMemory, params: &BootParams<'_>) -> Result<(), MemoryError> {
    let mut page = [0u8; ZERO_PAGE_BYTES];
    if let Some(header) = params.setup_header {
        put(&mut page, SETUP_HEADER, header);
    } else {
        put(&mut page, BOOT_FLAG, &0xaa55u16.to_le_bytes());
        put(&mut page, HEADER_MAGIC, b"HdrS");
        put(&mut page, VERSION, &0x20fu16.to_le_bytes());
        page[LOADFLAGS] = LOADED_HIGH;
    }
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED;
    put(&mut page, CMD_LINE_PTR, &(CMDLINE_START as u32).to_le_bytes());
    put(&mut page, ACPI_RSDP_ADDR, &params.rsdp.to_le_bytes());
    if let Some((start, bytes)) = params.initrd {
        put(&mut page, RAMDISK_IMAGE, &(start as u32).to_le_bytes());
        put(&mut page, RAMDISK_SIZE, &(bytes as u32).to_le_bytes());
        put(&mut page, EXT_RAMDISK_IMAGE, &((start >> 32) as u32).to_le_bytes());
        put(&mut page, EXT_RAMDISK_SIZE, &((bytes >> 32) as u32).to_le_bytes());
    }
    let map = e820::memory_map(memory);
    page[E820_ENTRIES] = map.len() as u8;
    for (index, range) in map.iter().enumerate() {
        let at = E820_TABLE + index * E820_ENTRY_BYTES;
        put(&mut page, at, &range.start.to_le_bytes());
        put(&mut page, at + 8, &range.bytes.to_le_bytes());
        put(&mut page, at + 16, &(range.kind as u32).to_le_bytes());
    }
    memory.write(ZERO_PAGE, &page)
}

fn put(page: &mut [u8; ZERO_PAGE_BYTES], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}
