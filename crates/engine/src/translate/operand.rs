//! What an instruction does to registers, flags and memory, as far as copying it asks.

use iced_x86::{
    Code, EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits,
};

use super::HOST;
use crate::native::operand;

/// Why the address of an instruction's memory operand is of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// There is none, or it is only an address.
    None,
    Read,
    /// Also reads and writes.
    Write,
}

/// An instruction that can be copied, its operands aside.
#[derive(Clone, Copy, Debug)]
pub struct Copyable {
    pub touch: Touch,
    /// The memory operand is written, whatever it was.
    pub stores: bool,
    /// Of the memory operand.
    pub bytes: u64,
    /// Guest registers in memory that are named, and whether they are read and written.
    pub carried: [Option<Carried>; 2],
    /// RAX takes part as itself: without being named, or as AH.
    pub accumulator: bool,
    /// AH is named.
    pub high: bool,
    /// Flags must be in the host's: some are read, or some are kept.
    pub flags_in: bool,
    pub flags_out: bool,
    pub vectors: bool,
    /// Guest general registers, as bits.
    pub writes: u16,
}

impl Copyable {
    /// All flags are written, whatever they were.
    pub fn overwrites_flags(&self) -> bool {
        self.flags_out && !self.flags_in
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    pub guest: u8,
    pub read: bool,
    pub write: bool,
}

const STATUS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// The general form of instructions whose encoding names the accumulator.
pub fn general(code: Code) -> Code {
    use Code::*;
    match code {
        Add_AL_imm8 => Add_rm8_imm8,
        Add_AX_imm16 => Add_rm16_imm16,
        Add_EAX_imm32 => Add_rm32_imm32,
        Add_RAX_imm32 => Add_rm64_imm32,
        Or_AL_imm8 => Or_rm8_imm8,
        Or_AX_imm16 => Or_rm16_imm16,
        Or_EAX_imm32 => Or_rm32_imm32,
        Or_RAX_imm32 => Or_rm64_imm32,
        Adc_AL_imm8 => Adc_rm8_imm8,
        Adc_AX_imm16 => Adc_rm16_imm16,
        Adc_EAX_imm32 => Adc_rm32_imm32,
        Adc_RAX_imm32 => Adc_rm64_imm32,
        Sbb_AL_imm8 => Sbb_rm8_imm8,
        Sbb_AX_imm16 => Sbb_rm16_imm16,
        Sbb_EAX_imm32 => Sbb_rm32_imm32,
        Sbb_RAX_imm32 => Sbb_rm64_imm32,
        And_AL_imm8 => And_rm8_imm8,
        And_AX_imm16 => And_rm16_imm16,
        And_EAX_imm32 => And_rm32_imm32,
        And_RAX_imm32 => And_rm64_imm32,
        Sub_AL_imm8 => Sub_rm8_imm8,
        Sub_AX_imm16 => Sub_rm16_imm16,
        Sub_EAX_imm32 => Sub_rm32_imm32,
        Sub_RAX_imm32 => Sub_rm64_imm32,
        Xor_AL_imm8 => Xor_rm8_imm8,
        Xor_AX_imm16 => Xor_rm16_imm16,
        Xor_EAX_imm32 => Xor_rm32_imm32,
        Xor_RAX_imm32 => Xor_rm64_imm32,
        Cmp_AL_imm8 => Cmp_rm8_imm8,
        Cmp_AX_imm16 => Cmp_rm16_imm16,
        Cmp_EAX_imm32 => Cmp_rm32_imm32,
        Cmp_RAX_imm32 => Cmp_rm64_imm32,
        Test_AL_imm8 => Test_rm8_imm8,
        Test_AX_imm16 => Test_rm16_imm16,
        Test_EAX_imm32 => Test_rm32_imm32,
        Test_RAX_imm32 => Test_rm64_imm32,
        Xchg_r16_AX => Xchg_rm16_r16,
        Xchg_r32_EAX => Xchg_rm32_r32,
        Xchg_r64_RAX => Xchg_rm64_r64,
        other => other,
    }
}

/// Integer instructions that have nothing to them but operands and flags.
pub fn is_plain(insn: &Instruction) -> bool {
    use Mnemonic as M;
    // SETcc and CMOVcc; CMPccXADD is VEX.
    let conditional = insn.condition_code() != iced_x86::ConditionCode::None && insn.encoding() == EncodingKind::Legacy;
    conditional
        || matches!(
            insn.mnemonic(),
            M::Mov
                | M::Add
                | M::Or
                | M::Adc
                | M::Sbb
                | M::And
                | M::Sub
                | M::Xor
                | M::Cmp
                | M::Test
                | M::Inc
                | M::Dec
                | M::Neg
                | M::Not
                | M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
                | M::Shl
                | M::Sal
                | M::Shr
                | M::Sar
                | M::Movzx
                | M::Movsx
                | M::Movsxd
                | M::Xchg
                | M::Imul
                | M::Mul
                | M::Bt
                | M::Bts
                | M::Btr
                | M::Btc
                | M::Cbw
                | M::Cwde
                | M::Cdqe
                | M::Cwd
                | M::Cdq
                | M::Cqo
                | M::Clc
                | M::Stc
                | M::Cmc
        )
}

fn is_absolute(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Mov_AL_moffs8
            | Mov_AX_moffs16
            | Mov_EAX_moffs32
            | Mov_RAX_moffs64
            | Mov_moffs8_AL
            | Mov_moffs16_AX
            | Mov_moffs32_EAX
            | Mov_moffs64_RAX
    )
}

