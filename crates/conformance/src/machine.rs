//! The world a guest finds.
//!
//! | address | what |
//! |---|---|
//! | 0x1000 | GDT (selectors below), TSS at 0x1800 |
//! | 0x2000 | IDT: 256 gates to the runtime's stubs |
//! | 0x3000–0x6fff | PML4, PDPT, page directory, page table: the first 2 MiB in 4 KiB pages, supervisor |
//! | 0x7000 | handler table: 256 addresses, 0 for the runtime's own; 0x7800: kernel RSP while in ring 3 |
//! | 0x8000 | exception runtime |
//! | 0x10000 | the guest (up to 64 KiB) |
//! | 0x20000–0x2ffff | free data |
//! | 0x38000, 0x3a000, 0x3c000, 0x3e000 | tops of the first stack, RSP0, IST1, IST2 |
//! | 0x50000 | top of the ring-3 stack (at 0x40050000 in the user alias) |
//! | 0x60000–0x9ffff | free |
//! | 2–8 MiB | free, mapped in 2 MiB pages |
//! | 0x40000000 | user alias of the first 8 MiB, 2 MiB pages |
//! | 0xc0000000 | MMIO that records writes (long mode) |
//! | 0xfee00000 | local APIC, uncached (long mode) |

use vireo_cpu::{CpuState, DescriptorTable, Segment};
use vireo_memory::{GuestMemory, MemoryError};

use crate::{Guest, Start, asm::code};

pub const RAM_BYTES: u64 = 8 << 20;
pub const CODE: u64 = 0x10000;
pub const MMIO: u64 = 0xc000_0000;

const GDT: u64 = 0x1000;
const TSS: u64 = 0x1800;
const IDT: u64 = 0x2000;
const PML4: u64 = 0x3000;
const PDPT: u64 = 0x4000;
const PD: u64 = 0x5000;
const PT: u64 = 0x6000;
const RUNTIME: u64 = 0x8000;
const PD_HIGH: u64 = 0xe000;
const PD_USER: u64 = 0xf000;
const STACK: u64 = 0x38000;

const PRESENT_WRITABLE: u64 = 3;
const USER: u64 = 4;
const UNCACHED: u64 = 0x18;
const LARGE: u64 = 0x80;

/// Descriptors by selector / 8.
#[rustfmt::skip]
const DESCRIPTORS: &[u64] = &[
    0,
    0x00cf_9b00_0000_ffff, // 08 code, 32-bit
    0x00af_9b00_0000_ffff, // 10 code, 64-bit
    0x00cf_9300_0000_ffff, // 18 data
    0x00cf_fb00_0000_ffff, // 20 user code, 32-bit
    0x00cf_f300_0000_ffff, // 28 user data
    0x00af_fb00_0000_ffff, // 30 user code, 64-bit
    0x00cf_f300_0000_ffff, // 38 user data again (SYSEXIT wants it here)
    0, 0,                  // 40 TSS: see `load`
    0x00cf_1300_0000_ffff, // 50 data, not present
    0x0000_9b01_0000_ffff, // 58 code, 16-bit, base 0x10000
    0x0000_9301_0000_ffff, // 60 data, 16-bit, base 0x10000
    0x0040_9300_0000_0fff, // 68 data, limit 0xfff
    0x0040_9702_0000_0fff, // 70 data, expand-down above 0xfff, base 0x20000
    0x0040_9102_0000_0fff, // 78 data, read-only, base 0x20000, limit 0xfff
    0, 0,                  // 80, 88: for the guest
];

