//! 32-bit protected mode: segments with limits, gates, rings, the older kinds of paging, virtual-8086 mode.

use crate::asm::code;

const SEP: (u32, u32, usize, u32) = (1, 0, 3, 11);

/// As [`crate::asm::guest`], with macros for 32-bit code: `USER` goes on in ring 3, `KERNEL` comes back,
/// `REPORTXU` reports from there; `ADDRESS register-opcode, label` is MOV of a label's address.
macro_rules! protected_guest {
    ($(#[$doc:meta])* $name:ident, $expected:expr, $text:literal $(, $field:ident: $value:expr)* $(,)?) => {
        $(#[$doc])*
        pub fn $name() -> crate::Guest {
            mod text {
                super::code!(bytes, concat!("protected_", stringify!($name)), concat!(
                    r#"
                    .code32
                    .macro ADDRESS opcode, label
                        .byte \opcode
                        .long \label - 99b + 0x10000
                    .endm
                    .macro PAGING cr4
                        mov eax, cr4
                        or eax, \cr4
                        mov cr4, eax
                        mov eax, 0x70000
                        mov cr3, eax
                        mov eax, cr0
                        or eax, 0x80010000
                        mov cr0, eax
                        jmp 77f
                        77:
                    .endm
                    .macro NO_PAGING
                        mov eax, cr0
                        btr eax, 31
                        mov cr0, eax
                        jmp 77f
                        77:
                    .endm
                    .macro USER
                        mov [0x7800], esp
                        push 0x2b
                        push 0x50000
                        push 0x202
                        push 0x23
                        .byte 0x68
                        .long 77f - 99b + 0x10000
                        iretd
                        77: mov ebx, 0x2b
                        mov ds, ebx
                        mov es, ebx
                        xor ebx, ebx
                    .endm
                    .macro KERNEL
                        .byte 0xbb
                        .long 77f - 99b + 0x10000
                        int 4
                        77:
                    .endm
                    .macro REPORTXU value:vararg
                        push eax
                        mov eax, \value
                        xor ebx, ebx
                        int 4
                        pop eax
                    .endm
                    xor edi, edi
                    "#,
                    $text,
                    r#"
                    .purgem ADDRESS
                    .purgem PAGING
                    .purgem NO_PAGING
                    .purgem USER
                    .purgem KERNEL
                    .purgem REPORTXU
                    "#
                ));
                pub fn get() -> &'static [u8] {
                    bytes()
                }
            }
            #[allow(clippy::needless_update)]
            crate::Guest {
                $($field: $value,)*
                ..crate::Guest {
                    name: concat!("protected::", stringify!($name)),
                    code: text::get(),
                    start: crate::Start::Protected,
                    vcpus: 1,
                    expected: crate::Expected::Reports($expected),
                    needs: &[],
                    emulator_errs: None,
                }
            }
        }
    };
}

protected_guest! {
    /// Faults with their error codes in 32-bit frames.
    exceptions, &[0, 0, 0, 13, 0x1000, 0, 11, 0x50, 0, 12, 0x50, 0, 13, 0x182, 0, 0x55, 0x30d, 0, 0, 0x77],
    r#"
        xor edx, edx
        xor ecx, ecx
        CATCHX div ecx
        mov eax, 0x1003
        CATCHX mov es, eax
        mov eax, 0x50
        CATCHX mov fs, eax
        CATCHX mov ss, eax
        // a gate that is none: #GP with its index and the IDT bit
        mov byte ptr [0x2000 + 8 * 0x30 + 5], 0x80
        CATCHX int 0x30
        USER
        REPORTXU 0x55
        CATCHX hlt
        KERNEL
        REPORTX 0x77
        DONE
    "#
}

protected_guest! {
    /// INT3, INTO, BOUND, UD2.
    traps_of_old, &[3, 0, 1, 4, 0, 1, 5, 0, 0, 6, 0, 0, 0x77],
    r#"
        CATCHX int3
        mov eax, 0x7fffffff
        inc eax
        CATCHX .byte 0xce
        mov dword ptr [0x20000], 5
        mov dword ptr [0x20004], 9
        mov eax, 9
        .byte 0x62, 0x05, 0x00, 0x00, 0x02, 0x00 // BOUND EAX, [0x20000]: within
        inc eax
        CATCHX .byte 0x62, 0x05, 0x00, 0x00, 0x02, 0x00
        CATCHX ud2
        REPORTX 0x77
        DONE
    "#
}

protected_guest! {
    /// Limits, expand-down and read-only segments, the null selector, writes to code.
    limits, &[
        0x1111, 13, 0, 0, 13, 0, 0, 13, 0, 0, 0x2222, 0x2222, 13, 0, 0, 0x3333, 13, 0, 0, 13, 0, 0, 13, 0, 0,
        12, 0, 0, 0x77,
    ],
    r#"
        mov eax, 0x68
        mov es, eax
        mov dword ptr [0xffc], 0x1111
        REPORTX es:[0xffc]
        CATCHX mov eax, es:[0xffd]
        CATCHX mov es:[0x1000], al
        CATCHX mov eax, es:[0xffffffff]
        mov eax, 0x70 // expand-down: 0x1000 and up
        mov fs, eax
        mov dword ptr fs:[0x1000], 0x2222
        REPORTX fs:[0x1000]
        REPORTX [0x21000]
        CATCHX mov eax, fs:[0xffe]
        mov eax, 0x78 // read-only
        mov gs, eax
        mov dword ptr [0x20010], 0x3333
        REPORTX gs:[0x10]
        CATCHX mov gs:[0x10], eax
        CATCHX mov cs:[0x20000], eax
        xor eax, eax
        mov gs, eax
        CATCHX mov eax, gs:[0]
        // the stack's own: #SS
        mov eax, 0x68
        mov ecx, esp
        mov ebp, 0x2000
        mov esp, 0x1000
        mov ss, eax
        CATCHX mov eax, [ebp]
        mov eax, 0x18
        mov ss, eax
        mov esp, ecx
        REPORTX 0x77
        DONE
    "#
}

protected_guest! {
    /// A call gate from ring 3: stack switch, parameters, far return with its stack adjustment.
    call_gates, &[0x55, 0x08, 0x18, 0x39ff0, 0x2222, 0x1111, 0x2b, 0x23, 0x66, 0x2b, 0x50000, 0x77],
    r#"
        ADDRESS 0xb8, 22f
        mov ecx, eax
        and eax, 0xffff
        or eax, 0x80000
        mov [0x1080], eax
        and ecx, 0xffff0000
        or ecx, 0xec02
        mov [0x1084], ecx
        mov dword ptr [0x1804], 0x3a008
        USER
        REPORTXU 0x55
        push 0x1111
        push 0x2222
        .byte 0x9a
        .long 0
        .word 0x83
        REPORTXU 0x66
        mov eax, ss
        REPORTXU eax
        mov eax, esp
        REPORTXU eax
        KERNEL
        REPORTX 0x77
        DONE
    22: mov eax, cs
        REPORTX eax
        mov eax, ss
        REPORTX eax
        mov eax, esp
        REPORTX eax
        mov eax, [esp + 8]
        REPORTX eax
        mov eax, [esp + 12]
        REPORTX eax
        mov eax, [esp + 20]
        REPORTX eax
        mov eax, [esp + 4]
        REPORTX eax
        .byte 0xca, 8, 0
    "#
}

protected_guest! {
    /// IRET with NT set returns to the task that the TSS links to: #TS with its selector where that is none.
    invalid_tss, &[10, 0x18, 0, 10, 0, 0, 0x77],
    r#"
        mov word ptr [0x1800], 0x18
        pushfd
        or dword ptr [esp], 0x4000
        popfd
        CATCHX iretd
        mov word ptr [0x1800], 0
        CATCHX iretd
        pushfd
        and dword ptr [esp], 0xffffbfff
        popfd
        REPORTX 0x77
        DONE
    "#
}

protected_guest! {
    /// Two-level paging: 4 KiB and 4 MiB pages, error codes, A and D; CR4.PSE decides about PS.
    legacy_paging, &[
        0x1111, 0x60027, 0x90063, 14, 0, 0, 0x0080_0000, 14, 2, 0, 0x0080_1000, 0x2222, 0x40_00a3, 14, 3, 0, 0x0080_0000,
        0x8001_0033, 0x77,
    ],
    r#"
        // 0 to 4 MiB to itself by one large page; 8 MiB: page table at 0x60000; 12 MiB: large page at 4 MiB
        mov dword ptr [0x70000], 0x83
        mov dword ptr [0x70000 + 4 * 2], 0x60007
        mov dword ptr [0x70000 + 4 * 3], 0x400083
        mov dword ptr [0x60000], 0x90003
        mov dword ptr [0x90000], 0x1111
        mov dword ptr [0x400010], 0x2222
        PAGING 0x10
        mov ebx, 0x800000
        REPORTX [ebx]
        mov [ebx + 4], eax
        REPORTX [0x70008]
        REPORTX [0x60000]
        mov dword ptr [0x60000], 0
        invlpg [ebx]
        CATCHX mov eax, [ebx]
        CATCHX mov [ebx + 0x1000], eax
        REPORTX [ebx + 0x400010]
        REPORTX [0x7000c]
        mov dword ptr [0x60000], 0x90001
        CATCHX mov [ebx], eax
        mov eax, cr0
        REPORTX eax
        NO_PAGING
        REPORTX 0x77
        DONE
    "#,
    emulator_errs: Some("has 64-bit paging only"),
}

protected_guest! {
    /// INVLPG by a segment whose base takes the address around 4 GiB.
    invlpg_around, &[0x1111, 0x2222, 0x77],
    r#"
        mov dword ptr [0x70000], 0x83
        mov dword ptr [0x70000 + 4 * 2], 0x60007
        mov dword ptr [0x60000], 0x90003
        mov dword ptr [0x90000], 0x1111
        mov dword ptr [0x91000], 0x2222
        // a copy of the GDT with one more descriptor: all of memory from 0xfff00000 on
        sgdt [0x20000]
        movzx ecx, word ptr [0x20000]
        inc ecx
        mov esi, [0x20002]
        mov edi, 0x21000
        lea ebx, [ecx]
        cld
        rep movsb
        mov dword ptr [edi], 0x0000ffff
        mov dword ptr [edi + 4], 0xffcf93f0
        mov dword ptr [0x20002], 0x21000
        add word ptr [0x20000], 8
        lgdt [0x20000]
        mov es, bx
        PAGING 0x10
        mov ebx, 0x800000
        REPORTX [ebx]
        mov dword ptr [0x60000], 0x91003
        invlpg es:[ebx + 0x100000]
        REPORTX [ebx]
        NO_PAGING
        REPORTX 0x77
        DONE
    "#,
    emulator_errs: Some("has 64-bit paging only"),
}

protected_guest! {
    /// PAE: page-directory pointers are loaded with CR3; 2 MiB and 4 KiB pages; NX.
    pae_paging, &[0x1111, 0x2222, 0x90063, 14, 0x11, 0, 0x4020_0000, 0x3333, 0x77],
    r#"
        mov dword ptr [0x70000], 0x71001 // 0: 2 MiB pages
        mov dword ptr [0x70008], 0x72001 // 0x40000000
        mov dword ptr [0x71000], 0x83
        mov dword ptr [0x71008], 0x200083
        mov dword ptr [0x72000], 0x400083
        mov dword ptr [0x72008], 0x60003
        mov dword ptr [0x60000], 0x90003
        mov dword ptr [0x400010], 0x1111
        mov dword ptr [0x90000], 0x2222
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x800
        wrmsr
        PAGING 0x20
        mov ebx, 0x40000000
        REPORTX [ebx + 0x10]
        REPORTX [ebx + 0x200000]
        mov [ebx + 0x200004], eax
        REPORTX [0x60000]
        // NX
        mov dword ptr [0x60004], 0x80000000
        invlpg [ebx + 0x200000]
        lea esi, [ebx + 0x200000]
        ADDRESS 0xbf, 23f
        jmp esi
    23: // the pointers are the processor's own: a change in memory waits for the next CR3 load
        mov dword ptr [0x73000], 0x200083
        mov dword ptr [0x200010], 0x3333
        mov dword ptr [0x70008], 0x73001
        mov eax, 0x70000
        mov cr3, eax
        REPORTX [ebx + 0x10]
        NO_PAGING
        REPORTX 0x77
        DONE
    "#,
    emulator_errs: Some("has 64-bit paging only"),
}

protected_guest! {
    /// SYSENTER and SYSEXIT: flat segments, ESP and EIP by MSR and register; #GP with a null SYSENTER_CS.
    rings_and_sysenter, &[0x30d, 0, 0, 0x10, 0x18, 0x39000, 2, 0x66, 0x23, 0x2b, 0x4ff00, 0xfffc, 4, 0x77],
    r#"
        mov ecx, 0x174
        xor eax, eax
        xor edx, edx
        wrmsr
        USER
        CATCHX sysenter
        KERNEL
        // SYSENTER_CS 0x10: CS 0x10, flat and of 32 bits whatever the table says there, SS 0x18; back to 0x23, 0x2b
        mov ecx, 0x174
        mov eax, 0x10
        xor edx, edx
        wrmsr
        mov ecx, 0x175
        mov eax, 0x39000
        wrmsr
        mov ecx, 0x176
        ADDRESS 0xb8, 22f
        wrmsr
        USER
        sysenter
    22: mov eax, cs
        REPORTX eax
        mov eax, ss
        REPORTX eax
        mov eax, esp
        REPORTX eax
        pushfd
        pop eax
        and eax, 0x20202
        REPORTX eax
        ADDRESS 0xba, 23f
        mov ecx, 0x4ff00
        sysexit
    23: REPORTXU 0x66
        mov eax, cs
        REPORTXU eax
        mov eax, ss
        REPORTXU eax
        mov eax, esp
        REPORTXU eax
        KERNEL
        // SS is the one behind the last
        mov ecx, 0x174
        mov eax, 0xfffc
        xor edx, edx
        wrmsr
        mov ecx, 0x176
        ADDRESS 0xb8, 24f
        wrmsr
        sysenter
    24: mov eax, cs
        REPORTX eax
        mov eax, ss
        REPORTX eax
        REPORTX 0x77
        DONE
    "#,
    needs: &[SEP],
}

protected_guest! {
    /// Virtual-8086 mode: real-mode addresses, INT and CLI by IOPL, what an interrupt saves of the segments.
    virtual_8086, &[0x0d, 0, 0xcd, 0x2_0202, 0x2000, 0x3000, 0x1111, 0x0d, 0xfa, 0x77],
    r#"
        ADDRESS 0xb8, 22f
        mov [0x7000 + 8 * 13], eax
        mov dword ptr [0x30010], 0x1111
        // code at 0x2000:0: MOV EAX, DS:[0x10]; INT 0x21; CLI
        mov dword ptr [0x20000], 0x0010a166
        mov dword ptr [0x20004], 0xfa21cd
        push 0 // GS FS
        push 0
        push 0x3000 // DS
        push 0 // ES
        push 0x4000 // SS
        push 0x1000
        push 0x20202
        push 0x2000
        push 0
        xor ebp, ebp
        iretd
    22: // error code, EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS
        mov ecx, 0x18
        mov edx, ds // zero: INT clears the data segments
        mov ds, ecx
        inc ebp
        cmp ebp, 2
        je 23f
        REPORTX 0x0d
        REPORTX edx
        mov ebx, [esp + 4]
        movzx ecx, byte ptr [ebx + 0x20000]
        REPORTX ecx
        mov ecx, [esp + 12]
        and ecx, 0x23202
        REPORTX ecx
        mov ecx, [esp + 8]
        REPORTX ecx
        mov ecx, [esp + 28]
        REPORTX ecx
        REPORTX eax
        add dword ptr [esp + 4], 2
        add esp, 4
        iretd
    23: REPORTX 0x0d
        mov ebx, [esp + 4]
        movzx ecx, byte ptr [ebx + 0x20000]
        REPORTX ecx
        REPORTX 0x77
        DONE
    "#,
}
