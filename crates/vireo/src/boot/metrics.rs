//! The file that `--metrics` writes; `docs/boot.md` describes its fields.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Context;
use serde_json::{Value, json};
use vireo_api::ExitCode;
use vireo_machine::{Outcome, Report, config::MachineConfig};

use crate::exit::Failure;

/// Opened before the guest starts, so that hours of work are not measured in vain; if nothing comes to be
/// written, a file that was not there before goes away again.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    unfinished: bool,
}

impl MetricsFile {
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let new = !path.exists();
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(|e| failed(path, e))?;
        Ok(Self { path: path.to_owned(), file, unfinished: new })
    }

    pub fn write(
        mut self,
        report: &Report,
        config: &MachineConfig,
        started: Instant,
        code: ExitCode,
    ) -> Result<(), Failure> {
        let text = format!("{:#}\n", to_json(report, config, started, code));
        let write = self.file.set_len(0).and_then(|()| self.file.write_all(text.as_bytes()));
        write.map_err(|e| failed(&self.path, e))?;
        self.unfinished = false;
        Ok(())
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        if self.unfinished {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn failed(path: &Path, error: std::io::Error) -> Failure {
    let error = Err::<(), _>(error).with_context(|| format!("cannot write the metrics to {}", path.display()));
    Failure::new(ExitCode::Failed, error.err().unwrap_or_else(|| anyhow::anyhow!("cannot write the metrics")))
}

fn to_json(report: &Report, config: &MachineConfig, started: Instant, code: ExitCode) -> Value {
    let since_start = |at: Option<Instant>| at.map(|at| at.duration_since(started).as_secs_f64() * 1000.0);
    let memory = report.memory.unwrap_or_default();
    json!({
        "engine": report.engine.kind.name(),
        "engine_reason": report.engine.why,
        "kernel": report.kernel,
        "outcome": outcome_name(&report.outcome),
        "exit_code": code as u8,
        "vcpus": config.vcpus,
        "boots": report.boots,
        "kernel_entry_ms": since_start(report.kernel_entry),
        "first_user_ms": since_start(report.first_user),
        "running_ms": report.running_time.as_secs_f64() * 1000.0,
        "instructions": report.stats.instructions,
        "exits": report.stats.exits,
        "guest_memory_bytes": config.memory.0,
        "peak_outside_guest_bytes": memory.outside_guest,
        "peak_guest_resident_bytes": memory.guest,
        "peak_resident_bytes": peak_resident_bytes(),
    })
}

fn outcome_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::PowerOff => "power-off",
        Outcome::Reset => "reset",
        Outcome::Panic => "panic",
        Outcome::Crash(_) => "crash",
        Outcome::Stopped => "stopped",
    }
}

/// The kernel's own high-water mark of everything, guest RAM included.
fn peak_resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}
