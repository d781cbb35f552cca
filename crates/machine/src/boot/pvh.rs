//! `hvm_start_info`, what a PVH kernel finds through EBX (Xen `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`).

use vireo_memory::{GuestMemory, MemoryError};

use super::e820;
use crate::layout::{CMDLINE_START, PVH_START_INFO};

const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const START_INFO_VERSION: u32 = 1;
const MODULES: u64 = PVH_START_INFO + 0x100;
const MEMORY_MAP: u64 = PVH_START_INFO + 0x200;

pub(super) fn write(memory: &GuestMemory, initrd: Option<(u64, u64)>, rsdp: u64) -> Result<(), MemoryError> {
    let map = e820::memory_map(memory);
    let mut info = Vec::with_capacity(56);
    info.extend(START_INFO_MAGIC.to_le_bytes());
    info.extend(START_INFO_VERSION.to_le_bytes());
    info.extend(0u32.to_le_bytes()); // flags
    info.extend(u32::from(initrd.is_some()).to_le_bytes());
    info.extend(initrd.map_or(0, |_| MODULES).to_le_bytes());
    info.extend(CMDLINE_START.to_le_bytes());
    info.extend(rsdp.to_le_bytes());
    info.extend(MEMORY_MAP.to_le_bytes());
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    memory.write(PVH_START_INFO, &info)?;

    if let Some((start, bytes)) = initrd {
        // hvm_modlist_entry: address, size, command line, reserved
        let entry = [start, bytes, 0, 0].map(u64::to_le_bytes).concat();
        memory.write(MODULES, &entry)?;
    }
    let entries: Vec<u8> = map
        .iter()
        .flat_map(|r| [r.start.to_le_bytes(), r.bytes.to_le_bytes(), u64::from(r.kind as u32).to_le_bytes()].concat())
        .collect();
    memory.write(MEMORY_MAP, &entries)
}
