//! Clusters of the file that hold tables. Guest data must never land in one of them, whatever a damaged or hostile
//! image says.

use std::{
    collections::HashSet,
    sync::{PoisonError, RwLock},
};

use super::{header::Header, l2::OFFSET, refcount::Refcounts};
use crate::{DiskError, file::HostFile};

#[derive(Debug, Default)]
pub struct Metadata(RwLock<HashSet<u64>>);

impl Metadata {
    pub fn contains(&self, cluster: u64) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&cluster)
    }

    pub fn insert(&self, cluster: u64) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(cluster);
    }

    pub fn remove(&self, cluster: u64) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&cluster);
    }

    /// Whether any of `bytes` bytes from `offset` on is a table's.
    pub fn overlaps(&self, offset: u64, bytes: u64, cluster_bits: u32) -> bool {
        let set = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let last = offset.saturating_add(bytes.saturating_sub(1)) >> cluster_bits;
        (offset >> cluster_bits..=last).any(|cluster| set.contains(&cluster))
    }

    /// Collects all tables of an image; two in one place are an error.
    pub fn collect(
        file: &HostFile,
        header: &Header,
        l1: &[u64],
        refcounts: &Refcounts,
        snapshots: &[Snapshot],
        snapshot_bytes: u64,
    ) -> Result<Self, DiskError> {
        let mut set = HashSet::new();
        let cluster = header.cluster_bytes();
        let file_bytes = file.len()?;
        let mut add = |what: &str, at: u64, bytes: u64| {
            if !at.is_multiple_of(cluster) || at.checked_add(bytes).is_none_or(|end| end > file_bytes) {
                return Err(DiskError::Corrupt(format!("the {what} at {at:#x} is not in the file")));
            }
            for n in at / cluster..(at + bytes).div_ceil(cluster) {
                if !set.insert(n) {
                    return Err(DiskError::Corrupt(format!("the {what} at {at:#x} overlaps another table")));
                }
            }
            Ok(())
        };
        add("header", 0, 1)?;
        add("L1 table", header.l1_offset, header.l1_entries * 8)?;
        let (at, bytes) = refcounts.table_range();
        add("refcount table", at, bytes)?;
        for at in refcounts.block_offsets() {
            add("refcount block", at, cluster)?;
        }
        for entry in l1.iter().map(|e| e & OFFSET).filter(|e| *e != 0) {
            add("L2 table", entry, cluster)?;
        }
        if snapshot_bytes > 0 {
            add("snapshot table", header.snapshots_offset, snapshot_bytes)?;
        }
        for snapshot in snapshots.iter().filter(|s| s.l1_entries > 0) {
            add("snapshot's L1 table", snapshot.l1_offset, snapshot.l1_entries * 8)?;
        }
        Ok(Self(RwLock::new(set)))
    }
}

/// What matters of an internal snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub l1_offset: u64,
    pub l1_entries: u64,
}

/// As QEMU: more is not believed.
const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
const MAX_SNAPSHOT_L1_BYTES: u64 = 32 << 20;

/// Reads the table of internal snapshots; also how many bytes it has.
pub fn read_snapshots(file: &HostFile, header: &Header) -> Result<(Vec<Snapshot>, u64), DiskError> {
    const FIXED: u64 = 40;
    let mut all = Vec::new();
    let (mut at, mut end) = (header.snapshots_offset, header.snapshots_offset);
    for _ in 0..header.snapshots {
        let mut entry = [0; FIXED as usize];
        file.read_bytes(at, &mut entry).map_err(|e| match e {
            DiskError::Io(_) => DiskError::Corrupt("its snapshot table ends too early".into()),
            e => e,
        })?;
        let number =
            |from: usize, bytes: usize| entry[from..from + bytes].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let (l1_offset, l1_entries) = (number(0, 8), number(8, 4));
        let extra = number(36, 4) + number(12, 2) + number(14, 2);
        end = at.checked_add(FIXED + extra).ok_or_else(|| DiskError::Corrupt("a snapshot has no end".into()))?;
        // Each begins at a multiple of 8; the last one may end with the file.
        at = end.next_multiple_of(8);
        if at - header.snapshots_offset > MAX_SNAPSHOT_TABLE_BYTES || l1_entries * 8 > MAX_SNAPSHOT_L1_BYTES {
            return Err(DiskError::Corrupt("its snapshot table is impossibly large".into()));
        }
        all.push(Snapshot { l1_offset, l1_entries });
    }
    Ok((all, end - header.snapshots_offset))
}
