//! Several processors: start-up, atomic operations, IPIs, each other's code and translations.
//!
//! The boot processor copies `TRAMPOLINE` to 0xa000, where a start-up IPI with vector 0x0a finds it. It takes
//! an application processor to 64-bit mode, gives it a stack by its APIC id, and jumps to the address at
//! 0x7820.

use crate::Expected::Reports;

macro_rules! smp_guest {
    ($(#[$doc:meta])* $module:ident $name:ident, $vcpus:literal, $reports:expr, $text:literal $(, $field:ident: $value:expr)* $(,)?) => {
        $(#[$doc])*
        pub fn $name() -> crate::Guest {
            mod text {
                crate::asm::code!(bytes, concat!(stringify!($module), "_", stringify!($name)), concat!(
                    r#"
                    .macro ICR destination, command
                        mov dword ptr [r11 + 0x310], \destination << 24
                        mov dword ptr [r11 + 0x300], \command
                    .endm
                    // starts the processors that ICR names, at `label`, by the INIT and two start-up IPIs of
                    // the Intel SDM, vol. 3, 9.4.4
                    .macro START destination, shorthand, label
                        mov word ptr [0x7810], 0x8f
                        mov dword ptr [0x7812], 0x1000
                        lea rax, [rip + \label]
                        mov [0x7820], rax
                        lea rsi, [rip + 90f]
                        mov edi, 0xa000
                        mov ecx, 256
                        rep movsb
                        ICR \destination, 0x4500 | \shorthand
                        ICR \destination, 0x460a | \shorthand
                        ICR \destination, 0x460a | \shorthand
                    .endm
                    mov r11d, 0xfee00000
                    mov dword ptr [r11 + 0xf0], 0x1ff
                    "#,
                    $text,
                    r#"
                    .code16
                90: mov ax, cs
                    mov bx, ax
                    xor ax, ax
                    mov ds, ax
                    .byte 0x66
                    lgdt [0x7810]
                    mov eax, 0x6a0
                    mov cr4, eax
                    mov eax, 0x3000
                    mov cr3, eax
                    mov ecx, 0xc0000080
                    mov eax, 0xd01
                    xor edx, edx
                    wrmsr
                    mov eax, 0x80010033
                    mov cr0, eax
                    .byte 0x66, 0xea
                    .long 92f - 90b + 0xa000
                    .word 0x10
                    .code64
                92: mov eax, 0x18
                    mov ds, eax
                    mov es, eax
                    mov ss, eax
                    mov r11d, 0xfee00000
                    mov r12d, [r11 + 0x20]
                    shr r12d, 24
                    mov esp, r12d
                    shl esp, 12
                    add esp, 0x40000
                    mov word ptr [0x7830], 0xfff
                    mov qword ptr [0x7832], 0x2000
                    lidt [0x7830]
                    mov dword ptr [r11 + 0xf0], 0x1ff
                    xor r15d, r15d
                    mov rax, [0x7820]
                    jmp rax

                    .purgem ICR
                    .purgem START
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
                    name: concat!(stringify!($module), "::", stringify!($name)),
                    code: text::get(),
                    start: crate::Start::Long,
                    vcpus: $vcpus,
                    expected: Reports($reports),
                    needs: &[],
                    emulator_errs: None,
                }
            }
        }
    };
}
pub(super) use smp_guest;

smp_guest! {
    /// INIT and start-up IPI: where it starts, in which state, and that a second start-up IPI does nothing.
    smp start_by_sipi, 2, &[0, 1, 0x0a00, 1, 0x77],
    r#"
        mov eax, [r11 + 0x20]
        shr eax, 24
        REPORT eax
        START 1, 0, 22f
        WAIT_FOR 1, dword ptr [0x20000]
        REPORT dword ptr [0x20004]
        REPORT dword ptr [0x20008]
        // CPUID tells the same APIC id
        REPORT dword ptr [0x2000c]
        mov dword ptr [0x20000], 2
        WAIT_FOR 3, dword ptr [0x20000]
        ICR 1, 0x460a // too late for anything
        REPORT 0x77
        DONE
    22: mov [0x20004], r12d
        mov [0x20008], ebx
        mov eax, 1
        cpuid
        shr ebx, 24
        mov [0x2000c], ebx
        mov dword ptr [0x20000], 1
        WAIT_FOR 2, dword ptr [0x20000]
        mov dword ptr [0x20000], 3
    23: pause
        jmp 23b
    "#
}

smp_guest! {
    /// LOCK INC, LOCK XADD, LOCK CMPXCHG and XCHG lose nothing; a spin lock of XCHG excludes.
    smp atomic_counters, 2, &[600, 600, 600, 600, 600],
    r#"
        START 1, 0, 22f
        call 22f
        WAIT_FOR 2, dword ptr [0x20100]
        REPORT dword ptr [0x20000]
        REPORT dword ptr [0x20040]
        REPORT dword ptr [0x20080]
        REPORT dword ptr [0x200c0]
        movzx eax, word ptr [0x20140]
        REPORT eax
        DONE
    22: mov ecx, 300
    23: lock inc dword ptr [0x20000]
        mov eax, 1
        lock xadd [0x20040], eax
        mov eax, [0x20080]
    24: lea edx, [eax + 1]
        lock cmpxchg [0x20080], edx
        jne 24b
    25: mov al, 1
        xchg [0x20180], al
        test al, al
        jz 26f
        pause
        jmp 25b
    26: mov eax, [0x200c0]
        inc eax
        mov [0x200c0], eax
        mov byte ptr [0x20180], 0
        lock add word ptr [0x20140], 1
        dec ecx
        jnz 23b
        lock inc dword ptr [0x20100]
        test r12d, r12d
        jnz 27f
        ret
    27: pause
        jmp 27b
    "#
}

smp_guest! {
    /// Two halted processors wake each other, ten times.
    smp ipis_both_ways, 2, &[10, 10, 0x77],
    r#"
        HANDLER 0x50, 24f
        HANDLER 0x51, 25f
        START 1, 0, 22f
        WAIT_FOR 1, dword ptr [0x20000]
        ICR 1, 0x4050
    21: sti
        hlt
        cli
        cmp dword ptr [0x20008], 10
        jb 21b
        REPORT dword ptr [0x20004]
        REPORT dword ptr [0x20008]
        REPORT 0x77
        DONE
    22: mov dword ptr [0x20000], 1
    23: sti
        hlt
        jmp 23b
    24: // on the application processor
        inc dword ptr [0x20004]
        ICR 0, 0x4051
        EOI
        add rsp, 8
        iretq
    25: // on the boot processor
        inc dword ptr [0x20008]
        cmp dword ptr [0x20008], 10
        jae 26f
        ICR 1, 0x4050
    26: EOI
        add rsp, 8
        iretq
    "#
}

smp_guest! {
    /// All but oneself, all, one logical destination, an NMI to another.
    smp broadcast, 3, &[2, 0x66, 2, 0x67, 3, 0x68, 1, 1],
    r#"
        HANDLER 0x50, 24f
        HANDLER 0x52, 25f
        HANDLER 2, 26f
        // flat model: logical ids 1, 2, 4
        mov dword ptr [r11 + 0xe0], 0xffffffff
        mov dword ptr [r11 + 0xd0], 0x1000000
        START 0, 0xc0000, 22f
        WAIT_FOR 2, dword ptr [0x20000]
        REPORT dword ptr [0x20000]
        REPORT 0x66
        sti
        ICR 0, 0xc4050 // all but self
        WAIT_FOR 2, dword ptr [0x20004]
        REPORT dword ptr [0x20004]
        REPORT 0x67
        mov dword ptr [0x20004], 0
        ICR 0, 0x84050 // all
        WAIT_FOR 3, dword ptr [0x20004]
        REPORT dword ptr [0x20004]
        REPORT 0x68
        ICR 4, 0x4852 // logical
        WAIT_FOR 1, dword ptr [0x20010 + 4 * 2]
        mov eax, [0x20010]
        add eax, [0x20014]
        add eax, [0x20018]
        REPORT eax
        ICR 1, 0x4400 // NMI
        WAIT_FOR 1, dword ptr [0x20020 + 4]
        mov eax, [0x20020]
        add eax, [0x20024]
        add eax, [0x20028]
        REPORT eax
        DONE
    22: mov eax, 0x1000000
        mov ecx, r12d
        shl eax, cl
        mov [r11 + 0xd0], eax
        mov dword ptr [r11 + 0xe0], 0xffffffff
        sti
        lock inc dword ptr [0x20000]
    23: hlt
        jmp 23b
    24: push rax
        EOI
        pop rax
        lock inc dword ptr [0x20004]
        add rsp, 8
        iretq
    25: push rax
        EOI
        pop rax
        lock inc dword ptr [0x20010 + r12d * 4]
        add rsp, 8
        iretq
    26: lock inc dword ptr [0x20020 + r12d * 4]
        add rsp, 8
        iretq
    "#
}

smp_guest! {
    /// One processor changes code that the other runs; the other serialises and runs the new.
    smp code_of_the_other, 2, &[0x11, 0x22, 0x33, 0x44, 0x77],
    r#"
        mov dword ptr [0x90000], 0x000011b8 // MOV EAX, 0x11
        mov word ptr [0x90004], 0xc300 // RET
        START 1, 0, 22f
        mov ebp, 0x11
        mov ecx, 4
    21: mov [0x90001], ebp
        inc dword ptr [0x20000]
        mov eax, [0x20000]
        WAIT_FOR eax, [0x20004]
        REPORT dword ptr [0x20008]
        add ebp, 0x11
        dec ecx
        jnz 21b
        REPORT 0x77
        DONE
    22: mov r8d, 1
    23: pause
        cmp [0x20000], r8d
        jne 23b
        xor eax, eax
        cpuid
        mov edx, 0x90000
        call rdx
        mov [0x20008], eax
        mov [0x20004], r8d
        inc r8d
        jmp 23b
    "#
}

smp_guest! {
    /// A TLB shootdown: one processor changes a translation, the other drops it when told by an IPI.
    smp shootdown, 2, &[0x90, 0x91, 0x92, 0x77],
    r#"
        HANDLER 0x50, 24f
        mov dword ptr [0x90000], 0x90
        mov dword ptr [0x91000], 0x91
        mov dword ptr [0x92000], 0x92
        mov dword ptr [0x4010], 0x60003 // 0x80000000
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        START 1, 0, 22f
        WAIT_FOR 1, dword ptr [0x20000]
        REPORT dword ptr [0x20004]
        mov dword ptr [0x61000], 0x91003
        ICR 1, 0x4050
        WAIT_FOR 2, dword ptr [0x20000]
        REPORT dword ptr [0x20004]
        mov dword ptr [0x61000], 0x92003
        ICR 1, 0x4050
        WAIT_FOR 3, dword ptr [0x20000]
        REPORT dword ptr [0x20004]
        REPORT 0x77
        DONE
    22: mov ebx, 0x80000000
        mov ecx, [rbx]
        mov [0x20004], ecx
        mov dword ptr [0x20000], 1
        sti
    23: mov ecx, [rbx]
        jmp 23b
    24: invlpg [rbx]
        mov ecx, [rbx]
        mov [0x20004], ecx
        EOI
        inc dword ptr [0x20000]
        add rsp, 8
        iretq
    "#
}

smp_guest! {
    /// The same thousands of times: code is run, changed, and run again by a processor that serialises.
    smp patched_code, 2, &[0, 0x77],
    r#"
        mov byte ptr [0x90003], 0xb8 // MOV EAX, 0
        mov dword ptr [0x90004], 0
        mov byte ptr [0x90008], 0xc3 // RET
        START 1, 0, 22f
        mov ebp, 1
    21: mov [0x90004], ebp
        mov [0x20000], ebp
        WAIT_FOR ebp, [0x20004]
        inc ebp
        cmp ebp, 5000
        jne 21b
        REPORT dword ptr [0x20008]
        REPORT 0x77
        DONE
    22: xor r8d, r8d
    23: mov r9d, [0x20000]
        pause
        cmp r9d, r8d
        je 23b
        xor eax, eax
        cpuid
        mov edx, 0x90003
        call rdx
        cmp eax, r9d
        je 24f
        inc dword ptr [0x20008]
    24: mov r8d, r9d
        mov [0x20004], r8d
        jmp 23b
    "#
}

smp_guest! {
    /// Pages are exchanged under a running processor: once it has dropped the translation it never sees the old page.
    smp shootdowns, 2, &[0, 0x77],
    r#"
        HANDLER 0x50, 24f
        mov dword ptr [0x90000], 1
        mov dword ptr [0x91000], 1
        mov dword ptr [0x4010], 0x60003 // 0x80000000
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90003
        START 1, 0, 22f
        WAIT_FOR 1, dword ptr [0x20000]
        mov ebp, 2
        mov esi, 0x91003
        mov edi, 0x90000
    21: mov [0x61000], esi
        ICR 1, 0x4050
        WAIT_FOR ebp, dword ptr [0x20000]
        mov dword ptr [rdi], 0xdead
        mov dword ptr [rdi], 1
        mov eax, esi
        lea esi, [rdi + 3]
        lea edi, [rax - 3]
        inc ebp
        cmp ebp, 3000
        jne 21b
        REPORT dword ptr [0x20008]
        REPORT 0x77
        DONE
    22: mov ebx, 0x80000000
        mov ecx, [rbx]
        mov dword ptr [0x20000], 1
        sti
    23: mov ecx, [rbx]
        mov edx, [rbx]
        add ecx, edx
        cmp ecx, 2
        je 23b
        inc dword ptr [0x20008]
        jmp 23b
    24: invlpg [rbx]
        EOI
        inc dword ptr [0x20000]
        add rsp, 8
        iretq
    "#
}
