//! Pieces of scattered buffers.

use std::borrow::Cow;

use vireo_memory::GuestSlice;

use crate::{DiskError, disk::Disk};

/// Length of all buffers together.
pub fn total(buffers: &[GuestSlice<'_>]) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}

/// The part of `buffers` that starts `at` bytes in and is `len` long (or as long as there is).
pub fn window<'b, 'a>(buffers: &'b [GuestSlice<'a>], at: u64, len: u64) -> Cow<'b, [GuestSlice<'a>]> {
    if at == 0 && total(buffers) <= len {
        return Cow::Borrowed(buffers);
    }
    let (mut skip, mut left) = (at, len);
    let mut parts = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let size = buffer.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = (size - skip).min(left);
        if take == 0 {
            break;
        }
        parts.extend(buffer.sub(skip as usize, take as usize));
        (skip, left) = (0, left - take);
    }
    Cow::Owned(parts)
}

pub fn fill_zero(buffers: &[GuestSlice<'_>]) {
    buffers.iter().for_each(|b| b.fill(0));
}

/// Copies `data` into the buffers, as far as both go.
pub fn copy_in(buffers: &[GuestSlice<'_>], mut data: &[u8]) {
    for buffer in buffers {
        let done = buffer.copy_from(data);
        data = &data[done..];
    }
}

/// Checks that a request lies within a disk, and a write on one that takes it.
pub fn in_range(disk: &(impl Disk + ?Sized), offset: u64, len: u64) -> Result<(), DiskError> {
    match offset.checked_add(len) {
        Some(end) if end <= disk.size_bytes() => Ok(()),
        _ => Err(DiskError::OutOfRange { offset, len }),
    }
}

pub fn writable(disk: &(impl Disk + ?Sized), offset: u64, len: u64) -> Result<(), DiskError> {
    if disk.read_only() { Err(DiskError::ReadOnly) } else { in_range(disk, offset, len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy_out(buffers: &[GuestSlice<'_>], mut out: &mut [u8]) {
        for buffer in buffers {
            let done = buffer.copy_to(out);
            out = &mut out[done..];
        }
    }

    #[test]
    fn windows_of_scattered_buffers() {
        let (mut a, mut b, mut c) = (*b"abc", *b"", *b"defgh");
        let all = [GuestSlice::from_host(&mut a), GuestSlice::from_host(&mut b), GuestSlice::from_host(&mut c)];
        let read = |at, len| {
            let mut out = vec![0; 16];
            let parts = window(&all, at, len);
            copy_out(&parts, &mut out);
            out.truncate(total(&parts) as usize);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(read(0, 8), "abcdefgh");
        assert_eq!(read(0, 2), "ab");
        assert_eq!(read(2, 3), "cde");
        assert_eq!(read(3, 1), "d");
        assert_eq!(read(7, 9), "h");
        assert_eq!(read(8, 1), "");
        copy_in(&window(&all, 2, 2), b"XY!");
        assert_eq!(read(0, 8), "abXYefgh");
    }
}
