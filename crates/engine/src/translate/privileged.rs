//! What kernels do many times in every system call: interrupt flag, GS and FS bases, access to user pages.
//!
//! Each looks whether it is what kernels mean by it; the interpreter has all the rest, and the faults.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, OpKind};

use super::{
    HOST, State,
    block::{Work, host_mask},
    emit::{Label, Mem, T0, T1, cc},
    outline::Outline,
    thunks::{CPL, DATA, RFLAGS, gpr, state},
};
use crate::{
    cpu::{Cpu, Msrs, Segment, cr4, rflags, sreg},
    uop::Uop,
};

const CR4: Mem = Mem::State(offset_of!(Cpu, cr4));
const KERNEL_GS: Mem = Mem::State(offset_of!(Cpu, msr) + offset_of!(Msrs, kernel_gs_base));

/// Where a segment's base is, for the guest and for addresses of 64-bit code.
fn bases(segment: usize) -> (Mem, Mem) {
    let own = offset_of!(Cpu, seg) + segment * size_of::<Segment>() + offset_of!(Segment, base);
    (Mem::State(own), Mem::State(offset_of!(Cpu, seg_base) + segment * 8))
}

impl Work<'_> {
    pub(super) fn privileged(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        match insn.code() {
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
                if insn.op0_kind() == OpKind::Register =>
            {
                self.selector(op, insn.code() == Code::Mov_rm16_Sreg);
            }
            Code::Cli => self.by_kernel(index, |work, _| work.e().group1_mem(false, 4, RFLAGS, !(rflags::IF as i32))),
            // No interrupt is taken before the next instruction is done: it is in the same translation, and does not leave
            // it before. A span would where it crosses pages.
            Code::Sti if self.followed => {
                self.no_span_for(index + 1);
                self.by_kernel(index, Self::enable_interrupts);
            }
            Code::Swapgs => self.by_kernel(index, |work, _| {
                let (own, linear) = bases(sreg::GS);
                let e = work.e();
                e.load(T0, KERNEL_GS);
                e.load(T1, own);
                e.store(T1, KERNEL_GS);
                e.store(T0, own);
                e.store(T0, linear);
            }),
            Code::Stac => self.by_kernel(index, |work, odd| work.reach_user_pages(true, odd)),
            Code::Clac => self.by_kernel(index, |work, odd| work.reach_user_pages(false, odd)),
            Code::Rdfsbase_r64 | Code::Rdgsbase_r64 => self.odd_without(cr4::FSGSBASE, index, |work, _| {
                let guest = op.dst / 8;
                let to = HOST[usize::from(guest)].unwrap_or(T0);
                work.e().load(to, bases(op.src.into()).0);
                if to == T0 {
                    work.store_guest(T0, guest);
                }
            }),
            Code::Wrfsbase_r64 | Code::Wrgsbase_r64 => self.odd_without(cr4::FSGSBASE, index, |work, odd| {
                let guest = op.dst / 8;
                match HOST[usize::from(guest)] {
                    Some(host) => work.e().mov(T0, host),
                    None => work.e().load(T0, gpr(guest)),
                }
                let (own, linear) = bases(op.src.into());
                let e = work.e();
                e.compare_canonical();
                e.jcc(cc::NE, odd);
                e.store(T0, own);
                e.store(T0, linear);
            }),
            _ => return false,
        }
        true
    }

    /// Code that may use T0, T1 and the host's flags, and leaves what is odd to the interpreter.
    fn or_interpret(&mut self, index: usize, make: impl FnOnce(&mut Self, Label)) {
        self.drop_held();
        self.pack();
        let (odd, done) = (self.e().label(), self.e().label());
        make(self, odd);
        self.drop_held();
        let site = self.site(index, 1, false);
        self.t.outlines.push(Outline::Interpret { from: odd, done, site });
        self.flags.host = false;
        self.recipe = None;
        self.e().bind(done);
    }

    /// The same where it is for privilege 0.
    fn by_kernel(&mut self, index: usize, make: impl FnOnce(&mut Self, Label)) {
        self.or_interpret(index, |work, odd| {
            work.e().cmp_byte(CPL, 0);
            work.e().jcc(cc::NE, odd);
            make(work, odd);
        });
    }

    /// The same where it is for a bit of CR4.
    fn odd_without(&mut self, bit: u64, index: usize, make: impl FnOnce(&mut Self, Label)) {
        self.or_interpret(index, |work, odd| {
            work.test_cr4(bit);
            work.e().jcc(cc::E, odd);
            make(work, odd);
        });
    }

    fn test_cr4(&mut self, bit: u64) {
        self.e().rm(false, &[0xf7], 0, CR4);
        self.e().raw(&(bit as u32).to_le_bytes());
    }

    fn enable_interrupts(&mut self, odd: Label) {
        self.unless_something_waits(odd);
        self.e().group1_mem(false, 1, RFLAGS, rflags::IF as i32);
    }

    /// Goes to `odd` where something waits for interrupts to be on, in the request word or in the APIC. Uses T0.
    pub(super) fn unless_something_waits(&mut self, odd: Label) {
        let e = self.e();
        for word in [offset_of!(State, requests), offset_of!(State, interrupts)] {
            e.load(T0, state(word));
            e.group1_mem(false, 7, Mem::Base(T0, 0), 0);
            e.jcc(cc::NE, odd);
        }
    }

    /// STAC and CLAC, as `Cpu::select_sets` does it.
    fn reach_user_pages(&mut self, set: bool, odd: Label) {
        self.no_spans();
        self.test_cr4(cr4::SMAP);
        let e = self.e();
        e.jcc(cc::E, odd);
        e.cmp_byte(Mem::State(offset_of!(Cpu, inspect)), 0);
        e.jcc(cc::NE, odd);
        let window_set = state(offset_of!(State, window_set));
        if set {
            e.group1_mem(false, 1, RFLAGS, rflags::AC as i32);
            e.load(T0, state(offset_of!(State, user_pages)));
            e.rm(true, &[0xc7], 0, window_set);
            e.raw(&0i32.to_le_bytes());
        } else {
            e.group1_mem(false, 4, RFLAGS, !(rflags::AC as i32));
            e.load(T0, Mem::State(offset_of!(Cpu, system_data)));
            e.store(T0, window_set);
        }
        e.store(T0, DATA);
    }

    /// MOV r, Sreg.
    fn selector(&mut self, op: &Uop, short: bool) {
        let at = offset_of!(Cpu, seg) + usize::from(op.src) * size_of::<Segment>() + offset_of!(Segment, selector);
        let guest = op.dst / 8;
        self.keep_recipe(host_mask(1 << guest));
        let to = HOST[usize::from(guest)].filter(|_| !short).unwrap_or(T0);
        self.e().rm(false, &[0x0f, 0xb7], to, Mem::State(at));
        if short {
            match HOST[usize::from(guest)] {
                // MOV r16, AX
                Some(host) => {
                    self.e().raw(&[0x66]);
                    self.e().rr(false, &[0x89], T0, host);
                }
                None => {
                    self.e().prefixed(&[0x66], false, &[0x89], T0, gpr(guest));
                    if self.holds(guest) {
                        self.drop_held();
                    }
                }
            }
        } else if to == T0 {
            self.store_guest(T0, guest);
        }
    }
}
