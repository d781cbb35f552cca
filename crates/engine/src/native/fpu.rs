//! The guest's x87 registers and MXCSR, and calling stubs that use them.
//!
//! They are switched lazily, as an operating system does: the first stub that needs them puts the guest's values
//! into the host's registers, and [`Fpu::park`] takes them out again. Between the two a stub costs nothing extra.
//! That is sound because all guest exceptions are masked then and nothing else on the thread computes in floating
//! point: **between a [`Fpu::call`] and the next [`Fpu::park`] the caller must run no code that may use floating
//! point (bus callbacks, libc, formatting of floats, another vCPU)**. The interpreter core has none.
//!
//! A guest that unmasks exceptions (in FCW or MXCSR) is run the strict way, state around every single stub.

use super::{
    Trap, guard,
    image::{self, FSW, FX_BYTES},
    stub::{Access, Stub, uses},
};
use crate::regs::Regs;

/// MXCSR bits that exist for guests (Intel SDM vol. 1, 11.6.6). AMD's misaligned-SSE bit is not among them.
pub const MXCSR_MASK: u32 = 0xffff;

/// All SIMD exceptions masked.
const MXCSR_MASKS: u32 = 0x1f80;
/// What Rust code expects.
pub(super) const MXCSR_DEFAULT: u32 = 0x1f80;

/// Where the last non-control x87 instruction was; what FIP, FDP and FOP are made of.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    pub instruction: u64,
    pub operand: u64,
    pub code_selector: u16,
    pub data_selector: u16,
    pub opcode: u16,
}

/// A 512-byte FXSAVE area in its 64-bit form. Its MXCSR and XMM fields are not the guest's.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct FxArea(pub(super) [u8; FX_BYTES]);

/// One vCPU's x87 state, and the use of MXCSR. Belongs to the thread that runs the vCPU while anything is in the
/// host's registers.
#[derive(Clone)]
pub struct Fpu {
    pub(super) area: FxArea,
    /// See [`uses`]: what is in the host's registers now.
    live: u8,
    /// An unmasked x87 exception waits (FSW.ES). Never while the x87 state is live.
    pending: bool,
    /// Kept by the caller: see [`Self::note`].
    pub environment: Environment,
}

impl Default for Fpu {
    fn default() -> Self {
        let mut fpu =
            Self { area: FxArea([0; FX_BYTES]), live: 0, pending: false, environment: Environment::default() };
        image::initialise(&mut fpu.area.0);
        fpu
    }
}

impl std::fmt::Debug for Fpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fpu").field("live", &self.live).field("pending", &self.pending).finish_non_exhaustive()
    }
}

impl Fpu {
    /// The x87 state as FXSAVE has it, while it is not in the host's registers. MXCSR, vectors and pointers are not
    /// the guest's.
    pub(crate) fn area(&self) -> &[u8; FX_BYTES] {
        debug_assert!(!self.x87_is_live());
        &self.area.0
    }

    /// An unmasked x87 exception waits: the next instruction with [`Stub::waits`] raises `#MF` instead of running.
    #[inline]
    pub fn pending_x87_exception(&self) -> bool {
        self.pending
    }

    /// Records where an x87 instruction was (FIP, FOP) and its operand (FDP). Cheap enough to do always.
    #[inline]
    pub fn note(&mut self, stub: &Stub, instruction: u64, operand: u64) {
        if stub.fop != 0 {
            self.environment.instruction = instruction;
            self.environment.opcode = stub.fop;
            if stub.memory.access != Access::None {
                self.environment.operand = operand;
            }
        }
    }

    /// Runs a stub.
    ///
    /// # Safety
    /// `stub` comes from a [`StubCache`](super::StubCache) that was not flushed since. Where it has a memory
    /// operand, `memory` points to that many bytes which may be read (and written, as [`Stub::memory`] says), with
    /// that alignment; other threads may access them (it is guest memory). No floating point on this thread
    /// before [`Self::park`].
    #[inline(always)]
    pub unsafe fn call(&mut self, stub: &Stub, regs: &mut Regs, memory: *mut u8) -> Result<(), Trap> {
        if stub.uses & !self.live == 0 {
            // SAFETY: the caller's word; what the stub wants in the host's registers is there.
            unsafe { (stub.entry)(regs, memory) };
            return match guard::take() {
                None => Ok(()),
                Some(fault) => Err(trap(fault)),
            };
        }
        // SAFETY: the caller's word.
        unsafe { self.call_cold(stub, regs, memory) }
    }

