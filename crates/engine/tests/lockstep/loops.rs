//! Guests whose loops stay hot while what they reach is changed under them: pages come from elsewhere, go, may no longer
//! be written, become code; address spaces, privileges and what these may do change.
//!
//! A guest is a script that calls loops at both privileges. Events happen between calls and inside of loops; each is a
//! routine of its own, and does what the manual asks for before the change may be relied upon (Intel SDM vol. 3, 5.10.4).

mod bodies;
mod chores;
mod events;

use std::fmt::Write;

use bodies::Loop;
use vireo_cpu::Segment;

use super::{
    guest::{DONE, EXCEPTION_STACK, Guest},
    random_code::{
        bare::{self, TSS},
        random::Random,
    },
    runtime::{self, CURSOR, EVENT_COUNT, EVENTS, RANGES, RUNTIME, entry},
};

const RAM: u64 = 8 << 20;
const STACK_END: u64 = 0x2_1000;
const USER_STACK: (u64, u64) = (0x5000_0000, 0x2_a000);
const EVENT_CODE: u64 = 0x8_0000;
const TABLES: u64 = 0x10_0000;
const TABLES_OF_ONE: u64 = 0x4_0000;
const SCRIPT: u64 = 0x20_0000;
const SCRIPT_BYTES: usize = 0x1_0000;
const LOOPS: u64 = 0x21_0000;
const LOOP_BYTES: usize = 0x600;
const LOOP_COUNT: u64 = 24;
/// User code that goes back, and code that has an event happen.
const WAY_BACK: u64 = LOOPS + LOOP_BYTES as u64 * LOOP_COUNT;
const EVENT_CALL: u64 = WAY_BACK + 0x40;
/// User code that comes back by SYSCALL, and where the kernel meets it.
const TRIP_CODE: u64 = WAY_BACK + 0x60;
const TRIP_END: u64 = EVENT_CODE - 0x40;
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
    // ADD EAX, ECX; SYSCALL
    memory.push((TRIP_CODE, vec![0x01, 0xc8, 0x0f, 0x05]));
    // JMP [7F28]
    memory.push((TRIP_END, vec![0xff, 0x24, 0x25, 0x28, 0x7f, 0, 0]));
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
    state.cr4 |= if pcid { 1 << 17 } else { 0 } | 1 << 16 | 1 << 7;
    // STAR, LSTAR and SFMASK.
    state.msrs.extend([(0xc000_0081, 0x0010_0008 << 32), (0xc000_0082, TRIP_END), (0xc000_0084, 0x4_7700)]);
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
