//! Integers: arithmetic, branches, tables, hashing, compression, memory in order and out of order, calls.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    hash::{BuildHasherDefault, DefaultHasher},
    hint::black_box,
};

use super::{Run, random::Random};

pub fn sieve(run: &Run) -> u64 {
    let mut count = 0;
    for _ in 0..run.rounds {
        let mut composite = vec![false; black_box(1 << 19)];
        for number in 2..composite.len() {
            if !composite[number] {
                count += 1;
                for multiple in (number * number..composite.len()).step_by(number) {
                    composite[multiple] = true;
                }
            }
        }
    }
    count
}

pub fn collatz(run: &Run) -> u64 {
    let (mut longest, mut total) = (0, 0u64);
    for start in 1..black_box(run.rounds) {
        let (mut value, mut steps) = (start, 0);
        while value != 1 {
            value = if value & 1 == 0 { value >> 1 } else { 3 * value + 1 };
            steps += 1;
        }
        longest = longest.max(steps);
        total += steps;
    }
    total << 16 | longest
}

/// Division by a number that changes: what no compiler turns into a multiplication.
pub fn divide(run: &Run) -> u64 {
    let mut random = Random::new(3);
    let mut sum = 0u64;
    for _ in 0..run.rounds {
        let (dividend, divisor) = (random.next(), random.next() >> 40 | 1);
        sum = sum.wrapping_add(dividend / divisor) ^ (dividend % divisor);
    }
    sum
}

/// Products of 2048-bit numbers with schoolbook multiplication.
pub fn big_numbers(run: &Run) -> u64 {
    const LIMBS: usize = 32;
    let mut random = Random::new(4);
    let mut left: [u64; LIMBS] = std::array::from_fn(|_| random.next());
    let right: [u64; LIMBS] = std::array::from_fn(|_| random.next());
    for _ in 0..run.rounds {
        let mut product = [0u64; 2 * LIMBS];
        for (i, &x) in left.iter().enumerate() {
            let mut carry = 0u64;
            for (j, &y) in black_box(&right).iter().enumerate() {
                let wide = u128::from(x) * u128::from(y) + u128::from(product[i + j]) + u128::from(carry);
                product[i + j] = wide as u64;
                carry = (wide >> 64) as u64;
            }
            product[i + LIMBS] = carry;
        }
        left = std::array::from_fn(|i| product[i] ^ product[i + LIMBS]);
    }
    left.iter().fold(0, |sum, limb| sum ^ limb)
}

/// CRC-32 (IEEE 802.3) with a table, a byte at a time.
pub fn crc32(run: &Run) -> u64 {
    let table: [u32; 256] = std::array::from_fn(|byte| {
        (0..8).fold(byte as u32, |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    });
    let data = Random::new(5).bytes(64 << 10);
    let mut crc = !0u32;
    for _ in 0..run.rounds {
        for byte in black_box(&data) {
            crc = table[(crc as u8 ^ byte) as usize] ^ crc >> 8;
        }
    }
    u64::from(!crc)
}

/// SHA-256 (FIPS 180-4) in plain integer instructions.
pub fn sha256(run: &Run) -> u64 {
    let constants = Sha256Constants::new();
    let data = Random::new(6).bytes(64 << 10);
    let mut state = constants.initial;
    for _ in 0..run.rounds {
        for block in black_box(&data).as_chunks::<64>().0 {
            constants.compress(&mut state, block);
        }
    }
    u64::from(state[0]) << 32 | u64::from(state[7])
}

struct Sha256Constants {
    initial: [u32; 8],
    rounds: [u32; 64],
}

impl Sha256Constants {
    /// The fractions of the square roots of the first 8 primes, and of the cube roots of the first 64.
    fn new() -> Self {
        let is_prime = |n: &u128| (2..*n).all(|d| !n.is_multiple_of(d));
        let mut primes = (2u128..).filter(is_prime);
        let primes: [u128; 64] = std::array::from_fn(|_| primes.next().unwrap_or(2));
        let root = |of: u128, power: u32| {
            let (mut low, mut high) = (0u128, 1 << 40);
            while high - low > 1 {
                let middle = (low + high) / 2;
                *(if middle.pow(power) <= of { &mut low } else { &mut high }) = middle;
            }
            low as u32
        };
        Self {
            initial: std::array::from_fn(|i| root(primes[i] << 64, 2)),
            rounds: std::array::from_fn(|i| root(primes[i] << 96, 3)),
        }
    }

    fn compress(&self, state: &mut [u32; 8], block: &[u8; 64]) {
        let mut words = [0u32; 64];
        for (word, bytes) in words.iter_mut().zip(block.as_chunks::<4>().0) {
            *word = u32::from_be_bytes(*bytes);
        }
        for i in 16..64 {
            let (x, y) = (words[i - 15], words[i - 2]);
            let x = x.rotate_right(7) ^ x.rotate_right(18) ^ x >> 3;
            let y = y.rotate_right(17) ^ y.rotate_right(19) ^ y >> 10;
            words[i] = words[i - 16].wrapping_add(x).wrapping_add(words[i - 7]).wrapping_add(y);
        }
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
        for (constant, word) in self.rounds.iter().zip(words) {
            let mixed = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
            let chosen = e & f ^ !e & g;
            let first = h.wrapping_add(mixed).wrapping_add(chosen).wrapping_add(*constant).wrapping_add(word);
            let mixed = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
            let second = mixed.wrapping_add(a & b ^ a & c ^ b & c);
            (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(first), c, b, a, first.wrapping_add(second));
        }
        for (word, more) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *word = word.wrapping_add(more);
        }
    }
}

