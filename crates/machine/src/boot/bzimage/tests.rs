use std::io::Write;

use proptest::prelude::*;

use super::*;

/// A bzImage whose payload is `payload`, stored as the kernel build does.
pub(in crate::boot) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let setup_sectors = 4u8;
    let mut file = vec![0; (usize::from(setup_sectors) + 1) * 512];
    file[0x1f1] = setup_sectors;
    file[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
    file[0x201] = 0x6a;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236..0x238].copy_from_slice(&XLF_KERNEL_64.to_le_bytes());
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    let payload_offset = 0x300u32;
    file[0x248..0x24c].copy_from_slice(&payload_offset.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    let mut code = vec![0xcc; payload_offset as usize];
    code.extend_from_slice(payload);
    code.resize(code.len().next_multiple_of(16), 0);
    file[0x1f4..0x1f8].copy_from_slice(&(code.len() as u32 / 16).to_le_bytes());
    file.extend(code);
    file
}

/// `vmlinux` as a gzip payload (which needs no size behind it).
pub(in crate::boot) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn on_disk(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn memory() -> GuestMemory {
    GuestMemory::new(8 << 20, crate::layout::LOW_RAM_LIMIT).unwrap()
}

#[test]
fn the_image_goes_in_as_it_is_for_the_guest_to_decompress() {
    let image = bzimage(b"\x89LZO and so on");
    let header = SetupHeader::parse(&image, image.len() as u64).unwrap();
    let memory = memory();
    let loaded = load_compressed(&memory, &mut on_disk(&image), &header).unwrap();
    assert_eq!(loaded, LoadedLinux { entry: 0x10_0200, end: 0x30_0000 });
    let mut code = vec![0; image.len() - 2560];
    memory.read(0x10_0000, &mut code).unwrap();
    assert!(code == image[2560..]);
}

#[test]
fn an_unknown_payload_is_left_to_the_guest() {
    let image = bzimage(b"\x89LZO\0\r\n\x1a\n and so on");
    let header = SetupHeader::parse(&image, image.len() as u64).unwrap();
    assert!(load_payload(&memory(), &mut on_disk(&image), &header).unwrap().is_none());
}

#[test]
fn the_payload_is_decompressed_to_where_it_was_linked_for() {
    let vmlinux = elf::tests::elf(0x20_0000, &[elf::tests::Part::load(0x20_0000, b"kernel", 0x1000)]);
    let zstd =
        [zstd::stream::encode_all(&vmlinux[..], 3).unwrap(), (vmlinux.len() as u32).to_le_bytes().to_vec()].concat();
    for (payload, format) in [(gzip(&vmlinux), Compression::Gzip), (zstd, Compression::Zstd)] {
        let image = bzimage(&payload);
        let header = SetupHeader::parse(&image, image.len() as u64).unwrap();
        let memory = memory();
        let loaded = load_payload(&memory, &mut on_disk(&image), &header).unwrap();
        assert_eq!(loaded, Some((LoadedLinux { entry: 0x20_0000, end: 0x20_1000 }, format)));
        let mut text = [0; 6];
        memory.read(0x20_0000, &mut text).unwrap();
        assert_eq!(&text, b"kernel");
    }
}

#[test]
fn a_damaged_payload_is_an_error() {
    let vmlinux = elf::tests::elf(0x20_0000, &[elf::tests::Part::load(0x20_0000, &[7; 100_000], 100_000)]);
    let mut payload = gzip(&vmlinux);
    payload.truncate(payload.len() / 2);
    let image = bzimage(&payload);
    let header = SetupHeader::parse(&image, image.len() as u64).unwrap();
    assert!(matches!(
        load_payload(&memory(), &mut on_disk(&image), &header),
        Err(Fault::Truncated(_) | Fault::Corrupt(_))
    ));
}

#[test]
fn headers_that_cannot_be_right_are_refused() {
    let good = bzimage(&[0; 64]);
    let parse = |image: &[u8]| SetupHeader::parse(&image[..image.len().min(4096)], image.len() as u64);
    assert!(parse(&good).is_ok());
    assert!(matches!(parse(&good[..good.len() - 16]), Err(Fault::Truncated(_))));
    assert!(matches!(parse(&good[..0x220]), Err(Fault::Truncated(_))));
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    assert!(matches!(parse(&with(0x206, &[9, 2])), Err(Fault::Unsupported(why)) if why.contains("2.09")));
    assert!(matches!(parse(&with(0x236, &[0, 0])), Err(Fault::Unsupported(why)) if why.contains("32-bit")));
    assert!(matches!(parse(&with(0x24c, &[0xff; 4])), Err(Fault::Corrupt(_))));
    let needs = with(0x260, &(64u32 << 20).to_le_bytes());
    let header = parse(&needs).unwrap();
    assert!(matches!(load_compressed(&memory(), &mut on_disk(&needs), &header), Err(Fault::NeedsMemory(_))));
    for address in [0u64, 0x1000, u64::MAX - 5, 0xbfff_0000] {
        let odd = with(0x258, &address.to_le_bytes());
        let header = parse(&odd).unwrap();
        assert!(load_compressed(&memory(), &mut on_disk(&odd), &header).is_err(), "{address:#x}");
    }
}

proptest! {
    #[test]
    fn hostile_headers_never_panic(fields in prop::collection::vec((0x1f1usize..0x270, any::<u32>()), 1..12)) {
        let mut image = bzimage(&gzip(&[1; 2000]));
        for (at, value) in fields {
            image[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(header) = SetupHeader::parse(&image[..4096.min(image.len())], image.len() as u64) {
            let mut file = on_disk(&image);
            let _ = load_payload(&memory(), &mut file, &header);
            let _ = load_compressed(&memory(), &mut file, &header);
        }
    }
}
