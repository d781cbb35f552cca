//! The DHCP server (RFC 2131): every guest gets an address, the same one each time it asks.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr},
};

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use super::{config::Addresses, neighbor::encode_domains, packet};
use crate::MacAddress;

pub(crate) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

const LEASE_SECONDS: u32 = 86400;

// RFC 2132, RFC 3397.
const OPTION_HOST_NAME: u8 = 12;
const OPTION_DOMAIN_NAME: u8 = 15;
const OPTION_INTERFACE_MTU: u8 = 26;
const OPTION_BROADCAST: u8 = 28;
const OPTION_CLIENT_ID: u8 = 61;
const OPTION_DOMAIN_SEARCH: u8 = 119;

pub(crate) struct DhcpServer {
    addresses: Addresses,
    hostname: Option<String>,
    mtu: u16,
    /// Whether to offer a default route and DNS.
    outside: bool,
    /// The oldest first. At most one per address that there is.
    leases: VecDeque<(MacAddress, Ipv4Addr)>,
}

/// An answer and whom it goes to.
pub(crate) struct Reply {
    pub mac: MacAddress,
    pub packet: Vec<u8>,
}

impl DhcpServer {
    pub(crate) fn new(addresses: Addresses, hostname: Option<String>, mtu: u16, outside: bool) -> Self {
        Self { addresses, hostname, mtu, outside, leases: VecDeque::new() }
    }

    pub(crate) fn handle(&mut self, message: &[u8], search_domains: &[String]) -> Option<Reply> {
        let packet = DhcpPacket::new_checked(message).ok()?;
        let request = DhcpRepr::parse(&packet).ok()?;
        let mac = MacAddress(request.client_hardware_address.0);
        if mac.is_multicast() || request.server_identifier.is_some_and(|server| server != self.addresses.gateway) {
            return None;
        }
        let client_id = packet.options().find(|option| option.kind == OPTION_CLIENT_ID).map(|option| option.data);
        let answer = |kind, ip| Answer { kind, mac, ip, client_id };
        let answer = match request.message_type {
            DhcpMessageType::Discover => answer(DhcpMessageType::Offer, self.lease(mac)),
            DhcpMessageType::Request => match self.requested(&request, mac) {
                Some(ip) => answer(DhcpMessageType::Ack, ip),
                None => answer(DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED),
            },
            DhcpMessageType::Inform => answer(DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED),
            DhcpMessageType::Release => {
                self.leases.retain(|(owner, _)| *owner != mac);
                return None;
            }
            _ => return None,
        };
        self.reply(&request, &answer, search_domains)
    }

    /// The address that a request asks for, if it is the client's.
    fn requested(&mut self, request: &DhcpRepr<'_>, mac: MacAddress) -> Option<Ipv4Addr> {
        let wanted = request.requested_ip.unwrap_or(request.client_ip);
        let known = self.leases.iter().find(|(owner, _)| *owner == mac).map(|(_, ip)| *ip);
        // A guest that slept, or was restored, may ask for what it had.
        let free = self.is_for_guests(wanted) && !self.leases.iter().any(|(_, ip)| *ip == wanted);
        match known {
            Some(ip) => (ip == wanted).then_some(ip),
            None if free => {
                self.leases.push_back((mac, wanted));
                Some(wanted)
            }
            None => None,
        }
    }

    fn is_for_guests(&self, ip: Ipv4Addr) -> bool {
        let last = ip.octets()[3];
        self.addresses.on_link(IpAddr::V4(ip)) && (self.addresses.guest.octets()[3]..255).contains(&last)
    }

