//! A terminal in raw mode, so that every key reaches the guest. It is put back on every way out: when the guard is
//! dropped, when a thread panics, and on the signals by which a process dies of its own faults.
#![allow(unsafe_code)]

use std::{
    io, mem, panic,
    sync::{
        Once, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetwinsize,
    tcsetattr,
};

static ORIGINAL: OnceLock<Termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Standard input in raw mode, for as long as this lives.
#[derive(Debug)]
pub struct Terminal(());

impl Terminal {
    /// Every byte passes as it is, in both directions: messages of our own need `\r\n` while this lives. `None` where
    /// standard input is no terminal.
    pub fn raw() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return Ok(None);
        }
        let current = tcgetattr(stdin)?;
        let original = ORIGINAL.get_or_init(|| current);
        restore_when_things_go_wrong();
        let mut raw = original.clone();
        raw.input_modes -= InputModes::IGNBRK
            | InputModes::BRKINT
            | InputModes::PARMRK
            | InputModes::ISTRIP
            | InputModes::INLCR
            | InputModes::IGNCR
            | InputModes::ICRNL
            | InputModes::IXON;
        raw.local_modes -=
            LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG | LocalModes::IEXTEN;
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        // What the guest sends went through its own terminal's output processing; ours would spoil it.
        raw.output_modes -= OutputModes::OPOST;
        RAW.store(true, Ordering::Release);
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self(())))
    }

    /// Columns and rows of the terminal on standard input, if it is one and knows.
    pub fn size() -> Option<(u16, u16)> {
        let size = tcgetwinsize(rustix::stdio::stdin()).ok()?;
        (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Async-signal-safe: an atomic swap and one system call.
fn restore() {
    if RAW.swap(false, Ordering::AcqRel)
        && let Some(original) = ORIGINAL.get()
    {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, original);
    }
}

fn restore_when_things_go_wrong() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            report(info);
        }));
        for (slot, signal) in FATAL.iter().enumerate() {
            // SAFETY: all-zero sigactions are valid; the handler only calls async-signal-safe functions.
            unsafe {
                let mut action: libc::sigaction = mem::zeroed();
                let mut previous: libc::sigaction = mem::zeroed();
                action.sa_sigaction = on_fatal as *const () as usize;
                action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
                if libc::sigaction(*signal, std::ptr::null(), &mut previous) == 0 {
                    let _ = PREVIOUS[slot].set(previous);
                    libc::sigaction(*signal, &action, std::ptr::null_mut());
                }
            }
        }
    });
}

const FATAL: [libc::c_int; 5] = [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];
static PREVIOUS: [OnceLock<libc::sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// Restores the terminal. If an instruction faulted, it runs again and meets the handler that was there before ours;
/// a signal that someone sent (`abort` does) ends the process as if nobody had caught it.
extern "C" fn on_fatal(signal: libc::c_int, info: *const libc::siginfo_t, _context: *const libc::c_void) {
    restore();
    let previous = FATAL.iter().position(|s| *s == signal).and_then(|slot| PREVIOUS[slot].get());
    // SAFETY: the kernel gives a valid `info` to SA_SIGINFO handlers; `previous` came from sigaction, and zeroes mean
    // the default action.
    unsafe {
        let sent = (*info).si_code <= 0;
        let default: libc::sigaction = mem::zeroed();
        let next = if sent { &default } else { previous.unwrap_or(&default) };
        libc::sigaction(signal, next, std::ptr::null_mut());
        if sent {
            libc::raise(signal);
        }
    }
}
