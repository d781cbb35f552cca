//! How far a build is: a bar on a terminal, a line a step elsewhere. Ctrl-C cancels.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use vireo_image::{Progress, Step};
use vireo_machine::host::{Signal, on_signals};

pub struct Bar {
    bar: ProgressBar,
    on_terminal: bool,
    cancelled: Arc<AtomicBool>,
}

impl Bar {
    pub fn new(on_terminal: bool) -> io::Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = cancelled.clone();
        on_signals(move |signal| {
            if let Signal::Stop(_) = signal {
                flag.store(true, Ordering::Relaxed);
            }
        })?;
        let bar = if on_terminal { ProgressBar::no_length() } else { ProgressBar::hidden() };
        // Nothing is drawn in the library's own style before the first step has one.
        bar.set_style(Self::style("{msg}"));
        Ok(Self { bar, on_terminal, cancelled })
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn style(template: &str) -> ProgressStyle {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
    }
}

impl Progress for Bar {
    fn step(&self, step: Step, total: u64) {
        if !self.on_terminal {
            eprintln!("{}", step.title());
            return;
        }
        self.bar.reset();
        self.bar.set_message(step.title());
        self.bar.set_position(0);
        if total == 0 {
            self.bar.set_style(Self::style("{msg} {spinner}"));
            self.bar.enable_steady_tick(Duration::from_millis(120));
            return;
        }
        self.bar.disable_steady_tick();
        self.bar.set_length(total);
        self.bar.set_style(Self::style(if step.counts_bytes() {
            "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}"
        } else {
            "{msg} [{bar:30}] {pos}/{len}"
        }));
    }

    fn advance(&self, done: u64, total: u64) {
        if total > 0 {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
