//! `vireo boot` as a user meets it: exit codes, messages, output.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

#[path = "../../machine/tests/support/mod.rs"]
mod support;
use support::{crash, elf_kernel, halt, power_off, print, report_panic, reset};

/// A folder with a kernel that prints `hello` and powers off, and other files that a test wants.
struct Case {
    folder: TempDir,
}

struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Case {
    fn new() -> Self {
        let case = Self { folder: tempfile::tempdir().unwrap() };
        case.file("kernel", &elf_kernel(&[print("hello\n"), power_off(), halt()].concat()));
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        support::write(self.folder.path(), name, bytes)
    }

    /// Runs `vireo boot` in the case's folder.
    fn boot(&self, args: &[&str]) -> Ended {
        ended(vireo(self.folder.path(), &[&["boot"], args].concat()).output().unwrap())
    }
}

fn vireo(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.args(args).current_dir(folder).stdin(Stdio::null());
    command
}

fn ended(output: Output) -> Ended {
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[track_caller]
fn assert_refused(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "'{word}' is missing in: {}", ended.stderr);
    }
    assert!(!ended.stderr.contains("thread '"), "{}", ended.stderr);
}

#[test]
fn wrong_usage_is_2() {
    let case = Case::new();
    let kernel = ["--kernel", "kernel"];
    let with = |args: &[&'static str]| [&kernel[..], args].concat();
    for (args, words) in [
        (vec![], vec!["--kernel"]),
        (with(&["--cpus", "x"]), vec!["--cpus"]),
        (with(&["--cpus", "0"]), vec!["vCPU", "--cpus 1"]),
        (with(&["--accel", "soft", "--cpus", "9"]), vec!["9 vCPUs", "soft", "--cpus 8"]),
        (with(&["--accel", "kvm", "--cpus", "65"]), vec!["65 vCPUs", "kvm", "--cpus 64"]),
        (with(&["--accel", "tcg"]), vec!["'tcg' is no engine", "auto, kvm or soft"]),
        (with(&["--memory", "lots"]), vec!["'lots' is no size", "512M"]),
        (with(&["--memory", "1M"]), vec!["--memory", "2 MiB"]),
        (with(&["--memory", "600G"]), vec!["--memory"]),
        (with(&["--disk", "a,format=vmdk"]), vec!["vmdk", "raw"]),
        (with(&["--disk", "a,fast"]), vec!["'fast'"]),
        (with(&["--net", "bridge=br0"]), vec!["bridge=br0", "tap=NAME"]),
        (with(&["--net", "user,fwd=tcp:80"]), vec!["guest port"]),
        (with(&["--serial", "tcp"]), vec!["stdio, file=PATH or none"]),
        (with(&["--bogus"]), vec!["--bogus"]),
        (with(&["--append", &*Box::leak("x".repeat(3000).into_boxed_str())]), vec!["3000", "2047", "--append"]),
    ] {
        assert_refused(&case.boot(&args), 2, &words);
    }
}

#[test]
fn a_kernel_that_is_none_is_3() {
    let case = Case::new();
    case.file("text", b"not a kernel at all\n");
    case.file("empty", b"");
    case.file("disk.qcow2", b"QFI\xfb\0\0\0\x03");
    let whole = elf_kernel(&[0x90; 4000]);
    case.file("cut", &whole[..whole.len() - 100]);
    for (kernel, words) in [
        ("text", vec!["text", "a text file", "--kernel"]),
        ("empty", vec!["an empty file"]),
        ("disk.qcow2", vec!["a qcow2 disk image"]),
        ("cut", vec!["cut", "truncated"]),
    ] {
        assert_refused(&case.boot(&["--kernel", kernel]), 3, &words);
    }
}

#[test]
fn a_file_that_is_not_there_is_1() {
    let case = Case::new();
    assert_refused(&case.boot(&["--kernel", "nowhere"]), 1, &["kernel nowhere", "No such file"]);
    let args = ["--kernel", "kernel", "--initrd", "gone"];
    assert_refused(&case.boot(&args), 1, &["initrd gone", "No such file"]);
    let args = ["--kernel", "kernel", "--disk", "gone.img"];
    assert_refused(&case.boot(&args), 1, &["gone.img", "No such file"]);
    let args = ["--kernel", "kernel", "--metrics", "no/such/folder"];
    assert_refused(&case.boot(&args), 1, &["no/such/folder"]);
    let args = ["--kernel", "kernel", "--serial", "file=no/such/folder"];
    assert_refused(&case.boot(&args), 1, &["no/such/folder"]);
}

#[test]
fn a_broken_initrd_is_3() {
    let case = Case::new();
    let archive = support::cpio::Archive::default().file("init", 0o755, &[7; 5000]).finish();
    case.file("cut.cpio", &archive[..3000]);
    case.file("empty.cpio", b"");
    let packed = zstd_frame(&archive);
    case.file("cut.zst", &packed[..packed.len() / 2]);
    for (initrd, words) in [
        ("cut.cpio", vec!["cut.cpio", "truncated", "'init'"]),
        ("empty.cpio", vec!["empty.cpio", "empty"]),
        ("cut.zst", vec!["cut.zst", "zstd"]),
    ] {
        assert_refused(&case.boot(&["--kernel", "kernel", "--initrd", initrd]), 3, &words);
    }
}

/// A zstd frame of one raw block (RFC 8878, 3.1.1): enough to be cut.
fn zstd_frame(data: &[u8]) -> Vec<u8> {
    let mut frame = 0xfd2f_b528u32.to_le_bytes().to_vec();
    frame.push(0b1010_0000); // single segment, 4-byte content size
    frame.extend((data.len() as u32).to_le_bytes());
    frame.extend(&((data.len() as u32) << 3 | 1).to_le_bytes()[..3]);
    frame.extend_from_slice(data);
    frame
}

#[test]
fn too_little_memory_says_how_much_is_needed() {
    let case = Case::new();
    let mut kernel = elf_kernel(&[0xf4]);
    // p_memsz of the only segment: 64 MiB
    kernel[64 + 40..64 + 48].copy_from_slice(&(64u64 << 20).to_le_bytes());
    case.file("large", &kernel);
    assert_refused(&case.boot(&["--kernel", "large", "--memory", "32M"]), 3, &["32 MiB", "large", "--memory 65M"]);
}

#[test]
fn nothing_is_left_behind_by_a_failure() {
    let case = Case::new();
    let args = ["--kernel", "kernel", "--initrd", "gone", "--metrics", "m.json"];
    assert_refused(&case.boot(&args), 1, &["gone"]);
    assert!(!case.path("m.json").exists());
}

/// Options for each engine that can run here.
fn accels(test: &str) -> Vec<&'static str> {
    support::engines(test)
        .into_iter()
        .map(|accel| match accel {
            vireo_machine::config::Accel::Kvm => "kvm",
            _ => "soft",
        })
        .collect()
}

