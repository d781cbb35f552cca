use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::BorrowedFd,
};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

/// What a backend takes over from the guest, in the terms of virtio 1.2, 5.1.3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames to the backend may carry a partial checksum (`VIRTIO_NET_F_CSUM`).
    pub checksum_in: bool,
    /// Frames from the backend may be marked as already checked or carry a partial checksum (`VIRTIO_NET_F_GUEST_CSUM`).
    pub checksum_out: bool,
    /// Frames to the backend may be TCP segments larger than the MTU (`VIRTIO_NET_F_HOST_TSO4/6`).
    pub segmentation_in: bool,
    /// Frames from the backend may be larger than the MTU (`VIRTIO_NET_F_GUEST_TSO4/6`).
    pub segmentation_out: bool,
}

/// The other end of a NIC. Frames are Ethernet frames without FCS, each preceded by a 12-byte
/// `virtio_net_hdr_v1` (virtio 1.2, 5.1.6), in both directions. In frames from the backend `num_buffers` is 1; a device
/// that merges receive buffers sets it to what it used.
///
/// `send` and `recv` never block; they are called from one thread each, which may differ.
pub trait Backend: Send + Sync {
    /// A frame from the guest, header first, in as many pieces as it came. Lost if there is no room, as on a wire.
    fn send(&self, frame: &[IoSlice<'_>]) -> io::Result<()>;
    /// The next frame for the guest, header first, scattered over `buffers`; returns its length, or `None`
    /// if there is none now (then [`Self::readable`] tells when). A frame that is longer than the buffers is dropped.
    fn recv(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>>;
    /// Becomes readable (level-triggered) while [`Self::recv`] has a frame to give.
    fn readable(&self) -> BorrowedFd<'_>;
    fn offloads(&self) -> Offloads;
    /// The driver settled on these, a subset of [`Self::offloads`]: what is not in here must not be sent to it.
    fn set_offloads(&self, negotiated: Offloads);
    /// The MTU that the guest should use, if it should know one (`VIRTIO_NET_F_MTU`).
    fn mtu(&self) -> Option<u16>;
}
