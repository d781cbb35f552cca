//! How machines end: by themselves, by a crash, by a signal; and side by side.

use std::{
    fs,
    io::Read,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use crate::{
    images::{Image, State},
    process::Guard,
};

#[test]
fn a_kernel_ends_as_it_is_told() {
    let Some(state) = State::with(Image::Bookworm, "a_kernel_ends_as_it_is_told") else { return };
    let proc = "mount -t proc proc /proc; ";
    let with_proc = |script: &str| format!("{proc}{script}");
    let ended = state.boot_script(&[], &with_proc("echo up; echo o >/proc/sysrq-trigger; sleep 60"));
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{}", ended.text());
    assert!(ended.text().contains("up"), "{}", ended.text());
    let ended = state.boot_script(&["--no-reboot"], &with_proc("echo b >/proc/sysrq-trigger; sleep 60"));
    ended.assert_says(121, &["reset"]);
    let ended = state.boot_script(&[], &with_proc("echo c >/proc/sysrq-trigger; sleep 60"));
    ended.assert_says(122, &["kernel panicked"]);
    assert!(ended.text().contains("sysrq triggered crash"), "{}", ended.text());
}

/// `reboot=triple`: the kernel resets by a triple fault.
#[test]
fn a_triple_fault_is_a_crash() {
    let Some(state) = State::with(Image::Trixie, "a_triple_fault_is_a_crash") else { return };
    let disk = format!("{},format=raw,ro", state.file("root.raw").display());
    let line = "root=/dev/vda ro console=ttyS0 quiet reboot=triple,force init=/bin/sh -- \
                -c \"mount -t proc proc /proc; echo b >/proc/sysrq-trigger; sleep 60\"";
    let mut command = crate::process::vireo();
    command.args(["boot", "--disk", &disk, "--append", line]);
    command.arg("--kernel").arg(state.file("kernel")).arg("--initrd").arg(state.file("initrd"));
    let ended = crate::process::run(&mut command, b"");
    ended.assert_says(120, &["triple fault", "vCPU 0"]);
}

/// The second boot of the same machine finds what the first one left on its disk.
#[test]
fn a_reboot_starts_the_guest_again() {
    let Some(state) = State::with(Image::Bookworm, "a_reboot_starts_the_guest_again") else { return };
    let disk = state.path().join("note.raw");
    crate::images::empty_file(&disk, 1 << 20);
    let disk = format!("{},format=raw", disk.display());
    let metrics = state.path().join("metrics.json");
    let script = "mount -t proc proc /proc; mount -t devtmpfs dev /dev; read -r n </dev/vdb; \
                  case $n in again) echo second; echo o >/proc/sysrq-trigger ;; \
                  *) echo first; echo again | dd of=/dev/vdb conv=fsync; echo b >/proc/sysrq-trigger ;; esac; sleep 60";
    let ended = state.boot_script(&["--disk", &disk, "--metrics", metrics.to_str().unwrap()], script);
    let text = ended.text();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{text}");
    assert!(text.find("first").unwrap() < text.find("second").unwrap(), "{text}");
    let metrics: serde_json::Value = serde_json::from_slice(&fs::read(metrics).unwrap()).unwrap();
    assert_eq!((&metrics["boots"], &metrics["exit_code"]), (&2.into(), &0.into()), "{metrics}");
    assert!(metrics["first_user_ms"].as_f64() > metrics["kernel_entry_ms"].as_f64(), "{metrics}");
}

#[test]
fn a_guest_that_ends_before_its_command_says_how() {
    let Some(state) = State::with(Image::Bookworm, "a_guest_that_ends_before_its_command_says_how") else { return };
    let command = ["sh", "-c", "systemctl is-system-running --wait; systemctl poweroff; sleep 1000"];
    state.run(&[], &command, b"").assert_says(1, &["powered off"]);
    state.run(&[], &["sh", "-c", "reboot -ff; sleep 1000"], b"").assert_says(121, &["reset"]);
    let ended = state.run(&[], &["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"], b"");
    ended.assert_says(122, &["kernel panicked", "sysrq triggered crash"]);
    let ended = state.run(&[], &["sh", "-c", "kill -9 $(pidof agent); sleep 1000"], b"");
    ended.assert_says(123, &["connection to the guest agent is lost"]);
}

/// A signal before the guest is up, and one that the command gets.
#[test]
fn signals_end_machines_and_leave_nothing() {
    let Some(state) = State::with(Image::Bookworm, "signals_end_machines_and_leave_nothing") else { return };
    for (signal, early, code) in [("-TERM", true, Some(1)), ("-INT", false, Some(130)), ("-KILL", false, None)] {
        let mut command = state.run_command(&[], &["sh", "-c", "echo up; exec sleep 1000"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut child = Guard(child);
        if early {
            // The disk's temporary file is there by now.
            thread::sleep(Duration::from_secs(1));
        } else {
            child.0.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        }
        let start = Instant::now();
        child.signal(signal);
        assert_eq!(child.wait(), code, "{signal}");
        assert!(start.elapsed() < Duration::from_secs(30), "{signal}: {:?}", start.elapsed());
        state.assert_nothing_left();
    }
}

/// A command that ignores signals: the third one ends the machine.
#[test]
fn a_third_signal_always_ends_it() {
    let Some(state) = State::with(Image::Bookworm, "a_third_signal_always_ends_it") else { return };
    let script = "trap 'echo no' TERM; echo up; while :; do sleep 0.1; done";
    let mut command = state.run_command(&[], &["sh", "-c", script]);
    let mut child = Guard(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut stdout = child.0.stdout.take().unwrap();
    for _ in 0..3 {
        stdout.read_exact(&mut [0; 3]).unwrap();
        child.signal("-TERM");
    }
    assert_eq!(child.wait(), Some(1));
    state.assert_nothing_left();
}

/// Two machines from one image, and the image goes while they run.
#[test]
fn machines_side_by_side_survive_their_image() {
    let Some(state) = State::with(Image::Bookworm, "machines_side_by_side_survive_their_image") else { return };
    // With an empty page cache all of it is read and checked anew.
    let script = "echo up; read -r word; echo $word; cat /tmp/word 2>/dev/null; echo $word >/tmp/word; \
                  cp -a /usr/sbin /tmp/copy; (cd /usr/sbin && sha256sum * >/tmp/sums); sync; \
                  echo 3 >/proc/sys/vm/drop_caches; cd /tmp/copy && sha256sum --quiet -c /tmp/sums && cat /tmp/word";
    let mut children = [(); 2].map(|()| {
        let mut command = state.run_command(&["--memory", "512M"], &["sh", "-c", script]);
        Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    });
    for child in &mut children {
        let mut up = [0; 3];
        child.0.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
        assert_eq!(&up, b"up\n");
    }
    let mut remove = crate::process::vireo();
    remove.arg("--state").arg(state.path()).args(["image", "rm", state.image.name()]);
    let removed = crate::process::run(&mut remove, b"");
    assert_eq!((removed.code, removed.text()), (Some(0), format!("{}\n", state.image.name())), "{}", removed.stderr);
    assert!(!state.file("kernel").exists());
    for (child, word) in children.iter_mut().zip(["one", "two"]) {
        use std::io::Write;
        writeln!(child.0.stdin.take().unwrap(), "{word}").unwrap();
    }
    for (mut child, word) in children.into_iter().zip(["one", "two"]) {
        let mut said = String::new();
        child.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!((said, child.wait()), (format!("{word}\n{word}\n"), Some(0)));
    }
    state.assert_nothing_left();
}
