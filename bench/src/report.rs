//! Figures of all rounds, as a table and as JSON.

use std::{collections::BTreeMap, fmt::Write as _, fs, time::Duration};

use serde_json::{Value, json};

use crate::{guest::Guest, vmm::Vmm};

/// What was measured in one round.
#[derive(Clone)]
pub struct Figure {
    pub name: String,
    pub unit: Unit,
    pub value: f64,
    /// The same, over the CPU time that the VMM took for it: what other load on the host disturbs least.
    pub by_cpu: Option<f64>,
}

/// A [`Figure`] of bytes moved.
pub fn rate(name: String, bytes: f64, wall: Duration, cpu: Duration) -> Figure {
    let over = |time: Duration| bytes / 1e6 / time.as_secs_f64();
    Figure { name, unit: Unit::MegaBytesPerSecond, value: over(wall), by_cpu: (!cpu.is_zero()).then(|| over(cpu)) }
}

pub fn memory(test: &str, bytes: u64) -> Figure {
    let name = format!("peak memory outside guest RAM, {test}");
    Figure { name, unit: Unit::MebiBytes, value: bytes as f64 / f64::from(1 << 20), by_cpu: None }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    MebiBytes,
    MegaBytesPerSecond,
    /// Times one vCPU's: the more, the better.
    Gain,
    /// Times one vCPU's: the less, the better.
    Loss,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::MebiBytes => "MiB",
            Self::MegaBytesPerSecond => "MB/s",
            Self::Gain | Self::Loss => "× 1 vCPU",
        }
    }

    fn more_is_better(self) -> bool {
        matches!(self, Self::MegaBytesPerSecond | Self::Gain)
    }
}

struct Row {
    name: String,
    unit: Unit,
    /// By VMM.
    values: Values,
    by_cpu: Values,
}

type Values = BTreeMap<&'static str, Vec<f64>>;

pub struct Report {
    vmms: Vec<(&'static str, bool, String)>,
    kernel: String,
    rounds: usize,
    rows: Vec<Row>,
}

impl Report {
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn new(vmms: &[Vmm], guest: &Guest, rounds: usize) -> Self {
        let vmms = vmms.iter().map(|vmm| (vmm.name(), vmm.is_vireo(), vmm.version())).collect();
        let kernel = guest.kernel.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Self { vmms, kernel, rounds, rows: Vec::new() }
    }

    pub fn add(&mut self, vmm: &Vmm, figures: Vec<Figure>) {
        for figure in figures {
            let at = self.rows.iter().position(|row| row.name == figure.name).unwrap_or_else(|| {
                self.rows.push(Row {
                    name: figure.name.clone(),
                    unit: figure.unit,
                    values: Values::new(),
                    by_cpu: Values::new(),
                });
                self.rows.len() - 1
            });
            self.rows[at].values.entry(vmm.name()).or_default().push(figure.value);
            if let Some(value) = figure.by_cpu {
                self.rows[at].by_cpu.entry(vmm.name()).or_default().push(value);
            }
        }
    }

    /// Medians in Markdown. The ratio says how many times as good Vireo is, whichever way is better.
    pub fn table(&self) -> String {
        let mut text = String::from("| test | unit |");
        let mut rule = String::from("|---|---|");
        for (name, ..) in &self.vmms {
            let _ = write!(text, " {name} |");
            rule.push_str("--:|");
        }
        let compares = self.vmms.len() > 1;
        text.push_str(if compares { " Vireo is × as good | by CPU time |\n" } else { "\n" });
        text = text + &rule + if compares { "--:|--:|\n" } else { "\n" };
        for row in &self.rows {
            let _ = write!(text, "| {} | {} |", row.name, row.unit.name());
            for (name, ..) in &self.vmms {
                let value =
                    row.values.get(name).map_or_else(|| "–".into(), |v| format!("{:.*}", digits(median(v)), median(v)));
                let _ = write!(text, " {value} |");
            }
            if compares {
                for ratio in [self.ratio(row.unit, &row.values), self.ratio(row.unit, &row.by_cpu)] {
                    let ratio = ratio.map_or_else(|| "–".into(), |ratio| format!("{ratio:.2}"));
                    let _ = write!(text, " {ratio} |");
                }
            }
            text.push('\n');
        }
        text
    }

    fn ratio(&self, unit: Unit, values: &Values) -> Option<f64> {
        let of = |vireo: bool| {
            let (name, ..) = self.vmms.iter().find(|(_, is, _)| *is == vireo)?;
            values.get(name).map(|values| median(values))
        };
        let (vireo, other) = (of(true)?, of(false)?);
        Some(if unit.more_is_better() { vireo / other } else { other / vireo })
    }

    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(
            |row| json!({ "name": row.name, "unit": row.unit.name(), "values": row.values, "by_cpu_time": row.by_cpu, "ratio": self.ratio(row.unit, &row.values) }),
        );
        let versions: BTreeMap<_, _> = self.vmms.iter().map(|(name, _, version)| (name, version)).collect();
        json!({ "kernel": self.kernel, "host": host(), "rounds": self.rounds, "versions": versions, "tests": rows.collect::<Vec<_>>() })
    }
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

fn digits(value: f64) -> usize {
    if value < 10.0 { 2 } else { usize::from(value < 100.0) }
}

/// What a reader has to know about the machine that measured.
fn host() -> Value {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| info.lines().find(|line| line.starts_with(name)).and_then(|line| line.split_once(": "));
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    json!({
        "processor": field("model name").map(|(_, name)| name),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "load": load.split(' ').next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_value_counts() {
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
    }

    #[test]
    fn a_ratio_above_one_is_good_for_vireo() {
        let vmms = vec![("QEMU TCG", false, String::new()), ("Vireo soft", true, String::new())];
        let row = |unit, qemu, vireo| Row {
            name: "test".into(),
            unit,
            values: [("QEMU TCG", vec![qemu]), ("Vireo soft", vec![vireo])].into(),
            by_cpu: Values::new(),
        };
        let rows = vec![row(Unit::Seconds, 2.0, 4.0), row(Unit::MegaBytesPerSecond, 100.0, 150.0)];
        let report = Report { vmms, kernel: String::new(), rounds: 1, rows };
        let ratios: Vec<_> = report.rows.iter().map(|row| report.ratio(row.unit, &row.values)).collect();
        assert_eq!(ratios, [Some(0.5), Some(1.5)]);
        assert!(report.table().contains("| test | MB/s | 100 | 150 | 1.50 | – |"), "{}", report.table());
    }
}
