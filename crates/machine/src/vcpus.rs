//! The threads that run a machine's vCPUs.

use std::{
    io,
    panic::{self, AssertUnwindSafe},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Instant,
};

use vireo_cpu::{Bus, CpuError, Engine, Exit, RunStats, Vcpu, VcpuConfig};

use crate::{
    boot::Entry,
    events::{End, Events},
    user_watch::UserWatch,
};

/// vCPU threads that wait for the word to go.
pub(crate) struct Vcpus {
    threads: Vec<Thread>,
    events: Arc<Events>,
    user_watch: Option<Arc<UserWatch>>,
}

struct Thread {
    go: mpsc::Sender<()>,
    join: JoinHandle<RunStats>,
}

impl Vcpus {
    /// Creates `count` vCPUs, each on its own thread, the first one ready to enter the kernel.
    pub fn create(
        engine: &Arc<dyn Engine>,
        bus: &Arc<dyn Bus>,
        events: &Arc<Events>,
        count: u32,
        entry: Entry,
        watch_for_user_code: bool,
    ) -> Result<Self, CpuError> {
        let cpuid = engine.supported_cpuid()?;
        let user_watch = watch_for_user_code.then(Arc::default);
        let mut vcpus = Self { threads: Vec::new(), events: events.clone(), user_watch };
        for id in 0..count {
            let config = VcpuConfig { id, count, cpuid: cpuid.clone() };
            let place = Place { engine: engine.clone(), bus: bus.clone(), events: events.clone(), config, entry };
            vcpus.threads.push(place.spawn(vcpus.user_watch.clone())?);
        }
        Ok(vcpus)
    }

    pub fn start(&self) {
        if let Some(watch) = &self.user_watch {
            watch.start(self.events.clone());
        }
        for thread in &self.threads {
            // A thread that is gone has said why already.
            let _ = thread.go.send(());
        }
    }

    /// When user code was first seen, if someone was to look for it.
    pub fn first_user(&self) -> Option<Instant> {
        self.user_watch.as_ref()?.seen()
    }

    /// Waits for all threads to end, which they do once the events say so. Returns what they counted.
    pub fn join(mut self) -> RunStats {
        let mut total = RunStats::default();
        for thread in std::mem::take(&mut self.threads) {
            drop(thread.go);
            if let Ok(stats) = thread.join.join() {
                add(&mut total, &stats);
            }
        }
        total
    }
}

impl Drop for Vcpus {
    /// Threads that were created and never started, or not joined because of an error.
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.events.finish(End::Stopped);
        }
        for thread in std::mem::take(&mut self.threads) {
            drop(thread.go);
            let _ = thread.join.join();
        }
    }
}

pub(crate) fn add(total: &mut RunStats, stats: &RunStats) {
    if let Some(instructions) = stats.instructions {
        *total.instructions.get_or_insert(0) += instructions;
    }
    for (kind, count) in &stats.exits {
        *total.exits.entry(kind).or_insert(0) += count;
    }
}

/// What a vCPU's thread needs.
struct Place {
    engine: Arc<dyn Engine>,
    bus: Arc<dyn Bus>,
    events: Arc<Events>,
    config: VcpuConfig,
    entry: Entry,
}

impl Place {
    fn spawn(self, watch: Option<Arc<UserWatch>>) -> Result<Thread, CpuError> {
        let (go, wait) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let name = format!("vireo-cpu{}", self.config.id);
        let body = move || {
            let mut vcpu = match create(&*self.engine, &self.config, self.entry) {
                Ok(vcpu) => vcpu,
                Err(e) => {
                    let _ = ready.send(Err(e));
                    return RunStats::default();
                }
            };
            self.events.add_kicker(vcpu.kicker());
            let _ = ready.send(Ok(()));
            if wait.recv().is_ok() {
                run(&mut *vcpu, &*self.bus, &self.events, watch.as_deref());
            }
            vcpu.stats()
        };
        let join = thread::Builder::new()
            .name(name)
            .spawn(body)
            .map_err(|source| CpuError::Host { what: "starting a vCPU thread", source })?;
        is_ready.recv().unwrap_or_else(|_| {
            Err(CpuError::Host { what: "creating a vCPU", source: io::Error::other("its thread panicked") })
        })?;
        Ok(Thread { go, join })
    }
}

fn create(engine: &dyn Engine, config: &VcpuConfig, entry: Entry) -> Result<Box<dyn Vcpu>, CpuError> {
    let mut vcpu = engine.create_vcpu(config)?;
    if config.id == 0 {
        let mut state = vcpu.state()?;
        entry.apply(&mut state);
        vcpu.set_state(&state)?;
    }
    Ok(vcpu)
}

/// Runs until the machine stops. A bug of ours that panics here ends the machine, not just one of its vCPUs.
fn run(vcpu: &mut dyn Vcpu, bus: &dyn Bus, events: &Events, watch: Option<&UserWatch>) {
    let end = panic::catch_unwind(AssertUnwindSafe(|| {
        while !events.stopping() {
            match vcpu.run(bus) {
                Ok(Exit::Kicked) => {
                    if let Some(watch) = watch {
                        watch.look(vcpu);
                    }
                }
                Ok(Exit::Crash(info)) => return Some(End::Crash(info)),
                Err(e) => return Some(End::Failed(e)),
            }
        }
        None
    }));
    match end {
        Ok(None) => {}
        Ok(Some(end)) => events.finish(end),
        Err(_) => events.finish(End::Failed(CpuError::Other("a vCPU thread panicked: this is a bug in Vireo".into()))),
    }
}

#[cfg(test)]
mod tests;
