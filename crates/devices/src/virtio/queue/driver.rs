use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use vireo_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::{QueueResources, QueueState, features};

/// Guest-physical address, length, and whether the device may write it.
pub type Buffer = (u64, u32, bool);

/// The driver's side of a queue, able to break every rule of it. Descriptors are used round and round.
pub struct Driver {
    pub memory: GuestMemory,
    pub size: u16,
    pub base: u64,
    pub features: u64,
    next_avail: u16,
    next_used: u16,
    next_descriptor: u16,
}

impl Driver {
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        let (next_avail, next_used, next_descriptor) = (0, 0, 0);
        let features = features::TRANSPORT;
        Self { memory: memory.clone(), size, base, features, next_avail, next_used, next_descriptor }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn driver(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    pub fn device(&self) -> u64 {
        (self.driver() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    pub fn resources(&self, state: Option<QueueState>) -> QueueResources {
        QueueResources {
            memory: self.memory.clone(),
            size: self.size,
            descriptors: self.descriptors(),
            driver: self.driver(),
            device: self.device(),
            features: self.features,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupt: Arc::new(|| ()),
            config_changed: Arc::new(|| ()),
            broken: Arc::new(|| ()),
            state,
        }
    }

    pub fn write_descriptor(&self, table: u64, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let raw = u128::from(gpa) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.memory.write_pod(table + 16 * u64::from(index), raw).unwrap();
    }

    fn write_chain(&self, table: u64, entries: u16, first: u16, buffers: &[Buffer]) {
        for (i, (gpa, len, writable)) in buffers.iter().enumerate() {
            let index = (first + i as u16) % entries;
            let flags = u16::from(i + 1 < buffers.len()) | u16::from(*writable) << 1;
            self.write_descriptor(table, index, *gpa, *len, flags, (index + 1) % entries);
        }
    }

    /// Makes a chain available; returns its head.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        self.write_chain(self.descriptors(), self.size, head, buffers);
        self.next_descriptor = (head + buffers.len() as u16) % self.size;
        self.offer_head(head);
        head
    }

    /// As [`Self::offer`] with an indirect table at `table`.
    pub fn offer_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        self.write_chain(table, buffers.len() as u16, 0, buffers);
        self.write_descriptor(self.descriptors(), head, table, 16 * buffers.len() as u32, 4, 0);
        self.next_descriptor = (head + 1) % self.size;
        self.offer_head(head);
        head
    }

    pub fn offer_head(&mut self, head: u16) {
        self.memory.write_pod(self.driver() + 4 + 2 * u64::from(self.next_avail % self.size), head).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory.store_u16(self.driver() + 2, self.next_avail, Ordering::SeqCst).unwrap();
    }

    /// The next finished chain: head and bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.memory.load_u16(self.device() + 2, Ordering::SeqCst).unwrap() == self.next_used {
            return None;
        }
        let at = self.device() + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let (id, len): (u32, u32) = (self.memory.read_pod(at).unwrap(), self.memory.read_pod(at + 4).unwrap());
        Some((id as u16, len))
    }

    /// Asks for an interrupt once the device has used chain number `index`.
    pub fn set_used_event(&self, index: u16) {
        self.memory.write_pod(self.driver() + 4 + 2 * u64::from(self.size), index).unwrap();
    }

    /// Whether the device wants to hear of the chains offered since `old` were (virtio 1.2, 2.7.10).
    pub fn wants_kick(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        self.next_avail.wrapping_sub(self.avail_event()).wrapping_sub(1) < self.next_avail.wrapping_sub(old)
    }

    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The next finished chain, or a promise of an interrupt for it.
    pub fn used_or_event(&mut self) -> Option<(u16, u32)> {
        self.used().or_else(|| {
            self.set_used_event(self.next_used);
            fence(Ordering::SeqCst);
            self.used()
        })
    }

    pub fn avail_event(&self) -> u16 {
        self.memory.read_pod(self.device() + 4 + 8 * u64::from(self.size)).unwrap()
    }
}
