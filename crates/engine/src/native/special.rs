//! Instructions that are executed for the guest in Rust: element-wise memory accesses, register images, and what
//! would raise a signal on the host.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{
    Access, Bcd, FeatureClass, Fpu, Trap, divide,
    gather::{Gather, MaskedBytes, MaskedBytesKind, MaskedMove},
    image::{self, FX_BYTES, Form, HEADER, Layout, XSAVE_BYTES, component, put, read64},
};
use crate::regs::Regs;

/// Guest memory as an instruction sees it. Addresses are effective addresses in the segment of its memory operand,
/// already cut to its address size; the implementation adds the base, checks limits or canonical form, translates
/// and deals with MMIO.
pub trait GuestAccess {
    type Fault;
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Self::Fault>;
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Self::Fault>;
    /// Whether [`Self::write`] of so many bytes will fault; so that an instruction can fault before it writes.
    fn check_write(&mut self, address: u64, bytes: usize) -> Result<(), Self::Fault>;
}

/// The mode that the instruction runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub xcr0: u64,
    /// 64-bit mode (CS.L), not compatibility mode.
    pub long_mode: bool,
    /// Real or virtual-8086 mode.
    pub real_mode: bool,
}

/// One instruction with its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Gather(Gather),
    MaskedMove(MaskedMove),
    MaskedBytes(MaskedBytes),
    /// VZEROUPPER, or VZEROALL.
    ZeroVectors {
        all: bool,
    },
    Fxsave {
        wide: bool,
    },
    Fxrstor {
        wide: bool,
    },
    Xsave {
        kind: Xsave,
        wide: bool,
    },
    Xrstor {
        wide: bool,
    },
    Xgetbv,
    /// FNSTENV; `wide` is a 32-bit operand size here and below.
    StoreEnvironment {
        wide: bool,
    },
    LoadEnvironment {
        wide: bool,
    },
    /// FNSAVE.
    SaveX87 {
        wide: bool,
    },
    /// FRSTOR.
    RestoreX87 {
        wide: bool,
    },
    Ldmxcsr {
        vex: bool,
    },
    Stmxcsr {
        vex: bool,
    },
    /// DIV and IDIV.
    Divide {
        signed: bool,
        bits: u8,
        divisor: Divisor,
    },
    Bcd(Bcd),
}

/// Which instruction of the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Xsave {
    Plain,
    Optimised,
    Compacted,
}

/// What DIV divides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Divisor {
    /// General register and the bit that the operand starts at (8 for AH … BH).
    Register {
        number: u8,
        shift: u8,
    },
    Memory,
}

