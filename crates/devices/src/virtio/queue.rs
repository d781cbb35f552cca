use std::sync::atomic::{Ordering, fence};

use vireo_memory::GuestMemory;

use super::{
    chain::DescriptorChain,
    device::{QueueResources, QueueState, VirtioError},
    features::{INDIRECT_DESC, RING_EVENT_IDX},
};

/// Virtio 1.2, 2.7: at most 32768 descriptors.
pub const MAX_QUEUE_SIZE: u16 = 1 << 15;
/// Descriptors in a chain that uses an indirect table. The specification says "at most the queue size", but
/// drivers whose queue we made small still send what their segment limit allows, so a fixed bound it is.
const MAX_INDIRECT: u32 = 1024;
/// Virtio 1.2, 2.7.4.2: a chain is no longer than 2^32 bytes.
const MAX_CHAIN_BYTES: u64 = u32::MAX as u64;
const DESCRIPTOR_BYTES: u64 = 16;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// The driver broke the rules: the device must stop serving the queue and call [`QueueResources::broken`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    #[error("the driver offers {0} chains at once, more than the queue holds")]
    TooManyAvailable(u16),
    #[error("more chains in flight than the queue holds")]
    TooManyInFlight,
    #[error("descriptor index {0} is past the end of its table")]
    BadIndex(u32),
    #[error("a descriptor chain is too long or loops")]
    ChainTooLong,
    #[error("a descriptor chain is longer than 4 GiB")]
    TooManyBytes,
    #[error("buffer {gpa:#x}+{len:#x} is not in guest memory")]
    BadAddress { gpa: u64, len: u64 },
    #[error("a readable buffer follows a writable one")]
    ReadableAfterWritable,
    #[error("a malformed indirect descriptor")]
    BadIndirect,
    #[error("the rings left guest memory")]
    BadRing,
}

/// The device's side of a split virtqueue (virtio 1.2, 2.7).
///
/// A wake-up should take at most [`Self::size`] chains before the device looks at its stop signal again: a
/// driver on another vCPU may refill the ring for ever.
pub struct Queue {
    memory: GuestMemory,
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    /// The driver's index as last read; what lies between it and `next_avail` is ready.
    seen_avail: u16,
    next_used: u16,
    /// The used index that the driver can see.
    published_used: u16,
    /// The used index when `needs_interrupt` last decided, and whether it did since the start.
    decided_used: u16,
    decided: bool,
    in_flight: u16,
    /// Chains whose allocations can be used again.
    spare: Vec<DescriptorChain>,
}

#[derive(Clone, Copy)]
struct Descriptor {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(raw: u128) -> Self {
        Self { gpa: raw as u64, len: (raw >> 64) as u32, flags: (raw >> 96) as u16, next: (raw >> 112) as u16 }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The table that a chain is being read from.
#[derive(Clone, Copy)]
struct Table {
    gpa: u64,
    entries: u32,
    indirect: bool,
}

impl Queue {
    pub fn new(resources: &QueueResources) -> Result<Self, VirtioError> {
        let QueueResources { memory, size, descriptors, driver, device, features, state, .. } = resources;
        let count = u64::from(*size);
        if !size.is_power_of_two() || *size > MAX_QUEUE_SIZE {
            return Err(VirtioError::BadRing);
        }
        // Sizes and alignments: virtio 1.2, 2.7.
        let rings = [(*descriptors, 16 * count, 16), (*driver, 6 + 2 * count, 2), (*device, 6 + 8 * count, 4)];
        for (gpa, bytes, align) in rings {
            if !gpa.is_multiple_of(align) || memory.slice(gpa, bytes).is_err() {
                return Err(VirtioError::BadRing);
            }
        }
        let state = state.unwrap_or_default();
        Ok(Self {
            memory: memory.clone(),
            size: *size,
            descriptors: *descriptors,
            driver: *driver,
            device: *device,
            event_idx: features & RING_EVENT_IDX != 0,
            indirect: features & INDIRECT_DESC != 0,
            next_avail: state.next_avail,
            seen_avail: state.next_avail,
            next_used: state.next_used,
            published_used: state.next_used,
            decided_used: state.next_used,
            decided: false,
            in_flight: 0,
            spare: Vec::new(),
        })
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the queue stands. Only meaningful when every popped chain was pushed (or un-popped) again.
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.next_avail, next_used: self.next_used }
    }

