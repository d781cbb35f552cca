//! Instruction semantics against the host CPU itself.
//!
//! For every user-mode instruction that CPUID advertises, random instructions run in random states both on the host,
//! in a sandboxed child, and in an executor of ours; registers, flags, vectors, x87 state and memory must be the
//! same afterwards. `VIREO_HOST_CPU_CASES` (cases for each of iced's codes, default 30 for
//! stubs and 10 for the whole engine) makes the run longer,
//! `VIREO_HOST_CPU_SEED` another one, `VIREO_HOST_CPU_ONLY` takes a substring of the codes to run.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(unsafe_code)]

mod child;
mod compare;
mod interpreter;
#[path = "../random_code/mod.rs"]
#[allow(dead_code)] // what other tests use
mod random_code;
mod stubs;

use std::collections::BTreeMap;

use case::{Case, Executor, Mode, Verdict};
use child::{BATCH, Host};
use iced_x86::Code;
use random_code::{case, generate, random::Random, sequence};
use vireo_engine::native::FeatureSet;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[derive(Default)]
struct Report {
    compared: BTreeMap<String, u64>,
    skipped: BTreeMap<(&'static str, String), u64>,
    ungenerated: Vec<String>,
    killed: Vec<String>,
    differences: Vec<String>,
}

fn hold_against_host(mode: Mode, executor: &mut dyn Executor, cases: u64) -> Report {
    let per_code = setting("VIREO_HOST_CPU_CASES", cases);
    let seed = setting("VIREO_HOST_CPU_SEED", 1);
    let only = std::env::var("VIREO_HOST_CPU_ONLY").unwrap_or_default();
    let mut host = Host::new().expect("shared memory for the child");
    let mut report = Report::default();
    let codes = generate::codes(mode, &executor.features());
    let mut batch: Vec<(Code, Case)> = Vec::new();
    for code in codes.iter().filter(|c| format!("{c:?}").contains(&only)) {
        let mut random = Random(seed.wrapping_mul(0x1000_0000_01b3) ^ (*code as u64) << 32);
        let mut made = 0;
        for _ in 0..per_code * 4 {
            if made == per_code {
                break;
            }
            if let Some(case) = generate::case(*code, mode, &mut random) {
                made += 1;
                batch.push((*code, case));
                if batch.len() == BATCH {
                    run(&mut batch, &mut host, executor, &mut report);
                }
            }
        }
        if made == 0 {
            report.ungenerated.push(format!("{code:?}"));
        }
    }
    run(&mut batch, &mut host, executor, &mut report);
    report
}

fn run(batch: &mut Vec<(Code, Case)>, host: &mut Host, executor: &mut dyn Executor, report: &mut Report) {
    let cases: Vec<Case> = batch.iter().map(|(_, case)| case.clone()).collect();
    let outcomes = host.run(&cases).expect("the sandboxed child");
    for ((code, case), outcome) in batch.drain(..).zip(outcomes) {
        let name = format!("{code:?}");
        let Some(native) = outcome else {
            report.killed.push(format!("{name}: {:02x?}", case.code));
            continue;
        };
        if std::env::var_os("VIREO_HOST_CPU_TRACE").is_some() {
            eprintln!("{name} {:02x?}, host vector {:?}", case.code, native.vector);
        }
        match executor.step(&case) {
            Verdict::Skipped(why) => *report.skipped.entry((why, name)).or_default() += 1,
            Verdict::Ran(ours) => {
                if let Some(difference) = compare::difference(&case, &native, &ours, executor.undefined_flags(&case)) {
                    report.differences.push(format!("{name} {:02x?}: {difference}", case.code));
                }
                *report.compared.entry(name).or_default() += 1;
            }
        }
    }
}

impl Report {
    fn print(&self, title: &str) {
        let cases: u64 = self.compared.values().sum();
        println!("{title}: {cases} cases of {} codes compared, {} differ", self.compared.len(), self.differences.len());
        let mut by_reason: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (why, name) in self.skipped.keys() {
            if !self.compared.contains_key(name) {
                by_reason.entry(why).or_default().push(name);
            }
        }
        for (why, names) in by_reason {
            println!("  {why} ({}): {}", names.len(), names.join(" "));
        }
        println!("  no instruction made ({}): {}", self.ungenerated.len(), self.ungenerated.join(" "));
        println!("  the child died of {}: {}", self.killed.len(), self.killed.join(", "));
    }
}

impl Report {
    /// Fails the test where anything differs, or where too little was looked at.
    fn judge(&self, title: &str) {
        self.print(title);
        for difference in self.differences.iter().take(setting("VIREO_HOST_CPU_SHOW", 30) as usize) {
            println!("  {difference}");
        }
        assert!(self.killed.is_empty(), "the child died of an instruction");
        assert!(self.differences.is_empty(), "{} cases differ from the host", self.differences.len());
        if std::env::var_os("VIREO_HOST_CPU_ONLY").is_none() {
            assert!(self.compared.len() >= 600, "only {} codes were compared", self.compared.len());
        }
    }
}

fn stubs_against_host(mode: Mode, title: &str) {
    let mut stubs = stubs::Stubs::new(FeatureSet::host()).expect("executable memory");
    let report = hold_against_host(mode, &mut stubs, 30);
    report.judge(title);
    println!("  {} stubs, {} bytes", stubs.size().0, stubs.size().1);
}

fn engine_against_host(mode: Mode, promote: u32, title: &str) {
    let mut engine = interpreter::Interpreter::promoting(promote).expect("a virtual machine");
    let report = hold_against_host(mode, &mut engine, 10);
    println!("{title}: {} cases ran translated, {} instructions of them did not", engine.translated, engine.left);
    report.judge(title);
    // Whatever CPUID advertises is executed, not skipped.
    let skipped: Vec<_> = report.skipped.keys().filter(|(_, name)| !report.compared.contains_key(name)).collect();
    assert!(skipped.is_empty(), "never compared: {skipped:?}");
}

#[test]
fn engine_in_64_bit_mode() {
    engine_against_host(Mode::Bits64, 0, "the interpreter in 64-bit mode");
}

#[test]
fn translator_in_64_bit_mode() {
    engine_against_host(Mode::Bits64, 1, "the translator in 64-bit mode");
}

#[test]
fn engine_in_32_bit_mode() {
    engine_against_host(Mode::Bits32, 0, "the interpreter in 32-bit mode");
}

#[test]
fn stubs_in_64_bit_mode() {
    stubs_against_host(Mode::Bits64, "64-bit mode");
}

#[test]
fn stubs_in_32_bit_mode() {
    stubs_against_host(Mode::Bits32, "32-bit mode");
}

/// What CPUID does not advertise is undefined, or what it was before it was invented; the translator does not run it.
#[test]
fn what_is_not_advertised_is_not_run() {
    let mut interpreter = interpreter::Interpreter::promoting(0).expect("a virtual machine");
    let mut translator = interpreter::Interpreter::promoting(1).expect("a virtual machine");
    let features = interpreter.features();
    let mut undefined = 0;
    for code in Code::values() {
        let op = code.op_code();
        // Of the clock no two engines tell the same.
        // SYSENTER has nowhere to go to.
        let other = matches!(code, Code::Rdtsc | Code::Rdtscp) || code.flow_control() != iced_x86::FlowControl::Next;
        if other || !op.is_instruction() || !op.mode64() || features.contains_all(code.cpuid_features()) {
            continue;
        }
        let mut random = Random(code as u64);
        for _ in 0..8 {
            let Some(case) = generate::case(code, Mode::Bits64, &mut random) else { continue };
            let [a, b] = [&mut interpreter, &mut translator].map(|engine| engine.run(&case).expect("the engine"));
            assert_eq!(a.vector, b.vector, "{code:?} {:02x?}", case.code);
            assert_eq!(a.state.gpr, b.state.gpr, "{code:?} {:02x?}", case.code);
            undefined += u64::from(b.vector == Some(6));
        }
    }
    println!("{undefined} instructions are undefined");
    assert!(undefined > 1000);
}

/// Sequences in a batch are run on the host first, then by the interpreter, then as translated code.
#[test]
fn sequences() {
    let wanted = setting("VIREO_HOST_CPU_SEQUENCES", 6000);
    let seed = setting("VIREO_HOST_CPU_SEED", 1);
    let first = setting("VIREO_HOST_CPU_FIRST", 0);
    let mut engines = Engines::new();
    let pool = sequence::Pool::new(&engines.interpreter.features());
    let mut host = Host::new().expect("shared memory for the child");
    let (mut done, mut faults, mut died, mut differences) = (0, 0, 0, Vec::new());
    let mut case = first;
    while case < first + wanted {
        let mut batch = Vec::new();
        while batch.len() < BATCH && case < first + wanted {
            let mut random = Random(seed << 40 ^ case);
            let sequence = sequence::sequence(&pool, &mut random);
            if let Some(assembled) = sequence.assemble() {
                batch.push((case, sequence.case(&assembled), sequence, assembled));
            }
            case += 1;
        }
        let cases: Vec<Case> = batch.iter().map(|(_, case, ..)| case.clone()).collect();
        let outcomes = host.run(&cases).expect("the sandboxed child");
        for ((number, case, sequence, assembled), native) in batch.into_iter().zip(outcomes) {
            done += 1;
            let Some(native) = native else {
                // A changed return address leads anywhere, for ever or to a system call.
                died += 1;
                continue;
            };
            faults += u64::from(native.vector.is_some());
            let Some(difference) = engines.difference(&case, &assembled, &native) else { continue };
            let (shortest, difference) = shortest(&mut host, &mut engines, sequence, difference);
            println!("case {number}: {difference}\n{}", shortest.describe());
            differences.push(number);
        }
        if differences.len() >= setting("VIREO_HOST_CPU_SHOW", 5) as usize {
            break;
        }
    }
    let translated = engines.translator.translated;
    println!(
        "{done} sequences, {faults} of them ended by a fault, {translated} translated, the host's child died of {died}"
    );
    assert!(differences.is_empty(), "sequences that differ: {differences:?}");
    assert!(died <= 1 + done / 10_000);
    let (hot, paths) = (engines.mixed.figure("translated_hot_blocks"), engines.mixed.figure("translated_paths"));
    println!("{hot} blocks were hot, {paths} translations went through several");
    assert!(hot > done / 20 && paths > done / 100, "hot code is hardly tried");
    assert!(translated > done * 9 / 10 && faults > done / 20 && faults < done * 9 / 10);
}

struct Engines {
    interpreter: interpreter::Interpreter,
    translator: interpreter::Interpreter,
    /// Translates loops after a few rounds.
    mixed: interpreter::Interpreter,
    /// As `translator`, and counts instructions.
    counter: interpreter::Interpreter,
}

impl Engines {
    fn new() -> Self {
        let engine = |promote| interpreter::Interpreter::promoting(promote).expect("a virtual machine");
        let counter = interpreter::Interpreter::counting().expect("a virtual machine");
        Self { interpreter: engine(0), translator: engine(1), mixed: engine(2), counter }
    }

    fn difference(&mut self, case: &Case, assembled: &sequence::Assembled, native: &case::Outcome) -> Option<String> {
        let engines = [
            ("interpreter", &mut self.interpreter),
            ("translator", &mut self.translator),
            ("both", &mut self.mixed),
            ("counting", &mut self.counter),
        ];
        for (name, engine) in engines {
            let ours = engine.run(case).expect("the virtual machine");
            if let Some(difference) = assembled.difference(case, native, &ours) {
                return Some(format!("host, {name}: {difference}"));
            }
        }
        None
    }
}

/// Leaves out instructions as long as there is a difference.
fn shortest(
    host: &mut Host,
    engines: &mut Engines,
    sequence: sequence::Sequence,
    difference: String,
) -> (sequence::Sequence, String) {
    for shorter in sequence.shorter() {
        let Some(assembled) = shorter.assemble() else { continue };
        let case = shorter.case(&assembled);
        let native = host.run(std::slice::from_ref(&case)).expect("the sandboxed child").pop().flatten();
        let Some(native) = native else { continue };
        if let Some(difference) = engines.difference(&case, &assembled, &native) {
            return shortest(host, engines, shorter, difference);
        }
    }
    (sequence, difference)
}
