//! `vireo doctor`: what this host offers, a line for each thing that matters, and what to do about what it lacks.

mod host;

use vireo_api::ExitCode;

use crate::{
    exit::{Failure, print},
    state::StateArgs,
};

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ok,
    /// Vireo works, with less.
    Warn,
    /// Something that users expect does not work.
    Fail,
}

/// One line of the report.
struct Finding {
    level: Level,
    what: &'static str,
    found: String,
    /// What to do, where there is something to do.
    remedy: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self { level: Level::Ok, what, found: found.into(), remedy: None }
    }

    fn warn(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Warn, what, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Fail, what, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Prints the report. The exit code is 1 if anything failed.
pub fn run(state: &StateArgs) -> Result<ExitCode, Failure> {
    let findings = host::examine(&state.dir());
    for finding in &findings {
        let level = match finding.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        print(&format!("{level}  {:<16} {}", finding.what, finding.found))?;
        if let Some(remedy) = &finding.remedy {
            print(&format!("      {:<16} → {remedy}", ""))?;
        }
    }
    let failed = findings.iter().filter(|finding| finding.level == Level::Fail).count();
    Ok(if failed == 0 { ExitCode::Ok } else { ExitCode::Failed })
}
