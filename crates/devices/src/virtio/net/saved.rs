use minicbor::{Decode, Encode};

/// State of a [`super::Net`] besides its queues.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct SavedNet {
    /// The address that the driver uses now.
    #[n(0)]
    pub mac: [u8; 6],
    #[n(1)]
    pub link_up: bool,
    /// What the driver set by `VIRTIO_NET_CTRL_GUEST_OFFLOADS`, if it did.
    #[n(2)]
    pub guest_offloads: Option<u64>,
}
