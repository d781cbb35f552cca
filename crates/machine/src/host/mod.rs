//! The host's side of a run in the foreground: terminal, signals.

mod escape;
mod input;
mod signals;
mod terminal;

pub use input::{InputError, Quit, forward_stdin};
pub use signals::{Signal, on_signals};
pub use terminal::Terminal;
