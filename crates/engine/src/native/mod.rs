//! Instructions that run on the host CPU itself, one at a time.
//!
//! [`StubCache::get`] makes, once per instruction shape, a small host function that loads the guest registers the
//! instruction reads, executes the guest's own instruction with its memory operand replaced by a host pointer, and
//! stores what it wrote. So the interpreter knows x87, MMX, SSE, AVX, BMI, AES … without describing any of them.
//!
//! What the caller (the interpreter core) does around a stub:
//!
//! 1. [`FeatureClass`]: the CR0/CR4/XCR0 checks that the class asks for (`#UD`, `#NM`), then
//!    [`Fpu::pending_x87_exception`] for instructions that wait.
//! 2. The effective address as the instruction says, plus [`Stub::bit_displacement`]; canonical, segment and
//!    [`MemoryOperand::alignment`] checks; translation. A memory operand that is not one piece of host memory goes
//!    through `Regs::bounce`: copied in before (also for `Write`), copied out after.
//! 3. [`Fpu::call`].
//!
//! Instructions that touch memory element by element or move whole register files are [`Special`]: the same checks,
//! then [`Special::execute`] with a [`GuestAccess`].
//!
//! Between the first x87, MMX or SIMD floating-point stub and [`Fpu::park`] the guest's x87 registers and MXCSR are
//! in the host's; see [`Fpu`] for what that asks of the caller.

mod arena;
mod bcd;
mod classify;
mod divide;
mod emit;
mod features;
mod fpu;
mod gather;
mod guard;
mod image;
pub(crate) mod operand;
mod special;
mod stub;

pub(crate) use arena::DualMapping;
pub use bcd::Bcd;
pub use classify::FeatureClass;
pub use divide::divide;
pub use features::{FeatureSet, advertise};
pub use fpu::{Environment, Fpu, MXCSR_MASK};
pub use image::{ImageError, XSAVE_BYTES, component};
pub use special::{Context, GuestAccess, Special};
pub use stub::{Access, BitOffset, Entry, MemoryOperand, Native, Stub, StubCache};

/// Why an instruction has no stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// `#UD`: the guest's CPUID does not have it, the host cannot do it, or nothing decodes so.
    #[error("the instruction is not among those that CPUID names")]
    NotAdvertised,
    /// The interpreter's own job: control flow, segments, stack, strings, ports and system instructions.
    #[error("the instruction is not one to run on the host")]
    NotNative,
    /// No room is left: drop every [`Stub`] that was ever handed out, [`StubCache::flush`], and ask again.
    #[error("the stub cache is full")]
    Full,
}

/// Why a stub or special did not complete. `F` is what a memory access failed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap<F = std::convert::Infallible> {
    /// `#DE`.
    Divide,
    /// `#UD`.
    InvalidOpcode,
    /// `#GP(0)`.
    GeneralProtection,
    /// `#MF`: an x87 exception was pending.
    MathFault,
    /// `#XM` (or `#UD` while CR4.OSXMMEXCPT is clear). MXCSR's flags are set, nothing else has changed.
    SimdException,
    Memory(F),
}

impl Trap {
    /// The same trap where memory accesses may fail too.
    pub fn widen<F>(self) -> Trap<F> {
        match self {
            Self::Divide => Trap::Divide,
            Self::InvalidOpcode => Trap::InvalidOpcode,
            Self::GeneralProtection => Trap::GeneralProtection,
            Self::MathFault => Trap::MathFault,
            Self::SimdException => Trap::SimdException,
            Self::Memory(never) => match never {},
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
