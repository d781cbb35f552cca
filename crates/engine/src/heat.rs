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

use crate::{
    cache::Block,
    cpu::Cpu,
    signal::request,
};

/// Blocks that are looked at when the time has come.
const TRACE: u32 = 128;
/// Times that a block must be met.
const HOT: u8 = 3;
/// Nanoseconds of CPU time between two looks: at first and while something new is found, and at most.
const SOON: i64 = 1_000_000;
const LATE: i64 = 32_000_000;

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

impl Cpu {
    /// Translates again what is to be, and has the next blocks looked at.
    pub fn look_for_heat(&mut self) {
        let again = mem::take(&mut self.translated.again);
        if again.is_empty() {
            self.translated.trace = TRACE;
            self.translated.news_of_heat = false;
        }
        for block in again {
            self.translate_again(block);
        }
    }

    /// A block that comes by while hot code is looked for.
    pub fn warm(&mut self, block: *const Block) {
        self.translated.trace -= 1;
        // SAFETY: the block is alive, and this is the thread that owns the cache.
        let known = unsafe { &mut *block.cast_mut() };
        known.heat = known.heat.saturating_add(1);
        if known.heat >= HOT && !known.hot {
            known.hot = true;
            self.translated.news_of_heat = true;
            self.translate_again(block.cast_mut());
        }
        if self.translated.trace == 0
            && let Some(pulse) = &mut self.pulse
        {
            let interval = if self.translated.news_of_heat { SOON } else { (pulse.interval * 2).min(LATE) };
            pulse.set(interval);
        }
    }
}
