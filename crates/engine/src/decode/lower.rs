//! Which handler an instruction gets.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{BLANK, Fusable, Lowered, operand};
use crate::{
    cpu::{Cpu, mode, sreg},
    native::Native,
    ops::{alu, bits, data, flow, native, stack, system::System},
    regs::slot,
    uop::{Handler, Uop},
};

/// A handler for each condition code.
macro_rules! by_condition {
    ($cc:expr, |$c:ident| $f:expr) => {
        by_condition!($cc, $c, $f, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    };
    ($cc:expr, $c:ident, $f:expr, $($number:literal)*) => {
        match $cc {
            $($number => {
                const $c: u8 = $number;
                $f
            })*
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

mod arithmetic;
mod control_flow;
mod data_movement;
mod system;

pub use control_flow::{compare_jcc, condition_of};

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
    /// Nothing after it belongs to the block.
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
            _ if insn.is_jcc_short_or_near() || control_flow::is_branch(insn) => self.branch(),
            _ if data_movement::is_cmov(insn) => self.cmov(cc - 1),
            _ if data_movement::is_setcc(insn) => self.setcc(cc - 1),
            _ => self.system_handler(),
        }
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

const _: () = assert!(slot::ZERO < 20 && slot::BLOCK < 20);
