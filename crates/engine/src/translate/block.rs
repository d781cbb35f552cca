//! From a decoded block to host code.

use std::mem::offset_of;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory};

use super::{
    HOST, State,
    emit::{Emitter, Label, Mem, T0, T1, cc},
    flags::{Flags, Recipe},
    leave::Site,
    outline::Outline,
    span::{self, Plan},
    thunks::{Thunks, state},
    window::Windows,
};
use crate::{
    cache::{Block, MAX_BLOCK},
    cpu::{Cpu, mode},
    decode::MAX_LENGTH,
    native::{FeatureSet, StubCache},
    tlb::PAGE_MASK,
    uop::Uop,
};

/// What is kept from one translation to the next.
pub struct Translator {
    pub(super) emitter: Emitter,
    pub(super) info: InstructionInfoFactory,
    pub(super) encoder: Encoder,
    pub(super) outlines: Vec<Outline>,
    pub(super) bmi2: bool,
}

impl Translator {
    pub fn new() -> Self {
        Self {
            emitter: Emitter::default(),
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
            outlines: Vec::new(),
            bmi2: FeatureSet::host().contains_all(&[CpuidFeature::BMI2]),
        }
    }
}

pub(super) struct Work<'a> {
    pub(super) stubs: &'a mut StubCache,
    pub(super) t: &'a mut Translator,
    pub(super) thunks: Thunks,
    pub(super) block: *const Block,
    /// Offset of the block in its page.
    pub(super) start: i64,
    /// Offset of this translation in the code buffer.
    pub(super) at: usize,
    pub(super) flags: Flags,
    /// How to make the flags again, if that is possible.
    pub(super) recipe: Option<Recipe>,
    /// What the vectors' state is known to allow.
    pub(super) vectors: u32,
    /// The x87 state is known to be in the host's registers.
    pub(super) x87: bool,
    counts: bool,
    /// Where a block that leads back to itself goes on.
    pub(super) head: Option<Head>,
    /// The state of flags with which it does, before there is a head.
    pub(super) again: Option<Flags>,
    pub(super) exits: Vec<Exit>,
    pub(super) plan: Plan,
    /// The windows of a hot block, but for these ops.
    pub(super) windows: Option<&'a mut Windows>,
    pub(super) plain: u64,
}

/// The start of a loop, inside of a translation.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub label: Label,
    pub recipe: Option<Recipe>,
    pub vectors: u32,
    pub x87: bool,
}

/// A way out of the block that is made behind it.
pub(super) struct Exit {
    pub from: Label,
    pub to: i64,
    pub here: i64,
    pub flags: Flags,
    pub recipe: Option<Recipe>,
}

/// Whether the translation goes on behind an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    On,
    Ended,
}

