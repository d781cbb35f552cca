//! Linux `bzImage`: the setup header and the two ways to boot it (Linux `Documentation/arch/x86/boot.rst`).

use std::{
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
};

use vireo_memory::GuestMemory;

use super::{
    bytes::{le16, le32, le64},
    compression::{Compression, MAGIC_BYTES},
    elf,
    fault::Fault,
};

const SECTOR_BYTES: u64 = 512;
const HEADER_START: usize = 0x1f1;
const MAGIC_AT: usize = 0x202;
/// The header may not reach into the e820 table of `boot_params`.
const HEADER_MAX_END: usize = 0x290;
/// The first protocol version with a 64-bit entry point.
const VERSION_64_BIT: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1 << 0;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// `startup_64` of the decompressor.
const ENTRY_64_OFFSET: u64 = 0x200;
const COPY_BYTES: usize = 256 << 10;

/// What we use of the setup header, and its raw bytes for `boot_params`.
#[derive(Clone, Debug)]
pub(super) struct SetupHeader {
    /// From offset 0x1f1 on, as they belong into `boot_params`.
    pub raw: Vec<u8>,
    /// Where the protected-mode code starts in the file.
    code_offset: u64,
    code_bytes: u64,
    payload_offset: u64,
    payload_bytes: u64,
    pref_address: u64,
    init_bytes: u64,
    pub cmdline_max: u32,
    pub initrd_end_max: u64,
}

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    le16(head, 0x1fe) == Some(0xaa55) && head.get(MAGIC_AT..MAGIC_AT + 4) == Some(b"HdrS")
}

impl SetupHeader {
    /// Reads and checks the header; `head` is the beginning of the file, `file_bytes` its length.
    pub fn parse(head: &[u8], file_bytes: u64) -> Result<Self, Fault> {
        Self::parse_fields(head)
            .unwrap_or_else(|| Err(Fault::Truncated("it ends inside its setup header".into())))?
            .check(file_bytes)
    }

    fn parse_fields(head: &[u8]) -> Option<Result<Self, Fault>> {
        let version = le16(head, 0x206)?;
        if version < VERSION_64_BIT {
            let why = format!(
                "its boot protocol is {}.{:02}; 2.12 is the first with a 64-bit entry point",
                version >> 8,
                version & 0xff
            );
            return Some(Err(Fault::Unsupported(why)));
        }
        let xloadflags = le16(head, 0x236)?;
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Some(Err(Fault::Unsupported("it is a 32-bit kernel".into())));
        }
        let header_end = (MAGIC_AT + usize::from(*head.get(0x201)?)).min(HEADER_MAX_END);
        let setup_sectors = match *head.get(HEADER_START)? {
            0 => 4,
            n => u64::from(n),
        };
        let initrd_end_max =
            if xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 { u64::MAX } else { u64::from(le32(head, 0x22c)?) + 1 };
        Some(Ok(Self {
            raw: head.get(HEADER_START..header_end)?.to_vec(),
            code_offset: (setup_sectors + 1) * SECTOR_BYTES,
            code_bytes: u64::from(le32(head, 0x1f4)?) * 16,
            payload_offset: u64::from(le32(head, 0x248)?),
            payload_bytes: u64::from(le32(head, 0x24c)?),
            pref_address: le64(head, 0x258)?,
            init_bytes: u64::from(le32(head, 0x260)?),
            cmdline_max: le32(head, 0x238)?,
            initrd_end_max,
        }))
    }

    fn check(self, file_bytes: u64) -> Result<Self, Fault> {
        let end = self.code_offset + self.code_bytes;
        if file_bytes < end || self.code_bytes == 0 {
            return Err(Fault::Truncated(format!("it has {file_bytes} bytes, but its header promises {end}")));
        }
        let payload_end = self.payload_offset + self.payload_bytes;
        if payload_end > self.code_bytes {
            return Err(Fault::Corrupt("its header places the compressed kernel outside of the file".into()));
        }
        Ok(self)
    }
}

/// A kernel in guest memory, to be entered in 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoadedLinux {
    pub entry: u64,
    /// First address behind what the kernel uses before it looks at the memory map.
    pub end: u64,
}

/// Copies the image as it is; the guest decompresses it.
pub(super) fn load_compressed(
    memory: &GuestMemory,
    file: &mut File,
    header: &SetupHeader,
) -> Result<LoadedLinux, Fault> {
    let start = header.pref_address;
    let used = header.init_bytes.max(header.code_bytes);
    let end = start.checked_add(used).filter(|end| *end <= crate::layout::LOW_RAM_LIMIT);
    let Some(end) = end.filter(|_| start >= crate::layout::HIGH_MEMORY_START) else {
        return Err(Fault::Corrupt(format!("its header asks for the impossible load address {start:#x}")));
    };
    if end > memory.low_bytes() {
        return Err(Fault::NeedsMemory(end));
    }
    file.seek(SeekFrom::Start(header.code_offset))?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut done = 0;
    while done < header.code_bytes {
        let piece = (header.code_bytes - done).min(COPY_BYTES as u64) as usize;
        file.read_exact(&mut buffer[..piece])?;
        memory.write(start + done, &buffer[..piece])?;
        done += piece as u64;
    }
    Ok(LoadedLinux { entry: start + ENTRY_64_OFFSET, end })
}

/// Decompresses the `vmlinux` inside on the host. `None` if its format is not one that we can decode.
pub(super) fn load_payload(
    memory: &GuestMemory,
    file: &mut File,
    header: &SetupHeader,
) -> Result<Option<(LoadedLinux, Compression)>, Fault> {
    let mut magic = [0; MAGIC_BYTES];
    if header.payload_bytes < MAGIC_BYTES as u64 + 4 {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(header.code_offset + header.payload_offset))?;
    file.read_exact(&mut magic)?;
    file.seek_relative(-(MAGIC_BYTES as i64))?;
    let Some(format) = Compression::detect(&magic) else { return Ok(None) };
    // The kernel build appends the uncompressed size to every format but gzip, which ends with it anyway.
    let stream_bytes = if format == Compression::Gzip { header.payload_bytes } else { header.payload_bytes - 4 };
    let input = BufReader::with_capacity(COPY_BYTES, file.take(stream_bytes));
    let mut vmlinux = format.decode(input)?;
    let loaded =
        elf::load(memory, &mut vmlinux).map_err(|f| f.within(&format!("the {} data inside", format.name())))?;
    Ok(Some((LoadedLinux { entry: loaded.entry, end: loaded.end }, format)))
}

#[cfg(test)]
pub(super) mod tests;
