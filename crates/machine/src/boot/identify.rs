//! Says what a file seems to be, for kernels that are none.

/// How many bytes of a file [`describe`] looks at.
pub const PROBE_BYTES: usize = 4096;

/// `(offset, magic, what it is)`; the first match counts.
const MAGICS: &[(usize, &[u8], &str)] = &[
    (0, b"\x1f\x8b", "gzip-compressed data"),
    (0, b"\xfd7zXZ\0", "xz-compressed data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (0, b"\x02\x21\x4c\x18", "lz4-compressed data"),
    (0, b"\x04\x22\x4d\x18", "lz4-compressed data"),
    (0, b"BZh", "bzip2-compressed data"),
    (0, b"070701", "a cpio archive, perhaps an initrd"),
    (0, b"070702", "a cpio archive, perhaps an initrd"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"!<arch>\n", "an ar archive or Debian package"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"#!", "a script"),
    (56, b"ARM\x64", "a Linux kernel for 64-bit Arm"),
    (0x202, b"HdrS", "a Linux kernel without a boot sector signature"),
    (257, b"ustar", "a tar archive"),
    (1080, b"\x53\xef", "an ext2/3/4 file system"),
    (510, b"\x55\xaa", "a disk image or boot sector"),
    (0, b"MZ", "a DOS or EFI program"),
];

/// ELF machine numbers that people meet (`e_machine`).
const MACHINES: &[(u16, &str)] =
    &[(3, "32-bit x86"), (40, "32-bit Arm"), (62, "x86-64"), (183, "64-bit Arm"), (243, "RISC-V"), (21, "POWER")];

/// What the file that starts with `head` (up to [`PROBE_BYTES`]) seems to be.
pub fn describe(head: &[u8]) -> String {
    if head.is_empty() {
        return "an empty file".into();
    }
    if head.starts_with(b"\x7fELF") {
        return describe_elf(head);
    }
    for (offset, magic, what) in MAGICS {
        if head.get(*offset..).is_some_and(|rest| rest.starts_with(magic)) {
            return (*what).into();
        }
    }
    if head.iter().all(|b| *b == 0) {
        return "a file of zeroes".into();
    }
    let text = |b: &u8| b.is_ascii_graphic() || b" \t\r\n".contains(b) || *b >= 0x80;
    if head.iter().all(text) { "a text file".into() } else { "data of an unknown kind".into() }
}

fn describe_elf(head: &[u8]) -> String {
    let (Some(class), Some(machine)) = (head.get(4), head.get(18..20)) else {
        return "the beginning of an ELF file".into();
    };
    let machine = u16::from_le_bytes([machine[0], machine[1]]);
    let cpu = MACHINES.iter().find(|(number, _)| *number == machine).map_or("another CPU", |(_, name)| name);
    match class {
        1 => format!("a 32-bit ELF file for {cpu}"),
        _ => format!("an ELF file for {cpu}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_common_mistakes() {
        let mut arm = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 183, 0];
        for (head, says) in [
            (&b""[..], "empty"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"QFI\xfb\0\0\0\x03", "qcow2"),
            (b"070701", "cpio"),
            (b"#!/bin/sh\n", "script"),
            (b"hello\nworld\n", "text"),
            (&[0; 64], "zeroes"),
            (&[1, 2, 3], "unknown"),
            (&arm, "64-bit Arm"),
        ] {
            assert!(describe(head).contains(says), "{}", describe(head));
        }
        arm.truncate(5);
        assert!(describe(&arm).contains("ELF"));
    }
}
