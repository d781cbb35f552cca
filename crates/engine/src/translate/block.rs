//! From a decoded block to host code.

use std::mem::offset_of;

use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
};

use super::{
    State,
    emit::{Emitter, Label, Mem, T0, T1, cc},
    flags::{self, Flags, Recipe},
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
    signal::request,
    tlb::PAGE_MASK,
    uop::Uop,
    verify,
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
    /// The part that is worked on: its block, where it begins in the page, and where its instructions are among all.
    pub(super) block: *const Block,
    pub(super) start: i64,
    pub(super) first: usize,
    /// Where the part begins that follows it, if there is one.
    pub(super) follower: Option<i64>,
    /// The instruction's store may be scattered.
    pub(super) scatters: bool,
    /// The instruction is followed by one in its part that is run before the run loop looks at anything.
    pub(super) followed: bool,
    /// Where the first part begins, and whether the translation may be a loop.
    pub(super) entry: i64,
    pub(super) may_loop: bool,
    /// Offsets of this translation's two parts in the code buffer, and where the second one will run.
    places: [usize; 2],
    apart: u64,
    pub(super) flags: Flags,
    /// How to make the flags again, if that is possible.
    pub(super) recipe: Option<Recipe>,
    /// Flags in memory have the right carry, if nothing else.
    pub(super) carry: bool,
    /// What the vectors' state is known to allow.
    pub(super) vectors: u32,
    /// The x87 state is known to be in the host's registers.
    pub(super) x87: bool,
    counts: bool,
    /// Accesses are checked: see [`Work::guard`].
    pub(super) guards: bool,
    /// Where a translation that leads back to its start goes on.
    pub(super) head: Option<Head>,
    /// The state of flags with which it does, before there is a head.
    pub(super) again: Option<Flags>,
    pub(super) exits: Vec<Exit>,
    pub(super) plan: Plan,
    /// The accesses of blocks that are part of loops have windows, but for these ops of each part.
    pub(super) windows: &'a mut Windows,
    pub(super) plain: u64,
    /// See [`flags::in_the_way`].
    pub(super) in_the_way: Vec<bool>,
    /// See [`flags::dead`].
    pub(super) dead: Vec<bool>,
}

/// A block that a translation is made of: several, where hot code goes from one to the next.
struct Part<'a> {
    block: *const Block,
    start: i64,
    ops: &'a [Uop],
    instructions: Vec<Instruction>,
}

impl Part<'_> {
    /// Whether this block can come next. Where a jump leads is looked at when the jump is translated.
    fn may_lead_to(&self, block: *const Block) -> bool {
        let Some(last) = self.instructions.last() else { return false };
        // SAFETY: blocks live until the cache is cleared.
        let start = unsafe { (*block).gpa & PAGE_MASK } as i64;
        last.flow_control() != FlowControl::Next || start == self.start + last.next_ip() as i64
    }
}

/// Instructions of a translation that is made of several blocks, at most.
const LONGEST: usize = 160;
/// Loops of more instructions are not made twice.
const LONGEST_LOOP: usize = 100;

/// The start of a loop, inside of a translation.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub label: Label,
    pub recipe: Option<Recipe>,
    pub carry: bool,
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
    /// With the next part.
    Through,
    Ended,
}

