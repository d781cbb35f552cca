//! Windows: what the accesses of hot code reached last.
//!
//! An access of a hot block has a window of its own: a run of linear addresses that are one run on the host too. To see
//! that an access is inside takes a subtraction and a comparison with memory that nothing else waits for, where a
//! look-up in the TLB is a chain of seven steps; and a window covers any number of pages that happen to follow each other
//! on the host. An access outside of it asks the TLB ([`super::thunks`]) and moves the window there, or widens it by a
//! page.
//!
//! A window says what one TLB set says: that of user code, or the kernel's. Whatever drops entries of that set drops the
//! windows that may cover them ([`Windows::forget`], [`Windows::forget_page`], [`Windows::forbid_writes`]), and with
//! another set (RFLAGS.AC, breakpoints) none moves.

use std::{
    collections::HashMap,
    mem::offset_of,
    time::{Duration, Instant},
};

/// Windows of a vCPU. Further accesses ask the TLB.
const CAPACITY: usize = 16384;
/// Windows of one kind that are in use at a time.
const LISTED: usize = 768;
/// Moves of a window until it is asked how quickly they came.
pub const PATIENCE: i32 = 256;
/// Host TSC ticks for so many moves below which the access does without.
const HASTE: u64 = PATIENCE as u64 * 1000;

/// How long windows are not begun anew.
const FRESH: Duration = Duration::from_secs(60);

/// What translated code looks at.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Window {
    pub start: u64,
    /// Distances from the start below which an access begins, if it is inside: 0 where none is.
    pub room: u64,
    /// From a linear address to the host's.
    pub difference: u64,
    /// The host's address of the start.
    pub host: u64,
}

/// What moves it looks at.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Frame {
    /// The TLB table that it is filled from, as its offset in the set.
    pub table: i32,
    /// Distances from a page's start below which an access begins that is inside of the page.
    pub room: u32,
    /// Moves that are left until it is asked how quickly they came.
    pub patience: i32,
    pub user: bool,
    /// It may be written through.
    pub write: bool,
    /// The lists that it is in, by their bits.
    pub listed: u8,
    /// All of it is the same in all address spaces.
    pub global: u64,
    /// The host's TSC when it last was asked.
    pub since: u64,
}

/// Windows of a kind that were moved since they were last forgotten.
#[repr(C)]
pub struct List {
    pub count: u64,
    pub windows: [u32; LISTED],
}

/// What [`List`] a window is in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Of user code.
    User,
    /// Of the kernel, covering pages that are the same in all address spaces.
    Global,
    /// Of the kernel, covering others.
    Local,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::User, Self::Global, Self::Local];
}

#[repr(C)]
pub struct Table {
    pub windows: [Window; CAPACITY],
    pub frames: [Frame; CAPACITY],
    pub lists: [List; 3],
}

/// From a window to its frame: both are as large.
pub const TO_FRAME: i32 = offset_of!(Table, frames) as i32;
pub const SHIFT: u8 = 5;
const _: () = assert!(size_of::<Window>() == 1 << SHIFT && size_of::<Frame>() == 1 << SHIFT);
pub const LIST_FULL: i32 = LISTED as i32;
/// Memory that the windows of a vCPU take at most.
pub const BYTES: usize = size_of::<Table>().next_multiple_of(4096);

/// The windows of one vCPU.
pub struct Windows {
    /// Zeroed memory near the vCPU's code; null where there is none.
    table: *mut Table,
    used: usize,
    /// Those of translations that are gone.
    free: Vec<u32>,
    /// Those of the translation that is being made.
    new: Vec<u32>,
    /// Those of others, by the addresses of their blocks.
    owned: HashMap<u64, Vec<u32>>,
    /// When there last were none.
    cleared: Instant,
}

// SAFETY: a vCPU's windows are used by the thread that runs it.
unsafe impl Send for Windows {}

impl Default for Windows {
    fn default() -> Self {
        Self::at(std::ptr::null_mut())
    }
}

impl Windows {
    fn at(table: *mut Table) -> Self {
        Self { table, used: 0, free: Vec::new(), new: Vec::new(), owned: HashMap::new(), cleared: Instant::now() }
    }

    /// # Safety
    /// `memory` has [`BYTES`] zeroed bytes, aligned for a page, that are nobody else's and live as long as this.
    pub unsafe fn new(memory: *mut u8) -> Self {
        Self::at(memory.cast())
    }

    /// A window for accesses of `bytes` bytes, and nothing in it yet: its address, if there is room for one more.
    pub fn add(&mut self, bytes: u64, table: i32, write: bool, user: bool) -> Option<u64> {
        if self.table.is_null() || self.is_exhausted() {
            return None;
        }
        let at = self.free.pop().map_or(self.used, |at| at as usize);
        // Where it was used before it may be in lists.
        // SAFETY: inside the table, and written before.
        let listed = if at == self.used { 0 } else { unsafe { (*self.table).frames[at].listed } };
        self.used = self.used.max(at + 1);
        self.new.push(at as u32);
        let room = 0x1001 - bytes as u32;
        let frame = Frame { table, room, patience: PATIENCE, user, write, listed, global: 0, since: 0 };
        // SAFETY: inside the table, which translated code does not run on now.
        unsafe {
            (&raw mut (*self.table).windows[at]).write(Window { start: 0, room: 0, difference: 0, host: 0 });
            (&raw mut (*self.table).frames[at]).write(frame);
            Some(&raw const (*self.table).windows[at] as u64)
        }
    }

