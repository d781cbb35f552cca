//! The software CPU: an interpreter over cached, decoded blocks of x86-64 code.
//!
//! [`SoftEngine`] stands behind the CPU seam of `vireo-cpu`. Inside, a vCPU ([`cpu::Cpu`]) goes from block to
//! block ([`run`]): a block is a run of decoded instructions ([`uop`], made by [`decode`], kept by guest-physical
//! address in [`cache`]) whose handlers ([`ops`]) call each other by tail calls. Memory accesses go through a soft
//! TLB ([`tlb`], [`mmu`]); everything that is neither integer arithmetic, control flow nor system state runs on the
//! host CPU itself, one instruction at a time ([`native`]).
#![allow(unsafe_code)]
// The handlers' safety contract is one and the same: it stands in `ops`.
#![allow(clippy::missing_safety_doc, clippy::undocumented_unsafe_blocks)]

pub mod apic;
mod cache;
pub mod clock;
mod cpu;
pub mod cpuid;
mod decode;
mod engine;
mod fault;
mod heat;
mod int;
mod interrupt;
mod machine;
mod mmu;
pub mod msr;
pub mod native;
mod ops;
pub mod regs;
mod run;
mod segment;
pub mod signal;
mod state;
mod steal;
mod task;
mod tlb;
mod translate;
mod uop;
mod verify;

pub use engine::{SoftEngine, SoftVcpu};
