//! What a guest finds where a PC's firmware has its entry point.
//!
//! Linux comes here to restart: on hardware-reduced ACPI it prefers EFI's reset, and where there is no EFI it jumps to
//! the BIOS in real mode, at F000:FFF0 (Linux `arch/x86/kernel/reboot.c`, `efi_reboot_required` and `BOOT_BIOS`).

use vireo_memory::{GuestMemory, MemoryError};

use crate::layout::{RESET_PORT, RESET_VALUE, RESET_VECTOR};

pub fn write(memory: &GuestMemory) -> Result<(), MemoryError> {
    let [low, high] = RESET_PORT.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xba, low, high,   //    mov dx, RESET_PORT
        0xb0, RESET_VALUE, //    mov al, RESET_VALUE
        0xee,              //    out dx, al
        0xf4, 0xeb, 0xfd,  // 1: hlt; jmp 1b
    ];
    memory.write(RESET_VECTOR, &code)
}
