//! What every part of the router works with.

use std::{net::SocketAddr, time::Instant};

use super::{link::Link, poller::Poller, resolver::Resolver, route::Policy};

pub(crate) struct Shared {
    pub link: Link,
    pub poller: Poller,
    pub policy: Policy,
    pub resolver: Resolver,
    /// When this round of work began.
    pub now: Instant,
}

/// The two ends of a connection or an exchange of datagrams, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FlowKey {
    pub guest: SocketAddr,
    pub remote: SocketAddr,
}
