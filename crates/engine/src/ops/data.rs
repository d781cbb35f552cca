//! Moves, conversions, exchanges, address computation, conditional moves and flag instructions.

use super::{attempt, next};
use crate::{
    cpu::{Cpu, rflags},
    int::{CF, Int, condition},
    mmu::Access,
    uop::{Ctl, Uop},
};

pub unsafe fn mov_reg_reg<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let v = cpu.reg::<T>((*op).src);
        cpu.set_reg((*op).dst, v);
        next(cpu, op)
    }
}

pub unsafe fn mov_reg_imm<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        cpu.set_reg((*op).dst, T::from_u64((*op).imm));
        next(cpu, op)
    }
}

pub unsafe fn mov_reg_mem<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, T::BYTES, Access::Read));
        let v = attempt!(cpu, op, cpu.load::<T>(at));
        cpu.set_reg((*op).dst, v);
        next(cpu, op)
    }
}

pub unsafe fn mov_mem_reg<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, T::BYTES, Access::Write));
        let v = cpu.reg::<T>((*op).src);
        attempt!(cpu, op, cpu.store::<T>(at, v));
        next(cpu, op)
    }
}

pub unsafe fn mov_mem_imm<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, T::BYTES, Access::Write));
        attempt!(cpu, op, cpu.store::<T>(at, T::from_u64((*op).imm)));
        next(cpu, op)
    }
}

/// MOV between the accumulator and an absolute 64-bit address (A0–A3): `imm` is the address.
pub unsafe fn mov_acc_abs<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, absolute(cpu, &*op, T::BYTES, Access::Read));
        let v = attempt!(cpu, op, cpu.load::<T>(at));
        cpu.set_reg(0, v);
        next(cpu, op)
    }
}

pub unsafe fn mov_abs_acc<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, absolute(cpu, &*op, T::BYTES, Access::Write));
        let v = cpu.reg::<T>(0);
        attempt!(cpu, op, cpu.store::<T>(at, v));
        next(cpu, op)
    }
}

fn absolute(cpu: &mut Cpu, op: &Uop, bytes: usize, access: Access) -> crate::fault::Run<u64> {
    cpu.segment_address(op.seg as usize, op.imm, bytes, access)
}

macro_rules! extend {
    ($reg:ident, $mem:ident, |$v:ident: $s:ident, $t:ident| $body:expr) => {
        pub unsafe fn $reg<$s: Int, $t: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
            unsafe {
                let $v = cpu.reg::<$s>((*op).src);
                cpu.set_reg((*op).dst, $body);
                next(cpu, op)
            }
        }
        pub unsafe fn $mem<$s: Int, $t: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
            unsafe {
                let at = attempt!(cpu, op, cpu.ea(&*op, $s::BYTES, Access::Read));
                let $v = attempt!(cpu, op, cpu.load::<$s>(at));
                cpu.set_reg((*op).dst, $body);
                next(cpu, op)
            }
        }
    };
}
extend!(movzx_reg, movzx_mem, |v: S, T| T::from_u64(v.to_u64()));
extend!(movsx_reg, movsx_mem, |v: S, T| T::from_u64(v.sext() as u64));

pub unsafe fn lea<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let offset = cpu.offset_of(&*op) & Cpu::address_mask(&*op);
        cpu.set_reg((*op).dst, T::from_u64(offset));
        next(cpu, op)
    }
}

/// The two-register LEA of 64-bit code, which is most of them.
pub unsafe fn lea64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let offset = cpu.offset_of(&*op);
        cpu.set_reg::<u64>((*op).dst, offset);
        next(cpu, op)
    }
}

pub unsafe fn xchg_reg_reg<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let (a, b) = (cpu.reg::<T>((*op).dst), cpu.reg::<T>((*op).src));
        cpu.set_reg((*op).dst, b);
        cpu.set_reg((*op).src, a);
        next(cpu, op)
    }
}

