//! Two-operand arithmetic and logic, unary operations, shifts and rotates.

use super::{attempt, next};
use crate::{
    cpu::Cpu,
    int::Int,
    mmu::Access,
    regs::PackedFlags,
    uop::{Ctl, Uop},
};

pub trait Binary {
    /// CMP and TEST only set flags.
    const WRITES: bool = true;
    fn run<T: Int>(a: T, b: T, f: &mut PackedFlags) -> T;
}

macro_rules! binary {
    ($($name:ident $method:ident $writes:literal;)*) => { $(
        pub struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: Int>(a: T, b: T, f: &mut PackedFlags) -> T {
                a.$method(b, f)
            }
        }
    )* };
}
binary! {
    Add add true;
    Or or true;
    Adc adc true;
    Sbb sbb true;
    And and true;
    Sub sub true;
    Xor xor true;
    Cmp sub false;
    Test and false;
}

pub unsafe fn reg_reg<O: Binary, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let b = cpu.reg::<T>(o.src);
        let v = O::run(cpu.reg::<T>(o.dst), b, &mut cpu.regs.flags);
        if O::WRITES {
            cpu.set_reg(o.dst, v);
        }
        next(cpu, op)
    }
}

pub unsafe fn reg_imm<O: Binary, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let v = O::run(cpu.reg::<T>(o.dst), T::from_u64(o.imm), &mut cpu.regs.flags);
        if O::WRITES {
            cpu.set_reg(o.dst, v);
        }
        next(cpu, op)
    }
}

pub unsafe fn reg_mem<O: Binary, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let at = attempt!(cpu, op, cpu.ea(o, T::BYTES, Access::Read));
        let b = attempt!(cpu, op, cpu.load::<T>(at));
        let v = O::run(cpu.reg::<T>(o.dst), b, &mut cpu.regs.flags);
        if O::WRITES {
            cpu.set_reg(o.dst, v);
        }
        next(cpu, op)
    }
}

#[inline(always)]
unsafe fn mem<O: Binary, T: Int>(cpu: &mut Cpu, op: *const Uop, b: T) -> Ctl {
    unsafe {
        let o = &*op;
        if O::WRITES {
            let at = attempt!(cpu, op, cpu.ea(o, T::BYTES, Access::Write));
            attempt!(cpu, op, cpu.modify::<T>(at, |a, f| O::run(a, b, f)));
        } else {
            let at = attempt!(cpu, op, cpu.ea(o, T::BYTES, Access::Read));
            let a = attempt!(cpu, op, cpu.load::<T>(at));
            O::run(a, b, &mut cpu.regs.flags);
        }
        next(cpu, op)
    }
}

pub unsafe fn mem_reg<O: Binary, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let b = cpu.reg::<T>((*op).src);
        mem::<O, T>(cpu, op, b)
    }
}

pub unsafe fn mem_imm<O: Binary, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe { mem::<O, T>(cpu, op, T::from_u64((*op).imm)) }
}

pub trait Unary {
    fn run<T: Int>(a: T, f: &mut PackedFlags) -> T;
}

macro_rules! unary {
    ($($name:ident |$a:ident, $f:ident| $body:expr;)*) => { $(
        pub struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<T: Int>($a: T, $f: &mut PackedFlags) -> T {
                $body
            }
        }
    )* };
}
unary! {
    Inc |a, f| a.inc(f);
    Dec |a, f| a.dec(f);
    Neg |a, f| a.neg(f);
    Not |a, _f| T::from_u64(!a.to_u64());
}

pub unsafe fn unary_reg<O: Unary, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let v = O::run(cpu.reg::<T>(o.dst), &mut cpu.regs.flags);
        cpu.set_reg(o.dst, v);
        next(cpu, op)
    }
}

pub unsafe fn unary_mem<O: Unary, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, T::BYTES, Access::Write));
        attempt!(cpu, op, cpu.modify::<T>(at, |a, f| O::run(a, f)));
        next(cpu, op)
    }
}

pub trait Shift {
    fn run<T: Int>(a: T, count: u8, f: &mut PackedFlags) -> T;
}

macro_rules! shift {
    ($($name:ident $method:ident;)*) => { $(
        pub struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<T: Int>(a: T, count: u8, f: &mut PackedFlags) -> T {
                a.$method(count, f)
            }
        }
    )* };
}
shift! {
    Rol rol;
    Ror ror;
    Rcl rcl;
    Rcr rcr;
    Shl shl;
    Shr shr;
    Sar sar;
}

pub unsafe fn shift_reg_imm<O: Shift, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let v = O::run(cpu.reg::<T>(o.dst), o.imm as u8, &mut cpu.regs.flags);
        cpu.set_reg(o.dst, v);
        next(cpu, op)
    }
}

pub unsafe fn shift_reg_cl<O: Shift, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let v = O::run(cpu.reg::<T>(o.dst), cpu.regs.gpr[1] as u8, &mut cpu.regs.flags);
        cpu.set_reg(o.dst, v);
        next(cpu, op)
    }
}

pub unsafe fn shift_mem_imm<O: Shift, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let at = attempt!(cpu, op, cpu.ea(o, T::BYTES, Access::Write));
        attempt!(cpu, op, cpu.modify::<T>(at, |a, f| O::run(a, o.imm as u8, f)));
        next(cpu, op)
    }
}

pub unsafe fn shift_mem_cl<O: Shift, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let count = cpu.regs.gpr[1] as u8;
        let at = attempt!(cpu, op, cpu.ea(o, T::BYTES, Access::Write));
        attempt!(cpu, op, cpu.modify::<T>(at, |a, f| O::run(a, count, f)));
        next(cpu, op)
    }
}
