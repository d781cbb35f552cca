//! IP packets as bytes: what the guest sent, taken apart, and what it gets, put together.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::wire::{Ipv4Packet, Ipv6Packet};

use super::checksum;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const IPV6_FRAGMENT: u8 = 44;
pub(crate) const ICMPV6: u8 = 58;

pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;
pub(crate) const UDP_HEADER: usize = 8;

/// Where a piece of a fragmented packet belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub identification: u32,
    pub offset: usize,
    pub more: bool,
}

/// An IP packet, checked as far as its own header goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'a> {
    /// Header and payload, without what padded the frame.
    pub bytes: &'a [u8],
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub hop_limit: u8,
    pub payload: &'a [u8],
    pub piece: Option<Piece>,
}

impl<'a> Packet<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Option<Self> {
        let packet = Ipv4Packet::new_checked(bytes).ok()?;
        let (header, total) = (usize::from(packet.header_len()), usize::from(packet.total_len()));
        let offset = usize::from(packet.frag_offset());
        let fragmented = packet.more_frags() || offset != 0;
        Some(Self {
            bytes: bytes.get(..total)?,
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            protocol: packet.next_header().into(),
            hop_limit: packet.hop_limit(),
            payload: bytes.get(header..total)?,
            piece: fragmented.then(|| Piece {
                identification: packet.ident().into(),
                offset,
                more: packet.more_frags(),
            }),
        })
    }

    /// Of the extension headers only the fragment header is known; guests send no others to a NAT.
    fn parse_v6(bytes: &'a [u8]) -> Option<Self> {
        let packet = Ipv6Packet::new_checked(bytes).ok()?;
        let bytes = bytes.get(..packet.total_len())?;
        let mut protocol = u8::from(packet.next_header());
        let mut payload = bytes.get(IPV6_HEADER..)?;
        let mut piece = None;
        if protocol == IPV6_FRAGMENT {
            // RFC 8200, section 4.5.
            let header = payload.first_chunk::<8>()?;
            let field = u16::from_be_bytes([header[2], header[3]]);
            let identification = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            let (offset, more) = (usize::from(field & !7), field & 1 != 0);
            protocol = header[0];
            payload = &payload[8..];
            // An atomic fragment is a whole packet (RFC 6946).
            piece = (more || offset != 0).then_some(Piece { identification, offset, more });
        }
        Some(Self {
            bytes,
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            protocol,
            hop_limit: packet.hop_limit(),
            payload,
            piece,
        })
    }
}

/// The two ports that TCP and UDP headers begin with.
pub(crate) fn ports(payload: &[u8]) -> Option<(u16, u16)> {
    let ports = payload.first_chunk::<4>()?;
    Some((u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]])))
}

/// The datagram within a UDP packet and its ports.
pub(crate) fn parse_udp(payload: &[u8]) -> Option<(u16, u16, &[u8])> {
    let (source, destination) = ports(payload)?;
    let length = usize::from(u16::from_be_bytes([*payload.get(4)?, *payload.get(5)?]));
    Some((source, destination, payload.get(UDP_HEADER..length)?))
}

/// An IP header and room for `length` bytes of payload, which is zero. `None` if that is too much for a packet.
pub(crate) fn build(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    hop_limit: u8,
    length: usize,
) -> Option<Vec<u8>> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => build_v4(source, destination, protocol, hop_limit, length),
        (IpAddr::V6(source), IpAddr::V6(destination)) => build_v6(source, destination, protocol, hop_limit, length),
        _ => None,
    }
}

fn build_v4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, ttl: u8, length: usize) -> Option<Vec<u8>> {
    let total = u16::try_from(IPV4_HEADER + length).ok()?;
    let mut bytes = vec![0; total.into()];
    bytes[0] = 0x45;
    bytes[2..4].copy_from_slice(&total.to_be_bytes());
    bytes[8] = ttl;
    bytes[9] = protocol;
    bytes[12..16].copy_from_slice(&source.octets());
    bytes[16..20].copy_from_slice(&destination.octets());
    fill_v4_checksum(&mut bytes);
    Some(bytes)
}

