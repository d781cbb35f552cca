//! The soft TLB: guest-linear page to host address, for each address space and privilege.

use std::{
    alloc::{Layout, alloc_zeroed, handle_alloc_error},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    cache::Block,
    mmu::Translation,
    translate::window::{Kind, Windows},
};

pub const PAGE_MASK: u64 = 0xfff;
pub const ENTRIES: usize = 2048;
const CODE_ENTRIES: usize = 256;
pub const JUMP_ENTRIES: usize = 16384;
/// How jumps are spread: by the high bits of a product.
pub const JUMP_FACTOR: u32 = 0x9e37_79b1;
pub const JUMP_SHIFT: u32 = start_shift(JUMP_ENTRIES);
const PLACES: usize = 4096;
/// Never the page of a fetch: the low bits of a code page's tag are compared as zeroes.
const INVALID: u64 = 1;
/// Addresses that empty entries are for. A guest may jump there, so each is only used where it is not looked for.
const NOWHERE: [u64; 2] = [1 << 63 | 1, 1 << 63 | 2];
/// Address spaces (PCIDs) that are kept at a time.
pub const SPACES: usize = 6;

/// Where the page at linear address `tag` is on the host.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub struct Entry {
    pub tag: u64,
    pub host: u64,
    /// From a linear address to the host's.
    pub difference: u64,
    /// The page is the same in all address spaces.
    pub global: u64,
}

/// Makes an entry's tag that of a page which has its entry at another index, far from this one.
const ELSEWHERE: u64 = (ENTRIES as u64 / 2) << 12;

/// An entry's size as a power of two.
pub const ENTRY_SHIFT: u8 = 5;
const _: () = assert!(size_of::<Entry>() == 1 << ENTRY_SHIFT);

impl Entry {
    /// An entry that no access matches: the tag is of a page that another entry stands for, and not of the page
    /// before or after, which an access may reach into.
    const fn invalid(index: usize) -> Self {
        Self { tag: (index as u64) << 12 ^ ELSEWHERE, host: 0, difference: 0, global: 0 }
    }

    /// An entry that no access matches either, but that says where a page is which may be written the slow way only:
    /// a watched one. Instead of a difference it has the guest-physical address.
    const fn watched(page: u64, host: u64, gpa: u64) -> Self {
        Self { tag: page ^ ELSEWHERE, host, difference: gpa, global: 0 }
    }

    /// Host and guest-physical address of `linear`, if this is the entry of a watched page that has it.
    #[inline]
    pub fn find_watched(&self, linear: u64) -> Option<(u64, u64)> {
        let found = self.tag ^ ELSEWHERE == linear & !PAGE_MASK && self.host != 0;
        found.then(|| (self.host + (linear & PAGE_MASK), self.difference + (linear & PAGE_MASK)))
    }

    /// The host address of `bytes` bytes at a linear address, if they are in this entry's page.
    #[inline(always)]
    pub fn find(&self, linear: u64, bytes: u64) -> Option<u64> {
        let offset = linear ^ self.tag;
        (offset <= 0x1000 - bytes).then(|| self.host.wrapping_add(offset))
    }
}

static NO_ENTRIES: [Entry; ENTRIES] = {
    let mut entries = [Entry::invalid(0); ENTRIES];
    let mut i = 0;
    while i < ENTRIES {
        entries[i] = Entry::invalid(i);
        i += 1;
    }
    entries
};

/// Translations for data accesses of one privilege in one address space.
#[repr(C)]
pub struct DataSet {
    pub read: [Entry; ENTRIES],
    pub write: [Entry; ENTRIES],
    large: Regions,
    /// Which chunks of the tables have entries: a flush looks at no others.
    used_read: u64,
    used_write: u64,
    /// Which chunks have entries of pages that are not global.
    local_read: u64,
    local_write: u64,
}

/// Entries that one bit of a set's `used` words stands for.
const CHUNK: usize = ENTRIES / 64;

/// Which entry a linear address uses.
#[inline(always)]
pub const fn index(linear: u64) -> usize {
    (linear >> 12) as usize & (ENTRIES - 1)
}

/// The bits that are set, lowest first.
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(bit)
    })
}

