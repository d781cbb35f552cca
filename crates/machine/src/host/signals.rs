use std::{io, thread};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH},
    iterator::Signals,
};

/// A signal that a machine in the foreground cares about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Stop; the name of the signal that said so.
    Stop(&'static str),
    /// The terminal has another size.
    Resized,
}

const SIGNALS: [(i32, Signal); 4] = [
    (SIGTERM, Signal::Stop("SIGTERM")),
    (SIGINT, Signal::Stop("SIGINT")),
    (SIGHUP, Signal::Stop("SIGHUP")),
    (SIGWINCH, Signal::Resized),
];

/// From now on calls `handler`, on a thread of its own, for each signal in [`Signal`].
pub fn on_signals(handler: impl Fn(Signal) + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new(SIGNALS.map(|(number, _)| number))?;
    let serve = move || {
        for number in signals.forever() {
            if let Some((_, signal)) = SIGNALS.iter().find(|(n, _)| *n == number) {
                handler(*signal);
            }
        }
    };
    thread::Builder::new().name("vireo-signals".into()).spawn(serve)?;
    Ok(())
}
