use minicbor::{Decode, Encode};

/// State of a [`super::Vsock`] besides its queues. Connections do not survive a snapshot: the driver is told so by
/// a transport reset and then reads its CID again (virtio 1.2, 5.10.6.7).
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct SavedVsock {}
