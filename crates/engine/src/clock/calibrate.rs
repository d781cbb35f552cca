//! Finding the frequency of the host's TSC.

use std::{sync::OnceLock, time::Duration};

use super::monotonic_raw_ns;

/// How long a calibration measures. The two clocks are read within some 30 ns of each other, so that 20 ms give
/// about 3 ppm at worst; the kernel's own idea of its TSC is what `CLOCK_MONOTONIC_RAW` runs by.
const SPAN: Duration = Duration::from_millis(20);
/// Pairs of readings at each end, of which the tightest counts.
const TRIES: usize = 16;

/// How fast the source of guest time ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frequency {
    pub khz: u32,
    /// Bound on the error of `khz`, in parts per million. Rounding to whole kHz is part of it.
    pub error_ppm: f64,
    /// Ticks are the host's TSC; otherwise nanoseconds of the host's clock.
    pub host_tsc: bool,
    /// Which way the frequency was found.
    pub origin: &'static str,
}

/// A reading of both clocks, and how many ticks wide its uncertainty is.
#[derive(Clone, Copy, Debug)]
struct Sample {
    ticks: u64,
    ns: u64,
    width: u64,
}

static FIRST: OnceLock<Option<Sample>> = OnceLock::new();

/// Takes the first reading of a calibration, so that the time until a [`super::Clock`] is needed counts and nobody
/// has to wait later. Costs microseconds; calling it is optional.
pub fn begin_calibration() {
    FIRST.get_or_init(|| host::has_invariant_tsc().then(sample));
}

pub(super) fn measure() -> Frequency {
    if !host::has_invariant_tsc() {
        return Frequency { khz: 1_000_000, error_ppm: 0.0, host_tsc: false, origin: "CLOCK_MONOTONIC_RAW" };
    }
    if let Some((khz, origin)) = host::told_khz() {
        return Frequency { khz, error_ppm: 0.5e6 / f64::from(khz), host_tsc: true, origin };
    }
    begin_calibration();
    let first = FIRST.get().copied().flatten().unwrap_or_else(sample);
    let gone = Duration::from_nanos(monotonic_raw_ns().saturating_sub(first.ns));
    if let Some(left) = SPAN.checked_sub(gone) {
        std::thread::sleep(left);
    }
    between(first, sample())
}

fn between(first: Sample, last: Sample) -> Frequency {
    let ticks = last.ticks.wrapping_sub(first.ticks);
    let ns = last.ns.saturating_sub(first.ns).max(1);
    let khz = (u128::from(ticks) * 1_000_000 + u128::from(ns) / 2) / u128::from(ns);
    let khz = u32::try_from(khz).unwrap_or(u32::MAX).max(1);
    let uncertain = (first.width + last.width) as f64 / 2.0;
    let error_ppm = (uncertain + 1.0) / ticks.max(1) as f64 * 1e6 + 0.5e6 / f64::from(khz);
    Frequency { khz, error_ppm, host_tsc: true, origin: "measured against CLOCK_MONOTONIC_RAW" }
}

/// The tightest of some readings: the clock between two readings of the TSC.
fn sample() -> Sample {
    let one = || {
        let before = host::ticks();
        let ns = monotonic_raw_ns();
        let after = host::ticks();
        let width = after.wrapping_sub(before);
        Sample { ticks: before.wrapping_add(width / 2), ns, width }
    };
    let mut best = one();
    for _ in 1..TRIES {
        let next = one();
        if next.width < best.width {
            best = next;
        }
    }
    best
}

#[cfg(target_arch = "x86_64")]
mod host {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};

    pub fn ticks() -> u64 {
        // SAFETY: RDTSC has no preconditions at user privilege.
        unsafe { _rdtsc() }
    }

    /// CPUID 0x80000007 EDX bit 8 (AMD APM vol. 3, E.4.6; Intel SDM vol. 3, 18.17.1).
    #[allow(unused_unsafe)]
    pub fn has_invariant_tsc() -> bool {
        // SAFETY: every x86-64 processor has CPUID.
        let top = unsafe { __cpuid(0x8000_0000) }.eax;
        // SAFETY: as above.
        top >= 0x8000_0007 && unsafe { __cpuid(0x8000_0007) }.edx & (1 << 8) != 0
    }

    /// The frequency where the processor or a hypervisor tells it exactly.
    #[allow(unused_unsafe)]
    pub fn told_khz() -> Option<(u32, &'static str)> {
        // SAFETY: every x86-64 processor has CPUID, here and below.
        let leaf = |function: u32| unsafe { __cpuid_count(function, 0) };
        // a hypervisor's timing leaf, in kHz (VMware's, which QEMU and others give for KVM too)
        if leaf(1).ecx & (1 << 31) != 0 && (0x4000_0010..0x4001_0000).contains(&leaf(0x4000_0000).eax) {
            let khz = leaf(0x4000_0010).eax;
            if khz != 0 {
                return Some((khz, "CPUID leaf 0x40000010"));
            }
        }
        // Intel SDM vol. 3, 20.7.3: TSC = crystal Hz * EBX / EAX; without the crystal's Hz it is only nominal
        if leaf(0).eax >= 0x15 {
            let (denominator, numerator, hz) = (leaf(0x15).eax, leaf(0x15).ebx, leaf(0x15).ecx);
            if denominator != 0 && numerator != 0 && hz != 0 {
                let khz = u64::from(hz) * u64::from(numerator) / u64::from(denominator) / 1000;
                return u32::try_from(khz).ok().filter(|k| *k != 0).map(|khz| (khz, "CPUID leaf 0x15"));
            }
        }
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod host {
    pub fn ticks() -> u64 {
        super::monotonic_raw_ns()
    }

    pub fn has_invariant_tsc() -> bool {
        false
    }

    pub fn told_khz() -> Option<(u32, &'static str)> {
        None
    }
}
