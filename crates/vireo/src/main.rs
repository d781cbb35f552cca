//! The `vireo` command: reads the command line, calls, and turns the result into an exit code.

mod agent;
mod boot;
mod doctor;
mod exit;
mod image;
mod run;
mod state;

use std::{process::ExitCode, time::Instant};

use clap::{Parser, Subcommand};

/// Runs virtual machines, with or without hardware virtualization.
#[derive(Parser)]
#[command(name = "vireo", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    state: state::StateArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a kernel of your own, with your own disks, in the foreground
    Boot(boot::Args),
    /// Run a command, or a shell, in a machine of its own that is gone afterwards
    Run(run::Args),
    /// Build, list, show and remove images
    #[command(subcommand)]
    Image(image::Command),
    /// Check what this host offers, and say how to get what it lacks
    Doctor,
}

fn main() -> ExitCode {
    let started = Instant::now();
    let Cli { state, command } = Cli::parse();
    let result = match command {
        Command::Boot(args) => boot::run(args, started).map(|code| code as u8),
        Command::Run(args) => run::run(args, &state),
        Command::Image(command) => image::run(command, &state).map(|code| code as u8),
        Command::Doctor => doctor::run(&state).map(|code| code as u8),
    };
    exit::report(result)
}
