//! The local APIC: its own interrupts, messages from devices, NMIs; when each is let through.
//!
//! Registers lie at 0xfee00000 (R11 here): 0x20 id, 0x80 TPR, 0xa0 PPR, 0xb0 EOI, 0xf0 SVR, 0x100 ISR,
//! 0x180 TMR, 0x200 IRR, 0x300 ICR (Intel SDM vol. 3, table 11-1). Vectors 0x40 to 0x5f have their bits in
//! the third word of ISR, TMR and IRR (0x120, 0x1a0, 0x220), 0x60 to 0x7f in the fourth.

use crate::{Expected::Reports, asm::guest};

const X2APIC: (u32, u32, usize, u32) = (1, 0, 2, 21);

/// KVM on a host without VT-x or AMD-V is PVM's emulator here, which has its own idea of delivery.
const LATE: Option<&str> = Some("looks for interrupts only now and then");
const OWN_EOI: Option<&str> = Some("ends interrupts by itself when it delivers them");

guest! {
    /// A self-IPI waits in IRR while IF is 0 and is delivered when it is 1.
    interrupts self_ipi, Long, Reports(&[0, 1, 0, 0x40, 0x10, 0x202, 0x2, 0x55, 0, 0]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x40, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov eax, [r11 + 0x220]
        REPORT eax
        mov dword ptr [r11 + 0x300], 0x44040
        mov eax, [r11 + 0x220]
        REPORT eax
        mov eax, [r11 + 0x120]
        REPORT eax
        xor ebx, ebx
        sti
        WAIT_FOR 1, ebx
        cli
        REPORT 0x55
        mov eax, [r11 + 0x220]
        REPORT eax
        mov eax, [r11 + 0x120]
        REPORT eax
        DONE
    22: REPORT 0x40
        mov eax, [rsp + 16]
        REPORT eax
        mov eax, [rsp + 24]
        and eax, 0x202
        REPORT eax
        pushfq
        pop rax
        and eax, 0x202
        REPORT eax
        inc ebx
        EOI
        add rsp, 8
        iretq
    "#
}

guest! {
    /// Whenever an interrupt comes, STI holds it off until the next instruction is done, also one that is not for the
    /// processor's quick ways: x87 with an unmasked exception.
    interrupts sti_before_floats, Long, Reports(&[0, 0x77]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x40, 24f
        mov dword ptr [0x20000], 0x37e
        fninit
        fldcw [0x20000]
        fld1
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x3e0], 0xb
        mov dword ptr [r11 + 0x320], 0x20040 // periodic
        lea rbp, [rip + 23f]
        xor ebx, ebx
        xor edx, edx
        mov dword ptr [r11 + 0x380], 20000
    22: cli
        sti
    23: fstp st(0)
        fld1
        cmp ebx, 3000
        jb 22b
        cli
        mov dword ptr [r11 + 0x380], 0
        REPORT edx
        REPORT 0x77
        DONE
    24: add rsp, 8
        inc ebx
        cmp [rsp], rbp
        jne 25f
        inc edx
    25: EOI
        iretq
    "#,
    emulator_errs: LATE
}

guest! {
    /// The highest vector first, not the first sent; two of one vector are one.
    interrupts priorities, Long, Reports(&[0x51, 0x41, 0x31, 0x77, 0]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x31, 22f
        HANDLER 0x41, 23f
        HANDLER 0x51, 24f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x300], 0x44031
        mov dword ptr [r11 + 0x300], 0x44051
        mov dword ptr [r11 + 0x300], 0x44041
        mov dword ptr [r11 + 0x300], 0x44051
        xor ebx, ebx
        sti
        WAIT_FOR 3, ebx
        cli
        REPORT 0x77
        mov eax, [r11 + 0x220]
        REPORT eax
        DONE
    22: REPORT 0x31
        jmp 25f
    23: REPORT 0x41
        jmp 25f
    24: REPORT 0x51
    25: inc ebx
        EOI
        add rsp, 8
        iretq
    "#
}

guest! {
    /// In service until EOI: only a higher class comes through meanwhile; EOI ends the highest. INT n to a
    /// vector leaves the APIC alone.
    interrupts in_service, Long,
    Reports(&[0x42, 4, 0x40, 0x52, 0x40004, 0x50, 4, 0x142, 0x43, 0x32, 0x77, 0x43, 0]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x32, 25f
        HANDLER 0x42, 26f
        HANDLER 0x43, 27f
        HANDLER 0x52, 28f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x300], 0x44042
        xor ebx, ebx
        sti
        WAIT_FOR 3, ebx
        cli
        REPORT 0x77
        HANDLER 0x43, 29f
        int 0x43
        DONE
    25: REPORT 0x32
        jmp 24f
    26: REPORT 0x42
        mov eax, [r11 + 0x120]
        REPORT eax
        mov eax, [r11 + 0xa0]
        REPORT eax
        mov dword ptr [r11 + 0x300], 0x44032 // lower: waits
        mov dword ptr [r11 + 0x300], 0x44043 // same class: waits
        mov dword ptr [r11 + 0x300], 0x44052 // higher: comes
        sti
        nop
        nop
        cli
        mov eax, [r11 + 0x120]
        REPORT eax
        REPORT 0x142
        jmp 24f
    27: REPORT 0x43
        jmp 24f
    28: REPORT 0x52
        mov eax, [r11 + 0x120]
        REPORT eax
        mov eax, [r11 + 0xa0]
        REPORT eax
        EOI
        add rsp, 8
        iretq
    29: REPORT 0x43
        mov eax, [r11 + 0x120]
        REPORT eax
        add rsp, 8
        iretq
    24: inc ebx
        EOI
        add rsp, 8
        iretq
    "#,
    emulator_errs: OWN_EOI,
}

guest! {
    /// TPR and CR8 are one; they hold back their class and below, and show in PPR.
    interrupts task_priority, Long,
    Reports(&[5, 0x50, 0x50, 0x65, 0x77, 2, 0x41, 0x78, 3, 0x30, 13, 0, 0]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x41, 22f
        HANDLER 0x65, 23f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x80], 0x50
        mov rax, cr8
        REPORT eax
        mov eax, [r11 + 0x80]
        REPORT eax
        mov eax, [r11 + 0xa0]
        REPORT eax
        xor ebx, ebx
        mov dword ptr [r11 + 0x300], 0x44041
        sti
        mov dword ptr [r11 + 0x300], 0x44065
        WAIT_FOR 1, ebx
        REPORT 0x77
        mov eax, [r11 + 0x220]
        REPORT eax
        xor eax, eax
        mov cr8, rax
        WAIT_FOR 2, ebx
        REPORT 0x78
        mov eax, 3
        mov cr8, rax
        mov rax, cr8
        REPORT eax
        mov eax, [r11 + 0x80]
        REPORT eax
        mov eax, 16
        CATCH mov cr8, rax
        DONE
    22: REPORT 0x41
        jmp 24f
    23: REPORT 0x65
    24: inc ebx
        EOI
        add rsp, 8
        iretq
    "#
}

guest! {
    /// STI holds interrupts off for one instruction, POPF does not; STI, CLI opens no window.
    interrupts shadow_of_sti, Long, Reports(&[1, 2, 0x77, 0, 1]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x40, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x300], 0x44040
        xor ebx, ebx
        sti
        inc ebx // in the shadow
        inc ebx
        cli
        REPORT ebx
        // STI, CLI: no window
        mov dword ptr [r11 + 0x300], 0x44040
        sti
        cli
        nop
        REPORT 0x77
        // POPF: at once
        xor ebx, ebx
        pushfq
        or dword ptr [rsp], 0x200
        popfq
        inc ebx
        cli
        REPORT ebx
        DONE
    22: REPORT ebx
        EOI
        add rsp, 8
        iretq
    "#,
    emulator_errs: LATE,
}

guest! {
    /// NMIs come with IF 0, one at a time: a second waits for IRET; the APIC has none in service.
    interrupts nmi, Long,
    Reports(&[2, 0, 1, 0x55, 2, 0, 2, 0x102, 2, 0, 3, 0x77]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 2, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        xor ebx, ebx
        xor ebp, ebp
        cli
        mov dword ptr [r11 + 0x310], 0
        mov dword ptr [r11 + 0x300], 0x4400 // to the APIC with id 0: ourselves
        WAIT_FOR 1, ebx
        REPORT 0x55
        mov ebp, 1
        mov dword ptr [r11 + 0x300], 0x4400
        WAIT_FOR 3, ebx
        REPORT 0x77
        DONE
    22: REPORT 2
        inc ebx
        mov eax, [r11 + 0x100]
        REPORT eax
        REPORT ebx
        cmp ebp, 1
        jne 23f
        mov ebp, 2
        mov dword ptr [r11 + 0x300], 0x4400 // both latched into one
        mov dword ptr [r11 + 0x300], 0x4400
        nop
        nop
        REPORT 0x102
    23: add rsp, 8
        iretq
    "#
}

guest! {
    /// A device's message: delivered, lost while masked, changed.
    interrupts message_signalled, Long,
    Reports(&[0x60, 0x77, 0, 0x62, 0x78, 0x62]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x60, 22f
        HANDLER 0x62, 23f
        mov dword ptr [r11 + 0xf0], 0x1ff
        xor ebx, ebx
        sti
        mov dx, 0x502
        mov al, 1
        out dx, al
        WAIT_FOR 1, ebx
        REPORT 0x77
        mov al, 5 // mask
        out dx, al
        mov al, 1
        out dx, al
        cli
        mov ecx, 100
    24: pause
        dec ecx
        jnz 24b
        mov eax, [r11 + 0x230]
        REPORT eax
        sti
        mov al, 6 // unmask with another vector
        out dx, al
        mov al, 1
        out dx, al
        WAIT_FOR 2, ebx
        REPORT 0x78
        mov al, 1
        out dx, al
        WAIT_FOR 3, ebx
        DONE
    22: REPORT 0x60
        jmp 25f
    23: REPORT 0x62
    25: inc ebx
        push rax
        EOI
        pop rax
        add rsp, 8
        iretq
    "#
}

guest! {
    /// A level-triggered message sets TMR, and its EOI goes to the bus; an edge-triggered one's does not.
    interrupts level_triggered, Long,
    Reports(&[0x61, 0xe0161, 0x77, 2, 0x61, 0xe0161, 0x78, 2, 0x60, 0x79, 2]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 0x60, 23f
        HANDLER 0x61, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        xor ebx, ebx
        sti
        mov dx, 0x502
        mov al, 3
        out dx, al
        WAIT_FOR 1, ebx
        REPORT 0x77
        mov eax, [r11 + 0x1b0]
        REPORT eax
        mov al, 3
        out dx, al
        WAIT_FOR 2, ebx
        REPORT 0x78
        mov eax, [r11 + 0x1b0]
        REPORT eax
        mov al, 1
        out dx, al
        WAIT_FOR 3, ebx
        REPORT 0x79
        mov eax, [r11 + 0x1b0]
        REPORT eax
        DONE
    22: REPORT 0x61
        jmp 24f
    23: REPORT 0x60
    24: EOI
        inc ebx
        add rsp, 8
        iretq
    "#
}

guest! {
    /// HLT sleeps until an interrupt or, with IF 0, an NMI; then goes on behind it.
    interrupts halt_and_wake, Long,
    Reports(&[0x60, 0, 0x77, 0x60, 0, 0x78, 2, 0x79, 0x60, 0, 0x7a]),
    r#"
        mov r11d, 0xfee00000
        HANDLER 2, 23f
        HANDLER 0x60, 22f
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dx, 0x502
        mov al, 4
        out dx, al
        lea rbp, [rip + 24f]
        sti
        hlt
    24: REPORT 0x77
        mov al, 4
        out dx, al
        lea rbp, [rip + 25f]
        hlt
    25: REPORT 0x78
        cli
        mov al, 7 // NMI, later
        out dx, al
        hlt
        REPORT 0x79
        // already pending: HLT does not sleep
        mov al, 1
        out dx, al
    26: pause
        mov eax, [r11 + 0x230]
        test eax, eax
        jz 26b
        lea rbp, [rip + 27f]
        sti
        hlt
    27: REPORT 0x7a
        DONE
    22: REPORT 0x60
        push rax
        mov rax, [rsp + 16]
        sub rax, rbp
        REPORT eax
        EOI
        pop rax
        add rsp, 8
        iretq
    23: REPORT 2
        add rsp, 8
        iretq
    "#
}

guest! {
    /// x2APIC: registers as MSRs, 64-bit ICR, SELF IPI, #GP where there is nothing.
    interrupts x2apic, Long,
    Reports(&[0xfee0_0900, 0xfee0_0d00, 0, 1, 0x40, 0x77, 0x41, 0x78, 13, 0, 0, 13, 0, 0, 0x50]),
    r#"
        HANDLER 0x40, 22f
        HANDLER 0x41, 22f
        mov ecx, 0x1b
        rdmsr
        REPORT eax
        bts eax, 10
        wrmsr
        rdmsr
        REPORT eax
        mov ecx, 0x802
        rdmsr
        REPORT eax
        mov ecx, 0x80d // LDR: cluster 0, bit 0
        rdmsr
        REPORT eax
        mov ecx, 0x80f
        mov eax, 0x1ff
        xor edx, edx
        wrmsr
        mov ebp, 0x40
        xor ebx, ebx
        sti
        mov ecx, 0x83f // SELF IPI
        mov eax, 0x40
        wrmsr
        WAIT_FOR 1, ebx
        REPORT 0x77
        mov ebp, 0x41
        mov ecx, 0x830 // ICR, to id 0
        mov eax, 0x4041
        xor edx, edx
        wrmsr
        WAIT_FOR 2, ebx
        REPORT 0x78
        cli
        mov ecx, 0x80e // no DFR here
        CATCH rdmsr
        mov ecx, 0x80b
        CATCH rdmsr // EOI is write-only
        mov ecx, 0x808 // TPR
        mov eax, 0x50
        wrmsr
        rdmsr
        REPORT eax
        DONE
    22: REPORT ebp
        inc ebx
        push rcx
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
        wrmsr
        pop rcx
        add rsp, 8
        iretq
    "#,
    needs: &[X2APIC],
}