impl Cpu {
    /// Translates a block, if it is one that can be.
    pub(crate) fn translate_block(&mut self, block: *mut Block) -> bool {
        // SAFETY: blocks live until the cache is cleared; this is the thread that owns it.
        let (gpa, count, shape, second) =
            unsafe { ((*block).gpa, (*block).count, (*block).mode, (*block).second_page) };
        if shape & !mode::USER != mode::CODE64 {
            return false;
        }
        if self.cache.code.is_full() {
            // There is room again when the next new block was decoded.
            // SAFETY: as above.
            unsafe { (*block).runs_left = self.cache.promote };
            return false;
        }
        let Some(page) = self.memory.host_page(gpa & !PAGE_MASK) else { return false };
        let from = (gpa & PAGE_MASK) as usize;
        // As far as a block can reach: into a second page only with its only instruction.
        let mut bytes = [0u8; MAX_BLOCK * MAX_LENGTH];
        let here = bytes.len().min(4096 - from);
        // SAFETY: the rest of a page of guest RAM, or less.
        unsafe { std::ptr::copy_nonoverlapping(page.add(from), bytes.as_mut_ptr(), here) };
        let mut end = here;
        if let Some(second) = second {
            let Some(page) = self.memory.host_page(second & !PAGE_MASK) else { return false };
            let there = MAX_LENGTH.saturating_sub(here);
            // SAFETY: the start of another. An instruction that crosses into it begins less than its length before.
            unsafe { std::ptr::copy_nonoverlapping(page, bytes[here..].as_mut_ptr(), there) };
            end += there;
        }
        let mut decoder = Decoder::with_ip(64, &bytes[..end], 0, DecoderOptions::NONE);
        let instructions: Vec<Instruction> = (0..count).map(|_| decoder.decode()).collect();
        // SAFETY: as above.
        let ops = unsafe { std::slice::from_raw_parts((*block).ops, (*block).abortable as usize) };
        // Another vCPU may have written here a moment ago, and the block is about to go: nothing is made of what was
        // decoded from other bytes.
        let same = ops.iter().zip(&instructions).enumerate().all(|(i, (op, insn))| {
            let fused = i + 1 == ops.len() && ops.len() < instructions.len();
            !insn.is_invalid() && u64::from(op.off) == insn.ip() && is_same(op, &self.lower(insn, op.off).op, fused)
        });
        if !same {
            return false;
        }
        // Where everything is translated at once, for tests, every second block counts as hot.
        if self.cache.promote == 1 && self.counters.translated.blocks & 1 != 0 {
            // SAFETY: as above.
            unsafe { (*block).hot = true };
        }
        let started = std::time::Instant::now();
        let Some(mut t) = self.translator.take() else { return false };
        let thunks = self.cache.code.thunks;
        t.emitter.start(self.cache.code.next_address());
        t.outlines.clear();
        let mut work = Work {
            stubs: &mut self.stubs,
            t: &mut t,
            thunks,
            block,
            start: from as i64,
            at: self.cache.code.next_offset(),
            flags: Flags::IN_MEMORY,
            recipe: None,
            vectors: 0,
            x87: false,
            counts: self.translated.counts,
            head: None,
            again: None,
            exits: Vec::new(),
            plan: Plan::default(),
            // SAFETY: as above.
            windows: unsafe { (*block).hot }.then_some(&mut self.tlb.windows),
            // SAFETY: as above.
            plain: unsafe { (*block).plain },
        };
        // SAFETY: as above.
        if unsafe { (*block).crossings } < span::CROSSINGS {
            work.plan(&instructions);
        }
        work.block(ops, &instructions);
        let dead = t.emitter.here();
        t.emitter.constant(T0, from as u64);
        t.emitter.jmp_address(thunks.leave_at);
        t.emitter.resolve();
        let pushed = self.cache.code.push(&t.emitter.code);
        self.translator = Some(t);
        let Some(at) = pushed else { return false };
        // SAFETY: as above.
        unsafe {
            (*block).entry = at as u32;
            (*block).dead = (at + dead) as u32;
            (*block).code = self.cache.code.address(at);
            self.cache.translated(&*block);
        }
        let c = &mut self.counters.translated;
        c.blocks += 1;
        c.instructions += u64::from(count);
        c.nanoseconds += started.elapsed().as_nanos() as u64;
        true
    }
}

/// Whether two ops stand for the same instruction; one that does the jump behind it too differs where that is.
fn is_same(a: &Uop, b: &Uop, fused: bool) -> bool {
    let operands = |op: &Uop| (op.imm, op.dst, op.src, op.base, op.index, op.scale, op.seg, op.len, op.asz);
    let rest = |op: &Uop| (op.handler as usize, op.disp, op.aux);
    operands(a) == operands(b) && (fused || rest(a) == rest(b))
}

