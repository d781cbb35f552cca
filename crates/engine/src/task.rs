//! Hardware task switches between 32-bit tasks (Intel SDM vol. 3, chapter 9). Long mode has none.

use crate::{
    cpu::{Cpu, Segment, cr0, mode, rflags, rights, sreg},
    fault::{Fault, Run, vector},
    segment::{Descriptor, rpl, selector_error},
};

/// What brings a task switch about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    Jump,
    /// CALL, or an exception or interrupt through a task gate: the new task returns by IRET.
    Nested,
    Return,
}

/// Offsets in a 32-bit task-state segment (figure 9-2).
mod field {
    pub const LINK: u64 = 0;
    pub const CR3: u64 = 28;
    pub const EIP: u64 = 32;
    pub const EFLAGS: u64 = 36;
    pub const EAX: u64 = 40;
    pub const ES: u64 = 72;
    pub const LDT: u64 = 96;
    pub const TRAP: u64 = 100;
    pub const LAST: u32 = 0x67;
}

const AVAILABLE: u16 = 9;
const BUSY: u16 = 11;

impl Cpu {
    /// IRET with NT set: back to the task that the current one is linked to.
    pub fn task_return(&mut self, back: u64) -> Run {
        let link = self.load_system::<u16>(self.tr.base.wrapping_add(field::LINK))?;
        self.task_switch(link, Switch::Return, back, None)
    }

    /// Through a task gate, whose own checks are done.
    pub fn task_gate(&mut self, gate: Descriptor, switch: Switch, back: u64, error: Option<u32>) -> Run {
        self.task_switch(gate.gate().0, switch, back, error)
    }

    /// Switches to the task of a TSS selector; `back` is where the current task goes on later.
    pub fn task_switch(&mut self, selector: u16, switch: Switch, back: u64, error: Option<u32>) -> Run {
        let d = self.new_task(selector, switch)?;
        let (old, new) = (self.tr.base, d.base());
        if self.tr.rights & 8 == 0 || self.tr.limit < field::LAST {
            return self.unsupported("a task switch from a 16-bit task");
        }
        // All that may fault for want of a page does so before anything changes.
        for base in [old, new] {
            for offset in [0, u64::from(field::LAST)] {
                let byte = self.load_system::<u8>(base.wrapping_add(offset))?;
                self.store_system::<u8>(base.wrapping_add(offset), byte)?;
            }
        }
        self.save_task(old, switch, back)?;
        if switch == Switch::Nested {
            self.store_system::<u16>(new.wrapping_add(field::LINK), self.tr.selector)?;
        } else {
            let old_descriptor = self.descriptor(self.tr.selector, vector::TS)?;
            self.set_busy(old_descriptor, false)?;
        }
        if switch != Switch::Return {
            self.set_busy(d, true)?;
        }
        self.tr = d.segment(selector);
        self.tr.rights |= 2;
        self.cr0 |= cr0::TS;
        self.load_task_state(new, switch)?;
        if let Some(error) = error {
            self.push(u64::from(error), 4)?;
        }
        if self.rip > u64::from(self.seg[sreg::CS].limit) {
            return self.gp(0);
        }
        if self.load_system::<u16>(new.wrapping_add(field::TRAP))? & 1 != 0 {
            self.debug[4] |= 1 << 15;
            return self.raise(Fault::new(vector::DB));
        }
        self.switched = false;
        Ok(())
    }

