//! Accesses near each other, by the same register: looked up in the TLB once for all of them.
//!
//! Before a block is translated its memory operands are sorted into spans: those with one base register that is not
//! changed in between, or only by a constant, and at most [`WIDEST`] bytes apart. The first access of a span looks up
//! the page for all; the others only add the difference between host and guest addresses. Where a span turns out to
//! cross pages the interpreter takes over, and a block in which that happens often is translated without spans.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, InstructionInfo, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register};

use super::{
    HOST, STACK, State,
    block::Work,
    emit::{Emitter, Label, Mem, T0, T1},
    outline::{Form, Outline},
    thunks::{gpr, state},
    window::Window,
};
use crate::native::operand;

/// Bytes that a span reaches over at most.
const WIDEST: i64 = 256;
/// Spans of a block that are kept.
pub const SLOTS: usize = 40;
/// Times that the spans of a block may cross pages before it is translated without them.
pub const CROSSINGS: u16 = 64;

/// Accesses by one register that are looked up together.
#[derive(Clone, Copy, Debug)]
struct Span {
    base: u8,
    write: bool,
    /// The first and the last byte's end, from the register's value `shift` after the block's start.
    lo: i64,
    hi: i64,
    shift: i64,
    members: u32,
    /// What is to be added to a linear address is in the span's slot.
    active: bool,
}

/// An instruction's part in a span.
#[derive(Clone, Copy, Debug)]
struct Member {
    span: usize,
    /// From the register's value there to that at the span's reference.
    back: i64,
    write: bool,
}

#[derive(Default)]
pub struct Plan {
    members: Vec<Option<Member>>,
    spans: Vec<Span>,
    held: Held,
}

/// What T1 holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Held {
    #[default]
    Nothing,
    /// The difference of a span.
    Span(usize),
    /// A guest register that lives in memory.
    Guest(u8),
}

/// How an access gets to its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Looks it up, for others too.
    Lead,
    /// Another has.
    Follow,
    /// Looks it up for itself.
    Alone,
}

/// A memory access, by guest register.
struct Touch {
    base: u8,
    disp: i64,
    bytes: i64,
    write: bool,
}

const SLOT: usize = offset_of!(State, spans);

