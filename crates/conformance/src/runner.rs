//! Runs a guest on an engine and compares what it reports.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use vireo_cpu::{Bus, CpuState, CrashInfo, Engine, Exit, Kick, MsiLine, MsiMessage, VcpuConfig, cpuid::CpuidTable};
use vireo_memory::GuestMemory;

use crate::{
    Expected, Guest,
    machine::{MMIO, RAM_BYTES, load},
};

/// A guest that has not ended by then hangs. The slowest takes 3 s on a KVM that emulates ring 0, and ten times that
/// on a busy host.
const LIMIT: Duration = Duration::from_secs(120);

/// Where guests report, end, and ask for something (see [`action`]).
const REPORT: u16 = 0x500;
const END: u16 = 0x501;
const ACT: u16 = 0x502;
/// Sixteen ports that report each write as size, port and value, and answer reads with a pattern.
const ECHO: std::ops::Range<u16> = 0x510..0x520;

/// What a guest may ask for by a byte to port [`ACT`].
mod action {
    /// Trigger the edge-triggered line: vector 0x60 at APIC 0.
    pub const EDGE: u8 = 1;
    /// Send an NMI to APIC 0.
    pub const NMI: u8 = 2;
    /// Trigger the level-triggered line: vector 0x61 at APIC 0. Its EOI is reported as 0xe0100 + vector.
    pub const LEVEL: u8 = 3;
    /// As [`EDGE`], 10 ms later and from another thread.
    pub const EDGE_LATER: u8 = 4;
    /// Mask the edge-triggered line.
    pub const MASK: u8 = 5;
    /// Unmask it with vector 0x62.
    pub const UNMASK: u8 = 6;
    /// As [`NMI`], 10 ms later.
    pub const NMI_LATER: u8 = 7;
}

/// KVM without VT-x or AMD-V below it emulates guest kernel code, and its emulator does not know every
/// instruction: that says nothing about us. On real virtualization no guest of the suite meets this.
const NOT_EMULATED: &str = "KVM cannot emulate";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

/// Fails (by panic, as tests do) unless `guest` passes on the engine; says by name when it is skipped.
/// `emulated`: the engine is a KVM that emulates ring 0.
pub fn check(guest: &Guest, engine: impl Fn(&GuestMemory) -> Option<Arc<dyn Engine>>, emulated: bool) {
    let outcome = match guest.emulator_errs {
        Some(what) if emulated => Outcome::Skipped(format!("KVM's emulator {what}")),
        _ => run(guest, engine),
    };
    match outcome {
        Outcome::Passed => {}
        Outcome::Skipped(why) => eprintln!("SKIPPED {}: {why}", guest.name),
        Outcome::Failed(why) => panic!("{}: {why}", guest.name),
    }
}

pub fn run(guest: &Guest, engine: impl Fn(&GuestMemory) -> Option<Arc<dyn Engine>>) -> Outcome {
    let memory = match GuestMemory::new(RAM_BYTES, RAM_BYTES) {
        Ok(memory) => memory,
        Err(e) => return Outcome::Failed(e.to_string()),
    };
    let state = match load(&memory, guest) {
        Ok(state) => state,
        Err(e) => return Outcome::Failed(e.to_string()),
    };
    let Some(engine) = engine(&memory) else { return Outcome::Skipped("no such engine on this host".into()) };
    let cpuid = match engine.supported_cpuid() {
        Ok(cpuid) => cpuid,
        Err(e) => return Outcome::Failed(e.to_string()),
    };
    if let Some(lacking) = guest.lacks(&cpuid) {
        return Outcome::Skipped(format!("the engine {} does not have {lacking}", engine.name()));
    }
    match run_vcpus(guest, engine, &cpuid, &state) {
        Ok((_, Some(crash))) if crash.reason.contains(NOT_EMULATED) => {
            Outcome::Skipped(format!("{} at {:#x}", crash.reason, crash.rip))
        }
        Ok((reports, crash)) => compare(guest, &cpuid, &reports, crash.as_ref()),
        Err(why) => Outcome::Failed(why),
    }
}