impl Cpu {
    /// The instructions of a block, if they can be translated and are what was decoded.
    fn part<'a>(&mut self, block: *const Block) -> Option<Part<'a>> {
        // SAFETY: blocks live until the cache is cleared; this is the thread that owns it.
        let (gpa, count, second) = unsafe { ((*block).gpa, (*block).count, (*block).second_page) };
        let page = self.memory.host_page(gpa & !PAGE_MASK)?;
        let from = (gpa & PAGE_MASK) as usize;
        // As far as a block can reach: into a second page only with its only instruction.
        let mut bytes = [0u8; MAX_BLOCK * MAX_LENGTH];
        let here = bytes.len().min(4096 - from);
        // SAFETY: the rest of a page of guest RAM, or less.
        unsafe { std::ptr::copy_nonoverlapping(page.add(from), bytes.as_mut_ptr(), here) };
        let mut end = here;
        if let Some(second) = second {
            let page = self.memory.host_page(second & !PAGE_MASK)?;
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
        let mut same = true;
        for (i, (op, insn)) in ops.iter().zip(&instructions).enumerate() {
            let fused = i + 1 == ops.len() && ops.len() < instructions.len();
            same &= !insn.is_invalid() && u64::from(op.off) == insn.ip();
            same &= is_same(op, &self.lower(insn, op.off).op, fused);
        }
        same.then_some(Part { block, start: from as i64, ops, instructions })
    }

    /// The block and those that its translation goes on with.
    fn parts<'a>(&mut self, block: *const Block) -> Option<Vec<Part<'a>>> {
        let mut parts = vec![self.part(block)?];
        let mut count = parts[0].instructions.len();
        for next in self.cache.path(block).to_vec() {
            // SAFETY: blocks live until the cache is cleared, which forgets paths.
            let fits = unsafe {
                (*next).valid
                    && (*next).mode == (*block).mode
                    && ((*next).gpa ^ (*block).gpa) & !PAGE_MASK == 0
                    && (*next).second_page.is_none()
                    && (*block).second_page.is_none()
            };
            // Nor behind an end that leads elsewhere: an interrupt may have come between the two.
            if !fits || !parts.last().is_some_and(|last| last.may_lead_to(next)) {
                break;
            }
            let Some(part) = self.part(next).filter(|p| count + p.instructions.len() <= LONGEST) else { break };
            if self.verifier.is_some() && !part.instructions.iter().all(verify::is_pure) {
                break;
            }
            count += part.instructions.len();
            parts.push(part);
        }
        Some(parts)
    }

    /// Translates a block, if it is one that can be.
    pub(crate) fn translate_block(&mut self, block: *mut Block) -> bool {
        // SAFETY: blocks live until the cache is cleared; this is the thread that owns it.
        if unsafe { (*block).mode } & !mode::USER != mode::CODE64 {
            return false;
        }
        if self.cache.code.is_full() {
            // There is room again soon: see `Cpu::look_for_heat`.
            // SAFETY: as above.
            unsafe { (*block).runs_left = self.cache.promote };
            self.signal.note(request::HOT);
            return false;
        }
        let Some(parts) = self.parts(block) else { return false };
        // Where everything is translated at once, for tests, every second block counts as hot.
        if self.cache.promote == 1 && self.counters.translated.blocks & 1 != 0 {
            // SAFETY: as above.
            unsafe { ((*block).hot, (*block).loops) = (true, true) };
        }
        let started = std::time::Instant::now();
        let Some(mut t) = self.translator.take() else { return false };
        let thunks = self.cache.code.thunks;
        let places = self.cache.code.next();
        t.emitter.start(self.cache.code.address(places[0]) as u64);
        t.outlines.clear();
        let count: usize = parts.iter().map(|p| p.instructions.len()).sum();
        let mut work = Work {
            stubs: &mut self.stubs,
            t: &mut t,
            thunks,
            block,
            start: parts[0].start,
            first: 0,
            follower: None,
            scatters: false,
            followed: false,
            entry: parts[0].start,
            may_loop: count <= LONGEST_LOOP,
            places,
            apart: self.cache.code.address(places[1]) as u64,
            flags: Flags::IN_MEMORY,
            recipe: None,
            carry: true,
            vectors: 0,
            x87: false,
            counts: self.translated.counts,
            guards: self.translated.guards,
            head: None,
            again: None,
            exits: Vec::new(),
            plan: Plan::default(),
            windows: &mut self.tlb.windows,
            plain: 0,
            in_the_way: flags::in_the_way(parts.iter().flat_map(|p| &p.instructions)),
            dead: flags::dead(parts.iter().flat_map(|p| &p.instructions)),
        };
        // SAFETY: as above.
        if parts.iter().all(|p| unsafe { (*p.block).crossings } < span::CROSSINGS) {
            work.plan(parts.iter().flat_map(|p| &p.instructions));
        }
        work.block(&parts);
        let (often, rarely) = t.emitter.parts();
        let lengths = [often.len(), rarely.len()];
        let dead = places[1] + lengths[1];
        t.emitter.constant(T0, parts[0].start as u64);
        t.emitter.jmp_address(thunks.leave_at);
        t.emitter.resolve();
        #[cfg(test)]
        verify::tests::spoil(&mut t.emitter.code);
        let (often, rarely) = t.emitter.parts();
        let pushed = self.cache.code.push(often, rarely);
        self.translator = Some(t);
        let Some(at) = pushed else {
            self.tlb.windows.untranslated();
            return false;
        };
        self.tlb.windows.translated(block as u64);
        // SAFETY: as above.
        unsafe {
            (*block).entry = at as u32;
            (*block).dead = dead as u32;
            (*block).code = self.cache.code.address(at);
            self.cache.translated(&*block);
        }
        parts[1..].iter().for_each(|p| self.cache.note_head(p.block, block));
        if let Some(verifier) = &mut self.verifier {
            let parts = parts.iter().map(|p| (p.block, &p.instructions[..]));
            let code = [(places[0], lengths[0]), (places[1], lengths[1])];
            verifier.translated(parts, count <= LONGEST_LOOP, code, self.cache.clears);
        }
        let c = &mut self.counters.translated;
        c.blocks += 1;
        c.instructions += count as u64;
        // SAFETY: as above.
        c.hot += u64::from(unsafe { (*block).hot });
        c.paths += u64::from(parts.len() > 1);
        c.nanoseconds += started.elapsed().as_nanos() as u64;
        true
    }
}

/// Whether an instruction is one of integers alone: others may want x87 state or vectors, which may be for the interpreter to
/// bring.
fn is_of_integers(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    let plain = |f: &F| {
        matches!(f, F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::MULTIBYTENOP)
    };
    insn.encoding() == EncodingKind::Legacy && insn.cpuid_features().iter().all(plain)
}

/// Whether two ops stand for the same instruction; one that does the jump behind it too differs where that is.
fn is_same(a: &Uop, b: &Uop, fused: bool) -> bool {
    let operands = |op: &Uop| (op.imm, op.dst, op.src, op.base, op.index, op.scale, op.seg, op.len, op.asz);
    let rest = |op: &Uop| (op.handler as usize, op.disp, op.aux);
    operands(a) == operands(b) && (fused || rest(a) == rest(b))
}

impl Work<'_> {
    /// Where the next byte goes in the code buffer.
    pub(super) fn place(&self) -> usize {
        let (often, rarely) = self.t.emitter.parts();
        if self.t.emitter.is_apart() { self.places[1] + rarely.len() } else { self.places[0] + often.len() }
    }

