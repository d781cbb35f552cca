//! Four-level paging: sizes, permissions, A and D bits, and when the TLB may remember.
//!
//! Guests never look at translations that a processor may or may not have cached: only at those that it must
//! have dropped.

use crate::{Expected::Reports, asm::guest};

/// CPUID features: 1.ECX PCID, 7.0.EBX SMEP, INVPCID, SMAP, 0x80000001.EDX 1 GiB pages.
const PCID: (u32, u32, usize, u32) = (1, 0, 2, 17);
const SMEP: (u32, u32, usize, u32) = (7, 0, 1, 7);
const INVPCID: (u32, u32, usize, u32) = (7, 0, 1, 10);
const SMAP: (u32, u32, usize, u32) = (7, 0, 1, 20);
const GIGABYTE: (u32, u32, usize, u32) = (0x8000_0001, 0, 3, 26);

guest! {
    /// 4 KiB and 2 MiB pages in the upper half: data, code, stack; another CR3.
    paging sizes, Long,
    Reports(&[0x1111, 0x2222, 0x3333, 0x44, 0x5555, 14, 0, 0, 0xc020_5010, 14, 0, 0, 0xc020_5010, 0x2222]),
    r#"
        mov qword ptr [0x3ff8], 0x60003 // PML4[511]
        mov qword ptr [0x60ff8], 0x61003 // PDPT[511]: 0xffffffffc0000000
        mov dword ptr [0x61000], 0x200083 // PD[0]: 2 MiB
        mov dword ptr [0x61008], 0x62003 // PD[1]: page table
        mov dword ptr [0x62028], 0x90003
        mov dword ptr [0x62030], 0x10003 // this code
        mov dword ptr [0x62038], 0x91003
        mov dword ptr [0x2abcd8], 0x1111
        mov dword ptr [0x90010], 0x2222
        mov rbx, 0xffffffffc0000000
        REPORT dword ptr [rbx + 0xabcd8]
        REPORT dword ptr [rbx + 0x205010]
        mov dword ptr [rbx + 0x1ffffc], 0x3333
        REPORT dword ptr [0x3ffffc]
        // code there
        lea rax, [rip + 22f]
        sub rax, 0x10000
        lea rax, [rax + rbx + 0x206000]
        call rax
        // a stack there
        mov rbp, rsp
        lea rsp, [rbx + 0x208000]
        push 0x5555
        mov rsp, rbp
        REPORT dword ptr [0x91ff8]
        // another CR3 without the upper half
        mov rax, [0x3000]
        mov [0x63000], rax
        mov eax, 0x63000
        mov cr3, rax
        CATCH mov eax, [rbx + 0x205010]
        // not present one level up
        mov qword ptr [0x63ff8], 0x64003
        CATCH mov eax, [rbx + 0x205010]
        mov eax, 0x3000
        mov cr3, rax
        REPORT dword ptr [rbx + 0x205010]
        DONE
    22: REPORT 0x44
        ret
    "#
}

guest! {
    /// A on every level at the first access, D at the first write and only in the last level.
    paging accessed_and_dirty, Long,
    Reports(&[
        0x90003, 0x90023, 0x60027, 0x61023, 0x90063, 0x60027, 0x61023, 0x40_00a3, 0x40_00e3, 0x90021, 14, 3, 0,
        0x8000_0000, 0x90021, 0x90043, 0x90063,
    ]),
    r#"
        mov dword ptr [0x4010], 0x60007 // 0x80000000
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        mov dword ptr [0x60008], 0x400083
        mov ebx, 0x80000000
        REPORT dword ptr [0x61000]
        mov eax, [rbx]
        REPORT dword ptr [0x61000]
        REPORT dword ptr [0x4010]
        REPORT dword ptr [0x60000]
        mov [rbx], eax
        REPORT dword ptr [0x61000]
        REPORT dword ptr [0x4010]
        REPORT dword ptr [0x60000]
        mov eax, [rbx + 0x200000]
        REPORT dword ptr [0x60008]
        mov [rbx + 0x212340], eax
        REPORT dword ptr [0x60008]
        // a write that faults sets no D
        mov dword ptr [0x61000], 0x90001
        invlpg [rbx]
        mov eax, [rbx]
        REPORT dword ptr [0x61000]
        CATCH mov [rbx], eax
        REPORT dword ptr [0x61000]
        // A comes back after it was cleared and the page invalidated
        mov dword ptr [0x61000], 0x90043
        invlpg [rbx]
        REPORT dword ptr [0x61000]
        mov eax, [rbx]
        REPORT dword ptr [0x61000]
        DONE
    "#
}

