//! What translated code leaves to the interpreter, and the calls by which it does.

use super::{Gathered, Left, State, vectors};
use crate::{
    cache::Block,
    cpu::{Cpu, cr0, cr4},
    fault::{NON_CANONICAL, Run},
    mmu::crosses,
    ops,
    regs::slot,
    signal::request,
    tlb::PAGE_MASK,
    uop::{Ctl, Uop},
};

/// An instruction of a translated block, in one word: the block's address, the op's index, and the size and direction
/// of its memory access.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    pub block: *const Block,
    pub index: usize,
    pub bytes: u64,
    pub write: bool,
    /// It is a store that may be made to [`State::gathered`] and be scattered from there.
    pub scatters: bool,
}

const ADDRESS_BITS: u32 = 47;

impl Site {
    /// Where the word has the number of bytes, less one, and the bits for writing and scattering.
    pub const BYTES_AT: u8 = ADDRESS_BITS as u8 + 6;
    pub const WRITE_AT: u8 = ADDRESS_BITS as u8 + 11;
    pub const SCATTERS_AT: u8 = ADDRESS_BITS as u8 + 12;

    /// `None` where the address has too many bits.
    pub fn pack(self) -> Option<u64> {
        let block = self.block as u64;
        (block >> ADDRESS_BITS == 0 && self.index < 64 && (1..=32).contains(&self.bytes)).then(|| {
            block
                | (self.index as u64) << ADDRESS_BITS
                | (self.bytes - 1) << Self::BYTES_AT
                | u64::from(self.write) << Self::WRITE_AT
                | u64::from(self.scatters) << Self::SCATTERS_AT
        })
    }

    fn unpack(word: u64) -> Self {
        Self {
            block: (word & ((1 << ADDRESS_BITS) - 1)) as *const Block,
            index: (word >> ADDRESS_BITS) as usize & 63,
            bytes: (word >> Self::BYTES_AT & 31) + 1,
            write: word >> Self::WRITE_AT & 1 != 0,
            scatters: word >> Self::SCATTERS_AT & 1 != 0,
        }
    }
}

/// What a helper returns to have translated code go on, or leave.
const GO_ON: u64 = 0;
const LEAVE: u64 = 1;

/// The op behind one that runs alone.
pub unsafe fn stop(cpu: &mut Cpu, _: *const Uop) -> Ctl {
    cpu.translated.stopped = true;
    Ctl::Next
}

impl Cpu {
    /// Hears of a window that could not be moved. The access of an op whose window moves too often does without.
    unsafe fn look_at_window(&mut self, site: Site) {
        let window = std::mem::take(&mut self.translated.window);
        if window == 0 {
            return;
        }
        if self.tlb.windows.is_full() {
            self.see_letters();
            self.tlb.windows.make_room();
        }
        // SAFETY: the block is alive, as the caller says.
        let plain = unsafe { &mut (*site.block.cast_mut()).plain };
        if self.tlb.windows.is_hasty(window) && *plain >> site.index & 1 == 0 {
            *plain |= 1 << site.index;
            self.counters.translated.windowless += 1;
            self.translated.again.push(site.block.cast_mut());
            self.signal.note(request::HOT);
        }
    }

    /// Instructions of the running block that were counted but did not run.
    pub fn uncount(&mut self, instructions: u64) {
        if !self.translated.running || self.translated.counts {
            self.counters.instructions = self.counters.instructions.saturating_sub(instructions);
        }
    }

    /// Puts the interpreter's view of the running block in order.
    ///
    /// # Safety
    /// `block` is alive and running.
    unsafe fn at_block(&mut self, block: *const Block) {
        self.block = block;
        // SAFETY: the caller's word.
        self.regs.gpr[slot::BLOCK] = self.translated.page.wrapping_add(unsafe { (*block).gpa } & PAGE_MASK);
    }

    /// The host's address of an access; `None` where the interpreter knows what comes first: which page's fault where
    /// it crosses pages, and alignment checks before faults.
    fn reach(&mut self, linear: u64, site: Site) -> Run<Option<*mut u8>> {
        if self.inspect || crosses(linear, site.bytes) {
            return Ok(None);
        }
        self.direct(linear, site.bytes, site.write)
    }