    #[cold]
    #[inline(never)]
    unsafe fn call_cold(&mut self, stub: &Stub, regs: &mut Regs, memory: *mut u8) -> Result<(), Trap> {
        if self.pending && stub.waits {
            return Err(Trap::MathFault);
        }
        let mut strict_x87 = false;
        if stub.uses & uses::X87 != 0 {
            // SAFETY: FLDCW's operand is two readable bytes.
            let unmasks = stub.uses & uses::CONTROL != 0
                && image::unmasks(u16::from_le_bytes(unsafe { memory.cast::<[u8; 2]>().read_unaligned() }));
            strict_x87 = unmasks || image::unmasks(self.control_word());
            if strict_x87 {
                self.park_x87();
            } else {
                self.enter_x87();
            }
        }
        if stub.uses & uses::MXCSR == 0 || self.live & uses::MXCSR != 0 {
            // SAFETY: the caller's word.
            return unsafe { self.run(stub, regs, memory, strict_x87) }.map_err(trap);
        }
        let outside = host::mxcsr();
        host::set_mxcsr(regs.mxcsr);
        if regs.mxcsr & MXCSR_MASKS == MXCSR_MASKS {
            self.live |= uses::MXCSR;
            // SAFETY: the caller's word.
            return unsafe { self.run(stub, regs, memory, strict_x87) }.map_err(trap);
        }
        // The guest wants some SIMD exceptions: the host's own detection raises them (see `guard`).
        // SAFETY: the caller's word.
        let result = unsafe { self.run(stub, regs, memory, strict_x87) };
        regs.mxcsr = match result {
            Ok(()) => host::mxcsr(),
            Err(fault) => fault.mxcsr,
        } & MXCSR_MASK;
        host::set_mxcsr(outside);
        result.map_err(trap)
    }

    /// Runs a stub with the x87 state where the caller of this has put it.
    unsafe fn run(
        &mut self,
        stub: &Stub,
        regs: &mut Regs,
        memory: *mut u8,
        strict_x87: bool,
    ) -> Result<(), guard::Fault> {
        if strict_x87 {
            image::set_mxcsr(&mut self.area.0, host::mxcsr());
            // SAFETY: the caller's word; no x87 exception is pending, or the stub does not wait.
            unsafe { host::call_with_x87(stub.entry, regs, memory, &mut self.area) };
            self.settle();
        } else {
            // SAFETY: the caller's word.
            unsafe { (stub.entry)(regs, memory) };
        }
        guard::take().map_or(Ok(()), Err)
    }

    /// Puts the guest's MXCSR into the host's register, unless it unmasks exceptions.
    pub(crate) fn enter_mxcsr(&mut self, regs: &mut Regs) -> bool {
        if self.live & uses::MXCSR != 0 {
            return true;
        }
        if regs.mxcsr & MXCSR_MASKS != MXCSR_MASKS {
            return false;
        }
        host::set_mxcsr(regs.mxcsr);
        self.live |= uses::MXCSR;
        true
    }

    /// Puts the guest's x87 state into the host's registers, unless an exception is pending or unmasked. Vector
    /// registers are lost on the way.
    pub(crate) fn bring_x87(&mut self) -> bool {
        if self.live & uses::X87 == 0 {
            if self.pending || image::unmasks(self.control_word()) {
                return false;
            }
            self.enter_x87();
        }
        true
    }

    /// Whether the guest's x87 state is in the host's registers.
    pub(crate) fn x87_is_live(&self) -> bool {
        self.live & uses::X87 != 0
    }

    /// Takes the guest's state out of the host's registers: x87 into this, MXCSR into `regs`. To be called before
    /// anything that may use floating point, before `regs.mxcsr` or the x87 state is looked at, and before the
    /// vCPU's thread leaves the run loop. Costs nothing when nothing is there.
    #[inline]
    pub fn park(&mut self, regs: &mut Regs) {
        if self.live != 0 {
            self.park_cold(regs);
        }
    }

    #[cold]
    fn park_cold(&mut self, regs: &mut Regs) {
        self.park_x87();
        if self.live & uses::MXCSR != 0 {
            regs.mxcsr = host::mxcsr() & MXCSR_MASK;
            host::set_mxcsr(MXCSR_DEFAULT);
            self.live &= !uses::MXCSR;
        }
    }

