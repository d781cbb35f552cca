//! Accesses that cross pages which are apart on the host: read into one piece, or scattered from one.

use std::mem::offset_of;

use super::{
    State,
    emit::{Mem, RDI, RSI, RSP, T0, T1, cc},
    leave::Site,
    thunks::{Maker, look_up, state},
};
use crate::{cpu::Cpu, tlb::DataSet};

const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RBP: u8 = 5;

impl Maker {
    /// To `to`: where [`State::gathered`] is.
    fn gathered(&mut self, to: u8) {
        self.e.load(to, state(offset_of!(State, cpu)));
        self.e.lea(to, Mem::Base(to, (offset_of!(Cpu, translated) + offset_of!(State, gathered)) as i32));
    }

    /// At the start of [`super::thunks::Thunks::slow`]: comes back where the access at RAX crosses pages and the TLB has
    /// both; goes on where not.
    pub(super) fn apart(&mut self) {
        let saved = [RCX, RDX, RBX, RBP, RSI, RDI];
        let e = &mut self.e;
        let (other, writes) = (e.label(), e.label());
        saved.iter().for_each(|r| e.push(*r));
        // RCX: bytes but for one; RDX: those in the second page.
        e.mov(RCX, T1);
        e.shift(true, 5, RCX, Site::BYTES_AT);
        e.group1(false, 4, RCX, 31);
        e.mov32(RDX, T0);
        e.group1(false, 4, RDX, 0xfff);
        e.rr(false, &[0x01], RCX, RDX);
        e.group1(false, 5, RDX, 0xfff);
        e.jcc(cc::BE, other);
        // RBP: the second page.
        e.lea(RBP, Mem::Indexed(T0, RCX, 0, 0));
        e.group1(true, 4, RBP, -4096);
        // RCX: those in the first one.
        e.group1(false, 0, RCX, 1);
        e.rr(false, &[0x29], RDX, RCX);
        // BT R15, write
        e.raw(&[0x49, 0x0f, 0xba, 0xe7, Site::WRITE_AT]);
        e.jcc(cc::B, writes);
        look_up(e, T0, RSI, RBX, offset_of!(DataSet, read), other);
        look_up(e, RBP, RBP, RBX, offset_of!(DataSet, read), other);
        self.gathered(RDI);
        let e = &mut self.e;
        e.mov(T0, RDI);
        // REP MOVSB
        e.raw(&[0xf3, 0xa4]);
        e.mov(RSI, RBP);
        e.mov(RCX, RDX);
        e.raw(&[0xf3, 0xa4]);
        let back = e.mark();
        saved.iter().rev().for_each(|r| e.pop(*r));
        // RSP is not 0: "not equal".
        e.rr(true, &[0x85], RSP, RSP);
        e.ret();
        e.bind(writes);
        // BT R15, scatters
        e.raw(&[0x49, 0x0f, 0xba, 0xe7, Site::SCATTERS_AT]);
        e.jcc(cc::AE, other);
        look_up(e, T0, RSI, RBX, offset_of!(DataSet, write), other);
        look_up(e, RBP, RBP, RBX, offset_of!(DataSet, write), other);
        for (i, (host, bytes)) in [(RSI, RCX), (RBP, RDX)].into_iter().enumerate() {
            let part = offset_of!(State, scattered) + i * 16;
            e.store(host, state(part));
            e.store(bytes, state(part + 8));
        }
        // MOV byte [scatters], 1
        e.rm(false, &[0xc6], 0, state(offset_of!(State, scatters)));
        e.raw(&[1]);
        self.gathered(T0);
        self.e.jmp(back);
        self.e.bind(other);
        saved.iter().rev().for_each(|r| self.e.pop(*r));
    }

    /// See [`super::thunks::Thunks::scatter`].
    pub(super) fn scatter(&mut self) {
        let saved = [RCX, RSI, RDI];
        saved.iter().for_each(|r| self.e.push(*r));
        self.gathered(RSI);
        let e = &mut self.e;
        for part in 0..2 {
            let part = offset_of!(State, scattered) + part * 16;
            e.load(RDI, state(part));
            e.load(RCX, state(part + 8));
            // REP MOVSB
            e.raw(&[0xf3, 0xa4]);
        }
        // MOV byte [scatters], 0
        e.rm(false, &[0xc6], 0, state(offset_of!(State, scatters)));
        e.raw(&[0]);
        saved.iter().rev().for_each(|r| e.pop(*r));
        e.ret();
    }
}
