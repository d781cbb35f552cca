//! systemd brings whole systems up: on the serial console with `vireo boot`, and as the agent sees it.

use std::{fs, process::Command};

use crate::{
    images::{Image, PASSWORD, RELEASES, State},
    process,
    screen::Screen,
};

/// `vireo boot` of an image, as docs/images.md says; what the guest writes goes to a disk of its own.
fn boot(state: &State, cpus: &str) -> Command {
    let record: serde_json::Value = serde_json::from_slice(&fs::read(state.file("image.json")).unwrap()).unwrap();
    let disk = state.path().join("disk.raw");
    assert!(
        Command::new("cp").arg("--sparse=always").args([&state.file("root.raw"), &disk]).status().unwrap().success()
    );
    let mut command = process::vireo();
    command.args(["boot", "--cpus", cpus, "--memory", "1G", "--append", record["cmdline"].as_str().unwrap()]);
    command.arg("--kernel").arg(state.file("kernel")).arg("--initrd").arg(state.file("initrd"));
    command.arg("--disk").arg(format!("{},format=raw", disk.display()));
    command
}

fn boots_to_a_login(image: Image, cpus: &str, test: &str) {
    let Some(state) = State::with(image, test) else { return };
    let mut screen = Screen::on_pipes(&mut boot(&state, cpus));
    screen.expect("debian login: ");
    for trouble in ["Failed", "FAILED", "Call Trace", "BUG:", "emergency"] {
        assert!(!screen.shown.contains(trouble), "{}", screen.shown);
    }
}

/// The system is up, with nothing failed, and the kernel saw nothing strange.
fn comes_up_whole(image: Image, cpus: &str) {
    let Some(state) = State::with(image, "systems_come_up_whole_with_4_processors") else { return };
    let script = "nproc; systemctl is-system-running --wait; systemctl --failed --no-legend; \
                  dmesg | grep -E 'BUG:|WARNING:|Call Trace|Oops|soft lockup|stall|unimplemented' || true";
    assert_eq!(state.script(&["--cpus", cpus], script), format!("{cpus}\nrunning\n"));
}

#[test]
fn releases_boot_to_a_login() {
    for image in RELEASES {
        boots_to_a_login(image, "1", "releases_boot_to_a_login");
    }
}

#[test]
fn releases_boot_to_a_login_with_2_processors() {
    for image in RELEASES {
        boots_to_a_login(image, "2", "releases_boot_to_a_login_with_2_processors");
    }
}

#[test]
fn releases_boot_to_a_login_with_4_processors() {
    for image in RELEASES {
        boots_to_a_login(image, "4", "releases_boot_to_a_login_with_4_processors");
    }
}

/// With fewer processors: see the tests of the network.
#[test]
fn systems_come_up_whole_with_4_processors() {
    for image in RELEASES {
        comes_up_whole(image, "4");
    }
}

#[test]
fn root_logs_in_with_the_password_and_powers_off() {
    let Some(state) = State::with(Image::Fio, "root_logs_in_with_the_password_and_powers_off") else { return };
    let mut screen = Screen::on_pipes(&mut boot(&state, "2"));
    screen.expect("debian login: ");
    screen.keys("root\r");
    screen.expect("Password: ");
    screen.keys(&format!("{PASSWORD}\r"));
    screen.expect("root@debian:~# ");
    screen.keys("echo state=$(systemctl is-system-running --wait)\r");
    screen.expect("state=running");
    screen.keys("poweroff\r");
    assert_eq!(screen.child.wait(), Some(0), "{}", screen.shown);
}
