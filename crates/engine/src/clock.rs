//! Guest time: the time stamp counter, its frequency, and KVM's paravirtual clock.
//!
//! The guest's TSC is the host's TSC plus an offset wherever the host has an invariant one, so that reading it
//! costs one instruction and all vCPUs agree. Elsewhere it is derived from `CLOCK_MONOTONIC_RAW`.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering, fence},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use minicbor::{Decode, Encode};
use vireo_memory::GuestMemory;

use crate::msr::MsrFault;

mod calibrate;
#[cfg(test)]
mod tests;

pub use calibrate::{Frequency, begin_calibration};

const NS_PER_SECOND: u64 = 1_000_000_000;

/// MSRs of this module.
pub mod msr {
    pub const TSC: u32 = 0x10;
    pub const TSC_ADJUST: u32 = 0x3b;
    /// `MSR_KVM_WALL_CLOCK_NEW` (Linux Documentation/virt/kvm/x86/msr.rst).
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    /// `MSR_KVM_SYSTEM_TIME_NEW`.
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
}

/// Where the ticks come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// RDTSC on an invariant TSC.
    HostTsc,
    /// Nanoseconds of `CLOCK_MONOTONIC_RAW`: 1 GHz.
    Monotonic,
}

impl Source {
    #[inline(always)]
    fn ticks(self) -> u64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: RDTSC has no preconditions at user privilege; a host that sets CR4.TSD is not one on which
            // `Frequency::of_host` would have found a usable TSC (it reads it first).
            Self::HostTsc => unsafe { std::arch::x86_64::_rdtsc() },
            #[cfg(not(target_arch = "x86_64"))]
            Self::HostTsc => monotonic_raw_ns(),
            Self::Monotonic => monotonic_raw_ns(),
        }
    }
}

/// Nanoseconds of a clock that runs at the hardware's rate, never stepped and never slewed.
pub(crate) fn monotonic_raw_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for a timespec; this clock exists since Linux 2.6.28.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &mut now) };
    now.tv_sec as u64 * NS_PER_SECOND + now.tv_nsec as u64
}

/// A factor as a 32.32 fixed-point number: exact to 2⁻³² relative for factors near 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Factor(u64);

impl Factor {
    fn new(numerator: u64, denominator: u64) -> Self {
        let value = (u128::from(numerator) << 32) / u128::from(denominator.max(1));
        Self(u64::try_from(value).unwrap_or(u64::MAX))
    }

    #[inline(always)]
    fn of(self, value: u64) -> u64 {
        ((u128::from(value) * u128::from(self.0)) >> 32) as u64
    }
}

/// What [`Clock::save`] keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ClockState {
    /// Guest TSC at the moment of saving (without any vCPU's adjustment).
    #[n(0)]
    pub tsc: u64,
    #[n(1)]
    pub tsc_khz: u32,
    /// Nanoseconds since the guest was first started.
    #[n(2)]
    pub ns: u64,
}

/// The time of one virtual machine.
#[derive(Debug)]
pub struct Clock {
    source: Source,
    frequency: Frequency,
    /// kHz that the guest is told.
    khz: u32,
    /// Guest ticks per host tick; `None` where they are the same.
    scale: Option<Factor>,
    to_ns: Factor,
    to_ticks: Factor,
    /// Host ticks at which guest TSC and nanoseconds were those below.
    epoch: u64,
    tsc_at_epoch: u64,
    ns_at_epoch: u64,
}

impl Clock {
    /// A new guest's clock: its TSC starts near 0 and runs at the host's frequency.
    pub fn new() -> Arc<Self> {
        let frequency = Frequency::of_host();
        Self::build(frequency, frequency.khz, 0, 0)
    }

    /// The clock of a saved guest: goes on from where it was, at the frequency that the guest knows.
    pub fn restore(saved: &ClockState) -> Arc<Self> {
        let frequency = Frequency::of_host();
        let khz = if saved.tsc_khz == 0 { frequency.khz } else { saved.tsc_khz };
        Self::build(frequency, khz, saved.tsc, saved.ns)
    }

    fn build(frequency: Frequency, khz: u32, tsc: u64, ns: u64) -> Arc<Self> {
        let source = if frequency.host_tsc { Source::HostTsc } else { Source::Monotonic };
        Arc::new(Self {
            source,
            frequency,
            khz,
            scale: (khz != frequency.khz).then(|| Factor::new(khz.into(), frequency.khz.into())),
            to_ns: Factor::new(1_000_000, khz.into()),
            to_ticks: Factor::new(khz.into(), 1_000_000),
            epoch: source.ticks(),
            tsc_at_epoch: tsc,
            ns_at_epoch: ns,
        })
    }

