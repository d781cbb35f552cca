//! What a machine shall be, before anything of it exists.

mod disk;
mod nic;
mod stream;

use std::path::PathBuf;

use vireo_api::ByteSize;
pub use vireo_block::Format;

use crate::{boot::Decompressor, layout::MAX_RAM_BYTES};

pub use self::{
    disk::{DiskConfig, DiskSpecError},
    nic::{NicBackend, NicConfig, NicSpecError},
    stream::Stream,
};

/// Room for the boot structures, a kernel's first steps and the BIOS area.
const MIN_RAM_BYTES: u64 = 2 << 20;
const PAGE_BYTES: u64 = 4096;

/// Which engine runs the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// KVM where it runs guest kernels at native speed, the software engine elsewhere.
    #[default]
    Auto,
    Kvm,
    Soft,
}

impl std::str::FromStr for Accel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "soft" => Ok(Self::Soft),
            _ => Err(format!("'{text}' is no engine: write auto, kvm or soft")),
        }
    }
}

/// The kernel and what it gets.
#[derive(Clone, Debug)]
pub struct BootConfig {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    /// Who decompresses a bzImage; `None` leaves it to the engine: the host for the software engine, the guest for KVM.
    pub decompressor: Option<Decompressor>,
}

/// A virtio console, `hvc0` in a Linux guest.
#[derive(Clone)]
pub struct ConsoleConfig {
    pub stream: Stream,
    /// Columns and rows of the window, if it has a size.
    pub size: Option<(u16, u16)>,
}

/// A virtio vsock device.
#[derive(Clone, Copy, Debug)]
pub struct VsockConfig {
    /// The guest's context id: 3 or more (virtio 1.2, 5.10.4).
    pub guest_cid: u32,
}

/// Everything that [`crate::Machine::build`] needs to know. Cheap to clone, and good for several builds: a
/// guest that resets gets a new machine from the same description.
#[derive(Clone)]
pub struct MachineConfig {
    pub vcpus: u32,
    pub memory: ByteSize,
    pub accel: Accel,
    pub boot: BootConfig,
    /// In the order in which the guest finds them: `vda`, `vdb`, …
    pub disks: Vec<DiskConfig>,
    pub nics: Vec<NicConfig>,
    /// COM1; without one the port is there and nobody listens.
    pub serial: Option<Stream>,
    pub console: Option<ConsoleConfig>,
    pub vsock: Option<VsockConfig>,
    pub rng: bool,
    /// A guest that resets starts again; otherwise the run ends with [`crate::Outcome::Reset`].
    pub reboot: bool,
    /// Count and sample what [`crate::Report`] tells.
    pub metrics: bool,
    /// Have the software engine compare all that it translates with its interpreter: for those who work on it.
    pub verify_translation: bool,
}

impl MachineConfig {
    /// A machine with one vCPU, 512 MiB, an entropy device and nothing else.
    pub fn new(boot: BootConfig) -> Self {
        Self {
            vcpus: 1,
            memory: ByteSize(512 << 20),
            accel: Accel::Auto,
            boot,
            disks: Vec::new(),
            nics: Vec::new(),
            serial: None,
            console: None,
            vsock: None,
            rng: true,
            reboot: true,
            metrics: false,
            verify_translation: false,
        }
    }

    /// Refuses what no host could do.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.vcpus == 0 {
            return Err(ConfigError::NoVcpu);
        }
        if self.memory.0 < MIN_RAM_BYTES || self.memory.0 > MAX_RAM_BYTES || !self.memory.0.is_multiple_of(PAGE_BYTES) {
            return Err(ConfigError::Memory(self.memory));
        }
        if let Some(vsock) = self.vsock.filter(|v| v.guest_cid < 3 || v.guest_cid == u32::MAX) {
            return Err(ConfigError::VsockCid(vsock.guest_cid));
        }
        Ok(())
    }
}

/// A description that cannot become a machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("a machine needs at least one vCPU: give --cpus 1 or more")]
    NoVcpu,
    #[error("{0} is no possible memory size: give --memory a multiple of 4 KiB from {least} to {most}", least = ByteSize(MIN_RAM_BYTES), most = ByteSize(MAX_RAM_BYTES))]
    Memory(ByteSize),
    #[error("{0} is no context id for a guest: vsock takes 3 to 4294967294")]
    VsockCid(u32),
}

/// Cuts `PATH,option,option=value` at its commas; a doubled comma is one that belongs to the value.
fn split_options(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let doubled = c == ',' && rest.next_if_eq(&',').is_some();
        match parts.last_mut() {
            Some(part) if c != ',' || doubled => part.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts
}

#[cfg(test)]
mod tests;
