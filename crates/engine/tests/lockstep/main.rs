//! The interpreter and the translator in lockstep: the same guest on both, compared again and again.
//!
//! Guests are made of random functions ([`sequence`]) and a script that calls them at both privileges and changes what
//! they run on: their code, page tables, address spaces, control and debug registers, interrupts to itself. Where the
//! guest writes to a port both engines stop, and registers and RAM must be the same; the script since the last stop is
//! told otherwise. A third engine compares each of its translations with the interpreter on its own. `VIREO_LOCKSTEP_CASES` says how many guests, `VIREO_LOCKSTEP_SEED` (default 1) which.
#![cfg(target_arch = "x86_64")]

mod guest;
mod loops;
#[path = "../random_code/mod.rs"]
#[allow(dead_code)] // what other tests use
mod random_code;
mod runtime;

use std::{sync::Arc, time::Duration};

use guest::Guest;
use random_code::{bare::Stops, random::Random, sequence};
use vireo_cpu::{CpuError, CpuState, Engine, Exit, Vcpu, VcpuConfig};
use vireo_engine::{SoftEngine, native::FeatureSet};
use vireo_memory::GuestMemory;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

struct Machine {
    promote: u32,
    memory: GuestMemory,
    vcpu: Box<dyn Vcpu>,
    bus: Arc<Stops>,
}

/// What a guest came to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stop {
    Port(u32),
    Crash(String),
    /// It runs in circles.
    Endless,
}

impl Machine {
    fn new(guest: &Guest, promote: u32) -> Self {
        Self::with(guest, promote, |memory| {
            let engine = SoftEngine::promoting(memory, promote)?;
            if promote > 1 {
                engine.check_accesses(u64::MAX);
            }
            Ok(engine)
        })
    }

    fn verifying(guest: &Guest) -> Self {
        Self::with(guest, 1, |memory| {
            let engine = SoftEngine::verifying(memory)?;
            engine.count_instructions();
            Ok(engine)
        })
    }

    fn with(guest: &Guest, promote: u32, engine: impl Fn(&GuestMemory) -> Result<Arc<SoftEngine>, CpuError>) -> Self {
        let memory = GuestMemory::new(guest.ram, 0xc000_0000).expect("memory");
        for (gpa, bytes) in &guest.memory {
            memory.write(*gpa, bytes).expect("RAM");
        }
        let engine = engine(&memory).expect("an engine");
        let cpuid = engine.supported_cpuid().expect("CPUID");
        let mut vcpu = engine.create_vcpu(&VcpuConfig { id: 0, count: 1, cpuid }).expect("a vCPU");
        vcpu.set_state(&guest.state).expect("a state");
        let bus = Stops::new(vcpu.kicker());
        Self { promote, memory, vcpu, bus }
    }

    fn run(&mut self) -> Stop {
        self.bus.arm();
        let kicker = self.vcpu.kicker();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if wait.recv_timeout(Duration::from_secs(5)).is_err() {
                    kicker.kick();
                }
            });
            let exit = self.vcpu.run(&*self.bus).expect("the vCPU");
            let _ = done.send(());
            match (exit, self.bus.port()) {
                (Exit::Crash(info), _) => Stop::Crash(info.reason),
                (Exit::Kicked, None) => Stop::Endless,
                (Exit::Kicked, Some(port)) => Stop::Port(port),
            }
        })
    }

    fn state(&self) -> CpuState {
        self.vcpu.state().expect("the state")
    }

    fn figure(&self, name: &str) -> u64 {
        self.vcpu.stats().exits.get(name).copied().unwrap_or(0)
    }
}