    pub fn save(&self) -> ClockState {
        let ticks = self.ticks();
        ClockState { tsc: self.tsc_at(ticks), tsc_khz: self.khz, ns: self.ns_at(ticks) }
    }

    pub fn tsc_khz(&self) -> u32 {
        self.khz
    }

    /// How the host's frequency was found and how well it is known.
    pub fn frequency(&self) -> Frequency {
        self.frequency
    }

    /// Guest ticks since the epoch.
    #[inline(always)]
    fn ticks(&self) -> u64 {
        let ticks = self.source.ticks().wrapping_sub(self.epoch);
        match self.scale {
            None => ticks,
            Some(factor) => factor.of(ticks),
        }
    }

    #[inline(always)]
    fn tsc_at(&self, ticks: u64) -> u64 {
        self.tsc_at_epoch.wrapping_add(ticks)
    }

    #[inline(always)]
    fn ns_at(&self, ticks: u64) -> u64 {
        self.ns_at_epoch.wrapping_add(self.to_ns.of(ticks))
    }

    /// The guest's TSC now, for a vCPU that never wrote its own.
    #[inline(always)]
    pub fn tsc(&self) -> u64 {
        self.tsc_at(self.ticks())
    }

    /// Nanoseconds since the guest was first started. Runs on while it is paused.
    #[inline(always)]
    pub fn ns(&self) -> u64 {
        self.ns_at(self.ticks())
    }

    /// A span of the guest's TSC in nanoseconds, rounded up: a timer set by it is never early.
    pub fn ns_of_ticks(&self, ticks: u64) -> u64 {
        self.to_ns.of(ticks).saturating_add(1)
    }

    pub fn ticks_of_ns(&self, ns: u64) -> u64 {
        self.to_ticks.of(ns)
    }
}

/// The clock as one vCPU sees it: the VM's, plus what the guest added to this vCPU's TSC, plus its kvmclock page.
#[derive(Debug)]
pub struct VcpuClock {
    vm: Arc<Clock>,
    /// IA32_TSC_ADJUST (Intel SDM vol. 3, 18.17.3): writing the TSC changes it by the same amount.
    adjust: AtomicU64,
    system_time: AtomicU64,
    wall_clock: AtomicU64,
}

impl VcpuClock {
    pub fn new(vm: Arc<Clock>) -> Arc<Self> {
        Arc::new(Self { vm, adjust: AtomicU64::new(0), system_time: AtomicU64::new(0), wall_clock: AtomicU64::new(0) })
    }

    pub fn vm(&self) -> &Arc<Clock> {
        &self.vm
    }

    /// What RDTSC reads.
    #[inline(always)]
    pub fn tsc(&self) -> u64 {
        self.vm.tsc().wrapping_add(self.adjust.load(Ordering::Relaxed))
    }

    /// What this vCPU's TSC is ahead of the host's, where it runs with it.
    pub fn ahead_of_host(&self) -> Option<u64> {
        let clock = &self.vm;
        let same = clock.source == Source::HostTsc && clock.scale.is_none();
        let base = clock.tsc_at_epoch.wrapping_sub(clock.epoch);
        same.then(|| base.wrapping_add(self.adjust.load(Ordering::Relaxed)))
    }

    /// Sets this vCPU's TSC, as writing IA32_TSC does; also how a saved state is restored.
    pub fn set_tsc(&self, value: u64) {
        self.adjust.fetch_add(value.wrapping_sub(self.tsc()), Ordering::Relaxed);
    }

    /// Reads one of the MSRs in [`msr`]; `None` for any other.
    pub fn msr_read(&self, index: u32) -> Option<u64> {
        match index {
            msr::TSC => Some(self.tsc()),
            msr::TSC_ADJUST => Some(self.adjust.load(Ordering::Relaxed)),
            msr::KVM_WALL_CLOCK => Some(self.wall_clock.load(Ordering::Relaxed)),
            msr::KVM_SYSTEM_TIME => Some(self.system_time.load(Ordering::Relaxed)),
            _ => None,
        }
    }

    /// Writes one of the MSRs in [`msr`]; `None` for any other. After writing the TSC the vCPU calls
    /// [`crate::apic::LocalApic::tsc_changed`].
    pub fn msr_write(&self, index: u32, value: u64, memory: &GuestMemory) -> Option<Result<(), MsrFault>> {
        match index {
            msr::TSC => self.set_tsc(value),
            msr::TSC_ADJUST => self.adjust.store(value, Ordering::Relaxed),
            msr::KVM_WALL_CLOCK => {
                // A value that is refused leaves the register as it was, or it would be saved and not restored.
                let written = self.write_wall_clock(value, memory);
                return Some(written.inspect(|()| self.wall_clock.store(value, Ordering::Relaxed)));
            }
            msr::KVM_SYSTEM_TIME => {
                let written = self.write_system_time(value, memory);
                return Some(written.inspect(|()| self.system_time.store(value, Ordering::Relaxed)));
            }
            _ => return None,
        }
        Some(Ok(()))
    }

