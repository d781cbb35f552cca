//! Virtio 1.2 devices and their PCI transport.

pub mod block;
mod chain;
mod config;
pub mod console;
mod cursor;
mod device;
#[cfg(test)]
mod fake_driver;
pub mod features;
pub mod net;
pub mod pci;
mod queue;
pub mod rng;
mod saved;
mod serve;
pub mod vsock;
mod worker;

pub use chain::DescriptorChain;
pub use cursor::{Reader, ShortChain, Writer};
pub use device::{QueueResources, QueueState, VirtioDevice, VirtioError};
pub use queue::{MAX_QUEUE_SIZE, Queue, QueueError};