/// The header must be one of [`build`]'s: without options.
pub(crate) fn fill_v4_checksum(bytes: &mut [u8]) {
    bytes[10..12].fill(0);
    let sum = !checksum::sum(&bytes[..IPV4_HEADER]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn build_v6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, hop_limit: u8, length: usize) -> Option<Vec<u8>> {
    let length = u16::try_from(length).ok()?;
    let mut bytes = vec![0; IPV6_HEADER + usize::from(length)];
    bytes[0] = 0x60;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes[6] = protocol;
    bytes[7] = hop_limit;
    bytes[8..24].copy_from_slice(&source.octets());
    bytes[24..40].copy_from_slice(&destination.octets());
    Some(bytes)
}

pub(crate) fn header_len(address: IpAddr) -> usize {
    if address.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER }
}

/// A UDP packet with its checksum.
pub(crate) fn build_udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + data.len()).ok()?;
    let mut bytes = build(source.ip(), destination.ip(), UDP, 64, length.into())?;
    let udp = &mut bytes[header_len(source.ip())..];
    udp[0..2].copy_from_slice(&source.port().to_be_bytes());
    udp[2..4].copy_from_slice(&destination.port().to_be_bytes());
    udp[4..6].copy_from_slice(&length.to_be_bytes());
    udp[UDP_HEADER..].copy_from_slice(data);
    let sum = checksum::combine(&[
        checksum::sum(udp),
        checksum::pseudo_header(source.ip(), destination.ip(), UDP, length.into()),
    ]);
    // Zero would mean that there is none (RFC 768).
    let sum = if sum == 0xffff { 0xffff } else { !sum };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    Some(bytes)
}

/// An ICMP or ICMPv6 message, as the addresses ask for; its checksum field is filled.
pub(crate) fn build_icmp(source: IpAddr, destination: IpAddr, hop_limit: u8, message: &[u8]) -> Option<Vec<u8>> {
    let protocol = if source.is_ipv4() { ICMP } else { ICMPV6 };
    let mut bytes = build(source, destination, protocol, hop_limit, message.len())?;
    let icmp = &mut bytes[header_len(source)..];
    icmp.copy_from_slice(message);
    icmp.get_mut(2..4)?.fill(0);
    let mut sum = checksum::sum(icmp);
    if source.is_ipv6() {
        sum = checksum::combine(&[sum, checksum::pseudo_header(source, destination, protocol, message.len())]);
    }
    icmp[2..4].copy_from_slice(&(!sum).to_be_bytes());
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{IpAddress, UdpPacket};

    use super::*;

    #[test]
    fn what_is_built_can_be_parsed() {
        for (from, to) in [("10.0.2.2:5", "10.0.2.15:6"), ("[fd00::2]:5", "[fd00::15]:6")] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            for length in [0, 1, 7, 1472, 65507 - 20] {
                let data: Vec<u8> = (0..length).map(|i| i as u8).collect();
                let bytes = build_udp(from, to, &data).unwrap();
                let packet = Packet::parse(&bytes).unwrap();
                assert_eq!((packet.source, packet.destination, packet.protocol), (from.ip(), to.ip(), UDP));
                assert_eq!(parse_udp(packet.payload), Some((5, 6, &data[..])));
                assert_eq!(packet.piece, None);
                let (source, destination): (IpAddress, IpAddress) = (from.ip().into(), to.ip().into());
                assert!(UdpPacket::new_checked(packet.payload).unwrap().verify_checksum(&source, &destination));
            }
        }
        assert!(build_udp("1.2.3.4:5".parse().unwrap(), "1.2.3.4:5".parse().unwrap(), &[0; 65508]).is_none());
    }

    #[test]
    fn truncated_packets_are_none() {
        let bytes = build_udp("1.2.3.4:5".parse().unwrap(), "1.2.3.4:5".parse().unwrap(), b"data").unwrap();
        for length in 0..bytes.len() {
            assert!(Packet::parse(&bytes[..length]).is_none());
        }
    }
}
