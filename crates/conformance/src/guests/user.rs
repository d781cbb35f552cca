//! Ring 3: there and back, faults from there, SYSCALL, I/O permissions, stacks.

use crate::{Expected::Reports, asm::guest};

guest! {
    /// IRETQ to ring 3 and a software interrupt back: selectors, stacks, flags.
    user there_and_back, Long,
    Reports(&[0x33, 0x2b, 0x4005_0000, 0x202, 0x10, 0x38000, 0x33, 0x2b, 0x246, 0x4005_0000, 0x3a000]),
    r#"
        TO_USER
        mov eax, cs
        REPORTU eax
        mov eax, ss
        REPORTU eax
        mov eax, esp
        REPORTU eax
        pushfq
        pop rax
        and eax, 0x3302
        REPORTU eax
        TO_KERNEL
        mov eax, cs
        REPORT eax
        mov eax, esp
        REPORT eax
        // and with a look at the frame
        HANDLER 4, 22f
        TO_USER
        int 4
    22: mov eax, [rsp + 16]
        REPORT eax
        mov eax, [rsp + 40]
        REPORT eax
        mov eax, [rsp + 24]
        and eax, 0xfff7ffff
        REPORT eax
        mov eax, [rsp + 32]
        REPORT eax
        lea rax, [rsp + 48]
        REPORT eax
        DONE
    "#
}

guest! {
    /// What ring 3 may not do: privileged instructions, supervisor pages. Divisions and UD2.
    user faults, Long,
    Reports(&[
        0x30d, 0, 0, 0x30d, 0, 0, 0x30d, 0, 0, 0x30d, 0, 0, 0x30d, 0, 0, //
        0x30e, 5, 0, 0x20000, 0x30e, 7, 0, 0x20000, 0x30e, 0x15, 0, 0x20000, 0x30e, 4, 0, 0x4100_0000, //
        0x300, 0, 0, 0x306, 0, 0, 0x303, 0, 1, 0x304, 0, 2, 0x30d, 0, 0, 0x30d, 0x10, 0, 0x77,
    ]),
    r#"
        mov qword ptr [0xf000 + 8 * 8], 0 // 0x41000000 is not mapped
        TO_USER
        CATCH hlt
        CATCH mov rax, cr0
        CATCH invlpg [rax]
        mov ecx, 0x1b
        CATCH rdmsr
        CATCH lidt [rsp]
        mov ebx, 0x20000
        CATCH mov eax, [rbx]
        CATCH mov [rbx], eax
        mov r14, rbx
        lea r15, [rip + 22f]
        jmp rbx
    22: mov ebx, 0x41000000
        CATCH mov eax, [rbx]
        xor ecx, ecx
        CATCH div ecx
        CATCH ud2
        CATCH int3
        CATCH int 4
        mov rbx, 0x800000000000
        CATCH mov eax, [rbx]
        mov eax, 0x10 // a code segment of ring 0
        CATCH mov ds, eax
        TO_KERNEL
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// #MF at the next waiting instruction, #XM at the instruction itself, #DB by TF.
    user fpu_and_simd_faults, Long,
    Reports(&[
        0x310, 0, 0, 0xb084, 0x313, 0, 0, 0x1d84, 0x301, 0, 1, 0xffff_4ff0, 0x77,
    ]),
    r#"
        TO_USER
        fninit
        push 0x37b // zero-divide unmasked
        fldcw [rsp]
        fld1
        fldz
        fdivp
        CATCH fwait
        fnstsw ax
        and eax, 0xff84
        REPORTU eax
        fninit
        push 0x1d80 // zero-divide unmasked
        ldmxcsr [rsp]
        mov eax, 0x3f800000
        movd xmm0, eax
        xorps xmm1, xmm1
        CATCH divss xmm0, xmm1
        stmxcsr [rsp]
        mov eax, [rsp]
        REPORTU eax
        lea r14, [rip + 22f]
        lea r15, [rip + 23f]
        pushfq
        or dword ptr [rsp], 0x100
        popfq
    22: nop
    23: REPORTU 0x77
        TO_KERNEL
        DONE
    "#
}

guest! {
    /// CR0.TS: #NM at the first FPU or SSE instruction; MOV and integer instructions go on.
    user device_not_available, Long, Reports(&[0x307, 0, 0, 0x307, 0, 0, 0x307, 0, 0, 0x77]),
    r#"
        mov rax, cr0
        or eax, 8
        mov cr0, rax
        TO_USER
        CATCH fld1
        CATCH paddb xmm0, xmm1
        CATCH fwait
        TO_KERNEL
        clts
        TO_USER
        fninit
        fld1
        paddb xmm0, xmm1
        fwait
        TO_KERNEL
        REPORT 0x77
        DONE
    "#,
    emulator_errs: Some("ignores CR0.TS in ring 3"),
}

