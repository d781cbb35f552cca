//! Guests whose loops stay hot while what they reach is changed under them: pages come from elsewhere, go, may no longer
//! be written, become code; address spaces, privileges and what these may do change.
//!
//! A guest is a script that calls loops at both privileges. Events happen between calls and inside of loops; each is a
//! routine of its own, and does what the manual asks for before the change may be relied upon (Intel SDM vol. 3, 5.10.4).

use std::fmt::Write;

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, FastFormatter, Instruction, MemoryOperand, Register as R};
use vireo_cpu::Segment;

use super::{
    guest::{DONE, EXCEPTION_STACK, Guest},
    random_code::{
        bare::{self, TSS},
        random::Random,
    },
    runtime::{self, CURSOR, EVENT_COUNT, EVENTS, RANGES, RUNTIME, STEPS, entry},
};

const RAM: u64 = 8 << 20;
const STACK_END: u64 = 0x2_1000;
const USER_STACK: (u64, u64) = (0x5000_0000, 0x2_a000);
/// A page of user code: the way back.
const EVENT_CODE: u64 = 0x8_0000;
const TABLES: u64 = 0x10_0000;
const TABLES_OF_ONE: u64 = 0x4_0000;
const SCRIPT: u64 = 0x20_0000;
const SCRIPT_BYTES: usize = 0x1_0000;
const LOOPS: u64 = 0x21_0000;
const LOOP_BYTES: usize = 0x600;
const LOOP_COUNT: u64 = 24;
const WAY_BACK: u64 = LOOPS + LOOP_BYTES as u64 * LOOP_COUNT;
const EVENT_CALL: u64 = WAY_BACK + 0x40;
const FRAMES: u64 = 0x30_0000;
const FRAME_COUNT: u64 = 16;
/// Where each frame has a function: MOV EAX, imm32; RET. Loops seldom write there.
const FUNCTION: u64 = 0xc00;
const LARGE_FRAMES: [u64; 2] = [0x40_0000, 0x60_0000];
const EVENT: u8 = 0x82;
const BACK: u8 = 0x81;
const SPACES: u64 = 2;

/// A run of pages that events change.
struct Area {
    start: u64,
    pages: u64,
    shift: u32,
    user: bool,
    /// All address spaces have one table for it, and its pages may be global.
    shared: bool,
}

const AREAS: [Area; 6] = [
    Area { start: 0x4000_0000, pages: 8, shift: 12, user: true, shared: false },
    Area { start: 0xffff_8000_0000_0000, pages: 8, shift: 12, user: false, shared: true },
    Area { start: 0xffff_ffff_ffff_f000, pages: 1, shift: 12, user: false, shared: true },
    Area { start: 0, pages: 1, shift: 12, user: false, shared: true },
    Area { start: 0x7fff_ffff_f000, pages: 1, shift: 12, user: true, shared: false },
    Area { start: 0x8000_0000, pages: 1, shift: 21, user: true, shared: false },
];
const LOW: usize = 3;
const LARGE: usize = 5;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const IS_LARGE: u64 = 0x80;
const GLOBAL: u64 = 0x100;

/// Page tables of one address space, made in the same order for all: entries are at the same distance from the root.
struct Tables {
    root: u64,
    used: u64,
    words: std::collections::BTreeMap<u64, u64>,
}

impl Tables {
    fn new(space: u64) -> Self {
        Self { root: TABLES + space * TABLES_OF_ONE, used: 1, words: Default::default() }
    }

    /// Where the entry for a page is.
    fn entry(&mut self, linear: u64, shift: u32) -> u64 {
        let mut table = self.root;
        let mut level = 39;
        while level > shift {
            let at = table + (linear >> level & 0x1ff) * 8;
            table = match self.words.get(&at) {
                Some(word) => word & !0xfff,
                None => {
                    let new = self.root + self.used * 0x1000;
                    self.used += 1;
                    // Whether a space's own tables lead to what is global may be known without them.
                    self.words.insert(at, new | PRESENT | WRITE | USER | ACCESSED);
                    new
                }
            };
            level -= 9;
        }
        table + (linear >> shift & 0x1ff) * 8
    }

    fn map(&mut self, linear: u64, shift: u32, entry: u64) {
        let at = self.entry(linear, shift);
        self.words.insert(at, entry);
    }
}

