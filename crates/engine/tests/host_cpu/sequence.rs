//! Random sequences of instructions: what one leaves in registers, flags and memory the next one finds.
//!
//! Flags that the manual leaves undefined are followed through the sequence: no instruction reads them, and they are
//! not compared where the sequence ends. So everything else is exact, also where a fault ends it in the middle.

use iced_x86::{
    Code, CpuidFeature, Encoder, FastFormatter, FlowControl, Instruction, InstructionInfoFactory, MemorySize, Mnemonic,
    OpAccess, OpCodeOperandKind as Kind, OpKind, Register, RflagsBits,
};
use vireo_engine::native::FeatureSet;

use super::{
    case::{CODE, Case, DATA_END, Mode, Outcome, STATUS, State, WINDOW, WINDOW_BYTES},
    child::CODE_BYTES,
    generate,
    random::Random,
};

/// An instruction, or one that names another of the sequence.
#[derive(Clone)]
enum What {
    Plain(Instruction),
    /// A jump or call.
    Jump(Instruction),
    /// LEA of an instruction's address.
    Address(Instruction),
    /// Changes a byte of the immediate that an instruction ends with.
    Modify(Instruction, u64),
}

#[derive(Clone)]
struct Item {
    what: What,
    /// The other instruction's place in the sequence.
    to: usize,
    /// Bounds a loop.
    keep: bool,
}

#[derive(Clone)]
pub struct Sequence {
    items: Vec<Item>,
    state: State,
    memory: Box<[u8; WINDOW_BYTES]>,
}

/// Instructions to choose from.
pub struct Pool {
    common: Vec<Code>,
    integer: Vec<Code>,
    vector: Vec<Code>,
    other: Vec<Code>,
    jumps: Vec<(Code, Code)>,
}

const COMMON: [Mnemonic; 34] = [
    Mnemonic::Mov,
    Mnemonic::Add,
    Mnemonic::Or,
    Mnemonic::Adc,
    Mnemonic::Sbb,
    Mnemonic::And,
    Mnemonic::Sub,
    Mnemonic::Xor,
    Mnemonic::Cmp,
    Mnemonic::Test,
    Mnemonic::Inc,
    Mnemonic::Dec,
    Mnemonic::Neg,
    Mnemonic::Not,
    Mnemonic::Shl,
    Mnemonic::Shr,
    Mnemonic::Sar,
    Mnemonic::Rol,
    Mnemonic::Rcl,
    Mnemonic::Rcr,
    Mnemonic::Lea,
    Mnemonic::Movzx,
    Mnemonic::Movsx,
    Mnemonic::Movsxd,
    Mnemonic::Imul,
    Mnemonic::Xchg,
    Mnemonic::Xadd,
    Mnemonic::Cmpxchg,
    Mnemonic::Bts,
    Mnemonic::Bt,
    Mnemonic::Push,
    Mnemonic::Pop,
    Mnemonic::Clc,
    Mnemonic::Stc,
];

impl Pool {
    pub fn new(features: &FeatureSet) -> Self {
        let mut pool = Self { common: vec![], integer: vec![], vector: vec![], other: vec![], jumps: vec![] };
        let codes = generate::codes(Mode::Bits64, features);
        for &code in &codes {
            if code.flow_control() == FlowControl::ConditionalBranch && code.is_jcc_short() {
                pool.jumps.push((code, code.as_near_branch()));
            }
            if code.flow_control() != FlowControl::Next || is_left_out(code) {
                continue;
            }
            let op = code.op_code();
            let kinds: Vec<Kind> = (0..op.op_count()).map(|i| op.op_kind(i)).collect();
            let has = |names: &[&str]| kinds.iter().any(|k| names.iter().any(|n| format!("{k:?}").starts_with(n)));
            let x87 = code.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::MMX));
            if x87 || has(&["mm_", "st0", "sti"]) {
                pool.other.push(code);
            } else if has(&["xmm", "ymm"]) || code.cpuid_features().contains(&CpuidFeature::AVX) {
                pool.vector.push(code);
            } else {
                let conditional = code.condition_code() != iced_x86::ConditionCode::None;
                if COMMON.contains(&code.mnemonic()) || conditional {
                    pool.common.push(code);
                }
                pool.integer.push(code);
            }
        }
        pool
    }

    fn code(&self, random: &mut Random) -> Code {
        match random.below(20) {
            0..11 => random.pick(&self.common),
            11..14 => random.pick(&self.integer),
            14..19 => random.pick(&self.vector),
            _ => random.pick(&self.other),
        }
    }
}

