//! Random instructions, one behind the other.

mod forms;
mod hot;

use iced_x86::{
    Code, Encoder, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpCodeOperandKind as Kind, OpKind,
    Register,
};

use super::{FS_BASE, GS_BASE, Item, Pool, Sequence, What, undefined::undefined_behind};
use crate::random_code::{
    case::{CODE, DATA_END, Mode, WINDOW, WINDOW_BYTES},
    generate,
    random::Random,
};

struct Builder<'a> {
    pool: &'a Pool,
    random: &'a mut Random,
    info: InstructionInfoFactory,
    items: Vec<Item>,
    /// Registers whose values stay what they are: pointers, an index, counters; the stack pointer.
    reserved: u16,
    /// Those of them that no chance may change.
    counters: u16,
    pointers: Vec<(u32, u64)>,
    index: (u32, u64),
    undefined: u64,
    /// Neither the stack nor pointers come to harm.
    tame: bool,
    /// Jumps that wait for their target, and how many instructions from here it is.
    open: Vec<(usize, u64)>,
    /// See [`Sequence::loose`].
    loose: bool,
}

const RSP: u32 = 4;

pub(super) fn make(pool: &Pool, random: &mut Random, rip: u64, tame: bool) -> Sequence {
    let mut state = generate::random_state(Mode::Bits64, random);
    let mut memory = Box::new([0u8; WINDOW_BYTES]);
    generate::fill(&mut memory, random);
    let mut names: Vec<u32> = (0..16).filter(|r| *r != RSP).collect();
    for i in (1..names.len()).rev() {
        names.swap(i, random.below(i as u64 + 1) as usize);
    }
    let pointers: Vec<(u32, u64)> =
        names[..3].iter().map(|r| (*r, WINDOW + random.below(WINDOW_BYTES as u64))).collect();
    let index = (names[3], random.below(16));
    for (register, value) in pointers.iter().chain([&index]) {
        state.gpr[*register as usize] = *value;
    }
    state.gpr[RSP as usize] = match random.below(12) {
        0 => WINDOW + random.below(24),
        1 => WINDOW + 0x1000 + random.below(24),
        2 => DATA_END - random.below(24),
        3 => WINDOW + 0x1000,
        _ => WINDOW + 0x400 + random.below(0x180) * 8,
    };
    state.rip = rip;
    let loose = !tame && random.chance(30);
    let reserved = pointers.iter().chain([&index]).fold(1 << RSP, |all, (r, _)| all | 1u16 << r);
    let mut b = Builder {
        pool,
        random,
        info: InstructionInfoFactory::new(),
        items: Vec::new(),
        reserved,
        counters: 0,
        pointers,
        index,
        undefined: 0,
        tame,
        open: Vec::new(),
        loose,
    };
    if loose {
        b.rounds();
    }
    if tame {
        for (register, value) in b.pointers.clone().into_iter().chain([b.index]) {
            if let Ok(insn) = Instruction::with2(Code::Mov_r64_imm64, Register::RAX + register, value) {
                b.push(What::Plain(insn), 0, false);
            }
        }
    }
    let wanted = if loose { 1 } else { 2 + b.random.below(19) as usize };
    while b.items.len() < wanted {
        match b.random.below(40) {
            0..4 => b.jump(),
            4 => b.repeat(),
            5 | 6 => b.call(),
            7 => b.string(),
            8 => b.indirect_jump(),
            9 => b.modify(),
            _ => b.plain(true),
        }
    }
    b.land(true);
    if tame {
        b.finish();
    }
    Sequence { items: b.items, state, memory, loose }
}

