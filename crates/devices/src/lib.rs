//! Device models: chipset, PCI and virtio.
#![allow(unsafe_code)]

pub mod bus;
pub mod interrupt;
pub mod ioapic;
pub mod pci;
pub mod power;
pub mod rtc;
pub mod saved;
pub mod serial;
pub mod virtio;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod fake_engine;
#[cfg(test)]
mod fake_pin;
#[cfg(test)]
mod tests;
