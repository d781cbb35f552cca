//! The decoded form of an instruction: what the interpreter runs.

use crate::cpu::Cpu;

/// What a handler returns to the run loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Ctl {
    /// The block is done; `Cpu::rip` and `Cpu::next` say where it goes on.
    Next,
    /// `Cpu::fault` is to be delivered; `Cpu::rip` is the address to push.
    Fault,
    /// The vCPU halted.
    Halt,
    /// The guest is beyond help: `Cpu::crash` says why.
    Crash,
}

/// Executes one decoded instruction and goes on with the next by a tail call, or returns at the block's end.
///
/// Where the compiler makes no jump of the tail call the stack grows by a frame an instruction; a block's
/// length bounds that.
pub type Handler = unsafe fn(&mut Cpu, *const Uop) -> Ctl;

/// How [`Uop`]'s effective address is made.
pub mod address {
    /// 64-bit mode, 64-bit addresses: nothing to mask, no limits to check.
    pub const LONG: u8 = 0;
    /// 64-bit mode with an address-size prefix.
    pub const LONG32: u8 = 1;
    /// Legacy modes: 32- and 16-bit addresses, segment limits and rights.
    pub const LEGACY32: u8 = 2;
    pub const LEGACY16: u8 = 3;
}

/// "No segment": base 0, in [`Uop::seg`].
pub const FLAT: u8 = 6;

/// One instruction. Registers are byte offsets into `Regs::gpr` (so AH is simply offset 1), base and index
/// are slot numbers of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Uop {
    pub handler: Handler,
    pub imm: u64,
    pub disp: i32,
    pub dst: u8,
    pub src: u8,
    pub base: u8,
    pub index: u8,
    pub scale: u8,
    pub seg: u8,
    /// Offset of this instruction from the block's start, in bytes.
    pub off: u16,
    /// Length of this instruction, in bytes.
    pub len: u8,
    /// See [`address`].
    pub asz: u8,
    /// What the handler likes to keep here.
    pub aux: u16,
}

const _: () = assert!(size_of::<Uop>() == 32);
