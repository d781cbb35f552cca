//! Fixed amounts of work, each of another kind, whose results are the same on every machine that works.
//!
//! `begin NAME` and `end NAME RESULT WALL_NS CPU_NS` stand on the console, with a pause after each in which the
//! machine is idle: whoever reads the lines can look at what the machine has used without having to hurry.

mod atomics;
mod code;
mod integer;
mod random;
mod strings;
mod system;
mod vector;

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// What a workload is given.
pub struct Run<'a> {
    pub rounds: u64,
    /// For files.
    pub folder: &'a Path,
    /// This program.
    pub program: &'a Path,
}

struct Workload {
    name: &'static str,
    group: &'static str,
    rounds: u64,
    work: fn(&Run) -> u64,
}

const fn workload(group: &'static str, name: &'static str, rounds: u64, work: fn(&Run) -> u64) -> Workload {
    Workload { name, group, rounds, work }
}

const INTEGER: &str = "integer";
const VECTOR: &str = "float-simd-string";
const SYSTEM: &str = "os";
const OTHER: &str = "other";
/// Not among all: for the comparison of one vCPU with two.
const PARALLEL: &str = "smp";

/// Rounds are chosen for about half a second each with QEMU's TCG.
const WORKLOADS: [Workload; 58] = [
    workload(INTEGER, "sieve", 60, integer::sieve),
    workload(INTEGER, "collatz", 3_000_000, integer::collatz),
    workload(INTEGER, "divide", 60_000_000, integer::divide),
    workload(INTEGER, "big-numbers", 100_000, integer::big_numbers),
    workload(INTEGER, "crc32", 1000, integer::crc32),
    workload(INTEGER, "sha256", 400, integer::sha256),
    workload(INTEGER, "compress", 50, integer::compress),
    workload(INTEGER, "sort", 120, integer::sort),
    workload(INTEGER, "maps", 1_000_000, integer::maps),
    workload(INTEGER, "text", 500_000, integer::text),
    workload(INTEGER, "chase-near", 100_000_000, integer::chase_near),
    workload(INTEGER, "chase-far", 2_000_000, integer::chase_far),
    workload(INTEGER, "calls", 800, integer::calls),
    workload(INTEGER, "indirect", 4000, integer::indirect),
    workload(INTEGER, "bytecode", 12_000, integer::bytecode),
    workload(VECTOR, "nbody", 200_000, vector::nbody),
    workload(VECTOR, "mandelbrot", 60, vector::mandelbrot),
    workload(VECTOR, "matrix-sse", 150, vector::matrix_sse),
    workload(VECTOR, "matrix-avx2", 300, vector::matrix_avx2),
    workload(VECTOR, "bytes-avx2", 12_000, vector::bytes_avx2),
    workload(VECTOR, "aes", 2_000_000, vector::aes),
    workload(VECTOR, "x87", 1_500_000, vector::x87),
    workload(VECTOR, "mathematics", 400_000, vector::mathematics),
    workload(VECTOR, "strlen", 60_000, strings::strlen),
    workload(VECTOR, "memchr", 60_000, strings::memchr),
    workload(VECTOR, "strcmp", 40_000, strings::strcmp),
    workload(VECTOR, "memmem", 30_000, strings::memmem),
    workload(VECTOR, "memcpy-short", 50_000, strings::memcpy_short),
    workload(VECTOR, "memcpy-long", 40, strings::memcpy_long),
    workload(VECTOR, "rep-movs", 20_000, strings::rep_movs),
    workload(VECTOR, "rep-stos", 40_000, strings::rep_stos),
    workload(VECTOR, "rep-scas", 30_000, strings::rep_scas),
    workload(SYSTEM, "system-calls", 1_500_000, system::system_calls),
    workload(SYSTEM, "clock", 8_000_000, system::clock),
    workload(SYSTEM, "fork", 800, system::fork),
    workload(SYSTEM, "copy-on-write", 40, system::copy_on_write),
    workload(SYSTEM, "exec", 50, system::exec),
    workload(SYSTEM, "pipe-turns", 8000, system::pipe_turns),
    workload(SYSTEM, "pipe-bulk", 1200, system::pipe_bulk),
    workload(SYSTEM, "sockets", 15_000, system::sockets),
    workload(SYSTEM, "poll", 40_000, system::poll),
    workload(SYSTEM, "context-switches", 30_000, system::context_switches),
    workload(SYSTEM, "threads", 2500, system::threads),
    workload(SYSTEM, "page-faults", 20, system::page_faults),
    workload(SYSTEM, "mappings", 10_000, system::mappings),
    workload(SYSTEM, "signals", 20_000, system::signals),
    workload(SYSTEM, "faults-caught", 15_000, system::faults_caught),
    workload(SYSTEM, "file-data", 50, system::file_data),
    workload(SYSTEM, "file-names", 4000, system::file_names),
    workload(OTHER, "self-modifying", 50_000, code::self_modifying),
    workload(OTHER, "data-beside-code", 1_000_000, code::data_beside_code),
    workload(OTHER, "just-in-time", 1500, code::just_in_time),
    workload(OTHER, "just-in-time-protected", 1500, code::just_in_time_protected),
    workload(OTHER, "locked", 60_000_000, atomics::one_thread),
    workload(OTHER, "two-thread-atomics", 30_000_000, atomics::two_threads),
    workload(OTHER, "two-thread-mutex", 20_000_000, atomics::mutex),
    workload(PARALLEL, "compute-alone", 800, atomics::compute_alone),
    workload(PARALLEL, "compute-twice", 800, atomics::compute_twice),
];