    pub(super) fn e(&mut self) -> &mut Emitter {
        &mut self.t.emitter
    }

    fn block(&mut self, parts: &[Part<'_>]) {
        // SAFETY: the block is alive.
        if unsafe { (*self.block).second_page.is_some() } {
            self.check_second_page();
        }
        self.body(parts);
        if let Some(flags) = self.again.take() {
            // It leads back to its start: once more, with what is known at its end known at its start.
            let label = self.e().mark();
            let (recipe, carry) = (self.recipe, self.carry);
            self.head = Some(Head { label, recipe, carry, vectors: self.vectors, x87: self.x87 });
            self.flags = flags;
            self.poll(self.entry as i32);
            self.flags.host = false;
            self.body(parts);
        }
        let apart = self.apart;
        self.e().go_apart(apart);
        for exit in std::mem::take(&mut self.exits) {
            self.e().bind(exit.from);
            self.drop_held();
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
            // Not with ADD: within a path, the guest's flags may be the host's.
            let e = self.e();
            e.load(T0, counted);
            e.lea(T0, Mem::Base(T0, instructions as i32));
            e.store(T0, counted);
        }
    }

    fn body(&mut self, parts: &[Part<'_>]) {
        self.no_spans();
        self.first = 0;
        for (i, part) in parts.iter().enumerate() {
            self.block = part.block;
            self.start = part.start;
            self.follower = parts.get(i + 1).map(|p| p.start);
            // SAFETY: the block is alive.
            self.plain = unsafe { (*part.block).plain };
            self.count(part.instructions.len());
            match self.part(part.ops, &part.instructions) {
                Flow::Ended => return,
                Flow::On => {
                    let end = part.start + part.instructions.last().map_or(0, |i| i.next_ip() as i64);
                    if self.follower != Some(end) {
                        self.pack();
                        return self.go(end, end);
                    }
                }
                Flow::Through => {}
            }
            self.first += part.instructions.len();
        }
    }

    fn part(&mut self, ops: &[Uop], instructions: &[Instruction]) -> Flow {
        for (index, insn) in instructions.iter().enumerate() {
            // A comparison and the jump behind it may be one op.
            let fused = index >= ops.len();
            let op = &ops[index.min(ops.len() - 1)];
            let last = index + 1 == ops.len() && ops.len() < instructions.len();
            self.followed = instructions.get(index + 1).is_some_and(is_of_integers);
            let flow = self.instruction(insn, op, index.min(ops.len() - 1), last, fused);
            if flow != Flow::On {
                return flow;
            }
        }
        Flow::On
    }

    /// One instruction. `compares`: its op does the jump behind it too. `jumps`: it is that jump.
    fn instruction(&mut self, insn: &Instruction, op: &Uop, index: usize, compares: bool, jumps: bool) -> Flow {
        if jumps || insn.is_jcc_short_or_near() {
            return self.conditional_jump(insn, index);
        }
        if let Some(flow) = self.control(insn, op, index) {
            return flow;
        }
        let kernel = |work: &mut Self| work.privileged(insn, op, index) || work.repeated(insn, op, index);
        if self.special(insn, op, index) || kernel(self) || self.copy(insn, op, index) {
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
        let (loops, user) = unsafe { ((*self.block).loops, (*self.block).mode & mode::USER != 0) };
        if !loops || self.plain >> index & 1 != 0 {
            return None;
        }
        self.windows.add(bytes, table, write, user)
    }

    pub(super) fn site(&self, index: usize, bytes: u64, write: bool) -> u64 {
        let scatters = self.scatters;
        Site { block: self.block, index, bytes, write, scatters }
            .pack()
            .expect("blocks are in the lower half and short")
    }
}

/// The bits of guest registers: see [`flags::register_bit`].
pub(super) fn host_mask(guests: u16) -> u16 {
    (0..16).filter(|g| guests >> g & 1 != 0).fold(0, |all, g| all | flags::register_bit(g))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{BlockCache, Shape};

    /// What came by behind a block is not what follows it where an interrupt came between the two.
    #[test]
    fn a_path_goes_on_where_control_does() {
        let mut cache = BlockCache::new(1, true).unwrap();
        let mut at = |gpa| {
            let shape = Shape { mode: mode::CODE64, second_page: None, count: 1, abortable: 1 };
            cache.insert(gpa, shape, &[crate::decode::BLANK])
        };
        let (block, next, handler) = (at(0x1000), at(0x1003), at(0x1800));
        for (code, straight) in
            [(&[0x48, 0x89, 0xc2][..], true), (&[0x0f, 0x1f, 0x00], true), (&[0x90, 0x74, 0x10], false)]
        {
            let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
            let instructions: Vec<_> = decoder.iter().collect();
            let part = Part { block, start: 0, ops: &[], instructions };
            assert!(part.may_lead_to(next), "{code:x?}");
            assert_eq!(part.may_lead_to(handler), !straight, "{code:x?}");
        }
    }
}
