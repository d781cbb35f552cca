//! Disk formats: raw and qcow2 files as one kind of [`Disk`].
#![allow(unsafe_code)]

mod disk;

pub use disk::{Disk, DiskError};
