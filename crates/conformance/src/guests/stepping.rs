//! Debug traps at instructions that are special: repeated strings, loads of SS, bytes that are read and written.

use crate::{Expected::Reports, asm::guest};

guest! {
    /// A repeated string instruction is stepped iteration by iteration (Intel SDM vol. 3, 18.3.1.4).
    stepping repeated_strings, Long, Reports(&[2, 0, 1, 0, 0, 2, 0x77]),
    r#"
        HANDLER 1, 28f
        lea rsi, [rip + 22f]
        mov edi, 0x20000
        mov ecx, 3
        cld
        pushfq
        or dword ptr [rsp], 0x100
        popfq
    22: rep movsb
        REPORT 0x77
        DONE
    28: REPORT ecx
        mov rax, [rsp + 8]
        lea rdx, [rip + 22b]
        sub rax, rdx
        REPORT eax
        test ecx, ecx
        jnz 29f
        and dword ptr [rsp + 24], 0xfffffeff
    29: add rsp, 8
        iretq
    "#,
    emulator_errs: Some("steps a repeated string instruction as one"),
}

guest! {
    /// MOV SS has no trap of its own: the next comes behind the instruction after it (Intel SDM vol. 3, 7.8.3).
    stepping loads_of_ss, Long, Reports(&[1, 0, 3, 0xffff_4ff0, 0x51]),
    r#"
        mov ebx, 0x18
        lea r14, [rip + 22f]
        lea r15, [rip + 23f]
        pushfq
        or dword ptr [rsp], 0x100
        popfq
    22: mov ss, ebx
        nop
    23: REPORT 0x51
        DONE
    "#,
    emulator_errs: Some("traps behind a load of SS"),
}

guest! {
    /// A data breakpoint that a load of SS meets is held back with everything else (Intel SDM vol. 3, 7.8.3): it traps
    /// behind the next instruction, and where that is INT n, in front of the handler's first one.
    stepping watched_stacks, Long,
    Reports(&[1, 0, 3, 0xffff_0ff2, 0x51, 1, 0, 0, 0xffff_0ff2, 0x52, 6, 0, 0, 0x53, 1, 0, 0, 0xffff_0ff3, 0x54, 1, 0, 0, 0xffff_0ff2, 0x55]),
    r#"
        mov ebx, 0x20000
        mov qword ptr [rbx], 0x18
        mov dr1, rbx
        mov eax, 0x00300404
        mov dr7, rax
        lea r14, [rip + 22f]
        lea r15, [rip + 23f]
    22: mov ss, [rbx]
        nop
    23: REPORT 0x51
        // INT n: its gate's address is the one that is saved
        lea rax, [rip + 24f]
        mov [0x2000 + 16 * 0x30], ax
        shr eax, 16
        mov [0x2000 + 16 * 0x30 + 6], ax
        lea r14, [rip + 24f]
        lea r15, [rip + 25f]
        mov ss, [rbx]
        int 0x30
    24: nop
        REPORT 0xbad
    25: REPORT 0x52
        // a fault drops it
        lea r14, [rip + 26f]
        lea r15, [rip + 27f]
        mov ss, [rbx]
    26: ud2
    27: REPORT 0x53
        // a breakpoint at the instruction itself comes with it
        lea rax, [rip + 28f]
        mov dr0, rax
        mov eax, 0x00300405
        mov dr7, rax
        lea r14, [rip + 28f]
        lea r15, [rip + 29f]
        mov ss, [rbx]
    28: nop
        REPORT 0xbad
    29: REPORT 0x54
        // and so it does with INT1
        lea r14, [rip + 30f]
        lea r15, [rip + 31f]
        mov ss, [rbx]
        .byte 0xf1
    30: nop
        REPORT 0xbad
    31: REPORT 0x55
        DONE
    "#,
    emulator_errs: Some("has no data breakpoints"),
}

guest! {
    /// A breakpoint for writes of one byte, met by an instruction that reads, changes and writes it, locked and not.
    stepping changed_bytes, Long,
    Reports(&[1, 0, 2, 0xffff_0ff2, 1, 0, 3, 0xffff_0ff2, 1, 0, 2, 0xffff_0ff2, 3]),
    r#"
        mov ebx, 0x20000
        mov dr1, rbx
        mov eax, 0x00100404
        mov dr7, rax
        lea r14, [rip + 22f]
        lea r15, [rip + 23f]
    22: inc byte ptr [rbx]
        nop
    23: lea r14, [rip + 24f]
        lea r15, [rip + 25f]
    24: lock inc byte ptr [rbx]
        nop
    25: mov al, 3
        lea r14, [rip + 26f]
        lea r15, [rip + 27f]
    26: xchg [rbx], al
        nop
    27: movzx eax, byte ptr [rbx]
        REPORT eax
        DONE
    "#,
    emulator_errs: Some("has no data breakpoints"),
}
