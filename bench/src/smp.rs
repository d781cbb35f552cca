//! Two vCPUs against one: what a second one gains where it can, and costs where it cannot.

use std::{collections::BTreeMap, fs, process::Command, thread, time::Duration};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    report::{Figure, Unit},
    vmm::Vmm,
    work::{self, Setting, Taken, Workload},
};

/// Workloads that run here only.
pub const GROUP: &str = "smp";
const ALONE: &str = "compute-alone";
/// Twice the work, on two threads.
const TWICE: &str = "compute-twice";
/// Work that a second vCPU should not make slower.
const SINGLE: [&str; 3] = ["fork", "clock", "pipe-turns"];
type Clock = (&'static str, fn(&Taken) -> f64);

/// Time that passed is what a user sees, on a host with two idle cores; CPU time tells what it costs on a busy one.
const CLOCKS: [Clock; 2] = [("wall", |taken| taken.host_wall.as_secs_f64()), ("CPU", |taken| taken.cpu.as_secs_f64())];

pub fn measure(vmm: &Vmm, setting: &Setting<'_>) -> Result<Vec<Figure>> {
    let one = run(vmm, setting, ALONE, 1)?;
    let two = run(vmm, setting, TWICE, 2)?;
    let (alone, twice) = (&one[ALONE], &two[TWICE]);
    if alone.result != twice.result {
        bail!("{TWICE} came to {} instead of {}", twice.result, alone.result);
    }
    let mut figures = Vec::new();
    for (clock, time) in CLOCKS {
        figures.push(Figure {
            name: format!("2 vCPUs: two threads, throughput by {clock}"),
            unit: Unit::Gain,
            value: 2.0 * time(alone) / time(twice),
            by_cpu: None,
        });
        figures.extend(SINGLE.map(|name| Figure {
            name: format!("2 vCPUs: {name}, {clock}"),
            unit: Unit::Loss,
            value: time(&two[name]) / time(&one[name]),
            by_cpu: None,
        }));
    }
    let longer = at_once(vmm, setting)?;
    figures.push(Figure {
        name: "two machines with 1 vCPU at once, throughput by wall".into(),
        unit: Unit::Gain,
        value: 2.0 * AT_ONCE * alone.host_wall.as_secs_f64() / longer.as_secs_f64(),
        by_cpu: None,
    });
    Ok(figures)
}

/// What the host's own second processor costs [`SINGLE`] without any VMM, where `taskset` is there to take it away.
pub fn on_the_host(setting: &Setting<'_>) -> Result<Vec<Figure>> {
    let workloads = SINGLE.map(|name| Workload { group: String::new(), name: name.into() });
    let pinned = ["taskset", "-c", "0"];
    if !Command::new(pinned[0]).args(&pinned[1..]).arg("true").status().is_ok_and(|status| status.success()) {
        return Ok(Vec::new());
    }
    let load = &setting.guest.load_path;
    let one = work::native(&pinned, load, &workloads, setting.scale)?;
    let two = work::native(&[], load, &workloads, setting.scale)?;
    let time = |outcomes: &work::Outcomes, name: &str| match outcomes.get(name) {
        Some(Ok(taken)) => Ok(taken.wall.as_secs_f64()),
        _ => bail!("{name} did not run on the host"),
    };
    let figure = |name: &&str| {
        let value = time(&two, name)? / time(&one, name)?;
        Ok(Figure { name: format!("2 processors of the host: {name}, wall"), unit: Unit::Loss, value, by_cpu: None })
    };
    SINGLE.iter().map(figure).collect()
}

/// How many times as long as [`ALONE`] two machines compute at once: beside that, one's start is soon over.
const AT_ONCE: f64 = 4.0;

/// The longer time of two machines that compute at once: what the host has for two vCPUs of this VMM that have nothing to
/// do with each other.
fn at_once(vmm: &Vmm, setting: &Setting<'_>) -> Result<Duration> {
    let one = |folder: &str| -> Result<Duration> {
        let work = setting.work.join(folder);
        fs::create_dir_all(&work)?;
        let setting = Setting { work: &work, scale: setting.scale * AT_ONCE, ..*setting };
        let workloads = [Workload { group: String::new(), name: ALONE.into() }];
        let outcomes = work::in_guest(vmm, &setting, &workloads, 1)?.outcomes;
        let taken = outcomes.into_values().next().context("nothing ran")?.map_err(anyhow::Error::msg)?;
        Ok(taken.host_wall)
    };
    let [first, second] = thread::scope(|scope| {
        let second = scope.spawn(|| one("second"));
        [one("first"), second.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")))]
    });
    Ok(first?.max(second?))
}

fn run(vmm: &Vmm, setting: &Setting<'_>, compute: &str, cpus: u32) -> Result<BTreeMap<String, Taken>> {
    let workload = |name: &str| Workload { group: String::new(), name: name.into() };
    let workloads: Vec<_> = [compute].iter().chain(&SINGLE).map(|name| workload(name)).collect();
    let outcomes = work::in_guest(vmm, setting, &workloads, cpus)?.outcomes;
    let taken = outcomes.into_iter().map(|(name, outcome)| {
        let taken = outcome.map_err(anyhow::Error::msg).with_context(|| format!("{name} with {cpus} vCPUs"))?;
        Ok((name, taken))
    });
    taken.collect()
}
