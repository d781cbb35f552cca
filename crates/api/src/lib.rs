//! The words of Vireo: sizes, addresses and exit codes that every floor shares. No logic lives here.
#![forbid(unsafe_code)]

mod exit;
mod size;

pub use exit::ExitCode;
pub use size::{ByteSize, ByteSizeError};
