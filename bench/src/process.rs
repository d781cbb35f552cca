//! A process under measurement: its output with times, what it used, how much memory it had.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// How often memory is looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(200);
/// A guest that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(180);

pub struct Line {
    pub at: Instant,
    /// What the process had used when the line came.
    pub cpu: Duration,
    pub text: String,
}

pub struct Finished {
    pub started: Instant,
    pub wall: Duration,
    /// User and system time, all threads.
    pub cpu: Duration,
    /// Resident memory outside the mapping of guest RAM, at most.
    pub outside_guest_bytes: u64,
    pub lines: Vec<Line>,
    /// Or why it did not end as it should.
    pub ended: Result<(), String>,
}

impl Finished {
    /// The first line that says `what`. Firmware may have left control sequences before it.
    pub fn line(&self, what: &str) -> Option<&Line> {
        self.lines.iter().find(|line| line.text.ends_with(what))
    }
}

/// Ends the process when its owner goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `command`, whose standard output is a guest's console, to its end.
pub fn run(command: &mut Command, guest_bytes: u64) -> Result<Finished> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = Instant::now();
    let program = command.get_program().to_string_lossy().into_owned();
    let mut running = Running(command.spawn().with_context(|| format!("cannot run {program}"))?);
    let pid = running.0.id();
    let console = running.0.stdout.take().context("no standard output")?;
    let mut complaints = running.0.stderr.take().context("no standard error")?;
    let (send, receive) = mpsc::channel();
    let reader = thread::spawn(move || {
        for text in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&text).trim().to_owned();
            let line = Line { at: Instant::now(), cpu: cpu_so_far(pid).unwrap_or_default(), text };
            if send.send(line).is_err() {
                break;
            }
        }
    });
    let words = thread::spawn(move || {
        let mut text = String::new();
        let _ = complaints.read_to_string(&mut text);
        text
    });
    let (mut lines, mut outside, mut hung) = (Vec::new(), 0, false);
    loop {
        outside = outside.max(outside_guest(pid, guest_bytes));
        let next = Instant::now() + SAMPLE_EVERY;
        let over = loop {
            match receive.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Timeout) => break false,
                Err(RecvTimeoutError::Disconnected) => break true,
            }
        };
        if over {
            break;
        }
        if lines.last().map_or(started, |line| line.at).elapsed() > PATIENCE {
            hung = true;
            running.0.kill()?;
            break;
        }
    }
    let _ = reader.join();
    lines.extend(receive.try_iter());
    let (status, cpu) = wait(pid)?;
    let wall = started.elapsed();
    let words = words.join().unwrap_or_default();
    let ended = if hung {
        Err(format!("{program} said nothing for {} seconds", PATIENCE.as_secs()))
    } else if !status.success() {
        Err(format!("{program} ended with {status}: {}", words.trim()))
    } else {
        Ok(())
    };
    Ok(Finished { started, wall, cpu, outside_guest_bytes: outside, lines, ended })
}

pub fn tail(lines: &[Line]) -> String {
    let from = lines.len().saturating_sub(15);
    lines[from..].iter().map(|line| format!("  {}\n", line.text)).collect()
}

/// Waits for a process and says what it used in all its life.
fn wait(pid: u32) -> Result<(ExitStatus, Duration)> {
    let mut status = 0;
    // SAFETY: plain integers, for which zeroes are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the right types.
    let waited = unsafe { libc::wait4(pid as libc::pid_t, &mut status, 0, &mut usage) };
    if waited < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot wait for the process");
    }
    let time = |t: libc::timeval| Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64);
    Ok((ExitStatus::from_raw(status), time(usage.ru_utime) + time(usage.ru_stime)))
}

/// User and system time of all threads, in nanoseconds where `/proc/PID/stat` has steps of the kernel's clock tick.
fn cpu_so_far(pid: u32) -> Option<Duration> {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: `clock` is alive and writable.
    let known = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) } == 0;
    // SAFETY: `time` is alive and writable.
    let read = known && unsafe { libc::clock_gettime(clock, &mut time) } == 0;
    read.then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// All resident memory but that of guest RAM, or 0 if the process is gone.
fn outside_guest(pid: u32, guest_bytes: u64) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/smaps")).map_or(0, |smaps| split(&smaps, guest_bytes))
}

/// Guest RAM is the anonymous mapping, readable and writable only, that is at least as large as the guest's memory
/// and has the most of it resident. Where the kernel joined it with a neighbour, the excess is not guest RAM. Of a
/// shared mapping, the part counts that is this one's: a code cache is mapped twice, for writing and for execution.
fn split(smaps: &str, guest_bytes: u64) -> u64 {
    let (mut total, mut guest) = (0, 0);
    let (mut candidate, mut counts) = (false, "Rss:");
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or("");
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            let access = words.next().unwrap_or("");
            counts = if access.ends_with('s') { "Pss:" } else { "Rss:" };
            candidate = access.starts_with("rw-") && words.nth(3).is_none() && end - start >= guest_bytes;
        } else if first == counts {
            let resident = words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
            total += resident;
            if candidate {
                guest = guest.max(resident.min(guest_bytes));
            }
        }
    }
    total - guest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_apart() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 1 /usr/bin/vmm
Rss:                 512 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Rss:              100000 kB
7f0020000000-7f0040000000 rwxp 00000000 00:00 0
Rss:                3000 kB
7f0050000000-7f0070000000 rw-p 00000000 00:00 0
Rss:                  88 kB
Pss:                  80 kB
7f0080000000-7f0080100000 rw-s 00000000 00:01 9 /memfd:code
Rss:                 600 kB
Pss:                 300 kB
7f0090000000-7f0090100000 r-xs 00000000 00:01 9 /memfd:code
Rss:                 600 kB
Pss:                 300 kB
";
        assert_eq!(split(smaps, 0x1000_0000), (512 + 3000 + 88 + 600) << 10);
        assert_eq!(split(smaps, 50_000 << 10), (512 + 50_000 + 3000 + 88 + 600) << 10);
    }

    #[test]
    fn what_a_process_used_and_said() {
        // It is there for long enough to be looked at more than once: the first look may come before it is a shell.
        let script = "echo one; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo two; sleep 0.7; exit 0";
        let done = run(Command::new("sh").args(["-c", script]), 1 << 40).unwrap();
        let said: Vec<_> = done.lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!(said, ["one", "two"]);
        assert!(done.cpu > Duration::from_millis(5) && done.cpu < done.wall * 2, "{:?} of {:?}", done.cpu, done.wall);
        assert!(done.outside_guest_bytes > 100 << 10, "{}", done.outside_guest_bytes);
        let said = done.lines[1].cpu;
        assert!(said > Duration::from_millis(5) && said <= done.cpu, "{said:?} of {:?}", done.cpu);
        let failed = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"]), 1 << 40).unwrap();
        assert!(failed.ended.is_err_and(|why| why.contains("why")));
    }
}
