//! How anyone (devices, timers, other vCPUs) gets a vCPU's attention.

use std::sync::{
    Condvar, Mutex, OnceLock,
    atomic::{AtomicBool, AtomicU32, Ordering},
};
use std::time::{Duration, Instant};

/// Nanoseconds that a halted vCPU waits at most before it sleeps: for what devices and timers have to say, and for
/// other vCPUs (longer than Linux's KVM does: what they do takes longer here).
const LONGEST_PATIENCE: u32 = 50_000;
const LONGEST_FOR_VCPUS: u32 = 500_000;

/// Whether somebody else can run while a vCPU waits.
fn can_wait() -> bool {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from)) > 1
}

/// How long to wait the next time, after a halt of this length that was not waited out.
fn next_patience(patience: u32, halted: Duration, by_vcpu: bool) -> u32 {
    let longest = if by_vcpu { LONGEST_FOR_VCPUS } else { LONGEST_PATIENCE };
    if halted < Duration::from_nanos(longest.into()) {
        return (patience * 2).clamp(longest / 8, longest);
    }
    let less = patience / 2;
    if less < LONGEST_PATIENCE / 16 { 0 } else { less }
}

/// Reasons to leave translated or interpreted code at the next block boundary.
pub mod request {
    /// The local APIC has an interrupt that may be deliverable.
    pub const INTERRUPT: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 1;
    pub const INIT: u32 = 1 << 2;
    /// A start-up IPI; its vector is in [`super::VcpuSignal::sipi_vector`].
    pub const SIPI: u32 = 1 << 3;
    /// [`vireo_cpu::Kick`]: come back from `run`.
    pub const KICK: u32 = 1 << 4;
    /// Another vCPU or a device changed code: work through the invalidation queue before anything else runs.
    pub const CODE: u32 = 1 << 5;
    /// The local APIC timer is due.
    pub const TIMER: u32 = 1 << 6;
    /// Time to look what is hot, or to translate something again.
    pub const HOT: u32 = 1 << 7;
    /// What nobody need be woken for.
    pub const QUIET: u32 = CODE | HOT;
}

/// One vCPU's request word and the place where it sleeps when halted.
#[derive(Debug, Default)]
pub struct VcpuSignal {
    requests: AtomicU32,
    asleep: AtomicBool,
    /// Nanoseconds for which the vCPU waits for a request before it sleeps.
    patience: AtomicU32,
    /// Another vCPU sent an interrupt since the last halt.
    called: AtomicBool,
    pub sipi_vector: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

impl VcpuSignal {
    /// Asks for attention, waking the vCPU if it sleeps.
    pub fn raise(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            drop(self.lock.lock());
            self.wake.notify_all();
        }
    }

    /// Asks for attention before the vCPU runs on, but lets it sleep.
    pub fn note(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
    }

    /// The interrupt that is raised next comes from another vCPU.
    pub fn called(&self) {
        self.called.store(true, Ordering::Relaxed);
    }

    /// Has the vCPU sleep at once when it next halts.
    pub fn lose_patience(&self) {
        self.patience.store(0, Ordering::Relaxed);
    }

    /// Where translated code looks for requests.
    pub fn word(&self) -> *const AtomicU32 {
        &raw const self.requests
    }

    /// One relaxed load: what the run loop looks at between blocks.
    #[inline(always)]
    pub fn pending(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Takes and clears the given requests; returns those that were set.
    pub fn take(&self, bits: u32) -> u32 {
        self.requests.fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// Sleeps until a request is raised or `until` is past. News of code are no reason to wake.
    ///
    /// To fall asleep and to be woken costs more than many a wait is long: where the last ones were short, the vCPU
    /// looks for a while whether something comes before it sleeps, and for less and less time if nothing does.
    pub fn sleep(&self, until: Option<Instant>) {
        let patience = self.patience.load(Ordering::Relaxed);
        let begun = Instant::now();
        if patience != 0 && self.wait_for(Duration::from_nanos(patience.into())) {
            return;
        }
        self.called.store(false, Ordering::Relaxed);
        self.sleep_well(until);
        if can_wait() {
            let next = next_patience(patience, begun.elapsed(), self.called.load(Ordering::Relaxed));
            self.patience.store(next, Ordering::Relaxed);
        }
    }

    /// Whether a request comes within that time.
    fn wait_for(&self, time: Duration) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < time {
            for _ in 0..16 {
                if self.requests.load(Ordering::SeqCst) & !request::QUIET != 0 {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        false
    }

    fn sleep_well(&self, until: Option<Instant>) {
        let Ok(mut guard) = self.lock.lock() else { return };
        self.asleep.store(true, Ordering::SeqCst);
        while self.requests.load(Ordering::SeqCst) & !request::QUIET == 0 {
            match until {
                None => match self.wake.wait(guard) {
                    Ok(g) => guard = g,
                    Err(_) => break,
                },
                Some(end) => {
                    let Some(left) = end.checked_duration_since(Instant::now()) else { break };
                    match self.wake.wait_timeout(guard, left) {
                        Ok((g, _)) => guard = g,
                        Err(_) => break,
                    }
                }
            }
        }
        self.asleep.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(halts: &[(u64, bool)]) -> u32 {
        halts
            .iter()
            .fold(0, |patience, &(micros, by_vcpu)| next_patience(patience, Duration::from_micros(micros), by_vcpu))
    }

    #[test]
    fn patience_pays_or_goes() {
        assert_eq!(after(&[(1000, false); 8]), 0, "long halts are slept through");
        assert_eq!(after(&[(1000, true); 8]), 0, "whoever ends them");
        assert_eq!(after(&[(20, false)]), LONGEST_PATIENCE / 8);
        assert_eq!(after(&[(20, false); 8]), LONGEST_PATIENCE);
        assert_eq!(after(&[(120, false); 8]), 0, "a device that takes longer is not waited for");
        assert_eq!(after(&[(120, true); 8]), LONGEST_FOR_VCPUS, "another vCPU is");
        let mut halts = vec![(120, true); 8];
        halts.push((1000, false));
        assert_eq!(after(&halts), LONGEST_FOR_VCPUS / 2);
        halts.extend([(1000, false); 8]);
        assert_eq!(after(&halts), 0);
    }

    #[test]
    fn a_vcpu_is_woken_whether_it_waits_or_sleeps() {
        for patience in [0, LONGEST_FOR_VCPUS] {
            let signal = VcpuSignal::default();
            signal.patience.store(patience, Ordering::Relaxed);
            std::thread::scope(|scope| {
                let sleeper = scope.spawn(|| {
                    for _ in 0..200 {
                        signal.sleep(None);
                        assert_eq!(signal.take(request::INTERRUPT), request::INTERRUPT);
                    }
                });
                while !sleeper.is_finished() {
                    signal.called();
                    signal.raise(request::INTERRUPT);
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn without_patience_a_vcpu_sleeps_at_once() {
        let signal = VcpuSignal::default();
        signal.patience.store(LONGEST_FOR_VCPUS, Ordering::Relaxed);
        signal.lose_patience();
        assert_eq!(signal.patience.load(Ordering::Relaxed), 0);
    }
}
