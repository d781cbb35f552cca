//! How guests are written: in assembly text, assembled when this crate is compiled.
//!
//! A guest is position-independent; where it needs an absolute address it writes `label - 99b + 0x10000`
//! (99 is the label of its first byte, 0x10000 where it is loaded). Labels are numbers; 77 and up belong to
//! the macros:
//!
//! | macro | does |
//! |---|---|
//! | `REPORT value` | reports a register, an immediate or memory (64-bit code); `REPORTX`: 16- and 32-bit code |
//! | `REPORTU value` | the same from ring 3, by INT 4 |
//! | `DONE` | ends the guest |
//! | `CATCH instruction` | expects it to fault: the runtime reports vector, error code, and RIP less the instruction's, then goes on behind it. Uses R14 and R15 (`CATCHX` in 32-bit code: ESI and EDI) |
//! | `HANDLER vector, label` | own handler; it finds the error code (or 0) on top of the stack frame. Uses RAX |
//! | `TO_USER` | goes on in ring 3, interrupts on, at the same code's user alias; `TO_KERNEL` comes back. Use R13 |
//! | `WAIT_FOR value, operand` | spins until the operand has the value |
//! | `EOI` | ends the interrupt in service. Uses RAX |
//!
//! What the runtime reports for an exception: vector with the interrupted privilege level in bits 8 and 9;
//! error code; RIP less the faulting instruction's; for #PF CR2, for #DB DR6.

/// Text in front of each guest: the macros.
macro_rules! prelude {
    () => {
        r#"
        .macro REPORT value:vararg
            push rax
            push rdx
            mov eax, \value
            mov dx, 0x500
            out dx, eax
            pop rdx
            pop rax
        .endm
        .macro REPORTX value:vararg
            push eax
            push edx
            mov eax, \value
            mov dx, 0x500
            out dx, eax
            pop edx
            pop eax
        .endm
        .macro DONE
            mov dx, 0x501
            out dx, al
            77: hlt
            jmp 77b
        .endm
        .macro CATCH instruction:vararg
            lea r14, [rip + 77f]
            lea r15, [rip + 78f]
            77: \instruction
            78:
        .endm
        .macro CATCHX instruction:vararg
            .byte 0xbe
            .long 77f - 99b + 0x10000
            .byte 0xbf
            .long 78f - 99b + 0x10000
            77: \instruction
            78:
        .endm
        .macro HANDLER vector, label
            lea rax, [rip + \label]
            mov [0x7000 + 8 * \vector], rax
        .endm
        .macro TO_USER
            mov [0x7800], rsp
            lea r13, [rip + 77f + 0x40000000]
            push 0x2b
            push 0x40050000
            push 0x202
            push 0x33
            push r13
            iretq
            77: xor r13d, r13d
        .endm
        .macro REPORTU value:vararg
            push rax
            mov eax, \value
            int 4
            pop rax
        .endm
        .macro TO_KERNEL
            lea r13, [rip + 77f]
            sub r13, 0x40000000
            int 4
            77:
        .endm
        .macro WAIT_FOR value, operand:vararg
            77: pause
            cmp \operand, \value
            jne 77b
        .endm
        .macro EOI
            mov eax, 0xfee000b0
            mov dword ptr [rax], 0
        .endm
        "#
    };
}

/// Text behind each guest: other guests define the same macros.
macro_rules! postlude {
    () => {
        r#"
        .code64
        .purgem REPORT
        .purgem REPORTX
        .purgem DONE
        .purgem CATCH
        .purgem CATCHX
        .purgem HANDLER
        .purgem TO_USER
        .purgem REPORTU
        .purgem TO_KERNEL
        .purgem WAIT_FOR
        .purgem EOI
        "#
    };
}

/// Assembles a piece of code and makes `fn $name() -> &'static [u8]`.
macro_rules! code {
    ($name:ident, $symbol:expr, $text:expr) => {
        std::arch::global_asm!(
            ".pushsection .rodata.vireo_conformance, \"a\"",
            crate::asm::prelude!(),
            ".p2align 4", // alignment inside counts from the start
            concat!(".global vireo_conformance_", $symbol),
            concat!(".hidden vireo_conformance_", $symbol),
            concat!("vireo_conformance_", $symbol, ":"),
            "99:",
            $text,
            crate::asm::postlude!(),
            concat!(".global vireo_conformance_end_", $symbol),
            concat!(".hidden vireo_conformance_end_", $symbol),
            concat!("vireo_conformance_end_", $symbol, ":"),
            ".popsection",
        );
        fn $name() -> &'static [u8] {
            let (start, end): (*const u8, *const u8);
            // SAFETY: two address computations.
            unsafe {
                std::arch::asm!(
                    concat!("lea {0}, [rip + vireo_conformance_", $symbol, "]"),
                    concat!("lea {1}, [rip + vireo_conformance_end_", $symbol, "]"),
                    out(reg) start,
                    out(reg) end,
                    options(nomem, nostack, preserves_flags),
                );
            }
            // SAFETY: both labels are in the same read-only section, `end` behind `start`.
            unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
        }
    };
}

/// A guest: `guest! { module name, Start, Expected, "text" }`, then fields of [`crate::Guest`] that differ
/// from one vCPU, no needs.
macro_rules! guest {
    ($(#[$doc:meta])* $module:ident $name:ident, $start:ident, $expected:expr, $text:literal $(, $field:ident: $value:expr)* $(,)?) => {
        $(#[$doc])*
        pub fn $name() -> crate::Guest {
            mod text {
                crate::asm::code!(bytes, concat!(stringify!($module), "_", stringify!($name)), $text);
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
                    start: crate::Start::$start,
                    vcpus: 1,
                    expected: $expected,
                    needs: &[],
                    emulator_errs: None,
                }
            }
        }
    };
}

pub(crate) use {code, guest, postlude, prelude};
