//! Input that cannot work: the exit code, one sentence that names the file or flag, and nothing left behind.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    images::{Image, State, empty_file},
    process::{self, Ended, vireo},
};

fn run(arguments: &[&str]) -> Ended {
    process::run(vireo().args(arguments), b"")
}

#[test]
fn machines_that_cannot_be_are_refused() {
    let test = "machines_that_cannot_be_are_refused";
    let Some(state) = State::with(Image::Bookworm, test) else { return };
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port();
    let net = format!("user,fwd=tcp:127.0.0.1:{port}:80");
    for (options, code, words) in [
        (&["--accel", "soft", "--cpus", "9"][..], 2, &["9 vCPUs", "--cpus 8"][..]),
        (&["--cpus", "100"], 2, &["100 vCPUs", "--cpus"]),
        (&["--cpus", "0"], 2, &["--cpus 1"]),
        (&["--cpus", "-1"], 2, &["-1"]),
        (&["--memory", "1M"], 2, &["--memory"]),
        (&["--memory", "8M"], 3, &["8 MiB", "--memory"]),
        (&["--memory", "64M"], 3, &["initrd", "--memory"]),
        (&["--memory", "9999T"], 2, &["--memory"]),
        (&["--net", &net], 1, &[&format!("{port}"), "in use"]),
        (&["--net", "tap=vireo-none"], 1, &["no tap device vireo-none", "ip tuntap add"]),
        (&["--net", "bridge"], 2, &["'bridge'", "tap=NAME"]),
        (&["--disk", "/no/such/disk"], 1, &["/no/such/disk", "No such file"]),
        (&["--disk", "x,format=vmdk"], 2, &["vmdk"]),
        (&["--env", "=x"], 2, &["--env"]),
        (&["--boot-timeout", "soon"], 2, &["--boot-timeout"]),
        (&["--boot-timeout", "0"], 124, &["--boot-timeout", "--verbose"]),
    ] {
        let ended = state.run(options, &["true"], b"");
        ended.assert_says(code, words);
        assert_eq!(ended.stdout, b"", "{options:?}");
    }
    drop(busy);
}

#[test]
fn an_image_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().to_str().unwrap();
    for (arguments, code, words) in [
        (&["run", "windows", "--", "true"][..], 1, &["no image 'windows'"][..]),
        (&["run", "../../etc", "--", "true"], 2, &["'../../etc' is no name"]),
        (&["run", ""], 2, &["no name for an image"]),
        (&["image", "inspect", "windows"], 1, &["no image 'windows'"]),
        (&["image", "rm", "windows"], 1, &["no image 'windows'"]),
        (&["image", "build", "windows"], 2, &["'windows'", "debian:bookworm"]),
        (&["image", "build", "debian:potato"], 2, &["'potato'", "trixie, bookworm"]),
        (&["image", "build", "debian", "--name", "No/Good"], 2, &["'No/Good'"]),
        (&["image", "build", "debian", "--size", "1M"], 1, &["--size"]),
        (&["image", "rm"], 2, &["IMAGE"]),
        (&["fly"], 2, &["fly"]),
        (&["run"], 2, &["IMAGE"]),
    ] {
        let ended = run(&[&["--state", state], arguments].concat());
        ended.assert_says(code, words);
        assert_eq!(ended.stdout, b"");
    }
    let left = fs::read_dir(folder.path().join("images")).unwrap().flatten();
    assert_eq!(left.filter(|entry| entry.file_name() != ".lock").count(), 0);
}

