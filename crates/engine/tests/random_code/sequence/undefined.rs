//! Flags that are undefined.

use iced_x86::{Instruction, Mnemonic};

use crate::random_code::case::status_flags;

/// The undefined flags behind an instruction; `None` if it reads one that is undefined before it. `shifted`: those of
/// shifts and rotations count as defined, for engines that have the processor make them.
pub(super) fn undefined_behind(insn: &Instruction, before: u64, shifted: bool) -> Option<u64> {
    use Mnemonic as M;
    if status_flags(insn.rflags_read()) & before != 0 {
        return None;
    }
    let written = status_flags(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
    let undefined = status_flags(insn.rflags_undefined());
    let rotate = matches!(insn.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
    let shift = matches!(insn.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd);
    if insn.is_string_instruction() {
        return Some(before);
    }
    if !rotate && !shift {
        return Some(before & !written | undefined);
    }
    if shifted && insn.op0_register().size() >= 4 {
        return Some(before);
    }
    let size = match insn.op0_register().size() {
        0 => insn.memory_size().size(),
        bytes => bytes,
    };
    let narrow = if size < 4 && shift { 1 } else { 0 };
    let unknown = if rotate { 0x800 } else { 0x810 | narrow };
    let Ok(count) = insn.try_immediate(insn.op_count() - 1) else {
        return Some(before | unknown);
    };
    Some(match (count as u32 & if size == 8 { 63 } else { 31 }, rotate) {
        (0, _) => before,
        (1, true) => before & !0x801,
        (1, false) => before & !written | 0x10,
        (_, true) => before & !1 | 0x800,
        (_, false) => before & !written & !unknown | unknown,
    })
}
