//! Exclusive use of ranges, for requests that must not overlap.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Ranges that are in use. Few at a time: one for each virtqueue at most.
#[derive(Debug, Default)]
pub struct RangeLocks {
    busy: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
}

/// Exclusive use of a range, until dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: (u64, u64),
}

impl RangeLocks {
    fn busy(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody uses any of `start..end`.
    pub fn lock(&self, start: u64, end: u64) -> RangeGuard<'_> {
        let mut busy = self.busy();
        while busy.iter().any(|(s, e)| *s < end && start < *e) {
            busy = self.freed.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        busy.push((start, end));
        RangeGuard { locks: self, range: (start, end) }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut busy = self.locks.busy();
        if let Some(at) = busy.iter().position(|r| *r == self.range) {
            busy.swap_remove(at);
        }
        drop(busy);
        self.locks.freed.notify_all();
    }
}
