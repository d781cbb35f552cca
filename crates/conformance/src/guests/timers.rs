//! The local APIC's timer. Nothing here measures: how fast it counts is the engine's business.

use crate::{Expected::Reports, asm::guest};

const TSC_DEADLINE: (u32, u32, usize, u32) = (1, 0, 2, 24);

guest! {
    /// One-shot: one interrupt, then the count stays 0. Masked: none.
    timers one_shot, Long, Reports(&[0x45, 0, 1, 0, 0x77, 0, 0, 0x46, 0]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x45, 22f
        HANDLER 0x46, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x3e0], 0xb // divide by 1
        mov dword ptr [r11 + 0x320], 0x45
        xor ebx, ebx
        mov ebp, 0x45
        sti
        mov dword ptr [r11 + 0x380], 100000
        WAIT_FOR 1, ebx
        mov ecx, 200
    24: pause
        dec ecx
        jnz 24b
        REPORT ebx
        mov eax, [r11 + 0x390]
        REPORT eax
        REPORT 0x77
        // masked: it counts, and nothing comes
        mov dword ptr [r11 + 0x320], 0x10045
        mov dword ptr [r11 + 0x380], 1000
    25: pause
        mov eax, [r11 + 0x390]
        test eax, eax
        jnz 25b
        mov eax, [r11 + 0x220]
        REPORT eax
        // stopped by a zero count
        mov dword ptr [r11 + 0x320], 0x45
        mov dword ptr [r11 + 0x380], 0x7fffffff
        mov dword ptr [r11 + 0x380], 0
        mov eax, [r11 + 0x390]
        REPORT eax
        // HLT wakes up by it
        mov ebp, 0x46
        mov dword ptr [r11 + 0x320], 0x46
        mov dword ptr [r11 + 0x380], 1000000
        hlt
        DONE
    22: REPORT ebp
        inc ebx
        mov eax, [r11 + 0x390]
        REPORT eax
        push rax
        EOI
        pop rax
        add rsp, 8
        iretq
    "#
}

guest! {
    /// Periodic: it comes again and again, until stopped.
    timers periodic, Long, Reports(&[0x45, 0x45, 0x45, 0x45, 0x77, 0]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x45, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x3e0], 0xb
        mov dword ptr [r11 + 0x320], 0x20045
        xor ebx, ebx
        sti
        mov dword ptr [r11 + 0x380], 3000000
    23: hlt
        cmp ebx, 4
        jb 23b
        REPORT 0x77
        mov eax, [r11 + 0x390]
        REPORT eax
        DONE
    22: cmp ebx, 4 // a slow engine may be late
        jae 24f
        inc ebx
        REPORT 0x45
        cmp ebx, 4
        jne 24f
        mov dword ptr [r11 + 0x380], 0
    24: EOI
        add rsp, 8
        iretq
    "#
}

guest! {
    /// TSC deadline: fires once, disarms itself; a past one fires at once, 0 never.
    timers tsc_deadline, Long, Reports(&[0, 0x45, 0, 1, 0x77, 0x45, 0, 2, 0x78, 0, 1, 2, 0x45, 0, 3]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x45, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x320], 0x40045
        xor ebx, ebx
        mov ecx, 0x6e0
        rdmsr
        REPORT eax
        sti
        rdtsc
        shl rdx, 32
        lea rax, [rax + rdx + 4000000]
        mov [0x20000], rax
        mov rdx, rax
        shr rdx, 32
        wrmsr
        WAIT_FOR 1, ebx
        REPORT 0x77
        mov eax, 1 // long past
        xor edx, edx
        wrmsr
        WAIT_FOR 2, ebx
        REPORT 0x78
        // armed far in the future, then disarmed
        mov eax, -1
        mov edx, 0x7fffffff
        wrmsr
        rdmsr
        inc eax
        REPORT eax
        xor eax, eax
        xor edx, edx
        wrmsr
        mov eax, 1
        REPORT eax
        REPORT ebx
        // HLT wakes up by it
        rdtsc
        shl rdx, 32
        lea rax, [rax + rdx + 4000000]
        mov [0x20000], rax
        mov rdx, rax
        shr rdx, 32
        wrmsr
        hlt
        DONE
    22: REPORT 0x45
        inc ebx
        push rax
        push rdx
        push rcx
        rdmsr
        REPORT eax
        // not before its time
        rdtsc
        shl rdx, 32
        or rax, rdx
        cmp rax, [0x20000]
        jae 23f
        REPORT 0xbad
    23: REPORT ebx
        EOI
        pop rcx
        pop rdx
        pop rax
        add rsp, 8
        iretq
    "#,
    needs: &[TSC_DEADLINE],
}

guest! {
    /// The current count goes down from the initial one, slower with a larger divider; the initial stays.
    timers counts_down, Long, Reports(&[0x7fff_ffff, 1, 1, 1]),
    r#"
        mov r11d, 0xfee00000
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x320], 0x10045
        mov dword ptr [r11 + 0x3e0], 0xb
        mov dword ptr [r11 + 0x380], 0x7fffffff
        mov eax, [r11 + 0x380]
        REPORT eax
        mov ecx, [r11 + 0x390]
        xor eax, eax
        cmp ecx, 0x7fffffff
        setbe al
        REPORT eax
        mov ebx, 1000
    22: mov eax, [r11 + 0x390]
        cmp eax, ecx
        jb 23f
        dec ebx
        jnz 22b
    23: xor eax, eax
        test ebx, ebx
        setnz al
        REPORT eax
        // never up
        mov ebx, 20
        mov ebp, 1
        mov ecx, [r11 + 0x390]
    24: mov eax, [r11 + 0x390]
        cmp eax, ecx
        jbe 25f
        xor ebp, ebp
    25: mov ecx, eax
        dec ebx
        jnz 24b
        REPORT ebp
        DONE
    "#
}
