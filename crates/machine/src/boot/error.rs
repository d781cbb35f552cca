use std::{io, path::PathBuf};

use vireo_api::ByteSize;
use vireo_memory::MemoryError;

/// Which of the user's files an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootFile {
    Kernel,
    Initrd,
}

impl BootFile {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        }
    }
}

/// Why a kernel could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot read the {} {path}", what.name())]
    Read {
        what: BootFile,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{path} is no kernel that can be booted: it seems to be {found}. Give --kernel a Linux bzImage (vmlinuz) or an x86-64 ELF kernel (vmlinux)"
    )]
    NotAKernel { path: PathBuf, found: String },
    #[error("the {} {path} is truncated: {why}. Copy or download it again", what.name())]
    Truncated { what: BootFile, path: PathBuf, why: String },
    #[error("the {} {path} is damaged: {why}. Copy or download it again", what.name())]
    Corrupt { what: BootFile, path: PathBuf, why: String },
    #[error("the kernel {path} cannot be booted: {why}")]
    Unsupported { path: PathBuf, why: String },
    #[error("{has} of guest memory is too small for the kernel {path}, which needs {needs}. Give at least --memory {}M", needs.0.div_ceil(1 << 20))]
    MemoryTooSmall { path: PathBuf, has: ByteSize, needs: ByteSize },
    #[error(
        "the initrd {path} of {size} does not fit into guest memory beside the kernel: {room} are free there. {advice}"
    )]
    InitrdTooLarge { path: PathBuf, size: ByteSize, room: ByteSize, advice: String },
    #[error("the kernel command line has {has} bytes, but this kernel takes at most {most}. Shorten --append")]
    CommandLineTooLong { has: usize, most: usize },
    #[error("the kernel command line contains a NUL byte. Remove it from --append")]
    CommandLineNul,
    #[error("cannot write the boot structures into guest memory")]
    Memory(#[from] MemoryError),
}
