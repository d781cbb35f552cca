//! What all vCPUs of a machine share.
//!
//! # How changes of code are noticed
//!
//! Each page of guest RAM has one atomic word in [`vireo_memory::GuestMemory`] that says which 64-byte chunks of it may
//! have been decoded, by any vCPU; a page where it is not 0 is *watched*. Nobody locks it:
//!
//! - Who decodes sets the bits of the bytes that it decodes, fences, and then reads these bytes (or reads them again,
//!   and decodes again if they are not what they were). The block is inserted afterwards, and letters are read later
//!   still, on the same thread.
//! - Who writes (a vCPU without a quick TLB entry, or a device) writes, fences, and then looks at the word. If the
//!   bits of what was written are clear, nothing more happens: the fences order the two sides, so that who decodes
//!   these bytes at the same time sets its bits before that look or reads what was written. If one is set, the word is
//!   cleared, then the writer drops its own blocks of the page, and posts [`Letter::Changed`] to the others.
//! - A bit is only cleared together with the blocks that it stands for: who set one before it was cleared reads
//!   the letter, which is posted after that, once its block is inserted, and drops it. Who sets one later fences
//!   later, too, and so reads what was written. That a page which others have blocks in is no longer watched in
//!   between, or is watched without blocks, does no harm: the former are dropped before their vCPU goes on from an
//!   instruction that serializes, and the latter costs the next write to those chunks a letter for nothing.
//! - Quick TLB entries for writes look at no word. Who finds that the word was 0 posts [`Letter::Watched`], and who
//!   reads that and finds such an entry of the page, by which it may have written since, drops it and posts
//!   [`Letter::Changed`]. Such entries are only made where the word is 0, and only replaced or flushed after the letters
//!   that there are have been read.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock,
    atomic::{AtomicU64, Ordering},
};

use vireo_memory::PageWatch;

use crate::signal::{VcpuSignal, request};

/// The mailbox through which a vCPU learns that code changed under it.
#[derive(Debug, Default)]
pub struct CodeMail {
    letters: Mutex<Vec<Letter>>,
}

/// News about the page of guest-physical memory that starts at this address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Letter {
    /// Its bytes changed: what was decoded from it is void.
    Changed(u64),
    /// Somebody decoded code in it: writes must be noticed from now on.
    Watched(u64),
}

/// Letters that a sleeping vCPU may leave lying.
const BACKLOG: usize = 1024;

impl CodeMail {
    pub fn take(&self) -> Vec<Letter> {
        std::mem::take(&mut *self.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A vCPU's number, and how it is told of something.
type Member = (u32, Arc<VcpuSignal>, Arc<CodeMail>);

/// Shared by all vCPUs of a machine.
#[derive(Debug, Default)]
pub struct Shared {
    vcpus: RwLock<Vec<Member>>,
    split: Mutex<()>,
    /// Until when, by the machine's clock, the host is taken to have more to do than processors.
    crowded_until: AtomicU64,
    /// When the first instruction with user privilege ran.
    pub first_user: std::sync::OnceLock<std::time::Instant>,
}

impl Shared {
    pub fn join(&self, id: u32, signal: Arc<VcpuSignal>, mail: Arc<CodeMail>) {
        self.vcpus.write().unwrap_or_else(PoisonError::into_inner).push((id, signal, mail));
    }

    /// Held during a locked operation that is not one access of the host: split over pages, or on a device.
    pub fn split_lock(&self) -> MutexGuard<'_, ()> {
        self.split.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPUs were kept waiting for a processor of the host, and will be for some time.
    pub fn is_crowded_until(&self, ns: u64) {
        self.crowded_until.store(ns, Ordering::Relaxed);
    }

    pub fn is_crowded(&self, now_ns: u64) -> bool {
        now_ns < self.crowded_until.load(Ordering::Relaxed)
    }

    /// Tells all vCPUs but `by` that code in this page changed.
    pub fn code_changed(&self, page: u64, by: Option<u32>) {
        self.post(Letter::Changed(page), by);
    }

    /// Tells all vCPUs but `by` that `by` holds decoded code of this page.
    pub fn code_watched(&self, page: u64, by: u32) {
        self.post(Letter::Watched(page), Some(by));
    }

    fn post(&self, letter: Letter, by: Option<u32>) {
        for (id, signal, mail) in self.vcpus.read().unwrap_or_else(PoisonError::into_inner).iter() {
            if Some(*id) == by {
                continue;
            }
            let mut letters = mail.letters.lock().unwrap_or_else(PoisonError::into_inner);
            if letters.last() != Some(&letter) {
                letters.push(letter);
            }
            let many = letters.len() >= BACKLOG;
            drop(letters);
            if many {
                // A reason to wake that does nothing else.
                signal.raise(request::CODE | request::INTERRUPT);
            } else {
                signal.note(request::CODE);
            }
        }
    }
}

/// Listens to what devices write.
pub struct DeviceWrites {
    pub memory: vireo_memory::WeakGuestMemory,
    pub shared: Arc<Shared>,
}

impl PageWatch for DeviceWrites {
    fn page_written(&self, gpa: u64, _len: u64) {
        let page = gpa & !crate::tlb::PAGE_MASK;
        if let Some(memory) = self.memory.upgrade() {
            memory.unwatch_page(page);
        }
        self.shared.code_changed(page, None);
    }
}
