//! A driver that sleeps on interrupts and obeys event indices, as a kernel's does, for tests of whole devices.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering, fence},
    },
    time::{Duration, Instant},
};

use vireo_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{QueueResources, QueueState};

pub const F_INDIRECT_DESC: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// How long a test waits for a device before it counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Counts interrupts and lets a test wait for one.
#[derive(Default)]
pub struct Interrupts {
    count: Mutex<u64>,
    raised: Condvar,
}

impl Interrupts {
    pub fn raise(&self) {
        *self.count.lock().unwrap() += 1;
        self.raised.notify_all();
    }

    pub fn count(&self) -> u64 {
        *self.count.lock().unwrap()
    }

    /// Waits until more than `seen` were raised; returns how many, or `None` if time ran out.
    pub fn wait(&self, seen: u64, timeout: Duration) -> Option<u64> {
        let count = self.count.lock().unwrap();
        let (count, result) = self.raised.wait_timeout_while(count, timeout, |count| *count <= seen).unwrap();
        (!result.timed_out()).then_some(*count)
    }
}

/// One descriptor of a chain: guest-physical address, length, and whether the device may write.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub gpa: u64,
    pub len: u32,
    pub write: bool,
}

/// Hands out guest memory, front to back.
pub struct Heap {
    pub memory: GuestMemory,
    next: AtomicU64,
}

impl Heap {
    /// All of a new guest memory.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { memory: GuestMemory::new(bytes, bytes).unwrap(), next: AtomicU64::new(0) })
    }

    pub fn take(&self, bytes: u64) -> u64 {
        let gpa = self.next.fetch_add(bytes.next_multiple_of(64), Ordering::Relaxed);
        assert!(gpa + bytes <= self.memory.bytes(), "the test's guest memory is too small");
        gpa
    }

    /// A buffer that the device reads.
    pub fn filled(&self, data: &[u8]) -> Piece {
        let gpa = self.take(data.len() as u64);
        self.memory.write(gpa, data).unwrap();
        Piece { gpa, len: data.len() as u32, write: false }
    }

    /// A buffer that the device writes.
    pub fn empty(&self, len: usize) -> Piece {
        Piece { gpa: self.take(len as u64), len: len as u32, write: true }
    }

    pub fn bytes(&self, piece: Piece) -> Vec<u8> {
        let mut out = vec![0; piece.len as usize];
        self.memory.read(piece.gpa, &mut out).unwrap();
        out
    }
}

/// One virtqueue as its driver sees it.
pub struct Ring {
    heap: Arc<Heap>,
    pub size: u16,
    pub features: u64,
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
    free: Vec<u16>,
    next_avail: u16,
    published: u16,
    last_used: u16,
    pub kick: EventFd,
    pub kicks: u64,
    pub interrupts: Arc<Interrupts>,
    pub config_changes: Arc<Interrupts>,
    pub broken: Arc<Interrupts>,
}

impl Ring {
    pub fn new(heap: &Arc<Heap>, size: u16, features: u64) -> Self {
        let n = u64::from(size);
        Self {
            descriptors: heap.take(16 * n),
            avail: heap.take(6 + 2 * n),
            used: heap.take(6 + 8 * n),
            heap: heap.clone(),
            size,
            features: features | F_VERSION_1,
            free: (0..size).rev().collect(),
            next_avail: 0,
            published: 0,
            last_used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            kicks: 0,
            interrupts: Arc::default(),
            config_changes: Arc::default(),
            broken: Arc::default(),
        }
    }

