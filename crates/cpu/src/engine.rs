use std::{collections::BTreeMap, io, os::fd::BorrowedFd, sync::Arc};

use crate::{bus::Bus, cpuid::CpuidTable, state::CpuState};

/// vCPUs that an engine may be asked for at most (KVM); the software engine takes 8.
pub const MAX_VCPUS: u32 = 64;

/// Why an engine cannot go on. These are failures of the host or of Vireo, never of the guest.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    #[error("{engine} does not support {asked} vCPUs: at most {most}")]
    TooManyVcpus { engine: &'static str, asked: u32, most: u32 },
    #[error("{what} failed")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{engine} is not available on this host: {why}")]
    Unavailable { engine: &'static str, why: String },
    #[error("the saved CPU state does not fit: {0}")]
    BadState(String),
    #[error("{0}")]
    Other(String),
}

/// Where and how a guest came to its end without asking for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashInfo {
    pub vcpu: u32,
    /// One sentence, such as "triple fault".
    pub reason: String,
    pub rip: u64,
    pub rsp: u64,
    pub cr3: u64,
}

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Someone called [`Kick::kick`].
    Kicked,
    /// The guest crashed (triple fault, or a state the engine cannot run).
    Crash(CrashInfo),
}

/// Counters for `--metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunStats {
    /// Guest instructions executed; `None` where the engine cannot count them (KVM).
    pub instructions: Option<u64>,
    /// Exits (KVM) or slow-path events (software engine) by kind.
    pub exits: BTreeMap<&'static str, u64>,
}

/// Makes a vCPU come back from [`Vcpu::run`], from any thread, at any time, also before it is called.
pub trait Kick: Send + Sync {
    fn kick(&self);
}

/// One virtual CPU. It is created and run on one thread, its own.
pub trait Vcpu {
    /// Runs guest code until something needs the caller. A halted or not yet started vCPU waits inside.
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, CpuError>;
    /// The whole architectural state. Only while not in [`Self::run`].
    fn state(&self) -> Result<CpuState, CpuError>;
    fn set_state(&mut self, state: &CpuState) -> Result<(), CpuError>;
    fn kicker(&self) -> Arc<dyn Kick>;
    fn stats(&self) -> RunStats;
}

/// What a vCPU is created with.
#[derive(Clone, Debug)]
pub struct VcpuConfig {
    /// Index and APIC id. 0 is the boot processor; the others wait for INIT and SIPI.
    pub id: u32,
    /// All vCPUs of the machine.
    pub count: u32,
    pub cpuid: CpuidTable,
}

/// A message-signalled interrupt as a device writes it (Intel SDM vol. 3, 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// One interrupt source that sends messages: an MSI-X table entry or an IOAPIC pin.
pub trait MsiLine: Send + Sync {
    /// What is sent from now on; `None` while masked (a trigger is then lost: the owner keeps pending bits).
    fn set(&self, message: Option<MsiMessage>);
    fn trigger(&self);
}

/// One virtual machine's CPUs and interrupt plumbing.
pub trait Engine: Send + Sync {
    /// `kvm` or `soft`.
    fn name(&self) -> &'static str;
    fn create_vcpu(&self, config: &VcpuConfig) -> Result<Box<dyn Vcpu>, CpuError>;
    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, CpuError>;
    /// Sends one message now.
    fn send_msi(&self, message: MsiMessage);
    /// Guest writes to this MMIO address (any value, `len` bytes) signal the eventfd without coming back to
    /// the bus. `false` where the engine has no such short cut: the bus sees the write as any other.
    fn ioeventfd(&self, gpa: u64, len: u32, fd: BorrowedFd<'_>) -> bool;
    fn remove_ioeventfd(&self, gpa: u64, len: u32, fd: BorrowedFd<'_>);
    /// What CPUID says here at most: the host's features less what this engine cannot do.
    fn supported_cpuid(&self) -> Result<CpuidTable, CpuError>;
}
