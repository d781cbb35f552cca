//! Virtio network device (virtio 1.2, 5.1): one queue pair and a control queue.

mod control;
mod device;
mod header;
mod link;
mod rx;
mod saved;
#[cfg(test)]
mod tests;
mod tx;

pub use device::Net;
pub use link::Link;
