//! Fragments: putting together what the guest cut, and cutting what is longer than the MTU.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::packet::{self, IPV4_HEADER, IPV6_FRAGMENT, IPV6_HEADER, Packet};

/// RFC 1122, section 3.3.2 asks for 60 to 120 s; on a lossless wire the rest comes at once or never.
const PATIENCE: Duration = Duration::from_secs(15);
const MAX_PACKETS: usize = 16;
/// A guest with the smallest MTU cuts the largest packet into 53.
const MAX_PIECES: usize = 128;
const LARGEST_PAYLOAD: usize = 65535;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    identification: u32,
}

struct Partial {
    deadline: Instant,
    /// Offset and bytes, in order and without overlap.
    pieces: Vec<(usize, Vec<u8>)>,
    length: Option<usize>,
}

/// Packets of which some fragments are here.
#[derive(Default)]
pub(crate) struct Reassembly {
    partials: HashMap<Key, Partial>,
}

impl Reassembly {
    /// Takes a fragment; returns the whole packet once it was the last missing one.
    pub(crate) fn add(&mut self, packet: &Packet<'_>, now: Instant) -> Option<Vec<u8>> {
        let piece = packet.piece?;
        let (source, destination, protocol) = (packet.source, packet.destination, packet.protocol);
        let key = Key { source, destination, protocol, identification: piece.identification };
        let end = piece.offset + packet.payload.len();
        let aligned = packet.payload.len().is_multiple_of(8);
        if end > LARGEST_PAYLOAD || packet.payload.is_empty() || (piece.more && !aligned) {
            self.partials.remove(&key);
            return None;
        }
        self.make_room(&key, now);
        let partial = self.partials.entry(key).or_insert_with(|| Partial {
            deadline: now + PATIENCE,
            pieces: Vec::new(),
            length: None,
        });
        if !partial.insert(piece.offset, packet.payload, (!piece.more).then_some(end)) {
            // RFC 8200, section 4.5: overlapping fragments discard the whole packet.
            self.partials.remove(&key);
            return None;
        }
        if !partial.is_whole() {
            return None;
        }
        let partial = self.partials.remove(&key)?;
        let mut whole = packet::build(source, destination, protocol, packet.hop_limit, partial.length?)?;
        let header = packet::header_len(source);
        for (offset, bytes) in &partial.pieces {
            whole.get_mut(header + offset..header + offset + bytes.len())?.copy_from_slice(bytes);
        }
        Some(whole)
    }

    fn make_room(&mut self, key: &Key, now: Instant) {
        if self.partials.contains_key(key) || self.partials.len() < MAX_PACKETS {
            return;
        }
        self.partials.retain(|_, partial| partial.deadline > now);
        if self.partials.len() >= MAX_PACKETS
            && let Some(oldest) = self.partials.iter().min_by_key(|(_, partial)| partial.deadline).map(|(key, _)| *key)
        {
            self.partials.remove(&oldest);
        }
    }
}

impl Partial {
    /// False if the piece cannot be part of this packet.
    fn insert(&mut self, offset: usize, bytes: &[u8], length: Option<usize>) -> bool {
        let end = offset + bytes.len();
        if length.is_some() && self.length.is_some_and(|known| Some(known) != length) {
            return false;
        }
        self.length = self.length.or(length);
        let place = self.pieces.partition_point(|(start, _)| *start < offset);
        let touches_before = place
            .checked_sub(1)
            .and_then(|i| self.pieces.get(i))
            .is_some_and(|(start, piece)| start + piece.len() > offset);
        let after = self.pieces.get(place);
        if after.is_some_and(|(start, piece)| *start == offset && piece == bytes) {
            return true;
        }
        if touches_before || after.is_some_and(|(start, _)| *start < end) || self.pieces.len() >= MAX_PIECES {
            return false;
        }
        self.pieces.insert(place, (offset, bytes.to_vec()));
        let last = self.pieces.last().map_or(0, |(start, piece)| start + piece.len());
        self.length.is_none_or(|length| last <= length)
    }

    fn is_whole(&self) -> bool {
        self.length == Some(self.pieces.iter().map(|(_, piece)| piece.len()).sum())
    }
}

