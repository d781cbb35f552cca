//! Images on disk: a directory each, complete or absent.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    debian::sandbox::{self, Privilege},
    digest::Sha256Sum,
    state::{FileLock, StateDir, remove_any},
};

/// Why the store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "'{0}' is no name for an image: use lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 64"
    )]
    Name(String),
    #[error("there is no image '{name}'{hint}")]
    NotFound { name: String, hint: String },
    #[error("image '{name}' is damaged: {why}; remove it (vireo image rm {name}) and build it again")]
    Damaged { name: String, why: String },
    #[error("'{path}' cannot be used")]
    Io { path: PathBuf, source: io::Error },
}

/// The version of `image.json` that this code writes, and the newest that it reads.
pub const SCHEMA: u32 = 1;

/// `image.json`: what an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    pub schema: u32,
    pub name: String,
    /// `debian`.
    pub distribution: String,
    /// `bookworm`, `trixie`.
    pub suite: String,
    /// Debian's name for it: `amd64`.
    pub architecture: String,
    pub kernel_version: String,
    /// The kernel command line with which the image boots.
    pub cmdline: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The version of the in-guest agent, if there is one.
    pub agent: Option<String>,
    /// The size of the root disk as the guest sees it.
    pub root_bytes: u64,
    /// `kernel`, `initrd` and `root.raw`.
    pub files: BTreeMap<String, FileRecord>,
    /// Name to version.
    pub packages: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    pub size_bytes: u64,
    pub sha256: Sha256Sum,
}

/// How the root disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

/// A complete image: what it takes to boot it.
#[derive(Clone, Debug)]
pub struct Image {
    pub name: String,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub root: PathBuf,
    pub format: DiskFormat,
    pub cmdline: String,
    pub record: ImageRecord,
}

impl Image {
    /// Bytes that the image takes on disk; less than the sizes of its files, as the root disk has holes.
    pub fn disk_usage_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let files = [&self.kernel, &self.initrd, &self.root];
        files.iter().filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.blocks() * 512).sum()
    }
}

/// One line of a list: a damaged image is listed too.
#[derive(Debug)]
pub struct Listed {
    pub name: String,
    pub image: Result<Image, StoreError>,
}

const RECORD: &str = "image.json";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const ROOTS: [(&str, DiskFormat); 2] = [("root.raw", DiskFormat::Raw), ("root.qcow2", DiskFormat::Qcow2)];
const RECORD_LIMIT: u64 = 16 << 20;

/// The images of one state directory.
#[derive(Clone, Debug)]
pub struct ImageStore {
    state: StateDir,
}

impl ImageStore {
    /// Opens the store, makes its directory where it is missing, and removes what dead builds left behind.
    pub fn open(state: StateDir) -> Result<Self, StoreError> {
        let store = Self { state };
        fs::create_dir_all(store.dir()).map_err(at(&store.dir()))?;
        store.remove_stale();
        Ok(store)
    }

    pub fn state(&self) -> &StateDir {
        &self.state
    }

    fn dir(&self) -> PathBuf {
        self.state.images()
    }