/// Longer than a busy host takes to look.
const PAUSE: Duration = Duration::from_millis(20);
/// Seconds after which a workload is taken to hang.
const PATIENCE: u32 = 60;

/// Their groups and names, a line each.
pub fn list() {
    for workload in &WORKLOADS {
        println!("{} {}", workload.group, workload.name);
    }
}

pub fn run(program: &str, name: &str, folder: &str, scale: f64) -> super::Result<()> {
    let workload =
        WORKLOADS.iter().find(|workload| workload.name == name).ok_or_else(|| format!("no workload '{name}'"))?;
    let rounds = ((workload.rounds as f64 * scale) as u64).max(1);
    let program = PathBuf::from(program);
    let run = Run { rounds, folder: Path::new(folder), program: &program };
    // SAFETY: it takes a number; the signal ends this process.
    unsafe { libc::alarm(PATIENCE) };
    println!("begin {name}");
    thread::sleep(PAUSE);
    let (start, used) = (Instant::now(), cpu_time());
    let result = (workload.work)(&run);
    let (wall, cpu) = (start.elapsed(), cpu_time() - used);
    println!("end {name} {result:x} {} {}", wall.as_nanos(), cpu.as_nanos());
    thread::sleep(PAUSE);
    Ok(())
}

/// Of this process and of its children that have ended.
fn cpu_time() -> Duration {
    let of = |who| {
        // SAFETY: plain integers, for which zeroes are a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: `usage` is alive and writable.
        unsafe { libc::getrusage(who, &mut usage) };
        let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
        time(usage.ru_utime) + time(usage.ru_stime)
    };
    of(libc::RUSAGE_SELF) + of(libc::RUSAGE_CHILDREN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_repeats_its_result() {
        let folder = std::env::temp_dir().join(format!("vireo-bench-load-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for workload in &WORKLOADS {
            // It would fork or catch signals in a test with other threads.
            if workload.group == SYSTEM {
                continue;
            }
            let run = Run { rounds: workload.rounds / 100 + 1, folder: &folder, program: Path::new("") };
            assert_eq!((workload.work)(&run), (workload.work)(&run), "{}", workload.name);
        }
        let _ = std::fs::remove_dir_all(folder);
    }
}