    /// Writes the kvmclock page anew; after a restore, and whenever this vCPU's TSC was changed.
    pub fn refresh(&self, memory: &GuestMemory) {
        let _ = self.write_system_time(self.system_time.load(Ordering::Relaxed), memory);
    }

    /// `pvclock_vcpu_time_info`: version, pad, tsc_timestamp, system_time, mul, shift, flags
    /// (Linux Documentation/virt/kvm/x86/msr.rst).
    fn write_system_time(&self, value: u64, memory: &GuestMemory) -> Result<(), MsrFault> {
        const TSC_STABLE: u8 = 1;
        if value & 1 == 0 {
            return Ok(());
        }
        let (mul, shift) = pvclock_scale(self.vm.khz);
        // The same pair on all vCPUs: that is what TSC_STABLE promises.
        let adjust = self.adjust.load(Ordering::Relaxed);
        let mut body = [0u8; 28];
        body[4..12].copy_from_slice(&self.vm.tsc_at_epoch.wrapping_add(adjust).to_le_bytes());
        body[12..20].copy_from_slice(&self.vm.ns_at_epoch.to_le_bytes());
        body[20..24].copy_from_slice(&mul.to_le_bytes());
        body[24] = shift as u8;
        body[25] = TSC_STABLE;
        write_versioned(memory, value & !1, &body)
    }

    /// `pvclock_wall_clock`: version, seconds, nanoseconds of the wall clock when [`Clock::ns`] was 0.
    fn write_wall_clock(&self, gpa: u64, memory: &GuestMemory) -> Result<(), MsrFault> {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let start = wall.saturating_sub(Duration::from_nanos(self.vm.ns()));
        let mut body = [0u8; 8];
        body[0..4].copy_from_slice(&(start.as_secs() as u32).to_le_bytes());
        body[4..8].copy_from_slice(&start.subsec_nanos().to_le_bytes());
        write_versioned(memory, gpa, &body)
    }
}

/// A structure that begins with a version: odd while it is being written, so that a guest on another vCPU reads again.
fn write_versioned(memory: &GuestMemory, gpa: u64, body: &[u8]) -> Result<(), MsrFault> {
    let body_at = gpa.checked_add(4).ok_or(MsrFault)?;
    memory.slice(gpa, 4 + body.len() as u64).map_err(|_| MsrFault)?;
    let version = memory.load_u32(gpa, Ordering::Acquire).map_err(|_| MsrFault)?;
    let odd = version.wrapping_add(1) | 1;
    memory.store_u32(gpa, odd, Ordering::Release).map_err(|_| MsrFault)?;
    fence(Ordering::SeqCst);
    memory.write(body_at, body).map_err(|_| MsrFault)?;
    memory.store_u32(gpa, odd.wrapping_add(1), Ordering::Release).map_err(|_| MsrFault)
}

/// `(tsc_to_system_mul, tsc_shift)` such that `ns = ((ticks << shift) * mul) >> 32` (a negative shift goes right),
/// with as many significant bits in `mul` as fit.
fn pvclock_scale(khz: u32) -> (u32, i8) {
    let base = u64::from(khz.max(1)) * 1000;
    // mul = 2^32 * 1e9 / (base * 2^shift) must lie in 2^31 .. 2^32, so base * 2^shift in 1e9 .. 2e9.
    let mut shift = 0i8;
    while shifted(base, shift) <= NS_PER_SECOND {
        shift += 1;
    }
    while shifted(base, shift) > 2 * NS_PER_SECOND {
        shift -= 1;
    }
    let numerator = u128::from(NS_PER_SECOND) << 64;
    let mul = (numerator / (u128::from(base) << (32 + i32::from(shift)))) as u64;
    (u32::try_from(mul).unwrap_or(u32::MAX), shift)
}

fn shifted(value: u64, shift: i8) -> u64 {
    if shift >= 0 { value << shift } else { value >> -shift }
}

/// The frequency of the host, found once.
fn host_frequency() -> Frequency {
    static FREQUENCY: OnceLock<Frequency> = OnceLock::new();
    *FREQUENCY.get_or_init(calibrate::measure)
}

impl Frequency {
    /// Blocks for up to 20 ms the first time it is asked; see [`begin_calibration`].
    pub fn of_host() -> Self {
        host_frequency()
    }
}
