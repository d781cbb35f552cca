//! `vireo run`: a machine from an image, for as long as a command or a shell runs in it.

mod console;
mod session;

use std::{
    net::Ipv4Addr,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::anyhow;
use vireo_api::{ByteSize, ExitCode};
use vireo_guest_protocol::{READY_PORT, VERSION};
use vireo_image::Image;
use vireo_machine::{
    Control, Handles, MachineError, Outcome, Report, VsockListener,
    config::{Accel, BootConfig, DiskConfig, MachineConfig, NicBackend, NicConfig, VsockConfig},
};

use self::{console::Console, session::Terminal};
use crate::{exit::Failure, image, state::StateArgs};

/// What the guest's vsock device answers to; nobody but this process talks to it.
const GUEST_CID: u32 = 3;
/// How long a command waits for the guest's network, if the machine has one.
const NETWORK_WAIT_MS: u32 = 15_000;
/// How long a guest that was asked to power off may take before it is stopped.
const POWER_OFF: Duration = Duration::from_secs(10);
/// How long a guest may take to go down once its agent is gone.
const GOING_DOWN: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
#[command(after_help = "\
Everything that the machine writes to its own disk is gone when it ends. Without a command a shell runs in the guest.

The exit code is the command's: 128 + N where signal N killed it, 127 where there is no such command, 126 where it \
cannot be run. Besides, 1 is a failure before the command ran, 2 wrong usage, 3 a file that is not what it should be, \
120 a guest crash, 121 a guest reset, 122 a guest kernel panic, 123 a host failure and 124 a guest agent that did not \
come up in time.")]
pub struct Args {
    /// Image: debian, debian:bookworm, or the name of an image of your own
    image: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Guest memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    memory: ByteSize,
    /// CPU engine: auto takes KVM where it is fast
    #[arg(long, value_name = "auto|kvm|soft", default_value = "auto")]
    accel: Accel,
    /// Network card: user[,fwd=tcp:HOSTPORT:GUESTPORT]…, tap=NAME or none
    #[arg(long = "net", value_name = "user|tap=NAME|none", default_value = "user")]
    net: Vec<String>,
    /// Another disk: PATH[,format=raw|qcow2][,ro]; what is written to it stays
    #[arg(long = "disk", value_name = "PATH[,…]")]
    disks: Vec<DiskConfig>,
    /// Set a variable in the command's environment
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Run the command as this user of the guest
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,
    /// Run the command in this folder of the guest
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Give the command a terminal (a shell gets one anyway if there is one here)
    #[arg(short, long)]
    tty: bool,
    /// Show the guest's console while it boots, and how long that took on which engine
    #[arg(short, long)]
    verbose: bool,
    /// Seconds that the guest may take to boot
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    boot_timeout: u64,
    /// Command to run in the guest, and its arguments
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Returns the command's exit status.
pub fn run(args: Args, state: &StateArgs) -> Result<u8, Failure> {
    let mut exec = session::request(&args.command, &args.environment, args.user.clone(), args.workdir.clone())?;
    let store = state.store()?;
    let image = image::find_or_build(&store, &args.image)?;
    let console = Console::new(args.verbose);
    let config = machine_config(&args, &image, state, &console)?;
    let control = Control::default();
    exec.network_wait_ms = (!config.nics.is_empty()).then_some(NETWORK_WAIT_MS);
    let started = Instant::now();
    let machine = Running::start(config, &control)?;
    let signals = session::Signals::install(&control)?;

    let vsock = machine.handles()?.vsock.clone().ok_or_else(|| host_failure("the machine has no vsock device"))?;
    let listener = vsock
        .listen(READY_PORT)
        .map_err(|e| Failure::new(ExitCode::HostFailure, anyhow!(e).context("cannot listen for the guest agent")))?;
    let deadline = Instant::now() + Duration::from_secs(args.boot_timeout);
    let ready = loop {
        match listener.accept(Duration::from_millis(50)) {
            Ok(stream) => break session::read_ready(stream, deadline)?,
            Err(_) if machine.is_over() => return Err(machine.ended_early(&console, signals.stopped())),
            Err(_) if Instant::now() > deadline => {
                control.stop();
                let _ = machine.wait();
                let why = format!(
                    "the agent in the guest did not come up within {} s; run with --verbose to watch it boot, or \
                     give it longer with --boot-timeout",
                    args.boot_timeout
                );
                return Err(Failure::new(ExitCode::AgentTimeout, anyhow!(why)));
            }
            Err(_) => {}
        }
    };
    if ready.version != VERSION {
        control.stop();
        let why = format!(
            "the agent in image '{}' speaks protocol {}, this vireo {VERSION}: build the image again",
            image.name, ready.version
        );
        return Err(Failure::new(ExitCode::Failed, anyhow!(why)));
    }
    console.quiet();
    if args.verbose {
        let choice = machine.engine();
        eprintln!(
            "vireo: {} booted in {:.1} s on the {} engine{}",
            image.name,
            started.elapsed().as_secs_f64(),
            choice.as_ref().map_or("unknown", |c| c.kind.name()),
            choice.map_or(String::new(), |c| format!(" ({})", c.why)),
        );
    }
    let terminal = Terminal::wanted(args.tty, args.command.is_empty())?;
    let result = session::run(&vsock, exec, terminal, &signals, || machine.is_over());
    let status = match result {
        Ok(status) => status,
        Err(failure) if failure.code() == ExitCode::HostFailure && is_going_down(&machine, &listener) => {
            return Err(machine.ended_early(&console, signals.stopped()));
        }
        Err(failure) => {
            control.stop();
            let _ = machine.wait();
            return Err(failure);
        }
    };
    let _asked = session::power_off(&vsock);
    machine.wait_or_stop(&control, POWER_OFF)?;
    Ok(status)
}

/// A guest that powers off or crashes breaks the connection to its agent before it is gone. If it was the agent alone
/// that died, the next one announces itself.
fn is_going_down(machine: &Running, listener: &VsockListener) -> bool {
    let deadline = Instant::now() + GOING_DOWN;
    while !machine.is_over() && Instant::now() < deadline {
        if listener.accept(Duration::from_millis(20)).is_ok() {
            return false;
        }
    }
    machine.is_over()
}

fn host_failure(what: &str) -> Failure {
    Failure::new(ExitCode::HostFailure, anyhow!(what.to_owned()))
}

fn machine_config(args: &Args, image: &Image, state: &StateArgs, console: &Console) -> Result<MachineConfig, Failure> {
    let usage = |e: anyhow::Error| Failure::new(ExitCode::Usage, e);
    let scratch = state.dir().path().join("tmp");
    std::fs::create_dir_all(&scratch).map_err(|e| {
        let what = format!("cannot make the folder '{}' for the machine's temporary disk", scratch.display());
        Failure::new(ExitCode::Failed, anyhow!(e).context(what))
    })?;
    let mut root = DiskConfig::new(&image.root);
    root.ephemeral = Some(scratch);
    root.format = Some(match image.format {
        vireo_image::DiskFormat::Raw => vireo_machine::config::Format::Raw,
        vireo_image::DiskFormat::Qcow2 => vireo_machine::config::Format::Qcow2,
    });
    let mut disks = vec![root];
    disks.extend(args.disks.iter().cloned());
    let nics: Result<Vec<_>, _> = args.net.iter().map(|text| NicConfig::parse(text)).collect();
    let nics: Vec<_> = nics.map_err(|e| usage(e.into()))?.into_iter().flatten().collect();
    let boot = BootConfig {
        kernel: image.kernel.clone(),
        initrd: Some(image.initrd.clone()),
        cmdline: format!("{} panic=-1{}", image.cmdline, nics.first().map_or(String::new(), network_parameter)),
        decompressor: None,
    };
    Ok(MachineConfig {
        vcpus: args.cpus,
        memory: args.memory,
        accel: args.accel,
        disks,
        nics,
        serial: Some(console.stream()),
        vsock: Some(VsockConfig { guest_cid: GUEST_CID }),
        reboot: false,
        ..MachineConfig::new(boot)
    })
}

/// Tells the image's initrd what the user-mode network will say by DHCP, so that a command has its network from the
/// start: systemd takes seconds until it asks. Other networks are the guest's to find out about.
fn network_parameter(nic: &NicConfig) -> String {
    let NicBackend::User(user) = &nic.backend else { return String::new() };
    // See `UserNetConfig::network` for the last bytes.
    let at = |host: u8| {
        let [a, b, c, _] = user.network.octets();
        Ipv4Addr::new(a, b, c, host)
    };
    format!(" ip={}::{}:255.255.255.0::eth0:off:{}", at(15), at(2), at(3))
}

/// A machine that runs on a thread of its own.
struct Running {
    thread: thread::JoinHandle<Result<Report, MachineError>>,
    built: mpsc::Receiver<(Handles, vireo_machine::engine::Choice)>,
    first: std::cell::OnceCell<(Handles, vireo_machine::engine::Choice)>,
}

impl Running {
    fn start(config: MachineConfig, control: &Control) -> Result<Self, Failure> {
        let (tell, built) = mpsc::channel();
        let control = control.clone();
        let run = move || {
            vireo_machine::run(&config, &control, |machine| {
                let _ = tell.send((machine.handles().clone(), machine.engine().clone()));
            })
        };
        let thread = thread::Builder::new().name("vireo-machine".into()).spawn(run).map_err(|e| {
            Failure::new(ExitCode::HostFailure, anyhow!(e).context("cannot start a thread for the machine"))
        })?;
        let running = Self { thread, built, first: std::cell::OnceCell::new() };
        match running.built.recv() {
            Ok(first) => {
                let _ = running.first.set(first);
                Ok(running)
            }
            // It ended before it was built: its error says why.
            Err(_) => Err(running.wait().err().unwrap_or_else(|| host_failure("the machine ended before it began"))),
        }
    }

    fn handles(&self) -> Result<&Handles, Failure> {
        self.first.get().map(|(handles, _)| handles).ok_or_else(|| host_failure("the machine was not built"))
    }

    fn engine(&self) -> Option<vireo_machine::engine::Choice> {
        self.first.get().map(|(_, choice)| choice.clone())
    }

    fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    fn wait(self) -> Result<Report, Failure> {
        match self.thread.join() {
            Ok(Ok(report)) => {
                report.disk_failures.iter().for_each(|failure| eprintln!("vireo: {failure}"));
                Ok(report)
            }
            Ok(Err(error)) => Err(Failure::new(error.exit_code(), error)),
            Err(_) => Err(host_failure("the machine's thread panicked; this is a bug in Vireo")),
        }
    }

    fn ends_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.is_over() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.is_over()
    }

    /// Waits for the guest to power off; stops it if that takes too long.
    fn wait_or_stop(self, control: &Control, limit: Duration) -> Result<(), Failure> {
        self.ends_within(limit);
        control.stop();
        self.wait().map(|_| ())
    }

    /// What to say of a machine that ended while it was still wanted.
    fn ended_early(self, console: &Console, by_signal: bool) -> Failure {
        let (tail, panicked) = (console.tail(), console.shows_panic());
        let report = match self.wait() {
            Ok(report) => report,
            Err(failure) => return failure,
        };
        let (code, why) = match report.outcome {
            Outcome::Stopped if by_signal => return Failure::new(ExitCode::Failed, anyhow!("stopped by a signal")),
            Outcome::Stopped => return Failure::new(ExitCode::Failed, anyhow!("the machine was stopped")),
            Outcome::PowerOff => (ExitCode::Failed, "the guest powered off before the command was done".to_owned()),
            // Kernels that cannot report a panic only restart after it.
            Outcome::Reset if panicked => (ExitCode::GuestPanic, "the guest's kernel panicked".to_owned()),
            Outcome::Reset => (ExitCode::GuestReset, "the guest reset before the command was done".to_owned()),
            Outcome::Panic => (ExitCode::GuestPanic, "the guest's kernel panicked".to_owned()),
            Outcome::Crash(crash) => (
                ExitCode::GuestCrash,
                format!("the guest crashed: {} on vCPU {} at {:#x}", crash.reason, crash.vcpu, crash.rip),
            ),
        };
        let said = if tail.is_empty() { String::new() } else { format!("; its last words on the console:\n{tail}") };
        Failure::new(code, anyhow!("{why}{said}"))
    }
}
