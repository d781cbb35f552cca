use std::{thread::sleep, time::Instant};

use super::*;

/// A reading of a clock and the moment when it was taken, the tightest of some.
fn moment(read: impl Fn() -> u64) -> (u64, Instant) {
    let one = || {
        let before = Instant::now();
        let value = read();
        (before.elapsed(), value, before)
    };
    let (_, value, at) = (0..50).map(|_| one()).min_by_key(|(width, ..)| *width).unwrap();
    (value, at)
}

#[test]
fn the_tsc_runs_at_the_frequency_told() {
    let clock = Clock::new();
    let (t0, start) = moment(|| clock.tsc());
    sleep(Duration::from_millis(50));
    let (t1, end) = moment(|| clock.tsc());
    let gone = end - start;
    let khz = (t1 - t0) as f64 / gone.as_nanos() as f64 * 1e6;
    let off = (khz / f64::from(clock.tsc_khz()) - 1.0).abs();
    assert!(off < 1e-3, "measured {khz} kHz, told {:?}", clock.frequency());
    assert!(clock.frequency().error_ppm < 50.0, "{:?}", clock.frequency());
}

#[test]
fn pvclock_numbers_convert_any_frequency() {
    for khz in [1u32, 999, 1_000_000, 1_000_001, 2_596_152, 3_999_999, 5_000_000, u32::MAX] {
        let (mul, shift) = pvclock_scale(khz);
        let ticks = u64::from(khz) * 1000;
        let ns = (u128::from(shifted(ticks, shift)) * u128::from(mul)) >> 32;
        let off = (ns as f64 / 1e9 - 1.0).abs();
        assert!(off < if khz < 1000 { 1e-3 } else { 1e-6 }, "{khz} kHz gives {ns} ns a second");
        assert!(mul >= 1 << 30, "{khz} kHz loses precision: {mul:#x}");
    }
}

#[test]
fn kvmclock_page_gives_the_time() {
    let memory = GuestMemory::new(1 << 16, 1 << 16).unwrap();
    let clock = VcpuClock::new(Clock::new());
    clock.set_tsc(1 << 40);
    assert_eq!(clock.msr_write(msr::KVM_SYSTEM_TIME, 0x1001, &memory), Some(Ok(())));
    let version: u32 = memory.read_pod(0x1000).unwrap();
    assert!(version != 0 && version & 1 == 0);
    let stamp: u64 = memory.read_pod(0x1008).unwrap();
    let system: u64 = memory.read_pod(0x1010).unwrap();
    let mul: u32 = memory.read_pod(0x1018).unwrap();
    let shift: i8 = memory.read_pod(0x101c).unwrap();
    assert_eq!(memory.read_pod::<u8>(0x101d).unwrap(), 1, "TSC_STABLE");
    let (before, tsc, after) = (clock.vm().ns(), clock.tsc(), clock.vm().ns());
    let ns = system + ((u128::from(shifted(tsc - stamp, shift)) * u128::from(mul)) >> 32) as u64;
    assert!(ns + 1000 >= before && ns <= after + 1000, "{before} <= {ns} <= {after}");
    assert_eq!(clock.msr_read(msr::KVM_SYSTEM_TIME), Some(0x1001));
    // off again, misaligned, outside RAM
    assert_eq!(clock.msr_write(msr::KVM_SYSTEM_TIME, 0, &memory), Some(Ok(())));
    assert_eq!(clock.msr_write(msr::KVM_SYSTEM_TIME, 0x1003, &memory), Some(Err(MsrFault)));
    assert_eq!(clock.msr_write(msr::KVM_SYSTEM_TIME, u64::MAX, &memory), Some(Err(MsrFault)));
    assert_eq!(clock.msr_write(msr::KVM_SYSTEM_TIME, 0xffe1, &memory), Some(Ok(())));
    assert_eq!(clock.msr_write(msr::KVM_SYSTEM_TIME, 0xfff1, &memory), Some(Err(MsrFault)));
}

#[test]
fn wall_clock_is_the_time_of_the_start() {
    let memory = GuestMemory::new(1 << 12, 1 << 12).unwrap();
    let clock = VcpuClock::new(Clock::restore(&ClockState { tsc: 0, tsc_khz: 0, ns: 3600 * NS_PER_SECOND }));
    assert_eq!(clock.msr_write(msr::KVM_WALL_CLOCK, 0x20, &memory), Some(Ok(())));
    let version: u32 = memory.read_pod(0x20).unwrap();
    let seconds: u32 = memory.read_pod(0x24).unwrap();
    assert!(version != 0 && version & 1 == 0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as u32;
    assert!((now - 3602..=now - 3599).contains(&seconds), "{seconds} at {now}");
    assert_eq!(clock.msr_write(msr::KVM_WALL_CLOCK, u64::MAX - 2, &memory), Some(Err(MsrFault)));
}

#[test]
fn tsc_and_adjust_follow_each_other() {
    let memory = GuestMemory::new(1 << 12, 1 << 12).unwrap();
    let clock = VcpuClock::new(Clock::new());
    clock.msr_write(msr::TSC, 1 << 50, &memory);
    let adjust = clock.msr_read(msr::TSC_ADJUST).unwrap();
    assert!((1 << 50) - adjust < 10_000_000_000 && clock.tsc() >= 1 << 50);
    clock.msr_write(msr::TSC_ADJUST, 0, &memory);
    assert!(clock.tsc() < 1 << 49);
}

#[test]
fn a_restored_clock_goes_on_at_its_own_rate() {
    let saved = ClockState { tsc: 1 << 44, tsc_khz: 1_234_567, ns: 77 * NS_PER_SECOND };
    let clock = Clock::restore(&saved);
    let ((t0, t0_at), (n0, n0_at)) = (moment(|| clock.tsc()), moment(|| clock.ns()));
    sleep(Duration::from_millis(20));
    let ((t1, t1_at), (n1, n1_at)) = (moment(|| clock.tsc()), moment(|| clock.ns()));
    assert!(t0 >= saved.tsc && t0 < saved.tsc + 10 * 1_234_567_000 && n0 >= saved.ns);
    let khz = (t1 - t0) as f64 / (t1_at - t0_at).as_nanos() as f64 * 1e6;
    assert!((khz / 1_234_567.0 - 1.0).abs() < 1e-3, "{khz}");
    let rate = (n1 - n0) as f64 / (n1_at - n0_at).as_nanos() as f64;
    assert!((rate - 1.0).abs() < 1e-3, "{rate}");
    assert_eq!(clock.save().tsc_khz, 1_234_567);
    assert!(clock.ticks_of_ns(1_000_000).abs_diff(1_234_567) <= 1);
    assert!(clock.ns_of_ticks(1_234_567).abs_diff(1_000_000) <= 1);
}
