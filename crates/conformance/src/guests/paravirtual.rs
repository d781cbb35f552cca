//! What KVM tells guests and does for them, and our own engine alike (Linux Documentation/virt/kvm/x86).

use super::smp::smp_guest;
use crate::{Expected::Reports, asm::guest};

const STEAL_TIME: (u32, u32, usize, u32) = (0x4000_0001, 0, 0, 5);
const PV_TLB_FLUSH: (u32, u32, usize, u32) = (0x4000_0001, 0, 0, 9);

guest! {
    /// The register of the steal time: what may be written, and that the record is not touched while it is off.
    paravirtual steal_time_register, Long, Reports(&[0, 13, 0, 0, 0, 0x70001, 1, 0, 0xff, 0x70000]),
    r#"
        mov ecx, 0x4b564d03
        rdmsr
        REPORT eax
        mov eax, 0x70021 // a record is aligned to 64 bytes
        xor edx, edx
        CATCH wrmsr
        rdmsr
        REPORT eax
        mov eax, 0x70001
        wrmsr
        rdmsr
        REPORT eax
        // a version that is even, and a processor that runs
        mov ebx, [0x70008]
        and ebx, 1
        xor ebx, 1
        REPORT ebx
        movzx ebx, byte ptr [0x70010]
        REPORT ebx
        mov eax, 0x70000
        wrmsr
        mov byte ptr [0x70010], 0xff
        HANDLER 0x45, 22f
        mov r11d, 0xfee00000
        mov dword ptr [r11 + 0xf0], 0x1ff
        mov dword ptr [r11 + 0x300], 0x40045
        sti
        hlt
        cli
        movzx ebx, byte ptr [0x70010]
        REPORT ebx
        mov ecx, 0x4b564d03
        rdmsr
        REPORT eax
        DONE
    22: EOI
        add rsp, 8
        iretq
    "#,
    needs: &[STEAL_TIME],
}

smp_guest! {
    /// A halted processor says that it does not run, and drops all translations before it goes on, if it is asked to
    /// meanwhile.
    paravirtual flush_while_halted, 2, &[0x90, 0x91, 0, 0x92, 0, 0x77],
    r#"
        .macro REMAP page, turn
            // the other one may come and go before it stays away
        25: WAIT_FOR 1, byte ptr [0x70010]
            mov dword ptr [0x61000], \page << 12 | 3
            mov eax, 1
            mov ecx, 3
            lock cmpxchg [0x70010], cl
            jne 25b
            ICR 1, 0x4050
            WAIT_FOR \turn, dword ptr [0x20000]
            REPORT dword ptr [0x20004]
            REPORT dword ptr [0x20008]
        .endm
        HANDLER 0x50, 24f
        mov dword ptr [0x90000], 0x90
        mov dword ptr [0x91000], 0x91
        mov dword ptr [0x92000], 0x92
        mov dword ptr [0x4010], 0x60003 // 0x80000000
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        mov qword ptr [0x70010], 0
        START 1, 0, 22f
        WAIT_FOR 1, dword ptr [0x20000]
        REPORT dword ptr [0x20004]
        REMAP 0x91, 2
        REMAP 0x92, 3
        .purgem REMAP
        REPORT 0x77
        DONE
    22: mov ecx, 0x4b564d03
        mov eax, 0x70001
        xor edx, edx
        wrmsr
        mov ebx, 0x80000000
        mov ecx, [rbx]
        mov [0x20004], ecx
        mov dword ptr [0x20000], 1
        sti
    23: hlt
        jmp 23b
    24: mov ecx, [rbx]
        mov [0x20004], ecx
        movzx ecx, byte ptr [0x70010]
        mov [0x20008], ecx
        EOI
        inc dword ptr [0x20000]
        add rsp, 8
        iretq
    "#,
    needs: &[STEAL_TIME, PV_TLB_FLUSH],
    emulator_errs: Some("does not say of a halted processor that it does not run"),
}
