use std::{
    hint::spin_loop,
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use super::*;

const RECORD: u64 = 0x1040;

fn memory() -> GuestMemory {
    GuestMemory::new(1 << 16, 1 << 16).unwrap()
}

fn preempted(memory: &GuestMemory) -> u8 {
    memory.read_pod(RECORD + field::PREEMPTED).unwrap()
}

#[test]
fn the_register_is_an_address_and_a_bit() {
    let (memory, mut steal) = (memory(), StealTime::default());
    for bad in [2, 4, 8, 16, 32] {
        assert_eq!(steal.set(RECORD | ENABLED | bad, &memory), Err(MsrFault));
    }
    assert_eq!(steal.msr(), 0);
    assert_eq!(steal.set(RECORD | ENABLED, &memory), Ok(()));
    assert_eq!(steal.msr(), RECORD | ENABLED);
}

#[test]
fn a_halted_vcpu_says_so_and_hears_of_flushes() {
    let (memory, mut steal) = (memory(), StealTime::default());
    memory.write_pod(RECORD + field::PREEMPTED, PREEMPTED | FLUSH_TLB).unwrap();
    steal.halts(&memory);
    assert!(!steal.goes_on(&memory), "the record is not kept yet");
    assert_eq!(preempted(&memory), PREEMPTED | FLUSH_TLB);
    steal.set(RECORD | ENABLED, &memory).unwrap();
    assert_eq!(preempted(&memory), 0);

    steal.halts(&memory);
    assert_eq!(preempted(&memory), PREEMPTED);
    assert!(!steal.goes_on(&memory));
    assert_eq!(preempted(&memory), 0);

    steal.halts(&memory);
    memory.write_pod(RECORD + field::PREEMPTED, PREEMPTED | FLUSH_TLB).unwrap();
    assert!(steal.goes_on(&memory));
    assert_eq!(preempted(&memory), 0);
    assert!(!steal.goes_on(&memory), "once");
}

#[test]
fn a_record_outside_ram_does_no_harm() {
    let (memory, mut steal) = (memory(), StealTime::default());
    for record in [1 << 16, 1 << 40, !0x3f] {
        steal.set(record | ENABLED, &memory).unwrap();
        steal.halts(&memory);
        assert!(!steal.goes_on(&memory));
        steal.account(0, &memory);
        steal.account(INTERVAL_NS, &memory);
    }
}

#[test]
fn time_is_added_under_a_version() {
    let memory = memory();
    memory.write_pod(RECORD + field::VERSION, 7u32).unwrap();
    add(RECORD, 5, &memory).unwrap();
    add(RECORD, 6, &memory).unwrap();
    assert_eq!(memory.read_pod::<u64>(RECORD + field::STEAL).unwrap(), 11);
    assert_eq!(memory.read_pod::<u32>(RECORD + field::VERSION).unwrap(), 10);
}

/// Keeps this thread on one processor of the host.
fn stay_on(processor: usize) -> bool {
    // SAFETY: a set of processors is plain bits, and the call reads as much of it as it is told.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) == 0
    }
}

fn work(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        spin_loop();
    }
}

#[test]
fn waiting_for_a_processor_is_told() {
    // SAFETY: no arguments.
    let processor = unsafe { libc::sched_getcpu() };
    let Ok(processor) = usize::try_from(processor) else { return };
    let (memory, done) = (memory(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            stay_on(processor);
            while !done.load(Ordering::Relaxed) {
                work(Duration::from_millis(1));
            }
        });
        scope.spawn(|| {
            let mut steal = StealTime::default();
            steal.set(RECORD | ENABLED, &memory).unwrap();
            let shares = stay_on(processor);
            let mut now = 1_000_000_000;
            assert!(!steal.account(now, &memory), "nothing is known of the time before");
            let known = steal.waits.as_ref().is_some_and(|waits| waits.file.is_some());
            // Two threads that never sleep have half of the processor each.
            work(Duration::from_millis(200));
            now += 200_000_000;
            assert_eq!(steal.account(now, &memory), shares && known);
            let told: u64 = memory.read_pod(RECORD + field::STEAL).unwrap();
            assert_eq!(told > 10_000_000, shares && known, "{told} ns");
            assert!(!steal.account(now + 1, &memory), "not again so soon");
            done.store(true, Ordering::Relaxed);
        });
    });
}