impl Special {
    pub(super) fn of(insn: &Instruction) -> Option<Self> {
        if let Some(gather) = Gather::of(insn) {
            return Some(Self::Gather(gather));
        }
        if let Some(masked) = MaskedMove::of(insn) {
            return Some(Self::MaskedMove(masked));
        }
        if let Some(masked) = MaskedBytes::of(insn) {
            return Some(Self::MaskedBytes(masked));
        }
        let base = insn.immediate8();
        Some(match insn.code() {
            Code::VEX_Vzeroupper => Self::ZeroVectors { all: false },
            Code::VEX_Vzeroall => Self::ZeroVectors { all: true },
            Code::Fxsave_m512byte => Self::Fxsave { wide: false },
            Code::Fxsave64_m512byte => Self::Fxsave { wide: true },
            Code::Fxrstor_m512byte => Self::Fxrstor { wide: false },
            Code::Fxrstor64_m512byte => Self::Fxrstor { wide: true },
            Code::Xsave_mem => Self::Xsave { kind: Xsave::Plain, wide: false },
            Code::Xsave64_mem => Self::Xsave { kind: Xsave::Plain, wide: true },
            Code::Xsaveopt_mem => Self::Xsave { kind: Xsave::Optimised, wide: false },
            Code::Xsaveopt64_mem => Self::Xsave { kind: Xsave::Optimised, wide: true },
            Code::Xsavec_mem => Self::Xsave { kind: Xsave::Compacted, wide: false },
            Code::Xsavec64_mem => Self::Xsave { kind: Xsave::Compacted, wide: true },
            Code::Xrstor_mem => Self::Xrstor { wide: false },
            Code::Xrstor64_mem => Self::Xrstor { wide: true },
            Code::Xgetbv => Self::Xgetbv,
            Code::Fnstenv_m14byte => Self::StoreEnvironment { wide: false },
            Code::Fnstenv_m28byte => Self::StoreEnvironment { wide: true },
            Code::Fldenv_m14byte => Self::LoadEnvironment { wide: false },
            Code::Fldenv_m28byte => Self::LoadEnvironment { wide: true },
            Code::Fnsave_m94byte => Self::SaveX87 { wide: false },
            Code::Fnsave_m108byte => Self::SaveX87 { wide: true },
            Code::Frstor_m94byte => Self::RestoreX87 { wide: false },
            Code::Frstor_m108byte => Self::RestoreX87 { wide: true },
            Code::Ldmxcsr_m32 => Self::Ldmxcsr { vex: false },
            Code::VEX_Vldmxcsr_m32 => Self::Ldmxcsr { vex: true },
            Code::Stmxcsr_m32 => Self::Stmxcsr { vex: false },
            Code::VEX_Vstmxcsr_m32 => Self::Stmxcsr { vex: true },
            Code::Aaa => Self::Bcd(Bcd::Aaa),
            Code::Aas => Self::Bcd(Bcd::Aas),
            Code::Daa => Self::Bcd(Bcd::Daa),
            Code::Das => Self::Bcd(Bcd::Das),
            Code::Aam_imm8 => Self::Bcd(Bcd::Aam(base)),
            Code::Aad_imm8 => Self::Bcd(Bcd::Aad(base)),
            Code::Salc => Self::Bcd(Bcd::Salc),
            _ => return divide_of(insn),
        })
    }

    /// The checks that come first, as for stubs.
    pub fn class(&self) -> FeatureClass {
        match self {
            Self::Gather(_) | Self::MaskedMove(_) | Self::ZeroVectors { .. } => FeatureClass::Avx,
            Self::Ldmxcsr { vex: true } | Self::Stmxcsr { vex: true } => FeatureClass::Avx,
            Self::Ldmxcsr { vex: false } | Self::Stmxcsr { vex: false } => FeatureClass::Sse,
            Self::MaskedBytes(masked) => match masked.kind {
                MaskedBytesKind::Mmx => FeatureClass::Mmx,
                MaskedBytesKind::Sse => FeatureClass::Sse,
                MaskedBytesKind::Avx => FeatureClass::Avx,
            },
            Self::Fxsave { .. } | Self::Fxrstor { .. } => FeatureClass::Fxsave,
            Self::Xsave { .. } | Self::Xrstor { .. } => FeatureClass::Xsave,
            Self::Xgetbv => FeatureClass::Xgetbv,
            Self::StoreEnvironment { .. }
            | Self::LoadEnvironment { .. }
            | Self::SaveX87 { .. }
            | Self::RestoreX87 { .. } => FeatureClass::X87,
            Self::Divide { .. } | Self::Bcd(_) => FeatureClass::Integer,
        }
    }

    /// As [`Stub::waits`](super::Stub::waits).
    pub fn waits(&self) -> bool {
        self.class() == FeatureClass::Mmx || matches!(self, Self::LoadEnvironment { .. } | Self::RestoreX87 { .. })
    }

    /// What the linear address of the memory operand must be a multiple of, or `#GP(0)`.
    pub fn alignment(&self) -> u8 {
        match self {
            Self::Fxsave { .. } | Self::Fxrstor { .. } => 16,
            Self::Xsave { .. } | Self::Xrstor { .. } => 64,
            _ => 1,
        }
    }

