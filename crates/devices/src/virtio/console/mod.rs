//! Virtio console device (virtio 1.2, 5.3): one port, with its size.

mod device;
mod input;
mod output;
mod saved;
#[cfg(test)]
mod tests;

pub use device::{Console, ConsoleSize};
