//! Integer arithmetic: operations on two operands and on one, shifts, bits, multiplication and division.

use super::{Form, Lower, form, operand_bytes};
use crate::{
    decode::Fusable,
    ops::{alu, bits, by_size, muldiv},
    uop::Handler,
};

impl Lower<'_> {
    pub(super) fn binary<O: alu::Binary>(&mut self) -> Option<Handler> {
        if self.insn.has_lock_prefix() {
            return None;
        }
        let n = operand_bytes(self.insn, 0);
        Some(match self.two_operands()? {
            Form::RegReg => by_size!(n, alu::reg_reg<O>),
            Form::RegMem => by_size!(n, alu::reg_mem<O>),
            Form::MemReg => by_size!(n, alu::mem_reg<O>),
            Form::RegImm => by_size!(n, alu::reg_imm<O>),
            Form::MemImm => by_size!(n, alu::mem_imm<O>),
        })
    }

    pub(super) fn compare<O: alu::Binary>(&mut self, test: bool) -> Option<Handler> {
        let handler = self.binary::<O>()?;
        let bytes = operand_bytes(self.insn, 0);
        self.fusable = match form(self.insn)? {
            Form::RegReg => Fusable::Compare { test, bytes, imm: false },
            Form::RegImm => Fusable::Compare { test, bytes, imm: true },
            _ => Fusable::No,
        };
        Some(handler)
    }

    pub(super) fn unary<O: alu::Unary>(&mut self) -> Option<Handler> {
        if self.insn.has_lock_prefix() {
            return None;
        }
        let n = operand_bytes(self.insn, 0);
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            return Some(by_size!(n, alu::unary_reg<O>));
        }
        Some(by_size!(n, alu::unary_mem<O>))
    }

    pub(super) fn shift<O: alu::Shift>(&mut self) -> Option<Handler> {
        let n = operand_bytes(self.insn, 0);
        let by_cl = self.is_reg(1);
        if !by_cl {
            self.op.imm = self.insn.immediate(1);
        }
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
        }
        Some(match (self.is_reg(0), by_cl) {
            (true, true) => by_size!(n, alu::shift_reg_cl<O>),
            (true, false) => by_size!(n, alu::shift_reg_imm<O>),
            (false, true) => by_size!(n, alu::shift_mem_cl<O>),
            (false, false) => by_size!(n, alu::shift_mem_imm<O>),
        })
    }

    pub(super) fn bit(&mut self, change: bits::Change) -> Option<Handler> {
        let n = operand_bytes(self.insn, 0);
        let mut flags = change as u16;
        if self.is_reg(1) {
            self.op.src = self.reg(1);
            flags |= bits::BY_REGISTER;
        } else {
            self.op.imm = self.insn.immediate(1);
        }
        if self.insn.has_lock_prefix() {
            flags |= bits::LOCK;
        }
        self.op.aux = flags;
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            return Some(by_wide!(n, |T| bits::bit_reg::<T>));
        }
        Some(by_wide!(n, |T| bits::bit_mem::<T>))
    }

    pub(super) fn imul(&mut self) -> Option<Handler> {
        let n = operand_bytes(self.insn, 0);
        match self.insn.op_count() {
            1 => self.multiply::<true>(),
            2 => {
                self.op.dst = self.reg(0);
                if self.is_reg(1) {
                    self.op.src = self.reg(1);
                    return Some(by_wide!(n, |T| muldiv::imul_reg::<T>));
                }
                Some(by_wide!(n, |T| muldiv::imul_mem::<T>))
            }
            _ => {
                self.op.dst = self.reg(0);
                self.op.imm = self.insn.immediate(2);
                if self.is_reg(1) {
                    self.op.src = self.reg(1);
                    return Some(by_wide!(n, |T| muldiv::imul_reg_imm::<T>));
                }
                Some(by_wide!(n, |T| muldiv::imul_mem_imm::<T>))
            }
        }
    }

    pub(super) fn multiply<const SIGNED: bool>(&mut self) -> Option<Handler> {
        let n = operand_bytes(self.insn, 0);
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            return Some(match n {
                1 => muldiv::mul_reg::<u8, SIGNED>,
                n => by_wide!(n, |T| muldiv::mul_reg::<T, SIGNED>),
            });
        }
        Some(match n {
            1 => muldiv::mul_mem::<u8, SIGNED>,
            n => by_wide!(n, |T| muldiv::mul_mem::<T, SIGNED>),
        })
    }

    pub(super) fn divide<const SIGNED: bool>(&mut self) -> Option<Handler> {
        let n = operand_bytes(self.insn, 0);
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            return Some(match n {
                1 => muldiv::div_reg::<u8, SIGNED>,
                n => by_wide!(n, |T| muldiv::div_reg::<T, SIGNED>),
            });
        }
        Some(match n {
            1 => muldiv::div_mem::<u8, SIGNED>,
            n => by_wide!(n, |T| muldiv::div_mem::<T, SIGNED>),
        })
    }
}
