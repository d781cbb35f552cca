//! Virtio 1.2 devices and their PCI transport.

mod device;

pub use device::{QueueResources, QueueState, VirtioDevice, VirtioError};
