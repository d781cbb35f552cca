//! How a command ends: one message on standard error at most, and a documented exit code.

use std::{
    error::Error,
    fmt,
    io::{self, Write},
    process,
};

use vireo_api::ExitCode;

/// A failure with the exit code that tells its kind.
#[derive(Debug)]
pub struct Failure {
    code: ExitCode,
    error: anyhow::Error,
}

impl Failure {
    pub fn new(code: ExitCode, error: impl Into<anyhow::Error>) -> Self {
        Self { code, error: error.into() }
    }

    pub fn code(&self) -> ExitCode {
        self.code
    }
}

impl fmt::Display for Failure {
    /// The error and each cause that it does not say itself, in one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.error.to_string();
        f.write_str(&said)?;
        for cause in self.error.chain().skip(1) {
            let cause = cause.to_string();
            if !said.contains(&cause) {
                write!(f, ": {cause}")?;
                said = cause;
            }
        }
        Ok(())
    }
}

impl Error for Failure {}

/// Writes lines to standard output. A reader that has gone (`vireo image ls | head -1`) has read enough.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let error = anyhow::Error::new(error).context("cannot write to standard output");
            Err(Failure::new(ExitCode::Failed, error))
        }
        _ => Ok(()),
    }
}

/// Prints a failure and gives the process its exit code.
pub fn report(result: Result<u8, Failure>) -> process::ExitCode {
    let code = result.unwrap_or_else(|failure| {
        eprintln!("vireo: {failure}");
        failure.code as u8
    });
    process::ExitCode::from(code)
}