guest! {
    /// CR0.WP, read-only on each level, and U/S on each level.
    paging write_protect, Long,
    Reports(&[
        14, 3, 0, 0x8000_0000, 0x1234, 14, 3, 0, 0x8000_0000, 14, 3, 0, 0x8000_0000, //
        0x30e, 7, 0, 0x8000_0000, 0x30e, 7, 0, 0x8000_2000, 0x30e, 5, 0, 0x8000_2000, 0x55, 0x30e, 5, 0, 0x8000_1000,
        0x77,
    ]),
    r#"
        mov dword ptr [0x4010], 0x60007 // 0x80000000
        mov dword ptr [0x60000], 0x61007
        mov dword ptr [0x61000], 0x90005
        mov dword ptr [0x61008], 0x91007
        mov dword ptr [0x61010], 0x92003
        mov ebx, 0x80000000
        CATCH mov dword ptr [rbx], 1
        mov rax, cr0
        btr rax, 16
        mov cr0, rax
        mov dword ptr [rbx], 0x1234
        REPORT dword ptr [0x90000]
        bts rax, 16
        mov cr0, rax
        CATCH mov dword ptr [rbx], 1
        // writable page, read-only directory
        mov dword ptr [0x61000], 0x90007
        mov dword ptr [0x60000], 0x61005
        mov rax, cr3
        mov cr3, rax
        CATCH mov dword ptr [rbx], 1
        mov dword ptr [0x61000], 0x90005
        mov dword ptr [0x60000], 0x61007
        mov rax, cr3
        mov cr3, rax
        // ring 3
        TO_USER
        mov ebx, 0x80000000
        mov eax, [rbx]
        CATCH mov dword ptr [rbx], 1
        CATCH mov dword ptr [rbx + 0x2000], 1
        CATCH mov eax, [rbx + 0x2000]
        mov dword ptr [rbx + 0x1000], 0x55
        mov eax, [rbx + 0x1000]
        REPORTU eax
        TO_KERNEL
        // user page, supervisor directory
        mov dword ptr [0x60000], 0x61003
        mov rax, cr3
        mov cr3, rax
        TO_USER
        mov ebx, 0x80001000
        CATCH mov eax, [rbx]
        TO_KERNEL
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// NX in a page, in a directory; data is not held back; without EFER.NXE the bit is reserved.
    paging no_execute, Long,
    Reports(&[
        0x1234_00c3, 14, 0x11, 0, 0x8000_0000, 0x44, 14, 0x11, 0, 0x8000_0000, 0x44, 0x30e, 0x15, 0, 0x8000_0000,
        14, 9, 0, 0x8000_0000, 14, 0xb, 0, 0x8000_0000, 0x77,
    ]),
    r#"
        mov dword ptr [0x4010], 0x60007 // 0x80000000
        mov dword ptr [0x60000], 0x61007
        mov dword ptr [0x61000], 0x90007
        mov byte ptr [0x61007], 0x80 // NX
        mov dword ptr [0x90000], 0x123400c3 // RET
        mov ebx, 0x80000000
        REPORT dword ptr [rbx]
        mov r14, rbx
        lea r15, [rip + 22f]
        jmp rbx
    22: mov byte ptr [0x61007], 0
        invlpg [rbx]
        call rbx
        REPORT 0x44
        mov byte ptr [0x60007], 0x80
        invlpg [rbx]
        mov r14, rbx
        lea r15, [rip + 23f]
        jmp rbx
    23: mov byte ptr [0x60007], 0
        invlpg [rbx]
        call rbx
        REPORT 0x44
        mov byte ptr [0x61007], 0x80
        invlpg [rbx]
        TO_USER
        mov ebx, 0x80000000
        mov r14, rbx
        lea r15, [rip + 24f]
        jmp rbx
    24: TO_KERNEL
        mov ecx, 0xc0000080
        rdmsr
        btr eax, 11
        wrmsr
        mov ebx, 0x80000000
        invlpg [rbx]
        CATCH mov eax, [rbx]
        CATCH mov dword ptr [rbx], 0
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// Bits that must be zero: address bits below a large page's size, PS where no large page can be.
    paging reserved_bits, Long,
    Reports(&[
        14, 9, 0, 0x8000_0000, 14, 0xb, 0, 0x8000_0000, 0x30e, 0xd, 0, 0x8000_0000, 14, 9, 0, 0x123_4567, 0x77,
    ]),
    r#"
        mov dword ptr [0x4010], 0x60007 // 0x80000000
        mov dword ptr [0x60000], 0x402087 // bit 13
        mov ebx, 0x80000000
        CATCH mov eax, [rbx]
        CATCH mov [rbx], eax
        TO_USER
        mov ebx, 0x80000000
        CATCH mov eax, [rbx]
        TO_KERNEL
        // PML4[1]: PS is reserved
        mov dword ptr [0x3008], 0x4087
        mov rbx, 0x8001234567
        CATCH mov eax, [rbx]
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// What INVLPG and CR3 drop: small and large pages, permissions, the way through the directories.
    paging invlpg, Long,
    Reports(&[0x90, 0x91, 0x92, 0x40, 0x60, 14, 3, 0, 0x8000_0000, 0x99, 0x90, 14, 0, 0, 0x8000_0000, 0x90]),
    r#"
        mov dword ptr [0x90000], 0x90
        mov dword ptr [0x91000], 0x91
        mov dword ptr [0x92000], 0x92
        mov dword ptr [0x412344], 0x40
        mov dword ptr [0x612344], 0x60
        mov dword ptr [0x4010], 0x60003
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        mov dword ptr [0x62000], 0x92003
        mov dword ptr [0x60008], 0x400083
        mov ebx, 0x80000000
        REPORT dword ptr [rbx]
        mov dword ptr [0x61000], 0x91003
        invlpg [rbx + 0xabc]
        REPORT dword ptr [rbx]
        // another page table: INVLPG drops what is cached of the way, too
        mov dword ptr [0x60000], 0x62003
        invlpg [rbx]
        REPORT dword ptr [rbx]
        // a large page, by an address somewhere else in it
        REPORT dword ptr [rbx + 0x212344]
        mov dword ptr [0x60008], 0x600083
        invlpg [rbx + 0x3ff000]
        REPORT dword ptr [rbx + 0x212344]
        // less permission
        mov [rbx], eax
        mov dword ptr [0x62000], 0x92001
        invlpg [rbx]
        CATCH mov dword ptr [rbx], 1
        // more permission needs no INVLPG: the fault drops the entry
        mov dword ptr [0x62000], 0x92003
        mov dword ptr [rbx], 0x99
        REPORT dword ptr [0x92000]
        // CR3
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        mov rax, cr3
        mov cr3, rax
        REPORT dword ptr [rbx]
        // absence is never cached
        mov dword ptr [0x61000], 0
        invlpg [rbx]
        CATCH mov eax, [rbx]
        mov dword ptr [0x61000], 0x90003
        REPORT dword ptr [rbx]
        DONE
    "#
}

