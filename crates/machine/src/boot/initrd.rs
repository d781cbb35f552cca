//! Puts an initrd into guest memory, decompressed where that is safe (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! An initramfs is a row of cpio archives, each plain or compressed, with zeroes between them. The host
//! decompresses faster than a software CPU and as fast as any other, and finds out early that a file is broken.
//! What is not a row of cpio archives (an ext2 ramdisk, a format that only the kernel knows) goes in as it is.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read, Seek, SeekFrom},
};

use vireo_memory::GuestMemory;

use super::{
    compression::{Compression, MAGIC_BYTES},
    fault::Fault,
};

const COPY_BYTES: usize = 64 << 10;
/// How much of a stream with unknown content is decoded to see whether it is whole.
const VERIFY_MAX_BYTES: u64 = 1 << 30;
/// What Linux recognizes that we do not decode: other compressions (`lib/decompress.c`), and file systems of ramdisks
/// (`init/do_mounts_rd.c`, `identify_ramdisk_image`). Offset and magic.
const LINUX_MAGICS: [(usize, &[u8]); 13] = [
    (0, b"BZh"),
    (0, b"\x89LZ"),
    (0, b"\x1f\x9e"),
    (0, b"hsqs"),
    (0, b"-rom1fs-"),
    (0, b"\x45\x3d\xcd\x28"), // cramfs
    (512, b"-rom1fs-"),
    (512, b"\x45\x3d\xcd\x28"),
    (1024 + 56, b"\x53\xef"), // ext2
    (1024 + 16, b"\x7f\x13"), // minix, four kinds
    (1024 + 16, b"\x8f\x13"),
    (1024 + 16, b"\x68\x24"),
    (1024 + 16, b"\x78\x24"),
];
const CPIO_HEADER_BYTES: usize = 110;
const CPIO_NAME_MAX: u64 = 4096;
const CPIO_TRAILER: &[u8] = b"TRAILER!!!\0";
/// The kernel holds an initrd and the files from it at the same time, so a decompressed one may only
/// take this part of all memory.
const DECOMPRESSED_SHARE: u64 = 4;

/// Guest memory that an initrd may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub start: u64,
    pub end: u64,
}

impl Room {
    pub fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

#[derive(Debug)]
pub(super) enum InitrdFault {
    /// The file, as it is, is larger than the room.
    TooLarge,
    Fault(Fault),
}

impl<T: Into<Fault>> From<T> for InitrdFault {
    fn from(fault: T) -> Self {
        Self::Fault(fault.into())
    }
}

/// Where the initrd lies, and how many bytes the host decompressed it from, if it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoadedInitrd {
    pub start: u64,
    pub bytes: u64,
    pub decompressed: bool,
}

/// Whether Linux could make anything of an initrd that begins so; if not, it would panic for want of an init.
pub(super) fn suits_linux(head: &[u8]) -> bool {
    let has = |(offset, magic): &(usize, &[u8])| head.get(*offset..).is_some_and(|rest| rest.starts_with(magic));
    // Archives may have zeroes before them.
    head.starts_with(b"\0")
        || head.starts_with(b"070701")
        || head.starts_with(b"070702")
        || Compression::detect(head).is_some()
        || LINUX_MAGICS.iter().any(has)
}

pub(super) fn load(memory: &GuestMemory, file: &mut File, room: Room) -> Result<LoadedInitrd, InitrdFault> {
    let limit = room.bytes().min(memory.bytes() / DECOMPRESSED_SHARE);
    let mut sink = Sink { memory, start: room.start, bytes: 0, limit };
    let mut input = Input { reader: BufReader::with_capacity(COPY_BYTES, &mut *file), offset: 0 };
    match copy_initramfs(&mut input, &mut sink) {
        Ok(decompressed) => Ok(LoadedInitrd { start: room.start, bytes: sink.bytes, decompressed }),
        Err(Stop::Fault(fault)) => Err(fault.into()),
        Err(Stop::Unknown | Stop::Full) => copy_raw(memory, file, room),
    }
}

