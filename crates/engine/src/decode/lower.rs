//! Which handler an instruction gets.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::{BLANK, Fusable, Lowered, operand};
use crate::{
    cpu::{Cpu, mode, sreg},
    native::Native,
    ops::{
        alu, bits, by_size, data, flow, muldiv, native, port, stack, string,
        system::{self, MEMORY, System, aux},
    },
    regs::slot,
    uop::{Handler, Uop},
};

/// A handler for each condition code.
macro_rules! by_condition {
    ($cc:expr, |$c:ident| $f:expr) => {
        match $cc {
            0 => {
                const $c: u8 = 0;
                $f
            }
            1 => {
                const $c: u8 = 1;
                $f
            }
            2 => {
                const $c: u8 = 2;
                $f
            }
            3 => {
                const $c: u8 = 3;
                $f
            }
            4 => {
                const $c: u8 = 4;
                $f
            }
            5 => {
                const $c: u8 = 5;
                $f
            }
            6 => {
                const $c: u8 = 6;
                $f
            }
            7 => {
                const $c: u8 = 7;
                $f
            }
            8 => {
                const $c: u8 = 8;
                $f
            }
            9 => {
                const $c: u8 = 9;
                $f
            }
            10 => {
                const $c: u8 = 10;
                $f
            }
            11 => {
                const $c: u8 = 11;
                $f
            }
            12 => {
                const $c: u8 = 12;
                $f
            }
            13 => {
                const $c: u8 = 13;
                $f
            }
            14 => {
                const $c: u8 = 14;
                $f
            }
            _ => {
                const $c: u8 = 15;
                $f
            }
        }
    };
}

/// A handler for 2-, 4- and 8-byte operands.
macro_rules! by_wide {
    ($bytes:expr, |$t:ident| $f:expr) => {
        match $bytes {
            2 => {
                type $t = u16;
                $f
            }
            4 => {
                type $t = u32;
                $f
            }
            _ => {
                type $t = u64;
                $f
            }
        }
    };
}

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

/// How the operands of an instruction reach it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    RegReg,
    RegMem,
    MemReg,
    RegImm,
    MemImm,
}

fn form(insn: &Instruction) -> Option<Form> {
    let memory = |i| insn.op_kind(i) == OpKind::Memory;
    let register = |i| insn.op_kind(i) == OpKind::Register;
    Some(match insn.op_count() {
        2 if register(0) && register(1) => Form::RegReg,
        2 if register(0) && memory(1) => Form::RegMem,
        2 if memory(0) && register(1) => Form::MemReg,
        2 if register(0) && insn.try_immediate(1).is_ok() => Form::RegImm,
        2 if memory(0) && insn.try_immediate(1).is_ok() => Form::MemImm,
        _ => return None,
    })
}

/// Bytes of operand `i`, register or memory.
fn operand_bytes(insn: &Instruction, i: u32) -> usize {
    if insn.op_kind(i) == OpKind::Register { insn.op_register(i).size() } else { insn.memory_size().size() }
}

/// An instruction on its way to a [`Uop`].
struct Lower<'a> {
    insn: &'a Instruction,
    op: Uop,
    mode: u8,
    /// The operand size of near control transfers and stack operations, in bytes.
    ends: bool,
    fusable: Fusable,
}

impl Cpu {
    pub(crate) fn lower(&mut self, insn: &Instruction, off: u16) -> Lowered {
        let op = Uop { off, len: insn.len() as u8, ..BLANK };
        let mut lower = Lower { insn, op, mode: self.mode, ends: false, fusable: Fusable::No };
        let has_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        let expressible = !has_memory || operand::memory(&mut lower.op, insn, self.mode);
        if !has_memory && insn.is_stack_instruction() {
            // Faults of its accesses are the stack's.
            lower.op.seg = sreg::SS as u8;
        }
        if insn.is_invalid() || !expressible {
            lower.undefined();
        } else if let Some(handler) = lower.handler() {
            lower.op.handler = handler;
        } else {
            self.lower_native(&mut lower);
        }
        Lowered { op: lower.op, ends: lower.ends, fusable: lower.fusable }
    }

