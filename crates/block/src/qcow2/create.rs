//! Making new images.

use std::{fs, path::Path};

use super::header::{MAGIC, V3_BYTES, extension};
use crate::{Format, OpenError, SECTOR_BYTES};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// log2 of 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// What an L1 table of 32 MiB can map.
const MAX_SIZE: u64 = (32 << 20) / 8 * (CLUSTER / 8) * CLUSTER;

/// Makes an empty qcow2 image (version 3, clusters of 64 KiB) of `size` bytes, or one that shows `backing` until it
/// is written. A relative backing path counts from where the new image lies. The file must not exist yet, and
/// nothing is left of it after an error.
pub fn create_qcow2(path: &Path, size: u64, backing: Option<(&Path, Format)>) -> Result<(), OpenError> {
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || size > MAX_SIZE {
        let why = format!("{size} bytes is no possible disk size (a multiple of 512 up to {MAX_SIZE})");
        return Err(OpenError::NoDisk { path: path.into(), why });
    }
    let image = layout(path, size, backing)?;
    let failed = |source| OpenError::Open { path: path.into(), read_only: false, source };
    let made = fs::OpenOptions::new().write(true).create_new(true).open(path);
    made.map_err(failed)?;
    fs::write(path, image).map_err(|source| {
        let _ = fs::remove_file(path);
        failed(source)
    })
}

/// The whole file: header, refcount table, one refcount block, L1 table.
fn layout(path: &Path, size: u64, backing: Option<(&Path, Format)>) -> Result<Vec<u8>, OpenError> {
    let l1_entries = size.div_ceil(CLUSTER).div_ceil(CLUSTER / 8);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    let clusters = 3 + l1_clusters;
    let mut image = vec![0; (clusters * CLUSTER) as usize];
    let mut put = |at: u64, bytes: &[u8]| image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    for (at, value) in
        [(4, 3), (20, CLUSTER_BITS), (36, l1_entries as u32), (56, 1), (96, REFCOUNT_ORDER), (100, V3_BYTES as u32 + 8)]
    {
        put(at, &value.to_be_bytes());
    }
    for (at, value) in [(24, size), (40, 3 * CLUSTER), (48, CLUSTER)] {
        put(at, &value.to_be_bytes());
    }
    put(CLUSTER, &(2 * CLUSTER).to_be_bytes());
    for used in 0..clusters {
        put(2 * CLUSTER + 2 * used, &1u16.to_be_bytes());
    }
    let Some((backing, format)) = backing else { return Ok(image) };
    let name = backing.to_str().filter(|name| name.len() <= 1023 && !name.contains('\0') && !name.is_empty());
    let Some(name) = name else {
        let why = "its backing file's name must be UTF-8 of at most 1023 bytes".into();
        return Err(OpenError::NoDisk { path: path.into(), why });
    };
    // A name with a colon would be taken for a protocol.
    let name = if name.contains(':') { format!("file:{name}") } else { name.into() };
    let format = format.to_string();
    let at = V3_BYTES as u64 + 8;
    put(at, &extension::BACKING_FORMAT.to_be_bytes());
    put(at + 4, &(format.len() as u32).to_be_bytes());
    put(at + 8, format.as_bytes());
    let name_at = at + 8 + (format.len() as u64).next_multiple_of(8) + 8;
    put(name_at, name.as_bytes());
    put(8, &name_at.to_be_bytes());
    put(16, &(name.len() as u32).to_be_bytes());
    Ok(image)
}
