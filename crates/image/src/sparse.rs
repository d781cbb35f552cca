use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::fd::AsRawFd,
};

use crate::digest::{Sha256Sum, Summing};

/// Where zeros are found in pieces of this size they are given back to the host.
const PIECE: usize = 64 << 10;
static ZEROS: [u8; PIECE] = [0; PIECE];

/// Sums a disk image up and digs holes where it stores zeros: mke2fs writes its empty inode tables out.
///
/// Holes are not read, only counted into the sum.
pub fn sum_and_dig(file: &mut File) -> io::Result<(Sha256Sum, u64)> {
    let size = file.metadata()?.len();
    let mut summing = Summing::default();
    let mut at = 0;
    while at < size {
        let (data, end) = next_data(file, at, size)?;
        add_zeros(&mut summing, data - at);
        file.seek(SeekFrom::Start(data))?;
        at = data;
        while at < end {
            // Pieces are aligned, as only whole blocks can become holes.
            let piece = (PIECE as u64 - at % PIECE as u64).min(end - at) as usize;
            let mut buffer = [0; PIECE];
            file.read_exact(&mut buffer[..piece])?;
            if buffer == ZEROS {
                dig(file, at, piece as u64)?;
            }
            summing.add(&buffer[..piece]);
            at += piece as u64;
        }
    }
    Ok((summing.finish(), size))
}

fn add_zeros(summing: &mut Summing, mut count: u64) {
    while count > 0 {
        let piece = count.min(PIECE as u64);
        summing.add(&ZEROS[..piece as usize]);
        count -= piece;
    }
}

/// The next range that is no hole, from `at` on; empty at the end of the file.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<(u64, u64)> {
    let Some(data) = seek(file, at, libc::SEEK_DATA)? else { return Ok((size, size)) };
    let end = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(size);
    Ok((data.min(size), end.min(size)))
}

fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: the descriptor is open for as long as `file` lives; the call touches no memory.
    let result = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, whence) };
    if result >= 0 {
        return Ok(Some(result as u64));
    }
    let error = io::Error::last_os_error();
    // ENXIO: no data from here to the end.
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

fn dig(file: &File, at: u64, bytes: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: as above.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, at as libc::off_t, bytes as libc::off_t) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // A file system without holes keeps the zeros.
    if error.raw_os_error() == Some(libc::EOPNOTSUPP) { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn the_sum_is_that_of_the_content_and_zeros_take_no_space() {
        let mut file = tempfile::tempfile().unwrap();
        let mut content = vec![0; 3 << 20];
        content[5] = 1;
        content[(2 << 20) + 77] = 2;
        file.write_all(&content).unwrap();
        file.set_len((3 << 20) + 100).unwrap();
        content.resize((3 << 20) + 100, 0);
        let (sum, size) = sum_and_dig(&mut file).unwrap();
        assert_eq!((sum, size), (Sha256Sum::of(&content), content.len() as u64));
        assert_eq!(sum_and_dig(&mut file).unwrap().0, sum);
        let mut again = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut again).unwrap();
        assert_eq!(again, content);
        let supports_holes = file.metadata().unwrap().blocks() * 512 < 1 << 20;
        assert!(supports_holes || dig(&file, 0, 0).is_err(), "{} blocks", file.metadata().unwrap().blocks());
    }
}
