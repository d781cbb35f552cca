//! `vireo image`: builds, lists, shows and removes images.

mod progress;

use std::{io::IsTerminal, path::PathBuf};

use anyhow::anyhow;
use vireo_api::{ByteSize, ExitCode};
use vireo_image::{BuildError, BuildOptions, Image, ImageStore, Listed, StoreError};

pub use self::progress::Bar;
use crate::{
    agent,
    exit::{Failure, print},
    state::StateArgs,
};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a bootable image from the Debian archive that this host's apt configuration names
    Build(BuildArgs),
    /// List images
    Ls {
        /// Only names
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show everything about an image, as JSON
    Inspect {
        #[arg(value_name = "IMAGE")]
        name: String,
    },
    /// Remove images
    Rm {
        #[arg(value_name = "IMAGE", required = true)]
        names: Vec<String>,
    },
}

#[derive(clap::Args)]
pub struct BuildArgs {
    /// What to build: debian, debian:bookworm or debian:trixie
    #[arg(value_name = "debian[:RELEASE]")]
    what: String,
    /// A package to install besides the base system; may be given again
    #[arg(long = "package", value_name = "P")]
    packages: Vec<String>,
    /// Name of the image [default: debian-RELEASE]
    #[arg(long, value_name = "N")]
    name: Option<String>,
    /// Size of the root disk; the host only stores what is written
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    size: ByteSize,
    /// Base address of a Debian archive, instead of the one that apt uses on this host
    #[arg(long, value_name = "URL", env = "VIREO_DEBIAN_MIRROR")]
    mirror: Option<String>,
    /// Keys that sign the archive, instead of the host's
    #[arg(long, value_name = "FILE")]
    keyring: Option<PathBuf>,
    /// Password of root at the console; without one only the agent lets root in
    #[arg(long, value_name = "PASSWORD")]
    root_password: Option<String>,
}

pub fn run(command: Command, state: &StateArgs) -> Result<ExitCode, Failure> {
    let store = state.store()?;
    match command {
        Command::Build(args) => {
            let image = build(&store, args)?;
            print(&image.name)?;
        }
        Command::Ls { quiet } => list(&store, quiet)?,
        Command::Inspect { name } => {
            let image = find(&store, &name)?;
            let text = serde_json::to_string_pretty(&image.record)
                .map_err(|e| Failure::new(ExitCode::Failed, anyhow!(e).context("cannot show the image")))?;
            print(&text)?;
        }
        Command::Rm { names } => {
            for name in names {
                let name = match store.find(&name) {
                    Ok(image) => image.name,
                    // Removing is the remedy.
                    Err(StoreError::Damaged { name, .. }) => name,
                    Err(error) => return Err(unusable(error)),
                };
                store.remove(&name).map_err(|e| Failure::new(ExitCode::Failed, e))?;
                print(&name)?;
            }
        }
    }
    Ok(ExitCode::Ok)
}

fn find(store: &ImageStore, name: &str) -> Result<Image, Failure> {
    store.find(name).map_err(unusable)
}

/// An image that cannot be had.
fn unusable(error: StoreError) -> Failure {
    Failure::new(code_of_store(&error), error)
}

fn code_of_store(error: &StoreError) -> ExitCode {
    match error {
        StoreError::Name(_) => ExitCode::Usage,
        StoreError::Damaged { .. } => ExitCode::BadInput,
        StoreError::NotFound { .. } | StoreError::Io { .. } => ExitCode::Failed,
    }
}

/// The release of `debian` or `debian:RELEASE`.
pub fn release_of(what: &str) -> Option<Option<&str>> {
    match what.split_once(':') {
        None => (what == "debian").then_some(None),
        Some((distribution, release)) => (distribution == "debian").then_some(Some(release)),
    }
}

