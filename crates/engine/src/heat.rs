//! Which code is hot.
//!
//! Now and then, by the CPU time of the vCPU's thread, a signal has it leave translated code and run a few blocks in the
//! interpreter. What is met again and again that way is translated once more, with more effort: see
//! [`crate::translate::window`].

use std::{
    io, mem, ptr,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{cache::Block, cpu::Cpu, signal::request, tlb::PAGE_MASK};

/// Blocks that are looked at when the time has come.
const TRACE: usize = 192;
/// Blocks that one translation goes on through at most.
const LONGEST_PATH: usize = 16;
/// Times that a block must be met.
const HOT: u8 = 3;
/// Times that a block is met in one go where it is part of a loop: its accesses are likely to go where they went before.
const ROUNDS: usize = 4;
/// Nanoseconds of CPU time between two looks: at first and while something new is found, and at most.
const SOON: i64 = 1_000_000;
const LATE: i64 = 5_000_000;

/// The timer of a thread that runs a vCPU. Whoever made it drops it, on the same thread.
pub struct Pulse {
    timer: libc::timer_t,
    interval: i64,
}

/// Asks the vCPU that was running for attention.
extern "C" fn beat(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the signal is this module's own, and comes with the address of a request word that outlives the timer:
    // a signal for the thread that deletes its timer comes before that call returns.
    unsafe {
        let word = (*info).si_value().sival_ptr.cast::<AtomicU32>();
        if (*info).si_code == libc::SI_TIMER && !word.is_null() {
            (*word).fetch_or(request::HOT, Ordering::Relaxed);
        }
    }
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

impl Pulse {
    /// A timer for this thread that raises [`request::HOT`] in `word`.
    ///
    /// # Safety
    /// The word outlives what is returned.
    pub unsafe fn new(word: *const AtomicU32) -> io::Result<Self> {
        static HANDLER: Once = Once::new();
        // SAFETY: plain system calls on structures of their own; the handler does nothing but an atomic operation.
        unsafe {
            HANDLER.call_once(|| {
                let mut action: libc::sigaction = mem::zeroed();
                action.sa_sigaction = beat as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
                libc::sigaction(signal(), &raw const action, ptr::null_mut());
            });
            let mut event: libc::sigevent = mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal();
            event.sigev_value = libc::sigval { sival_ptr: word.cast_mut().cast() };
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = mem::zeroed();
            if libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut event, &raw mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut pulse = Self { timer, interval: 0 };
            pulse.set(SOON);
            Ok(pulse)
        }
    }

    fn set(&mut self, interval: i64) {
        if self.interval == interval {
            return;
        }
        self.interval = interval;
        let every = libc::timespec { tv_sec: 0, tv_nsec: interval };
        let setting = libc::itimerspec { it_interval: every, it_value: every };
        // SAFETY: a timer of our own.
        unsafe { libc::timer_settime(self.timer, 0, &raw const setting, ptr::null_mut()) };
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        // SAFETY: a timer of our own, gone for good.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// What came by while hot code was looked for.
#[derive(Default)]
pub struct Trace {
    /// Blocks that are still to be looked at.
    pub left: usize,
    /// For tests: everything is hot, and is looked at all the time.
    pub eager: bool,
    /// And room is made where there still is some.
    pub collects: bool,
    seen: Vec<*const Block>,
}

/// Blocks that an eager one looks at.
const EAGER_TRACE: usize = 4;
/// Times that it enters translated code between two collections.
const EAGER_COLLECTION: u64 = 200;

impl Trace {
    /// The block that most often followed this one.
    fn follower(&self, block: *const Block) -> Option<*const Block> {
        let mut found: Vec<(*const Block, usize)> = Vec::new();
        for pair in self.seen.windows(2).filter(|pair| pair[0] == block) {
            match found.iter_mut().find(|(next, _)| *next == pair[1]) {
                Some((_, times)) => *times += 1,
                None => found.push((pair[1], 1)),
            }
        }
        found.into_iter().max_by_key(|(_, times)| *times).map(|(next, _)| next)
    }

    /// Whether control came to the block at this place as it does when one translation goes on with it: straight from a
    /// block before it that it mostly follows.
    fn follows(&self, i: usize) -> bool {
        let Some(before) = i.checked_sub(1).map(|i| self.seen[i]) else { return true };
        // SAFETY: what was seen in one go is alive until its end.
        let (from, to) = unsafe { (&*before, &*self.seen[i]) };
        let straight = from.links.contains(&self.seen[i]) && from.gpa < to.gpa;
        straight && self.follower(before) == Some(self.seen[i])
    }

    /// Where control most often went on from a block, within its page, until it went back.
    fn path(&self, from: *const Block) -> Vec<*const Block> {
        let mut path = vec![from];
        while path.len() < LONGEST_PATH
            && let Some(next) = self.follower(path[path.len() - 1])
            && !path.contains(&next)
            // SAFETY: as above.
            && unsafe {
                let last = path[path.len() - 1];
                let same_page = ((*next).gpa ^ (*from).gpa) & !PAGE_MASK == 0;
                same_page && (*next).gpa > (*last).gpa && (*next).mode == (*from).mode
            }
        {
            path.push(next);
        }
        path.remove(0);
        path
    }
}

impl Cpu {
    /// Translates again what is to be, and has the next blocks looked at.
    pub fn look_for_heat(&mut self) {
        if self.cache.code.is_full() || self.tlb.windows.are_stale() || mem::take(&mut self.trace.collects) {
            return self.make_room();
        }
        let again = mem::take(&mut self.translated.again);
        if again.is_empty() {
            self.trace.left = TRACE;
            self.trace.seen.clear();
        }
        for block in again {
            self.translate_again(block);
        }
    }

    /// Has the next blocks looked at without being asked to.
    pub fn look_eagerly(&mut self) {
        self.trace.left = EAGER_TRACE;
        self.trace.seen.clear();
    }

    /// For tests, after translated code ran: looks again and again, and makes room where there is some.
    #[cold]
    pub fn be_eager(&mut self) {
        let entries = self.counters.translated.entries;
        if self.trace.left == 0 && entries & 15 == 0 {
            self.look_eagerly();
        }
        if entries.is_multiple_of(EAGER_COLLECTION) && self.verifier.is_none() {
            self.trace.collects = true;
            self.signal.note(request::HOT);
        }
    }

    /// Forgets what was seen: it is gone.
    pub fn forget_trace(&mut self) {
        self.trace.left = 0;
        self.trace.seen.clear();
    }

    /// A block that comes by while hot code is looked for.
    #[cold]
    pub fn look_at(&mut self, block: *const Block) {
        self.trace.seen.push(block);
        self.trace.left -= 1;
        if self.trace.left == 0 {
            let news = self.promote_hot();
            if let Some(pulse) = &mut self.pulse {
                pulse.set(if news { SOON } else { (pulse.interval * 2).min(LATE) });
            }
        }
    }

    /// Makes more of blocks that were seen often enough; whether there were any.
    fn promote_hot(&mut self) -> bool {
        let trace = mem::take(&mut self.trace);
        (self.trace.eager, self.trace.collects) = (trace.eager, trace.collects);
        let wanted = if trace.eager { 1 } else { HOT };
        let mut hot = Vec::new();
        for (i, &at) in trace.seen.iter().enumerate() {
            // SAFETY: what was seen is alive: clearing the cache forgets it. This is the thread that owns it.
            let block = unsafe { &mut *at.cast_mut() };
            block.heat = block.heat.saturating_add(1);
            if block.heat < wanted {
                continue;
            }
            let starts = self.cache.path(at).is_empty() && !trace.follows(i);
            let path = if starts { trace.path(at) } else { Vec::new() };
            let loops = trace.eager || trace.seen.iter().filter(|seen| **seen == at).count() >= ROUNDS;
            if block.hot && path.is_empty() && block.loops >= loops {
                continue;
            }
            block.hot = true;
            block.loops |= loops;
            if !path.is_empty() {
                self.cache.set_path(at, path);
            }
            if !hot.contains(&at) {
                hot.push(at);
            }
        }
        // Whoever is part of another has its own translation first.
        for &block in &hot {
            // SAFETY: as above.
            unsafe { self.translate_anew(block.cast_mut()) };
        }
        !hot.is_empty()
    }
}
