//! The `vireo` command: reads the command line, calls, and turns the result into an exit code.

mod boot;
mod exit;

use std::{process::ExitCode, time::Instant};

use clap::{Parser, Subcommand};

/// Runs virtual machines, with or without hardware virtualization.
#[derive(Parser)]
#[command(name = "vireo", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a kernel of your own, with your own disks, in the foreground
    Boot(boot::Args),
}

fn main() -> ExitCode {
    let started = Instant::now();
    let result = match Cli::parse().command {
        Command::Boot(args) => boot::run(args, started),
    };
    exit::report(result)
}
