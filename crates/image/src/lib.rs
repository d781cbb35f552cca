//! Images: the local store, and the builder that makes a bootable Debian out of its archive.
//!
//! Nothing here prints or reads the command line: a caller passes a [`Progress`] and gets typed errors.
//!
//! ```no_run
//! use vireo_image::{BuildOptions, ImageStore, Quiet, StateDir};
//! let store = ImageStore::open(StateDir::default_for_user())?;
//! let image = store.build_debian(&BuildOptions::default(), &Quiet)?;
//! println!("{} boots with '{}'", image.kernel.display(), image.cmdline);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
// Namespaces, locks and the exchange of directories need system calls that std does not wrap.
#![allow(unsafe_code)]

mod apt;
mod deb;
mod debian;
mod digest;
mod error;
mod fetch;
mod mirror;
mod progress;
mod sparse;
mod state;
mod store;
#[cfg(test)]
mod testing;
mod verify;

pub use deb::{
    control::ControlError, package_file::PackageFileError, packages::IndexError, relation::RelationError,
    release::ReleaseError, resolve::ResolveError,
};
pub use debian::{BuildOptions, check_host, initrd::InitrdError, sandbox::SandboxError, suites, tree::TreeError};
pub use digest::{Sha256Sum, SumError};
pub use error::BuildError;
pub use fetch::FetchError;
pub use mirror::MirrorError;
pub use progress::{Progress, Quiet, Step};
pub use state::StateDir;
pub use store::{DiskFormat, FileRecord, Image, ImageRecord, ImageStore, Listed, StoreError};
pub use verify::VerifyError;

impl ImageStore {
    /// Builds a Debian image and puts it under its name, in the place of one that has it.
    ///
    /// Every file is checked against the signed index of the archive. What was downloaded stays in the cache, so that
    /// an interrupted build goes on where it was; under the image's name there is only ever a complete image.
    pub fn build_debian(&self, options: &BuildOptions, progress: &dyn Progress) -> Result<Image, BuildError> {
        debian::build(self, options, progress)
    }
}
