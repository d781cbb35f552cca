//! Builds a Debian image: `cargo run -p vireo-image --example build -- [SUITE] [PACKAGE]…`.
//!
//! `VIREO_STATE` names the state directory, `VIREO_DEBIAN_MIRROR` an archive instead of the host's,
//! `VIREO_ROOT_PASSWORD` a password for root at the console,
//! `VIREO_BUILD_IN_MEMORY` (0 or 1) where to install.
use std::{env, process::ExitCode, sync::Mutex, time::Instant};

use vireo_image::{BuildOptions, ImageStore, Progress, StateDir, Step};

struct Lines {
    start: Instant,
    last: Mutex<(&'static str, u64)>,
}

impl Progress for Lines {
    fn step(&self, step: Step, total: u64) {
        eprintln!("{:6.1} s  {} ({total})", self.start.elapsed().as_secs_f32(), step.title());
    }

    fn advance(&self, done: u64, total: u64) {
        let percent = (done * 100).checked_div(total).unwrap_or(0);
        let mut last = self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if percent / 25 != last.1 / 25 {
            eprintln!("          {percent} %");
        }
        last.1 = percent;
    }

    fn note(&self, text: &str) {
        eprintln!("          note: {text}");
    }
}

fn main() -> ExitCode {
    let state = env::var_os("VIREO_STATE").map_or_else(StateDir::default_for_user, StateDir::new);
    let mut words = env::args().skip(1);
    let suite = words.next();
    let options = BuildOptions {
        suite,
        packages: words.collect(),
        mirror: env::var("VIREO_DEBIAN_MIRROR").ok(),
        root_password: env::var("VIREO_ROOT_PASSWORD").ok(),
        in_memory: env::var("VIREO_BUILD_IN_MEMORY").ok().map(|value| value == "1"),
        ..BuildOptions::default()
    };
    let progress = Lines { start: Instant::now(), last: Mutex::new(("", 0)) };
    let built = ImageStore::open(state).map_err(Into::into).and_then(|store| store.build_debian(&options, &progress));
    match built {
        Ok(image) => {
            println!(
                "{}: {} packages, {} MiB on disk, {:.1} s",
                image.name,
                image.record.packages.len(),
                image.disk_usage_bytes() >> 20,
                progress.start.elapsed().as_secs_f32()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = cause {
                eprintln!("{error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}
