//! Real mode, and the way from there to 64-bit mode.

use crate::{Expected::Reports, asm::guest};

guest! {
    /// Results and flags of integer instructions, those of 16-bit code and those that 64-bit mode dropped.
    real arithmetic_and_flags, Real,
    Reports(&[
        0x8000_0000, 0x894, 0x00, 0x55, 0x0626_0060, 0x801, 0xffff, 0x95, 2, 0x801, 0xffeb, 0x1000_0000, 0,
        0xffff_8001, 0xffff, 0x0098, 0x1234_5678,
    ]),
    r#"
    .code16
    .macro FLAGS mask
        pushfd
        pop ebx
        and ebx, \mask
        REPORTX ebx
    .endm
        mov eax, 0x7fffffff
        add eax, 1
        pushfd
        REPORTX eax
        popfd
        FLAGS 0x8d5
        mov eax, 0xff
        add al, 1
        pushfd
        REPORTX eax
        popfd
        FLAGS 0x8d5
        mov ax, 0x1234
        mov bx, 0x5678
        mul bx
        pushfd
        shl edx, 16
        mov dx, ax
        REPORTX edx
        popfd
        FLAGS 0x801
        mov eax, 1
        sub ax, 2
        pushfd
        movzx eax, ax
        REPORTX eax
        popfd
        FLAGS 0x8d5
        mov eax, 0x80000001
        shl eax, 1
        pushfd
        REPORTX eax
        popfd
        FLAGS 0x8c5
        mov eax, -3
        imul ax, ax, 7
        movzx eax, ax
        REPORTX eax
        mov edx, 1
        xor eax, eax
        mov ecx, 16
        div ecx
        REPORTX eax
        REPORTX edx
        mov ax, 0x8001
        cwde
        REPORTX eax
        cwd
        movzx edx, dx
        REPORTX edx
        mov eax, 0x5a
        mov bl, 0x31
        xor al, bl
        rol al, 3 // 0x6b rol 3 = 0x5b
        add al, 0x3d
        REPORTX eax
        mov eax, 0x78563412
        bswap eax
        REPORTX eax
        DONE
    .purgem FLAGS
    "#
}

guest! {
    /// DAA, DAS, AAM, AAD, AAA and AAS.
    real decimal_arithmetic, Real, Reports(&[0x0114, 0x0115, 0x0603, 0x003f, 0x0105, 0x00_ff09]),
    r#"
    .code16
        // decimal arithmetic: 79 + 35 = 114, in AL with the carry in AH
        mov eax, 0x79
        add al, 0x35
        daa
        setc ah
        REPORTX eax
        mov eax, 0x14
        stc
        mov ah, 1
        sub al, 0x99 // 114 - 99 = 15
        das
        REPORTX eax
        mov eax, 63
        aam
        REPORTX eax
        aad
        REPORTX eax
        mov eax, 0x0f
        aaa
        REPORTX eax
        mov eax, 0x0f
        aas
        movzx eax, ax
        REPORTX eax
        DONE
    "#
}

guest! {
    /// String instructions to and from ports, forwards and backwards, in all sizes; and between memory.
    real strings_to_ports, Real,
    Reports(&[
        0x1_0510, 0x61, 0x1_0510, 0x62, 0x1_0510, 0x63, //
        0x2_0511, 0x6261, 0x2_0511, 0x6463, //
        0x4_0512, 0x6463_6261, //
        0x1_0510, 0x64, 0x1_0510, 0x63, //
        0x7871_7871, 0x7871, 3, 0x6463_6261, 0x10, 0x5a5a_5a5a, 3, 2,
    ]),
    r#"
    .code16
    .macro SOURCE at
        .byte 0xbe
        .word 22f - 99b + \at
    .endm
        cld
        SOURCE 0
        mov dx, 0x510
        mov cx, 3
        rep outsb
        SOURCE 0
        inc dx
        mov cx, 2
        rep outsw
        SOURCE 0
        inc dx
        outsd
        std
        SOURCE 3
        mov dx, 0x510
        mov cx, 2
        rep outsb
        cld
        // 0x510 * 7 + 1 = 0x71, 0x78
        mov di, 0x8000
        mov cx, 3
        rep insw
        REPORTX dword ptr [0x8000]
        movzx eax, word ptr [0x8004]
        REPORTX eax
        // what is in between: lengths and pointers
        movzx eax, di
        sub ax, 0x8003
        REPORTX eax
        // copy, compare, scan, store
        SOURCE 0
        mov di, 0x9000
        mov cx, 4
        rep movsd
        REPORTX dword ptr [0x9000]
        movzx eax, di
        sub ax, 0x9000
        REPORTX eax
        mov eax, 0x5a5a5a5a
        mov di, 0x9100
        mov cx, 2
        rep stosd
        REPORTX dword ptr [0x9104]
        SOURCE 0
        mov di, 0x9000
        mov byte ptr [0x9004], 0
        mov cx, 8
        repe cmpsb
        movzx ecx, cx
        REPORTX ecx
        mov al, 0x62
        mov di, 0x9000
        mov cx, 4
        repne scasb
        movzx ecx, cx
        REPORTX ecx
        DONE
    22: .ascii "abcdefghijklmnop"
    .purgem SOURCE
    "#
}