fn compare(guest: &Guest, cpuid: &CpuidTable, reports: &[u32], crash: Option<&CrashInfo>) -> Outcome {
    let (expected, crash_expected) = match guest.expected {
        Expected::Reports(reports) => (reports, None),
        Expected::Crash(reports, reason) => (reports, Some(reason)),
        Expected::Checked(check) => {
            return match (crash, check(cpuid, reports)) {
                (None, Ok(())) => Outcome::Passed,
                (Some(crash), _) => Outcome::Failed(format!("crashed: {crash:x?} after {reports:x?}")),
                (_, Err(why)) => Outcome::Failed(format!("{why}; reports: {reports:x?}")),
            };
        }
    };
    let crash_fits = match (crash, crash_expected) {
        (None, None) => true,
        (Some(crash), Some(reason)) => crash.reason.contains(reason),
        _ => false,
    };
    if !crash_fits {
        return Outcome::Failed(format!("expected crash {crash_expected:?}, got {crash:x?}; reports: {reports:x?}"));
    }
    if reports == expected {
        return Outcome::Passed;
    }
    let at = reports.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(reports.len().min(expected.len()));
    let tail = |list: &[u32]| format!("{:x?}", &list[at.min(list.len())..list.len().min(at + 8)]);
    Outcome::Failed(format!("report {at}: expected {}, got {}", tail(expected), tail(reports)))
}

/// The bus that the guest sees.
struct Board {
    reports: Mutex<Vec<u32>>,
    kickers: Mutex<Vec<Arc<dyn Kick>>>,
    ended: AtomicBool,
    end: (Mutex<bool>, Condvar),
    edge: Arc<dyn MsiLine>,
    level: Arc<dyn MsiLine>,
    engine: Arc<dyn Engine>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn msi(data: u32) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data }
}

impl Board {
    fn new(engine: Arc<dyn Engine>) -> Result<Self, String> {
        let line = |data| {
            let line = engine.msi_line().map_err(|e| e.to_string())?;
            line.set(Some(msi(data)));
            Ok::<_, String>(line)
        };
        let (edge, level) = (line(0x60)?, line(0x8061)?);
        Ok(Self {
            reports: Mutex::default(),
            kickers: Mutex::default(),
            ended: AtomicBool::new(false),
            end: Default::default(),
            edge,
            level,
            engine,
        })
    }

    fn report(&self, values: &[u32]) {
        let mut reports = lock(&self.reports);
        if reports.len() < 10_000 {
            reports.extend_from_slice(values);
        }
    }

    /// No vCPU goes on after this.
    fn stop(&self) {
        self.ended.store(true, Ordering::SeqCst);
        lock(&self.kickers).iter().for_each(|kicker| kicker.kick());
        *lock(&self.end.0) = true;
        self.end.1.notify_all();
    }

    fn act(&self, what: u8) {
        let nmi = msi(4 << 8);
        match what {
            action::EDGE => self.edge.trigger(),
            action::NMI => self.engine.send_msi(nmi),
            action::LEVEL => self.level.trigger(),
            action::EDGE_LATER => {
                let line = self.edge.clone();
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(10));
                    line.trigger();
                });
            }
            action::NMI_LATER => {
                let engine = self.engine.clone();
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(10));
                    engine.send_msi(nmi);
                });
            }
            action::MASK => self.edge.set(None),
            action::UNMASK => self.edge.set(Some(msi(0x62))),
            _ => self.report(&[0xbad0_0000 | u32::from(what)]),
        }
    }
}

fn word(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    let len = data.len().min(4);
    bytes[..len].copy_from_slice(&data[..len]);
    u32::from_le_bytes(bytes)
}

/// What reads of the echo ports and of MMIO answer: a byte that depends on the address.
fn pattern(address: u64, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = (address as u8).wrapping_add(i as u8).wrapping_mul(7).wrapping_add(1);
    }
}

impl Bus for Board {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if ECHO.contains(&port) { pattern(port.into(), data) } else { data.fill(0xff) }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match port {
            REPORT => self.report(&[word(data)]),
            END => self.stop(),
            ACT => self.act(data[0]),
            port if ECHO.contains(&port) => self.report(&[(data.len() as u32) << 16 | u32::from(port), word(data)]),
            _ => {}
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        pattern(gpa, data);
    }

