//! Descriptor tables, and what loads segment registers or looks at descriptors.

use super::{After, bytes, far_pointer, in_memory};
use crate::{
    cpu::{Cpu, rights, sreg},
    fault::{Run, vector},
    mmu::{Access, canonical},
    segment::{Descriptor, rpl},
    uop::Uop,
};

fn check_protected(cpu: &mut Cpu) -> Run {
    if cpu.protected() { Ok(()) } else { cpu.ud() }
}

/// The pseudo-descriptor of LGDT and LIDT.
fn load_table(cpu: &mut Cpu, op: &Uop) -> Run<vireo_cpu::DescriptorTable> {
    cpu.require_ring0()?;
    let size = if cpu.code64() { 10 } else { 6 };
    let at = cpu.ea(op, size, Access::Read)?;
    let limit = cpu.load::<u16>(at)?;
    let base = if size == 10 {
        cpu.load::<u64>(at.wrapping_add(2))?
    } else {
        let mask = if bytes(op) == 2 { 0x00ff_ffff } else { 0xffff_ffff };
        u64::from(cpu.load::<u32>(at.wrapping_add(2))?) & mask
    };
    if !canonical(base) {
        return cpu.gp(0);
    }
    Ok(vireo_cpu::DescriptorTable { base, limit })
}

pub(super) fn lgdt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.gdtr = load_table(cpu, op)?;
    Ok(After::Next)
}

pub(super) fn lidt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.idtr = load_table(cpu, op)?;
    Ok(After::Next)
}

fn store_table(cpu: &mut Cpu, op: &Uop, table: vireo_cpu::DescriptorTable) -> Run<After> {
    cpu.check_umip()?;
    let size = if cpu.code64() { 10 } else { 6 };
    let at = cpu.ea(op, size, Access::Write)?;
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    cpu.write_bytes(at, &image[..size], false)?;
    Ok(After::Next)
}

pub(super) fn sgdt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    store_table(cpu, op, cpu.gdtr)
}

pub(super) fn sidt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    store_table(cpu, op, cpu.idtr)
}

pub(super) fn lldt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.require_ring0()?;
    let selector = cpu.read_operand16(op)?;
    cpu.load_ldt(selector)?;
    Ok(After::Next)
}

pub(super) fn ltr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.require_ring0()?;
    let selector = cpu.read_operand16(op)?;
    cpu.load_task(selector)?;
    Ok(After::Next)
}

pub(super) fn sldt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.check_umip()?;
    cpu.write_operand16(op, u64::from(cpu.ldtr.selector))?;
    Ok(After::Next)
}

pub(super) fn str(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.check_umip()?;
    cpu.write_operand16(op, u64::from(cpu.tr.selector))?;
    Ok(After::Next)
}

/// The descriptor that LAR, LSL, VERR and VERW may look at, if any.
fn visible(cpu: &mut Cpu, selector: u16, system_types: u16) -> Run<Option<Descriptor>> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    let before = cpu.fault;
    let d = match cpu.descriptor(selector, vector::GP) {
        Ok(d) => d,
        Err(stop) if cpu.fault.vector == vector::PF => return Err(stop),
        Err(_) => {
            cpu.fault = before;
            return Ok(None);
        }
    };
    let type_ok = d.is_segment() || system_types & 1 << d.kind() != 0;
    let reachable = d.is_code() && d.conforming() || (cpu.cpl <= d.dpl() && rpl(selector) <= d.dpl());
    Ok((type_ok && reachable).then_some(d))
}

fn set_zero_flag(cpu: &mut Cpu, set: bool) {
    cpu.regs.flags = cpu.regs.flags & !crate::int::ZF | if set { crate::int::ZF } else { 0 };
}

