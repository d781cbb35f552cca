//! One instruction, the state before it, and what came of it.

use iced_x86::{Instruction, RflagsBits};
use vireo_engine::native::FeatureSet;

/// Where the code of a case is, in the host's child and for every executor: a page of INT3 around it.
pub const CODE: u64 = 0x2345_6000;
/// The longest code of a case.
pub const CODE_BYTES: usize = 0x400;
/// Two writable pages with nothing mapped before and behind.
pub const DATA: u64 = 0x4567_8000;
pub const DATA_END: u64 = DATA + 0x2000;
/// What cases fill and compare: all of it.
pub const WINDOW: u64 = DATA;
pub const WINDOW_BYTES: usize = (DATA_END - WINDOW) as usize;

/// RFLAGS' status bits.
pub const STATUS: u64 = 0x8d5;

/// Status flags as iced says them, in RFLAGS' places.
pub fn status_flags(iced: u32) -> u64 {
    [
        (RflagsBits::OF, 0x800),
        (RflagsBits::SF, 0x80),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::AF, 0x10),
        (RflagsBits::CF, 0x01),
        (RflagsBits::PF, 0x04),
    ]
    .iter()
    .fold(0, |all, (from, to)| all | if iced & from != 0 { *to } else { 0 })
}

/// User-visible registers.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct State {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 … R15.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// x87, MXCSR and XMM as FXSAVE64 has them.
    pub fx: [u8; 512],
    /// Upper halves of YMM0 … YMM15.
    pub upper: [[u64; 2]; 16],
}

impl State {
    pub const ZERO: Self = Self { gpr: [0; 16], rip: 0, rflags: 2, fx: [0; 512], upper: [[0; 2]; 16] };

    pub fn fx16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.fx[at], self.fx[at + 1]])
    }

    pub fn mxcsr(&self) -> u32 {
        u32::from(self.fx16(24)) | u32::from(self.fx16(26)) << 16
    }

    pub fn vector(&self, register: usize) -> [u64; 4] {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| self.fx[160 + register * 16 + at + i]));
        [word(0), word(8), self.upper[register][0], self.upper[register][1]]
    }

    pub fn set_vector(&mut self, register: usize, value: [u64; 4]) {
        let at = 160 + register * 16;
        self.fx[at..at + 8].copy_from_slice(&value[0].to_le_bytes());
        self.fx[at + 8..at + 16].copy_from_slice(&value[1].to_le_bytes());
        self.upper[register] = [value[2], value[3]];
    }
}

/// How the code is to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Bits64,
    Bits32,
}

impl Mode {
    pub fn bitness(self) -> u32 {
        match self {
            Self::Bits64 => 64,
            Self::Bits32 => 32,
        }
    }
}

#[derive(Clone)]
pub struct Case {
    pub mode: Mode,
    /// As decoded from `code`.
    pub instruction: Instruction,
    pub code: Vec<u8>,
    pub state: State,
    pub memory: Box<[u8; WINDOW_BYTES]>,
}

/// What one step leaves behind.
#[derive(Clone)]
pub struct Outcome {
    /// The exception that stopped it, or none.
    pub vector: Option<u8>,
    /// A page fault's error code and address.
    pub page_fault: Option<(u64, u64)>,
    pub state: State,
    pub memory: Box<[u8; WINDOW_BYTES]>,
}

/// What an executor says to a case.
pub enum Verdict {
    Ran(Box<Outcome>),
    /// It did not run the instruction, for a reason that is counted, not hidden.
    Skipped(&'static str),
}

/// Something that can execute one instruction, to be held against the host.
pub trait Executor {
    /// The instruction sets it says it has.
    fn features(&self) -> FeatureSet;
    fn step(&mut self, case: &Case) -> Verdict;
    /// Flags that may differ from the host's after this case, among [`STATUS`]: the ones the manual leaves
    /// undefined and the executor computes itself.
    fn undefined_flags(&self, case: &Case) -> u64;
}
