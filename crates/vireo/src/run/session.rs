//! One command in the guest, its streams tied to ours.

use std::{
    io::{self, IsTerminal, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::anyhow;
use vireo_api::ExitCode;
use vireo_guest_protocol::{Exec, FromAgent, Ready, SESSION_PORT, ToAgent, WindowSize};
use vireo_machine::{
    Control, VsockHost,
    host::{self, Signal, on_signals},
};

use crate::exit::Failure;

const CONNECT: Duration = Duration::from_secs(30);
const CTRL_C: u8 = 2;
const TERMINATE: u8 = 15;
const HANG_UP: u8 = 1;

fn lost(error: impl Into<anyhow::Error>) -> Failure {
    Failure::new(ExitCode::HostFailure, error.into().context("the connection to the guest agent is lost"))
}

/// The request for a command; empty means a shell.
pub fn request(
    command: &[String],
    environment: &[String],
    user: Option<String>,
    directory: Option<String>,
) -> Result<Exec, Failure> {
    let mut variables = Vec::new();
    for text in environment {
        // A name alone passes our own value on, as docker does.
        let pair = match text.split_once('=') {
            Some((name, value)) => Some((name.to_owned(), value.to_owned())),
            None => std::env::var(text).ok().map(|value| (text.clone(), value)),
        };
        if text.is_empty() || text.starts_with('=') {
            let why = anyhow!("'{text}' sets no variable: write --env NAME=VALUE, or --env NAME to pass yours on");
            return Err(Failure::new(ExitCode::Usage, why));
        }
        variables.extend(pair);
    }
    Ok(Exec {
        command: command.to_vec(),
        environment: variables,
        directory,
        terminal: None,
        user,
        network_wait_ms: None,
    })
}

/// What the agent says of itself; a guest that connects and says nothing has until `deadline`.
pub fn read_ready(mut stream: UnixStream, deadline: Instant) -> Result<Ready, Failure> {
    // Zero would be no limit.
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left)).map_err(lost)?;
    match FromAgent::read(&mut stream) {
        Ok(Some(FromAgent::Ready(ready))) => Ok(ready),
        Ok(_) => Err(Failure::new(
            ExitCode::HostFailure,
            anyhow!("the guest agent says something else than that it is ready"),
        )),
        Err(error) => Err(lost(error)),
    }
}

/// Our terminal, in raw mode while this lives, if the command gets one.
pub struct Terminal {
    raw: Option<host::Terminal>,
    size: Option<WindowSize>,
}

impl Terminal {
    pub fn wanted(asked: bool, is_shell: bool) -> Result<Self, Failure> {
        let ours = io::stdin().is_terminal() && io::stdout().is_terminal();
        let wanted = asked || (is_shell && ours);
        if !wanted {
            return Ok(Self { raw: None, size: None });
        }
        let raw = host::Terminal::raw().map_err(|e| {
            Failure::new(ExitCode::HostFailure, anyhow!(e).context("cannot set the terminal to raw mode"))
        })?;
        let size = window_size().unwrap_or(WindowSize { rows: 24, columns: 80 });
        Ok(Self { raw, size: Some(size) })
    }
}

fn window_size() -> Option<WindowSize> {
    host::Terminal::size().map(|(columns, rows)| WindowSize { rows, columns })
}

type Sender = Arc<Mutex<Option<UnixStream>>>;

/// What signals do: before the command runs they stop the machine, then they go to the command, and a third of
/// them stops the machine after all.
pub struct Signals {
    session: Sender,
    count: Arc<AtomicU32>,
    stopped: Arc<AtomicBool>,
}

