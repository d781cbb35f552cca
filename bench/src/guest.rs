//! The guest that all tests run in: a kernel, and an initial ramdisk of busybox, the load program and drivers.

use std::{
    env, fs,
    io::Read,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    cpio::Archive,
    packages::{self, find},
};

/// In the order in which they depend on each other. One that is not there is taken to be part of the kernel.
const DRIVERS: [&str; 9] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
];

/// The lines on the guest's console that the measurement looks for.
pub const READY: &str = "bench: init";
pub const FAILED: &str = "bench: failed";

pub struct Guest {
    pub kernel: PathBuf,
    busybox: Vec<u8>,
    /// The load program, for the host to run.
    pub load_path: PathBuf,
    load: Vec<u8>,
    drivers: Vec<(&'static str, Vec<u8>)>,
}

impl Guest {
    /// `kernel` is one with the folder of its modules.
    pub fn prepare(work: &Path, kernel: Option<(PathBuf, PathBuf)>, busybox: Option<PathBuf>) -> Result<Self> {
        let (kernel, modules) = kernel.map_or_else(|| packages::kernel(work), Ok)?;
        let busybox = busybox.map_or_else(|| packages::busybox(work), Ok)?;
        let drivers = DRIVERS.iter().filter_map(|name| Some((*name, driver(&modules, name)?)));
        let drivers = drivers.map(|(name, data)| Ok((name, data?))).collect::<Result<_>>()?;
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let load_path = build_load()?;
        let load = read(&load_path)?;
        Ok(Self { busybox: read(&busybox)?, load, load_path, drivers, kernel: kernel.canonicalize()? })
    }

    /// A ramdisk that says [`READY`] and powers off, and has nothing more in it than that needs.
    pub fn bare_ramdisk(&self) -> Vec<u8> {
        let mut archive = base(&self.busybox);
        archive.program("init", init("").as_bytes());
        archive.finish()
    }

    /// A ramdisk with drivers and load program whose init runs `script`.
    pub fn ramdisk(&self, script: &str) -> Vec<u8> {
        let mut archive = base(&self.busybox);
        archive.program("bin/load", &self.load);
        let mut steps = String::from("mount -t devtmpfs dev /dev\n");
        let mut load = String::new();
        for (name, data) in &self.drivers {
            archive.program(&format!("drivers/{name}.ko"), data);
            load.push_str(&format!("[ -d /sys/module/{name} ] || insmod /drivers/{name}.ko 2>/dev/null || true\n"));
        }
        // Which driver needs which changes from kernel to kernel: those that came too early get another turn.
        steps.push_str("mount -t sysfs sys /sys\n");
        steps.push_str(&load.repeat(2));
        for (name, _) in &self.drivers {
            steps.push_str(&format!("[ -d /sys/module/{name} ]\n"));
        }
        steps.push_str(script);
        archive.program("init", init(&steps).as_bytes());
        archive.finish()
    }
}

fn base(busybox: &[u8]) -> Archive {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "drivers"] {
        archive.folder(folder);
    }
    archive.character_device("dev/console", (5, 1));
    archive.program("bin/busybox", busybox);
    archive
}

/// Any step that fails is told to the host.
fn init(steps: &str) -> String {
    let commands = ["mount", "insmod", "dd", "ip", "cat", "sleep"];
    let aliases: String = commands.iter().map(|c| format!("{c}() {{ /bin/busybox {c} \"$@\"; }}\n")).collect();
    format!(
        "#!/bin/busybox sh\n{aliases}echo '{READY}'\n(\nset -e\n{steps}\n)\n\
         test $? = 0 || echo '{FAILED}'\n/bin/busybox poweroff -f\n"
    )
}

fn driver(modules: &Path, name: &str) -> Option<Result<Vec<u8>>> {
    let is_it = |file: &str| {
        file.split_once(".ko").is_some_and(|(stem, rest)| stem.replace('-', "_") == name && ["", ".xz"].contains(&rest))
    };
    find(modules, &is_it).map(|path| unpacked(&path).with_context(|| format!("cannot read {}", path.display())))
}

/// Busybox loads uncompressed modules only.
fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let data = fs::read(path)?;
    if path.extension().is_none_or(|end| end != "xz") {
        return Ok(data);
    }
    let mut plain = Vec::new();
    xz2::read::XzDecoder::new(&data[..]).read_to_end(&mut plain)?;
    Ok(plain)
}

/// Builds the load program, statically: there are no libraries in the guest.
fn build_load() -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let build = ["rustc", "--quiet", "--release", "-p", "vireo-bench-load", "--message-format", "json"];
    let output = Command::new(cargo)
        .args(build)
        .args(["--", "-C", "target-feature=+crt-static"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .context("cannot run cargo to build the guest's load program")?;
    if !output.status.success() {
        bail!("building the guest's load program failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let program = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back();
    program.context("cargo named no load program")
}
