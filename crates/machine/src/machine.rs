//! Builds a machine from its description and runs it to its end.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use vireo_cpu::{Bus, CrashInfo, RunStats};
use vireo_memory::GuestMemory;

use crate::{
    acpi::{self, AcpiConfig},
    board::{self, Devices, Handles},
    boot::{self, BootSource, Decompressor, Loaded},
    config::MachineConfig,
    disks::{self, OpenDisk},
    engine::{Choice, Created, EngineKind},
    error::MachineError,
    events::{End, Events, restarts_on_panic},
    layout::LOW_RAM_LIMIT,
    metrics::{MemorySampler, MemoryUse},
    reset_vector, smbios,
    vcpus::{self, Vcpus},
};

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    PowerOff,
    /// The guest reset and shall not start again ([`MachineConfig::reboot`]).
    Reset,
    /// The guest's kernel reported a panic.
    Panic,
    Crash(CrashInfo),
    /// [`Control::stop`].
    Stopped,
}

/// What is known after a run.
#[derive(Clone, Debug)]
pub struct Report {
    pub outcome: Outcome,
    pub engine: Choice,
    /// How the kernel was loaded, for people.
    pub kernel: String,
    /// When the boot processor entered the kernel, for the first time.
    pub kernel_entry: Option<Instant>,
    /// When the first instruction of a user process ran, for the first time. The software engine knows exactly; on
    /// KVM it is when a vCPU was first found in user mode, which is only looked for with [`MachineConfig::metrics`].
    pub first_user: Option<Instant>,
    /// Of all boots together.
    pub stats: RunStats,
    /// Times that the guest started.
    pub boots: u32,
    /// Peaks, if [`MachineConfig::metrics`] is set.
    pub memory: Option<MemoryUse>,
    pub running_time: Duration,
    /// A sentence for each disk whose host file failed the guest.
    pub disk_failures: Vec<String>,
}

/// Stops a run from anywhere. Clones are the same control, and it stays good when the guest reboots.
#[derive(Clone, Default)]
pub struct Control(Arc<ControlState>);

#[derive(Default)]
struct ControlState {
    stop: AtomicBool,
    running: Mutex<Option<Arc<Events>>>,
}

impl Control {
    /// Ends the run, now or as soon as it begins.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        let running = self.0.running.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(events) = running {
            events.finish(End::Stopped);
        }
    }

    fn attach(&self, events: &Arc<Events>) {
        *self.0.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(events.clone());
        if self.0.stop.load(Ordering::SeqCst) {
            events.finish(End::Stopped);
        }
    }
}

/// Runs a machine to its end, through all reboots. `built` sees each machine right before it starts: the place
/// to take its [`Handles`].
pub fn run(config: &MachineConfig, control: &Control, mut built: impl FnMut(&Machine)) -> Result<Report, MachineError> {
    config.check()?;
    let choice = Choice::of(config.accel, vireo_cpu_kvm::probe);
    check_vcpus(config, choice.kind)?;
    let disks = disks::open(&config.disks)?;
    let mut total: Option<Report> = None;
    loop {
        let machine = Machine::build(config, &choice, &disks)?;
        control.attach(&machine.events);
        built(&machine);
        let report = machine.run(config)?;
        let again = report.outcome == Outcome::Reset && config.reboot;
        let merged = match total.take() {
            None => report,
            Some(earlier) => earlier.followed_by(report),
        };
        if !again {
            disks::flush(&disks)?;
            return Ok(Report { disk_failures: disks::failures(&disks), ..merged });
        }
        total = Some(merged);
    }
}

fn check_vcpus(config: &MachineConfig, engine: EngineKind) -> Result<(), MachineError> {
    let most = engine.max_vcpus();
    if config.vcpus > most {
        return Err(MachineError::TooManyVcpus { engine: engine.name(), asked: config.vcpus, most });
    }
    Ok(())
}

