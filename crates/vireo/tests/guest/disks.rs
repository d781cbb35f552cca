//! Disks of the user's, and the image's own.

use std::{path::Path, process::Command};

use crate::images::{Image, State, empty_file};

fn has_qemu_img(test: &str) -> bool {
    let has = Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has {
        println!("SKIPPED: {test}: qemu-img is not there (package qemu-utils)");
    }
    has
}

#[track_caller]
fn qemu_img(arguments: &[&str], path: &Path) {
    let output = Command::new("qemu-img").args(arguments).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A raw and a qcow2 disk hold what one machine wrote for the next one, and are sound in between.
#[test]
fn disks_keep_what_is_written_to_them() {
    let test = "disks_keep_what_is_written_to_them";
    let Some(state) = State::with(Image::Bookworm, test) else { return };
    if !has_qemu_img(test) {
        return;
    }
    let (raw, base, qcow2) = ["a.raw", "base.raw", "b.qcow2"].map(|name| state.path().join(name)).into();
    empty_file(&raw, 300 << 20);
    empty_file(&base, 300 << 20);
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&base, &qcow2])
        .status();
    assert!(created.unwrap().success());
    let disks = [raw.display().to_string(), format!("{},format=qcow2", qcow2.display())];
    let write = "for disk in vdb vdc; do
            mkfs.ext4 -q /dev/$disk; mount /dev/$disk /mnt; cp -a /usr/sbin /usr/lib/systemd /mnt
            head -c 5000000 /dev/urandom >/mnt/noise; rm -r /mnt/systemd/system; fstrim /mnt
            (cd /mnt && find . -type f | sort | xargs sha256sum | sha256sum); umount /mnt
        done; touch /root/marker";
    let wrote = state.script(&["--disk", &disks[0], "--disk", &disks[1]], write);
    assert_eq!(wrote.lines().count(), 2);
    qemu_img(&["check", "-q", "-f", "qcow2"], &qcow2);
    let read = "test ! -e /root/marker
        for disk in vdb vdc; do
            e2fsck -fn /dev/$disk >/dev/null 2>&1; mount -o ro /dev/$disk /mnt
            (cd /mnt && find . -type f | sort | xargs sha256sum | sha256sum); umount /mnt
        done; dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/dev/null && sync /dev/vdb && echo written || echo read-only";
    let read_only = format!("{},ro", disks[0]);
    assert_eq!(state.script(&["--disk", &read_only, "--disk", &disks[1]], read), format!("{wrote}read-only\n"));
    qemu_img(&["check", "-q", "-f", "qcow2"], &qcow2);
}

/// What is written without a sync is on the disk too, when the machine ends because its command did.
#[test]
fn disks_are_written_back_at_the_end() {
    let Some(state) = State::with(Image::Bookworm, "disks_are_written_back_at_the_end") else { return };
    let disk = state.path().join("a.raw");
    empty_file(&disk, 64 << 20);
    let disk = disk.display().to_string();
    let write = "mkfs.ext4 -q /dev/vdb; mount /dev/vdb /mnt; head -c 3000000 /dev/zero | tr '\\0' x >/mnt/file";
    state.script(&["--disk", &disk], write);
    let read = "mount /dev/vdb /mnt; tr -d x </mnt/file | wc -c; wc -c </mnt/file";
    assert_eq!(state.script(&["--disk", &disk], read), "0\n3000000\n");
}

#[test]
fn fio_verifies_raw_and_qcow2() {
    let test = "fio_verifies_raw_and_qcow2";
    let Some(state) = State::with(Image::Fio, test) else { return };
    if !has_qemu_img(test) {
        return;
    }
    let (raw, qcow2) = (state.path().join("a.raw"), state.path().join("b.qcow2"));
    empty_file(&raw, 64 << 20);
    assert!(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&qcow2)
            .arg("64M")
            .status()
            .unwrap()
            .success()
    );
    let script = "for disk in vdb vdc; do
            fio --name=$disk --filename=/dev/$disk --rw=randwrite --bsrange=512-64k --bs_unaligned=0 --size=32M \
                --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 \
                --randseed=7 --output-format=terse --output=/tmp/out || { cat /tmp/out; exit 1; }
            cut -d ';' -f 5 /tmp/out
        done";
    let disks = [raw.display().to_string(), format!("{},format=qcow2", qcow2.display())];
    assert_eq!(state.script(&["--cpus", "2", "--disk", &disks[0], "--disk", &disks[1]], script), "0\n0\n");
    qemu_img(&["check", "-q", "-f", "qcow2"], &qcow2);
}
