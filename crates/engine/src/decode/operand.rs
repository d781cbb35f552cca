//! Operands of `iced_x86::Instruction` in terms of [`Uop`].

use iced_x86::{Instruction, OpKind, Register};

use crate::{
    cpu::mode,
    regs::slot,
    uop::{FLAT, Uop, address},
};

/// Byte offset of a general register in `Regs::gpr`.
pub fn gpr(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => (register as u8 - Register::AH as u8) * 8 + 1,
        _ => register.full_register().number() as u8 * 8,
    }
}

fn slot_of(register: Register) -> u8 {
    match register {
        Register::None => slot::ZERO as u8,
        Register::RIP | Register::EIP => slot::BLOCK as u8,
        _ if register.is_vector_register() => slot::ZERO as u8,
        _ => register.full_register().number() as u8,
    }
}

/// Number of a segment register in encoding order.
pub fn segment(register: Register) -> u8 {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => FLAT,
    }
}

/// Fills in how the memory operand is addressed. `false` where it cannot be expressed (a RIP-relative address at
/// the very edge of its range).
pub fn memory(op: &mut Uop, insn: &Instruction, mode_bits: u8) -> bool {
    let long = mode_bits & mode::CODE == mode::CODE64;
    op.base = slot_of(insn.memory_base());
    op.index = slot_of(insn.memory_index());
    op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    op.seg = segment(insn.memory_segment());
    let bytes = if insn.memory_base() != Register::None {
        insn.memory_base().size()
    } else if insn.memory_index() != Register::None {
        insn.memory_index().size()
    } else {
        insn.memory_displ_size() as usize
    };
    op.asz = match (long, bytes) {
        (true, 4) => address::LONG32,
        (true, _) => address::LONG,
        (false, 2) => address::LEGACY16,
        (false, _) => address::LEGACY32,
    };
    // The decoder's IP is relative to the block, and so is the address it makes of a RIP-relative operand.
    let displacement = insn.memory_displacement64() as i64;
    op.disp = if long && bytes != 4 {
        match i32::try_from(displacement) {
            Ok(fits) => fits,
            // A0–A3 have a whole address, which their handlers take from the instruction.
            Err(_) if insn.memory_base() == Register::None && insn.memory_index() == Register::None => 0,
            Err(_) => return false,
        }
    } else {
        displacement as i32
    };
    true
}

/// Address size of string instructions and of LOOP and JCXZ, from the register that the operand uses.
pub fn implicit_address(register_bytes: usize, mode_bits: u8) -> u8 {
    let long = mode_bits & mode::CODE == mode::CODE64;
    match (long, register_bytes) {
        (true, 8) => address::LONG,
        (true, _) => address::LONG32,
        (false, 2) => address::LEGACY16,
        (false, _) => address::LEGACY32,
    }
}

/// Bytes of the address registers that a string operand of this kind uses.
pub fn string_register_bytes(kind: OpKind) -> Option<usize> {
    Some(match kind {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 8,
        _ => return None,
    })
}
