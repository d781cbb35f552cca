//! Random sequences of instructions: what one leaves in registers, flags and memory the next one finds.
//!
//! Flags that the manual leaves undefined are followed through the sequence: no instruction reads them, and they are
//! not compared where the sequence ends. So everything else is exact, also where a fault ends it in the middle.

mod builder;
mod difference;
mod pool;
mod undefined;

use builder::make;
use iced_x86::{Encoder, FastFormatter, FlowControl, Instruction, Register};
pub use pool::Pool;
use undefined::undefined_behind;

use super::{
    case::{CODE, CODE_BYTES, Case, Mode, State, WINDOW_BYTES},
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
    /// Undefined flags may be taken along by direct jumps, and those of shifts are what the processor makes of them.
    loose: bool,
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
        let undefined = if self.loose { self.undefined_on_all_ways()? } else { self.undefined_in_order()? };
        Some(Assembled { code, offsets, undefined })
    }

    /// The undefined flags before each instruction and behind the last, where none are taken along by a jump.
    fn undefined_in_order(&self) -> Option<Vec<u64>> {
        let mut undefined = vec![0];
        for item in &self.items {
            let before = undefined[undefined.len() - 1];
            let insn = item.instruction();
            if insn.flow_control() != FlowControl::Next && before != 0 {
                return None;
            }
            undefined.push(undefined_behind(insn, before, false)?);
        }
        Some(undefined)
    }

    /// The same where direct jumps may take them along.
    fn undefined_on_all_ways(&self) -> Option<Vec<u64>> {
        let mut undefined = vec![0; self.items.len() + 1];
        loop {
            let last = undefined.clone();
            for (i, item) in self.items.iter().enumerate() {
                let insn = item.instruction();
                let behind = undefined_behind(insn, undefined[i], true)?;
                match insn.flow_control() {
                    FlowControl::Next => undefined[i + 1] |= behind,
                    FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                        undefined[item.to.min(self.items.len())] |= behind;
                        if insn.flow_control() == FlowControl::ConditionalBranch {
                            undefined[i + 1] |= behind;
                        }
                    }
                    _ if undefined[i] != 0 => return None,
                    _ => {}
                }
            }
            if undefined == last {
                return Some(undefined);
            }
        }
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

/// What the functions of [`function`] take the segments' bases to be.
pub const FS_BASE: u64 = 0x1230;
pub const GS_BASE: u64 = 0x4560u64.wrapping_neg();

pub fn sequence(pool: &Pool, random: &mut Random) -> Sequence {
    let rip = CODE + 0x10 + random.below(0xb00);
    make(pool, random, rip, false)
}

/// A function at `rip`: it sets its own pointers, leaves the stack alone, and returns with all flags defined.
pub fn function(pool: &Pool, random: &mut Random, rip: u64) -> Sequence {
    make(pool, random, rip, true)
}
