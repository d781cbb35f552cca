use vireo_memory::{GuestMemory, GuestSlice};

use super::cursor::{Reader, Writer};

/// One request: the buffers of a descriptor chain, resolved and checked. It comes from [`super::Queue::pop`] and
/// goes back with [`super::Queue::push`], which lets the queue use its allocations again.
///
/// Chains own their memory, so a device may hold several and finish them in any order.
pub struct DescriptorChain {
    /// Keeps alive what `slices` points to.
    memory: GuestMemory,
    head: u16,
    /// First the readable buffers, then the writable ones.
    slices: Vec<GuestSlice<'static>>,
    addresses: Vec<u64>,
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
}

impl DescriptorChain {
    pub(super) fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            head: 0,
            slices: Vec::new(),
            addresses: Vec::new(),
            readable: 0,
            readable_bytes: 0,
            writable_bytes: 0,
        }
    }

    pub(super) fn restart(&mut self, head: u16) {
        self.head = head;
        self.slices.clear();
        self.addresses.clear();
        self.readable = 0;
        self.readable_bytes = 0;
        self.writable_bytes = 0;
    }

    pub(super) fn add(&mut self, gpa: u64, slice: GuestSlice<'_>, writable: bool) {
        // SAFETY: the slice points into the RAM that `self.memory` keeps mapped, and it is only ever handed
        // out with the lifetime of a borrow of `self` (`readable`, `writable`, `reader`, `writer`).
        let slice: GuestSlice<'static> = unsafe { GuestSlice::new(slice.as_ptr(), slice.len()) };
        self.slices.push(slice);
        self.addresses.push(gpa);
        if writable {
            self.writable_bytes += slice.len() as u64;
        } else {
            self.readable += 1;
            self.readable_bytes += slice.len() as u64;
        }
    }

    /// Tells the memory's watcher that the writable buffers changed.
    pub(super) fn report_written(&self) {
        for (gpa, slice) in self.addresses[self.readable..].iter().zip(self.writable()) {
            self.memory.written(*gpa, slice.len() as u64);
        }
    }

    /// Index of the first descriptor; identifies the chain while it is in flight.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for the device; no slice is empty.
    pub fn readable(&self) -> &[GuestSlice<'_>] {
        &self.slices[..self.readable]
    }

    /// Where the device may write; no slice is empty.
    pub fn writable(&self) -> &[GuestSlice<'_>] {
        &self.slices[self.readable..]
    }

    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    pub fn reader(&self) -> Reader<'_> {
        Reader::new(self.readable())
    }

    pub fn writer(&self) -> Writer<'_> {
        Writer::new(self.writable())
    }
}
