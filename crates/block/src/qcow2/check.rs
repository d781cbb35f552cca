//! Whether refcounts agree with what is used, and setting them right after a crash with lazy refcounts.

use std::{collections::HashMap, path::Path};

use super::{
    disk::entry_clusters,
    header::{Header, read_header},
    l2::{COMPRESSED, COPIED, OFFSET, read_table},
    metadata::{Metadata, read_snapshots},
    refcount::Refcounts,
};
use crate::{DiskError, OpenError, file::HostFile};

/// Clusters that a check keeps count of: 4 bytes each.
const MAX_CLUSTERS: u64 = 32 << 20;
const MAX_MESSAGES: usize = 10;

/// What [`check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Clusters of the file that are in use.
    pub used: u64,
    /// Clusters that are counted as used more often than they are: lost space, no harm.
    pub leaked: u64,
    /// Things that will lose data.
    pub corruptions: u64,
    /// The first few of them, in words.
    pub messages: Vec<String>,
    /// Refcounts may be behind: the next opening for writing sets them right.
    pub dirty: bool,
}

impl CheckReport {
    fn corrupt(&mut self, message: impl FnOnce() -> String) {
        self.corruptions += 1;
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(message());
        }
    }
}

/// Checks a qcow2 image's tables. Data are not read; nothing is changed.
pub fn check(path: &Path) -> Result<CheckReport, OpenError> {
    let file = HostFile::open(path, true)?;
    let header = read_header(&file)?;
    let failed = |source| match source {
        DiskError::Corrupt(why) => OpenError::Corrupt { path: path.into(), why },
        source => OpenError::Read { path: path.into(), source },
    };
    inspect(&file, &header).map_err(failed)
}

fn inspect(file: &HostFile, header: &Header) -> Result<CheckReport, DiskError> {
    let mut report = CheckReport { dirty: header.dirty, ..CheckReport::default() };
    let mut refcounts = Refcounts::read(file, header)?;
    let uses = Uses::count(file, header, &refcounts, &mut report)?;
    report.used = uses.counts.iter().filter(|n| **n > 0).count() as u64;
    for (cluster, uses) in uses.counts.iter().enumerate() {
        let counted = refcounts.get(file, cluster as u64)?;
        if counted < u64::from(*uses) {
            report.corrupt(|| format!("cluster {cluster:#x} is used {uses} times but its refcount is {counted}"));
        } else if counted > u64::from(*uses) {
            report.leaked += 1;
        }
    }
    for range in refcounts.counted_from(uses.counts.len() as u64) {
        for cluster in range {
            report.leaked += u64::from(refcounts.get(file, cluster)? > 0);
        }
    }
    for (what, entry) in uses.copied {
        let cluster = (entry & OFFSET) >> header.cluster_bits;
        if (entry & COPIED != 0) != (refcounts.get(file, cluster)? == 1) {
            report.corrupt(|| format!("{what} {entry:#x} disagrees with its cluster's refcount about sharing"));
        }
    }
    Ok(report)
}

/// Sets all refcounts to what they should be.
pub fn repair(
    file: &HostFile,
    header: &Header,
    refcounts: &mut Refcounts,
    metadata: &Metadata,
) -> Result<(), DiskError> {
    let mut report = CheckReport::default();
    let uses = Uses::count(file, header, refcounts, &mut report)?;
    if let Some(message) = report.messages.first() {
        return Err(DiskError::Corrupt(format!("it was not closed properly and cannot be repaired: {message}")));
    }
    let end = uses.counts.len() as u64;
    refcounts.allocate_from(end);
    for range in refcounts.counted_from(end) {
        for cluster in range {
            if refcounts.get(file, cluster)? != 0 {
                refcounts.force(file, metadata, cluster, 0)?;
            }
        }
    }
    for (cluster, uses) in uses.counts.iter().enumerate() {
        let (cluster, uses) = (cluster as u64, u64::from(*uses));
        if uses > refcounts.max() {
            return Err(DiskError::Corrupt(format!("cluster {cluster:#x} is used more often than can be counted")));
        }
        if refcounts.get(file, cluster)? != uses {
            refcounts.force(file, metadata, cluster, uses)?;
        }
    }
    refcounts.allocate_from(0);
    Ok(())
}

