//! SMBIOS 3.0 tables (DSP0134): who made this machine, for `dmidecode`, cloud-init and the like.

use vireo_memory::{GuestMemory, MemoryError};

use crate::layout::SMBIOS_START;

const VENDOR: &str = "Vireo";
const PRODUCT: &str = "Vireo virtual machine";
const ENTRY_POINT_BYTES: u64 = 24;
const TABLE_START: u64 = SMBIOS_START + 32;
/// BIOS characteristics: none of the optional ones (bit 3: "not supported").
const CHARACTERISTICS_NONE: u64 = 1 << 3;
/// Extension byte 2: the table describes a virtual machine.
const VIRTUAL_MACHINE: u8 = 1 << 4;
const WAKE_UP_POWER_SWITCH: u8 = 6;

pub fn write(memory: &GuestMemory) -> Result<(), MemoryError> {
    let table = [bios_information(), system_information(), chassis(), end_of_table()].concat();
    memory.write(TABLE_START, &table)?;
    let mut entry = Vec::with_capacity(ENTRY_POINT_BYTES as usize);
    entry.extend_from_slice(b"_SM3_");
    entry.push(0); // checksum
    entry.push(ENTRY_POINT_BYTES as u8);
    entry.extend_from_slice(&[3, 0, 0, 1, 0]); // version 3.0, no revision, entry point revision 1
    entry.extend((table.len() as u32).to_le_bytes());
    entry.extend(TABLE_START.to_le_bytes());
    entry[5] = 0u8.wrapping_sub(entry.iter().fold(0, |sum, b| sum.wrapping_add(*b)));
    memory.write(SMBIOS_START, &entry)
}

/// One structure: its formatted part (behind type, length and handle) and the strings that it counts from 1.
fn structure(kind: u8, handle: u16, formatted: &[u8], strings: &[&str]) -> Vec<u8> {
    let mut out = vec![kind, formatted.len() as u8 + 4];
    out.extend(handle.to_le_bytes());
    out.extend_from_slice(formatted);
    for string in strings {
        out.extend_from_slice(string.as_bytes());
        out.push(0);
    }
    if strings.is_empty() {
        out.push(0);
    }
    out.push(0);
    out
}

fn bios_information() -> Vec<u8> {
    let mut formatted = vec![1, 2];
    formatted.extend(0u16.to_le_bytes()); // no segment
    formatted.extend([3, 0]); // release date, ROM size
    formatted.extend(CHARACTERISTICS_NONE.to_le_bytes());
    formatted.extend([0, VIRTUAL_MACHINE, 0, 0, 0xff, 0xff]);
    structure(0, 0, &formatted, &[VENDOR, env!("CARGO_PKG_VERSION"), "01/01/2026"])
}

fn system_information() -> Vec<u8> {
    let mut formatted = vec![1, 2, 3, 0];
    formatted.extend([0; 16]); // no UUID
    formatted.extend([WAKE_UP_POWER_SWITCH, 0, 0]);
    structure(1, 1, &formatted, &[VENDOR, PRODUCT, env!("CARGO_PKG_VERSION")])
}

fn chassis() -> Vec<u8> {
    // manufacturer, type "other", no version, serial and tag, states "safe", security "none"
    structure(3, 2, &[1, 1, 0, 0, 0, 3, 3, 3, 3], &[VENDOR])
}

fn end_of_table() -> Vec<u8> {
    structure(127, 3, &[], &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_point_leads_to_whole_structures() {
        let memory = GuestMemory::new(2 << 20, 2 << 20).unwrap();
        write(&memory).unwrap();
        let entry: [u8; 24] = memory.read_pod(SMBIOS_START).unwrap();
        assert_eq!(&entry[..5], b"_SM3_");
        assert_eq!(entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        let mut table = vec![0; u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize];
        memory.read(u64::from_le_bytes(entry[16..24].try_into().unwrap()), &mut table).unwrap();
        let mut kinds = Vec::new();
        let mut rest = &table[..];
        while !rest.is_empty() {
            kinds.push(rest[0]);
            let strings = &rest[rest[1] as usize..];
            let end = strings.windows(2).position(|w| w == [0, 0]).unwrap() + 2;
            rest = &strings[end..];
        }
        assert_eq!(kinds, [0, 1, 3, 127]);
    }
}
