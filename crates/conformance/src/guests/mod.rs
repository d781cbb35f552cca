//! The guests, by what they are about.

pub mod code;
pub mod contention;
pub mod cpu;
pub mod exceptions;
pub mod interrupts;
pub mod io;
pub mod paging;
pub mod paravirtual;
pub mod protected;
pub mod real;
pub mod smp;
pub mod stepping;
pub mod timers;
pub mod user;
pub mod vectors;
