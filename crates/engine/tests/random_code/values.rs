//! Values that find mistakes.

use super::random::Random;

impl Random {
    /// A general register's value.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(80),
            1 => self.below(80).wrapping_neg(),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.next() & 0x8080_8080_8080_8080,
            5 => u64::from(self.next() as u32),
            _ => self.next(),
        }
    }

    pub fn float32(&mut self) -> u32 {
        const SPECIAL: [u32; 12] = [
            0,
            0x3f80_0000,
            0x7f80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            0x7f7f_ffff,
            0x0080_0000,
            0x0000_0001,
            0x007f_ffff,
            0x4f00_0000,
            0x4b00_0001,
            0x3f00_0000,
        ];
        let sign = (self.next() as u32) & 0x8000_0000;
        match self.below(3) {
            0 => sign | self.pick(&SPECIAL),
            1 => sign | (0x3f80_0000u32 - 0x0600_0000 + (self.next() as u32 & 0x0fff_ffff)),
            _ => self.next() as u32,
        }
    }

    pub fn float64(&mut self) -> u64 {
        const SPECIAL: [u64; 12] = [
            0,
            0x3ff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0x7fef_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            1,
            0x000f_ffff_ffff_ffff,
            0x41e0_0000_0000_0000,
            0x43e0_0000_0000_0000,
            0x3fe0_0000_0000_0000,
        ];
        let sign = self.next() & 1 << 63;
        match self.below(3) {
            0 => sign | self.pick(&SPECIAL),
            1 => sign | (0x3fe0_0000_0000_0000 + (self.next() & 0x003f_ffff_ffff_ffff)),
            _ => self.next(),
        }
    }

    /// An 80-bit float: sign and exponent, mantissa. Also ones that no processor makes (unnormals).
    pub fn float80(&mut self) -> (u16, u64) {
        let sign = (self.next() as u16) & 0x8000;
        let top = 1u64 << 63;
        let (exponent, mantissa) = match self.below(10) {
            0 => (0, 0),
            1 => (0x7fff, top),
            2 => (0x7fff, top | self.next()),
            3 => (0, self.next() & !top),
            4 => (self.next() as u16 & 0x7fff, self.next()),
            5 => (0x3fff, top),
            6 => (0x3fff + self.below(64) as u16, top | (self.next() << self.below(63))),
            _ => (0x3fff - 40 + self.below(80) as u16, top | self.next()),
        };
        (sign | exponent, mantissa)
    }

    /// A vector register's value or a piece of memory.
    pub fn vector(&mut self) -> [u64; 4] {
        let kind = self.below(6);
        std::array::from_fn(|_| match kind {
            0 => self.next(),
            1 => u64::from(self.float32()) | u64::from(self.float32()) << 32,
            2 => self.float64(),
            3 => self.integer(),
            4 => u64::from_le_bytes(std::array::from_fn(|_| self.pick(&[0, 1, 0x7f, 0x80, 0xff, 0x41]))),
            _ => self.next() & self.next(),
        })
    }
}
