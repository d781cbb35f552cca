//! Every exception that ring-0 64-bit code can raise: vector, error code, RIP (see [`crate::asm`] for the
//! order of the reports).

use crate::{
    Expected::{Crash, Reports},
    asm::guest,
};

guest! {
    /// #DE by zero and by overflow, in all sizes; registers stay as they were.
    exceptions divide_errors, Long,
    Reports(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x1000, 0x11, 7, 1]),
    r#"
        mov eax, 5
        xor edx, edx
        xor ecx, ecx
        CATCH div ecx
        mov eax, 0x80000000
        cdq
        mov ecx, -1
        CATCH idiv ecx
        mov eax, 0x1000
        mov cl, 0x10
        CATCH div cl
        mov edx, 0x11
        mov ecx, 0x11
        CATCH div ecx
        mov rdx, -1
        mov rax, 0
        mov ecx, 1
        CATCH idiv rcx
        mov eax, 0x1000
        mov edx, 0x11
        xor ecx, ecx
        CATCH div cx
        REPORT eax
        REPORT edx
        // and one that works
        mov edx, 0
        mov eax, 50
        mov ecx, 7
        div ecx
        REPORT eax
        REPORT edx
        DONE
    "#
}

guest! {
    /// Single step and instruction breakpoints: RIP, DR6, and RF that lets the instruction through.
    exceptions debug_traps, Long,
    Reports(&[
        1, 0, 1, 0xffff_4ff0, 0x51, //
        1, 0, 0, 0xffff_0ff1, 0x52, //
        1, 0, 0, 0xffff_2ff0, 0x400,
    ]),
    r#"
        // single step: a trap behind the NOP
        lea r14, [rip + 22f]
        lea r15, [rip + 23f]
        pushfq
        or dword ptr [rsp], 0x100
        popfq
    22: nop
    23: REPORT 0x51
        // DR0: execution, a fault
        lea rax, [rip + 24f]
        mov dr0, rax
        mov eax, 0x401
        mov dr7, rax
        lea r14, [rip + 24f]
        lea r15, [rip + 25f]
    24: nop
        REPORT 0xbad
    25: REPORT 0x52
        // DR7.GD: touching a debug register faults; DR7.GD is off in the handler
        mov eax, 0x2400
        mov dr7, rax
        CATCH mov dr3, rax
        mov rax, dr7
        REPORT eax
        DONE
    "#
}

guest! {
    /// Data breakpoints for writes and for all accesses: traps behind the access, which is done.
    exceptions data_breakpoints, Long, Reports(&[1, 0, 6, 0xffff_0ff2, 0x1234, 1, 0, 4, 0xffff_0ff2, 0x53]),
    r#"
        // DR1: a write of 4 bytes, a trap; the write is done
        mov eax, 0x20000
        mov dr1, rax
        mov eax, 0x00d00404
        mov dr7, rax
        mov ebx, 0x20000
        mov dword ptr [rbx + 8], 1 // not covered
        mov eax, [rbx] // reads do not count
        lea r14, [rip + 26f]
        lea r15, [rip + 27f]
    26: mov word ptr [rbx + 2], 0x1234 // 6 bytes
        nop
    27: movzx eax, word ptr [rbx + 2]
        REPORT eax
        // DR1 for reads and writes
        mov eax, 0x00f00404
        mov dr7, rax
        lea r14, [rip + 28f]
        lea r15, [rip + 29f]
    28: movzx eax, byte ptr [rbx + 3]
        nop
    29: REPORT 0x53
        DONE
    "#,
    emulator_errs: Some("has no data breakpoints"),
}

