//! Virtio socket device (virtio 1.2, 5.10): stream connections between programs in the guest and this process.
//!
//! One thread serves all queues and pumps all connections. On the host each connection is an end of a Unix
//! socket pair, so that host code reads, writes, polls and closes it like any other.

mod connection;
mod device;
mod host;
mod muxer;
mod packet;
mod saved;
#[cfg(test)]
mod tests;
mod thread;

pub use device::Vsock;
pub use host::{VsockHost, VsockListener};