impl Work<'_> {
    /// Sorts the block's accesses into spans.
    pub fn plan<'a>(&mut self, instructions: impl Iterator<Item = &'a Instruction>) {
        let mut plan = Plan::default();
        let mut shifts = [0i64; 16];
        // The spans that are open for reading and for writing.
        let mut open: [[Option<usize>; 2]; 16] = [[None; 2]; 16];
        for insn in instructions {
            let found = self.t.info.info_options(insn, InstructionInfoOptions::NO_MEMORY_USAGE);
            let touch = touch(insn, found);
            let write = touch.as_ref().is_some_and(|t| t.write);
            let member = touch.and_then(|t| {
                let at = shifts[usize::from(t.base)];
                let of = &mut open[usize::from(t.base)];
                // What may be written may be read.
                let candidates = if t.write { [of[1], None] } else { [of[1], of[0]] };
                let joined = candidates.into_iter().flatten().find(|&i| {
                    let s: &mut Span = &mut plan.spans[i];
                    let from = at - s.shift + t.disp;
                    let (lo, hi) = (s.lo.min(from), s.hi.max(from + t.bytes));
                    let fits = hi - lo <= WIDEST;
                    if fits {
                        (s.lo, s.hi, s.members) = (lo, hi, s.members + 1);
                    }
                    fits
                });
                let span = match joined {
                    Some(span) => span,
                    None if plan.spans.len() < SLOTS => {
                        let (lo, hi) = (t.disp, t.disp + t.bytes);
                        let span = Span { base: t.base, write: t.write, lo, hi, shift: at, members: 1, active: false };
                        plan.spans.push(span);
                        of[usize::from(t.write)] = Some(plan.spans.len() - 1);
                        plan.spans.len() - 1
                    }
                    None => return None,
                };
                Some(Member { span, back: plan.spans[span].shift - at, write })
            });
            plan.members.push(member);
            follow_registers(insn, found, &mut shifts, &mut open);
        }
        self.plan = plan;
    }

    /// At the start of a body: nothing is known.
    pub fn no_spans(&mut self) {
        self.plan.held = Held::Nothing;
        for span in &mut self.plan.spans {
            span.active = false;
        }
    }

    /// The access of this instruction of the part is part of no span.
    pub fn no_span_for(&mut self, index: usize) {
        if let Some(member) = self.plan.members.get_mut(self.first + index) {
            *member = None;
        }
    }

    /// T1 is about to be used for something else.
    pub fn drop_held(&mut self) {
        self.plan.held = Held::Nothing;
    }

    /// Whether T1 is this guest register.
    pub fn holds(&self, guest: u8) -> bool {
        self.plan.held == Held::Guest(guest)
    }

    /// A guest register that lives in memory, to T0 or T1.
    pub fn load_guest(&mut self, to: u8, guest: u8) {
        if self.holds(guest) {
            return self.e().mov(to, T1);
        }
        self.e().load(to, gpr(guest));
        if to == T1 {
            self.plan.held = Held::Guest(guest);
        }
    }

    /// To a guest register that lives in memory, from T0 or T1.
    pub fn store_guest(&mut self, from: u8, guest: u8) {
        self.e().store(from, gpr(guest));
        if from == T1 {
            self.plan.held = Held::Guest(guest);
        } else if self.holds(guest) {
            self.drop_held();
        }
    }

    /// The guest register that T1 is.
    pub fn held_guest(&self) -> Option<u8> {
        match self.plan.held {
            Held::Guest(guest) => Some(guest),
            _ => None,
        }
    }

    /// Whether the access of the instruction is part of a span that is worth it.
    pub fn reach(&self, index: usize) -> Option<Reach> {
        let member = self.plan.members.get(self.first + index).copied().flatten()?;
        let span = self.plan.spans[member.span];
        match (span.active, span.members) {
            (true, _) => Some(Reach::Follow),
            (false, 0 | 1) => Some(Reach::Alone),
            // A read must not ask for more than it needs.
            (false, _) if span.write && !member.write => Some(Reach::Alone),
            (false, _) => Some(Reach::Lead),
        }
    }

    /// Has T1 hold what is to be added to the address of the instruction's operand at `disp`. A leader uses RAX and
    /// the host's flags, a follower neither.
    pub fn reach_span(&mut self, index: usize, disp: i32, bytes: u64, write: bool) {
        let Some(member) = self.plan.members[self.first + index] else { unreachable!("`reach` was asked") };
        let span = self.plan.spans[member.span];
        let slot = state(SLOT + member.span * 8);
        if span.active {
            if self.plan.held != Held::Span(member.span) {
                self.e().load(T1, slot);
            }
        } else {
            let base = HOST[usize::from(span.base)].unwrap_or(T0);
            let make = self.missing_flags();
            let site = self.site(index, bytes, write);
            let lo = (span.lo + member.back) as i32;
            let bytes = (span.hi - span.lo) as u64;
            let again = self.e().mark();
            self.e().lea(T0, Mem::Base(base, lo));
            let mut moved = None;
            let missed = match self.window(index, bytes, span.write) {
                Some(window) => {
                    let missed = self.check_window(window);
                    self.e().load(T1, Mem::Near(window + offset_of!(Window, difference) as u64));
                    moved = Some((window, self.e().mark()));
                    missed
                }
                None => self.look_up_span(bytes, span.write),
            };
            self.e().store(T1, slot);
            let own = Mem::Base(base, disp);
            let reach = (lo.wrapping_sub(disp), bytes as u32);
            self.t.outlines.push(Outline::Span { missed, again, moved, own, site, reach, make });
            self.plan.spans[member.span].active = true;
        }
        self.plan.held = Held::Span(member.span);
    }

    /// Has T1 hold what is to be added to the address of an operand that is part of no span. Uses RAX and the host's
    /// flags. `done` is where the interpreter goes on if it did the instruction.
    pub fn reach_alone(&mut self, index: usize, base: u8, disp: i32, bytes: u64, write: bool, done: Label) {
        let base = HOST[usize::from(base)].unwrap_or(T0);
        let own = Mem::Base(base, disp);
        let make = self.missing_flags();
        let site = self.site(index, bytes, write);
        if disp == 0 {
            self.e().mov(T0, base);
        } else {
            self.e().lea(T0, own);
        }
        if let Some(window) = self.window(index, bytes, write) {
            let missed = self.check_window(window);
            self.e().load(T1, Mem::Near(window + offset_of!(Window, difference) as u64));
            let (again, form) = (self.e().mark(), Form::Near(own));
            self.t.outlines.push(Outline::Moved {
                missed,
                again,
                done,
                site,
                window,
                form,
                flags: false,
                held: None,
                make,
                scatter: Vec::new(),
            });
            return;
        }
        let table = self.table(write);
        let missed = self.look_up_span(bytes, write);
        let again = self.e().mark();
        self.t.outlines.push(Outline::SlowNear {
            missed,
            again,
            done,
            own,
            site,
            table,
            flags: false,
            held: None,
            make,
            scatter: Vec::new(),
        });
    }

    /// The stack operand of an instruction, `disp` bytes from RSP, if it is part of a span.
    pub fn stack_span(&mut self, index: usize, disp: i32, write: bool, written: u16) -> Option<Mem> {
        match self.reach(index)? {
            Reach::Lead => self.keep_flags(written),
            Reach::Follow => self.keep_recipe(written),
            Reach::Alone => return None,
        }
        self.reach_span(index, disp, 8, write);
        Some(Mem::Indexed(T1, STACK, 0, disp))
    }
}