    pub fn resources(&self, state: Option<QueueState>) -> QueueResources {
        let (interrupts, config) = (self.interrupts.clone(), self.config_changes.clone());
        let broken = self.broken.clone();
        QueueResources {
            memory: self.heap.memory.clone(),
            size: self.size,
            descriptors: self.descriptors,
            driver: self.avail,
            device: self.used,
            features: self.features,
            kick: self.kick.try_clone().unwrap(),
            interrupt: Arc::new(move || interrupts.raise()),
            config_changed: Arc::new(move || config.raise()),
            broken: Arc::new(move || broken.raise()),
            state,
        }
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    fn write_descriptor(&self, table: u64, index: u16, piece: Piece, next: Option<u16>) {
        let flags = if piece.write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        self.write_raw(table, index, piece.gpa, piece.len, flags, next.unwrap_or(0));
    }

    fn write_raw(&self, table: u64, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&gpa.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.heap.memory.write(table + 16 * u64::from(index), &raw).unwrap();
    }

    /// Puts a chain on the ring, not visible to the device before [`Self::publish`]; returns its head.
    pub fn add(&mut self, pieces: &[Piece]) -> u16 {
        let ids: Vec<u16> = pieces.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (at, piece) in pieces.iter().enumerate() {
            self.write_descriptor(self.descriptors, ids[at], *piece, ids.get(at + 1).copied());
        }
        self.offer(ids[0]);
        ids[0]
    }

    /// Like [`Self::add`], by way of an indirect table.
    pub fn add_indirect(&mut self, pieces: &[Piece]) -> u16 {
        let table = self.heap.take(16 * pieces.len() as u64);
        for (at, piece) in pieces.iter().enumerate() {
            let next = (at + 1 < pieces.len()).then_some(at as u16 + 1);
            self.write_descriptor(table, at as u16, *piece, next);
        }
        let head = self.free.pop().expect("a free descriptor");
        self.write_raw(self.descriptors, head, table, 16 * pieces.len() as u32, INDIRECT, 0);
        self.offer(head);
        head
    }

    /// Writes one descriptor as it is, for hostile drivers.
    pub fn scribble(&self, index: u16, raw: [u8; 16]) {
        self.heap.memory.write(self.descriptors + 16 * u64::from(index), &raw).unwrap();
    }

    /// Puts any number into the next slot of the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.heap.memory.write_pod(self.avail + 4 + 2 * slot, head.to_le()).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Shows all that was added to the device, and notifies it if it wants to know.
    pub fn publish(&mut self) {
        let memory = &self.heap.memory;
        memory.store_u16(self.avail + 2, self.next_avail.to_le(), Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let wanted = if self.features & F_EVENT_IDX != 0 {
            let event = memory.load_u16(self.used + 4 + 8 * u64::from(self.size), Ordering::Acquire).unwrap();
            let new = self.next_avail;
            // vring_need_event, virtio 1.2, 2.7.7.2
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.published)
        } else {
            memory.load_u16(self.used, Ordering::Acquire).unwrap() & 1 == 0
        };
        self.published = self.next_avail;
        if wanted {
            self.kick();
        }
    }

    pub fn kick(&mut self) {
        self.kicks += 1;
        self.kick.write(1).unwrap();
    }

    /// The next finished chain, head and length, if there is one.
    pub fn try_used(&mut self) -> Option<(u16, u32)> {
        let memory = &self.heap.memory;
        if memory.load_u16(self.used + 2, Ordering::Acquire).unwrap() == self.last_used {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.last_used % self.size);
        let id = memory.load_u32(entry, Ordering::Relaxed).unwrap() as u16;
        let len = memory.load_u32(entry + 4, Ordering::Relaxed).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        self.release(id);
        Some((id, len))
    }

    fn release(&mut self, head: u16) {
        let mut at = head;
        loop {
            let mut raw = [0; 16];
            self.heap.memory.read(self.descriptors + 16 * u64::from(at), &mut raw).unwrap();
            self.free.push(at);
            let flags = u16::from_le_bytes([raw[12], raw[13]]);
            if flags & NEXT == 0 || self.free.len() >= usize::from(self.size) {
                return;
            }
            at = u16::from_le_bytes([raw[14], raw[15]]) % self.size;
        }
    }

    /// The next finished chain; sleeps on the interrupt, as a driver does.
    pub fn wait_used(&mut self, timeout: Duration) -> Option<(u16, u32)> {
        let deadline = Instant::now() + timeout;
        loop {
            let seen = self.interrupts.count();
            if self.features & F_EVENT_IDX != 0 {
                let event = self.avail + 4 + 2 * u64::from(self.size);
                self.heap.memory.store_u16(event, self.last_used, Ordering::Release).unwrap();
                fence(Ordering::SeqCst);
            }
            if let Some(used) = self.try_used() {
                return Some(used);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if self.interrupts.wait(seen, left).is_none() {
                // With little time it may just be on its way.
                let late = self.try_used();
                assert!(late.is_none() || timeout < PATIENCE, "finished, but without an interrupt");
                return late;
            }
        }
    }

    /// Adds a chain, publishes it and waits for it alone; returns the length that the device wrote.
    pub fn run(&mut self, pieces: &[Piece]) -> u32 {
        let head = self.add(pieces);
        self.publish();
        let (id, len) = self.wait_used(PATIENCE).expect("the device hangs");
        assert_eq!(id, head);
        len
    }
}
