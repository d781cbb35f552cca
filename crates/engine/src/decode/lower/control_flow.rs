//! Jumps, calls and returns.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind};

use super::{Lower, operand, operand_bytes};
use crate::{
    ops::{
        alu, flow,
        system::{self, MEMORY, System, aux},
    },
    uop::{Handler, Uop},
};

fn jcc(cc: u8) -> Handler {
    by_condition!(cc, |C| flow::jcc::<C>)
}

fn jcc16(cc: u8) -> Handler {
    by_condition!(cc, |C| flow::jcc16::<C>)
}

/// The condition code of an op that is a plain conditional jump.
pub fn condition_of(op: &Uop) -> Option<u8> {
    (0..16).find(|&cc| std::ptr::fn_addr_eq(op.handler, jcc(cc)))
}

/// The handler of a comparison with the conditional jump behind it.
pub fn compare_jcc(cc: u8, test: bool, bytes: usize, imm: bool) -> Handler {
    macro_rules! of {
        ($t:ty) => {
            match (test, imm) {
                (false, false) => by_condition!(cc, |C| flow::compare_jcc::<C, alu::Cmp, $t, false>),
                (false, true) => by_condition!(cc, |C| flow::compare_jcc::<C, alu::Cmp, $t, true>),
                (true, false) => by_condition!(cc, |C| flow::compare_jcc::<C, alu::Test, $t, false>),
                (true, true) => by_condition!(cc, |C| flow::compare_jcc::<C, alu::Test, $t, true>),
            }
        };
    }
    match bytes {
        1 => of!(u8),
        2 => of!(u16),
        4 => of!(u32),
        _ => of!(u64),
    }
}

impl Lower<'_> {
    /// The relative target of a near branch, its operand size in bytes.
    fn near(&mut self) -> usize {
        match self.insn.op0_kind() {
            OpKind::NearBranch16 => {
                self.op.imm = u64::from(self.insn.near_branch16());
                2
            }
            OpKind::NearBranch32 => {
                self.op.imm = u64::from(self.insn.near_branch32());
                4
            }
            _ => {
                self.op.imm = self.insn.near_branch64();
                8
            }
        }
    }

    pub(super) fn branch(&mut self) -> Option<Handler> {
        let insn = self.insn;
        self.ends = true;
        let cc = insn.condition_code();
        Some(match insn.flow_control() {
            FlowControl::ConditionalBranch if insn.is_jcc_short_or_near() => {
                let cc = cc as u8 - 1;
                if self.near() == 2 { jcc16(cc) } else { jcc(cc) }
            }
            FlowControl::ConditionalBranch => {
                let (kind, bytes) = match insn.mnemonic() {
                    Mnemonic::Loop => (0, loop_bytes(insn)),
                    Mnemonic::Loope => (1, loop_bytes(insn)),
                    Mnemonic::Loopne => (2, loop_bytes(insn)),
                    Mnemonic::Jcxz => (3, 2),
                    Mnemonic::Jecxz => (3, 4),
                    Mnemonic::Jrcxz => (3, 8),
                    _ => return None,
                };
                self.op.asz = operand::implicit_address(bytes, self.mode);
                let narrow = self.near() == 2;
                self.op.aux = kind | if narrow { 4 } else { 0 };
                flow::loop_cx
            }
            FlowControl::UnconditionalBranch if insn.is_jmp_far() => self.far(System::FarJmp)?,
            FlowControl::UnconditionalBranch => match self.near() {
                2 => flow::jmp16,
                _ => flow::jmp,
            },
            FlowControl::IndirectBranch if insn.is_jmp_far_indirect() => self.far(System::FarJmp)?,
            FlowControl::IndirectBranch => self.indirect(flow::jmp_reg64, flow::jmp_mem64, flow::legacy::jmp),
            FlowControl::Call if insn.is_call_far() => self.far(System::FarCall)?,
            FlowControl::Call if insn.is_call_near() => {
                let n = self.near();
                if n == 8 {
                    flow::call64
                } else {
                    self.op.aux = flow::legacy::RELATIVE | n as u16;
                    flow::legacy::call
                }
            }
            FlowControl::IndirectCall if insn.is_call_far_indirect() => self.far(System::FarCall)?,
            FlowControl::IndirectCall => self.indirect(flow::call_reg64, flow::call_mem64, flow::legacy::call),
            _ => return None,
        })
    }

    fn indirect(&mut self, register: Handler, memory: Handler, legacy: Handler) -> Handler {
        let n = operand_bytes(self.insn, 0);
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
        }
        match (n, self.is_reg(0)) {
            (8, true) => register,
            (8, false) => memory,
            (n, in_register) => {
                self.op.aux = n as u16 | if in_register { flow::legacy::REGISTER } else { flow::legacy::MEMORY };
                legacy
            }
        }
    }

    fn far(&mut self, which: System) -> Option<Handler> {
        let insn = self.insn;
        self.ends = true;
        let (size, form) = match insn.op0_kind() {
            OpKind::FarBranch16 => (2, 0),
            OpKind::FarBranch32 => (4, 0),
            _ => (insn.memory_size().size() - 2, MEMORY),
        };
        if form == 0 {
            let offset = if size == 2 { u32::from(insn.far_branch16()) } else { insn.far_branch32() };
            self.op.imm = u64::from(insn.far_branch_selector()) << 32 | u64::from(offset);
        }
        self.op.aux = aux(which, size | form);
        Some(system::system)
    }

    pub(super) fn near_return(&mut self) -> Option<Handler> {
        let insn = self.insn;
        self.ends = true;
        let n = match insn.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        self.op.imm = if insn.op_count() == 1 { insn.immediate(0) & 0xffff } else { 0 };
        if n == 8 {
            return Some(flow::ret64);
        }
        self.op.aux = n;
        Some(flow::legacy::ret)
    }

    pub(super) fn far_return(&mut self) -> Option<Handler> {
        let n = match self.insn.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        self.op.imm = if self.insn.op_count() == 1 { self.insn.immediate(0) & 0xffff } else { 0 };
        self.system_end(System::FarRet, n)
    }
}

fn loop_bytes(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}

pub(super) fn is_branch(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Jmp | M::Call | M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz)
}