guest! {
    /// Global pages go with INVLPG and with CR4.PGE.
    paging global_pages, Long, Reports(&[0x90, 0x91, 0x90, 0x91]),
    r#"
        mov dword ptr [0x90000], 0x90
        mov dword ptr [0x91000], 0x91
        mov dword ptr [0x4010], 0x60003
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90103
        mov ebx, 0x80000000
        REPORT dword ptr [rbx]
        mov dword ptr [0x61000], 0x91103
        invlpg [rbx]
        REPORT dword ptr [rbx]
        mov dword ptr [0x61000], 0x90103
        mov rax, cr4
        btc rax, 7
        mov cr4, rax
        btc rax, 7
        mov cr4, rax
        REPORT dword ptr [rbx]
        mov dword ptr [0x61000], 0x91103
        btc rax, 7
        mov cr4, rax
        REPORT dword ptr [rbx]
        DONE
    "#
}

guest! {
    /// Address spaces with PCIDs keep apart, with and without the flush; INVPCID in all four kinds.
    paging pcid, Long,
    Reports(&[13, 0, 0, 0x90, 0x91, 0x90, 0x91, 0x90, 0x92, 0x91, 0x93, 0x94, 0x95, 13, 0, 0, 0x3002, 0x77]),
    r#"
        // PCIDE needs a CR3 with PCID 0
        mov eax, 0x3001
        mov cr3, rax
        mov rbx, cr4
        bts rbx, 17
        CATCH mov cr4, rbx
        mov eax, 0x3000
        mov cr3, rax
        mov cr4, rbx
        // two PML4s, 0x3000 and 0x65000, that differ at 0x80000000
        mov dword ptr [0x65000], 0x66007
        mov rax, [0x4000]
        mov [0x66000], rax
        mov rax, [0x4018]
        mov [0x66018], rax
        mov dword ptr [0x4010], 0x60003
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        mov dword ptr [0x66010], 0x62003
        mov dword ptr [0x62000], 0x63003
        mov dword ptr [0x63000], 0x91003
        mov dword ptr [0x90000], 0x90
        mov dword ptr [0x91000], 0x91
        mov dword ptr [0x92000], 0x92
        mov dword ptr [0x93000], 0x93
        mov dword ptr [0x94000], 0x94
        mov dword ptr [0x95000], 0x95
        mov ebx, 0x80000000
        mov rsi, 0x8000000000003001 // PCID 1, keep
        mov rdi, 0x8000000000065002 // PCID 2, keep
        mov cr3, rsi
        REPORT dword ptr [rbx]
        mov cr3, rdi
        REPORT dword ptr [rbx]
        mov cr3, rsi
        REPORT dword ptr [rbx]
        mov cr3, rdi
        REPORT dword ptr [rbx]
        mov cr3, rsi
        REPORT dword ptr [rbx]
        // a load without bit 63 flushes that PCID
        mov dword ptr [0x61000], 0x92003
        mov eax, 0x3001
        mov cr3, rax
        REPORT dword ptr [rbx]
        mov cr3, rdi
        REPORT dword ptr [rbx]
        // INVPCID: one address of another PCID
        mov dword ptr [0x61000], 0x93003
        mov qword ptr [0x20000], 1
        mov [0x20008], rbx
        xor eax, eax
        invpcid rax, [0x20000]
        mov cr3, rsi
        REPORT dword ptr [rbx]
        // one PCID
        mov cr3, rdi
        mov dword ptr [0x61000], 0x94003
        mov eax, 1
        invpcid rax, [0x20000]
        mov cr3, rsi
        REPORT dword ptr [rbx]
        // all
        mov dword ptr [0x61000], 0x95003
        mov eax, 2
        invpcid rax, [0x20000]
        REPORT dword ptr [rbx]
        // not a kind
        mov eax, 4
        CATCH invpcid rax, [0x20000]
        mov rax, rdi
        btr rax, 63
        sub rax, 0x62000
        mov cr3, rax
        mov rax, cr3 // bit 63 does not stay
        REPORT eax
        REPORT 0x77
        DONE
    "#,
    needs: &[PCID, INVPCID],
}

