//! Puts a kernel, its initrd and its command line into guest memory, without any firmware.
//!
//! | file | entered by |
//! |---|---|
//! | bzImage | the 64-bit Linux boot protocol: the `vmlinux` inside, decompressed on the host, or the image itself |
//! | ELF with a PVH note | the PVH protocol, in 32-bit protected mode |
//! | other ELF for x86-64 | the 64-bit Linux boot protocol |
//!
//! Everything is streamed into guest memory: besides a decoder's window nothing of the files stays on the host.

mod bytes;
mod bzimage;
mod compression;
mod e820;
mod elf;
mod entry;
mod error;
mod fault;
mod identify;
mod initrd;
mod pvh;
mod zero_page;

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use vireo_api::ByteSize;
use vireo_memory::{GuestMemory, PAGE_BYTES};

use self::{
    bzimage::SetupHeader,
    fault::Fault,
    initrd::{InitrdFault, Room},
    zero_page::BootParams,
};
use crate::layout::{CMDLINE_MAX_BYTES, CMDLINE_START, LOW_RAM_LIMIT};

pub use self::{
    entry::Entry,
    error::{BootError, BootFile},
};

/// `COMMAND_LINE_SIZE` of x86 Linux without its NUL, for kernels that do not say what they take.
const LINUX_CMDLINE_MAX: usize = 2047;
/// Left free between the kernel and the initrd, for what a kernel puts right behind itself early on.
const INITRD_GAP_BYTES: u64 = 2 << 20;

/// Who decompresses the kernel in a bzImage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decompressor {
    /// The host. A software CPU is spared the work; the kernel then runs where it was linked for (no KASLR).
    Host,
    /// The guest, as the image is made for, with KASLR.
    Guest,
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootSource {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    pub decompressor: Decompressor,
}

/// A kernel that is ready to be entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    pub entry: Entry,
    /// What was loaded and how, for people: `bzImage, lz4 decompressed on the host`.
    pub how: String,
    /// Address and length of the initrd.
    pub initrd: Option<(u64, u64)>,
}

/// A kernel in memory, whichever kind it was.
struct LoadedKernel {
    entry: Entry,
    how: String,
    end: u64,
    header: Option<SetupHeader>,
}

/// Loads everything that `source` names. `rsdp` is where the ACPI tables start.
pub fn load(memory: &GuestMemory, source: &BootSource, rsdp: u64) -> Result<Loaded, BootError> {
    let kernel = load_kernel(memory, &source.kernel, source.decompressor)?;
    let cmdline_max = kernel.header.as_ref().map_or(LINUX_CMDLINE_MAX, |h| h.cmdline_max as usize);
    write_cmdline(memory, &source.cmdline, cmdline_max)?;
    let initrd_end_max = kernel.header.as_ref().map_or(u64::MAX, |h| h.initrd_end_max);
    let room = Room {
        start: (kernel.end + INITRD_GAP_BYTES).next_multiple_of(PAGE_BYTES),
        end: memory.low_bytes().min(initrd_end_max),
    };
    let initrd = match &source.initrd {
        Some(path) => Some(load_initrd(memory, path, room, kernel.header.is_some())?),
        None => None,
    };
    match kernel.entry {
        Entry::Linux64 { .. } => {
            let setup_header = kernel.header.as_ref().map(|h| &h.raw[..]);
            zero_page::write(memory, &BootParams { setup_header, initrd, rsdp })?;
        }
        Entry::Pvh32 { .. } => pvh::write(memory, initrd, rsdp)?,
    }
    kernel.entry.prepare(memory)?;
    Ok(Loaded { entry: kernel.entry, how: kernel.how, initrd })
}

