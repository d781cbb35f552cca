//! What a guest is told of the time in which its vCPUs did not run: KVM's steal time (`MSR_KVM_STEAL_TIME`, Linux
//! Documentation/virt/kvm/x86/msr.rst).
//!
//! A vCPU that halts says so in the record's `preempted`, as one of KVM's does once it has left its processor. That
//! spares the guest's kernel what costs most between two vCPUs, to wake one that sleeps:
//!
//! * What another one wants flushed from its TLB (`KVM_FEATURE_PV_TLB_FLUSH`) is flushed when it goes on: there is no
//!   interrupt, and nobody waits for an answer.
//! * Who wakes a process and is about to sleep takes it for the better place, since the other would have to come
//!   first. Two processes that take turns then do so on one vCPU, with its translations and its TLB.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::atomic::{Ordering, fence},
    thread::{self, ThreadId},
};

use vireo_memory::GuestMemory;

use crate::msr::MsrFault;

#[cfg(test)]
mod tests;

/// `MSR_KVM_STEAL_TIME`: the address of a record of 64 bytes, and whether it is kept.
pub const MSR: u32 = 0x4b56_4d03;
const ENABLED: u64 = 1;
const RESERVED: u64 = 0x3e;

/// `kvm_steal_time`: where its fields are.
mod field {
    pub const STEAL: u64 = 0;
    pub const VERSION: u64 = 8;
    pub const PREEMPTED: u64 = 16;
}

/// Bits of `preempted`.
const PREEMPTED: u8 = 1 << 0;
const FLUSH_TLB: u8 = 1 << 1;

/// How often the time is brought up to date: asking the host is a system call.
const INTERVAL_NS: u64 = 10_000_000;

/// Of the time, what a vCPU is kept waiting for a processor on a busy host, at least; to be woken up takes much less.
const CROWDED_PART: u64 = 4;

/// How long a thread has been kept waiting for a processor.
#[derive(Debug)]
struct Waits {
    thread: ThreadId,
    /// `schedstat` of the thread (Linux Documentation/scheduler/sched-stats.rst); `None` where the host has none.
    file: Option<File>,
    /// What it was last.
    ns: u64,
}

impl Waits {
    /// Of the thread that asks.
    fn here() -> Self {
        let mut waits =
            Self { thread: thread::current().id(), file: File::open("/proc/thread-self/schedstat").ok(), ns: 0 };
        waits.since();
        waits
    }

    /// Nanoseconds since this was asked last.
    fn since(&mut self) -> u64 {
        let now = self.file.as_ref().and_then(run_delay).unwrap_or(self.ns);
        now.saturating_sub(std::mem::replace(&mut self.ns, now))
    }
}

/// The second of three numbers: nanoseconds spent waiting on a run queue.
fn run_delay(file: &File) -> Option<u64> {
    let mut text = [0; 64];
    let length = file.read_at(&mut text, 0).ok()?;
    str::from_utf8(text.get(..length)?).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The register of one vCPU, and what stands behind it.
#[derive(Debug, Default)]
pub struct StealTime {
    msr: u64,
    waits: Option<Waits>,
    /// When the host is next asked.
    due: u64,
}

impl StealTime {
    pub fn msr(&self) -> u64 {
        self.msr
    }

    /// A record where no RAM is is not kept; as with KVM that is no fault.
    pub fn set(&mut self, value: u64, memory: &GuestMemory) -> Result<(), MsrFault> {
        if value & RESERVED != 0 {
            return Err(MsrFault);
        }
        self.msr = value;
        // Who writes it runs; nothing can have been asked of it before.
        let _ = self.goes_on(memory);
        Ok(())
    }

    /// Where the record is, if it is kept.
    fn record(&self) -> Option<u64> {
        (self.msr & ENABLED != 0).then_some(self.msr & !ENABLED)
    }

    /// The vCPU is about to halt.
    pub fn halts(&self, memory: &GuestMemory) {
        if let Some(record) = self.record() {
            let _ = memory.swap_u8(record + field::PREEMPTED, PREEMPTED, Ordering::SeqCst);
        }
    }

    /// The vCPU goes on: to be called before it reads or writes anything. Whether its TLB must be flushed.
    #[must_use = "others rely on the flush that they asked for"]
    pub fn goes_on(&self, memory: &GuestMemory) -> bool {
        let Some(record) = self.record() else { return false };
        let before = memory.swap_u8(record + field::PREEMPTED, 0, Ordering::SeqCst).unwrap_or(0);
        before & FLUSH_TLB != 0
    }

    /// Notes the time for which the vCPU's thread, which calls this, was kept waiting, if that was not done lately.
    /// Whether it was much.
    pub fn account(&mut self, now_ns: u64, memory: &GuestMemory) -> bool {
        if now_ns < self.due {
            return false;
        }
        let waits = match &mut self.waits {
            Some(waits) if waits.thread == thread::current().id() => waits,
            // Of what this thread did before nothing is known.
            waits => {
                *waits = Some(Waits::here());
                self.due = now_ns + INTERVAL_NS;
                return false;
            }
        };
        let waited = waits.since();
        let much = waited > (now_ns + INTERVAL_NS - self.due) / CROWDED_PART;
        self.due = now_ns + INTERVAL_NS;
        if let Some(record) = self.record().filter(|_| waited != 0) {
            let _ = add(record, waited, memory);
        }
        much
    }
}

/// The version is odd while the record changes.
fn add(record: u64, ns: u64, memory: &GuestMemory) -> Result<(), vireo_memory::MemoryError> {
    let version = memory.load_u32(record + field::VERSION, Ordering::Relaxed)? | 1;
    memory.store_u32(record + field::VERSION, version, Ordering::Relaxed)?;
    fence(Ordering::SeqCst);
    let steal = memory.load_u64(record + field::STEAL, Ordering::Relaxed)?;
    memory.store_u64(record + field::STEAL, steal.wrapping_add(ns), Ordering::Relaxed)?;
    memory.store_u32(record + field::VERSION, version.wrapping_add(1), Ordering::Release)
}