/// The first difference, in words.
fn difference(guest: &Guest, a: &Machine, b: &Machine) -> Option<String> {
    let (x, y) = (a.state(), b.state());
    for i in 0..16 {
        if x.gpr[i] != y.gpr[i] {
            return Some(format!("register {i}: {:#x}, {:#x} (rip {:#x}, {:#x})", x.gpr[i], y.gpr[i], x.rip, y.rip));
        }
    }
    let words = |s: &CpuState| {
        [
            ("rip", s.rip),
            ("rflags", s.rflags),
            ("cr0", s.cr0),
            ("cr2", s.cr2),
            ("cr3", s.cr3),
            ("cr4", s.cr4),
            ("efer", s.efer),
            ("dr6", s.debug[4]),
            ("dr7", s.debug[5]),
        ]
    };
    for ((name, x), (_, y)) in words(&x).into_iter().zip(words(&y)) {
        if x != y {
            return Some(format!("{name}: {x:#x}, {y:#x}"));
        }
    }
    if x.segments != y.segments {
        return Some(format!("segments: {:x?}, {:x?}", x.segments, y.segments));
    }
    // The instruction and data pointers of x87 are only as good as the instruction before.
    for (i, (x, y)) in x.xsave.iter().zip(&y.xsave).enumerate() {
        if x != y {
            return Some(format!("byte {i:#x} of the XSAVE area: {x:#x}, {y:#x}"));
        }
    }
    let (mut p, mut q) = ([0u8; 0x1000], [0u8; 0x1000]);
    for page in (0..guest.used).step_by(0x1000).filter(|p| !guest::EXCEPTION_STACK.contains(p)) {
        a.memory.read(page, &mut p).expect("RAM");
        b.memory.read(page, &mut q).expect("RAM");
        if let Some(at) = (0..0x1000).find(|&i| p[i] != q[i]) {
            return Some(format!("RAM at {:#x}: {:#x}, {:#x}", page + at as u64, p[at], q[at]));
        }
    }
    None
}

#[derive(Debug, Default)]
struct Totals {
    stops: u64,
    translated: u64,
    verified: u64,
    verified_faults: u64,
    exceptions: u64,
    interrupts: u64,
    code_writes: u64,
    /// Times that what was of no use lately was forgotten.
    collections: u64,
    /// Translations of hot code, and those that went through several blocks.
    hot: u64,
    paths: u64,
    endless: u64,
    crashes: u64,
}

/// What is different, or how it went.
fn lockstep(guest: &Guest, totals: &mut Totals) -> Result<(), String> {
    let mut interpreter = Machine::new(guest, 0);
    let mut translators = [Machine::new(guest, 1), Machine::new(guest, 4), Machine::verifying(guest)];
    let mut last = 0;
    loop {
        let stop = interpreter.run();
        if stop == Stop::Endless {
            totals.endless += 1;
            if std::env::var_os("VIREO_LOCKSTEP_TRACE").is_some() {
                let at = interpreter.state();
                println!(
                    "endless, {:x?} at {:#x}, rflags {:#x}, cr2 {:#x}, gpr {:x?}\n{}",
                    at.debug,
                    at.rip,
                    at.rflags,
                    at.cr2,
                    at.gpr,
                    guest.script(last, u64::MAX)
                );
            }
            break;
        }
        let at = interpreter.state().rip;
        for translator in &mut translators {
            let other = translator.run();
            let different = if stop == other {
                difference(guest, &interpreter, translator)
            } else {
                Some(format!("{stop:x?}, {other:x?} (rip {:#x}, {:#x})", at, translator.state().rip))
            };
            if let Some(different) = different {
                let promote = translator.promote;
                return Err(format!("{different} (promoting at {promote})\n{}", guest.script(last, at)));
            }
        }
        totals.stops += 1;
        if guest.is_script(at) {
            last = at;
        }
        match stop {
            Stop::Port(port) if port != guest::DONE => {}
            Stop::Crash(reason) => {
                totals.crashes += 1;
                if std::env::var_os("VIREO_LOCKSTEP_TRACE").is_some() {
                    let mut cursor = [0; 8];
                    let _ = interpreter.memory.read(runtime::CURSOR, &mut cursor);
                    let state = interpreter.state();
                    println!(
                        "{reason} at {at:#x}, cr2 {:#x}, cr0 {:#x}, cr4 {:#x}, efer {:#x}, cr3 {:#x} gpr {:x?}, event {cursor:?}\n{}",
                        state.cr2,
                        state.cr0,
                        state.cr4,
                        state.efer,
                        state.cr3,
                        state.gpr,
                        guest.script(last, u64::MAX)
                    );
                }
                break;
            }
            _ => break,
        }
    }
    let [all, some, verifying] = &translators;
    totals.hot += some.figure("translated_hot_blocks");
    totals.paths += some.figure("translated_paths");
    totals.translated += all.figure("translated_entries");
    totals.verified += verifying.figure("verified_blocks");
    totals.verified_faults += verifying.figure("verified_faults");
    totals.exceptions += all.figure("exceptions");
    totals.interrupts += all.figure("interrupts");
    totals.code_writes += all.figure("code_writes");
    totals.collections += some.figure("code_cache_collections");
    Ok(())
}

