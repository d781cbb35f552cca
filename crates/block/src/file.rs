//! A file or block device of the host: scattered I/O, holes, locks.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use vireo_memory::GuestSlice;

use crate::{DiskError, OpenError, buffers};

/// What the kernel takes in one call (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;
/// Zeroes are written in pieces of this size where the file system cannot make holes.
const ZERO_CHUNK: usize = 64 << 10;

impl DiskError {
    fn of(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace,
            _ => Self::Io(error),
        }
    }
}

#[cfg(test)]
fn copy(buffer: &GuestSlice<'_>) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.copy_to(&mut bytes);
    bytes
}

#[derive(Debug)]
pub struct HostFile {
    file: File,
    path: PathBuf,
    /// What was done to the file, for simulating crashes.
    #[cfg(test)]
    pub journal: std::sync::Mutex<Vec<Change>>,
}

/// A change of the file, in the order in which the kernel got them.
#[cfg(test)]
#[derive(Clone, Debug)]
pub enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Sync,
}

/// Identity of a file, for finding loops.
pub type FileId = (u64, u64);

impl HostFile {
    /// Opens and locks a disk image.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let open = fs::OpenOptions::new().read(true).write(!read_only).open(path);
        let file = open.map_err(|source| OpenError::Open { path: path.into(), read_only, source })?;
        let kind = file.metadata().map_err(|source| OpenError::Open { path: path.into(), read_only, source })?;
        if !kind.is_file() && !kind.file_type().is_block_device() {
            let why = "it is neither a regular file nor a block device";
            return Err(OpenError::NoDisk { path: path.into(), why: why.into() });
        }
        let this = Self::of(file, path);
        this.lock_patiently(!read_only)?;
        Ok(this)
    }

    /// A file without a name or lock, for temporary data.
    pub fn unnamed(file: File) -> Self {
        Self::of(file, Path::new(""))
    }

    fn of(file: File, path: &Path) -> Self {
        Self {
            file,
            path: path.into(),
            #[cfg(test)]
            journal: Default::default(),
        }
    }

    #[cfg(test)]
    fn note(&self, change: Change) {
        self.journal.lock().unwrap().push(change);
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn id(&self) -> io::Result<FileId> {
        let data = self.file.metadata()?;
        // A block device has many names: its number counts.
        Ok(if data.file_type().is_block_device() { (u64::MAX, data.rdev()) } else { (data.dev(), data.ino()) })
    }

    /// Bytes in the file, or on the device.
    pub fn len(&self) -> io::Result<u64> {
        let data = self.file.metadata()?;
        if data.is_file() { Ok(data.len()) } else { (&self.file).seek(SeekFrom::End(0)) }
    }

    /// Fills the buffers from `offset` on; fewer bytes than wanted only at the end of the file.
    fn read_some(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<u64, DiskError> {
        self.transfer(offset, buffers, |fd, iov, at| {
            // SAFETY: the buffers are writable memory that lives as long as the slices, which outlive this call.
            unsafe { libc::preadv(fd, iov.as_ptr(), iov.len() as libc::c_int, at) }
        })
    }

    /// Fills all buffers; a file that ends before is an error.
    pub fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        if self.read_some(offset, buffers)? < buffers::total(buffers) {
            return Err(DiskError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    /// Fills all buffers; what lies behind the end of the file is zeroes.
    pub fn read_or_zero(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        let done = self.read_some(offset, buffers)?;
        if done < buffers::total(buffers) {
            buffers::fill_zero(&buffers::window(buffers, done, u64::MAX));
        }
        Ok(())
    }

    pub fn read_bytes(&self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_exact_at(out, offset).map_err(DiskError::of)
    }

    pub fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        let done = self.transfer(offset, buffers, |fd, iov, at| {
            // SAFETY: the buffers are readable memory that lives as long as the slices, which outlive this call.
            unsafe { libc::pwritev(fd, iov.as_ptr(), iov.len() as libc::c_int, at) }
        })?;
        if done < buffers::total(buffers) {
            return Err(DiskError::Io(io::ErrorKind::WriteZero.into()));
        }
        #[cfg(test)]
        self.note(Change::Write(offset, buffers.iter().flat_map(copy).collect()));
        Ok(())
    }

    pub fn write_bytes(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.file.write_all_at(data, offset).map_err(DiskError::of)?;
        #[cfg(test)]
        self.note(Change::Write(offset, data.into()));
        Ok(())
    }

    /// Calls `call` until all is done or it says 0.
    fn transfer(
        &self,
        offset: u64,
        buffers: &[GuestSlice<'_>],
        call: impl Fn(libc::c_int, &[libc::iovec], libc::off_t) -> libc::ssize_t,
    ) -> Result<u64, DiskError> {
        let mut iov: Vec<libc::iovec> = buffers.iter().filter(|b| !b.is_empty()).map(GuestSlice::as_iovec).collect();
        let (mut first, mut done) = (0, 0u64);
        while first < iov.len() {
            let end = iov.len().min(first + MAX_IOVECS);
            let at = offset.checked_add(done).and_then(|at| libc::off_t::try_from(at).ok());
            let at = at.ok_or(DiskError::OutOfRange { offset, len: buffers::total(buffers) })?;
            let count = call(self.file.as_raw_fd(), &iov[first..end], at);
            if count < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(DiskError::of(error));
            }
            if count == 0 {
                break;
            }
            done += count as u64;
            let mut left = count as usize;
            while first < iov.len() && left >= iov[first].iov_len {
                left -= iov[first].iov_len;
                first += 1;
            }
            if left > 0 {
                // SAFETY: `left` is less than the length of this buffer.
                iov[first].iov_base = unsafe { iov[first].iov_base.cast::<u8>().add(left) }.cast();
                iov[first].iov_len -= left;
            }
        }
        Ok(done)
    }

    pub fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(DiskError::of)?;
        #[cfg(test)]
        self.note(Change::Sync);
        Ok(())
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        let (at, len) = (i64::try_from(offset).map_err(|_| wrong())?, i64::try_from(len).map_err(|_| wrong())?);
        loop {
            // SAFETY: no pointers.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode | libc::FALLOC_FL_KEEP_SIZE, at, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Makes a hole where the file system can; whether the range reads as zeroes now.
    pub fn punch(&self, offset: u64, len: u64) -> Result<bool, DiskError> {
        self.try_fallocate(libc::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    fn try_fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> Result<bool, DiskError> {
        if len == 0 {
            return Ok(true);
        }
        match self.fallocate(mode, offset, len) {
            Ok(()) => {
                #[cfg(test)]
                self.note(Change::Zero(offset, len));
                Ok(true)
            }
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL)) =>
            {
                Ok(false)
            }
            Err(e) => Err(DiskError::of(e)),
        }
    }

    /// Makes the range read as zeroes, by whatever way works; with `unmap` preferably a hole.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        let ways: &[libc::c_int] = if unmap {
            &[libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE]
        } else {
            &[libc::FALLOC_FL_ZERO_RANGE]
        };
        for way in ways {
            if self.try_fallocate(*way, offset, len)? {
                return Ok(());
            }
        }
        let zeroes = vec![0; ZERO_CHUNK.min(len as usize)];
        let mut at = 0;
        while at < len {
            let part = (len - at).min(zeroes.len() as u64);
            self.write_bytes(offset + at, &zeroes[..part as usize])?;
            at += part;
        }
        Ok(())
    }
}

/// Locks as QEMU takes them, so that neither a second Vireo nor QEMU's tools can write what we have open: a byte
/// for each thing that we do (from 100 on) and for each that we do not want others to do (from 200 on).
/// <https://www.qemu.org/docs/master/system/images.html#disk-image-file-locking>
mod lock {
    pub const DOES: i64 = 100;
    pub const FORBIDS: i64 = 200;
    pub const READ: i64 = 0;
    pub const WRITE: i64 = 1;
    pub const RESIZE: i64 = 3;
}

/// How long a lock is waited for. A process that was forked while someone had the image open shares the lock until
/// it executes its program; and two who come at once may each see the other.
const LOCK_PATIENCE: Duration = Duration::from_millis(250);

impl HostFile {
    fn lock_patiently(&self, write: bool) -> Result<(), OpenError> {
        let end = Instant::now() + LOCK_PATIENCE;
        loop {
            match self.lock(write) {
                Err(OpenError::Locked { .. }) if Instant::now() < end => self.unlock(),
                done => return done,
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn unlock(&self) {
        for byte in [lock::READ, lock::WRITE, lock::RESIZE] {
            let _ = self.fcntl(libc::F_OFD_SETLK, libc::F_UNLCK, lock::DOES + byte);
            let _ = self.fcntl(libc::F_OFD_SETLK, libc::F_UNLCK, lock::FORBIDS + byte);
        }
    }

    fn lock(&self, write: bool) -> Result<(), OpenError> {
        use lock::*;
        let does: &[i64] = if write { &[READ, WRITE, RESIZE] } else { &[READ] };
        let forbids = [WRITE, RESIZE];
        // First take, then look: of two who come at once at least one sees the other.
        for byte in does.iter().map(|n| DOES + n).chain(forbids.iter().map(|n| FORBIDS + n)) {
            match self.fcntl(libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
                Ok(_) => {}
                // No locks on this file system: nothing that could be done.
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
                    ) =>
                {
                    return Ok(());
                }
                Err(_) => return Err(self.locked(write)),
            }
        }
        for byte in does.iter().map(|n| FORBIDS + n).chain(forbids.iter().map(|n| DOES + n)) {
            if !matches!(self.fcntl(libc::F_OFD_GETLK, libc::F_WRLCK, byte), Ok(libc::F_UNLCK)) {
                return Err(self.locked(write));
            }
        }
        Ok(())
    }

    fn locked(&self, write: bool) -> OpenError {
        OpenError::Locked { path: self.path.clone(), write }
    }

    /// Locks one byte or asks for a lock in the way; returns the type that the kernel answers.
    fn fcntl(&self, command: libc::c_int, kind: libc::c_int, byte: i64) -> io::Result<libc::c_int> {
        // SAFETY: all zeroes is a valid flock; l_pid must be 0 for OFD locks.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        (lock.l_start, lock.l_len) = (byte, 1);
        // SAFETY: `lock` is a valid flock and the descriptor is open.
        if unsafe { libc::fcntl(self.file.as_raw_fd(), command, &mut lock) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(lock.l_type.into())
    }
}