    fn lower_native(&mut self, lower: &mut Lower<'_>) {
        match self.stubs.get(lower.insn) {
            Ok(Native::Stub(stub)) => {
                let plain = !stub.uses_fpu()
                    && stub.class == crate::native::FeatureClass::Integer
                    && stub.memory.access == crate::native::Access::None;
                lower.op.handler = if plain { native::stub_register } else { native::stub };
                lower.op.imm = self.keep_stub(stub) as u64;
            }
            Ok(Native::Special(special)) => {
                lower.op.handler = native::special;
                lower.op.imm = self.keep_special(special) as u64;
                for i in 0..lower.insn.op_count() {
                    // MASKMOV: the address is rDI in the (overridable) data segment.
                    if let Some(bytes) = operand::string_register_bytes(lower.insn.op_kind(i)) {
                        lower.op.base = 7;
                        lower.op.seg = operand::segment(lower.insn.memory_segment());
                        lower.op.asz = operand::implicit_address(bytes, lower.mode);
                    }
                }
            }
            Err(error) => {
                self.stubs_full |= error == crate::native::Unsupported::Full;
                if self.stubs_full {
                    // Come back to this very instruction with an empty cache.
                    lower.op.handler = flow::refetch;
                    lower.ends = true;
                } else {
                    lower.undefined();
                }
            }
        }
    }
}