struct Maker<'a> {
    random: &'a mut Random,
    offsets: [u64; AREAS.len()],
    pcid: bool,
    events: Vec<String>,
    event_code: Vec<u8>,
}

fn constant(code: &mut Vec<u8>, register: u8, value: u64) {
    code.extend([0x48, 0xb8 | register]);
    code.extend(value.to_le_bytes());
}

fn store(code: &mut Vec<u8>, at: u64, value: u64) {
    constant(code, 0, at);
    constant(code, 3, value);
    code.extend([0x48, 0x89, 0x18]);
}

pub fn guest(random: &mut Random) -> Guest {
    let mut memory = Vec::new();
    for frame in 0..FRAME_COUNT {
        let mut bytes = vec![0; 0x1000];
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&random.integer().to_le_bytes());
        }
        bytes[FUNCTION as usize..][..6].copy_from_slice(&[0xb8, frame as u8, 0, 0, 0, 0xc3]);
        memory.push((FRAMES + frame * 0x1000, bytes));
    }
    let offsets = tables(random, &mut memory);
    let pcid = random.chance(60);
    let mut maker = Maker { random, offsets, pcid, events: Vec::new(), event_code: Vec::new() };
    let mut pointers = Vec::new();
    for _ in 0..EVENT_COUNT {
        pointers.push(EVENT_CODE + maker.event_code.len() as u64);
        let (text, code) = maker.event();
        maker.events.push(text);
        maker.event_code.extend(code);
        maker.event_code.push(0xc3);
    }
    memory.push((EVENT_CODE, maker.event_code.clone()));
    memory.push((EVENTS, pointers.iter().flat_map(|p| p.to_le_bytes()).collect()));
    let loops: Vec<Loop> = (0..LOOP_COUNT).map(|i| maker.hot_loop(LOOPS + i * LOOP_BYTES as u64)).collect();
    for (i, l) in loops.iter().enumerate() {
        memory.push((LOOPS + (i * LOOP_BYTES) as u64, l.code.clone()));
    }
    memory.push((WAY_BACK, vec![0xcd, BACK, 0xeb, 0xfc]));
    memory.push((EVENT_CALL, vec![0xcd, EVENT, 0xc3]));
    let (script, steps) = maker.script(&loops);
    memory.push((SCRIPT, script));
    memory.push((RUNTIME, runtime::code().to_vec()));
    let offsets = maker.offsets;
    let mut ranges: Vec<u8> = Vec::new();
    for (area, offset) in AREAS.iter().zip(offsets) {
        let end = area.start + ((area.pages << area.shift) - 1);
        ranges.extend([area.start, end, offset, area.shift.into()].iter().flat_map(|w| w.to_le_bytes()));
    }
    let (stack, stack_offset) = (USER_STACK.0, stack_offset());
    ranges.extend([stack, stack + 0x1fff, stack_offset, 12].iter().flat_map(|w| w.to_le_bytes()));
    ranges.extend([0; 32]);
    memory.push((RANGES, ranges));
    for (gpa, word) in bare::segments(STACK_END - 0x2000) {
        memory.push((gpa, word.to_le_bytes().to_vec()));
    }
    memory.push((TSS + 0x24, EXCEPTION_STACK.end.to_le_bytes().to_vec()));
    for vector in 0..256u64 {
        let (to, ist) = match vector as u8 {
            1 => (entry::DEBUG, 1),
            14 => (entry::PAGE_FAULT, 1),
            17 => (entry::ALIGNMENT, 1),
            EVENT => (entry::EVENT, 0),
            _ => (entry::BACK, 1),
        };
        for (gpa, word) in bare::gate(vector, RUNTIME + to * 0x40, ist, 0xee) {
            memory.push((gpa, word.to_le_bytes().to_vec()));
        }
    }
    let mut state = bare::state(TABLES, 0x10, 0xc093);
    state.segments[1] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b, unusable: false };
    state.cr4 |= if pcid { 1 << 17 } else { 0 } | 1 << 7;
    state.rip = SCRIPT;
    state.gpr[4] = STACK_END;
    Guest::of(memory, state, steps, RAM, RAM, SCRIPT..SCRIPT + SCRIPT_BYTES as u64)
}

