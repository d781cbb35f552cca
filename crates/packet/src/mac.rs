use std::{fmt, io, str::FromStr};

use crate::MacAddress;

/// Why a text is no Ethernet address of a NIC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacAddressError {
    #[error("'{0}' is no MAC address: write six bytes in hex, such as 52:54:00:12:34:56")]
    Malformed(String),
    #[error("'{0}' is a multicast address: the first byte of a NIC's address must be even")]
    Multicast(String),
}

impl MacAddress {
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// A random address that no vendor owns: locally administered and unicast (IEEE 802, 8.4).
    pub fn random_local() -> io::Result<Self> {
        let mut bytes = [0; 6];
        crate::user::random_bytes(&mut bytes)?;
        bytes[0] = (bytes[0] & !0x01) | 0x02;
        Ok(Self(bytes))
    }

    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || MacAddressError::Malformed(text.to_owned());
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut bytes = [0; 6];
        let mut parts = text.split(separator);
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(malformed)?;
            if part.is_empty() || part.len() > 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(malformed());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
        }
        if parts.next().is_some() {
            return Err(malformed());
        }
        let address = Self(bytes);
        if address.is_multicast() {
            return Err(MacAddressError::Multicast(text.to_owned()));
        }
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let mac: MacAddress = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac, MacAddress([0x52, 0x54, 0, 0xab, 0xcd, 0x0f]));
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        assert_eq!("52-54-0-ab-cd-f".parse(), Ok(mac));
    }

    #[test]
    fn bad_texts() {
        for text in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:11",
            "52:54:00:ab:cd:0g",
            "52:54:00:ab:cd:+1",
            "525400abcd0f",
            "::::::",
        ] {
            assert_eq!(text.parse::<MacAddress>(), Err(MacAddressError::Malformed(text.into())), "{text}");
        }
        assert_eq!(
            "01:00:5e:00:00:01".parse::<MacAddress>(),
            Err(MacAddressError::Multicast("01:00:5e:00:00:01".into()))
        );
    }

    #[test]
    fn random_ones_are_local_unicast_and_differ() {
        let some: Vec<_> = (0..8).map(|_| MacAddress::random_local().unwrap()).collect();
        assert!(some.iter().all(|mac| mac.0[0] & 3 == 2));
        assert!(some.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
