//! Where images and caches live: `--state`, `VIREO_STATE`, or the user's usual place.

use std::path::PathBuf;

use vireo_api::ExitCode;
use vireo_image::{ImageStore, StateDir};

use crate::exit::Failure;

#[derive(clap::Args)]
pub struct StateArgs {
    /// Folder for images and caches [default: /var/lib/vireo for root, else ~/.local/share/vireo]
    #[arg(long = "state", value_name = "DIR", env = "VIREO_STATE", global = true, display_order = 900)]
    state: Option<PathBuf>,
}

impl StateArgs {
    pub fn dir(&self) -> StateDir {
        match &self.state {
            Some(path) => StateDir::new(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
            None => StateDir::default_for_user(),
        }
    }

    pub fn store(&self) -> Result<ImageStore, Failure> {
        ImageStore::open(self.dir()).map_err(|e| Failure::new(ExitCode::Failed, e))
    }
}
