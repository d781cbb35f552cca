use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use vireo_block::Disk;

use super::{
    request::{
        ID_BYTES, Limits, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_SEGMENT_BYTES, MAX_WRITE_ZEROES_SECTORS, SECTOR_BYTES,
    },
    saved::SavedBlock,
    worker::BlockQueue,
};
use crate::virtio::{
    QueueResources, QueueState, VirtioDevice, VirtioError, config, saved,
    serve::{self, AdaptivePoll},
    worker::Worker,
};

const DEVICE_TYPE: u16 = 2;
/// Twice the pages of a MiB, so that what programs like to read and write at a time stays one request.
pub(super) const QUEUE_SIZE: u16 = 512;
const MAX_QUEUES: u16 = 64;
/// As long as a wake-up takes, about.
const MAX_POLL: std::time::Duration = std::time::Duration::from_micros(40);

/// Feature bits, virtio 1.2, 5.2.3.
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// `struct virtio_blk_config`, virtio 1.2, 5.2.4: as far as we have something to say.
const CONFIG_BYTES: usize = 60;
const CONFIG_WRITEBACK: u64 = 32;

/// What makes one block device differ from another.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Part of its threads' names, for example `blk0`.
    pub name: String,
    /// What the guest finds as the disk's serial number; at most 20 bytes are used.
    pub serial: String,
    /// Virtqueues, each with a thread of its own; see [`BlockConfig::default_queues`].
    pub queues: u16,
}

impl BlockConfig {
    /// One for each vCPU, as the driver likes it, up to 4: more threads than that only wait for the same disk.
    pub fn default_queues(vcpus: u16) -> u16 {
        vcpus.clamp(1, 4)
    }
}

/// A virtio block device over a disk of any format.
pub struct Block {
    name: String,
    disk: Arc<dyn Disk>,
    id: [u8; ID_BYTES],
    queue_sizes: Vec<u16>,
    workers: Vec<Option<Worker<QueueState>>>,
    /// The cache mode that the driver chose (`CONFIG_WCE`).
    writeback: bool,
    /// What it comes to with the features that the driver took.
    effective_writeback: Arc<AtomicBool>,
    features: u64,
}

impl Block {
    pub fn new(disk: Arc<dyn Disk>, config: BlockConfig) -> Self {
        let queues = config.queues.clamp(1, MAX_QUEUES);
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        Self {
            name: config.name,
            disk,
            id,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            workers: (0..queues).map(|_| None).collect(),
            writeback: true,
            effective_writeback: Arc::new(AtomicBool::new(true)),
            features: 0,
        }
    }

    /// Virtio 1.2, 5.2.5.2 and 5.2.6.2: a driver that cannot flush gets a write-through cache.
    fn update_writeback(&self) {
        let effective = match self.features {
            f if f & feature::CONFIG_WCE != 0 => self.writeback,
            f => f & feature::FLUSH != 0,
        };
        self.effective_writeback.store(effective, Ordering::Release);
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size_bytes() / SECTOR_BYTES).to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
        // seg_max: without indirect tables, header and status take a descriptor each.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        // topology: physical blocks of 2^3 logical ones, which is also the least that is efficient.
        put(24, &[3, 0]);
        put(26, &8u16.to_le_bytes());
        put(CONFIG_WRITEBACK as usize, &[u8::from(self.writeback)]);
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        if !self.disk.read_only() {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &8u32.to_le_bytes());
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    fn limits(&self) -> Limits {
        Limits { size_bytes: self.disk.size_bytes() / SECTOR_BYTES * SECTOR_BYTES, read_only: self.disk.read_only() }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        use feature::*;
        let multi_queue = if self.queue_sizes.len() > 1 { MQ } else { 0 };
        let access = if self.disk.read_only() { RO } else { DISCARD | WRITE_ZEROES };
        SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | multi_queue | access
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // `writeback` is the only field that a driver may write, and a byte of its own.
        if let (CONFIG_WRITEBACK, &[mode]) = (offset, data) {
            self.writeback = mode & 1 != 0;
            self.update_writeback();
        }
    }

    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), VirtioError> {
        let limits = self.limits();
        let Some(slot) = self.workers.get_mut(index) else { return Err(VirtioError::BadRing) };
        let service = BlockQueue {
            disk: self.disk.clone(),
            limits,
            id: self.id,
            writeback: self.effective_writeback.clone(),
            batch: Vec::new(),
        };
        self.features = resources.features;
        let name = format!("vireo-{}-q{index}", self.name);
        *slot = Some(serve::spawn(name, resources, service, AdaptivePoll::new(MAX_POLL))?);
        self.update_writeback();
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        self.workers.get_mut(index)?.take()?.stop()
    }

    fn reset(&mut self) {
        self.writeback = true;
        self.features = 0;
        self.update_writeback();
    }

    fn save(&self) -> Vec<u8> {
        saved::encode(&SavedBlock {
            writeback: self.writeback,
            size_bytes: self.disk.size_bytes(),
            read_only: self.disk.read_only(),
        })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), VirtioError> {
        let saved: SavedBlock = saved::decode("block", bytes)?;
        let bad = |why: String| Err(VirtioError::BadState { device: "block", why });
        if saved.size_bytes != self.disk.size_bytes() {
            return bad(format!("the disk had {} bytes and now has {}", saved.size_bytes, self.disk.size_bytes()));
        }
        if saved.read_only != self.disk.read_only() {
            return bad("the disk's read-only setting changed".into());
        }
        self.writeback = saved.writeback;
        self.update_writeback();
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        for worker in self.workers.iter_mut().filter_map(Option::take) {
            worker.stop();
        }
    }
}