impl Work<'_> {
    pub(super) fn e(&mut self) -> &mut Emitter {
        &mut self.t.emitter
    }

    fn block(&mut self, ops: &[Uop], instructions: &[Instruction]) {
        // SAFETY: the block is alive.
        if unsafe { (*self.block).second_page.is_some() } {
            self.check_second_page();
        }
        self.count(instructions.len());
        self.body(ops, instructions);
        if let Some(flags) = self.again.take() {
            // The block leads back to itself: once more, with what is known at its end known at its start.
            let label = self.e().mark();
            self.head = Some(Head { label, recipe: self.recipe, vectors: self.vectors, x87: self.x87 });
            self.flags = flags;
            self.poll(self.start as i32);
            self.flags.host = false;
            self.count(instructions.len());
            self.body(ops, instructions);
        }
        for exit in std::mem::take(&mut self.exits) {
            self.e().bind(exit.from);
            self.flags_set(exit.flags, exit.recipe);
            self.pack();
            self.go(exit.to, exit.here);
        }
        self.outlines();
    }

    /// An instruction that crosses pages runs where the second page was looked at since translations of code changed.
    fn check_second_page(&mut self) {
        let (block, start, leave) = (self.block as u64, self.start as u64, self.thunks.leave_at);
        let e = &mut self.t.emitter;
        let checked = e.label();
        e.load(T0, state(offset_of!(State, generation)));
        e.constant(T1, block);
        e.rm(true, &[0x3b], T0, Mem::Base(T1, offset_of!(Block, checked) as i32));
        e.jcc(cc::E, checked);
        e.constant(T0, start);
        e.jmp_address(leave);
        e.bind(checked);
    }

    fn count(&mut self, instructions: usize) {
        if self.counts {
            let counted = offset_of!(crate::cpu::Counters, instructions);
            let counted = Mem::State(offset_of!(Cpu, counters) + counted);
            self.e().group1_mem(true, 0, counted, instructions as i32);
        }
    }

    fn body(&mut self, ops: &[Uop], instructions: &[Instruction]) {
        self.no_spans();
        let mut flow = Flow::On;
        for (index, insn) in instructions.iter().enumerate() {
            // A comparison and the jump behind it may be one op.
            let fused = index >= ops.len();
            let op = &ops[index.min(ops.len() - 1)];
            let last = index + 1 == ops.len() && ops.len() < instructions.len();
            flow = self.instruction(insn, op, index.min(ops.len() - 1), last, fused);
            if flow == Flow::Ended {
                break;
            }
        }
        if flow == Flow::On {
            let end = instructions.last().map_or(0, |i| i.next_ip() as i64);
            self.pack();
            self.go(self.start + end, self.start + end);
        }
    }

    /// One instruction. `compares`: its op does the jump behind it too. `jumps`: it is that jump.
    fn instruction(&mut self, insn: &Instruction, op: &Uop, index: usize, compares: bool, jumps: bool) -> Flow {
        if jumps || insn.is_jcc_short_or_near() {
            return self.conditional_jump(insn, index);
        }
        if let Some(flow) = self.control(insn, op, index) {
            return flow;
        }
        if self.special(insn, op, index) || self.copy(insn, op, index) {
            return Flow::On;
        }
        self.no_spans();
        self.leave_to_interpreter(index, compares)
    }

    pub(super) fn leave_to_interpreter(&mut self, index: usize, ends: bool) -> Flow {
        self.pack();
        let site = self.site(index, 1, false);
        self.e().constant(T1, site);
        if ends {
            let last = self.thunks.last;
            self.e().jmp_address(last);
            return Flow::Ended;
        }
        let interpret = self.thunks.interpret;
        self.e().call_address(interpret);
        self.flags_set(Flags::IN_MEMORY, None);
        self.vectors = 0;
        self.x87 = false;
        Flow::On
    }

    /// A window of its own for the memory access of an op, if it is to have one.
    pub(super) fn window(&mut self, index: usize, bytes: u64, write: bool) -> Option<u64> {
        let table = self.table(write);
        // SAFETY: the block is alive.
        let user = unsafe { (*self.block).mode } & mode::USER != 0;
        let wanted = self.plain >> index & 1 == 0;
        self.windows.as_mut().filter(|_| wanted)?.add(bytes, table, write, user)
    }

    pub(super) fn site(&self, index: usize, bytes: u64, write: bool) -> u64 {
        Site { block: self.block, index, bytes, write }.pack().expect("blocks are in the lower half and short")
    }
}

/// The host registers of guest registers.
pub(super) fn host_mask(guests: u16) -> u16 {
    (0..16).filter(|g| guests >> g & 1 != 0).filter_map(|g| HOST[g as usize]).fold(0, |all, host| all | 1 << host)
}
