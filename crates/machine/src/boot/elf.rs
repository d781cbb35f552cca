//! Loads an ELF kernel from a stream, so that a decompressed `vmlinux` never lies in host memory as a whole.

use std::io::{self, Read};

use vireo_memory::GuestMemory;

use super::{
    bytes::{le16, le32, le64},
    fault::Fault,
};
use crate::layout::HIGH_MEMORY_START;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// Program headers must lie in the first bytes of the file: a stream cannot be rewound.
const HEAD_MAX_BYTES: u64 = 64 << 10;
const COPY_BYTES: usize = 256 << 10;
const NOTE_MAX_BYTES: u64 = 64 << 10;

const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The 32-bit entry point of the PVH boot protocol (Xen `xen/include/public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Where an ELF kernel ended up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoadedElf {
    /// Physical address of the ELF entry point.
    pub entry: u64,
    /// First address behind the kernel, `.bss` included.
    pub end: u64,
    pub pvh_entry: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

struct Header {
    entry: u64,
    /// In the order in which they lie in the file.
    segments: Vec<Segment>,
}

pub(super) fn is_elf64(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF\x02\x01") && le16(head, 18) == Some(MACHINE_X86_64)
}

/// Loads the ELF file that `input` yields from its first byte on to its physical addresses.
pub(super) fn load(memory: &GuestMemory, input: &mut dyn Read) -> Result<LoadedElf, Fault> {
    let (head, header) = read_header(input)?;
    let loadable = || header.segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_bytes > 0);
    let mut end = 0;
    for segment in loadable() {
        end = end.max(check_place(segment)?);
    }
    if end == 0 {
        return Err(Fault::Unsupported("it has nothing to load".into()));
    }
    if end > memory.low_bytes() {
        return Err(Fault::NeedsMemory(end));
    }
    let mut stream = Stream { position: head.len() as u64, head, input, buffer: vec![0; COPY_BYTES] };
    for segment in loadable() {
        stream.copy(memory, segment)?;
    }
    let entry = physical(header.entry, loadable()).ok_or_else(|| {
        Fault::Unsupported(format!("its entry point {:#x} lies outside of what it loads", header.entry))
    })?;
    let pvh_entry = header.segments.iter().filter(|s| s.kind == PT_NOTE).find_map(|note| {
        let address = loaded_at(note, loadable())?;
        let mut notes = vec![0; note.file_bytes.min(NOTE_MAX_BYTES) as usize];
        memory.read(address, &mut notes).ok()?;
        pvh_entry(&notes)
    });
    Ok(LoadedElf { entry, end, pvh_entry })
}

/// The first bytes of the file, up to the end of the program headers, and what they say.
fn read_header(input: &mut dyn Read) -> Result<(Vec<u8>, Header), Fault> {
    let mut head = vec![0; HEADER_BYTES];
    input.read_exact(&mut head).map_err(|e| Fault::from(e).within("the ELF header"))?;
    let broken = || Fault::Corrupt("its ELF header makes no sense".into());
    if !is_elf64(&head) {
        return Err(Fault::Corrupt("it is no ELF file for x86-64".into()));
    }
    let entry = le64(&head, 24).ok_or_else(broken)?;
    let table = le64(&head, 32).ok_or_else(broken)?;
    let entry_bytes = le16(&head, 54).ok_or_else(broken)?;
    let count = le16(&head, 56).ok_or_else(broken)?;
    let table_bytes = u64::from(count) * PROGRAM_HEADER_BYTES as u64;
    let table_end = table.checked_add(table_bytes).filter(|end| *end <= HEAD_MAX_BYTES).ok_or_else(broken)?;
    if table < HEADER_BYTES as u64 || usize::from(entry_bytes) != PROGRAM_HEADER_BYTES {
        return Err(broken());
    }
    head.resize((table_end as usize).max(HEADER_BYTES), 0);
    input.read_exact(&mut head[HEADER_BYTES..]).map_err(|e| Fault::from(e).within("the ELF program headers"))?;
    let mut segments = head[table as usize..]
        .chunks_exact(PROGRAM_HEADER_BYTES)
        .map(parse_segment)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(broken)?;
    segments.sort_by_key(|s| s.offset);
    Ok((head, Header { entry, segments }))
}

fn parse_segment(bytes: &[u8]) -> Option<Segment> {
    Some(Segment {
        kind: le32(bytes, 0)?,
        offset: le64(bytes, 8)?,
        virt: le64(bytes, 16)?,
        phys: le64(bytes, 24)?,
        file_bytes: le64(bytes, 32)?,
        memory_bytes: le64(bytes, 40)?,
    })
}

/// The end of the segment in memory, if RAM can be there.
fn check_place(segment: &Segment) -> Result<u64, Fault> {
    let end = segment.phys.checked_add(segment.memory_bytes);
    let (Some(end), true) = (end, segment.file_bytes <= segment.memory_bytes) else {
        return Err(Fault::Corrupt("an ELF segment has an impossible size".into()));
    };
    if segment.phys < HIGH_MEMORY_START {
        return Err(Fault::Unsupported(format!(
            "it wants to be loaded to {:#x}, where the boot structures are; kernels start at 1 MiB or above",
            segment.phys
        )));
    }
    if end > crate::layout::LOW_RAM_LIMIT {
        return Err(Fault::Unsupported(format!("it wants to be loaded up to {end:#x}, where no RAM can be")));
    }
    Ok(end)
}

struct Stream<'a> {
    /// What was read already, from offset 0 on.
    head: Vec<u8>,
    input: &'a mut dyn Read,
    /// Offset of the next byte of `input`.
    position: u64,
    buffer: Vec<u8>,
}

impl Stream<'_> {
    fn copy(&mut self, memory: &GuestMemory, segment: &Segment) -> Result<(), Fault> {
        let truncated = || Fault::Truncated("the ELF file ends inside a segment".into());
        let end = segment.offset.checked_add(segment.file_bytes).ok_or_else(truncated)?;
        let mut at = segment.offset;
        let mut to = segment.phys;
        if let Some(early) = self.head.get(at.min(u64::from(u32::MAX)) as usize..) {
            let early = &early[..early.len().min(segment.file_bytes as usize)];
            memory.write(to, early)?;
            at += early.len() as u64;
            to += early.len() as u64;
        }
        if at < end && at < self.position {
            return Err(Fault::Unsupported("its ELF segments overlap in the file".into()));
        }
        while at < end {
            let ahead = at - self.position;
            if ahead > 0 {
                let skipped = io::copy(&mut (&mut *self.input).take(ahead), &mut io::sink())?;
                self.position += skipped;
                if skipped < ahead {
                    return Err(truncated());
                }
            }
            let piece = (end - at).min(COPY_BYTES as u64) as usize;
            let piece = &mut self.buffer[..piece];
            self.input.read_exact(piece).map_err(|e| Fault::from(e).within("an ELF segment"))?;
            memory.write(to, piece)?;
            self.position += piece.len() as u64;
            at += piece.len() as u64;
            to += piece.len() as u64;
        }
        Ok(())
    }
}

/// `vmlinux` names its entry point by physical address, other kernels by virtual address.
fn physical<'a>(entry: u64, segments: impl Iterator<Item = &'a Segment> + Clone) -> Option<u64> {
    let inside = |start: u64, s: &Segment| entry.checked_sub(start).filter(|offset| *offset < s.memory_bytes);
    let by_physical = segments.clone().find(|s| inside(s.phys, s).is_some()).map(|_| entry);
    by_physical.or_else(|| segments.clone().find_map(|s| Some(inside(s.virt, s)? + s.phys)))
}

/// Where a segment that is part of a loaded one lies in memory.
fn loaded_at<'a>(part: &Segment, mut segments: impl Iterator<Item = &'a Segment>) -> Option<u64> {
    segments.find_map(|s| {
        let inside = part.offset.checked_sub(s.offset)?;
        (inside.checked_add(part.file_bytes)? <= s.file_bytes).then_some(s.phys + inside)
    })
}

/// Looks for the PVH entry point in a list of ELF notes.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let name_bytes = le32(notes, 0)? as usize;
        let value_bytes = le32(notes, 4)? as usize;
        let kind = le32(notes, 8)?;
        let value_at = 12usize.checked_add(name_bytes.checked_next_multiple_of(4)?)?;
        let next = value_at.checked_add(value_bytes.checked_next_multiple_of(4)?)?;
        let name = notes.get(12..12usize.checked_add(name_bytes)?)?;
        if name == b"Xen\0" && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            return le32(notes, value_at);
        }
        notes = notes.get(next..)?;
    }
}

#[cfg(test)]
pub(super) mod tests;