/// Cuts a packet from [`packet::build`] into fragments of at most `mtu` bytes.
pub(crate) fn split(bytes: &[u8], mtu: usize, identification: u32, mut send: impl FnMut(&[u8])) {
    let Some(whole) = Packet::parse(bytes) else { return };
    let header = match whole.source {
        IpAddr::V4(_) => IPV4_HEADER,
        IpAddr::V6(_) => IPV6_HEADER + 8,
    };
    let room = (mtu.saturating_sub(header) & !7).max(8);
    let last = whole.payload.len().div_ceil(room).saturating_sub(1);
    for (index, data) in whole.payload.chunks(room).enumerate() {
        let (offset, more) = (index * room, index < last);
        let piece = match whole.source {
            IpAddr::V4(_) => piece_v4(&whole, identification, offset, more, data),
            IpAddr::V6(_) => piece_v6(&whole, identification, offset, more, data),
        };
        if let Some(piece) = piece {
            send(&piece);
        }
    }
}

fn piece_v4(whole: &Packet<'_>, identification: u32, offset: usize, more: bool, data: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = packet::build(whole.source, whole.destination, whole.protocol, whole.hop_limit, data.len())?;
    bytes[4..6].copy_from_slice(&(identification as u16).to_be_bytes());
    let field = (offset / 8) as u16 | u16::from(more) << 13;
    bytes[6..8].copy_from_slice(&field.to_be_bytes());
    packet::fill_v4_checksum(&mut bytes);
    bytes[IPV4_HEADER..].copy_from_slice(data);
    Some(bytes)
}

fn piece_v6(whole: &Packet<'_>, identification: u32, offset: usize, more: bool, data: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = packet::build(whole.source, whole.destination, IPV6_FRAGMENT, whole.hop_limit, 8 + data.len())?;
    bytes[IPV6_HEADER] = whole.protocol;
    let field = offset as u16 | u16::from(more);
    bytes[IPV6_HEADER + 2..IPV6_HEADER + 4].copy_from_slice(&field.to_be_bytes());
    bytes[IPV6_HEADER + 4..IPV6_HEADER + 8].copy_from_slice(&identification.to_be_bytes());
    bytes[IPV6_HEADER + 8..].copy_from_slice(data);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(from: &str, to: &str, length: usize) -> Vec<u8> {
        let data: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
        packet::build_udp(from.parse().unwrap(), to.parse().unwrap(), &data).unwrap()
    }

    proptest! {
        #[test]
        fn cut_and_put_together_in_any_order(six: bool, length in 1usize..60_000, mtu in 1280usize..9000, seed: u64) {
            let (from, to) = if six { ("[fd00::2]:5", "[fd00::15]:6") } else { ("10.0.2.2:5", "10.0.2.15:6") };
            let whole = packet(from, to, length);
            let mut pieces = Vec::new();
            split(&whole, mtu, 77, |piece| pieces.push(piece.to_vec()));
            prop_assert!(pieces.iter().all(|piece| piece.len() <= mtu));
            let mut state = seed | 1;
            pieces.sort_by_cached_key(|_| { state = state.wrapping_mul(6364136223846793005).wrapping_add(1); state >> 33 });
            let (mut reassembly, now) = (Reassembly::default(), Instant::now());
            let count = pieces.len();
            for (index, piece) in pieces.iter().enumerate() {
                let parsed = Packet::parse(piece).unwrap();
                if parsed.piece.is_none() {
                    prop_assert_eq!(count, 1);
                    continue;
                }
                let result = reassembly.add(&parsed, now);
                prop_assert_eq!(result.is_some(), index + 1 == count);
                if let Some(bytes) = result {
                    prop_assert_eq!(Packet::parse(&bytes).unwrap().payload, Packet::parse(&whole).unwrap().payload);
                }
            }
            prop_assert!(reassembly.partials.is_empty());
        }

        #[test]
        fn hostile_fragments_stay_bounded(pieces in prop::collection::vec((0u16..40, any::<u16>(), 0usize..400), 0..400)) {
            let (mut reassembly, now) = (Reassembly::default(), Instant::now());
            for (identification, field, length) in pieces {
                let mut bytes = packet("10.0.2.15:5", "10.0.2.2:6", length);
                bytes[4..6].copy_from_slice(&identification.to_be_bytes());
                bytes[6..8].copy_from_slice(&field.to_be_bytes());
                let parsed = Packet::parse(&bytes).unwrap();
                reassembly.add(&parsed, now);
                prop_assert!(reassembly.partials.len() <= MAX_PACKETS);
                prop_assert!(reassembly.partials.values().all(|partial| partial.pieces.len() <= MAX_PIECES));
            }
        }
    }
}
