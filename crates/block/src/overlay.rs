//! Ephemeral copy-on-write: writes go to a file without a name and are gone in the end.

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use vireo_memory::GuestSlice;

use crate::{
    Disk, DiskError,
    buffers::{in_range, total, window},
    file::HostFile,
    ranges::RangeLocks,
};

/// The unit in which the overlay knows what was written, unless the disk is very large.
const BLOCK_BITS: u32 = 12;
/// Memory for that knowledge, at most.
const MAX_BITMAP_BYTES: u64 = 4 << 20;

/// A disk that shows `base` and keeps what is written to itself, as long as it lives.
pub struct Overlay {
    base: Arc<dyn Disk>,
    /// Byte n of the disk is byte n here, where its block was written.
    file: HostFile,
    block_bits: u32,
    written: Box<[AtomicU64]>,
    ranges: RangeLocks,
}

impl Overlay {
    /// `dir` holds the (unlinked) file and must have room for what is written.
    pub fn new(base: Arc<dyn Disk>, dir: &Path) -> io::Result<Self> {
        let size = base.size_bytes();
        let file = unnamed(dir)?;
        file.set_len(size)?;
        let mut block_bits = BLOCK_BITS;
        while size >> block_bits > MAX_BITMAP_BYTES * 8 {
            block_bits += 1;
        }
        let words = (size >> block_bits) / 64 + 1;
        let written = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { base, file: HostFile::unnamed(file), block_bits, written, ranges: RangeLocks::default() })
    }

    fn block(&self) -> u64 {
        1 << self.block_bits
    }

    fn is_written(&self, block: u64) -> bool {
        self.written.get((block / 64) as usize).is_some_and(|w| w.load(Ordering::Acquire) & 1 << (block % 64) != 0)
    }

    fn mark(&self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            if let Some(word) = self.written.get((block / 64) as usize) {
                word.fetch_or(1 << (block % 64), Ordering::Release);
            }
        }
    }

    /// Bytes from `offset` on, at most `len`, that are all in the overlay or all in the base; and which.
    fn run(&self, offset: u64, len: u64) -> (bool, u64) {
        let first = offset >> self.block_bits;
        let end = (offset + len).div_ceil(self.block());
        let written = self.is_written(first);
        let run = (first + 1..end).find(|b| self.is_written(*b) != written).unwrap_or(end);
        (written, ((run << self.block_bits) - offset).min(len))
    }

    fn read_run(&self, written: bool, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        if written { self.file.read(offset, buffers) } else { self.base.read(offset, buffers) }
    }

    /// The blocks that a range touches, and the two at its ends if they are touched in part and not here yet.
    fn edges(&self, offset: u64, len: u64) -> (std::ops::Range<u64>, [Option<u64>; 2]) {
        let end = offset + len;
        let blocks = offset >> self.block_bits..end.div_ceil(self.block());
        let part = |block: u64| {
            let whole = block << self.block_bits;
            let block_end = (whole + self.block()).min(self.size_bytes());
            (whole < offset || block_end > end) && !self.is_written(block)
        };
        let last = blocks.end - 1;
        let edges = [Some(blocks.start).filter(|b| part(*b)), Some(last).filter(|b| *b != blocks.start && part(*b))];
        (blocks, edges)
    }

    /// Brings a block here that will be changed in part. The caller has its range locked.
    fn copy_up(&self, block: u64) -> Result<(), DiskError> {
        let at = block << self.block_bits;
        let mut data = vec![0; self.block().min(self.size_bytes() - at) as usize];
        self.base.read(at, &[GuestSlice::from_host(&mut data)])?;
        self.file.write_bytes(at, &data)?;
        self.mark(block..block + 1);
        Ok(())
    }

    /// Does `change` to a range, with all of its blocks here afterwards.
    fn change(&self, offset: u64, len: u64, change: impl FnOnce() -> Result<(), DiskError>) -> Result<(), DiskError> {
        if len == 0 {
            return Ok(());
        }
        if self.run(offset, len) == (true, len) {
            return change();
        }
        let (blocks, _) = self.edges(offset, len);
        let _range = self.ranges.lock(blocks.start, blocks.end);
        // Looked at again: someone may have been there before.
        let (blocks, edges) = self.edges(offset, len);
        for edge in edges.into_iter().flatten() {
            self.copy_up(edge)?;
        }
        change()?;
        self.mark(blocks);
        Ok(())
    }
}

/// A file in `dir` that nobody else can see and that vanishes by itself.
fn unnamed(dir: &Path) -> io::Result<File> {
    let open = std::fs::OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(dir);
    match open {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => named(dir),
        other => other,
    }
}

/// For file systems without `O_TMPFILE`: a file that is unlinked at once.
fn named(dir: &Path) -> io::Result<File> {
    let mut number = std::process::id();
    loop {
        let path = dir.join(format!(".vireo-overlay-{number}"));
        match std::fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number = number.wrapping_add(1),
            Err(e) => return Err(e),
        }
    }
}

impl Disk for Overlay {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        let len = total(buffers);
        in_range(self, offset, len)?;
        let mut done = 0;
        while done < len {
            let (written, part) = self.run(offset + done, len - done);
            self.read_run(written, offset + done, &window(buffers, done, part))?;
            done += part;
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        in_range(self, offset, total(buffers))?;
        self.change(offset, total(buffers), || self.file.write(offset, buffers))
    }

    /// Nothing outlives this process: there is nothing to be safe from.
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), DiskError> {
        in_range(self, offset, len)?;
        self.change(offset, len, || self.file.zero(offset, len, true))
    }
}
