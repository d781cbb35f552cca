//! Instructions that run on the host CPU through [`crate::native`].

use super::{attempt, next};
use crate::{
    cpu::{Cpu, cr0, cr4},
    fault::{Fault, Run, Stop, vector},
    mmu::Access,
    native::{Access as MemoryAccess, Context, FeatureClass, GuestAccess, Stub, Trap},
    uop::{Ctl, Uop},
};

impl Cpu {
    /// The CR0, CR4 and XCR0 checks of a class of instructions.
    #[inline(always)]
    fn check_class(&mut self, class: FeatureClass) -> Run {
        if class == FeatureClass::Integer { Ok(()) } else { self.check_class_slow(class) }
    }

    fn check_class_slow(&mut self, class: FeatureClass) -> Run {
        use FeatureClass as F;
        let em = self.cr0 & cr0::EM != 0;
        let ts = self.cr0 & cr0::TS != 0;
        let osxsave = self.cr4 & cr4::OSXSAVE != 0;
        let undefined = match class {
            F::Integer | F::X87 | F::Wait | F::Fxsave => false,
            F::VexInteger => !self.protected(),
            F::Mmx => em,
            F::Sse | F::SseMmx => em || self.cr4 & cr4::OSFXSR == 0,
            F::Avx => !osxsave || self.xcr0 & 6 != 6 || !self.protected(),
            F::Xsave | F::Xgetbv => !osxsave,
        };
        if undefined {
            return self.ud();
        }
        let missing = match class {
            F::Integer | F::VexInteger | F::Xgetbv => false,
            F::X87 | F::Fxsave => em || ts,
            F::Wait => ts && self.cr0 & cr0::MP != 0,
            _ => ts,
        };
        if missing { self.raise(Fault::new(vector::NM)) } else { Ok(()) }
    }

    fn trap<T>(&mut self, trap: Trap<Stop>) -> Run<T> {
        match trap {
            Trap::Divide => self.raise(Fault::new(vector::DE)),
            Trap::InvalidOpcode => self.ud(),
            Trap::GeneralProtection => self.gp(0),
            Trap::MathFault => self.x87_error(),
            Trap::SimdException if self.cr4 & cr4::OSXMMEXCPT == 0 => self.ud(),
            Trap::SimdException => self.raise(Fault::new(vector::XM)),
            Trap::Memory(stop) => Err(stop),
        }
    }

    /// Puts the host's floating-point registers in order before code that is not ours to vouch for.
    #[inline(always)]
    pub fn park_fpu(&mut self) {
        self.fpu.park(&mut self.regs);
    }

    fn run_stub(&mut self, stub: &Stub, op: &Uop) -> Run {
        self.check_class(stub.class)?;
        if stub.waits && self.fpu.pending_x87_exception() {
            return self.x87_error();
        }
        if stub.memory.access == MemoryAccess::None {
            // SAFETY: the stub comes from our cache, which is only flushed together with all blocks.
            let done = unsafe { self.fpu.call(stub, &mut self.regs, std::ptr::null_mut()) };
            if stub.fop != 0 {
                self.note_x87(stub, op, 0);
            }
            return done.or_else(|t| self.trap(t.widen()));
        }
        self.run_stub_memory(stub, op)
    }

    fn note_x87(&mut self, stub: &Stub, op: &Uop, operand: u64) {
        let at = self.regs.gpr[crate::regs::slot::BLOCK].wrapping_add(u64::from(op.off));
        self.fpu.note(stub, at, operand);
    }

    #[inline]
    fn run_stub_memory(&mut self, stub: &Stub, op: &Uop) -> Run {
        let bytes = stub.memory.bytes as usize;
        let write = stub.memory.access != MemoryAccess::Read;
        let access = if write { Access::Write } else { Access::Read };
        let offset = self.offset_of(op).wrapping_add(stub.bit_displacement(&self.regs) as u64);
        let at = self.ea_at(op, offset, bytes, access)?;
        if stub.memory.alignment > 1 && !at.is_multiple_of(u64::from(stub.memory.alignment)) {
            return self.gp(0);
        }
        if stub.fop != 0 {
            self.note_x87(stub, op, at);
        }
        if let Some(host) = self.direct(at, bytes as u64, write)? {
            // SAFETY: as above; `direct` gave a pointer to that many bytes of guest RAM.
            return unsafe { self.fpu.call(stub, &mut self.regs, host) }.or_else(|t| self.trap(t.widen()));
        }
        if let Some((host, gpa)) = self.in_ram(at, bytes as u64, write)? {
            // SAFETY: as above, of `in_ram`.
            let done = unsafe { self.fpu.call(stub, &mut self.regs, host) };
            if write {
                self.settle(gpa, bytes);
            }
            return done.or_else(|t| self.trap(t.widen()));
        }
        // Page crossing or a device: through the bounce buffer. The lock is one among such accesses only.
        let shared = self.shared.clone();
        let _guard = stub.locked.then(|| shared.split_lock());
        if write {
            self.check_writable(at, bytes)?;
        }
        let mut buffer = [0u8; 64];
        let reads = stub.memory.access != MemoryAccess::Write || self.direct_ram(at, bytes);
        if reads {
            self.read_bytes(at, &mut buffer[..bytes], false)?;
        }
        let mut bounce = Bounce(buffer);
        // SAFETY: as above; the buffer is large and aligned enough for any operand.
        if let Err(t) = unsafe { self.fpu.call(stub, &mut self.regs, bounce.0.as_mut_ptr()) } {
            return self.trap(t.widen());
        }
        if write { self.write_bytes(at, &bounce.0[..bytes], false) } else { Ok(()) }
    }