guest! {
    /// Ring 0 neither executes (SMEP) nor, without EFLAGS.AC, touches (SMAP) user pages.
    paging smep_smap, Long,
    Reports(&[
        0x44, 14, 0x11, 0, 0x8000_0000, 14, 1, 0, 0x8000_0000, 14, 3, 0, 0x8000_0000, 0xc3, 14, 1, 0, 0x8000_0000,
        0x55, 0x77,
    ]),
    r#"
        mov dword ptr [0x4010], 0x60007
        mov dword ptr [0x60000], 0x61007
        mov dword ptr [0x61000], 0x90007
        mov dword ptr [0x90000], 0xc3
        mov ebx, 0x80000000
        call rbx
        REPORT 0x44
        mov rax, cr4
        bts rax, 20
        bts rax, 21
        mov cr4, rax
        mov r14, rbx
        lea r15, [rip + 22f]
        jmp rbx
    22: CATCH mov eax, [rbx]
        CATCH mov [rbx], eax
        stac
        mov eax, [rbx]
        clac
        REPORT eax
        CATCH mov eax, [rbx]
        TO_USER
        mov ebx, 0x80000000
        call rbx
        REPORTU 0x55
        TO_KERNEL
        REPORT 0x77
        DONE
    "#,
    needs: &[SMEP, SMAP],
}

guest! {
    /// 1 GiB pages: data, NX, reserved bits.
    paging gigabyte_pages, Long, Reports(&[0x1111, 0x2222, 14, 0x11, 0, 0x8030_0000, 14, 9, 0, 0x8000_0000]),
    r#"
        mov dword ptr [0x300010], 0x1111
        mov dword ptr [0x4010], 0x83
        mov byte ptr [0x4017], 0x80
        mov ebx, 0x80300000
        REPORT dword ptr [rbx + 0x10]
        mov dword ptr [rbx + 0x20], 0x2222
        REPORT dword ptr [0x300020]
        mov r14, rbx
        lea r15, [rip + 22f]
        jmp rbx
    22: mov dword ptr [0x4010], 0x200083
        mov ebx, 0x80000000
        invlpg [rbx]
        CATCH mov eax, [rbx]
        DONE
    "#,
    needs: &[GIGABYTE],
}
