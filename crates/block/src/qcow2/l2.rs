//! L2 tables: where each cluster of the disk is.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{DiskError, file::HostFile};

pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
pub const ZERO: u64 = 1 << 0;
/// Bits 9 to 55: a cluster's place in the file.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Not here: as the backing file has it.
    Unallocated,
    /// Zeroes; `offset` if a cluster is kept for it that is ours alone.
    Zero { offset: Option<u64> },
    /// `ours`: nobody else (no snapshot) uses the cluster, it may be overwritten.
    Data { offset: u64, ours: bool },
    /// Compressed, in `bytes` at most from `offset` on.
    Compressed { offset: u64, bytes: u64 },
}

/// Reads an entry; the text says what is wrong with it.
pub fn decode(entry: u64, cluster_bits: u32, version: u32, file_bytes: u64) -> Result<Mapping, String> {
    if entry & COMPRESSED != 0 {
        let split = 62 - (cluster_bits - 8);
        let offset = entry & ((1 << split) - 1);
        let sectors = (entry & !(COPIED | COMPRESSED)) >> split;
        let bytes = (sectors + 1) * 512 - (offset & 511);
        if offset == 0 || offset >= file_bytes {
            return Err(format!("compressed cluster at {offset:#x} lies behind the end of the file"));
        }
        return Ok(Mapping::Compressed { offset, bytes });
    }
    let offset = entry & OFFSET;
    if !offset.is_multiple_of(1 << cluster_bits) {
        return Err(format!("cluster at {offset:#x} is not aligned"));
    }
    if offset != 0 && offset >= file_bytes {
        return Err(format!("cluster at {offset:#x} lies behind the end of the file"));
    }
    let ours = entry & COPIED != 0;
    Ok(match (offset, version >= 3 && entry & ZERO != 0) {
        (0, true) => Mapping::Zero { offset: None },
        (_, true) => Mapping::Zero { offset: ours.then_some(offset) },
        (0, false) => Mapping::Unallocated,
        (_, false) => Mapping::Data { offset, ours },
    })
}

/// One table in memory.
#[derive(Debug)]
pub struct L2Table {
    /// Its place in the file.
    pub offset: u64,
    pub entries: Box<[AtomicU64]>,
    pub dirty: AtomicBool,
}

impl L2Table {
    pub fn new(offset: u64, entries: impl IntoIterator<Item = u64>) -> Self {
        let entries = entries.into_iter().map(AtomicU64::new).collect();
        Self { offset, entries, dirty: AtomicBool::new(false) }
    }

    pub fn read(file: &HostFile, offset: u64, entries: u64) -> Result<Self, DiskError> {
        let bytes = read_table(file, offset, entries)?;
        Ok(Self::new(offset, bytes))
    }

    pub fn get(&self, index: usize) -> u64 {
        self.entries.get(index).map_or(0, |e| e.load(Ordering::Acquire))
    }

    /// Changes an entry; the data that it points to must have been written.
    pub fn set(&self, index: usize, entry: u64) {
        if let Some(slot) = self.entries.get(index) {
            slot.store(entry, Ordering::Release);
            self.dirty.store(true, Ordering::SeqCst);
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|e| e.load(Ordering::Acquire).to_be_bytes()).collect()
    }
}

/// Big-endian 64-bit entries, as all tables are.
pub fn read_table(file: &HostFile, offset: u64, entries: u64) -> Result<Vec<u64>, DiskError> {
    let mut bytes = vec![0; entries as usize * 8];
    file.read_bytes(offset, &mut bytes).map_err(|e| match e {
        DiskError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            DiskError::Corrupt(format!("the table at {offset:#x} lies behind the end of the file"))
        }
        e => e,
    })?;
    Ok(bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
}

/// Tables in memory, by their index in the L1 table.
#[derive(Debug, Default)]
pub struct L2Cache {
    tables: RwLock<HashMap<u64, Arc<L2Table>>>,
}

/// Memory for L2 tables: with clusters of 64 KiB it covers 32 GiB of disk.
const CACHE_BYTES: usize = 4 << 20;

pub type Tables = HashMap<u64, Arc<L2Table>>;

impl L2Cache {
    pub fn get(&self, index: u64) -> Option<Arc<L2Table>> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner).get(&index).cloned()
    }

    /// All tables, for loading one that is not there: of two who come at once only one loads.
    pub fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there are more tables than the cache should hold.
    pub fn is_full(tables: &Tables, cluster_bytes: u64) -> bool {
        tables.len() > 1 && tables.len() as u64 * cluster_bytes >= CACHE_BYTES as u64
    }

    /// Drops tables that nobody uses and that the file has as they are, down to three quarters.
    pub fn evict(tables: &mut Tables, cluster_bytes: u64) {
        let keep = (CACHE_BYTES as u64 * 3 / 4 / cluster_bytes).max(1) as usize;
        let mut excess = tables.len().saturating_sub(keep);
        tables.retain(|_, table| {
            let used = Arc::strong_count(table) > 1 || table.dirty.load(Ordering::SeqCst);
            let drop = excess > 0 && !used;
            excess -= usize::from(drop);
            !drop
        });
    }

    pub fn dirty(&self) -> Vec<Arc<L2Table>> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.values().filter(|t| t.dirty.load(Ordering::SeqCst)).cloned().collect()
    }
}