    /// Whether reading the operand of a pure store first is harmless.
    fn direct_ram(&mut self, at: u64, bytes: usize) -> bool {
        let mut is_ram = |at| {
            // A TLB entry is of RAM, and an access without breakpoints is one that it may stand for.
            matches!(self.direct(at, 1, false), Ok(Some(_))) || matches!(self.in_ram(at, 1, false), Ok(Some(_)))
        };
        is_ram(at) && is_ram(at.wrapping_add(bytes as u64 - 1))
    }
}

#[repr(align(64))]
struct Bounce([u8; 64]);

/// `imm` points at the stub's description, which lives as long as the stub cache is not flushed.
pub unsafe fn stub(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let stub = &*(o.imm as *const Stub);
        attempt!(cpu, op, cpu.run_stub(stub, o));
        next(cpu, op)
    }
}

/// A register-only stub without floating-point state or checks: nothing but the call.
pub unsafe fn stub_register(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let stub = &*((*op).imm as *const Stub);
        (stub.entry)(&raw mut cpu.regs, std::ptr::null_mut());
        next(cpu, op)
    }
}

/// Guest memory for instructions that are executed element by element.
struct Memory<'a> {
    cpu: &'a mut Cpu,
    seg: usize,
}

impl GuestAccess for Memory<'_> {
    type Fault = Stop;

    fn read(&mut self, address: u64, data: &mut [u8]) -> Run {
        let mut done = 0;
        while done < data.len() {
            let n = (data.len() - done).min(64);
            let at = self.cpu.segment_address(self.seg, address.wrapping_add(done as u64), n, Access::Read)?;
            self.cpu.read_bytes(at, &mut data[done..done + n], false)?;
            done += n;
        }
        Ok(())
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Run {
        self.check_write(address, data.len())?;
        for (i, piece) in data.chunks(64).enumerate() {
            let at = address.wrapping_add(i as u64 * 64);
            let at = self.cpu.segment_address(self.seg, at, piece.len(), Access::Write)?;
            self.cpu.write_bytes(at, piece, false)?;
        }
        Ok(())
    }

    fn check_write(&mut self, address: u64, bytes: usize) -> Run {
        let at = self.cpu.segment_address(self.seg, address, bytes.max(1), Access::Write)?;
        self.cpu.check_writable(at, bytes)
    }
}

/// `imm` points at the description of the instruction.
pub unsafe fn special(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        let special = *(o.imm as *const crate::native::Special);
        attempt!(cpu, op, cpu.run_special(&special, o));
        next(cpu, op)
    }
}

impl Cpu {
    fn run_special(&mut self, special: &crate::native::Special, op: &Uop) -> Run {
        self.check_class(special.class())?;
        let offset = self.offset_of(op) & Self::address_mask(op);
        if special.access() != MemoryAccess::None && special.alignment() > 1 {
            let linear = self.segment_address(op.seg as usize, offset, 1, Access::Read)?;
            if !linear.is_multiple_of(u64::from(special.alignment())) {
                return self.gp(0);
            }
        }
        let context = Context { xcr0: self.xcr0, long_mode: self.code64(), real_mode: !self.protected() };
        // The instruction works on the registers while its memory accesses work on the rest of the CPU.
        let mut fpu = std::mem::take(&mut self.fpu);
        let mut regs = self.regs.clone();
        let mut memory = Memory { cpu: self, seg: op.seg as usize };
        let done = special.execute(&mut fpu, &mut regs, &context, &mut memory, offset);
        self.fpu = fpu;
        self.regs = regs;
        done.or_else(|t| self.trap(t))
    }
}

pub unsafe fn vzeroupper(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        attempt!(cpu, op, cpu.check_class(FeatureClass::Avx));
        let count = if cpu.code64() { 16 } else { 8 };
        for register in &mut cpu.regs.ymm[..count] {
            register[2] = 0;
            register[3] = 0;
        }
        next(cpu, op)
    }
}

/// MFENCE, LFENCE and SFENCE: what other vCPUs and device threads see is what the host orders, also of non-temporal
/// stores, which run natively.
pub unsafe fn fence(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    unsafe { next(cpu, op) }
}

/// CLFLUSH and its kind: the address must be readable, that is all.
pub unsafe fn touch(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let at = attempt!(cpu, op, cpu.ea(&*op, 1, Access::Read));
        attempt!(cpu, op, cpu.direct(at, 1, false));
        next(cpu, op)
    }
}
