use std::{fs, process::Command};

use super::*;
use crate::layout::LOW_RAM_LIMIT;

fn built(vcpus: u32) -> (GuestMemory, u64) {
    let memory = GuestMemory::new(2 << 20, LOW_RAM_LIMIT).unwrap();
    let rsdp = write(&memory, &AcpiConfig { vcpus }).unwrap();
    (memory, rsdp)
}

fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    memory.read(at, &mut out).unwrap();
    out
}

/// The table at `at`, its checksum checked.
fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
    let len = memory.read_pod::<u32>(at + 4).unwrap() as usize;
    assert!((36..0x10000).contains(&len), "a table of {len} bytes at {at:#x}");
    let bytes = read(memory, at, len);
    assert_eq!(bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum of {:?}", &bytes[..4]);
    bytes
}

/// All tables, found as a guest finds them.
fn tables(memory: &GuestMemory, rsdp: u64) -> Vec<Vec<u8>> {
    let root = read(memory, rsdp, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!(root.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
    assert_eq!(root[..20].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
    let xsdt = table(memory, u64::from_le_bytes(root[24..32].try_into().unwrap()));
    let mut all: Vec<_> =
        xsdt[36..].chunks_exact(8).map(|entry| table(memory, u64::from_le_bytes(entry.try_into().unwrap()))).collect();
    let fadt = all.iter().find(|t| t.starts_with(b"FACP")).unwrap();
    let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
    all.push(table(memory, dsdt));
    all.push(xsdt);
    all
}

#[test]
fn a_guest_finds_every_table_with_a_right_checksum() {
    for vcpus in [1, 64] {
        let (memory, rsdp) = built(vcpus);
        let tables = tables(&memory, rsdp);
        let signatures: Vec<_> = tables.iter().map(|t| String::from_utf8_lossy(&t[..4]).into_owned()).collect();
        assert_eq!(signatures, ["FACP", "APIC", "MCFG", "DSDT", "XSDT"]);
        let madt = &tables[1];
        assert_eq!(madt.len(), 44 + vcpus as usize * 8 + 12);
    }
}

#[test]
fn the_fadt_says_how_to_power_off_and_reset() {
    let (memory, rsdp) = built(1);
    let fadt = tables(&memory, rsdp).remove(0);
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0x04, 0x06, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[128], 1);
    assert_eq!(fadt[244..256], [1, 8, 0, 1, 0x00, 0x06, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[256..268], [1, 8, 0, 1, 0x01, 0x06, 0, 0, 0, 0, 0, 0]);
}

/// Intel's compiler reads the tables back: no byte is left over, and compiling what it read gives the same AML.
#[test]
fn iasl_reads_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        println!("SKIPPED: iasl is not installed (package acpica-tools)");
        return;
    }
    let (memory, rsdp) = built(4);
    let folder = tempfile::tempdir().unwrap();
    for table in tables(&memory, rsdp) {
        let name = String::from_utf8_lossy(&table[..4]).into_owned();
        let path = folder.path().join(format!("{name}.dat"));
        fs::write(&path, &table).unwrap();
        let read = Command::new("iasl").arg("-d").arg(&path).output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&read.stdout), String::from_utf8_lossy(&read.stderr));
        assert!(read.status.success(), "{name}: {text}");
        for complaint in ["Error", "Invalid", "Incorrect checksum", "Warning"] {
            assert!(!text.contains(complaint), "{name}: {text}");
        }
        if name == "DSDT" {
            let source = fs::read_to_string(path.with_extension("dsl")).unwrap();
            for word in ["PNP0A08", "PNP0501", "PNP0B00", "ACPI0007", "_S5", "_OSC", "QEMU0001"] {
                assert!(source.contains(word), "{word} is missing in\n{source}");
            }
            let compiled = Command::new("iasl").arg("-ve").arg(path.with_extension("dsl")).output().unwrap();
            let text = String::from_utf8_lossy(&compiled.stdout).into_owned();
            assert!(compiled.status.success(), "{text}\n{source}");
            assert_eq!(fs::read(path.with_extension("aml")).unwrap()[36..], table[36..]);
        }
    }
}
