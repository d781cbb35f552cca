//! One guest from its start to a kick or its crash.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use vireo_cpu::{Bus, Engine, Exit, MsiMessage, Vcpu, VcpuConfig};
use vireo_engine::SoftEngine;
use vireo_memory::GuestMemory;

use super::{random::Random, state};

/// What came of all guests.
#[derive(Debug, Default)]
pub struct Tally {
    pub slowest: Duration,
    pub instructions: u64,
    pub exceptions: u64,
    pub translated: u64,
    /// Kicks, and crashes by their reason (without numbers).
    pub ends: BTreeMap<String, u64>,
    pub refused_states: u64,
}

/// Devices that answer with rubbish.
pub struct Rubbish(pub AtomicU64);

impl Rubbish {
    fn fill(&self, data: &mut [u8]) {
        let n = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        data.copy_from_slice(&(n ^ n >> 29).to_le_bytes()[..data.len()]);
    }
}

impl Bus for Rubbish {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.fill(data);
    }
    fn pio_write(&self, _: u16, data: &[u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4));
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4 | 8) && gpa >> 52 == 0);
        self.fill(data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4 | 8) && gpa >> 52 == 0);
    }
    fn eoi(&self, _: u8) {}
}

/// Ends the process where a vCPU does not come back at all: its thread cannot be stopped otherwise.
const GIVE_UP: Duration = Duration::from_secs(30);

/// One guest, on an engine as of [`SoftEngine::promoting`].
pub fn play(random: &mut Random, promote: u32, tally: &mut Tally) {
    let pages = state::LEAST_RAM / 4096 + random.below(64);
    let low = if random.chance(30) { pages - 8 } else { pages };
    let memory = GuestMemory::new(pages * 4096, low * 4096).unwrap();
    let engine = SoftEngine::promoting(&memory, promote).unwrap();
    // Half of them with every address looked at that translated code reads from or writes to.
    if random.chance(50) {
        engine.check_accesses(u64::MAX);
    }
    let vcpus = if random.chance(30) { 2 } else { 1 };
    let states = state::guest(random, &memory, vcpus);
    let bus = Rubbish(AtomicU64::new(random.next()));
    let kicked_at = Mutex::new(None::<Instant>);
    let tally = Mutex::new(tally);
    let start = Barrier::new(vcpus as usize);
    thread::scope(|scope| {
        let (kickers, ready) = mpsc::channel();
        let (ended, ends) = mpsc::channel();
        for (id, state) in states.iter().enumerate() {
            let (kickers, ended, engine, bus, tally, kicked_at, start) =
                (kickers.clone(), ended.clone(), engine.clone(), &bus, &tally, &kicked_at, &start);
            scope.spawn(move || {
                let cpuid = engine.supported_cpuid().unwrap();
                let config = VcpuConfig { id: id as u32, count: vcpus as u32, cpuid };
                let mut vcpu = engine.create_vcpu(&config).unwrap();
                if vcpu.set_state(state).is_err() {
                    tally.lock().unwrap().refused_states += 1;
                }
                start.wait();
                kickers.send(vcpu.kicker()).unwrap();
                let exit = vcpu.run(bus).unwrap();
                let latency = kicked_at.lock().unwrap().map_or(Duration::ZERO, |at| at.elapsed());
                note(&mut tally.lock().unwrap(), exit, latency, vcpu.as_mut());
                ended.send(()).unwrap();
            });
        }
        drop((kickers, ended));
        let kickers: Vec<_> = (0..vcpus).map(|_| ready.recv().unwrap()).collect();
        disturb(random, engine.as_ref(), &memory);
        *kicked_at.lock().unwrap() = Some(Instant::now());
        for kicker in kickers {
            kicker.kick();
        }
        for _ in 0..vcpus {
            if ends.recv_timeout(GIVE_UP).is_err() {
                eprintln!("a vCPU did not come back");
                std::process::abort();
            }
        }
    });
}

fn note(tally: &mut Tally, exit: Exit, latency: Duration, vcpu: &mut dyn Vcpu) {
    let end = match exit {
        Exit::Kicked => {
            tally.slowest = tally.slowest.max(latency);
            "kicked".to_owned()
        }
        Exit::Crash(info) => info.reason.chars().take_while(|c| *c != '(').collect(),
    };
    *tally.ends.entry(end).or_default() += 1;
    let stats = vcpu.stats();
    tally.instructions += stats.instructions.unwrap_or(0);
    tally.translated += stats.exits.get("translated_entries").copied().unwrap_or(0);
    tally.exceptions += stats.exits.get("exceptions").copied().unwrap_or(0);
    // What such a guest left behind can be saved, and what was saved is a state.
    let state = vcpu.state().unwrap();
    vcpu.set_state(&state).unwrap();
}

/// Interrupts and writes of devices for a while.
fn disturb(random: &mut Random, engine: &dyn Engine, memory: &GuestMemory) {
    let end = Instant::now() + Duration::from_micros(500 + random.below(2500));
    let line = engine.msi_line().unwrap();
    while Instant::now() < end {
        let address = 0xfee0_0000 | random.below(4) << 12 | random.below(16);
        let address = if random.chance(10) { random.next() } else { address };
        let message = MsiMessage { address, data: random.next() as u32 & random.pick(&[0xff, 0x40ff, 0xffff, 0x4ff]) };
        match random.below(4) {
            0 => engine.send_msi(message),
            1 => {
                line.set(random.chance(80).then_some(message));
                line.trigger();
            }
            2 => {
                let _ = memory.write_pod(random.integer(memory.low_bytes()), random.next());
            }
            _ => thread::yield_now(),
        }
        thread::sleep(Duration::from_micros(random.below(100)));
    }
}

/// Runs one vCPU until it is kicked, several times; the shortest time from a kick to the end of `run`. Of the
/// interpreter's and the translator's the longer.
pub fn shortest_latency(memory: &GuestMemory, state: &vireo_cpu::CpuState, bus: &(dyn Bus + Sync)) -> Duration {
    [0, 1].map(|promote| latency(memory, state, bus, promote)).into_iter().max().unwrap_or_default()
}

fn latency(memory: &GuestMemory, state: &vireo_cpu::CpuState, bus: &(dyn Bus + Sync), promote: u32) -> Duration {
    let engine = SoftEngine::promoting(memory, promote).unwrap();
    let (kickers, ready) = mpsc::channel();
    let (ended, ends) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let cpuid = engine.supported_cpuid().unwrap();
            let mut vcpu = engine.create_vcpu(&VcpuConfig { id: 0, count: 1, cpuid }).unwrap();
            vcpu.set_state(state).unwrap();
            kickers.send(vcpu.kicker()).unwrap();
            for _ in 0..5 {
                let exit = vcpu.run(bus).unwrap();
                ended.send((Instant::now(), exit)).unwrap();
            }
        });
        let kicker: Arc<dyn vireo_cpu::Kick> = ready.recv().unwrap();
        let mut shortest = Duration::MAX;
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(10));
            let kicked = Instant::now();
            kicker.kick();
            let Ok((at, exit)) = ends.recv_timeout(GIVE_UP) else {
                eprintln!("a vCPU does not come back");
                std::process::abort();
            };
            assert_eq!(exit, Exit::Kicked);
            shortest = shortest.min(at.saturating_duration_since(kicked));
        }
        shortest
    })
}
