//! Refcounts: which clusters of the file are in use, and where new ones come from.
//!
//! Changes go to the file at once. A new refcount block or table is on stable storage before anything points to it.

use std::collections::HashMap;

use super::{
    header::{Header, field},
    l2::{OFFSET, read_table},
    metadata::Metadata,
};
use crate::{DiskError, file::HostFile};

/// Memory for refcount blocks; each covers some 32,768 clusters.
const CACHE_BYTES: u64 = 1 << 20;
/// What a header may say at most.
const MAX_TABLE_BYTES: u64 = 8 << 20;

#[derive(Debug)]
pub struct Refcounts {
    order: u32,
    cluster_bits: u32,
    table: Vec<u64>,
    table_offset: u64,
    blocks: HashMap<u64, Vec<u8>>,
    /// No cluster before this one is free.
    next: u64,
    /// No cluster from this one on was ever written.
    high: u64,
}

/// Clusters in a row that were free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub start: u64,
    pub count: u64,
    /// They were never written: they read as zeroes.
    pub fresh: bool,
}

/// Reads a refcount of `1 << order` bits.
fn get(block: &[u8], order: u32, index: u64) -> u64 {
    let bits = 1u64 << order;
    if order < 3 {
        let byte = block.get((index * bits / 8) as usize).copied().unwrap_or(0);
        return u64::from(byte) >> (index * bits % 8) & ((1 << bits) - 1);
    }
    let bytes = bits / 8;
    let at = (index * bytes) as usize;
    let value = block.get(at..at + bytes as usize).unwrap_or(&[]);
    value.iter().fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// Writes one and returns the bytes of the block that changed.
fn put(block: &mut [u8], order: u32, index: u64, value: u64) -> std::ops::Range<usize> {
    let bits = 1u64 << order;
    if order < 3 {
        let at = (index * bits / 8) as usize;
        let shift = index * bits % 8;
        let mask = ((1u64 << bits) - 1) << shift;
        if let Some(byte) = block.get_mut(at) {
            *byte = (u64::from(*byte) & !mask | value << shift & mask) as u8;
        }
        return at..at + 1;
    }
    let bytes = (bits / 8) as usize;
    let at = index as usize * bytes;
    if let Some(slot) = block.get_mut(at..at + bytes) {
        slot.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
    at..at + bytes
}

impl Refcounts {
    pub fn read(file: &HostFile, header: &Header) -> Result<Self, DiskError> {
        let entries = u64::from(header.reftable_clusters) * header.cluster_bytes() / 8;
        let table = read_table(file, header.reftable_offset, entries)?;
        let file_bytes = file.len()?;
        for entry in table.iter().filter(|e| **e != 0) {
            let good = entry.is_multiple_of(header.cluster_bytes())
                && entry.checked_add(header.cluster_bytes()).is_some_and(|end| end <= file_bytes);
            if !good {
                return Err(DiskError::Corrupt(format!("refcount block at {entry:#x} is not in the file")));
            }
        }
        Ok(Self {
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            table,
            table_offset: header.reftable_offset,
            blocks: HashMap::new(),
            next: 0,
            high: file_bytes.div_ceil(header.cluster_bytes()),
        })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters that one block counts.
    fn per_block(&self) -> u64 {
        (self.cluster() * 8) >> self.order
    }

    /// Clusters before this one are not given out, whatever their refcounts say.
    pub fn allocate_from(&mut self, cluster: u64) {
        self.next = cluster;
    }

    /// Clusters that existing blocks count, from `cluster` on.
    pub fn counted_from(&self, cluster: u64) -> Vec<std::ops::Range<u64>> {
        let per_block = self.per_block();
        let blocks = self.table.iter().enumerate().filter(|(_, entry)| **entry != 0);
        blocks
            .map(|(n, _)| (n as u64 * per_block).max(cluster)..(n as u64 + 1) * per_block)
            .filter(|range| !range.is_empty())
            .collect()
    }

    pub fn max(&self) -> u64 {
        if self.order == 6 { u64::MAX } else { (1 << (1 << self.order)) - 1 }
    }

    /// Clusters that the table can count.
    pub fn covered(&self) -> u64 {
        self.table.len() as u64 * self.per_block()
    }

    /// Offsets of all blocks.
    pub fn block_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.table.iter().copied().filter(|e| *e != 0)
    }

    /// Offset and length of the table.
    pub fn table_range(&self) -> (u64, u64) {
        (self.table_offset, self.table.len() as u64 * 8)
    }

    /// The block that counts cluster `block * per_block` and up; `None` where there is none.
    fn block(&mut self, file: &HostFile, block: u64) -> Result<Option<&mut Vec<u8>>, DiskError> {
        let offset = self.table.get(block as usize).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&block) {
            if self.blocks.len() as u64 * self.cluster() >= CACHE_BYTES.max(4 * self.cluster()) {
                self.blocks.clear();
            }
            let mut bytes = vec![0; self.cluster() as usize];
            file.read_bytes(offset, &mut bytes)?;
            self.blocks.insert(block, bytes);
        }
        Ok(self.blocks.get_mut(&block))
    }

    pub fn get(&mut self, file: &HostFile, cluster: u64) -> Result<u64, DiskError> {
        let (per_block, order) = (self.per_block(), self.order);
        let block = self.block(file, cluster / per_block)?;
        Ok(block.map_or(0, |block| get(block, order, cluster % per_block)))
    }

    /// Sets a refcount whose block exists.
    fn set(&mut self, file: &HostFile, cluster: u64, value: u64) -> Result<(), DiskError> {
        let (per_block, order) = (self.per_block(), self.order);
        let offset = self.table.get((cluster / per_block) as usize).copied().unwrap_or(0);
        let Some(block) = self.block(file, cluster / per_block)? else {
            return Err(DiskError::Corrupt(format!("no refcount block counts cluster {cluster:#x}")));
        };
        let changed = put(block, order, cluster % per_block, value);
        let bytes = block[changed.clone()].to_vec();
        if let Err(e) = file.write_bytes(offset + changed.start as u64, &bytes) {
            // What the file has is unknown now: read it again.
            self.blocks.remove(&(cluster / per_block));
            return Err(e);
        }
        Ok(())
    }

    /// Sets a refcount, making the block that counts it where there is none.
    pub fn force(&mut self, file: &HostFile, metadata: &Metadata, cluster: u64, value: u64) -> Result<(), DiskError> {
        let block = cluster / self.per_block();
        if value == 0 && self.table.get(block as usize).copied().unwrap_or(0) == 0 {
            return Ok(());
        }
        while block as usize >= self.table.len() {
            self.grow(file, metadata, block)?;
        }
        if self.table[block as usize] == 0 {
            let at = self.allocate(file, metadata, 1)?.start;
            // Allocating may have made just this block.
            if self.table[block as usize] == 0 {
                self.install_block(file, metadata, block, at)?;
            } else {
                self.set(file, at, 0)?;
            }
        }
        self.set(file, cluster, value)
    }

    /// One user less; whether the cluster is free now.
    pub fn release(&mut self, file: &HostFile, cluster: u64) -> Result<bool, DiskError> {
        let count = self.get(file, cluster)?;
        if count == 0 {
            return Err(DiskError::Corrupt(format!("cluster {cluster:#x} is used but counted as free")));
        }
        self.set(file, cluster, count - 1)?;
        if count == 1 {
            self.next = self.next.min(cluster);
        }
        Ok(count == 1)
    }

    /// Finds up to `count` free clusters in a row and counts them as used.
    pub fn allocate(&mut self, file: &HostFile, metadata: &Metadata, count: u64) -> Result<Run, DiskError> {
        loop {
            let (per_block, order) = (self.per_block(), self.order);
            if self.next >= OFFSET >> self.cluster_bits {
                return Err(DiskError::NoSpace);
            }
            let block = self.next / per_block;
            if block >= self.table.len() as u64 {
                self.grow(file, metadata, block)?;
                continue;
            }
            if self.table[block as usize] == 0 {
                let at = self.next;
                if !metadata.contains(at) {
                    self.install_block(file, metadata, block, at)?;
                }
                self.next = at + 1;
                continue;
            }
            let (first, next) = (block * per_block, self.next);
            let Some(bytes) = self.block(file, block)? else { continue };
            let free = |n: &u64| get(bytes, order, n - first) == 0 && !metadata.contains(*n);
            let end = first + per_block;
            let Some(start) = (next..end).find(free) else {
                self.next = end;
                continue;
            };
            let run = (start..end.min(start.saturating_add(count))).take_while(free).count() as u64;
            self.count_as_used(file, block, start - first, run)?;
            self.next = start + run;
            let fresh = start >= self.high;
            self.high = self.high.max(self.next);
            return Ok(Run { start, count: run, fresh });
        }
    }

    fn count_as_used(&mut self, file: &HostFile, block: u64, at: u64, run: u64) -> Result<(), DiskError> {
        let (order, offset) = (self.order, self.table[block as usize]);
        let Some(bytes) = self.block(file, block)? else { return Ok(()) };
        let first = put(bytes, order, at, 1).start;
        let end = (at..at + run).fold(first, |_, n| put(bytes, order, n, 1).end);
        let changed = bytes[first..end].to_vec();
        if let Err(e) = file.write_bytes(offset + first as u64, &changed) {
            self.blocks.remove(&block);
            return Err(e);
        }
        Ok(())
    }

    /// Makes cluster `at` the block that counts clusters from `block * per_block` on.
    fn install_block(&mut self, file: &HostFile, metadata: &Metadata, block: u64, at: u64) -> Result<(), DiskError> {
        let mut bytes = vec![0; self.cluster() as usize];
        if at / self.per_block() == block {
            put(&mut bytes, self.order, at % self.per_block(), 1);
        }
        let offset = at << self.cluster_bits;
        file.write_bytes(offset, &bytes)?;
        file.sync()?;
        file.write_bytes(self.table_offset + block * 8, &offset.to_be_bytes())?;
        metadata.insert(at);
        self.high = self.high.max(at + 1);
        self.table[block as usize] = offset;
        self.blocks.insert(block, bytes);
        Ok(())
    }

    /// Moves the table behind all that is counted and behind the file's end, larger, so that it has an entry for
    /// `block`. The new place is counted by blocks right behind it.
    fn grow(&mut self, file: &HostFile, metadata: &Metadata, block: u64) -> Result<(), DiskError> {
        let (cluster, per_block) = (self.cluster(), self.per_block());
        let start = self.covered().max(file.len()?.div_ceil(cluster));
        let old_clusters = self.table.len() as u64 * 8 / cluster;
        let mut clusters = old_clusters + old_clusters / 2 + 1;
        // Blocks that count the table and themselves, and a table that holds them: a few rounds settle it.
        let (first_block, blocks) = loop {
            let mut blocks = 1;
            while (start + clusters + blocks).div_ceil(per_block) - start / per_block > blocks {
                blocks += 1;
            }
            let needed = (start / per_block + blocks).max(block + 1).div_ceil(cluster / 8);
            if needed <= clusters {
                break (start / per_block, blocks);
            }
            clusters = needed;
        };
        if clusters * cluster > MAX_TABLE_BYTES {
            return Err(DiskError::NoSpace);
        }
        let mut table = self.table.clone();
        table.resize((clusters * cluster / 8) as usize, 0);
        let mut images = vec![vec![0; cluster as usize]; blocks as usize];
        for used in start..start + clusters + blocks {
            put(&mut images[(used / per_block - first_block) as usize], self.order, used % per_block, 1);
        }
        for (n, image) in images.iter().enumerate() {
            let at = (start + clusters + n as u64) << self.cluster_bits;
            let slot = &mut table[first_block as usize + n];
            if *slot != 0 {
                return Err(DiskError::Corrupt("a refcount block counts clusters behind the table".into()));
            }
            *slot = at;
            file.write_bytes(at, image)?;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        let offset = start << self.cluster_bits;
        file.write_bytes(offset, &bytes)?;
        file.sync()?;
        let mut fields = [0; 12];
        fields[..8].copy_from_slice(&offset.to_be_bytes());
        fields[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        file.write_bytes(field::REFTABLE, &fields)?;
        file.sync()?;
        (start..start + clusters + blocks).for_each(|c| metadata.insert(c));
        self.high = self.high.max(start + clusters + blocks);
        let old = self.table_offset >> self.cluster_bits;
        (self.table, self.table_offset) = (table, offset);
        for (n, image) in images.into_iter().enumerate() {
            self.blocks.insert(first_block + n as u64, image);
        }
        for cluster in old..old + old_clusters {
            metadata.remove(cluster);
            self.release(file, cluster)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_all_widths() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let per_block = (512 * 8) >> order;
            let max = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            for n in 0..per_block {
                put(&mut block, order, n, n.wrapping_mul(0x9e37_79b9_7f4a_7c15) & max);
            }
            for n in 0..per_block {
                assert_eq!(get(&block, order, n), n.wrapping_mul(0x9e37_79b9_7f4a_7c15) & max, "{order} {n}");
            }
        }
        // the manual's example of narrow counts: the lowest bits of a byte are the first
        let mut block = [0; 2];
        assert_eq!(put(&mut block, 0, 1, 1), 0..1);
        assert_eq!(put(&mut block, 3, 1, 7), 1..2);
        assert_eq!(block, [2, 7]);
    }
}
