//! Builds the in-guest agent as a static program, which the `vireo` binary carries in itself.
//!
//! It is another build of the same workspace: other flags, another profile and, so as not to wait for the lock of
//! the outer one, another target folder.

use std::{env, fs, path::PathBuf, process::Command};

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let workspace = manifest.ancestors().nth(2).expect("the crate lies in crates/vireo").to_owned();
    for path in ["guest/agent", "crates/guest-protocol", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", workspace.join(path).display());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let target = env::var("TARGET").expect("cargo sets it");
    let folder = out.join("agent");
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(&workspace)
        .args(["build", "--quiet", "--locked", "--package", "vireo-agent", "--profile", "agent"])
        .args(["--target", &target])
        .arg("--target-dir")
        .arg(&folder)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static")
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .expect("cargo can be run");
    assert!(status.success(), "building the in-guest agent failed");
    let built = folder.join(&target).join("agent").join("vireo-agent");
    fs::copy(&built, out.join("vireo-agent")).expect("the agent was built");
}
