//! Locked instructions, and threads that share memory.

use std::{
    panic::resume_unwind,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use super::{Run, integer};

fn locked(counters: &[AtomicU64; 3], rounds: u64) {
    let [sum, product, last] = counters;
    for turn in 0..rounds {
        sum.fetch_add(turn, Ordering::SeqCst);
        let mut old = product.load(Ordering::Relaxed);
        while let Err(now) = product.compare_exchange(old, old + 3, Ordering::SeqCst, Ordering::Relaxed) {
            old = now;
        }
        last.swap(turn, Ordering::SeqCst);
    }
}

pub fn one_thread(run: &Run) -> u64 {
    let counters = Default::default();
    locked(&counters, run.rounds);
    total(&counters)
}

pub fn two_threads(run: &Run) -> u64 {
    let counters = Default::default();
    thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(|| locked(&counters, run.rounds)))));
    total(&counters)
}

fn total(counters: &[AtomicU64; 3]) -> u64 {
    counters.iter().fold(0, |sum, counter| sum.rotate_left(16) ^ counter.load(Ordering::SeqCst))
}

pub fn mutex(run: &Run) -> u64 {
    let shared = Mutex::new(0u64);
    let work = || (0..run.rounds).for_each(|turn| *shared.lock().expect("a thread panicked") += turn & 3);
    thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    shared.into_inner().unwrap_or(0)
}

/// What one thread computes for the comparison of one vCPU with two.
fn compute(run: &Run) -> u64 {
    let part = |share| Run { rounds: run.rounds / share, ..*run };
    integer::crc32(&part(8))
        ^ integer::calls(&part(1))
        ^ integer::big_numbers(&Run { rounds: run.rounds * 100, ..*run })
}

/// On a thread of its own, as the second of [`compute_twice`]: where the stack lies is part of how long calls take.
pub fn compute_alone(run: &Run) -> u64 {
    thread::scope(|scope| scope.spawn(|| compute(run)).join()).unwrap_or_else(|panic| resume_unwind(panic))
}

/// Twice the work of [`compute_alone`].
pub fn compute_twice(run: &Run) -> u64 {
    thread::scope(|scope| {
        let other = scope.spawn(|| compute(run));
        let here = compute(run);
        assert!(other.join().is_ok_and(|there| there == here), "two threads disagree");
        here
    })
}
