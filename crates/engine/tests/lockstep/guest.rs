//! A guest: functions, and a script that calls them and disturbs them.

use iced_x86::{Decoder, DecoderOptions, FastFormatter};
use vireo_cpu::{CpuState, Segment};

use super::random_code::{
    bare::{self, TSS},
    case::{CODE, DATA},
    random::Random,
    sequence::{self, Pool},
};

const RAM: u64 = 4 << 20;
/// Nothing is above it.
const USED: u64 = 0x22_0000;
/// Where the stack of exceptions is: their frames have flags that are nobody's business.
pub const EXCEPTION_STACK: std::ops::Range<u64> = 0x2_4000..0x2_8000;
/// The port that says that the script is over; any other is a stop on the way.
pub const DONE: u32 = 0x81;

const STUBS: u64 = 0x4000;
/// Below it, at 0x5000: the stack pointer to go back to.
const COUNTS: u64 = 0x5010;
const STACK_END: u64 = 0x2_1000;
const SCRIPT: u64 = 0x8_0000;
const SCRIPT_BYTES: usize = 0x4_0000;
const TABLES: u64 = 0x10_0000;
const CODE_AT: u64 = 0x20_0000;
const CODE_PAGES: u64 = 16;
const DATA_AT: u64 = 0x21_8000;
const DATA_PAGES: u64 = 6;
/// Where a second mapping of the code begins.
const ALIAS: u64 = CODE + 0x10_0000;
/// Linear pages of code.
const MAPPED: u64 = 8;
const FUNCTION_BYTES: u64 = 0x400;
const PER_PAGE: u64 = 0x1000 / FUNCTION_BYTES;
/// In the last mapped page: where user functions return to.
const IPI: u8 = 0x40;
const BACK: u8 = 0x81;

pub struct Guest {
    pub memory: Vec<(u64, Vec<u8>)>,
    pub state: CpuState,
    /// Bytes of RAM, and of those that are compared.
    pub ram: u64,
    pub used: u64,
    script: std::ops::Range<u64>,
    /// Where each step of the script begins, and what it is.
    steps: Vec<(u64, String)>,
    functions: Vec<Vec<u8>>,
}

/// The page table entry of a linear address of code in one of two address spaces; and of data, which they share.
fn code_entry(space: u64, linear: u64) -> u64 {
    TABLES + (8 + space) * 0x1000 + (linear >> 12 & 0x1ff) * 8
}

fn data_entry(linear: u64) -> u64 {
    TABLES + 10 * 0x1000 + (linear >> 12 & 0x1ff) * 8
}

/// The page of code that a linear page leads to at first.
fn first_page(space: u64, page: u64) -> u64 {
    (page + space * 3) % CODE_PAGES
}

fn root(space: u64) -> u64 {
    TABLES + space * 4 * 0x1000
}

struct Script<'a> {
    random: &'a mut Random,
    code: Vec<u8>,
    steps: Vec<(u64, String)>,
    functions: &'a [Vec<u8>],
    pcid: bool,
    /// The current address space.
    space: usize,
    /// Pages of code that linear pages lead to: by address space, [`ALIAS`] or not, and page.
    mapped: [[[u64; MAPPED as usize]; 2]; 2],
    /// Functions that are in each place of the pages of code.
    contents: Vec<usize>,
}

impl Guest {
    pub fn new(pool: &Pool, random: &mut Random) -> Self {
        let mut memory = Vec::new();
        // Functions belong to a place in their page, not to a page.
        let mut functions = Vec::new();
        while functions.len() < (CODE_PAGES * PER_PAGE) as usize {
            let place = functions.len() as u64 % PER_PAGE * FUNCTION_BYTES;
            let function = sequence::function(pool, random, CODE + place);
            let Some(assembled) = function.assemble() else { continue };
            let mut code = assembled.code;
            // The last one of a page has the way back from user mode behind it.
            if code.len() > FUNCTION_BYTES as usize - 0x40 {
                continue;
            }
            code.resize(FUNCTION_BYTES as usize, 0xcc);
            let end = code.len();
            code[end - 4..].copy_from_slice(&[0xcd, BACK, 0xeb, 0xfc]);
            functions.push(code);
        }
        for (i, code) in functions.iter().enumerate() {
            memory.push((CODE_AT + i as u64 * FUNCTION_BYTES, code.clone()));
        }
        let mut data = vec![0; (DATA_PAGES * 0x1000) as usize];
        for word in data.chunks_mut(8) {
            word.copy_from_slice(&random.integer().to_le_bytes());
        }
        memory.push((DATA_AT, data));
        let pcid = random.chance(60);
        let mapped = [0, 1]
            .map(|space| [[0u64; MAPPED as usize]; 2].map(|_| std::array::from_fn(|i| first_page(space, i as u64))));
        let contents = (0..functions.len()).collect();
        let mut script = Script {
            random,
            code: Vec::new(),
            steps: Vec::new(),
            functions: &functions,
            pcid,
            space: 0,
            mapped,
            contents,
        };
        script.write();
        let Script { code, steps, .. } = script;
        memory.push((SCRIPT, code));
        tables(&mut memory);
        descriptors(&mut memory);
        memory.push((STUBS, stubs()));
        Self { functions, ..Self::of(memory, state(pcid), steps, RAM, USED, SCRIPT..SCRIPT + SCRIPT_BYTES as u64) }
    }

