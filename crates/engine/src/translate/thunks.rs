//! The way in and out of translated code.

use std::mem::offset_of;

use iced_x86::CpuidFeature;

use super::{
    GUARDED, HOST, Left, State,
    emit::{Emitter, Label, Mem, RDI, RDX, RSI, RSP, T0, T1, cc},
    leave,
    strings::SIZES,
    window::{self, Frame, Kind, LIST_FULL, List, TO_FRAME, Window},
};
use crate::{
    cpu::Cpu,
    native::FeatureSet,
    regs::Regs,
    tlb::{ENTRIES, ENTRY_SHIFT, Entry},
};

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
pub const RFLAGS: Mem = Mem::State(offset_of!(Cpu, rflags));
pub const CPL: Mem = Mem::State(offset_of!(Cpu, cpl));
pub const DATA: Mem = Mem::State(offset_of!(Cpu, data));

/// `to` becomes the host's address of the linear one in `linear`, if the table has its page. Uses `entry` and flags.
pub fn look_up(e: &mut Emitter, linear: u8, to: u8, entry: u8, table: usize, missed: Label) {
    e.mov32(entry, linear);
    e.shift(false, 5, entry, 12 - ENTRY_SHIFT);
    e.group1(false, 4, entry, ((ENTRIES - 1) << ENTRY_SHIFT) as i32);
    e.rm(true, &[0x03], entry, DATA);
    e.mov(to, linear);
    e.rm(true, &[0x33], to, Mem::Base(entry, (table + offset_of!(Entry, tag)) as i32));
    e.group1(true, 7, to, 0xfff);
    e.jcc(cc::A, missed);
    e.rm(true, &[0x03], to, Mem::Base(entry, (table + offset_of!(Entry, host)) as i32));
}

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
    /// Jump: R15 is the site of a last instruction for the interpreter.
    pub last: u64,
    /// Call: R15 is the site of an instruction for the interpreter.
    pub interpret: u64,
    /// Call: the same, with vectors in registers again afterwards if they were there before.
    pub careful: u64,
    /// Call: a memory access at RAX that the TLB does not know; R15 is its site. Comes back with the host's address in
    /// RAX and ZF clear, or with ZF set when the instruction is done.
    pub slow: u64,
    /// Call: an access at RAX that is not in its window, which R15 points at. Comes back with ZF clear and in R15 what is
    /// to be added to the address, or with ZF set when the TLB does not know it either. RAX stays as it is.
    pub window: u64,
    /// Calls: REP MOVS and REP STOS of each size; ZF says that it is one for the interpreter.
    pub movs: [u64; SIZES],
    pub stos: [u64; SIZES],
    /// Call: what a store left in [`State::gathered`] goes where it belongs. Everything stays as it is but the host's flags.
    pub scatter: u64,
    /// Call: the host's address in RAX must be one of the guest's RAM. Everything stays as it is.
    pub guard: u64,
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

pub(super) struct Maker {
    pub(super) e: Emitter,
    pub(super) guard_thunk: u64,
    avx: bool,
    tail: Label,
    /// Where the windows and their lists are.
    windows: u64,
    lists: u64,
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

    /// See [`Thunks::guard`].
    fn guard(&mut self) {
        const RCX: u8 = 1;
        let e = &mut self.e;
        let fine = e.label();
        // PUSHFQ
        e.raw(&[0x9c]);
        e.push(RCX);
        for range in 0..GUARDED {
            let range = offset_of!(State, guarded) + range * 16;
            e.mov(RCX, T0);
            e.rm(true, &[0x2b], RCX, state(range));
            e.rm(true, &[0x3b], RCX, state(range + 8));
            e.jcc(cc::B, fine);
        }
        // UD2
        e.raw(&[0x0f, 0x0b]);
        e.bind(fine);
        e.pop(RCX);
        // POPFQ
        e.raw(&[0x9d]);
        e.ret();
    }

