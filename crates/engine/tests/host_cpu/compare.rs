//! Where two outcomes differ.

use iced_x86::Mnemonic;

use super::case::{Case, Mode, Outcome, STATUS, WINDOW};
use super::generate::address;
use super::stubs::MEMORY_FAULT;

/// The first difference between what the host did and what we did, in words; `undefined` flags may differ.
pub fn difference(case: &Case, host: &Outcome, ours: &Outcome, undefined: u64) -> Option<String> {
    let memory_fault = ours.vector == Some(MEMORY_FAULT) && matches!(host.vector, Some(12..=14));
    // Intel SDM vol. 2, MASKMOVDQU: faults for bytes that the mask leaves out are "implementation dependent".
    let masked_bytes =
        matches!(case.instruction.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu);
    if masked_bytes && host.vector.is_some() && ours.vector.is_none() {
        return None;
    }
    // An operand that reaches across 4 GiB violates the segment's limit, is misaligned or is not mapped: which of it
    // the processor sees first is its own affair.
    let both_memory = [host.vector, ours.vector].iter().all(|v| matches!(v, Some(12..=14)));
    let end =
        address(&case.instruction, &case.state).saturating_add(case.instruction.memory_size().size().max(512) as u64);
    let wraps = case.mode == Mode::Bits32 && both_memory && end > 1 << 32;
    if host.vector != ours.vector && !memory_fault && !wraps {
        return Some(format!("the host's vector is {:?}, ours {:?}; {}", host.vector, ours.vector, operands(case)));
    }
    let (h, o) = (&host.state, &ours.state);
    let random_result = matches!(case.instruction.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed);
    if random_result {
        return ((h.rflags ^ o.rflags) & STATUS & !1 != 0).then(|| "flags of a random number".to_owned());
    }
    for (i, (host, ours)) in h.gpr.iter().zip(&o.gpr).enumerate() {
        if host != ours && (case.mode == Mode::Bits64 || i < 8) {
            let before = case.state.gpr[i];
            return Some(format!("register {i} was {before:#x}, host {host:#x}, ours {ours:#x}; {}", operands(case)));
        }
    }
    if h.rip != o.rip {
        return Some(format!("rip: host {:#x}, ours {:#x}", h.rip, o.rip));
    }
    let flags = (h.rflags ^ o.rflags) & STATUS & !undefined;
    if flags != 0 {
        return Some(format!(
            "flags {flags:#x}: before {:#x}, host {:#x}, ours {:#x}; {}",
            case.state.rflags & STATUS,
            h.rflags & STATUS,
            o.rflags & STATUS,
            operands(case)
        ));
    }
    for i in 0..16 {
        if h.vector(i) != o.vector(i) && !(host.vector.is_some() && same_mask(case, i, h.vector(i), o.vector(i))) {
            let before = case.state.vector(i);
            return Some(format!("ymm{i} was {before:x?}, host {:x?}, ours {:x?}", h.vector(i), o.vector(i)));
        }
    }
    if h.mxcsr() != o.mxcsr() {
        return Some(format!("mxcsr was {:#x}, host {:#x}, ours {:#x}", case.state.mxcsr(), h.mxcsr(), o.mxcsr()));
    }
    for (name, at) in [("fcw", 0), ("fsw", 2), ("ftw", 4)] {
        if h.fx16(at) != o.fx16(at) {
            let before = case.state.fx16(at);
            return Some(format!("{name} was {before:#x}, host {:#x}, ours {:#x}", h.fx16(at), o.fx16(at)));
        }
    }
    for i in 0..8 {
        let at = 32 + i * 16..42 + i * 16;
        if h.fx[at.clone()] != o.fx[at.clone()] {
            let before = &case.state.fx[at.clone()];
            return Some(format!("st{i} was {before:02x?}, host {:02x?}, ours {:02x?}", &h.fx[at.clone()], &o.fx[at]));
        }
    }
    if host.memory == ours.memory {
        return None;
    }
    let mut first = None;
    for (i, (host, ours)) in host.memory.iter().zip(ours.memory.iter()).enumerate() {
        if host != ours && !pointer_byte(case, i) {
            first = Some((i, *host, *ours));
            break;
        }
    }
    first.map(|(i, host, ours)| format!("memory at +{i:#x}: host {host:#x}, ours {ours:#x}; {}", operands(case)))
}

/// Of the mask that a gather which faulted leaves, only the elements' sign bits count: Intel's manual spreads them
/// over the element first, processors do not.
fn same_mask(case: &Case, register: usize, host: [u64; 4], ours: [u64; 4]) -> bool {
    let insn = &case.instruction;
    let gather = insn.memory_index().is_vector_register() && insn.op2_register().number() == register;
    let wide = insn.memory_size().element_type().size() == 8 || insn.memory_size().size() == 8;
    let signs = if wide { 1 << 63 } else { 0x8000_0000_8000_0000 };
    gather && host.iter().zip(&ours).all(|(h, o)| (h ^ o) & signs == 0)
}

fn operands(case: &Case) -> String {
    format!("{:?} gpr {:x?}", case.instruction.mnemonic(), case.state.gpr)
}

/// Bytes of an image that are the processor's own: FIP, FDP and FOP point into the child there, and the mask of
/// MXCSR bits is the host's (AMD has one more).
fn pointer_byte(case: &Case, at: usize) -> bool {
    let base = address(&case.instruction, &case.state).wrapping_sub(WINDOW);
    let at = (at as u64).wrapping_sub(base);
    match case.instruction.mnemonic() {
        Mnemonic::Fnstenv | Mnemonic::Fnsave if case.instruction.memory_size().size() % 80 == 28 => {
            (12..28).contains(&at)
        }
        Mnemonic::Fnstenv | Mnemonic::Fnsave => (6..14).contains(&at),
        Mnemonic::Fxsave
        | Mnemonic::Fxsave64
        | Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xsavec
        | Mnemonic::Xsavec64
        | Mnemonic::Xsaveopt
        | Mnemonic::Xsaveopt64 => (6..24).contains(&at) || (28..32).contains(&at),
        _ => false,
    }
}
