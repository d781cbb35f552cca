//! Interpreter and translator in lockstep, on whatever guest a vCPU runs.
//!
//! Two machines with stock systems cannot be kept alike: their devices and clocks go their own ways. So the two tiers
//! are compared in place. Where the run loop would enter a translation, the interpreter runs what the translation is
//! made of; registers and RAM are put back ([`journal`]); the translation runs, and must come to the same registers,
//! the same RAM and the same fault. The first difference stops the vCPU, and says in which block.
//!
//! In this mode blocks end before and behind instructions that cannot be done twice ([`pure`]); those are only
//! interpreted. Jumps between translations are not patched and the table that they look targets up in is an empty one, so
//! that a translation comes back at its end. It may still be one of several blocks, or loop: the interpreter goes as far
//! as it could.
//!
//! It is made for one vCPU. What a device writes to RAM between the two runs is told from a difference by another try;
//! so would be the writes of other vCPUs, if there are few.

mod journal;
mod pure;
mod report;
#[cfg(test)]
pub mod tests;

use std::{collections::HashMap, mem, ptr, rc::Rc};

use iced_x86::Instruction;

pub use self::pure::is_pure;
use self::{journal::Journal, pure::FlagFlow};
use crate::{
    cache::Block,
    cpu::Cpu,
    fault::Fault,
    native::Fpu,
    regs::{Regs, slot},
    tlb::PAGE_MASK,
    translate::Left,
    uop::{Ctl, Uop},
};

/// Runs of a block before it is translated; few, and whatever is met is hot.
pub const PROMOTE: u32 = 2;
/// Times that a difference must be seen in a row.
const TRIES: u32 = 3;
/// Blocks that the interpreter runs at most for one run of a translation.
const LONGEST: u64 = 1 << 18;

/// What a translation is made of.
pub struct Made {
    parts: Vec<*const Block>,
    flags: Vec<FlagFlow>,
    /// It may lead back to its start without leaving.
    loops: bool,
    /// It has instructions that may be left in the middle.
    repeats: bool,
    /// Where its two parts are in the code buffer, and their lengths.
    code: [(usize, usize); 2],
}

/// Why something ran without being compared.
#[derive(Clone, Copy, Debug)]
enum Unverified {
    /// It is not translated yet, or for the interpreter only.
    Untranslated,
    /// It cannot be done twice.
    Impure,
    /// It met a device.
    Device,
    /// It changed code.
    Code,
    /// A request came in the middle of an instruction, or code was changed by others.
    Interrupted,
    /// Too many blocks, or too many pages that were written.
    Long,
    /// It depends on flags that are undefined.
    Undefined,
}

const REASONS: [(Unverified, &str); 7] = [
    (Unverified::Untranslated, "unverified_untranslated"),
    (Unverified::Impure, "unverified_impure"),
    (Unverified::Device, "unverified_device"),
    (Unverified::Code, "unverified_code"),
    (Unverified::Interrupted, "unverified_interrupted"),
    (Unverified::Long, "unverified_long"),
    (Unverified::Undefined, "unverified_undefined"),
];

/// Blocks, for `--metrics`.
#[derive(Clone, Debug, Default)]
struct Tally {
    verified: u64,
    instructions: u64,
    /// Runs of translations that were verified, and those that took more than one try.
    runs: u64,
    again: u64,
    /// Of those with a fault at the end.
    faults: u64,
    unverified: [u64; REASONS.len()],
}

/// What is needed besides while translations are verified.
#[derive(Default)]
pub struct Verifier {
    /// By the address of the block that a translation begins with, and for which life of the cache.
    made: HashMap<u64, Rc<Made>>,
    clears: u64,
    journal: Journal,
    tally: Tally,
    turn: u64,
}

// SAFETY: a vCPU's blocks are used by the thread that runs it.
unsafe impl Send for Verifier {}

impl Verifier {
    /// A page of guest RAM is about to be written, for the first time since the last run began.
    #[cold]
    pub fn about_to_write(&mut self, host: *mut u8, gpa: u64) {
        self.journal.save(host, gpa);
    }

