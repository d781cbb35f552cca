//! How a running machine comes to its end: everyone who knows a reason says it here, and the first one counts.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use vireo_cpu::{CpuError, CrashInfo, Kick};

/// How long a guest that reported a kernel panic may go on, to print its last words.
const PANIC_GRACE: Duration = Duration::from_secs(1);

/// Why a machine stops running.
#[derive(Debug)]
pub(crate) enum End {
    PowerOff,
    Reset,
    Panic,
    Crash(CrashInfo),
    /// Someone on the host asked for it.
    Stopped,
    Failed(CpuError),
}

#[derive(Default)]
struct State {
    end: Option<End>,
    panicked_at: Option<Instant>,
    kickers: Vec<Arc<dyn Kick>>,
}

/// One machine's events.
#[derive(Default)]
pub(crate) struct Events {
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the run, unless it has ended already. May be called from a vCPU within an instruction.
    pub fn finish(&self, end: End) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = Some(end);
            self.stopping.store(true, Ordering::Release);
            self.changed.notify_all();
        }
        let kickers = state.kickers.clone();
        drop(state);
        for kicker in kickers {
            kicker.kick();
        }
    }

    /// Makes every vCPU come out of the engine once; the run goes on.
    pub fn kick_all(&self) {
        let kickers = self.lock().kickers.clone();
        for kicker in kickers {
            kicker.kick();
        }
    }

    pub fn panicked(&self) {
        let mut state = self.lock();
        state.panicked_at.get_or_insert_with(Instant::now);
        self.changed.notify_all();
    }

    pub fn has_panicked(&self) -> bool {
        self.lock().panicked_at.is_some()
    }

    /// Whether vCPUs shall leave their loops.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// A vCPU that wants to be told when the run ends.
    pub fn add_kicker(&self, kicker: Arc<dyn Kick>) {
        let mut state = self.lock();
        if state.end.is_some() {
            kicker.kick();
        }
        state.kickers.push(kicker);
    }

    /// Blocks until the run ends, or `until` is past (`None`). A guest that panicked ends by itself if
    /// `restarts_on_panic` (it was told to), else a moment later.
    pub fn wait(&self, until: Option<Instant>, restarts_on_panic: bool) -> Option<End> {
        let mut state = self.lock();
        loop {
            if let Some(end) = state.end.take() {
                let reset_by_panic = state.panicked_at.is_some() && matches!(end, End::Reset) && !restarts_on_panic;
                return Some(if reset_by_panic { End::Panic } else { end });
            }
            let panic_end = state.panicked_at.filter(|_| !restarts_on_panic).map(|at| at + PANIC_GRACE);
            let now = Instant::now();
            if panic_end.is_some_and(|end| end <= now) {
                drop(state);
                self.finish(End::Panic);
                state = self.lock();
                continue;
            }
            if until.is_some_and(|until| until <= now) {
                return None;
            }
            state = match [panic_end, until].into_iter().flatten().min() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(end) => {
                    let waited = self.changed.wait_timeout(state, end - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// Whether the command line tells the kernel to restart after a panic (`panic=`, Linux `kernel-parameters.txt`).
pub(crate) fn restarts_on_panic(cmdline: &str) -> bool {
    let last = cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix("panic=")).next_back();
    last.and_then(|seconds| seconds.parse::<i64>().ok()).is_some_and(|seconds| seconds != 0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Default)]
    struct Kicks(AtomicU32);
    impl Kick for Kicks {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_first_reason_counts_and_everyone_is_told() {
        let events = Events::default();
        let kicks = Arc::new(Kicks::default());
        events.add_kicker(kicks.clone());
        events.finish(End::Reset);
        events.finish(End::PowerOff);
        assert!(events.stopping());
        assert!(kicks.0.load(Ordering::Relaxed) > 0);
        assert!(matches!(events.wait(None, false), Some(End::Reset)));
        let late = Arc::new(Kicks::default());
        let events = Events::default();
        events.finish(End::Stopped);
        events.add_kicker(late.clone());
        assert_eq!(late.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_panic_ends_the_run_a_moment_later() {
        let events = Events::default();
        events.panicked();
        let start = Instant::now();
        assert!(events.wait(Some(start + Duration::from_millis(10)), false).is_none());
        assert!(matches!(events.wait(None, false), Some(End::Panic)));
        assert!(start.elapsed() >= PANIC_GRACE);
    }

    #[test]
    fn a_guest_that_restarts_on_panic_is_left_to_do_so() {
        let events = Events::default();
        events.panicked();
        assert!(events.wait(Some(Instant::now() + PANIC_GRACE + Duration::from_millis(50)), true).is_none());
        events.finish(End::Reset);
        assert!(matches!(events.wait(None, true), Some(End::Reset)));
        for (cmdline, restarts) in
            [("", false), ("panic=0", false), ("quiet panic=-1", true), ("panic=5 panic=0", false), ("panic=x", false)]
        {
            assert_eq!(restarts_on_panic(cmdline), restarts, "{cmdline}");
        }
    }
}
