//! From guest bytes to blocks of [`Uop`]s.

mod lower;
mod operand;

pub(crate) use lower::is_nop;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use crate::{
    cache::{Block, MAX_BLOCK, Shape},
    cpu::{Cpu, mode},
    fault::Run,
    ops::flow,
    tlb::PAGE_MASK,
    uop::{FLAT, Uop, address},
    verify::is_pure,
};

/// The longest instruction (Intel SDM vol. 2, 2.3.11).
pub(crate) const MAX_LENGTH: usize = 15;

/// What the last op of a block under construction may be fused with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fusable {
    No,
    /// CMP or TEST of registers, or of a register and an immediate.
    Compare {
        test: bool,
        bytes: usize,
        imm: bool,
    },
}

/// A lowered instruction.
pub(crate) struct Lowered {
    pub op: Uop,
    /// Nothing after it belongs to the block.
    pub ends: bool,
    pub fusable: Fusable,
}

pub(crate) const BLANK: Uop = Uop {
    handler: flow::undefined,
    imm: 0,
    disp: 0,
    dst: 0,
    src: 0,
    base: crate::regs::slot::ZERO as u8,
    index: crate::regs::slot::ZERO as u8,
    scale: 0,
    seg: FLAT,
    off: 0,
    len: 0,
    asz: address::LONG,
    aux: 0,
};

fn bitness(mode_bits: u8) -> u32 {
    match mode_bits & mode::CODE {
        mode::CODE64 => 64,
        mode::CODE32 => 32,
        _ => 16,
    }
}

impl Cpu {
    /// Decodes the block at `linear`, whose first page is at `gpa`.
    pub(crate) fn decode_block(&mut self, linear: u64, gpa: u64) -> Run<*const Block> {
        if self.cache.is_full() || self.cache.code.is_full() || self.stubs_full {
            self.make_room();
        }
        let start = gpa | (linear & PAGE_MASK);
        let Some(page) = self.memory.host_page(gpa) else {
            let at = self.rip;
            return self
                .unsupported(&format!("to run code outside RAM (at guest-physical address {start:#x}, rip {at:#x})"));
        };
        match self.try_decode(linear, start, page, false)? {
            Some(block) => Ok(block),
            // It is being written this very moment.
            None => Ok(self.try_decode(linear, start, page, true)?.unwrap_or_else(|| unreachable!("watched before"))),
        }
    }