    fn lease(&mut self, mac: MacAddress) -> Ipv4Addr {
        if let Some((_, ip)) = self.leases.iter().find(|(owner, _)| *owner == mac) {
            return *ip;
        }
        let [a, b, c, first] = self.addresses.guest.octets();
        let unused = (first..255)
            .map(|last| Ipv4Addr::new(a, b, c, last))
            .find(|ip| !self.leases.iter().any(|(_, used)| used == ip));
        let ip = unused.or_else(|| self.leases.pop_front().map(|(_, ip)| ip)).unwrap_or(self.addresses.guest);
        self.leases.push_back((mac, ip));
        ip
    }

    fn reply(&self, request: &DhcpRepr<'_>, answer: &Answer<'_>, search_domains: &[String]) -> Option<Reply> {
        let nak = answer.kind == DhcpMessageType::Nak;
        let inform = request.message_type == DhcpMessageType::Inform;
        let mtu = self.mtu.to_be_bytes();
        let broadcast = self.addresses.broadcast.octets();
        let search = encode_domains(search_domains, 255);
        let hostname = self.hostname.as_deref().filter(|_| answer.ip == self.addresses.guest || inform);
        let mut options = Vec::new();
        let mut option = |kind, data: Option<&'_ [u8]>| {
            if let Some(data) = data.filter(|data| !data.is_empty()) {
                options.push((kind, data.to_vec()));
            }
        };
        option(OPTION_CLIENT_ID, answer.client_id);
        if !nak {
            option(OPTION_INTERFACE_MTU, Some(&mtu));
            option(OPTION_BROADCAST, Some(&broadcast));
            option(OPTION_HOST_NAME, hostname.map(str::as_bytes));
            option(
                OPTION_DOMAIN_NAME,
                search_domains.first().filter(|name| super::config::is_host_name(name)).map(|name| name.as_bytes()),
            );
            option(OPTION_DOMAIN_SEARCH, Some(&search));
        }
        let options: Vec<_> = options.iter().map(|(kind, data)| DhcpOption { kind: *kind, data }).collect();
        let repr = DhcpRepr {
            message_type: answer.kind,
            transaction_id: request.transaction_id,
            secs: 0,
            client_hardware_address: EthernetAddress(answer.mac.0),
            client_ip: if nak { Ipv4Addr::UNSPECIFIED } else { request.client_ip },
            your_ip: answer.ip,
            server_ip: self.addresses.gateway,
            router: (self.outside && !nak).then_some(self.addresses.gateway),
            subnet_mask: (!nak).then_some(Ipv4Addr::new(255, 255, 255, 0)),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: request.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(self.addresses.gateway),
            parameter_request_list: None,
            dns_servers: (self.outside && !nak).then(|| [self.addresses.dns].into_iter().collect()),
            max_size: None,
            lease_duration: (!nak && !inform).then_some(LEASE_SECONDS),
            renew_duration: None,
            rebind_duration: None,
            additional_options: &options,
        };
        // BOOTP relays and some clients want at least the 300 bytes that RFC 951 knows.
        let mut message = vec![0; repr.buffer_len().max(300)];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut message[..])).ok()?;
        let (mac, to) = self.destination(request, answer);
        let from = (self.addresses.gateway, SERVER_PORT).into();
        Some(Reply { mac, packet: packet::build_udp(from, (to, CLIENT_PORT).into(), &message)? })
    }

    /// RFC 2131, section 4.1.
    fn destination(&self, request: &DhcpRepr<'_>, answer: &Answer<'_>) -> (MacAddress, Ipv4Addr) {
        let everybody = (MacAddress::BROADCAST, Ipv4Addr::BROADCAST);
        if answer.kind == DhcpMessageType::Nak {
            return everybody;
        }
        match request.client_ip {
            ip if self.addresses.on_link(ip.into()) => (answer.mac, ip),
            _ if request.broadcast || answer.ip.is_unspecified() => everybody,
            _ => (answer.mac, answer.ip),
        }
    }
}

struct Answer<'a> {
    kind: DhcpMessageType,
    mac: MacAddress,
    ip: Ipv4Addr,
    client_id: Option<&'a [u8]>,
}

#[cfg(test)]
mod tests;