#[test]
fn a_damaged_image_says_so() {
    let Some(state) = State::with(Image::Bookworm, "a_damaged_image_says_so") else { return };
    let kernel = state.file("kernel");
    fs::remove_file(&kernel).unwrap();
    let words = ["damaged", "'kernel'", "vireo image rm debian-bookworm"];
    state.run(&[], &["true"], b"").assert_says(3, &words);
    fs::write(&kernel, b"short").unwrap();
    state.run(&[], &["true"], b"").assert_says(3, &["damaged", "5 bytes"]);
    let listed = run(&["--state", state.path().to_str().unwrap(), "image", "ls"]);
    assert_eq!(listed.code, Some(0));
    assert!(listed.text().contains("debian-bookworm") && listed.text().contains("damaged"), "{}", listed.text());
    let removed = run(&["--state", state.path().to_str().unwrap(), "image", "rm", "debian-bookworm"]);
    assert_eq!(removed.code, Some(0), "a damaged image cannot be removed: {}", removed.stderr);
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> String {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

/// A stock kernel and initrd, cut or spoilt.
#[test]
fn kernels_and_initrds_that_are_broken() {
    let Some(state) = State::with(Image::Trixie, "kernels_and_initrds_that_are_broken") else { return };
    let folder = state.path();
    let (kernel, initrd) = (fs::read(state.file("kernel")).unwrap(), fs::read(state.file("initrd")).unwrap());
    let whole = state.file("kernel").display().to_string();
    let half_kernel = write(folder, "half-kernel", &kernel[..kernel.len() / 2]);
    let head_kernel = write(folder, "head-kernel", &kernel[..600]);
    let mut spoilt = kernel.clone();
    let middle = spoilt.len() / 2;
    spoilt[middle..middle + 4096].fill(0);
    let spoilt_kernel = write(folder, "spoilt-kernel", &spoilt);
    let half_initrd = write(folder, "half-initrd", &initrd[..initrd.len() / 2]);
    let noise_initrd = write(folder, "noise-initrd", &[0xa5; 100_000]);
    for (arguments, code, words) in [
        (&["--kernel", &half_kernel][..], 3, &["half-kernel"][..]),
        (&["--kernel", &head_kernel], 3, &["head-kernel"]),
        (&["--kernel", &spoilt_kernel, "--accel", "soft"], 3, &["spoilt-kernel"]),
        (&["--kernel", "/etc"], 1, &["/etc"]),
        (&["--kernel", "/etc/passwd"], 3, &["/etc/passwd", "text file"]),
        (&["--kernel", &whole, "--initrd", &half_initrd], 3, &["half-initrd", "truncated"]),
        (&["--kernel", &whole, "--initrd", &noise_initrd], 3, &["noise-initrd"]),
        (&["--kernel", &whole, "--initrd", "/etc"], 1, &["/etc"]),
        (&["--kernel", &whole, "--memory", "16M"], 3, &["--memory"]),
    ] {
        let ended = run(&[&["boot"], arguments].concat());
        ended.assert_says(code, words);
        assert_eq!(ended.stdout, b"", "{arguments:?}");
    }
}

/// With a bare kernel, as the disk is looked at before anything runs.
#[test]
fn disks_that_are_broken() {
    let test = "disks_that_are_broken";
    let Some(state) = State::with(Image::Bookworm, test) else { return };
    let folder = state.path();
    let image = |name: &str, options: &[&str]| {
        let path = folder.join(name).display().to_string();
        let output = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).args(options).arg(&path).output();
        output.is_ok_and(|output| output.status.success()).then_some(path)
    };
    let Some(whole) = image("whole.qcow2", &["-o", "size=64M"]) else {
        println!("SKIPPED: {test}: qemu-img is not there (package qemu-utils)");
        return;
    };
    let bytes = fs::read(&whole).unwrap();
    let cut = write(folder, "cut.qcow2", &bytes[..70_000]);
    let head = write(folder, "head.qcow2", &bytes[..50]);
    let mut spoilt = bytes.clone();
    spoilt[40..48].copy_from_slice(&u64::MAX.to_be_bytes()); // the offset of the L1 table
    let spoilt = write(folder, "spoilt.qcow2", &spoilt);
    empty_file(&folder.join("base.raw"), 1 << 20);
    let orphan = image("orphan.qcow2", &["-b", "base.raw", "-F", "raw"]).unwrap();
    fs::remove_file(folder.join("base.raw")).unwrap();
    let (one, two) = (folder.join("one.qcow2"), folder.join("two.qcow2"));
    let one = image("one.qcow2", &["-u", "-b", "two.qcow2", "-F", "qcow2", "-o", "size=1M"])
        .unwrap_or_else(|| panic!("{}", one.display()));
    image("two.qcow2", &["-u", "-b", "one.qcow2", "-F", "qcow2", "-o", "size=1M"])
        .unwrap_or_else(|| panic!("{}", two.display()));
    let empty = write(folder, "empty.raw", b"");
    let raw_as_qcow2 = format!("{},format=qcow2", write(folder, "plain.raw", &[7; 4096]));
    let kernel = state.file("kernel").display().to_string();
    for (disk, code, words) in [
        (&cut, 3, &["cut.qcow2"][..]),
        (&head, 3, &["head.qcow2"]),
        (&spoilt, 3, &["spoilt.qcow2"]),
        (&orphan, 3, &["orphan.qcow2", "base.raw"]),
        (&one, 3, &["one.qcow2"]),
        (&raw_as_qcow2, 3, &["plain.raw", "qcow2"]),
        (&empty, 3, &["empty.raw"]),
        (&"/etc".to_owned(), 3, &["/etc", "block device"]),
    ] {
        let ended = run(&["boot", "--kernel", &kernel, "--disk", disk]);
        ended.assert_says(code, words);
    }
}

/// One machine has the disk, another wants it.
#[test]
fn a_disk_in_use_is_refused() {
    let Some(state) = State::with(Image::Bookworm, "a_disk_in_use_is_refused") else { return };
    let disk = state.path().join("mine.raw");
    empty_file(&disk, 1 << 20);
    let disk = disk.display().to_string();
    let mut command = state.run_command(&["--disk", &disk], &["true"]);
    let mut first = process::Guard(command.stdin(Stdio::null()).spawn().unwrap());
    std::thread::sleep(std::time::Duration::from_secs(2));
    let ended = process::run(&mut state.run_command(&["--disk", &disk], &["true"]), b"");
    ended.assert_says(1, &["mine.raw", "is locked"]);
    assert_eq!(first.wait(), Some(0));
}

#[test]
fn a_state_folder_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "file", b"");
    let inside = format!("{file}/state");
    for state in [inside.as_str(), "/proc/vireo", "/dev/null"] {
        run(&["--state", state, "image", "ls"]).assert_says(1, &[state]);
        run(&["--state", state, "run", "debian", "--", "true"]).assert_says(1, &[state]);
    }
}

/// A file system of a few megabytes, where this process may mount one.
#[test]
fn no_space_is_said() {
    let test = "no_space_is_said";
    let Some(state) = State::with(Image::Bookworm, test) else { return };
    let small = state.path().join("small");
    fs::create_dir(&small).unwrap();
    // In a mount namespace of its own: nothing is left mounted, whatever happens.
    let script = "mount -t tmpfs -o size=4M none \"$1\" || exit 77; \"$2\" --state \"$1\" image build debian; \
                  code=$?; find \"$1\" -name '.stage*' >&2; ls \"$1/images\" >&2; exit $code";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(&small).arg(env!("CARGO_BIN_EXE_vireo"));
    let ended = process::run(&mut command, b"");
    if ended.code != Some(1) || ended.stderr.contains("unshare") {
        assert!(ended.code == Some(77) || ended.stderr.contains("unshare"), "{:?}: {}", ended.code, ended.stderr);
        println!("SKIPPED: {test}: a file system cannot be mounted here: {}", ended.stderr.trim());
        return;
    }
    ended.assert_says(1, &["no space left", "--state"]);
    assert!(!ended.stderr.contains("stage"), "{}", ended.stderr);
}
