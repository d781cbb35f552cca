//! The soft TLB: guest-linear page to host address, for each address space and privilege.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};

use crate::cache::Block;

pub const PAGE_MASK: u64 = 0xfff;
pub const ENTRIES: usize = 1024;
const CODE_ENTRIES: usize = 256;
const JUMP_ENTRIES: usize = 4096;
/// Never the page of a fetch: the low bits of a code page's tag are compared as zeroes.
const INVALID: u64 = 1;
/// No canonical address, and so never the target of a jump.
const NO_JUMP: Jump = Jump { rip: 1 << 63 | 1, block: std::ptr::null() };
/// Address spaces (PCIDs) that are kept at a time.
pub const SPACES: usize = 6;

/// Where the page at linear address `tag` is on the host.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    pub tag: u64,
    pub host: u64,
}

impl Entry {
    /// An entry that no access matches: the tag is of a page that another entry stands for, and not of the page
    /// before or after, which an access may reach into.
    const fn invalid(index: usize) -> Self {
        Self { tag: ((index ^ (ENTRIES / 2)) as u64) << 12, host: 0 }
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
    /// Which 2 MiB (1 GiB) regions, hashed, have entries that came from a large page: INVLPG of one address
    /// there must drop them all.
    large_2m: [u64; 16],
    large_1g: [u64; 16],
    /// Which chunks of the tables have entries: a flush looks at no others.
    used_read: u64,
    used_write: u64,
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

fn region_bit(linear: u64, shift: u32) -> (usize, u64) {
    let hash = (linear >> shift) as usize & 1023;
    (hash / 64, 1 << (hash % 64))
}

impl DataSet {
    fn flush(&mut self) {
        for (table, used) in [(&mut self.read, &mut self.used_read), (&mut self.write, &mut self.used_write)] {
            for chunk in bits(std::mem::take(used)) {
                let range = chunk * CHUNK..(chunk + 1) * CHUNK;
                table[range.clone()].copy_from_slice(&NO_ENTRIES[range]);
            }
        }
        self.large_2m.fill(0);
        self.large_1g.fill(0);
    }

    pub fn fill(&mut self, linear: u64, host: *mut u8, write: bool, page_shift: u32) {
        let page = linear & !PAGE_MASK;
        let entry = Entry { tag: page, host: host as u64 };
        let at = index(linear);
        let (table, used) =
            if write { (&mut self.write, &mut self.used_write) } else { (&mut self.read, &mut self.used_read) };
        table[at] = entry;
        *used |= 1 << (at / CHUNK);
        if page_shift > 12 {
            let (bits, shift) = if page_shift > 22 { (&mut self.large_1g, 30) } else { (&mut self.large_2m, 21) };
            let (word, bit) = region_bit(linear, shift);
            bits[word] |= bit;
        }
    }

    fn flush_page(&mut self, linear: u64) {
        let in_large = |bits: &[u64; 16], shift| {
            let (word, bit) = region_bit(linear, shift);
            bits[word] & bit != 0
        };
        if in_large(&self.large_2m, 21) || in_large(&self.large_1g, 30) {
            return self.flush();
        }
        let page = linear & !PAGE_MASK;
        for table in [&mut self.read, &mut self.write] {
            let entry = &mut table[index(linear)];
            if entry.tag == page {
                *entry = Entry::invalid(index(linear));
            }
        }
    }

    /// Drops the write entries that lead to this host page; whether there were any.
    fn forbid_writes(&mut self, host: *mut u8) -> bool {
        let mut any = false;
        for chunk in bits(self.used_write) {
            for at in chunk * CHUNK..(chunk + 1) * CHUNK {
                if self.write[at].host == host as u64 {
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
}

/// A block that starts at a linear address.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Jump {
    pub rip: u64,
    pub block: *const Block,
}

/// Translations for instruction fetches, and the blocks that start at recent addresses.
#[repr(C)]
pub struct CodeSet {
    pub jumps: [Jump; JUMP_ENTRIES],
    pages: [CodeEntry; CODE_ENTRIES],
    /// Which groups of jumps, and which chunks of pages, have entries.
    used_jumps: u64,
    used_pages: u64,
    large: bool,
}

/// A page's entries form a group of 64, so that a page can be dropped without a full flush. Translated code computes
/// the same (`translate::jumps`).
#[inline(always)]
const fn jump_index(linear: u64) -> usize {
    (((linear ^ (linear & 0x3f) << 6) >> 6) & (JUMP_ENTRIES as u64 - 1)) as usize
}

impl CodeSet {
    fn flush(&mut self) {
        const CHUNK: usize = CODE_ENTRIES / 64;
        for chunk in bits(std::mem::take(&mut self.used_pages)) {
            self.pages[chunk * CHUNK..(chunk + 1) * CHUNK].fill(CodeEntry { tag: INVALID, gpa: 0 });
        }
        self.flush_jumps();
        self.large = false;
    }

    pub fn flush_jumps(&mut self) {
        for group in bits(std::mem::take(&mut self.used_jumps)) {
            self.jumps[group * 64..(group + 1) * 64].fill(NO_JUMP);
        }
    }

    fn flush_page(&mut self, linear: u64) {
        if self.large {
            return self.flush();
        }
        let page = linear & !PAGE_MASK;
        let entry = &mut self.pages[(linear >> 12) as usize % CODE_ENTRIES];
        if entry.tag == page {
            entry.tag = INVALID;
        }
        let group = jump_index(page) & !0x3f;
        if self.used_jumps >> (group / 64) & 1 != 0 {
            self.jumps[group..group + 64].fill(NO_JUMP);
            self.used_jumps &= !(1 << (group / 64));
        }
    }

    #[inline(always)]
    pub fn page(&self, linear: u64) -> Option<u64> {
        let entry = &self.pages[(linear >> 12) as usize % CODE_ENTRIES];
        (entry.tag == linear & !PAGE_MASK).then_some(entry.gpa)
    }

    pub fn fill(&mut self, linear: u64, gpa: u64, page_shift: u32) {
        let entry = CodeEntry { tag: linear & !PAGE_MASK, gpa: gpa & !PAGE_MASK };
        let at = (linear >> 12) as usize % CODE_ENTRIES;
        self.pages[at] = entry;
        self.used_pages |= 1 << (at / (CODE_ENTRIES / 64));
        self.large |= page_shift > 12;
    }

    #[inline(always)]
    pub fn jump(&self, linear: u64) -> *const Block {
        let jump = &self.jumps[jump_index(linear)];
        if jump.rip == linear { jump.block } else { std::ptr::null() }
    }

    pub fn remember(&mut self, linear: u64, block: *const Block) {
        let at = jump_index(linear);
        self.jumps[at] = Jump { rip: linear, block };
        self.used_jumps |= 1 << (at / 64);
    }
}

/// All that is cached of one address space.
pub struct Space {
    /// PCID, or 0 where PCIDs are off.
    pcid: u16,
    used: u64,
    empty: bool,
    pub user: DataSet,
    pub supervisor: DataSet,
    /// Supervisor accesses while RFLAGS.AC lets them reach user pages (SMAP).
    pub supervisor_ac: DataSet,
    pub user_code: CodeSet,
    pub supervisor_code: CodeSet,
}

impl Space {
    fn boxed() -> Box<Self> {
        let layout = Layout::new::<Self>();
        // SAFETY: all fields are integers, bools and raw pointers, for which zeroes are valid; `flush` follows.
        let mut space = unsafe {
            let raw = alloc_zeroed(layout).cast::<Self>();
            if raw.is_null() {
                handle_alloc_error(layout);
            }
            Box::from_raw(raw)
        };
        for set in [&mut space.user, &mut space.supervisor, &mut space.supervisor_ac] {
            (set.used_read, set.used_write) = (u64::MAX, u64::MAX);
        }
        for set in [&mut space.user_code, &mut space.supervisor_code] {
            (set.used_jumps, set.used_pages) = (u64::MAX, u64::MAX);
        }
        space.flush();
        space
    }

    fn flush(&mut self) {
        self.user.flush();
        self.supervisor.flush();
        self.supervisor_ac.flush();
        self.user_code.flush();
        self.supervisor_code.flush();
        self.empty = true;
    }

    fn flush_page(&mut self, linear: u64) {
        self.user.flush_page(linear);
        self.supervisor.flush_page(linear);
        self.supervisor_ac.flush_page(linear);
        self.user_code.flush_page(linear);
        self.supervisor_code.flush_page(linear);
    }
}

/// The TLB of one vCPU.
pub struct Tlb {
    spaces: Vec<Box<Space>>,
    current: usize,
    clock: u64,
    pub flushes: u64,
    /// A set that nothing is ever filled into.
    empty: Option<Box<Space>>,
}

impl Default for Tlb {
    fn default() -> Self {
        let mut spaces = vec![Space::boxed()];
        spaces[0].empty = false;
        Self { spaces, current: 0, clock: 0, flushes: 0, empty: None }
    }
}

impl Tlb {
    #[inline(always)]
    pub fn space(&mut self) -> &mut Space {
        &mut self.spaces[self.current]
    }

    /// A data set without entries: every access misses.
    pub fn empty(&mut self) -> *mut DataSet {
        &raw mut self.empty.get_or_insert_with(Space::boxed).user
    }

    /// Makes `pcid`'s space current; `keep` says that what is cached of it is still valid.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.clock += 1;
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
        for (i, space) in self.spaces.iter_mut().enumerate().filter(|(_, s)| s.pcid == pcid) {
            space.flush();
            space.empty = i != current;
        }
    }

    /// One page, in every space: its translation may be global.
    pub fn flush_page(&mut self, linear: u64) {
        for space in self.spaces.iter_mut().filter(|s| !s.empty) {
            space.flush_page(linear);
        }
    }

    /// From now on writes to this host page take the slow path; whether any may have gone the quick one.
    pub fn forbid_writes(&mut self, host: *mut u8) -> bool {
        let mut any = false;
        for space in self.spaces.iter_mut().filter(|s| !s.empty) {
            for set in [&mut space.user, &mut space.supervisor, &mut space.supervisor_ac] {
                any |= set.forbid_writes(host);
            }
        }
        any
    }

    /// Forgets which blocks start where (they are about to be freed).
    pub fn flush_jumps(&mut self) {
        for space in &mut self.spaces {
            space.user_code.flush_jumps();
            space.supervisor_code.flush_jumps();
        }
    }
}
