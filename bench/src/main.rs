//! Measures Vireo beside QEMU: the same kernel, initial ramdisk, files and host, in turn, several rounds.
//! `docs/benchmarks.md` says what is measured and how.
#![allow(unsafe_code)]

mod boot;
mod comparison;
mod cpio;
mod disk;
mod guest;
mod net;
mod packages;
mod process;
mod report;
mod smp;
mod vmm;
mod work;

use std::{env, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use self::{
    comparison::{Comparison, NATIVE},
    guest::Guest,
    report::Report,
    vmm::{Accel, Qemu, Vmm},
    work::{Setting, Workload},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// From nothing to the first user process
    Boot,
    /// Programs of all kinds, on the host as well
    Work,
    /// Two vCPUs against one
    Smp,
    Disk,
    Net,
}

/// Measures Vireo beside QEMU and prints both with their ratios.
#[derive(Parser)]
struct Args {
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_value = "boot,work,smp,disk,net")]
    suite: Vec<Suite>,
    /// Rounds; each runs Vireo and QEMU one after the other, and medians count
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Workloads to run, by name or group [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Leave out the host itself, whose results all others are compared with
    #[arg(long)]
    no_native: bool,
    /// The vireo binary [default: vireo beside this program]
    #[arg(long)]
    vireo: Option<PathBuf>,
    /// The QEMU to compare with; it may be missing
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// Software or hardware virtualization, the same for both
    #[arg(long, value_enum, default_value = "soft")]
    accel: Accel,
    /// Kernel [default: the distribution's cloud kernel, downloaded with apt-get]
    #[arg(long, requires = "modules")]
    kernel: Option<PathBuf>,
    /// Folder with the kernel's modules, to find its virtio drivers in
    #[arg(long, requires = "kernel")]
    modules: Option<PathBuf>,
    /// Static busybox [default: the distribution's, downloaded with apt-get]
    #[arg(long)]
    busybox: Option<PathBuf>,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// Size of the scratch disks in MiB
    #[arg(long, default_value_t = 512)]
    disk_size: u64,
    /// How much is done: 2 moves twice the bytes of each test, and does everything twice as often
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Where downloads are kept and scratch disks are made
    #[arg(long, default_value = "target/bench")]
    work: PathBuf,
    /// Write all figures here [default: results.json in the work folder]
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vireo-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    fs::create_dir_all(&args.work).with_context(|| format!("cannot make {}", args.work.display()))?;
    let work = args.work.canonicalize()?;
    let guest = Guest::prepare(&work, args.kernel.clone().zip(args.modules.clone()), args.busybox.clone())?;
    let vmms = vmms(args)?;
    let mut report = Report::new(&vmms, &guest, args.rounds);
    let setting = Setting { guest: &guest, work: &work, memory_mib: args.memory, scale: args.scale };
    let wanted = |workload: &Workload| {
        let named = || args.only.iter().any(|word| *word == workload.name || *word == workload.group);
        workload.group != smp::GROUP && (args.only.is_empty() || named())
    };
    let workloads = work::list(&guest.load_path, wanted)?;
    let mut comparison = Comparison::new(workloads.clone(), vmms.iter().map(Vmm::name).collect());
    for round in 1..=args.rounds {
        for suite in &args.suite {
            if *suite == Suite::Work && !args.no_native {
                eprintln!("round {round}/{}: {suite:?} on the host", args.rounds);
                comparison.add(NATIVE, work::native(&[], &guest.load_path, &workloads, args.scale)?);
            }
            let mut host = Vec::new();
            if *suite == Suite::Smp && !args.no_native {
                eprintln!("round {round}/{}: {suite:?} on the host", args.rounds);
                host = smp::on_the_host(&setting)?;
            }
            for vmm in &vmms {
                eprintln!("round {round}/{}: {suite:?} on {}", args.rounds, vmm.name());
                let figures = match suite {
                    Suite::Boot => boot::measure(vmm, &guest, &work, args.memory),
                    Suite::Work => work::in_guest(vmm, &setting, &workloads, 1).map(|done| {
                        comparison.add(vmm.name(), done.outcomes);
                        vec![report::memory("workloads", done.outside_guest_bytes)]
                    }),
                    Suite::Smp => smp::measure(vmm, &setting),
                    Suite::Disk => disk::measure(vmm, &guest, &work, args.memory, args.disk_size << 20, args.scale),
                    Suite::Net => net::measure(vmm, &guest, &work, args.memory, args.scale),
                };
                report.add(vmm, figures.with_context(|| format!("{suite:?} on {}", vmm.name()))?);
                report.add(vmm, host.clone());
            }
        }
    }
    if !report.is_empty() {
        print!("{}", report.table());
    }
    let mut all = report.json();
    if args.suite.contains(&Suite::Work) {
        print!("{}", comparison.table());
        all["work"] = comparison.json();
    }
    let json = args.json.clone().unwrap_or_else(|| work.join("results.json"));
    fs::write(&json, format!("{all:#}\n")).with_context(|| format!("cannot write {}", json.display()))?;
    eprintln!("all figures: {}", json.display());
    let failures: Vec<_> = comparison.failures().collect();
    if !failures.is_empty() {
        bail!("{} runs of workloads failed:\n{}", failures.len(), failures.join("\n"));
    }
    Ok(())
}

fn vmms(args: &Args) -> Result<Vec<Vmm>> {
    let beside = || env::current_exe().ok()?.parent().map(|folder| folder.join("vireo"));
    let vireo = args.vireo.clone().or_else(beside).unwrap_or_else(|| "vireo".into());
    if !vireo.exists() {
        bail!("there is no {}: build it (cargo build --release -p vireo) or name it with --vireo", vireo.display());
    }
    let mut vmms = Vec::new();
    match Qemu::find(&args.qemu) {
        Some(qemu) => vmms.push(Vmm::Qemu { qemu, accel: args.accel }),
        None => eprintln!(
            "{} does not run here: only Vireo is measured (Debian and Ubuntu have it in qemu-system-x86)",
            args.qemu
        ),
    }
    vmms.push(Vmm::Vireo { program: vireo, accel: args.accel });
    Ok(vmms)
}
