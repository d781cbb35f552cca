use std::{io, path::PathBuf};

use vireo_api::ExitCode;
use vireo_block::{DiskError, OpenError};
use vireo_cpu::CpuError;
use vireo_devices::{
    bus::BusError,
    pci::PciError,
    virtio::{VirtioError, pci::VirtioPciError},
};
use vireo_memory::MemoryError;
use vireo_packet::NetError;

use crate::{boot::BootError, config::ConfigError};

/// Why a machine could not be built or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{asked} vCPUs are more than the {engine} engine supports: give --cpus {most} or less")]
    TooManyVcpus { engine: &'static str, asked: u32, most: u32 },
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Disk(#[from] OpenError),
    #[error("cannot make a temporary file in {folder} for what the guest writes to its disks", folder = folder.display())]
    Temporary {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write what the guest wrote to the disk {path} to the host's storage", path = path.display())]
    Flush {
        path: PathBuf,
        #[source]
        source: DiskError,
    },
    #[error(transparent)]
    Nic(#[from] NetError),
    #[error("cannot connect the guest's {device}")]
    Stream {
        device: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Engine(#[from] CpuError),
    #[error("cannot place a device")]
    Bus(#[from] BusError),
    #[error("cannot place a PCI device")]
    Pci(#[from] PciError),
    #[error("cannot make a virtio device")]
    Virtio(#[from] VirtioError),
    #[error("cannot make a virtio PCI function")]
    VirtioPci(#[from] VirtioPciError),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl MachineError {
    /// The exit code that tells this kind of failure.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_) | Self::TooManyVcpus { .. } => ExitCode::Usage,
            Self::Boot(error) => boot_exit_code(error),
            Self::Nic(_) | Self::Temporary { .. } | Self::Engine(CpuError::Unavailable { .. }) => ExitCode::Failed,
            Self::Engine(CpuError::TooManyVcpus { .. }) => ExitCode::Usage,
            Self::Disk(error) => disk_exit_code(error),
            _ => ExitCode::HostFailure,
        }
    }
}

fn boot_exit_code(error: &BootError) -> ExitCode {
    match error {
        BootError::Read { .. } => ExitCode::Failed,
        BootError::CommandLineTooLong { .. } | BootError::CommandLineNul => ExitCode::Usage,
        BootError::Memory(_) => ExitCode::HostFailure,
        _ => ExitCode::BadInput,
    }
}

fn disk_exit_code(error: &OpenError) -> ExitCode {
    match error {
        OpenError::Open { .. } | OpenError::Locked { .. } | OpenError::Read { .. } => ExitCode::Failed,
        _ => ExitCode::BadInput,
    }
}
