//! What is refused, and in which words; locks; what an image says of itself.

mod model;

use std::{fs, path::Path, sync::Arc};

use model::{RO, RW, as_format, have_qemu, pattern, qemu_img, str, tool};
use vireo_block::{Disk, DiskError, Format, ImageInfo, OpenError, OpenOptions, check, create_qcow2, describe, open};
use vireo_memory::GuestSlice;

/// The error and all below it, as a user sees them.
fn refusal(path: &Path, options: OpenOptions) -> String {
    let Err(error) = open(path, options) else { panic!("{} was opened", path.display()) };
    let mut text = error.to_string();
    let mut below: Option<&dyn std::error::Error> = std::error::Error::source(&error);
    while let Some(error) = below {
        text = format!("{text}: {error}");
        below = error.source();
    }
    text
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}

fn raw(dir: &Path, name: &str, bytes: usize) -> std::path::PathBuf {
    let path = dir.join(name);
    fs::write(&path, pattern(1, bytes)).unwrap();
    path
}

#[test]
fn what_is_no_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    says(&refusal(&dir.join("none"), RW), &["none", "reading and writing", "No such file"]);
    says(&refusal(dir, RO), &["neither a regular file nor a block device"]);
    says(&refusal(&raw(dir, "odd", 1000), RW), &["odd", "1000 bytes", "truncate -s 1024"]);
    says(&refusal(&raw(dir, "empty", 0), RW), &["empty"]);
    says(&refusal(&raw(dir, "raw", 4096), as_format(Format::Qcow2, true)), &["raw", "magic", "format=raw"]);
    says(&refusal(Path::new("/dev/null"), RO), &["/dev/null"]);
}

#[test]
fn probing_finds_qcow2_by_its_magic_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create_qcow2(&path, 1 << 20, None).unwrap();
    assert_eq!(open(&path, RW).unwrap().size_bytes(), 1 << 20);
    // a guest that wrote a qcow2 header to its raw disk stays with a raw disk
    let file_bytes = fs::metadata(&path).unwrap().len();
    assert_eq!(open(&path, as_format(Format::Raw, false)).unwrap().size_bytes(), file_bytes);
}

#[test]
fn two_writers_cannot_open_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    for path in [raw(dir.path(), "disk.raw", 4096), {
        let path = dir.path().join("disk.qcow2");
        create_qcow2(&path, 1 << 20, None).unwrap();
        path
    }] {
        let first = open(&path, RW).unwrap();
        says(&refusal(&path, RW), &[str(&path), "locked", "has it open"]);
        says(&refusal(&path, RO), &["locked", "for writing"]);
        if have_qemu("two_writers_cannot_open_a_disk (QEMU's half)") {
            let (good, text) = tool("qemu-io", &["-c", "read 0 512", str(&path)]).unwrap();
            assert!(!good && text.contains("lock"), "{text}");
        }
        drop(first);
        let readers = (open(&path, RO).unwrap(), open(&path, RO).unwrap());
        says(&refusal(&path, RW), &["locked"]);
        drop(readers);
        open(&path, RW).unwrap();
    }
    // the base of an open image cannot be written either
    let (base, top) = (raw(dir.path(), "base", 4096), dir.path().join("top"));
    create_qcow2(&top, 4096, Some((&base, Format::Raw))).unwrap();
    let _top = open(&top, RW).unwrap();
    says(&refusal(&base, RW), &["locked"]);
}

