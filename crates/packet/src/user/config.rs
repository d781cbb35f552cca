//! What a user can say about a user-mode network.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use crate::{MacAddress, NetError};

/// The largest MTU that virtio and IPv4 leave room for; a multiple of 8, as fragments need it.
pub(crate) const LARGEST_MTU: u16 = 65520;
/// Below this IPv6 does not work (RFC 8200, section 5).
const SMALLEST_MTU: u16 = 1280;

/// A transport protocol that can be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A port of the host that leads to a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    pub protocol: Protocol,
    /// The address of the host to listen on.
    pub host_ip: IpAddr,
    /// 0 lets the host choose one; [`super::UserNet::forwards`] tells which.
    pub host_port: u16,
    /// `None` is the first guest of the network, as DHCP numbers them: 10.0.2.15.
    pub guest_ip: Option<IpAddr>,
    pub guest_port: u16,
}

/// Why a text is no port forward.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no port forward: {why}; write PROTOCOL:[HOSTADDRESS:]HOSTPORT:[GUESTADDRESS:]GUESTPORT, such as tcp:8080:80"
)]
pub struct ForwardError {
    text: String,
    why: &'static str,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.protocol, SocketAddr::new(self.host_ip, self.host_port))
    }
}

impl FromStr for Forward {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |why| ForwardError { text: text.to_owned(), why };
        let mut parts = split_outside_brackets(text).into_iter().peekable();
        let protocol = match parts.next() {
            Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            _ => return Err(fail("the protocol must be tcp or udp")),
        };
        let mut address = |default: Option<IpAddr>| match parts.peek().map(|part| parse_address(part)) {
            Some(Some(ip)) => {
                parts.next();
                (Some(ip), parts.next())
            }
            _ => (default, parts.next()),
        };
        let (host_ip, host_port) = address(Some(Ipv4Addr::LOCALHOST.into()));
        let (guest_ip, guest_port) = address(None);
        if parts.next().is_some() {
            return Err(fail("it has too many parts"));
        }
        let port = |part: Option<&str>| {
            part.filter(|p| p.bytes().all(|b| b.is_ascii_digit())).and_then(|p| p.parse::<u16>().ok())
        };
        let guest_port = port(guest_port).filter(|port| *port != 0);
        Ok(Self {
            protocol,
            host_ip: host_ip.unwrap_or(Ipv4Addr::LOCALHOST.into()),
            host_port: port(host_port).ok_or_else(|| fail("the host port must be a number from 0 to 65535"))?,
            guest_ip,
            guest_port: guest_port.ok_or_else(|| fail("the guest port must be a number from 1 to 65535"))?,
        })
    }
}

fn split_outside_brackets(text: &str) -> Vec<&str> {
    let mut inside = false;
    text.split(|c| {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            _ => {}
        }
        c == ':' && !inside
    })
    .collect()
}

fn parse_address(part: &str) -> Option<IpAddr> {
    match part.strip_prefix('[').and_then(|p| p.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => part.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
    }
}

/// A range of addresses, such as `192.168.0.0/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is no range of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no range of addresses: write an address and a prefix length, such as 192.168.0.0/16 or fd00::/8")]
pub struct SubnetError(String);

impl Subnet {
    pub const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Self {
        Self { address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix }
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let shift = 32 - u32::from(self.prefix.min(32));
                (u32::from(own) ^ u32::from(other)).checked_shr(shift).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let shift = 128 - u32::from(self.prefix.min(128));
                (u128::from(own) ^ u128::from(other)).checked_shr(shift).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || SubnetError(text.to_owned());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse::<u8>().map_err(|_| fail())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| fail())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.unwrap_or(longest);
        if prefix > longest { Err(fail()) } else { Ok(Self { address, prefix }) }
    }
}

/// A user-mode network. The default is what users of QEMU's `-netdev user` know, plus IPv6.
#[derive(Clone, Debug)]
pub struct UserNetConfig {
    pub forwards: Vec<Forward>,
    /// The name that DHCP gives the first guest.
    pub hostname: Option<String>,
    /// `None` takes the `search` line of the host's resolv.conf.
    pub search_domains: Option<Vec<String>>,
    /// `None` takes the `nameserver` lines of the host's resolv.conf, read again when it changes.
    pub dns_servers: Option<Vec<SocketAddr>>,
    /// Large frames are what makes it fast: the default is 65520.
    pub mtu: u16,
    /// No access to the outside at all, not even to DNS; only port forwards work.
    pub restrict: bool,
    /// The gateway's address leads to the host's loopback address.
    pub host_loopback: bool,
    pub ipv6: bool,
    /// Destinations that the guest must not reach. By default the link-local and unique-local addresses where
    /// clouds serve the credentials of the host.
    pub deny: Vec<Subnet>,
    /// The first address of the guest's /24. The gateway is .2, DNS is .3, the first guest .15.
    pub network: Ipv4Addr,
    /// The guest's /64. The gateway is ::2, DNS is ::3.
    pub network6: Ipv6Addr,
    pub gateway_mac: MacAddress,
}

impl Default for UserNetConfig {
    fn default() -> Self {
        Self {
            forwards: Vec::new(),
            hostname: None,
            search_domains: None,
            dns_servers: None,
            mtu: LARGEST_MTU,
            restrict: false,
            host_loopback: true,
            ipv6: true,
            deny: vec![
                Subnet::v4(169, 254, 0, 0, 16),
                Subnet { address: IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)), prefix: 128 },
                Subnet { address: IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)), prefix: 128 },
            ],
            network: Ipv4Addr::new(10, 0, 2, 0),
            network6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0),
            gateway_mac: MacAddress([0x52, 0x55, 10, 0, 2, 2]),
        }
    }
}

