//! Instructions with code of their own, in the place of a copy.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, OpKind};

use super::{
    HOST, STACK, State,
    block::{Work, host_mask},
    emit::{Mem, T0, T1, cc},
    flags::Flags,
    outline::Outline,
    span::Reach,
    thunks::{FLAGS, RFLAGS, gpr, state},
    vectors,
};
use crate::{cpu::Cpu, decode::is_nop, uop::Uop};

const SCRATCH: Mem = state(offset_of!(State, scratch));
const TARGET: Mem = state(offset_of!(State, target));

impl Work<'_> {
    pub(super) fn special(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        match insn.code() {
            Code::Push_r64 => self.push(op, index),
            Code::Pop_r64 => self.pop(op, index),
            Code::Leaveq => self.leave_frame(index),
            Code::Lea_r32_m | Code::Lea_r64_m => self.lea(insn, op),
            Code::Pushq_imm8 | Code::Pushq_imm32 => self.push_constant(op.imm, index),
            Code::Push_rm64 if insn.op0_kind() == OpKind::Memory => self.push_memory(op, index),
            Code::Pushfq => self.push_flags(index),
            Code::Div_rm32 | Code::Div_rm64 | Code::Idiv_rm32 | Code::Idiv_rm64 => self.divide(insn, op, index),
            Code::Bt_rm32_r32 | Code::Bt_rm64_r64 if insn.op0_kind() == OpKind::Memory => {
                self.bit_string(insn, op, index, None)
            }
            Code::Bts_rm32_r32 | Code::Bts_rm64_r64 if insn.op0_kind() == OpKind::Memory => {
                self.bit_string(insn, op, index, Some(0xab))
            }
            Code::Btr_rm32_r32 | Code::Btr_rm64_r64 if insn.op0_kind() == OpKind::Memory => {
                self.bit_string(insn, op, index, Some(0xb3))
            }
            Code::Btc_rm32_r32 | Code::Btc_rm64_r64 if insn.op0_kind() == OpKind::Memory => {
                self.bit_string(insn, op, index, Some(0xbb))
            }
            Code::Rdtsc | Code::Rdtscp => {
                self.read_tsc(insn.code() == Code::Rdtscp, index);
                true
            }
            Code::Mfence => self.fence(0xf0),
            Code::Lfence => self.fence(0xe8),
            Code::Sfence => self.fence(0xf8),
            Code::Stmxcsr_m32 | Code::VEX_Vstmxcsr_m32 => self.store_mxcsr(insn, op, index),
            Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32 => self.load_mxcsr(insn, op, index),
            Code::VEX_Vzeroupper => {
                self.want_vectors(vectors::AVX, self.start as i32 + i32::from(op.off));
                self.e().raw(&[0xc5, 0xf8, 0x77]);
                true
            }
            _ => is_nop(insn.mnemonic()),
        }
    }

    fn lea(&mut self, insn: &Instruction, op: &Uop) -> bool {
        let Some(disp) = self.displacement(op) else { return false };
        let guest = op.dst / 8;
        let to = HOST[usize::from(guest)].unwrap_or(T1);
        self.keep_recipe(host_mask(1 << guest));
        self.offset(op, disp, to);
        if insn.op0_register().size() == 4 {
            self.e().mov32(to, to);
        }
        if to == T1 {
            self.store_guest(T1, guest);
        }
        true
    }

    fn push(&mut self, op: &Uop, index: usize) -> bool {
        if let Some(top) = self.stack_span(index, -8, true, 1 << STACK) {
            let guest = op.src / 8;
            let value = HOST[usize::from(guest)].unwrap_or_else(|| {
                self.load_guest(T0, guest);
                T0
            });
            self.guard(top, 8);
            self.e().store(value, top);
            self.e().lea(STACK, Mem::Base(STACK, -8));
            return true;
        }
        self.keep_flags(1 << STACK);
        self.e().lea(T0, Mem::Base(STACK, -8));
        let done = self.e().label();
        self.access(index, 8, true, 1, done);
        let guest = op.src / 8;
        let value = HOST[usize::from(guest)].unwrap_or_else(|| {
            self.e().load(T1, gpr(guest));
            T1
        });
        self.guard(Mem::Base(T0, 0), 8);
        self.e().store(value, Mem::Base(T0, 0));
        self.e().lea(STACK, Mem::Base(STACK, -8));
        self.e().bind(done);
        true
    }

    fn pop(&mut self, op: &Uop, index: usize) -> bool {
        let written = 1 << STACK | host_mask(1 << (op.dst / 8));
        if let Some(top) = self.stack_span(index, 0, false, written) {
            let guest = op.dst / 8;
            let to = HOST[usize::from(guest)].unwrap_or(T0);
            self.guard(top, 8);
            self.e().load(to, top);
            if to == T0 {
                self.store_guest(T0, guest);
            }
            if to != STACK {
                self.e().lea(STACK, Mem::Base(STACK, 8));
            }
            return true;
        }
        self.keep_flags(1 << STACK | host_mask(1 << (op.dst / 8)));
        self.e().mov(T0, STACK);
        let done = self.e().label();
        self.access(index, 8, false, 1, done);
        let guest = op.dst / 8;
        self.e().lea(STACK, Mem::Base(STACK, 8));
        match HOST[usize::from(guest)] {
            Some(host) => {
                self.guard(Mem::Base(T0, 0), 8);
                self.e().load(host, Mem::Base(T0, 0));
            }
            None => {
                self.guard(Mem::Base(T0, 0), 8);
                self.e().load(T1, Mem::Base(T0, 0));
                self.e().store(T1, gpr(guest));
            }
        }
        self.e().bind(done);
        true
    }

    fn leave_frame(&mut self, index: usize) -> bool {
        const FRAME: u8 = 5;
        let written = 1 << STACK | 1 << FRAME;
        if let Some(reach @ (Reach::Lead | Reach::Follow)) = self.reach(index) {
            match reach {
                Reach::Follow => self.keep_recipe(written),
                _ => self.keep_flags(written),
            }
            self.reach_span(index, 0, 8, false);
            self.e().lea(STACK, Mem::Base(FRAME, 8));
            self.guard(Mem::Indexed(T1, FRAME, 0, 0), 8);
            self.e().load(FRAME, Mem::Indexed(T1, FRAME, 0, 0));
            return true;
        }
        self.keep_flags(1 << STACK | 1 << FRAME);
        self.e().mov(T0, FRAME);
        let done = self.e().label();
        self.access(index, 8, false, 1, done);
        self.e().lea(STACK, Mem::Base(FRAME, 8));
        self.guard(Mem::Base(T0, 0), 8);
        self.e().load(FRAME, Mem::Base(T0, 0));
        self.e().bind(done);
        true
    }

    /// Stores T1 on the stack, which is known to be writable at T0.
    fn pushed(&mut self) {
        self.guard(Mem::Base(T0, 0), 8);
        self.e().store(T1, Mem::Base(T0, 0));
        self.e().lea(STACK, Mem::Base(STACK, -8));
    }

    fn push_constant(&mut self, value: u64, index: usize) -> bool {
        if let Some(top) = self.stack_span(index, -8, true, 1 << STACK) {
            self.e().constant(T0, value);
            self.guard(top, 8);
            self.e().store(T0, top);
            self.e().lea(STACK, Mem::Base(STACK, -8));
            return true;
        }
        self.keep_flags(1 << STACK);
        self.e().lea(T0, Mem::Base(STACK, -8));
        let done = self.e().label();
        self.access(index, 8, true, 1, done);
        self.e().constant(T1, value);
        self.pushed();
        self.e().bind(done);
        true
    }

    fn push_memory(&mut self, op: &Uop, index: usize) -> bool {
        let Some(disp) = self.displacement(op) else { return false };
        self.keep_flags(1 << STACK);
        self.address(op, disp);
        let done = self.e().label();
        self.access(index, 8, false, 1, done);
        self.guard(Mem::Base(T0, 0), 8);
        self.e().load(T0, Mem::Base(T0, 0));
        self.e().store(T0, TARGET);
        self.e().lea(T0, Mem::Base(STACK, -8));
        self.access(index, 8, true, 1, done);
        self.e().load(T1, TARGET);
        self.pushed();
        self.e().bind(done);
        true
    }

    /// PUSHFQ; in 64-bit mode it is never refused.
    fn push_flags(&mut self, index: usize) -> bool {
        self.pack();
        self.e().lea(T0, Mem::Base(STACK, -8));
        let done = self.e().label();
        self.access(index, 8, true, 1, done);
        // As `regs::unpack`: bits 15 to 8 are flags 7 to 0, bit 0 is OF.
        self.e().rm(false, &[0x0f, 0xb7], T1, FLAGS);
        self.e().shift(false, 5, T1, 8);
        self.e().group1(false, 4, T1, 0xd5);
        self.e().rm(true, &[0x0b], T1, RFLAGS);
        self.e().group1(false, 4, T1, !(crate::cpu::rflags::RF | crate::cpu::rflags::VM) as i32);
        self.e().test_byte(FLAGS, 1);
        let no_overflow = self.e().label();
        self.e().jcc(cc::E, no_overflow);
        self.e().group1(false, 1, T1, 0x800);
        self.e().bind(no_overflow);
        self.pushed();
        self.e().bind(done);
        true
    }

    /// DIV and IDIV where they are known not to raise #DE; the interpreter does the rest.
    fn divide(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        const HIGH: u8 = 2;
        self.drop_held();
        let wide = matches!(insn.code(), Code::Div_rm64 | Code::Idiv_rm64);
        let signed = matches!(insn.code(), Code::Idiv_rm32 | Code::Idiv_rm64);
        let memory = insn.op0_kind() == OpKind::Memory;
        let disp = self.displacement(op);
        if memory && disp.is_none() {
            return false;
        }
        self.pack();
        let done = self.e().label();
        // The divisor in T1, unless it is RDX: there it always overflows or is zero, or is signed and rare.
        if let (true, Some(disp)) = (memory, disp) {
            self.address(op, disp);
            self.access(index, if wide { 8 } else { 4 }, false, 1, done);
            self.guard(Mem::Base(T0, 0), if wide { 8 } else { 4 });
            self.e().rm(wide, &[0x8b], T1, Mem::Base(T0, 0));
        } else {
            let guest = op.dst / 8;
            match HOST[usize::from(guest)] {
                Some(host) => self.e().rr(wide, &[0x89], host, T1),
                None => self.e().rm(wide, &[0x8b], T1, gpr(guest)),
            }
        }
        let site = self.site(index, 1, false);
        let odd = self.e().label();
        let accumulator = HOST[0].unwrap_or(T0);
        self.e().rr(wide, &[0x89], accumulator, T0);
        if signed {
            // RDX:RAX is RAX's own extension, and the divisor neither 0 nor -1.
            self.e().shift(wide, 7, T0, if wide { 63 } else { 31 });
            self.e().rr(wide, &[0x39], T0, HIGH);
            self.e().jcc(cc::NE, odd);
            self.e().lea(T0, Mem::Base(T1, 1));
            if !wide {
                self.e().mov32(T0, T0);
            }
            self.e().group1(wide, 7, T0, 1);
            self.e().jcc(cc::BE, odd);
            self.e().rr(wide, &[0x89], accumulator, T0);
        } else {
            // The quotient fits where the divisor is greater than the high half.
            self.e().rr(wide, &[0x39], T1, HIGH);
            self.e().jcc(cc::AE, odd);
        }
        self.e().rr(wide, &[0xf7], if signed { 7 } else { 6 }, T1);
        self.e().mov(accumulator, T0);
        self.t.outlines.push(Outline::Interpret { from: odd, done, site });
        self.flags_set(Flags::IN_MEMORY, None);
        self.e().bind(done);
        true
    }

    /// BT, BTS, BTR and BTC with a register's bit offset into memory.
    fn bit_string(&mut self, insn: &Instruction, op: &Uop, index: usize, change: Option<u8>) -> bool {
        let wide = insn.op1_register().size() == 8;
        let (guest, bytes) = (op.src / 8, if wide { 8 } else { 4 });
        let Some(disp) = self.displacement(op) else { return false };
        self.pack();
        self.address(op, disp);
        // The offset reaches beyond the operand in steps of its size.
        let bits = HOST[usize::from(guest)];
        match (bits, wide) {
            (Some(host), true) => self.e().mov(T1, host),
            (Some(host), false) => self.e().rr(true, &[0x63], T1, host),
            (None, true) => self.e().load(T1, gpr(guest)),
            (None, false) => self.e().rm(true, &[0x63], T1, gpr(guest)),
        }
        self.e().shift(true, 7, T1, if wide { 6 } else { 5 });
        self.e().lea(T0, Mem::Indexed(T0, T1, if wide { 3 } else { 2 }, 0));
        let done = self.e().label();
        self.access(index, bytes, change.is_some(), 1, done);
        match bits {
            Some(host) => self.e().mov32(T1, host),
            None => self.e().load32(T1, gpr(guest)),
        }
        self.e().group1(false, 4, T1, if wide { 63 } else { 31 });
        self.guard(Mem::Base(T0, 0), bytes);
        if insn.has_lock_prefix() {
            self.e().raw(&[0xf0]);
        }
        self.e().rm(wide, &[0x0f, change.unwrap_or(0xa3)], T1, Mem::Base(T0, 0));
        // Only CF changes: bit 8 of the packed word.
        self.e().raw(&[0x0f, 0x92, 0xc0]);
        self.e().group1_mem(false, 4, FLAGS, !0x100);
        self.e().raw(&[0x0f, 0xb6, 0xc0]);
        self.e().shift(false, 4, T0, 8);
        self.e().prefixed(&[0x66], false, &[0x09], T0, FLAGS);
        self.flags_set(Flags::IN_MEMORY, None);
        self.e().bind(done);
        true
    }

    fn fence(&mut self, which: u8) -> bool {
        self.e().raw(&[0x0f, 0xae, which]);
        true
    }

    /// RDTSC and RDTSCP, where the guest's runs with the host's.
    fn read_tsc(&mut self, with_aux: bool, index: usize) {
        const LOW: u8 = super::ACCUMULATOR;
        const HIGH: u8 = 2;
        self.drop_held();
        self.pack();
        let (odd, done) = (self.e().label(), self.e().label());
        self.e().test_byte(state(offset_of!(State, tsc_direct)), 1);
        self.e().jcc(cc::E, odd);
        if with_aux {
            // Earlier instructions are done first.
            self.fence(0xe8);
        }
        self.e().raw(&[0x0f, 0x31]);
        self.e().shift(true, 4, HIGH, 32);
        self.e().rr(true, &[0x09], HIGH, T0);
        self.e().rm(true, &[0x03], T0, state(offset_of!(State, tsc_offset)));
        self.e().mov(HIGH, T0);
        self.e().shift(true, 5, HIGH, 32);
        self.e().mov32(LOW, T0);
        if with_aux {
            const COUNTER: u8 = 1;
            let aux = offset_of!(Cpu, msr) + offset_of!(crate::cpu::Msrs, tsc_aux);
            self.e().load32(COUNTER, Mem::State(aux));
        }
        let site = self.site(index, 1, false);
        self.t.outlines.push(Outline::Interpret { from: odd, done, site });
        self.flags_set(Flags::IN_MEMORY, None);
        self.e().bind(done);
    }

    /// Brings MXCSR in; the displacement of its operand, if its address can be made here.
    fn want_mxcsr(&mut self, insn: &Instruction, op: &Uop) -> Option<i32> {
        let vex = matches!(insn.code(), Code::VEX_Vstmxcsr_m32 | Code::VEX_Vldmxcsr_m32);
        let disp = self.displacement(op)?;
        self.want_vectors(if vex { vectors::AVX } else { vectors::SSE }, self.start as i32 + i32::from(op.off));
        self.keep_flags(0);
        Some(disp)
    }

    /// While vectors are in the host's registers, so is MXCSR.
    fn store_mxcsr(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        let Some(disp) = self.want_mxcsr(insn, op) else { return false };
        self.address(op, disp);
        let done = self.e().label();
        self.access(index, 4, true, 1, done);
        self.guard(Mem::Base(T0, 0), 4);
        self.e().rm(false, &[0x0f, 0xae], 3, Mem::Base(T0, 0));
        self.e().bind(done);
        true
    }

    /// A value that unmasks exceptions, or that is refused, is the interpreter's.
    fn load_mxcsr(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        let Some(disp) = self.want_mxcsr(insn, op) else { return false };
        self.pack();
        self.address(op, disp);
        // What the interpreter did instead may have changed how vectors are to be treated: nothing goes on behind it.
        let (done, odd) = (self.e().label(), self.e().label());
        let site = self.site(index, 1, false);
        self.access(index, 4, false, 1, odd);
        self.guard(Mem::Base(T0, 0), 4);
        self.e().load32(T1, Mem::Base(T0, 0));
        self.e().rr(false, &[0x89], T1, T0);
        self.e().group1(false, 4, T0, 0xffff_1f80_u32 as i32);
        self.e().group1(false, 7, T0, 0x1f80);
        self.e().jcc(cc::NE, odd);
        // From a place that no other vCPU can change meanwhile.
        self.e().rm(false, &[0x89], T1, SCRATCH);
        self.e().rm(false, &[0x0f, 0xae], 2, SCRATCH);
        self.e().bind(done);
        self.t.outlines.push(Outline::Last { from: odd, site, make: None });
        true
    }
}
