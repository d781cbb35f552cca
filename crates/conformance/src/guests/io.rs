//! Port and memory-mapped I/O as the bus sees it.

use crate::{Expected::Reports, asm::guest};

guest! {
    /// IN and OUT in each size; what they do to the rest of RAX.
    io port_sizes, Long,
    Reports(&[
        0x1_0510, 0x78, 0x2_0511, 0x5678, 0x4_0512, 0x1234_5678, //
        0xffff_ff71, 0xffff_ffff, 0xffff_7f78, 0x8d86_7f78, 0, 0xffff_ffff,
    ]),
    r#"
        mov eax, 0x12345678
        mov dx, 0x510
        out dx, al
        inc edx
        out dx, ax
        inc edx
        out dx, eax
        mov rax, -1
        mov dx, 0x510
        in al, dx
        REPORT eax
        mov rbx, rax
        shr rbx, 32
        REPORT ebx
        inc edx
        mov rax, -1
        in ax, dx
        REPORT eax
        in eax, dx
        REPORT eax
        shr rax, 32
        REPORT eax
        in eax, 0x99 // nothing there
        REPORT eax
        DONE
    "#
}

guest! {
    /// REP OUTS and INS: counts, directions, across pages, more than fits in one exit.
    io string_ports, Long,
    Reports(&[
        0x4_0510, 0x11, 0x4_0510, 0x22, 0x4_0510, 0x33, 0, 0x20ffc + 12, //
        0x1_0511, 0x33, 0x1_0511, 0, 0x1_0511, 0, 2, 0x1_0511, 0x33, //
        0, 1500 * 0x71, 0x25000 + 1500, 0x867f_7871, 0x1_0000,
    ]),
    r#"
        cld
        mov esi, 0x20ffc // across a page border
        mov dword ptr [rsi], 0x11
        mov dword ptr [rsi + 4], 0x22
        mov dword ptr [rsi + 8], 0x33
        mov ecx, 3
        mov dx, 0x510
        rep outsd
        REPORT ecx
        REPORT esi
        std
        mov esi, 0x21007 // the top of the third word downwards
        sub esi, 3
        mov ecx, 1
        inc edx
        rep outsb
        mov esi, 0x21002
        mov ecx, 2
        rep outsb
        cld
        xor ecx, ecx
        rep outsb
        mov ecx, 2
        REPORT ecx
        mov esi, 0x21004
        outsb
        // 1500 bytes of 0x71 in
        mov dx, 0x510
        mov edi, 0x25000
        mov ecx, 1500
        rep insb
        REPORT ecx
        xor eax, eax
        mov ebx, 0x25000
        mov ecx, 1500
    22: movzx ebp, byte ptr [rbx]
        add eax, ebp
        inc ebx
        dec ecx
        jnz 22b
        REPORT eax
        REPORT edi
        mov edi, 0x26000
        insd
        REPORT dword ptr [0x26000]
        // with 32-bit addresses the upper halves do not count
        mov rdi, 0x100026100
        mov ecx, 1
        .byte 0x67
        rep insb
        mov eax, 0x10000
        REPORT eax
        DONE
    "#
}

guest! {
    /// MMIO reads and writes of 1, 2, 4 and 8 bytes.
    io mmio_sizes, Long,
    Reports(&[
        0x1_0010, 0x88, 0x2_0020, 0x7788, 0x4_0030, 0x5566_7788, 0x8_0040, 0x5566_7788, 0x1122_3344, //
        0x4_0051, 0x12, 0x71, 0xf9f2, 0x867f_7871, 0x867f_7871, 0xa29b_948d, 0xffff_ff8d,
    ]),
    r#"
        mov ebx, 0xc0000000
        mov rax, 0x1122334455667788
        mov [rbx + 0x10], al
        mov [rbx + 0x20], ax
        mov [rbx + 0x30], eax
        mov [rbx + 0x40], rax
        mov dword ptr [rbx + 0x51], 0x12
        movzx eax, byte ptr [rbx + 0x10]
        REPORT eax
        xor eax, eax
        mov ax, [rbx + 0x447]
        REPORT eax
        mov eax, [rbx + 0x110]
        REPORT eax
        mov rax, [rbx + 0x110]
        REPORT eax
        shr rax, 32
        REPORT eax
        movsx eax, byte ptr [rbx + 0x14]
        REPORT eax
        DONE
    "#
}

guest! {
    /// A string instruction reads a device between floating-point instructions: those go on as before, with x87 registers
    /// and with the rounding of MXCSR.
    io string_between_floats, Long,
    Reports(&[0x4140_0000, 36, 0xbeb7_b0a9, 0]),
    r#"
        mov dword ptr [0x20000], 0x5f80 // towards plus infinity
        mov dword ptr [0x20004], 0x40100000 // 2.25
        ldmxcsr [0x20000]
        fninit
        cld
        fldz
        xor ebx, ebx
        mov ebp, 12
    22: fld1
        movss xmm0, [0x20004]
        mov esi, 0xc0000018
        mov edi, 0x21000
        mov ecx, 4
        rep movsb
        faddp
        cvtss2si eax, xmm0
        add ebx, eax
        dec ebp
        jnz 22b
        fstp dword ptr [0x2000c]
        REPORT dword ptr [0x2000c]
        REPORT ebx
        REPORT dword ptr [0x21000]
        fnstsw ax
        and eax, 0x3841
        REPORT eax
        DONE
    "#
}

guest! {
    /// MMIO as an operand of other instructions: read-modify-write, compare, strings, exchange, stack, SSE.
    io mmio_operands, Long,
    Reports(&[
        0x4_0010, 0x867f_7872, 0x46, 0x80, 0x1_0300, 0x5a, 0x1_0301, 0x5a, 0x1_0302, 0x5a, 0, 0xc000_0303, //
        0x867f_7871, 0xa29b_948d, 0x4_0020, 0x77, 0xf6ef_e8e1, 0x4_0010, 0x867f_7881, 0x867f_7871, 0x867f_7871, //
        0x4_0404, 0xaa55,
    ]),
    r#"
        mov ebx, 0xc0000000
        add dword ptr [rbx + 0x10], 1
        cmp dword ptr [rbx + 0x10], 0x867f7871
        pushfq
        pop rax
        and eax, 0x8d7
        REPORT eax
        test byte ptr [rbx + 0x20], 0x80 // 0xe1
        pushfq
        pop rax
        and eax, 0x80
        REPORT eax
        cld
        mov edi, 0xc0000300
        mov al, 0x5a
        mov ecx, 3
        rep stosb
        REPORT ecx
        REPORT edi
        mov esi, 0xc0000110
        mov edi, 0x20000
        mov ecx, 2
        rep movsd
        REPORT dword ptr [0x20000]
        REPORT dword ptr [0x20004]
        mov eax, 0x77
        xchg [rbx + 0x20], eax
        REPORT eax
        mov eax, 0x10
        lock xadd [rbx + 0x10], eax
        REPORT eax
        push qword ptr [rbx + 0x110]
        pop rax
        REPORT eax
        mov dword ptr [0x20000], 0xaa55
        mov esi, 0x20000
        mov edi, 0xc0000404
        movsd
        DONE
    "#
}