impl Lower<'_> {
    fn undefined(&mut self) {
        self.op.handler = flow::undefined;
        self.ends = true;
    }

    fn long(&self) -> bool {
        self.mode & mode::CODE == mode::CODE64
    }

    fn reg(&self, i: u32) -> u8 {
        operand::gpr(self.insn.op_register(i))
    }

    fn is_reg(&self, i: u32) -> bool {
        self.insn.op_kind(i) == OpKind::Register
    }

    /// Fills in registers and immediates of a two-operand instruction.
    fn two_operands(&mut self) -> Option<Form> {
        let form = form(self.insn)?;
        match form {
            Form::RegReg => (self.op.dst, self.op.src) = (self.reg(0), self.reg(1)),
            Form::RegMem => self.op.dst = self.reg(0),
            Form::MemReg => self.op.src = self.reg(1),
            Form::RegImm => {
                self.op.dst = self.reg(0);
                self.op.imm = self.insn.immediate(1);
            }
            Form::MemImm => self.op.imm = self.insn.immediate(1),
        }
        Some(form)
    }

    fn binary<O: alu::Binary>(&mut self) -> Option<Handler> {
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

    fn compare<O: alu::Binary>(&mut self, test: bool) -> Option<Handler> {
        let handler = self.binary::<O>()?;
        let bytes = operand_bytes(self.insn, 0);
        self.fusable = match form(self.insn)? {
            Form::RegReg => Fusable::Compare { test, bytes, imm: false },
            Form::RegImm => Fusable::Compare { test, bytes, imm: true },
            _ => Fusable::No,
        };
        Some(handler)
    }

    fn unary<O: alu::Unary>(&mut self) -> Option<Handler> {
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

    fn shift<O: alu::Shift>(&mut self) -> Option<Handler> {
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

    fn mov(&mut self) -> Option<Handler> {
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

    fn extend(&mut self, signed: bool) -> Option<Handler> {
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

    fn bit(&mut self, change: bits::Change) -> Option<Handler> {
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

    fn imul(&mut self) -> Option<Handler> {
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

    fn multiply<const SIGNED: bool>(&mut self) -> Option<Handler> {
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

    fn divide<const SIGNED: bool>(&mut self) -> Option<Handler> {
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

    fn push(&mut self) -> Option<Handler> {
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

    fn pop(&mut self) -> Option<Handler> {
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

    fn branch(&mut self) -> Option<Handler> {
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

    fn near_return(&mut self) -> Option<Handler> {
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

    fn string(&mut self) -> Option<Handler> {
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

    fn port(&mut self, input: bool) -> Option<Handler> {
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

    fn system(&mut self, which: System, bytes: usize) -> Option<Handler> {
        self.op.aux = aux(which, bytes);
        Some(system::system)
    }

    fn system_end(&mut self, which: System, bytes: usize) -> Option<Handler> {
        self.ends = true;
        self.system(which, bytes)
    }

    /// A system instruction with one 16-bit (or wider register) operand.
    fn system_operand(&mut self, which: System) -> Option<Handler> {
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            let n = self.insn.op0_register().size();
            return self.system(which, n);
        }
        self.system(which, MEMORY | 2)
    }

    fn lar_lsl(&mut self, which: System) -> Option<Handler> {
        self.op.dst = self.reg(0);
        let n = self.insn.op0_register().size();
        if self.is_reg(1) {
            self.op.src = self.reg(1);
            return self.system(which, n);
        }
        self.system(which, MEMORY | n)
    }

    fn base(&mut self, which: System, segment: u8) -> Option<Handler> {
        self.op.dst = self.reg(0);
        self.op.src = segment;
        let n = self.insn.op0_register().size();
        self.system(which, n)
    }

    fn load_far(&mut self, segment: u8) -> Option<Handler> {
        self.op.dst = self.reg(0);
        self.op.src = segment;
        let n = self.insn.op0_register().size();
        self.system(System::LoadFar, n)
    }

    fn flags_stack(&mut self, handler: Handler) -> Option<Handler> {
        self.op.aux = self.insn.stack_pointer_increment().unsigned_abs() as u16;
        Some(handler)
    }

    fn table_bytes(&self) -> usize {
        // 16-bit operands take 24 bits of the base.
        match self.insn.code() {
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
            _ => 4,
        }
    }

    /// The handler, or `None` for what runs natively.
    fn handler(&mut self) -> Option<Handler> {
        use Mnemonic as M;
        let insn = self.insn;
        let cc = insn.condition_code() as u8;
        match insn.mnemonic() {
            M::Mov => self.mov(),
            M::Add => self.binary::<alu::Add>(),
            M::Or => self.binary::<alu::Or>(),
            M::Adc => self.binary::<alu::Adc>(),
            M::Sbb => self.binary::<alu::Sbb>(),
            M::And => self.binary::<alu::And>(),
            M::Sub => self.binary::<alu::Sub>(),
            M::Xor => self.binary::<alu::Xor>(),
            M::Cmp => self.compare::<alu::Cmp>(false),
            M::Test => self.compare::<alu::Test>(true),
            M::Inc => self.unary::<alu::Inc>(),
            M::Dec => self.unary::<alu::Dec>(),
            M::Neg => self.unary::<alu::Neg>(),
            M::Not => self.unary::<alu::Not>(),
            M::Rol => self.shift::<alu::Rol>(),
            M::Ror => self.shift::<alu::Ror>(),
            M::Rcl => self.shift::<alu::Rcl>(),
            M::Rcr => self.shift::<alu::Rcr>(),
            M::Shl | M::Sal => self.shift::<alu::Shl>(),
            M::Shr => self.shift::<alu::Shr>(),
            M::Sar => self.shift::<alu::Sar>(),
            M::Movzx => self.extend(false),
            M::Movsx | M::Movsxd => self.extend_signed(),
            M::Lea => self.lea(),
            M::Xchg => self.xchg(),
            M::Push => self.push(),
            M::Pop => self.pop(),
            M::Imul => self.imul(),
            M::Mul => self.multiply::<false>(),
            M::Div => self.divide::<false>(),
            M::Idiv => self.divide::<true>(),
            M::Bt => self.bit(bits::Change::None),
            M::Bts => self.bit(bits::Change::Set),
            M::Btr => self.bit(bits::Change::Reset),
            M::Btc => self.bit(bits::Change::Complement),
            m if is_nop(m) => Some(data::nop),
            M::Pause => self.system(System::Wait, 0),
            M::Mfence | M::Lfence | M::Sfence => Some(native::fence),
            M::Clflush | M::Clflushopt | M::Clwb => Some(native::touch),
            M::Vzeroupper => Some(native::vzeroupper),
            M::Cbw => Some(data::extend_acc::<u16>),
            M::Cwde => Some(data::extend_acc::<u32>),
            M::Cdqe => Some(data::extend_acc::<u64>),
            M::Cwd => Some(data::sign_acc::<u16>),
            M::Cdq => Some(data::sign_acc::<u32>),
            M::Cqo => Some(data::sign_acc::<u64>),
            M::Clc => Some(data::clc),
            M::Stc => Some(data::stc),
            M::Cmc => Some(data::cmc),
            M::Cld => Some(data::cld),
            M::Std => Some(data::std),
            M::Lahf => Some(data::lahf),
            M::Sahf => Some(data::sahf),
            M::Xlatb => self.xlat(),
            M::Ret => self.near_return(),
            M::Retf => self.far_return(),
            M::Leave => self.flags_or_frame(stack::leave),
            M::Enter => self.enter(),
            M::Pushf | M::Pushfd | M::Pushfq => self.flags_stack(stack::pushf),
            M::Popf | M::Popfd | M::Popfq => {
                self.ends = true;
                self.flags_stack(stack::popf)
            }
            M::Pusha => self.all_registers(stack::pusha, 2),
            M::Pushad => self.all_registers(stack::pusha, 4),
            M::Popa => self.all_registers(stack::popa, 2),
            M::Popad => self.all_registers(stack::popa, 4),
            M::In => self.port(true),
            M::Out => self.port(false),
            M::Movsb
            | M::Movsw
            | M::Movsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsq
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd => self.string(),
            M::Movsd | M::Cmpsd if insn.is_string_instruction() => self.string(),
            _ if insn.is_jcc_short_or_near() || is_branch(insn) => self.branch(),
            _ if is_cmov(insn) => self.cmov(cc - 1),
            _ if is_setcc(insn) => self.setcc(cc - 1),
            _ => self.system_handler(),
        }
    }

    fn extend_signed(&mut self) -> Option<Handler> {
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

    fn lea(&mut self) -> Option<Handler> {
        self.op.dst = self.reg(0);
        let n = self.insn.op0_register().size();
        if n == 8 && self.op.asz == crate::uop::address::LONG {
            return Some(data::lea64);
        }
        Some(by_wide!(n, |T| data::lea::<T>))
    }

    fn xchg(&mut self) -> Option<Handler> {
        if !(self.is_reg(0) && self.is_reg(1)) {
            return None;
        }
        let n = operand_bytes(self.insn, 0);
        self.two_operands()?;
        Some(by_size!(n, data::xchg_reg_reg))
    }

    fn xlat(&mut self) -> Option<Handler> {
        let bytes = match self.insn.memory_base() {
            Register::BX => 2,
            Register::EBX => 4,
            _ => 8,
        };
        self.op.seg = operand::segment(self.insn.memory_segment());
        self.op.asz = operand::implicit_address(bytes, self.mode);
        Some(data::xlat)
    }

    fn cmov(&mut self, cc: u8) -> Option<Handler> {
        let n = operand_bytes(self.insn, 0);
        Some(match self.two_operands()? {
            Form::RegReg => by_condition!(cc, |C| by_wide!(n, |T| data::cmov_reg::<C, T>)),
            _ => by_condition!(cc, |C| by_wide!(n, |T| data::cmov_mem::<C, T>)),
        })
    }

    fn setcc(&mut self, cc: u8) -> Option<Handler> {
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            return Some(by_condition!(cc, |C| data::set_reg::<C>));
        }
        Some(by_condition!(cc, |C| data::set_mem::<C>))
    }

    fn far_return(&mut self) -> Option<Handler> {
        let n = match self.insn.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        self.op.imm = if self.insn.op_count() == 1 { self.insn.immediate(0) & 0xffff } else { 0 };
        self.system_end(System::FarRet, n)
    }

    fn flags_or_frame(&mut self, handler: Handler) -> Option<Handler> {
        self.op.aux = match self.insn.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        Some(handler)
    }

    fn enter(&mut self) -> Option<Handler> {
        self.op.aux = match self.insn.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        self.op.imm = u64::from(self.insn.immediate16()) | u64::from(self.insn.immediate8_2nd()) << 16;
        Some(stack::enter)
    }

    fn all_registers(&mut self, handler: Handler, bytes: u16) -> Option<Handler> {
        self.op.aux = bytes;
        Some(handler)
    }

    fn system_handler(&mut self) -> Option<Handler> {
        use Mnemonic as M;
        let insn = self.insn;
        match insn.mnemonic() {
            M::Hlt => self.system_end(System::Hlt, 0),
            M::Cli => self.system(System::Cli, 0),
            M::Sti => self.system(System::Sti, 0),
            M::Cpuid => self.system(System::Cpuid, 0),
            M::Rdtsc => self.system(System::Rdtsc, 0),
            M::Rdtscp => self.system(System::Rdtscp, 0),
            M::Rdpmc => self.system(System::Rdpmc, 0),
            M::Rdmsr => self.system(System::Rdmsr, 0),
            M::Wrmsr => self.system_end(System::Wrmsr, 0),
            M::Syscall => self.system_end(System::Syscall, 0),
            M::Sysret => self.system_end(System::Sysret, 4),
            M::Sysretq => self.system_end(System::Sysret, 8),
            M::Sysenter => self.system_end(System::Sysenter, 0),
            M::Sysexit => self.system_end(System::Sysexit, 4),
            M::Sysexitq => self.system_end(System::Sysexit, 8),
            M::Int => {
                self.op.imm = u64::from(insn.immediate8());
                self.system_end(System::Int, 0)
            }
            M::Int3 => self.system_end(System::Int3, 0),
            M::Int1 => self.system_end(System::Int1, 0),
            M::Into => self.system_end(System::Into, 0),
            M::Iret => self.system_end(System::Iret, 2),
            M::Iretd => self.system_end(System::Iret, 4),
            M::Iretq => self.system_end(System::Iret, 8),
            M::Lgdt => self.system(System::Lgdt, self.table_bytes()),
            M::Lidt => self.system(System::Lidt, self.table_bytes()),
            M::Sgdt => self.system(System::Sgdt, 0),
            M::Sidt => self.system(System::Sidt, 0),
            M::Lldt => self.system_operand(System::Lldt),
            M::Ltr => self.system_operand(System::Ltr),
            M::Sldt => self.system_operand(System::Sldt),
            M::Str => self.system_operand(System::Str),
            M::Smsw => self.system_operand(System::Smsw),
            M::Lmsw => {
                self.ends = true;
                self.system_operand(System::Lmsw)
            }
            M::Clts => self.system(System::Clts, 0),
            M::Invlpg => self.system_end(System::Invlpg, 0),
            M::Invpcid => {
                self.op.dst = self.reg(0);
                self.system_end(System::Invpcid, 0)
            }
            M::Invd | M::Wbinvd | M::Wbnoinvd => self.system(System::Privileged, 0),
            M::Swapgs => self.system(System::Swapgs, 0),
            M::Rdfsbase => self.base(System::Rdfsbase, 4),
            M::Rdgsbase => self.base(System::Rdfsbase, 5),
            M::Wrfsbase => self.base(System::Wrfsbase, 4),
            M::Wrgsbase => self.base(System::Wrfsbase, 5),
            M::Clac => self.system(System::Clac, 0),
            M::Stac => self.system(System::Stac, 0),
            M::Lar => self.lar_lsl(System::Lar),
            M::Lsl => self.lar_lsl(System::Lsl),
            M::Verr => self.system_operand(System::Verr),
            M::Verw => self.system_operand(System::Verw),
            M::Arpl => {
                self.op.src = self.reg(1);
                self.system_operand(System::Arpl)
            }
            M::Les => self.load_far(0),
            M::Lss => self.load_far(2),
            M::Lds => self.load_far(3),
            M::Lfs => self.load_far(4),
            M::Lgs => self.load_far(5),
            M::Bound => {
                self.op.dst = self.reg(0);
                let n = insn.op0_register().size();
                self.system(System::Bound, n)
            }
            M::Xsetbv => self.system(System::Xsetbv, 0),
            M::Vmcall | M::Vmmcall => self.system(System::Hypercall, 0),
            _ => None,
        }
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

/// Instructions that do nothing.
pub(crate) fn is_nop(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Nop
            | M::Endbr64
            | M::Endbr32
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Reservednop
    )
}

fn is_branch(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Jmp | M::Call | M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz)
}

fn is_cmov(insn: &Instruction) -> bool {
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

fn is_setcc(insn: &Instruction) -> bool {
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

const _: () = assert!(slot::ZERO < 20 && slot::BLOCK < 20);