    /// Whether there is a memory operand, and which way it goes. Its size may depend on registers.
    pub fn access(&self) -> Access {
        match self {
            Self::ZeroVectors { .. } | Self::Xgetbv | Self::Bcd(_) => Access::None,
            Self::Divide { divisor: Divisor::Register { .. }, .. } => Access::None,
            Self::MaskedMove(masked) if masked.is_store() => Access::Write,
            Self::Gather(_)
            | Self::MaskedMove(_)
            | Self::Fxrstor { .. }
            | Self::Xrstor { .. }
            | Self::LoadEnvironment { .. }
            | Self::RestoreX87 { .. }
            | Self::Ldmxcsr { .. }
            | Self::Divide { .. } => Access::Read,
            Self::MaskedBytes(_)
            | Self::Fxsave { .. }
            | Self::Xsave { .. }
            | Self::StoreEnvironment { .. }
            | Self::SaveX87 { .. }
            | Self::Stmxcsr { .. } => Access::Write,
        }
    }

    /// Executes the instruction. `address` is the effective address of the memory operand, for gathers without
    /// the index, for MASKMOV that of rDI. A trap leaves the state as the manual says: unchanged, except that
    /// gathers keep what they have.
    pub fn execute<A: GuestAccess>(
        &self,
        fpu: &mut Fpu,
        regs: &mut Regs,
        context: &Context,
        memory: &mut A,
        address: u64,
    ) -> Result<(), Trap<A::Fault>> {
        if self.waits() && fpu.pending_x87_exception() {
            return Err(Trap::MathFault);
        }
        if self.access() != Access::None {
            // The access may end in a device, whose code may use floating point.
            fpu.park(regs);
        }
        let form = |wide| Form { long_mode: context.long_mode, wide_pointers: wide };
        let layout = |wide| Layout { wide, real: context.real_mode };
        match *self {
            Self::Gather(gather) => gather.execute(regs, memory, address).map_err(Trap::Memory),
            Self::MaskedMove(masked) => masked.execute(regs, memory, address).map_err(Trap::Memory),
            Self::MaskedBytes(masked) => masked.execute(fpu, regs, memory, address).map_err(Trap::Memory),
            Self::ZeroVectors { all } => {
                let count = if context.long_mode { 16 } else { 8 };
                for register in &mut regs.ymm[..count] {
                    register[if all { 0 } else { 2 }..].fill(0);
                }
                Ok(())
            }
            Self::Fxsave { wide } => fxsave(fpu, regs, form(wide), memory, address),
            Self::Fxrstor { wide } => {
                let mut bytes = [0; FX_BYTES];
                memory.read(address, &mut bytes).map_err(Trap::Memory)?;
                fpu.fxrstor(regs, form(wide), &bytes).map_err(|_| Trap::GeneralProtection)
            }
            Self::Xsave { kind, wide } => xsave(kind, fpu, regs, form(wide), context.xcr0, memory, address),
            Self::Xrstor { wide } => xrstor(fpu, regs, form(wide), context.xcr0, memory, address),
            Self::Xgetbv => xgetbv(fpu, regs, form(true), context.xcr0).map_err(Trap::widen),
            Self::StoreEnvironment { wide } => store_x87(fpu, regs, layout(wide), memory, address, false),
            Self::SaveX87 { wide } => store_x87(fpu, regs, layout(wide), memory, address, true),
            Self::LoadEnvironment { wide } => load_x87(fpu, regs, layout(wide), memory, address, false),
            Self::RestoreX87 { wide } => load_x87(fpu, regs, layout(wide), memory, address, true),
            Self::Ldmxcsr { .. } => {
                let mut bytes = [0; 4];
                memory.read(address, &mut bytes).map_err(Trap::Memory)?;
                fpu.set_mxcsr(regs, u32::from_le_bytes(bytes)).map_err(|_| Trap::GeneralProtection)
            }
            Self::Stmxcsr { .. } => {
                let value = fpu.mxcsr(regs).to_le_bytes();
                memory.write(address, &value).map_err(Trap::Memory)
            }
            Self::Divide { signed, bits, divisor } => {
                let divisor = match divisor {
                    Divisor::Register { number, shift } => regs.gpr[usize::from(number) & 15] >> shift,
                    Divisor::Memory => {
                        let mut bytes = [0; 8];
                        memory.read(address, &mut bytes[..usize::from(bits) / 8]).map_err(Trap::Memory)?;
                        u64::from_le_bytes(bytes)
                    }
                };
                divide_registers(regs, signed, bits, divisor).map_err(Trap::widen)
            }
            Self::Bcd(bcd) => bcd.execute(regs).map_err(Trap::widen),
        }
    }
}

