//! Delivery of exceptions and interrupts, and IRET (Intel SDM vol. 3, chapter 7; vol. 2, IRET).

use std::ptr;

use vireo_cpu::CrashInfo;

use crate::{
    cpu::{Cpu, Segment, cr0, rflags, rights, sreg},
    fault::{Fault, Run, Stop, vector},
    mmu::canonical,
    segment::{Descriptor, rpl, selector_error},
    task::Switch,
    uop::Ctl,
};

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An exception of the processor.
    Exception,
    /// A device, an IPI, the timer, or an NMI.
    External,
    /// INT n, INT3, INTO: gate privilege is checked.
    Software,
}

/// The error code's EXT bit.
const EXT: u32 = 1;

impl Cpu {
    /// Gives up on the guest with a reason.
    pub fn unsupported<T>(&mut self, what: &str) -> Run<T> {
        self.crash_with(format!("the guest needs {what}, which the software engine does not have"));
        Err(Stop)
    }

    pub fn crash_with(&mut self, reason: String) {
        self.crash = Some(CrashInfo { vcpu: self.id, reason, rip: self.rip, rsp: self.regs.gpr[4], cr3: self.cr3 });
    }

    /// Delivers the exception in `self.fault`; `rip` is what it saves. Escalates to double and triple fault.
    pub fn deliver_fault(&mut self) -> Ctl {
        self.block = ptr::null();
        let mut first = self.fault;
        // A double fault in turn, then the end (SDM vol. 3, table 7-5).
        for _ in 0..3 {
            if self.crash.is_some() {
                return Ctl::Crash;
            }
            self.counters.exceptions += 1;
            if first.vector == vector::PF {
                self.cr2 = first.address;
            }
            let at = self.rip;
            if self.interrupt(first.vector, first.error, Source::Exception, at).is_ok() {
                if first.vector == vector::DB {
                    // The handler may touch debug registers (SDM vol. 3, 18.2.4, GD).
                    self.debug[5] &= !(1 << 13);
                }
                return Ctl::Next;
            }
            if !std::mem::take(&mut self.switched) {
                self.rip = at;
            }
            let second = self.fault;
            if first.vector == vector::DF {
                break;
            }
            let contributory = |v: u8| matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP);
            let double = (contributory(first.vector) && contributory(second.vector))
                || (first.vector == vector::PF && (contributory(second.vector) || second.vector == vector::PF));
            first = if double { Fault::with(vector::DF, 0) } else { second };
        }
        if self.crash.is_none() {
            self.crash_with("triple fault".to_owned());
        }
        Ctl::Crash
    }

    /// Delivers an external interrupt or NMI at the current instruction boundary.
    pub fn deliver_external(&mut self, vector: u8) -> Ctl {
        // No block is running: a stack in a device must not make `leave_soon` suspend the last one, or it would stay
        // so once another block has run.
        self.block = ptr::null();
        self.counters.interrupts += 1;
        let at = self.rip;
        match self.interrupt(vector, None, Source::External, at) {
            Ok(()) => Ctl::Next,
            Err(_) => {
                if !std::mem::take(&mut self.switched) {
                    self.rip = at;
                }
                self.deliver_fault()
            }
        }
    }

    /// Transfers to the handler of `vector`; `back` is the return address. All or nothing.
    pub fn interrupt(&mut self, number: u8, error: Option<u32>, source: Source, back: u64) -> Run {
        let saved = self.snapshot();
        self.transferred = true;
        let result = if self.real_mode() {
            self.interrupt_real(number, back)
        } else if self.long_mode() {
            self.interrupt_long(number, error, source, back)
        } else {
            self.interrupt_protected(number, error, source, back)
        };
        if result.is_err() {
            self.roll_back(saved);
        }
        result
    }

    fn interrupt_real(&mut self, number: u8, back: u64) -> Run {
        let entry = u64::from(number) * 4;
        if entry + 3 > u64::from(self.idtr.limit) {
            return self.gp(0);
        }
        let target = self.load_system::<u32>(self.idtr.base.wrapping_add(entry))?;
        let flags = self.flags();
        self.push(flags, 2)?;
        self.push(u64::from(self.seg[sreg::CS].selector), 2)?;
        self.push(back, 2)?;
        self.set_flags(flags & !(rflags::IF | rflags::TF | rflags::AC | rflags::RF));
        let selector = (target >> 16) as u16;
        self.seg[sreg::CS] =
            Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, rights: 0x9b, unusable: false };
        self.rip = u64::from(target & 0xffff);
        self.refresh();
        Ok(())
    }

    /// An error code that names an IDT entry.
    fn idt_error(number: u8, source: Source) -> u32 {
        u32::from(number) << 3 | 2 | if source == Source::Software { 0 } else { EXT }
    }

    fn interrupt_long(&mut self, number: u8, error: Option<u32>, source: Source, back: u64) -> Run {
        let here = Self::idt_error(number, source);
        let ext = if source == Source::Software { 0 } else { EXT };
        let entry = u64::from(number) * 16;
        if entry + 15 > u64::from(self.idtr.limit) {
            return self.gp(here);
        }
        let raw = self.load_system::<u64>(self.idtr.base.wrapping_add(entry))?;
        let upper = self.load_system::<u64>(self.idtr.base.wrapping_add(entry + 8))?;
        let gate = Descriptor { raw, address: 0 };
        if gate.is_segment() || !matches!(gate.kind(), 14 | 15) {
            return self.gp(here);
        }
        if source == Source::Software && gate.dpl() < self.cpl {
            return self.gp(here);
        }
        if !gate.present() {
            return self.raise(Fault::with(vector::NP, here));
        }
        let (selector, low) = gate.gate();
        let target = low | (upper & 0xffff_ffff) << 32;
        let ist = (raw >> 32) & 7;
        if selector & 0xfffc == 0 {
            return self.gp(ext);
        }
        let code = self.descriptor(selector, vector::GP)?;
        let rights = code.rights();
        if !code.is_code() || code.dpl() > self.cpl || rights & (rights::LONG | rights::BIG) != rights::LONG {
            return self.gp(selector_error(selector) | ext);
        }
        if !code.present() {
            return self.raise(Fault::with(vector::NP, selector_error(selector) | ext));
        }
        if !canonical(target) {
            return self.gp(ext);
        }
        let new_cpl = if code.conforming() { self.cpl } else { code.dpl() };
        let (old_ss, old_sp) = (self.seg[sreg::SS].selector, self.regs.gpr[4]);
        let (old_cs, flags) = (self.seg[sreg::CS].selector, self.flags());
        if new_cpl < self.cpl || ist != 0 {
            let ist = if ist == 0 { None } else { Some(ist) };
            self.switch_stack(new_cpl, ist)?;
        }
        // The new stack is written with the new privilege.
        self.set_code_segment(code, selector, new_cpl)?;
        let frame = self.regs.gpr[4] & !15;
        let mut sp = frame;
        for value in [u64::from(old_ss), old_sp, flags, u64::from(old_cs), back] {
            sp = sp.wrapping_sub(8);
            self.store::<u64>(sp, value)?;
        }
        if let Some(error) = error {
            sp = sp.wrapping_sub(8);
            self.store::<u64>(sp, u64::from(error))?;
        }
        self.regs.gpr[4] = sp;
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.kind() == 14 {
            cleared |= rflags::IF;
        }
        self.set_flags(flags & !cleared);
        self.rip = target;
        self.refresh();
        Ok(())
    }

    fn interrupt_protected(&mut self, number: u8, error: Option<u32>, source: Source, back: u64) -> Run {
        let here = Self::idt_error(number, source);
        let ext = if source == Source::Software { 0 } else { EXT };
        if source == Source::Software && self.v86() && self.iopl() < 3 {
            return self.gp(0);
        }
        let entry = u64::from(number) * 8;
        if entry + 7 > u64::from(self.idtr.limit) {
            return self.gp(here);
        }
        let raw = self.load_system::<u64>(self.idtr.base.wrapping_add(entry))?;
        let gate = Descriptor { raw, address: 0 };
        if gate.is_segment() || !matches!(gate.kind(), 5 | 6 | 7 | 14 | 15) {
            return self.gp(here);
        }
        if source == Source::Software && gate.dpl() < self.cpl {
            return self.gp(here);
        }
        if !gate.present() {
            return self.raise(Fault::with(vector::NP, here));
        }
        if gate.kind() == 5 {
            return self.task_gate(gate, Switch::Nested, back, error);
        }
        let bytes = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let (selector, offset) = gate.gate();
        let target = if bytes == 4 { offset } else { offset & 0xffff };
        if selector & 0xfffc == 0 {
            return self.gp(ext);
        }
        let code = self.descriptor(selector, vector::GP)?;
        if !code.is_code() || code.dpl() > self.cpl {
            return self.gp(selector_error(selector) | ext);
        }
        if !code.present() {
            return self.raise(Fault::with(vector::NP, selector_error(selector) | ext));
        }
        if target > u64::from(code.limit()) {
            return self.gp(ext);
        }
        let new_cpl = if code.conforming() { self.cpl } else { code.dpl() };
        let (old_ss, old_sp) = (self.seg[sreg::SS].selector, self.stack_pointer());
        let (old_cs, flags) = (self.seg[sreg::CS].selector, self.flags());
        let old_data = [sreg::GS, sreg::FS, sreg::DS, sreg::ES].map(|i| self.seg[i].selector);
        let from_v86 = self.v86();
        if from_v86 && new_cpl != 0 {
            return self.gp(selector_error(selector) | ext);
        }
        if new_cpl < self.cpl {
            self.rflags &= !rflags::VM;
            self.switch_stack(new_cpl, None)?;
            self.set_code_segment(code, selector, new_cpl)?;
            if from_v86 {
                for selector in old_data {
                    self.push(u64::from(selector), bytes)?;
                }
                for i in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
                    self.seg[i] = Segment { unusable: true, ..Segment::default() };
                }
            }
            self.push(u64::from(old_ss), bytes)?;
            self.push(old_sp, bytes)?;
        } else {
            self.set_code_segment(code, selector, new_cpl)?;
        }
        self.push(flags, bytes)?;
        self.push(u64::from(old_cs), bytes)?;
        self.push(back, bytes)?;
        if let Some(error) = error {
            self.push(u64::from(error), bytes)?;
        }
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.kind() & 1 == 0 {
            cleared |= rflags::IF;
        }
        self.set_flags(flags & !cleared);
        self.rip = target;
        self.refresh();
        Ok(())
    }

    /// IRET with operands of `bytes`; `next` is the address after it. All or nothing.
    pub fn interrupt_return(&mut self, bytes: usize, next: u64) -> Run {
        let saved = self.snapshot();
        let result = if self.real_mode() || self.v86() {
            self.return_real(bytes)
        } else if self.rflags & rflags::NT != 0 {
            if self.long_mode() { self.gp(0) } else { self.task_return(next) }
        } else {
            self.return_protected(bytes)
        };
        if result.is_err() {
            self.roll_back(saved);
        }
        result
    }

    fn return_real(&mut self, bytes: usize) -> Run {
        if self.v86() && self.iopl() < 3 {
            return self.gp(0);
        }
        let offset = self.pop(bytes)?;
        let selector = self.pop(bytes)? as u16;
        let flags = self.pop(bytes)?;
        if offset > 0xffff {
            return self.gp(0);
        }
        self.load_flags(flags, bytes);
        let cs = &mut self.seg[sreg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.rip = offset;
        self.refresh();
        Ok(())
    }

    fn return_protected(&mut self, bytes: usize) -> Run {
        let offset = self.pop(bytes)?;
        let selector = self.pop(bytes)? as u16;
        let flags = self.pop(bytes)?;
        if flags & rflags::VM != 0 && self.cpl == 0 && bytes == 4 && !self.long_mode() {
            return self.return_to_v86(offset, selector, flags);
        }
        let code = self.return_code(selector, offset)?;
        let outward = rpl(selector) != self.cpl;
        // In 64-bit code the stack pointer is always popped.
        let stack = if outward || self.code64() {
            let sp = self.pop(bytes)?;
            Some((sp, self.pop(bytes)? as u16))
        } else {
            None
        };
        // Flags are changed by the old privilege's rules.
        let mut allowed = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if bytes > 2 {
            allowed |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.cpl <= self.iopl() {
            allowed |= rflags::IF;
        }
        if self.cpl == 0 {
            allowed |= rflags::IOPL | if bytes > 2 { 3 << 19 } else { 0 };
        }
        let new_flags = (self.flags() & !allowed) | (flags & allowed);
        match stack {
            Some((sp, ss)) if outward || ss != self.seg[sreg::SS].selector => {
                self.return_outward(code, selector, ss, sp)?;
            }
            Some((sp, _)) => {
                let cpl = self.cpl;
                self.set_code_segment(code, selector, cpl)?;
                self.set_stack_pointer(sp);
            }
            None => {
                let cpl = self.cpl;
                self.set_code_segment(code, selector, cpl)?;
            }
        }
        self.set_flags(new_flags);
        self.rip = offset;
        self.refresh();
        Ok(())
    }

    fn return_to_v86(&mut self, offset: u64, selector: u16, flags: u64) -> Run {
        let sp = self.pop(4)?;
        let mut selectors = [0u16; 5];
        for s in &mut selectors {
            *s = self.pop(4)? as u16;
        }
        let [ss, es, ds, fs, gs] = selectors;
        self.set_flags(flags);
        self.cpl = 3;
        for (index, selector) in [es, selector, ss, ds, fs, gs].into_iter().enumerate() {
            self.seg[index] =
                Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, rights: 0xf3, unusable: false };
        }
        self.rip = offset & 0xffff;
        self.refresh();
        self.regs.gpr[4] = sp & 0xffff_ffff;
        Ok(())
    }

    /// The #MF or FERR of an x87 error: CR0.NE kernels get the exception.
    pub fn x87_error<T>(&mut self) -> Run<T> {
        if self.cr0 & cr0::NE != 0 { self.raise(Fault::new(vector::MF)) } else { self.unsupported("FERR# and IRQ 13") }
    }
}
