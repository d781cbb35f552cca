//! The wire between the router and its guests: addresses on it, and frames to them.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{
    checksum,
    config::Addresses,
    fragment,
    packet::{self, IPV4_HEADER, IPV6_HEADER},
    queues::Queues,
};
use crate::{
    MacAddress, Offloads,
    virtio_header::{self, VirtioHeader},
};

const ETHERNET_HEADER: usize = 14;
/// Where the IP packet starts in a frame.
pub(crate) const PACKET_START: usize = virtio_header::LEN + ETHERNET_HEADER;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// More guests than that behind one NIC are not remembered.
const MAX_NEIGHBORS: usize = 512;

pub(crate) struct Link {
    queues: Arc<Queues>,
    pub addresses: Addresses,
    pub mac: MacAddress,
    pub mtu: u16,
    /// What the driver takes over for us.
    pub offloads: Offloads,
    neighbors: HashMap<IpAddr, MacAddress>,
    /// Who spoke last: the only guest, nearly always.
    latest: Option<MacAddress>,
    identification: u32,
}

impl Link {
    pub(crate) fn new(queues: Arc<Queues>, addresses: Addresses, mac: MacAddress, mtu: u16) -> Self {
        let offloads = Offloads::default();
        Self { queues, addresses, mac, mtu, offloads, neighbors: HashMap::new(), latest: None, identification: 0 }
    }

    /// Whether bulk data may be sent now.
    pub(crate) fn has_room(&self) -> bool {
        self.queues.outbound_has_room()
    }

    /// Remembers whose address this is.
    pub(crate) fn learn(&mut self, address: IpAddr, mac: MacAddress) {
        self.latest = Some(mac);
        if self.neighbors.get(&address) == Some(&mac) {
            return;
        }
        if address.is_unspecified() || !self.addresses.on_link(address) || self.addresses.is_own(address) {
            return;
        }
        if self.neighbors.len() >= MAX_NEIGHBORS && !self.neighbors.contains_key(&address) {
            self.neighbors.clear();
        }
        self.neighbors.insert(address, mac);
    }

    pub(crate) fn knows(&self, address: IpAddr) -> bool {
        self.neighbors.contains_key(&address)
    }

    fn mac_of(&self, destination: IpAddr) -> Option<MacAddress> {
        match destination {
            IpAddr::V4(ip) if ip.is_broadcast() || ip == self.addresses.broadcast => Some(MacAddress::BROADCAST),
            // RFC 2464, section 7.
            IpAddr::V6(ip) if ip.is_multicast() => {
                let [.., a, b, c, d] = ip.octets();
                Some(MacAddress([0x33, 0x33, a, b, c, d]))
            }
            ip => self.neighbors.get(&ip).copied().or(self.latest),
        }
    }

    /// Sends a packet from [`packet::build`] to whoever has its destination, in fragments if it is longer than the MTU.
    pub(crate) fn send_packet(&mut self, bytes: &[u8]) {
        if bytes.len() <= usize::from(self.mtu) {
            return self.send_whole(bytes, None);
        }
        self.identification = self.identification.wrapping_add(1);
        fragment::split(bytes, self.mtu.into(), self.identification, |piece| self.send_whole(piece, None));
    }

    /// Sends a packet to this MAC, whatever is known of its destination.
    pub(crate) fn send_packet_to(&mut self, mac: MacAddress, bytes: &[u8]) {
        self.send_whole(bytes, Some(mac));
    }

    fn send_whole(&mut self, bytes: &[u8], mac: Option<MacAddress>) {
        let mut frame = Vec::with_capacity(PACKET_START + bytes.len());
        frame.resize(PACKET_START, 0);
        frame.extend_from_slice(bytes);
        self.send_frame(frame, mac, VirtioHeader::default());
    }

    /// A frame whose packet is in place, from [`PACKET_START`] on; the headers before it are filled here.
    fn send_frame(&mut self, mut frame: Vec<u8>, mac: Option<MacAddress>, header: VirtioHeader) {
        let Some((destination, ethertype)) = destination(&frame[PACKET_START..]) else { return };
        let Some(mac) = mac.or_else(|| self.mac_of(destination)) else { return };
        self.fill_headers(&mut frame, mac, ethertype, header);
        self.queues.push_outbound(frame);
    }

