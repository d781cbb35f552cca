//! The guest-physical memory map and the port map: every address that more than one part must agree on.
//!
//! ```text
//! 0x0000_0000  RAM (boot structures below 640 KiB, ACPI and SMBIOS tables in the BIOS area)
//! 0xC000_0000  32-bit window for PCI BARs            (end of low RAM at the latest)
//! 0xE000_0000  PCI ECAM, 1 MiB for bus 0
//! 0xFEC0_0000  IOAPIC
//! 0xFEE0_0000  local APICs, MSI
//! 0x1_0000_0000  the rest of RAM
//! 0x80_0000_0000 64-bit window for PCI BARs
//! ```

use vireo_memory::HIGH_RAM_START;

/// Low RAM ends here at the latest; what a guest has more starts at [`HIGH_RAM_START`].
pub const LOW_RAM_LIMIT: u64 = PCI_MMIO32_START;
pub const PCI_MMIO32_START: u64 = 0xc000_0000;
pub const PCI_MMIO32_BYTES: u64 = 0x2000_0000;
/// Configuration space, memory-mapped (PCI Express base specification, 7.2.2).
pub const PCI_ECAM_START: u64 = 0xe000_0000;
/// One bus: 32 devices of 8 functions of 4 KiB.
pub const PCI_ECAM_BYTES: u64 = 1 << 20;
pub const IOAPIC_START: u64 = 0xfec0_0000;
pub const IOAPIC_PINS: u32 = 24;
pub const LOCAL_APIC_START: u64 = 0xfee0_0000;
pub const PCI_MMIO64_START: u64 = 0x80_0000_0000;
pub const PCI_MMIO64_BYTES: u64 = 64 << 30;
/// The most RAM a guest can have: the 64-bit PCI window starts where it would end.
pub const MAX_RAM_BYTES: u64 = PCI_MMIO64_START - HIGH_RAM_START;

pub const COM1_PORT: u16 = 0x3f8;
pub const COM1_PIN: u32 = 4;
pub const RTC_PORT: u16 = 0x70;
pub const RTC_PIN: u32 = 8;
/// `SLEEP_CONTROL_REG` and `SLEEP_STATUS_REG` of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// `RESET_REG` and the value that resets (ACPI 6.5, 4.8.3.6).
pub const RESET_PORT: u16 = 0x604;
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of S5, power off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// `pvpanic`, a port through which a kernel says that it panicked.
pub const PANIC_PORT: u16 = 0x505;

/// The boot GDT; gone as soon as the kernel loads its own.
pub const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info`, its module list and memory map (PVH boot).
pub const PVH_START_INFO: u64 = 0x6000;
/// `boot_params`, the "zero page" (Linux boot protocol).
pub const ZERO_PAGE: u64 = 0x7000;
/// PML4, PDPT and four page directories: the first 4 GiB mapped one to one.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// A stack for the first instructions of a kernel that relies on one.
pub const BOOT_STACK: u64 = 0x1_fff0;
pub const CMDLINE_START: u64 = 0x2_0000;
pub const CMDLINE_MAX_BYTES: u64 = 0x1_0000;
/// End of the RAM below 640 KiB that is the guest's to use; above would be the EBDA.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// RSDP, then all other ACPI tables.
pub const ACPI_START: u64 = 0xe_0000;
pub const ACPI_BYTES: u64 = 0x1_0000;
/// The SMBIOS entry point, searched for by kernels in 0xF0000..0x100000, then its table.
pub const SMBIOS_START: u64 = 0xf_0000;
pub const SMBIOS_BYTES: u64 = 0x1_0000 - 16;
/// Where a processor starts in real mode, in the last 16 bytes of the first MiB.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM begins again above the BIOS area, and the lowest address a kernel may be loaded to.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
