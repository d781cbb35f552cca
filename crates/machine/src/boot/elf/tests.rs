use proptest::prelude::*;

use super::*;

/// A segment of a synthetic ELF file: kind, virtual and physical address, content, bytes in memory.
pub(in crate::boot) struct Part<'a> {
    pub kind: u32,
    pub virt: u64,
    pub phys: u64,
    pub content: &'a [u8],
    pub memory_bytes: u64,
}

impl<'a> Part<'a> {
    pub(in crate::boot) fn load(phys: u64, content: &'a [u8], memory_bytes: u64) -> Self {
        Self { kind: PT_LOAD, virt: phys | 0xffff_ffff_8000_0000, phys, content, memory_bytes }
    }
}

pub(in crate::boot) fn elf(entry: u64, parts: &[Part<'_>]) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(HEADER_BYTES, 0);
    header[16..18].copy_from_slice(&2u16.to_le_bytes());
    header[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
    header[24..32].copy_from_slice(&entry.to_le_bytes());
    header[32..40].copy_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
    header[54..56].copy_from_slice(&(PROGRAM_HEADER_BYTES as u16).to_le_bytes());
    header[56..58].copy_from_slice(&(parts.len() as u16).to_le_bytes());
    let mut offset = HEADER_BYTES + parts.len() * PROGRAM_HEADER_BYTES + 100;
    let mut body = vec![0xee; 100];
    for part in parts {
        let bytes = part.content.len() as u64;
        header.extend(part.kind.to_le_bytes());
        header.extend(7u32.to_le_bytes());
        for field in [offset as u64, part.virt, part.phys, bytes, part.memory_bytes, 0x1000] {
            header.extend(field.to_le_bytes());
        }
        offset += part.content.len();
        body.extend_from_slice(part.content);
    }
    [header, body].concat()
}

pub(in crate::boot) fn pvh_note(entry: u32) -> Vec<u8> {
    let mut notes = Vec::new();
    for (name, kind, value) in
        [(&b"GNU\0"[..], 3u32, &[1u8, 2, 3][..]), (b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &entry.to_le_bytes())]
    {
        notes.extend((name.len() as u32).to_le_bytes());
        notes.extend((value.len() as u32).to_le_bytes());
        notes.extend(kind.to_le_bytes());
        notes.extend_from_slice(name);
        notes.extend_from_slice(value);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    notes
}

fn memory() -> GuestMemory {
    GuestMemory::new(8 << 20, crate::layout::LOW_RAM_LIMIT).unwrap()
}

fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    memory.read(at, &mut out).unwrap();
    out
}

#[test]
fn loads_segments_to_their_physical_addresses() {
    let memory = memory();
    let long = vec![0x5a; 700_000];
    let file = elf(0x10_0004, &[Part::load(0x10_0000, b"first", 0x1000), Part::load(0x30_0000, &long, 0x20_0000)]);
    let loaded = load(&memory, &mut &file[..]).unwrap();
    assert_eq!(loaded, LoadedElf { entry: 0x10_0004, end: 0x50_0000, pvh_entry: None });
    assert_eq!(read(&memory, 0x10_0000, 6), b"first\0");
    assert!(read(&memory, 0x30_0000, long.len()) == long);
}

#[test]
fn a_virtual_entry_point_becomes_physical() {
    let file = elf(0xffff_ffff_8010_0010, &[Part::load(0x10_0000, &[0x90; 64], 64)]);
    assert_eq!(load(&memory(), &mut &file[..]).unwrap().entry, 0x10_0010);
}

#[test]
fn finds_the_pvh_note_inside_a_segment() {
    let note = pvh_note(0x10_0042);
    let mut file = elf(
        0x10_0000,
        &[Part::load(0x10_0000, &note, 0x1000), Part { kind: PT_NOTE, ..Part::load(0x10_0000, &note, 0) }],
    );
    // the note's segment is the very bytes of the loaded one
    let first = le64(&file, HEADER_BYTES + 8).unwrap();
    file[HEADER_BYTES + PROGRAM_HEADER_BYTES + 8..][..8].copy_from_slice(&first.to_le_bytes());
    assert_eq!(load(&memory(), &mut &file[..]).unwrap().pvh_entry, Some(0x10_0042));
}

#[test]
fn says_what_is_wrong() {
    let big = elf(0x10_0000, &[Part::load(0x10_0000, b"x", 16 << 20)]);
    assert!(matches!(load(&memory(), &mut &big[..]), Err(Fault::NeedsMemory(end)) if end == 0x10_0000 + (16 << 20)));
    // Not what the first of them needs, but what all do.
    let two = elf(0x10_0000, &[Part::load(0x10_0000, b"x", 16 << 20), Part::load(0x110_0000, b"x", 8 << 20)]);
    assert!(matches!(load(&memory(), &mut &two[..]), Err(Fault::NeedsMemory(end)) if end == 0x10_0000 + (24 << 20)));
    let low = elf(0x1000, &[Part::load(0x1000, b"x", 1)]);
    assert!(matches!(load(&memory(), &mut &low[..]), Err(Fault::Unsupported(_))));
    let outside = elf(0x4000, &[Part::load(0x10_0000, b"x", 1)]);
    assert!(matches!(load(&memory(), &mut &outside[..]), Err(Fault::Unsupported(why)) if why.contains("entry point")));
    let nothing = elf(0, &[]);
    assert!(matches!(load(&memory(), &mut &nothing[..]), Err(Fault::Unsupported(_))));
    let good = elf(0x10_0000, &[Part::load(0x10_0000, &[1; 5000], 5000)]);
    for cut in [10, HEADER_BYTES + 8, good.len() - 1] {
        assert!(matches!(load(&memory(), &mut &good[..cut]), Err(Fault::Truncated(_))), "{cut}");
    }
}

proptest! {
    #[test]
    fn hostile_headers_never_panic(
        fields in prop::collection::vec((0usize..HEADER_BYTES + 2 * PROGRAM_HEADER_BYTES, any::<u64>(), any::<bool>()), 1..12)
    ) {
        let note = pvh_note(1);
        let mut file = elf(0x10_0000, &[Part::load(0x10_0000, &note, 0x1000), Part { kind: PT_NOTE, ..Part::load(0x10_0000, &note, 64) }]);
        for (at, value, small) in fields {
            let value = if small { value % 0x20_0000 } else { value };
            let at = at & !7;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        let _ = load(&memory(), &mut &file[..]);
    }

    #[test]
    fn hostile_notes_never_panic(notes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = pvh_entry(&notes);
    }
}