/// Regions that are remembered at a time; a power of two.
const REGIONS: usize = 1024;

/// Which regions of 2 MiB (1 GiB) have entries that came from a large page: INVLPG of one address there must drop them
/// all. No others, as far as that can be: most often it names a page of a process, at an address as good as random, and
/// the kernel's own entries are many and dear.
struct Regions {
    /// Slots of a hash table: 0 where it is empty.
    table: [u64; REGIONS],
    count: usize,
    /// There are more: any address may be in one.
    full: bool,
}

impl Regions {
    /// Never 0, and different for regions of different size.
    const fn key(linear: u64, shift: u32) -> u64 {
        (linear >> shift) << 2 | if shift == 30 { 2 } else { 1 }
    }

    /// Where the region is, or where it would be.
    fn slot(&self, key: u64) -> usize {
        let mut at = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - REGIONS.ilog2())) as usize;
        while self.table[at] != 0 && self.table[at] != key {
            at = (at + 1) % REGIONS;
        }
        at
    }

    fn note(&mut self, linear: u64, page_shift: u32) {
        match page_shift {
            12 => {}
            21 => self.add(Self::key(linear, 21)),
            // 4 MiB, of two-level paging.
            22 => [0, 1 << 21].iter().for_each(|half| self.add(Self::key(linear & !(1 << 21) | half, 21))),
            _ => self.add(Self::key(linear, 30)),
        }
    }

    fn add(&mut self, key: u64) {
        let at = self.slot(key);
        if self.table[at] == 0 {
            // Some slots stay empty, where searches end.
            if self.count == REGIONS / 4 * 3 {
                self.full = true;
                return;
            }
            self.table[at] = key;
            self.count += 1;
        }
    }

    fn contain(&self, linear: u64) -> bool {
        self.full
            || self.count != 0 && [21, 30].iter().any(|shift| self.table[self.slot(Self::key(linear, *shift))] != 0)
    }

    fn clear(&mut self) {
        if self.count != 0 {
            self.table.fill(0);
            (self.count, self.full) = (0, false);
        }
    }
}

impl DataSet {
    pub fn flush(&mut self) {
        (self.local_read, self.local_write) = (self.used_read, self.used_write);
        self.flush_local();
        self.large.clear();
    }

    /// All but entries of global pages (and some of those).
    fn flush_local(&mut self) {
        let read = (&mut self.read, &mut self.used_read, &mut self.local_read);
        let write = (&mut self.write, &mut self.used_write, &mut self.local_write);
        for (table, used, local) in [read, write] {
            let chunks = std::mem::take(local);
            *used &= !chunks;
            for chunk in bits(chunks) {
                let range = chunk * CHUNK..(chunk + 1) * CHUNK;
                table[range.clone()].copy_from_slice(&NO_ENTRIES[range]);
            }
        }
    }

    /// All entries for writing.
    pub fn flush_writes(&mut self) {
        self.local_write = 0;
        for chunk in bits(std::mem::take(&mut self.used_write)) {
            let range = chunk * CHUNK..(chunk + 1) * CHUNK;
            self.write[range.clone()].copy_from_slice(&NO_ENTRIES[range]);
        }
    }

    pub fn fill(&mut self, linear: u64, host: *mut u8, write: bool, found: &Translation) {
        let page = linear & !PAGE_MASK;
        let difference = (host as u64).wrapping_sub(page);
        let entry = Entry { tag: page, host: host as u64, difference, global: found.global.into() };
        self.put(linear, entry, write, found);
    }

    /// The page may be written, but has code: writes find it by [`Entry::find_watched`].
    pub fn fill_watched(&mut self, linear: u64, host: *mut u8, found: &Translation) {
        let entry = Entry::watched(linear & !PAGE_MASK, host as u64, found.gpa & !PAGE_MASK);
        self.put(linear, entry, true, found);
    }

    fn put(&mut self, linear: u64, entry: Entry, write: bool, found: &Translation) {
        let at = index(linear);
        let (table, used, local) = if write {
            (&mut self.write, &mut self.used_write, &mut self.local_write)
        } else {
            (&mut self.read, &mut self.used_read, &mut self.local_read)
        };
        table[at] = entry;
        *used |= 1 << (at / CHUNK);
        if !found.global {
            *local |= 1 << (at / CHUNK);
        }
        self.large.note(linear, found.shift);
    }