/// Results that are the processor's own, depend on where the code is, are undefined, or need operands that chance does
/// not make. Each of them runs alone in the tests of single instructions.
fn is_left_out(code: Code) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    let gathers = (0..op.op_count()).any(|i| format!("{:?}", op.op_kind(i)).contains("vsib"));
    let name = format!("{code:?}");
    gathers
        || ["Fx", "Xsave", "Xrstor", "Fnstenv", "Fnsave", "Fldenv", "Frstor", "Vmaskmov", "Maskmov", "Rd", "Ud"]
            .iter()
            .any(|part| name.starts_with(part) || name.starts_with(&format!("VEX_{part}")))
        || matches!(code, Code::Shld_rm16_r16_imm8 | Code::Shld_rm16_r16_CL)
        || matches!(code, Code::Shrd_rm16_r16_imm8 | Code::Shrd_rm16_r16_CL)
        || matches!(
            code.mnemonic(),
            M::Enter | M::Leave | M::Xlatb | M::Ldmxcsr | M::Vldmxcsr | M::Monitor | M::Mwait | M::Clzero
        )
        || code.instruction_is_string()
}

trait IsString {
    fn instruction_is_string(self) -> bool;
}

impl IsString for Code {
    fn instruction_is_string(self) -> bool {
        let mut insn = Instruction::default();
        insn.set_code(self);
        insn.is_string_instruction()
    }
}

/// Status flags in RFLAGS' places.
fn bits(iced: u32) -> u64 {
    [
        (RflagsBits::OF, 0x800),
        (RflagsBits::SF, 0x80),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::AF, 0x10),
        (RflagsBits::CF, 0x01),
        (RflagsBits::PF, 0x04),
    ]
    .iter()
    .fold(0, |all, (from, to)| all | if iced & from != 0 { *to } else { 0 })
}

