//! Floating point and vectors: scalar SSE, packed SSE and AVX2, x87, the C library's mathematics.

use std::{arch::asm, arch::x86_64::*, hint::black_box};

use super::{Run, random::Random};

/// Bodies that attract each other, in double precision.
pub fn nbody(run: &Run) -> u64 {
    let mut random = Random::new(20);
    let mut unit = || (random.next() >> 12) as f64 / (1u64 << 52) as f64;
    let mut place: [[f64; 3]; 5] = std::array::from_fn(|_| std::array::from_fn(|_| unit() * 10.0));
    let mut speed = [[0.0f64; 3]; 5];
    let mass: [f64; 5] = std::array::from_fn(|_| unit());
    for _ in 0..run.rounds {
        for i in 0..5 {
            for j in i + 1..5 {
                let apart: [f64; 3] = std::array::from_fn(|k| place[i][k] - place[j][k]);
                let square = apart.iter().map(|x| x * x).sum::<f64>() + 0.01;
                let pull = 0.001 / (square * square.sqrt());
                for k in 0..3 {
                    speed[i][k] -= apart[k] * mass[j] * pull;
                    speed[j][k] += apart[k] * mass[i] * pull;
                }
            }
        }
        for (place, speed) in place.iter_mut().zip(&speed) {
            for (x, v) in place.iter_mut().zip(speed) {
                *x += 0.001 * v;
            }
        }
    }
    place.iter().flatten().fold(0, |sum: u64, x| sum.rotate_left(7) ^ x.to_bits())
}

pub fn mandelbrot(run: &Run) -> u64 {
    let mut inside = 0;
    let size = black_box(64);
    for _ in 0..run.rounds {
        for y in 0..size {
            for x in 0..size {
                let (re, im) = (f64::from(x) * 3.0 / f64::from(size) - 2.0, f64::from(y) * 2.0 / f64::from(size) - 1.0);
                let (mut a, mut b, mut steps) = (0.0, 0.0, 0);
                while a * a + b * b < 4.0 && steps < 100 {
                    (a, b) = (a * a - b * b + re, 2.0 * a * b + im);
                    steps += 1;
                }
                inside += steps;
            }
        }
    }
    inside
}

const SIDE: usize = 64;

fn matrices() -> (Vec<f32>, Vec<f32>) {
    // Small whole numbers: sums are exact in whatever order they are made.
    let mut random = Random::new(21);
    let mut matrix = || (0..SIDE * SIDE).map(|_| (random.next() % 16) as f32).collect();
    (matrix(), matrix())
}

fn sum_of(matrix: &[f32]) -> u64 {
    matrix.iter().fold(0, |sum: u64, x| sum.rotate_left(3) ^ u64::from(x.to_bits()))
}

pub fn matrix_sse(run: &Run) -> u64 {
    let (left, right) = matrices();
    let mut product = vec![0f32; SIDE * SIDE];
    for _ in 0..run.rounds {
        for row in 0..SIDE {
            for column in (0..SIDE).step_by(4) {
                // SAFETY: SSE2 is part of x86-64; rows and columns are below SIDE, and four of them are left.
                unsafe {
                    let mut sum = _mm_setzero_ps();
                    for k in 0..SIDE {
                        let x = _mm_set1_ps(*black_box(&left).get_unchecked(row * SIDE + k));
                        let y = _mm_loadu_ps(right.as_ptr().add(k * SIDE + column));
                        sum = _mm_add_ps(sum, _mm_mul_ps(x, y));
                    }
                    _mm_storeu_ps(product.as_mut_ptr().add(row * SIDE + column), sum);
                }
            }
        }
    }
    sum_of(&product)
}

pub fn matrix_avx2(run: &Run) -> u64 {
    assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"), "the CPU has no AVX2 and FMA");
    let (left, right) = matrices();
    let mut product = vec![0f32; SIDE * SIDE];
    for _ in 0..run.rounds {
        // SAFETY: it was just asked for AVX2 and FMA; all three are square matrices of SIDE.
        unsafe { multiply_avx2(black_box(&left), &right, &mut product) };
    }
    sum_of(&product)
}

/// # Safety
/// AVX2 and FMA are there, and all three have SIDE × SIDE elements.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_avx2(left: &[f32], right: &[f32], product: &mut [f32]) {
    for row in 0..SIDE {
        for column in (0..SIDE).step_by(16) {
            // SAFETY: rows and columns are below SIDE, and sixteen of them are left.
            unsafe {
                let (mut low, mut high) = (_mm256_setzero_ps(), _mm256_setzero_ps());
                for k in 0..SIDE {
                    let x = _mm256_set1_ps(*left.get_unchecked(row * SIDE + k));
                    let y = right.as_ptr().add(k * SIDE + column);
                    low = _mm256_fmadd_ps(x, _mm256_loadu_ps(y), low);
                    high = _mm256_fmadd_ps(x, _mm256_loadu_ps(y.add(8)), high);
                }
                let to = product.as_mut_ptr().add(row * SIDE + column);
                _mm256_storeu_ps(to, low);
                _mm256_storeu_ps(to.add(8), high);
            }
        }
    }
}