fn open(what: BootFile, path: &Path) -> Result<File, BootError> {
    let failed = |source| BootError::Read { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(failed(std::io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

fn load_kernel(memory: &GuestMemory, path: &Path, decompressor: Decompressor) -> Result<LoadedKernel, BootError> {
    let mut file = open(BootFile::Kernel, path)?;
    let fault = |fault: Fault| fault.of(BootFile::Kernel, path, memory);
    let read = |source| fault(Fault::Read(source));
    let mut head = Vec::new();
    (&mut file).take(identify::PROBE_BYTES as u64).read_to_end(&mut head).map_err(read)?;
    if bzimage::is_bzimage(&head) {
        let bytes = file.metadata().map_err(read)?.len();
        load_bzimage(memory, &mut file, &head, bytes, decompressor).map_err(fault)
    } else if elf::is_elf64(&head) {
        file.seek(SeekFrom::Start(0)).map_err(read)?;
        load_elf(memory, &mut file).map_err(fault)
    } else {
        Err(BootError::NotAKernel { path: path.to_owned(), found: identify::describe(&head) })
    }
}

fn load_bzimage(
    memory: &GuestMemory,
    file: &mut File,
    head: &[u8],
    bytes: u64,
    decompressor: Decompressor,
) -> Result<LoadedKernel, Fault> {
    let header = SetupHeader::parse(head, bytes)?;
    let unpacked = match decompressor {
        Decompressor::Host => bzimage::load_payload(memory, file, &header)?,
        Decompressor::Guest => None,
    };
    let (linux, how) = match unpacked {
        Some((linux, format)) => (linux, format!("bzImage, {} decompressed on the host", format.name())),
        None => (bzimage::load_compressed(memory, file, &header)?, "bzImage, decompressed by the guest".to_owned()),
    };
    Ok(LoadedKernel { entry: Entry::Linux64 { rip: linux.entry }, how, end: linux.end, header: Some(header) })
}

fn load_elf(memory: &GuestMemory, file: &mut File) -> Result<LoadedKernel, Fault> {
    let elf = elf::load(memory, file)?;
    let (entry, how) = match elf.pvh_entry {
        Some(rip) => (Entry::Pvh32 { rip }, "ELF, entered by PVH"),
        None => (Entry::Linux64 { rip: elf.entry }, "ELF, entered in 64-bit mode"),
    };
    Ok(LoadedKernel { entry, how: how.to_owned(), end: elf.end, header: None })
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str, most: usize) -> Result<(), BootError> {
    let most = most.min(CMDLINE_MAX_BYTES as usize - 1);
    if cmdline.len() > most {
        return Err(BootError::CommandLineTooLong { has: cmdline.len(), most });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    memory.write(CMDLINE_START, cmdline.as_bytes())?;
    memory.write(CMDLINE_START + cmdline.len() as u64, &[0])?;
    Ok(())
}

fn load_initrd(memory: &GuestMemory, path: &Path, room: Room, is_linux: bool) -> Result<(u64, u64), BootError> {
    let mut file = open(BootFile::Initrd, path)?;
    let failed = |source| BootError::Read { what: BootFile::Initrd, path: path.to_owned(), source };
    let mut head = Vec::with_capacity(identify::PROBE_BYTES);
    file.by_ref().take(identify::PROBE_BYTES as u64).read_to_end(&mut head).map_err(failed)?;
    file.rewind().map_err(failed)?;
    if is_linux && !head.is_empty() && !initrd::suits_linux(&head) {
        let why = format!("it seems to be {}, which Linux does not take", identify::describe(&head));
        return Err(Fault::Corrupt(why).of(BootFile::Initrd, path, memory));
    }
    let size = ByteSize(file.metadata().map_err(failed)?.len());
    match initrd::load(memory, &mut file, room) {
        Ok(loaded) => Ok((loaded.start, loaded.bytes)),
        Err(InitrdFault::TooLarge) => {
            let needs = room.start.saturating_add(size.0);
            let advice = if needs > LOW_RAM_LIMIT {
                "Make it smaller: an initrd lies below 3 GiB".to_owned()
            } else {
                format!("Give at least --memory {}M", needs.div_ceil(1 << 20))
            };
            Err(BootError::InitrdTooLarge { path: path.to_owned(), size, room: ByteSize(room.bytes()), advice })
        }
        Err(InitrdFault::Fault(fault)) => Err(fault.of(BootFile::Initrd, path, memory)),
    }
}

#[cfg(test)]
mod tests;