/// Says in the state what bytes a span covers, from the operand that leads it.
pub fn note(e: &mut Emitter, (from, bytes): (i32, u32)) {
    e.set32(state(offset_of!(State, span_from)), from as u32);
    e.set32(state(offset_of!(State, span_bytes)), bytes);
}

/// What an instruction does to the registers that spans count from.
fn follow_registers(
    insn: &Instruction,
    found: &InstructionInfo,
    shifts: &mut [i64; 16],
    open: &mut [[Option<usize>; 2]; 16],
) {
    let stack = match insn.code() {
        Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 => Some(-8),
        Code::Pop_r64 if insn.op0_register() != Register::RSP => Some(8),
        _ => None,
    };
    let first = insn.op0_register();
    let by_constant = insn.op0_kind() == OpKind::Register && first.is_gpr64();
    let shifted = match insn.mnemonic() {
        Mnemonic::Add if by_constant => insn.try_immediate(1).ok().map(|i| i as i64),
        Mnemonic::Sub if by_constant => insn.try_immediate(1).ok().map(|i| (i as i64).wrapping_neg()),
        Mnemonic::Inc if by_constant => Some(1),
        Mnemonic::Dec if by_constant => Some(-1),
        Mnemonic::Lea
            if by_constant
                && insn.memory_base() == first
                && insn.memory_index() == Register::None
                && insn.segment_prefix() == Register::None =>
        {
            Some(insn.memory_displacement64() as i64)
        }
        _ => None,
    }
    .filter(|by| i32::try_from(*by).is_ok());
    for used in found.used_registers() {
        let register = used.register();
        if !operand::writes(used.access()) || !register.is_gpr() {
            continue;
        }
        let guest = register.full_register().number();
        match (stack, shifted) {
            (Some(by), _) if guest == 4 => shifts[4] += by,
            (None, Some(by)) if first.full_register() == register.full_register() => shifts[guest] += by,
            _ => open[guest] = [None; 2],
        }
    }
}

/// The access of an instruction that is a candidate.
fn touch(insn: &Instruction, found: &InstructionInfo) -> Option<Touch> {
    let stack = |disp, write| Some(Touch { base: 4, disp, bytes: 8, write });
    match insn.code() {
        Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Call_rel32_64 => return stack(-8, true),
        Code::Pop_r64 | Code::Retnq | Code::Retnq_imm16 => return stack(0, false),
        Code::Leaveq => return Some(Touch { base: 5, disp: 0, bytes: 8, write: false }),
        _ => {}
    }
    let at = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)?;
    let base = insn.memory_base();
    let plain = base.is_gpr64()
        && insn.memory_index() == Register::None
        && !matches!(insn.memory_segment(), Register::FS | Register::GS)
        && !insn.is_stack_instruction()
        && insn.flow_control() == iced_x86::FlowControl::Next
        && insn.mnemonic() != Mnemonic::Lea;
    let bytes = insn.memory_size().size();
    if !plain || HOST[base.number()].is_none() || !(1..=32).contains(&bytes) {
        return None;
    }
    let disp = i64::from(i32::try_from(insn.memory_displacement64() as i64).ok()?);
    let write = match found.op_access(at) {
        OpAccess::None | OpAccess::NoMemAccess => return None,
        OpAccess::Read | OpAccess::CondRead => false,
        _ => true,
    };
    Some(Touch { base: base.number() as u8, disp, bytes: bytes as i64, write })
}
