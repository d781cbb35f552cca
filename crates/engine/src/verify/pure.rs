//! What may be done twice.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, RflagsBits};

use crate::cpu::rflags;

/// What depends on more than registers and memory, or changes more than that, and no predicate of iced says.
const IMPURE: &[Mnemonic] = &[
    Mnemonic::Syscall,
    Mnemonic::Sysenter,
    Mnemonic::Sysret,
    Mnemonic::Sysretq,
    Mnemonic::Sysexit,
    Mnemonic::Sysexitq,
    Mnemonic::Retf,
    Mnemonic::Iret,
    Mnemonic::Iretd,
    Mnemonic::Iretq,
    Mnemonic::Sti,
    Mnemonic::Popf,
    Mnemonic::Popfd,
    Mnemonic::Popfq,
    Mnemonic::Pause,
    Mnemonic::Cpuid,
    Mnemonic::Xgetbv,
    Mnemonic::Rdtsc,
    Mnemonic::Rdtscp,
    Mnemonic::Rdpmc,
    Mnemonic::Rdpid,
    Mnemonic::Rdrand,
    Mnemonic::Rdseed,
    Mnemonic::Lds,
    Mnemonic::Les,
    Mnemonic::Lss,
    Mnemonic::Lfs,
    Mnemonic::Lgs,
    Mnemonic::Wrfsbase,
    Mnemonic::Wrgsbase,
    Mnemonic::Lar,
    Mnemonic::Lsl,
    Mnemonic::Verr,
    Mnemonic::Verw,
    Mnemonic::Vmcall,
    Mnemonic::Vmmcall,
    Mnemonic::Stac,
    Mnemonic::Clac,
];

/// Whether an instruction changes nothing but general, floating-point and vector registers, flags and memory, and depends
/// on nothing that changes otherwise.
pub fn is_pure(insn: &Instruction) -> bool {
    let flow = matches!(
        insn.flow_control(),
        FlowControl::Next
            | FlowControl::UnconditionalBranch
            | FlowControl::ConditionalBranch
            | FlowControl::Call
            | FlowControl::Return
            | FlowControl::IndirectBranch
            | FlowControl::IndirectCall
            | FlowControl::Exception
    );
    let far = insn.op_kinds().any(|kind| matches!(kind, OpKind::FarBranch16 | OpKind::FarBranch32))
        || insn.is_jmp_far_indirect()
        || insn.is_call_far_indirect();
    let loads_segment = insn.op_count() > 0
        && insn.op0_kind() == OpKind::Register
        && insn.op0_register().is_segment_register()
        && insn.mnemonic() != Mnemonic::Push;
    let privileged = insn.is_privileged() && insn.mnemonic() != Mnemonic::Cli;
    flow && !far && !loads_segment && !privileged && !IMPURE.contains(&insn.mnemonic())
}

/// Where the manual leaves flags undefined and processors make them of what they were before, so that the tiers differ.
/// All others are compared.
const UNDEFINED: &[Mnemonic] = &[Mnemonic::Imul, Mnemonic::Mul, Mnemonic::Div, Mnemonic::Idiv];

/// What a run of instructions does to status flags, as bits of RFLAGS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlagFlow {
    /// Not written.
    kept: u64,
    /// Undefined at its end, and anywhere.
    undefined: u64,
    ever_undefined: u64,
    /// Read before they are written.
    read: u64,
    /// Some are read that are undefined.
    reads_undefined: bool,
}

impl FlagFlow {
    pub fn of(instructions: &[Instruction]) -> Self {
        let mut flow = Self { kept: rflags::STATUS, ..Self::default() };
        for insn in instructions {
            let read = status(insn.rflags_read());
            flow.reads_undefined |= read & flow.undefined != 0;
            flow.read |= read & flow.kept;
            let modified = status(insn.rflags_modified());
            let undefined = match insn.mnemonic() {
                // By 9 bits, say, iced takes a byte's flags for unchanged. Processors change OF, which is undefined.
                Mnemonic::Rcl | Mnemonic::Rcr => status(RflagsBits::OF),
                mnemonic if UNDEFINED.contains(&mnemonic) => status(insn.rflags_undefined()),
                _ => 0,
            };
            flow.kept &= !modified;
            flow.undefined = flow.undefined & !modified | undefined;
            flow.ever_undefined |= undefined;
        }
        flow
    }

    /// What is undefined at its end where this was before; `None` if something depends on it. `faults`: it may have
    /// ended anywhere.
    pub fn follow(&self, undefined: u64, faults: bool) -> Option<u64> {
        let depends = self.reads_undefined || self.read & undefined != 0;
        let after = if faults { undefined | self.ever_undefined } else { undefined & self.kept | self.undefined };
        (!depends).then_some(after)
    }
}

/// From iced's bits to those of RFLAGS.
fn status(bits: u32) -> u64 {
    [
        (RflagsBits::OF, 1 << 11),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::CF, 1),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |all, (_, flag)| all | flag)
}
