use std::io;

use vireo_memory::GuestSlice;

/// What a guest or user asked of a disk and did not get.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("bytes {offset}+{len} lie outside the disk")]
    OutOfRange { offset: u64, len: u64 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("no space left on the host for the disk")]
    NoSpace,
    #[error("the disk image is corrupt: {0}")]
    Corrupt(String),
    #[error("host I/O error")]
    Io(#[from] io::Error),
}

/// A disk of any format. All calls are synchronous and may be made from several threads (one for each
/// virtqueue) at once; offsets and lengths are in bytes and, for guests, multiples of 512.
pub trait Disk: Send + Sync {
    fn size_bytes(&self) -> u64;
    fn read_only(&self) -> bool;
    /// Fills `buffers` in order from `offset` on.
    fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError>;
    /// Writes `buffers` in order from `offset` on.
    fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError>;
    /// All that was written before is on stable storage after this.
    fn flush(&self) -> Result<(), DiskError>;
    /// The range may read as anything (here: zeroes) afterwards; frees host space where the format can.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;
    /// The range reads as zeroes afterwards; `unmap` allows freeing its host space.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError>;
}