    fn fill_headers(&self, frame: &mut [u8], mac: MacAddress, ethertype: u16, header: VirtioHeader) {
        if let Some((virtio, rest)) = frame.split_first_chunk_mut::<{ virtio_header::LEN }>() {
            header.write(virtio);
            rest[0..6].copy_from_slice(&mac.0);
            rest[6..12].copy_from_slice(&self.mac.0);
            rest[12..14].copy_from_slice(&ethertype.to_be_bytes());
        }
    }

    /// A frame around a TCP packet of the stack, whose checksum field is zero if the driver completes checksums.
    /// A packet with more than `segment` bytes of payload is for the driver to cut.
    pub(crate) fn send_tcp(&mut self, mut frame: Vec<u8>, segment: usize) {
        let mut header = VirtioHeader::default();
        if self.offloads.checksum_out {
            header = prepare_offload(&mut frame, segment).unwrap_or_default();
        }
        self.send_frame(frame, None, header);
    }

    /// Asks who has an address: ARP or neighbor solicitation.
    pub(crate) fn ask_for(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(ip) => self.send_arp(1, MacAddress::BROADCAST, MacAddress([0; 6]), ip, self.addresses.gateway),
            IpAddr::V6(ip) => self.solicit(ip),
        }
    }

    /// RFC 826.
    pub(crate) fn send_arp(
        &mut self,
        operation: u16,
        to: MacAddress,
        target_mac: MacAddress,
        target: Ipv4Addr,
        own: Ipv4Addr,
    ) {
        let mut frame = vec![0; PACKET_START + 28];
        let arp = &mut frame[PACKET_START..];
        arp[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation as u8]);
        arp[8..14].copy_from_slice(&self.mac.0);
        arp[14..18].copy_from_slice(&own.octets());
        arp[18..24].copy_from_slice(&target_mac.0);
        arp[24..28].copy_from_slice(&target.octets());
        self.fill_headers(&mut frame, to, ETHERTYPE_ARP, VirtioHeader::default());
        self.queues.push_outbound(frame);
    }

    /// RFC 4861, section 4.3.
    fn solicit(&mut self, target: Ipv6Addr) {
        let [.., a, b, c] = target.octets();
        let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c));
        let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&target.octets());
        message.extend_from_slice(&[1, 1]);
        message.extend_from_slice(&self.mac.0);
        if let Some(bytes) = packet::build_icmp(self.addresses.link_local.into(), group.into(), 255, &message) {
            self.send_packet(&bytes);
        }
    }
}

fn destination(bytes: &[u8]) -> Option<(IpAddr, u16)> {
    match bytes.first()? >> 4 {
        4 => bytes.get(16..20)?.try_into().ok().map(|ip: [u8; 4]| (IpAddr::from(ip), ETHERTYPE_IPV4)),
        6 => bytes.get(24..40)?.try_into().ok().map(|ip: [u8; 16]| (IpAddr::from(ip), ETHERTYPE_IPV6)),
        _ => None,
    }
}

/// Leaves the checksum of a TCP packet for the driver to complete, and its segmentation if there is more than one
/// segment in it (virtio 1.2, 5.1.6.2.2).
fn prepare_offload(frame: &mut [u8], segment: usize) -> Option<VirtioHeader> {
    let parsed = packet::Packet::parse(frame.get(PACKET_START..)?)?;
    let (source, destination) = (parsed.source, parsed.destination);
    let (ip_header, kind) = match source {
        IpAddr::V4(_) => (IPV4_HEADER, virtio_header::GSO_TCPV4),
        IpAddr::V6(_) => (IPV6_HEADER, virtio_header::GSO_TCPV6),
    };
    let length = parsed.payload.len();
    let tcp_header = usize::from(*parsed.payload.get(12)? >> 4) * 4;
    let start = PACKET_START + ip_header;
    let partial = checksum::pseudo_header(source, destination, packet::TCP, length);
    frame.get_mut(start + 16..start + 18)?.copy_from_slice(&partial.to_be_bytes());
    let ethernet_start = (ETHERNET_HEADER + ip_header) as u16;
    let data = length.checked_sub(tcp_header)?;
    Some(VirtioHeader {
        checksum: Some((ethernet_start, 16)),
        segmentation: (data > segment && segment > 0).then_some((
            kind,
            segment as u16,
            ethernet_start + tcp_header as u16,
        )),
    })
}