fn build(store: &ImageStore, args: BuildArgs) -> Result<Image, Failure> {
    let Some(release) = release_of(&args.what) else {
        let why = anyhow!("'{}' cannot be built: Vireo builds debian, debian:bookworm and debian:trixie", args.what);
        return Err(Failure::new(ExitCode::Usage, why));
    };
    let options = BuildOptions {
        suite: release.map(str::to_owned),
        name: args.name,
        packages: args.packages,
        size: args.size,
        mirror: args.mirror,
        keyring: args.keyring,
        root_password: args.root_password,
        ..with_agent()
    };
    build_with(store, &options)
}

fn with_agent() -> BuildOptions {
    BuildOptions { agent: Some(agent::PROGRAM.to_vec()), agent_version: Some(agent::version()), ..Default::default() }
}

fn build_with(store: &ImageStore, options: &BuildOptions) -> Result<Image, Failure> {
    let bar = Bar::new(std::io::stderr().is_terminal())
        .map_err(|e| Failure::new(ExitCode::HostFailure, anyhow!(e).context("cannot handle signals")))?;
    let result = store.build_debian(options, &bar);
    bar.finish();
    result.map_err(|e| Failure::new(code_of(&e), e))
}

fn code_of(error: &BuildError) -> ExitCode {
    match error {
        BuildError::UnknownSuite(..) | BuildError::Hostname(_) | BuildError::Password => ExitCode::Usage,
        BuildError::Store(error) => code_of_store(error),
        _ => ExitCode::Failed,
    }
}

/// The image that `vireo run` means, built first if it is one that we know how to build.
pub fn find_or_build(store: &ImageStore, reference: &str) -> Result<Image, Failure> {
    let missing = match store.find(reference) {
        Ok(image) if agent::speaks_with(image.record.agent.as_deref()) => return Ok(image),
        Ok(image) => {
            let why = anyhow!(
                "image '{}' was built by a Vireo whose agent this one does not understand: build it again with \
                 'vireo image build {}:{}'",
                image.name,
                image.record.distribution,
                image.record.suite
            );
            return Err(Failure::new(ExitCode::Failed, why));
        }
        Err(missing) => missing,
    };
    match (missing, release_of(reference)) {
        (StoreError::NotFound { .. }, Some(release)) => {
            eprintln!("vireo: there is no image '{reference}' yet: building it, once");
            build_with(store, &BuildOptions { suite: release.map(str::to_owned), ..with_agent() })
        }
        (other, _) => Err(unusable(other)),
    }
}

fn list(store: &ImageStore, quiet: bool) -> Result<(), Failure> {
    let images = store.list().map_err(|e| Failure::new(ExitCode::Failed, e))?;
    if quiet {
        return images.iter().try_for_each(|listed| print(&listed.name));
    }
    print(&format!("{:<24} {:<18} {:<28} {:>10}  CREATED", "NAME", "RELEASE", "KERNEL", "ON DISK"))?;
    for Listed { name, image } in images {
        print(&match image {
            Ok(image) => format!(
                "{name:<24} {:<18} {:<28} {:>10}  {}",
                format!("{} {}", image.record.distribution, image.record.suite),
                image.record.kernel_version,
                ByteSize(image.disk_usage_bytes()).to_string(),
                age(image.record.created),
            ),
            Err(StoreError::Damaged { why, .. }) => format!("{name:<24} damaged: {why}"),
            Err(error) => format!("{name:<24} {error}"),
        })?;
    }
    Ok(())
}

/// How long ago a time in seconds since 1970 was.
fn age(created: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let seconds = now.saturating_sub(created);
    for (unit, name) in [(86_400, "day"), (3600, "hour"), (60, "minute")] {
        let count = seconds / unit;
        if count > 0 {
            return format!("{count} {name}{} ago", if count == 1 { "" } else { "s" });
        }
    }
    "just now".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_is_built() {
        assert_eq!(release_of("debian"), Some(None));
        assert_eq!(release_of("debian:trixie"), Some(Some("trixie")));
        assert_eq!(release_of("ubuntu"), None);
        assert_eq!(release_of("debian-trixie"), None);
    }
}
