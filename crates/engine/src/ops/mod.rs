//! Handlers: one function for each shape of instruction.
//!
//! Safety of all of them: they are called with the `Cpu` they run on and a `Uop` inside a block of its own
//! cache whose last op ends the block, so that `op.add(1)` is valid wherever a handler goes on.

pub mod alu;
pub mod bits;
pub mod data;
pub mod flow;
pub mod muldiv;
pub mod native;
pub mod port;
pub mod stack;
pub mod string;
pub mod system;

use std::ptr;

use crate::{
    cpu::{Cpu, mode, rights, sreg},
    fault::{Fault, NON_CANONICAL, Run, vector},
    int::Int,
    mmu::Access,
    regs::slot,
    tlb::PAGE_MASK,
    uop::{Ctl, Uop, address},
};

/// Goes on with the next instruction of the block.
#[inline(always)]
pub unsafe fn next(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    // SAFETY: see the module: a block's last op never comes here.
    unsafe {
        let n = op.add(1);
        ((*n).handler)(cpu, n)
    }
}

/// Leaves the block with the exception in `cpu.fault`.
#[cold]
#[inline(never)]
pub unsafe fn fault(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    // SAFETY: see the module.
    unsafe {
        let at = cpu.rip;
        leave_at(cpu, op);
        if std::mem::take(&mut cpu.switched) {
            cpu.rip = at;
        }
        if cpu.fault == NON_CANONICAL && usize::from((*op).seg) == sreg::SS {
            cpu.fault = Fault::with(vector::SS, 0);
        }
    }
    Ctl::Fault
}

/// `rip` goes to this instruction; the instructions after it are taken off the count.
unsafe fn leave_at(cpu: &mut Cpu, op: *const Uop) {
    // SAFETY: `op` lies in the current block's ops.
    unsafe {
        let block = &*cpu.block;
        let index = cpu.translated.alone.unwrap_or_else(|| op.offset_from(block.ops) as usize) as u64;
        cpu.uncount(u64::from(block.count).saturating_sub(index));
        cpu.rip = cpu.regs.gpr[slot::BLOCK].wrapping_add(u64::from((*op).off)) & cpu.ip_mask;
    }
    cpu.next = ptr::null();
    cpu.link = ptr::null_mut();
}

/// The handler of every instruction of a block that was invalidated: go to the same address, decoded anew.
pub unsafe fn abort(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    // SAFETY: see the module.
    unsafe { leave_at(cpu, op) };
    Ctl::Next
}

/// `?` for handlers.
macro_rules! attempt {
    ($cpu:expr, $op:expr, $e:expr) => {
        match $e {
            Ok(v) => v,
            Err(_) => return $crate::ops::fault($cpu, $op),
        }
    };
}
pub(crate) use attempt;

impl Cpu {
    /// A register by byte offset; narrower reads take the low part.
    #[inline(always)]
    pub fn reg<T: Int>(&self, offset: u8) -> T {
        // SAFETY: offsets are made by the decoder and lie within `gpr`.
        unsafe { ptr::read_unaligned(self.regs.gpr.as_ptr().cast::<u8>().add(offset as usize).cast::<T>()) }
    }

    /// Writes a register: 32-bit writes clear the upper half, narrower ones leave the rest.
    #[inline(always)]
    pub fn set_reg<T: Int>(&mut self, offset: u8, value: T) {
        // SAFETY: as in `reg`; a 32-bit register's offset is a multiple of 8.
        unsafe {
            let at = self.regs.gpr.as_mut_ptr().cast::<u8>().add(offset as usize);
            if T::BYTES == 4 {
                ptr::write_unaligned(at.cast::<u64>(), value.to_u64());
            } else {
                ptr::write_unaligned(at.cast::<T>(), value);
            }
        }
    }

    /// Base, index and displacement, before segment and address size.
    #[inline(always)]
    pub fn offset_of(&self, op: &Uop) -> u64 {
        // SAFETY: slot numbers are made by the decoder.
        unsafe {
            let base = *self.regs.gpr.get_unchecked(op.base as usize);
            let index = *self.regs.gpr.get_unchecked(op.index as usize);
            base.wrapping_add(index << op.scale).wrapping_add(op.disp as i64 as u64)
        }
    }

    /// The linear address of the memory operand, `bytes` long.
    #[inline(always)]
    pub fn ea(&mut self, op: &Uop, bytes: usize, access: Access) -> Run<u64> {
        let offset = self.offset_of(op);
        self.ea_at(op, offset, bytes, access)
    }

    /// As [`Self::ea`] from an offset that the caller computed: it is cut to the address size here.
    #[inline(always)]
    pub fn ea_at(&mut self, op: &Uop, offset: u64, bytes: usize, access: Access) -> Run<u64> {
        if op.asz == address::LONG {
            // SAFETY: `seg` is below 8.
            return Ok(offset.wrapping_add(unsafe { *self.seg_base.get_unchecked(op.seg as usize) }));
        }
        self.ea_odd(op, offset, bytes, access)
    }

