//! Virtio 1.2 devices and their PCI transport.

mod chain;
mod cursor;
mod device;
pub mod features;
mod queue;

pub use chain::DescriptorChain;
pub use cursor::{Reader, ShortChain, Writer};
pub use device::{QueueResources, QueueState, VirtioDevice, VirtioError};
pub use queue::{MAX_QUEUE_SIZE, Queue, QueueError};
