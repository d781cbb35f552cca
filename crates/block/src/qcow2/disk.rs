//! Reading and writing.

use std::{
    collections::BTreeSet,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use vireo_memory::GuestSlice;

use super::{
    check,
    compressed::{Recent, decompress},
    header::{Header, field, read_header, without_dirty},
    l2::{COMPRESSED, COPIED, L2Cache, L2Table, Mapping, OFFSET, ZERO, decode, read_table},
    metadata::{Metadata, read_snapshots},
    refcount::{Refcounts, Run},
};
use crate::{
    Disk, DiskError, OpenError, OpenOptions,
    buffers::{copy_in, fill_zero, in_range, total, window, writable},
    file::{FileId, HostFile},
    open::open_in_chain,
    ranges::RangeLocks,
};

/// Zeroes are written in pieces of this size where the format cannot say "zero".
const ZERO_CHUNK: u64 = 256 << 10;

pub struct Qcow2 {
    file: HostFile,
    header: Header,
    backing: Option<Arc<dyn Disk>>,
    read_only: bool,
    l1: Box<[AtomicU64]>,
    /// L1 entries that the file does not have yet. Held while an L2 table is added.
    l1_dirty: Mutex<BTreeSet<u64>>,
    cache: L2Cache,
    /// `None` in an image that is not written.
    refcounts: Option<Mutex<Refcounts>>,
    metadata: Metadata,
    /// Bytes in the file, or more where clusters were allocated but not filled yet.
    end: AtomicU64,
    /// Guest clusters whose mapping is being changed.
    ranges: RangeLocks,
    /// Held shared by each request, so that clusters are given back only when nobody uses them any more.
    gate: RwLock<()>,
    flushing: Mutex<()>,
    /// No longer mapped in memory, but perhaps on stable storage.
    freed: Mutex<Vec<Freed>>,
    /// Mapped nowhere.
    reclaimable: Mutex<Vec<Freed>>,
    any_reclaimable: AtomicBool,
    recent: Recent,
}

/// Something of the file that a table pointed to.
#[derive(Clone, Copy, Debug)]
enum Freed {
    /// What an L2 entry pointed to.
    Entry(u64),
    Table(u64),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What becomes of the file's clusters behind a range that is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unmap {
    /// Given back; what was never there need not become zero.
    Discard,
    /// Given back.
    Free,
    /// Kept, where they are ours.
    Keep,
}

/// A piece of a request: clusters `first..first + count` of one L2 table, all mapped alike and in a row.
struct Extent {
    mapping: Mapping,
    count: u64,
}

impl Qcow2 {
    pub fn open(file: HostFile, read_only: bool, chain: &mut Vec<FileId>) -> Result<Self, OpenError> {
        let path = file.path().to_owned();
        let failed = |source| match source {
            DiskError::Corrupt(why) => OpenError::Corrupt { path: path.clone(), why },
            source => OpenError::Read { path: path.clone(), source },
        };
        let header = read_header(&file)?;
        if header.corrupt && !read_only {
            let why = "it was marked so when something wrong was found in it".into();
            return Err(OpenError::Corrupt { path, why });
        }
        let backing = match header.backing_path(&path)? {
            None => None,
            Some((backing, format)) => {
                let options = OpenOptions { format, read_only: true };
                let disk = open_in_chain(&backing, options, chain).map_err(|source| OpenError::Backing {
                    path: path.clone(),
                    backing,
                    source: Box::new(source),
                })?;
                Some(disk)
            }
        };
        let l1 = read_table(&file, header.l1_offset, header.l1_entries).map_err(failed)?;
        let end = file.len().map_err(|e| failed(e.into()))?;
        let mut this = Self {
            l1: l1.iter().copied().map(AtomicU64::new).collect(),
            end: AtomicU64::new(end),
            file,
            header,
            backing,
            read_only,
            l1_dirty: Mutex::default(),
            cache: L2Cache::default(),
            refcounts: None,
            metadata: Metadata::default(),
            ranges: RangeLocks::default(),
            gate: RwLock::default(),
            flushing: Mutex::default(),
            freed: Mutex::default(),
            reclaimable: Mutex::default(),
            any_reclaimable: AtomicBool::new(false),
            recent: Recent::default(),
        };
        if !read_only {
            this.prepare_writing(&l1).map_err(failed)?;
        }
        Ok(this)
    }

    fn prepare_writing(&mut self, l1: &[u64]) -> Result<(), DiskError> {
        let mut refcounts = Refcounts::read(&self.file, &self.header)?;
        let (snapshots, snapshot_bytes) = read_snapshots(&self.file, &self.header)?;
        self.metadata = Metadata::collect(&self.file, &self.header, l1, &refcounts, &snapshots, snapshot_bytes)?;
        if self.header.dirty {
            check::repair(&self.file, &self.header, &mut refcounts, &self.metadata)?;
            self.file.sync()?;
            let features = without_dirty(self.header.compression);
            self.file.write_bytes(field::INCOMPATIBLE, &features.to_be_bytes())?;
        }
        if self.header.autoclear != 0 {
            // Features that hold only while nobody writes who does not know them, such as dirty bitmaps.
            self.file.write_bytes(field::AUTOCLEAR, &0u64.to_be_bytes())?;
        }
        self.refcounts = Some(Mutex::new(refcounts));
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn journal(&self) -> Vec<crate::file::Change> {
        self.file.journal.lock().unwrap().clone()
    }

    fn cluster(&self) -> u64 {
        self.header.cluster_bytes()
    }

    fn decode(&self, entry: u64) -> Result<Mapping, DiskError> {
        decode(entry, self.header.cluster_bits, self.header.version, self.end.load(Ordering::Acquire))
            .map_err(DiskError::Corrupt)
    }

    fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn l1_entry(&self, index: u64) -> u64 {
        self.l1.get(index as usize).map_or(0, |e| e.load(Ordering::Acquire))
    }

    /// The L2 table for reading; `None` where there is none.
    fn table(&self, index: u64) -> Result<Option<Arc<L2Table>>, DiskError> {
        if let Some(table) = self.cache.get(index) {
            return Ok(Some(table));
        }
        if self.l1_entry(index) & OFFSET == 0 {
            return Ok(None);
        }
        let (table, full) = {
            let mut tables = self.cache.write();
            if let Some(table) = tables.get(&index) {
                return Ok(Some(table.clone()));
            }
            if L2Cache::is_full(&tables, self.cluster()) {
                L2Cache::evict(&mut tables, self.cluster());
            }
            let offset = self.l1_entry(index) & OFFSET;
            if offset == 0 || !offset.is_multiple_of(self.cluster()) {
                return Err(DiskError::Corrupt(format!("L2 table {index} at {offset:#x} is not aligned")));
            }
            let table = Arc::new(L2Table::read(&self.file, offset, self.header.l2_entries())?);
            tables.insert(index, table.clone());
            (table, L2Cache::is_full(&tables, self.cluster()))
        };
        if full && !self.read_only {
            self.write_back()?;
        }
        Ok(Some(table))
    }

    /// The L2 table for writing: one that is ours alone.
    fn own_table(&self, index: u64) -> Result<Arc<L2Table>, DiskError> {
        let old = self.table(index)?;
        if let Some(table) = &old
            && self.is_own(index)
        {
            return Ok(table.clone());
        }
        let mut dirty = lock(&self.l1_dirty);
        if self.is_own(index) {
            drop(dirty);
            return self.table(index)?.ok_or_else(|| DiskError::Corrupt(format!("L2 table {index} vanished")));
        }
        let run = self.allocate(1)?;
        let offset = run.start << self.header.cluster_bits;
        let entries = (0..self.header.l2_entries() as usize).map(|n| old.as_ref().map_or(0, |old| old.get(n)));
        let table = Arc::new(L2Table::new(offset, entries));
        table.dirty.store(true, Ordering::SeqCst);
        self.metadata.insert(run.start);
        self.cache.write().insert(index, table.clone());
        if let Some(entry) = self.l1.get(index as usize) {
            entry.store(offset | COPIED, Ordering::Release);
        }
        dirty.insert(index);
        drop(dirty);
        if let Some(old) = old {
            lock(&self.freed).push(Freed::Table(old.offset >> self.header.cluster_bits));
        }
        let full = {
            let mut tables = self.cache.write();
            L2Cache::is_full(&tables, self.cluster()) && {
                L2Cache::evict(&mut tables, self.cluster());
                L2Cache::is_full(&tables, self.cluster())
            }
        };
        if full {
            self.write_back()?;
        }
        Ok(table)
    }

    /// The L1 entry points to a table that no snapshot uses.
    fn is_own(&self, index: u64) -> bool {
        let entry = self.l1_entry(index);
        entry & COPIED != 0 && entry & OFFSET != 0
    }

    fn allocate(&self, count: u64) -> Result<Run, DiskError> {
        let refcounts = self.refcounts.as_ref().ok_or(DiskError::ReadOnly)?;
        let run = lock(refcounts).allocate(&self.file, &self.metadata, count)?;
        self.end.fetch_max((run.start + run.count) << self.header.cluster_bits, Ordering::AcqRel);
        Ok(run)
    }

    /// Gives clusters back that were never mapped.
    fn give_back(&self, run: Run) {
        if let Some(refcounts) = &self.refcounts {
            let mut refcounts = lock(refcounts);
            for cluster in run.start..run.start + run.count {
                let _ = refcounts.release(&self.file, cluster);
            }
        }
    }

    /// Where a byte of the disk is looked up: L1 index, L2 index, offset in the cluster.
    fn place(&self, offset: u64) -> (u64, u64, u64) {
        let cluster = offset >> self.header.cluster_bits;
        (cluster / self.header.l2_entries(), cluster % self.header.l2_entries(), offset & (self.cluster() - 1))
    }

    /// How many clusters of the L2 table that `offset` is in a request of `len` bytes touches.
    fn clusters(&self, offset: u64, len: u64) -> u64 {
        let (_, first, inner) = self.place(offset);
        (inner + len).div_ceil(self.cluster()).min(self.header.l2_entries() - first)
    }

    /// Maps at most `most` clusters from entry `first` on.
    fn extent(&self, table: Option<&L2Table>, first: u64, most: u64) -> Result<Extent, DiskError> {
        let Some(table) = table else { return Ok(Extent { mapping: Mapping::Unallocated, count: most }) };
        let mapping = self.decode(table.get(first as usize))?;
        let mut count = 1;
        while count < most {
            let next = self.decode(table.get((first + count) as usize));
            let goes_on = match (mapping, next) {
                (Mapping::Unallocated, Ok(Mapping::Unallocated)) => true,
                (Mapping::Zero { .. }, Ok(Mapping::Zero { .. })) => true,
                (Mapping::Data { offset, ours }, Ok(Mapping::Data { offset: o, ours: u })) => {
                    u == ours && o == offset + count * self.cluster()
                }
                _ => false,
            };
            if !goes_on {
                break;
            }
            count += 1;
        }
        Ok(Extent { mapping, count })
    }

    fn read_inner(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        let len = total(buffers);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (l1, first, inner) = self.place(at);
            let table = self.table(l1)?;
            let extent = self.extent(table.as_deref(), first, self.clusters(at, len - done))?;
            let part = (extent.count * self.cluster() - inner).min(len - done);
            let parts = window(buffers, done, part);
            match extent.mapping {
                Mapping::Unallocated => self.read_backing(at, &parts)?,
                Mapping::Zero { .. } => fill_zero(&parts),
                Mapping::Data { offset, .. } => self.file.read_or_zero(offset + inner, &parts)?,
                Mapping::Compressed { offset, bytes } => {
                    let entry = table.as_ref().map_or(0, |t| t.get(first as usize));
                    let data = self.decompressed(entry, offset, bytes)?;
                    copy_in(&parts, data.get(inner as usize..).unwrap_or(&[]));
                }
            }
            done += part;
        }
        Ok(())
    }

    /// The backing file may be shorter: what it does not have is zeroes.
    fn read_backing(&self, at: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        let Some(backing) = &self.backing else {
            fill_zero(buffers);
            return Ok(());
        };
        let have = backing.size_bytes().saturating_sub(at).min(total(buffers));
        if have > 0 {
            backing.read(at, &window(buffers, 0, have))?;
        }
        fill_zero(&window(buffers, have, u64::MAX));
        Ok(())
    }

    fn decompressed(&self, entry: u64, offset: u64, bytes: u64) -> Result<Arc<[u8]>, DiskError> {
        if let Some(data) = self.recent.get(entry) {
            return Ok(data);
        }
        // At most two clusters, by the entry's width; the file may end before.
        let have = self.end.load(Ordering::Acquire).saturating_sub(offset).min(bytes);
        let mut packed = vec![0; have as usize];
        let slice = [GuestSlice::from_host(&mut packed)];
        self.file.read_or_zero(offset, &slice)?;
        let data = decompress(self.header.compression, &packed, self.cluster() as usize)
            .map_err(|why| DiskError::Corrupt(format!("compressed cluster at {offset:#x}: {why}")))?;
        let data: Arc<[u8]> = data.into();
        self.recent.put(entry, data.clone());
        Ok(data)
    }

    fn write_inner(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        let len = total(buffers);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (l1, first, inner) = self.place(at);
            let most = self.clusters(at, len - done);
            let table = if self.is_own(l1) { self.table(l1)? } else { None };
            let extent = self.extent(table.as_deref(), first, most)?;
            done += match (table, extent.mapping) {
                (Some(_), Mapping::Data { offset: host, ours: true }) => {
                    let part = (extent.count * self.cluster() - inner).min(len - done);
                    self.write_in_place(host + inner, &window(buffers, done, part))?;
                    part
                }
                _ => self.write_new(at, &window(buffers, done, len - done))?,
            };
        }
        Ok(())
    }

    fn write_in_place(&self, host: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        if self.metadata.overlaps(host, total(buffers), self.header.cluster_bits) {
            return Err(DiskError::Corrupt(format!("the cluster at {host:#x} holds data and a table")));
        }
        self.file.write(host, buffers)
    }

    /// Writes as much as goes into new clusters in a row; returns how many bytes. Data first, then the mapping.
    fn write_new(&self, at: u64, buffers: &[GuestSlice<'_>]) -> Result<u64, DiskError> {
        let len = total(buffers);
        let (l1, first, inner) = self.place(at);
        let most = self.clusters(at, len);
        let guest = at >> self.header.cluster_bits;
        let _range = self.ranges.lock(guest, guest + most);
        let table = self.own_table(l1)?;
        let extent = self.extent(Some(&table), first, most)?;
        let bytes = |count: u64| (count * self.cluster() - inner).min(len);
        match extent.mapping {
            // Someone else was first.
            Mapping::Data { offset, ours: true } => {
                self.write_in_place(offset + inner, &window(buffers, 0, bytes(extent.count)))?;
                return Ok(bytes(extent.count));
            }
            Mapping::Zero { offset: Some(host) } => {
                if self.metadata.overlaps(host, 1, self.header.cluster_bits) {
                    return Err(DiskError::Corrupt(format!("the cluster at {host:#x} is kept and holds a table")));
                }
                let run = Run { start: host >> self.header.cluster_bits, count: 1, fresh: false };
                self.fill(run, at, &window(buffers, 0, bytes(1)))?;
                table.set(first as usize, host | COPIED);
                return Ok(bytes(1));
            }
            _ => {}
        }
        // Up to the next cluster that can be written in place or is kept.
        let is_new = |n: u64| {
            let mapping = self.decode(table.get((first + n) as usize))?;
            let kept = matches!(mapping, Mapping::Data { ours: true, .. } | Mapping::Zero { offset: Some(_) });
            Ok::<_, DiskError>(!kept)
        };
        let mut count = 1;
        while count < most && is_new(count)? {
            count += 1;
        }
        let run = self.allocate(count)?;
        let part = bytes(run.count);
        if let Err(e) = self.fill(run, at, &window(buffers, 0, part)) {
            self.give_back(run);
            return Err(e);
        }
        let mut freed = Vec::new();
        for n in 0..run.count {
            let slot = (first + n) as usize;
            freed.extend(Some(table.get(slot)).filter(|old| *old & (OFFSET | COMPRESSED) != 0));
            table.set(slot, (run.start + n) << self.header.cluster_bits | COPIED);
        }
        lock(&self.freed).extend(freed.into_iter().map(Freed::Entry));
        Ok(part)
    }

    /// Fills clusters of the file with what the disk has there, overlaid with `buffers` at `at`.
    fn fill(&self, run: Run, at: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        let host = run.start << self.header.cluster_bits;
        let inner = at & (self.cluster() - 1);
        let end = at + total(buffers);
        let run_end = at - inner + run.count * self.cluster();
        let (mut head, mut tail) = (vec![0; inner as usize], vec![0; (run_end - end) as usize]);
        let head_zero = self.read_old(at - inner, &mut head)?;
        let tail_zero = self.read_old(end, &mut tail)?;
        if run.fresh && head_zero && tail_zero {
            // The file has zeroes there already.
            return self.file.write(host + inner, buffers);
        }
        let mut all = Vec::with_capacity(buffers.len() + 2);
        all.push(GuestSlice::from_host(&mut head));
        all.extend_from_slice(buffers);
        all.push(GuestSlice::from_host(&mut tail));
        self.file.write(host, &all)
    }

    /// Reads the part of one cluster that a write leaves; whether it is zeroes for sure. Behind the disk's end are
    /// zeroes, too.
    fn read_old(&self, at: u64, out: &mut [u8]) -> Result<bool, DiskError> {
        let have = self.header.size.saturating_sub(at).min(out.len() as u64) as usize;
        if have == 0 {
            return Ok(true);
        }
        let (l1, first, _) = self.place(at);
        let mapping = self.extent(self.table(l1)?.as_deref(), first, 1)?.mapping;
        let zero = match mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => self.backing.as_ref().is_none_or(|b| b.size_bytes() <= at),
            _ => false,
        };
        if !zero {
            self.read_inner(at, &[GuestSlice::from_host(&mut out[..have])])?;
        }
        Ok(zero)
    }

    /// Maps whole clusters as zero, or as nothing where that reads as zero.
    fn unmap(&self, cluster: u64, count: u64, how: Unmap) -> Result<(), DiskError> {
        let mut done = 0;
        while done < count {
            let guest = cluster + done;
            let (l1, first) = (guest / self.header.l2_entries(), guest % self.header.l2_entries());
            let most = (count - done).min(self.header.l2_entries() - first);
            let _range = self.ranges.lock(guest, guest + most);
            done += most;
            let covered = self.backing.as_ref().map_or(0, |b| b.size_bytes()) > guest << self.header.cluster_bits;
            if (how == Unmap::Discard || !covered) && self.table(l1)?.is_none() {
                continue;
            }
            let table = self.own_table(l1)?;
            for slot in first..first + most {
                self.unmap_one(&table, slot as usize, how)?;
            }
        }
        Ok(())
    }

    fn unmap_one(&self, table: &L2Table, slot: usize, how: Unmap) -> Result<(), DiskError> {
        let old = table.get(slot);
        let free = how != Unmap::Keep;
        let nothing = if self.backing.is_some() { ZERO } else { 0 };
        let new = match self.decode(old)? {
            Mapping::Unallocated if how == Unmap::Discard => old,
            Mapping::Unallocated => nothing,
            Mapping::Zero { offset: None } if old & OFFSET == 0 => old,
            Mapping::Zero { offset: Some(_) } if !free => old,
            Mapping::Data { ours: true, .. } if !free && self.header.version >= 3 => old | ZERO,
            Mapping::Data { offset, ours: true } if !free => {
                if self.metadata.overlaps(offset, 1, self.header.cluster_bits) {
                    return Err(DiskError::Corrupt(format!("the cluster at {offset:#x} holds data and a table")));
                }
                return self.file.zero(offset, self.cluster(), false);
            }
            _ => nothing,
        };
        if new != old {
            table.set(slot, new);
            if new & OFFSET == 0 && old & (OFFSET | COMPRESSED) != 0 {
                lock(&self.freed).push(Freed::Entry(old));
            }
        }
        Ok(())
    }

    /// Version 2 cannot say "zero" over a backing file.
    fn can_say_zero(&self) -> bool {
        self.header.version >= 3 || self.backing.is_none()
    }

    fn write_zero_bytes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let mut zeroes = vec![0; len.min(ZERO_CHUNK) as usize];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZERO_CHUNK) as usize;
            self.write_inner(offset + done, &[GuestSlice::from_host(&mut zeroes[..part])])?;
            done += part as u64;
        }
        Ok(())
    }

    /// Zeroes within one cluster, unless it reads as zeroes already.
    fn zero_edge(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let (l1, first, _) = self.place(offset);
        let mapping = self.extent(self.table(l1)?.as_deref(), first, 1)?.mapping;
        let zero = matches!(mapping, Mapping::Zero { .. })
            || (mapping == Mapping::Unallocated && self.backing.as_ref().is_none_or(|b| b.size_bytes() <= offset));
        if len == 0 || zero { Ok(()) } else { self.write_zero_bytes(offset, len) }
    }

    /// The whole clusters of a range: the first, and how many. The disk's last one counts as whole.
    fn whole_clusters(&self, offset: u64, len: u64) -> (u64, u64) {
        let end = offset + len;
        let first = offset.div_ceil(self.cluster());
        let last = if end == self.header.size { end.div_ceil(self.cluster()) } else { end / self.cluster() };
        (first, last.saturating_sub(first))
    }

    /// Brings all tables to the file: see the module's words on the order.
    fn write_back(&self) -> Result<(), DiskError> {
        let _one = lock(&self.flushing);
        // What is taken first was changed in memory before what is taken later.
        let freed = mem::take(&mut *lock(&self.freed));
        let l1 = mem::take(&mut *lock(&self.l1_dirty));
        let l1_values: Vec<(u64, u64)> = l1.iter().map(|n| (*n, self.l1_entry(*n))).collect();
        let tables = self.cache.dirty();
        let images: Vec<Vec<u8>> = tables
            .iter()
            .map(|table| {
                table.dirty.store(false, Ordering::SeqCst);
                table.bytes()
            })
            .collect();
        let written = self.write_tables(&tables, &images, &l1_values);
        match written {
            Ok(()) if freed.is_empty() => {}
            Ok(()) => {
                lock(&self.reclaimable).extend(freed);
                self.any_reclaimable.store(true, Ordering::Release);
            }
            Err(_) => {
                tables.iter().for_each(|table| table.dirty.store(true, Ordering::SeqCst));
                lock(&self.l1_dirty).extend(l1);
                lock(&self.freed).extend(freed);
            }
        }
        written
    }

    fn write_tables(&self, tables: &[Arc<L2Table>], images: &[Vec<u8>], l1: &[(u64, u64)]) -> Result<(), DiskError> {
        self.file.sync()?;
        if tables.is_empty() && l1.is_empty() {
            return Ok(());
        }
        for (table, image) in tables.iter().zip(images) {
            self.file.write_bytes(table.offset, image)?;
        }
        if !l1.is_empty() {
            self.file.sync()?;
            for (index, value) in l1 {
                self.file.write_bytes(self.header.l1_offset + index * 8, &value.to_be_bytes())?;
            }
        }
        self.file.sync()
    }

    /// Gives clusters back that nothing points to. Called outside any request.
    fn reclaim(&self) {
        if !self.any_reclaimable.swap(false, Ordering::AcqRel) {
            return;
        }
        let list = mem::take(&mut *lock(&self.reclaimable));
        // Requests that began before are over once this is had.
        drop(self.gate.write());
        let Some(refcounts) = &self.refcounts else { return };
        let mut refcounts = lock(refcounts);
        for freed in list {
            for (cluster, table) in self.clusters_of(freed) {
                // In a damaged image guest data may have been "in" a table: that stays.
                if !table && self.metadata.contains(cluster) {
                    continue;
                }
                // A cluster that is counted wrongly leaks at worst.
                if let Ok(true) = refcounts.release(&self.file, cluster) {
                    self.metadata.remove(cluster);
                    let _ = self.file.punch(cluster << self.header.cluster_bits, self.cluster());
                }
            }
        }
    }

    /// Clusters of the file behind something freed, and whether they are a table's.
    fn clusters_of(&self, freed: Freed) -> Vec<(u64, bool)> {
        match freed {
            Freed::Table(cluster) => vec![(cluster, true)],
            Freed::Entry(entry) => entry_clusters(entry, self.header.cluster_bits).map(|c| (c, false)).collect(),
        }
    }
}

