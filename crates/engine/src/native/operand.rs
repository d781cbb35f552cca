//! Operands of the guest's instructions, on their way into host code.

use iced_x86::{CodeSize, Instruction, OpAccess, OpKind, Register};

/// Whether all operands are general registers, vectors, x87 or MMX registers, immediates and an explicit memory operand.
pub(crate) fn are_known(insn: &Instruction) -> bool {
    insn.op_kinds().enumerate().all(|(i, kind)| match kind {
        OpKind::Register => {
            let r = insn.op_register(i as u32);
            r.is_gpr() || r.is_xmm() || r.is_ymm() || r.is_mm() || r.is_st()
        }
        OpKind::Memory
        | OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => true,
        _ => false,
    })
}

/// Takes out of an instruction what its copy must not depend on: the address of its memory operand above all.
pub(crate) fn without_address(insn: &mut Instruction, has_memory: bool) {
    insn.set_code_size(CodeSize::Code64);
    insn.set_segment_prefix(Register::None);
    if has_memory {
        insn.set_memory_base(Register::None);
        insn.set_memory_index(Register::None);
        insn.set_memory_index_scale(1);
        insn.set_memory_displ_size(0);
        insn.set_memory_displacement64(0);
    }
    // Transactional hints on locked instructions; elsewhere F2 and F3 are ignored or part of the code.
    insn.set_has_repe_prefix(false);
    insn.set_has_repne_prefix(false);
}

/// Whether an access to a register may change it.
pub(crate) fn writes(access: OpAccess) -> bool {
    !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
}

/// Shifts and rotates by CL.
pub(crate) fn counts_by_cl(insn: &Instruction) -> bool {
    (1..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i) == Register::CL)
}

pub(crate) fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The part of general register `host` that corresponds to `register`; AH and its like stay what they are.
pub(crate) fn part(register: Register, host: u8) -> Register {
    if is_high_byte(register) {
        return register;
    }
    let first = match register.size() {
        1 => return LOW_BYTES[host as usize & 15],
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + u32::from(host)
}

const LOW_BYTES: [Register; 16] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];