    #[inline(never)]
    fn ea_odd(&mut self, op: &Uop, offset: u64, bytes: usize, access: Access) -> Run<u64> {
        match op.asz {
            address::LONG32 => Ok((offset & 0xffff_ffff).wrapping_add(self.seg_base[op.seg as usize])),
            address::LEGACY32 => self.segment_address(op.seg as usize, offset & 0xffff_ffff, bytes, access),
            _ => self.segment_address(op.seg as usize, offset & 0xffff, bytes, access),
        }
    }

    /// Mask of the address size, for string and loop counters.
    pub fn address_mask(op: &Uop) -> u64 {
        match op.asz {
            address::LONG => u64::MAX,
            address::LONG32 | address::LEGACY32 => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// Limit and rights checks of legacy modes (SDM vol. 3, 6.3 and 6.4).
    pub fn segment_address(&mut self, seg: usize, offset: u64, bytes: usize, access: Access) -> Run<u64> {
        if self.code64() {
            return Ok(offset.wrapping_add(self.seg_base[seg]));
        }
        let s = self.seg[seg];
        let stack = seg == sreg::SS;
        let violation = Fault::with(if stack { vector::SS } else { vector::GP }, 0);
        if self.protected() {
            let code = s.rights & rights::CODE != 0;
            let flag = s.rights & rights::WRITE_OR_READ != 0;
            let allowed = match access {
                Access::Write => !code && flag,
                _ => !code || flag,
            };
            if s.unusable {
                return self.raise(Fault::gp(0));
            }
            if !allowed {
                return self.raise(violation);
            }
        }
        let limit = u64::from(s.limit);
        let last = offset + bytes as u64 - 1;
        let down = s.rights & (rights::CODE | rights::DOWN_OR_CONFORMING) == rights::DOWN_OR_CONFORMING;
        let inside = if down && self.protected() {
            let top = if s.rights & rights::BIG != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if !inside {
            return self.raise(violation);
        }
        Ok((s.base.wrapping_add(offset)) & 0xffff_ffff)
    }

    /// Reads, changes and writes a memory operand of this vCPU alone (no LOCK).
    #[inline(always)]
    pub fn modify<T: Int>(&mut self, linear: u64, change: impl FnOnce(T, &mut u16) -> T) -> Run {
        let mut flags = self.regs.flags;
        let ram = match self.direct(linear, T::BYTES as u64, true)? {
            Some(at) => Some((at, None)),
            None => self.in_ram(linear, T::BYTES as u64, true)?.map(|(at, gpa)| (at, Some(gpa))),
        };
        if let Some((at, gpa)) = ram {
            // SAFETY: `direct` and `in_ram` give a pointer to that many bytes of guest RAM.
            unsafe {
                let old = ptr::read_unaligned(at.cast::<T>());
                ptr::write_unaligned(at.cast::<T>(), change(old, &mut flags));
            }
            if let Some(gpa) = gpa {
                self.settle(gpa, T::BYTES);
            }
        } else {
            // A page crossing or a device: writability first, so that a fault is a write's.
            let mut bytes = [0; 8];
            self.check_writable(linear, T::BYTES)?;
            self.read_bytes(linear, &mut bytes[..T::BYTES], false)?;
            let new = change(T::from_u64(u64::from_le_bytes(bytes)), &mut flags);
            self.write_bytes(linear, &new.to_u64().to_le_bytes()[..T::BYTES], false)?;
        }
        self.regs.flags = flags;
        Ok(())
    }

    /// Faults as a write of `len` bytes would.
    pub fn check_writable(&mut self, linear: u64, len: usize) -> Run {
        self.direct(linear, 1, true)?;
        let last = linear.wrapping_add((len as u64).saturating_sub(1));
        if (linear ^ last) & !PAGE_MASK != 0 {
            self.direct(last & !PAGE_MASK, 1, true)?;
        }
        Ok(())
    }

    /// Whether the stack pointer is RSP (8), ESP (4) or SP (2).
    pub fn stack_bytes(&self) -> usize {
        match self.mode & (mode::CODE | mode::STACK32) {
            mode::CODE64 => 8,
            m if m & mode::STACK32 != 0 => 4,
            _ => 2,
        }
    }
}

/// The three ways in which an operand reaches a handler, for tables of handlers by operand size.
macro_rules! by_size {
    ($bytes:expr, $($path:ident)::+) => {
        match $bytes {
            1 => $($path)::+::<u8>,
            2 => $($path)::+::<u16>,
            4 => $($path)::+::<u32>,
            _ => $($path)::+::<u64>,
        }
    };
    ($bytes:expr, $($path:ident)::+ < $($g:ty),* >) => {
        match $bytes {
            1 => $($path)::+::<$($g,)* u8>,
            2 => $($path)::+::<$($g,)* u16>,
            4 => $($path)::+::<$($g,)* u32>,
            _ => $($path)::+::<$($g,)* u64>,
        }
    };
}
pub(crate) use by_size;