    /// Whether everything was dropped: a large page may be among it.
    fn flush_page(&mut self, linear: u64) -> bool {
        if self.large.contain(linear) {
            self.flush();
            return true;
        }
        let page = linear & !PAGE_MASK;
        for table in [&mut self.read, &mut self.write] {
            let entry = &mut table[index(linear)];
            if entry.tag == page || entry.tag == page ^ ELSEWHERE {
                *entry = Entry::invalid(index(linear));
            }
        }
        false
    }

    /// Drops the write entries that lead to this host page; whether there were any.
    fn forbid_writes(&mut self, host: *mut u8) -> bool {
        let mut any = false;
        for chunk in bits(self.used_write) {
            for at in chunk * CHUNK..(chunk + 1) * CHUNK {
                let entry = &self.write[at];
                if entry.host == host as u64 && index(entry.tag) == at {
                    self.write[at] = Entry::invalid(at);
                    any = true;
                }
            }
        }
        any
    }
}

#[derive(Clone, Copy)]
struct CodeEntry {
    tag: u64,
    gpa: u64,
    global: bool,
}

const NO_CODE: CodeEntry = CodeEntry { tag: INVALID, gpa: 0, global: false };

/// What starts at a linear address: a block, or the code that it was translated to.
#[repr(C)]
pub struct Start<T> {
    pub rip: u64,
    pub what: *const T,
}

impl<T> Clone for Start<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Start<T> {}

pub type Jump = Start<u8>;

/// Where a linear address is looked for first in a table of `N`; the other place is next to it. Translated code computes
/// the same (`Work::jump_to`).
#[inline(always)]
const fn start_index<const N: usize>(linear: u64) -> usize {
    ((linear as u32).wrapping_mul(JUMP_FACTOR) >> start_shift(N)) as usize
}

const fn start_shift(entries: usize) -> u32 {
    u32::BITS - entries.ilog2()
}

/// What starts at recent addresses.
#[repr(C)]
pub struct Starts<T, const N: usize> {
    entries: [Start<T>; N],
    /// Which groups of entries are in use, and which have some of pages that are not global.
    used: u64,
    local: u64,
}

impl<T, const N: usize> Starts<T, N> {
    /// Entries that one bit stands for.
    const GROUP: usize = N / 64;

    #[inline(always)]
    fn find(&self, linear: u64) -> *const T {
        let first = start_index::<N>(linear);
        let at = if self.entries[first].rip == linear { first } else { first ^ 1 };
        let start = &self.entries[at];
        if start.rip == linear { start.what } else { std::ptr::null() }
    }

    fn add(&mut self, linear: u64, what: *const T, global: bool) {
        let at = start_index::<N>(linear);
        if self.entries[at].rip != linear {
            self.entries[at ^ 1] = self.entries[at];
        }
        self.entries[at] = Start { rip: linear, what };
        self.used |= 1 << (at / Self::GROUP);
        if !global {
            self.local |= 1 << (at / Self::GROUP);
        }
    }

    /// What started here starts elsewhere now.
    fn replace(&mut self, linear: u64, old: *const T, new: *const T) {
        let first = start_index::<N>(linear);
        for at in [first, first ^ 1] {
            let start = &mut self.entries[at];
            if start.rip == linear && start.what == old {
                start.what = new;
            }
        }
    }

    fn flush_local(&mut self) {
        let groups = std::mem::take(&mut self.local);
        self.used &= !groups;
        for group in bits(groups) {
            self.entries[group * Self::GROUP..(group + 1) * Self::GROUP].fill(Self::nothing(NOWHERE[0]));
            let exception = start_index::<N>(NOWHERE[0]);
            if exception / Self::GROUP == group {
                self.entries[exception] = Self::nothing(NOWHERE[1]);
                self.entries[exception ^ 1] = Self::nothing(NOWHERE[1]);
            }
        }
    }

    /// What no search finds: it is for an address that is not looked for in this place.
    const fn nothing(rip: u64) -> Start<T> {
        Start { rip, what: std::ptr::null() }
    }

