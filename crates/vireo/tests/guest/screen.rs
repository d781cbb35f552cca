//! What a program shows, on a pseudo-terminal or a pipe, and keys for it.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::{Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcgetattr, tcsetwinsize},
};

use crate::process::{Guard, TIMEOUT};

/// A program whose output is read as it comes.
pub struct Screen {
    pub child: Guard,
    keyboard: File,
    output: Receiver<Vec<u8>>,
    /// All that was shown.
    pub shown: String,
    /// Up to where `shown` was looked at.
    seen: usize,
}

/// The program's end of a pseudo-terminal, to look at its state.
pub struct Terminal {
    ours: File,
    theirs: OwnedFd,
    before: String,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    fn open(rows: u16, columns: u16) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        tcsetwinsize(&ours, size(rows, columns)).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let before = format!("{:?}", tcgetattr(&theirs).unwrap());
        Self { ours: File::from(ours), theirs, before }
    }

    /// The kernel tells the terminal's foreground processes with SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(&self.ours, size(rows, columns)).unwrap();
    }

    pub fn is_as_before(&self) -> bool {
        format!("{:?}", tcgetattr(&self.theirs).unwrap()) == self.before
    }
}

impl Screen {
    /// Starts a command in a session of its own with a new controlling terminal.
    pub fn on_terminal(command: &Command, rows: u16, columns: u16) -> (Self, Terminal) {
        let terminal = Terminal::open(rows, columns);
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        session.env("TERM", "dumb");
        session.stdin(terminal.theirs.try_clone().unwrap());
        session.stdout(terminal.theirs.try_clone().unwrap());
        session.stderr(terminal.theirs.try_clone().unwrap());
        let child = Guard(session.spawn().unwrap());
        let (reader, keyboard) = (terminal.ours.try_clone().unwrap(), terminal.ours.try_clone().unwrap());
        (Self::new(child, keyboard, reader), terminal)
    }

    /// Starts a command with pipes; what it says on standard error is the test's.
    pub fn on_pipes(command: &mut Command) -> Self {
        let mut child = Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let (stdin, stdout) = (child.0.stdin.take().unwrap(), child.0.stdout.take().unwrap());
        Self::new(child, File::from(OwnedFd::from(stdin)), File::from(OwnedFd::from(stdout)))
    }

    fn new(child: Guard, keyboard: File, mut reader: File) -> Self {
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = vec![0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keyboard, output, shown: String::new(), seen: 0 }
    }

    pub fn keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this appears behind what was expected before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        assert!(self.appears(text, TIMEOUT), "'{text}' does not appear in:\n{}", &self.shown);
    }

    /// Whether this appears in time.
    pub fn appears(&mut self, text: &str, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.shown[self.seen..].find(text) {
                self.seen += at + text.len();
                return true;
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                // Terminals in guests of these tests say nothing but ASCII.
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return false,
            }
        }
    }
}
