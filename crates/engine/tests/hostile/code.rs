//! Guest code: random bytes, random valid instructions, and the system's instructions with something in their registers.

use iced_x86::{Decoder, DecoderOptions};

use super::random::Random;

/// `bytes` of it or a little more, for code segments of this many bits.
pub fn program(random: &mut Random, bits: u32, bytes: usize, ram_bytes: u64) -> Vec<u8> {
    let mut code = Vec::with_capacity(bytes + 32);
    while code.len() < bytes {
        match random.below(16) {
            0 => {
                let mut raw = vec![0; random.below(20) as usize];
                random.bytes(&mut raw);
                code.extend(raw);
            }
            1..=4 => load(random, bits, ram_bytes, &mut code),
            5 | 6 => system(random, bits, ram_bytes, &mut code),
            7 => string(random, bits, ram_bytes, &mut code),
            8 => code.extend([random.pick(&[0xeb, 0x74, 0x75, 0xe2, 0x72]), random.next() as u8]),
            _ => valid(random, bits, &mut code),
        }
    }
    // A mutation here and there.
    for _ in 0..random.below(4) {
        let at = random.below(code.len() as u64) as usize;
        code[at] ^= 1 << random.below(8);
    }
    code
}

/// MOV of an interesting number to a register that is not the stack pointer, mostly.
fn load(random: &mut Random, bits: u32, ram_bytes: u64, code: &mut Vec<u8>) {
    let value = random.integer(ram_bytes).to_le_bytes();
    let stack = random.chance(1);
    let register = if stack { 4 } else { random.pick(&[0u8, 1, 2, 3, 5, 6, 7]) };
    load_register(bits, register, value, random.chance(30), code);
}

fn load_register(bits: u32, register: u8, value: [u8; 8], high: bool, code: &mut Vec<u8>) {
    match bits {
        64 => {
            code.extend([if high { 0x49 } else { 0x48 }, 0xb8 | register]);
            code.extend(value);
        }
        32 => {
            code.push(0xb8 | register);
            code.extend(&value[..4]);
        }
        _ => {
            code.extend([0x66, 0xb8 | register]);
            code.extend(&value[..4]);
        }
    }
}

/// Instructions that are seldom hit upon by chance, after what makes them do something.
fn system(random: &mut Random, bits: u32, ram_bytes: u64, code: &mut Vec<u8>) {
    const MSRS: [u32; 31] = [
        0x10,
        0x1b,
        0x3a,
        0x3b,
        0x11,
        0x12,
        0x8b,
        0x174,
        0x175,
        0x176,
        0x179,
        0x17a,
        0x1a0,
        0x277,
        0x2ff,
        0x6e0,
        0x802,
        0x80b,
        0x80f,
        0x830,
        0x832,
        0x838,
        0x83e,
        0x83f,
        0x4b56_4d00,
        0x4b56_4d01,
        0x4b56_4d03,
        0xc000_0080,
        0xc000_0081,
        0xc000_0082,
        0xc000_0102,
    ];
    const MORE: [&[u8]; 30] = [
        &[0xf4],                         // hlt
        &[0xfb],                         // sti
        &[0xfa],                         // cli
        &[0xcf],                         // iret
        &[0x48, 0xcf],                   // iretq
        &[0x0f, 0x05],                   // syscall
        &[0x48, 0x0f, 0x07],             // sysretq
        &[0x0f, 0x34],                   // sysenter
        &[0x0f, 0x35],                   // sysexit
        &[0xcb],                         // retf
        &[0x9d],                         // popf
        &[0x0f, 0x06],                   // clts
        &[0x0f, 0x01, 0xf8],             // swapgs
        &[0x0f, 0x01, 0xcb],             // stac
        &[0x0f, 0x01, 0xd1],             // xsetbv
        &[0x0f, 0x01, 0xd0],             // xgetbv
        &[0x0f, 0x00, 0xd8],             // ltr ax
        &[0x0f, 0x00, 0xd0],             // lldt ax
        &[0x8e, 0xd0],                   // mov ss, ax
        &[0x8e, 0xd8],                   // mov ds, ax
        &[0x0f, 0x01, 0x3e],             // invlpg [esi]
        &[0x0f, 0x01, 0x1e],             // lidt [esi]
        &[0x0f, 0x01, 0x16],             // lgdt [esi]
        &[0x66, 0x0f, 0x38, 0x82, 0x06], // invpcid eax, [esi]
        &[0x0f, 0xae, 0x2e],             // xrstor [esi]
        &[0x0f, 0xae, 0x0e],             // fxrstor [esi]
        &[0x0f, 0xae, 0x26],             // xsave [esi]
        &[0x0f, 0xae, 0x16],             // ldmxcsr [esi]
        &[0xdd, 0x26],                   // frstor [esi]
        &[0xd9, 0x2e],                   // fldcw [esi]
    ];
    if random.chance(50) {
        load_register(bits, 6, (random.integer(ram_bytes) & !63).to_le_bytes(), false, code);
    }
    match random.below(8) {
        0 | 1 => {
            load_register(bits, 1, u64::from(random.pick(&MSRS)).to_le_bytes(), false, code);
            code.extend([0x0f, random.pick(&[0x30, 0x30, 0x32])]);
        }
        2 => {
            // mov crN, eax with a value that has a chance, or eax as it is
            if random.chance(70) {
                let value = random.pick(&[0x8000_0011u64, 0x11, 0x8001_0033, 0x20, 0x6a0, 0x37_06a0, 0x1000, 0x2000]);
                load_register(bits, 0, (value ^ (1 << random.below(32))).to_le_bytes(), false, code);
            }
            code.extend([0x0f, 0x22, 0xc0 | random.pick(&[0, 2, 3, 4, 0]) << 3]);
        }
        3 => code.extend([0x0f, 0x23, 0xc0 | (random.below(8) as u8) << 3]),
        4 => code.extend([0xcd, random.next() as u8]),
        _ => code.extend(random.pick(&MORE)),
    }
}

