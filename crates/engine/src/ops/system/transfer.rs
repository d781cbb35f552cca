//! Transfers of control to other privileges and segments.

use super::{After, bytes, far_pointer, in_memory};
use crate::{
    cpu::Cpu,
    fault::{Run, vector},
    interrupt::Source,
    ops::flow::return_address,
    uop::Uop,
};

pub(super) fn syscall(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let back = return_address(cpu, op);
    cpu.syscall(back)?;
    cpu.transferred = true;
    Ok(After::Jumped)
}

pub(super) fn sysret(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.sysret(bytes(op) == 8)?;
    Ok(After::Jumped)
}

pub(super) fn sysenter(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.sysenter()?;
    cpu.transferred = true;
    Ok(After::Jumped)
}

pub(super) fn sysexit(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.sysexit(bytes(op) == 8)?;
    Ok(After::Jumped)
}

fn software_interrupt(cpu: &mut Cpu, op: &Uop, number: u8) -> Run<After> {
    let back = return_address(cpu, op);
    cpu.interrupt(number, None, Source::Software, back)?;
    Ok(After::Jumped)
}

pub(super) fn int(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    software_interrupt(cpu, op, op.imm as u8)
}

pub(super) fn int3(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let back = return_address(cpu, op);
    // INT3 is not subject to the IOPL check of virtual-8086 mode.
    cpu.interrupt(vector::BP, None, Source::Software, back)?;
    Ok(After::Jumped)
}

pub(super) fn int1(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let back = return_address(cpu, op);
    cpu.interrupt(vector::DB, None, Source::Exception, back)?;
    // What a load of SS has held back comes with this #DB: one of its own would meet the handler's first instruction.
    cpu.debug[4] |= std::mem::take(&mut cpu.breakpoint_hits);
    Ok(After::Jumped)
}

pub(super) fn into(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    if cpu.regs.flags & crate::int::OF == 0 {
        return Ok(After::Leave);
    }
    software_interrupt(cpu, op, vector::OF)
}

pub(super) fn iret(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let next = return_address(cpu, op);
    cpu.interrupt_return(bytes(op), next)?;
    cpu.nmi_masked = false;
    if cpu.nmi_pending {
        cpu.signal.raise(crate::signal::request::NMI);
    }
    Ok(After::Jumped)
}

/// The far pointer of JMP and CALL: immediate (selector in bits 32–47 of `imm`) or memory.
fn far_target(cpu: &mut Cpu, op: &Uop) -> Run<(u16, u64)> {
    if in_memory(op) { far_pointer(cpu, op) } else { Ok(((op.imm >> 32) as u16, op.imm & 0xffff_ffff)) }
}

pub(super) fn far_jmp(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let (selector, offset) = far_target(cpu, op)?;
    let next = return_address(cpu, op);
    cpu.far_transfer(selector, offset, bytes(op), next, false)?;
    Ok(After::Jumped)
}

pub(super) fn far_call(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let (selector, offset) = far_target(cpu, op)?;
    let back = return_address(cpu, op);
    cpu.far_transfer(selector, offset, bytes(op), back, true)?;
    Ok(After::Jumped)
}

pub(super) fn far_ret(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.far_return(bytes(op), op.imm)?;
    Ok(After::Jumped)
}
