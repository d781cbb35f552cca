//! The register file, laid out so that generated code can reach it at fixed offsets.

/// Slots of [`Regs::gpr`] that are no architectural register.
pub mod slot {
    /// Always zero: the "no base" and "no index" register.
    pub const ZERO: usize = 16;
    /// Linear address of the current block's first instruction, less the CS base: RIP-relative operands count from it.
    pub const BLOCK: usize = 17;
}

/// Status flags as LAHF and SETO leave them: bits 8..=15 are SF ZF – AF – PF – CF in their RFLAGS order
/// (SF 15, ZF 14, AF 12, PF 10, CF 8), bit 0 is OF.
pub type PackedFlags = u16;

/// Guest registers that generated code and native stubs read and write.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub struct Regs {
    /// RAX … R15 in encoding order, then the slots of [`slot`], the rest spare (it brings `bounce` and `ymm` to
    /// their natural alignment, which instructions that demand it rely on).
    pub gpr: [u64; 23],
    /// See [`PackedFlags`]; the other RFLAGS bits live with the interpreter.
    pub flags: PackedFlags,
    /// Guest MXCSR, with the guest's own masks.
    pub mxcsr: u32,
    /// Scratch for memory operands that are not one piece of host memory (page crossing, MMIO).
    pub bounce: [u64; 8],
    /// YMM0 … YMM15; the low half is XMM.
    pub ymm: [[u64; 4]; 16],
}

impl Default for Regs {
    fn default() -> Self {
        Self { gpr: [0; 23], flags: 0x0200, mxcsr: 0x1f80, bounce: [0; 8], ymm: [[0; 4]; 16] }
    }
}

/// RFLAGS status bits (CF PF AF ZF SF OF) of a packed word.
#[inline(always)]
pub const fn unpack(flags: PackedFlags) -> u64 {
    ((flags >> 8) as u64 & 0xd5) | ((flags as u64 & 1) << 11)
}

/// The packed word of RFLAGS' status bits.
#[inline(always)]
pub const fn pack(rflags: u64) -> PackedFlags {
    (((rflags & 0xd5) | 2) << 8) as u16 | ((rflags >> 11) & 1) as u16
}
