//! MOVS, STOS, LODS, SCAS, CMPS with their repeat prefixes, in bulk where memory allows.

use std::ptr;

use super::{attempt, next};
use crate::{
    cpu::{Cpu, mode, rflags, sreg},
    fault::Run,
    int::{Int, ZF},
    mmu::Access,
    tlb::PAGE_MASK,
    uop::{Ctl, Uop, address},
};

/// [`Uop::aux`] of string instructions.
pub const REP: u16 = 1;
pub const REPNE: u16 = 2;

/// Elements that are done before pending interrupts are looked at again.
const BATCH: u64 = 4096;

const RCX: u8 = 8;
const RSI: u8 = 48;
const RDI: u8 = 56;

impl Cpu {
    fn counter(&self, op: &Uop) -> u64 {
        self.regs.gpr[1] & Self::address_mask(op)
    }

    /// Writes a counter or index register with the width of the address size.
    fn set_indexed(&mut self, offset: u8, value: u64, op: &Uop) {
        match op.asz {
            address::LONG => self.set_reg(offset, value),
            address::LEGACY16 => self.set_reg(offset, value as u16),
            _ => self.set_reg(offset, value as u32),
        }
    }

    fn step<T: Int>(&self) -> u64 {
        if self.rflags & rflags::DF != 0 { (T::BYTES as u64).wrapping_neg() } else { T::BYTES as u64 }
    }

    fn advance(&mut self, offset: u8, by: u64, op: &Uop) {
        let v = self.reg::<u64>(offset).wrapping_add(by);
        self.set_indexed(offset, v, op);
    }

    fn source<T: Int>(&mut self, op: &Uop) -> Run<u64> {
        let offset = self.regs.gpr[6] & Self::address_mask(op);
        if op.asz <= address::LONG32 {
            return Ok(offset.wrapping_add(self.seg_base[op.seg as usize]));
        }
        self.segment_address(op.seg as usize, offset, T::BYTES, Access::Read)
    }

    fn destination<T: Int>(&mut self, op: &Uop, access: Access) -> Run<u64> {
        let offset = self.regs.gpr[7] & Self::address_mask(op);
        if op.asz <= address::LONG32 {
            return Ok(offset);
        }
        self.segment_address(sreg::ES, offset, T::BYTES, access)
    }

    /// Where `bytes` bytes within a page may be written at once; with the guest-physical address if
    /// [`Self::settle`] must follow.
    #[inline(always)]
    fn bulk_target(&mut self, linear: u64, bytes: u64) -> Run<Option<(*mut u8, Option<u64>)>> {
        if let Some(host) = self.direct(linear, 1, true)? {
            return Ok(Some((host, None)));
        }
        if self.inspect {
            return Ok(None);
        }
        Ok(self.in_ram(linear, bytes, true)?.map(|(host, gpa)| (host, Some(gpa))))
    }

    /// How many elements from `linear` on stay in its page, at most `left`; 0 if even the first crosses.
    fn in_page<T: Int>(linear: u64, left: u64) -> u64 {
        ((0x1000 - (linear & PAGE_MASK)) / T::BYTES as u64).min(left)
    }
}

/// Runs `element` as often as the repeat prefix says. It returns whether to go on (the ZF condition of SCAS
/// and CMPS) and how many elements it did. Between batches the instruction can be interrupted: its registers
/// say how far it came.
#[inline(always)]
unsafe fn repeat(
    cpu: &mut Cpu,
    op: *const Uop,
    mut element: impl FnMut(&mut Cpu, &Uop, u64) -> Run<(u64, bool)>,
) -> Ctl {
    unsafe {
        let o = &*op;
        if o.aux & (REP | REPNE) == 0 {
            attempt!(cpu, op, element(cpu, o, 1));
            return next(cpu, op);
        }
        let mut left = cpu.counter(o);
        let mut since = 0;
        let stepping = cpu.mode & mode::SINGLE != 0 && cpu.rflags & rflags::TF != 0;
        while left != 0 {
            let (done, more) = attempt!(cpu, op, element(cpu, o, if stepping { 1 } else { left }));
            left -= done;
            since += done;
            cpu.set_indexed(RCX, left, o);
            if !more {
                break;
            }
            // A debug trap comes after each iteration (Intel SDM vol. 3, 18.3.1.4 and 18.2.4).
            if (stepping || cpu.breakpoint_hits != 0) && left != 0 {
                return super::abort(cpu, op);
            }
            if since >= BATCH && left != 0 {
                since = 0;
                if cpu.signal.pending() != 0 || !(*cpu.block).valid {
                    return super::abort(cpu, op);
                }
            }
        }
        next(cpu, op)
    }
}

