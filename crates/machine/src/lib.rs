//! Describes, builds and runs a virtual machine.
//!
//! A [`config::MachineConfig`] says what the machine shall be; [`run`] chooses the engine, opens disks, resolves each
//! kind of device (`board`), loads the kernel (`boot`) and runs vCPUs until the guest powers off, resets, crashes or
//! someone stops it by its [`Control`].

pub mod acpi;
mod board;
pub mod boot;
pub mod config;
mod disks;
pub mod engine;
mod error;
mod events;
pub mod host;
pub mod layout;
mod machine;
mod metrics;
mod reset_vector;
pub mod smbios;
mod user_watch;
mod vcpus;

pub use board::Handles;
pub use error::MachineError;
pub use machine::{Control, Machine, Outcome, Report, run};
pub use metrics::MemoryUse;
pub use vireo_devices::virtio::{
    console::ConsoleSize,
    vsock::{VsockHost, VsockListener},
};
