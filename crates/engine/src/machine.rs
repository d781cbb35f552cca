//! What all vCPUs of a machine share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

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

/// Shared by all vCPUs of a machine.
#[derive(Debug, Default)]
pub struct Shared {
    vcpus: RwLock<Vec<(u32, Arc<VcpuSignal>, Arc<CodeMail>)>>,
    split: Mutex<()>,
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
        // Decoding watches a page before it reads it, so what was decoded before this is dropped and what is
        // decoded from now on is new.
        if let Some(memory) = self.memory.upgrade() {
            memory.unwatch_page(page);
        }
        self.shared.code_changed(page, None);
    }
}
