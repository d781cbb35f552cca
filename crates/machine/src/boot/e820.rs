//! The guest's memory map in the terms of BIOS call E820, which both boot protocols use.

use vireo_memory::{GuestMemory, HIGH_RAM_START};

use crate::layout::{ACPI_START, CONVENTIONAL_END, HIGH_MEMORY_START, PCI_ECAM_BYTES, PCI_ECAM_START};

/// Address range types (ACPI 6.5, table 15.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub start: u64,
    pub bytes: u64,
    pub kind: RangeKind,
}

/// Sorted, without overlaps.
pub(super) fn memory_map(memory: &GuestMemory) -> Vec<Range> {
    let mut map = vec![
        range(0, CONVENTIONAL_END, RangeKind::Ram),
        range(CONVENTIONAL_END, 0xa_0000, RangeKind::Reserved),
        range(ACPI_START, HIGH_MEMORY_START, RangeKind::Reserved),
        range(HIGH_MEMORY_START, memory.low_bytes(), RangeKind::Ram),
        // Linux uses ECAM only where the firmware marks it as reserved.
        range(PCI_ECAM_START, PCI_ECAM_START + PCI_ECAM_BYTES, RangeKind::Reserved),
        range(HIGH_RAM_START, HIGH_RAM_START + memory.high_bytes(), RangeKind::Ram),
    ];
    map.retain(|r| r.bytes > 0);
    map
}

fn range(start: u64, end: u64, kind: RangeKind) -> Range {
    Range { start, bytes: end.saturating_sub(start), kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covers_all_ram_and_never_overlaps() {
        for bytes in [2u64 << 20, 64 << 20, 3 << 30, 5 << 30] {
            let memory = GuestMemory::new(bytes, crate::layout::LOW_RAM_LIMIT).unwrap();
            let map = memory_map(&memory);
            assert!(map.windows(2).all(|w| w[0].start + w[0].bytes <= w[1].start), "{map:x?}");
            let ram: u64 = map.iter().filter(|r| r.kind == RangeKind::Ram).map(|r| r.bytes).sum();
            assert_eq!(ram, bytes - (HIGH_MEMORY_START - CONVENTIONAL_END));
        }
    }
}
