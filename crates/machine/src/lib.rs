//! Describes, resolves, builds and runs a virtual machine.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod layout;
pub mod smbios;
