//! The disks of a run. They are opened once and stay open, and locked, when the guest reboots.

use std::{io, path::PathBuf, sync::Arc};

use vireo_block::{Disk, DiskError, Format, OpenOptions, SECTOR_BYTES};
use vireo_memory::GuestSlice;

use self::watched::Watched;
use crate::{config::DiskConfig, error::MachineError};

mod watched;

const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";

/// An opened disk and where it came from.
#[derive(Clone)]
pub struct OpenDisk {
    pub path: PathBuf,
    pub serial: Option<String>,
    pub disk: Arc<Watched>,
}

pub fn open(configs: &[DiskConfig]) -> Result<Vec<OpenDisk>, MachineError> {
    configs.iter().map(open_one).collect()
}

fn open_one(config: &DiskConfig) -> Result<OpenDisk, MachineError> {
    let read_only = config.read_only || config.ephemeral.is_some();
    let guessed = match config.format {
        Some(_) => None,
        None => Some(vireo_block::describe(&config.path, None)?.format),
    };
    let options = OpenOptions { format: config.format.or(guessed), read_only };
    let mut disk = vireo_block::open(&config.path, options)?;
    if guessed == Some(Format::Raw) && !read_only {
        disk = Arc::new(GuessedRaw(disk));
    }
    if let Some(folder) = config.ephemeral.as_ref().filter(|_| !config.read_only) {
        let overlay = vireo_block::Overlay::new(disk, folder);
        disk = Arc::new(overlay.map_err(|source| MachineError::Temporary { folder: folder.clone(), source })?);
    }
    let disk = Arc::new(Watched::new(disk, config.ephemeral.as_deref().unwrap_or(&config.path)));
    Ok(OpenDisk { path: config.path.clone(), serial: config.serial.clone(), disk })
}

/// A sentence for each disk that failed the guest.
pub fn failures(disks: &[OpenDisk]) -> Vec<String> {
    disks.iter().filter_map(|open| open.disk.failure().map(str::to_owned)).collect()
}

/// All data of all disks is on stable storage after this.
pub fn flush(disks: &[OpenDisk]) -> Result<(), MachineError> {
    for open in disks.iter().filter(|open| !open.disk.read_only()) {
        open.disk.flush().map_err(|source| MachineError::Flush { path: open.path.clone(), source })?;
    }
    Ok(())
}

/// A raw disk whose format nobody named. Its guest must not make it look like a qcow2 image, which the next run
/// would take it for, together with whatever backing file it names: such a write fails.
struct GuessedRaw(Arc<dyn Disk>);

impl GuessedRaw {
    /// Writes the first sector from a copy, so that the guest cannot change it behind the check.
    fn write_first_sector(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<u64, DiskError> {
        let mut sector = [0; SECTOR_BYTES as usize];
        let from = offset as usize;
        self.0.read(0, &[GuestSlice::from_host(&mut sector)])?;
        let mut at = from;
        for buffer in buffers {
            at += buffer.copy_to(&mut sector[at..]);
        }
        if sector.starts_with(QCOW2_MAGIC) {
            let why = "the guest tried to write a qcow2 header to a raw disk; allow it with format=raw";
            return Err(DiskError::Io(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        self.0.write(offset, &[GuestSlice::from_host(&mut sector[from..at])])?;
        Ok((at - from) as u64)
    }
}

/// `buffers` without their first `skip` bytes.
fn behind<'a>(buffers: &[GuestSlice<'a>], mut skip: u64) -> Vec<GuestSlice<'a>> {
    let mut rest = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let cut = skip.min(buffer.len() as u64);
        skip -= cut;
        rest.extend(buffer.sub(cut as usize, buffer.len() - cut as usize).filter(|b| !b.is_empty()));
    }
    rest
}

impl Disk for GuessedRaw {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        self.0.read(offset, buffers)
    }
    fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        if offset >= QCOW2_MAGIC.len() as u64 || self.0.size_bytes() < SECTOR_BYTES {
            return self.0.write(offset, buffers);
        }
        let done = self.write_first_sector(offset, buffers)?;
        let rest = behind(buffers, done);
        if rest.is_empty() { Ok(()) } else { self.0.write(offset + done, &rest) }
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.0.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.0.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.0.write_zeroes(offset, len, unmap)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn write(disk: &dyn Disk, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let mut first = data[..data.len() / 2].to_vec();
        let mut second = data[data.len() / 2..].to_vec();
        disk.write(offset, &[GuestSlice::from_host(&mut first), GuestSlice::from_host(&mut second)])
    }

    fn raw(path: &Path) -> Vec<u8> {
        fs::write(path, vec![0x11; 8192]).unwrap();
        fs::read(path).unwrap()
    }

    #[test]
    fn a_guest_cannot_turn_a_guessed_raw_disk_into_qcow2() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let before = raw(&path);
        let mut header = b"QFI\xfb".to_vec();
        header.resize(4096, 0);

        let guessed = open(&[DiskConfig::new(&path)]).unwrap();
        assert!(write(&*guessed[0].disk, 0, &header).is_err());
        assert!(fs::read(&path).unwrap() == before);
        let good: Vec<u8> = (0..4096).map(|i| (i * 7) as u8).collect();
        write(&*guessed[0].disk, 0, &good).unwrap();
        write(&*guessed[0].disk, 4096, &header).unwrap();
        assert!(fs::read(&path).unwrap() == [good, header.clone()].concat());
        drop(guessed);

        let named = open(&[DiskConfig { format: Some(Format::Raw), ..DiskConfig::new(&path) }]).unwrap();
        write(&*named[0].disk, 0, &header).unwrap();
    }

    #[test]
    fn an_ephemeral_disk_leaves_its_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let before = raw(&path);
        let disks = open(&[DiskConfig { ephemeral: Some(folder.path().into()), ..DiskConfig::new(&path) }]).unwrap();
        assert!(!disks[0].disk.read_only());
        write(&*disks[0].disk, 0, &[0x22; 4096]).unwrap();
        let mut back = vec![0; 4096];
        disks[0].disk.read(0, &[GuestSlice::from_host(&mut back)]).unwrap();
        assert!(back == [0x22; 4096]);
        assert!(fs::read(&path).unwrap() == before);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = open(&[DiskConfig::new("/nonexistent.img")]).err().unwrap();
        assert!(error.to_string().contains("/nonexistent.img"));
    }
}
