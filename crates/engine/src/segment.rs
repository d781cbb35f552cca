//! Descriptors, segment loads and far control transfers (Intel SDM vol. 3, chapters 3, 6 and 7).

use crate::{
    cpu::{Cpu, Segment, cr4, efer, rflags, rights, sreg},
    fault::{Fault, Run, vector},
    mmu::canonical,
    regs::pack,
    task::Switch,
};

/// Rights of the segments that SYSCALL and SYSRET load in 64-bit mode.
const KERNEL_CODE: u16 = 0xa09b;
const KERNEL_STACK: u16 = 0xc093;
const USER_CODE: u16 = 0xa0fb;
const USER_STACK: u16 = 0xc0f3;

/// A segment that covers everything.
const fn flat(selector: u16, rights: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, rights, unusable: false }
}

/// A descriptor as it stands in the GDT or LDT.
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub raw: u64,
    pub address: u64,
}

impl Descriptor {
    pub fn rights(self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }

    pub fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff) as u32 | ((self.raw >> 32) as u32 & 0x000f_0000);
        if self.rights() & rights::GRANULAR != 0 { limit << 12 | 0xfff } else { limit }
    }

    pub fn base(self) -> u64 {
        ((self.raw >> 16) & 0x00ff_ffff) | ((self.raw >> 32) & 0xff00_0000)
    }

    pub fn dpl(self) -> u8 {
        rights::dpl(self.rights())
    }

    pub fn present(self) -> bool {
        self.rights() & rights::PRESENT != 0
    }

    /// A code or data segment, not a system one.
    pub fn is_segment(self) -> bool {
        self.rights() & rights::S != 0
    }

    pub fn is_code(self) -> bool {
        self.is_segment() && self.rights() & rights::CODE != 0
    }

    pub fn conforming(self) -> bool {
        self.rights() & rights::DOWN_OR_CONFORMING != 0
    }

    /// Type of a system descriptor.
    pub fn kind(self) -> u16 {
        self.rights() & 15
    }

    pub fn segment(self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), rights: self.rights(), unusable: false }
    }

    /// Gates: target selector and offset (without the upper half of 64-bit gates).
    pub fn gate(self) -> (u16, u64) {
        ((self.raw >> 16) as u16, (self.raw & 0xffff) | ((self.raw >> 32) & 0xffff_0000))
    }
}

pub const fn rpl(selector: u16) -> u8 {
    selector as u8 & 3
}

/// An error code that names a selector.
pub const fn selector_error(selector: u16) -> u32 {
    selector as u32 & 0xfffc
}

