use minicbor::{Decode, Encode};

/// State of a [`super::Console`] besides its queues.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct SavedConsole {
    #[n(0)]
    pub columns: u16,
    #[n(1)]
    pub rows: u16,
    /// What the guest wrote and the other end has not taken yet.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub unwritten: Vec<u8>,
}