code!(
    runtime_long,
    "runtime_long",
    r#"
    // One stub for each vector: a zero where the processor pushes no error code, then the vector.
    .set vector, 0
    .rept 256
        .p2align 4, 0x90
        .if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
            push 0
        .endif
        .byte 0x68
        .long vector
        jmp 20f
        .set vector, vector + 1
    .endr
    .p2align 4, 0x90
20:
    push rax
    push rdx
    push rcx
    mov rcx, [rsp + 24]
    mov rax, [0x7000 + rcx * 8]
    test rax, rax
    jz 21f
    mov [rsp + 24], rax
    pop rcx
    pop rdx
    pop rax
    ret
21: // no handler of the guest's own
    test r15, r15
    jnz 28f
    cmp ecx, 4
    je 25f
    jmp 26f
28:
    mov edx, 0x500
    mov eax, [rsp + 48]
    and eax, 3
    shl eax, 8
    or eax, ecx
    out dx, eax
    mov eax, [rsp + 32]
    out dx, eax
    mov rax, [rsp + 40]
    sub rax, r14
    out dx, eax
    cmp ecx, 14
    jne 22f
    mov rax, cr2
    out dx, eax
22: cmp ecx, 1
    jne 23f
    mov rax, dr6
    out dx, eax
    mov eax, 0xffff0ff0
    mov dr6, rax
23: mov [rsp + 40], r15
    xor r15d, r15d
    and dword ptr [rsp + 56], 0xfffefeff
    pop rcx
    pop rdx
    pop rax
    add rsp, 16
    iretq
25: // REPORTU, or TO_KERNEL where R13 has an address
    test r13, r13
    jnz 27f
    mov edx, 0x500
    mov eax, [rsp + 16]
    out dx, eax
    pop rcx
    pop rdx
    pop rax
    add rsp, 16
    iretq
27: pop rcx
    pop rdx
    pop rax
    mov rsp, [0x7800]
    jmp r13
26: // not expected
    mov edx, 0x500
    mov eax, ecx
    or eax, 0xdead0000
    out dx, eax
    mov eax, [rsp + 32]
    out dx, eax
    mov eax, [rsp + 40]
    out dx, eax
    mov rax, cr2
    out dx, eax
    DONE
"#
);

code!(
    runtime_protected,
    "runtime_protected",
    r#"
    .code32
    .set vector, 0
    .rept 256
        .p2align 4, 0x90
        .if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
            push 0
        .endif
        .byte 0x68
        .long vector
        jmp 20f
        .set vector, vector + 1
    .endr
    .p2align 4, 0x90
20: // stack: DS, eight registers, vector, error code, EIP, CS, EFLAGS
    pushad
    .byte 0x1e // PUSH DS: of 32 bits, which the assembler does not choose
    push 0x18
    .byte 0x1f
    mov ecx, [esp + 36]
    mov eax, [0x7000 + ecx * 8]
    test eax, eax
    jz 21f
    mov [esp + 36], eax
    .byte 0x1f
    popad
    ret
21: test edi, edi
    jnz 28f
    cmp ecx, 4
    je 25f
    jmp 26f
28:
    mov edx, 0x500
    mov eax, [esp + 48]
    and eax, 3
    shl eax, 8
    or eax, ecx
    out dx, eax
    mov eax, [esp + 40]
    out dx, eax
    mov eax, [esp + 44]
    sub eax, esi
    out dx, eax
    cmp ecx, 14
    jne 22f
    mov eax, cr2
    out dx, eax
22: cmp ecx, 1
    jne 23f
    mov eax, dr6
    out dx, eax
    mov eax, 0xffff0ff0
    mov dr6, eax
23: mov [esp + 44], edi
    mov dword ptr [esp + 4], 0
    and dword ptr [esp + 52], 0xfffefeff
    .byte 0x1f
    popad
    add esp, 8
    iretd
25: // from ring 3: a report of EAX, or back to ring 0 at EBX
    test ebx, ebx
    jnz 29f
    mov eax, [esp + 32]
    mov edx, 0x500
    out dx, eax
    .byte 0x1f
    popad
    add esp, 8
    iretd
29: mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov esp, [0x7800]
    jmp ebx
26: mov edx, 0x500
    mov eax, ecx
    or eax, 0xdead0000
    out dx, eax
    mov eax, [esp + 40]
    out dx, eax
    mov eax, [esp + 44]
    out dx, eax
    mov eax, cr2
    out dx, eax
    mov edx, 0x501
    out dx, al
27: hlt
    jmp 27b
"#
);

/// Fills memory for the guest; returns the state its boot processor starts in.
pub fn load(memory: &GuestMemory, guest: &Guest) -> Result<CpuState, MemoryError> {
    memory.write(CODE, guest.code)?;
    for (i, descriptor) in DESCRIPTORS.iter().enumerate() {
        memory.write_pod(GDT + 8 * i as u64, *descriptor)?;
    }
    memory.write_pod(GDT + 0x40, 0x0000_8900_0000_0067 | (TSS & 0xff_ffff) << 16)?;
    match guest.start {
        Start::Real => Ok(real()),
        Start::Protected => {
            load_protected(memory)?;
            Ok(protected())
        }
        Start::Long => {
            load_long(memory)?;
            Ok(long())
        }
    }
}