#[test]
fn a_guest_powers_off_with_0() {
    for accel in accels("a_guest_powers_off_with_0") {
        let case = Case::new();
        let ended = case.boot(&["--kernel", "kernel", "--accel", accel, "--metrics", "m.json", "--memory", "16M"]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "hello\n"), "{accel}: {}", ended.stderr);
        assert_eq!(ended.stderr, "");
        let metrics: serde_json::Value = serde_json::from_slice(&fs::read(case.path("m.json")).unwrap()).unwrap();
        assert_eq!(metrics["engine"], accel);
        assert_eq!(metrics["outcome"], "power-off");
        assert!(metrics["kernel_entry_ms"].as_f64().unwrap() > 0.0, "{metrics}");
        assert!(metrics["first_user_ms"].is_null(), "{metrics}");
        assert_eq!(metrics["instructions"].is_u64(), accel == "soft", "{metrics}");
        assert!(metrics["peak_outside_guest_bytes"].as_u64().unwrap() > 1 << 20, "{metrics}");
    }
}

#[test]
fn serial_output_goes_where_it_is_told() {
    for accel in accels("serial_output_goes_where_it_is_told") {
        let case = Case::new();
        let kernel = ["--kernel", "kernel", "--accel", accel];
        let ended = case.boot(&[&kernel[..], &["--serial", "file=out.txt"]].concat());
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
        assert_eq!(fs::read_to_string(case.path("out.txt")).unwrap(), "hello\n");
        let ended = case.boot(&[&kernel[..], &["--serial", "none"]].concat());
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""), "{}", ended.stderr);
    }
}

#[test]
fn each_way_a_guest_ends_has_its_code() {
    for accel in accels("each_way_a_guest_ends_has_its_code") {
        let case = Case::new();
        case.file("crash", &elf_kernel(&crash()));
        case.file("reset", &elf_kernel(&[reset(), halt()].concat()));
        case.file("panic", &elf_kernel(&[report_panic(), halt()].concat()));
        for (kernel, code, word) in
            [("crash", 120, "triple fault"), ("reset", 121, "reset"), ("panic", 122, "panicked")]
        {
            let ended = case.boot(&["--kernel", kernel, "--accel", accel, "--no-reboot"]);
            assert_refused(&ended, code, &[word]);
        }
    }
}

#[test]
fn a_signal_stops_the_guest() {
    for accel in accels("a_signal_stops_the_guest") {
        let case = Case::new();
        case.file("idle", &elf_kernel(&[print("up"), halt()].concat()));
        let out = case.path("out.txt");
        let args = ["boot", "--kernel", "idle", "--accel", accel, "--serial", "file=out.txt", "--metrics", "m.json"];
        let child = vireo(case.folder.path(), &args).stderr(Stdio::piped()).spawn().unwrap();
        let start = std::time::Instant::now();
        while fs::read_to_string(&out).unwrap_or_default() != "up" {
            assert!(start.elapsed().as_secs() < 30, "the guest did not start");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let ended = ended(child.wait_with_output().unwrap());
        assert_refused(&ended, 1, &["signal"]);
        let metrics: serde_json::Value = serde_json::from_slice(&fs::read(case.path("m.json")).unwrap()).unwrap();
        assert_eq!(metrics["outcome"], "stopped");
    }
}
