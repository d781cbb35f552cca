//! What moves data: MOV and its kin, the stack, strings and ports.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{Form, Lower, operand, operand_bytes};
use crate::{
    ops::{
        by_size, data, flow, port, stack, string,
        system::{self, MEMORY, System, aux},
    },
    uop::Handler,
};

impl Lower<'_> {
    pub(super) fn mov(&mut self) -> Option<Handler> {
        let insn = self.insn;
        let (r0, r1) = (insn.op0_register(), insn.op1_register());
        let bytes = |i| operand_bytes(insn, i);
        if r0.is_segment_register() {
            self.op.src = operand::segment(r0);
            let form = if self.is_reg(1) {
                self.op.dst = self.reg(1);
                0
            } else {
                MEMORY
            };
            self.op.aux = aux(System::MovSeg, form);
            return Some(system::system);
        }
        if r1.is_segment_register() {
            self.op.src = operand::segment(r1);
            if self.is_reg(0) {
                self.op.dst = self.reg(0);
                self.op.aux = bytes(0) as u16;
            }
            return Some(data::mov_from_seg);
        }
        let control = |r: Register| r.is_cr() || r.is_dr();
        if control(r0) || control(r1) {
            let which = match (r0.is_cr(), r0.is_dr(), r1.is_cr()) {
                (true, ..) => System::WriteCr,
                (_, true, _) => System::WriteDr,
                (_, _, true) => System::ReadCr,
                _ => System::ReadDr,
            };
            if control(r0) {
                (self.op.dst, self.op.src) = (r0.number() as u8, self.reg(1));
                self.ends = true;
            } else {
                (self.op.dst, self.op.src) = (self.reg(0), r1.number() as u8);
            }
            self.op.aux = aux(which, 0);
            return Some(system::system);
        }
        if r0.is_tr() || r1.is_tr() {
            self.undefined();
            return Some(flow::undefined);
        }
        let absolute = matches!(
            insn.code(),
            Code::Mov_AL_moffs8
                | Code::Mov_AX_moffs16
                | Code::Mov_EAX_moffs32
                | Code::Mov_RAX_moffs64
                | Code::Mov_moffs8_AL
                | Code::Mov_moffs16_AX
                | Code::Mov_moffs32_EAX
                | Code::Mov_moffs64_RAX
        );
        if absolute {
            self.op.imm = insn.memory_displacement64();
            self.op.disp = 0;
            let n = if self.is_reg(0) { bytes(0) } else { bytes(1) };
            return Some(if self.is_reg(0) { by_size!(n, data::mov_acc_abs) } else { by_size!(n, data::mov_abs_acc) });
        }
        let n = bytes(0);
        Some(match self.two_operands()? {
            Form::RegReg => by_size!(n, data::mov_reg_reg),
            Form::RegMem => by_size!(n, data::mov_reg_mem),
            Form::MemReg => by_size!(n, data::mov_mem_reg),
            Form::RegImm => by_size!(n, data::mov_reg_imm),
            Form::MemImm => by_size!(n, data::mov_mem_imm),
        })
    }

    pub(super) fn extend(&mut self, signed: bool) -> Option<Handler> {
        let (to, from) = (operand_bytes(self.insn, 0), operand_bytes(self.insn, 1));
        self.op.dst = self.reg(0);
        let register = self.is_reg(1);
        if register {
            self.op.src = self.reg(1);
        }
        macro_rules! pick {
            ($s:ty) => {
                by_wide!(to, |T| match (signed, register) {
                    (false, true) => data::movzx_reg::<$s, T>,
                    (false, false) => data::movzx_mem::<$s, T>,
                    (true, true) => data::movsx_reg::<$s, T>,
                    (true, false) => data::movsx_mem::<$s, T>,
                })
            };
        }
        Some(match from {
            1 => pick!(u8),
            2 => pick!(u16),
            _ => pick!(u32),
        })
    }

    pub(super) fn extend_signed(&mut self) -> Option<Handler> {
        // MOVSXD without REX.W only copies.
        if operand_bytes(self.insn, 0) == operand_bytes(self.insn, 1) {
            let n = operand_bytes(self.insn, 0);
            return Some(match self.two_operands()? {
                Form::RegReg => by_size!(n, data::mov_reg_reg),
                _ => by_size!(n, data::mov_reg_mem),
            });
        }
        self.extend(true)
    }

    pub(super) fn lea(&mut self) -> Option<Handler> {
        self.op.dst = self.reg(0);
        let n = self.insn.op0_register().size();
        if n == 8 && self.op.asz == crate::uop::address::LONG {
            return Some(data::lea64);
        }
        Some(by_wide!(n, |T| data::lea::<T>))
    }

    pub(super) fn xchg(&mut self) -> Option<Handler> {
        if !(self.is_reg(0) && self.is_reg(1)) {
            return None;
        }
        let n = operand_bytes(self.insn, 0);
        self.two_operands()?;
        Some(by_size!(n, data::xchg_reg_reg))
    }

    pub(super) fn xlat(&mut self) -> Option<Handler> {
        let bytes = match self.insn.memory_base() {
            Register::BX => 2,
            Register::EBX => 4,
            _ => 8,
        };
        self.op.seg = operand::segment(self.insn.memory_segment());
        self.op.asz = operand::implicit_address(bytes, self.mode);
        Some(data::xlat)
    }

    pub(super) fn cmov(&mut self, cc: u8) -> Option<Handler> {
        let n = operand_bytes(self.insn, 0);
        Some(match self.two_operands()? {
            Form::RegReg => by_condition!(cc, |C| by_wide!(n, |T| data::cmov_reg::<C, T>)),
            _ => by_condition!(cc, |C| by_wide!(n, |T| data::cmov_mem::<C, T>)),
        })
    }

    pub(super) fn setcc(&mut self, cc: u8) -> Option<Handler> {
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            return Some(by_condition!(cc, |C| data::set_reg::<C>));
        }
        Some(by_condition!(cc, |C| data::set_mem::<C>))
    }

    pub(super) fn push(&mut self) -> Option<Handler> {
        let insn = self.insn;
        // The stack changes by the operand size that the encoding has.
        let n = insn.stack_pointer_increment().unsigned_abs() as usize;
        self.op.aux = n as u16;
        if self.is_reg(0) {
            let register = insn.op0_register();
            if register.is_segment_register() {
                self.op.src = operand::segment(register);
                return Some(stack::push_seg);
            }
            self.op.src = self.reg(0);
            return Some(if self.long() && n == 8 { stack::push_reg64 } else { stack::push_reg });
        }
        if insn.op0_kind() == OpKind::Memory {
            return Some(stack::push_mem);
        }
        self.op.imm = insn.immediate(0);
        Some(stack::push_imm)
    }

    pub(super) fn pop(&mut self) -> Option<Handler> {
        let n = self.insn.stack_pointer_increment().unsigned_abs() as usize;
        self.op.aux = n as u16;
        if !self.is_reg(0) {
            return Some(stack::pop_mem);
        }
        let register = self.insn.op0_register();
        if register.is_segment_register() {
            self.op.src = operand::segment(register);
            self.op.aux = aux(System::PopSeg, n);
            return Some(system::system);
        }
        self.op.dst = self.reg(0);
        Some(if self.long() && n == 8 { stack::pop_reg64 } else { stack::pop_reg })
    }

    pub(super) fn flags_stack(&mut self, handler: Handler) -> Option<Handler> {
        self.op.aux = self.insn.stack_pointer_increment().unsigned_abs() as u16;
        Some(handler)
    }

    pub(super) fn flags_or_frame(&mut self, handler: Handler) -> Option<Handler> {
        self.op.aux = match self.insn.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        Some(handler)
    }

    pub(super) fn enter(&mut self) -> Option<Handler> {
        self.op.aux = match self.insn.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        self.op.imm = u64::from(self.insn.immediate16()) | u64::from(self.insn.immediate8_2nd()) << 16;
        Some(stack::enter)
    }

    pub(super) fn all_registers(&mut self, handler: Handler, bytes: u16) -> Option<Handler> {
        self.op.aux = bytes;
        Some(handler)
    }

    pub(super) fn string(&mut self) -> Option<Handler> {
        let insn = self.insn;
        let kinds = (0..insn.op_count()).map(|i| insn.op_kind(i));
        let bytes = kinds.filter_map(operand::string_register_bytes).next()?;
        self.op.asz = operand::implicit_address(bytes, self.mode);
        self.op.seg = operand::segment(insn.memory_segment());
        if insn.has_rep_prefix() || insn.has_repe_prefix() {
            self.op.aux = string::REP;
        } else if insn.has_repne_prefix() {
            // Only SCAS and CMPS look at which prefix it is.
            self.op.aux = string::REPNE;
        }
        let n = insn.memory_size().size();
        Some(match insn.mnemonic() {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => by_size!(n, string::movs),
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => by_size!(n, string::stos),
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => by_size!(n, string::lods),
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => by_size!(n, string::scas),
            Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => by_size!(n, string::cmps),
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => by_size!(n, string::ins),
            _ => by_size!(n, string::outs),
        })
    }

    pub(super) fn port(&mut self, input: bool) -> Option<Handler> {
        let (value, port) = if input { (0, 1) } else { (1, 0) };
        let n = self.insn.op_register(value).size() as u16;
        self.op.aux = if self.is_reg(port) {
            n | port::PORT_IN_DX
        } else {
            self.op.imm = self.insn.immediate(port) & 0xff;
            n
        };
        Some(if input { port::input } else { port::output })
    }
}

pub(super) fn is_cmov(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}

pub(super) fn is_setcc(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}
