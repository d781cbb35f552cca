//! The buffer that translations live in.

use std::io;

use super::{
    thunks::{self, Thunks},
    window::{self, Windows},
};
use crate::{cache::Capacity, native::DualMapping};

/// Code of one vCPU. No page of it is writable where it is executable.
pub struct CodeBuffer {
    memory: DualMapping,
    pub thunks: Thunks,
    /// Where translations begin, behind the thunks.
    first: usize,
    used: usize,
    /// Where what is rarely run goes next: it has the rest of the buffer, so that what is often run lies close together.
    used_apart: usize,
    /// Bytes that there is room for now.
    limit: usize,
}

/// Bytes for the translations of all vCPUs together, and of one at least: at first, and where more are of use.
const CAPACITY: Capacity = Capacity { first: 16 << 20, first_of_one: 7 << 20, most: 96 << 20, most_of_one: 28 << 20 };
/// The same of an engine that is to run out of them often.
const SMALL_CAPACITY: Capacity =
    Capacity { first: 384 << 10, first_of_one: 384 << 10, most: 768 << 10, most_of_one: 768 << 10 };
/// Translations begin at multiples of this.
const ALIGNED: usize = 16;
/// Eighths of the room that are for what is often run.
const OFTEN_RUN: usize = 4;
/// No part of a translation is larger.
const LARGEST: usize = 64 << 10;

impl CodeBuffer {
    pub fn new(vcpus: u32, small: bool) -> io::Result<Self> {
        let (limit, most) = if small { SMALL_CAPACITY } else { CAPACITY }.of_one(vcpus);
        let memory = DualMapping::with_data(most, window::BYTES)?;
        let (code, thunks) = thunks::make(memory.executable() as u64, memory.data() as u64);
        let mut buffer = Self { memory, thunks, first: 0, used: 0, used_apart: 0, limit };
        buffer.put(0, &code);
        buffer.first = code.len().next_multiple_of(ALIGNED);
        buffer.clear();
        Ok(buffer)
    }

    /// The windows of the vCPU, all new.
    ///
    /// # Safety
    /// Called once, and not used when this buffer is gone.
    pub unsafe fn windows(&self) -> Windows {
        // SAFETY: so many zeroed bytes were mapped with the code, for nobody else by the caller's word.
        unsafe { Windows::new(self.memory.data()) }
    }

    /// Where the two parts of the next translation will be.
    pub fn next(&self) -> [usize; 2] {
        [self.used, self.used_apart]
    }

    pub fn is_full(&self) -> bool {
        self.used + LARGEST > self.middle() || self.used_apart + LARGEST > self.limit
    }

    /// Where code begins that is rarely run.
    fn middle(&self) -> usize {
        (self.first + (self.limit - self.first) / 8 * OFTEN_RUN).next_multiple_of(ALIGNED)
    }

    /// Bytes that there is room for now.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Makes room for twice as much, as far as there is any. Nothing is in it.
    pub fn widen(&mut self) {
        self.limit = (self.limit * 2).min(self.memory.bytes());
        self.clear();
    }

    pub fn used(&self) -> usize {
        self.used + (self.used_apart - self.middle())
    }

    /// Appends a translation that was made for [`Self::next`]; its offset, or `None` if it is too large.
    pub fn push(&mut self, often: &[u8], rarely: &[u8]) -> Option<usize> {
        let fits = often.len().max(rarely.len()) <= LARGEST
            && self.used + often.len() <= self.middle()
            && self.used_apart + rarely.len() <= self.limit;
        if !fits {
            return None;
        }
        let at = self.used;
        self.put(at, often);
        self.put(self.used_apart, rarely);
        self.used = (at + often.len()).next_multiple_of(ALIGNED);
        self.used_apart += rarely.len();
        Some(at)
    }

    fn put(&mut self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= self.memory.bytes());
        // SAFETY: the range lies in the writable view, which nobody has a reference into.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.memory.writable().add(at), code.len()) };
    }

    pub fn address(&self, offset: usize) -> *const u8 {
        self.memory.executable().wrapping_add(offset)
    }

    /// Makes the 32-bit displacement at `site` lead to `target`.
    pub fn patch(&mut self, site: usize, target: usize) {
        debug_assert!(site + 4 <= self.limit && target < self.limit);
        let rel = (target as i64 - (site as i64 + 4)) as i32;
        // SAFETY: inside the writable view. Only the thread of this vCPU runs this code, and it is not there now.
        unsafe { self.memory.writable().add(site).cast::<i32>().write_unaligned(rel) };
    }

    /// Has a jump to another page lead to `target` as long as translations of code are of `generation` and it is done in
    /// the page at `page`. `data` is where it keeps these two, and the place of its displacement.
    pub fn patch_cross(&mut self, data: usize, generation: u64, page: u64, target: usize) {
        debug_assert!(data + 24 <= self.limit);
        // SAFETY: inside the writable view; as for `patch`.
        let site = unsafe {
            let words = self.memory.writable().add(data).cast::<u64>();
            words.write_unaligned(generation);
            words.add(1).write_unaligned(page);
            words.add(2).read_unaligned()
        };
        self.patch(site as usize, target);
    }

    /// Puts a jump to `target` at `at`.
    pub fn cut(&mut self, at: usize, target: usize) {
        // SAFETY: as above; every translation begins with five bytes that nothing leads into the middle of.
        unsafe { *self.memory.writable().add(at) = 0xe9 };
        self.patch(at + 1, target);
    }

    /// Forgets all translations.
    pub fn clear(&mut self) {
        self.used = self.first;
        self.used_apart = self.middle();
    }
}
