//! Disk formats: raw and qcow2 files as one kind of [`Disk`], and ephemeral copy-on-write over any of them.
//!
//! [`open`] is the way in. An image's bytes are hostile: everything in them is checked before it is used, nothing
//! is allocated by an image's word without a bound, and what does not fit is an error, never a panic.
//!
//! **Formats and trust.** Give the format whenever you know it. Without one, an image that begins with qcow2's magic
//! is opened as qcow2 and anything else as raw. A guest writes the first sector of a raw disk as it likes: it can
//! make its disk look like a qcow2 image whose backing file is any file that the process may read. So a disk that
//! was once opened as raw must never be opened again without saying so. Likewise a qcow2 image from somebody else
//! may name any path as its backing file; look at [`describe`] before opening it where that matters.
#![allow(unsafe_code)]

mod buffers;
mod disk;
mod file;
mod open;
mod overlay;
mod qcow2;
mod ranges;
mod raw;

pub use disk::{Disk, DiskError};
pub use open::{Format, ImageInfo, OpenError, OpenOptions, describe, open};
pub use overlay::Overlay;
pub use qcow2::{CheckReport, check, create_qcow2};

/// Disks are counted in these.
pub const SECTOR_BYTES: u64 = 512;
