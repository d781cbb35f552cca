//! The programs that are compared, told to run the same machine.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{
    guest::{FAILED, READY},
    process::{self, Finished},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Vireo's own engine, QEMU's TCG
    Soft,
    Kvm,
}

pub struct Qemu {
    program: String,
    version: String,
}

impl Qemu {
    /// `None` if it does not run.
    pub fn find(program: &str) -> Option<Self> {
        let output = Command::new(program).arg("--version").output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let version = text.lines().next()?.strip_prefix("QEMU emulator version ")?;
        Some(Self { program: program.into(), version: version.into() })
    }
}

pub enum Vmm {
    Qemu { qemu: Qemu, accel: Accel },
    Vireo { program: PathBuf, accel: Accel },
}

/// A machine with a console on its serial port, and what is said here.
pub struct Machine<'a> {
    pub kernel: &'a Path,
    pub ramdisk: &'a Path,
    pub memory_mib: u64,
    /// The file and its format.
    pub disk: Option<(&'a Path, &'static str)>,
    pub user_network: bool,
    pub cpus: u32,
    /// All instructions that the VMM has. QEMU's default CPU is one of 2003; Vireo's has them anyway.
    pub all_features: bool,
}

impl<'a> Machine<'a> {
    pub fn new(kernel: &'a Path, ramdisk: &'a Path, memory_mib: u64) -> Self {
        Self { kernel, ramdisk, memory_mib, disk: None, user_network: false, cpus: 1, all_features: false }
    }
}

/// With `quiet` the console costs nobody anything but the lines that are looked for.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";

impl Vmm {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Qemu { accel: Accel::Soft, .. } => "QEMU TCG",
            Self::Qemu { accel: Accel::Kvm, .. } => "QEMU KVM",
            Self::Vireo { accel: Accel::Soft, .. } => "Vireo soft",
            Self::Vireo { accel: Accel::Kvm, .. } => "Vireo KVM",
        }
    }

    pub fn is_vireo(&self) -> bool {
        matches!(self, Self::Vireo { .. })
    }

    pub fn version(&self) -> String {
        match self {
            Self::Qemu { qemu, .. } => qemu.version.clone(),
            Self::Vireo { program, .. } => {
                let output = Command::new(program).arg("--version").output();
                output.map_or_else(|_| String::new(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
            }
        }
    }

    /// Runs the machine until it powers off; fails if it breaks, its init did not run or a step of it failed.
    pub fn run(&self, machine: &Machine<'_>) -> Result<Finished> {
        let finished = self.try_run(machine)?;
        let console = || process::tail(&finished.lines);
        if let Err(why) = &finished.ended {
            bail!("{why}\nits console:\n{}", console());
        }
        if finished.line(FAILED).is_some() {
            bail!("the guest failed; its console:\n{}", console());
        }
        Ok(finished)
    }

    /// Runs the machine until it ends in whatever way; fails if its init did not run.
    pub fn try_run(&self, machine: &Machine<'_>) -> Result<Finished> {
        let mut command = match self {
            Self::Qemu { qemu, accel } => qemu_command(&qemu.program, *accel, machine),
            Self::Vireo { program, accel } => vireo_command(program, *accel, machine),
        };
        let finished = process::run(&mut command, machine.memory_mib << 20)?;
        if finished.line(READY).is_none() {
            let why = finished.ended.err().unwrap_or_default();
            bail!("the guest's init did not run. {why}\nits console:\n{}", process::tail(&finished.lines));
        }
        Ok(finished)
    }
}

fn qemu_command(program: &str, accel: Accel, machine: &Machine<'_>) -> Command {
    let mut command = Command::new(program);
    command.args(["-M", "q35", "-nographic", "-nodefaults", "-no-user-config", "-serial", "stdio", "-no-reboot"]);
    match accel {
        Accel::Soft if machine.all_features => command.args(["-accel", "tcg", "-cpu", "max"]),
        Accel::Soft => command.args(["-accel", "tcg"]),
        Accel::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
    };
    command.arg("-m").arg(format!("{}M", machine.memory_mib)).arg("-smp").arg(machine.cpus.to_string());
    command.arg("-kernel").arg(machine.kernel).arg("-initrd").arg(machine.ramdisk).args(["-append", COMMAND_LINE]);
    if let Some((path, format)) = machine.disk {
        let path = path.display().to_string().replace(',', ",,");
        command.arg("-drive").arg(format!("if=none,id=disk,format={format},file={path}"));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
    }
    if machine.user_network {
        command.args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]);
    }
    command
}

fn vireo_command(program: &Path, accel: Accel, machine: &Machine<'_>) -> Command {
    let mut command = Command::new(program);
    command.args(["boot", "--accel", if accel == Accel::Soft { "soft" } else { "kvm" }]);
    command.arg("--memory").arg(format!("{}M", machine.memory_mib)).arg("--cpus").arg(machine.cpus.to_string());
    command.arg("--kernel").arg(machine.kernel).arg("--initrd").arg(machine.ramdisk).args(["--append", COMMAND_LINE]);
    if let Some((path, format)) = machine.disk {
        let path = path.display().to_string().replace(',', ",,");
        command.arg("--disk").arg(format!("{path},format={format}"));
    }
    if machine.user_network {
        command.args(["--net", "user"]);
    }
    command
}
