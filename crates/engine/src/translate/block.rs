//! From a decoded block to host code.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, InstructionInfoFactory, OpKind, Register,
};

use super::{
    ACCUMULATOR, HOST, STACK,
    emit::{Emitter, Label, Mem, T0, T1, cc},
    flags::{self, Flags, Recipe},
    leave::Site,
    operand::{self, Carried, Copyable, Touch},
    span::{self, Plan, Reach},
    thunks::{PAGE, Thunks, VECTORS, gpr, state},
    vectors,
};
use crate::{
    cache::Block,
    cpu::{Cpu, mode},
    decode::MAX_LENGTH,
    native::{Access, Environment, FeatureClass, FeatureSet, Fpu, Native, Stub, StubCache},
    regs::slot,
    tlb::{CodeSet, DataSet, ENTRIES, ENTRY_SHIFT, Entry, JUMP_ENTRIES, JUMP_HASH_SHIFT, Jump, PAGE_MASK},
    uop::{FLAT, Uop, address},
};

/// What is kept from one translation to the next.
pub struct Translator {
    emitter: Emitter,
    pub(super) info: InstructionInfoFactory,
    encoder: Encoder,
    pub(super) outlines: Vec<Outline>,
    pub features: FeatureSet,
    bmi2: bool,
}

impl Translator {
    pub fn new(features: FeatureSet) -> Self {
        Self {
            emitter: Emitter::default(),
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
            outlines: Vec::new(),
            features,
            bmi2: host_has_bmi2(),
        }
    }
}

fn host_has_bmi2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::is_x86_feature_detected!("bmi2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Code that is rarely run, behind the block.
pub(super) enum Outline {
    /// A memory access that missed.
    Slow {
        /// With `linear ^ tag` in T0 and the entry in T1; with the address in T0.
        missed: Label,
        again: Label,
        done: Label,
        site: u64,
        table: i32,
        flags: bool,
        make: Option<Recipe>,
        /// The host's address is the sum of T0 and T1, else T0.
        pair: bool,
    },
    /// An instruction for the interpreter after all, in the middle of the block.
    Interpret {
        from: Label,
        done: Label,
        site: u64,
    },
    /// An instruction that ends the block, or is left to the interpreter after all.
    Last {
        from: Label,
        site: u64,
        make: Option<Recipe>,
    },
    /// A memory access that missed, where T1 is to be what its address lacks.
    SlowNear {
        missed: Label,
        again: Label,
        done: Label,
        own: Mem,
        site: u64,
        table: i32,
        flags: bool,
        make: Option<Recipe>,
    },
    /// A span that missed.
    Span {
        missed: Label,
        again: Label,
        /// The operand that leads it.
        own: Mem,
        site: u64,
        reach: (i32, u32),
        make: Option<Recipe>,
    },
    /// A jump that is not patched yet: its displacement's place.
    Link {
        from: Label,
        to: i32,
        site: usize,
    },
    /// A jump to another page that is not patched for what is now.
    Across {
        data: Label,
        page: Label,
        missed: Label,
        to: i32,
        site: usize,
    },
    /// A request is pending.
    Called {
        from: Label,
        to: i32,
        make: Option<Recipe>,
    },
    CalledTo {
        from: Label,
    },
    /// The table's first place for a jump does not have it.
    Second {
        from: Label,
        found: Label,
        /// For an address that may not be canonical: the instruction, and what to add to RSP before it is done again.
        unsure: Option<(u64, i32)>,
    },
    /// Vectors must be brought in first.
    Vectors {
        from: Label,
        back: Label,
        at: i32,
        wanted: u32,
        make: Option<Recipe>,
    },
    /// The x87 state must be brought in first.
    X87 {
        from: Label,
        back: Label,
        at: i32,
        make: Option<Recipe>,
    },
}

pub(super) struct Work<'a> {
    stubs: &'a mut StubCache,
    pub(super) t: &'a mut Translator,
    thunks: Thunks,
    block: *const Block,
    /// Offset of the block in its page.
    pub(super) start: i64,
    /// Offset of this translation in the code buffer.
    at: usize,
    pub(super) flags: Flags,
    /// How to make the flags again, if that is possible.
    pub(super) recipe: Option<Recipe>,
    /// What the vectors' state is known to allow.
    vectors: u32,
    /// The x87 state is known to be in the host's registers.
    x87: bool,
    counts: bool,
    /// Where a block that leads back to itself goes on.
    head: Option<Head>,
    /// The state of flags with which it does, before there is a head.
    again: Option<Flags>,
    exits: Vec<Exit>,
    pub(super) plan: Plan,
}

/// The start of a loop, inside of a translation.
#[derive(Clone, Copy)]
struct Head {
    label: Label,
    recipe: Option<Recipe>,
    vectors: u32,
}

/// A way out of the block that is made behind it.
struct Exit {
    from: Label,
    to: i64,
    here: i64,
    flags: Flags,
    recipe: Option<Recipe>,
}