fn divide_of(insn: &Instruction) -> Option<Special> {
    let signed = match insn.mnemonic() {
        Mnemonic::Div => false,
        Mnemonic::Idiv => true,
        _ => return None,
    };
    if insn.op0_kind() != OpKind::Register {
        let bits = insn.memory_size().size() as u8 * 8;
        return Some(Special::Divide { signed, bits, divisor: Divisor::Memory });
    }
    let register = insn.op0_register();
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    let number = register.full_register().number() as u8;
    let divisor = Divisor::Register { number, shift: if high { 8 } else { 0 } };
    Some(Special::Divide { signed, bits: register.size() as u8 * 8, divisor })
}

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;

/// Writes the low `bits` bits of a register as an instruction in 64-bit mode does.
fn set(regs: &mut Regs, register: usize, bits: u8, value: u64) {
    let slot = &mut regs.gpr[register];
    *slot = match bits {
        16 => *slot & !0xffff | value & 0xffff,
        32 => value & 0xffff_ffff,
        _ => value,
    };
}

fn divide_registers(regs: &mut Regs, signed: bool, bits: u8, divisor: u64) -> Result<(), Trap> {
    let (rax, rdx) = (regs.gpr[RAX], regs.gpr[RDX]);
    if bits == 8 {
        let (quotient, remainder) = divide(signed, 8, rax >> 8, rax, divisor).ok_or(Trap::Divide)?;
        set(regs, RAX, 16, remainder << 8 | quotient);
        return Ok(());
    }
    let (quotient, remainder) = divide(signed, bits.into(), rdx, rax, divisor).ok_or(Trap::Divide)?;
    set(regs, RAX, bits, quotient);
    set(regs, RDX, bits, remainder);
    Ok(())
}

fn fxsave<A: GuestAccess>(
    fpu: &mut Fpu,
    regs: &mut Regs,
    form: Form,
    memory: &mut A,
    address: u64,
) -> Result<(), Trap<A::Fault>> {
    let mut bytes = [0; FX_BYTES];
    fpu.fxsave(regs, form, &mut bytes);
    // What lies behind the last XMM register is not written.
    let end = 160 + form.vectors() * 16;
    memory.check_write(address, FX_BYTES).map_err(Trap::Memory)?;
    memory.write(address, &bytes[..end]).map_err(Trap::Memory)
}

/// RFBM: what EDX:EAX asks for and XCR0 allows.
fn requested(regs: &Regs, xcr0: u64) -> u64 {
    (regs.gpr[RDX] << 32 | regs.gpr[RAX] & 0xffff_ffff) & xcr0
}

/// XSAVE, XSAVEOPT and XSAVEC (Intel SDM vol. 1, 13.7, 13.9 and 13.10).
fn xsave<A: GuestAccess>(
    kind: Xsave,
    fpu: &mut Fpu,
    regs: &mut Regs,
    form: Form,
    xcr0: u64,
    memory: &mut A,
    address: u64,
) -> Result<(), Trap<A::Fault>> {
    fpu.park(regs);
    let requested = requested(regs, xcr0);
    let mut in_use = fpu.in_use(regs, form);
    if kind == Xsave::Compacted && regs.mxcsr != super::fpu::MXCSR_DEFAULT {
        in_use |= component::SSE;
    }
    let stored = if kind == Xsave::Plain { requested } else { requested & in_use };
    let mut bytes = [0; XSAVE_BYTES];
    fpu.store_components(regs, form, stored, &mut bytes);
    image::store_mxcsr(regs, &mut bytes);

    let extent = if requested & component::AVX != 0 { XSAVE_BYTES } else { HEADER + 64 };
    memory.check_write(address, extent).map_err(Trap::Memory)?;
    let header = if kind == Xsave::Compacted {
        put(&mut bytes, HEADER, &(requested & in_use).to_le_bytes());
        put(&mut bytes, HEADER + 8, &(requested | 1 << 63).to_le_bytes());
        16
    } else {
        let mut old = [0; 8];
        memory.read(address.wrapping_add(HEADER as u64), &mut old).map_err(Trap::Memory)?;
        let present = u64::from_le_bytes(old) & !requested | requested & in_use;
        put(&mut bytes, HEADER, &present.to_le_bytes());
        8
    };
    let mxcsr = match kind {
        Xsave::Compacted => stored & component::SSE != 0,
        _ => requested & (component::SSE | component::AVX) != 0,
    };
    let vectors = form.vectors() * 16;
    let parts = [
        (stored & component::X87 != 0, 0..24),
        (mxcsr, 24..32),
        (stored & component::X87 != 0, 32..160),
        (stored & component::SSE != 0, 160..160 + vectors),
        (stored & component::AVX != 0, HEADER + 64..HEADER + 64 + vectors),
        (true, HEADER..HEADER + header),
    ];
    for (_, range) in parts.into_iter().filter(|(wanted, _)| *wanted) {
        memory.write(address.wrapping_add(range.start as u64), &bytes[range]).map_err(Trap::Memory)?;
    }
    Ok(())
}