#[test]
fn read_only_disks_refuse_changes_and_ranges_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    create_qcow2(&path, 1 << 20, None).unwrap();
    let base = raw(dir.path(), "disk.raw", 1 << 20);
    for path in [&path, &base] {
        let disk = open(path, RO).unwrap();
        let mut data = vec![0; 512];
        let data = [GuestSlice::from_host(&mut data)];
        assert!(disk.read_only());
        assert!(matches!(disk.write(0, &data), Err(DiskError::ReadOnly)));
        assert!(matches!(disk.discard(0, 512), Err(DiskError::ReadOnly)));
        assert!(matches!(disk.write_zeroes(0, 512, true), Err(DiskError::ReadOnly)));
        disk.flush().unwrap();
        drop(disk);
        let disk = open(path, RW).unwrap();
        for at in [(1 << 20) - 256, 1 << 20, u64::MAX - 100, u64::MAX] {
            assert!(matches!(disk.read(at, &data), Err(DiskError::OutOfRange { .. })), "{at:#x}");
            assert!(matches!(disk.write(at, &data), Err(DiskError::OutOfRange { .. })), "{at:#x}");
            assert!(matches!(disk.discard(at, 512), Err(DiskError::OutOfRange { .. })), "{at:#x}");
            assert!(matches!(disk.write_zeroes(at, 512, false), Err(DiskError::OutOfRange { .. })), "{at:#x}");
        }
        disk.write(1 << 20, &[]).unwrap();
        disk.discard(1 << 20, 0).unwrap();
        disk.write_zeroes(1 << 20, 0, true).unwrap();
        disk.write_zeroes(0, 1 << 20, true).unwrap();
    }
}

#[test]
fn chains_that_are_missing_or_loop_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    create_qcow2(&at("top"), 1 << 20, Some((Path::new("middle"), Format::Qcow2))).unwrap();
    says(&refusal(&at("top"), RW), &["top", "middle", "cannot be used", "No such file"]);
    create_qcow2(&at("middle"), 1 << 20, Some((Path::new("bottom"), Format::Raw))).unwrap();
    says(&refusal(&at("top"), RO), &["top", "middle", "bottom", "No such file"]);
    raw(dir.path(), "bottom", 512 << 10);
    let disk = open(&at("top"), RW).unwrap();
    assert_eq!(model::read(&*disk, 0, 4096).unwrap(), pattern(1, 4096));
    assert_eq!(model::read(&*disk, 512 << 10, 4096).unwrap(), [0; 4096]);
    drop(disk);

    fs::remove_file(at("bottom")).unwrap();
    create_qcow2(&at("bottom"), 1 << 20, Some((Path::new("top"), Format::Qcow2))).unwrap();
    fs::remove_file(at("middle")).unwrap();
    create_qcow2(&at("middle"), 1 << 20, Some((Path::new("bottom"), Format::Qcow2))).unwrap();
    for options in [RO, RW] {
        says(&refusal(&at("top"), options), &["top", "middle", "bottom", "based on itself"]);
    }
    create_qcow2(&at("self"), 1 << 20, Some((Path::new("self"), Format::Qcow2))).unwrap();
    says(&refusal(&at("self"), RW), &["based on itself"]);
    for n in 0..40 {
        let base = format!("deep{}", n + 1);
        create_qcow2(&at(&format!("deep{n}")), 1 << 20, Some((Path::new(&base), Format::Qcow2))).unwrap();
    }
    create_qcow2(&at("deep40"), 1 << 20, None).unwrap();
    says(&refusal(&at("deep0"), RO), &["more than 32 backing files"]);
    open(&at("deep20"), RO).unwrap();
}

#[test]
fn images_tell_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (raw(dir.path(), "base", 4096), dir.path().join("top"));
    create_qcow2(&top, 8192, Some((Path::new("base"), Format::Raw))).unwrap();
    let info = ImageInfo { format: Format::Qcow2, size_bytes: 8192, backing: Some((base.clone(), Some(Format::Raw))) };
    assert_eq!(describe(&top, None).unwrap(), info);
    assert_eq!(describe(&base, None).unwrap(), ImageInfo { format: Format::Raw, size_bytes: 4096, backing: None });
    if have_qemu("images_tell_what_they_are (QEMU's half)") {
        let text = qemu_img(&["info", str(&top)]);
        says(&text, &["file format: qcow2", "8 KiB", "backing file: base", "backing file format: raw"]);
    }
}

