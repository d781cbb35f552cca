use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    deb::{package_file::PackageFileError, packages::IndexError, resolve::ResolveError},
    debian::{initrd::InitrdError, sandbox::SandboxError, tree::TreeError},
    fetch::FetchError,
    mirror::MirrorError,
    store::StoreError,
};

/// Why an image was not built. Nothing is left under its name, unless it was there before.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the build was cancelled; what was downloaded is kept for the next one")]
    Cancelled,
    #[error("there is no Debian release '{0}' that Vireo can build; it knows {1}")]
    UnknownSuite(String, String),
    #[error("'{0}' is no host name: use letters, digits and '-'")]
    Hostname(String),
    #[error("the root password must be one line that is not empty")]
    Password,
    #[error("programs that the build needs are missing: {programs}; install them: apt-get install {packages}")]
    MissingPrograms { programs: String, packages: String },
    #[error("the file system of {size} is too small for the packages; give a larger --size")]
    TooSmall { size: vireo_api::ByteSize },
    #[error("'{path}' has no space left: free some, or use another state directory (--state)")]
    NoSpace { path: PathBuf },
    #[error("no archive can be used")]
    Mirror(#[source] MirrorError),
    #[error("a package cannot be downloaded")]
    Fetch(#[source] FetchError),
    #[error("the packages do not fit together")]
    Resolve(#[from] ResolveError),
    #[error("the package index cannot be used")]
    Index(#[from] IndexError),
    #[error("the archive has no kernel for {0}: none of {1}")]
    NoKernel(String, String),
    #[error("package '{package}' cannot be read")]
    Package { package: String, source: PackageFileError },
    #[error("package '{package}' cannot be unpacked")]
    Tree { package: String, source: TreeError },
    #[error("the initrd cannot be made")]
    Initrd(#[from] InitrdError),
    #[error("packages cannot be installed on this host")]
    Sandbox(#[from] SandboxError),
    #[error("installing the packages failed ({status}); its last words were:\n{tail}")]
    Install { status: String, tail: String },
    #[error("'{path}' cannot be written")]
    Io { path: PathBuf, source: io::Error },
    #[error("the image cannot be stored")]
    Store(#[from] StoreError),
}

impl BuildError {
    /// An error while writing `path`; a full disk is said as such.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path },
            _ => Self::Io { path, source },
        }
    }
}

impl From<FetchError> for BuildError {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Cancelled => Self::Cancelled,
            FetchError::Cache { path, source } if source.kind() == io::ErrorKind::StorageFull => {
                Self::io(&path)(source)
            }
            other => Self::Fetch(other),
        }
    }
}

impl From<MirrorError> for BuildError {
    fn from(error: MirrorError) -> Self {
        match error {
            // What is the build's or the host's own is not said of the archive.
            MirrorError::Fetch(error) => match Self::from(error) {
                Self::Fetch(error) => Self::Mirror(MirrorError::Fetch(error)),
                other => other,
            },
            other => Self::Mirror(other),
        }
    }
}
