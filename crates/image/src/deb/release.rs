use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use super::control::{ControlError, paragraphs};
use crate::digest::Sha256Sum;

/// What a verified `InRelease` file says about one suite of an archive.
#[derive(Clone, Debug)]
pub struct Release {
    pub origin: String,
    pub codename: String,
    pub date: Option<SystemTime>,
    pub valid_until: Option<SystemTime>,
    /// Whether indices can be fetched by their sum, so that a mirror that is just being updated does no harm.
    pub by_hash: bool,
    files: HashMap<String, (Sha256Sum, u64)>,
}

/// Why a release file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    #[error("the release file is malformed")]
    Malformed(#[from] ControlError),
    #[error("the release file is empty")]
    Empty,
    #[error("the release file lists no SHA-256 sums")]
    NoSums,
    #[error("the release file has a malformed '{field}' field: '{value}'")]
    Field { field: &'static str, value: String },
}

impl Release {
    pub fn parse(text: &str) -> Result<Self, ReleaseError> {
        let paragraph = paragraphs(text).next().ok_or(ReleaseError::Empty)??;
        let text = |field| paragraph.get(field).unwrap_or_default().to_owned();
        let date = |field: &'static str| match paragraph.get(field) {
            None => Ok(None),
            Some(value) => parse_date(value)
                .map(Some)
                .ok_or_else(|| ReleaseError::Field { field, value: value.chars().take(80).collect() }),
        };
        let mut files = HashMap::new();
        for line in paragraph.get("SHA256").ok_or(ReleaseError::NoSums)?.lines().filter(|line| !line.is_empty()) {
            let entry = parse_sum(line);
            let (path, sum) =
                entry.ok_or_else(|| ReleaseError::Field { field: "SHA256", value: line.chars().take(80).collect() })?;
            files.insert(path, sum);
        }
        Ok(Self {
            origin: text("Origin"),
            codename: text("Codename"),
            date: date("Date")?,
            valid_until: date("Valid-Until")?,
            by_hash: paragraph.get("Acquire-By-Hash") == Some("yes"),
            files,
        })
    }

    /// Sum and size in bytes of an index file, named by its path below the suite's directory.
    pub fn file(&self, path: &str) -> Option<(Sha256Sum, u64)> {
        self.files.get(path).copied()
    }
}

fn parse_sum(line: &str) -> Option<(String, (Sha256Sum, u64))> {
    let mut words = line.split_whitespace();
    let (sum, size, path) = (words.next()?, words.next()?, words.next()?);
    words.next().is_none().then_some(())?;
    Some((path.to_owned(), (sum.parse().ok()?, size.parse().ok()?)))
}

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// `Sat, 11 Jul 2026 10:16:37 UTC`: the date format of release files (RFC 5322, always in UTC).
fn parse_date(text: &str) -> Option<SystemTime> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_, day, month, year, time, "UTC" | "GMT" | "Z" | "+0000"] = words[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    let clock: Vec<u64> = time.split(':').map(str::parse).collect::<Result<_, _>>().ok()?;
    let [hours, minutes, seconds] = clock[..] else { return None };
    if !(1970..10_000).contains(&year) || !(1..=31).contains(&day) || hours > 23 || minutes > 59 || seconds > 60 {
        return None;
    }
    let days = days_since_1970(year, month, day);
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(((days * 24 + hours) * 60 + minutes) * 60 + seconds))
}

/// Counts in years that begin on 1 March, so that the leap day is the last one of its year.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year / 4 - year / 100 + year / 400;
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    // 719468 days lie between 1 March of the year 0 and 1 January 1970.
    year * 365 + leap_days + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_dates() {
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 UTC", 0),
            ("Tue, 29 Feb 2000 23:59:59 UTC", 951_868_799),
            ("Sat, 11 Jul 2026 10:16:37 UTC", 1_783_764_997),
        ] {
            assert_eq!(parse_date(text), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), "{text}");
        }
        for text in [
            "",
            "Sat, 11 Jul 2026",
            "Sat, 11 Jul 2026 25:00:00 UTC",
            "Sat, 11 Foo 2026 10:16:37 UTC",
            "x 0 Jan 0 0:0:0 UTC",
        ] {
            assert_eq!(parse_date(text), None, "{text}");
        }
    }

    #[test]
    fn reads_sums_and_refuses_malformed_ones() {
        let sum = Sha256Sum::of(b"x");
        let release = Release::parse(&format!(
            "Origin: Debian\nSuite: stable\nCodename: trixie\nAcquire-By-Hash: yes\nMD5Sum:\n junk\nSHA256:\n {sum} 12 main/a\n"
        ))
        .unwrap();
        assert_eq!(release.file("main/a"), Some((sum, 12)));
        assert_eq!(release.file("main/b"), None);
        assert!(release.by_hash && release.valid_until.is_none());
        assert_eq!(Release::parse("Origin: Debian\n").unwrap_err(), ReleaseError::NoSums);
        assert_eq!(Release::parse("").unwrap_err(), ReleaseError::Empty);
        assert!(Release::parse("SHA256:\n abc 12 main/a\n").is_err());
        assert!(Release::parse(&format!("SHA256:\n {sum} -1 main/a\n")).is_err());
        assert!(Release::parse(&format!("Valid-Until: soon\nSHA256:\n {sum} 1 main/a\n")).is_err());
    }
}