guest! {
    /// INT n, INT3, INTO, #DE and single step through the interrupt vector table.
    real interrupts_by_ivt, Real,
    Reports(&[
        0x21, 0x1000, 0x0002, 0x0202, 3, 1, 4, 2, 0x100, 0, 0x101, 0x1_0001, 0x99,
    ]),
    r#"
    .code16
    .macro VECTOR number, label
        .byte 0xbb
        .word \label - 99b
        mov es:[\number * 4], bx
        mov word ptr es:[\number * 4 + 2], 0x1000
    .endm
        xor ax, ax
        mov es, ax
        VECTOR 0x21, 22f
        VECTOR 3, 23f
        VECTOR 4, 24f
        VECTOR 0, 25f
        VECTOR 1, 27f
        xor ebp, ebp
        sti
        int 0x21
        pushfd
        pop eax
        and eax, 0x302
        REPORTX eax
        cli
        int3
        mov al, 0x7f
        inc al
        into
        xor al, al
        into // no overflow: nothing
        xor edx, edx
        mov eax, 1
        xor ecx, ecx
        div cl
        // single step over one NOP
        pushf
        pop ax
        or ax, 0x100
        push ax
        popf
    28: nop
        REPORTX 0x99
        DONE
    22: // the frame: IP, CS, FLAGS; interrupts are off
        REPORTX 0x21
        push ebp
        mov bp, sp
        movzx eax, word ptr [bp + 6]
        REPORTX eax
        pushfd
        pop eax
        and eax, 0x302
        REPORTX eax
        pop ebp
        iret
    23: REPORTX 3
        REPORTX 1
        iret
    24: REPORTX 4
        REPORTX 2
        iret
    25: // a fault: IP is the instruction's own
        REPORTX 0x100
        REPORTX 0
        push bp
        mov bp, sp
        add word ptr [bp + 2], 2
        pop bp
        iret
    27: // a trap: IP is behind the NOP; TF goes
        REPORTX 0x101
        push bp
        mov bp, sp
        movzx eax, word ptr [bp + 2]
        .byte 0x66, 0x2d
        .long 28b - 99b
        or eax, 0x10000
        REPORTX eax
        and word ptr [bp + 6], 0xfeff
        pop bp
        iret
    .purgem VECTOR
    "#
}

