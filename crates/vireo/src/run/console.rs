//! The guest's serial console while `vireo run` waits for the agent: shown if wanted, and its end kept to explain
//! a guest that does not come up.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

use vireo_machine::config::Stream;

const KEPT_BYTES: usize = 16 << 10;
const TAIL_LINES: usize = 12;
const PANIC: &str = "Kernel panic - not syncing";

#[derive(Default)]
struct State {
    kept: VecDeque<u8>,
    shown: bool,
}

/// Clones are the same console.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<State>>);

impl Console {
    pub fn new(shown: bool) -> Self {
        let console = Self::default();
        console.state().shown = shown;
        console
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn stream(&self) -> Stream {
        Stream::new(None, self.clone())
    }

    /// Shows nothing from here on: the command has the terminal.
    pub fn quiet(&self) {
        self.state().shown = false;
    }

    fn text(&self) -> String {
        let bytes: Vec<u8> = self.state().kept.iter().copied().collect();
        plain(&String::from_utf8_lossy(&bytes))
    }

    /// Whether what is kept has the words with which a Linux kernel gives up.
    pub fn shows_panic(&self) -> bool {
        self.text().contains(PANIC)
    }

    /// A few lines, without control sequences: those from a kernel's panic on, else the last.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        let last = lines.len().saturating_sub(TAIL_LINES);
        let first = lines.iter().position(|line| line.contains(PANIC)).unwrap_or(last).min(last);
        lines[first..].iter().take(TAIL_LINES).copied().collect::<Vec<_>>().join("\n")
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state();
        state.kept.extend(bytes);
        let excess = state.kept.len().saturating_sub(KEPT_BYTES);
        state.kept.drain(..excess);
        if state.shown {
            io::stderr().write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Text without escape sequences and other control characters.
fn plain(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            if chars.next_if_eq(&'[').is_some() {
                // A control sequence ends with a byte from @ to ~ (ECMA-48, 5.4).
                while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {}
            }
        } else if c == '\n' || !c.is_control() {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_readable() {
        let mut console = Console::new(false);
        for i in 0..100 {
            write!(console, "\u{1b}[0;32mline\u{1b}[0m {i}\r\n\r\n").unwrap();
        }
        let tail = console.tail();
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("line 98\nline 99"), "{tail}");
    }

    #[test]
    fn a_panic_is_seen_as_long_as_it_is_kept() {
        let mut console = Console::new(false);
        write!(console, "[ 1.5] Kernel panic").unwrap();
        assert!(!console.shows_panic());
        write!(console, " - not syncing: Fatal exception\r\n").unwrap();
        assert!(console.shows_panic());
        for i in 0..100 {
            writeln!(console, "register {i}").unwrap();
        }
        assert!(console.tail().starts_with("[ 1.5] Kernel panic - not syncing: Fatal exception\nregister 0\n"));
        assert_eq!(console.tail().lines().count(), TAIL_LINES);
        console.write_all(&[b'x'; KEPT_BYTES]).unwrap();
        assert!(!console.shows_panic());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut console = Console::new(false);
        console.write_all(&[b'x'; 100_000]).unwrap();
        assert_eq!(console.state().kept.len(), KEPT_BYTES);
    }
}