fn load_descriptor_field(cpu: &mut Cpu, op: &Uop, types: u16, field: impl Fn(Descriptor) -> u32) -> Run<After> {
    check_protected(cpu)?;
    let selector = if in_memory(op) {
        let at = cpu.ea(op, 2, Access::Read)?;
        cpu.load::<u16>(at)?
    } else {
        cpu.reg::<u16>(op.src)
    };
    let found = visible(cpu, selector, types)?;
    if let Some(d) = found {
        match bytes(op) {
            2 => cpu.set_reg(op.dst, field(d) as u16),
            4 => cpu.set_reg(op.dst, field(d)),
            _ => cpu.set_reg(op.dst, u64::from(field(d))),
        }
    }
    set_zero_flag(cpu, found.is_some());
    Ok(After::Next)
}

pub(super) fn lar(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    // Types 1–5, 9, 11, 12; in long mode 2, 9, 11, 12.
    let types = if cpu.long_mode() { 0b0001_1010_0000_0100 } else { 0b0001_1010_0011_1110 };
    load_descriptor_field(cpu, op, types, |d| (d.raw >> 32) as u32 & 0x00ff_ff00)
}

pub(super) fn lsl(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    // Types 1–3, 9, 11; in long mode 2, 9, 11.
    let types = if cpu.long_mode() { 0b1010_0000_0100 } else { 0b1010_0000_1110 };
    load_descriptor_field(cpu, op, types, |d| d.limit())
}

fn verify(cpu: &mut Cpu, op: &Uop, write: bool) -> Run<After> {
    check_protected(cpu)?;
    let selector = cpu.read_operand16(op)?;
    let ok = visible(cpu, selector, 0)?.is_some_and(|d| {
        let flag = d.rights() & rights::WRITE_OR_READ != 0;
        if write { !d.is_code() && flag } else { !d.is_code() || flag }
    });
    set_zero_flag(cpu, ok);
    Ok(After::Next)
}

pub(super) fn verr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    verify(cpu, op, false)
}

pub(super) fn verw(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    verify(cpu, op, true)
}

pub(super) fn arpl(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    let wanted = cpu.reg::<u16>(op.src) & 3;
    if in_memory(op) {
        let at = cpu.ea(op, 2, Access::Write)?;
        cpu.check_writable(at, 2)?;
        let selector = cpu.load::<u16>(at)?;
        let raise = selector & 3 < wanted;
        if raise {
            cpu.store::<u16>(at, selector & !3 | wanted)?;
        }
        set_zero_flag(cpu, raise);
        return Ok(After::Next);
    }
    let selector = cpu.reg::<u16>(op.dst);
    let raise = selector & 3 < wanted;
    if raise {
        cpu.set_reg(op.dst, selector & !3 | wanted);
    }
    set_zero_flag(cpu, raise);
    Ok(After::Next)
}

/// Loads segment register `index`; SS holds interrupts off for an instruction, and has no single-step trap
/// (Intel SDM vol. 3, 7.8.3).
fn load_segment(cpu: &mut Cpu, index: usize, selector: u16) -> Run<After> {
    let before = cpu.mode;
    cpu.load_data_segment(index, selector)?;
    if index == sreg::SS {
        cpu.shadow = true;
        cpu.transferred = true;
        return Ok(After::Leave);
    }
    Ok(if cpu.mode == before { After::Next } else { After::Leave })
}

/// MOV Sreg, r/m16: `src` is the segment.
pub(super) fn mov_seg(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let selector = cpu.read_operand16(op)?;
    load_segment(cpu, op.src as usize, selector)
}

pub(super) fn pop_seg(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let sp = cpu.regs.gpr[4];
    let selector = cpu.pop(bytes(op))? as u16;
    match load_segment(cpu, op.src as usize, selector) {
        Ok(after) => Ok(after),
        Err(stop) => {
            cpu.regs.gpr[4] = sp;
            Err(stop)
        }
    }
}

/// LDS, LES, LFS, LGS, LSS: `src` is the segment.
pub(super) fn load_far(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let (selector, offset) = far_pointer(cpu, op)?;
    let after = load_segment(cpu, op.src as usize, selector)?;
    match bytes(op) {
        2 => cpu.set_reg(op.dst, offset as u16),
        4 => cpu.set_reg(op.dst, offset as u32),
        _ => cpu.set_reg(op.dst, offset),
    }
    Ok(after)
}
