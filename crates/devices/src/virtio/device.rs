use std::sync::Arc;

use minicbor::{Decode, Encode};
use vireo_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

/// Where a virtqueue stands; enough to go on from there after a pause, a snapshot or a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct QueueState {
    #[n(0)]
    pub next_avail: u16,
    #[n(1)]
    pub next_used: u16,
}

/// Everything a device needs to serve one queue.
pub struct QueueResources {
    pub memory: GuestMemory,
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Guest-physical addresses of the three rings.
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    /// Feature bits that driver and device agreed on.
    pub features: u64,
    /// Signalled when the driver notifies this queue.
    pub kick: EventFd,
    /// Interrupts the driver for this queue (suppression by the rings is the queue's business).
    pub interrupt: Arc<dyn Fn() + Send + Sync>,
    /// Tells the driver that the configuration space changed.
    pub config_changed: Arc<dyn Fn() + Send + Sync>,
    /// To be called once the driver broke the rules of the queue ([`super::QueueError`]) and it is no longer
    /// served: the transport sets `DEVICE_NEEDS_RESET` and tells the driver (virtio 1.2, 2.1.2).
    pub broken: Arc<dyn Fn() + Send + Sync>,
    /// Set on restore and resume.
    pub state: Option<QueueState>,
}

#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    #[error("cannot start a thread for a virtqueue")]
    Thread(#[source] std::io::Error),
    #[error("the virtqueue's rings do not lie in guest memory")]
    BadRing,
    #[error("saved state of {device} does not fit: {why}")]
    BadState { device: &'static str, why: String },
}

/// A virtio device, whatever bus it is on. Queues are started and stopped one by one, and stopping returns
/// the queue's state: reset, pause, snapshot and migration are the same path.
///
/// Queue work runs on the device's own threads (usually one for each queue), never on a vCPU's.
/// All methods are called with the device locked, and must not wait for the guest.
pub trait VirtioDevice: Send {
    /// Device type id (virtio 1.2, section 5).
    fn device_type(&self) -> u16;
    /// Feature bits that the device offers; the transport adds `VIRTIO_F_VERSION_1`, `RING_EVENT_IDX` and `INDIRECT_DESC`.
    fn features(&self) -> u64;
    /// The largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device configuration space; bytes past its end are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Starts serving queue `index`. Called at most once until [`Self::stop_queue`].
    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), VirtioError>;
    /// Stops serving it, after every request that was taken from the ring is finished; `None` if it did not run.
    fn stop_queue(&mut self, index: usize) -> Option<QueueState>;
    /// Forgets everything that the driver set (all queues are stopped by then).
    fn reset(&mut self);
    /// The device's own state besides its queues, encoded (see the module's `saved` type).
    fn save(&self) -> Vec<u8>;
    fn restore(&mut self, saved: &[u8]) -> Result<(), VirtioError>;
}
