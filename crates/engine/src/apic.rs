//! Local APICs and the messages between them (Intel SDM vol. 3, chapter 11).
//!
//! Each vCPU has a [`LocalApic`]; the [`ApicBus`] joins them. Anyone may deliver an interrupt to any of them at any
//! time: that is a few atomic operations and, where the vCPU sleeps, a wake-up. Everything else (registers,
//! acknowledging, end of interrupt, timer) is called by the owning vCPU's thread.

mod bus;
mod local;
mod registers;
mod state;
mod timer;

#[cfg(test)]
mod tests;

pub use bus::{ApicBus, Delivery, Destination, Message};
pub use local::LocalApic;
pub use registers::{MSR_APIC_BASE, MSR_TSC_DEADLINE, is_apic_msr};
