//! `vireo boot`: the plain VMM.

mod metrics;
mod serial;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use vireo_api::{ByteSize, ExitCode};
use vireo_machine::{
    Control, Outcome, Report,
    config::{Accel, BootConfig, DiskConfig, MachineConfig, NicConfig},
    host::{Signal, Terminal, on_signals},
};

use self::{metrics::MetricsFile, serial::Serial};
use crate::exit::Failure;

/// What a kernel gets where the user gives no --append.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

#[derive(clap::Args)]
#[command(after_help = "\
A terminal on standard input is in raw mode while the guest runs: every key goes to the guest, but Control-A X ends \
the machine, Control-A A sends a Control-A and Control-A H shows help.

Exit codes: 0 the guest powered off, 1 failure, 2 wrong usage, 3 a file is not what it should be, 120 guest crash, \
121 guest reset with --no-reboot, 122 guest kernel panic, 123 host failure.")]
pub struct Args {
    /// Linux bzImage (vmlinuz), or x86-64 ELF kernel
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    append: Option<String>,
    /// Disk, in the order vda, vdb, …: PATH[,format=raw|qcow2][,ro][,serial=TEXT]; write a comma in PATH twice
    #[arg(long = "disk", value_name = "PATH[,…]")]
    disks: Vec<DiskConfig>,
    /// Network card: none, user[,fwd=tcp:HOSTPORT:GUESTPORT]… or tap=NAME
    #[arg(long = "net", value_name = "none|user|tap=NAME")]
    nics: Vec<String>,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Guest memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: ByteSize,
    /// CPU engine: auto takes KVM where it is fast
    #[arg(long, value_name = "auto|kvm|soft", default_value = "auto")]
    accel: Accel,
    /// Where the serial port (ttyS0) goes
    #[arg(long, value_name = "stdio|file=PATH|none", default_value = "stdio")]
    serial: Serial,
    /// Write timings, counters and memory use to this file, as JSON
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// End when the guest resets
    #[arg(long)]
    no_reboot: bool,
    /// Run all that the software engine translates in its interpreter as well, and compare (docs/testing.md)
    #[arg(long, hide = true)]
    verify_translation: bool,
}

/// Boots what `args` say; `started` is when the process began.
pub fn run(args: Args, started: Instant) -> Result<ExitCode, Failure> {
    let metrics = args.metrics.as_deref().map(MetricsFile::create).transpose()?;
    let mut config = machine_config(&args)?;
    let control = Control::default();
    let by_signal = stop_on_signals(&control)?;
    let terminal = match args.serial {
        Serial::Stdio => raw_terminal()?,
        _ => None,
    };
    config.serial = serial::open(&args.serial, terminal.is_some(), &control)?;
    let result = vireo_machine::run(&config, &control, |_| {});
    drop(terminal);
    let report = result.map_err(|e| Failure::new(e.exit_code(), e))?;
    report.disk_failures.iter().for_each(|failure| eprintln!("vireo: {failure}"));
    if let Some(why) = config.serial.as_ref().and_then(|serial| serial.failure()) {
        eprintln!("vireo: some of what the guest wrote to its serial port is lost: {why}");
    }
    if args.verify_translation {
        tell_verified(&report);
    }
    let code = tell(&report.outcome, by_signal.load(Ordering::Relaxed));
    if let Some(file) = metrics {
        file.write(&report, &config, started, code)?;
    }
    Ok(code)
}

fn machine_config(args: &Args) -> Result<MachineConfig, Failure> {
    let cmdline = args.append.clone().unwrap_or_else(|| DEFAULT_CMDLINE.to_owned());
    let boot = BootConfig { kernel: args.kernel.clone(), initrd: args.initrd.clone(), cmdline, decompressor: None };
    let nics: Result<Vec<_>, _> = args.nics.iter().map(|text| NicConfig::parse(text)).collect();
    let nics = nics.map_err(|e| Failure::new(ExitCode::Usage, e))?;
    Ok(MachineConfig {
        vcpus: args.cpus,
        memory: args.memory,
        // There is nothing else to verify.
        accel: if args.verify_translation { Accel::Soft } else { args.accel },
        disks: args.disks.clone(),
        nics: nics.into_iter().flatten().collect(),
        reboot: !args.no_reboot,
        metrics: args.metrics.is_some(),
        verify_translation: args.verify_translation,
        ..MachineConfig::new(boot)
    })
}

/// The flag says whether it was a signal that stopped the machine.
fn stop_on_signals(control: &Control) -> Result<Arc<AtomicBool>, Failure> {
    let by_signal = Arc::new(AtomicBool::new(false));
    let (control, flag) = (control.clone(), by_signal.clone());
    on_signals(move |signal| {
        if let Signal::Stop(_) = signal {
            flag.store(true, Ordering::Relaxed);
            control.stop();
        }
    })
    .map_err(|e| Failure::new(ExitCode::HostFailure, anyhow::Error::new(e).context("cannot handle signals")))?;
    Ok(by_signal)
}

fn raw_terminal() -> Result<Option<Terminal>, Failure> {
    Terminal::raw().map_err(|e| {
        Failure::new(ExitCode::HostFailure, anyhow::Error::new(e).context("cannot set the terminal to raw mode"))
    })
}

/// Says how much of what ran was verified.
fn tell_verified(report: &Report) {
    let figure = |name: &str| report.stats.exits.get(name).copied().unwrap_or_default();
    let unverified: Vec<_> = report.stats.exits.iter().filter(|(name, _)| name.starts_with("unverified_")).collect();
    let reasons: Vec<_> = unverified.iter().map(|(name, n)| format!("{n} {}", &name["unverified_".len()..])).collect();
    eprintln!(
        "vireo: {} blocks with {} instructions did the same interpreted and translated; not compared: {} ({})",
        figure("verified_blocks"),
        figure("verified_instructions"),
        unverified.iter().map(|(_, n)| **n).sum::<u64>(),
        reasons.join(", ")
    );
}

/// Says how the guest ended, where that is not what everyone expects.
fn tell(outcome: &Outcome, by_signal: bool) -> ExitCode {
    match outcome {
        Outcome::PowerOff => ExitCode::Ok,
        Outcome::Reset => {
            eprintln!("vireo: the guest reset, and --no-reboot was given");
            ExitCode::GuestReset
        }
        Outcome::Panic => {
            eprintln!("vireo: the guest's kernel panicked; its last messages on the console tell why");
            ExitCode::GuestPanic
        }
        Outcome::Crash(crash) => {
            eprintln!(
                "vireo: the guest crashed: {} on vCPU {} at {:#x} (stack {:#x}, page tables {:#x})",
                crash.reason, crash.vcpu, crash.rip, crash.rsp, crash.cr3
            );
            ExitCode::GuestCrash
        }
        Outcome::Stopped if by_signal => {
            eprintln!("vireo: stopped by a signal while the guest was running");
            ExitCode::Failed
        }
        Outcome::Stopped => ExitCode::Ok,
    }
}