    fn flush(&mut self) {
        self.local = self.used;
        self.flush_local();
    }
}

/// Translations for instruction fetches, and what starts at recent addresses: for translated code, which jumps there, and
/// for the run loop.
#[repr(C, align(64))]
pub struct CodeSet {
    pub jumps: Starts<u8, JUMP_ENTRIES>,
    places: Starts<Block, PLACES>,
    pages: [CodeEntry; CODE_ENTRIES],
    /// Which chunks of pages have entries, and which have some of pages that are not global.
    used_pages: u64,
    local_pages: u64,
    /// A number of its own for as long as nothing that it says of code becomes void.
    pub generation: u64,
    /// Pages that may have jumps: most pages that INVLPG names have none.
    jump_pages: Pages,
    large: Regions,
}

/// Pages that may be in a table: a page is noted by a hash of its own and by one of its 2 MiB region, so that those of
/// a kernel and those of processes are seldom taken for each other.
#[derive(Clone, Copy, Default)]
struct Pages {
    pages: [u64; 32],
    regions: [u64; 32],
}

impl Pages {
    const fn bit(linear: u64, shift: u32) -> (usize, u64) {
        let hash = ((linear >> shift).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 53) as usize;
        (hash / 64, 1 << (hash % 64))
    }

    #[inline]
    fn note(&mut self, linear: u64) {
        let ((page, of_page), (region, of_region)) = (Self::bit(linear, 12), Self::bit(linear, 21));
        self.pages[page] |= of_page;
        self.regions[region] |= of_region;
    }

    #[inline]
    fn may_contain(&self, linear: u64) -> bool {
        let ((page, of_page), (region, of_region)) = (Self::bit(linear, 12), Self::bit(linear, 21));
        self.pages[page] & of_page != 0 && self.regions[region] & of_region != 0
    }
}

impl CodeSet {
    fn flush(&mut self) {
        self.local_pages = self.used_pages;
        self.flush_jumps();
        self.flush_local();
        self.large.clear();
        self.renew();
    }

    /// What was checked against this set is to be checked again.
    fn renew(&mut self) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.generation = NEXT.fetch_add(1, Ordering::Relaxed);
    }

    /// All but entries of global pages (and some of those).
    fn flush_local(&mut self) {
        if self.local_pages | self.jumps.local | self.places.local == 0 {
            return;
        }
        self.renew();
        const CHUNK: usize = CODE_ENTRIES / 64;
        let chunks = std::mem::take(&mut self.local_pages);
        self.used_pages &= !chunks;
        for chunk in bits(chunks) {
            self.pages[chunk * CHUNK..(chunk + 1) * CHUNK].fill(NO_CODE);
        }
        self.jumps.flush_local();
        self.places.flush_local();
    }

    pub fn flush_jumps(&mut self) {
        self.jump_pages = Pages::default();
        self.jumps.flush();
        self.places.flush();
    }

    fn flush_page(&mut self, linear: u64) {
        if self.large.contain(linear) {
            return self.flush();
        }
        let page = linear & !PAGE_MASK;
        let entry = &mut self.pages[(linear >> 12) as usize % CODE_ENTRIES];
        if entry.tag == page {
            entry.tag = INVALID;
            self.renew();
        }
        if self.jump_pages.may_contain(linear) {
            self.flush_jumps();
            self.renew();
        }
    }

    /// The page is one that a generation stands for.
    pub fn note_page(&mut self, linear: u64) {
        self.jump_pages.note(linear);
    }

    #[inline(always)]
    pub fn page(&self, linear: u64) -> Option<u64> {
        let entry = &self.pages[(linear >> 12) as usize % CODE_ENTRIES];
        (entry.tag == linear & !PAGE_MASK).then_some(entry.gpa)
    }

    pub fn fill(&mut self, linear: u64, found: &Translation) {
        let entry = CodeEntry { tag: linear & !PAGE_MASK, gpa: found.gpa & !PAGE_MASK, global: found.global };
        let at = (linear >> 12) as usize % CODE_ENTRIES;
        self.pages[at] = entry;
        self.used_pages |= 1 << (at / (CODE_ENTRIES / 64));
        if !found.global {
            self.local_pages |= 1 << (at / (CODE_ENTRIES / 64));
        }
        self.large.note(linear, found.shift);
    }

    /// The block that starts here, if it did lately.
    #[inline(always)]
    pub fn place(&self, linear: u64) -> *const Block {
        self.places.find(linear)
    }

    fn is_global(&self, linear: u64) -> bool {
        let page = &self.pages[(linear >> 12) as usize % CODE_ENTRIES];
        page.tag == linear & !PAGE_MASK && page.global
    }

    /// The block starts here, as long as nothing that this says of code becomes void.
    pub fn remember(&mut self, linear: u64, block: *const Block) {
        let global = self.is_global(linear);
        self.places.add(linear, block, global);
        self.jump_pages.note(linear);
    }

    /// Whether jumps of translated code lead to this translation.
    #[inline(always)]
    pub fn jumps_to(&self, linear: u64, code: *const u8) -> bool {
        self.jumps.find(linear) == code
    }

    /// Has them do so as long as nothing that this says of code becomes void: of the page, too.
    pub fn remember_code(&mut self, linear: u64, code: *const u8) {
        let global = self.is_global(linear);
        self.jumps.add(linear, code, global);
        self.jump_pages.note(linear);
    }

    /// A translation took the place of another.
    pub fn replace_code(&mut self, linear: u64, old: *const u8, new: *const u8) {
        self.jumps.replace(linear, old, new);
    }
}

