//! Decoded blocks, by guest-physical address.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    ptr,
    time::{Duration, Instant},
};

use crate::{
    translate::{PROMOTE, code::CodeBuffer},
    uop::Uop,
};

/// The longest block, in instructions.
pub const MAX_BLOCK: usize = 48;
/// Decoded instructions (32 bytes each) that the vCPUs of a machine keep together, and one at least: at first, and where
/// more are of use.
const CAPACITY: Capacity = Capacity { first: 420_000, first_of_one: 150_000, most: 1_500_000, most_of_one: 450_000 };
/// The same of an engine that is to run out of them often.
const SMALL_CAPACITY: Capacity = Capacity { first: 4_000, first_of_one: 4_000, most: 8_000, most_of_one: 8_000 };
/// Room that was filled again within this time is too small, if most of what filled it is of use.
const SOON: Duration = Duration::from_secs(5);
/// Bytes of translation that an instruction takes at least, about.
const BYTES_OF_ONE: usize = 64;

/// How much room the vCPUs of a machine have together, and how much each has at least.
#[derive(Clone, Copy)]
pub struct Capacity {
    pub first: usize,
    pub first_of_one: usize,
    pub most: usize,
    pub most_of_one: usize,
}

impl Capacity {
    /// For one vCPU of `count`: at first, and at most.
    pub fn of_one(self, count: u32) -> (usize, usize) {
        let count = count.max(1) as usize;
        ((self.first / count).max(self.first_of_one), (self.most / count).max(self.most_of_one))
    }
}

/// A run of instructions with one entry, within one page (only a single instruction may cross into the next).
#[repr(C)]
pub struct Block {
    /// Where its translation is, if there is one.
    pub code: *const u8,
    /// Offset of its translation in the code buffer, 0 if there is none, and of the way out of it.
    pub entry: u32,
    pub dead: u32,
    /// Runs in the interpreter that are left until it is translated.
    pub runs_left: u32,
    /// How often a span of its translation crossed pages; from [`crate::translate::span::CROSSINGS`] on it is translated
    /// without.
    pub crossings: u16,
    /// It is run so often that it is worth more: see [`crate::heat`].
    pub hot: bool,
    /// It is part of a loop, and its accesses have windows: see [`crate::translate::window`].
    pub loops: bool,
    /// Times that it was seen while hot code was looked for.
    pub heat: u8,
    /// Ops whose accesses do without windows all the same.
    pub plain: u64,

    /// Instructions.
    pub count: u8,
    /// Ops that stand for instructions (fewer where some are fused).
    pub abortable: u8,
    pub ops: *const Uop,
    /// [`crate::tlb::CodeSet::generation`] for which the second page is where the block wants it.
    pub checked: u64,
    pub gpa: u64,
    /// Where its translation last started.
    pub linear: u64,
    /// Where the second page was when the block was decoded, for an instruction that crosses pages.
    pub second_page: Option<u64>,
    /// [`crate::cpu::Cpu::mode`] that it was decoded for.
    pub mode: u8,
    pub valid: bool,
    /// The blocks that follow within the page: not taken, taken.
    pub links: [*const Block; 2],
}

/// What [`BlockCache::insert`] is told of a block; see [`Block`].
pub struct Shape {
    pub mode: u8,
    pub second_page: Option<u64>,
    pub count: u32,
    pub abortable: u32,
}

/// How often the code of a page was dropped lately, and when it last was.
struct Changes {
    count: u32,
    last: Instant,
}

/// Time in which half of a page's changes are forgotten: it is another program's by and by.
const HALF_LIFE: Duration = Duration::from_millis(20);

impl Changes {
    /// Those that still count.
    fn lately(&self, now: Instant) -> u32 {
        let halves = now.duration_since(self.last).as_nanos() / HALF_LIFE.as_nanos();
        self.count.checked_shr(halves.try_into().unwrap_or(u32::MAX)).unwrap_or(0)
    }
}

#[derive(Default)]
struct GpaHasher(u64);

impl Hasher for GpaHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        let mixed = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

type Map<V> = HashMap<u64, V, BuildHasherDefault<GpaHasher>>;

/// The blocks of one vCPU. Pointers to blocks stay valid until [`BlockCache::clear`] and
/// [`BlockCache::collect`].
pub struct BlockCache {
    ops: Box<[std::mem::MaybeUninit<Uop>]>,
    used: usize,
    /// Ops that there is room for now.
    limit: usize,
    collected: Option<Instant>,
    blocks: Vec<Box<[std::mem::MaybeUninit<Block>]>>,
    block_count: usize,
    by_address: Map<*mut Block>,
    by_page: Map<Vec<*mut Block>>,
    changes: Map<Changes>,
    /// The blocks that hot ones are followed by, by the address of those.
    paths: Map<Vec<*const Block>>,
    /// The blocks whose translations go on with others, by the address of these.
    heads: Map<Vec<*mut Block>>,
    pub code: CodeBuffer,
    /// Entries of translations that were cut, by the address of their code: jumps may still lead there.
    cut: Map<u32>,
    pub promote: u32,
    pub decoded: u64,
    pub invalidated: u64,
    /// How often blocks were forgotten, and how often only those that had not been of use lately.
    pub clears: u64,
    pub collections: u64,
}

