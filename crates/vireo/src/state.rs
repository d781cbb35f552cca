//! Where images and caches live: `--state`, `VIREO_STATE`, or the user's usual place.

use std::path::PathBuf;

use clap::builder::TypedValueParser;
use vireo_api::ExitCode;
use vireo_image::{ImageStore, StateDir};

use crate::exit::Failure;

#[derive(clap::Args)]
pub struct StateArgs {
    /// Folder for images and caches [default: /var/lib/vireo for root, else ~/.local/share/vireo]
    #[arg(long = "state", value_name = "DIR", env = "VIREO_STATE", value_parser = clap::builder::OsStringValueParser::new().map(PathBuf::from), global = true, display_order = 900)]
    state: Option<PathBuf>,
}

impl StateArgs {
    pub fn dir(&self) -> StateDir {
        match &self.state {
            Some(path) if !path.as_os_str().is_empty() => {
                StateDir::new(std::path::absolute(path).unwrap_or_else(|_| path.clone()))
            }
            // An empty variable counts as none.
            _ => StateDir::default_for_user(),
        }
    }

    pub fn store(&self) -> Result<ImageStore, Failure> {
        ImageStore::open(self.dir()).map_err(|e| Failure::new(ExitCode::Failed, e))
    }
}
