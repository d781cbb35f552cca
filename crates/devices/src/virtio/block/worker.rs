use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vireo_block::{Disk, DiskError};
use vireo_memory::GuestSlice;

use super::request::{Extent, HEADER_BYTES, ID_BYTES, Limits, Request, Status};
use crate::virtio::{DescriptorChain, Queue, QueueError, serve::Service};

/// Neighbouring reads or writes become one call as long as they stay below these: `IOV_MAX`, and what a cache holds.
const MERGED_SLICES: usize = 1000;
const MERGED_BYTES: u64 = 1 << 20;

/// Serves one queue of a block device.
pub(super) struct BlockQueue {
    pub disk: Arc<dyn Disk>,
    pub limits: Limits,
    pub id: [u8; ID_BYTES],
    /// Whether a write may be finished before it is on stable storage.
    pub writeback: Arc<AtomicBool>,
    /// Requests that are served by one call to the disk; empty in between.
    pub batch: Vec<DescriptorChain>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    FromDisk,
    ToDisk,
}

impl Service for BlockQueue {
    fn serve(&mut self, queue: &mut Queue, chain: DescriptorChain) -> Result<Option<DescriptorChain>, QueueError> {
        // Without a byte for the status there is no way to answer.
        if chain.writable_bytes() == 0 {
            queue.push(chain, 0)?;
            return Ok(None);
        }
        match Request::parse(&chain, self.limits) {
            Ok(Request::Read(range)) => self.transfer(queue, chain, Direction::FromDisk, range),
            Ok(Request::Write(range)) => self.transfer(queue, chain, Direction::ToDisk, range),
            Ok(other) => {
                let status = self.control(&chain, &other);
                finish(queue, chain, status).map(|()| None)
            }
            Err(status) => finish(queue, chain, status).map(|()| None),
        }
    }
}

impl BlockQueue {
    fn transfer(
        &mut self,
        queue: &mut Queue,
        chain: DescriptorChain,
        direction: Direction,
        range: Range<u64>,
    ) -> Result<Option<DescriptorChain>, QueueError> {
        let (range, left_over) = self.gather(queue, chain, direction, range)?;
        let merged = self.transfer_all(&self.batch, direction, range.start);
        let mut batch = std::mem::take(&mut self.batch);
        for chain in batch.drain(..) {
            let status = match merged {
                Ok(()) => Status::Ok,
                // Which of them failed? The others shall not fail with it.
                Err(_) => self.transfer_one(&chain, direction),
            };
            finish(queue, chain, status)?;
        }
        self.batch = batch;
        Ok(left_over)
    }

    /// Fills the batch with `chain` and what follows it on the ring and on the disk. Returns the bytes of the disk
    /// that this makes, and the chain that did not fit if one was popped.
    fn gather(
        &mut self,
        queue: &mut Queue,
        chain: DescriptorChain,
        direction: Direction,
        mut range: Range<u64>,
    ) -> Result<(Range<u64>, Option<DescriptorChain>), QueueError> {
        let mut slices = slice_count(&chain);
        self.batch.push(chain);
        while let Some(next) = queue.pop()? {
            slices += slice_count(&next);
            let end = match Request::parse(&next, self.limits) {
                Ok(Request::Read(r)) if direction == Direction::FromDisk && r.start == range.end => r.end,
                Ok(Request::Write(r)) if direction == Direction::ToDisk && r.start == range.end => r.end,
                _ => return Ok((range, Some(next))),
            };
            if next.writable_bytes() == 0 || slices > MERGED_SLICES || end - range.start > MERGED_BYTES {
                return Ok((range, Some(next)));
            }
            range.end = end;
            self.batch.push(next);
        }
        Ok((range, None))
    }

    fn transfer_one(&self, chain: &DescriptorChain, direction: Direction) -> Status {
        // Parsed again, since the driver may have changed the header: the disk is asked for what is checked now.
        let start = match (Request::parse(chain, self.limits), direction) {
            (Ok(Request::Read(range)), Direction::FromDisk) | (Ok(Request::Write(range)), Direction::ToDisk) => {
                range.start
            }
            _ => return Status::IoError,
        };
        status(self.transfer_all(std::slice::from_ref(chain), direction, start))
    }

    fn transfer_all(&self, chains: &[DescriptorChain], direction: Direction, offset: u64) -> Result<(), DiskError> {
        let mut buffers = Vec::with_capacity(chains.iter().map(slice_count).sum());
        for chain in chains {
            data(chain, direction, &mut buffers);
        }
        match direction {
            _ if buffers.is_empty() => Ok(()),
            Direction::FromDisk => self.disk.read(offset, &buffers),
            Direction::ToDisk => self.disk.write(offset, &buffers).and_then(|()| self.settle()),
        }
    }

    /// After something was written.
    fn settle(&self) -> Result<(), DiskError> {
        if self.writeback.load(Ordering::Acquire) { Ok(()) } else { self.disk.flush() }
    }

    fn control(&self, chain: &DescriptorChain, request: &Request) -> Status {
        match request {
            Request::Flush => status(self.disk.flush()),
            Request::GetId => {
                let mut writer = chain.writer();
                let room = writer.remaining().saturating_sub(1).min(ID_BYTES as u64) as usize;
                writer.write(&self.id[..room]);
                Status::Ok
            }
            Request::Discard(extents) => self.each(extents, |e| self.disk.discard(e.offset, e.len)),
            Request::WriteZeroes(extents) => self.each(extents, |e| self.disk.write_zeroes(e.offset, e.len, e.unmap)),
            Request::Read(_) | Request::Write(_) => Status::IoError,
        }
    }

    fn each(&self, extents: &[Extent], apply: impl Fn(&Extent) -> Result<(), DiskError>) -> Status {
        let mut wanted = extents.iter().filter(|extent| extent.len > 0);
        status(wanted.try_for_each(apply).and_then(|()| self.settle()))
    }
}

fn slice_count(chain: &DescriptorChain) -> usize {
    chain.readable().len() + chain.writable().len()
}

/// The part of a chain that moves from or to the disk, however the driver cut it (virtio 1.2, 2.7.4.3).
fn data<'a>(chain: &'a DescriptorChain, direction: Direction, out: &mut Vec<GuestSlice<'a>>) {
    // The lengths were checked by `Request::parse` and by `serve`, and cannot change in a popped chain.
    let taken = match direction {
        Direction::FromDisk => chain.writer().take(chain.writable_bytes().saturating_sub(1), out),
        Direction::ToDisk => {
            let mut reader = chain.reader();
            reader.skip(HEADER_BYTES).and_then(|()| reader.take(reader.remaining(), out))
        }
    };
    debug_assert!(taken.is_ok());
}

fn status(result: Result<(), DiskError>) -> Status {
    if result.is_ok() { Status::Ok } else { Status::IoError }
}

/// Writes the status to the last byte and gives the chain back.
fn finish(queue: &mut Queue, chain: DescriptorChain, status: Status) -> Result<(), QueueError> {
    let writable = chain.writable_bytes();
    let mut writer = chain.writer();
    let _ = writer.skip(writable.saturating_sub(1)).and_then(|()| writer.write_all(&[status as u8]));
    // Not more than what was surely written, front to back (virtio 1.2, 2.7.8.2); but at least the status.
    let written = if status == Status::Ok { u32::try_from(writable).unwrap_or(u32::MAX) } else { 1 };
    queue.push(chain, written)
}