/// What supervisor code sees where it may not reach user pages: mostly global, and so the same in all address spaces.
/// What is not is dropped with every change of the address space.
#[repr(C)]
pub struct Kernel {
    pub data: DataSet,
    pub code: CodeSet,
}

/// All that is cached of one address space besides.
#[repr(C)]
pub struct Space {
    /// PCID, or 0 where PCIDs are off.
    pcid: u16,
    used: u64,
    empty: bool,
    pub user: DataSet,
    /// Supervisor accesses while RFLAGS.AC lets them reach user pages (SMAP).
    pub supervisor_ac: DataSet,
    pub user_code: CodeSet,
}

/// # Safety
/// All zeroes are a valid `T`.
unsafe fn zeroed<T>() -> Box<T> {
    let layout = Layout::new::<T>();
    // SAFETY: the caller's word; the layout is that of `T`, which is not empty.
    unsafe {
        let raw = alloc_zeroed(layout).cast::<T>();
        if raw.is_null() {
            handle_alloc_error(layout);
        }
        Box::from_raw(raw)
    }
}

impl DataSet {
    /// After zeroed memory, whose tags would match.
    fn initialise(&mut self) {
        (self.used_read, self.used_write) = (u64::MAX, u64::MAX);
        self.flush();
    }
}

impl CodeSet {
    fn initialise(&mut self) {
        (self.jumps.used, self.places.used, self.used_pages) = (u64::MAX, u64::MAX, u64::MAX);
        self.flush();
    }
}

impl Kernel {
    fn boxed() -> Box<Self> {
        // SAFETY: all fields are integers, bools and raw pointers, for which zeroes are valid.
        let mut kernel = unsafe { zeroed::<Self>() };
        kernel.data.initialise();
        kernel.code.initialise();
        kernel
    }

    fn flush(&mut self) {
        self.data.flush();
        self.code.flush();
    }

    fn flush_local(&mut self) {
        self.data.flush_local();
        self.code.flush_local();
    }
}

impl Space {
    fn boxed() -> Box<Self> {
        // SAFETY: as in `Kernel::boxed`.
        let mut space = unsafe { zeroed::<Self>() };
        space.user.initialise();
        space.supervisor_ac.initialise();
        space.user_code.initialise();
        space.empty = true;
        space
    }

    fn flush(&mut self) {
        self.user.flush();
        self.supervisor_ac.flush();
        self.user_code.flush();
        self.empty = true;
    }

    /// Whether everything that user code sees was dropped.
    fn flush_page(&mut self, linear: u64) -> bool {
        self.supervisor_ac.flush_page(linear);
        self.user_code.flush_page(linear);
        self.user.flush_page(linear)
    }
}

