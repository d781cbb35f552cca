//! Virtio entropy device (virtio 1.2, 5.4).

mod device;
mod saved;
#[cfg(test)]
mod tests;

pub use device::Rng;
