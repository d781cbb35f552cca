//! Raw images: byte n of the file is byte n of the disk.

use vireo_memory::GuestSlice;

use crate::{
    Disk, DiskError, OpenError, SECTOR_BYTES,
    buffers::{in_range, total, writable},
    file::HostFile,
};

#[derive(Debug)]
pub struct Raw {
    file: HostFile,
    size: u64,
    read_only: bool,
}

impl Raw {
    pub fn new(file: HostFile, read_only: bool) -> Result<Self, OpenError> {
        let path = file.path().to_owned();
        let size = file.len().map_err(|source| OpenError::Open { path: path.clone(), read_only, source })?;
        if size == 0 {
            return Err(OpenError::NoDisk { path, why: "it is empty".into() });
        }
        if !size.is_multiple_of(SECTOR_BYTES) {
            let up = size.next_multiple_of(SECTOR_BYTES);
            let why = format!(
                "its {size} bytes are not a whole number of 512-byte sectors; \
                 if it is a raw disk, extend it with `truncate -s {up}`"
            );
            return Err(OpenError::NoDisk { path, why });
        }
        Ok(Self { file, size, read_only })
    }
}

impl Disk for Raw {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        in_range(self, offset, total(buffers))?;
        self.file.read(offset, buffers)
    }

    fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        writable(self, offset, total(buffers))?;
        self.file.write(offset, buffers)
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only { Ok(()) } else { self.file.sync() }
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        writable(self, offset, len)?;
        // Where holes cannot be made the data simply stay.
        self.file.punch(offset, len).map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        writable(self, offset, len)?;
        self.file.zero(offset, len, unmap)
    }
}