fn xrstor<A: GuestAccess>(
    fpu: &mut Fpu,
    regs: &mut Regs,
    form: Form,
    xcr0: u64,
    memory: &mut A,
    address: u64,
) -> Result<(), Trap<A::Fault>> {
    let mut bytes = [0; XSAVE_BYTES];
    let (legacy, extended) = bytes.split_at_mut(HEADER + 64);
    memory.read(address, legacy).map_err(Trap::Memory)?;
    let requested = requested(regs, xcr0);
    if requested & component::AVX & read64(legacy, HEADER) != 0 {
        memory.read(address.wrapping_add(HEADER as u64 + 64), extended).map_err(Trap::Memory)?;
    }
    fpu.xrstor(regs, form, requested, xcr0, &bytes).map_err(|_| Trap::GeneralProtection)
}

/// Register 0 is XCR0, register 1 the part of it in use (Intel SDM vol. 2, XGETBV).
fn xgetbv(fpu: &mut Fpu, regs: &mut Regs, form: Form, xcr0: u64) -> Result<(), Trap> {
    let value = match regs.gpr[RCX] as u32 {
        0 => xcr0,
        1 => {
            fpu.park(regs);
            fpu.in_use(regs, form) & xcr0
        }
        _ => return Err(Trap::GeneralProtection),
    };
    set(regs, RAX, 32, value);
    set(regs, RDX, 32, value >> 32);
    Ok(())
}

/// FNSTENV, and with the registers FNSAVE.
fn store_x87<A: GuestAccess>(
    fpu: &mut Fpu,
    regs: &mut Regs,
    layout: Layout,
    memory: &mut A,
    address: u64,
    registers: bool,
) -> Result<(), Trap<A::Fault>> {
    fpu.park(regs);
    let mut bytes = [0; 108];
    let start = layout.bytes();
    fpu.store_environment(layout, &mut bytes);
    let end = if registers {
        fpu.store_stack(&mut bytes[start..]);
        start + 80
    } else {
        start
    };
    memory.check_write(address, end).map_err(Trap::Memory)?;
    memory.write(address, &bytes[..end]).map_err(Trap::Memory)?;
    if registers {
        fpu.reset_environment();
    } else {
        fpu.mask_exceptions();
    }
    Ok(())
}

/// FLDENV, and with the registers FRSTOR.
fn load_x87<A: GuestAccess>(
    fpu: &mut Fpu,
    regs: &mut Regs,
    layout: Layout,
    memory: &mut A,
    address: u64,
    registers: bool,
) -> Result<(), Trap<A::Fault>> {
    let mut bytes = [0; 108];
    let start = layout.bytes();
    let end = if registers { start + 80 } else { start };
    memory.read(address, &mut bytes[..end]).map_err(Trap::Memory)?;
    fpu.park(regs);
    fpu.load_environment(layout, &bytes);
    if registers {
        fpu.load_stack(&bytes[start..]);
    }
    Ok(())
}
