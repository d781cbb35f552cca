//! The numbers that guests hurt themselves with.

use super::random::Random;

impl Random {
    pub fn bytes(&mut self, out: &mut [u8]) {
        for piece in out.chunks_mut(8) {
            piece.copy_from_slice(&self.next().to_le_bytes()[..piece.len()]);
        }
    }

    /// A number that is an address where something begins or ends, a size, or anything.
    pub fn integer(&mut self, ram_bytes: u64) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            0x1_0000,
            0x10_0000,
            0xc000_0000,
            0xfec0_0000,
            0xfee0_0000,
            1 << 32,
            1 << 46,
            1 << 47,
            0xffff_8000_0000_0000,
            0xffff_8000_fee0_0000,
            1 << 63,
        ];
        match self.below(12) {
            0 => self.next(),
            1 => self.below(80),
            2 => self.below(80).wrapping_neg(),
            3 => self.pick(&EDGES).wrapping_add(self.below(80)),
            4 => self.pick(&EDGES).wrapping_sub(self.below(80)),
            5 => (self.below(ram_bytes) | 0xfff).wrapping_sub(self.below(70)),
            6 => ram_bytes.wrapping_sub(self.below(80)),
            7 => 0xfee0_0000 | self.below(0x40) << 4,
            8 => 1 << self.below(64),
            _ => self.below(ram_bytes),
        }
    }
}
