//! Guests to start from: code, tables and a CPU state in every mode, sound enough to get somewhere.

use vireo_cpu::{CpuState, DescriptorTable, Segment};
use vireo_memory::{GuestMemory, HIGH_RAM_START};

use super::{code, random::Random};

/// Where things are. Everything below is within the smallest RAM.
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x7000;
const IDT: u64 = 0x8000;
const TSS: u64 = 0x9000;
const STACK: u64 = 0xe000;
const CODE: u64 = 0x1_0000;
const CODE_BYTES: usize = 0x1800;

pub const LEAST_RAM: u64 = 0x4_0000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Real,
    Protected,
    Paged,
    Pae,
    Long,
}

/// Fills memory, and says how the vCPUs begin.
pub fn guest(random: &mut Random, memory: &GuestMemory, vcpus: u64) -> Vec<CpuState> {
    let mode = random.pick(&[Mode::Real, Mode::Protected, Mode::Paged, Mode::Pae, Mode::Long, Mode::Long, Mode::Long]);
    let bits = match mode {
        Mode::Real => 16,
        Mode::Long => 64,
        _ => 32,
    };
    if random.chance(40) {
        let mut all = vec![0; memory.low_bytes() as usize];
        random.bytes(&mut all);
        put(memory, 0, &all);
    }
    let entries = write_code(random, memory, bits);
    write_tables(random, memory, mode);
    write_descriptors(random, memory, mode, &entries);
    (0..vcpus).map(|_| state(random, memory, mode, &entries)).collect()
}

fn put(memory: &GuestMemory, gpa: u64, bytes: &[u8]) {
    memory.write(gpa, bytes).expect("tables and code are placed in RAM");
}

/// The same code at a good place, across a page's end, at the end of RAM, and above 4 GiB; where to enter it.
fn write_code(random: &mut Random, memory: &GuestMemory, bits: u32) -> Vec<u64> {
    let code = code::program(random, bits, CODE_BYTES, memory.low_bytes());
    let code = &code[..CODE_BYTES];
    let mut starts = vec![CODE, CODE + 0x4000 - 0x20, memory.low_bytes() - CODE_BYTES as u64];
    if memory.high_bytes() >= CODE_BYTES as u64 {
        starts.push(HIGH_RAM_START);
    }
    for start in &starts {
        put(memory, *start, code);
    }
    let mut entries = starts.clone();
    for _ in 0..12 {
        entries.push(random.pick(&starts) + random.below(CODE_BYTES as u64));
    }
    entries.extend([memory.low_bytes() - 1, memory.low_bytes() - 7, CODE + 0xfff, memory.low_bytes()]);
    entries
}

/// A page table entry: the page itself, mostly, else anything.
fn entry(random: &mut Random, frame: u64, ram_bytes: u64) -> u64 {
    match random.below(24) {
        0 => random.next(),
        1 => frame | random.below(0x1000),
        2 => (random.integer(ram_bytes) & 0x000f_ffff_ffff_f000) | 7,
        3 => TABLES + random.below(6) * 0x1000 + 7,
        4 => 0xfee0_0000 | 7,
        _ => frame | 7,
    }
}

/// Page tables that map the first 2 MiB where they are, again and again, with some entries astray.
fn write_tables(random: &mut Random, memory: &GuestMemory, mode: Mode) {
    let ram = memory.low_bytes();
    let wide = matches!(mode, Mode::Pae | Mode::Long);
    let (bytes, count) = if wide { (8, 512) } else { (4, 1024) };
    for (level, table) in (0..4).map(|level| (level, TABLES + level * 0x1000)) {
        for i in 0..count {
            let frame = match (level, wide) {
                (3, _) => i << 12,
                (2, true) => TABLES + 0x3000,
                (1, true) => TABLES + 0x2000,
                (0, true) => TABLES + 0x1000,
                (_, false) => TABLES + 0x3000,
                _ => 0,
            };
            // the page directory pointers of PAE have other bits than the rest
            let value = match (mode, level) {
                (Mode::Pae, 1) if !random.chance(5) => frame | 1,
                (Mode::Long | Mode::Pae | Mode::Paged, 3) if i < 0x20 && !random.chance(2) => frame | 7,
                _ => entry(random, frame, ram),
            };
            put(memory, table + i * bytes, &value.to_le_bytes()[..bytes as usize]);
        }
    }
}

