//! Guests that mean harm: whatever a guest executes, `run` comes back when it is kicked, nothing but guest RAM is
//! touched, and the process stays as it was.
//!
//! Random guests run in a child process, so that a fatal signal is a failure with a case number. The cases are the
//! same each time: `VIREO_HOSTILE_SEED` (default 1) chooses others, `VIREO_HOSTILE_CASES` says how many.
//! Guest RAM lies between inaccessible pages; Rust code that leaves it ends in a signal.
#![cfg(target_arch = "x86_64")]

mod code;
mod directed;
mod numbers;
#[path = "../random_code/random.rs"]
mod random;
mod round;
mod state;

use std::{
    os::unix::fs::FileExt,
    process::Command,
    time::{Duration, Instant},
};

use random::Random;

const CASES: u64 = 3000;
/// What the process may have in memory at most, in KiB, with at most two vCPUs at a time.
const MOST_MEMORY_KB: u64 = 400 << 10;
/// From a kick until `run` is back. The work between two looks at the request takes milliseconds at most; the rest
/// is for hosts that do other things too.
const MOST_LATENCY: Duration = Duration::from_secs(5);

/// Most guests run as translated code, some in the interpreter, some in both.
fn promote(case: u64) -> u32 {
    match case % 8 {
        0 | 1 => 0,
        2 | 3 => 3,
        _ => 1,
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn random_guests_come_back_when_kicked() {
    let last = std::env::temp_dir().join(format!("vireo-hostile-{}", std::process::id()));
    std::fs::write(&last, [0; 8]).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "guests_of_the_child", "--ignored", "--nocapture"])
        .env("VIREO_HOSTILE_LAST", &last)
        .output()
        .unwrap();
    let case = std::fs::read(&last).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
    let _ = std::fs::remove_file(&last);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(
        output.status.success(),
        "case {case}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("cases done"), "the child ran nothing: {text}");
}

#[test]
#[ignore = "started by random_guests_come_back_when_kicked"]
fn guests_of_the_child() {
    let Some(last) = std::env::var_os("VIREO_HOSTILE_LAST") else { return };
    let last = std::fs::OpenOptions::new().write(true).open(last).unwrap();
    let seed = number("VIREO_HOSTILE_SEED", 1);
    let (first, cases) = (number("VIREO_HOSTILE_FIRST", 0), number("VIREO_HOSTILE_CASES", CASES));
    let started = Instant::now();
    let mut tally = round::Tally::default();
    let mut descriptors = None;
    for case in first..first + cases {
        last.write_at(&case.to_le_bytes(), 0).unwrap();
        round::play(&mut Random(seed << 32 ^ case), promote(case), &mut tally);
        // Whatever the process opens once is open after the first.
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert_eq!(open, *descriptors.get_or_insert(open), "file descriptors leak in case {case}");
    }
    let memory = peak_memory_kb();
    println!("{cases} cases done in {:?}, {memory} KiB at most: {tally:#?}", started.elapsed());
    assert!(tally.translated > cases, "hardly anything ran translated");
    assert!(memory < MOST_MEMORY_KB, "{memory} KiB");
    assert!(tally.slowest < MOST_LATENCY, "{:?} from a kick to the end of run", tally.slowest);
}

fn peak_memory_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
