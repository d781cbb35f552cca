//! The ACPI tables: hardware-reduced ACPI 6.5, made for one machine and written into the BIOS area.
//!
//! The guest finds the RSDP at [`ACPI_START`]; the boot protocols also name it.

mod dsdt;
mod fixed;

use acpi_tables::{Aml, rsdp::Rsdp, xsdt::XSDT};
use vireo_memory::{GuestMemory, MemoryError};

use crate::layout::{ACPI_BYTES, ACPI_START};

const OEM_ID: [u8; 6] = *b"VIREO ";
const OEM_TABLE_ID: [u8; 8] = *b"VIREOVM ";
const OEM_REVISION: u32 = 1;

/// What the tables depend on.
#[derive(Clone, Copy, Debug)]
pub struct AcpiConfig {
    /// APIC ids 0 to `vcpus - 1`.
    pub vcpus: u32,
}

/// Writes all tables; returns the address of the RSDP.
pub fn write(memory: &GuestMemory, config: &AcpiConfig) -> Result<u64, MemoryError> {
    let mut area = Area { memory, next: ACPI_START + Rsdp::len() as u64 };
    let dsdt = area.put(&dsdt::dsdt(config))?;
    let tables = [
        area.put(&bytes(&fixed::fadt(dsdt)))?,
        area.put(&bytes(&fixed::madt(config)))?,
        area.put(&bytes(&fixed::mcfg()))?,
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = area.put(&bytes(&xsdt))?;
    memory.write(ACPI_START, &bytes(&Rsdp::new(OEM_ID, xsdt)))?;
    Ok(ACPI_START)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

/// Hands out the tables' area from low to high.
struct Area<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Area<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, MemoryError> {
        let at = self.next.next_multiple_of(16);
        let len = table.len() as u64;
        if at + len > ACPI_START + ACPI_BYTES {
            return Err(MemoryError::OutOfRange { gpa: at, len });
        }
        self.memory.write(at, table)?;
        self.next = at + len;
        Ok(at)
    }
}

#[cfg(test)]
mod tests;