fn copy_raw(memory: &GuestMemory, file: &mut File, room: Room) -> Result<LoadedInitrd, InitrdFault> {
    file.seek(SeekFrom::Start(0)).map_err(Fault::Read)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut bytes = 0;
    loop {
        let len = file.read(&mut buffer).map_err(Fault::Read)?;
        if len == 0 && bytes == 0 {
            return Err(Fault::Truncated("it is empty".into()).into());
        }
        if len == 0 {
            return Ok(LoadedInitrd { start: room.start, bytes, decompressed: false });
        }
        if bytes + len as u64 > room.bytes() {
            return Err(InitrdFault::TooLarge);
        }
        memory.write(room.start + bytes, &buffer[..len]).map_err(Fault::from)?;
        bytes += len as u64;
    }
}

/// Why copying archives came to an end.
enum Stop {
    /// Nothing that we know: leave the file as it is.
    Unknown,
    /// The result would not fit.
    Full,
    Fault(Fault),
}

impl<T: Into<Fault>> From<T> for Stop {
    fn from(fault: T) -> Self {
        Self::Fault(fault.into())
    }
}

/// Guest memory, filled from `start` on.
struct Sink<'a> {
    memory: &'a GuestMemory,
    start: u64,
    bytes: u64,
    limit: u64,
}

impl Sink<'_> {
    fn put(&mut self, data: &[u8]) -> Result<(), Stop> {
        // Without any room, `start` is no address in RAM.
        if data.is_empty() {
            return Ok(());
        }
        if self.bytes + data.len() as u64 > self.limit {
            return Err(Stop::Full);
        }
        self.memory.write(self.start + self.bytes, data).map_err(Fault::from)?;
        self.bytes += data.len() as u64;
        Ok(())
    }

    fn align(&mut self) -> Result<(), Stop> {
        let pad = self.bytes.next_multiple_of(4) - self.bytes;
        self.put(&[0; 4][..pad as usize])
    }
}

/// A reader that knows how far it is.
struct Input<R> {
    reader: R,
    offset: u64,
}

impl<R: BufRead> Read for Input<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = self.reader.read(out)?;
        self.offset += len as u64;
        Ok(len)
    }
}

impl<R: BufRead> BufRead for Input<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }
    fn consume(&mut self, amount: usize) {
        self.offset += amount as u64;
        self.reader.consume(amount);
    }
}

impl<R: BufRead> Input<R> {
    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.fill_buf()?.first().copied())
    }

    /// Moves `bytes` to the sink; too few are an error that names what was being read.
    fn copy(&mut self, sink: &mut Sink<'_>, mut bytes: u64, what: impl Fn() -> String) -> Result<(), Stop> {
        while bytes > 0 {
            let buffer = self.fill_buf()?;
            if buffer.is_empty() {
                return Err(Stop::Fault(Fault::Truncated(format!("it ends inside {}", what()))));
            }
            let len = buffer.len().min(bytes.min(usize::MAX as u64) as usize);
            sink.put(&buffer[..len])?;
            self.consume(len);
            bytes -= len as u64;
        }
        Ok(())
    }
}

/// Copies the whole row; says whether anything was compressed.
fn copy_initramfs(input: &mut Input<impl BufRead>, sink: &mut Sink<'_>) -> Result<bool, Stop> {
    let mut decompressed = false;
    while let Some(first) = input.peek()? {
        match first {
            0 => copy_zeroes(input, sink)?,
            b'0' if input.offset.is_multiple_of(4) => copy_archive(input, sink)?,
            _ => {
                copy_compressed(input, sink)?;
                decompressed = true;
            }
        }
    }
    // an empty file is no initramfs; let the kernel say so
    if sink.bytes == 0 { Err(Stop::Unknown) } else { Ok(decompressed) }
}

fn copy_zeroes(input: &mut Input<impl BufRead>, sink: &mut Sink<'_>) -> Result<(), Stop> {
    loop {
        let buffer = input.fill_buf()?;
        let zeroes = buffer.iter().take_while(|b| **b == 0).count();
        if zeroes == 0 {
            return Ok(());
        }
        sink.put(&buffer[..zeroes])?;
        input.consume(zeroes);
    }
}

