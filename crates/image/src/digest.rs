use std::{
    fmt,
    io::{self, Read},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A SHA-256 sum; written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256Sum([u8; 32]);

/// A text that is no SHA-256 sum.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no SHA-256 sum of 64 hexadecimal digits")]
pub struct SumError(String);

impl Sha256Sum {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Reads `source` to its end; returns the sum and the number of bytes.
    pub fn of_reader(mut source: impl Read) -> io::Result<(Self, u64)> {
        let mut summing = Summing::default();
        let mut buffer = vec![0; 1 << 20];
        let mut total = 0;
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return Ok((summing.finish(), total)),
                Ok(bytes) => {
                    summing.add(&buffer[..bytes]);
                    total += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A sum that is made piece by piece.
#[derive(Default)]
pub struct Summing(Sha256);

impl Summing {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Sha256Sum {
        Sha256Sum(self.0.finalize().into())
    }
}

impl FromStr for Sha256Sum {
    type Err = SumError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || SumError(text.chars().take(80).collect());
        if text.len() != 64 || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut sum = [0; 32];
        for (at, byte) in sum.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(sum))
    }
}

impl TryFrom<String> for Sha256Sum {
    type Error = SumError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Sha256Sum> for String {
    fn from(sum: Sha256Sum) -> Self {
        sum.to_string()
    }
}

impl fmt::Display for Sha256Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_texts_agree() {
        // FIPS 180-4 example: the sum of "abc".
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Sha256Sum::of(b"abc").to_string(), abc);
        assert_eq!(abc.parse(), Ok(Sha256Sum::of(b"abc")));
        assert_eq!(Sha256Sum::of_reader(&b"abc"[..]).unwrap(), (Sha256Sum::of(b"abc"), 3));
        for bad in ["", "zz", &abc[1..], &format!("{abc}0"), &abc.replace('b', "é")] {
            assert!(bad.parse::<Sha256Sum>().is_err(), "{bad}");
        }
    }
}
