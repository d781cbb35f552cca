//! The load program's workloads: on the host itself, and in a guest of each VMM.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    guest::Guest,
    process::{self, Finished, Line},
    vmm::{Machine, Vmm},
};

#[derive(Clone)]
pub struct Workload {
    pub group: String,
    pub name: String,
}

/// What one workload took.
#[derive(Clone)]
pub struct Taken {
    /// The same on every machine that works.
    pub result: String,
    /// Of the whole VMM; on the host, of the program and its children.
    pub cpu: Duration,
    /// By the clock of the machine that it ran on.
    pub wall: Duration,
    /// By the host's clock.
    pub host_wall: Duration,
}

/// By name; or why there is nothing.
pub type Outcomes = BTreeMap<String, Result<Taken, String>>;

/// How long the load program sleeps after `begin NAME`.
const PAUSE: Duration = Duration::from_millis(20);

/// The load program's list, without those that `wanted` leaves out.
pub fn list(load: &Path, wanted: impl Fn(&Workload) -> bool) -> Result<Vec<Workload>> {
    let output = Command::new(load).arg("workloads").output().context("cannot run the load program")?;
    let text = String::from_utf8(output.stdout)?;
    let workloads = text.lines().filter_map(|line| line.split_once(' '));
    let workloads = workloads.map(|(group, name)| Workload { group: group.into(), name: name.into() });
    Ok(workloads.filter(wanted).collect())
}

/// On the host itself; `by` is a command that runs it, if it is not run as it is.
pub fn native(by: &[&str], load: &Path, workloads: &[Workload], scale: f64) -> Result<Outcomes> {
    // In memory, as the guest's files are.
    let shared = Path::new("/dev/shm");
    let folder = if shared.is_dir() { tempfile::tempdir_in(shared)? } else { tempfile::tempdir()? };
    let mut outcomes = Outcomes::new();
    for Workload { name, .. } in workloads {
        let mut command = match by.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(load);
                command
            }
            None => Command::new(load),
        };
        command.args(["work", name]).arg(folder.path()).arg(scale.to_string());
        let finished = process::run(&mut command, u64::MAX)?;
        outcomes.extend(read(&finished.lines, true));
        outcomes.entry(name.clone()).or_insert_with(|| Err(finished.ended.err().unwrap_or_default()));
    }
    Ok(outcomes)
}

/// Everything that was asked for, in as few boots as it takes: a machine that breaks is started anew with what is left.
pub struct InGuest {
    pub outcomes: Outcomes,
    pub outside_guest_bytes: u64,
}

pub struct Setting<'a> {
    pub guest: &'a Guest,
    pub work: &'a Path,
    pub memory_mib: u64,
    pub scale: f64,
}

pub fn in_guest(vmm: &Vmm, setting: &Setting<'_>, workloads: &[Workload], cpus: u32) -> Result<InGuest> {
    let (mut outcomes, mut outside) = (Outcomes::new(), 0);
    let mut left = workloads;
    while !left.is_empty() {
        let finished = boot(vmm, setting, left, cpus)?;
        outside = outside.max(finished.outside_guest_bytes);
        let new = read(&finished.lines, false);
        // They run in the order of the list.
        let done = left.iter().take_while(|workload| new.contains_key(&workload.name)).count();
        outcomes.extend(new);
        left = &left[done..];
        if let (Some((broken, rest)), Err(why)) = (left.split_first(), &finished.ended) {
            let why = format!("the machine broke: {why}\n{}", process::tail(&finished.lines));
            outcomes.insert(broken.name.clone(), Err(why));
            left = rest;
        } else if let (Some(broken), Ok(())) = (left.first(), &finished.ended) {
            bail!("the guest did not run {}; its console:\n{}", broken.name, process::tail(&finished.lines));
        }
    }
    Ok(InGuest { outcomes, outside_guest_bytes: outside })
}

fn boot(vmm: &Vmm, setting: &Setting<'_>, workloads: &[Workload], cpus: u32) -> Result<Finished> {
    let names: Vec<&str> = workloads.iter().map(|workload| workload.name.as_str()).collect();
    let script = format!(
        "mount -t tmpfs tmp /tmp\nfor name in {}; do\nload work $name /tmp {} || echo \"failed $name $?\"\ndone\n",
        names.join(" "),
        setting.scale
    );
    let ramdisk: PathBuf = setting.work.join("work.cpio");
    fs::write(&ramdisk, setting.guest.ramdisk(&script))?;
    let machine =
        Machine { cpus, all_features: true, ..Machine::new(&setting.guest.kernel, &ramdisk, setting.memory_mib) };
    vmm.try_run(&machine)
}

/// What the lines of a console say. A workload that has only begun is not among it.
fn read(lines: &[Line], native: bool) -> Outcomes {
    let mut outcomes = Outcomes::new();
    let mut begun: Option<(&str, &Line)> = None;
    for line in lines {
        let words: Vec<&str> = line.text.split(' ').collect();
        match words[..] {
            ["begin", name] => begun = Some((name, line)),
            ["end", name, result, wall, cpu] => {
                let Some((_, start)) = begun.take().filter(|(begun, _)| *begun == name) else { continue };
                let nanos = |text: &str| text.parse().map(Duration::from_nanos).unwrap_or_default();
                let cpu = if native { nanos(cpu) } else { line.cpu.saturating_sub(start.cpu) };
                let host_wall = (line.at - start.at).saturating_sub(PAUSE);
                let taken = Taken { result: result.into(), cpu, wall: nanos(wall), host_wall };
                outcomes.insert(name.into(), Ok(taken));
            }
            ["failed", name, code] => {
                outcomes.insert(name.into(), Err(format!("it ended with exit code {code}")));
            }
            _ => (),
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_console_is_read() {
        let start = Instant::now();
        let line = |millis, cpu, text: &str| {
            let (at, cpu) = (start + Duration::from_millis(millis), Duration::from_millis(cpu));
            Line { at, cpu, text: text.into() }
        };
        let lines = [
            line(0, 1000, "begin sieve"),
            line(320, 1250, "end sieve 1f 299000000 240000000"),
            line(340, 1250, "begin fork"),
            line(400, 1300, "Segmentation fault"),
            line(401, 1300, "failed fork 139"),
            line(440, 1301, "begin exec"),
        ];
        let outcomes = read(&lines, false);
        let sieve = outcomes["sieve"].as_ref().unwrap();
        assert_eq!((sieve.result.as_str(), sieve.cpu.as_millis(), sieve.host_wall.as_millis()), ("1f", 250, 300));
        assert_eq!(sieve.wall.as_millis(), 299);
        assert_eq!(read(&lines, true)["sieve"].as_ref().unwrap().cpu.as_millis(), 240);
        assert!(outcomes["fork"].as_ref().is_err_and(|why| why.contains("139")));
        assert!(!outcomes.contains_key("exec"));
    }
}