guest! {
    /// INT3, INT n and their RIP, behind the instruction; INT through a gate that is not there.
    exceptions breakpoints, Long,
    Reports(&[3, 0, 1, 3, 0, 2, 4, 0, 2, 0x30, 0, 2, 11, 0x182, 0, 13, 0x402, 0]),
    r#"
        CATCH .byte 0xcc
        CATCH .byte 0xcd, 3
        CATCH int 4
        CATCH int 0x30
        // not present: #NP with the gate's index and the IDT bit
        mov byte ptr [0x2000 + 16 * 0x30 + 5], 0x0e
        CATCH int 0x30
        mov byte ptr [0x2000 + 16 * 0x30 + 5], 0x8e
        // beyond the IDT's limit: #GP
        sidt [0x20000]
        mov word ptr [0x20000], 0x7ff
        lidt [0x20000]
        CATCH int 0x80
        DONE
    "#
}

guest! {
    /// #UD: by UD2, by LOCK where it may not be, by instructions that 64-bit mode dropped.
    exceptions undefined_opcodes, Long,
    Reports(&[6, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0, 0, 6, 0, 0]),
    r#"
        CATCH ud2
        CATCH .byte 0xf0, 0x89, 0xc0
        CATCH .byte 0xf0, 0x90
        CATCH .byte 0x06
        CATCH .byte 0x27
        CATCH .byte 0xd5, 0x0a
        CATCH .byte 0x0f, 0xff, 0xc0
        CATCH .byte 0x8c, 0xf0
        DONE
    "#
}

guest! {
    /// #NM by CR0.TS and CR0.EM, and what CLTS does.
    exceptions device_not_available, Long,
    Reports(&[7, 0, 0, 7, 0, 0, 0x80010033, 7, 0, 0]),
    r#"
        mov rax, cr0
        or eax, 8
        mov cr0, rax
        CATCH fwait
        CATCH movaps xmm0, xmm1
        clts
        mov rax, cr0
        REPORT eax
        or eax, 4
        mov cr0, rax
        CATCH fninit
        DONE
    "#
}

guest! {
    /// A fault while a page fault is delivered: #DF with error code 0 on its IST stack.
    exceptions double_fault, Long,
    Reports(&[8, 0, 1, 0x3c000, 0x77]),
    r#"
        HANDLER 8, 22f
        mov byte ptr [0x2000 + 16 * 14 + 5], 0x0e
        mov qword ptr [0x6000 + 8 * 0x90], 0
        invlpg [0x90000]
        mov [0x20000], rsp
        mov eax, [0x90000]
        REPORT 0xbad
        DONE
    22: REPORT 8
        REPORT dword ptr [rsp]
        mov eax, [rsp + 16] // CS
        shr eax, 4
        REPORT eax
        lea rax, [rsp + 48]
        REPORT eax
        mov rax, [rsp + 32] // the interrupted RSP
        cmp rax, [0x20000]
        jne 23f
        REPORT 0x77
    23: DONE
    "#
}

guest! {
    /// #NP, #SS and #GP by loading segment registers; #SS by an address on the stack.
    exceptions segment_faults, Long,
    Reports(&[
        11, 0x50, 0, 12, 0x50, 0, 13, 0x1000, 0, 13, 0x3c, 0, 13, 0, 0, 13, 0x10, 0, 12, 0, 0, 13, 0x40, 0, 0x18, 0,
    ]),
    r#"
        mov eax, 0x50
        CATCH mov ds, eax
        CATCH mov ss, eax
        mov eax, 0x1003 // beyond the GDT
        CATCH mov es, eax
        mov eax, 0x3c // an LDT that is not there
        CATCH mov fs, eax
        mov eax, 3 // null with RPL 3 in SS at CPL 0
        CATCH mov ss, eax
        mov eax, 0x10 // code in SS
        CATCH mov ss, eax
        mov rbp, 0x800000000000
        CATCH mov rax, [rbp]
        // a busy TSS
        mov byte ptr [0x1045], 0x8b
        mov eax, 0x40
        CATCH ltr ax
        mov eax, 0x18
        mov ds, eax
        mov ecx, ds
        REPORT ecx
        xor eax, eax
        mov ds, eax // null is fine outside SS
        mov ecx, ds
        REPORT ecx
        DONE
    "#
}