/// The undefined flags behind an instruction; `None` if it reads one that is undefined before it.
fn undefined_behind(insn: &Instruction, before: u64) -> Option<u64> {
    use Mnemonic as M;
    if bits(insn.rflags_read()) & before != 0 {
        return None;
    }
    let written = bits(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
    let undefined = bits(insn.rflags_undefined());
    let rotate = matches!(insn.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
    let shift = matches!(insn.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd);
    if insn.is_string_instruction() {
        return Some(before);
    }
    if !rotate && !shift {
        return Some(before & !written | undefined);
    }
    let size = match insn.op0_register().size() {
        0 => insn.memory_size().size(),
        bytes => bytes,
    };
    let narrow = if size < 4 && shift { 1 } else { 0 };
    let unknown = if rotate { 0x800 } else { 0x810 | narrow };
    let Ok(count) = insn.try_immediate(insn.op_count() - 1) else {
        return Some(before | unknown);
    };
    Some(match (count as u32 & if size == 8 { 63 } else { 31 }, rotate) {
        (0, _) => before,
        (1, true) => before & !0x801,
        (1, false) => before & !written | 0x10,
        (_, true) => before & !1 | 0x800,
        (_, false) => before & !written & !unknown | unknown,
    })
}

impl Item {
    fn instruction(&self) -> &Instruction {
        match &self.what {
            What::Plain(insn) | What::Jump(insn) | What::Address(insn) | What::Modify(insn, _) => insn,
        }
    }
}

/// A sequence as bytes.
pub struct Assembled {
    pub code: Vec<u8>,
    offsets: Vec<u64>,
    /// Undefined flags before each instruction and behind the last.
    undefined: Vec<u64>,
}

impl Sequence {
    /// `None` if something cannot be encoded, or if undefined flags would be read.
    pub fn assemble(&self) -> Option<Assembled> {
        let mut offsets = vec![0u64; self.items.len() + 1];
        let mut code = Vec::new();
        // The first pass finds the places: lengths do not depend on them.
        for _ in 0..2 {
            code.clear();
            let known = offsets.clone();
            for (i, item) in self.items.iter().enumerate() {
                offsets[i] = code.len() as u64;
                let mut insn = *item.instruction();
                let at = self.state.rip + code.len() as u64;
                let to = self.state.rip + known[item.to.min(self.items.len())];
                let first = known[self.items.len()] == 0;
                let to = if first { at } else { to };
                match item.what {
                    What::Plain(_) => {}
                    What::Jump(_) => insn.set_near_branch64(to),
                    What::Address(_) => insn.set_memory_displacement64(to),
                    What::Modify(_, byte) => {
                        let end = known[(item.to + 1).min(self.items.len())];
                        let place = (self.state.rip + end + byte).wrapping_sub(4);
                        insn.set_memory_displacement64(if first { at } else { place });
                    }
                }
                let mut encoder = Encoder::new(64);
                encoder.encode(&insn, at).ok()?;
                code.extend(encoder.take_buffer());
            }
            offsets[self.items.len()] = code.len() as u64;
        }
        if code.len() > CODE_BYTES - 16 || (self.state.rip & 0xfff) + code.len() as u64 > 0xff0 {
            return None;
        }
        let mut undefined = vec![0];
        for item in &self.items {
            let before = undefined[undefined.len() - 1];
            let insn = item.instruction();
            if insn.flow_control() != FlowControl::Next && before != 0 {
                return None;
            }
            undefined.push(undefined_behind(insn, before)?);
        }
        Some(Assembled { code, offsets, undefined })
    }

    pub fn case(&self, assembled: &Assembled) -> Case {
        Case {
            mode: Mode::Bits64,
            instruction: Instruction::default(),
            code: assembled.code.clone(),
            state: self.state,
            memory: self.memory.clone(),
        }
    }

    /// The sequences that lack an instruction of this one.
    pub fn shorter(&self) -> Vec<Self> {
        let backward =
            self.items.iter().enumerate().any(|(i, item)| item.to < i && !matches!(item.what, What::Plain(_)));
        (0..self.items.len())
            .filter(|&i| !(backward && self.items[i].keep))
            .map(|gone| {
                let mut shorter = self.clone();
                shorter.items.remove(gone);
                for item in &mut shorter.items {
                    item.to -= usize::from(item.to > gone);
                }
                shorter
            })
            .collect()
    }

    pub fn describe(&self) -> String {
        let Some(assembled) = self.assemble() else { return "not encodable".to_owned() };
        let mut text =
            format!("rip {:#x}, rflags {:#x}, mxcsr {:#x}\n", self.state.rip, self.state.rflags, self.state.mxcsr());
        for (i, value) in self.state.gpr.iter().enumerate() {
            text += &format!("    {:?} {value:#x}\n", Register::RAX + i as u32);
        }
        let mut decoder =
            iced_x86::Decoder::with_ip(64, &assembled.code, self.state.rip, iced_x86::DecoderOptions::NONE);
        let mut formatter = FastFormatter::new();
        while decoder.can_decode() {
            let insn = decoder.decode();
            let mut line = String::new();
            formatter.format(&insn, &mut line);
            let from = (insn.ip() - self.state.rip) as usize;
            text += &format!("  {:#x}  {line}    {:02x?}\n", insn.ip(), &assembled.code[from..from + insn.len()]);
        }
        text
    }
}

/// The first difference between two outcomes of a sequence, in words.
pub fn difference(case: &Case, assembled: &Assembled, a: &Outcome, b: &Outcome) -> Option<String> {
    let (x, y) = (&a.state, &b.state);
    // What a changed return address leads into is no instruction of ours.
    let place = x.rip.wrapping_sub(case.state.rip);
    if place < assembled.code.len() as u64 && !assembled.offsets.contains(&place) {
        return None;
    }
    if a.vector != b.vector || x.rip != y.rip {
        return Some(format!("vector {:?} at {:#x}, {:?} at {:#x}", a.vector, x.rip, b.vector, y.rip));
    }
    for i in 0..16 {
        if x.gpr[i] != y.gpr[i] {
            return Some(format!("{:?}: {:#x}, {:#x}", Register::RAX + i as u32, x.gpr[i], y.gpr[i]));
        }
    }
    // A jump to nowhere is not followed that closely.
    let undefined = assembled.offsets.iter().position(|o| *o == place).map_or(STATUS, |i| assembled.undefined[i]);
    let flags = (x.rflags ^ y.rflags) & STATUS & !undefined;
    if flags != 0 {
        return Some(format!("flags {flags:#x}: {:#x}, {:#x}", x.rflags & STATUS, y.rflags & STATUS));
    }
    if (x.rflags ^ y.rflags) & 0x400 != 0 {
        return Some("the direction flag".to_owned());
    }
    if let (Some((error_a, address_a)), Some((error_b, address_b))) = (a.page_fault, b.page_fault) {
        // Elsewhere the host has mappings of its own.
        let ours = (CODE - 0x10_0000..DATA_END + 0x10_0000).contains(&address_a);
        let mask = if ours { 0x1f } else { 0x1e };
        if address_a != address_b || (error_a ^ error_b) & mask != 0 {
            return Some(format!("page fault {error_a:#x} at {address_a:#x}, {error_b:#x} at {address_b:#x}"));
        }
    }
    for i in 0..16 {
        if x.vector(i) != y.vector(i) {
            return Some(format!("ymm{i}: {:x?}, {:x?}", x.vector(i), y.vector(i)));
        }
    }
    if x.mxcsr() != y.mxcsr() {
        return Some(format!("mxcsr: {:#x}, {:#x}", x.mxcsr(), y.mxcsr()));
    }
    for (name, at) in [("fcw", 0), ("fsw", 2), ("ftw", 4)] {
        if x.fx16(at) != y.fx16(at) {
            return Some(format!("{name}: {:#x}, {:#x}", x.fx16(at), y.fx16(at)));
        }
    }
    for i in 0..8 {
        let at = 32 + i * 16..42 + i * 16;
        if x.fx[at.clone()] != y.fx[at.clone()] {
            return Some(format!("st{i}: {:02x?}, {:02x?}", &x.fx[at.clone()], &y.fx[at]));
        }
    }
    let at = (0..WINDOW_BYTES).find(|&i| a.memory[i] != b.memory[i])?;
    Some(format!("memory at {:#x}: {:#x}, {:#x}", WINDOW + at as u64, a.memory[at], b.memory[at]))
}

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
}

const RSP: u32 = 4;
/// What the functions of [`function`] take the segments' bases to be.
#[allow(dead_code)]
pub const FS_BASE: u64 = 0x1230;
#[allow(dead_code)]
pub const GS_BASE: u64 = 0x4560u64.wrapping_neg();

pub fn sequence(pool: &Pool, random: &mut Random) -> Sequence {
    let rip = CODE + 0x10 + random.below(0xb00);
    make(pool, random, rip, false)
}

/// A function at `rip`: it sets its own pointers, leaves the stack alone, and returns with all flags defined.
#[allow(dead_code)]
pub fn function(pool: &Pool, random: &mut Random, rip: u64) -> Sequence {
    make(pool, random, rip, true)
}

fn make(pool: &Pool, random: &mut Random, rip: u64, tame: bool) -> Sequence {
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
    };
    if tame {
        for (register, value) in b.pointers.clone().into_iter().chain([b.index]) {
            if let Ok(insn) = Instruction::with2(Code::Mov_r64_imm64, Register::RAX + register, value) {
                b.push(What::Plain(insn), 0, false);
            }
        }
    }
    let wanted = 2 + b.random.below(19) as usize;
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
    Sequence { items: b.items, state, memory }
}