guest! {
    /// #AC only with CR0.AM, EFLAGS.AC and in ring 3.
    user alignment_check, Long,
    Reports(&[0x1, 0x311, 0, 0, 0x311, 0, 0, 0x2, 0x3]),
    r#"
        mov rax, cr0
        or eax, 0x40000
        mov cr0, rax
        TO_USER
        mov ebx, 0x40020001
        mov eax, [rbx] // no AC yet
        REPORTU 1
        pushfq
        or dword ptr [rsp], 0x40000
        popfq
        CATCH mov eax, [rbx]
        CATCH mov word ptr [rbx + 2], ax
        mov al, [rbx] // bytes are always aligned
        mov eax, [rbx + 3]
        pushfq
        and dword ptr [rsp], 0xfffbffff
        popfq
        REPORTU 2
        TO_KERNEL
        pushfq
        or dword ptr [rsp], 0x40000
        popfq
        mov eax, [0x20001] // ring 0 is not checked
        pushfq
        and dword ptr [rsp], 0xfffbffff
        popfq
        REPORT 3
        DONE
    "#
}

guest! {
    /// SYSCALL and SYSRET: RCX and R11, the flag mask, selectors; SYSRET with 32-bit operands.
    user syscall_sysret, Long,
    Reports(&[0x10, 0x18, 0xa02, 2, 0x55, 0x33, 0x2b, 0xa02, 0x66, 0x20 + 3, 0x2b]),
    r#"
        mov ecx, 0xc0000081 // STAR
        xor eax, eax
        mov edx, 0x00230010
        wrmsr
        mov ecx, 0xc0000082 // LSTAR
        lea rax, [rip + 22f]
        xor edx, edx
        wrmsr
        mov ecx, 0xc0000084 // SFMASK: IF, DF, IOPL, OF
        mov eax, 0x3e00
        wrmsr
        TO_USER
        pushfq
        or dword ptr [rsp], 0x800 // OF
        popfq
        mov edi, 1
        syscall
    23: mov ebx, 0x55 // keeps flags
        pushfq
        pop rbp
        REPORTU ebx
        mov eax, cs
        REPORTU eax
        mov eax, ss
        REPORTU eax
        and ebp, 0x3f02
        REPORTU ebp
        mov edi, 2
        syscall
    22: cmp edi, 2
        je 24f
        cmp edi, 1
        jne 25f
        mov eax, cs
        REPORT eax
        mov eax, ss
        REPORT eax
        mov eax, r11d
        and eax, 0x3f02
        REPORT eax
        pushfq
        pop rax
        and eax, 0x3f02
        REPORT eax
        sysretq
    24: // return to compatibility mode
        REPORT 0x66
        mov rsp, 0x40050000
        lea rcx, [rip + 26f + 0x40000000]
        mov r11d, 0x3202
        .byte 0x0f, 0x07
    .code32
    26: mov eax, cs
        REPORTX eax
        mov eax, ss
        REPORTX eax
        DONE
    .code64
    25: REPORT 0xbad
        DONE
    "#,
    emulator_errs: Some("has no SYSCALL"),
}

guest! {
    /// Port I/O in ring 3 by IOPL and by the TSS's bit map; CLI and POPF by IOPL.
    user io_permission, Long,
    Reports(&[
        0x30d, 0, 0, 0x30d, 0, 0, 0x30d, 0, 0, 0x30d, 0, 0, 0x202, 0x1_0510, 0x42, 0x3002, //
        0x30d, 0, 0, 0x1_0511, 0x43, 0x30d, 0, 0,
    ]),
    r#"
        HANDLER 0x82, 22f
        mov byte ptr [0x2000 + 16 * 0x82 + 5], 0xee
        TO_USER
        // IOPL 0, no bit map
        mov dx, 0x510
        CATCH out dx, al
        CATCH in al, 0x71
        CATCH insb
        CATCH cli
        pushfq
        and dword ptr [rsp], 0xfffffdff // POPF does not change IF
        popfq
        pushfq
        pop rax
        and eax, 0x3202
        REPORTU eax
        int 0x82 // IOPL 3
        mov al, 0x42
        out dx, al
        cli
        pushfq
        pop rax
        and eax, 0x3202
        REPORTU eax
        TO_KERNEL
        // a bit map that allows 0x511 alone: bit 1 of byte 0xa2
        mov word ptr [0x1866], 0x68
        mov edi, 0x1868
        mov ecx, 0x100
        mov al, 0xff
        rep stosb
        mov byte ptr [0x1868 + 0xa2], 0xfd
        mov word ptr [0x1040], 0x168
        mov byte ptr [0x1045], 0x89
        mov eax, 0x40
        ltr ax
        TO_USER
        mov dx, 0x510
        CATCH out dx, al
        inc edx
        mov al, 0x43
        out dx, al
        CATCH out dx, ax // two bytes: both must be allowed
        TO_KERNEL
        DONE
    22: or dword ptr [rsp + 24], 0x3000
        add rsp, 8
        iretq
    "#,
    emulator_errs: Some("lets ring 3 do no port I/O, and hardly any INT n"),
}