const SLAB: usize = 4096;

fn key(gpa: u64, mode: u8) -> u64 {
    gpa | (u64::from(mode) << 56)
}

impl BlockCache {
    /// For one vCPU of `count`; a small one for tests. Memory is only touched as it fills.
    pub fn new(count: u32, small: bool) -> std::io::Result<Self> {
        let capacity = if small { SMALL_CAPACITY } else { CAPACITY };
        let (limit, most) = capacity.of_one(count);
        Ok(Self {
            ops: Box::new_uninit_slice(most),
            used: 0,
            limit,
            collected: None,
            blocks: Vec::new(),
            block_count: 0,
            by_address: Map::default(),
            by_page: Map::default(),
            changes: Map::default(),
            paths: Map::default(),
            heads: Map::default(),
            code: CodeBuffer::new(count, small)?,
            cut: Map::default(),
            promote: PROMOTE,
            decoded: 0,
            invalidated: 0,
            clears: 0,
            collections: 0,
        })
    }

    pub fn find(&self, gpa: u64, mode: u8) -> *const Block {
        self.by_address.get(&key(gpa, mode)).map_or(ptr::null(), |b| b.cast_const())
    }

    /// What a block's translation is to go on with.
    pub fn path(&self, block: *const Block) -> &[*const Block] {
        self.paths.get(&(block as u64)).map_or(&[], |path| path)
    }

    /// The blocks whose translations go on with this one.
    pub fn heads(&self, part: *const Block) -> &[*mut Block] {
        self.heads.get(&(part as u64)).map_or(&[], |heads| heads)
    }

    pub fn note_head(&mut self, part: *const Block, head: *mut Block) {
        let heads = self.heads.entry(part as u64).or_default();
        if !heads.contains(&head) {
            heads.push(head);
        }
    }

    pub fn set_path(&mut self, block: *const Block, path: Vec<*const Block>) {
        self.paths.insert(block as u64, path);
    }

    /// Whether there is a block in this page.
    pub fn has_page(&self, gpa: u64) -> bool {
        self.by_page.contains_key(&(gpa >> 12))
    }

    /// Whether one more block of the longest kind may not fit.
    pub fn is_full(&self) -> bool {
        self.used + MAX_BLOCK + 1 > self.limit
    }

    /// Makes room: blocks that were not translated since the last time go. The others are translated again when they
    /// run next, as well as they were. No pointer to a block may be used after this.
    pub fn collect(&mut self) {
        let paths = std::mem::take(&mut self.paths);
        let moved = self.keep_translated();
        self.collections += 1;
        for (head, path) in paths {
            let Some(head) = moved.get(&head) else { continue };
            let path: Vec<_> = path.iter().map_while(|part| moved.get(&(*part as u64)).copied()).collect();
            if !path.is_empty() {
                self.paths.insert(*head as u64, path);
            }
        }
        self.widen();
        // Where most of it is of use there would be no room again too soon.
        if self.used > self.limit / 4 * 3 {
            self.clear();
        }
    }

    /// Drops all blocks but those that are translated. Says where these are now.
    fn keep_translated(&mut self) -> Map<*const Block> {
        let (blocks, used) = (self.block_count, self.used);
        self.clear();
        let mut moved = Map::default();
        for i in 0..blocks {
            let from = self.block_at(i);
            // SAFETY: blocks and ops below the old counts were written, in this order, and are only overwritten from
            // their start: behind what is read still.
            unsafe {
                let first = self.index_of((*from).ops);
                let next = (i + 1 < blocks).then(|| (*self.block_at(i + 1)).ops);
                let end = next.map_or(used, |ops| self.index_of(ops));
                if !(*from).valid || (*from).entry == 0 {
                    continue;
                }
                self.ops.copy_within(first..end, self.used);
                let ops = self.ops.as_ptr().add(self.used).cast::<Uop>();
                self.used += end - first;
                let to = self.block_at(self.block_count);
                self.block_count += 1;
                ptr::copy(from, to, 1);
                (*to).ops = ops;
                ((*to).entry, (*to).dead, (*to).code) = (0, 0, ptr::null());
                ((*to).runs_left, (*to).checked, (*to).links) = (1, 0, [ptr::null(); 2]);
                self.list(to);
                moved.insert(from as u64, to.cast_const());
            }
        }
        moved
    }

    /// # Safety
    /// The ops are some of this cache.
    unsafe fn index_of(&self, ops: *const Uop) -> usize {
        // SAFETY: the caller's word.
        unsafe { ops.offset_from_unsigned(self.ops.as_ptr().cast::<Uop>()) }
    }