    /// Windows that accesses have.
    pub fn count(&self) -> u64 {
        (self.used - self.free.len()) as u64
    }

    fn is_exhausted(&self) -> bool {
        self.used == CAPACITY && self.free.is_empty()
    }

    /// Whether there is no room for one more, and it is worth to begin anew: most are of code that does not run any more.
    pub fn are_stale(&self) -> bool {
        self.is_exhausted() && self.cleared.elapsed() > FRESH
    }

    /// A translation of this block was made, and takes the place of the one before: that is never run again.
    pub fn translated(&mut self, block: u64) {
        let new = std::mem::take(&mut self.new);
        let old = if new.is_empty() { self.owned.remove(&block) } else { self.owned.insert(block, new) };
        self.free.extend(old.unwrap_or_default());
    }

    /// No translation was made.
    pub fn untranslated(&mut self) {
        self.free.append(&mut self.new);
    }

    fn lists(&mut self) -> &mut [List; 3] {
        // SAFETY: the table is not null where this is called, and nobody else's while this thread is not in
        // translated code.
        unsafe { &mut (*self.table).lists }
    }

    /// Drops what windows of this kind say.
    pub fn forget(&mut self, kind: Kind) {
        if self.table.is_null() {
            return;
        }
        let table = self.table;
        let list = &mut self.lists()[kind as usize];
        for at in list.windows.iter().take(list.count as usize).map(|at| *at as usize) {
            // SAFETY: listed windows are inside the table.
            unsafe {
                (*table).windows[at].room = 0;
                (*table).frames[at].listed &= !(1 << kind as u8);
            }
        }
        list.count = 0;
    }

    /// Drops all.
    pub fn forget_all(&mut self) {
        Kind::ALL.into_iter().for_each(|kind| self.forget(kind));
    }

    /// Drops what windows say of the page at `linear`.
    pub fn forget_page(&mut self, linear: u64) {
        self.drop_where(|window, frame| {
            let last = window.room.wrapping_sub(frame.room.into());
            (linear & !0xfff).wrapping_sub(window.start) <= last
        });
    }

    /// Drops windows through which this page of the host may be written; whether there were any.
    pub fn forbid_writes(&mut self, host: *mut u8) -> bool {
        self.drop_where(|window, frame| {
            let last = window.room.wrapping_sub(frame.room.into());
            frame.write && (host as u64).wrapping_sub(window.host) <= last
        })
    }

    fn drop_where(&mut self, doomed: impl Fn(&Window, &Frame) -> bool) -> bool {
        if self.table.is_null() {
            return false;
        }
        let table = self.table;
        let mut any = false;
        for list in &*self.lists() {
            for at in list.windows.iter().take(list.count as usize).map(|at| *at as usize) {
                // SAFETY: listed windows are inside the table.
                let (window, frame) = unsafe { (&mut (*table).windows[at], &(*table).frames[at]) };
                if window.room != 0 && doomed(window, frame) {
                    window.room = 0;
                    any = true;
                }
            }
        }
        any
    }

    /// Whether a list has no room left.
    pub fn is_full(&mut self) -> bool {
        !self.table.is_null() && self.lists().iter().any(|list| list.count as usize == LISTED)
    }

    /// Makes room where a list has none left.
    pub fn make_room(&mut self) {
        for kind in Kind::ALL {
            if self.lists()[kind as usize].count as usize == LISTED {
                self.forget(kind);
            }
        }
    }

    /// Whether the window at this address moves so often that its access does better without; else it has patience
    /// again.
    pub fn is_hasty(&mut self, window: u64) -> bool {
        let at = (window.wrapping_sub(self.table as u64) >> SHIFT) as usize;
        if self.table.is_null() || at >= self.used {
            return false;
        }
        // SAFETY: inside the table.
        let frame = unsafe { &mut (*self.table).frames[at] };
        if frame.patience >= 0 {
            return false;
        }
        let now = host_ticks();
        let hasty = frame.since != 0 && now.wrapping_sub(frame.since) < HASTE;
        (frame.patience, frame.since) = (PATIENCE, now);
        hasty
    }

    /// Forgets that there are windows: their code is gone.
    pub fn clear(&mut self) {
        self.forget_all();
        self.used = 0;
        self.free.clear();
        self.owned.clear();
        self.cleared = Instant::now();
    }
}

fn host_ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: reads a counter that every processor has.
    return unsafe { std::arch::x86_64::_rdtsc() };
    #[cfg(not(target_arch = "x86_64"))]
    0
}
