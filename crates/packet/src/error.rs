use std::io;

use crate::user::Forward;

/// Why a NIC backend could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error(
        "port {port} is busy: something listens on {forward} already, another program or another forward; stop it or choose another host port"
    )]
    PortBusy { port: u16, forward: Forward, source: io::Error },
    #[error("port {port} needs privileges: {forward} is below 1024; choose a host port of 1024 or more")]
    PortPrivileged { port: u16, forward: Forward, source: io::Error },
    #[error(
        "the host address of {forward} is not an address of this host; use 127.0.0.1 or one that `ip address` lists"
    )]
    NoSuchHostAddress { forward: Forward, source: io::Error },
    #[error("cannot listen for {forward}")]
    Forward { forward: Forward, source: io::Error },
    #[error("{forward} leads to {guest}, which is not an address of the guest's network {network}")]
    ForwardOutside { forward: Forward, guest: std::net::IpAddr, network: String },
    #[error("an MTU of {0} is out of range: use 1280 to 65520")]
    Mtu(u16),
    #[error("'{0}' is no host name: use letters, digits, '-' and '.', at most 63 in a row")]
    HostName(String),
    #[error("{0} is no network for guests: use a /24 of unicast addresses that ends in .0")]
    Network(std::net::Ipv4Addr),
    #[error("cannot set up the user-mode network: {what}")]
    Setup { what: &'static str, source: io::Error },

    #[error("'{0}' is no name of a tap device: 1 to 15 characters without '/', ':', '%' and spaces")]
    TapName(String),
    #[error(
        "there is no tap device {0}; make it as root: ip tuntap add mode tap user YOUR-NAME name {0} && ip link set {0} up"
    )]
    NoTap(String),
    #[error("the tap device '{0}' is busy: another program, perhaps another VM, has it open")]
    TapBusy(String),
    #[error("'{0}' is a network device but no tap device; make one with `ip tuntap add dev NAME mode tap`")]
    NotATap(String),
    #[error(
        "no tap device '{0}' that this user may open; make it with `ip tuntap add dev {0} mode tap user $USER`, or run as root"
    )]
    TapPermission(String),
    #[error("cannot open /dev/net/tun: {advice}")]
    TunDevice { advice: &'static str, source: io::Error },
    #[error("cannot configure the tap device '{name}': {what} failed")]
    Tap { name: String, what: &'static str, source: io::Error },
}