impl Cpu {
    /// Reads a selector's descriptor; outside its table raises `vector`(selector).
    pub fn descriptor(&mut self, selector: u16, fault: u8) -> Run<Descriptor> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        } else if self.ldtr.unusable || self.ldtr.selector & 0xfffc == 0 {
            return self.raise(Fault::with(fault, selector_error(selector)));
        } else {
            (self.ldtr.base, self.ldtr.limit)
        };
        let offset = u32::from(selector & 0xfff8);
        if offset + 7 > limit {
            return self.raise(Fault::with(fault, selector_error(selector)));
        }
        let address = base.wrapping_add(u64::from(offset));
        let raw = self.load_system::<u64>(address)?;
        Ok(Descriptor { raw, address })
    }

    /// Upper half of the base of a 16-byte system descriptor (64-bit TSS and LDT).
    fn upper_base(&mut self, d: Descriptor) -> Run<u64> {
        if !self.long_mode() {
            return Ok(0);
        }
        Ok((self.load_system::<u64>(d.address.wrapping_add(8))? & 0xffff_ffff) << 32)
    }

    pub fn mark_accessed(&mut self, d: &mut Descriptor) -> Run {
        if d.rights() & rights::ACCESSED == 0 {
            d.raw |= 1 << 40;
            self.store_system::<u8>(d.address.wrapping_add(5), (d.raw >> 40) as u8)?;
        }
        Ok(())
    }

    /// A real-mode or virtual-8086 segment.
    fn set_real_segment(&mut self, index: usize, selector: u16) {
        let s = &mut self.seg[index];
        s.selector = selector;
        s.base = u64::from(selector) << 4;
        s.unusable = false;
        if self.rflags & rflags::VM != 0 {
            s.limit = 0xffff;
            s.rights = 0xf3;
        } else if index == sreg::CS {
            s.rights = 0x9b;
        }
    }

    /// MOV, POP and Lxx of a data segment register. SS also starts an interrupt shadow (the caller's business).
    pub fn load_data_segment(&mut self, index: usize, selector: u16) -> Run {
        if !self.protected() {
            self.set_real_segment(index, selector);
            self.refresh();
            return Ok(());
        }
        if selector & 0xfffc == 0 {
            let null_stack = index == sreg::SS;
            if null_stack && !(self.code64() && self.cpl < 3 && rpl(selector) == self.cpl) {
                return self.gp(0);
            }
            // The base is kept on AMD and cleared on Intel; kernels cope with both. DPL of SS stays the CPL.
            let dpl = u16::from(self.cpl) << 5;
            self.seg[index] = Segment { selector, base: 0, limit: 0, rights: dpl, unusable: true };
            self.refresh();
            return Ok(());
        }
        let mut d = self.descriptor(selector, vector::GP)?;
        let error = selector_error(selector);
        let writable = d.is_segment() && !d.is_code() && d.rights() & rights::WRITE_OR_READ != 0;
        if index == sreg::SS {
            if rpl(selector) != self.cpl || !writable || d.dpl() != self.cpl {
                return self.gp(error);
            }
            if !d.present() {
                return self.raise(Fault::with(vector::SS, error));
            }
        } else {
            let readable = d.is_segment() && (!d.is_code() || d.rights() & rights::WRITE_OR_READ != 0);
            let privileged = !(d.is_code() && d.conforming());
            if !readable || (privileged && (rpl(selector) > d.dpl() || self.cpl > d.dpl())) {
                return self.gp(error);
            }
            if !d.present() {
                return self.raise(Fault::with(vector::NP, error));
            }
        }
        self.mark_accessed(&mut d)?;
        self.seg[index] = d.segment(selector);
        self.refresh();
        Ok(())
    }

    pub fn load_ldt(&mut self, selector: u16) -> Run {
        if selector & 0xfffc == 0 {
            self.ldtr = Segment { selector, unusable: true, ..Segment::default() };
            return Ok(());
        }
        if selector & 4 != 0 {
            return self.gp(selector_error(selector));
        }
        let d = self.descriptor(selector, vector::GP)?;
        if d.is_segment() || d.kind() != 2 {
            return self.gp(selector_error(selector));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, selector_error(selector)));
        }
        let high = self.upper_base(d)?;
        self.ldtr = d.segment(selector);
        self.ldtr.base |= high;
        Ok(())
    }

    pub fn load_task(&mut self, selector: u16) -> Run {
        if selector & 0xfffc == 0 || selector & 4 != 0 {
            return self.gp(selector_error(selector));
        }
        let d = self.descriptor(selector, vector::GP)?;
        // Available 16- or 32/64-bit TSS.
        if d.is_segment() || !matches!(d.kind(), 1 | 9) || (self.long_mode() && d.kind() == 1) {
            return self.gp(selector_error(selector));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, selector_error(selector)));
        }
        let high = self.upper_base(d)?;
        let busy = (d.raw >> 40) as u8 | 2;
        self.store_system::<u8>(d.address.wrapping_add(5), busy)?;
        self.tr = d.segment(selector);
        self.tr.base |= high;
        self.tr.rights |= 2;
        Ok(())
    }

    /// Loads CS from a checked descriptor with the given privilege.
    pub fn set_code_segment(&mut self, mut d: Descriptor, selector: u16, cpl: u8) -> Run {
        self.mark_accessed(&mut d)?;
        self.seg[sreg::CS] = d.segment(selector & !3 | u16::from(cpl));
        self.cpl = cpl;
        self.refresh();
        Ok(())
    }

    /// CS of protected mode must not be both L and D in long mode, and must be a present code segment.
    fn check_code(&mut self, d: Descriptor, selector: u16) -> Run {
        let both = d.rights() & (rights::LONG | rights::BIG) == rights::LONG | rights::BIG;
        if !d.is_code() || (self.long_mode() && both) {
            return self.gp(selector_error(selector));
        }
        Ok(())
    }

    fn check_offset(&mut self, d: Descriptor, offset: u64) -> Run {
        let long = self.long_mode() && d.rights() & rights::LONG != 0;
        let bad = if long { !canonical(offset) } else { offset > u64::from(d.limit()) };
        if bad { self.gp(0) } else { Ok(()) }
    }

    /// Far JMP (`call` false) and far CALL. `bytes` is the operand size, `back` the return address.
    pub fn far_transfer(&mut self, selector: u16, offset: u64, bytes: usize, back: u64, call: bool) -> Run {
        if !self.protected() {
            if offset > 0xffff {
                return self.gp(0);
            }
            if call {
                let (sp, cs) = (self.regs.gpr[4], self.seg[sreg::CS].selector);
                self.push(u64::from(cs), bytes)?;
                if let Err(stop) = self.push(back, bytes) {
                    self.regs.gpr[4] = sp;
                    return Err(stop);
                }
            }
            self.set_real_segment(sreg::CS, selector);
            self.rip = offset;
            self.refresh();
            return Ok(());
        }
        if selector & 0xfffc == 0 {
            return self.gp(0);
        }
        let d = self.descriptor(selector, vector::GP)?;
        if d.is_segment() {
            return self.far_direct(d, selector, offset, bytes, back, call);
        }
        match d.kind() {
            4 | 12 if !(self.long_mode() && d.kind() == 4) => self.far_gate(d, selector, bytes, back, call),
            1 | 5 | 9 if !self.long_mode() => self.far_task(d, selector, back, call),
            _ => self.gp(selector_error(selector)),
        }
    }

    /// To a TSS or through a task gate.
    fn far_task(&mut self, d: Descriptor, selector: u16, back: u64, call: bool) -> Run {
        let error = selector_error(selector);
        if d.dpl() < self.cpl || d.dpl() < rpl(selector) {
            return self.gp(error);
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, error));
        }
        let target = if d.kind() == 5 { d.gate().0 } else { selector };
        self.task_switch(target, if call { Switch::Nested } else { Switch::Jump }, back, None)
    }

    fn far_direct(&mut self, d: Descriptor, selector: u16, offset: u64, bytes: usize, back: u64, call: bool) -> Run {
        self.check_code(d, selector)?;
        let allowed =
            if d.conforming() { d.dpl() <= self.cpl } else { rpl(selector) <= self.cpl && d.dpl() == self.cpl };
        if !allowed {
            return self.gp(selector_error(selector));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, selector_error(selector)));
        }
        self.check_offset(d, offset)?;
        if call {
            self.push_far_return(bytes, back)?;
        }
        self.rip = offset;
        let cpl = self.cpl;
        self.set_code_segment(d, selector, cpl)
    }

    fn push_far_return(&mut self, bytes: usize, back: u64) -> Run {
        let (sp, cs) = (self.regs.gpr[4], self.seg[sreg::CS].selector);
        self.push(u64::from(cs), bytes)?;
        if let Err(stop) = self.push(back, bytes) {
            self.regs.gpr[4] = sp;
            return Err(stop);
        }
        Ok(())
    }

    /// Through a call gate.
    fn far_gate(&mut self, gate: Descriptor, selector: u16, _bytes: usize, back: u64, call: bool) -> Run {
        let error = selector_error(selector);
        if gate.dpl() < self.cpl || gate.dpl() < rpl(selector) {
            return self.gp(error);
        }
        if !gate.present() {
            return self.raise(Fault::with(vector::NP, error));
        }
        let (target, mut offset) = gate.gate();
        let long = self.long_mode();
        let bytes = if long {
            let upper = self.load_system::<u64>(gate.address.wrapping_add(8))?;
            offset |= (upper & 0xffff_ffff) << 32;
            8
        } else if gate.kind() == 4 {
            offset &= 0xffff;
            2
        } else {
            4
        };
        if target & 0xfffc == 0 {
            return self.gp(0);
        }
        let d = self.descriptor(target, vector::GP)?;
        self.check_code(d, target)?;
        if d.dpl() > self.cpl || (long && d.rights() & rights::LONG == 0) {
            return self.gp(selector_error(target));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, selector_error(target)));
        }
        self.check_offset(d, offset)?;
        if !call {
            if !d.conforming() && d.dpl() != self.cpl {
                return self.gp(selector_error(target));
            }
            self.rip = offset;
            let cpl = self.cpl;
            return self.set_code_segment(d, target, cpl);
        }
        if d.conforming() || d.dpl() == self.cpl {
            self.push_far_return(bytes, back)?;
            self.rip = offset;
            let cpl = self.cpl;
            return self.set_code_segment(d, target, cpl);
        }
        self.inner_call(gate, d, target, offset, bytes, back)
    }

    /// A call to a more privileged level: the stack comes from the TSS, parameters are copied.
    fn inner_call(
        &mut self,
        gate: Descriptor,
        d: Descriptor,
        target: u16,
        offset: u64,
        bytes: usize,
        back: u64,
    ) -> Run {
        let new_cpl = d.dpl();
        let (old_ss, old_sp) = (self.seg[sreg::SS].selector, self.stack_pointer());
        let (old_cs, saved) = (self.seg[sreg::CS].selector, self.snapshot());
        let count = if self.long_mode() { 0 } else { (gate.raw >> 32) & 31 };
        let mut parameters = [0u64; 32];
        for i in 0..count {
            let at = self.stack_address(old_sp.wrapping_add(i * bytes as u64), bytes, crate::mmu::Access::Read)?;
            parameters[i as usize] = self.load_sized(at, bytes)?;
        }
        let result = (|| {
            self.switch_stack(new_cpl, None)?;
            self.set_code_segment(d, target, new_cpl)?;
            self.push(u64::from(old_ss), bytes)?;
            self.push(old_sp, bytes)?;
            for i in (0..count).rev() {
                self.push(parameters[i as usize], bytes)?;
            }
            self.push(u64::from(old_cs), bytes)?;
            self.push(back, bytes)?;
            self.rip = offset;
            Ok(())
        })();
        if result.is_err() {
            self.roll_back(saved);
        }
        result
    }

    /// Far RET and RET imm16.
    pub fn far_return(&mut self, bytes: usize, release: u64) -> Run {
        let saved = self.snapshot();
        let result = self.far_return_inner(bytes, release);
        if result.is_err() {
            self.roll_back(saved);
        }
        result
    }

    fn far_return_inner(&mut self, bytes: usize, release: u64) -> Run {
        let offset = self.pop(bytes)?;
        let selector = self.pop(bytes)? as u16;
        let sp = self.stack_pointer().wrapping_add(release);
        self.set_stack_pointer(sp);
        if !self.protected() {
            if offset > 0xffff {
                return self.gp(0);
            }
            self.set_real_segment(sreg::CS, selector);
            self.rip = offset;
            self.refresh();
            return Ok(());
        }
        let d = self.return_code(selector, offset)?;
        self.rip = offset;
        if rpl(selector) == self.cpl {
            let cpl = self.cpl;
            return self.set_code_segment(d, selector, cpl);
        }
        let new_sp = self.pop(bytes)?;
        let new_ss = self.pop(bytes)? as u16;
        self.return_outward(d, selector, new_ss, new_sp.wrapping_add(release))
    }

    /// The code descriptor that RET or IRET goes back to.
    pub fn return_code(&mut self, selector: u16, offset: u64) -> Run<Descriptor> {
        if selector & 0xfffc == 0 {
            return self.gp(0);
        }
        let d = self.descriptor(selector, vector::GP)?;
        self.check_code(d, selector)?;
        let target = rpl(selector);
        if target < self.cpl || (if d.conforming() { d.dpl() > target } else { d.dpl() != target }) {
            return self.gp(selector_error(selector));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, selector_error(selector)));
        }
        self.check_offset(d, offset)?;
        Ok(d)
    }

    /// The rest of a return to a less privileged level: stack segment, and data segments that may not stay.
    pub fn return_outward(&mut self, code: Descriptor, cs: u16, ss: u16, sp: u64) -> Run {
        let cpl = rpl(cs);
        let long_target = self.long_mode() && code.rights() & rights::LONG != 0;
        let stack = if ss & 0xfffc == 0 {
            if !(long_target && cpl != 3 && rpl(ss) == cpl) {
                return self.gp(0);
            }
            None
        } else {
            let mut d = self.descriptor(ss, vector::GP)?;
            let writable = d.is_segment() && !d.is_code() && d.rights() & rights::WRITE_OR_READ != 0;
            if rpl(ss) != cpl || !writable || d.dpl() != cpl {
                return self.gp(selector_error(ss));
            }
            if !d.present() {
                return self.raise(Fault::with(vector::SS, selector_error(ss)));
            }
            self.mark_accessed(&mut d)?;
            Some(d)
        };
        self.set_code_segment(code, cs, cpl)?;
        self.seg[sreg::SS] = match stack {
            Some(d) => d.segment(ss),
            None => {
                let rights = u16::from(cpl) << 5;
                Segment { selector: ss, base: 0, limit: 0, rights, unusable: true }
            }
        };
        for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            let s = self.seg[index];
            let data = s.rights & rights::S != 0
                && s.rights & (rights::CODE | rights::DOWN_OR_CONFORMING) != rights::CODE | rights::DOWN_OR_CONFORMING;
            if data && rights::dpl(s.rights) < cpl && !s.unusable {
                self.seg[index] = Segment { selector: 0, base: 0, limit: 0, rights: 0, unusable: true };
            }
            // A null selector loses its RPL; what FS and GS have for a base stays.
            if self.seg[index].selector & 0xfffc == 0 {
                self.seg[index].selector = 0;
            }
        }
        self.refresh();
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// Stack of privilege `cpl` from the TSS (or of IST `ist`), loaded into SS and SP.
    pub fn switch_stack(&mut self, cpl: u8, ist: Option<u64>) -> Run {
        let base = self.tr.base;
        let ts = Fault::with(vector::TS, selector_error(self.tr.selector));
        if self.long_mode() {
            let offset = match ist {
                Some(n) => 0x1c + n * 8,
                None => 4 + u64::from(cpl) * 8,
            };
            if offset + 7 > u64::from(self.tr.limit) {
                return self.raise(ts);
            }
            let sp = self.load_system::<u64>(base.wrapping_add(offset))?;
            if !canonical(sp) {
                return self.raise(Fault::with(vector::SS, 0));
            }
            if cpl != self.cpl {
                // A null SS with the new privilege as RPL.
                let rights = u16::from(cpl) << 5;
                self.seg[sreg::SS] = Segment { selector: u16::from(cpl), base: 0, limit: 0, rights, unusable: true };
            }
            self.regs.gpr[4] = sp;
            return Ok(());
        }
        let wide = self.tr.rights & 8 != 0;
        let offset = if wide { 4 + u64::from(cpl) * 8 } else { 2 + u64::from(cpl) * 4 };
        if offset + if wide { 5 } else { 3 } > u64::from(self.tr.limit) {
            return self.raise(ts);
        }
        let (sp, ss) = if wide {
            let sp = self.load_system::<u32>(base.wrapping_add(offset))?;
            (u64::from(sp), self.load_system::<u16>(base.wrapping_add(offset + 4))?)
        } else {
            let sp = self.load_system::<u16>(base.wrapping_add(offset))?;
            (u64::from(sp), self.load_system::<u16>(base.wrapping_add(offset + 2))?)
        };
        if ss & 0xfffc == 0 {
            return self.raise(Fault::with(vector::TS, selector_error(ss)));
        }
        let mut d = self.descriptor(ss, vector::TS)?;
        let writable = d.is_segment() && !d.is_code() && d.rights() & rights::WRITE_OR_READ != 0;
        if rpl(ss) != cpl || d.dpl() != cpl || !writable {
            return self.raise(Fault::with(vector::TS, selector_error(ss)));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::SS, selector_error(ss)));
        }
        self.mark_accessed(&mut d)?;
        self.seg[sreg::SS] = d.segment(ss);
        self.cpl = cpl;
        self.refresh();
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// What a far transfer may have to take back.
    pub fn snapshot(&self) -> ([Segment; 6], u64, u64, u8, u64) {
        (self.seg, self.regs.gpr[4], self.rip, self.cpl, self.flags())
    }

    pub fn roll_back(&mut self, (seg, sp, rip, cpl, flags): ([Segment; 6], u64, u64, u8, u64)) {
        if self.switched {
            return;
        }
        self.seg = seg;
        self.regs.gpr[4] = sp;
        self.rip = rip;
        self.cpl = cpl;
        self.set_flags(flags);
        self.refresh();
    }

    /// SYSCALL (SDM vol. 2; AMD APM vol. 3). `next` is the address after it.
    pub fn syscall(&mut self, next: u64) -> Run {
        if self.efer & efer::SCE == 0 || !self.protected() {
            return self.ud();
        }
        let cs = (self.msr.star >> 32) as u16 & 0xfffc;
        if self.long_mode() {
            self.regs.gpr[1] = next;
            self.regs.gpr[11] = self.flags() & !rflags::RF;
            self.rip = if self.code64() { self.msr.lstar } else { self.msr.cstar };
            let flags = self.flags() & !self.msr.sfmask & !rflags::RF;
            self.set_flags(flags);
            self.seg[sreg::CS] = flat(cs, KERNEL_CODE);
        } else {
            self.regs.gpr[1] = next & 0xffff_ffff;
            self.rip = self.msr.star & 0xffff_ffff;
            let flags = self.flags() & !(rflags::VM | rflags::IF | rflags::RF);
            self.set_flags(flags);
            self.seg[sreg::CS] = flat(cs, 0xc09b);
        }
        self.seg[sreg::SS] = flat(cs.wrapping_add(8), KERNEL_STACK);
        self.cpl = 0;
        self.refresh();
        Ok(())
    }

    /// Has translated code know what SYSCALL and SYSRET do, after control registers or their MSRs changed.
    pub fn look_at_calls(&mut self) {
        let (star, mask) = (self.msr.star, self.msr.sfmask);
        let usual = self.efer & efer::SCE != 0
            && self.long_mode()
            && self.protected()
            && self.cr4 & cr4::TSD == 0
            && mask & rflags::AC != 0;
        let calls = &mut self.translated.calls;
        calls.usual = usual.into();
        calls.keeps = !mask & !rflags::RF;
        calls.keeps_packed = !u32::from(pack(mask) & !pack(0));
        let (kernel, user) = ((star >> 32) as u16 & 0xfffc, (star >> 48) as u16);
        calls.kernel = [flat(kernel, KERNEL_CODE), flat(kernel.wrapping_add(8), KERNEL_STACK)];
        calls.user = [flat(user.wrapping_add(16) | 3, USER_CODE), flat(user.wrapping_add(8) | 3, USER_STACK)];
    }

    /// SYSRET; `wide` with REX.W.
    pub fn sysret(&mut self, wide: bool) -> Run {
        if self.efer & efer::SCE == 0 || !self.protected() {
            return self.ud();
        }
        if self.cpl != 0 {
            return self.gp(0);
        }
        let base = (self.msr.star >> 48) as u16;
        if self.long_mode() {
            if wide && !canonical(self.regs.gpr[1]) {
                return self.gp(0);
            }
            let r11 = self.regs.gpr[11];
            self.set_flags(r11 & !(rflags::RF | rflags::VM));
        } else {
            let flags = self.flags() | rflags::IF;
            self.set_flags(flags);
        }
        if wide {
            self.rip = self.regs.gpr[1];
            self.seg[sreg::CS] = flat(base.wrapping_add(16) | 3, USER_CODE);
        } else {
            self.rip = self.regs.gpr[1] & 0xffff_ffff;
            self.seg[sreg::CS] = flat(base | 3, 0xc0fb);
        }
        self.seg[sreg::SS] = flat(base.wrapping_add(8) | 3, USER_STACK);
        self.cpl = 3;
        self.refresh();
        Ok(())
    }

    pub fn sysenter(&mut self) -> Run {
        let cs = self.msr.sysenter_cs as u16 & 0xfffc;
        if !self.protected() || cs == 0 {
            return self.gp(0);
        }
        let flags = self.flags() & !(rflags::VM | rflags::IF | rflags::RF);
        self.set_flags(flags);
        let mask = if self.long_mode() { u64::MAX } else { 0xffff_ffff };
        self.rip = self.msr.sysenter_eip & mask;
        self.regs.gpr[4] = self.msr.sysenter_esp & mask;
        self.seg[sreg::CS] = flat(cs, if self.long_mode() { 0xa09b } else { 0xc09b });
        self.seg[sreg::SS] = flat(cs.wrapping_add(8), 0xc093);
        self.cpl = 0;
        self.refresh();
        Ok(())
    }

    pub fn sysexit(&mut self, wide: bool) -> Run {
        let cs = self.msr.sysenter_cs as u16 & 0xfffc;
        if !self.protected() || cs == 0 || self.cpl != 0 {
            return self.gp(0);
        }
        let (rip, rsp) = (self.regs.gpr[2], self.regs.gpr[1]);
        if wide && (!canonical(rip) || !canonical(rsp)) {
            return self.gp(0);
        }
        let flat = |selector: u16, rights| Segment {
            selector: selector | 3,
            base: 0,
            limit: u32::MAX,
            rights,
            unusable: false,
        };
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        self.rip = rip & mask;
        self.regs.gpr[4] = rsp & mask;
        self.seg[sreg::CS] = if wide { flat(cs.wrapping_add(32), 0xa0fb) } else { flat(cs.wrapping_add(16), 0xc0fb) };
        self.seg[sreg::SS] = flat(cs.wrapping_add(if wide { 40 } else { 24 }), 0xc0f3);
        self.cpl = 3;
        self.refresh();
        Ok(())
    }
}
