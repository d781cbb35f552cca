//! The header, and whether we can do with what it says.

use std::path::{Path, PathBuf};

use crate::{Format, OpenError, SECTOR_BYTES, file::HostFile};

pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Version 2's header; version 3 adds 32 bytes or more.
const V2_BYTES: usize = 72;
pub const V3_BYTES: usize = 104;

/// Limits that QEMU has, too: they bound what an image can make us allocate.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
pub const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_BACKING_NAME: u32 = 1023;

/// Incompatible features.
mod incompatible {
    pub const DIRTY: u64 = 1 << 0;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
}

/// Header extensions.
pub mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
}

/// Where fields are that we write again.
pub mod field {
    pub const REFTABLE: u64 = 48;
    pub const INCOMPATIBLE: u64 = 72;
    pub const AUTOCLEAR: u64 = 88;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Deflate,
    Zstd,
}

/// A header that was found good: tables lie in the file and have bounded sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_entries: u64,
    pub l1_offset: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    /// log2 of a refcount's bits.
    pub refcount_order: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub compression: Compression,
    pub dirty: bool,
    pub corrupt: bool,
    pub autoclear: u64,
    backing_name: Option<String>,
    backing_format: Option<String>,
}

impl Header {
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// The backing file's path, relative ones taken from where `image` lies, and its format if it is named.
    pub fn backing_path(&self, image: &Path) -> Result<Option<(PathBuf, Option<Format>)>, OpenError> {
        let Some(name) = &self.backing_name else { return Ok(None) };
        let unsupported =
            |what: String, remedy: &str| OpenError::Unsupported { path: image.into(), what, remedy: remedy.into() };
        let name = name.strip_prefix("file:").unwrap_or(name);
        // "json:…", "nbd://…": anything with a colon before the first slash is not a plain path.
        if name.split('/').next().is_some_and(|first| first.contains(':')) {
            let remedy = "give it a plain file as its backing file with `qemu-img rebase -u`";
            return Err(unsupported(format!("the backing file `{name}`"), remedy));
        }
        let format = match self.backing_format.as_deref() {
            None => None,
            Some("raw" | "file" | "host_device") => Some(Format::Raw),
            Some("qcow2") => Some(Format::Qcow2),
            Some(other) => {
                let remedy = "convert the backing file with `qemu-img convert -O qcow2`";
                return Err(unsupported(format!("a backing file of format `{other}`"), remedy));
            }
        };
        let path = image.parent().unwrap_or(Path::new("")).join(name);
        Ok(Some((path, format)))
    }
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        self.0.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
    }
}

/// Reads and validates the header of an image.
pub fn read_header(file: &HostFile) -> Result<Header, OpenError> {
    let path = file.path();
    let read = |source| OpenError::Read { path: path.into(), source };
    let file_bytes = file.len().map_err(|e| read(e.into()))?;
    // All of a header with its extensions lies in the first cluster: at most 2 MiB, 64 KiB nearly always.
    let mut bytes = vec![0; file_bytes.min(64 << 10) as usize];
    file.read_bytes(0, &mut bytes).map_err(read)?;
    if bytes.len() >= 24 && bytes[..4] == MAGIC {
        let wanted = 1u64.checked_shl(Bytes(&bytes).u32(20)).unwrap_or(0).min(2 << 20).min(file_bytes);
        if wanted > bytes.len() as u64 {
            bytes.resize(wanted as usize, 0);
            file.read_bytes(0, &mut bytes).map_err(read)?;
        }
    }
    parse(&bytes, file_bytes, path)
}

pub fn parse(bytes: &[u8], file_bytes: u64, path: &Path) -> Result<Header, OpenError> {
    let corrupt = |why: &str| OpenError::Corrupt { path: path.into(), why: why.into() };
    let unsupported = |what: &str, remedy: &str| OpenError::Unsupported {
        path: path.into(),
        what: what.into(),
        remedy: remedy.into(),
    };
    if bytes.len() < V2_BYTES || bytes[..4] != MAGIC {
        let why = "it does not begin with qcow2's magic; if it is a raw image, say format=raw";
        return Err(OpenError::NoDisk { path: path.into(), why: why.into() });
    }
    let b = Bytes(bytes);
    let version = b.u32(4);
    if !(2..=3).contains(&version) {
        let remedy = "convert it with `qemu-img convert -O qcow2`";
        return Err(unsupported(&format!("version {version} of its format"), remedy));
    }
    let cluster_bits = b.u32(20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(corrupt("its cluster size is not between 512 bytes and 2 MiB"));
    }
    let crypt = b.u32(32);
    if crypt != 0 {
        let what = if crypt == 2 { "LUKS encryption" } else { "encryption" };
        return Err(unsupported(what, "decrypt it with `qemu-img convert`"));
    }
    let (mut incompatible, mut autoclear, mut refcount_order, mut header_bytes) = (0, 0, 4, V2_BYTES);
    if version == 3 {
        header_bytes = b.u32(100) as usize;
        if bytes.len() < V3_BYTES || !(V3_BYTES..=1 << cluster_bits).contains(&header_bytes) {
            return Err(corrupt("its header has an impossible length"));
        }
        (incompatible, autoclear, refcount_order) = (b.u64(72), b.u64(88), b.u32(96));
    }
    refuse_features(incompatible, &unsupported)?;
    if refcount_order > 6 {
        return Err(corrupt("its refcounts have more than 64 bits"));
    }
    let compression = match (incompatible & incompatible::COMPRESSION != 0, bytes.get(V3_BYTES)) {
        (false, _) => Compression::Deflate,
        (true, Some(1)) if header_bytes > V3_BYTES => Compression::Zstd,
        (true, _) => {
            return Err(unsupported("a compression that is not known here", "convert it with `qemu-img convert`"));
        }
    };
    let mut header = Header {
        version,
        cluster_bits,
        size: b.u64(24),
        l1_entries: b.u32(36).into(),
        l1_offset: b.u64(40),
        reftable_offset: b.u64(48),
        reftable_clusters: b.u32(56),
        refcount_order,
        snapshots: b.u32(60),
        snapshots_offset: b.u64(64),
        compression,
        dirty: incompatible & incompatible::DIRTY != 0,
        corrupt: incompatible & incompatible::CORRUPT != 0,
        autoclear,
        backing_name: None,
        backing_format: None,
    };
    check_tables(&header, file_bytes).map_err(|why| corrupt(&why))?;
    backing(&mut header, bytes, header_bytes).map_err(|why| corrupt(&why))?;
    Ok(header)
}