    /// Decodes the block at `linear`, which is at `start` in the page at `page`. What is watched is what was decoded,
    /// and `None` says that it changed until then; or, `ahead`, all that might be.
    fn try_decode(&mut self, linear: u64, start: u64, page: *mut u8, ahead: bool) -> Run<Option<*const Block>> {
        let in_page = 0x1000 - (linear & PAGE_MASK) as usize;
        // SAFETY: the offset stays in the page.
        let from = unsafe { page.add((linear & PAGE_MASK) as usize) };
        if ahead {
            self.watch_code(start, in_page, page);
        }
        let mut bytes = [0u8; 4096];
        // SAFETY: the rest of one page of guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), in_page) };
        let most = if self.mode & mode::SINGLE != 0 { 1 } else { MAX_BLOCK };
        let mut ops: Vec<Uop> = std::mem::take(&mut self.scratch_ops);
        ops.clear();
        let mut count = 0;
        let mut second_page = None;
        // An instruction that crosses pages, and where its second page is on the host.
        let mut crossing = None;
        let mut decoder = Decoder::with_ip(bitness(self.mode), &bytes[..in_page], 0, DecoderOptions::NONE);
        let mut insn = Instruction::default();
        let mut length = 0;
        let mut looked_at = 0;
        let mut fusable = Fusable::No;
        let mut ended = false;
        loop {
            decoder.decode_out(&mut insn);
            if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                if length != 0 {
                    // It crosses into the next page: a block of its own.
                    break;
                }
                let mut whole = [0u8; MAX_LENGTH];
                let here = in_page.min(MAX_LENGTH);
                whole[..here].copy_from_slice(&bytes[..here]);
                let next_linear = (linear | PAGE_MASK).wrapping_add(1);
                let next = match self.translate_fetch(next_linear) {
                    Ok(next) => next,
                    Err(stop) => {
                        self.scratch_ops = ops;
                        return Err(stop);
                    }
                };
                let Some(host) = self.memory.host_page(next) else {
                    self.scratch_ops = ops;
                    return self.unsupported("to run code outside RAM");
                };
                if ahead {
                    self.watch_code(next, MAX_LENGTH - here, host);
                }
                // SAFETY: the start of a page of guest RAM.
                unsafe {
                    std::ptr::copy_nonoverlapping(host, whole.as_mut_ptr().add(here), MAX_LENGTH - here);
                }
                second_page = Some(next);
                Decoder::with_ip(bitness(self.mode), &whole, 0, DecoderOptions::NONE).decode_out(&mut insn);
                crossing = Some((whole, host));
            }
            // What cannot be done twice is a block of its own where blocks are.
            let alone = self.verifier.is_some() && !is_pure(&insn);
            if alone && length != 0 {
                break;
            }
            let lowered = self.lower(&insn, length as u16);
            count += 1;
            // That it is none may be told from any byte that an instruction has.
            looked_at = length + if insn.is_invalid() { MAX_LENGTH } else { insn.len() };
            length += insn.len();
            if !(lowered.ends && fuse(&mut ops, fusable, &lowered.op)) {
                ops.push(lowered.op);
            }
            fusable = lowered.fusable;
            ended = lowered.ends;
            if ended || alone || count == most || second_page.is_some() || length >= in_page {
                break;
            }
        }
        let abortable = ops.len() as u32;
        if !ended {
            ops.push(Uop { handler: flow::end, off: length as u16, ..BLANK });
        }
        let here = looked_at.min(in_page);
        let mut unchanged = true;
        if !ahead {
            self.watch_code(start, here, page);
            // SAFETY: bytes of the page.
            unchanged = unsafe { is_same(from, &bytes[..here]) };
        }
        if let (Some((whole, host)), Some(next), false) = (crossing, second_page, ahead)
            && looked_at > in_page
        {
            let there = &whole[in_page..looked_at.min(MAX_LENGTH)];
            self.watch_code(next, there.len(), host);
            // SAFETY: the start of another page.
            unchanged &= unsafe { is_same(host, there) };
        }
        if !unchanged {
            self.scratch_ops = ops;
            return Ok(None);
        }
        let shape = Shape { mode: self.mode, second_page, count: count as u32, abortable };
        let block = self.cache.insert(start, shape, &ops);
        self.scratch_ops = ops;
        Ok(Some(block))
    }
}

/// Whether guest RAM still has these bytes.
///
/// # Safety
/// As many bytes are there.
unsafe fn is_same(at: *const u8, bytes: &[u8]) -> bool {
    bytes.chunks(64).enumerate().all(|(i, piece)| {
        let mut now = [0u8; 64];
        // SAFETY: the caller's word.
        unsafe { std::ptr::copy_nonoverlapping(at.add(i * 64), now.as_mut_ptr(), piece.len()) };
        now[..piece.len()] == *piece
    })
}

/// Makes one op of a comparison and the conditional jump behind it.
fn fuse(ops: &mut [Uop], fusable: Fusable, jump: &Uop) -> bool {
    let (Some(last), Fusable::Compare { test, bytes, imm }) = (ops.last_mut(), fusable) else { return false };
    let Some(cc) = lower::condition_of(jump) else { return false };
    let (Ok(target), end) = (i32::try_from(jump.imm as i64), jump.off + u16::from(jump.len)) else { return false };
    last.handler = lower::compare_jcc(cc, test, bytes, imm);
    last.disp = target;
    last.aux = end;
    true
}
