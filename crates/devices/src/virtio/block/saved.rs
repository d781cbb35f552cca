use minicbor::{Decode, Encode};

/// State of a [`super::Block`] besides its queues.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct SavedBlock {
    #[n(0)]
    pub writeback: bool,
    /// The disk that the guest knows; another one would corrupt its file systems.
    #[n(1)]
    pub size_bytes: u64,
    #[n(2)]
    pub read_only: bool,
}
