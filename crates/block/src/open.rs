//! Opening an image of any format, with all that it is based on.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Disk, DiskError,
    file::{FileId, HostFile},
    qcow2::{self, Qcow2},
    raw::Raw,
};

/// Images that may stand on each other.
const MAX_DEPTH: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("`{s}` is no disk format that is known here; use raw or qcow2")),
        }
    }
}

/// How to open an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// `None` looks for qcow2's magic; see the crate's words on trust.
    pub format: Option<Format>,
    pub read_only: bool,
}

fn access(read_only: bool) -> &'static str {
    if read_only { "reading" } else { "reading and writing" }
}

fn other_use(write: bool) -> &'static str {
    if write {
        "something else has it open; stop what uses it, or open it read-only in both"
    } else {
        "something else has it open for writing; stop that first"
    }
}

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot open disk image {} for {}", .path.display(), access(*.read_only))]
    Open {
        path: PathBuf,
        read_only: bool,
        #[source]
        source: io::Error,
    },
    #[error("disk image {} is locked: {}", .path.display(), other_use(*.write))]
    Locked { path: PathBuf, write: bool },
    #[error("{} cannot be used as a disk: {why}", .path.display())]
    NoDisk { path: PathBuf, why: String },
    #[error("disk image {} uses {what}, which is not supported; {remedy}", .path.display())]
    Unsupported { path: PathBuf, what: String, remedy: String },
    #[error("disk image {} is corrupt: {why}; restore it from a copy or try `qemu-img check -r all`", .path.display())]
    Corrupt { path: PathBuf, why: String },
    #[error("disk image {} is based on {}, which cannot be used", .path.display(), .backing.display())]
    Backing {
        path: PathBuf,
        backing: PathBuf,
        #[source]
        source: Box<OpenError>,
    },
    #[error("disk image {} is based on itself: the chain of backing files comes back to it", .path.display())]
    Loop { path: PathBuf },
    #[error("disk image {} stands on more than {MAX_DEPTH} backing files; merge some with `qemu-img rebase`", .path.display())]
    TooDeep { path: PathBuf },
    #[error("cannot read disk image {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: DiskError,
    },
}

/// What an image says of itself, without opening what it is based on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    pub format: Format,
    pub size_bytes: u64,
    /// Path of the backing file, relative ones resolved, and its format if the image names one.
    pub backing: Option<(PathBuf, Option<Format>)>,
}

/// Opens an image and locks it against other writers (or against any, if it is opened for writing).
pub fn open(path: &Path, options: OpenOptions) -> Result<Arc<dyn Disk>, OpenError> {
    open_in_chain(path, options, &mut Vec::new())
}

/// Reads what an image says of itself.
pub fn describe(path: &Path, format: Option<Format>) -> Result<ImageInfo, OpenError> {
    let file = HostFile::open(path, true)?;
    match probe(&file, format)? {
        Format::Raw => {
            let size_bytes = Raw::new(file, true)?.size_bytes();
            Ok(ImageInfo { format: Format::Raw, size_bytes, backing: None })
        }
        Format::Qcow2 => {
            let header = qcow2::read_header(&file)?;
            let backing = header.backing_path(path)?;
            Ok(ImageInfo { format: Format::Qcow2, size_bytes: header.size, backing })
        }
    }
}

fn probe(file: &HostFile, format: Option<Format>) -> Result<Format, OpenError> {
    if let Some(format) = format {
        return Ok(format);
    }
    let mut magic = [0; 4];
    match file.read_bytes(0, &mut magic) {
        Ok(()) if magic == qcow2::MAGIC => Ok(Format::Qcow2),
        Ok(()) => Ok(Format::Raw),
        Err(DiskError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Format::Raw),
        Err(source) => Err(OpenError::Read { path: file.path().into(), source }),
    }
}

pub(crate) fn open_in_chain(
    path: &Path,
    options: OpenOptions,
    chain: &mut Vec<FileId>,
) -> Result<Arc<dyn Disk>, OpenError> {
    let file = match HostFile::open(path, options.read_only) {
        // A chain that comes back to the image that we write is locked by ourselves.
        Err(OpenError::Locked { .. }) if is_in(path, chain) => return Err(OpenError::Loop { path: path.into() }),
        other => other?,
    };
    let id = file.id().map_err(|source| OpenError::Open { path: path.into(), read_only: options.read_only, source })?;
    if chain.contains(&id) {
        return Err(OpenError::Loop { path: path.into() });
    }
    if chain.len() > MAX_DEPTH {
        return Err(OpenError::TooDeep { path: path.into() });
    }
    chain.push(id);
    Ok(match probe(&file, options.format)? {
        Format::Raw => Arc::new(Raw::new(file, options.read_only)?),
        Format::Qcow2 => Arc::new(Qcow2::open(file, options.read_only, chain)?),
    })
}

fn is_in(path: &Path, chain: &[FileId]) -> bool {
    let id = std::fs::File::open(path).ok().and_then(|file| HostFile::unnamed(file).id().ok());
    id.is_some_and(|id| chain.contains(&id))
}
