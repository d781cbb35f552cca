//! A small generator (SplitMix64), and the numbers that guests hurt themselves with.

#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

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