/// GDT, IDT and TSS. Selectors 8 and 16 are code and data of the mode, the rest is what chance says.
fn write_descriptors(random: &mut Random, memory: &GuestMemory, mode: Mode, entries: &[u64]) {
    let long = mode == Mode::Long;
    let code = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    let user_code = if long { 0x00af_fb00_0000_ffff } else { 0x00cf_fb00_0000_ffff };
    let tss = 0x0000_8900_0000_0067 | TSS << 16;
    let gate = u64::from(entries[0] as u16) | 8 << 16 | 0xec00 << 32;
    let mut gdt = vec![0, code, 0x00cf_9300_0000_ffff, tss, 0, user_code, 0x00cf_f300_0000_ffff, gate, 0];
    for _ in 0..32 {
        let descriptor = random.next() & random.next()
            | random.pick(&[0u64, 0x9300 << 32, 0x8b00 << 32, 0xe500 << 32, 0x8500 << 32]);
        gdt.push(descriptor);
    }
    put(memory, GDT, &gdt.iter().flat_map(|d| d.to_le_bytes()).collect::<Vec<_>>());
    if mode == Mode::Real {
        for i in 0..256u64 {
            let at = random.pick(entries);
            put(memory, i * 4, &((at >> 4 << 16 | at & 15) as u32).to_le_bytes());
        }
        return;
    }
    for i in 0..256u64 {
        let at = random.pick(entries);
        let selector = if random.chance(97) { 8 } else { random.below(0x140) };
        let task = random.chance(4);
        let rights = if task { 0xe500 } else { random.pick(&[0xee00u64, 0x8e00, 0x8e00, 0x8f00]) };
        let ist = if long && random.chance(30) { random.below(8) } else { 0 };
        let low = at & 0xffff | selector << 16 | ist << 32 | rights << 32 | (at >> 16 & 0xffff) << 48;
        if long {
            put(memory, IDT + i * 16, &low.to_le_bytes());
            put(memory, IDT + i * 16 + 8, &(at >> 32).to_le_bytes());
        } else {
            put(memory, IDT + i * 8, &low.to_le_bytes());
        }
    }
    let mut image = [0u8; 0x68];
    for at in (4..0x60).step_by(8) {
        let stack = if random.chance(80) { STACK } else { random.integer(memory.low_bytes()) };
        image[at..at + 8].copy_from_slice(&stack.to_le_bytes());
    }
    put(memory, TSS, &image);
}

fn state(random: &mut Random, memory: &GuestMemory, mode: Mode, entries: &[u64]) -> CpuState {
    let ram = memory.low_bytes();
    let mut state = CpuState::reset();
    for register in &mut state.gpr {
        *register = random.integer(ram);
    }
    state.gpr[4] = if random.chance(90) { STACK } else { random.integer(ram) };
    state.rip = random.pick(entries);
    state.rflags = 2 | random.pick(&[0, 0x200, 0x3202, 0x100, 0x40200, 0x4000]);
    state.xcr0 = random.pick(&[1, 3, 7]);
    state.cr4 = random.pick(&[0x6a0, 0x4_06a0, 0x37_06a0, 0x4_07a0]);
    state.cr3 = if mode == Mode::Pae { TABLES + 0x1000 } else { TABLES };
    state.gdtr = DescriptorTable { base: GDT, limit: 41 * 8 - 1 };
    let idt = if random.chance(95) { IDT } else { random.integer(ram) };
    state.idtr = DescriptorTable { base: idt, limit: 0xfff };
    state.tr = Segment { selector: 0x18, base: TSS, ..Segment::TSS };
    let (code, cr0) = match mode {
        Mode::Real => (Segment { selector: 0, limit: 0xffff, rights: 0x9b, ..Segment::CODE32 }, 0x10),
        Mode::Protected => (Segment::CODE32, 0x11),
        Mode::Paged | Mode::Pae => (Segment::CODE32, 0x8000_0011),
        Mode::Long => (Segment::CODE64, 0x8000_0011),
    };
    state.cr0 = cr0 | random.pick(&[0, 0x1_0000, 0x20, 0x5_0022, 0x8, 0x4]);
    if mode == Mode::Paged {
        state.cr4 &= !0x20;
    }
    if mode == Mode::Long {
        state.efer = 0xd01;
    } else {
        state.cr4 &= !0x2_0000;
    }
    let data =
        if mode == Mode::Real { Segment { limit: 0xffff, rights: 0x93, ..Segment::DATA } } else { Segment::DATA };
    state.segments = [Segment { selector: 0x10, ..data }; 6];
    state.segments[1] = Segment { selector: 8, ..code };
    if mode == Mode::Real {
        state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
        state.segments[1].base = state.rip & !0xf;
        state.segments[1].selector = (state.rip >> 4) as u16;
        state.rip &= 0xf;
    }
    if random.chance(20) && mode != Mode::Real {
        // user mode
        state.segments[1].selector = 0x2b;
        state.segments[1].rights |= 0x60;
        for i in [0, 2, 3] {
            state.segments[i].selector = 0x33;
            state.segments[i].rights |= 0x60;
        }
    }
    if random.chance(30) {
        random.bytes(&mut state.xsave[..512]);
        let mxcsr = random.next() as u32 & 0xffff;
        state.xsave[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    }
    if random.chance(10) {
        distort(random, &mut state, ram);
    }
    state
}

/// What only a damaged snapshot has.
fn distort(random: &mut Random, state: &mut CpuState, ram: u64) {
    for _ in 0..1 + random.below(4) {
        let value = random.integer(ram);
        match random.below(16) {
            0 => state.cr0 = value,
            1 => state.cr3 = value,
            2 => state.cr4 = value,
            3 => state.efer = value,
            4 => state.rflags = value,
            5 => state.xcr0 = value,
            6 => state.rip = value,
            7 => state.debug[random.below(6) as usize] = value,
            8 => state.gdtr.base = value,
            9 => state.tr = segment(random, ram),
            10 => random.bytes(&mut state.xsave),
            11 => state.xsave.truncate(random.below(600) as usize),
            12 => state.msrs = vec![(random.next() as u32, value), (0xc000_0080, value), (0x1b, value)],
            13 => {
                state.apic.registers = vec![0; random.pick(&[0, 1, 1024, 4096])];
                random.bytes(&mut state.apic.registers);
                state.apic.base_msr = value;
            }
            14 => state.tsc = value,
            _ => state.segments[random.below(6) as usize] = segment(random, ram),
        }
    }
}

fn segment(random: &mut Random, ram: u64) -> Segment {
    Segment {
        selector: random.next() as u16,
        base: random.integer(ram),
        limit: random.next() as u32,
        rights: random.next() as u16,
        unusable: random.chance(30),
    }
}
