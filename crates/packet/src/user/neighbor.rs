//! ARP (RFC 826) and IPv6 neighbor discovery (RFC 4861): who the router is, and that it is one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    link::Link,
    packet::{self, Packet},
};
use crate::MacAddress;

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Five unsolicited advertisements fit into it, so that a guest never sees it end.
const ROUTER_LIFETIME_SECONDS: u16 = 9000;

/// What a router advertisement offers.
#[derive(Clone, Debug)]
pub(crate) struct Advertisement {
    /// Whether the guest may use the router as its default one.
    pub default_route: bool,
    pub dns: bool,
    pub search_domains: Vec<String>,
}

impl Link {
    pub(crate) fn receive_arp(&mut self, bytes: &[u8]) {
        let Some(arp) = bytes.first_chunk::<28>() else { return };
        let [0, 1, 8, 0, 6, 4, 0, operation, a, b, c, d, e, f, s0, s1, s2, s3, _, _, _, _, _, _, t0, t1, t2, t3] = *arp
        else {
            return;
        };
        let mac = MacAddress([a, b, c, d, e, f]);
        let (sender, target) = (Ipv4Addr::new(s0, s1, s2, s3), Ipv4Addr::new(t0, t1, t2, t3));
        if mac.is_multicast() {
            return;
        }
        self.learn(sender.into(), mac);
        if operation == 1 && self.addresses.is_own(target.into()) {
            self.send_arp(2, mac, mac, sender, target);
        }
    }

    /// True if the message is a router solicitation, which the caller answers.
    pub(crate) fn receive_neighbor_discovery(&mut self, packet: &Packet<'_>, mac: MacAddress) -> bool {
        // RFC 4861, section 7.1: nothing that passed a router.
        if packet.hop_limit != 255 {
            return false;
        }
        match packet.payload.first() {
            Some(&ROUTER_SOLICITATION) => true,
            Some(&NEIGHBOR_SOLICITATION) => {
                self.answer_solicitation(packet, mac);
                false
            }
            _ => false,
        }
    }

    fn answer_solicitation(&mut self, packet: &Packet<'_>, mac: MacAddress) {
        let target = packet.payload.get(8..24).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(Ipv6Addr::from);
        let Some(target) = target.filter(|target| self.addresses.is_own(IpAddr::V6(*target))) else { return };
        // Router, and solicited unless somebody wants the address for itself (section 7.2.4).
        let (flags, to, mac) = match packet.source {
            source if source.is_unspecified() => (0xa0, ALL_NODES.into(), MacAddress([0x33, 0x33, 0, 0, 0, 1])),
            source => (0xe0, source, mac),
        };
        let mut message = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
        message.extend_from_slice(&target.octets());
        message.extend_from_slice(&[2, 1]);
        message.extend_from_slice(&self.mac.0);
        if let Some(bytes) = packet::build_icmp(target.into(), to, 255, &message) {
            self.send_packet_to(mac, &bytes);
        }
    }

    /// To all nodes (RFC 4861, section 6.2.3).
    pub(crate) fn advertise_router(&mut self, offer: &Advertisement) {
        let lifetime = if offer.default_route { ROUTER_LIFETIME_SECONDS } else { 0 };
        let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
        message.extend_from_slice(&lifetime.to_be_bytes());
        message.extend_from_slice(&[0; 8]);
        // Source link-layer address.
        message.extend_from_slice(&[1, 1]);
        message.extend_from_slice(&self.mac.0);
        // MTU.
        message.extend_from_slice(&[5, 1, 0, 0]);
        message.extend_from_slice(&u32::from(self.mtu).to_be_bytes());
        // Prefix: on link, for autonomous configuration, for ever.
        message.extend_from_slice(&[3, 4, 64, 0xc0]);
        message.extend_from_slice(&[0xff; 8]);
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(&self.addresses.network6.octets());
        if offer.dns {
            // RFC 8106, section 5.1.
            message.extend_from_slice(&[25, 3, 0, 0]);
            message.extend_from_slice(&u32::from(ROUTER_LIFETIME_SECONDS).to_be_bytes());
            message.extend_from_slice(&self.addresses.dns6.octets());
            message.extend_from_slice(&search_list_option(&offer.search_domains));
        }
        if let Some(bytes) = packet::build_icmp(self.addresses.link_local.into(), ALL_NODES.into(), 255, &message) {
            self.send_packet(&bytes);
        }
    }
}

/// RFC 8106, section 5.2; empty if there are no domains.
fn search_list_option(domains: &[String]) -> Vec<u8> {
    let names = encode_domains(domains, 240);
    if names.is_empty() {
        return names;
    }
    let units = (8 + names.len()).div_ceil(8);
    let mut option = vec![31, units as u8, 0, 0];
    option.extend_from_slice(&u32::from(ROUTER_LIFETIME_SECONDS).to_be_bytes());
    option.extend_from_slice(&names);
    option.resize(units * 8, 0);
    option
}

/// Domain names in DNS form, one after another (RFC 1035, section 3.1), as many as fit.
pub(crate) fn encode_domains(domains: &[String], room: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for domain in domains.iter().filter(|domain| super::config::is_host_name(domain)) {
        let name = domain.trim_end_matches('.');
        if bytes.len() + name.len() + 2 > room {
            break;
        }
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_in_dns_form() {
        let domains = ["example.org.".to_owned(), "bad domain".to_owned(), "a.b".to_owned()];
        assert_eq!(encode_domains(&domains, 255), b"\x07example\x03org\x00\x01a\x01b\x00");
        assert_eq!(encode_domains(&domains, 14), b"\x07example\x03org\x00");
        assert_eq!(search_list_option(&domains).len() % 8, 0);
        assert!(search_list_option(&[]).is_empty());
    }
}
