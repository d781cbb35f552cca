//! Several processors on the same bytes at the same time: atomic operations in pages that hold code, stores next to
//! them, page-table entries that are used while they are taken away.

use super::smp::smp_guest;
use crate::Expected::Reports;

smp_guest! {
    /// Locked operations on memory in the page of the code that is running lose nothing, whatever their size and
    /// alignment, and neither does a plain store to the other half of the same word.
    contention atomics_beside_code, 2, &[20000, 20000, 20000, 20000, 0, 0x77],
    r#"
        mov r8d, 0x90800
        lea rsi, [rip + 30f]
        mov edi, 0x90000
        mov ecx, 256
        rep movsb
        START 1, 0, 22f
        mov r9, 0x90000
        call r9
        WAIT_FOR 2, dword ptr [0x20100]
        REPORT dword ptr [r8]
        REPORT dword ptr [r8 + 0x11]
        REPORT dword ptr [r8 + 0x20]
        REPORT dword ptr [r8 + 0x32]
        REPORT dword ptr [0x20104]
        REPORT 0x77
        DONE
    22: mov r8d, 0x90800
        mov r9, 0x90000
        call r9
    23: pause
        jmp 23b
        // from here on: at 0x90000, on both processors
    30: mov ecx, 10000
        lea r10, [r8 + r12 * 2 + 0x40] // a half of a word for each
        xor ebx, ebx
    31: lock inc dword ptr [r8]
        mov eax, 1
        lock xadd [r8 + 0x11], eax
    32: mov eax, [r8 + 0x20]
        lea edx, [rax + 1]
        lock cmpxchg [r8 + 0x20], edx
        jne 32b
        // a lock of BTS at an odd address, given back by a plain store
    33: lock bts dword ptr [r8 + 0x29], 3
        jnc 34f
        pause
        jmp 33b
    34: mov eax, [r8 + 0x32]
        inc eax
        mov [r8 + 0x32], eax
        mov byte ptr [r8 + 0x29], 0
        // the neighbour's locked addition of zero does not bring back an old value
        mov [r10], bx
        lock add dword ptr [r8 + 0x40], 0
        cmp [r10], bx
        je 35f
        lock inc dword ptr [0x20104]
    35: inc ebx
        dec ecx
        jnz 31b
        lock inc dword ptr [0x20100]
        ret
    "#
}

smp_guest! {
    /// Accessed and dirty bits are set in one step with the check that the entry is there: an entry that was taken away
    /// by XCHG stays as it was left.
    contention entries_taken_away, 2, &[0, 0x77],
    r#"
        HANDLER 14, 28f
        mov dword ptr [0x4010], 0x60003 // 0x80000000
        mov dword ptr [0x60000], 0x61003
        START 1, 0, 22f
        xor ebp, ebp
        mov ecx, 8000
    21: mov eax, 0x90003
        mov [0x61000], rax
        mov edx, ecx
        and edx, 7
    25: dec edx
        jns 25b
        xor eax, eax
        xchg [0x61000], rax
        mov edx, 8
    26: dec edx
        jnz 26b
        cmp qword ptr [0x61000], 0
        je 27f
        inc ebp
    27: dec ecx
        jnz 21b
        REPORT ebp
        REPORT 0x77
        DONE
    22: mov ebx, 0x80000000
    23: invlpg [rbx]
        mov [rbx], ecx
        jmp 23b
        // no page: on behind the store, which has two bytes
    28: add qword ptr [rsp + 8], 2
        add rsp, 8
        iretq
    "#
}