fn copy_compressed(input: &mut Input<impl BufRead>, sink: &mut Sink<'_>) -> Result<(), Stop> {
    let mut magic = Vec::with_capacity(MAGIC_BYTES);
    input.by_ref().take(MAGIC_BYTES as u64).read_to_end(&mut magic)?;
    let format = Compression::detect(&magic).ok_or(Stop::Unknown)?;
    sink.align()?;
    let stream = Cursor::new(magic).chain(input);
    let context = |stop| match stop {
        Stop::Fault(fault) => Stop::Fault(fault.within(&format!("its {} data", format.name()))),
        other => other,
    };
    let decoder = format.decode(stream).map_err(|e| context(e.into()))?;
    let mut archives = Input { reader: BufReader::with_capacity(COPY_BYTES, decoder), offset: 0 };
    let mut copy = || -> Result<(), Stop> {
        while let Some(first) = archives.peek()? {
            match first {
                0 => copy_zeroes(&mut archives, sink)?,
                b'0' if archives.offset.is_multiple_of(4) => copy_archive(&mut archives, sink)?,
                _ => return Err(Stop::Unknown),
            }
        }
        Ok(())
    };
    let copied = copy();
    if matches!(copied, Err(Stop::Unknown)) {
        // Damage may look like something unknown; the checksum at the end of the stream tells.
        io::copy(&mut archives.by_ref().take(VERIFY_MAX_BYTES), &mut io::sink()).map_err(|e| context(e.into()))?;
    }
    copied.map_err(context)?;
    sink.align()
}

/// Copies one cpio archive in the "new ASCII" format, up to its trailer or the end of the input.
fn copy_archive(input: &mut Input<impl BufRead>, sink: &mut Sink<'_>) -> Result<(), Stop> {
    let mut header = [0; CPIO_HEADER_BYTES];
    let mut name = Vec::new();
    sink.align()?;
    while input.peek()?.is_some() {
        input.read_exact(&mut header).map_err(in_header)?;
        if !(header.starts_with(b"070701") || header.starts_with(b"070702")) {
            return Err(Stop::Unknown);
        }
        let (Some(file_bytes), Some(name_bytes)) = (hex_field(&header, 6), hex_field(&header, 11)) else {
            return Err(Stop::Fault(Fault::Corrupt("a cpio header holds no numbers".into())));
        };
        if name_bytes == 0 || name_bytes > CPIO_NAME_MAX {
            return Err(Stop::Fault(Fault::Corrupt(format!("a cpio member has a name of {name_bytes} bytes"))));
        }
        sink.put(&header)?;
        let padded = (CPIO_HEADER_BYTES as u64 + name_bytes).next_multiple_of(4) - CPIO_HEADER_BYTES as u64;
        name.resize(name_bytes as usize, 0);
        input.read_exact(&mut name).map_err(in_header)?;
        sink.put(&name)?;
        let trailer = name == CPIO_TRAILER;
        let title = || format!("the cpio member '{}'", String::from_utf8_lossy(&name).trim_end_matches('\0'));
        copy_padding(input, sink, padded - name_bytes)?;
        if trailer {
            return Ok(());
        }
        input.copy(sink, file_bytes, title)?;
        copy_padding(input, sink, file_bytes.next_multiple_of(4) - file_bytes)?;
    }
    Ok(())
}

fn in_header(error: io::Error) -> Stop {
    Stop::Fault(Fault::from(error).within("inside a cpio header"))
}

/// Padding may be missing at the very end of a file.
fn copy_padding(input: &mut Input<impl BufRead>, sink: &mut Sink<'_>, bytes: u64) -> Result<(), Stop> {
    let mut padding = Vec::with_capacity(4);
    input.by_ref().take(bytes).read_to_end(&mut padding)?;
    sink.put(&padding)
}

/// Field `index` of a cpio header: 8 hexadecimal digits.
fn hex_field(header: &[u8; CPIO_HEADER_BYTES], index: usize) -> Option<u64> {
    let start = 6 + index * 8;
    let digits = header.get(start..start + 8)?;
    digits.iter().try_fold(0u64, |value, digit| Some(value << 4 | u64::from((*digit as char).to_digit(16)?)))
}

#[cfg(test)]
mod tests;
