//! What two executors made of a sequence.

use iced_x86::Register;

use super::Assembled;
use crate::random_code::case::{CODE, Case, DATA_END, Outcome, STATUS, WINDOW, WINDOW_BYTES};

impl Assembled {
    /// The first difference between two outcomes of a sequence, in words.
    pub fn difference(&self, case: &Case, a: &Outcome, b: &Outcome) -> Option<String> {
        let (x, y) = (&a.state, &b.state);
        // What a changed return address leads into is no instruction of ours.
        let place = x.rip.wrapping_sub(case.state.rip);
        if place < self.code.len() as u64 && !self.offsets.contains(&place) {
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
        let undefined = self.offsets.iter().position(|o| *o == place).map_or(STATUS, |i| self.undefined[i]);
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
}
