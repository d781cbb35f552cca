//! Kernel and busybox from the archive that this host's apt is set up for.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// Metapackages that depend on the distribution's kernel for virtual machines: Debian's, Ubuntu's.
const KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// Kernel and folder of its modules, downloaded into `work` unless they are there.
pub fn kernel(work: &Path) -> Result<(PathBuf, PathBuf)> {
    let root = work.join("kernel");
    if find(&root, &|name| name.starts_with("vmlinuz-")).is_none() {
        let known = KERNELS.iter().find_map(|meta| real_kernel(meta));
        let Some(package) = known else {
            bail!("apt knows none of {KERNELS:?}: run apt-get update, or give --kernel and --modules");
        };
        unpack(&package, &root)?;
        // Ubuntu keeps them apart.
        if let Some(version) = package.strip_prefix("linux-image-")
            && find(&root, &|name| name.starts_with("virtio_blk.ko")).is_none()
        {
            unpack(&format!("linux-modules-{version}"), &root)?;
        }
    }
    let kernel =
        find(&root, &|name| name.starts_with("vmlinuz-")).context("the kernel package has no /boot/vmlinuz-*")?;
    Ok((kernel, root))
}

pub fn busybox(work: &Path) -> Result<PathBuf> {
    let root = work.join("busybox");
    if find(&root, &|name| name == "busybox").is_none() {
        unpack("busybox-static", &root)?;
    }
    find(&root, &|name| name == "busybox").context("busybox-static has no busybox in it")
}

/// What a metapackage stands for at the moment.
fn real_kernel(meta: &str) -> Option<String> {
    let output = Command::new("apt-cache").args(["depends", "--important", meta]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut depends = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    depends.find(|name| name.starts_with("linux-image-")).map(str::to_owned)
}

fn unpack(package: &str, into: &Path) -> Result<()> {
    eprintln!("downloading {package}");
    let folder = tempfile::tempdir_in(into.parent().unwrap_or(into))?;
    run(Command::new("apt-get").args(["-qq", "-o", "APT::Sandbox::User=", "download", package]).current_dir(&folder))?;
    let file = find(folder.path(), &|name| name.ends_with(".deb"));
    let file = file.with_context(|| format!("apt-get downloaded no package {package}"))?;
    run(Command::new("dpkg-deb").arg("-x").arg(file).arg(into))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The first file below `folder` with a name that `wanted` takes.
pub fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries.into_iter().find_map(|path| match path.symlink_metadata() {
        Ok(data) if data.is_dir() => find(&path, wanted),
        Ok(data) if data.is_file() && wanted(path.file_name()?.to_str()?) => Some(path),
        _ => None,
    })
}
