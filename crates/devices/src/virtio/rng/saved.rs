use minicbor::{Decode, Encode};

/// An entropy device has no state besides its queue; the type holds the place.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct SavedRng {}