    /// After a collection: more room, if it was filled soon and much of it is of use.
    fn widen(&mut self) {
        let soon = self.collected.replace(Instant::now()).is_some_and(|last| last.elapsed() < SOON);
        if soon && self.used > self.limit / 4 {
            self.limit = (self.limit * 2).min(self.ops.len());
        }
        if soon && self.used * BYTES_OF_ONE > self.code.limit() / 2 {
            self.code.widen();
        }
    }

    fn block_at(&mut self, i: usize) -> *mut Block {
        self.blocks[i / SLAB][i % SLAB].as_mut_ptr()
    }

    /// Has a block found by where it is.
    ///
    /// # Safety
    /// It was written.
    unsafe fn list(&mut self, block: *mut Block) {
        // SAFETY: the caller's word.
        let (gpa, mode, second_page) = unsafe { ((*block).gpa, (*block).mode, (*block).second_page) };
        self.by_address.insert(key(gpa, mode), block);
        self.by_page.entry(gpa >> 12).or_default().push(block);
        if let Some(second) = second_page {
            self.by_page.entry(second >> 12).or_default().push(block);
        }
    }

    /// Forgets everything. No pointer to a block may be used after this.
    pub fn clear(&mut self) {
        self.used = 0;
        self.block_count = 0;
        self.by_address.clear();
        self.by_page.clear();
        self.code.clear();
        self.cut.clear();
        self.paths.clear();
        self.heads.clear();
        self.clears += 1;
    }

    /// Adds a block of at most [`MAX_BLOCK`] + 1 decoded instructions; [`Self::is_full`] was checked.
    pub fn insert(&mut self, gpa: u64, shape: Shape, ops: &[Uop]) -> *const Block {
        let Shape { mode, second_page, count, abortable } = shape;
        let at = self.used;
        self.used += ops.len();
        self.decoded += u64::from(count);
        let room = &mut self.ops[at..at + ops.len()];
        for (slot, op) in room.iter_mut().zip(ops) {
            slot.write(*op);
        }
        let ops = room.as_ptr().cast::<Uop>();
        let slab = self.block_count / SLAB;
        if slab == self.blocks.len() {
            self.blocks.push(Box::new_uninit_slice(SLAB));
        }
        // Where code changes again and again, translating it is wasted more and more often: unless it is asked for.
        let changes = self.changes.get(&(gpa >> 12)).map_or(0, |c| (c.lately(Instant::now()) / 4).min(10));
        let changes = if self.promote < PROMOTE { 0 } else { changes };
        let block = self.blocks[slab][self.block_count % SLAB].write(Block {
            code: ptr::null(),
            entry: 0,
            dead: 0,
            checked: 0,
            crossings: 0,
            hot: false,
            loops: false,
            heat: 0,
            plain: 0,
            runs_left: self.promote.saturating_mul(1 << changes),
            ops,
            count: count as u8,
            abortable: abortable as u8,
            mode,
            valid: true,
            gpa,
            linear: 0,
            second_page,
            links: [ptr::null(); 2],
        });
        self.block_count += 1;
        let block: *mut Block = block;
        // SAFETY: just written.
        unsafe { self.list(block) };
        block
    }

    /// A block was translated: what led to an earlier translation of the same code leads to the new one.
    pub fn translated(&mut self, block: &Block) {
        if let Some(old) = self.cut.remove(&key(block.gpa, block.mode)) {
            self.code.cut(old as usize, block.entry as usize);
        }
    }

    /// Ends all blocks of the page: whoever still runs or links to one comes to `abort` at its next instruction.
    pub fn invalidate_page(&mut self, gpa: u64, abort: crate::uop::Handler) {
        let Some(blocks) = self.by_page.remove(&(gpa >> 12)) else { return };
        let now = Instant::now();
        let changes = self.changes.entry(gpa >> 12).or_insert(Changes { count: 0, last: now });
        *changes = Changes { count: changes.lately(now) + 1, last: now };
        for block in blocks {
            // SAFETY: blocks and their ops live in slabs that are only reused after `clear`, which empties
            // `by_page`; nobody else is changing them, as a cache belongs to one vCPU's thread.
            unsafe {
                if !(*block).valid {
                    continue;
                }
                (*block).valid = false;
                self.by_address.remove(&key((*block).gpa, (*block).mode));
                if (*block).entry != 0 {
                    self.code.cut((*block).entry as usize, (*block).dead as usize);
                    self.cut.insert(key((*block).gpa, (*block).mode), (*block).entry);
                    (*block).entry = 0;
                    (*block).code = ptr::null();
                }
                let ops = (*block).ops.cast_mut();
                // A separate end of the block stays as it is: it only says where to go on.
                for i in 0..(*block).abortable as usize {
                    (*ops.add(i)).handler = abort;
                }
            }
            self.invalidated += 1;
        }
    }
}

// SAFETY: a cache is used by one vCPU's thread at a time; the raw pointers lead into its own slabs.
unsafe impl Send for BlockCache {}

#[cfg(test)]
mod tests;
