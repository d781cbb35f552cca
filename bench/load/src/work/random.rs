//! The same data in every run.

/// Xorshift (Marsaglia, 2003).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 56) as u8).collect()
    }

    /// Words of a small vocabulary, some of them more often than others.
    pub fn text(&mut self, count: usize) -> Vec<u8> {
        let word = |random: &mut Self| -> Vec<u8> {
            let letters = 2 + random.next() % 9;
            (0..letters).map(|_| b'a' + (random.next() % 26) as u8).collect()
        };
        let words: Vec<_> = (0..1024).map(|_| word(self)).collect();
        let mut text = Vec::new();
        while text.len() < count {
            let (x, y) = (self.next() as usize % 1024, self.next() as usize % 1024);
            text.extend_from_slice(&words[x * y / 1024]);
            text.push(b' ');
        }
        text.truncate(count);
        text
    }
}
