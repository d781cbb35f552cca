//! The workloads of all rounds: times, ratios to the host and between the VMMs, geometric means by group.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Value, json};

use crate::{
    report::median,
    work::{Outcomes, Taken, Workload},
};

/// The machine without a VMM: the host itself.
pub const NATIVE: &str = "native";

pub struct Comparison {
    workloads: Vec<Workload>,
    /// The VMMs' names, Vireo's last.
    vmms: Vec<&'static str>,
    /// By machine and workload, of all rounds.
    taken: BTreeMap<(&'static str, String), Vec<Taken>>,
    /// What went wrong: machine, workload, why.
    failures: Vec<(&'static str, String, String)>,
}

impl Comparison {
    pub fn new(workloads: Vec<Workload>, vmms: Vec<&'static str>) -> Self {
        Self { workloads, vmms, taken: BTreeMap::new(), failures: Vec::new() }
    }

    /// The outcomes of one round; the host's come first, and results have to be the same as there.
    pub fn add(&mut self, machine: &'static str, outcomes: Outcomes) {
        for (name, outcome) in outcomes {
            let right = self.taken.get(&(NATIVE, name.clone())).map(|taken| taken[0].result.clone());
            match outcome {
                Ok(taken) if right.as_ref().is_none_or(|right| *right == taken.result) => {
                    self.taken.entry((machine, name)).or_default().push(taken);
                }
                Ok(taken) => {
                    let why = format!("its result is {} instead of {}", taken.result, right.unwrap_or_default());
                    self.failures.push((machine, name, why));
                }
                Err(why) => self.failures.push((machine, name, why)),
            }
        }
    }

    pub fn failures(&self) -> impl Iterator<Item = String> {
        self.failures.iter().map(|(machine, name, why)| format!("{name} on {machine}: {why}"))
    }

    fn cpu(&self, machine: &'static str, name: &str) -> Option<f64> {
        let taken = self.taken.get(&(machine, name.to_owned()))?;
        let seconds = median(&taken.iter().map(|taken| taken.cpu.as_secs_f64()).collect::<Vec<_>>());
        // Less than the clock can tell is no time to divide by.
        (seconds > 0.0).then_some(seconds)
    }

    /// How many times `machine` takes what `other` takes.
    fn ratio(&self, machine: &'static str, other: &'static str, name: &str) -> Option<f64> {
        Some(self.cpu(machine, name)? / self.cpu(other, name)?)
    }

    /// What the columns on the right compare.
    fn ratios(&self) -> Vec<(String, &'static str, &'static str)> {
        let natives = self.vmms.iter().map(|vmm| (format!("{vmm} ÷ native"), *vmm, NATIVE));
        let between = match self.vmms[..] {
            [other, vireo] => Some(("Vireo is × as fast".into(), other, vireo)),
            _ => None,
        };
        natives.chain(between).collect()
    }

    fn groups(&self) -> Vec<&str> {
        let mut groups: Vec<&str> = self.workloads.iter().map(|workload| workload.group.as_str()).collect();
        groups.dedup();
        groups
    }

    /// The geometric mean over a group, or over all, and how many workloads are in it.
    fn mean(&self, group: Option<&str>, machine: &'static str, other: &'static str) -> Option<(f64, usize)> {
        let of_group = self.workloads.iter().filter(|workload| group.is_none_or(|group| workload.group == group));
        let ratios: Vec<f64> = of_group.filter_map(|workload| self.ratio(machine, other, &workload.name)).collect();
        let logs: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
        (!ratios.is_empty()).then(|| ((logs / ratios.len() as f64).exp(), ratios.len()))
    }

    /// How fast the guest's clock goes, over all workloads; 1 is right.
    fn clock(&self, machine: &'static str) -> f64 {
        let of_machine = self.taken.iter().filter(|((of, _), _)| *of == machine).flat_map(|(_, taken)| taken);
        let (guest, host) = of_machine.fold((0.0, 0.0), |(guest, host), taken| {
            (guest + taken.wall.as_secs_f64(), host + taken.host_wall.as_secs_f64())
        });
        guest / host
    }

    /// Medians of CPU seconds in Markdown, and two tables of what follows from them.
    pub fn table(&self) -> String {
        let ratios = self.ratios();
        let machines: Vec<_> = [NATIVE].iter().chain(&self.vmms).copied().collect();
        let headings = machines.iter().map(|name| format!("{name}, s")).chain(ratios.iter().map(|r| r.0.clone()));
        let headings: Vec<_> = headings.collect();
        let mut text =
            format!("\n| workload | group | {} |\n|---|---|{}\n", headings.join(" | "), "--:|".repeat(headings.len()));
        for Workload { group, name } in &self.workloads {
            let _ = write!(text, "| {name} | {group} |");
            for machine in &machines {
                let cell = self.cpu(machine, name).map_or_else(|| "–".into(), |seconds| format!("{seconds:.3}"));
                let _ = write!(text, " {cell} |");
            }
            for (_, machine, other) in &ratios {
                let cell = self.ratio(machine, other, name).map_or_else(|| "–".into(), |ratio| format!("{ratio:.2}"));
                let _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
        let headings: Vec<_> = ratios.iter().map(|(heading, ..)| heading.as_str()).collect();
        let _ = write!(
            text,
            "\n| geometric mean | workloads | {} |\n|---|--:|{}\n",
            headings.join(" | "),
            "--:|".repeat(headings.len())
        );
        for group in self.groups().into_iter().map(Some).chain([None]) {
            let means: Vec<_> = ratios.iter().map(|(_, machine, other)| self.mean(group, machine, other)).collect();
            let count = means.iter().flatten().map(|(_, count)| *count).max().unwrap_or(0);
            let cells: Vec<_> =
                means.iter().map(|mean| mean.map_or_else(|| "–".into(), |(mean, _)| format!("{mean:.2}"))).collect();
            let _ = writeln!(text, "| {} | {count} | {} |", group.unwrap_or("all"), cells.join(" | "));
        }
        if let [other, vireo] = self.vmms[..] {
            let slower = |workload: &Workload| {
                let ratio = self.ratio(other, vireo, &workload.name).filter(|ratio| *ratio < 1.0)?;
                Some(format!("{} ({ratio:.2})", workload.name))
            };
            let slower: Vec<_> = self.workloads.iter().filter_map(slower).collect();
            let slower = if slower.is_empty() { "none".into() } else { slower.join(", ") };
            let _ = writeln!(text, "\nslower than {other}: {slower}");
        }
        for vmm in &self.vmms {
            let _ = writeln!(text, "clock of the guest over that of the host, {vmm}: {:.3}", self.clock(vmm));
        }
        text
    }

    pub fn json(&self) -> Value {
        let machines = || [NATIVE].into_iter().chain(self.vmms.iter().copied());
        let workloads = self.workloads.iter().map(|Workload { group, name }| {
            let of = |machine: &'static str, time: fn(&Taken) -> f64| -> Vec<f64> {
                self.taken.get(&(machine, name.clone())).map_or_else(Vec::new, |taken| taken.iter().map(time).collect())
            };
            let table = |time: fn(&Taken) -> f64| -> BTreeMap<_, _> {
                machines().map(|machine| (machine, of(machine, time))).collect()
            };
            json!({
                "name": name,
                "group": group,
                "cpu_seconds": table(|taken| taken.cpu.as_secs_f64()),
                "guest_wall_seconds": table(|taken| taken.wall.as_secs_f64()),
                "host_wall_seconds": table(|taken| taken.host_wall.as_secs_f64()),
                "ratios": self.named_ratios(|machine, other| self.ratio(machine, other, name)),
            })
        });
        let means = self.groups().into_iter().map(Some).chain([None]).map(|group| {
            let means = self.named_ratios(|machine, other| Some(self.mean(group, machine, other)?.0));
            (group.unwrap_or("all"), means)
        });
        json!({
            "workloads": workloads.collect::<Vec<_>>(),
            "geometric_means": means.collect::<BTreeMap<_, _>>(),
            "guest_clock": self.vmms.iter().map(|vmm| (*vmm, self.clock(vmm))).collect::<BTreeMap<_, _>>(),
            "failures": self.failures().collect::<Vec<_>>(),
        })
    }

    fn named_ratios(&self, of: impl Fn(&'static str, &'static str) -> Option<f64>) -> BTreeMap<String, Option<f64>> {
        self.ratios().into_iter().map(|(heading, machine, other)| (heading, of(machine, other))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn taken(result: &str, millis: u64) -> Result<Taken, String> {
        let time = Duration::from_millis(millis);
        Ok(Taken { result: result.into(), cpu: time, wall: time, host_wall: time })
    }

    #[test]
    fn means_are_geometric_and_by_group() {
        let workload = |group: &str, name: &str| Workload { group: group.into(), name: name.into() };
        let workloads = vec![workload("integer", "a"), workload("integer", "b"), workload("os", "c")];
        let mut comparison = Comparison::new(workloads, vec!["QEMU", "Vireo"]);
        let outcomes =
            |times: [u64; 3]| ["a", "b", "c"].map(String::from).into_iter().zip(times.map(|t| taken("1", t)));
        comparison.add(NATIVE, outcomes([10, 10, 10]).collect());
        comparison.add("QEMU", outcomes([20, 80, 30]).collect());
        comparison.add("Vireo", outcomes([10, 10, 60]).collect());
        assert_eq!(comparison.failures().count(), 0);
        let table = comparison.table();
        assert!(table.contains("| a | integer | 0.010 | 0.020 | 0.010 | 2.00 | 1.00 | 2.00 |"), "{table}");
        assert!(table.contains("| integer | 2 | 4.00 | 1.00 | 4.00 |"), "{table}");
        assert!(table.contains("| all | 3 | 3.63 | 1.82 | 2.00 |"), "{table}");
        assert!(table.contains("slower than QEMU: c (0.50)"), "{table}");
    }

    #[test]
    fn a_wrong_result_is_no_time() {
        let workloads = vec![Workload { group: "os".into(), name: "a".into() }];
        let mut comparison = Comparison::new(workloads, vec!["QEMU", "Vireo"]);
        comparison.add(NATIVE, [("a".to_owned(), taken("12", 10))].into());
        comparison.add("Vireo", [("a".to_owned(), taken("13", 10))].into());
        assert_eq!(comparison.failures().collect::<Vec<_>>(), ["a on Vireo: its result is 13 instead of 12"]);
        assert!(comparison.cpu("Vireo", "a").is_none());
    }
}
