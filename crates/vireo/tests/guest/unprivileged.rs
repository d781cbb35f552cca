//! Machines run for users without any rights.

use std::{fs, os::unix::process::CommandExt, path::Path, process::Command};

use crate::{
    images::{Image, State},
    process,
};

const NOBODY: u32 = 65534;

/// Whether another user gets to this path.
fn is_reachable(path: &Path) -> bool {
    Command::new("test").arg("-x").arg(path).uid(NOBODY).gid(NOBODY).status().is_ok_and(|status| status.success())
}

#[test]
fn machines_run_without_rights_and_without_a_home() {
    let test = "machines_run_without_rights_and_without_a_home";
    let Some(state) = State::with(Image::Bookworm, test) else { return };
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: {test}: these tests run as an ordinary user, so that all others show it");
        return;
    }
    // The state folder is the user's; the image in it may be someone else's.
    std::os::unix::fs::chown(state.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    std::os::unix::fs::chown(state.path().join("images"), Some(NOBODY), Some(NOBODY)).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_vireo"));
    if !is_reachable(program) || !is_reachable(state.path()) {
        println!("SKIPPED: {test}: the folders of this checkout are closed to other users");
        return;
    }
    let mut command =
        state.run_command(&["--cpus", "2"], &["sh", "-c", "id -u; ping -c 1 -W 5 10.0.2.2 >/dev/null; echo $?"]);
    command.uid(NOBODY).gid(NOBODY).env_clear();
    let ended = process::run(&mut command, b"");
    assert_eq!((ended.code, ended.text().as_str(), ended.stderr.as_str()), (Some(0), "0\n0\n", ""));
    state.assert_nothing_left();
    let owner = |path: &Path| std::os::unix::fs::MetadataExt::uid(&fs::metadata(path).unwrap());
    assert_eq!(owner(&state.path().join("tmp")), NOBODY);

    // A home in which nothing can be made.
    let mut command = process::vireo();
    command.args(["image", "ls"]).uid(NOBODY).gid(NOBODY).env_clear().env("HOME", "/nonexistent");
    process::run(&mut command, b"").assert_says(1, &["/nonexistent/.local/share/vireo"]);
}
