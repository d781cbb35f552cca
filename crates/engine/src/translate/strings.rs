//! REP MOVS and REP STOS of less than a page, as kernels have many: by the host's own.

use std::mem::offset_of;

use iced_x86::{Code, Instruction};

use super::{
    State,
    block::Work,
    emit::{Emitter, Mem, RDI, RSI, RSP, T0, T1, cc},
    outline::Outline,
    thunks::{Maker, RFLAGS, look_up, state},
};
use crate::{
    cpu::rflags,
    tlb::DataSet,
    uop::{FLAT, Uop, address},
};

/// Sizes of elements, as powers of two.
pub const SIZES: usize = 4;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RBP: u8 = 5;
const PAGE: i32 = 0x1000;

impl Work<'_> {
    pub(super) fn repeated(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        let (size, moves) = match insn.code() {
            Code::Stosb_m8_AL => (0, false),
            Code::Stosw_m16_AX => (1, false),
            Code::Stosd_m32_EAX => (2, false),
            Code::Stosq_m64_RAX => (3, false),
            Code::Movsb_m8_m8 => (0, true),
            Code::Movsw_m16_m16 => (1, true),
            Code::Movsd_m32_m32 => (2, true),
            Code::Movsq_m64_m64 => (3, true),
            _ => return false,
        };
        let flat = op.seg == FLAT || op.seg < 4;
        if !insn.has_rep_prefix() || op.asz != address::LONG || !flat {
            return false;
        }
        self.no_spans();
        self.pack();
        let (odd, done) = (self.e().label(), self.e().label());
        let thunk = if moves { self.thunks.movs[size] } else { self.thunks.stos[size] };
        self.e().call_address(thunk);
        self.e().jcc(cc::E, odd);
        let site = self.site(index, 1, false);
        self.t.outlines.push(Outline::Interpret { from: odd, done, site });
        self.flags.host = false;
        self.recipe = None;
        self.e().bind(done);
        true
    }
}

impl Maker {
    /// REP MOVS or REP STOS with guest registers where they are, if what it reads and writes are parts of pages that the
    /// TLB knows; else comes back with ZF set, and nothing was done. Uses T0, T1 and the host's flags.
    pub(super) fn repeat(&mut self, size: usize, moves: bool) {
        let (scale, opcode) = (size as u8, if moves { 0xa4 } else { 0xaa });
        let saved = [RBX, RDX, RBP];
        let e = &mut self.e;
        let odd = e.label();
        saved.iter().for_each(|r| e.push(*r));
        e.rm(false, &[0xf7], 0, RFLAGS);
        e.raw(&(rflags::DF as u32).to_le_bytes());
        e.jcc(cc::NE, odd);
        e.group1(true, 7, RCX, PAGE >> size);
        e.jcc(cc::A, odd);
        let reach = |e: &mut Emitter, linear: u8, to: u8, table: usize| {
            // Up to the end of the page.
            e.mov32(T0, linear);
            e.group1(false, 4, T0, PAGE - 1);
            e.lea(T0, Mem::Indexed(T0, RCX, scale, 0));
            e.group1(true, 7, T0, PAGE);
            e.jcc(cc::A, odd);
            look_up(e, linear, to, T1, table, odd);
        };
        reach(e, RDI, RBX, offset_of!(DataSet, write));
        if moves {
            reach(e, RSI, RDX, offset_of!(DataSet, read));
        }
        // Where accesses are checked: the first byte and the last.
        let unchecked = e.label();
        e.cmp_byte(state(offset_of!(State, guards)), 0);
        e.jcc(cc::E, unchecked);
        e.rr(true, &[0x85], RCX, RCX);
        e.jcc(cc::E, unchecked);
        for start in [RBX, RDX].into_iter().take(1 + usize::from(moves)) {
            e.mov(T0, start);
            e.call_address(self.guard_thunk);
            e.lea(T0, Mem::Indexed(start, RCX, scale, -1));
            e.call_address(self.guard_thunk);
        }
        e.bind(unchecked);
        e.mov(RBP, RDI);
        e.mov(RDI, RBX);
        if moves {
            e.mov(T1, RSI);
            e.mov(RSI, RDX);
        } else {
            e.mov(T0, super::ACCUMULATOR);
        }
        if size == 1 {
            e.raw(&[0x66]);
        }
        e.raw(&[0xf3]);
        if size == 3 {
            e.raw(&[0x48]);
        }
        e.raw(&[if size == 0 { opcode } else { opcode + 1 }]);
        e.rr(true, &[0x29], RBX, RDI);
        e.rr(true, &[0x01], RBP, RDI);
        if moves {
            e.rr(true, &[0x29], RDX, RSI);
            e.rr(true, &[0x01], T1, RSI);
        }
        saved.iter().rev().for_each(|r| e.pop(*r));
        // RSP is not 0: "not equal".
        e.rr(true, &[0x85], RSP, RSP);
        e.ret();
        e.bind(odd);
        saved.iter().rev().for_each(|r| e.pop(*r));
        e.rr(true, &[0x39], T0, T0);
        e.ret();
    }
}
