//! The images that the tests run, and state folders with them.

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tempfile::TempDir;

use crate::process;

/// What the tests run. The tools of the last one are in no other image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    Bookworm,
    Trixie,
    /// bookworm with fio, and with a password for root.
    Fio,
}

pub const RELEASES: [Image; 2] = [Image::Bookworm, Image::Trixie];
/// Of root, in [`Image::Fio`].
pub const PASSWORD: &str = "open sesame";

impl Image {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "debian-bookworm",
            Self::Trixie => "debian-trixie",
            Self::Fio => "with-fio",
        }
    }

    fn build_arguments(self) -> &'static [&'static str] {
        match self {
            Self::Bookworm => &["debian:bookworm"],
            Self::Trixie => &["debian:trixie"],
            Self::Fio => &["debian:bookworm", "--name", "with-fio", "--package", "fio", "--root-password", PASSWORD],
        }
    }
}

/// Why an image cannot be built, by what `vireo image build` says: the host's lack, not our fault.
const LACKS: [&str; 4] = [
    "no archive can be used",
    "a package cannot be downloaded",
    "programs that the build needs are missing",
    "packages cannot be installed on this host",
];

fn test_state() -> PathBuf {
    let default = || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("test-state");
    std::env::var_os("VIREO_TEST_STATE").map_or_else(default, PathBuf::from)
}

/// When the newest file that goes into images was changed.
fn ingredients_changed() -> SystemTime {
    fn newest(path: &Path) -> SystemTime {
        let meta = fs::metadata(path).unwrap();
        if !meta.is_dir() {
            return meta.modified().unwrap();
        }
        fs::read_dir(path).unwrap().map(|entry| newest(&entry.unwrap().path())).max().unwrap_or(UNIX_EPOCH)
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    ["crates/image/src", "crates/guest-protocol/src", "guest/agent/src"]
        .iter()
        .map(|path| newest(&workspace.join(path)))
        .max()
        .unwrap()
}

/// Whether there is an image that was built from what is in the tree now.
fn is_fresh(folder: &Path) -> bool {
    let Ok(text) = fs::read(folder.join("image.json")) else { return false };
    let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
    UNIX_EPOCH + Duration::from_secs(record["created"].as_u64().unwrap()) > ingredients_changed()
}

/// Builds an image unless it is there. Tests wait for each other here, in this process and in others.
fn built(image: Image) -> Result<PathBuf, String> {
    static BUILDING: Mutex<Vec<(&str, Result<PathBuf, String>)>> = Mutex::new(Vec::new());
    let mut results = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, result)) = results.iter().find(|(name, _)| *name == image.name()) {
        return result.clone();
    }
    let state = test_state();
    fs::create_dir_all(&state).unwrap();
    let lock = OpenOptions::new().write(true).create(true).truncate(false).open(state.join("tests.lock")).unwrap();
    lock.lock().unwrap();
    let folder = state.join("images").join(image.name());
    let result = if is_fresh(&folder) { Ok(folder) } else { build(image, &state).map(|()| folder) };
    results.push((image.name(), result.clone()));
    result
}

fn build(image: Image, state: &Path) -> Result<(), String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.arg("--state").arg(state).args(["image", "build"]).args(image.build_arguments());
    let ended = process::run(&mut command, b"");
    match ended.code {
        Some(0) => {
            assert_eq!(ended.text(), format!("{}\n", image.name()));
            Ok(())
        }
        Some(1) if LACKS.iter().any(|lack| ended.stderr.contains(lack)) => {
            let why = ended.stderr.lines().last().unwrap_or_default().to_owned();
            Err(format!("{} cannot be built here: {why}", image.name()))
        }
        code => panic!("building {} ends with {code:?}:\n{}", image.name(), ended.stderr),
    }
}

/// A state folder of a test's own, with an image in it that shares its files with the kept one.
pub struct State {
    pub folder: TempDir,
    pub image: Image,
}

impl State {
    /// `None`, and a note, where there can be no image.
    pub fn with(image: Image, test: &str) -> Option<Self> {
        let source = match built(image) {
            Ok(source) => source,
            Err(why) => {
                println!("SKIPPED: {test}: {why}");
                return None;
            }
        };
        let folder = tempfile::Builder::new().prefix("state-").tempdir_in(test_state()).unwrap();
        let target = folder.path().join("images").join(image.name());
        fs::create_dir_all(&target).unwrap();
        for entry in fs::read_dir(source).unwrap() {
            let entry = entry.unwrap();
            fs::hard_link(entry.path(), target.join(entry.file_name())).unwrap();
        }
        Some(Self { folder, image })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file of the image: `kernel`, `initrd`, `root.raw`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join("images").join(self.image.name()).join(name)
    }

    /// `vireo run OPTIONS IMAGE -- COMMAND`.
    pub fn run_command(&self, options: &[&str], command: &[&str]) -> Command {
        let mut vireo = process::vireo();
        vireo.arg("--state").arg(self.path()).arg("run").args(options).arg(self.image.name());
        if !command.is_empty() {
            vireo.arg("--").args(command);
        }
        vireo
    }

    /// Runs a command in a guest, to its end; nothing may be left of it.
    pub fn run(&self, options: &[&str], command: &[&str], input: &[u8]) -> process::Ended {
        let ended = process::run(&mut self.run_command(options, command), input);
        self.assert_nothing_left();
        ended
    }

    /// Runs a script for the guest's shell, which must succeed; returns what it prints.
    #[track_caller]
    pub fn script(&self, options: &[&str], script: &str) -> String {
        let ended = self.run(options, &["sh", "-euc", script], b"");
        assert_eq!(ended.code, Some(0), "{}{}", ended.text(), ended.stderr);
        ended.text()
    }

    /// `vireo boot` with the image's kernel and initrd, and its root disk read-only; `script` is the first process.
    pub fn boot_script(&self, options: &[&str], script: &str) -> process::Ended {
        assert!(!script.contains('"'), "the kernel's command line has no escapes");
        let disk = format!("{},format=raw,ro", self.file("root.raw").display());
        let line = format!("root=/dev/vda ro console=ttyS0 quiet init=/bin/sh -- -c \"{script}\"");
        let mut command = process::vireo();
        command.args(["boot", "--kernel"]).arg(self.file("kernel")).arg("--initrd").arg(self.file("initrd"));
        command.args(["--disk", &disk, "--append", &line]).args(options);
        process::run(&mut command, b"")
    }

    #[track_caller]
    pub fn assert_nothing_left(&self) {
        for folder in ["tmp", "images"] {
            let entries = fs::read_dir(self.path().join(folder)).into_iter().flatten().map(|entry| entry.unwrap());
            let names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
            let left: Vec<_> = names.iter().filter(|name| *name != self.image.name() && *name != ".lock").collect();
            assert!(left.is_empty(), "{left:?} is left in {folder}");
        }
    }
}

/// A file of this size, all holes.
pub fn empty_file(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}