    /// Moves the window at R15 to the address in RAX.
    fn window(&mut self) {
        const RCX: u8 = 1;
        const RDX: u8 = 2;
        const RBX: u8 = 3;
        const RSI: u8 = 6;
        let window = |offset| Mem::Base(T1, offset as i32);
        let frame = |offset| Mem::Base(T1, TO_FRAME + offset as i32);
        let entry = |offset| Mem::Base(RCX, offset as i32);
        let (start, room) = (window(offset_of!(Window, start)), window(offset_of!(Window, room)));
        let (difference, host) = (window(offset_of!(Window, difference)), window(offset_of!(Window, host)));
        let one_page = frame(offset_of!(Frame, room));
        let listed = frame(offset_of!(Frame, listed));
        let saved = [RCX, RDX, RBX, RSI];
        let e = &mut self.e;
        let (missed, refused, plain, anew, wider, below, done) =
            (e.label(), e.label(), e.label(), e.label(), e.label(), e.label(), e.label());
        saved.iter().for_each(|r| e.push(*r));
        // What the TLB says.
        e.load(RDX, DATA);
        e.mov32(RCX, T0);
        e.shift(false, 5, RCX, 12 - ENTRY_SHIFT);
        e.group1(false, 4, RCX, ((ENTRIES - 1) << ENTRY_SHIFT) as i32);
        e.rr(true, &[0x01], RDX, RCX);
        // MOVSXD RBX, [table]
        e.rm(true, &[0x63], RBX, frame(offset_of!(Frame, table)));
        e.rr(true, &[0x01], RBX, RCX);
        e.mov(RBX, T0);
        e.rm(true, &[0x33], RBX, entry(offset_of!(Entry, tag)));
        e.load32(RSI, one_page);
        e.rr(true, &[0x39], RSI, RBX);
        e.jcc(cc::AE, missed);
        // Whether the window may be moved.
        e.rm(true, &[0x3b], RDX, state(offset_of!(State, window_set)));
        e.jcc(cc::NE, plain);
        // Not while a letter may ask what was written through it: LOCK OR [RSP], 0 orders the look behind that.
        let unwritten = e.label();
        e.cmp_byte(frame(offset_of!(Frame, write)), 0);
        e.jcc(cc::E, unwritten);
        e.raw(&[0xf0, 0x83, 0x0c, 0x24, 0]);
        e.bind(unwritten);
        e.load(RDX, state(offset_of!(State, requests)));
        e.group1_mem(false, 7, Mem::Base(RDX, 0), 0);
        e.jcc(cc::NE, plain);
        e.group1_mem(false, 5, frame(offset_of!(Frame, patience)), 1);
        e.jcc(cc::S, refused);
        // By a page, if it comes to lie next to it on the host too.
        e.mov(RDX, T0);
        e.group1(true, 4, RDX, -4096);
        e.load(RBX, entry(offset_of!(Entry, difference)));
        e.rm(true, &[0x3b], RBX, difference);
        e.jcc(cc::NE, anew);
        e.group1_mem(true, 7, room, 0);
        e.jcc(cc::E, anew);
        e.load(RBX, start);
        e.group1(true, 5, RBX, 0x1000);
        e.rr(true, &[0x39], RDX, RBX);
        e.jcc(cc::E, below);
        e.group1(true, 0, RBX, 0x2000);
        e.rm(true, &[0x03], RBX, room);
        e.rr(true, &[0x29], RSI, RBX);
        e.rr(true, &[0x39], RDX, RBX);
        e.jcc(cc::NE, anew);
        e.jmp(wider);
        e.bind(below);
        e.store(RDX, start);
        e.group1_mem(true, 5, host, 0x1000);
        e.bind(wider);
        e.group1_mem(true, 0, room, 0x1000);
        let mark = e.label();
        e.load(RBX, entry(offset_of!(Entry, global)));
        e.rm(true, &[0x21], RBX, frame(offset_of!(Frame, global)));
        e.jmp(mark);
        // Or to this page alone.
        e.bind(anew);
        e.store(RDX, start);
        e.store(RSI, room);
        e.load(RBX, entry(offset_of!(Entry, difference)));
        e.store(RBX, difference);
        e.load(RBX, entry(offset_of!(Entry, host)));
        e.store(RBX, host);
        e.load(RBX, entry(offset_of!(Entry, global)));
        e.store(RBX, frame(offset_of!(Frame, global)));
        e.bind(mark);
        // And notes it in the list of its kind.
        for kind in Kind::ALL {
            let next = e.label();
            e.cmp_byte(frame(offset_of!(Frame, user)), u8::from(kind == Kind::User));
            e.jcc(cc::NE, next);
            if kind != Kind::User {
                e.group1_mem(true, 7, frame(offset_of!(Frame, global)), 0);
                e.jcc(if kind == Kind::Global { cc::E } else { cc::NE }, next);
            }
            e.test_byte(listed, 1 << kind as u8);
            e.jcc(cc::NE, done);
            let count = self.lists + (kind as usize * size_of::<List>()) as u64;
            e.load(RDX, Mem::Near(count));
            e.group1(true, 7, RDX, LIST_FULL);
            let full = e.label();
            e.jcc(cc::AE, full);
            // LEA RBX, [windows]
            e.lea(RBX, Mem::Near(self.windows));
            e.mov(RCX, T1);
            e.rr(true, &[0x29], RBX, RCX);
            e.shift(true, 5, RCX, window::SHIFT);
            e.lea(RBX, Mem::Near(count + offset_of!(List, windows) as u64));
            e.rm(false, &[0x89], RCX, Mem::Indexed(RBX, RDX, 2, 0));
            e.group1(true, 0, RDX, 1);
            e.store(RDX, Mem::Near(count));
            // OR byte [listed], bit
            e.rm(false, &[0x80], 1, listed);
            e.raw(&[1 << kind as u8]);
            e.jmp(done);
            e.bind(full);
            // Nothing is in it that is not listed.
            e.rm(true, &[0xc7], 0, room);
            e.raw(&0i32.to_le_bytes());
            e.jmp(refused);
            e.bind(next);
        }
        e.bind(done);
        e.load(T1, difference);
        let back = e.mark();
        saved.iter().rev().for_each(|r| e.pop(*r));
        // RSP is not 0: "not equal".
        e.rr(true, &[0x85], RSP, RSP);
        e.ret();
        e.bind(plain);
        e.load(T1, entry(offset_of!(Entry, difference)));
        e.jmp(back);
        e.bind(refused);
        e.store(T1, state(offset_of!(State, window)));
        e.bind(missed);
        saved.iter().rev().for_each(|r| e.pop(*r));
        e.rr(true, &[0x39], T0, T0);
        e.ret();
    }

    fn entry(&mut self) -> u64 {
        while !self.e.here().is_multiple_of(16) {
            self.e.raw(&[0xcc]);
        }
        self.e.address + self.e.here() as u64
    }
}

/// The thunks' code, to run at `address`, with windows at `windows`.
pub fn make(address: u64, windows: u64) -> (Vec<u8>, Thunks) {
    let mut e = Emitter::default();
    e.start(address);
    let tail = e.label();
    let avx = FeatureSet::host().contains_all(&[CpuidFeature::AVX]);
    let lists = windows + offset_of!(window::Table, lists) as u64;
    let mut m = Maker { e, guard_thunk: 0, avx, tail, windows, lists };
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
    m.apart();
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

    thunks.window = m.entry();
    m.window();

    thunks.guard = m.entry();
    m.guard();
    m.guard_thunk = thunks.guard;

    thunks.scatter = m.entry();
    m.scatter();

    for size in 0..SIZES {
        thunks.movs[size] = m.entry();
        m.repeat(size, true);
        thunks.stos[size] = m.entry();
        m.repeat(size, false);
    }

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
