//! The way in and out of translated code.

use std::mem::offset_of;

use iced_x86::CpuidFeature;

use super::{
    HOST, Left, State,
    emit::{Emitter, Label, Mem, RDI, RDX, RSI, RSP, T0, T1, cc},
    leave,
};
use crate::{cpu::Cpu, native::FeatureSet, regs::Regs};

pub const fn state(offset: usize) -> Mem {
    Mem::State(offset_of!(Cpu, translated) + offset)
}

pub const fn gpr(guest: u8) -> Mem {
    Mem::State(offset_of!(Cpu, regs) + offset_of!(Regs, gpr) + guest as usize * 8)
}

pub const FLAGS: Mem = Mem::State(offset_of!(Cpu, regs) + offset_of!(Regs, flags));
pub const PAGE: Mem = state(offset_of!(State, page));
pub const VECTORS: Mem = state(offset_of!(State, vectors));
const LEFT: Mem = state(offset_of!(State, left));
const RIP: Mem = Mem::State(offset_of!(Cpu, rip));

/// Addresses of what translations call and jump to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thunks {
    /// `extern "C" fn(cpu, code)`: runs translated code until it leaves. GS points at the `Cpu`.
    pub enter: u64,
    /// Jump: leave; the next instruction is at page offset EAX.
    pub leave_at: u64,
    /// Jump: the same; R15 is the jump that may be patched.
    pub leave_link: u64,
    /// Jump: leave for the address in RAX; R15 is where the jump's data are, to be patched.
    pub leave_cross: u64,
    /// Jump: leave for the address in RAX.
    pub leave_to: u64,
    /// Jump: leave for the untranslated block in R15.
    pub leave_block: u64,
    /// Jump: R15 is the site of a last instruction for the interpreter.
    pub last: u64,
    /// Call: R15 is the site of an instruction for the interpreter.
    pub interpret: u64,
    /// Call: the same, with vectors in registers again afterwards if they were there before.
    pub careful: u64,
    /// Call: a memory access at RAX that the TLB does not know; R15 is its site. Comes back with the host's address in
    /// RAX and ZF clear, or with ZF set when the instruction is done.
    pub slow: u64,
    /// Call: a span that missed; RAX is its leading operand's address, R15 its site. To be tried again.
    pub span: u64,
    /// Call: brings vectors in; R15 is what is wanted, EAX the page offset of the instruction.
    pub vectors: u64,
    /// Call: brings the x87 state in; EAX is the page offset of the instruction.
    pub x87: u64,
}

/// Where a vector register's slot is.
fn vector(register: u8) -> usize {
    offset_of!(Cpu, regs) + offset_of!(Regs, ymm) + register as usize * 32
}

struct Maker {
    e: Emitter,
    avx: bool,
    tail: Label,
}

impl Maker {
    /// `[V]MOVAPS` between a vector register and its slot.
    fn vector(&mut self, opcode: u8, register: u8) {
        self.e.raw(&[0x65]);
        if self.avx {
            self.e.raw(&[0xc5, if register < 8 { 0xfc } else { 0x7c }, opcode]);
        } else {
            if register >= 8 {
                self.e.raw(&[0x44]);
            }
            self.e.raw(&[0x0f, opcode]);
        }
        self.e.raw(&[(register & 7) << 3 | 4, 0x25]);
        self.e.raw(&(vector(register) as u32).to_le_bytes());
    }

    fn store_registers(&mut self) {
        for (guest, host) in HOST.iter().enumerate() {
            if let Some(host) = host {
                self.e.store(*host, gpr(guest as u8));
            }
        }
    }

    fn load_registers(&mut self) {
        for (guest, host) in HOST.iter().enumerate() {
            if let Some(host) = host {
                self.e.load(*host, gpr(guest as u8));
            }
        }
    }

    /// Vectors go to memory if they are in registers; `forget` leaves them there.
    fn store_vectors(&mut self, forget: bool) {
        let none = self.e.label();
        self.e.group1_mem(false, 7, VECTORS, 0);
        self.e.jcc(cc::E, none);
        for register in 0..16 {
            self.vector(0x29, register);
        }
        if self.avx {
            self.e.raw(&[0xc5, 0xf8, 0x77]);
        }
        if forget {
            self.e.set32(VECTORS, 0);
        }
        self.e.bind(none);
    }

    fn load_vectors(&mut self) {
        for register in 0..16 {
            self.vector(0x28, register);
        }
    }

    /// Calls a Rust function with the `Cpu`, R15 and RAX.
    fn call(&mut self, function: u64) {
        self.e.load(RDI, state(offset_of!(State, cpu)));
        self.e.mov(RSI, T1);
        self.e.mov(RDX, T0);
        self.e.constant(T0, function);
        self.e.raw(&[0xff, 0xd0]);
    }