    /// Reported as size and offset, then the value in one or two words.
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if gpa & !0xfff != MMIO {
            return;
        }
        self.report(&[(data.len() as u32) << 16 | (gpa - MMIO) as u32, word(data)]);
        if data.len() > 4 {
            self.report(&[word(&data[4..])]);
        }
    }

    fn eoi(&self, vector: u8) {
        self.report(&[0xe_0100 + u32::from(vector)]);
    }
}

type Crash = Option<CrashInfo>;

/// One thread for each vCPU; the first crash or error ends all.
fn run_vcpus(
    guest: &Guest,
    engine: Arc<dyn Engine>,
    cpuid: &CpuidTable,
    state: &CpuState,
) -> Result<(Vec<u32>, Crash), String> {
    let board = Arc::new(Board::new(engine.clone())?);
    let (ready_tx, ready) = mpsc::channel::<Result<(), String>>();
    let mut threads = Vec::new();
    let mut starts = Vec::new();
    for id in 0..guest.vcpus {
        let (start, wait) = mpsc::channel::<()>();
        starts.push(start);
        let config = VcpuConfig { id, count: guest.vcpus, cpuid: cpuid.clone() };
        let state = (id == 0).then(|| state.clone());
        let (engine, board, ready) = (engine.clone(), board.clone(), ready_tx.clone());
        threads.push(thread::spawn(move || run_vcpu(&*engine, &board, &config, state, &ready, &wait)));
    }
    let created: Result<Vec<()>, String> =
        (0..guest.vcpus).map(|_| ready.recv().unwrap_or_else(|_| Err("a vCPU thread died".into()))).collect();
    if created.is_ok() {
        for start in &starts {
            let _ = start.send(());
        }
    } else {
        board.stop();
    }
    drop(starts);

    let deadline = Instant::now() + LIMIT;
    let mut ended = lock(&board.end.0);
    while !*ended && Instant::now() < deadline {
        ended = board.end.1.wait_timeout(ended, LIMIT).unwrap_or_else(PoisonError::into_inner).0;
    }
    let in_time = *ended;
    drop(ended);
    board.stop();
    if !in_time && !all_finish(&threads) {
        let reports = lock(&board.reports).clone();
        return Err(format!("no end after {LIMIT:?}, and a vCPU that does not heed its kick; reports: {reports:x?}"));
    }

    let mut crash = None;
    let mut places = Vec::new();
    for thread in threads {
        let (result, place) = thread.join().map_err(|_| "a vCPU thread panicked".to_string())??;
        crash = crash.or(result);
        places.push(place);
    }
    created?;
    let reports = lock(&board.reports).clone();
    if !in_time {
        return Err(format!("no end after {LIMIT:?}; vCPUs are at {places:x?}, reports: {reports:x?}"));
    }
    Ok((reports, crash))
}

/// Whether all threads end in the next seconds.
fn all_finish<T>(threads: &[thread::JoinHandle<T>]) -> bool {
    (0..500).any(|_| {
        thread::sleep(Duration::from_millis(10));
        threads.iter().all(thread::JoinHandle::is_finished)
    })
}

fn run_vcpu(
    engine: &dyn Engine,
    board: &Board,
    config: &VcpuConfig,
    state: Option<CpuState>,
    ready: &mpsc::Sender<Result<(), String>>,
    start: &mpsc::Receiver<()>,
) -> Result<(Crash, u64), String> {
    let created = engine.create_vcpu(config).and_then(|mut vcpu| {
        if let Some(state) = &state {
            vcpu.set_state(state)?;
        }
        Ok(vcpu)
    });
    let mut vcpu = match created {
        Ok(vcpu) => vcpu,
        Err(e) => {
            let _ = ready.send(Err(e.to_string()));
            return Ok((None, 0));
        }
    };
    lock(&board.kickers).push(vcpu.kicker());
    let _ = ready.send(Ok(()));
    if start.recv().is_err() {
        return Ok((None, 0));
    }
    let mut crash = None;
    while !board.ended.load(Ordering::SeqCst) {
        match vcpu.run(board) {
            Ok(Exit::Kicked) => {}
            Ok(Exit::Crash(info)) => {
                crash = Some(info);
                break;
            }
            Err(e) => {
                board.stop();
                return Err(e.to_string());
            }
        }
    }
    board.stop();
    let place = vcpu.state().map_or(0, |state| state.rip);
    Ok((crash, place))
}