pub unsafe fn cmov_reg<const CC: u8, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        // A 32-bit CMOV clears the upper half also when the condition is false.
        let v = if condition::<CC>(cpu.regs.flags) { cpu.reg::<T>((*op).src) } else { cpu.reg::<T>((*op).dst) };
        cpu.set_reg((*op).dst, v);
        next(cpu, op)
    }
}

pub unsafe fn cmov_mem<const CC: u8, T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, T::BYTES, Access::Read));
        let loaded = attempt!(cpu, op, cpu.load::<T>(at));
        let v = if condition::<CC>(cpu.regs.flags) { loaded } else { cpu.reg::<T>((*op).dst) };
        cpu.set_reg((*op).dst, v);
        next(cpu, op)
    }
}

pub unsafe fn set_reg<const CC: u8>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let v = u8::from(condition::<CC>(cpu.regs.flags));
        cpu.set_reg((*op).dst, v);
        next(cpu, op)
    }
}

pub unsafe fn set_mem<const CC: u8>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, 1, Access::Write));
        let v = u8::from(condition::<CC>(cpu.regs.flags));
        attempt!(cpu, op, cpu.store::<u8>(at, v));
        next(cpu, op)
    }
}

pub unsafe fn nop(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe { next(cpu, op) }
}

/// CBW, CWDE, CDQE: sign-extend half of the accumulator of `T` bytes.
pub unsafe fn extend_acc<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let half = match T::BYTES {
            2 => cpu.reg::<u8>(0).sext(),
            4 => cpu.reg::<u16>(0).sext(),
            _ => cpu.reg::<u32>(0).sext(),
        };
        cpu.set_reg(0, T::from_u64(half as u64));
        next(cpu, op)
    }
}

/// CWD, CDQ, CQO: fill DX with the accumulator's sign.
pub unsafe fn sign_acc<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let sign = cpu.reg::<T>(0).sext() >> 63;
        cpu.set_reg(16, T::from_u64(sign as u64));
        next(cpu, op)
    }
}

pub unsafe fn clc(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    cpu.regs.flags &= !CF;
    unsafe { next(cpu, op) }
}

pub unsafe fn stc(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    cpu.regs.flags |= CF;
    unsafe { next(cpu, op) }
}

pub unsafe fn cmc(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    cpu.regs.flags ^= CF;
    unsafe { next(cpu, op) }
}

pub unsafe fn cld(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    cpu.rflags &= !rflags::DF;
    unsafe { next(cpu, op) }
}

pub unsafe fn std(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    cpu.rflags |= rflags::DF;
    unsafe { next(cpu, op) }
}

pub unsafe fn lahf(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    let ah = crate::regs::unpack(cpu.regs.flags) as u8 & 0xd5 | 2;
    cpu.set_reg::<u8>(1, ah);
    unsafe { next(cpu, op) }
}

pub unsafe fn sahf(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    let kept = cpu.regs.flags & 0x00ff;
    cpu.regs.flags = crate::regs::pack(u64::from(cpu.reg::<u8>(1))) & 0xff00 | kept;
    unsafe { next(cpu, op) }
}

/// XLAT: AL = [RBX + AL].
pub unsafe fn xlat(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let offset = cpu.regs.gpr[3].wrapping_add(u64::from(cpu.reg::<u8>(0))) & Cpu::address_mask(o);
        let at = attempt!(cpu, op, cpu.segment_address(o.seg as usize, offset, 1, Access::Read));
        let v = attempt!(cpu, op, cpu.load::<u8>(at));
        cpu.set_reg(0, v);
        next(cpu, op)
    }
}

/// MOV r/m, Sreg: a 16-bit store, or a register of `aux` bytes.
pub unsafe fn mov_from_seg(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let selector = cpu.seg[o.src as usize].selector;
        match o.aux {
            0 => {
                let at = attempt!(cpu, op, cpu.ea(o, 2, Access::Write));
                attempt!(cpu, op, cpu.store::<u16>(at, selector));
            }
            2 => cpu.set_reg::<u16>(o.dst, selector),
            _ => cpu.set_reg::<u64>(o.dst, u64::from(selector)),
        }
        next(cpu, op)
    }
}
