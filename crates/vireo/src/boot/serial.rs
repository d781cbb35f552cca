use std::{io, path::PathBuf, str::FromStr};

use anyhow::Context;
use vireo_api::ExitCode;
use vireo_machine::{Control, config::Stream, host};

use crate::exit::Failure;

/// Where the guest's serial port goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    Stdio,
    File(PathBuf),
    None,
}

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=').unwrap_or((text, "")) {
            ("stdio", "") => Ok(Self::Stdio),
            ("none", "") => Ok(Self::None),
            ("file", path) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!("'{text}' is no place for the serial port: write stdio, file=PATH or none")),
        }
    }
}

/// `raw` says that standard input is a raw terminal: Control-A X then ends the machine.
pub fn open(serial: &Serial, raw: bool, control: &Control) -> Result<Option<Stream>, Failure> {
    match serial {
        Serial::None => Ok(None),
        Serial::Stdio => {
            let control = control.clone();
            let quit: Option<host::Quit> = raw.then(|| Box::new(move || control.stop()) as host::Quit);
            let input = host::forward_stdin(quit).map_err(|e| Failure::new(ExitCode::HostFailure, e))?;
            Ok(Some(Stream::new(Some(input), io::stdout())))
        }
        Serial::File(path) => {
            let stream = Stream::to_file(path)
                .with_context(|| format!("cannot write the serial port's output to {}", path.display()))
                .map_err(|e| Failure::new(ExitCode::Failed, e))?;
            Ok(Some(stream))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_three_places() {
        assert_eq!("stdio".parse(), Ok(Serial::Stdio));
        assert_eq!("file=/a=b".parse(), Ok(Serial::File("/a=b".into())));
        assert_eq!("none".parse(), Ok(Serial::None));
        for text in ["", "file", "file=", "tcp", "stdio=x"] {
            assert!(text.parse::<Serial>().is_err(), "{text}");
        }
    }
}
