//! Where a packet of the guest may go.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::config::{Addresses, Subnet, UserNetConfig};

/// Where a destination leads, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The router itself; TCP and UDP go on to the host's loopback address.
    Gateway,
    /// The DNS forwarder.
    Dns,
    /// Somewhere outside, by a socket of the host.
    Outside(IpAddr),
    /// Not allowed by the configuration.
    Prohibited,
    /// On the guest's own network, but nobody has the address.
    Nobody,
    /// Multicast, broadcast and what cannot be a destination.
    Ignored,
}

pub(crate) struct Policy {
    addresses: Addresses,
    restrict: bool,
    host_loopback: bool,
    deny: Vec<Subnet>,
}

impl Policy {
    pub(crate) fn of(config: &UserNetConfig) -> Self {
        let addresses = Addresses::of(config);
        Self { addresses, restrict: config.restrict, host_loopback: config.host_loopback, deny: config.deny.clone() }
    }

    pub(crate) fn route(&self, destination: IpAddr) -> Route {
        let own = &self.addresses;
        if is_no_destination(destination)
            || destination == IpAddr::V4(own.broadcast)
            || destination == IpAddr::V4(own.network)
        {
            return Route::Ignored;
        }
        if destination == IpAddr::V4(own.dns) || destination == IpAddr::V6(own.dns6) {
            return Route::Dns;
        }
        if own.is_own(destination) {
            return Route::Gateway;
        }
        if own.on_link(destination) {
            return Route::Nobody;
        }
        if self.restrict || self.deny.iter().any(|subnet| subnet.contains(destination)) {
            return Route::Prohibited;
        }
        Route::Outside(destination)
    }

    /// The host's side of a TCP or UDP destination that is not DNS.
    pub(crate) fn host_target(&self, destination: SocketAddr) -> Option<SocketAddr> {
        match self.route(destination.ip()) {
            Route::Outside(ip) => Some(SocketAddr::new(ip, destination.port())),
            Route::Gateway if self.host_loopback && !self.restrict => {
                let loopback = match destination {
                    SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
                };
                Some(SocketAddr::new(loopback, destination.port()))
            }
            _ => None,
        }
    }

    pub(crate) fn dns_allowed(&self) -> bool {
        !self.restrict
    }

    pub(crate) fn outside_allowed(&self) -> bool {
        !self.restrict
    }
}

/// Loopback addresses above all: they would lead to the host's own services.
fn is_no_destination(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_multicast() || ip.is_broadcast() || ip.octets()[0] == 0,
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_multicast() || ip.is_unspecified() || ip.to_ipv4_mapped().is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(config: &UserNetConfig, ip: &str) -> Route {
        Policy::of(config).route(ip.parse().unwrap())
    }

    #[test]
    fn destinations() {
        let config = UserNetConfig { deny: vec!["192.0.2.0/24".parse().unwrap()], ..UserNetConfig::default() };
        for (ip, expected) in [
            ("10.0.2.2", Route::Gateway),
            ("fd00::2", Route::Gateway),
            ("fe80::2", Route::Gateway),
            ("10.0.2.3", Route::Dns),
            ("fd00::3", Route::Dns),
            ("10.0.2.15", Route::Nobody),
            ("10.0.2.255", Route::Ignored),
            ("127.0.0.1", Route::Ignored),
            ("::1", Route::Ignored),
            ("::ffff:127.0.0.1", Route::Ignored),
            ("0.0.0.0", Route::Ignored),
            ("255.255.255.255", Route::Ignored),
            ("224.0.0.1", Route::Ignored),
            ("ff02::1", Route::Ignored),
            ("192.0.2.77", Route::Prohibited),
            ("198.51.100.1", Route::Outside("198.51.100.1".parse().unwrap())),
            ("2001:db8::1", Route::Outside("2001:db8::1".parse().unwrap())),
        ] {
            assert_eq!(route(&config, ip), expected, "{ip}");
        }
        assert_eq!(route(&UserNetConfig::default(), "169.254.169.254"), Route::Prohibited);
        let closed = UserNetConfig { restrict: true, ..UserNetConfig::default() };
        assert_eq!(route(&closed, "198.51.100.1"), Route::Prohibited);
        assert_eq!(Policy::of(&closed).host_target("10.0.2.2:80".parse().unwrap()), None);
        let target = Policy::of(&config).host_target("[fd00::2]:80".parse().unwrap());
        assert_eq!(target, Some("[::1]:80".parse().unwrap()));
    }
}
