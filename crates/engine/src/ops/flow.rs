//! Near control transfers, which end blocks.

use std::ptr;

use super::{attempt, fault};
use crate::{
    cpu::Cpu,
    fault::{Fault, Run},
    int::{Int, condition},
    mmu::{Access, canonical},
    regs::slot,
    uop::{Ctl, Uop},
};

/// Goes to an address relative to the block's start, by its link number `which`.
#[inline(always)]
unsafe fn go(cpu: &mut Cpu, offset: u64, which: usize) -> Ctl {
    cpu.rip = cpu.regs.gpr[slot::BLOCK].wrapping_add(offset) & cpu.ip_mask;
    // SAFETY: `block` is the block that is running.
    unsafe {
        let links = &raw mut (*cpu.block.cast_mut()).links[which];
        cpu.next = *links;
        cpu.link = links;
    }
    Ctl::Next
}

/// Goes to an address that is known only now.
#[inline(always)]
fn go_to(cpu: &mut Cpu, target: u64) -> Ctl {
    cpu.rip = target;
    cpu.next = ptr::null();
    cpu.link = ptr::null_mut();
    Ctl::Next
}

#[inline(always)]
fn after(op: &Uop) -> u64 {
    u64::from(op.off) + u64::from(op.len)
}

/// Address of the instruction after this one.
#[inline(always)]
pub fn return_address(cpu: &Cpu, op: &Uop) -> u64 {
    cpu.regs.gpr[slot::BLOCK].wrapping_add(after(op)) & cpu.ip_mask
}

/// The end of a block that did not end by itself: goes on behind it.
pub unsafe fn end(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe { go(cpu, u64::from((*op).off), 0) }
}

/// Leaves for the instruction after this one, without a link: after what changes how code is decoded or fetched.
pub unsafe fn leave(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    let target = return_address(cpu, unsafe { &*op });
    go_to(cpu, target)
}

pub unsafe fn jmp(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe { go(cpu, (*op).imm, 1) }
}

pub unsafe fn jcc<const CC: u8>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        if condition::<CC>(cpu.regs.flags) { go(cpu, o.imm, 1) } else { go(cpu, after(o), 0) }
    }
}

/// A comparison of registers (`IMM`: with the immediate) and the conditional jump behind it, in one. The jump's
/// target is in `disp`, the end of both instructions in `aux`.
pub unsafe fn compare_jcc<const CC: u8, O: super::alu::Binary, T: Int, const IMM: bool>(
    cpu: &mut Cpu,
    op: *const Uop,
) -> Ctl {
    unsafe {
        let o = &*op;
        let b = if IMM { T::from_u64(o.imm) } else { cpu.reg::<T>(o.src) };
        O::run(cpu.reg::<T>(o.dst), b, &mut cpu.regs.flags);
        if condition::<CC>(cpu.regs.flags) { go(cpu, o.disp as i64 as u64, 1) } else { go(cpu, u64::from(o.aux), 0) }
    }
}

/// In legacy code with 16-bit operands targets wrap at 64 KiB: `aux` holds 1.
pub unsafe fn jmp16(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let target = cpu.regs.gpr[slot::BLOCK].wrapping_add((*op).imm) & 0xffff;
        go_to(cpu, target)
    }
}

pub unsafe fn jcc16<const CC: u8>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe { if condition::<CC>(cpu.regs.flags) { jmp16(cpu, op) } else { go(cpu, after(&*op), 0) } }
}

/// LOOP, LOOPE, LOOPNE (`aux` 0, 1, 2) and JCXZ (3); the counter has the address size.
pub unsafe fn loop_cx(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let mask = Cpu::address_mask(o);
        let mut count = cpu.regs.gpr[1] & mask;
        if o.aux & 3 != 3 {
            count = count.wrapping_sub(1) & mask;
            match mask {
                0xffff => cpu.set_reg(8, count as u16),
                0xffff_ffff => cpu.set_reg(8, count as u32),
                _ => cpu.set_reg(8, count),
            }
        }
        let zero = cpu.regs.flags & crate::int::ZF != 0;
        let taken = match o.aux & 3 {
            0 => count != 0,
            1 => count != 0 && zero,
            2 => count != 0 && !zero,
            _ => count == 0,
        };
        if !taken {
            return go(cpu, after(o), 0);
        }
        if o.aux & 4 != 0 { jmp16(cpu, op) } else { go(cpu, o.imm, 1) }
    }
}

/// A near target must be canonical (64-bit) or within the code segment (legacy).
pub fn check_target(cpu: &mut Cpu, target: u64) -> Run {
    let bad = if cpu.code64() { !canonical(target) } else { cpu.protected() && target > u64::from(cpu.seg[1].limit) };
    if bad { cpu.raise(Fault::gp(0)) } else { Ok(()) }
}

pub unsafe fn jmp_reg64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let target = cpu.reg::<u64>((*op).dst);
        attempt!(cpu, op, check_target(cpu, target));
        go_to(cpu, target)
    }
}

