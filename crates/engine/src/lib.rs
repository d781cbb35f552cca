//! The software CPU: an interpreter over cached, decoded blocks of x86-64 code.
#![allow(unsafe_code)]

pub mod apic;
pub mod clock;
pub mod cpuid;
pub mod msr;
pub mod native;
pub mod regs;
pub mod signal;
