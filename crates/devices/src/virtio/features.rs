//! Feature bits that belong to queues and transport (virtio 1.2, section 6).

/// `VIRTIO_F_INDIRECT_DESC`
pub const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_RESET`
pub const RING_RESET: u64 = 1 << 40;

/// What the transport offers for every device.
pub const TRANSPORT: u64 = INDIRECT_DESC | RING_EVENT_IDX | VERSION_1 | RING_RESET;