/// How many guests, which, and what came of them.
fn play(name: &str, default: u64, guest: impl Fn(&mut Random) -> Guest) -> (u64, Totals) {
    let (first, cases) = (setting("VIREO_LOCKSTEP_FIRST", 0), setting("VIREO_LOCKSTEP_CASES", default));
    let seed = setting("VIREO_LOCKSTEP_SEED", 1);
    let mut totals = Totals::default();
    let mut failed = Vec::new();
    for case in first..first + cases {
        let guest = guest(&mut Random(seed << 40 ^ case));
        if let Err(what) = lockstep(&guest, &mut totals) {
            println!("guest {case}: interpreter, translator: {what}");
            failed.push(case);
            if failed.len() >= 5 {
                break;
            }
        }
    }
    println!("{cases} {name}: {totals:?}");
    assert!(failed.is_empty(), "guests that differ: {failed:?}");
    (cases, totals)
}

#[test]
fn the_translator_does_what_the_interpreter_does() {
    let memory = GuestMemory::new(4 << 20, 0xc000_0000).expect("memory");
    let cpuid = SoftEngine::new(&memory).and_then(|e| e.supported_cpuid()).expect("CPUID");
    let pool = sequence::Pool::new(&FeatureSet::from_cpuid(&cpuid));
    let (cases, totals) = play("guests", 30, |random| Guest::new(&pool, random));
    assert!(totals.stops > cases * 10 && totals.translated > cases * 100 && totals.code_writes > cases);
    assert!(totals.collections > cases / 2);
    assert!(totals.verified > cases * 100 && totals.verified_faults > cases);
    assert!(totals.endless + totals.crashes <= cases / 4);
}

#[test]
fn loops_see_what_changes_under_them() {
    let (cases, totals) = play("guests of loops", 30, loops::guest);
    assert!(totals.collections > cases);
    assert!(totals.stops > cases * 10 && totals.hot > cases * 20 && totals.exceptions > cases * 50);
    assert!(totals.endless + totals.crashes == 0);
}

/// More code than translations have room for: they are forgotten and made again.
#[test]
fn a_full_code_buffer_is_emptied() {
    let (guest, additions) = Guest::long();
    let mut machine = Machine::new(&guest, 1);
    assert_eq!(machine.run(), Stop::Port(guest::DONE));
    let mut sums = [0; 64];
    machine.memory.read(0x6000, &mut sums).expect("RAM");
    let sum: u64 = sums.chunks(8).map(|sum| u64::from_le_bytes(sum.try_into().unwrap_or_default())).sum();
    assert_eq!(sum, additions);
    let (clears, translated) = (machine.figure("code_cache_clears"), machine.figure("translated_instructions"));
    println!("{additions} additions, {translated} instructions translated, {clears} times nothing was left");
    assert!(clears >= 2 && translated > additions * 9 / 10);
}