    fn new_task(&mut self, selector: u16, switch: Switch) -> Run<Descriptor> {
        let returning = switch == Switch::Return;
        let fault = if returning { vector::TS } else { vector::GP };
        let error = selector_error(selector);
        if selector & 4 != 0 || selector & 0xfffc == 0 {
            return self.raise(Fault::with(fault, error));
        }
        let d = self.descriptor(selector, fault)?;
        let wanted = if returning { BUSY } else { AVAILABLE };
        if d.is_segment() || d.kind() != wanted {
            if !d.is_segment() && d.kind() == wanted - 8 {
                return self.unsupported("a task switch to a 16-bit task");
            }
            return self.raise(Fault::with(fault, error));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, error));
        }
        if d.limit() < field::LAST {
            return self.raise(Fault::with(vector::TS, error));
        }
        Ok(d)
    }

    fn set_busy(&mut self, d: Descriptor, busy: bool) -> Run {
        let rights = (d.raw >> 40) as u8;
        let new = if busy { rights | 2 } else { rights & !2 };
        self.store_system::<u8>(d.address.wrapping_add(5), new)
    }

    fn save_task(&mut self, base: u64, switch: Switch, back: u64) -> Run {
        let mut flags = self.flags();
        if switch == Switch::Return {
            flags &= !rflags::NT;
        }
        let put =
            |cpu: &mut Self, offset: u64, value: u64| cpu.store_system::<u32>(base.wrapping_add(offset), value as u32);
        put(self, field::EIP, back)?;
        put(self, field::EFLAGS, flags)?;
        for i in 0..8 {
            put(self, field::EAX + i * 4, self.regs.gpr[i as usize])?;
        }
        for i in 0..6 {
            let selector = self.seg[i as usize].selector;
            self.store_system::<u16>(base.wrapping_add(field::ES + i * 4), selector)?;
        }
        Ok(())
    }

    fn load_task_state(&mut self, base: u64, switch: Switch) -> Run {
        let get = |cpu: &mut Self, offset: u64| cpu.load_system::<u32>(base.wrapping_add(offset)).map(u64::from);
        let cr3 = get(self, field::CR3)?;
        let eip = get(self, field::EIP)?;
        let flags = get(self, field::EFLAGS)?;
        let mut registers = [0; 8];
        for (i, register) in registers.iter_mut().enumerate() {
            *register = get(self, field::EAX + i as u64 * 4)?;
        }
        let mut selectors = [0u16; 6];
        for (i, selector) in selectors.iter_mut().enumerate() {
            *selector = get(self, field::ES + i as u64 * 4)? as u16;
        }
        let ldt = get(self, field::LDT)? as u16;
        if self.cr0 & cr0::PG != 0 {
            self.write_cr3(cr3)?;
        }
        // From here on faults are the new task's.
        self.switched = true;
        self.regs.gpr[..8].copy_from_slice(&registers);
        self.rip = eip;
        self.set_flags(flags | if switch == Switch::Nested { rflags::NT } else { 0 });
        for (segment, selector) in self.seg.iter_mut().zip(selectors) {
            *segment = Segment { selector, unusable: true, ..Segment::default() };
        }
        self.load_task_ldt(ldt)?;
        if self.v86() {
            for segment in &mut self.seg {
                let base = u64::from(segment.selector) << 4;
                *segment = Segment { base, limit: 0xffff, rights: 0xf3, unusable: false, ..*segment };
            }
            self.cpl = 3;
            self.refresh();
            return Ok(());
        }
        self.cpl = rpl(selectors[sreg::CS]);
        self.load_task_code(selectors[sreg::CS])?;
        self.refresh();
        for (index, selector) in selectors.into_iter().enumerate().filter(|(i, _)| *i != sreg::CS) {
            if let Err(stop) = self.load_data_segment(index, selector) {
                // Bad selectors of a new task are #TS, whatever they would be elsewhere; #NP and #SS stay.
                if self.fault.vector == vector::GP {
                    self.fault.vector = vector::TS;
                }
                return Err(stop);
            }
        }
        debug_assert!(self.mode & mode::CODE != mode::CODE64);
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16) -> Run {
        let loaded = self.load_ldt(selector);
        if loaded.is_err() {
            self.fault.vector = vector::TS;
        }
        loaded
    }

    fn load_task_code(&mut self, selector: u16) -> Run {
        let error = selector_error(selector);
        if selector & 0xfffc == 0 {
            return self.raise(Fault::with(vector::TS, error));
        }
        let d = self.descriptor(selector, vector::TS)?;
        let level = if d.conforming() { d.dpl() <= self.cpl } else { d.dpl() == self.cpl };
        if !d.is_code() || !level {
            return self.raise(Fault::with(vector::TS, error));
        }
        if !d.present() {
            return self.raise(Fault::with(vector::NP, error));
        }
        let cpl = self.cpl;
        self.set_code_segment(d, selector, cpl)?;
        self.seg[sreg::CS].rights |= rights::ACCESSED;
        Ok(())
    }
}