guest! {
    /// Segment bases, far calls and jumps, LES, 32-bit addresses, ENTER and PUSHA.
    real segments_and_far_calls, Real,
    Reports(&[
        0x1111_2222, 0x1111_2222, 0x2222, 0x2000, 0x77, 0x1000, 0x3333_4444, 0x5555_6666, 0xabcd, 3, 2, 0xfffe, 0x66,
    ]),
    r#"
    .code16
        mov ax, 0x2000
        mov ds, ax
        mov dword ptr [0x10], 0x11112222
        REPORTX dword ptr [0x10]
        mov ax, 0x2001
        mov es, ax
        REPORTX dword ptr es:[0]
        // LES: offset and selector from memory
        mov dword ptr [0x20], 0x20002222
        les bx, [0x20]
        movzx eax, bx
        REPORTX eax
        mov ax, es
        movzx eax, ax
        REPORTX eax
        // a far call to the same code through another segment, 0x1001:offset - 16
        .byte 0x9a
        .word 22f - 99b - 16, 0x1001
        mov ax, cs
        movzx eax, ax
        REPORTX eax
        // 32-bit addressing: base + index * 4 + displacement
        mov eax, 0x100
        mov ecx, 0x20
        mov dword ptr [eax + ecx * 4 + 8], 0x33334444
        REPORTX dword ptr [0x188]
        mov ax, 0x1000
        mov ds, ax
        // SS is the default with BP, and FS overrides
        mov bp, 0x9000
        mov dword ptr [bp], 0x55556666
        mov ax, 0x1900
        mov fs, ax
        REPORTX dword ptr fs:[0]
        mov ax, 0xabcd
        pusha
        mov bp, sp
        movzx eax, word ptr [bp + 14]
        REPORTX eax
        popa
        mov sp, 0xf000
        mov bp, sp
        enter 4, 0
        // frame: BP at 0xeffe, locals down to 0xeffa
        movzx eax, bp
        sub ax, sp
        shr eax, 1
        inc eax
        REPORTX eax
        dec eax
        REPORTX eax
        leave
        // stack pointers wrap at 64 KiB
        mov sp, 0
        push ax
        movzx eax, sp
        REPORTX eax
        mov sp, 0xf000
        .byte 0xea
        .word 23f - 99b, 0x1000
    22: REPORTX 0x77
        .byte 0xcb
    23: REPORTX 0x66
        DONE
    "#
}

guest! {
    /// 16-bit real mode to 32-bit protected mode to 64-bit mode with paging, compatibility mode, and back down.
    real up_to_long_mode, Real,
    Reports(&[
        0x16, 0x11, 0x32, 0x1234_5678, 0x500, 0x64, 0x9abc_def0, 0x32c, 0x64b, 0x32d, 0x32e, 0x16a, 0x16, 0x10,
    ]),
    r#"
    .code16
        REPORTX 0x16
        cli
        mov word ptr [0x8000], 0x8f
        mov dword ptr [0x8002], 0x1000
        .byte 0x66
        lgdt [0x8000]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        and eax, 0x11
        REPORTX eax
        .byte 0x66, 0xea
        .long 22f - 99b + 0x10000
        .word 0x08
    .code32
    22: mov eax, 0x18
        mov ds, eax
        mov es, eax
        mov ss, eax
        mov esp, 0x38000
        REPORTX 0x32
        mov dword ptr [0x200000], 0x12345678
        REPORTX dword ptr [0x200000]
        // page tables: the first 4 MiB, 2 MiB pages
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x62003
        mov dword ptr [0x62000], 0x83
        mov dword ptr [0x62008], 0x200083
        mov eax, 0x60000
        mov cr3, eax
        mov eax, cr4
        or eax, 0x20
        mov cr4, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x100
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        // LMA follows paging
        rdmsr
        and eax, 0x500
        REPORTX eax
        .byte 0xea
        .long 23f - 99b + 0x10000
        .word 0x10
    .code64
    23: REPORT 0x64
        mov rax, 0x123456789abcdef0
        mov [0x200008], rax
        REPORT dword ptr [0x200008]
        // compatibility mode by a far return, and 64-bit mode again by a far jump
        push 0x08
        lea rax, [rip + 24f]
        push rax
        .byte 0x48, 0xcb
    .code32
    24: REPORTX 0x32c
        .byte 0xea
        .long 25f - 99b + 0x10000
        .word 0x10
    .code64
    25: REPORT 0x64b
        push 0x08
        lea rax, [rip + 26f]
        push rax
        .byte 0x48, 0xcb
    .code32
    26: REPORTX 0x32d
        // leave long mode: paging off first
        mov eax, cr0
        and eax, 0x7fffffff
        mov cr0, eax
        mov ecx, 0xc0000080
        rdmsr
        and eax, 0xfffffeff
        wrmsr
        REPORTX 0x32e
        .byte 0xea
        .long 27f - 99b
        .word 0x58
    .code16
    27: // 16-bit protected mode, then real mode; SP only has 16 bits from here
        mov ax, 0x60
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov esp, 0xf000
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        .byte 0xea
        .word 28f - 99b, 0x1000
    28: mov ax, 0x1000
        mov ss, ax
        mov ds, ax
        REPORTX 0x16a
        REPORTX 0x16
        mov eax, cr0
        and eax, 0x80000011
        REPORTX eax
        DONE
    "#
}
