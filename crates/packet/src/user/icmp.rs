//! What the router says by ICMP: answers to pings of itself, and why something cannot be reached.

use std::{io, net::IpAddr};

use super::{
    link::Link,
    packet::{self, Packet},
};

/// Why a packet was not delivered, in ICMP's words (RFC 792, RFC 1812 5.2.7.1, RFC 4443 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreachable {
    Network,
    Host,
    Port,
    Prohibited,
}

impl Unreachable {
    fn code(self, destination: IpAddr) -> u8 {
        match (self, destination) {
            (Self::Network, _) => 0,
            (Self::Host, IpAddr::V4(_)) => 1,
            (Self::Port, IpAddr::V4(_)) => 3,
            (Self::Prohibited, IpAddr::V4(_)) => 13,
            (Self::Host, IpAddr::V6(_)) => 3,
            (Self::Port, IpAddr::V6(_)) => 4,
            (Self::Prohibited, IpAddr::V6(_)) => 1,
        }
    }

    /// What an error of a host socket means for the guest, if it means anything.
    pub(crate) fn from_error(error: &io::Error) -> Option<Self> {
        Some(match error.raw_os_error()? {
            libc::ECONNREFUSED => Self::Port,
            libc::ENETUNREACH | libc::ENETDOWN | libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL => Self::Network,
            libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ETIMEDOUT => Self::Host,
            libc::EACCES | libc::EPERM => Self::Prohibited,
            _ => return None,
        })
    }
}

/// As much of the packet as an error message quotes, which leaves the message within every MTU.
const QUOTE: usize = 512;

impl Link {
    /// Tells the sender of `original` that it went nowhere.
    pub(crate) fn send_unreachable(&mut self, original: &[u8], why: Unreachable) {
        let Some(packet) = Packet::parse(original) else { return };
        if packet.source.is_multicast() || packet.source.is_unspecified() {
            return;
        }
        let kind = if packet.source.is_ipv4() { 3 } else { 1 };
        let mut message = vec![kind, why.code(packet.source), 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&original[..original.len().min(QUOTE)]);
        let own = self.addresses.gateway_like(packet.source);
        if let Some(bytes) = packet::build_icmp(own, packet.source, 64, &message) {
            self.send_packet(&bytes);
        }
    }

    /// The answer to an echo request, from the address that it asked.
    pub(crate) fn send_echo_reply(&mut self, from: IpAddr, to: IpAddr, request: &[u8]) {
        let mut message = request.to_vec();
        if message.len() < 8 {
            return;
        }
        message[0] = if to.is_ipv4() { 0 } else { 129 };
        if let Some(bytes) = packet::build_icmp(from, to, 64, &message) {
            self.send_packet(&bytes);
        }
    }
}

/// Whether this ICMP message is an echo request, by the family of its addresses.
pub(crate) fn is_echo_request(packet: &Packet<'_>) -> bool {
    let kind = if packet.source.is_ipv4() { 8 } else { 128 };
    packet.payload.len() >= 8 && packet.payload[0] == kind && packet.payload[1] == 0
}
