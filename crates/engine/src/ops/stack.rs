//! PUSH, POP and their relatives.

use super::{attempt, next};
use crate::{
    cpu::{Cpu, rflags, sreg},
    fault::{Fault, NON_CANONICAL, Run, Stop, vector},
    mmu::Access,
    uop::{Ctl, Uop},
};

impl Cpu {
    /// Writes SP, ESP or RSP, whichever the stack uses.
    #[inline]
    pub fn set_stack_pointer(&mut self, value: u64) {
        match self.stack_bytes() {
            8 => self.regs.gpr[4] = value,
            4 => self.regs.gpr[4] = value & 0xffff_ffff,
            _ => self.set_reg(32, value as u16),
        }
    }

    /// The stack pointer, as wide as the stack uses it.
    pub fn stack_pointer(&self) -> u64 {
        match self.stack_bytes() {
            8 => self.regs.gpr[4],
            4 => self.regs.gpr[4] & 0xffff_ffff,
            _ => self.regs.gpr[4] & 0xffff,
        }
    }

    pub fn stack_mask(&self) -> u64 {
        match self.stack_bytes() {
            8 => u64::MAX,
            4 => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// Linear address of `offset` in the stack segment.
    pub fn stack_address(&mut self, offset: u64, bytes: usize, access: Access) -> Run<u64> {
        let offset = offset & self.stack_mask();
        self.segment_address(sreg::SS, offset, bytes, access)
    }

    pub fn store_sized(&mut self, at: u64, value: u64, bytes: usize) -> Run {
        match bytes {
            2 => self.store::<u16>(at, value as u16),
            4 => self.store::<u32>(at, value as u32),
            _ => self.store::<u64>(at, value),
        }
    }

    pub fn load_sized(&mut self, at: u64, bytes: usize) -> Run<u64> {
        Ok(match bytes {
            2 => u64::from(self.load::<u16>(at)?),
            4 => u64::from(self.load::<u32>(at)?),
            _ => self.load::<u64>(at)?,
        })
    }

    /// Pushes 2, 4 or 8 bytes; nothing changes if it faults.
    pub fn push(&mut self, value: u64, bytes: usize) -> Run {
        let sp = self.stack_pointer().wrapping_sub(bytes as u64);
        let at = self.stack_address(sp, bytes, Access::Write)?;
        self.store_sized(at, value, bytes).map_err(|stop| self.blame_stack(stop))?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// An access to the stack faulted, whatever segment the instruction's operand is in.
    #[cold]
    pub fn blame_stack(&mut self, stop: Stop) -> Stop {
        if self.fault == NON_CANONICAL {
            self.fault = Fault::with(vector::SS, 0);
        }
        stop
    }

    pub fn pop(&mut self, bytes: usize) -> Run<u64> {
        let sp = self.stack_pointer();
        let at = self.stack_address(sp, bytes, Access::Read)?;
        let value = self.load_sized(at, bytes).map_err(|stop| self.blame_stack(stop))?;
        self.set_stack_pointer(sp.wrapping_add(bytes as u64));
        Ok(value)
    }
}

pub unsafe fn push_reg64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let v = cpu.reg::<u64>((*op).src);
        let sp = cpu.regs.gpr[4].wrapping_sub(8);
        attempt!(cpu, op, cpu.store::<u64>(sp, v));
        cpu.regs.gpr[4] = sp;
        next(cpu, op)
    }
}

pub unsafe fn pop_reg64(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let sp = cpu.regs.gpr[4];
        let v = attempt!(cpu, op, cpu.load::<u64>(sp));
        cpu.regs.gpr[4] = sp.wrapping_add(8);
        cpu.set_reg((*op).dst, v);
        next(cpu, op)
    }
}

/// Operand size in bytes: the low bits of `aux`.
fn bytes(op: &Uop) -> usize {
    (op.aux & 15) as usize
}

pub unsafe fn push_imm(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        attempt!(cpu, op, cpu.push((*op).imm, bytes(&*op)));
        next(cpu, op)
    }
}

pub unsafe fn push_reg(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let v = cpu.reg::<u64>((*op).src);
        attempt!(cpu, op, cpu.push(v, bytes(&*op)));
        next(cpu, op)
    }
}

pub unsafe fn push_mem(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let n = bytes(&*op);
        let at = attempt!(cpu, op, cpu.ea(&*op, n, Access::Read));
        let v = attempt!(cpu, op, cpu.load_sized(at, n));
        attempt!(cpu, op, cpu.push(v, n));
        next(cpu, op)
    }
}

pub unsafe fn push_seg(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let v = u64::from(cpu.seg[(*op).src as usize].selector);
        attempt!(cpu, op, cpu.push(v, bytes(&*op)));
        next(cpu, op)
    }
}

pub unsafe fn pop_reg(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let n = bytes(&*op);
        let v = attempt!(cpu, op, cpu.pop(n));
        match n {
            2 => cpu.set_reg((*op).dst, v as u16),
            4 => cpu.set_reg((*op).dst, v as u32),
            _ => cpu.set_reg((*op).dst, v),
        }
        next(cpu, op)
    }
}