fn load_long(memory: &GuestMemory) -> Result<(), MemoryError> {
    memory.write(RUNTIME, runtime_long())?;
    for vector in 0..256 {
        let handler = RUNTIME + 16 * vector;
        // INT3, INTO (which also serves as the call into ring 0) and 0x80 are for ring 3 too; double faults have a stack of their own.
        let dpl = if [3, 4, 0x80].contains(&vector) { 3 } else { 0 };
        let ist = if vector == 8 { 1 } else { 0 };
        let gate = handler & 0xffff | 0x10 << 16 | ist << 32 | (0x8e00 | dpl << 13) << 32 | (handler >> 16) << 48;
        memory.write_pod(IDT + 16 * vector, gate)?;
    }
    // TSS, 64-bit: RSP0 at 4, IST1 and IST2 at 36 and 44, I/O map beyond the limit
    memory.write_pod(TSS + 4, 0x3a000u64)?;
    memory.write_pod(TSS + 36, 0x3c000u64)?;
    memory.write_pod(TSS + 44, 0x3e000u64)?;
    memory.write_pod(TSS + 102, 0x68u16)?;

    memory.write_pod(PML4, PDPT | PRESENT_WRITABLE | USER)?;
    memory.write_pod(PDPT, PD | PRESENT_WRITABLE)?;
    memory.write_pod(PDPT + 8, PD_USER | PRESENT_WRITABLE | USER)?;
    memory.write_pod(PDPT + 24, PD_HIGH | PRESENT_WRITABLE)?;
    memory.write_pod(PD, PT | PRESENT_WRITABLE)?;
    for i in 0..512 {
        memory.write_pod(PT + 8 * i, i << 12 | PRESENT_WRITABLE)?;
    }
    for i in 0..4 {
        memory.write_pod(PD_USER + 8 * i, i << 21 | PRESENT_WRITABLE | USER | LARGE)?;
    }
    for i in 1..4 {
        memory.write_pod(PD + 8 * i, i << 21 | PRESENT_WRITABLE | LARGE)?;
    }
    let device = |at: u64| at | PRESENT_WRITABLE | UNCACHED | LARGE;
    memory.write_pod(PD_HIGH, device(MMIO))?;
    memory.write_pod(PD_HIGH + 8 * 503, device(0xfee0_0000))
}

fn load_protected(memory: &GuestMemory) -> Result<(), MemoryError> {
    memory.write(RUNTIME, runtime_protected())?;
    for vector in 0..256 {
        let handler = RUNTIME + 16 * vector;
        let dpl = if [3, 4, 0x80].contains(&vector) { 3 } else { 0 };
        let gate = handler & 0xffff | 0x08 << 16 | (0x8e00 | dpl << 13) << 32 | (handler >> 16) << 48;
        memory.write_pod(IDT + 8 * vector, gate)?;
    }
    // TSS, 32-bit: ESP0 at 4, SS0 at 8, I/O map beyond the limit
    memory.write_pod(TSS + 4, 0x3a000u32)?;
    memory.write_pod(TSS + 8, 0x18u32)?;
    memory.write_pod(TSS + 102, 0x68u16)
}

fn real() -> CpuState {
    let mut state = CpuState::reset();
    let segment = Segment { selector: 0x1000, base: CODE, limit: 0xffff, rights: 0x93, unusable: false };
    state.segments = [segment; 6];
    state.segments[1].rights = 0x9b;
    (state.rip, state.gpr[4]) = (0, 0xf000);
    state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
    state
}

fn protected() -> CpuState {
    let mut state = tables(CpuState::reset(), 8 * 256 - 1);
    state.segments = [data(0x18); 6];
    state.segments[1] = Segment { selector: 0x08, base: 0, limit: u32::MAX, rights: 0xc09b, unusable: false };
    state.cr0 = 0x0000_0033; // ET NE PE MP
    state.cr4 = 0x600; // OSFXSR OSXMMEXCPT
    state
}

fn long() -> CpuState {
    let mut state = tables(CpuState::reset(), 16 * 256 - 1);
    state.segments = [data(0x18); 6];
    state.segments[1] = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xa09b, unusable: false };
    state.cr0 = 0x8001_0033; // PG WP ET NE PE MP
    state.cr3 = PML4;
    state.cr4 = 0x6a0; // PAE PGE OSFXSR OSXMMEXCPT
    state.efer = 0xd01; // NXE LMA LME SCE
    state
}

fn data(selector: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, rights: 0xc093, unusable: false }
}

fn tables(mut state: CpuState, idt_limit: u16) -> CpuState {
    state.gdtr = DescriptorTable { base: GDT, limit: (8 * DESCRIPTORS.len() - 1) as u16 };
    state.idtr = DescriptorTable { base: IDT, limit: idt_limit };
    state.tr = Segment { selector: 0x40, base: TSS, limit: 0x67, rights: 0x8b, unusable: false };
    (state.rip, state.gpr[4], state.rflags) = (CODE, STACK, 2);
    state
}
