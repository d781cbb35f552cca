//! Code that changes: by itself, under itself, from other addresses.

use crate::{Expected::Reports, asm::guest};

guest! {
    /// A loop patches the immediate of an instruction that it then runs; the same through another mapping and
    /// by a string instruction.
    code modified_by_itself, Long, Reports(&[1, 2, 3, 4, 0x21, 0x31, 0x90c3]),
    r#"
        xor ecx, ecx
    22: inc ecx
        mov [rip + 23f + 1], ecx
        jmp 23f
    23: mov eax, 0x12345678
        REPORT eax
        cmp ecx, 4
        jb 22b
        // through the user alias of the same page
        lea rbx, [rip + 24f + 1]
        mov eax, 0x40000000
        add rbx, rax
        mov dword ptr [rbx], 0x21
        jmp 24f
    24: mov eax, 0x12345678
        REPORT eax
        // by REP MOVSB over the code
        lea rsi, [rip + 25f]
        lea rdi, [rip + 26f]
        mov ecx, 5
        cld
        rep movsb
        jmp 26f
    25: mov eax, 0x31
    26: mov eax, 0x12345678
        REPORT eax
        // code written where data was read and run before
        mov ebx, 0x90000
        mov byte ptr [rbx], 0xc3
        call rbx
        mov word ptr [rbx], 0xc390
        call rbx
        movzx eax, word ptr [rbx]
        xchg al, ah
        xchg al, ah
        rol ax, 8
        REPORT eax
        DONE
    "#
}

guest! {
    /// A store to the very next instructions is seen by them (Intel SDM vol. 3, 12.6: same linear address).
    code modified_ahead, Long, Reports(&[0x42, 0x43, 0x44, 5, 0x55]),
    r#"
        mov ecx, 0x42
        mov [rip + 22f + 1], ecx
    22: mov eax, 0x12345678
        REPORT eax
        // a whole instruction turns into another: MOV EAX to MOV EBX
        mov ebx, 0
        mov eax, 0x43
        mov byte ptr [rip + 23f], 0xbb
    23: mov eax, 0x44
        REPORT eax
        REPORT ebx
        // INC, five times, from NOPs that are overwritten one by one inside a loop
        xor eax, eax
        xor ecx, ecx
        lea rdx, [rip + 24f]
    25: mov word ptr [rdx + rcx * 2], 0xc0ff // INC EAX
        inc ecx
        cmp ecx, 5
        jb 25b
    24: .byte 0x66, 0x90, 0x66, 0x90, 0x66, 0x90, 0x66, 0x90, 0x66, 0x90
        REPORT eax
        // a jump's distance
        mov al, [rip + 29f]
        mov [rip + 26f + 1], al
    26: jmp 28f
    28: REPORT 0xbad
    27: REPORT 0x55
        DONE
    29: .byte 27b - 28b
    "#
}

guest! {
    /// Instructions across a page border: either part changes, the second page moves or goes away.
    code across_pages, Long,
    Reports(&[0x4433_2211, 0x4433_2255, 0x6633_2255, 0x7777_7755, 14, 0x10, 2, 0x91000, 0x4433_2255]),
    r#"
        // MOV EAX, imm32; RET with the last two bytes of the immediate in the next page
        mov ebx, 0x90ffd
        mov byte ptr [rbx], 0xb8
        mov dword ptr [rbx + 1], 0x44332211
        mov byte ptr [rbx + 5], 0xc3
        call rbx
        REPORT eax
        mov byte ptr [rbx + 1], 0x55
        call rbx
        REPORT eax
        mov byte ptr [rbx + 4], 0x66
        call rbx
        REPORT eax
        // another page behind the border
        mov byte ptr [0x92000], 0x77
        mov byte ptr [0x92001], 0x77
        mov byte ptr [0x92002], 0xc3
        mov byte ptr [rbx + 2], 0x77
        mov qword ptr [0x6000 + 8 * 0x91], 0x92003
        invlpg [0x91000]
        call rbx
        REPORT eax
        // none at all: the fault is the instruction's, CR2 the missing page
        mov qword ptr [0x6000 + 8 * 0x91], 0
        invlpg [0x91000]
        lea r14, [rbx - 2]
        lea r15, [rip + 22f]
        jmp rbx
    22: mov qword ptr [0x6000 + 8 * 0x91], 0x91003
        invlpg [0x91000]
        mov byte ptr [rbx + 2], 0x22
        mov byte ptr [rbx + 4], 0x44
        call rbx
        REPORT eax
        DONE
    "#
}

guest! {
    /// The same linear address with other code behind it: by INVLPG, by CR3, by a write to the other page.
    code moved_pages, Long, Reports(&[1, 2, 3, 4, 1, 2]),
    r#"
        // at 0x90000, of this space: mov eax, 1; ret. At 0x91000, global later on: mov eax, 2; ret
        mov dword ptr [0x90000], 0x000001b8
        mov word ptr [0x90004], 0xc300
        mov dword ptr [0x91000], 0x000002b8
        mov word ptr [0x91004], 0xc300
        mov dword ptr [0x4010], 0x60003 // 0x80000000
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        mov ebx, 0x80000000
        call rbx
        REPORT eax
        mov dword ptr [0x61000], 0x91003
        invlpg [rbx]
        call rbx
        REPORT eax
        mov byte ptr [0x90001], 3
        mov byte ptr [0x91001], 3
        call rbx
        REPORT eax
        // two PML4s
        mov rax, [0x3000]
        mov [0x65000], rax
        mov dword ptr [0x65000], 0x66003
        mov rax, [0x4000]
        mov [0x66000], rax
        mov dword ptr [0x66010], 0x62003
        mov dword ptr [0x62000], 0x63003
        mov dword ptr [0x63000], 0x90003
        mov byte ptr [0x90001], 1
        mov byte ptr [0x91001], 4
        call rbx
        REPORT eax
        mov eax, 0x65000
        mov cr3, rax
        call rbx
        REPORT eax
        mov byte ptr [0x91001], 2
        mov eax, 0x3000
        mov cr3, rax
        call rbx
        REPORT eax
        DONE
    "#
}