    fn park_x87(&mut self) {
        if self.live & uses::X87 != 0 {
            host::save_x87(&mut self.area);
            self.live &= !uses::X87;
        }
    }

    fn enter_x87(&mut self) {
        if self.live & uses::X87 == 0 {
            image::set_mxcsr(&mut self.area.0, host::mxcsr());
            host::load_x87(&self.area);
            self.live |= uses::X87;
        }
    }

    /// FCW. While the state is live all exceptions are masked, so that the parked one says the same about them.
    fn control_word(&self) -> u16 {
        if self.live & uses::X87 != 0 { 0x3f } else { image::control_word(&self.area.0) }
    }

    /// Brings FSW's summary bits in line after the control or status word may have changed.
    pub(super) fn settle(&mut self) {
        self.pending = image::settle(&mut self.area.0);
        debug_assert!(self.area.0[FSW + 1] & 0x80 == 0 || self.pending);
    }
}

/// What the guest sees of a stub's fault. Only SIMD exceptions are expected.
#[cold]
fn trap(fault: guard::Fault) -> Trap {
    match fault.vector {
        0 => Trap::Divide,
        6 => Trap::InvalidOpcode,
        16 => Trap::MathFault,
        19 => Trap::SimdException,
        _ => Trap::GeneralProtection,
    }
}

#[cfg(target_arch = "x86_64")]
mod host {
    use std::arch::asm;

    use super::FxArea;
    use crate::{native::Entry, regs::Regs};

    pub(super) fn mxcsr() -> u32 {
        let mut value = 0u32;
        // SAFETY: writes four bytes to a local.
        unsafe { asm!("stmxcsr [{}]", in(reg) &mut value, options(nostack, preserves_flags)) };
        value
    }

    pub(super) fn set_mxcsr(value: u32) {
        // SAFETY: reads four bytes; reserved bits are clear in every value that comes here, so that it does not fault.
        // Exceptions are unmasked only around a single stub.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &value, options(nostack, preserves_flags, readonly)) };
    }

    /// The guest's x87 state into the host's registers. XMM registers are loaded with rubbish on the way.
    pub(super) fn load_x87(area: &FxArea) {
        // SAFETY: `area` is 512 bytes, aligned, and its MXCSR field holds the current one. x87 registers stay
        // loaded afterwards: no code on this thread uses them until `save_x87` (the contract of `Fpu::call`).
        unsafe { asm!("fxrstor64 [{}]", in(reg) area, clobber_abi("sysv64"), options(nostack)) };
    }

    /// The host's x87 registers into `area`, and the host's back to what the ABI wants: empty.
    pub(super) fn save_x87(area: &mut FxArea) {
        // SAFETY: `area` is 512 writable bytes, aligned. FNINIT does not wait.
        unsafe { asm!("fxsave64 [{}]", "fninit", in(reg) area, options(nostack)) };
    }

    /// Calls a stub with the guest's x87 state loaded for it alone.
    ///
    /// # Safety
    /// As for calling `entry`; an x87 exception pending in `area` only if the stub does not wait.
    pub(super) unsafe fn call_with_x87(entry: Entry, regs: *mut Regs, memory: *mut u8, area: *mut FxArea) {
        // SAFETY: the caller's word. `area` sits in a register that calls preserve. FXSAVE and FNINIT do not wait.
        unsafe {
            asm!(
                "fxrstor64 [r12]",
                "call r13",
                "fxsave64 [r12]",
                "fninit",
                in("r12") area,
                in("r13") entry,
                inout("rdi") regs => _,
                inout("rsi") memory => _,
                clobber_abi("sysv64"),
            );
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod host {
    //! No stub exists on other architectures, so that none of this is ever reached.
    use super::FxArea;
    use crate::{native::Entry, regs::Regs};

    pub(super) fn mxcsr() -> u32 {
        super::MXCSR_DEFAULT
    }
    pub(super) fn set_mxcsr(_: u32) {}
    pub(super) fn load_x87(_: &FxArea) {}
    pub(super) fn save_x87(_: &mut FxArea) {}
    pub(super) unsafe fn call_with_x87(_: Entry, _: *mut Regs, _: *mut u8, _: *mut FxArea) {}
}