guest! {
    /// Pushes to a stack that is not canonical (#SS, by the address and not by RSP) or just below (#PF),
    /// through an IST stack; #DF without one.
    exceptions bad_stack_pointer, Long,
    Reports(&[12, 0, 0, 0x8008, 14, 2, 0, 0xffff_fff8, 8, 0, 0, 0x8018]),
    r#"
        mov byte ptr [0x2000 + 16 * 12 + 4], 2
        mov byte ptr [0x2000 + 16 * 14 + 4], 2
        mov rbx, rsp
        mov rsp, 0x800000000008
        CATCH push rax
        mov rax, rsp
        mov rsp, rbx
        mov rcx, rax
        shr rax, 32
        or eax, ecx
        REPORT eax
        mov rsp, 0x800000000000
        CATCH push rax
        // without one: the frame starts at a multiple of 16, and its first push must not be canonical either
        mov byte ptr [0x2000 + 16 * 12 + 4], 0
        mov rsp, 0x800000000018
        CATCH push rax
        mov rax, rsp
        mov rsp, rbx
        mov rcx, rax
        shr rax, 32
        or eax, ecx
        REPORT eax
        DONE
    "#
}

guest! {
    /// #GP(0): non-canonical addresses, unaligned SSE, unknown MSRs, reserved bits of control registers.
    exceptions general_protection, Long,
    Reports(&[
        13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 0x77,
    ]),
    r#"
        mov rbx, 0x800000000000
        CATCH mov rax, [rbx]
        CATCH mov [rbx], rax
        mov ecx, 0x12345678
        CATCH rdmsr
        CATCH wrmsr
        mov ecx, 0xc0000082 // LSTAR wants a canonical address
        mov edx, 0x8000
        xor eax, eax
        CATCH wrmsr
        mov rax, cr4
        bts rax, 31
        CATCH mov cr4, rax
        mov rax, cr0
        btr rax, 0 // PG without PE
        CATCH mov cr0, rax
        mov rax, cr4
        btr rax, 5 // PAE cannot go in long mode
        CATCH mov cr4, rax
        mov ecx, 0xc0000080
        rdmsr
        btr eax, 8 // nor can LME while paging
        CATCH wrmsr
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// Where an operand and the stack both are memory, each has its own fault: #SS(0) for a stack in the hole of addresses, or
    /// reaching into it, #GP(0) for the operand.
    exceptions two_memory_operands, Long,
    Reports(&[
        12, 0, 0, 12, 0, 0, 12, 0, 0, 12, 0, 0, 12, 0, 0, 12, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 12, 0, 0, 0x77,
    ]),
    r#"
        mov byte ptr [0x2000 + 16 * 12 + 4], 2
        mov byte ptr [0x2000 + 16 * 13 + 4], 2
        mov r13, rsp
        mov ebx, 0x20000
        lea rax, [rip + 21f]
        mov [rbx], rax
        mov rsp, 0x800000000008
        CATCH push qword ptr [rbx]
        CATCH push word ptr [rbx]
        CATCH call [rbx]
        mov rsp, 0x800000000000
        CATCH pop qword ptr [rbx]
        mov rsp, 0x800000000001 // its first byte is not in the hole
        CATCH push word ptr [rbx]
        CATCH push qword ptr [rbx]
        mov rsp, r13
        mov rbx, 0x800000000000
        CATCH push qword ptr [rbx]
        CATCH call [rbx]
        CATCH pop qword ptr [rbx]
        mov rsp, 0x800000000008
        CATCH pop qword ptr [rsp]
        mov rsp, r13
    21: REPORT 0x77
        DONE
    "#,
    emulator_errs: Some("takes a push that reaches into the hole of addresses for one of a kind that it cannot deliver"),
}