guest! {
    /// A locked addition whose immediate is a new one each time: an engine that keeps something for each must let go.
    code ever_new_operands, Long, Reports(&[0x2a06_b550]),
    r#"
        mov ebx, 0x20000
        mov edi, 0x90000
        mov byte ptr [rdi], 0xf0 // LOCK ADD [RBX], imm32; RET
        mov word ptr [rdi + 1], 0x0381
        mov byte ptr [rdi + 7], 0xc3
        mov ecx, 100000
    22: mov [rdi + 3], ecx
        call rdi
        dec ecx
        jnz 22b
        REPORT dword ptr [rbx]
        DONE
    "#
}

guest! {
    /// Data in a page that has code: writes to either, and what was the one becomes the other.
    code data_beside_code, Long, Reports(&[0x11, 0x11, 13, 0x2200_0011, 1, 4, 7, 0x2200_0012, 13]),
    r#"
        // MOV EAX, imm32; RET over the border of two cache lines
        mov ebx, 0x90000
        lea rdi, [rbx + 0x3e]
        mov byte ptr [rdi], 0xb8
        mov dword ptr [rdi + 1], 0x11
        mov byte ptr [rdi + 5], 0xc3
        call rdi
        REPORT eax
        mov qword ptr [rbx + 0x800], 5
        add dword ptr [rbx + 0x800], 6
        lock inc dword ptr [rbx + 0x800]
        inc byte ptr [rbx + 0x800]
        call rdi
        REPORT eax
        REPORT dword ptr [rbx + 0x800]
        mov byte ptr [rdi + 4], 0x22
        call rdi
        REPORT eax
        // INC EAX; RET where nothing was, and three of them
        lea rsi, [rbx + 0x100]
        mov word ptr [rsi], 0xc0ff
        mov byte ptr [rsi + 2], 0xc3
        xor eax, eax
        call rsi
        REPORT eax
        mov dword ptr [rsi + 2], 0xc0ffc0ff
        mov byte ptr [rsi + 6], 0xc3
        call rsi
        REPORT eax
        // NOPs from the data before it to all but the last of its bytes
        mov rdx, rdi
        lea rdi, [rbx + 0x80]
        mov ecx, 0x86
        mov al, 0x90
        cld
        rep stosb
        mov eax, 7
        call rsi
        REPORT eax
        // an access from the page before, which ends in the data, and one that ends in the code
        mov qword ptr [rbx - 4], 0
        mov byte ptr [rdx + 1], 0x12
        call rdx
        REPORT eax
        REPORT dword ptr [rbx + 0x800]
        DONE
    "#
}

guest! {
    /// Reads beside code, by the register by which an unusual instruction has just written there: they ask to read only.
    code reads_beside_code, Long, Reports(&[12]),
    r#"
        mov byte ptr [0x90000], 0xc3 // RET
        mov ebx, 0x90100
        mov dword ptr [rbx + 64], 5
        mov dword ptr [rbx + 72], 7
        mov ecx, 100
    22: mov eax, 0x90000
        call rax
        fnstenv [rbx]
        mov eax, [rbx + 64]
        add eax, [rbx + 72]
        dec ecx
        jnz 22b
        REPORT eax
        DONE
    "#
}

guest! {
    /// The same behind a write that must be aligned, and so is looked up for itself: a read is the first of those that
    /// may be looked up together, in a page that may be written, but has code. It must not wait for an entry to write by.
    code reads_behind_aligned_writes, Long, Reports(&[12]),
    r#"
        mov byte ptr [0x90000], 0xc3 // RET
        mov ebx, 0x90100
        mov eax, 6
        movd xmm0, eax
        mov ecx, 100
    22: mov eax, 0x90000
        call rax
        movaps [rbx], xmm0
        mov eax, [rbx]
        add eax, [rbx]
        dec ecx
        jnz 22b
        REPORT eax
        DONE
    "#
}

guest! {
    /// A page of one address space that becomes a global one elsewhere: a load of CR3 drops what was known of it.
    code local_to_global, Long, Reports(&[1, 80]),
    r#"
        mov rax, cr4
        bts rax, 7
        mov cr4, rax
        // at 0x90000, of this space: mov eax, 1; ret. At 0x91000, global later on: mov eax, 2; ret
        mov dword ptr [0x90000], 0x000001b8
        mov word ptr [0x90004], 0xc300
        mov dword ptr [0x91000], 0x000002b8
        mov word ptr [0x91004], 0xc300
        mov byte ptr [0x91010], 0xc3
        mov byte ptr [0x92000], 0xc3
        mov dword ptr [0x4010], 0x60003 // 0x80000000
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        mov dword ptr [0x61800], 0x92003
        mov ebx, 0x80000000
        mov ecx, 10
    22: call rbx
        dec ecx
        jnz 22b
        REPORT eax
        // the page is another one now, and what the processor knows of the old one is replaced; then the code gets hot
        mov dword ptr [0x61000], 0x91103
        lea rdx, [rbx + 0x100000]
        call rdx
        lea rdx, [rbx + 0x10]
        call rdx
        mov esi, 2
    23: mov rax, cr3
        cmp esi, 1
        jne 25f
        mov cr3, rax
    25: xor edi, edi
        mov ecx, 40
    24: call rbx
        add edi, eax
        dec ecx
        jnz 24b
        dec esi
        jnz 23b
        REPORT edi
        DONE
    "#
}
