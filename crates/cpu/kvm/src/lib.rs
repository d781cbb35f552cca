//! The KVM engine: vCPUs on hardware virtualization (VT-x, AMD-V), local APICs in the kernel, IOAPIC and
//! everything on the bus in this process (KVM's "split irqchip").
#![allow(unsafe_code)]

mod capability;
mod cpuid;
mod engine;
mod interrupt;
mod kick;
mod msr;
mod probe;
mod state;
mod vcpu;

#[cfg(test)]
mod tests;

pub use engine::{KvmEngine, KvmOptions};
pub use probe::{KvmProbe, Ring0Speed, probe};

use std::io;

use vireo_cpu::CpuError;

/// For `map_err`: this step of talking to KVM failed.
fn host(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |e| CpuError::Host { what, source: io::Error::from_raw_os_error(e.errno()) }
}