impl Builder<'_> {
    fn push(&mut self, what: What, to: usize, keep: bool) {
        let item = Item { what, to, keep };
        let insn = *item.instruction();
        let control = insn.flow_control() != FlowControl::Next;
        let taken_along = self.loose && matches!(item.what, What::Jump(_)) && !insn.is_call_near();
        let behind = undefined_behind(&insn, self.undefined, self.loose);
        if behind.is_none() || (control && self.undefined != 0 && !taken_along) {
            // CMP r, r of any two registers: all flags are defined again.
            let (a, b) = (self.random.below(16) as u32, self.random.below(16) as u32);
            let compare = with2(Code::Cmp_rm64_r64, Register::RAX + a, Register::RAX + b);
            self.undefined = 0;
            self.items.push(Item { what: What::Plain(compare), to: 0, keep: false });
        }
        self.undefined = undefined_behind(&insn, self.undefined, self.loose).unwrap_or(0);
        self.items.push(item);
        self.land(false);
    }

    /// The end of a function: flags that are defined, now and then a word to the harness, and RET.
    fn finish(&mut self) {
        for _ in 0..self.random.below(2) {
            if let Ok(out) = Instruction::with2(Code::Out_imm8_AL, 0x80, Register::AL) {
                self.push(What::Plain(with2(Code::Cmp_rm64_r64, Register::RAX, Register::RCX)), 0, false);
                self.push(What::Plain(out), 0, false);
            }
        }
        self.push(What::Plain(with2(Code::Cmp_rm64_r64, Register::RDX, Register::RBX)), 0, false);
        let mut insn = Instruction::default();
        insn.set_code(Code::Retnq);
        self.push(What::Plain(insn), 0, false);
    }

    /// Gives jumps their targets: those whose time has come, or all.
    fn land(&mut self, all: bool) {
        let here = self.items.len();
        for (at, left) in std::mem::take(&mut self.open) {
            if all || left == 0 {
                self.items[at].to = here;
            } else {
                self.open.push((at, left - 1));
            }
        }
    }

    fn free_register(&mut self) -> u32 {
        loop {
            let register = self.random.below(16) as u32;
            if self.reserved >> register & 1 == 0 {
                return register;
            }
        }
    }

    fn plain(&mut self, stack: bool) {
        for _ in 0..50 {
            let code = self.pool.code(self.random);
            let Some(insn) = self.instruction(code) else { continue };
            let moves_stack = insn.is_stack_instruction();
            if moves_stack && (!stack || self.tame) {
                continue;
            }
            let used = self.info.info(&insn);
            let counters = self.counters;
            let mut counts = false;
            let writes = used.used_registers().iter().filter(|u| {
                let register = u.register();
                let read = matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
                let number = register.full_register().number() as u32;
                let implied = moves_stack && number == RSP && insn.op0_register().full_register() != Register::RSP;
                let written = register.is_gpr() && !read && !implied;
                counts |= written && counters >> number & 1 != 0;
                written && self.reserved >> number & 1 != 0
            });
            let writes = writes.count() != 0;
            if counts || (writes && (self.tame || !self.random.chance(2))) {
                continue;
            }
            if !encodes(&insn) {
                continue;
            }
            return self.push(What::Plain(insn), 0, false);
        }
    }

    fn instruction(&mut self, code: Code) -> Option<Instruction> {
        let op = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        let memory_form = self.random.chance(55);
        let mut used = Vec::new();
        for i in 0..op.op_count() {
            generate::operand(&mut insn, op, i, memory_form, Mode::Bits64, self.random, &mut used)?;
        }
        if insn.op_kinds().any(|k| k == OpKind::Memory) {
            let absolute = (0..op.op_count()).any(|i| op.op_kind(i) == Kind::mem_offs);
            self.addressing(&mut insn, absolute);
            if op.can_use_lock_prefix() && insn.op0_kind() == OpKind::Memory && self.random.chance(40) {
                insn.set_has_lock_prefix(true);
            }
        }
        Some(insn)
    }

    fn addressing(&mut self, insn: &mut Instruction, absolute: bool) {
        let target = generate::target(insn.memory_size(), self.random);
        let (base, value) = self.pointers[self.random.below(self.pointers.len() as u64) as usize];
        let (index, by) = self.index;
        let scale = 1u64 << self.random.below(4);
        insn.set_memory_displ_size(8);
        let mut set = |base: Register, index: Register, scale: u64, displacement: u64| {
            insn.set_memory_base(base);
            insn.set_memory_index(index);
            insn.set_memory_index_scale(scale as u32);
            insn.set_memory_displacement64(displacement);
        };
        let (none, wide) = (Register::None, Register::RAX);
        if absolute {
            return set(none, none, 1, target);
        }
        let forms = if self.tame { 17 } else { 20 };
        match self.random.below(forms) {
            0..9 => set(wide + base, none, 1, target.wrapping_sub(value)),
            9..13 => set(wide + base, wide + index, scale, target.wrapping_sub(value).wrapping_sub(by * scale)),
            13..15 => set(Register::RIP, none, 1, target),
            15 => set(none, none, 1, target),
            16 => set(none, wide + index, scale, target.wrapping_sub(by * scale)),
            17 | 18 => {
                let offset = self.random.below(40) as i64 * 8 - 64;
                set(Register::RSP, none, 1, offset as u64);
            }
            _ => {
                set(Register::EAX + base, none, 1, u64::from(target.wrapping_sub(value) as u32));
                insn.set_memory_displ_size(4);
            }
        }
        if self.tame && self.random.chance(12) {
            let fs = self.random.chance(50);
            insn.set_segment_prefix(if fs { Register::FS } else { Register::GS });
            let segment = if fs { FS_BASE } else { GS_BASE };
            insn.set_memory_displacement64(insn.memory_displacement64().wrapping_sub(segment));
        }
        let displacement = insn.memory_displacement64() as i64;
        let base = insn.memory_base();
        if base != Register::None && base != Register::RIP && (-128..128).contains(&displacement) {
            insn.set_memory_displ_size(if displacement == 0 { 0 } else { 1 });
        }
        if base == Register::None {
            insn.set_memory_displ_size(if displacement < 0 { 8 } else { 4 });
            insn.set_memory_displ_size(8);
        }
    }
}

fn with2(code: Code, a: Register, b: Register) -> Instruction {
    Instruction::with2(code, a, b).unwrap_or_default()
}

fn encodes(insn: &Instruction) -> bool {
    Encoder::new(64).encode(insn, CODE + 0x400).is_ok()
}