/// The order in which both address spaces are laid out, and the areas' first entries, from the root.
fn lay_out(tables: &mut Tables, mut first: impl FnMut(usize, u64) -> u64) -> ([u64; AREAS.len()], u64) {
    // The first 2 MiB as they are for the kernel, the rest for both.
    for page in 1..512u64 {
        tables.map(page << 12, 12, page << 12 | PRESENT | WRITE);
    }
    for page in 1..4u64 {
        tables.map(page << 21, 21, page << 21 | PRESENT | WRITE | USER | IS_LARGE);
    }
    let mut offsets = [0; AREAS.len()];
    for (i, area) in AREAS.iter().enumerate() {
        for page in 0..area.pages {
            let linear = area.start + (page << area.shift);
            let entry = first(i, page);
            tables.map(linear, area.shift, entry);
        }
        offsets[i] = tables.entry(area.start, area.shift) - tables.root;
    }
    for page in 0..2u64 {
        let entry = (USER_STACK.1 + (page << 12)) | PRESENT | WRITE | USER;
        tables.map(USER_STACK.0 + (page << 12), 12, entry);
    }
    let stack = tables.entry(USER_STACK.0, 12) - tables.root;
    (offsets, stack)
}

fn stack_offset() -> u64 {
    lay_out(&mut Tables::new(0), |_, _| 0).1
}

fn tables(random: &mut Random, memory: &mut Vec<(u64, Vec<u8>)>) -> [u64; AREAS.len()] {
    let mut offsets = [0; AREAS.len()];
    let mut shared = Vec::new();
    for space in 0..SPACES {
        let mut tables = Tables::new(space);
        // Mostly one behind the other, so that what covers several pages does.
        let from = random.below(FRAME_COUNT);
        offsets = lay_out(&mut tables, |area, page| match area {
            LARGE => LARGE_FRAMES[space as usize] | PRESENT | WRITE | USER | IS_LARGE,
            // The last page and the first.
            2 | 3 => (FRAMES + (from + area as u64) % FRAME_COUNT * 0x1000) | PRESENT | WRITE,
            _ => {
                let bits = PRESENT | WRITE | if AREAS[area].user { USER } else { 0 };
                (FRAMES + (from + page) % FRAME_COUNT * 0x1000) | bits
            }
        })
        .0;
        // The tables that lead to the areas which all share are the first one's.
        for (i, area) in AREAS.iter().enumerate().filter(|(_, area)| area.shared) {
            let level = if i == LOW { 21 } else { 39 };
            let at = tables.entry(area.start, level);
            if space == 0 {
                shared.push(tables.words[&at]);
            } else {
                tables.words.insert(at, shared[i - 1]);
            }
        }
        for (at, word) in tables.words {
            memory.push((at, word.to_le_bytes().to_vec()));
        }
    }
    for (offset, _) in offsets.iter_mut().zip(AREAS).filter(|(_, area)| area.shared) {
        *offset += TABLES | 1;
    }
    offsets
}

