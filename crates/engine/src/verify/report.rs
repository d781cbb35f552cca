//! What is different, in words.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, FastFormatter};

use super::{Made, State};
use crate::{cache::Block, cpu::Cpu, regs::unpack, tlb::PAGE_MASK, uop::Ctl};

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
/// Bytes of RAM that are told.
const MOST_BYTES: usize = 32;

/// Bytes of the FXSAVE area that are the guest's: control, status and tag words, and the registers.
fn guest_bytes() -> impl Iterator<Item = usize> {
    (0..5).chain((0..8).flat_map(|i| 32 + i * 16..42 + i * 16))
}

impl Cpu {
    /// Lines of what the translation did otherwise, but for undefined flags.
    pub(super) fn differences(&self, start: &State, expected: &State, found: &State, undefined: u64) -> Vec<String> {
        let mut lines = Vec::new();
        let mut compare = |name: &str, before: u64, a: u64, b: u64| {
            if a != b {
                lines.push(format!("{name}: was {before:#x}, interpreted {a:#x}, translated {b:#x}"));
            }
        };
        for (i, name) in NAMES.iter().enumerate() {
            compare(name, start.regs.gpr[i], expected.regs.gpr[i], found.regs.gpr[i]);
        }
        compare("rip", start.rip, expected.rip, found.rip);
        let flags = |state: &State| (unpack(state.regs.flags) | state.rflags) & !undefined;
        compare("rflags", flags(start), flags(expected), flags(found));
        compare("mxcsr", start.regs.mxcsr.into(), expected.regs.mxcsr.into(), found.regs.mxcsr.into());
        let outcome = |state: &State| match state.ctl {
            Ctl::Fault => format!("{:x?}", state.fault),
            ctl => format!("{ctl:?}"),
        };
        if outcome(expected) != outcome(found) {
            lines.push(format!("ends: interpreted with {}, translated with {}", outcome(expected), outcome(found)));
        }
        for i in (0..16).filter(|&i| expected.regs.ymm[i] != found.regs.ymm[i]) {
            let values = [start, expected, found].map(|state| state.regs.ymm[i]);
            lines.push(format!(
                "ymm{i}: was {:x?}, interpreted {:x?}, translated {:x?}",
                values[0], values[1], values[2]
            ));
        }
        let areas = [start, expected, found].map(|state| state.fpu.area());
        for i in guest_bytes().filter(|&i| areas[1][i] != areas[2][i]) {
            let values = areas.map(|area| area[i]);
            lines.push(format!(
                "byte {i:#x} of the x87 state: was {:#x}, interpreted {:#x}, translated {:#x}",
                values[0], values[1], values[2]
            ));
        }
        if expected.fpu.environment != found.fpu.environment {
            let values = [start, expected, found].map(|state| state.fpu.environment);
            lines.push(format!(
                "x87 pointers: was {:x?}, interpreted {:x?}, translated {:x?}",
                values[0], values[1], values[2]
            ));
        }
        if expected.fpu.pending_x87_exception() != found.fpu.pending_x87_exception() {
            lines.push("one has a pending x87 exception".to_owned());
        }
        let bytes = self.verifier.as_ref().map(|v| v.journal.differences()).unwrap_or_default();
        for (gpa, [before, interpreted, translated]) in bytes.iter().take(MOST_BYTES) {
            lines.push(format!(
                "RAM at {gpa:#x}: was {before:#x}, interpreted {interpreted:#x}, translated {translated:#x}"
            ));
        }
        if bytes.len() > MOST_BYTES {
            lines.push(format!("and {} more bytes", bytes.len() - MOST_BYTES));
        }
        lines
    }

    /// The block, what is different, and how it was translated.
    ///
    /// # Safety
    /// The parts are alive.
    pub(super) unsafe fn report(&self, made: &Made, different: &[String]) -> String {
        // SAFETY: the caller's word.
        let gpa = unsafe { (*made.parts[0]).gpa };
        let mut text = format!(
            "a translation does not do what the interpreter does, in the block at {:#x} (guest-physical {gpa:#x}):",
            self.rip
        );
        for line in different {
            let _ = write!(text, "\n  {line}");
        }
        for &part in &made.parts {
            // SAFETY: the caller's word.
            let bytes = unsafe { self.guest_code(part) };
            // SAFETY: as above.
            let (gpa, count) = unsafe { ((*part).gpa, (*part).count) };
            let _ = write!(text, "\nThe guest's instructions:");
            text += &listing(&bytes, self.rip & !PAGE_MASK | gpa & PAGE_MASK, count.into());
        }
        let _ = write!(text, "\nTheir translation:");
        for (at, length) in made.code {
            let code = self.cache.code.address(at);
            // SAFETY: in the executable view of the buffer, which it was put into.
            let bytes = unsafe { std::slice::from_raw_parts(code, length) };
            text += &listing(bytes, code as u64, usize::MAX);
        }
        text
    }

    /// # Safety
    /// The block is alive.
    unsafe fn guest_code(&self, block: *const Block) -> Vec<u8> {
        // SAFETY: the caller's word.
        let (gpa, second) = unsafe { ((*block).gpa, (*block).second_page) };
        let mut bytes = Vec::new();
        for from in [Some(gpa), second.map(|page| page & !PAGE_MASK)].into_iter().flatten() {
            let mut page = vec![0; 0x1000 - (from & PAGE_MASK) as usize];
            if self.memory.read(from, &mut page).is_ok() {
                bytes.extend(page);
            }
        }
        bytes
    }
}

/// Instructions as text, a line each.
fn listing(bytes: &[u8], address: u64, most: usize) -> String {
    let mut decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
    let mut formatter = FastFormatter::new();
    let mut text = String::new();
    for insn in decoder.iter().take(most) {
        let _ = write!(text, "\n  {:#x} ", insn.ip());
        formatter.format(&insn, &mut text);
    }
    text
}