impl Report {
    fn followed_by(mut self, later: Self) -> Self {
        vcpus::add(&mut self.stats, &later.stats);
        self.memory = match (self.memory, later.memory) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
        self.first_user = self.first_user.or(later.first_user);
        self.running_time += later.running_time;
        self.boots += later.boots;
        self.outcome = later.outcome;
        self
    }
}

/// A machine that was built and has not run yet: all memory, devices and vCPUs are there.
pub struct Machine {
    // In the order in which they must go: vCPUs use devices, devices use memory.
    vcpus: Vcpus,
    devices: Devices,
    loaded: Loaded,
    choice: Choice,
    events: Arc<Events>,
    sampler: Option<MemorySampler>,
    engine: Created,
    _memory: GuestMemory,
}

impl Machine {
    pub fn build(config: &MachineConfig, choice: &Choice, disks: &[OpenDisk]) -> Result<Self, MachineError> {
        let memory = GuestMemory::new(config.memory.0, LOW_RAM_LIMIT)?;
        let sampler = config.metrics.then(|| MemorySampler::start(&memory));
        let rsdp = acpi::write(&memory, &AcpiConfig { vcpus: config.vcpus })?;
        smbios::write(&memory)?;
        reset_vector::write(&memory)?;
        let loaded = boot::load(&memory, &boot_source(config, choice.kind), rsdp)?;
        let created = choice.kind.create(&memory, config.metrics, config.verify_translation)?;
        let engine = created.engine.clone();
        let events = Arc::new(Events::default());
        let devices = board::build(config, disks, &memory, &engine, &events)?;
        let bus: Arc<dyn Bus> = devices.bus.clone();
        let look = config.metrics && !created.sees_user_code();
        let vcpus = Vcpus::create(&engine, &bus, &events, config.vcpus, loaded.entry, look)?;
        let choice = choice.clone();
        Ok(Self { vcpus, devices, loaded, choice, events, sampler, engine: created, _memory: memory })
    }

    /// The host's ends of this machine's devices. They end with it: a guest that reboots is a new machine.
    pub fn handles(&self) -> &Handles {
        &self.devices.handles
    }

    pub fn engine(&self) -> &Choice {
        &self.choice
    }

    fn run(self, config: &MachineConfig) -> Result<Report, MachineError> {
        let restarts = restarts_on_panic(&config.boot.cmdline);
        let kernel_entry = Instant::now();
        self.vcpus.start();
        let end = loop {
            if let Some(end) = self.events.wait(None, restarts) {
                break end;
            }
        };
        let first_user = self.vcpus.first_user().or_else(|| self.engine.first_user_instruction());
        let panicked = self.events.has_panicked();
        let stats = self.vcpus.join();
        let memory = self.sampler.map(MemorySampler::finish);
        let running_time = kernel_entry.elapsed();
        let outcome = match end {
            End::PowerOff => Outcome::PowerOff,
            End::Reset if panicked && !config.reboot => Outcome::Panic,
            End::Reset => Outcome::Reset,
            End::Panic => Outcome::Panic,
            End::Crash(info) => Outcome::Crash(info),
            End::Stopped => Outcome::Stopped,
            End::Failed(error) => return Err(error.into()),
        };
        Ok(Report {
            outcome,
            engine: self.choice,
            kernel: self.loaded.how,
            kernel_entry: Some(kernel_entry),
            first_user,
            stats,
            boots: 1,
            memory,
            running_time,
            disk_failures: Vec::new(),
        })
    }
}

fn boot_source(config: &MachineConfig, engine: EngineKind) -> BootSource {
    let boot = &config.boot;
    // Native decompression costs some 60 ms and buys KASLR; a software CPU would take seconds for it.
    let by_engine = match engine {
        EngineKind::Kvm => Decompressor::Guest,
        EngineKind::Soft => Decompressor::Host,
    };
    BootSource {
        kernel: boot.kernel.clone(),
        initrd: boot.initrd.clone(),
        cmdline: boot.cmdline.clone(),
        decompressor: boot.decompressor.unwrap_or(by_engine),
    }
}