/// What an instruction does that is either plain or runs on the host as it is.
pub fn analyse(info: &mut InstructionInfoFactory, insn: &Instruction) -> Option<Copyable> {
    let memory_at = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory);
    let mmx = insn.op_kinds().enumerate().any(|(i, k)| k == OpKind::Register && insn.op_register(i as u32).is_mm());
    if mmx || !operand::are_known(insn) {
        return None;
    }
    // A0 to A3 have a whole address.
    if memory_at.is_some() && is_absolute(insn.code()) {
        return None;
    }
    // Bit strings reach beyond their operand.
    let bit = matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if bit && memory_at.is_some() && insn.op_kind(1) == OpKind::Register {
        return None;
    }
    let named: u16 = (0..insn.op_count())
        .filter(|&i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr())
        .fold(0, |all, i| all | 1 << insn.op_register(i).full_register().number());
    if named & 1 != 0 && has_hidden_accumulator(info, insn)? {
        return None;
    }
    let found = info.info_options(insn, InstructionInfoOptions::NO_MEMORY_USAGE);
    let stores = memory_at.is_some_and(|at| found.op_access(at) == OpAccess::Write);
    let touch = match memory_at.map(|at| found.op_access(at)) {
        None | Some(OpAccess::None | OpAccess::NoMemAccess) => Touch::None,
        Some(OpAccess::Read | OpAccess::CondRead) => Touch::Read,
        _ => Touch::Write,
    };
    if memory_at.is_some() && touch == Touch::None {
        return None;
    }
    let high = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i) == Register::AH)
        || insn.code() == Code::Fnstsw_AX;
    let mut copyable = Copyable {
        touch,
        stores,
        bytes: if touch == Touch::None { 1 } else { insn.memory_size().size() as u64 },
        carried: [None; 2],
        accumulator: high,
        high,
        flags_in: false,
        flags_out: false,
        vectors: false,
        writes: 0,
    };
    for used in found.used_registers() {
        let (register, access) = (used.register(), used.access());
        if register.is_vector_register() {
            copyable.vectors = true;
            continue;
        }
        if register.is_segment_register() || register.is_st() {
            continue;
        }
        if !register.is_gpr() {
            return None;
        }
        let guest = register.full_register().number();
        if operand::writes(access) {
            copyable.writes |= 1 << guest;
        }
        if named >> guest & 1 == 0 {
            match guest {
                0 => copyable.accumulator = true,
                _ if HOST[guest] == Some(guest as u8) => {}
                _ => return None,
            }
            continue;
        }
        if HOST[guest].is_some() {
            continue;
        }
        // A write of less than four bytes keeps the rest, and a condition may keep everything.
        let whole = access == OpAccess::Write && register.size() >= 4;
        let carried = Carried { guest: guest as u8, read: !whole, write: operand::writes(access) };
        match copyable.carried.iter().position(|c| c.is_some_and(|c| c.guest == carried.guest)) {
            Some(at) => {
                if let Some(c) = &mut copyable.carried[at] {
                    c.read |= carried.read;
                    c.write |= carried.write;
                }
            }
            None => *copyable.carried.iter_mut().find(|c| c.is_none())? = Some(carried),
        }
    }
    copyable.vectors |=
        (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_vector_register());
    let defined = (insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set()) & STATUS;
    let by_cl = operand::counts_by_cl(insn);
    copyable.flags_out = insn.rflags_modified() & STATUS != 0;
    let read = insn.rflags_read() & STATUS != 0;
    // What the manuals leave undefined is what the processor makes of it, and that may depend on what was there.
    let undefined_matters = defined | insn.rflags_undefined() & STATUS != STATUS;
    let shift = matches!(
        insn.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    let none = shift && !by_cl && insn.try_immediate(insn.op_count() - 1).is_ok_and(|i| i as u8 & 31 == 0);
    copyable.flags_in = read || (copyable.flags_out && (undefined_matters || by_cl || none));
    Some(copyable)
}

/// Whether RAX takes part besides being named, as in MUL RAX and CMPXCHG RCX, RAX.
fn has_hidden_accumulator(info: &mut InstructionInfoFactory, insn: &Instruction) -> Option<bool> {
    const OTHER: u8 = 8;
    let mut other = *insn;
    for i in 0..insn.op_count() {
        if insn.op_kind(i) == OpKind::Register && insn.op_register(i).full_register() == Register::RAX {
            let high = insn.op_register(i) == Register::AH;
            other.set_op_register(i, if high { Register::BH } else { renamed(insn.op_register(i), OTHER)? });
        }
    }
    let found = info.info_options(&other, InstructionInfoOptions::NO_MEMORY_USAGE);
    Some(found.used_registers().iter().any(|used| used.register().full_register() == Register::RAX))
}

/// The part of host register `host` that corresponds to `register`; `None` for AH and its like where the number
/// changes.
pub fn renamed(register: Register, host: u8) -> Option<Register> {
    let possible = !operand::is_high_byte(register) || register.full_register().number() == usize::from(host);
    possible.then(|| operand::part(register, host))
}