    /// What another generator made.
    pub fn of(
        memory: Vec<(u64, Vec<u8>)>,
        state: CpuState,
        steps: Vec<(u64, String)>,
        ram: u64,
        used: u64,
        script: std::ops::Range<u64>,
    ) -> Self {
        Self { memory, state, ram, used, script, steps, functions: Vec::new() }
    }

    /// Two rounds through as much code as there is room for: `ADD [RDI + n], RAX` again and again.
    pub fn long() -> (Self, u64) {
        let mut memory = Vec::new();
        tables(&mut memory);
        descriptors(&mut memory);
        memory.push((STUBS, stubs()));
        let count = (RAM - USED - 0x100) / 4;
        let mut code: Vec<u8> = (0..count).flat_map(|i| [0x48, 0x01, 0x47, (i % 8) as u8 * 8]).collect();
        // DEC ECX; JZ over; JMP the start; over: OUT
        code.extend([0xff, 0xc9, 0x74, 5, 0xe9]);
        code.extend((-(code.len() as i32 + 4)).to_le_bytes());
        code.extend([0xe6, DONE as u8, 0xeb, 0xfe]);
        memory.push((USED, code));
        let mut state = state(false);
        state.rip = USED;
        (state.gpr[0], state.gpr[1], state.gpr[7]) = (1, 2, 0x6000);
        (Self::of(memory, state, Vec::new(), RAM, USED, SCRIPT..SCRIPT), count * 2)
    }

    pub fn is_script(&self, rip: u64) -> bool {
        self.script.contains(&rip)
    }

    /// The script's steps between two addresses of it; the functions that they call as they were at first.
    pub fn script(&self, from: u64, to: u64) -> String {
        let to = if self.is_script(to) { to } else { u64::MAX };
        let mut text = String::new();
        let steps: Vec<_> = self.steps.iter().filter(|(at, _)| *at + 64 >= from && *at <= to).take(24).collect();
        for (at, step) in &steps {
            text += &format!("  {at:#x}  {step}\n");
        }
        for (number, code) in self.functions.iter().enumerate() {
            if !steps.iter().any(|(_, step)| step.contains(&format!("function {number} "))) {
                continue;
            }
            text += &format!("function {number}:\n");
            let mut decoder = Decoder::with_ip(64, code, CODE + number as u64 * FUNCTION_BYTES, DecoderOptions::NONE);
            let mut formatter = FastFormatter::new();
            while decoder.can_decode() {
                let insn = decoder.decode();
                if insn.code() == iced_x86::Code::Int3 {
                    break;
                }
                let mut line = String::new();
                formatter.format(&insn, &mut line);
                text += &format!("    {:#x}  {line}\n", insn.ip());
            }
        }
        text
    }
}