impl Signals {
    pub fn install(control: &Control) -> Result<Self, Failure> {
        let signals = Self { session: Sender::default(), count: Arc::default(), stopped: Arc::default() };
        let (session, count, stopped) = (signals.session.clone(), signals.count.clone(), signals.stopped.clone());
        let control = control.clone();
        on_signals(move |signal| {
            let frame = match signal {
                Signal::Resized => window_size().map(ToAgent::Resize),
                Signal::Stop(name) => Some(ToAgent::Signal(number_of(name))),
            };
            let is_stop = matches!(signal, Signal::Stop(_));
            let often = is_stop && count.fetch_add(1, Ordering::Relaxed) >= 2;
            let sent = frame.is_some_and(|frame| pass_on(&session, &frame));
            if is_stop && (!sent || often) {
                stopped.store(true, Ordering::Relaxed);
                control.stop();
            }
        })
        .map_err(|e| Failure::new(ExitCode::HostFailure, anyhow!(e).context("cannot handle signals")))?;
        Ok(signals)
    }

    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

/// How long a signal waits for input that is on its way.
const INPUT: Duration = Duration::from_millis(500);

/// Sends a small frame, unless it would have to wait: a guest that does not read its input must not make us deaf.
fn pass_on(session: &Sender, frame: &ToAgent) -> bool {
    let deadline = Instant::now() + INPUT;
    loop {
        let mut session = match session.try_lock() {
            Ok(session) => session,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            Err(TryLockError::WouldBlock) => return false,
        };
        return session.as_mut().is_some_and(|stream| has_room(stream) && frame.write(stream).is_ok());
    }
}

/// A stream socket is writable while much of its buffer is free: far more than a small frame.
fn has_room(stream: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut wanted = [PollFd::new(stream, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut wanted, Some(&now)).is_ok_and(|ready| ready > 0)
}

fn number_of(name: &str) -> u8 {
    match name {
        "SIGINT" => CTRL_C,
        "SIGHUP" => HANG_UP,
        _ => TERMINATE,
    }
}

/// Runs the command to its end; returns its status as a shell shows it.
pub fn run(
    vsock: &VsockHost,
    mut exec: Exec,
    terminal: Terminal,
    signals: &Signals,
    is_over: impl Fn() -> bool,
) -> Result<u8, Failure> {
    let stream = connect(vsock, is_over)?;
    exec.terminal = terminal.size;
    if exec.terminal.is_some() && !exec.environment.iter().any(|(name, _)| name == "TERM") {
        let term = std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned());
        exec.environment.push(("TERM".to_owned(), term));
    }
    let mut writer = stream.try_clone().map_err(lost)?;
    ToAgent::Exec(exec).write(&mut writer).map_err(lost)?;
    *signals.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
    forward_input(signals.session.clone());
    let result = copy_output(&stream);
    // Input that nobody in the guest reads may hold the session: it ends here.
    let _ = stream.shutdown(Shutdown::Both);
    *signals.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
    drop(terminal.raw);
    result
}

/// The agent's listening socket is there before it announces itself.
fn connect(vsock: &VsockHost, is_over: impl Fn() -> bool) -> Result<UnixStream, Failure> {
    let deadline = Instant::now() + CONNECT;
    loop {
        match vsock.connect(SESSION_PORT, Duration::from_secs(2)) {
            Ok(stream) => return Ok(stream),
            Err(error) if is_over() || Instant::now() > deadline => return Err(lost(error)),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The thread ends with the process: it may be waiting for a key that never comes.
fn forward_input(session: Sender) {
    thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        loop {
            let frame = match io::stdin().lock().read(&mut buffer) {
                Ok(0) => ToAgent::StdinEnd,
                Ok(n) => ToAgent::Stdin(buffer[..n].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => ToAgent::StdinEnd,
            };
            let ended = frame == ToAgent::StdinEnd;
            let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(stream) = session.as_mut() else { return };
            if frame.write(stream).is_err() || ended {
                return;
            }
        }
    });
}

fn copy_output(mut from: &UnixStream) -> Result<u8, Failure> {
    let written = |result: io::Result<()>| {
        result.map_err(|e| Failure::new(ExitCode::Failed, anyhow!(e).context("cannot write the command's output")))
    };
    loop {
        match FromAgent::read(&mut from).map_err(lost)? {
            Some(FromAgent::Stdout(bytes)) => {
                let mut out = io::stdout().lock();
                written(out.write_all(&bytes).and_then(|()| out.flush()))?;
            }
            Some(FromAgent::Stderr(bytes)) => written(io::stderr().lock().write_all(&bytes))?,
            Some(FromAgent::Exit(exit)) => return Ok(exit.status() as u8),
            Some(FromAgent::Failed(why)) => {
                let why = anyhow!("the guest agent refuses: {why}");
                return Err(Failure::new(ExitCode::HostFailure, why));
            }
            Some(FromAgent::Ready(_)) => {}
            None => return Err(lost(io::Error::from(io::ErrorKind::UnexpectedEof))),
        }
    }
}

/// Asks the guest to power off; the machine's end tells whether it did. The stream is to be kept until then, for the
/// agent to read it.
pub fn power_off(vsock: &VsockHost) -> Option<UnixStream> {
    let mut stream = vsock.connect(SESSION_PORT, Duration::from_secs(2)).ok()?;
    ToAgent::PowerOff.write(&mut stream).ok()?;
    Some(stream)
}

#[cfg(test)]
mod tests;
