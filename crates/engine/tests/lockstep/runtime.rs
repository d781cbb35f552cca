//! What the guests of [`super::loops`] have besides their loops: ways into functions and back, and handlers.
#![allow(unsafe_code)]

/// Where it is loaded, and where its variables are.
pub const RUNTIME: u64 = 0x4000;
/// The next event; below it, the stack pointer to go back to and counters.
pub const CURSOR: u64 = 0x6040;
/// Instructions that are stepped through.
pub const STEPS: u64 = 0x6048;
/// Ranges of linear addresses whose entries the handler of #PF mends: start, end, the first entry's offset from the
/// root of the page tables (or its address and 1), the pages' size as a power of two; the last has no end.
pub const RANGES: u64 = 0x6100;
/// Addresses of the routines that events are.
pub const EVENTS: u64 = 0x6800;
pub const EVENT_COUNT: usize = 256;

/// Entries, each at a multiple of 64 bytes.
pub mod entry {
    /// Calls RAX.
    pub const CALL: u64 = 0;
    /// Calls RAX with user privilege and the stack at RBX.
    pub const CALL_USER: u64 = 1;
    /// Back to who did: any other exception, and the way back from user mode.
    pub const BACK: u64 = 2;
    pub const DEBUG: u64 = 3;
    pub const ALIGNMENT: u64 = 4;
    pub const EVENT: u64 = 5;
    pub const PAGE_FAULT: u64 = 8;
}

std::arch::global_asm!(
    ".pushsection .rodata.vireo_lockstep, \"a\"",
    ".global vireo_lockstep_runtime, vireo_lockstep_runtime_end",
    ".hidden vireo_lockstep_runtime, vireo_lockstep_runtime_end",
    ".p2align 9",
    "vireo_lockstep_runtime:",
    // CALL
    "mov [0x6000], rsp",
    "call rax",
    "ret",
    ".p2align 6",
    // CALL_USER
    "mov [0x6000], rsp",
    "push 0x1b",
    "push rbx",
    "push rcx",
    "push 0x23",
    "push rax",
    "iretq",
    ".p2align 6",
    // BACK
    "20: inc qword ptr [0x6010]",
    "mov rsp, [0x6000]",
    "ret",
    ".p2align 6",
    // DEBUG: a few steps are counted, then the flag goes
    "inc qword ptr [0x6018]",
    "dec qword ptr [0x6048]",
    "jns 21f",
    "and dword ptr [rsp + 0x10], 0xfffffeff",
    "21: iretq",
    ".p2align 6",
    // ALIGNMENT: it is not checked any more
    "inc qword ptr [0x6020]",
    "and dword ptr [rsp + 0x18], 0xfffbffff",
    "add rsp, 8",
    "iretq",
    ".p2align 6",
    // EVENT: the next one; it may use RAX to RBX, and finds the saved RFLAGS at [RSP + 0x38]
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "mov rax, [0x6040]",
    "inc rax",
    "movzx eax, al",
    "mov [0x6040], rax",
    "call qword ptr [0x6800 + rax * 8]",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "iretq",
    ".p2align 6",
    ".p2align 9",
    // PAGE_FAULT: [RSP + 0x20] is the error code
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "mov rax, cr2",
    "mov ebx, 0x6100",
    "22: mov rdx, [rbx + 8]",
    "test rdx, rdx",
    "jz 29f",
    "cmp rax, [rbx]",
    "jb 23f",
    "cmp rax, rdx",
    "jbe 24f",
    "23: add ebx, 32",
    "jmp 22b",
    // RDX becomes the address of the entry
    "24: sub rax, [rbx]",
    "mov rcx, [rbx + 24]",
    "shr rax, cl",
    "mov rcx, [rbx + 16]",
    "xor edx, edx",
    "test cl, 1",
    "jnz 30f",
    "mov rdx, cr3",
    "and rdx, -4096",
    "30: and rcx, -2",
    "add rdx, rcx",
    "lea rdx, [rdx + rax * 8]",
    "mov rax, [rdx]",
    // a fetch, or a user's of what is the kernel's
    "test byte ptr [rsp + 0x20], 0x10",
    "jnz 29f",
    "test byte ptr [rsp + 0x20], 4",
    "jz 25f",
    "test al, 4",
    "jz 29f",
    "25: test al, 1",
    "jnz 26f",
    "or qword ptr [rdx], 1",
    "jmp 28f",
    "26: test byte ptr [rsp + 0x20], 2",
    "jz 27f",
    "test al, 2",
    "jnz 27f",
    "or qword ptr [rdx], 2",
    "jmp 28f",
    // the kernel's of what is the user's: RFLAGS.AC
    "27: test byte ptr [rsp + 0x20], 4",
    "jnz 29f",
    "test al, 4",
    "jz 29f",
    "test dword ptr [rsp + 0x38], 0x40000",
    "jnz 29f",
    "or dword ptr [rsp + 0x38], 0x40000",
    "28: mov rax, cr2",
    "invlpg [rax]",
    "inc qword ptr [0x6028]",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 8",
    "iretq",
    "29: inc qword ptr [0x6030]",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "inc qword ptr [0x6010]",
    "mov rsp, [0x6000]",
    "ret",
    "vireo_lockstep_runtime_end:",
    ".popsection",
);

unsafe extern "C" {
    static vireo_lockstep_runtime: u8;
    static vireo_lockstep_runtime_end: u8;
}

pub fn code() -> &'static [u8] {
    // SAFETY: two labels of the section above, the second behind the first.
    unsafe {
        let (start, end) = (&raw const vireo_lockstep_runtime, &raw const vireo_lockstep_runtime_end);
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}
