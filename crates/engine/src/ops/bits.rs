//! BT, BTS, BTR and BTC with a bit offset in a register or an immediate, also locked and on bit strings.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{attempt, next};
use crate::{
    cpu::Cpu,
    fault::Run,
    int::{CF, Int},
    mmu::Access,
    uop::{Ctl, Uop},
};

/// What happens to the bit after it was copied to CF.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Change {
    None = 0,
    Set = 1,
    Reset = 2,
    Complement = 3,
}

pub const LOCK: u16 = 4;
/// The bit offset is a register (`src`), else `imm`.
pub const BY_REGISTER: u16 = 8;

#[inline(always)]
fn changed(v: u64, bit: u64, aux: u16) -> u64 {
    match aux & 3 {
        0 => v,
        1 => v | bit,
        2 => v & !bit,
        _ => v ^ bit,
    }
}

#[inline(always)]
fn set_carry(cpu: &mut Cpu, set: bool) {
    cpu.regs.flags = cpu.regs.flags & !CF | if set { CF } else { 0 };
}

pub unsafe fn bit_reg<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let which = if o.aux & BY_REGISTER != 0 { cpu.reg::<u64>(o.src) } else { o.imm };
        let bit = 1u64 << (which & u64::from(T::BITS - 1));
        let v = cpu.reg::<T>(o.dst).to_u64();
        set_carry(cpu, v & bit != 0);
        if o.aux & 3 != 0 {
            cpu.set_reg(o.dst, T::from_u64(changed(v, bit, o.aux)));
        }
        next(cpu, op)
    }
}

pub unsafe fn bit_mem<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let set = attempt!(cpu, op, bit_of_memory::<T>(cpu, &*op));
        set_carry(cpu, set);
        next(cpu, op)
    }
}

fn bit_of_memory<T: Int>(cpu: &mut Cpu, op: &Uop) -> Run<bool> {
    let access = if op.aux & 3 == 0 { Access::Read } else { Access::Write };
    let which =
        if op.aux & BY_REGISTER != 0 { cpu.reg::<T>(op.src).sext() } else { (op.imm & u64::from(T::BITS - 1)) as i64 };
    // A register offset reaches beyond the operand, in steps of its size, in either direction.
    let units = which >> T::BITS.trailing_zeros();
    let displaced = units.wrapping_mul(T::BYTES as i64);
    let bit = 1u64 << (which & i64::from(T::BITS - 1));
    let offset = cpu.offset_of(op).wrapping_add(displaced as u64);
    let at = cpu.ea_at(op, offset, T::BYTES, access)?;
    if op.aux & 3 == 0 {
        return Ok(cpu.load::<T>(at)?.to_u64() & bit != 0);
    }
    if op.aux & LOCK != 0 {
        // Of the operand only the byte with the bit changes, which is always aligned.
        let byte = usize::from(bit.trailing_zeros() as u8 / 8);
        if let Some(host) = cpu.direct(at, T::BYTES as u64, true)? {
            // SAFETY: `direct` gave a pointer to the whole operand.
            return Ok(unsafe { atomic(host.add(byte), bit, op.aux) });
        }
        if let Some((host, gpa)) = cpu.in_ram(at, T::BYTES as u64, true)? {
            // SAFETY: as above, of `in_ram`.
            let was = unsafe { atomic(host.add(byte), bit, op.aux) };
            cpu.settle(gpa, T::BYTES);
            return Ok(was);
        }
    }
    let aux = op.aux;
    let mut was = false;
    let locked = if aux & LOCK != 0 { Some(cpu.shared.clone()) } else { None };
    let _guard = locked.as_ref().map(|s| s.split_lock());
    cpu.modify::<T>(at, |v, _| {
        was = v.to_u64() & bit != 0;
        T::from_u64(changed(v.to_u64(), bit, aux))
    })?;
    Ok(was)
}

/// Atomically changes the bit that `bit` is in its byte of the operand; returns what it was.
///
/// # Safety
/// `host` points at that byte, in guest RAM.
unsafe fn atomic(host: *mut u8, bit: u64, aux: u16) -> bool {
    // SAFETY: by the contract above.
    let cell = unsafe { &*host.cast::<AtomicU8>() };
    let bit = 1u8 << (bit.trailing_zeros() % 8);
    let old = match aux & 3 {
        1 => cell.fetch_or(bit, Ordering::SeqCst),
        2 => cell.fetch_and(!bit, Ordering::SeqCst),
        _ => cell.fetch_xor(bit, Ordering::SeqCst),
    };
    old & bit != 0
}