guest! {
    /// Gates of ring 0 are closed to INT n, and ring 3 has its own.
    user gates, Long, Reports(&[0x30d, 0x182, 0, 0x81, 0x33, 0x77]),
    r#"
        HANDLER 0x81, 22f
        mov byte ptr [0x2000 + 16 * 0x81 + 5], 0xee
        TO_USER
        CATCH int 0x30
        int 0x81
        TO_KERNEL
        REPORT 0x77
        DONE
    22: REPORT 0x81
        mov eax, [rsp + 16]
        REPORT eax
        add rsp, 8
        iretq
    "#,
    emulator_errs: Some("lets ring 3 do hardly any INT n"),
}

guest! {
    /// RSP0 for interrupts from ring 3, none for those from ring 0, IST for both; RSP is aligned to 16.
    user stack_switch, Long,
    Reports(&[0x39f00, 0x3e000, 0x37ff0, 0x3e000]),
    r#"
        HANDLER 4, 22f
        HANDLER 0x83, 22f
        mov byte ptr [0x2000 + 16 * 0x83 + 4], 2
        mov dword ptr [0x1804], 0x39f08
        TO_USER
        int 4
        mov r13, 1
        int 4
    22: lea rax, [rsp + 48]
        REPORT eax
        cmp r13d, 1
        je 23f
        mov byte ptr [0x2000 + 16 * 4 + 4], 2
        add rsp, 8
        iretq
    23: mov byte ptr [0x2000 + 16 * 4 + 4], 0
        mov r13, 2
        mov rsp, 0x37ff7
        int 4
        int 0x83
        DONE
    "#
}

guest! {
    /// A null selector has no RPL any more after a return to ring 3; what FS has for a base stays.
    user null_selectors, Long, Reports(&[0, 0, 0, 0, 0x1234]),
    r#"
        mov ecx, 0xc0000100 // FS base
        mov eax, 0x40020000
        xor edx, edx
        mov qword ptr [rax], 0x1234
        mov ebx, 3
        mov ds, ebx
        mov es, ebx
        mov fs, ebx
        mov gs, ebx
        wrmsr
        TO_USER
        mov eax, ds
        REPORTU eax
        mov eax, es
        REPORTU eax
        mov eax, fs
        REPORTU eax
        mov eax, gs
        REPORTU eax
        mov eax, fs:[0]
        REPORTU eax
        TO_KERNEL
        DONE
    "#
}

guest! {
    /// What SYSCALL and SYSRET do changes with SFMASK, STAR, EFER.SCE and CR4.TSD after they were used.
    user calls_change, Long, Reports(&[0, 0x10, 0x400, 0x10, 0x400, 0x40, 0x400, 0x10, 6, 0, 0, 0x30d, 0, 0, 0x77]),
    r#"
        .macro MSR index, high, low
            mov ecx, \index
            mov edx, \high
            mov eax, \low
            wrmsr
        .endm
        .macro CALLS
            std
            syscall
            cld
            and ebx, 0x400
            REPORT ebx
            REPORT ebp
        .endm
        MSR 0xc0000084, 0, 0x43e00
        MSR 0xc0000081, 0x00230010, 0
        mov ecx, 0xc0000082
        lea rax, [rip + 22f]
        xor edx, edx
        wrmsr
        jmp 23f
    22: pushfq
        pop rbx
        mov ebp, cs
        jmp rcx
    23: CALLS
        MSR 0xc0000084, 0, 0x40200
        CALLS
        MSR 0xc0000081, 0x00230040, 0
        CALLS
        MSR 0xc0000081, 0x00230010, 0
        CALLS
        mov ecx, 0xc0000080
        rdmsr
        btr eax, 0
        wrmsr
        CATCH syscall
        mov ecx, 0xc0000080
        rdmsr
        bts eax, 0
        wrmsr
        mov edi, 2
        mov [0x7800], rsp
    24: mov rsp, 0x40050000
        lea rcx, [rip + 26f + 0x40000000]
        mov r11d, 0x202
        .byte 0x48, 0x0f, 0x07
    26: CATCH rdtsc
        xor r14d, r14d
        xor r15d, r15d
        TO_KERNEL
        mov rax, cr4
        bts rax, 2
        mov cr4, rax
        dec edi
        jnz 24b
        REPORT 0x77
        .purgem MSR
        .purgem CALLS
        DONE
    "#,
    emulator_errs: Some("lets ring 3 read the TSC while CR4.TSD is set"),
}