impl Maker<'_> {
    /// What happens at some time: in words, and as code that may use RAX, RCX, RDX and RBX. On its stack is the saved
    /// RFLAGS, at RSP + 38.
    fn event(&mut self) -> (String, Vec<u8>) {
        match self.random.below(40) {
            0..16 => self.remap(),
            16..19 => self.switch(),
            19..24 => self.run_frame(),
            24..27 => self.change_function(),
            27 | 28 => self.toggle("CR0.WP", 0, 1 << 16),
            29 => self.toggle("CR4.PGE", 4, 1 << 7),
            30 | 31 => self.toggle("CR4.SMAP", 4, 1 << 21),
            32 => self.toggle("CR0.AM", 0, 1 << 18),
            33 => self.toggle_nxe(),
            34 | 35 => self.saved_flag("AC", 1 << 18),
            36 => self.breakpoint(),
            37 => self.step(),
            38 => ("STAC or CLAC".to_owned(), vec![0x0f, 0x01, self.random.pick(&[0xca, 0xcb])]),
            _ => self.invalidate_only(),
        }
    }

    fn area(&mut self) -> (usize, u64) {
        let area = self.random.pick(&[0, 0, 0, 0, 1, 1, 1, 2, 3, 4, LARGE, LARGE]);
        (area, self.random.below(AREAS[area].pages))
    }

    /// Another frame, other rights, or none, for a page of the current address space.
    fn remap(&mut self) -> (String, Vec<u8>) {
        let (area, page) = self.area();
        let Area { start, shift, user, shared, .. } = AREAS[area];
        let linear = start + (page << shift);
        let bits = self.random.pick(&[3u64, 3, 3, 1, 2, 0]);
        let user = if user != self.random.chance(10) { USER } else { 0 };
        let global = if shared && self.random.chance(50) { GLOBAL } else { 0 };
        let frame = if area == LARGE {
            self.random.pick(&LARGE_FRAMES) | IS_LARGE
        } else {
            // Often where a neighbour's page suggests.
            let to = if self.random.chance(50) { page + self.random.below(3) } else { self.random.below(FRAME_COUNT) };
            FRAMES + to % FRAME_COUNT * 0x1000
        };
        let value = frame | bits | user | global;
        let mut code = Vec::new();
        if shared {
            code.extend([0x31, 0xc0]); // XOR EAX, EAX
        } else {
            code.extend([0x0f, 0x20, 0xd8]); // MOV RAX, CR3
            code.extend([0x48, 0x25, 0, 0xf0, 0xff, 0xff]); // AND RAX, -4096
        }
        constant(&mut code, 3, value);
        code.extend([0x48, 0x89, 0x98]); // MOV [RAX + offset], RBX
        code.extend((self.offsets[area] as u32 + page as u32 * 8 & !1).to_le_bytes());
        let text = format!("{linear:#x} to {value:#x}, ");
        let (how, more) = self.invalidate(linear, shift, shared);
        code.extend(more);
        (text + &how, code)
    }

    /// What is shared may be global, and in what other spaces know; with these engines INVLPG drops that, too.
    fn invalidate(&mut self, linear: u64, shift: u32, shared: bool) -> (String, Vec<u8>) {
        let at = linear + (self.random.below(1 << (shift - 4)) << 4);
        let mut code = Vec::new();
        match self.random.below(if shared { 8 } else { 12 }) {
            0..5 => {
                constant(&mut code, 0, at);
                code.extend([0x0f, 0x01, 0x38]);
                (format!("INVLPG {at:#x}"), code)
            }
            8 => (String::from("CR3"), vec![0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]),
            9..12 => {
                // Of this PCID: MOV RCX, CR3; AND ECX, FFF; SUB RSP, 10; MOV [RSP], RCX; MOV [RSP + 8], RBX;
                // INVPCID RAX, [RSP]; ADD RSP, 10
                let kind = self.random.pick(&[0u64, 1, 1, 3]);
                constant(&mut code, 0, kind);
                constant(&mut code, 3, at);
                code.extend([0x0f, 0x20, 0xd9, 0x81, 0xe1, 0xff, 0x0f, 0, 0, 0x48, 0x83, 0xec, 0x10]);
                code.extend([0x48, 0x89, 0x0c, 0x24, 0x48, 0x89, 0x5c, 0x24, 8]);
                code.extend([0x66, 0x0f, 0x38, 0x82, 0x04, 0x24, 0x48, 0x83, 0xc4, 0x10]);
                (format!("INVPCID {kind} of {at:#x}"), code)
            }
            5 => {
                // INVPCID RAX, [RSP - 16] after SUB, with all contexts
                constant(&mut code, 0, 2);
                code.extend([0x48, 0x83, 0xec, 0x10, 0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0]);
                code.extend([0x48, 0xc7, 0x44, 0x24, 8, 0, 0, 0, 0]);
                code.extend([0x66, 0x0f, 0x38, 0x82, 0x04, 0x24, 0x48, 0x83, 0xc4, 0x10]);
                ("INVPCID of all".to_owned(), code)
            }
            6 => {
                // MOV RAX, CR4; BTC RAX, 7; MOV CR4, RAX; BTC RAX, 7; MOV CR4, RAX
                let mut toggle = vec![0x0f, 0x20, 0xe0];
                for _ in 0..2 {
                    toggle.extend([0x48, 0x0f, 0xba, 0xf8, 7, 0x0f, 0x22, 0xe0]);
                }
                ("CR4.PGE there and back".to_owned(), toggle)
            }
            _ => {
                // INVLPG drops what is global, the load of CR3 the rest.
                constant(&mut code, 0, at);
                code.extend([0x0f, 0x01, 0x38, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]);
                (format!("INVLPG {at:#x} and CR3"), code)
            }
        }
    }

    fn invalidate_only(&mut self) -> (String, Vec<u8>) {
        let (area, page) = self.area();
        let Area { start, shift, shared, .. } = AREAS[area];
        self.invalidate(start + (page << shift), shift, shared)
    }

    fn switch(&mut self) -> (String, Vec<u8>) {
        let space = self.random.below(SPACES);
        let pcid = if self.pcid { space + 1 } else { 0 };
        // Of a space that is not the current one nothing is ever changed.
        let keep = if self.pcid && self.random.chance(60) { 1 << 63 } else { 0 };
        let mut code = Vec::new();
        constant(&mut code, 0, TABLES + space * TABLES_OF_ONE | pcid | keep);
        code.extend([0x0f, 0x22, 0xd8]);
        (format!("address space {space}, keep {}", keep != 0), code)
    }

    /// Runs the function of a frame, at its address in the first 4 MiB, and adds its result up.
    fn run_frame(&mut self) -> (String, Vec<u8>) {
        let at = FRAMES + self.random.below(FRAME_COUNT) * 0x1000 + FUNCTION;
        let mut code = Vec::new();
        constant(&mut code, 0, at);
        // CALL RAX; ADD [7F00], RAX
        code.extend([0xff, 0xd0, 0x48, 0x01, 0x04, 0x25, 0, 0x7f, 0, 0]);
        (format!("call {at:#x}"), code)
    }

    /// INC of its constant, through an area if that can be.
    fn change_function(&mut self) -> (String, Vec<u8>) {
        let at = FRAMES + self.random.below(FRAME_COUNT) * 0x1000 + FUNCTION + 1;
        let mut code = Vec::new();
        constant(&mut code, 0, at);
        // STAC; INC DWORD [RAX]; CLAC
        code.extend([0x0f, 0x01, 0xca, 0xff, 0x00, 0x0f, 0x01, 0xcb]);
        (format!("change the constant at {at:#x}"), code)
    }

    fn toggle(&mut self, what: &str, register: u8, bit: u64) -> (String, Vec<u8>) {
        // MOV RAX, CRn; XOR RAX, bit; MOV CRn, RAX
        let mut code = vec![0x0f, 0x20, 0xc0 | register << 3, 0x48, 0x35];
        code.extend((bit as u32).to_le_bytes());
        code.extend([0x0f, 0x22, 0xc0 | register << 3]);
        (format!("toggle {what}"), code)
    }

    fn toggle_nxe(&mut self) -> (String, Vec<u8>) {
        let mut code = vec![0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x35];
        code.extend((1u32 << 11).to_le_bytes());
        code.extend([0x0f, 0x30]);
        ("toggle EFER.NXE".to_owned(), code)
    }

    fn saved_flag(&mut self, name: &str, bit: u32) -> (String, Vec<u8>) {
        // XOR DWORD [RSP + 38], bit
        let mut code = vec![0x81, 0x74, 0x24, 0x38];
        code.extend(bit.to_le_bytes());
        (format!("RFLAGS.{name} changes"), code)
    }

    fn breakpoint(&mut self) -> (String, Vec<u8>) {
        let (area, page) = self.area();
        let at = AREAS[area].start + (page << AREAS[area].shift) + self.random.below(0x80) * 8;
        let on = self.random.chance(40);
        let mut code = Vec::new();
        constant(&mut code, 0, at);
        code.extend([0x0f, 0x23, 0xc0]);
        constant(&mut code, 0, if on { 0xd_0402 } else { 0x400 });
        code.extend([0x0f, 0x23, 0xf8]);
        (format!("a breakpoint at {at:#x}: {on}"), code)
    }

    fn step(&mut self) -> (String, Vec<u8>) {
        let mut code = Vec::new();
        store(&mut code, STEPS, self.random.below(40));
        code.extend([0x81, 0x4c, 0x24, 0x38, 0, 1, 0, 0]);
        ("a few single steps".to_owned(), code)
    }
}