/// A string instruction, mostly with a prefix and a huge count.
fn string(random: &mut Random, bits: u32, ram_bytes: u64, code: &mut Vec<u8>) {
    for register in [6, 7] {
        load_register(bits, register, random.integer(ram_bytes).to_le_bytes(), false, code);
    }
    let count = random.pick(&[u64::MAX, 1 << 40, 5000, 3]);
    load_register(bits, 1, count.to_le_bytes(), false, code);
    code.extend(random.pick(&[&[0xfcu8][..], &[0xfd], &[]]));
    code.extend(random.pick(&[&[0xf3u8][..], &[0xf2], &[0x66, 0xf3], &[]]));
    if bits == 64 && random.chance(40) {
        code.push(0x48);
    }
    code.push(random.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0x6c, 0x6d, 0x6e, 0x6f]));
}

/// Any instruction that decodes: prefixes, one of the opcode maps, random operands.
fn valid(random: &mut Random, bits: u32, code: &mut Vec<u8>) {
    for _ in 0..50 {
        let mut bytes = Vec::with_capacity(32);
        for _ in 0..random.pick(&[0, 0, 0, 1, 1, 2]) {
            bytes.push(random.pick(&[0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x64, 0x65, 0x26]));
        }
        let rex = 0x40 | (random.next() as u8 & 15);
        match random.below(8) {
            0..=2 => bytes.extend((bits == 64 && random.chance(40)).then_some(rex)),
            3 | 4 => {
                bytes.extend((bits == 64 && random.chance(40)).then_some(rex));
                bytes.push(0x0f);
            }
            5 => bytes.extend([0x0f, random.pick(&[0x38, 0x3a])]),
            6 => bytes.extend([0xc5, random.next() as u8]),
            _ => bytes.extend([0xc4, random.next() as u8 & 0xe0 | random.pick(&[1, 2, 3]), random.next() as u8]),
        }
        let start = bytes.len();
        bytes.resize(start + 14, 0);
        random.bytes(&mut bytes[start..]);
        if random.chance(30) {
            // an address with a small displacement, off a register
            bytes[start + 1] = bytes[start + 1] & 0x3f | 0x40;
        }
        let insn = Decoder::new(bits, &bytes, DecoderOptions::NONE).decode();
        if !insn.is_invalid() {
            code.extend(&bytes[..insn.len()]);
            return;
        }
    }
}
