//! The CPU seam: what a virtual CPU is, whichever engine runs it.
//!
//! Two engines stand behind it: hardware virtualization (`vireo-cpu-kvm`) and our software CPU
//! (`vireo-engine`). Devices, images, snapshots and tests are the same on both.

mod bus;
mod engine;
mod state;

pub use bus::{Bus, NoBus};
pub use engine::{CpuError, CrashInfo, Engine, Exit, Kick, MAX_VCPUS, MsiLine, MsiMessage, RunStats, Vcpu, VcpuConfig};
pub use state::{ApicState, CpuState, DescriptorTable, PendingEvents, Segment};

pub mod cpuid;
