//! SYSCALL and SYSRET as 64-bit kernels have them: [`Calls::usual`].

use std::mem::offset_of;

use iced_x86::Code;

use super::{
    Calls, State,
    block::Work,
    emit::{Mem, T0, T1, cc},
    outline::Outline,
    thunks::{CPL, DATA, FLAGS, PAGE, RFLAGS, state},
};
use crate::{
    cpu::{Cpu, Msrs, Segment, mode, rflags, sreg},
    tlb::CodeSet,
};

const MODE: Mem = Mem::State(offset_of!(Cpu, mode));
const LSTAR: Mem = Mem::State(offset_of!(Cpu, msr) + offset_of!(Msrs, lstar));
const RCX: u8 = 1;
const R11: u8 = 11;
const STATUS: i32 = 0xd5;
/// What SYSRET loads of RFLAGS besides the status flags, but for what only the interpreter does.
const LOADED: u64 = 0x003f_7702 & !(rflags::RF | rflags::VM | UNUSUAL);
const UNUSUAL: u64 = rflags::TF | rflags::AC;

const fn calls(offset: usize) -> Mem {
    state(offset_of!(State, calls) + offset)
}

impl Work<'_> {
    /// `next`: what follows, from the start of the page. Returns whether there is code for it now.
    pub(super) fn call_system(&mut self, code: Code, index: usize, next: i64) -> bool {
        let Ok(next) = i32::try_from(next) else { return false };
        let (usual, kernel, user) = (offset_of!(Calls, usual), offset_of!(Calls, kernel), offset_of!(Calls, user));
        if !matches!(code, Code::Syscall | Code::Sysretq) {
            return false;
        }
        self.drop_held();
        self.pack();
        let odd = self.e().label();
        self.e().cmp_byte(calls(usual), 0);
        self.e().jcc(cc::E, odd);
        self.e().cmp_byte(Mem::State(offset_of!(Cpu, inspect)), 0);
        self.e().jcc(cc::NE, odd);
        let site = self.site(index, 1, false);
        self.t.outlines.push(Outline::Last { from: odd, site, make: None });
        let e = self.e();
        if code == Code::Syscall {
            // As `Work::push_flags`.
            e.rm(false, &[0x0f, 0xb7], T0, FLAGS);
            e.mov32(R11, T0);
            e.shift(false, 5, R11, 8);
            e.group1(false, 4, R11, STATUS);
            e.group1(false, 4, T0, 1);
            e.shift(false, 4, T0, 11);
            e.rr(false, &[0x09], T0, R11);
            e.load(T0, RFLAGS);
            e.group1(false, 4, T0, !(rflags::RF as i32));
            e.rr(false, &[0x09], T0, R11);
            e.load(RCX, PAGE);
            e.lea(RCX, Mem::Base(RCX, next));
            e.rm(true, &[0x23], T0, calls(offset_of!(Calls, keeps)));
            e.group1(false, 1, T0, 2);
            e.store(T0, RFLAGS);
            e.load32(T0, calls(offset_of!(Calls, keeps_packed)));
            e.prefixed(&[0x66], false, &[0x21], T0, FLAGS);
            self.load_segments(kernel);
            self.enter_privilege(0, offset_of!(State, kernel_code));
            self.e().load(T0, LSTAR);
        } else {
            e.cmp_byte(CPL, 0);
            e.jcc(cc::NE, odd);
            e.rr(false, &[0xf7], 0, R11);
            e.raw(&(UNUSUAL as u32).to_le_bytes());
            e.jcc(cc::NE, odd);
            e.mov(T0, RCX);
            e.compare_canonical();
            e.jcc(cc::NE, odd);
            // IF may become 1.
            self.unless_something_waits(odd);
            let e = self.e();
            // As `regs::pack`.
            e.mov32(T0, R11);
            e.group1(false, 4, T0, STATUS);
            e.group1(false, 1, T0, 2);
            e.shift(false, 4, T0, 8);
            e.mov32(T1, R11);
            e.shift(false, 5, T1, 11);
            e.group1(false, 4, T1, 1);
            e.rr(false, &[0x09], T1, T0);
            e.prefixed(&[0x66], false, &[0x89], T0, FLAGS);
            e.mov32(T0, R11);
            e.group1(false, 4, T0, LOADED as i32);
            e.group1(false, 1, T0, 2);
            e.store(T0, RFLAGS);
            self.load_segments(user);
            self.enter_privilege(3, offset_of!(State, user_code));
            self.e().mov(T0, RCX);
        }
        self.jump_to(true, None);
        true
    }

    /// CS and SS from two that are prepared.
    fn load_segments(&mut self, from: usize) {
        for (i, to) in [sreg::CS, sreg::SS].into_iter().enumerate() {
            let to = offset_of!(Cpu, seg) + to * size_of::<Segment>();
            for word in (0..size_of::<Segment>()).step_by(8) {
                self.e().load(T0, calls(from + i * size_of::<Segment>() + word));
                self.e().store(T0, Mem::State(to + word));
            }
        }
    }

    /// As `Cpu::select_sets`, where nothing is inspected and the kernel does not reach user pages.
    fn enter_privilege(&mut self, cpl: u8, code: usize) {
        let e = self.e();
        // MOV byte [cpl], imm8; OR or AND byte [mode], imm8
        e.rm(false, &[0xc6], 0, CPL);
        e.raw(&[cpl]);
        let (which, bits) = if cpl == 3 { (1, mode::USER) } else { (4, !mode::USER) };
        e.rm(false, &[0x80], which, MODE);
        e.raw(&[bits]);
        let data =
            if cpl == 3 { state(offset_of!(State, user_data)) } else { Mem::State(offset_of!(Cpu, system_data)) };
        e.load(T0, data);
        e.store(T0, DATA);
        e.store(T0, state(offset_of!(State, window_set)));
        e.load(T0, state(code));
        e.store(T0, Mem::State(offset_of!(Cpu, code)));
        e.load(T0, Mem::Base(T0, offset_of!(CodeSet, generation) as i32));
        e.store(T0, state(offset_of!(State, generation)));
    }
}

const _: () = assert!(size_of::<Segment>().is_multiple_of(8));
