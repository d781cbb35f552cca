//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// Folded sum of the bytes as big-endian words, not complemented.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let (words, rest) = bytes.as_chunks::<4>();
    // RFC 1071, section 2(B) and (C): any word order and width will do, the sum is folded and swapped in the end.
    let mut total: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    for pair in rest.chunks(2) {
        total += u64::from(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::from_be(total as u16)
}

pub(crate) fn combine(sums: &[u16]) -> u16 {
    let mut total: u32 = sums.iter().map(|sum| u32::from(*sum)).sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Sum of the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1), not complemented.
pub(crate) fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u16 {
    let address = |address| match address {
        IpAddr::V4(ip) => sum(&ip.octets()),
        IpAddr::V6(ip) => sum(&ip.octets()),
    };
    let length = length as u32;
    combine(&[address(source), address(destination), u16::from(protocol), (length >> 16) as u16, length as u16])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn example_of_rfc_1071() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
        assert_eq!(sum(&[0x00, 0x01, 0xf2]), combine(&[0x0001, 0xf200]));
        assert_eq!(sum(&[0xff; 65535]), combine(&[sum(&[0xff; 65534]), 0xff00]));
    }
}