impl Script<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn step(&mut self, what: String) {
        self.steps.push((SCRIPT + self.code.len() as u64, what));
    }

    /// MOV of a constant to RAX (0) … RDI (7).
    fn constant(&mut self, register: u8, value: u64) {
        self.put(&[0x48, 0xb8 | register]);
        self.put(&value.to_le_bytes());
    }

    fn wrmsr(&mut self, msr: u32, value: u64) {
        self.put(&[0xb9]);
        self.put(&msr.to_le_bytes());
        self.put(&[0xb8]);
        self.put(&(value as u32).to_le_bytes());
        self.put(&[0xba]);
        self.put(&((value >> 32) as u32).to_le_bytes());
        self.put(&[0x0f, 0x30]);
    }

    /// CALL of one of the stubs.
    fn stub(&mut self, which: u64) {
        self.constant(1, STUBS + which * 0x40);
        self.put(&[0xff, 0xd1]);
    }

    fn write(&mut self) {
        self.step("set-up".to_owned());
        self.wrmsr(0x1b, 0xfee0_0d00);
        self.wrmsr(0x80f, 0x1ff);
        for _ in 0..200 {
            if self.code.len() > SCRIPT_BYTES - 0x400 {
                break;
            }
            match self.random.below(32) {
                0..10 => self.call(),
                10 => self.calls(),
                11..13 => self.call_user(),
                13..16 => self.write_code(),
                16 | 17 => self.replace_function(),
                18 | 19 => self.map_code(),
                20..22 => self.map_data(),
                22 => self.switch(),
                23 | 24 => self.interrupt(),
                25 => self.trace(),
                26 => self.watch(),
                27 => self.task_switched(),
                28 => self.reset_fpu(),
                _ => self.stop(),
            }
        }
        self.step("the end".to_owned());
        self.put(&[0xe6, DONE as u8, 0xeb, 0xfe]);
    }

    fn stop(&mut self) {
        self.step("stop".to_owned());
        self.put(&[0xe6, 0x80]);
    }

    /// A function that is mapped, and where.
    fn linear(&mut self) -> (usize, u64) {
        let (place, linear) = self.place();
        (self.contents[place], linear)
    }

    /// A place in the pages of code, and a linear address of it.
    fn place(&mut self) -> (usize, u64) {
        let alias = usize::from(self.random.chance(30));
        let at = self.random.below(MAPPED * PER_PAGE);
        let page = self.mapped[self.space][alias][(at / PER_PAGE) as usize];
        ((page * PER_PAGE + at % PER_PAGE) as usize, [CODE, ALIAS][alias] + at * FUNCTION_BYTES)
    }

    fn call(&mut self) {
        let (number, linear) = self.linear();
        self.step(format!("call function {number} at {linear:#x}"));
        self.constant(0, linear);
        self.stub(0);
    }

    /// The same a few times in a loop, so that it is translated on the way.
    fn calls(&mut self) {
        let (number, linear) = self.linear();
        let rounds = 2 + self.random.below(12);
        self.step(format!("call function {number} at {linear:#x}, {rounds} times"));
        // The counter is in memory: functions change all registers. MOV [COUNTS - 8], rounds
        self.put(&[0x48, 0xc7, 0x04, 0x25]);
        self.put(&(COUNTS as u32 - 8).to_le_bytes());
        self.put(&(rounds as u32).to_le_bytes());
        let again = self.code.len();
        self.constant(0, linear);
        self.stub(0);
        // SUB QWORD [COUNTS - 8], 1; JNZ again
        self.put(&[0x48, 0x83, 0x2c, 0x25]);
        self.put(&(COUNTS as u32 - 8).to_le_bytes());
        self.put(&[1]);
        let back = again as i64 - (self.code.len() as i64 + 6);
        self.put(&[0x0f, 0x85]);
        self.put(&(back as i32).to_le_bytes());
    }

    fn call_user(&mut self) {
        let (number, linear) = self.linear();
        self.step(format!("call function {number} at {linear:#x} in user mode"));
        let stack = DATA + 0x800 + self.random.below(0x80) * 8;
        self.constant(3, stack);
        // MOV [RBX], the way back
        let back = (CODE + FUNCTION_BYTES * (1 + self.random.below(MAPPED * PER_PAGE - 1))) - 4;
        self.constant(0, back);
        self.put(&[0x48, 0x89, 0x03]);
        self.constant(0, linear);
        self.stub(1);
    }

    /// Changes a byte of a function: mostly to what it is anyway.
    fn write_code(&mut self) {
        let (place_of, linear) = self.place();
        let number = self.contents[place_of];
        let code = &self.functions[number];
        let mut places = Vec::new();
        let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
        while decoder.can_decode() {
            let insn = decoder.decode();
            if insn.code() == iced_x86::Code::Int3 {
                break;
            }
            // The last byte of an immediate changes nothing but a number.
            let plain = matches!(insn.code(), iced_x86::Code::Mov_rm64_imm32 | iced_x86::Code::Add_rm32_imm32);
            places.push((insn.next_ip() - 1, plain));
        }
        let (place, plain) = places[self.random.below(places.len() as u64) as usize];
        let value = if plain { self.random.next() as u8 & 0x7f } else { code[place as usize] };
        // Through its own mapping, or through the large page at its physical address.
        let physical = CODE_AT + place_of as u64 * FUNCTION_BYTES;
        let at = if self.random.chance(50) { linear } else { physical } + place;
        self.step(format!("write {value:#x} to function {number} at {at:#x}"));
        self.constant(7, at);
        self.put(&[0xc6, 0x07, value]);
        if self.random.chance(30) {
            self.call_same(number, linear);
        }
    }

    fn call_same(&mut self, number: usize, linear: u64) {
        self.step(format!("call function {number} at {linear:#x}"));
        self.constant(0, linear);
        self.stub(0);
    }

    /// Copies another function of the same place in its page over one.
    fn replace_function(&mut self) {
        let (place, linear) = self.place();
        let other = (place + (PER_PAGE * (1 + self.random.below(CODE_PAGES - 1))) as usize) % self.contents.len();
        let number = self.contents[other];
        self.contents[place] = number;
        self.step(format!("copy function {number} to {linear:#x}"));
        self.constant(6, CODE_AT + other as u64 * FUNCTION_BYTES);
        self.constant(7, linear);
        let (count, bytes): (u64, &[u8]) = match self.random.below(3) {
            0 => (FUNCTION_BYTES, &[0xf3, 0xa4]),
            1 => (FUNCTION_BYTES / 4, &[0xf3, 0xa5]),
            _ => (FUNCTION_BYTES / 8, &[0xf3, 0x48, 0xa5]),
        };
        self.constant(1, count);
        self.put(&[0xfc]);
        self.put(bytes);
        if self.random.chance(60) {
            self.call_same(number, linear);
        }
    }

    fn store(&mut self, at: u64, value: u64) {
        self.constant(0, at);
        self.constant(3, value);
        self.put(&[0x48, 0x89, 0x18]);
    }

    fn invalidate(&mut self, linear: u64) {
        self.constant(0, linear);
        if self.random.chance(80) {
            self.put(&[0x0f, 0x01, 0x38]);
        } else {
            // All of it: CR3 again.
            self.put(&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]);
            // And of other address spaces: INVLPG all the same.
            self.constant(0, linear);
            self.put(&[0x0f, 0x01, 0x38]);
        }
    }

    /// Another page of code at a linear address.
    fn map_code(&mut self) {
        let page = self.random.below(MAPPED);
        let alias = usize::from(self.random.chance(30));
        let linear = [CODE, ALIAS][alias] + page * 0x1000;
        let to = self.random.below(CODE_PAGES);
        let gpa = CODE_AT + to * 0x1000;
        let space = self.random.below(2);
        self.mapped[space as usize][alias][page as usize] = to;
        self.step(format!("map {linear:#x} to {gpa:#x} in address space {space}"));
        self.store(code_entry(space, linear), gpa | 7);
        self.invalidate(linear);
    }

    /// Another page of data, or none, or one that may not be written: a fault of it is resolved.
    fn map_data(&mut self) {
        let linear = DATA + self.random.below(2) * 0x1000;
        let gpa = DATA_AT + self.random.below(DATA_PAGES) * 0x1000;
        let bits = self.random.pick(&[7u64, 7, 6, 5, 0]);
        self.step(format!("map {linear:#x} to {gpa:#x} with bits {bits:#x}"));
        self.store(data_entry(linear), gpa | bits | 1 << 63);
        self.invalidate(linear);
    }

    fn switch(&mut self) {
        let space = self.random.below(2);
        self.space = space as usize;
        let pcid = if self.pcid { space + 1 } else { 0 };
        let keep = if self.pcid && self.random.chance(60) { 1 << 63 } else { 0 };
        self.step(format!("address space {space}, PCID {pcid}, keep {}", keep != 0));
        self.constant(0, root(space) | pcid | keep);
        self.put(&[0x0f, 0x22, 0xd8]);
    }

    /// An interrupt to itself, at once or when it is let in.
    fn interrupt(&mut self) {
        self.step("interrupt".to_owned());
        let before: &[u8] = if self.random.chance(50) { &[0xfb, 0x90] } else { &[0xfa] };
        self.put(before);
        self.wrmsr(0x83f, u64::from(IPI));
        if self.random.chance(50) {
            // Before and after it is let in: INC RSI, STI, INC RDI, INC RBP.
            self.put(&[0x48, 0xff, 0xc6, 0xfb, 0x48, 0xff, 0xc7, 0x48, 0xff, 0xc5]);
        } else {
            let (number, linear) = self.linear();
            self.call_same(number, linear);
            self.put(&[0xfb, 0x90]);
        }
        self.put(&[0xfa]);
    }

    /// A function under the single-step flag.
    fn trace(&mut self) {
        let (number, linear) = self.linear();
        self.step(format!("trace function {number} at {linear:#x}"));
        self.constant(0, linear);
        self.constant(1, STUBS);
        // PUSHFQ; OR DWORD [RSP], 100; POPFQ; CALL RCX; PUSHFQ; AND DWORD [RSP], FFFFFEFF; POPFQ
        self.put(&[0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0xff, 0xd1]);
        self.put(&[0x9c, 0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff, 0x9d]);
    }

    /// A breakpoint on data or on a function, for a while.
    fn watch(&mut self) {
        let (number, linear) = self.linear();
        let data = self.random.chance(50);
        let at = if data { DATA + self.random.below(0x400) * 8 } else { linear };
        self.step(format!("breakpoint at {at:#x}, function {number} "));
        self.constant(0, at);
        self.put(&[0x0f, 0x23, 0xc0]);
        self.constant(0, if data { 0xd_0402 } else { 0x402 });
        self.put(&[0x0f, 0x23, 0xf8]);
        self.call_same(number, linear);
        self.constant(0, 0x400);
        self.put(&[0x0f, 0x23, 0xf8]);
    }

    /// The next vector instruction raises #NM.
    fn task_switched(&mut self) {
        self.step("CR0.TS".to_owned());
        self.put(&[0x0f, 0x20, 0xc0, 0x48, 0x83, 0xc8, 8, 0x0f, 0x22, 0xc0]);
    }

    fn reset_fpu(&mut self) {
        self.step("x87 and MXCSR as after reset".to_owned());
        // CLTS; FNINIT; MOV DWORD [COUNTS - 4], 1F80; LDMXCSR [COUNTS - 4]
        self.put(&[0x0f, 0x06, 0xdb, 0xe3, 0xc7, 0x04, 0x25]);
        self.put(&(COUNTS as u32 - 4).to_le_bytes());
        self.put(&0x1f80u32.to_le_bytes());
        self.put(&[0x0f, 0xae, 0x14, 0x25]);
        self.put(&(COUNTS as u32 - 4).to_le_bytes());
    }
}

