//! Virtio block device (virtio 1.2, 5.2).

mod device;
mod request;
mod saved;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Block, BlockConfig};
