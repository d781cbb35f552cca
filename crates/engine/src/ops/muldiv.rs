//! Multiplication and division.

use super::{attempt, fault, next};
use crate::{
    cpu::Cpu,
    fault::{Fault, vector},
    int::Int,
    mmu::Access,
    uop::{Ctl, Uop},
};

pub unsafe fn imul_reg<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let b = cpu.reg::<T>(o.src);
        let v = cpu.reg::<T>(o.dst).imul(b, &mut cpu.regs.flags);
        cpu.set_reg(o.dst, v);
        next(cpu, op)
    }
}

pub unsafe fn imul_mem<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let at = attempt!(cpu, op, cpu.ea(o, T::BYTES, Access::Read));
        let b = attempt!(cpu, op, cpu.load::<T>(at));
        let v = cpu.reg::<T>(o.dst).imul(b, &mut cpu.regs.flags);
        cpu.set_reg(o.dst, v);
        next(cpu, op)
    }
}

pub unsafe fn imul_reg_imm<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let v = cpu.reg::<T>(o.src).imul(T::from_u64(o.imm), &mut cpu.regs.flags);
        cpu.set_reg(o.dst, v);
        next(cpu, op)
    }
}

pub unsafe fn imul_mem_imm<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let at = attempt!(cpu, op, cpu.ea(o, T::BYTES, Access::Read));
        let a = attempt!(cpu, op, cpu.load::<T>(at));
        let v = a.imul(T::from_u64(o.imm), &mut cpu.regs.flags);
        cpu.set_reg(o.dst, v);
        next(cpu, op)
    }
}

#[inline(always)]
fn wide_result<T: Int>(cpu: &mut Cpu, (low, high): (T, T)) {
    if T::BYTES == 1 {
        cpu.set_reg::<u16>(0, (low.to_u64() | high.to_u64() << 8) as u16);
    } else {
        cpu.set_reg(0, low);
        cpu.set_reg(16, high);
    }
}

/// MUL and IMUL into DX:AX.
pub unsafe fn mul_reg<T: Int, const SIGNED: bool>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let b = cpu.reg::<T>((*op).dst);
        let a = cpu.reg::<T>(0);
        let f = &mut cpu.regs.flags;
        let wide = if SIGNED { a.imul_wide(b, f) } else { a.mul_wide(b, f) };
        wide_result(cpu, wide);
        next(cpu, op)
    }
}

pub unsafe fn mul_mem<T: Int, const SIGNED: bool>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, T::BYTES, Access::Read));
        let b = attempt!(cpu, op, cpu.load::<T>(at));
        let a = cpu.reg::<T>(0);
        let f = &mut cpu.regs.flags;
        let wide = if SIGNED { a.imul_wide(b, f) } else { a.mul_wide(b, f) };
        wide_result(cpu, wide);
        next(cpu, op)
    }
}

/// Quotient and remainder of DX:AX (AX for bytes) by `by`; `None` is #DE.
#[inline(always)]
fn divide<T: Int, const SIGNED: bool>(cpu: &Cpu, by: T) -> Option<(T, T)> {
    if by.to_u64() == 0 {
        return None;
    }
    let (low, high) = if T::BYTES == 1 {
        (u64::from(cpu.reg::<u8>(0)), u64::from(cpu.reg::<u8>(1)))
    } else {
        (cpu.reg::<T>(0).to_u64(), cpu.reg::<T>(16).to_u64())
    };
    if !SIGNED {
        if high == 0 {
            return Some((T::from_u64(low / by.to_u64()), T::from_u64(low % by.to_u64())));
        }
        if high >= by.to_u64() {
            return None;
        }
        let value = (u128::from(high) << T::BITS) | u128::from(low);
        let by = u128::from(by.to_u64());
        return Some((T::from_u64((value / by) as u64), T::from_u64((value % by) as u64)));
    }
    let value = ((i128::from(T::from_u64(high).sext())) << T::BITS) | i128::from(low);
    let by = i128::from(by.sext());
    let quotient = value.checked_div(by)?;
    let min = -(1i128 << (T::BITS - 1));
    if quotient < min || quotient >= -min {
        return None;
    }
    Some((T::from_u64(quotient as u64), T::from_u64((value % by) as u64)))
}

#[inline(always)]
unsafe fn divide_by<T: Int, const SIGNED: bool>(cpu: &mut Cpu, op: *const Uop, by: T) -> Ctl {
    unsafe {
        match divide::<T, SIGNED>(cpu, by) {
            Some(result) => {
                wide_result(cpu, result);
                next(cpu, op)
            }
            None => {
                cpu.fault = Fault::new(vector::DE);
                fault(cpu, op)
            }
        }
    }
}

pub unsafe fn div_reg<T: Int, const SIGNED: bool>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let by = cpu.reg::<T>((*op).dst);
        divide_by::<T, SIGNED>(cpu, op, by)
    }
}

pub unsafe fn div_mem<T: Int, const SIGNED: bool>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, T::BYTES, Access::Read));
        let by = attempt!(cpu, op, cpu.load::<T>(at));
        divide_by::<T, SIGNED>(cpu, op, by)
    }
}