#[test]
fn creating_refuses_what_cannot_be_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for size in [0, 1000, u64::MAX / 512 * 512] {
        assert!(matches!(create_qcow2(&path, size, None), Err(OpenError::NoDisk { .. })), "{size}");
    }
    let long = "x".repeat(2000);
    assert!(create_qcow2(&path, 512, Some((Path::new(&long), Format::Raw))).is_err());
    assert!(!path.exists());
    create_qcow2(&path, 512, None).unwrap();
    says(&create_qcow2(&path, 512, None).unwrap_err().to_string(), &["disk"]);
    for size in [512, 1 << 30, 1 << 40, 1 << 50] {
        let path = dir.path().join(size.to_string());
        create_qcow2(&path, size, None).unwrap();
        let disk = open(&path, RW).unwrap();
        assert_eq!(disk.size_bytes(), size);
        model::write(&*disk, size - 512, &pattern(3, 512)).unwrap();
        drop(disk);
        let disk = open(&path, RO).unwrap();
        assert_eq!(model::read(&*disk, size - 512, 512).unwrap(), pattern(3, 512));
        drop(disk);
        let report = check(&path).unwrap();
        assert_eq!((report.leaked, report.corruptions), (0, 0), "{report:?}");
        if have_qemu("creating_refuses_what_cannot_be_and_leaves_nothing (QEMU's half)") {
            qemu_img(&["check", "-q", str(&path)]);
        }
    }
}

#[test]
fn features_that_are_not_supported_are_named() {
    if !have_qemu("features_that_are_not_supported_are_named") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let data = format!("data_file={}", str(&at("data")));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, str(&at("external")), "1M"]);
    says(&refusal(&at("external"), RO), &["external data file", "qemu-img convert"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", str(&at("extended")), "1M"]);
    says(&refusal(&at("extended"), RO), &["extended L2"]);
    qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", "nbd://host/x", "-F", "raw", str(&at("nbd")), "1M"]);
    says(&refusal(&at("nbd"), RO), &["nbd://host/x"]);
    qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", "x.vmdk", "-F", "vmdk", str(&at("vmdk")), "1M"]);
    says(&refusal(&at("vmdk"), RO), &["vmdk"]);
    // unknown incompatible features, versions, the mark of corruption
    let change = |name: &str, offset: usize, bytes: &[u8]| {
        let path = at(name);
        create_qcow2(&path, 1 << 20, None).unwrap();
        let mut image = fs::read(&path).unwrap();
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, image).unwrap();
        path
    };
    says(&refusal(&change("future", 72, &[0x80]), RO), &["0x8000000000000000"]);
    says(&refusal(&change("v4", 7, &[4]), RO), &["version 4"]);
    says(&refusal(&change("aes", 35, &[1]), RO), &["encryption"]);
    // by hand, since qemu-img measures the host's speed for one and fails where the host is busy
    says(&refusal(&change("luks", 35, &[2]), RO), &["LUKS encryption"]);
    let corrupt = change("corrupt", 79, &[2]);
    says(&refusal(&corrupt, RW), &["corrupt", "qemu-img check"]);
    open(&corrupt, RO).unwrap();
}

#[test]
fn truncated_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create_qcow2(&path, 1 << 20, None).unwrap();
    let image = fs::read(&path).unwrap();
    for len in [1, 4, 71, 100, 512, 65_536, 131_072, 196_612] {
        fs::write(&path, &image[..len]).unwrap();
        says(&refusal(&path, as_format(Format::Qcow2, true)), &[str(&path)]);
    }
}