/// A loop, its instructions in words, and whether only the kernel can run it.
struct Loop {
    code: Vec<u8>,
    text: String,
}

/// What a loop's code is put together from.
struct Body {
    items: Vec<(Instruction, Option<usize>)>,
}

impl Body {
    fn put(&mut self, insn: Result<Instruction, iced_x86::IcedError>) {
        if let Ok(insn) = insn {
            self.items.push((insn, None));
        }
    }

    fn jump(&mut self, code: Code, to: usize) -> usize {
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_op0_kind(iced_x86::OpKind::NearBranch64);
        self.items.push((insn, Some(to)));
        self.items.len() - 1
    }

    fn assemble(&self, at: u64) -> Option<Vec<u8>> {
        let mut offsets = vec![at; self.items.len() + 1];
        let mut bytes = Vec::new();
        for _ in 0..2 {
            bytes.clear();
            for (i, (insn, to)) in self.items.iter().enumerate() {
                let here = at + bytes.len() as u64;
                let mut insn = *insn;
                if let Some(to) = to {
                    insn.set_near_branch64(offsets[*to]);
                }
                offsets[i] = here;
                let mut encoder = Encoder::new(64);
                encoder.encode(&insn, here).ok()?;
                bytes.extend(encoder.take_buffer());
            }
            *offsets.last_mut()? = at + bytes.len() as u64;
        }
        (bytes.len() <= LOOP_BYTES).then_some(bytes)
    }
}

