//! One session: a request of the host and what belongs to it.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use vireo_guest_protocol::{Exec, Exit, FromAgent, ToAgent};

use crate::{
    network,
    pump::{self, Out},
    terminal,
    user::User,
};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub fn serve(stream: File) {
    let Ok(mut from) = stream.try_clone() else { return };
    let out: Out = Arc::new(Mutex::new(stream));
    let failed = match ToAgent::read(&mut from) {
        Ok(Some(ToAgent::Exec(exec))) => match start(&exec) {
            Ok(running) => return running.run(from, &out),
            Err(refusal) => return refusal.tell(&out, exec.terminal.is_some()),
        },
        Ok(Some(ToAgent::PowerOff)) => format!("cannot power off: {}", terminal::power_off()),
        Ok(Some(_)) => "a session begins with a request".to_owned(),
        Ok(None) => return,
        Err(error) => error.to_string(),
    };
    pump::send(&out, &FromAgent::Failed(failed));
}

/// Why a command was not started, with the exit code that shells have for it.
struct Refusal {
    code: i32,
    why: String,
}

const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self { code: CANNOT_RUN, why }
    }
}

impl Refusal {
    fn tell(self, out: &Out, raw_terminal: bool) {
        let line = format!("vireo: {}{}", self.why, if raw_terminal { "\r\n" } else { "\n" });
        pump::send(out, &FromAgent::Stderr(line.into_bytes()));
        pump::send(out, &FromAgent::Exit(Exit::Code(self.code)));
    }
}

/// Where the host's input goes.
enum Input {
    Pipe(Option<ChildStdin>),
    Terminal(File),
}

struct Running {
    child: Child,
    input: Input,
}

fn command_line(exec: &Exec, user: &User) -> Command {
    let mut command = match exec.command.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => {
            let mut command = Command::new(&user.shell);
            command.arg("-l");
            command
        }
    };
    command.env_clear().env("PATH", PATH).env("HOME", &user.home).env("USER", &user.name);
    command.env("LOGNAME", &user.name).env("SHELL", &user.shell).env("LANG", "C.UTF-8");
    command.envs(exec.environment.iter().map(|(name, value)| (name, value)));
    command
}

fn start(exec: &Exec) -> Result<Running, Refusal> {
    let user = User::find(exec.user.as_deref())?;
    if let Some(limit) = exec.network_wait_ms {
        network::wait(Duration::from_millis(limit.into()));
    }
    let mut command = command_line(exec, &user);
    let directory = exec.directory.as_deref().unwrap_or(&user.home);
    if std::path::Path::new(directory).is_dir() {
        command.current_dir(directory);
    } else if exec.directory.is_some() {
        return Err(format!("there is no directory '{directory}' in the guest").into());
    } else {
        command.current_dir("/");
    }
    let with_terminal = exec.terminal.is_some();
    let mut ours = None;
    if let Some(size) = exec.terminal {
        let opened = terminal::open(size)
            .and_then(|(ours, theirs)| Ok((ours, theirs.try_clone()?, theirs.try_clone()?, theirs)));
        let (end, stdin, stdout, stderr) = opened.map_err(|error| format!("cannot open a terminal: {error}"))?;
        command.stdin(OwnedFd::from(stdin)).stdout(OwnedFd::from(stdout)).stderr(OwnedFd::from(stderr));
        ours = Some(end);
    } else {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let (uid, gid, groups) = (user.uid, user.gid, user.groups.clone());
    terminal::before_exec(&mut command, move || {
        terminal::new_session(with_terminal)?;
        if uid == 0 { Ok(()) } else { terminal::become_user(uid, gid, &groups) }
    });
    let mut child = command.spawn().map_err(|error| {
        let program = exec.command.first().unwrap_or(&user.shell);
        let code = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_RUN };
        Refusal { code, why: format!("cannot run '{program}': {error}") }
    })?;
    let input = match ours {
        Some(end) => Input::Terminal(end),
        None => Input::Pipe(child.stdin.take()),
    };
    Ok(Running { child, input })
}

impl Running {
    fn run(mut self, from: File, out: &Out) {
        let mut pumps = Vec::new();
        match &self.input {
            Input::Terminal(terminal) => {
                if let Ok(reader) = terminal.try_clone() {
                    pumps.push(pump::start(reader, out.clone(), FromAgent::Stdout));
                }
            }
            Input::Pipe(_) => {
                let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
                pumps.extend(stdout.map(|from| pump::start(from, out.clone(), FromAgent::Stdout)));
                pumps.extend(stderr.map(|from| pump::start(from, out.clone(), FromAgent::Stderr)));
            }
        }
        let pid = self.child.id();
        let input = self.input;
        let ended = Arc::new(AtomicBool::new(false));
        let is_over = ended.clone();
        // Ends with the connection: the host closes it once it has the exit status.
        thread::spawn(move || obey(from, input, pid, &is_over));
        let status = self.child.wait();
        ended.store(true, Ordering::SeqCst);
        for pump in pumps {
            let _ = pump.join();
        }
        let frame = match status {
            Ok(status) => FromAgent::Exit(exit_of(status)),
            Err(error) => FromAgent::Failed(format!("waiting for the command: {error}")),
        };
        pump::send(out, &frame);
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Code(-1),
    }
}

/// Does what the host says until the connection ends; the command is then hung up on.
fn obey(mut from: File, mut input: Input, pid: u32, ended: &AtomicBool) {
    while let Ok(Some(frame)) = ToAgent::read(&mut from) {
        match (frame, &mut input) {
            (ToAgent::Stdin(bytes), Input::Pipe(pipe)) => {
                let broken = pipe.as_mut().is_some_and(|pipe| pipe.write_all(&bytes).is_err());
                *pipe = pipe.take().filter(|_| !broken);
            }
            (ToAgent::Stdin(bytes), Input::Terminal(terminal)) => {
                let _ = terminal.write_all(&bytes);
            }
            (ToAgent::StdinEnd, Input::Pipe(pipe)) => *pipe = None,
            // End of file on a terminal is a control character.
            (ToAgent::StdinEnd, Input::Terminal(terminal)) => {
                let _ = terminal.write_all(&[4]);
            }
            (ToAgent::Resize(size), Input::Terminal(terminal)) => {
                let _ = terminal::resize(terminal, size);
            }
            (ToAgent::Signal(signal), _) if !ended.load(Ordering::SeqCst) => terminal::signal(pid, signal),
            _ => {}
        }
    }
    if !ended.load(Ordering::SeqCst) {
        terminal::signal(pid, libc::SIGHUP as u8);
    }
}