    /// All images by name.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let mut names: Vec<String> = fs::read_dir(self.dir())
            .map_err(at(&self.dir()))?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        Ok(names.into_iter().map(|name| Listed { image: self.inspect(&name), name }).collect())
    }

    /// The image of exactly this name.
    pub fn inspect(&self, name: &str) -> Result<Image, StoreError> {
        check_name(name)?;
        let dir = self.dir().join(name);
        if !dir.is_dir() {
            return Err(self.not_found(name));
        }
        let damaged = |why: String| StoreError::Damaged { name: name.to_owned(), why };
        let record = read_record(&dir.join(RECORD)).map_err(damaged)?;
        if record.schema > SCHEMA {
            return Err(damaged(format!("it was made by a newer Vireo (schema {})", record.schema)));
        }
        let (root, format) = ROOTS
            .into_iter()
            .find(|(file, _)| dir.join(file).is_file())
            .ok_or_else(|| damaged("it has no root disk".to_owned()))?;
        for file in [KERNEL, INITRD, root] {
            let size = fs::metadata(dir.join(file)).map_err(|_| damaged(format!("'{file}' is missing")))?.len();
            let wanted = record.files.get(file).ok_or_else(|| damaged(format!("'{file}' is not in its {RECORD}")))?;
            if size != wanted.size_bytes {
                return Err(damaged(format!("'{file}' has {size} bytes instead of {}", wanted.size_bytes)));
            }
        }
        Ok(Image {
            name: name.to_owned(),
            kernel: dir.join(KERNEL),
            initrd: dir.join(INITRD),
            root: dir.join(root),
            format,
            cmdline: record.cmdline.clone(),
            record,
        })
    }

    /// The image that a person means: an exact name, `debian:bookworm` for `debian-bookworm`, or a distribution's name
    /// alone for the newest release of it.
    pub fn find(&self, reference: &str) -> Result<Image, StoreError> {
        let name = reference.replace(':', "-");
        match self.inspect(&name) {
            Err(StoreError::NotFound { .. }) => {}
            found => return found,
        }
        let complete = self.list()?.into_iter().filter_map(|listed| listed.image.ok());
        let newest = complete
            .filter(|image| image.record.distribution == reference && image.name.starts_with(&format!("{reference}-")))
            .max_by_key(|image| (crate::debian::release_number(&image.record.suite), image.record.created));
        newest.ok_or_else(|| self.not_found(&name))
    }

    fn not_found(&self, name: &str) -> StoreError {
        let names: Vec<String> = self.list().unwrap_or_default().into_iter().map(|listed| listed.name).collect();
        let build = if name.starts_with("debian") { "; build it: vireo image build debian" } else { "" };
        let hint =
            if names.is_empty() { build.to_owned() } else { format!("; there are: {}{build}", names.join(", ")) };
        StoreError::NotFound { name: name.to_owned(), hint }
    }

    /// Reads the files of an image again and compares them with their sums. Takes seconds.
    pub fn verify(&self, name: &str) -> Result<(), StoreError> {
        let image = self.inspect(name)?;
        for path in [&image.kernel, &image.initrd, &image.root] {
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let (sum, _) = File::open(path).and_then(Sha256Sum::of_reader).map_err(at(path))?;
            if image.record.files.get(&file).map(|record| record.sha256) != Some(sum) {
                return Err(StoreError::Damaged {
                    name: name.to_owned(),
                    why: format!("the content of '{file}' has changed"),
                });
            }
        }
        Ok(())
    }

    /// Removes an image. A machine that runs from it keeps its open files.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        check_name(name)?;
        let dir = self.dir().join(name);
        let grave = self.stage()?;
        let gone = grave.path.join("removed");
        match fs::rename(&dir, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.not_found(name)),
            other => other.map_err(at(&dir)),
        }
    }

    /// A new directory in which an image is prepared; it vanishes when it is dropped.
    pub(crate) fn stage(&self) -> Result<Stage, StoreError> {
        let dir = self.dir();
        let _guard = self.lock_names()?;
        for number in 0u32.. {
            let path = dir.join(format!(".stage-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(StoreError::Io { path, source }),
                Ok(()) => {
                    let lock = FileLock::try_take(&path.join(".lock")).map_err(at(&path))?;
                    return Ok(Stage { path, _lock: lock });
                }
            }
        }
        Err(StoreError::Io { path: dir, source: io::ErrorKind::AlreadyExists.into() })
    }

    /// Moves a prepared directory to its name, in the place of an image that has it. Readers see the one or the other.
    pub(crate) fn commit(&self, prepared: &Path, record: &ImageRecord) -> Result<Image, StoreError> {
        check_name(&record.name)?;
        let text = serde_json::to_vec_pretty(record)
            .map_err(|error| StoreError::Io { path: prepared.join(RECORD), source: error.into() })?;
        let path = prepared.join(RECORD);
        File::create(&path).and_then(|mut file| file.write_all(&text)).map_err(at(&path))?;
        for file in record.files.keys().map(String::as_str).chain([RECORD]) {
            let path = prepared.join(file);
            File::open(&path).and_then(|file| file.sync_all()).map_err(at(&path))?;
        }
        let target = self.dir().join(&record.name);
        let _guard = self.lock_names()?;
        if target.exists() {
            // The old image is then under the prepared path and goes with the stage.
            exchange(prepared, &target).map_err(at(&target))?;
        } else {
            fs::rename(prepared, &target).map_err(at(&target))?;
        }
        File::open(self.dir()).and_then(|dir| dir.sync_all()).map_err(at(&self.dir()))?;
        self.inspect(&record.name)
    }

    /// Held for moments only: while names come and go.
    fn lock_names(&self) -> Result<FileLock, StoreError> {
        let path = self.dir().join(".lock");
        loop {
            if let Some(lock) = FileLock::try_take(&path).map_err(at(&path))? {
                return Ok(lock);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Stages whose lock nobody holds belong to builds that were killed.
    fn remove_stale(&self) {
        let Ok(_guard) = self.lock_names() else { return };
        for entry in fs::read_dir(self.dir()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".stage-")
                && let Ok(Some(_lock)) = FileLock::try_take(&entry.path().join(".lock"))
            {
                remove_staged(&entry.path());
            }
        }
    }
}

/// A directory of a build in progress.
pub(crate) struct Stage {
    pub path: PathBuf,
    _lock: Option<FileLock>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        remove_staged(&self.path);
    }
}

fn remove_staged(path: &Path) {
    if remove_any(path).is_err()
        && let Ok(privilege) = Privilege::detect()
    {
        let _ = sandbox::remove_tree(path, &privilege);
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::Io { path, source }
}

pub(crate) fn check_name(name: &str) -> Result<(), StoreError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let valid = (1..=64).contains(&name.len())
        && name.starts_with(plain)
        && name.chars().all(|c| plain(c) || "._-".contains(c));
    if valid { Ok(()) } else { Err(StoreError::Name(name.to_owned())) }
}

fn read_record(path: &Path) -> Result<ImageRecord, String> {
    let size = fs::metadata(path).map_err(|_| format!("'{RECORD}' is missing"))?.len();
    if size > RECORD_LIMIT {
        return Err(format!("'{RECORD}' is larger than any"));
    }
    let text = fs::read_to_string(path).map_err(|error| format!("'{RECORD}' cannot be read: {error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("'{RECORD}' is malformed: {error}"))
}

/// Swaps two directories in one step, so that there is no moment without an image.
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    let name = |path: &Path| {
        CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let (from, to) = (name(a)?, name(b)?);
    // SAFETY: both are NUL-terminated strings that live through the call.
    let result =
        unsafe { libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::RENAME_EXCHANGE) };
    if result == 0 {
        return Ok(());
    }
    // A file system without exchange: two steps, with a moment in between.
    let aside = a.with_extension("replaced");
    fs::rename(b, &aside)?;
    fs::rename(a, b)
}

#[cfg(test)]
mod tests;
