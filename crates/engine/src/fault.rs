//! Exceptions on their way to the guest.

/// Exception vectors (Intel SDM vol. 3, table 7-1).
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// Bits of a page fault's error code.
pub mod page_fault {
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
}

/// What stopped an instruction. The instruction has changed nothing, unless it may be restarted where it
/// stands (string instructions).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub vector: u8,
    pub error: Option<u32>,
    /// Goes to CR2 on a page fault.
    pub address: u64,
}

impl Fault {
    pub const fn new(vector: u8) -> Self {
        Self { vector, error: None, address: 0 }
    }

    pub const fn with(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), address: 0 }
    }

    pub const fn gp(error: u32) -> Self {
        Self::with(vector::GP, error)
    }

    pub const fn ud() -> Self {
        Self::new(vector::UD)
    }
}

/// #GP(0) for an address that is not canonical; #SS(0) where it is one in the stack segment.
pub const NON_CANONICAL: Fault = Fault { vector: vector::GP, error: Some(0), address: 1 };

/// The current instruction did not complete; [`crate::cpu::Cpu::fault`] says why. Kept empty so that a
/// `Result<u64, Stop>` travels in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop;

pub type Run<T = ()> = Result<T, Stop>;