pub unsafe fn jmp_mem64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, 8, Access::Read));
        let target = attempt!(cpu, op, cpu.load::<u64>(at));
        attempt!(cpu, op, check_target(cpu, target));
        go_to(cpu, target)
    }
}

#[inline(always)]
unsafe fn push64(cpu: &mut Cpu, value: u64) -> Run {
    let sp = cpu.regs.gpr[4].wrapping_sub(8);
    cpu.store::<u64>(sp, value).map_err(|stop| cpu.blame_stack(stop))?;
    cpu.regs.gpr[4] = sp;
    Ok(())
}

pub unsafe fn call64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let back = return_address(cpu, o);
        attempt!(cpu, op, push64(cpu, back));
        go(cpu, o.imm, 1)
    }
}

pub unsafe fn call_reg64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let target = cpu.reg::<u64>((*op).dst);
        attempt!(cpu, op, check_target(cpu, target));
        let back = return_address(cpu, &*op);
        attempt!(cpu, op, push64(cpu, back));
        go_to(cpu, target)
    }
}

pub unsafe fn call_mem64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, 8, Access::Read));
        let target = attempt!(cpu, op, cpu.load::<u64>(at));
        attempt!(cpu, op, check_target(cpu, target));
        let back = return_address(cpu, &*op);
        attempt!(cpu, op, push64(cpu, back));
        go_to(cpu, target)
    }
}

/// RET and RET imm16.
pub unsafe fn ret64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let sp = cpu.regs.gpr[4];
        let target = attempt!(cpu, op, cpu.load::<u64>(sp));
        if !canonical(target) {
            cpu.fault = Fault::gp(0);
            return fault(cpu, op);
        }
        cpu.regs.gpr[4] = sp.wrapping_add(8).wrapping_add((*op).imm);
        go_to(cpu, target)
    }
}

/// Near CALL, JMP and RET of legacy code, and with 16-bit operands. Operand size in bytes is `aux & 15`.
pub mod legacy {
    use super::*;

    /// Where the target of CALL and JMP stands.
    pub const RELATIVE: u16 = 0 << 4;
    pub const REGISTER: u16 = 1 << 4;
    pub const MEMORY: u16 = 2 << 4;

    unsafe fn target(cpu: &mut Cpu, o: &Uop) -> Run<u64> {
        let bytes = (o.aux & 15) as usize;
        let raw = match o.aux & 0xf0 {
            RELATIVE => cpu.regs.gpr[slot::BLOCK].wrapping_add(o.imm),
            REGISTER => cpu.reg::<u64>(o.dst),
            _ => {
                let at = cpu.ea(o, bytes, Access::Read)?;
                match bytes {
                    2 => u64::from(cpu.load::<u16>(at)?),
                    4 => u64::from(cpu.load::<u32>(at)?),
                    _ => cpu.load::<u64>(at)?,
                }
            }
        };
        let target = match bytes {
            2 => raw & 0xffff,
            4 => raw & 0xffff_ffff,
            _ => raw,
        };
        check_target(cpu, target)?;
        Ok(target)
    }

    pub unsafe fn jmp(cpu: &mut Cpu, op: *const Uop) -> Ctl {
        unsafe {
            let to = attempt!(cpu, op, target(cpu, &*op));
            go_to(cpu, to)
        }
    }

    pub unsafe fn call(cpu: &mut Cpu, op: *const Uop) -> Ctl {
        unsafe {
            let o = &*op;
            let to = attempt!(cpu, op, target(cpu, o));
            let back = return_address(cpu, o);
            attempt!(cpu, op, cpu.push(back, (o.aux & 15) as usize));
            go_to(cpu, to)
        }
    }

    pub unsafe fn ret(cpu: &mut Cpu, op: *const Uop) -> Ctl {
        unsafe {
            let o = &*op;
            let bytes = (o.aux & 15) as usize;
            let sp = cpu.regs.gpr[4];
            let to = attempt!(cpu, op, cpu.pop(bytes));
            if check_target(cpu, to).is_err() {
                cpu.regs.gpr[4] = sp;
                return fault(cpu, op);
            }
            let grown = cpu.regs.gpr[4].wrapping_add(o.imm);
            cpu.set_stack_pointer(grown);
            go_to(cpu, to)
        }
    }
}

/// Instructions that the mode does not have.
pub unsafe fn undefined(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    cpu.fault = Fault::ud();
    unsafe { fault(cpu, op) }
}

/// There was no room for this instruction's stub: it is decoded again with all old code dropped.
pub unsafe fn refetch(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    let target = cpu.regs.gpr[slot::BLOCK].wrapping_add(u64::from(unsafe { (*op).off })) & cpu.ip_mask;
    // Also of this block, which may begin here; its memory is not reused before something is decoded.
    cpu.clear_code();
    go_to(cpu, target)
}
