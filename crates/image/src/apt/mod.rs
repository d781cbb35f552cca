//! What the host's own apt configuration says: archives, keys and proxies.

pub mod config;
pub mod sources;