    /// A translation was made, in this life of the cache.
    pub fn translated<'a>(
        &mut self,
        parts: impl Iterator<Item = (*const Block, &'a [Instruction])>,
        loops: bool,
        code: [(usize, usize); 2],
        clears: u64,
    ) {
        self.forget_old(clears);
        let (mut all, mut flags) = (Vec::new(), Vec::new());
        let (mut pure, mut repeats) = (true, false);
        for (block, instructions) in parts {
            all.push(block);
            flags.push(FlagFlow::of(instructions));
            pure &= instructions.iter().all(is_pure);
            repeats |= instructions.iter().any(|i| i.has_rep_prefix() || i.has_repne_prefix());
        }
        let Some(first) = all.first().map(|block| *block as u64) else { return };
        if pure {
            self.made.insert(first, Rc::new(Made { parts: all, flags, loops, repeats, code }));
        } else {
            self.made.remove(&first);
        }
    }

    fn forget_old(&mut self, clears: u64) {
        if self.clears != clears {
            self.made.clear();
            self.clears = clears;
        }
    }

    fn made(&mut self, block: *const Block, clears: u64) -> Option<Rc<Made>> {
        self.forget_old(clears);
        self.made.get(&(block as u64)).cloned()
    }

    /// Figures for `--metrics`.
    pub fn figures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let t = &self.tally;
        let verified = [
            ("verified_blocks", t.verified),
            ("verified_instructions", t.instructions),
            ("verified_runs", t.runs),
            ("verified_runs_again", t.again),
            ("verified_faults", t.faults),
        ];
        verified.into_iter().chain(REASONS.map(|(why, name)| (name, t.unverified[why as usize])))
    }
}

/// Everything that blocks which may be done twice change, but for RAM.
#[derive(Clone)]
struct State {
    ctl: Ctl,
    fault: Fault,
    rip: u64,
    rflags: u64,
    regs: Regs,
    fpu: Fpu,
    /// Where the run loop goes on.
    block: *const Block,
    next: *const Block,
    link: *mut *const Block,
}

/// What is seen of things that cannot be done twice.
#[derive(PartialEq, Eq)]
struct Events {
    devices: u64,
    code: (u64, u32, u64),
}

/// How the interpreter ran a translation's blocks.
struct Interpreted {
    blocks: u64,
    instructions: u64,
    /// Flags that are undefined at its end.
    undefined: Option<u64>,
    unverified: Option<Unverified>,
}

impl Cpu {
    /// Runs a block, translated or not, and compares where that can be done.
    ///
    /// # Safety
    /// The block is alive and where `rip` is.
    #[cold]
    pub unsafe fn run_in_lockstep(&mut self, block: *const Block, single: bool) -> Ctl {
        if self.trace.left != 0 {
            self.look_at(block);
        }
        let interpret = mem::take(&mut self.translated.interpret);
        // While accesses are inspected, none is noted before it happens.
        if single || interpret || self.inspect || !self.is_translated(block) {
            // SAFETY: the caller's word.
            return unsafe { self.run_unverified(block, Unverified::Untranslated) };
        }
        let clears = self.cache.clears;
        let Some(made) = self.verifier.as_mut().and_then(|v| v.made(block, clears)) else {
            // SAFETY: the caller's word.
            return unsafe { self.run_unverified(block, Unverified::Impure) };
        };
        let mut differences = Vec::new();
        let mut foreign = Vec::new();
        for tried in 0..TRIES {
            // What is cached of writing is dropped below.
            self.see_letters();
            // SAFETY: the caller's word; no block was decoded since.
            if unsafe { !(*block).valid } {
                journal::put(&foreign);
                // SAFETY: as above: its ops say that it is void.
                return unsafe { self.run_unverified(block, Unverified::Code) };
            }
            let start = self.state_now(Ctl::Next);
            // SAFETY: `data` points at a set of our own TLB. Windows of a page outlive its entry.
            unsafe { (*self.data).flush_writes() };
            self.journal(Journal::start);
            // SAFETY: the parts of a translation live as long as it does.
            let (ctl, run) = unsafe { self.interpret_parts(&made) };
            let expected = self.state_now(ctl);
            if let Some(why) = run.unverified {
                self.journal(Journal::stop);
                journal::put(&foreign);
                self.tally(|t| t.unverified[why as usize] += run.blocks);
                return ctl;
            }
            self.journal(Journal::first_is_done);
            self.put(&start);
            self.disturb();
            // SAFETY: as above.
            let ctl = unsafe { self.run_translated(&made, &expected, run.blocks) };
            self.journal(Journal::stop);
            let found = self.state_now(ctl);
            let different = self.differences(&start, &expected, &found, run.undefined.unwrap_or(0));
            if different.is_empty() {
                journal::put(&foreign);
                self.put(&expected);
                self.tally(|t| {
                    t.verified += run.blocks;
                    t.instructions += run.instructions;
                    t.runs += 1;
                    t.again += u64::from(tried != 0);
                    t.faults += u64::from(ctl == Ctl::Fault);
                });
                return ctl;
            }
            // SAFETY: as above.
            if unsafe { !(*block).valid } || (made.repeats && self.signal.pending() != 0) {
                self.journal(Journal::take_first);
                journal::put(&foreign);
                self.put(&expected);
                self.tally(|t| t.unverified[Unverified::Interrupted as usize] += run.blocks);
                return expected.ctl;
            }
            differences.push(different);
            self.journal(|j| j.undo(&mut foreign));
            self.put(&start);
        }
        journal::put(&foreign);
        let different = differences.pop().unwrap_or_default();
        // SAFETY: as above.
        let reason = unsafe { self.report(&made, &different) };
        self.crash_with(reason);
        Ctl::Crash
    }

