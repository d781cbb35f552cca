//! A disk that remembers what the host could not do for it. The guest only sees an I/O error; whoever runs the
//! machine is told why.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use vireo_block::{Disk, DiskError};
use vireo_memory::GuestSlice;

pub struct Watched {
    disk: Arc<dyn Disk>,
    /// Where the data goes: the disk's own file, or the folder of what it holds for the time of the run.
    place: PathBuf,
    first: OnceLock<String>,
}

impl Watched {
    pub fn new(disk: Arc<dyn Disk>, place: &Path) -> Self {
        Self { disk, place: place.to_owned(), first: OnceLock::new() }
    }

    /// The first failure that was the host's or the image's fault.
    pub fn failure(&self) -> Option<&str> {
        self.first.get().map(String::as_str)
    }

    fn note(&self, result: Result<(), DiskError>) -> Result<(), DiskError> {
        if let Err(error) = &result {
            let why = match error {
                DiskError::OutOfRange { .. } | DiskError::ReadOnly => return result,
                DiskError::NoSpace => "no space is left on the host; free some".to_owned(),
                DiskError::Io(source) => source.to_string(),
                DiskError::Corrupt(_) => error.to_string(),
            };
            self.first.get_or_init(|| {
                format!("the guest got I/O errors from its disk, whose data is in {}: {why}", self.place.display())
            });
        }
        result
    }
}

impl Disk for Watched {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
    fn read_only(&self) -> bool {
        self.disk.read_only()
    }
    fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        self.note(self.disk.read(offset, buffers))
    }
    fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        self.note(self.disk.write(offset, buffers))
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.note(self.disk.flush())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.note(self.disk.discard(offset, len))
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.note(self.disk.write_zeroes(offset, len, unmap))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Full;

    impl Disk for Full {
        fn size_bytes(&self) -> u64 {
            4096
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read(&self, offset: u64, _: &[GuestSlice<'_>]) -> Result<(), DiskError> {
            Err(DiskError::OutOfRange { offset, len: 0 })
        }
        fn write(&self, _: u64, _: &[GuestSlice<'_>]) -> Result<(), DiskError> {
            Err(DiskError::NoSpace)
        }
        fn flush(&self) -> Result<(), DiskError> {
            Err(DiskError::Corrupt("later".into()))
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), DiskError> {
            Ok(())
        }
    }

    #[test]
    fn the_first_failure_of_the_host_is_remembered() {
        let disk = Watched::new(Arc::new(Full), Path::new("/data/disk.raw"));
        assert!(disk.read(9999, &[]).is_err(), "the guest's own mistake");
        assert!(disk.discard(0, 512).is_ok());
        assert_eq!(disk.failure(), None);
        assert!(disk.write(0, &[]).is_err());
        assert!(disk.flush().is_err());
        let said = disk.failure().unwrap();
        assert!(said.contains("/data/disk.raw") && said.contains("no space"), "{said}");
    }
}
