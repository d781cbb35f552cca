//! Random code, for tests of several kinds: instructions and sequences of them, in states that let them do something,
//! and a virtual machine that runs them.

pub mod bare;
pub mod case;
pub mod generate;
pub mod random;
pub mod sequence;
mod values;
