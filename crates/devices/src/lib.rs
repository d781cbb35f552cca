//! Device models: chipset, PCI and virtio.
#![allow(unsafe_code)]

pub mod virtio;