pub unsafe fn movs<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        repeat(cpu, op, |cpu, o, left| {
            let (from, to) = (cpu.source::<T>(o)?, cpu.destination::<T>(o, Access::Write)?);
            let step = cpu.step::<T>();
            if o.asz <= address::LONG32 && left > 1 && step == T::BYTES as u64 {
                let count = Cpu::in_page::<T>(from, Cpu::in_page::<T>(to, left));
                // The register's address must not wrap within the batch; pages see to that for 64 bits.
                if count > 1
                    && o.asz == address::LONG
                    && let Some(source) = cpu.direct(from, 1, false)?
                    && let Some((target, code)) = cpu.bulk_target(to, count * T::BYTES as u64)?
                {
                    let bytes = count as usize * T::BYTES;
                    let distance = (target as usize).wrapping_sub(source as usize);
                    if distance >= bytes {
                        // No byte is read after it was written: forward copying is what memmove does.
                        ptr::copy(source, target, bytes);
                    } else {
                        // The copy feeds on itself (a pattern fill).
                        for i in 0..count as usize {
                            let v = source.cast::<T>().add(i).read_unaligned();
                            target.cast::<T>().add(i).write_unaligned(v);
                        }
                    }
                    if let Some(gpa) = code {
                        cpu.settle(gpa, bytes);
                    }
                    cpu.advance(RSI, bytes as u64, o);
                    cpu.advance(RDI, bytes as u64, o);
                    return Ok((count, true));
                }
            }
            let v = cpu.load::<T>(from)?;
            cpu.store::<T>(to, v)?;
            cpu.advance(RSI, step, o);
            cpu.advance(RDI, step, o);
            Ok((1, true))
        })
    }
}

pub unsafe fn stos<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        repeat(cpu, op, |cpu, o, left| {
            let to = cpu.destination::<T>(o, Access::Write)?;
            let step = cpu.step::<T>();
            let v = cpu.reg::<T>(0);
            if o.asz == address::LONG && left > 1 && step == T::BYTES as u64 {
                let count = Cpu::in_page::<T>(to, left);
                if count > 1
                    && let Some((target, code)) = cpu.bulk_target(to, count * T::BYTES as u64)?
                {
                    if v.to_u64() == 0 || T::BYTES == 1 {
                        ptr::write_bytes(target, v.to_u64() as u8, count as usize * T::BYTES);
                    } else {
                        for i in 0..count as usize {
                            target.cast::<T>().add(i).write_unaligned(v);
                        }
                    }
                    if let Some(gpa) = code {
                        cpu.settle(gpa, count as usize * T::BYTES);
                    }
                    cpu.advance(RDI, count * T::BYTES as u64, o);
                    return Ok((count, true));
                }
            }
            cpu.store::<T>(to, v)?;
            cpu.advance(RDI, step, o);
            Ok((1, true))
        })
    }
}

pub unsafe fn lods<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        repeat(cpu, op, |cpu, o, _| {
            let from = cpu.source::<T>(o)?;
            let v = cpu.load::<T>(from)?;
            cpu.set_reg(0, v);
            let step = cpu.step::<T>();
            cpu.advance(RSI, step, o);
            Ok((1, true))
        })
    }
}

/// Whether REPE or REPNE goes on after a comparison.
fn goes_on(cpu: &Cpu, op: &Uop) -> bool {
    (cpu.regs.flags & ZF != 0) == (op.aux & REP != 0)
}

/// How many of `count` elements there are up to and with the first that `stops`; all if none does.
#[inline(always)]
fn first(count: usize, stops: impl Fn(usize) -> bool) -> usize {
    // So many are looked at together, as vectors.
    const GROUP: usize = 32;
    let mut at = 0;
    while at + GROUP <= count && !(at..at + GROUP).fold(false, |any, i| any | stops(i)) {
        at += GROUP;
    }
    (at..count).find(|&i| stops(i)).map_or(count, |i| i + 1)
}