const CONDITIONS: [Code; 10] = [
    Code::Je_rel32_64,
    Code::Jne_rel32_64,
    Code::Jb_rel32_64,
    Code::Jae_rel32_64,
    Code::Js_rel32_64,
    Code::Jns_rel32_64,
    Code::Jo_rel32_64,
    Code::Jp_rel32_64,
    Code::Jl_rel32_64,
    Code::Jg_rel32_64,
];

/// Registers that a loop has a use for.
struct Roles {
    /// Where areas begin, the counter, and where the round's accesses are.
    bases: [u32; 2],
    counter: u32,
    at: u32,
    others: Vec<u32>,
    /// One of them is the first page: behind it are descriptor tables.
    first_page: bool,
}

impl Maker<'_> {
    fn hot_loop(&mut self, at: u64) -> Loop {
        loop {
            let body = self.body();
            let Some(code) = body.assemble(at) else { continue };
            let mut text = String::new();
            let mut decoder = Decoder::with_ip(64, &code, at, DecoderOptions::NONE);
            let mut formatter = FastFormatter::new();
            while decoder.can_decode() {
                let insn = decoder.decode();
                let mut line = String::new();
                formatter.format(&insn, &mut line);
                let _ = writeln!(text, "    {:#x}  {line}", insn.ip());
            }
            return Loop { code, text };
        }
    }

    fn roles(&mut self) -> Roles {
        // RAX is what functions answer in.
        let mut names: Vec<u32> = (1..16).filter(|r| *r != 4).collect();
        for i in (1..names.len()).rev() {
            names.swap(i, self.random.below(i as u64 + 1) as usize);
        }
        Roles {
            bases: [names[0], names[1]],
            counter: names[2],
            at: names[3],
            others: names[4..10].to_vec(),
            first_page: false,
        }
    }

    fn body(&mut self) -> Body {
        let mut r = self.roles();
        let mut body = Body { items: Vec::new() };
        let wide = |n: u32| R::RAX + n;
        let mut masks = [0u32; 2];
        let mut callable = Vec::new();
        for (base, mask) in r.bases.into_iter().zip(&mut masks) {
            let (area, page) = self.area();
            let start = AREAS[area].start;
            r.first_page |= area == LOW;
            let (from, whole) = match AREAS[area].pages {
                1 if area == LARGE => (start + self.random.below(0x100) * 0x1000, 0x7_f7f8),
                1 => (start, 0x7f8),
                pages => (start + (page << 12), if page <= pages / 2 { 0x37f8 } else { 0x7f8 }),
            };
            if area != LARGE {
                callable.push(base);
            }
            *mask = whole;
            body.put(Instruction::with2(Code::Mov_r64_imm64, wide(base), from));
        }
        let most = if self.random.chance(20) { 400 } else { 60 };
        let rounds = 8 + self.random.below(most) as u32;
        body.put(Instruction::with2(Code::Mov_r32_imm32, R::EAX + r.counter, rounds));
        let head = body.items.len();
        for _ in 0..1 + self.random.below(3) {
            let which = self.random.below(2) as usize;
            // Where in the area this round is.
            let stride = self.random.pick(&[8u32, 16, 24, 64, 0x78, 0x208, 0x808, 0x1008, 0x1808, 0x3018]);
            body.put(Instruction::with3(Code::Imul_r64_rm64_imm32, wide(r.at), wide(r.counter), stride));
            body.put(Instruction::with2(Code::And_rm64_imm32, wide(r.at), masks[which]));
            body.put(Instruction::with2(Code::Add_r64_rm64, wide(r.at), wide(r.bases[which])));
            for _ in 0..1 + self.random.below(5) {
                let skip = self.random.chance(25).then(|| {
                    if self.random.chance(50) {
                        let bits = self.random.pick(&[1u32, 3, 7, 15]);
                        body.put(Instruction::with2(Code::Test_rm32_imm32, R::EAX + r.counter, bits));
                    }
                    let code = self.random.pick(&CONDITIONS);
                    body.jump(code, usize::MAX)
                });
                for _ in 0..1 + self.random.below(3) {
                    self.accesses(&mut body, &r);
                }
                if let Some(skip) = skip {
                    body.items[skip].1 = Some(body.items.len());
                }
            }
        }
        if let (Some(&base), true) = (callable.first(), self.random.chance(40)) {
            self.call_function(&mut body, &r, base);
        }
        if self.random.chance(60) {
            let bits = self.random.pick(&[3u32, 7, 7, 15, 31]);
            body.put(Instruction::with2(Code::Test_rm32_imm32, R::EAX + r.counter, bits));
            let skip = body.jump(Code::Jne_rel32_64, usize::MAX);
            body.put(Instruction::with1(Code::Int_imm8, u32::from(EVENT)));
            body.items[skip].1 = Some(body.items.len());
        }
        body.put(Instruction::with1(Code::Dec_rm64, wide(r.counter)));
        body.jump(Code::Jne_rel32_64, head);
        body.put(Instruction::with2(Code::Cmp_rm64_r64, wide(r.others[0]), wide(r.others[1])));
        let mut ret = Instruction::default();
        ret.set_code(Code::Retnq);
        body.put(Ok(ret));
        body
    }

    /// Changes the function in a page, and calls it now and then.
    fn call_function(&mut self, body: &mut Body, r: &Roles, base: u32) {
        let at = |disp: i64| MemoryOperand::with_base_displ(R::RAX + base, disp);
        if self.random.chance(70) {
            let constant = at(FUNCTION as i64 + 1);
            body.put(match self.random.below(3) {
                0 => Instruction::with1(Code::Inc_rm32, constant),
                1 => Instruction::with2(Code::Mov_rm32_r32, constant, R::EAX + r.counter),
                _ => Instruction::with2(Code::Add_rm32_imm8, constant, 3),
            });
        }
        let bits = self.random.pick(&[1u32, 3, 7, 7, 15]);
        body.put(Instruction::with2(Code::Test_rm32_imm32, R::EAX + r.counter, bits));
        let skip = body.jump(Code::Jne_rel32_64, usize::MAX);
        body.put(Instruction::with2(Code::Lea_r64_m, R::RAX, at(FUNCTION as i64)));
        body.put(Instruction::with1(Code::Call_rm64, R::RAX));
        body.put(Instruction::with2(Code::Add_r64_rm64, R::RAX + r.others[2], R::RAX));
        body.items[skip].1 = Some(body.items.len());
    }

    /// An access or two near each other, or something between.
    fn accesses(&mut self, body: &mut Body, r: &Roles) {
        let random = &mut *self.random;
        let other = R::RAX + random.pick(&r.others);
        let narrow = other.full_register32();
        let disp = match random.below(12) {
            0 | 3 if r.first_page => random.below(0x40) as i64 - 0x20,
            0 => 0xff8 + random.below(8) as i64,
            1 => FUNCTION as i64 + 1,
            2 => -8,
            3 => 0x1000,
            _ => random.below(24) as i64 * 8,
        };
        // The function's constant is changed by whole additions only.
        let near_function = disp == FUNCTION as i64 + 1;
        let base = if near_function || random.chance(25) { random.pick(&r.bases) } else { r.at };
        let place = |disp: i64| MemoryOperand::with_base_displ(R::RAX + base, disp);
        if near_function {
            return body.put(Instruction::with2(Code::Add_rm32_imm8, place(disp), 1));
        }
        match random.below(19) {
            0..3 => body.put(Instruction::with2(Code::Mov_r64_rm64, other, place(disp))),
            3 | 4 => body.put(Instruction::with2(Code::Mov_rm64_r64, place(disp), other)),
            5 => body.put(Instruction::with2(Code::Mov_rm32_r32, place(disp), narrow)),
            6 => body.put(Instruction::with2(Code::Add_r64_rm64, other, place(disp))),
            7 => body.put(Instruction::with2(Code::Add_rm64_r64, place(disp), other)),
            8 => body.put(Instruction::with2(Code::Xor_r32_rm32, narrow, place(disp))),
            9 => body.put(Instruction::with1(Code::Inc_rm32, place(disp))),
            10 => body.put(Instruction::with2(Code::Adc_r64_rm64, other, place(disp))),
            11 => body.put(Instruction::with2(Code::Cmp_rm64_r64, place(disp), other)),
            12 => body.put(Instruction::with2(Code::Movdqu_xmm_xmmm128, R::XMM3, place(disp))),
            13 => body.put(Instruction::with2(Code::Movdqu_xmmm128_xmm, place(disp), R::XMM3)),
            14 => {
                let insn = Instruction::with2(Code::Add_rm32_r32, place(disp), narrow);
                body.put(insn.map(|mut insn| {
                    insn.set_has_lock_prefix(true);
                    insn
                }));
            }
            15 => {
                body.put(Instruction::with1(Code::Push_r64, other));
                body.put(Instruction::with2(Code::Add_r64_rm64, other, place(disp)));
                body.put(Instruction::with1(Code::Pop_r64, R::RAX + random.pick(&r.others)));
            }
            16 => body.put(Instruction::with1(Code::Inc_rm64, other)),
            17 => body.put(Instruction::with2(Code::Add_rm64_imm8, other, random.below(256) as u8 as i8 as i32)),
            _ => {
                body.put(Instruction::with2(Code::Mov_r64_rm64, other, place(disp)));
                body.put(Instruction::with2(Code::Mov_rm64_r64, place(disp + 16), other));
            }
        }
    }

    fn script(&mut self, loops: &[Loop]) -> (Vec<u8>, Vec<(u64, String)>) {
        let mut code = Vec::new();
        let mut steps = Vec::new();
        let mut cursor = 0usize;
        let often = std::env::var_os("VIREO_LOCKSTEP_STOPS").is_some();
        for _ in 0..120 {
            if often {
                code.extend([0xe6, 0x80]);
            }
            if code.len() > SCRIPT_BYTES - 0x200 {
                break;
            }
            let mut step = |code: &[u8], text: String| steps.push((SCRIPT + code.len() as u64, text));
            match self.random.below(10) {
                0..6 => {
                    let which = self.random.below(LOOP_COUNT) as usize;
                    let user = self.random.chance(40);
                    // So that it can be said which events came.
                    let from = if self.random.chance(70) { cursor } else { self.random.below(256) as usize };
                    cursor = (from + 5) % EVENT_COUNT;
                    let mut text = format!("loop {which}, user: {user}, events behind {from}:\n");
                    for i in 1..9 {
                        let event = (from + i) % EVENT_COUNT;
                        let _ = writeln!(text, "      event {event}: {}", self.events[event]);
                    }
                    step(&code, text + &loops[which].text);
                    store(&mut code, CURSOR, from as u64);
                    if user {
                        let stack = USER_STACK.0 + 0x800 + self.random.below(0x80) * 8;
                        constant(&mut code, 3, stack);
                        constant(&mut code, 0, WAY_BACK);
                        code.extend([0x48, 0x89, 0x03]);
                        constant(&mut code, 1, self.random.pick(&[2, 2, 0x4_0002]));
                    }
                    constant(&mut code, 0, LOOPS + which as u64 * LOOP_BYTES as u64);
                    constant(&mut code, 2, RUNTIME + if user { entry::CALL_USER } else { entry::CALL } * 0x40);
                    code.extend([0xff, 0xd2]);
                }
                6 | 7 => {
                    let event = (cursor + 1) % EVENT_COUNT;
                    step(&code, format!("event {event}: {}", self.events[event]));
                    store(&mut code, CURSOR, cursor as u64);
                    constant(&mut code, 0, EVENT_CALL);
                    constant(&mut code, 2, RUNTIME + entry::CALL * 0x40);
                    code.extend([0xff, 0xd2]);
                    cursor = event;
                }
                _ => {
                    step(&code, "stop".to_owned());
                    code.extend([0xe6, 0x80]);
                }
            }
        }
        steps.push((SCRIPT + code.len() as u64, "the end".to_owned()));
        code.extend([0xe6, DONE as u8, 0xeb, 0xfe]);
        (code, steps)
    }
}