/// The addresses that follow from a [`UserNetConfig`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    pub network: Ipv4Addr,
    pub gateway: Ipv4Addr,
    pub dns: Ipv4Addr,
    pub guest: Ipv4Addr,
    pub broadcast: Ipv4Addr,
    pub network6: Ipv6Addr,
    pub gateway6: Ipv6Addr,
    pub dns6: Ipv6Addr,
    /// The source of router advertisements.
    pub link_local: Ipv6Addr,
}

impl Addresses {
    pub(crate) fn of(config: &UserNetConfig) -> Self {
        let [a, b, c, _] = config.network.octets();
        let host = |last| Ipv4Addr::new(a, b, c, last);
        let prefix = u128::from(config.network6) & !u128::from(u64::MAX);
        Self {
            network: host(0),
            gateway: host(2),
            dns: host(3),
            guest: host(15),
            broadcast: host(255),
            network6: Ipv6Addr::from(prefix),
            gateway6: Ipv6Addr::from(prefix | 2),
            dns6: Ipv6Addr::from(prefix | 3),
            link_local: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
        }
    }

    /// Whether guests may have this address.
    pub(crate) fn on_link(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(ip) => ip.octets()[..3] == self.network.octets()[..3],
            IpAddr::V6(ip) => {
                ip.segments()[..4] == self.network6.segments()[..4] || ip.segments()[0] & 0xffc0 == 0xfe80
            }
        }
    }

    /// Whether this is an address of the router itself.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(ip) => ip == self.gateway || ip == self.dns,
            IpAddr::V6(ip) => ip == self.gateway6 || ip == self.dns6 || ip == self.link_local,
        }
    }

    pub(crate) fn gateway_like(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(_) => self.gateway.into(),
            IpAddr::V6(_) => self.gateway6.into(),
        }
    }
}

impl UserNetConfig {
    pub(crate) fn check(&self) -> Result<(), NetError> {
        if !(SMALLEST_MTU..=LARGEST_MTU).contains(&self.mtu) {
            return Err(NetError::Mtu(self.mtu));
        }
        if self.network.octets()[3] != 0
            || self.network.is_multicast()
            || self.network.is_loopback()
            || self.network.octets()[0] == 0
        {
            return Err(NetError::Network(self.network));
        }
        if let Some(name) = self.hostname.as_deref().filter(|name| !is_host_name(name)) {
            return Err(NetError::HostName(name.to_owned()));
        }
        let addresses = Addresses::of(self);
        for forward in &self.forwards {
            if let Some(guest) = forward.guest_ip
                && (!addresses.on_link(guest) || addresses.is_own(guest))
            {
                let network = format!("{}/24", addresses.network);
                return Err(NetError::ForwardOutside { forward: *forward, guest, network });
            }
        }
        Ok(())
    }
}

/// RFC 1123, section 2.1.
pub(crate) fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.trim_end_matches('.').split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_in_all_shapes() {
        let of = |text: &str| text.parse::<Forward>().unwrap();
        let simple = of("tcp:8080:80");
        assert_eq!(simple.host_ip, IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert_eq!((simple.host_port, simple.guest_ip, simple.guest_port), (8080, None, 80));
        assert_eq!(simple.to_string(), "tcp:127.0.0.1:8080");
        let full = of("udp:0.0.0.0:53:10.0.2.16:5353");
        assert_eq!(full.protocol, Protocol::Udp);
        assert_eq!(full.host_ip, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        assert_eq!(full.guest_ip, Some("10.0.2.16".parse().unwrap()));
        let six = of("tcp:[::1]:0:[fd00::15]:22");
        assert_eq!(six.host_ip, "::1".parse::<IpAddr>().unwrap());
        assert_eq!((six.host_port, six.guest_ip), (0, Some("fd00::15".parse().unwrap())));
    }

    #[test]
    fn bad_forwards_say_why() {
        for (text, why) in [
            ("sctp:1:2", "protocol"),
            ("tcp", "host port"),
            ("tcp:80", "guest port"),
            ("tcp:80:0", "guest port"),
            ("tcp:+80:80", "host port"),
            ("tcp:70000:80", "host port"),
            ("tcp:1:2:3", "too many"),
            ("tcp:[::1:1:2", "host port"),
        ] {
            let error = text.parse::<Forward>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn subnets() {
        let net: Subnet = "192.168.0.0/16".parse().unwrap();
        assert!(net.contains("192.168.77.1".parse().unwrap()));
        assert!(!net.contains("192.169.0.1".parse().unwrap()));
        assert!(!net.contains("::1".parse().unwrap()));
        assert!("0.0.0.0/0".parse::<Subnet>().unwrap().contains("8.8.8.8".parse().unwrap()));
        assert!("fd00::/8".parse::<Subnet>().unwrap().contains("fdff::1".parse().unwrap()));
        assert!("1.2.3.4/33".parse::<Subnet>().is_err());
    }

    #[test]
    fn bad_configurations() {
        let with = |change: fn(&mut UserNetConfig)| {
            let mut config = UserNetConfig::default();
            change(&mut config);
            config.check()
        };
        assert!(with(|_| {}).is_ok());
        assert!(matches!(with(|c| c.mtu = 576), Err(NetError::Mtu(576))));
        assert!(matches!(with(|c| c.hostname = Some("a b".into())), Err(NetError::HostName(_))));
        assert!(matches!(with(|c| c.network = Ipv4Addr::new(10, 0, 2, 7)), Err(NetError::Network(_))));
        assert!(matches!(
            with(|c| c.forwards = vec!["tcp:1:9.9.9.9:1".parse().unwrap()]),
            Err(NetError::ForwardOutside { .. })
        ));
    }
}