guest! {
    /// #GP(0) by jumps and returns to addresses that are not canonical and end as code does; nothing is popped.
    exceptions jumps_to_nowhere, Long, Reports(&[13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 13, 0, 0, 0x77]),
    r#"
        mov rbx, 0x8000000000000001
        CATCH jmp rbx
        mov rbx, 0x8000000000000002
        CATCH jmp rbx
        mov rbx, 0x8000000000000000
        CATCH jmp rbx
        mov r13, rsp
        mov rbx, 0x8000000000000001
        push rbx
        CATCH ret
        cmp [rsp], rbx
        jne 21f
        inc qword ptr [rsp]
        CATCH ret
    21: mov rsp, r13
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// #PF for each kind of access in ring 0: error code and CR2.
    exceptions page_faults, Long,
    Reports(&[
        14, 0, 0, 0x90008, 14, 2, 0, 0x90010, 14, 3, 0, 0x91018, 14, 0x10, 0, 0x90000, //
        14, 0, 0, 0x9000_0000, 14, 2, 0, 0x90000, 1, 14, 2, 0, 0x90000, 2, 0x20002, //
    ]),
    r#"
        mov qword ptr [0x6000 + 8 * 0x90], 0
        mov qword ptr [0x6000 + 8 * 0x91], 0x91001
        invlpg [0x90000]
        invlpg [0x91000]
        mov byte ptr [0x2000 + 16 * 14 + 4], 2 // IST2: RSP will be bad, too
        mov ebx, 0x90000
        CATCH mov rax, [rbx + 8]
        CATCH mov [rbx + 16], rax
        CATCH mov [rbx + 0x1018], rax
        mov r14, rbx
        lea r15, [rip + 22f]
        jmp rbx
    22: mov ecx, 0x90000000 // no page directory
        CATCH mov al, [rcx]
        // a push and a string instruction stop where they fault, and leave what is done
        mov rcx, rsp
        lea rsp, [rbx + 8]
        CATCH push rax
        mov rax, rsp
        mov rsp, rcx
        sub rax, rbx
        shr eax, 3
        REPORT eax
        mov edi, 0x8fffe
        mov esi, 0x20000
        mov ecx, 4
        CATCH rep movsb
        REPORT ecx
        REPORT esi
        DONE
    "#
}

guest! {
    /// An access across the border into a missing page: CR2 is the first missing byte, nothing is written.
    exceptions split_accesses, Long,
    Reports(&[14, 0, 0, 0x90000, 14, 2, 0, 0x90000, 0x1122_3344, 14, 3, 0, 0x8fffe, 0x5566, 0xdead_beef, 0x1234]),
    r#"
        mov qword ptr [0x6000 + 8 * 0x90], 0
        invlpg [0x90000]
        mov ebx, 0x90000
        mov dword ptr [rbx - 4], 0x11223344
        CATCH mov rax, [rbx - 4]
        mov rax, -1
        CATCH mov [rbx - 4], rax
        REPORT dword ptr [rbx - 4]
        // the other way round: the first page is read-only
        mov qword ptr [0x6000 + 8 * 0x8f], 0x8f001
        mov qword ptr [0x6000 + 8 * 0x90], 0x90003
        invlpg [0x8f000]
        mov word ptr [rbx], 0x5566
        mov eax, -1
        CATCH mov [rbx - 2], eax
        movzx eax, word ptr [rbx]
        REPORT eax
        // and one that works, into a page that lies elsewhere
        mov qword ptr [0x6000 + 8 * 0x8f], 0x85003
        invlpg [0x8f000]
        mov dword ptr [rbx - 2], 0xdeadbeef
        mov eax, [rbx - 2]
        REPORT eax
        mov word ptr [rbx - 2], 0x1234
        movzx eax, word ptr [0x85ffe]
        REPORT eax
        DONE
    "#,
    emulator_errs: Some("writes the first part of an access before the second part faults"),
}

guest! {
    /// No IDT at all: the third fault ends the guest.
    exceptions triple_fault, Long, Crash(&[0x33], "triple fault"),
    r#"
        REPORT 0x33
        xor eax, eax
        mov [0x20000], rax
        mov [0x20008], rax
        lidt [0x20000]
        CATCH ud2
        REPORT 0xbad
        DONE
    "#
}