    /// # Safety
    /// The block is alive and where `rip` is.
    unsafe fn run_unverified(&mut self, block: *const Block, why: Unverified) -> Ctl {
        self.tally(|t| t.unverified[why as usize] += 1);
        // SAFETY: the caller's word.
        unsafe { self.interpret(block) }
    }

    fn tally(&mut self, change: impl FnOnce(&mut Tally)) {
        if let Some(v) = &mut self.verifier {
            change(&mut v.tally);
        }
    }

    fn journal(&mut self, change: impl FnOnce(&mut Journal)) {
        if let Some(v) = &mut self.verifier {
            change(&mut v.journal);
        }
    }

    fn state_now(&mut self, ctl: Ctl) -> State {
        self.park_fpu();
        State {
            ctl,
            fault: self.fault,
            rip: self.rip,
            rflags: self.rflags,
            regs: self.regs.clone(),
            fpu: self.fpu.clone(),
            block: self.block,
            next: self.next,
            link: self.link,
        }
    }

    fn put(&mut self, state: &State) {
        self.park_fpu();
        self.fault = state.fault;
        self.rip = state.rip;
        self.rflags = state.rflags;
        self.regs = state.regs.clone();
        self.fpu = state.fpu.clone();
        self.block = state.block;
        self.next = state.next;
        self.link = state.link;
    }

    fn events(&self) -> Events {
        let c = &self.counters;
        Events {
            devices: c.mmio + c.pio,
            code: (c.code_writes, self.translated.news, self.cache.clears + self.cache.invalidated),
        }
    }

    /// Runs the blocks that a translation is made of in the interpreter, for as long as the translation could run.
    ///
    /// # Safety
    /// The parts are alive, and the first is where `rip` is.
    unsafe fn interpret_parts(&mut self, made: &Made) -> (Ctl, Interpreted) {
        let (entry, events) = (self.rip, self.events());
        let mut run = Interpreted { blocks: 0, instructions: 0, undefined: Some(0), unverified: None };
        let mut at = 0;
        let ctl = loop {
            let block = made.parts[at];
            // SAFETY: the caller's word.
            let ctl = unsafe {
                self.at_start(block);
                run.instructions += u64::from((*block).count);
                self.interpret(block)
            };
            run.blocks += 1;
            run.undefined = run.undefined.and_then(|u| made.flags[at].follow(u, ctl == Ctl::Fault));
            if ctl != Ctl::Next || self.events() != events {
                break ctl;
            }
            match made.parts.get(at + 1) {
                // SAFETY: as above.
                Some(&next) if self.rip == unsafe { address(entry, next) } => at += 1,
                // A translation looks at requests there, too.
                _ if made.loops && self.rip == entry && self.signal.pending() == 0 => at = 0,
                _ => break ctl,
            }
            if run.blocks == LONGEST {
                run.unverified = Some(Unverified::Long);
                break ctl;
            }
        };
        let now = self.events();
        if now.devices != events.devices {
            run.unverified = Some(Unverified::Device);
        } else if now.code != events.code {
            run.unverified = Some(Unverified::Code);
        } else if !matches!(ctl, Ctl::Next | Ctl::Fault) || self.verifier.as_ref().is_some_and(|v| v.journal.is_full())
        {
            run.unverified = Some(Unverified::Long);
        } else if run.undefined.is_none() {
            run.unverified = Some(Unverified::Undefined);
        }
        (ctl, run)
    }