fn push_to(memory: &mut Vec<(u64, Vec<u8>)>, at: u64, value: u64) {
    memory.push((at, value.to_le_bytes().to_vec()));
}

fn tables(memory: &mut Vec<(u64, Vec<u8>)>) {
    const USER: u64 = 7;
    for space in 0..2 {
        let table = |i: u64| root(space) + i * 0x1000;
        let entry = |table: u64, linear: u64, level: u64| table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
        push_to(memory, entry(table(0), 0, 3), table(1) | USER);
        push_to(memory, entry(table(1), 0, 2), table(2) | USER);
        push_to(memory, entry(table(1), CODE, 2), table(2) | USER);
        push_to(memory, entry(table(1), DATA, 2), table(3) | USER);
        // The first 4 MiB as they are, for privilege 0.
        push_to(memory, entry(table(2), 0, 1), 0x83);
        push_to(memory, entry(table(2), 0x20_0000, 1), 0x20_0083);
        push_to(memory, entry(table(2), CODE, 1), (TABLES + (8 + space) * 0x1000) | USER);
        push_to(memory, entry(table(3), DATA, 1), (TABLES + 10 * 0x1000) | USER);
        for page in 0..MAPPED {
            for base in [CODE, ALIAS] {
                let gpa = CODE_AT + first_page(space, page) * 0x1000;
                push_to(memory, code_entry(space, base + page * 0x1000), gpa | USER);
            }
        }
    }
    for page in 0..2 {
        push_to(memory, data_entry(DATA + page * 0x1000), (DATA_AT + page * 0x2000) | USER | 1 << 63);
    }
}

