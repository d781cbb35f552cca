//! Whether KVM on this host is any good: a device node that opens says little.
//!
//! A host may answer every call and yet emulate the guest's kernel mode one instruction at a time (KVM
//! without VT-x or AMD-V below it), thousands of times slower than our software engine. So the probe runs
//! kernel-mode code in a throw-away VM and looks at the clock.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use vireo_cpu::{Bus, CpuError, CpuState, Engine, Exit, Kick, Segment, VcpuConfig};
use vireo_memory::GuestMemory;

use crate::{
    capability::{self, Obstacle},
    engine::{KvmEngine, KvmOptions},
};

/// How quick guest kernel code is.
#[derive(Clone, Debug, PartialEq)]
pub enum Ring0Speed {
    /// As on the bare machine: a stock kernel runs well.
    Native,
    /// Each instruction is emulated: right, but far too slow for a stock kernel.
    Emulated { ns_per_instruction: f64 },
    /// KVM cannot be used at all.
    Unavailable { why: String, remedy: String },
}

#[derive(Clone, Debug, PartialEq)]
pub struct KvmProbe {
    pub speed: Ring0Speed,
    /// 0 where the device cannot be opened.
    pub max_vcpus: u32,
}

/// Enough to drown what the first entry and the first page faults cost, and yet 0.1 ms on real hardware.
const ITERATIONS: u32 = 20_000;
const INSTRUCTIONS_PER_ITERATION: u32 = 5;
/// Emulation is called off after this time.
const LIMIT: Duration = Duration::from_millis(15);
/// Native is 0.3 to 2 ns, a busy host included (its thread's CPU time counts, not the clock on the wall);
/// emulation is beyond 500 ns.
const NATIVE_AT_MOST_NS: f64 = 150.0;

const CODE: u64 = 0x4000;
#[rustfmt::skip]
const GUEST: &[u8] = &[
    0xe6, 0x10,                   //    out 0x10, al
    0xb9, 0x20, 0x4e, 0x00, 0x00, //    mov ecx, 20000
    0x48, 0x8b, 0x03,             // 1: mov rax, [rbx]
    0x48, 0x01, 0xc8,             //    add rax, rcx
    0x48, 0x89, 0x03,             //    mov [rbx], rax
    0xff, 0xc9,                   //    dec ecx
    0x75, 0xf3,                   //    jnz 1b
    0xe6, 0x11,                   //    out 0x11, al
    0xf4,                         //    hlt
];
const START_PORT: u16 = 0x10;
const END_PORT: u16 = 0x11;

/// Looks at `/dev/kvm`. Takes some 5 ms on hardware, at most 50 ms.
pub fn probe() -> KvmProbe {
    probe_device(&KvmOptions::default())
}

pub(crate) fn probe_device(options: &KvmOptions) -> KvmProbe {
    let max_vcpus = match capability::open(&options.device) {
        Ok(kvm) => kvm.get_max_vcpus() as u32,
        Err(Obstacle { why, remedy }) => {
            return KvmProbe { speed: Ring0Speed::Unavailable { why, remedy }, max_vcpus: 0 };
        }
    };
    let speed = measure(options).unwrap_or_else(|e| unusable(&options.device, &e));
    KvmProbe { speed, max_vcpus }
}

fn unusable(device: &Path, error: &CpuError) -> Ring0Speed {
    let cause = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    Ring0Speed::Unavailable {
        why: format!("{} opens, but a trial VM does not run: {error}{cause}", device.display()),
        remedy: "see the kernel's log (dmesg) for kvm, or use --accel soft".into(),
    }
}

fn measure(options: &KvmOptions) -> Result<Ring0Speed, CpuError> {
    let memory = GuestMemory::new(0x10000, 0x10000).map_err(|e| CpuError::Other(e.to_string()))?;
    load(&memory).map_err(|e| CpuError::Other(e.to_string()))?;
    let engine = KvmEngine::new(&memory, options.clone())?;
    let config = VcpuConfig { id: 0, count: 1, cpuid: engine.supported_cpuid()? };
    let mut vcpu = engine.create_vcpu(&config)?;
    vcpu.set_state(&long_mode())?;

    let bus = Stopwatch { times: Mutex::default(), kicker: vcpu.kicker() };
    let (done, wait) = mpsc::channel::<()>();
    let kicker = vcpu.kicker();
    let alarm = thread::spawn(move || {
        while wait.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            kicker.kick();
        }
    });
    let exit = vcpu.run(&bus);
    drop(done);
    let _ = alarm.join();

    if let Exit::Crash(crash) = exit? {
        return Err(CpuError::Other(format!("{} at {:#x}", crash.reason, crash.rip)));
    }
    let times = *bus.times.lock().unwrap_or_else(PoisonError::into_inner);
    let left = vcpu.state()?.gpr[1] as u32;
    let start = times.start.unwrap_or_default();
    let spent = times.end.unwrap_or_else(thread_cpu_time).saturating_sub(start);
    let iterations = if times.start.is_some() { ITERATIONS.saturating_sub(left).max(1) } else { 1 };
    let ns = spent.as_nanos() as f64 / f64::from(iterations * INSTRUCTIONS_PER_ITERATION);
    Ok(if ns <= NATIVE_AT_MOST_NS { Ring0Speed::Native } else { Ring0Speed::Emulated { ns_per_instruction: ns } })
}

/// Page tables at 0x1000 to 0x3fff that map the first 2 MiB to themselves; code; data at 0x8000.
fn load(memory: &GuestMemory) -> Result<(), vireo_memory::MemoryError> {
    memory.write_pod(0x1000, 0x2003u64)?;
    memory.write_pod(0x2000, 0x3003u64)?;
    memory.write_pod(0x3000, 0x83u64)?;
    memory.write(CODE, GUEST)
}

fn long_mode() -> CpuState {
    let mut state = CpuState::reset();
    state.segments = [Segment::DATA; 6];
    state.segments[1] = Segment::CODE64;
    state.tr = Segment::TSS;
    (state.cr0, state.cr3, state.cr4, state.efer) = (0x8000_0033, 0x1000, 0x20, 0x500);
    (state.rip, state.gpr[3]) = (CODE, 0x8000);
    state
}

#[derive(Clone, Copy, Default)]
struct Times {
    start: Option<Duration>,
    end: Option<Duration>,
}

struct Stopwatch {
    times: Mutex<Times>,
    kicker: Arc<dyn Kick>,
}

impl Bus for Stopwatch {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, port: u16, _data: &[u8]) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        match port {
            START_PORT => times.start = Some(thread_cpu_time()),
            END_PORT => {
                times.end = Some(thread_cpu_time());
                self.kicker.kick();
            }
            _ => {}
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn eoi(&self, _vector: u8) {}
}

/// CPU time of this thread, the guest's included: a busy host does not make the guest look slow.
fn thread_cpu_time() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing; this clock always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