    /// As the run loop does before a block.
    ///
    /// # Safety
    /// The block is alive.
    unsafe fn at_start(&mut self, block: *const Block) {
        self.block = block;
        self.regs.gpr[slot::BLOCK] = self.rip;
        self.next = ptr::null();
        self.link = ptr::null_mut();
    }

    /// Has the translation find the TLB in another state now and then.
    fn disturb(&mut self) {
        let Some(v) = &mut self.verifier else { return };
        v.turn += 1;
        // SAFETY: `data` points at a set of our own TLB.
        let data = unsafe { &mut *self.data };
        if v.turn.is_multiple_of(64) {
            data.flush();
            self.tlb.windows.forget_all();
        } else if v.turn.is_multiple_of(2) {
            data.flush_writes();
        }
    }

    /// Runs a translation until it has come as far as the interpreter did. It may leave before: where it would loop but a
    /// request waits, and with instructions that are for the interpreter.
    ///
    /// # Safety
    /// The parts are alive, the first is where `rip` is, and was translated.
    unsafe fn run_translated(&mut self, made: &Made, expected: &State, blocks: u64) -> Ctl {
        let entry = self.rip;
        let mut budget = 2 * blocks + 4;
        let mut begun: Option<[u64; 23]> = None;
        let mut from: Option<(*const Block, *const Uop)> = None;
        loop {
            // SAFETY: the caller's word, and `part_at` gives an op of a part.
            let ctl = unsafe {
                match from {
                    None => {
                        begun = Some(self.regs.gpr);
                        self.at_start(made.parts[0]);
                        let code = self.code;
                        self.code = self.tlb.no_code((*code).generation);
                        let ctl = self.run_translation(made.parts[0]);
                        self.code = code;
                        ctl
                    }
                    Some((part, op)) => {
                        self.block = part;
                        self.regs.gpr[slot::BLOCK] = address(entry, part);
                        ((*op).handler)(self, op)
                    }
                }
            };
            // Nothing is patched.
            self.translated.left = Left::Next;
            let left_in_the_middle = mem::take(&mut self.translated.interpret);
            budget -= 1;
            let regs = &self.regs;
            let same = self.rip == expected.rip && regs.gpr[..16] == expected.regs.gpr[..16];
            let there = same && expected.ctl == Ctl::Next;
            if ctl != Ctl::Next || there || budget == 0 {
                return ctl;
            }
            let mut gpr = regs.gpr;
            gpr[slot::BLOCK] = begun.map_or(0, |b| b[slot::BLOCK]);
            let again = self.rip == entry && !left_in_the_middle && begun != Some(gpr);
            // SAFETY: the caller's word.
            from = match unsafe { self.part_at(made, entry) } {
                _ if again => None,
                None => return ctl,
                op => op,
            };
        }
    }

    /// The op at `rip`, and the part that it belongs to.
    ///
    /// # Safety
    /// The parts are alive.
    unsafe fn part_at(&self, made: &Made, entry: u64) -> Option<(*const Block, *const Uop)> {
        made.parts.iter().find_map(|&part| {
            // SAFETY: the caller's word.
            unsafe {
                let offset = self.rip.wrapping_sub(address(entry, part));
                (0..usize::from((*part).abortable))
                    .map(|i| (*part).ops.add(i))
                    .find(|op| u64::from((**op).off) == offset && (*part).valid)
                    .map(|op| (part, op))
            }
        })
    }
}

/// Where a part of a translation is that begins at `entry`.
///
/// # Safety
/// The block is alive.
unsafe fn address(entry: u64, part: *const Block) -> u64 {
    // SAFETY: the caller's word.
    entry & !PAGE_MASK | unsafe { (*part).gpa } & PAGE_MASK
}