fn refuse_features(features: u64, unsupported: &impl Fn(&str, &str) -> OpenError) -> Result<(), OpenError> {
    use incompatible::*;
    let convert = "convert it with `qemu-img convert -O qcow2`";
    let known: [(u64, &str); 2] =
        [(DATA_FILE, "an external data file"), (EXTENDED_L2, "subclusters (extended L2 entries)")];
    for (bit, what) in known {
        if features & bit != 0 {
            return Err(unsupported(what, convert));
        }
    }
    let unknown = features & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
    if unknown != 0 {
        return Err(unsupported(&format!("incompatible feature bits {unknown:#x}"), convert));
    }
    Ok(())
}

/// That the tables lie in the file, aligned, large enough and not larger than we will hold.
fn check_tables(header: &Header, file_bytes: u64) -> Result<(), String> {
    let cluster = header.cluster_bytes();
    if header.size == 0 || !header.size.is_multiple_of(SECTOR_BYTES) {
        return Err(format!("its disk size of {} bytes is not a whole number of 512-byte sectors", header.size));
    }
    let needed = header.size.div_ceil(cluster).div_ceil(header.l2_entries());
    if header.l1_entries < needed {
        return Err(format!("its L1 table has {} entries where the disk needs {needed}", header.l1_entries));
    }
    let in_file = |what: &str, at: u64, bytes: u64| {
        if at == 0 || !at.is_multiple_of(cluster) {
            return Err(format!("its {what} is not at a cluster's start"));
        }
        match at.checked_add(bytes) {
            Some(end) if end <= file_bytes => Ok(()),
            _ => Err(format!("its {what} lies behind the end of the file, which may be truncated")),
        }
    };
    let l1_bytes = header.l1_entries * 8;
    let reftable_bytes = u64::from(header.reftable_clusters) * cluster;
    if l1_bytes > MAX_L1_BYTES {
        return Err("its L1 table is larger than 32 MiB".into());
    }
    if reftable_bytes > MAX_REFTABLE_BYTES || reftable_bytes == 0 {
        return Err("its refcount table is empty or larger than 8 MiB".into());
    }
    if header.snapshots > MAX_SNAPSHOTS {
        return Err(format!("it has {} snapshots", header.snapshots));
    }
    in_file("L1 table", header.l1_offset, l1_bytes)?;
    in_file("refcount table", header.reftable_offset, reftable_bytes)?;
    if header.snapshots > 0 {
        in_file("snapshot table", header.snapshots_offset, u64::from(header.snapshots) * 40)?;
    }
    Ok(())
}

/// The backing file's name, and its format among the header extensions.
fn backing(header: &mut Header, bytes: &[u8], header_bytes: usize) -> Result<(), String> {
    let b = Bytes(bytes);
    let (at, len) = (b.u64(8), b.u32(16));
    let mut extensions_end = bytes.len().min(header.cluster_bytes() as usize);
    if at != 0 && len != 0 {
        if len > MAX_BACKING_NAME {
            return Err("its backing file's name is longer than 1023 bytes".into());
        }
        let start = usize::try_from(at).unwrap_or(usize::MAX);
        let end = start.checked_add(len as usize);
        let name = end.and_then(|end| bytes.get(start..end)).filter(|_| end <= Some(extensions_end));
        let name = name.ok_or("its backing file's name lies outside the header")?;
        let name = std::str::from_utf8(name).map_err(|_| "its backing file's name is not UTF-8")?;
        if name.contains('\0') {
            return Err("its backing file's name has a zero byte in it".into());
        }
        header.backing_name = Some(name.into());
        extensions_end = extensions_end.min(start);
    }
    let mut at = header_bytes;
    while at + 8 <= extensions_end {
        let (kind, len) = (b.u32(at), b.u32(at + 4) as usize);
        if kind == extension::END {
            break;
        }
        let end = (at + 8).checked_add(len).filter(|end| *end <= extensions_end);
        let data = end.and_then(|end| bytes.get(at + 8..end)).ok_or("a header extension lies outside the header")?;
        if kind == extension::BACKING_FORMAT {
            header.backing_format = Some(String::from_utf8_lossy(data).into_owned());
        }
        at = (at + 8 + len).next_multiple_of(8);
    }
    Ok(())
}

/// The incompatible features of an open image that is clean.
pub fn without_dirty(compression: Compression) -> u64 {
    if compression == Compression::Zstd { incompatible::COMPRESSION } else { 0 }
}