/// POP m: the address is computed with the stack pointer already raised.
pub unsafe fn pop_mem(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let n = bytes(&*op);
        let sp = cpu.regs.gpr[4];
        let v = attempt!(cpu, op, cpu.pop(n));
        let stored = match cpu.ea(&*op, n, Access::Write) {
            Ok(at) => cpu.store_sized(at, v, n),
            Err(stop) => Err(stop),
        };
        if stored.is_err() {
            cpu.regs.gpr[4] = sp;
            return super::fault(cpu, op);
        }
        next(cpu, op)
    }
}

pub unsafe fn pushf(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        if cpu.v86() && cpu.iopl() < 3 {
            cpu.fault = Fault::gp(0);
            return super::fault(cpu, op);
        }
        let v = cpu.flags() & !(rflags::RF | rflags::VM);
        attempt!(cpu, op, cpu.push(v, bytes(&*op)));
        next(cpu, op)
    }
}

/// POPF ends its block: IF, TF and AC may have changed.
pub unsafe fn popf(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        if cpu.v86() && cpu.iopl() < 3 {
            cpu.fault = Fault::gp(0);
            return super::fault(cpu, op);
        }
        let n = bytes(&*op);
        let v = attempt!(cpu, op, cpu.pop(n));
        cpu.load_flags(v, n);
        super::flow::leave(cpu, op)
    }
}

impl Cpu {
    /// What POPF and IRET let the current privilege change in RFLAGS.
    pub fn load_flags(&mut self, value: u64, bytes: usize) {
        let mut allowed = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if bytes > 2 {
            allowed |= rflags::AC | rflags::ID;
        }
        if self.cpl == 0 {
            allowed |= rflags::IOPL;
        }
        if self.cpl <= self.iopl() || self.real_mode() {
            allowed |= rflags::IF;
        }
        let old = self.flags();
        self.set_flags((old & !allowed & !rflags::RF) | (value & allowed));
        if (old ^ self.flags()) & (rflags::TF | rflags::AC) != 0 {
            self.refresh();
        }
    }
}

/// PUSHA and POPA exist in legacy code only.
pub unsafe fn pusha(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let n = bytes(&*op);
        let sp = cpu.regs.gpr[4];
        for i in 0..8 {
            let v = if i == 4 { sp } else { cpu.regs.gpr[i] };
            if cpu.push(v, n).is_err() {
                cpu.regs.gpr[4] = sp;
                return super::fault(cpu, op);
            }
        }
        next(cpu, op)
    }
}

pub unsafe fn popa(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let n = bytes(&*op);
        let saved = cpu.regs.gpr;
        for i in (0..8u8).rev() {
            let Ok(v) = cpu.pop(n) else {
                cpu.regs.gpr = saved;
                return super::fault(cpu, op);
            };
            match (i, n) {
                (4, _) => {}
                (_, 2) => cpu.set_reg(i * 8, v as u16),
                _ => cpu.set_reg(i * 8, v as u32),
            }
        }
        next(cpu, op)
    }
}

/// LEAVE: the frame pointer becomes the stack pointer, then POP into it.
pub unsafe fn leave(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let n = bytes(&*op);
        let sp = cpu.regs.gpr[4];
        let frame = cpu.regs.gpr[5];
        cpu.set_stack_pointer(frame);
        match cpu.pop(n) {
            Ok(v) if n == 2 => cpu.set_reg(40, v as u16),
            Ok(v) if n == 4 => cpu.set_reg(40, v as u32),
            Ok(v) => cpu.regs.gpr[5] = v,
            Err(_) => {
                cpu.regs.gpr[4] = sp;
                return super::fault(cpu, op);
            }
        }
        next(cpu, op)
    }
}

/// ENTER imm16 (bits 0–15 of `imm`), imm8 (bits 16–23).
pub unsafe fn enter(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let n = bytes(o);
        let saved = cpu.regs.gpr;
        if enter_frame(cpu, n, o.imm & 0xffff, (o.imm >> 16) & 31).is_err() {
            cpu.regs.gpr = saved;
            return super::fault(cpu, op);
        }
        next(cpu, op)
    }
}

fn enter_frame(cpu: &mut Cpu, n: usize, size: u64, level: u64) -> Run {
    let mut frame = cpu.regs.gpr[5];
    cpu.push(frame, n)?;
    let top = cpu.stack_pointer();
    for _ in 1..level {
        frame = frame.wrapping_sub(n as u64);
        let at = cpu.stack_address(frame, n, Access::Read)?;
        let v = cpu.load_sized(at, n)?;
        cpu.push(v, n)?;
    }
    if level > 0 {
        cpu.push(top, n)?;
    }
    let sp = cpu.stack_pointer().wrapping_sub(size);
    // The final stack top must be writable (SDM, ENTER).
    let at = cpu.stack_address(sp, n, Access::Write)?;
    cpu.check_writable(at, n)?;
    cpu.set_stack_pointer(sp);
    match n {
        2 => cpu.set_reg(40, top as u16),
        4 => cpu.set_reg(40, top as u32),
        _ => cpu.regs.gpr[5] = top,
    }
    Ok(())
}
