//! Writes cpio archives in the "new ASCII" format, for initramfs images made by tests.

/// Files as `(path, mode with type bits, content)`; a character device has its `(major, minor)`.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    members: u32,
}

impl Archive {
    pub fn directory(self, path: &str) -> Self {
        self.member(path, 0o040_755, (0, 0), b"")
    }

    pub fn file(self, path: &str, mode: u32, content: &[u8]) -> Self {
        self.member(path, 0o100_000 | mode, (0, 0), content)
    }

    #[allow(dead_code)] // not every test that includes this file makes device nodes
    pub fn character_device(self, path: &str, major: u32, minor: u32) -> Self {
        self.member(path, 0o020_600, (major, minor), b"")
    }

    /// Ends the archive.
    pub fn finish(self) -> Vec<u8> {
        self.member("TRAILER!!!", 0, (0, 0), b"").bytes
    }

    fn member(mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Self {
        self.members += 1;
        let size = content.len() as u32;
        let name = path.len() as u32 + 1;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.members, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
