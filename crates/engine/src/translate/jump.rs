//! Jumps, calls and returns.

use std::mem::offset_of;

use iced_x86::{Code, FlowControl, Instruction, OpKind};

use super::{
    HOST, STACK, State,
    block::{Exit, Flow, Head, Work},
    emit::{Label, Mem, T0, T1, cc},
    flags::Flags,
    outline::Outline,
    thunks::{PAGE, state},
};
use crate::{
    cpu::Cpu,
    tlb::{CodeSet, JUMP_ENTRIES, JUMP_FACTOR, JUMP_SHIFT, Jump},
    uop::Uop,
};

const CODE: Mem = Mem::State(offset_of!(Cpu, code));
const _: () = assert!(size_of::<Jump>() == 1 << 4, "as `jump_to` shifts");
const _: () = assert!(offset_of!(CodeSet, jumps) == 0, "jumps are found two by two at an aligned address");

impl Work<'_> {
    /// Where control goes next, at an offset from the page's start; `here` is where it comes from.
    pub fn go(&mut self, to: i64, here: i64) {
        debug_assert!(self.flags.memory);
        self.whole_entry();
        if !(0..0x1000).contains(&to) {
            return match i32::try_from(to) {
                Ok(to) => self.go_across(to, i64::from(to) <= here),
                Err(_) => {
                    self.e().load(T0, PAGE);
                    self.e().constant(T1, to as u64);
                    self.e().rr(true, &[0x01], T1, T0);
                    self.jump_to(to <= here, None)
                }
            };
        }
        if to <= here {
            self.poll(to as i32);
        }
        let from = self.e().label();
        self.e().jmp(from);
        let site = self.place() - 4;
        self.t.outlines.push(Outline::Link { from, to: to as i32, site });
    }

    /// To another page: directly, while it is known that this page and translations of code are what they were when the
    /// jump was patched; else through the table.
    fn go_across(&mut self, to: i32, poll: bool) {
        if poll {
            self.poll(to);
        }
        let (data, page, missed) = (self.e().label(), self.e().label(), self.e().label());
        let e = &mut self.t.emitter;
        e.load(T0, PAGE);
        e.load(T1, state(offset_of!(State, generation)));
        e.cmp_data(T1, data);
        e.jcc(cc::NE, missed);
        e.cmp_data(T0, page);
        e.jcc(cc::NE, missed);
        e.group1(true, 0, T0, to & !0xfff);
        e.store(T0, PAGE);
        e.jmp(missed);
        // No generation is 0. They lie where they come to the cache with the code.
        let at = self.place();
        let e = &mut self.t.emitter;
        e.bind(data);
        e.raw(&[0; 8]);
        e.bind(page);
        e.raw(&[0; 8]);
        e.raw(&(at as u64 - 4).to_le_bytes());
        self.t.outlines.push(Outline::Across { missed, to, at });
    }

    /// The first five bytes of a translation are one day a jump out of it: none of its own jumps is among them.
    fn whole_entry(&mut self) {
        if self.e().here() < 5 {
            self.e().raw(&[0x0f, 0x1f, 0x44, 0x00, 0x00]);
        }
    }

    /// Leaves for page offset `to` if a request is pending.
    pub fn poll(&mut self, to: i32) {
        let from = self.look_at_requests();
        let make = self.missing_flags();
        self.t.outlines.push(Outline::Called { from, to, make });
    }

    /// Leads to the label if a request is pending. Uses R15 and the host's flags.
    fn look_at_requests(&mut self) -> Label {
        let from = self.e().label();
        self.e().load(T1, state(offset_of!(State, requests)));
        self.e().group1_mem(false, 7, Mem::Base(T1, 0), 0);
        self.e().jcc(cc::NE, from);
        from
    }

    /// Jumps to the address in RAX: through the table of translations that began there lately.
    ///
    /// `poll`: the jump may close a loop. `unsure`: the address need not be canonical; see [`Outline::Second`].
    pub fn jump_to(&mut self, poll: bool, unsure: Option<(u64, i32)>) {
        debug_assert!(self.flags.memory);
        if poll {
            let from = self.look_at_requests();
            self.t.outlines.push(Outline::CalledTo { from });
        }
        let from = self.e().label();
        let e = &mut self.t.emitter;
        // The same as `tlb::jump_index`, times 16.
        e.multiply(T1, T0, JUMP_FACTOR);
        e.shift(false, 5, T1, JUMP_SHIFT as u8 - 4);
        e.group1(false, 4, T1, ((JUMP_ENTRIES - 1) * size_of::<Jump>()) as i32);
        e.rm(true, &[0x03], T1, CODE);
        e.rm(true, &[0x3b], T0, Mem::Base(T1, offset_of!(Jump, rip) as i32));
        e.jcc(cc::NE, from);
        let found = e.mark();
        // AND RAX, -4096
        e.raw(&[0x48, 0x25, 0x00, 0xf0, 0xff, 0xff]);
        e.store(T0, PAGE);
        e.jmp_mem(Mem::Base(T1, offset_of!(Jump, what) as i32));
        self.t.outlines.push(Outline::Second { from, found, unsure });
    }

    pub fn conditional_jump(&mut self, insn: &Instruction, index: usize) -> Flow {
        if insn.op0_kind() != OpKind::NearBranch64 {
            return self.leave_to_interpreter(index, true);
        }
        let condition = insn.condition_code() as u8 - 1;
        let taken = self.start.wrapping_add(insn.near_branch64() as i64);
        let next = self.start + insn.next_ip() as i64;
        self.whole_entry();
        let here = self.start + insn.ip() as i64;
        if taken == self.entry && self.may_loop {
            if self.recipe.is_none() {
                self.pack();
            }
            self.unpack();
            match self.head {
                None => {
                    self.exit(condition ^ 1, next, here);
                    self.again = Some(Flags { memory: self.recipe.is_none(), host: false });
                    return Flow::Ended;
                }
                Some(head) if self.leads_to(head) => {
                    self.e().jcc(condition, head.label);
                    self.pack();
                    self.go(next, here);
                    return Flow::Ended;
                }
                Some(_) => {}
            }
        }
        if let Some(follower) = self.follower
            && (follower == taken || follower == next)
        {
            self.unpack();
            let (condition, other) = if follower == taken { (condition ^ 1, next) } else { (condition, taken) };
            if taken != next {
                self.exit(condition, other, here);
            }
            return Flow::Through;
        }
        self.pack();
        self.unpack();
        let direct = (0..0x1000).contains(&taken) && taken > next;
        if direct {
            let from = self.e().label();
            self.e().jcc(condition, from);
            let site = self.place() - 4;
            self.t.outlines.push(Outline::Link { from, to: taken as i32, site });
            self.go(next, self.start + insn.ip() as i64);
        } else {
            let not = self.e().label();
            self.e().jcc(condition ^ 1, not);
            self.go(taken, next);
            self.e().bind(not);
            self.go(next, self.start + insn.ip() as i64);
        }
        Flow::Ended
    }

    /// Leaves the translation by a condition.
    fn exit(&mut self, condition: u8, to: i64, here: i64) {
        let from = self.e().label();
        self.e().jcc(condition, from);
        self.exits.push(Exit { from, to, here, flags: self.flags, recipe: self.recipe });
    }

    /// Whether what is known at the start of a loop is known here.
    fn leads_to(&self, head: Head) -> bool {
        head.recipe == self.recipe
            && self.carry >= head.carry
            && self.vectors & head.vectors == head.vectors
            && self.x87 >= head.x87
    }

    /// An unconditional jump or the end of a part that leads to `to`.
    fn go_on(&mut self, to: i64, here: i64) -> Flow {
        if self.follower == Some(to) {
            return Flow::Through;
        }
        if to == self.entry && self.may_loop {
            self.whole_entry();
            if self.recipe.is_none() {
                self.pack();
            }
            match self.head {
                None => {
                    self.again = Some(Flags { memory: self.recipe.is_none(), host: false });
                    return Flow::Ended;
                }
                Some(head) if self.leads_to(head) => {
                    self.e().jmp(head.label);
                    return Flow::Ended;
                }
                Some(_) => {}
            }
        }
        self.pack();
        self.go(to, here);
        Flow::Ended
    }

    /// Jumps, calls and returns.
    pub fn control(&mut self, insn: &Instruction, op: &Uop, index: usize) -> Option<Flow> {
        let here = self.start + insn.ip() as i64;
        let next = self.start + insn.next_ip() as i64;
        let near = insn.op0_kind() == OpKind::NearBranch64;
        match insn.flow_control() {
            FlowControl::Next => None,
            FlowControl::UnconditionalBranch if near => {
                Some(self.go_on(self.start.wrapping_add(insn.near_branch64() as i64), here))
            }
            FlowControl::Call if near => {
                self.pack();
                self.push_return(index, next);
                Some(self.go_on(self.start.wrapping_add(insn.near_branch64() as i64), here))
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                let memory = insn.op0_kind() == OpKind::Memory;
                if !matches!(insn.code(), Code::Jmp_rm64 | Code::Call_rm64) {
                    return Some(self.leave_to_interpreter(index, true));
                }
                let disp = self.displacement(op);
                if memory && disp.is_none() {
                    return Some(self.leave_to_interpreter(index, true));
                }
                self.pack();
                if let (true, Some(disp)) = (memory, disp) {
                    self.address(op, disp);
                    let done = self.e().label();
                    self.access(index, 8, false, 1, done);
                    self.e().bind(done);
                    self.guard(Mem::Base(T0, 0), 8);
                    self.e().load(T0, Mem::Base(T0, 0));
                } else {
                    let guest = op.dst / 8;
                    match HOST[usize::from(guest)] {
                        Some(host) => self.e().mov(T0, host),
                        None => self.load_guest(T0, guest),
                    }
                }
                let site = self.site(index, 1, false);
                if insn.flow_control() == FlowControl::IndirectCall {
                    self.check_canonical(index);
                    let target = state(offset_of!(State, target));
                    self.e().store(T0, target);
                    self.push_return(index, next);
                    self.e().load(T0, target);
                    self.jump_to(false, None);
                } else {
                    self.poll_indirect(site);
                    self.jump_to(false, Some((site, 0)));
                }
                Some(Flow::Ended)
            }
            FlowControl::Return if matches!(insn.code(), Code::Retnq | Code::Retnq_imm16) => {
                self.pack();
                if let Some(top) = self.stack_span(index, 0, false, 0) {
                    self.guard(top, 8);
                    self.e().load(T0, top);
                } else {
                    self.e().mov(T0, STACK);
                    let done = self.e().label();
                    self.access(index, 8, false, 1, done);
                    self.e().bind(done);
                    self.guard(Mem::Base(T0, 0), 8);
                    self.e().load(T0, Mem::Base(T0, 0));
                }
                let (site, size) = (self.site(index, 1, false), 8 + op.imm as i32);
                self.e().lea(STACK, Mem::Base(STACK, size));
                // No loop is made of returns alone.
                self.jump_to(false, Some((site, -size)));
                Some(Flow::Ended)
            }
            _ if self.call_system(insn.code(), index, next) => Some(Flow::Ended),
            // An interrupt or exception, LOOP, far jumps.
            _ => Some(self.leave_to_interpreter(index, true)),
        }
    }

    /// An indirect jump may close a loop. If a request is pending it is done by the interpreter, which leaves.
    fn poll_indirect(&mut self, site: u64) {
        let from = self.look_at_requests();
        self.t.outlines.push(Outline::Last { from, site, make: None });
    }

    /// The address in RAX must be canonical, or the interpreter says why not.
    fn check_canonical(&mut self, index: usize) {
        let site = self.site(index, 1, false);
        let from = self.e().label();
        self.e().compare_canonical();
        self.e().jcc(cc::NE, from);
        self.t.outlines.push(Outline::Last { from, site, make: None });
    }

    /// Pushes the return address, which is `next` bytes from the page's start.
    fn push_return(&mut self, index: usize, next: i64) {
        if let Some(top) = self.stack_span(index, -8, true, 0) {
            self.e().load(T0, PAGE);
            self.e().lea(T0, Mem::Base(T0, next as i32));
            self.guard(top, 8);
            self.e().store(T0, top);
            self.e().lea(STACK, Mem::Base(STACK, -8));
            return;
        }
        self.e().lea(T0, Mem::Base(STACK, -8));
        let done = self.e().label();
        self.access(index, 8, true, 1, done);
        self.e().bind(done);
        self.e().load(T1, PAGE);
        self.e().lea(T1, Mem::Base(T1, next as i32));
        self.guard(Mem::Base(T0, 0), 8);
        self.e().store(T1, Mem::Base(T0, 0));
        self.e().lea(STACK, Mem::Base(STACK, -8));
    }
}