impl Builder<'_> {
    fn push(&mut self, what: What, to: usize, keep: bool) {
        let item = Item { what, to, keep };
        let insn = *item.instruction();
        let control = insn.flow_control() != FlowControl::Next;
        let behind = undefined_behind(&insn, self.undefined);
        if behind.is_none() || (control && self.undefined != 0) {
            // CMP r, r of any two registers: all flags are defined again.
            let (a, b) = (self.random.below(16) as u32, self.random.below(16) as u32);
            let compare = with2(Code::Cmp_rm64_r64, Register::RAX + a, Register::RAX + b);
            self.undefined = 0;
            self.items.push(Item { what: What::Plain(compare), to: 0, keep: false });
        }
        self.undefined = undefined_behind(&insn, self.undefined).unwrap_or(0);
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

    fn branch(&mut self, code: Code, to: usize, keep: bool) {
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_op0_kind(OpKind::NearBranch64);
        self.push(What::Jump(insn), to, keep);
    }

    /// Forward, over a few instructions.
    fn jump(&mut self) {
        let (short, near) = self.random.pick(&self.pool.jumps);
        let code = match self.random.below(12) {
            0 => Code::Jmp_rel8_64,
            1 => Code::Jmp_rel32_64,
            2 => Code::Jrcxz_rel8_64,
            3..7 => near,
            _ => short,
        };
        let over = self.random.below(5);
        self.branch(code, usize::MAX, false);
        self.open.push((self.items.len() - 1, over));
    }

    fn body(&mut self, stack: bool) {
        for _ in 0..1 + self.random.below(5) {
            match self.random.below(12) {
                0 => self.jump(),
                1 => self.modify(),
                _ => self.plain(stack),
            }
        }
        self.land(true);
    }

    /// A loop of a few rounds.
    fn repeat(&mut self) {
        self.land(true);
        let counter = self.free_register();
        self.reserved |= 1 << counter;
        self.counters |= 1 << counter;
        let rounds = 1 + self.random.below(30);
        let Ok(set) = Instruction::with2(Code::Mov_r32_imm32, Register::EAX + counter, rounds as u32) else { return };
        self.push(What::Plain(set), 0, true);
        let head = self.items.len();
        self.body(false);
        let Ok(count) = Instruction::with2(Code::Sub_rm32_imm8, Register::EAX + counter, 1) else { return };
        self.push(What::Plain(count), 0, true);
        let code = if self.random.chance(50) { Code::Jne_rel8_64 } else { Code::Jne_rel32_64 };
        self.branch(code, head, true);
        self.reserved &= !(1 << counter);
        self.counters &= !(1 << counter);
    }

    /// CALL f; JMP over; f: …; RET; over:
    fn call(&mut self) {
        self.land(true);
        let mut calls = Vec::new();
        let twice = self.random.chance(40);
        for _ in 0..1 + u64::from(twice) {
            if self.random.chance(50) {
                self.branch(Code::Call_rel32_64, usize::MAX, false);
                calls.push(self.items.len() - 1);
            } else {
                let register = self.free_register();
                self.address(register);
                calls.push(self.items.len() - 1);
                if let Ok(insn) = Instruction::with1(Code::Call_rm64, Register::RAX + register) {
                    self.push(What::Plain(insn), 0, false);
                }
            }
        }
        self.branch(Code::Jmp_rel32_64, usize::MAX, false);
        let over = self.items.len() - 1;
        let target = self.items.len();
        for call in calls {
            self.items[call].to = target;
        }
        self.body(false);
        if self.undefined != 0 {
            self.push(What::Plain(with2(Code::Test_rm64_r64, Register::RAX, Register::RCX)), 0, false);
        }
        let mut insn = Instruction::default();
        insn.set_code(Code::Retnq);
        self.push(What::Plain(insn), 0, false);
        self.items[over].to = self.items.len();
    }

    fn address(&mut self, register: u32) {
        let mut insn = Instruction::default();
        insn.set_code(Code::Lea_r64_m);
        insn.set_op0_kind(OpKind::Register);
        insn.set_op0_register(Register::RAX + register);
        insn.set_op1_kind(OpKind::Memory);
        insn.set_memory_base(Register::RIP);
        insn.set_memory_displ_size(8);
        self.push(What::Address(insn), 0, false);
    }

    /// Through a register or memory, to the next instruction but some.
    fn indirect_jump(&mut self) {
        self.land(true);
        let register = self.free_register();
        self.address(register);
        let from = self.items.len() - 1;
        let (base, value) = self.pointers[0];
        let mut memory = Instruction::default();
        memory.set_memory_base(Register::RAX + base);
        memory.set_memory_displ_size(8);
        memory.set_memory_displacement64((WINDOW + self.random.below(0x3fc) * 8).wrapping_sub(value));
        if self.random.chance(50) {
            let mut store = memory;
            store.set_code(Code::Mov_rm64_r64);
            store.set_op0_kind(OpKind::Memory);
            store.set_op1_kind(OpKind::Register);
            store.set_op1_register(Register::RAX + register);
            self.push(What::Plain(store), 0, false);
            memory.set_code(Code::Jmp_rm64);
            memory.set_op0_kind(OpKind::Memory);
            self.push(What::Plain(memory), 0, false);
        } else if let Ok(insn) = Instruction::with1(Code::Jmp_rm64, Register::RAX + register) {
            self.push(What::Plain(insn), 0, false);
        }
        for _ in 0..self.random.below(3) {
            self.plain(true);
        }
        self.items[from].to = self.items.len();
    }

    /// Changes the constant of an instruction behind it.
    fn modify(&mut self) {
        let insn = Instruction::with2(
            self.random.pick(&[Code::Mov_rm8_imm8, Code::Add_rm8_imm8, Code::Xor_rm8_imm8]),
            iced_x86::MemoryOperand::with_base_displ(Register::RIP, 0x4000_0000),
            self.random.below(256) as u32,
        );
        let Ok(mut insn) = insn else { return };
        insn.set_memory_displ_size(8);
        let byte = self.random.below(4);
        self.push(What::Modify(insn, byte), 0, false);
        let from = self.items.len() - 1;
        for _ in 0..self.random.below(4) {
            self.plain(false);
        }
        let register = self.free_register();
        let code = self.random.pick(&[Code::Mov_r32_imm32, Code::Mov_rm64_imm32, Code::Add_rm32_imm32]);
        let insn = if code == Code::Mov_rm64_imm32 {
            Instruction::with2(code, Register::RAX + register, self.random.next() as i32)
        } else {
            Instruction::with2(code, Register::EAX + register, self.random.next() as u32)
        };
        if let Ok(insn) = insn {
            self.push(What::Plain(insn), 0, false);
        }
        self.items[from].to = self.items.len() - 1;
    }

    /// A string instruction after its operands.
    fn string(&mut self) {
        self.land(true);
        let reserved = self.reserved >> 1 & 1 | self.reserved >> 6 & 3;
        if reserved != 0 {
            return;
        }
        for register in [Register::RSI, Register::RDI] {
            let place = generate::target(MemorySize::UInt64, self.random);
            if let Ok(insn) = Instruction::with2(Code::Mov_r32_imm32, register.full_register32(), place as u32) {
                self.push(What::Plain(insn), 0, false);
            }
        }
        if let Ok(insn) = Instruction::with2(Code::Mov_r32_imm32, Register::ECX, self.random.below(20) as u32) {
            self.push(What::Plain(insn), 0, false);
        }
        let code = self.random.pick(&[
            Code::Movsb_m8_m8,
            Code::Movsq_m64_m64,
            Code::Stosb_m8_AL,
            Code::Stosq_m64_RAX,
            Code::Lodsb_AL_m8,
            Code::Lodsd_EAX_m32,
            Code::Cmpsb_m8_m8,
            Code::Scasw_AX_m16,
        ]);
        let op = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        for i in 0..op.op_count() {
            let mut used = Vec::new();
            if generate::operand(&mut insn, op, i, true, Mode::Bits64, self.random, &mut used).is_none() {
                return;
            }
        }
        insn.set_has_rep_prefix(self.random.chance(70));
        // RAX, which LODS writes, may be a pointer.
        if encodes(&insn) {
            self.push(What::Plain(insn), 0, false);
        }
    }
}

fn with2(code: Code, a: Register, b: Register) -> Instruction {
    Instruction::with2(code, a, b).unwrap_or_default()
}

fn encodes(insn: &Instruction) -> bool {
    Encoder::new(64).encode(insn, CODE + 0x400).is_ok()
}