    /// The next request, or `None` if the driver has made none available.
    pub fn pop(&mut self) -> Result<Option<DescriptorChain>, QueueError> {
        if self.seen_avail == self.next_avail && !self.look_for_more()? {
            return Ok(None);
        }
        if self.in_flight >= self.size {
            return Err(QueueError::TooManyInFlight);
        }
        let slot = u64::from(self.next_avail % self.size);
        let head = self.load(self.driver + 4 + 2 * slot, Ordering::Relaxed)?;
        let mut chain = self.spare.pop().unwrap_or_else(|| DescriptorChain::new(self.memory.clone()));
        chain.restart(head);
        match self.walk(head, &mut chain) {
            Ok(()) => {
                self.next_avail = self.next_avail.wrapping_add(1);
                self.in_flight += 1;
                Ok(Some(chain))
            }
            Err(error) => {
                self.spare.push(chain);
                Err(error)
            }
        }
    }

    /// Puts back the chain that was popped last, as if it had not been.
    pub fn unpop(&mut self, chain: DescriptorChain) {
        self.next_avail = self.next_avail.wrapping_sub(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.spare.push(chain);
    }

    /// Finishes a request of which `written` bytes of the writable part were written, and shows that to the driver.
    pub fn push(&mut self, chain: DescriptorChain, written: u32) -> Result<(), QueueError> {
        self.add_used(chain, written)?;
        self.publish()
    }

    /// Finishes a request without showing it to the driver before [`Self::publish`]: for several chains that
    /// the driver must see at once (virtio 1.2, 5.1.6.4).
    pub fn add_used(&mut self, chain: DescriptorChain, written: u32) -> Result<(), QueueError> {
        // A device that writes only its last byte still says 1: report the whole of what it may have touched.
        if written > 0 {
            chain.report_written();
        }
        let entry = self.device + 4 + 8 * u64::from(self.next_used % self.size);
        let element = u64::from(chain.head()) | u64::from(written) << 32;
        self.memory.write_pod(entry, element).map_err(|_| QueueError::BadRing)?;
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.spare.push(chain);
        Ok(())
    }

    /// Shows the driver everything that was added. The release store makes it see the data and the entries
    /// before the index (virtio 1.2, 2.7.8.2).
    pub fn publish(&mut self) -> Result<(), QueueError> {
        self.store(self.device + 2, self.next_used, Ordering::Release)?;
        self.published_used = self.next_used;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was published since the last call (virtio 1.2, 2.7.7).
    /// Call it once after a batch.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        let new = self.published_used;
        if self.decided_used == new {
            return Ok(false);
        }
        // Our store of the used index must be visible before we read what the driver wants: it stores its
        // wish and then looks at the index once more.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.decided_used, new);
        let first = !std::mem::replace(&mut self.decided, true);
        if !self.event_idx {
            return Ok(self.load(self.driver, Ordering::Relaxed)? & AVAIL_NO_INTERRUPT == 0);
        }
        let event = self.load(self.driver + 4 + 2 * u64::from(self.size), Ordering::Relaxed)?;
        // After a start nothing is known about earlier interrupts, so one too many it is.
        Ok(first || passed(event, new, old))
    }

    /// Asks the driver for notifications again. `true` if requests came in meanwhile: no notification will
    /// come for those, so go on popping.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        if self.event_idx {
            self.store(self.device + 4 + 8 * u64::from(self.size), self.next_avail, Ordering::Relaxed)?;
        } else {
            self.store(self.device, 0, Ordering::Relaxed)?;
        }
        // The wish must be visible before the driver's index is read again (virtio 1.2, 2.7.10).
        fence(Ordering::SeqCst);
        Ok(self.load(self.driver + 2, Ordering::Acquire)? != self.next_avail)
    }