/// An image that QEMU left without closing it: refcounts behind, the dirty bit set.
#[test]
fn lazy_refcounts_are_set_right() {
    if !have_qemu("lazy_refcounts_are_set_right") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", str(&path), "8M"]);
    // killed in the middle, as QEMU's own tests do it
    let _ = tool("qemu-io", &["-c", "write -P 5 0 3M", "-c", "flush", "-c", "sigraise 9", str(&path)]);
    let report = check(&path).unwrap();
    assert!(report.dirty && report.corruptions > 0, "{report:?}");
    let disk = open(&path, RO).unwrap();
    assert!(model::read(&*disk, 0, 3 << 20).unwrap().iter().all(|b| *b == 5), "readable as it is");
    drop(disk);
    let disk: Arc<dyn Disk> = open(&path, RW).unwrap();
    model::write(&*disk, 3 << 20, &pattern(9, 1 << 20)).unwrap();
    drop(disk);
    let report = check(&path).unwrap();
    assert_eq!((report.dirty, report.leaked, report.corruptions), (false, 0, 0), "{report:?}");
    qemu_img(&["check", "-q", str(&path)]);
    let disk = open(&path, RO).unwrap();
    assert!(model::read(&*disk, 0, 3 << 20).unwrap().iter().all(|b| *b == 5));
    assert_eq!(model::read(&*disk, 3 << 20, 1 << 20).unwrap(), pattern(9, 1 << 20));
}

#[test]
fn zeroes_in_the_middle_of_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(dir.path(), "disk", 4096);
    let disk = open(&path, RW).unwrap();
    disk.write_zeroes(512, 1024, false).unwrap();
    disk.write_zeroes(2048, 512, true).unwrap();
    let mut want = pattern(1, 4096);
    want[512..1536].fill(0);
    want[2048..2560].fill(0);
    assert_eq!(model::read(&*disk, 0, 4096).unwrap(), want);
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
}

/// A host file system that is full: said so, the image stays sound, and goes on once there is room. Runs again by
/// itself in a namespace where it may mount a small file system.
#[test]
fn a_full_host_is_said_so() {
    const INSIDE: &str = "VIREO_BLOCK_TEST_SMALL_FS";
    if let Some(dir) = std::env::var_os(INSIDE) {
        return fill_up(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mount =
        format!("mount -t tmpfs -o size=3M none {0} && exec \"$0\" --exact a_full_host_is_said_so", str(dir.path()));
    let can = tool("unshare", &["-rm", "sh", "-c", &format!("mount -t tmpfs none {}", str(dir.path()))]);
    if can.is_none_or(|(good, _)| !good) {
        eprintln!("SKIPPED a_full_host_is_said_so: cannot mount in a user namespace here");
        return;
    }
    let out = std::process::Command::new("unshare")
        .args(["-rm", "sh", "-c", &mount])
        .arg(std::env::current_exe().unwrap())
        .env(INSIDE, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

fn fill_up(dir: &Path) {
    let (path, ballast) = (dir.join("disk.qcow2"), dir.join("ballast"));
    create_qcow2(&path, 64 << 20, None).unwrap();
    fs::write(&ballast, vec![1; 1 << 20]).unwrap();
    let disk = open(&path, RW).unwrap();
    let mut written = 0;
    let error = loop {
        match model::write(&*disk, written << 16, &pattern(written, 1 << 16)) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 64, "it never gets full");
    };
    assert!(matches!(error, DiskError::NoSpace), "{error:?}");
    says(&error.to_string(), &["no space left"]);
    // what was written is there, and once there is room it goes on
    for n in 0..written {
        assert!(model::read(&*disk, n << 16, 1 << 16).unwrap() == pattern(n, 1 << 16));
    }
    let _ = disk.flush();
    fs::remove_file(ballast).unwrap();
    model::write(&*disk, written << 16, &pattern(written, 1 << 16)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let report = check(&path).unwrap();
    assert_eq!(report.corruptions, 0, "{report:?}");
    let disk = open(&path, RO).unwrap();
    for n in 0..=written {
        assert!(model::read(&*disk, n << 16, 1 << 16).unwrap() == pattern(n, 1 << 16));
    }
}