    /// Runs one op of a translated block in the interpreter.
    ///
    /// # Safety
    /// The block is alive and running, and has that op.
    unsafe fn run_alone(&mut self, site: Site) -> u64 {
        self.counters.translated.interpreted += 1;
        let news = self.translated.news;
        // SAFETY: the caller's word.
        unsafe {
            let op = (*site.block).ops.add(site.index);
            self.translated.single[0] = *op;
            self.translated.alone = Some(site.index);
            self.translated.stopped = false;
            let first = self.translated.single.as_ptr();
            let ctl = ((*first).handler)(self, first);
            self.translated.alone = None;
            if ctl != Ctl::Next || !self.translated.stopped {
                self.translated.left = Left::Handler;
                self.translated.ctl = ctl;
                return LEAVE;
            }
            // What it brought about is seen at the next instruction: an interrupt, or new code behind it.
            if self.signal.pending() != 0 || !(*site.block).valid || self.translated.news != news {
                let done = u64::from((*op).off) + u64::from((*op).len);
                self.uncount(u64::from((*site.block).count).saturating_sub(site.index as u64 + 1));
                self.rip = self.regs.gpr[slot::BLOCK].wrapping_add(done);
                self.translated.left = Left::Next;
                return LEAVE;
            }
        }
        GO_ON
    }

    /// Says whether the TSC may be read as it is, and what to add.
    pub fn look_at_tsc(&mut self) {
        let allowed = self.cpl == 0 || self.cr4 & cr4::TSD == 0;
        let offset = self.clock.ahead_of_host();
        self.translated.tsc_direct = (allowed && offset.is_some()).into();
        self.translated.tsc_offset = offset.unwrap_or_default();
    }

    /// Says whether x87 instructions may run as they are.
    pub fn look_at_x87(&mut self) {
        let x87 = self.fpu.x87_is_live() && self.cr0 & (cr0::TS | cr0::EM) == 0;
        self.translated.x87 = x87.into();
    }

    /// MXCSR and x87 state, where they are about to be in registers again: a device access has taken them out.
    fn keep_vectors(&mut self) {
        if self.translated.x87 != 0 {
            self.fpu.bring_x87();
        }
        if self.translated.vectors != 0 && !self.fpu.enter_mxcsr(&mut self.regs) {
            self.translated.vectors = 0;
        }
    }
}

/// A memory access that missed the TLB: the host's address of it, or the whole instruction.
pub unsafe extern "C" fn slow(cpu: *mut Cpu, site: u64, linear: u64) -> u64 {
    // SAFETY: thunks pass the `Cpu` they run on, and sites of the block that is running.
    unsafe {
        let (cpu, site) = (&mut *cpu, Site::unpack(site));
        cpu.counters.translated.slow_accesses += 1;
        cpu.at_block(site.block);
        let news = cpu.translated.news;
        cpu.look_at_window(site);
        let found = cpu.reach(linear, site);
        let done = match found {
            // Looking it up brought news of code: the block ends here, and a loop with it.
            Ok(_) if cpu.translated.news != news => {
                cpu.signal.note(request::CODE);
                cpu.run_alone(site)
            }
            Ok(Some(host)) => host as u64,
            Ok(None) => cpu.run_alone(site),
            // Which of an instruction's accesses it was says whether the stack is to blame.
            Err(_) if cpu.fault == NON_CANONICAL => cpu.run_alone(site),
            Err(_) => {
                cpu.translated.ctl = ops::fault(cpu, (*site.block).ops.add(site.index));
                cpu.translated.left = Left::Handler;
                LEAVE
            }
        };
        cpu.keep_vectors();
        done
    }
}

/// A span that missed the TLB: its first access at `linear` brings the page in, or the interpreter goes on there.
pub unsafe extern "C" fn span(cpu: *mut Cpu, site: u64, linear: u64) -> u64 {
    // SAFETY: as in `slow`.
    unsafe {
        let (cpu, site) = (&mut *cpu, Site::unpack(site));
        cpu.counters.translated.slow_accesses += 1;
        cpu.at_block(site.block);
        let news = cpu.translated.news;
        cpu.look_at_window(site);
        let op = (*site.block).ops.add(site.index);
        let from = linear.wrapping_add_signed(cpu.translated.span_from.into());
        let found = cpu.reach(linear, site);
        let block = &mut *site.block.cast_mut();
        let done = match found {
            Err(_) => {
                cpu.translated.ctl = ops::fault(cpu, op);
                cpu.translated.left = Left::Handler;
                LEAVE
            }
            // It is in the table that was looked at now.
            Ok(Some(_)) if !crosses(from, cpu.translated.span_bytes.into()) && cpu.translated.news == news => GO_ON,
            Ok(_) => {
                block.crossings = block.crossings.saturating_add(1);
                cpu.uncount(u64::from(block.count).saturating_sub(site.index as u64));
                cpu.rip = cpu.regs.gpr[slot::BLOCK].wrapping_add(u64::from((*op).off));
                cpu.translated.left = Left::Interpret;
                LEAVE
            }
        };
        cpu.keep_vectors();
        done
    }
}