/// A compressor of the LZ77 family with a hash table of places, and its decompressor.
pub fn compress(run: &Run) -> u64 {
    let text = Random::new(7).text(256 << 10);
    let mut sum = 0u64;
    for _ in 0..run.rounds {
        let packed = pack(black_box(&text));
        let back = unpack(&packed);
        assert!(back == text, "what was unpacked is not what was packed");
        sum = packed.iter().fold(sum, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    }
    sum
}

/// Pieces: how many literals, the literals, how many bytes to repeat, from how far back.
fn pack(text: &[u8]) -> Vec<u8> {
    const LEAST: usize = 4;
    let mut places = vec![usize::MAX; 1 << 14];
    let mut packed = Vec::new();
    let (mut at, mut literals) = (0, 0);
    while at + LEAST <= text.len() {
        let key = u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
        let slot = &mut places[(key.wrapping_mul(0x9e37_79b1) >> 18) as usize];
        let before = std::mem::replace(slot, at);
        let near = before < at && at - before <= usize::from(u16::MAX);
        let same = if near { text[at..].iter().zip(&text[before..]).take_while(|(x, y)| x == y).count() } else { 0 };
        if same < LEAST && at - literals < 255 {
            at += 1;
            continue;
        }
        let same = if same < LEAST { 0 } else { same.min(255) };
        packed.push((at - literals) as u8);
        packed.extend_from_slice(&text[literals..at]);
        packed.push(same as u8);
        packed.extend_from_slice(&(if same > 0 { (at - before) as u16 } else { 0 }).to_le_bytes());
        at += same;
        literals = at;
    }
    for rest in text[literals..].chunks(255) {
        packed.push(rest.len() as u8);
        packed.extend_from_slice(rest);
        packed.extend_from_slice(&[0; 3]);
    }
    packed
}

fn unpack(mut packed: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    while let Some((&literals, rest)) = packed.split_first() {
        let (plain, rest) = rest.split_at(usize::from(literals));
        text.extend_from_slice(plain);
        let (same, back) = (usize::from(rest[0]), usize::from(u16::from_le_bytes([rest[1], rest[2]])));
        let from = text.len() - back;
        for i in from..from + same {
            text.push(text[i]);
        }
        packed = &rest[3..];
    }
    text
}

pub fn sort(run: &Run) -> u64 {
    let mut random = Random::new(8);
    let mut sum = 0u64;
    for _ in 0..run.rounds {
        let mut values: Vec<u64> = (0..50_000).map(|_| random.next()).collect();
        black_box(&mut values).sort_unstable();
        sum = sum.wrapping_add(values[100] ^ values[49_000]);
    }
    sum
}

/// Hash tables and trees of the standard library.
pub fn maps(run: &Run) -> u64 {
    let mut random = Random::new(9);
    let mut hashed: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>> = HashMap::default();
    let mut ordered = BTreeMap::new();
    for turn in 0..run.rounds {
        let key = random.next() % 20_000;
        *hashed.entry(key).or_insert(0) += turn;
        if turn % 3 == 0 {
            ordered.remove(&(key / 2));
        } else {
            ordered.insert(key, turn);
        }
    }
    let sum = hashed.values().fold(0u64, |sum, value| sum.wrapping_add(*value));
    ordered.range(5000..6000).fold(sum, |sum, (key, value)| sum.wrapping_mul(3) ^ key ^ value)
}

/// Numbers to text and back.
pub fn text(run: &Run) -> u64 {
    let mut random = Random::new(10);
    let mut line = String::new();
    let mut sum = 0u64;
    for _ in 0..run.rounds {
        line.clear();
        let (x, y) = (random.next(), random.next() >> 32);
        let _ = write!(line, "{x} {y:08x} {:>12}", y % 1000);
        for word in black_box(&line).split_whitespace() {
            sum = sum.wrapping_mul(7).wrapping_add(word.parse::<u64>().unwrap_or(word.len() as u64));
        }
    }
    sum
}

/// Each load's address is what the load before it found.
fn chase(bytes: usize, steps: u64) -> u64 {
    let nodes = bytes / 8;
    let mut next: Vec<usize> = (0..nodes).collect();
    let mut random = Random::new(11);
    // Sattolo's shuffle makes one cycle of all.
    for i in (1..nodes).rev() {
        next.swap(i, random.next() as usize % i);
    }
    let mut at = 0;
    for _ in 0..steps {
        at = next[at];
    }
    at as u64
}

pub fn chase_near(run: &Run) -> u64 {
    chase(32 << 10, run.rounds)
}

/// More pages than any translation cache holds.
pub fn chase_far(run: &Run) -> u64 {
    chase(16 << 20, run.rounds)
}

pub fn calls(run: &Run) -> u64 {
    #[inline(never)]
    fn fibonacci(n: u64) -> u64 {
        if black_box(n) < 2 { n } else { fibonacci(n - 1) + fibonacci(n - 2) }
    }
    (0..run.rounds).fold(0, |sum, _| sum + fibonacci(22))
}

/// A call through a table, to another target nearly every time.
pub fn indirect(run: &Run) -> u64 {
    const TARGETS: [fn(u64) -> u64; 16] = [
        |x| x + 1,
        |x| x.wrapping_mul(3),
        |x| x ^ x >> 7,
        |x| x.rotate_left(5),
        |x| !x,
        |x| x.wrapping_sub(77),
        |x| x ^ 0x5555,
        |x| x << 1 | 1,
        |x| x.swap_bytes(),
        |x| x >> 1,
        |x| x.wrapping_add(x >> 3),
        |x| x.rotate_right(11),
        |x| x ^ x << 9,
        |x| x.wrapping_neg(),
        |x| x | 0x10,
        |x| x & !0x400,
    ];
    let mut random = Random::new(12);
    let order: Vec<u8> = (0..4096).map(|_| (random.next() >> 60) as u8).collect();
    let mut value = 1u64;
    for _ in 0..run.rounds {
        for target in black_box(&order) {
            value = black_box(&TARGETS)[usize::from(*target)](value & u64::MAX >> 1);
        }
    }
    value
}

/// An interpreter of bytes: one indirect jump for each.
pub fn bytecode(run: &Run) -> u64 {
    let program: Vec<u8> = Random::new(13).bytes(2048);
    let (mut stack, mut top, mut value) = ([0u64; 16], 0usize, 1u64);
    for _ in 0..run.rounds {
        for &code in black_box(&program) {
            match code & 15 {
                0 => value = value.wrapping_add(stack[top]),
                1 => value ^= stack[top],
                2 => value = value.wrapping_mul(0x9e37_79b9),
                3 => value = value.rotate_left(u32::from(code >> 4)),
                4 => stack[top] = value,
                5 => top = (top + 1) & 15,
                6 => top = top.wrapping_sub(1) & 15,
                7 => std::mem::swap(&mut value, &mut stack[top]),
                8 => value = !value,
                9 if value & 1 == 0 => value >>= 1,
                10 if value & 2 == 0 => value = value.wrapping_add(7),
                11 => stack[top] = stack[top].wrapping_sub(value),
                12 => value = value.swap_bytes(),
                13 => stack[(top + 3) & 15] ^= value,
                14 => value = value.wrapping_sub(u64::from(code)),
                _ => stack[top] = stack[top].wrapping_add(1),
            }
        }
    }
    stack.iter().fold(value, |sum, item| sum ^ item)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_the_standards() {
        let constants = Sha256Constants::new();
        let mut block = [0; 64];
        block[..4].copy_from_slice(b"abc\x80");
        block[63] = 24;
        let mut state = constants.initial;
        constants.compress(&mut state, &block);
        assert_eq!((state[0], state[7]), (0xba78_16bf, 0xf200_15ad));
    }

    #[test]
    fn packing_makes_text_smaller_and_loses_nothing() {
        for text in [Random::new(1).text(10_000), Random::new(1).bytes(1000), b"abc".to_vec(), vec![0; 5000]] {
            assert_eq!(unpack(&pack(&text)), text);
        }
        assert!(pack(&Random::new(1).text(100_000)).len() < 70_000);
    }
}
