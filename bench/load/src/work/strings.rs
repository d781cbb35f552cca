//! The C library's string functions, which choose their vectors by CPUID, and the processor's own.

use std::{arch::asm, ffi::c_void, hint::black_box};

use super::{Run, random::Random};

/// Strings with an end, of 0 to `most` bytes.
fn strings(most: u64) -> Vec<Vec<u8>> {
    let mut random = Random::new(30);
    let one = |random: &mut Random| {
        let mut text: Vec<u8> = (0..random.next() % most).map(|_| b'a' + (random.next() % 26) as u8).collect();
        text.push(0);
        text
    };
    (0..64).map(|_| one(&mut random)).collect()
}

pub fn strlen(run: &Run) -> u64 {
    let (short, long) = (strings(40), strings(8 << 10));
    let mut sum = 0;
    for turn in 0..run.rounds {
        for text in if turn % 16 == 0 { &long } else { &short } {
            // SAFETY: the strings end with a zero.
            sum += unsafe { libc::strlen(black_box(text.as_ptr()).cast()) } as u64;
        }
    }
    sum
}

pub fn memchr(run: &Run) -> u64 {
    let (short, long) = (strings(40), strings(8 << 10));
    let mut sum = 0;
    for turn in 0..run.rounds {
        for text in if turn % 16 == 0 { &long } else { &short } {
            // SAFETY: it looks at no more than the string.
            let found = unsafe { libc::memchr(black_box(text.as_ptr()).cast(), 0, text.len()) };
            sum += (found as usize - text.as_ptr() as usize) as u64;
        }
    }
    sum
}

pub fn strcmp(run: &Run) -> u64 {
    let left = [strings(40), strings(8 << 10)].concat();
    let mut right = left.clone();
    for text in right.iter_mut().skip(1).step_by(4) {
        let end = text.len() - 1;
        text[end / 2] = text[end / 2].saturating_sub(1);
    }
    let mut equal = 0;
    for turn in 0..run.rounds {
        let range = if turn % 16 == 0 { 64..128 } else { 0..64 };
        for (x, y) in left[range.clone()].iter().zip(&right[range]) {
            // SAFETY: the strings end with a zero.
            equal += u64::from(unsafe { libc::strcmp(black_box(x.as_ptr()).cast(), y.as_ptr().cast()) } == 0);
        }
    }
    equal
}

/// Copies of `least` to `least + range` bytes, to wherever they fall.
fn copies(rounds: u64, least: u64, range: u64) -> u64 {
    let mut random = Random::new(31);
    let from = random.bytes((least + range) as usize + 64);
    let mut to = vec![0u8; from.len() + 64];
    let sizes: Vec<(usize, usize)> =
        (0..256).map(|_| ((least + random.next() % range) as usize, random.next() as usize % 64)).collect();
    for _ in 0..rounds {
        for &(size, shift) in black_box(&sizes) {
            // SAFETY: both have room for the longest copy and the furthest shift.
            unsafe { libc::memcpy(to.as_mut_ptr().add(shift).cast(), from.as_ptr().add(shift / 3).cast(), size) };
        }
        // SAFETY: as above.
        unsafe { libc::memset(black_box(to.as_mut_ptr()).cast(), 1, least as usize) };
    }
    to.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

pub fn memcpy_short(run: &Run) -> u64 {
    copies(run.rounds, 1, 96)
}

pub fn memcpy_long(run: &Run) -> u64 {
    copies(run.rounds, 4 << 10, 60 << 10)
}

/// REP MOVSB and REP MOVSQ, large and small.
pub fn rep_movs(run: &Run) -> u64 {
    let from = Random::new(32).bytes(64 << 10);
    let mut to = vec![0u8; from.len()];
    let mut copy = |bytes: usize, shift: usize| {
        // SAFETY: no caller asks for more than 60 KiB at a shift of less than 4 KiB.
        unsafe {
            asm!("rep movsb", inout("rcx") bytes => _, inout("rsi") from.as_ptr().add(shift) => _,
                inout("rdi") to.as_mut_ptr().add(shift / 2) => _, options(nostack, preserves_flags));
            asm!("rep movsq", inout("rcx") bytes / 16 => _, inout("rsi") from.as_ptr().add(shift / 3) => _,
                inout("rdi") to.as_mut_ptr().add(shift) => _, options(nostack, preserves_flags));
        }
    };
    for turn in 0..run.rounds {
        let bytes = if turn % 8 == 0 { 60 << 10 } else { 64 + (turn as usize * 37) % 1000 };
        copy(bytes, (turn as usize * 13) % 4096);
    }
    to.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

/// REP STOSB and REP STOSQ.
pub fn rep_stos(run: &Run) -> u64 {
    let mut to = vec![0u8; 64 << 10];
    for turn in 0..run.rounds {
        let bytes = if turn % 8 == 0 { 60 << 10 } else { 64 + (turn as usize * 37) % 1000 };
        let shift = (turn as usize * 13) % 4096;
        // SAFETY: 60 KiB at a shift of less than 4 KiB is the most.
        unsafe {
            asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to.as_mut_ptr().add(shift) => _,
                in("al") turn as u8, options(nostack, preserves_flags));
            asm!("rep stosq", inout("rcx") bytes / 16 => _, inout("rdi") to.as_mut_ptr().add(shift / 2) => _,
                in("rax") turn, options(nostack, preserves_flags));
        }
    }
    to.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

/// REPNE SCASB and REPE CMPSB: how long until they differ.
pub fn rep_scas(run: &Run) -> u64 {
    let mut left = vec![1u8; 8 << 10];
    let mut right = left.clone();
    let mut sum = 0;
    for turn in 0..run.rounds {
        let end = (turn as usize * 97) % left.len();
        (left[end], right[end]) = (0, 2);
        let (mut scanned, mut compared) = (left.len(), left.len());
        // SAFETY: both count down from the length of what they read.
        unsafe {
            asm!("repne scasb", inout("rcx") scanned, inout("rdi") left.as_ptr() => _, in("al") 0u8,
                options(nostack, readonly));
            asm!("repe cmpsb", inout("rcx") compared, inout("rsi") left.as_ptr() => _,
                inout("rdi") right.as_ptr() => _, options(nostack, readonly));
        }
        sum = (sum * 3) % 1_000_003 + (scanned + compared) as u64;
        (left[end], right[end]) = (1, 1);
    }
    sum
}

/// A word in a text, as the C library finds it.
pub fn memmem(run: &Run) -> u64 {
    let text = Random::new(33).text(32 << 10);
    let needles: Vec<&[u8]> = (0..8).map(|i| &text[30_000 + i * 100..30_000 + i * 100 + 6 + 3 * i]).collect();
    let start: *const c_void = text.as_ptr().cast();
    let mut sum = 0;
    for turn in 0..run.rounds {
        let needle = needles[turn as usize % needles.len()];
        // SAFETY: both are given with their lengths.
        let found = unsafe { libc::memmem(black_box(start), text.len(), needle.as_ptr().cast(), needle.len()) };
        sum += (found as usize - start as usize) as u64;
    }
    sum
}
