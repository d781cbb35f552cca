//! The state in which the boot processor enters a kernel.

use vireo_cpu::{CpuState, DescriptorTable, Segment};
use vireo_memory::{GuestMemory, MemoryError};

use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK, PVH_START_INFO, ZERO_PAGE};

/// How and where a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The 64-bit Linux boot protocol: long mode, RSI points to `boot_params`.
    Linux64 { rip: u64 },
    /// PVH: 32-bit protected mode without paging, EBX points to `hvm_start_info`.
    Pvh32 { rip: u32 },
}

const RSP: usize = 4;
const RBX: usize = 3;
const RSI: usize = 6;
const CS: usize = 1;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITABLE: u64 = 1 << 1;
const PTE_LARGE: u64 = 1 << 7;
const TABLE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// Each directory maps 1 GiB; the protocol asks for the kernel, the zero page and the command line.
const DIRECTORIES: u64 = 4;

/// A 32-bit TSS, which protected mode wants loaded (the PVH specification names it).
const TSS32: Segment = Segment { selector: 0x20, base: 0, limit: 0x67, rights: 0x008b, unusable: false };

impl Entry {
    pub fn address(self) -> u64 {
        match self {
            Self::Linux64 { rip } => rip,
            Self::Pvh32 { rip } => rip.into(),
        }
    }

    /// Writes what the entry state points to: the GDT and, for long mode, page tables.
    pub(super) fn prepare(self, memory: &GuestMemory) -> Result<(), MemoryError> {
        let code = match self {
            Self::Linux64 { .. } => Segment::CODE64,
            Self::Pvh32 { .. } => Segment::CODE32,
        };
        // selectors 0x10 __BOOT_CS, 0x18 __BOOT_DS, 0x20 the TSS
        let gdt = [0, 0, descriptor(&code), descriptor(&Segment::DATA), descriptor(&TSS32), 0];
        memory.write(BOOT_GDT, &gdt.map(u64::to_le_bytes).concat())?;
        if matches!(self, Self::Linux64 { .. }) {
            write_page_tables(memory)?;
        }
        Ok(())
    }

    /// Changes a freshly created boot processor's state so that it enters the kernel.
    pub fn apply(self, state: &mut CpuState) {
        state.gpr = [0; 16];
        state.rip = self.address();
        state.rflags = 2;
        state.segments = [Segment::DATA; 6];
        state.tr = TSS32;
        state.gdtr = DescriptorTable { base: BOOT_GDT, limit: 6 * 8 - 1 };
        state.idtr = DescriptorTable { base: 0, limit: 0 };
        state.cr2 = 0;
        match self {
            Self::Linux64 { .. } => {
                state.segments[CS] = Segment::CODE64;
                state.gpr[RSI] = ZERO_PAGE;
                state.gpr[RSP] = BOOT_STACK;
                state.cr0 = CR0_PE | CR0_ET | CR0_PG;
                state.cr3 = BOOT_PAGE_TABLES;
                state.cr4 = CR4_PAE;
                state.efer = EFER_LME | EFER_LMA;
            }
            Self::Pvh32 { .. } => {
                state.segments[CS] = Segment::CODE32;
                state.gpr[RBX] = PVH_START_INFO;
                state.cr0 = CR0_PE | CR0_ET;
                state.cr3 = 0;
                state.cr4 = 0;
                state.efer = 0;
            }
        }
    }
}

/// The 8-byte descriptor of a segment (Intel SDM vol. 3, 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let rights = u64::from(segment.rights);
    let granular = rights & (1 << 15) != 0;
    let limit = u64::from(if granular { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    (limit & 0xffff)
        | ((base & 0xff_ffff) << 16)
        | ((rights & 0xf0ff) << 40)
        | (((limit >> 16) & 0xf) << 48)
        | (((base >> 24) & 0xff) << 56)
}

/// The first 4 GiB one to one in 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), MemoryError> {
    let table = PTE_PRESENT | PTE_WRITABLE;
    let pdpt = BOOT_PAGE_TABLES + TABLE_BYTES;
    let directories = pdpt + TABLE_BYTES;
    memory.write_pod(BOOT_PAGE_TABLES, pdpt | table)?;
    for index in 0..DIRECTORIES {
        memory.write_pod(pdpt + index * 8, (directories + index * TABLE_BYTES) | table)?;
    }
    for index in 0..DIRECTORIES * 512 {
        memory.write_pod(directories + index * 8, (index * LARGE_PAGE_BYTES) | table | PTE_LARGE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&Segment::CODE64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&Segment::CODE32), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&Segment::DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&TSS32), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn page_tables_map_one_to_one() {
        let memory = GuestMemory::new(2 << 20, 2 << 20).unwrap();
        Entry::Linux64 { rip: 0x100_0000 }.prepare(&memory).unwrap();
        for address in [0u64, 0x20_0000, 0x1234_5678, 0xffff_ffff] {
            let at = |table: u64, shift: u64| memory.read_pod::<u64>(table + ((address >> shift) & 511) * 8).unwrap();
            let pdpt = at(BOOT_PAGE_TABLES, 39) & !0xfff;
            let directory = at(pdpt, 30) & !0xfff;
            let page = at(directory, 21);
            assert_eq!(page & 0xfff, 0x83);
            assert_eq!((page & !0xfff) | (address & (LARGE_PAGE_BYTES - 1)), address);
        }
    }
}
