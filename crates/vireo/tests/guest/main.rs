//! The `vireo` command with whole Debian guests, as a user meets it.
//!
//! The images are built once and kept in `VIREO_TEST_STATE` (`target/test-state` unless it is set). A host on which
//! they cannot be built says so: each test prints `SKIPPED` with its name and the reason.

mod commands;
mod disks;
mod ends;
mod images;
mod login;
mod network;
mod process;
mod refusals;
mod screen;
mod shell;
mod unprivileged;