    /// Calls one with all registers in memory.
    fn help(&mut self, forget_vectors: bool, function: u64) {
        self.store_registers();
        self.store_vectors(forget_vectors);
        self.call(function);
    }

    /// Everything to memory and back to the caller of [`Thunks::enter`].
    fn leave(&mut self, left: Left) {
        self.e.set32(LEFT, left as u32);
        self.store_registers();
        self.store_vectors(true);
        self.e.jmp(self.tail);
    }

    fn entry(&mut self) -> u64 {
        while !self.e.here().is_multiple_of(16) {
            self.e.raw(&[0xcc]);
        }
        self.e.address + self.e.here() as u64
    }
}

/// The thunks' code, to run at `address`.
pub fn make(address: u64) -> (Vec<u8>, Thunks) {
    let mut e = Emitter::default();
    e.start(address);
    let tail = e.label();
    let mut m = Maker { e, avx: FeatureSet::host().contains_all(&[CpuidFeature::AVX]), tail };
    let mut thunks = Thunks { enter: m.entry(), ..Thunks::default() };
    let saved = [3, 5, 12, 13, 14, 15];
    for register in saved {
        m.e.push(register);
    }
    // Six registers and the return address: calls from translated code find the stack aligned.
    m.e.mov(T1, RSI);
    m.load_registers();
    m.e.rr(false, &[0xff], 4, T1);

    thunks.leave_at = m.entry();
    m.e.rm(true, &[0x03], T0, PAGE);
    m.e.store(T0, RIP);
    m.leave(Left::Next);

    thunks.leave_link = m.entry();
    m.e.rm(true, &[0x03], T0, PAGE);
    m.e.store(T0, RIP);
    m.e.store(T1, state(offset_of!(State, site)));
    m.leave(Left::Link);

    thunks.leave_cross = m.entry();
    m.e.store(T0, RIP);
    m.e.store(T1, state(offset_of!(State, site)));
    m.leave(Left::Cross);

    thunks.leave_to = m.entry();
    m.e.store(T0, RIP);
    m.leave(Left::Next);

    thunks.leave_block = m.entry();
    m.e.store(T1, Mem::State(offset_of!(Cpu, next)));
    m.leave(Left::Block);

    thunks.last = m.entry();
    m.store_registers();
    m.store_vectors(true);
    m.e.group1(true, 5, RSP, 8);
    m.call(leave::last as *const () as u64);
    m.e.group1(true, 0, RSP, 8);
    m.e.rr(true, &[0x85], T0, T0);
    m.e.jcc(cc::E, tail);
    m.load_registers();
    m.e.rr(false, &[0xff], 4, T0);

    let dropped = m.e.label();
    thunks.interpret = m.entry();
    m.help(true, leave::interpret as *const () as u64);
    m.e.group1(true, 7, T0, 1);
    m.e.jcc(cc::E, dropped);
    m.load_registers();
    m.e.ret();

    thunks.careful = m.entry();
    m.help(false, leave::careful as *const () as u64);
    let reload = m.e.label();
    m.e.jmp(reload);

    thunks.span = m.entry();
    m.help(false, leave::span as *const () as u64);
    m.e.jmp(reload);

    thunks.slow = m.entry();
    m.help(false, leave::slow as *const () as u64);
    m.e.bind(reload);
    m.e.group1(true, 7, T0, 1);
    m.e.jcc(cc::E, dropped);
    let none = m.e.label();
    m.e.group1_mem(false, 7, VECTORS, 0);
    m.e.jcc(cc::E, none);
    m.load_vectors();
    m.e.bind(none);
    m.load_registers();
    m.e.rr(true, &[0x85], T0, T0);
    m.e.ret();

    thunks.x87 = m.entry();
    m.e.store(T0, state(offset_of!(State, target)));
    m.help(false, leave::bring_x87 as *const () as u64);
    m.e.jmp(reload);

    thunks.vectors = m.entry();
    m.e.store(T0, state(offset_of!(State, target)));
    // They may be in, but not for what is wanted: AVX where only SSE may run.
    m.help(true, leave::bring_vectors as *const () as u64);
    m.e.group1(true, 7, T0, 1);
    m.e.jcc(cc::E, dropped);
    m.load_vectors();
    m.load_registers();
    m.e.ret();

    // A helper has said how to go on: registers are in memory already.
    m.e.bind(dropped);
    m.e.set32(VECTORS, 0);
    m.e.group1(true, 0, RSP, 8);
    m.e.bind(tail);
    for register in saved.into_iter().rev() {
        m.e.pop(register);
    }
    m.e.ret();
    m.e.resolve();
    (m.e.code, thunks)
}