/// The TLB of one vCPU.
pub struct Tlb {
    pub kernel: Box<Kernel>,
    spaces: Vec<Box<Space>>,
    current: usize,
    clock: u64,
    pub flushes: u64,
    /// A set that nothing is ever filled into.
    empty: Option<Box<Space>>,
    /// What hot code knows of the kernel's set and of the current space's.
    pub windows: Windows,
}

impl Default for Tlb {
    fn default() -> Self {
        let mut spaces = vec![Space::boxed()];
        spaces[0].empty = false;
        Self {
            kernel: Kernel::boxed(),
            spaces,
            current: 0,
            clock: 0,
            flushes: 0,
            empty: None,
            windows: Windows::default(),
        }
    }
}

impl Tlb {
    /// Where instructions of the privilege are fetched from.
    #[inline(always)]
    pub fn code(&mut self, user: bool) -> &mut CodeSet {
        if user { &mut self.spaces[self.current].user_code } else { &mut self.kernel.code }
    }

    #[inline(always)]
    pub fn space(&mut self) -> &mut Space {
        &mut self.spaces[self.current]
    }

    /// A data set without entries: every access misses.
    pub fn empty(&mut self) -> *mut DataSet {
        &raw mut self.empty.get_or_insert_with(Space::boxed).user
    }

    /// A code set without entries, of this generation.
    pub fn no_code(&mut self, generation: u64) -> *const CodeSet {
        let code = &mut self.empty.get_or_insert_with(Space::boxed).user_code;
        code.generation = generation;
        code
    }

    /// Makes `pcid`'s space current; `keep` says that what is cached of it is still valid.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.clock += 1;
        self.kernel.flush_local();
        self.windows.forget(Kind::Local);
        self.windows.forget(Kind::User);
        let found = self.spaces.iter().position(|s| s.pcid == pcid);
        let at = match found {
            Some(at) => at,
            None if self.spaces.len() < SPACES => {
                self.spaces.push(Space::boxed());
                self.spaces.len() - 1
            }
            None => (0..self.spaces.len()).min_by_key(|&i| self.spaces[i].used).unwrap_or(0),
        };
        let space = &mut self.spaces[at];
        if (found.is_none() || !keep) && !space.empty {
            space.flush();
            self.flushes += 1;
        }
        space.pcid = pcid;
        space.used = self.clock;
        space.empty = false;
        self.current = at;
    }

    pub fn flush_all(&mut self) {
        self.flushes += 1;
        self.windows.forget_all();
        self.kernel.flush();
        for space in &mut self.spaces {
            if !space.empty {
                space.flush();
            }
        }
        self.space().empty = false;
    }

    /// Everything of one PCID.
    pub fn flush_space(&mut self, pcid: u16) {
        let current = self.current;
        self.kernel.flush_local();
        self.windows.forget(Kind::Local);
        self.windows.forget(Kind::User);
        for (i, space) in self.spaces.iter_mut().enumerate().filter(|(_, s)| s.pcid == pcid) {
            space.flush();
            space.empty = i != current;
        }
    }

    /// One page, in every space: its translation may be global.
    pub fn flush_page(&mut self, linear: u64) {
        if self.kernel.data.flush_page(linear) {
            self.windows.forget(Kind::Global);
            self.windows.forget(Kind::Local);
        }
        self.kernel.code.flush_page(linear);
        for (i, space) in self.spaces.iter_mut().enumerate().filter(|(_, s)| !s.empty) {
            if space.flush_page(linear) && i == self.current {
                self.windows.forget(Kind::User);
            }
        }
        self.windows.forget_page(linear);
    }

    /// From now on writes to this host page take the slow path; whether any may have gone the quick one.
    pub fn forbid_writes(&mut self, host: *mut u8) -> bool {
        let mut any = self.kernel.data.forbid_writes(host);
        for space in self.spaces.iter_mut().filter(|s| !s.empty) {
            for set in [&mut space.user, &mut space.supervisor_ac] {
                any |= set.forbid_writes(host);
            }
        }
        any | self.windows.forbid_writes(host)
    }

    /// Forgets which blocks start where (they are about to be freed).
    pub fn flush_jumps(&mut self) {
        for space in &mut self.spaces {
            space.user_code.flush_jumps();
        }
        self.kernel.code.flush_jumps();
    }
}

#[cfg(test)]
mod tests;