    /// Says that notifications are of no use while the device is at work anyway.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        // With event indices the driver only notifies when it passes `avail_event`, which stays behind.
        if self.event_idx { Ok(()) } else { self.store(self.device, USED_NO_NOTIFY, Ordering::Relaxed) }
    }

    fn look_for_more(&mut self) -> Result<bool, QueueError> {
        // Acquire: ring entries and descriptors are read after the index that covers them (virtio 1.2, 2.7.13.3).
        let avail = self.load(self.driver + 2, Ordering::Acquire)?;
        let count = avail.wrapping_sub(self.next_avail);
        if count > self.size {
            return Err(QueueError::TooManyAvailable(count));
        }
        self.seen_avail = avail;
        Ok(count > 0)
    }

    /// Follows a chain through the queue's table and perhaps one indirect table (virtio 1.2, 2.7.5).
    fn walk(&self, head: u16, chain: &mut DescriptorChain) -> Result<(), QueueError> {
        let mut table = Table { gpa: self.descriptors, entries: u32::from(self.size), indirect: false };
        let mut index = u32::from(head);
        let mut budget = table.entries;
        loop {
            if budget == 0 {
                return Err(QueueError::ChainTooLong);
            }
            budget -= 1;
            let descriptor = self.descriptor(table, index)?;
            if descriptor.has(DESC_INDIRECT) {
                table = self.indirect_table(table, descriptor)?;
                index = 0;
                budget = table.entries.min(MAX_INDIRECT);
                continue;
            }
            self.add_buffer(descriptor, chain)?;
            if !descriptor.has(DESC_NEXT) {
                return Ok(());
            }
            index = u32::from(descriptor.next);
        }
    }

    fn descriptor(&self, table: Table, index: u32) -> Result<Descriptor, QueueError> {
        if index >= table.entries {
            return Err(QueueError::BadIndex(index));
        }
        let gpa = table.gpa + DESCRIPTOR_BYTES * u64::from(index);
        // One read: the driver may change it at any time.
        let raw = self.memory.read_pod::<u128>(gpa);
        raw.map(Descriptor::parse).map_err(|_| QueueError::BadAddress { gpa, len: DESCRIPTOR_BYTES })
    }

    fn indirect_table(&self, outer: Table, descriptor: Descriptor) -> Result<Table, QueueError> {
        let Descriptor { gpa, len, .. } = descriptor;
        let bytes = u64::from(len);
        let bad = !self.indirect || outer.indirect || descriptor.has(DESC_NEXT);
        if bad || bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(QueueError::BadIndirect);
        }
        self.memory.slice(gpa, bytes).map_err(|_| QueueError::BadAddress { gpa, len: bytes })?;
        Ok(Table { gpa, entries: (bytes / DESCRIPTOR_BYTES) as u32, indirect: true })
    }

    fn add_buffer(&self, descriptor: Descriptor, chain: &mut DescriptorChain) -> Result<(), QueueError> {
        let Descriptor { gpa, len, .. } = descriptor;
        let len = u64::from(len);
        let writable = descriptor.has(DESC_WRITE);
        if !writable && chain.writable_bytes() > 0 {
            return Err(QueueError::ReadableAfterWritable);
        }
        if chain.readable_bytes() + chain.writable_bytes() + len > MAX_CHAIN_BYTES {
            return Err(QueueError::TooManyBytes);
        }
        let slice = self.memory.slice(gpa, len).map_err(|_| QueueError::BadAddress { gpa, len })?;
        if !slice.is_empty() {
            chain.add(gpa, slice, writable);
        }
        Ok(())
    }

    fn load(&self, gpa: u64, order: Ordering) -> Result<u16, QueueError> {
        self.memory.load_u16(gpa, order).map_err(|_| QueueError::BadRing)
    }

    fn store(&self, gpa: u64, value: u16, order: Ordering) -> Result<(), QueueError> {
        self.memory.store_u16(gpa, value, order).map_err(|_| QueueError::BadRing)
    }
}

/// Whether moving from `old` to `new` went past `event` (virtio 1.2, 2.7.7.1).
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod driver;
#[cfg(test)]
mod tests;