/// Stub 0 calls RAX, stub 1 does so in user mode on the stack at RBX; from 16 on they are handlers of vectors.
fn stubs() -> Vec<u8> {
    let mut code = vec![0xcc; 0x1000];
    let mut put = |which: usize, bytes: &[u8]| code[which * 0x40..][..bytes.len()].copy_from_slice(bytes);
    // MOV [SAVED_RSP], RSP; CALL RAX; RET
    put(0, &[0x48, 0x89, 0x24, 0x25, 0, 0x50, 0, 0, 0xff, 0xd0, 0xc3]);
    // MOV [SAVED_RSP], RSP; PUSH 1B; PUSH RBX; PUSH 2; PUSH 23; PUSH RAX; IRETQ
    put(1, &[0x48, 0x89, 0x24, 0x25, 0, 0x50, 0, 0, 0x6a, 0x1b, 0x53, 0x6a, 2, 0x6a, 0x23, 0x50, 0x48, 0xcf]);
    // Back to who called the stub: ADD QWORD [COUNTS], 1; MOV RSP, [SAVED_RSP]; RET
    put(2, &[0x48, 0x83, 0x04, 0x25, 0x10, 0x50, 0, 0, 1, 0x48, 0x8b, 0x24, 0x25, 0, 0x50, 0, 0, 0xc3]);
    // #DB: ADD QWORD [COUNTS + 8], 1; OR BYTE [RSP + 18], 1 (RF); IRETQ
    put(3, &[0x48, 0x83, 0x04, 0x25, 0x18, 0x50, 0, 0, 1, 0x80, 0x4c, 0x24, 18, 1, 0x48, 0xcf]);
    // #NM: CLTS; IRETQ
    put(4, &[0x0f, 0x06, 0x48, 0xcf]);
    // The interrupt: ADD QWORD [COUNTS + 16], 1; PUSH RAX, RCX, RDX; EOI; POP …; IRETQ
    let mut handler = vec![0x48, 0x83, 0x04, 0x25, 0x20, 0x50, 0, 0, 1, 0x50, 0x51, 0x52, 0xb9, 0x0b, 0x08, 0, 0];
    handler.extend([0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30, 0x5a, 0x59, 0x58, 0x48, 0xcf]);
    put(5, &handler);
    // #PF: of a fetch, or outside the data, as any exception; else the page is present and writable from now on.
    let entries = data_entry(DATA) as u32;
    let mut handler = vec![0xf6, 0x04, 0x24, 0x10, 0x75, 0x32, 0x50, 0x0f, 0x20, 0xd0, 0x48, 0xc1, 0xe8, 12];
    // SUB RAX, DATA >> 12; CMP RAX, 2; JAE out
    handler.extend([0x48, 0x2d]);
    handler.extend(((DATA >> 12) as u32).to_le_bytes());
    handler.extend([0x48, 0x83, 0xf8, 2, 0x73, 0x1d]);
    // OR DWORD [RAX * 8 + entries], 7
    handler.extend([0x83, 0x0c, 0xc5]);
    handler.extend(entries.to_le_bytes());
    handler.extend([7]);
    // MOV RAX, CR2; INVLPG [RAX]; POP RAX; ADD RSP, 8; IRETQ
    handler.extend([0x0f, 0x20, 0xd0, 0x0f, 0x01, 0x38, 0x58, 0x48, 0x83, 0xc4, 8, 0x48, 0xcf]);
    let out = handler.len();
    handler.extend([0x58]);
    let jump = (STUBS + 2 * 0x40) as u32;
    // PUSH back; RET
    handler.extend([0x68]);
    handler.extend(jump.to_le_bytes());
    handler.push(0xc3);
    handler[5] = (out + 1 - 6) as u8;
    let jae = handler.windows(5).position(|w| w == [0x48, 0x83, 0xf8, 2, 0x73]).unwrap_or(0) + 5;
    handler[jae] = (out - jae - 1) as u8;
    put(6, &handler);
    code
}

fn descriptors(memory: &mut Vec<(u64, Vec<u8>)>) {
    for (gpa, word) in bare::segments(STACK_END - 0x2000) {
        push_to(memory, gpa, word);
    }
    // IST 1, for exceptions.
    push_to(memory, TSS + 0x24, EXCEPTION_STACK.end);
    for vector in 0..256u64 {
        let (stub, ist) = match vector as u8 {
            1 => (3, 1),
            7 => (4, 1),
            14 => (6, 1),
            IPI => (5, 0),
            BACK => (2, 1),
            _ => (2, 1),
        };
        for (gpa, word) in bare::gate(vector, STUBS + stub * 0x40, ist, 0xee) {
            push_to(memory, gpa, word);
        }
    }
}

fn state(pcid: bool) -> CpuState {
    let mut state = bare::state(root(0), 0x10, 0xc093);
    state.segments[1] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b, unusable: false };
    state.segments[4].base = sequence::FS_BASE;
    state.segments[5].base = sequence::GS_BASE;
    state.cr4 |= if pcid { 1 << 17 } else { 0 };
    state.rip = SCRIPT;
    state.gpr[4] = STACK_END;
    state
}
