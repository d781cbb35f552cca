use std::{io, path::Path};

use vireo_api::ByteSize;
use vireo_memory::{GuestMemory, MemoryError};

use super::error::{BootError, BootFile};

/// What is wrong with a file, before it is known which file it was.
#[derive(Debug)]
pub(super) enum Fault {
    Truncated(String),
    Corrupt(String),
    Unsupported(String),
    /// The kernel needs guest memory up to this address.
    NeedsMemory(u64),
    Read(io::Error),
    Memory(MemoryError),
}

impl From<MemoryError> for Fault {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

impl From<io::Error> for Fault {
    /// Errors of the host carry an `errno`; all others come from a decoder that met bad data.
    fn from(error: io::Error) -> Self {
        if error.raw_os_error().is_some() {
            Self::Read(error)
        } else if error.kind() == io::ErrorKind::UnexpectedEof {
            Self::Truncated("the data ends too early".into())
        } else {
            Self::Corrupt(error.to_string())
        }
    }
}

impl Fault {
    /// Puts `context` before the reason, where there is one.
    pub(super) fn within(self, context: &str) -> Self {
        match self {
            Self::Truncated(why) => Self::Truncated(format!("{context}: {why}")),
            Self::Corrupt(why) => Self::Corrupt(format!("{context}: {why}")),
            other => other,
        }
    }

    pub(super) fn of(self, what: BootFile, path: &Path, memory: &GuestMemory) -> BootError {
        let path = path.to_owned();
        match self {
            Self::Truncated(why) => BootError::Truncated { what, path, why },
            Self::Corrupt(why) => BootError::Corrupt { what, path, why },
            Self::Unsupported(why) => BootError::Unsupported { path, why },
            Self::NeedsMemory(end) => {
                BootError::MemoryTooSmall { path, has: ByteSize(memory.bytes()), needs: ByteSize(end) }
            }
            Self::Read(source) => BootError::Read { what, path, source },
            Self::Memory(error) => BootError::Memory(error),
        }
    }
}
