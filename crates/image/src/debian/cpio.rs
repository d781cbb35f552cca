use std::io::{self, Write};

/// Writes a `cpio` archive of the "newc" kind: the format of an initial RAM file system
/// (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`). Owners are root, times are zero.
pub struct CpioWriter<W> {
    writer: W,
    next_inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl<W: Write> CpioWriter<W> {
    pub fn new(writer: W) -> Self {
        Self { writer, next_inode: 1 }
    }

    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, &[], (0, 0))
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | mode, content, (0, 0))
    }

    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, SYMLINK | 0o777, target.as_bytes(), (0, 0))
    }

    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTER | 0o600, &[], (major, minor))
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        self.writer.flush()?;
        Ok(self.writer)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| io::Error::other("a file in the initrd exceeds 4 GiB"))?;
        let name_size = path.len() as u32 + 1;
        let fields = [self.next_inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.next_inode += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        header.push_str(path);
        header.push('\0');
        self.padded(header.as_bytes())?;
        self.padded(content)
    }

    /// Names (with their header) and contents end at a multiple of 4 bytes.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes)?;
        self.writer.write_all(&[0; 3][..bytes.len().wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_named() {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.directory("bin").unwrap();
        cpio.file("bin/x", 0o755, b"12345").unwrap();
        cpio.symlink("init", "bin/x").unwrap();
        let bytes = cpio.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 4);
        assert!(text.contains("bin/x\0") && text.contains("12345\0\0\0") && text.contains("TRAILER!!!\0"));
        // header 110 + "bin\0" 4 = 114, padded to 116: the second entry begins there.
        assert_eq!(&bytes[116..122], b"070701");
    }
}