/// Bytes in vectors: compare, shuffle, shift, differences.
pub fn bytes_avx2(run: &Run) -> u64 {
    assert!(is_x86_feature_detected!("avx2"), "the CPU has no AVX2");
    let data = Random::new(22).bytes(16 << 10);
    (0..run.rounds).fold(0, |sum: u64, turn| {
        // SAFETY: it was just asked for AVX2.
        sum.wrapping_mul(3).wrapping_add(unsafe { look_at_bytes(black_box(&data), turn as i8) })
    })
}

#[target_feature(enable = "avx2")]
fn look_at_bytes(data: &[u8], wanted: i8) -> u64 {
    let (mut found, mut apart) = (0u64, _mm256_setzero_si256());
    let wanted = _mm256_set1_epi8(wanted);
    let order = _mm256_broadcastsi128_si256(_mm_set_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    for chunk in data.as_chunks::<32>().0 {
        // SAFETY: a chunk is as long as the vector.
        let bytes = unsafe { _mm256_loadu_si256(chunk.as_ptr().cast()) };
        let same = _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, wanted)) as u32;
        found += u64::from(same.count_ones());
        let moved = _mm256_shuffle_epi8(bytes, order);
        let mixed = _mm256_xor_si256(_mm256_slli_epi16::<3>(moved), _mm256_permute4x64_epi64::<0x4e>(bytes));
        apart = _mm256_add_epi64(apart, _mm256_sad_epu8(_mm256_max_epu8(mixed, bytes), wanted));
    }
    let mut lanes = [0u64; 4];
    // SAFETY: four lanes are as long as the vector.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), apart) };
    found << 40 ^ lanes.iter().sum::<u64>()
}

/// AES rounds and carry-less products, as disk encryption and TLS do them.
pub fn aes(run: &Run) -> u64 {
    assert!(
        is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq"),
        "the CPU has no AES and PCLMULQDQ"
    );
    // SAFETY: it was just asked for AES and PCLMULQDQ.
    unsafe { encrypt(run.rounds) }
}

#[target_feature(enable = "aes,pclmulqdq")]
fn encrypt(rounds: u64) -> u64 {
    let mut random = Random::new(23);
    let keys: [__m128i; 10] =
        std::array::from_fn(|_| _mm_set_epi64x(random.next().cast_signed(), random.next().cast_signed()));
    let (mut state, mut tag) = (keys[0], keys[1]);
    for _ in 0..rounds {
        for key in black_box(&keys) {
            state = _mm_aesenc_si128(state, *key);
        }
        state = _mm_aesenclast_si128(state, keys[3]);
        let (low, high) = (_mm_clmulepi64_si128::<0x00>(tag, keys[5]), _mm_clmulepi64_si128::<0x11>(tag, keys[5]));
        tag = _mm_xor_si128(_mm_xor_si128(low, high), state);
    }
    let both = _mm_xor_si128(state, tag);
    (_mm_cvtsi128_si64(both) ^ _mm_cvtsi128_si64(_mm_unpackhi_epi64(both, both))).cast_unsigned()
}

/// Only operations that IEEE 754 defines to the last bit: QEMU and a processor agree on those.
pub fn x87(run: &Run) -> u64 {
    let mut values = [1.5f64, 0.75];
    let step = 3i32;
    for _ in 0..run.rounds {
        // SAFETY: it reads and writes two doubles and an integer that live here, and leaves the x87 stack as it was.
        unsafe {
            asm!(
                "fld qword ptr [{values}]",
                "fld qword ptr [{values} + 8]",
                "fld st(1)",
                "fmul st, st(1)",
                "fld1",
                "faddp st(1), st",
                "fsqrt",
                "fxch st(1)",
                "fdiv st, st(1)",
                "fild dword ptr [{step}]",
                "fsubrp st(1), st",
                "fabs",
                "fld1",
                "faddp st(1), st",
                "fcomi st, st(2)",
                "fcmovb st, st(1)",
                "fstp qword ptr [{values} + 8]",
                "fadd st, st(1)",
                "fsqrt",
                "fstp qword ptr [{values}]",
                "fstp st(0)",
                values = in(reg) values.as_mut_ptr(),
                step = in(reg) &step,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
    }
    values[0].to_bits() ^ values[1].to_bits().rotate_left(9)
}

/// Rounded, because the C library takes another way on CPUs with FMA.
pub fn mathematics(run: &Run) -> u64 {
    let mut sum = 0.0;
    for turn in 0..run.rounds {
        let x = black_box((turn % 1000) as f64 * 0.01 + 0.1);
        sum += x.sin() + (-x).exp() + x.ln() + x.powf(1.3) + x.atan();
    }
    (sum * 1e3).round() as u64
}