pub unsafe fn scas<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        repeat(cpu, op, |cpu, o, left| {
            let at = cpu.destination::<T>(o, Access::Read)?;
            let step = cpu.step::<T>();
            if o.asz == address::LONG && left > 1 && step == T::BYTES as u64 {
                let count = Cpu::in_page::<T>(at, left) as usize;
                if count > 1
                    && let Some(host) = cpu.direct(at, 1, false)?
                {
                    let (host, wanted) = (host.cast::<T>(), cpu.reg::<T>(0));
                    let done = if o.aux & REP != 0 {
                        first(count, |i| host.add(i).read_unaligned() != wanted)
                    } else if T::BYTES == 1 {
                        let found = libc::memchr(host.cast(), wanted.to_u64() as i32, count);
                        if found.is_null() { count } else { found.offset_from(host.cast()) as usize + 1 }
                    } else {
                        first(count, |i| host.add(i).read_unaligned() == wanted)
                    };
                    // Read once more, and believed this time: others may be writing.
                    wanted.sub(host.add(done - 1).read_unaligned(), &mut cpu.regs.flags);
                    cpu.advance(RDI, (done * T::BYTES) as u64, o);
                    return Ok((done as u64, goes_on(cpu, o)));
                }
            }
            let v = cpu.load::<T>(at)?;
            cpu.reg::<T>(0).sub(v, &mut cpu.regs.flags);
            cpu.advance(RDI, step, o);
            Ok((1, goes_on(cpu, o)))
        })
    }
}

pub unsafe fn cmps<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        repeat(cpu, op, |cpu, o, left| {
            let (from, to) = (cpu.source::<T>(o)?, cpu.destination::<T>(o, Access::Read)?);
            let step = cpu.step::<T>();
            if o.asz == address::LONG && left > 1 && step == T::BYTES as u64 {
                let count = Cpu::in_page::<T>(from, Cpu::in_page::<T>(to, left)) as usize;
                if count > 1
                    && let Some(a) = cpu.direct(from, 1, false)?
                    && let Some(b) = cpu.direct(to, 1, false)?
                {
                    let (a, b) = (a.cast::<T>(), b.cast::<T>());
                    let done = if o.aux & REP != 0 {
                        first(count, |i| a.add(i).read_unaligned() != b.add(i).read_unaligned())
                    } else {
                        first(count, |i| a.add(i).read_unaligned() == b.add(i).read_unaligned())
                    };
                    // As in SCAS.
                    let (a, b) = (a.add(done - 1).read_unaligned(), b.add(done - 1).read_unaligned());
                    a.sub(b, &mut cpu.regs.flags);
                    cpu.advance(RSI, (done * T::BYTES) as u64, o);
                    cpu.advance(RDI, (done * T::BYTES) as u64, o);
                    return Ok((done as u64, goes_on(cpu, o)));
                }
            }
            let a = cpu.load::<T>(from)?;
            let b = cpu.load::<T>(to)?;
            a.sub(b, &mut cpu.regs.flags);
            cpu.advance(RSI, step, o);
            cpu.advance(RDI, step, o);
            Ok((1, goes_on(cpu, o)))
        })
    }
}

pub unsafe fn ins<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let port = cpu.regs.gpr[2] as u16;
        attempt!(cpu, op, cpu.check_port(port, T::BYTES));
        repeat(cpu, op, |cpu, o, _| {
            let to = cpu.destination::<T>(o, Access::Write)?;
            cpu.check_writable(to, T::BYTES)?;
            let v = cpu.port_read(port, T::BYTES);
            cpu.store::<T>(to, T::from_u64(u64::from(v)))?;
            let step = cpu.step::<T>();
            cpu.advance(RDI, step, o);
            Ok((1, true))
        })
    }
}

pub unsafe fn outs<T: Int>(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let port = cpu.regs.gpr[2] as u16;
        attempt!(cpu, op, cpu.check_port(port, T::BYTES));
        repeat(cpu, op, |cpu, o, _| {
            let from = cpu.source::<T>(o)?;
            let v = cpu.load::<T>(from)?;
            cpu.port_write(port, v.to_u64() as u32, T::BYTES);
            let step = cpu.step::<T>();
            cpu.advance(RSI, step, o);
            Ok((1, true))
        })
    }
}