/// Clusters of the file that an L2 entry uses.
pub fn entry_clusters(entry: u64, cluster_bits: u32) -> std::ops::Range<u64> {
    if entry & COMPRESSED == 0 {
        let cluster = (entry & OFFSET) >> cluster_bits;
        return cluster..cluster + u64::from(cluster != 0);
    }
    match decode(entry, cluster_bits, 3, u64::MAX) {
        Ok(Mapping::Compressed { offset, bytes }) => offset >> cluster_bits..((offset + bytes - 1) >> cluster_bits) + 1,
        _ => 0..0,
    }
}

impl Disk for Qcow2 {
    fn size_bytes(&self) -> u64 {
        self.header.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        in_range(self, offset, total(buffers))?;
        let _gate = self.enter();
        self.read_inner(offset, buffers)
    }

    fn write(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), DiskError> {
        writable(self, offset, total(buffers))?;
        self.reclaim();
        let _gate = self.enter();
        self.write_inner(offset, buffers)
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.write_back()?;
        self.reclaim();
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        writable(self, offset, len)?;
        if !self.can_say_zero() {
            return Ok(());
        }
        self.reclaim();
        let _gate = self.enter();
        let (first, count) = self.whole_clusters(offset, len);
        self.unmap(first, count, Unmap::Discard)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        writable(self, offset, len)?;
        self.reclaim();
        let _gate = self.enter();
        let (first, count) = self.whole_clusters(offset, len);
        if !self.can_say_zero() {
            return self.write_zero_bytes(offset, len);
        }
        if count == 0 {
            // Within one cluster, or at the border of two.
            let border = (offset + len) & !(self.cluster() - 1);
            let head = border.saturating_sub(offset).min(len);
            self.zero_edge(offset, head)?;
            return self.zero_edge(offset + head, len - head);
        }
        let (start, end) = (first * self.cluster(), (first + count) * self.cluster());
        self.zero_edge(offset, start - offset)?;
        self.unmap(first, count, if unmap { Unmap::Free } else { Unmap::Keep })?;
        if offset + len > end { self.zero_edge(end, offset + len - end) } else { Ok(()) }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // Who wants to know of errors flushes before.
        let _ = self.flush();
    }
}