/// Loops of more instructions are not made twice.
const LONGEST_LOOP: usize = 40;

/// Whether the translation goes on behind an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    On,
    Ended,
}

const SEG_BASE: usize = std::mem::offset_of!(Cpu, seg_base);
const DATA: Mem = Mem::State(std::mem::offset_of!(Cpu, data));
const CODE: Mem = Mem::State(std::mem::offset_of!(Cpu, code));
const READ_TABLE: i32 = std::mem::offset_of!(DataSet, read) as i32;
const HOST_FIELD: i32 = std::mem::offset_of!(Entry, host) as i32;
const DIFFERENCE_FIELD: i32 = std::mem::offset_of!(Entry, difference) as i32;
const WRITE_TABLE: i32 = std::mem::offset_of!(DataSet, write) as i32;
const _: () = assert!(std::mem::offset_of!(CodeSet, jumps) == 0, "jumps are found two by two at an aligned address");
const BLOCK_CODE: i32 = std::mem::offset_of!(Block, code) as i32;

impl Cpu {
    /// Translates a block, if it is one that can be.
    pub(crate) fn translate_block(&mut self, block: *mut Block) -> bool {
        // SAFETY: blocks live until the cache is cleared; this is the thread that owns it.
        let (gpa, count, shape, second) =
            unsafe { ((*block).gpa, (*block).count, (*block).mode, (*block).second_page) };
        if shape != mode::CODE64 {
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
        let mut bytes = [0u8; 4096 + MAX_LENGTH];
        // SAFETY: one page of guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(page, bytes.as_mut_ptr(), 4096) };
        let mut end = 4096;
        if let Some(second) = second {
            let Some(page) = self.memory.host_page(second & !PAGE_MASK) else { return false };
            // SAFETY: the start of another.
            unsafe { std::ptr::copy_nonoverlapping(page, bytes[4096..].as_mut_ptr(), MAX_LENGTH) };
            end += MAX_LENGTH;
        }
        let mut decoder = Decoder::with_ip(64, &bytes[from..end], 0, DecoderOptions::NONE);
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
            self.head = Some(Head { label, recipe: self.recipe, vectors: self.vectors });
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
        e.load(T0, state(std::mem::offset_of!(super::State, generation)));
        e.constant(T1, block);
        e.rm(true, &[0x3b], T0, Mem::Base(T1, std::mem::offset_of!(Block, checked) as i32));
        e.jcc(cc::E, checked);
        e.constant(T0, start);
        e.jmp_address(leave);
        e.bind(checked);
    }

    fn count(&mut self, instructions: usize) {
        if self.counts {
            let counted = std::mem::offset_of!(crate::cpu::Counters, instructions);
            let counted = Mem::State(std::mem::offset_of!(Cpu, counters) + counted);
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
        if jumps || is_jcc(insn) {
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

    fn leave_to_interpreter(&mut self, index: usize, ends: bool) -> Flow {
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

    pub(super) fn site(&self, index: usize, bytes: u64, write: bool) -> u64 {
        Site { block: self.block, index, bytes, write }.pack().expect("blocks are in the lower half and short")
    }

    // ---- Memory ----

    /// The linear address of a memory operand, in T0. Uses T1 and the host's flags.
    pub(super) fn address(&mut self, op: &Uop, insn_disp: i64) -> Option<()> {
        let (base, index) = (usize::from(op.base), usize::from(op.index));
        if op.asz != address::LONG {
            return None;
        }
        let mut disp = insn_disp;
        if base == slot::BLOCK {
            disp += self.start;
        }
        let disp = i32::try_from(disp).ok()?;
        self.offset(base, index, op.scale, disp, T0);
        if op.seg != FLAT && op.seg >= 4 {
            self.e().rm(true, &[0x03], T0, Mem::State(SEG_BASE + usize::from(op.seg) * 8));
        }
        Some(())
    }

    /// `to` = base + index << scale + disp. Uses T0 and T1; leaves flags alone.
    pub(super) fn offset(&mut self, base: usize, index: usize, scale: u8, disp: i32, to: u8) {
        self.drop_held();
        let e = &mut self.t.emitter;
        let base = match base {
            slot::ZERO => None,
            slot::BLOCK => {
                e.load(T0, PAGE);
                Some(T0)
            }
            guest => Some(HOST[guest].unwrap_or_else(|| {
                e.load(T0, gpr(guest as u8));
                T0
            })),
        };
        let index = match index {
            slot::ZERO => None,
            guest => Some(HOST[guest].unwrap_or_else(|| {
                e.load(T1, gpr(guest as u8));
                T1
            })),
        };
        match (base, index) {
            (None, None) => e.constant(to, disp as i64 as u64),
            (Some(base), None) if disp == 0 => e.mov(to, base),
            (Some(base), None) => e.lea(to, Mem::Base(base, disp)),
            (Some(base), Some(index)) => e.lea(to, Mem::Indexed(base, index, scale, disp)),
            (None, Some(index)) => {
                // No base: a form of its own, with a 32-bit displacement.
                e.raw(&[
                    0x48 | (to >> 3) << 2 | (index >> 3) << 1,
                    0x8d,
                    (to & 7) << 3 | 4,
                    scale << 6 | (index & 7) << 3 | 5,
                ]);
                e.raw(&disp.to_le_bytes());
            }
        }
    }

    /// From the linear address in T0 to the host's: in T0, or as the sum of T0 and T1. Uses T1 and the host's flags.
    fn look_up(&mut self, bytes: u64, write: bool, pair: bool) -> (Label, Label, i32) {
        let table = self.entry(bytes, write);
        let e = &mut self.t.emitter;
        let missed = e.label();
        e.jcc(cc::A, missed);
        if pair {
            e.load(T1, Mem::Base(T1, table + HOST_FIELD));
        } else {
            e.rm(true, &[0x03], T0, Mem::Base(T1, table + HOST_FIELD));
        }
        let again = e.mark();
        (missed, again, table)
    }

    /// The same for a span, but for T1: it holds the difference of host and linear addresses then.
    pub(super) fn look_up_span(&mut self, bytes: u64, write: bool) -> Label {
        let table = self.entry(bytes, write);
        let e = &mut self.t.emitter;
        let missed = e.label();
        e.jcc(cc::A, missed);
        e.load(T1, Mem::Base(T1, table + DIFFERENCE_FIELD));
        missed
    }

    /// Where a set's table for reading or writing is.
    pub(super) fn table(&self, write: bool) -> i32 {
        if write { WRITE_TABLE } else { READ_TABLE }
    }

    /// T1 is where the TLB entry for the address in T0 is; T0 becomes the offset in its page, and "above" says that
    /// the bytes are not in it.
    fn entry(&mut self, bytes: u64, write: bool) -> i32 {
        debug_assert!(self.flags.memory || self.recipe.is_some());
        self.drop_held();
        let table = self.table(write);
        let bmi2 = self.t.bmi2;
        let e = &mut self.t.emitter;
        if bmi2 {
            // RORX R15D, EAX, imm8
            e.raw(&[0xc4, 0x63, 0x7b, 0xf0, 0xf8, 12 - ENTRY_SHIFT]);
        } else {
            e.mov32(T1, T0);
            e.shift(false, 5, T1, 12 - ENTRY_SHIFT);
        }
        e.group1(false, 4, T1, ((ENTRIES - 1) << ENTRY_SHIFT) as i32);
        e.rm(true, &[0x03], T1, DATA);
        e.rm(true, &[0x33], T0, Mem::Base(T1, table));
        // CMP RAX, imm32
        e.raw(&[0x48, 0x3d]);
        e.raw(&(0x1000 - bytes as u32).to_le_bytes());
        self.flags.host = false;
        table
    }

    /// The address of an operand of `bytes` bytes on the host, in T0. `done` is where the interpreter goes on if it
    /// did the instruction; `flags`: flags are expected in the host's there.
    pub(super) fn access(&mut self, index: usize, bytes: u64, write: bool, align: u64, done: Label) {
        self.access_by(index, bytes, write, align, done, false);
    }

    /// The same; with `pair` the address is the sum of T0 and T1.
    fn access_by(&mut self, index: usize, bytes: u64, write: bool, align: u64, done: Label, pair: bool) {
        let site = self.site(index, bytes, write);
        if align > 1 {
            // TEST AL, align - 1
            self.e().raw(&[0xa8, align as u8 - 1]);
            let from = self.e().label();
            self.e().jcc(cc::NE, from);
            // Which the interpreter says.
            let make = self.missing_flags();
            self.t.outlines.push(Outline::Last { from, site, make });
        }
        let make = self.missing_flags();
        let (missed, again, table) = self.look_up(bytes, write, pair);
        self.t.outlines.push(Outline::Slow { missed, again, done, site, table, flags: false, make, pair });
    }

    /// The outlines pushed since `first` come back to a place where flags are in the host's.
    fn flags_wanted(&mut self, first: usize) {
        let host = self.flags.host;
        for outline in &mut self.t.outlines[first..] {
            if let Outline::Slow { flags, .. } | Outline::SlowNear { flags, .. } = outline {
                *flags = host;
            }
        }
    }

    // ---- Instructions that are copied ----

    fn copy(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        let mut alignment = 1;
        let mut class = FeatureClass::Integer;
        let mut fop = 0;
        let plain = operand::is_plain(insn);
        if !plain {
            let Ok(Native::Stub(stub)) = self.stubs.get(insn) else { return false };
            let Stub { ref memory, class: of, fop: opcode, .. } = stub;
            fop = opcode;
            use FeatureClass as F;
            if !matches!(of, F::Integer | F::VexInteger | F::Sse | F::Avx | F::X87) || stub.loads_control() {
                return false;
            }
            if memory.access == Access::None && insn.op_kinds().any(|k| k == OpKind::Memory) {
                return false;
            }
            alignment = u64::from(memory.alignment);
            class = of;
        }
        // Nothing that the guest was not told of: the host may not have it either.
        if !self.t.features.contains_all(insn.cpuid_features()) {
            return false;
        }
        let mut insn = *insn;
        insn.set_code(operand::general(insn.code()));
        let has_memory = insn.op_kinds().any(|k| k == OpKind::Memory);
        let disp = op.disp;
        operand::without_address(&mut insn, has_memory);
        let Some(found) = operand::analyse(&mut self.t.info, &insn) else { return false };
        if !(1..=32).contains(&found.bytes) || (found.vectors && plain) {
            return false;
        }
        if has_memory && !self.addressable(op) {
            return false;
        }
        let mut reach = if has_memory && alignment == 1 { self.reach(index) } else { None };
        let near = reach.is_some().then_some((op.base, disp));
        let mut place = self.rename(insn, &found, has_memory, near);
        if reach.is_some() && place.is_none() {
            reach = None;
            place = self.rename(insn, &found, has_memory, None);
        }
        let Some((bytes, place)) = place else { return false };

        let wanted = match class {
            FeatureClass::Avx => vectors::AVX,
            FeatureClass::Sse => vectors::SSE,
            _ if found.vectors => vectors::SSE,
            _ => 0,
        };
        let x87 = class == FeatureClass::X87;
        if x87 {
            self.want_x87(self.start as i32 + i32::from(op.off));
            if fop != 0 {
                self.note_x87(fop, op);
            }
        }
        if wanted != 0 {
            self.want_vectors(wanted, self.start as i32 + i32::from(op.off));
        }
        let done = self.e().label();
        let first = self.t.outlines.len();
        let overwritten = found.flags_out && !found.flags_in;
        let written = host_mask(found.writes);
        if let Some(reach) = reach {
            let write = found.touch == Touch::Write;
            if reach == Reach::Alone {
                if found.flags_in {
                    self.pack();
                }
                self.keep_flags(if overwritten { 0 } else { written });
                if fop != 0 {
                    let base = HOST[usize::from(op.base)].unwrap_or(T0);
                    self.e().lea(T0, Mem::Base(base, disp));
                    self.e().store(T0, environment(std::mem::offset_of!(Environment, operand)));
                }
                self.reach_alone(index, op.base, disp, found.bytes, write, done);
                if found.flags_in {
                    self.unpack();
                }
            } else if reach == Reach::Lead {
                if found.flags_in {
                    self.pack();
                }
                self.keep_flags(if overwritten { 0 } else { written });
                self.reach_span(index, disp, found.bytes, write);
            }
            if reach == Reach::Alone {
                // That is done.
            } else if found.flags_in {
                self.unpack();
            } else if !found.flags_out {
                self.keep_recipe(written);
            }
            if fop != 0 && reach != Reach::Alone {
                let base = HOST[usize::from(op.base)].unwrap_or(T0);
                self.e().lea(T0, Mem::Base(base, disp));
                self.e().store(T0, environment(std::mem::offset_of!(Environment, operand)));
            }
            // Flags may have been made in between.
            if reach != Reach::Alone {
                self.reach_span(index, disp, found.bytes, write);
            }
        } else if has_memory {
            if found.flags_in {
                self.pack();
            }
            // Flags that are about to be overwritten must be there for a fault, not for longer.
            self.keep_flags(if overwritten { 0 } else { written });
            let _ = self.address(op, i64::from(disp));
            if fop != 0 {
                self.e().store(T0, environment(std::mem::offset_of!(Environment, operand)));
            }
            let pair = place.pair;
            self.access_by(index, found.bytes, found.touch == Touch::Write, alignment, done, pair);
            if place.memory == T1 {
                self.e().mov(T1, T0);
            }
        }
        if reach.is_some() {
            // That is done.
        } else if found.flags_in {
            self.unpack();
        } else if !has_memory && !found.flags_out {
            self.keep_recipe(written);
        }
        if found.accumulator {
            self.e().mov(T0, ACCUMULATOR);
        }
        for (carried, host) in &place.carried {
            if carried.read {
                self.e().load(*host, gpr(carried.guest));
            }
        }
        self.e().raw(&bytes);
        if found.accumulator {
            self.e().mov(ACCUMULATOR, T0);
        }
        for (carried, host) in &place.carried {
            if carried.write {
                self.e().store(*host, gpr(carried.guest));
            }
        }
        if found.flags_out {
            let simple = place.carried.is_empty() && !found.accumulator;
            let recipe = if simple && overwritten { Recipe::of(&place.insn, &bytes) } else { None };
            self.flags_set(Flags::IN_HOST, recipe);
        } else if (!has_memory || reach.is_some()) && found.flags_in {
            self.keep_recipe(written);
        }
        if place.carried.iter().any(|(_, host)| *host == T1) {
            self.drop_held();
        }
        if has_memory {
            // An instruction that the interpreter did has left its flags in memory.
            self.flags_wanted(first);
        }
        self.e().bind(done);
        true
    }

    pub(super) fn addressable(&self, op: &Uop) -> bool {
        let disp = i64::from(op.disp) + if usize::from(op.base) == slot::BLOCK { self.start } else { 0 };
        op.asz == address::LONG && i32::try_from(disp).is_ok()
    }

    /// The instruction with host registers in the place of guest registers.
    ///
    /// `near`: base register and displacement of an operand that is part of a span; then T1 is the rest of its address.
    fn rename(
        &mut self,
        mut insn: Instruction,
        found: &Copyable,
        has_memory: bool,
        near: Option<(u8, i32)>,
    ) -> Option<(Vec<u8>, Place)> {
        // RAX is free once it has been used: for the address, for flags, or as itself.
        let rax_busy = found.accumulator || (has_memory && near.is_none() && !found.flags_in);
        let in_t1 = near.is_some() || found.flags_in || found.accumulator;
        let memory = if has_memory && in_t1 { T1 } else { T0 };
        let mut free = Vec::with_capacity(2);
        if !(has_memory && memory == T1) {
            free.push(T1);
        }
        if !rax_busy {
            free.push(T0);
        }
        let mut carried = Vec::with_capacity(2);
        for c in found.carried.iter().flatten() {
            if free.is_empty() {
                return None;
            }
            carried.push((*c, free.remove(0)));
        }
        for i in 0..insn.op_count() {
            if insn.op_kind(i) != OpKind::Register || !insn.op_register(i).is_gpr() {
                continue;
            }
            let register = insn.op_register(i);
            let guest = register.full_register().number();
            let host = match HOST[guest] {
                Some(_) if guest == 0 && found.high => 0,
                Some(host) => host,
                None => carried.iter().find(|(c, _)| usize::from(c.guest) == guest)?.1,
            };
            insn.set_op_register(i, operand::renamed(register, host)?);
        }
        if has_memory {
            insn.set_memory_base(if memory == T1 { Register::R15 } else { Register::RAX });
        }
        // Nothing else wants T1: it is the other half of the address.
        let pair = has_memory && memory == T0 && carried.is_empty();
        if pair {
            insn.set_memory_index(Register::R15);
        }
        if let Some((base, disp)) = near {
            insn.set_memory_index(operand::renamed(Register::RAX, HOST[usize::from(base)]?)?);
            insn.set_memory_displacement64(i64::from(disp) as u64);
            insn.set_memory_displ_size(if disp == 0 { 0 } else { 4 });
        }
        let encoded = self.t.encoder.encode(&insn, 0);
        // Also what a failed attempt left there: AH and its like cannot go with registers that want a REX prefix.
        let bytes = self.t.encoder.take_buffer();
        encoded.ok()?;
        Some((bytes, Place { insn, memory, pair, carried }))
    }

    fn want_x87(&mut self, at: i32) {
        if self.x87 {
            return;
        }
        self.drop_held();
        self.keep_flags(0);
        let make = self.missing_flags();
        self.e().test_byte(state(std::mem::offset_of!(super::State, x87)), 1);
        self.flags.host = false;
        let from = self.e().label();
        self.e().jcc(cc::E, from);
        let back = self.e().mark();
        self.t.outlines.push(Outline::X87 { from, back, at, make });
        self.x87 = true;
    }

    /// Where the instruction is, and what it is: FIP and FOP. Uses RAX.
    fn note_x87(&mut self, opcode: u16, op: &Uop) {
        let at = self.start as i32 + i32::from(op.off);
        self.e().load(T0, PAGE);
        self.e().lea(T0, Mem::Base(T0, at));
        self.e().store(T0, environment(std::mem::offset_of!(Environment, instruction)));
        let at = environment(std::mem::offset_of!(Environment, opcode));
        self.e().prefixed(&[0x66], false, &[0xc7], 0, at);
        self.e().raw(&opcode.to_le_bytes());
    }

    pub(super) fn want_vectors(&mut self, wanted: u32, at: i32) {
        if self.vectors & wanted != 0 {
            return;
        }
        self.drop_held();
        // The test below takes the host's flags.
        self.keep_flags(0);
        let make = self.missing_flags();
        self.e().test_byte(VECTORS, wanted as u8);
        self.flags.host = false;
        let from = self.e().label();
        self.e().jcc(cc::E, from);
        let back = self.e().mark();
        self.t.outlines.push(Outline::Vectors { from, back, at, wanted, make });
        self.vectors |= wanted;
    }

    // ---- Control flow ----

    /// Where control goes next, at an offset from the page's start; `here` is where it comes from.
    fn go(&mut self, to: i64, here: i64) {
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
        let site = self.at + self.e().here() - 4;
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
        e.load(T1, state(std::mem::offset_of!(super::State, generation)));
        e.cmp_data(T1, data);
        e.jcc(cc::NE, missed);
        e.cmp_data(T0, page);
        e.jcc(cc::NE, missed);
        e.group1(true, 0, T0, to & !0xfff);
        e.store(T0, PAGE);
        e.jmp(missed);
        let site = self.at + self.e().here() - 4;
        self.t.outlines.push(Outline::Across { data, page, missed, to, site });
    }

    /// The first five bytes of a translation are one day a jump out of it: none of its own jumps is among them.
    fn whole_entry(&mut self) {
        if self.e().here() < 5 {
            self.e().raw(&[0x0f, 0x1f, 0x44, 0x00, 0x00]);
        }
    }

    /// Leaves for page offset `to` if a request is pending.
    fn poll(&mut self, to: i32) {
        let from = self.e().label();
        self.e().load(T1, state(std::mem::offset_of!(super::State, requests)));
        self.e().group1_mem(false, 7, Mem::Base(T1, 0), 0);
        self.e().jcc(cc::NE, from);
        let make = self.missing_flags();
        self.t.outlines.push(Outline::Called { from, to, make });
    }

    /// Jumps to the address in RAX: through the table of blocks that began there lately.
    ///
    /// `poll`: the jump may close a loop. `unsure`: the address need not be canonical; see [`Outline::Second`].
    fn jump_to(&mut self, poll: bool, unsure: Option<(u64, i32)>) {
        debug_assert!(self.flags.memory);
        if poll {
            let from = self.e().label();
            self.e().load(T1, state(std::mem::offset_of!(super::State, requests)));
            self.e().group1_mem(false, 7, Mem::Base(T1, 0), 0);
            self.e().jcc(cc::NE, from);
            self.t.outlines.push(Outline::CalledTo { from });
        }
        let from = self.e().label();
        let e = &mut self.t.emitter;
        // The same as `tlb::jump_index`, times 16.
        e.mov32(T1, T0);
        e.shift(false, 5, T1, JUMP_HASH_SHIFT as u8);
        e.rr(false, &[0x31], T0, T1);
        e.group1(false, 4, T1, JUMP_ENTRIES as i32 - 1);
        e.shift(false, 4, T1, 4);
        e.rm(true, &[0x03], T1, CODE);
        e.rm(true, &[0x3b], T0, Mem::Base(T1, std::mem::offset_of!(Jump, rip) as i32));
        e.jcc(cc::NE, from);
        let found = e.mark();
        e.load(T1, Mem::Base(T1, std::mem::offset_of!(Jump, block) as i32));
        // AND RAX, -4096
        e.raw(&[0x48, 0x25, 0x00, 0xf0, 0xff, 0xff]);
        e.store(T0, PAGE);
        e.jmp_mem(Mem::Base(T1, BLOCK_CODE));
        self.t.outlines.push(Outline::Second { from, found, unsure });
    }

    fn conditional_jump(&mut self, insn: &Instruction, index: usize) -> Flow {
        if insn.op0_kind() != OpKind::NearBranch64 {
            return self.leave_to_interpreter(index, true);
        }
        let condition = insn.condition_code() as u8 - 1;
        let taken = self.start.wrapping_add(insn.near_branch64() as i64);
        let next = self.start + insn.next_ip() as i64;
        self.whole_entry();
        if taken == self.start && index < LONGEST_LOOP {
            if self.recipe.is_none() {
                self.pack();
            }
            self.unpack();
            let here = self.start + insn.ip() as i64;
            match self.head {
                None => {
                    let from = self.e().label();
                    self.e().jcc(condition ^ 1, from);
                    let (flags, recipe) = (self.flags, self.recipe);
                    self.exits.push(Exit { from, to: next, here, flags, recipe });
                    self.again = Some(Flags { memory: recipe.is_none(), host: false });
                    return Flow::Ended;
                }
                Some(head) if head.recipe == self.recipe && self.vectors & head.vectors == head.vectors => {
                    self.e().jcc(condition, head.label);
                    self.pack();
                    self.go(next, here);
                    return Flow::Ended;
                }
                Some(_) => {}
            }
        }
        self.pack();
        self.unpack();
        let direct = (0..0x1000).contains(&taken) && taken > next;
        if direct {
            let from = self.e().label();
            self.e().jcc(condition, from);
            let site = self.at + self.e().here() - 4;
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

    /// Jumps, calls and returns.
    fn control(&mut self, insn: &Instruction, op: &Uop, index: usize) -> Option<Flow> {
        let here = self.start + insn.ip() as i64;
        let next = self.start + insn.next_ip() as i64;
        let near = insn.op0_kind() == OpKind::NearBranch64;
        match insn.flow_control() {
            FlowControl::Next => None,
            FlowControl::UnconditionalBranch if near => {
                self.pack();
                self.go(self.start.wrapping_add(insn.near_branch64() as i64), here);
                Some(Flow::Ended)
            }
            FlowControl::Call if near => {
                self.pack();
                self.push_return(index, next);
                self.go(self.start.wrapping_add(insn.near_branch64() as i64), here);
                Some(Flow::Ended)
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                let memory = insn.op0_kind() == OpKind::Memory;
                if !matches!(insn.code(), Code::Jmp_rm64 | Code::Call_rm64) {
                    return Some(self.leave_to_interpreter(index, true));
                }
                if memory && !self.addressable(op) {
                    return Some(self.leave_to_interpreter(index, true));
                }
                self.pack();
                if memory {
                    let _ = self.address(op, i64::from(op.disp));
                    let done = self.e().label();
                    self.access(index, 8, false, 1, done);
                    self.e().bind(done);
                    self.e().load(T0, Mem::Base(T0, 0));
                } else {
                    let guest = op.dst / 8;
                    match HOST[usize::from(guest)] {
                        Some(host) => self.e().mov(T0, host),
                        None => self.e().load(T0, gpr(guest)),
                    }
                }
                let site = self.site(index, 1, false);
                if insn.flow_control() == FlowControl::IndirectCall {
                    self.check_canonical(index);
                    let target = state(std::mem::offset_of!(super::State, target));
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
                    self.e().load(T0, top);
                } else {
                    self.e().mov(T0, STACK);
                    let done = self.e().label();
                    self.access(index, 8, false, 1, done);
                    self.e().bind(done);
                    self.e().load(T0, Mem::Base(T0, 0));
                }
                let (site, size) = (self.site(index, 1, false), 8 + op.imm as i32);
                self.e().lea(STACK, Mem::Base(STACK, size));
                // No loop is made of returns alone.
                self.jump_to(false, Some((site, -size)));
                Some(Flow::Ended)
            }
            // An interrupt or exception, a system call, LOOP, far jumps.
            _ => Some(self.leave_to_interpreter(index, true)),
        }
    }

    /// An indirect jump may close a loop. If a request is pending it is done by the interpreter, which leaves.
    fn poll_indirect(&mut self, site: u64) {
        let from = self.e().label();
        self.e().load(T1, state(std::mem::offset_of!(super::State, requests)));
        self.e().group1_mem(false, 7, Mem::Base(T1, 0), 0);
        self.e().jcc(cc::NE, from);
        self.t.outlines.push(Outline::Last { from, site, make: None });
    }

    /// The address in RAX must be canonical, or the interpreter says why not.
    fn check_canonical(&mut self, index: usize) {
        let site = self.site(index, 1, false);
        let from = self.e().label();
        self.e().mov(T1, T0);
        self.e().shift(true, 4, T1, 16);
        self.e().shift(true, 7, T1, 16);
        self.e().rr(true, &[0x39], T0, T1);
        self.e().jcc(cc::NE, from);
        self.t.outlines.push(Outline::Last { from, site, make: None });
    }

    /// Pushes the return address, which is `next` bytes from the page's start.
    fn push_return(&mut self, index: usize, next: i64) {
        if let Some(top) = self.stack_span(index, -8, true, 0) {
            self.e().load(T0, PAGE);
            self.e().lea(T0, Mem::Base(T0, next as i32));
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
        self.e().store(T1, Mem::Base(T0, 0));
        self.e().lea(STACK, Mem::Base(STACK, -8));
    }

    // ---- Outlines ----

    fn outlines(&mut self) {
        // SAFETY: the block is alive.
        let page = unsafe { (*self.block).gpa } & !PAGE_MASK;
        while let Some(outline) = self.t.outlines.pop() {
            let thunks = self.thunks;
            let e = &mut self.t.emitter;
            match outline {
                Outline::Slow { missed, again, done, site, table, flags, make, pair } => {
                    e.bind(missed);
                    e.rm(true, &[0x33], T0, Mem::Base(T1, table));
                    if let Some(recipe) = make {
                        flags::make(e, &recipe);
                    }
                    e.constant(T1, site);
                    e.call_address(thunks.slow);
                    if pair {
                        e.constant(T1, 0);
                    }
                    e.jcc(cc::NE, again);
                    if flags {
                        flags::unpack(e);
                    }
                    e.jmp(done);
                }
                Outline::SlowNear { missed, again, done, own, site, table, flags, make } => {
                    e.bind(missed);
                    e.rm(true, &[0x33], T0, Mem::Base(T1, table));
                    if let Some(recipe) = make {
                        flags::make(e, &recipe);
                    }
                    e.constant(T1, site);
                    e.call_address(thunks.slow);
                    // LEA leaves ZF alone; SUB comes after it was looked at.
                    e.lea(T1, own);
                    let interpreted = e.label();
                    e.jcc(cc::E, interpreted);
                    e.rr(true, &[0x29], T1, T0);
                    e.mov(T1, T0);
                    e.jmp(again);
                    e.bind(interpreted);
                    if flags {
                        flags::unpack(e);
                    }
                    e.jmp(done);
                }
                Outline::Span { missed, again, own, site, reach, make } => {
                    e.bind(missed);
                    if let Some(recipe) = make {
                        flags::make(e, &recipe);
                    }
                    e.lea(T0, own);
                    span::note(e, reach);
                    e.constant(T1, site);
                    e.call_address(thunks.span);
                    e.jmp(again);
                }
                Outline::Interpret { from, done, site } => {
                    e.bind(from);
                    e.constant(T1, site);
                    e.call_address(thunks.careful);
                    e.jmp(done);
                }
                Outline::Last { from, site, make } => {
                    e.bind(from);
                    if let Some(recipe) = make {
                        flags::make(e, &recipe);
                    }
                    e.constant(T1, site);
                    e.jmp_address(thunks.last);
                }
                Outline::Link { from, to, site } => {
                    e.bind(from);
                    e.constant(T1, page);
                    e.store(T1, state(std::mem::offset_of!(super::State, target)));
                    e.constant(T0, to as u64);
                    e.constant(T1, site as u64);
                    e.jmp_address(thunks.leave_link);
                }
                Outline::Across { data, page, missed, to, site } => {
                    // No generation is 0.
                    let at = self.at + e.here();
                    e.bind(data);
                    e.raw(&[0; 8]);
                    e.bind(page);
                    e.raw(&[0; 8]);
                    e.raw(&(site as u64).to_le_bytes());
                    e.bind(missed);
                    e.load(T0, PAGE);
                    e.lea(T0, Mem::Base(T0, to));
                    // After a while one of those that miss leaves to be patched.
                    let look_up = e.label();
                    e.group1_mem(false, 5, state(std::mem::offset_of!(super::State, patience)), 1);
                    e.jcc(cc::NS, look_up);
                    e.constant(T1, at as u64);
                    e.jmp_address(thunks.leave_cross);
                    e.bind(look_up);
                    self.flags_set(Flags::IN_MEMORY, None);
                    self.jump_to(false, None);
                }
                Outline::Called { from, to, make } => {
                    e.bind(from);
                    if let Some(recipe) = make {
                        flags::make(e, &recipe);
                    }
                    e.constant(T0, to as u64);
                    e.jmp_address(thunks.leave_at);
                }
                Outline::CalledTo { from } => {
                    e.bind(from);
                    e.jmp_address(thunks.leave_to);
                }
                Outline::Second { from, found, unsure } => {
                    e.bind(from);
                    e.group1(true, 6, T1, size_of::<Jump>() as i32);
                    e.rm(true, &[0x3b], T0, Mem::Base(T1, std::mem::offset_of!(Jump, rip) as i32));
                    e.jcc(cc::E, found);
                    if let Some((site, size)) = unsure {
                        e.mov(T1, T0);
                        e.shift(true, 4, T1, 16);
                        e.shift(true, 7, T1, 16);
                        e.rr(true, &[0x39], T0, T1);
                        e.jcc_address(cc::E, thunks.leave_to);
                        if size != 0 {
                            e.lea(STACK, Mem::Base(STACK, size));
                        }
                        e.constant(T1, site);
                        e.jmp_address(thunks.last);
                    } else {
                        e.jmp_address(thunks.leave_to);
                    }
                }
                Outline::X87 { from, back, at, make } => {
                    e.bind(from);
                    if let Some(recipe) = make {
                        flags::make(e, &recipe);
                    }
                    e.constant(T0, at as u64);
                    e.call_address(thunks.x87);
                    e.jmp(back);
                }
                Outline::Vectors { from, back, at, wanted, make } => {
                    e.bind(from);
                    if let Some(recipe) = make {
                        flags::make(e, &recipe);
                    }
                    e.constant(T0, at as u64);
                    e.constant(T1, u64::from(wanted));
                    e.call_address(thunks.vectors);
                    e.jmp(back);
                }
            }
        }
    }
}

/// Where a copied instruction finds its operands.
struct Place {
    /// With its operands renamed.
    insn: Instruction,
    memory: u8,
    /// With T1 for an index.
    pair: bool,
    carried: Vec<(Carried, u8)>,
}

/// A field of what FSTENV tells.
fn environment(offset: usize) -> Mem {
    Mem::State(std::mem::offset_of!(Cpu, fpu) + std::mem::offset_of!(Fpu, environment) + offset)
}

/// The host registers of guest registers.
pub(super) fn host_mask(guests: u16) -> u16 {
    (0..16).filter(|g| guests >> g & 1 != 0).filter_map(|g| HOST[g as usize]).fold(0, |all, host| all | 1 << host)
}

fn is_jcc(insn: &Instruction) -> bool {
    insn.is_jcc_short_or_near()
}