/// An instruction in the middle of a block.
pub unsafe extern "C" fn interpret(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as in `slow`.
    unsafe {
        let (cpu, site) = (&mut *cpu, Site::unpack(site));
        cpu.at_block(site.block);
        let done = cpu.run_alone(site);
        cpu.look_at_x87();
        done
    }
}

/// The same where translated code relies on vectors and x87 state being where they were: a device takes them out.
pub unsafe extern "C" fn careful(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as in `slow`.
    unsafe {
        let (cpu, site) = (&mut *cpu, Site::unpack(site));
        cpu.at_block(site.block);
        let done = cpu.run_alone(site);
        cpu.keep_vectors();
        done
    }
}

/// An instruction that ends its block. Where its successor is translated, and nothing else is to be done before it, that
/// is the answer; otherwise 0.
pub unsafe extern "C" fn last(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as in `slow`.
    unsafe {
        let (cpu, site) = (&mut *cpu, Site::unpack(site));
        cpu.at_block(site.block);
        if cpu.run_alone(site) == GO_ON {
            // It is followed by nothing but the block's end.
            let op = &*(*site.block).ops.add(site.index);
            cpu.rip = cpu.regs.gpr[slot::BLOCK].wrapping_add(u64::from(op.off) + u64::from(op.len));
            cpu.translated.left = Left::Next;
        }
        let next = cpu.successor();
        if next.is_null() { 0 } else { (*next).code as u64 }
    }
}

/// Puts the x87 state into the host's registers.
pub unsafe extern "C" fn bring_x87(cpu: *mut Cpu) -> u64 {
    // SAFETY: as in `slow`.
    let cpu = unsafe { &mut *cpu };
    if cpu.cr0 & (cr0::TS | cr0::EM) != 0 || !cpu.fpu.bring_x87() {
        cpu.rip = cpu.translated.page.wrapping_add(cpu.translated.target & 0xffff_ffff);
        cpu.translated.left = Left::Interpret;
        return LEAVE;
    }
    cpu.translated.x87 = 1;
    GO_ON
}

/// Says what vector instructions may run, and puts MXCSR into the host's register.
pub unsafe extern "C" fn bring_vectors(cpu: *mut Cpu, wanted: u64) -> u64 {
    // SAFETY: as in `slow`.
    let cpu = unsafe { &mut *cpu };
    let ts = cpu.cr0 & cr0::TS != 0;
    let sse = !ts && cpu.cr0 & cr0::EM == 0 && cpu.cr4 & cr4::OSFXSR != 0;
    let avx = !ts && cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & 6 == 6;
    let found = if sse { vectors::SSE } else { 0 } | if avx { vectors::AVX } else { 0 };
    if u64::from(found) & wanted == 0 || !cpu.fpu.enter_mxcsr(&mut cpu.regs) {
        // The interpreter raises what is to be raised, and knows about unmasked exceptions.
        cpu.rip = cpu.translated.page.wrapping_add(cpu.translated.target & 0xffff_ffff);
        cpu.translated.left = Left::Interpret;
        return LEAVE;
    }
    cpu.translated.vectors = found;
    GO_ON
}

impl Default for State {
    fn default() -> Self {
        let end = Uop { handler: stop, ..crate::decode::BLANK };
        Self {
            page: 0,
            generation: 0,
            cpu: 0,
            requests: std::ptr::null(),
            interrupts: std::ptr::null(),
            user_pages: 0,
            user_data: 0,
            user_code: 0,
            kernel_code: 0,
            calls: Default::default(),
            window_set: 0,
            window: 0,
            again: Vec::new(),
            target: 0,
            scratch: 0,
            operand: 0,
            scattered: [[0; 2]; 2],
            scatters: false,
            gathered: Gathered([0; 32]),
            spans: [0; super::span::SLOTS],
            span_from: 0,
            span_bytes: 0,
            news: 0,
            patience: super::PATIENCE,
            site: 0,
            vectors: 0,
            tsc_offset: 0,
            tsc_direct: 0,
            x87: 0,
            left: Left::Next,
            ctl: Ctl::Next,
            stopped: false,
            alone: None,
            single: [end, end],
            interpret: false,
            running: false,
            counts: false,
            guards: false,
            guarded: Default::default(),
            clears: 0,
        }
    }
}