/// How often each cluster of the file is used.
struct Uses {
    counts: Vec<u32>,
    /// Entries of the active tables that say whether a cluster is shared.
    copied: Vec<(&'static str, u64)>,
}

impl Uses {
    /// Reads every table once, however many point to it.
    fn count(
        file: &HostFile,
        header: &Header,
        refcounts: &Refcounts,
        report: &mut CheckReport,
    ) -> Result<Self, DiskError> {
        let cluster = header.cluster_bytes();
        let clusters = file.len()?.div_ceil(cluster);
        if clusters > MAX_CLUSTERS {
            return Err(DiskError::Corrupt(format!("its {clusters} clusters are too many to check here")));
        }
        let mut this = Self { counts: vec![0; clusters as usize], copied: Vec::new() };
        let (snapshots, snapshot_bytes) = read_snapshots(file, header)?;
        this.add(report, "header", 0, cluster, cluster, 1);
        this.add(report, "L1 table", header.l1_offset, header.l1_entries * 8, cluster, 1);
        let (at, bytes) = refcounts.table_range();
        this.add(report, "refcount table", at, bytes, cluster, 1);
        for at in refcounts.block_offsets() {
            this.add(report, "refcount block", at, cluster, cluster, 1);
        }
        this.add(report, "snapshot table", header.snapshots_offset, snapshot_bytes, cluster, 1);

        // L1 tables by place, and how many use them; then L2 tables likewise
        let mut l1_tables: HashMap<(u64, u64), u32> = HashMap::new();
        for snapshot in snapshots.iter().filter(|s| s.l1_entries > 0) {
            *l1_tables.entry((snapshot.l1_offset, snapshot.l1_entries)).or_default() += 1;
        }
        let mut l2_tables: HashMap<u64, u32> = HashMap::new();
        for ((at, entries), users) in l1_tables {
            this.add(report, "snapshot's L1 table", at, entries * 8, cluster, users);
            for entry in read_table(file, at, entries)? {
                *l2_tables.entry(entry & OFFSET).or_default() += users;
            }
        }
        let mut active = HashMap::new();
        for entry in read_table(file, header.l1_offset, header.l1_entries)?.into_iter().filter(|e| e & OFFSET != 0) {
            *l2_tables.entry(entry & OFFSET).or_default() += 1;
            active.insert(entry & OFFSET, ());
            this.copied.push(("L1 entry", entry));
        }
        l2_tables.remove(&0);
        for (at, users) in l2_tables {
            if !at.is_multiple_of(cluster) {
                report.corrupt(|| format!("L2 table at {at:#x} is not aligned"));
                continue;
            }
            this.add(report, "L2 table", at, cluster, cluster, users);
            for entry in read_table(file, at, header.l2_entries())? {
                this.add_entry(header, entry, users, active.contains_key(&at), report);
            }
        }
        Ok(this)
    }

    fn add_entry(&mut self, header: &Header, entry: u64, users: u32, active: bool, report: &mut CheckReport) {
        let used = entry_clusters(entry, header.cluster_bits);
        if used.is_empty() {
            return;
        }
        if entry & COMPRESSED == 0 && entry & OFFSET & (header.cluster_bytes() - 1) != 0 {
            report.corrupt(|| format!("cluster at {:#x} is not aligned", entry & OFFSET));
            return;
        }
        if active && entry & COMPRESSED == 0 {
            self.copied.push(("L2 entry", entry));
        }
        let bytes = (used.end - used.start) << header.cluster_bits;
        // The last compressed cluster may say more than the file has.
        let have = (self.counts.len() as u64) << header.cluster_bits;
        let start = used.start << header.cluster_bits;
        let bytes = if entry & COMPRESSED != 0 { bytes.min(have.saturating_sub(start)).max(1) } else { bytes };
        self.add(report, "cluster", start, bytes, header.cluster_bytes(), users);
    }

    fn add(&mut self, report: &mut CheckReport, what: &str, at: u64, bytes: u64, cluster: u64, users: u32) {
        let Some(end) = at.checked_add(bytes) else {
            return report.corrupt(|| format!("the {what} at {at:#x} has no end"));
        };
        let used = self.counts.get_mut((at / cluster) as usize..end.div_ceil(cluster) as usize);
        match used {
            Some(counts) => counts.iter_mut().for_each(|n| *n = n.saturating_add(users)),
            None => report.corrupt(|| format!("the {what} at {at:#x} lies behind the end of the file")),
        }
    }
}
