use std::{path::PathBuf, str::FromStr};

use vireo_block::Format;

use super::split_options;

/// A virtio block device over a file or block device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    pub path: PathBuf,
    /// `None` looks at the file: qcow2 if it says so itself, raw otherwise.
    pub format: Option<Format>,
    pub read_only: bool,
    /// What the guest writes goes to a temporary file in this folder and is gone when the run ends.
    pub ephemeral: Option<PathBuf>,
    /// What the guest finds as serial number (`/dev/disk/by-id/virtio-…`); at most 20 bytes.
    pub serial: Option<String>,
}

impl DiskConfig {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), format: None, read_only: false, ephemeral: None, serial: None }
    }
}

/// Why a text is no disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no disk: {why}; write PATH[,format=raw|qcow2][,ro][,serial=TEXT]")]
pub struct DiskSpecError {
    text: String,
    why: String,
}

impl FromStr for DiskConfig {
    type Err = DiskSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |why: String| DiskSpecError { text: text.to_owned(), why };
        let mut parts = split_options(text).into_iter();
        let path = parts.next().filter(|path| !path.is_empty()).ok_or_else(|| fail("it names no file".into()))?;
        let mut disk = Self::new(path);
        for option in parts {
            match option.split_once('=').unwrap_or((&option, "")) {
                ("ro", "") => disk.read_only = true,
                ("format", format) => disk.format = Some(format.parse().map_err(fail)?),
                ("serial", serial) if (1..=20).contains(&serial.len()) => disk.serial = Some(serial.to_owned()),
                ("serial", _) => return Err(fail("a serial has 1 to 20 bytes".into())),
                _ => return Err(fail(format!("the option '{option}' is not known"))),
            }
        }
        Ok(disk)
    }
}
