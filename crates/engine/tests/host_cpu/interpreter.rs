//! The whole software engine as an executor: through the CPU seam, as a virtual machine of one user-mode page.
//!
//! Every exception vector has a handler at privilege 0 that tells its number to a port; the bus then kicks the
//! vCPU out. What the instruction left behind is in the state and on the handler's stack.

use std::{error::Error, sync::Arc};

use iced_x86::{Code, Mnemonic};
use vireo_cpu::{CpuState, Engine, Exit, Segment, Vcpu, VcpuConfig};
use vireo_engine::{SoftEngine, native::FeatureSet};
use vireo_memory::GuestMemory;

use super::{
    case::{CODE, Case, DATA, Executor, Mode, Outcome, State, Verdict, WINDOW_BYTES, status_flags},
    random_code::bare::{self, Stops},
};

pub struct Interpreter {
    memory: GuestMemory,
    vcpu: Box<dyn Vcpu>,
    /// Hears which vector was taken.
    bus: Arc<Stops>,
    start: CpuState,
    features: FeatureSet,
    _engine: Arc<SoftEngine>,
    /// Runs of a block before it is translated, 0 for never.
    promote: u32,
    runs: u64,
    /// Vectors whose handlers have been decoded.
    heard: [bool; 256],
    /// Cases whose block was translated when it ran, and ops of them that were left to the interpreter.
    pub translated: u64,
    pub left: u64,
}

// Guest-physical addresses. The data pages are swapped, so that crossing from one into the other is no accident.
const HANDLERS: u64 = 0x4000;
const TABLES: u64 = 0x1_0000;
const STACK_END: u64 = 0x2_1000;
/// Pages that the code is in, in turn: where code changes often, the engine takes its time to translate it.
const CODE_AT: u64 = 0x8_0000;
const CODE_PAGES: u64 = 256;
/// The page table's entry for the code.
const CODE_ENTRY: u64 = TABLES + 4 * 0x1000 + (CODE >> 12 & 0x1ff) * 8;
const DATA_AT: [u64; 2] = [0x3_4000, 0x3_2000];

impl Interpreter {
    /// With `promote` as of [`SoftEngine::promoting`]: 0 interprets, 1 translates whatever is run.
    pub fn promoting(promote: u32) -> Result<Self, Box<dyn Error>> {
        Self::new(promote, false)
    }

    /// Translates whatever is run, and counts the instructions.
    pub fn counting() -> Result<Self, Box<dyn Error>> {
        Self::new(1, true)
    }

    fn new(promote: u32, counts: bool) -> Result<Self, Box<dyn Error>> {
        let memory = GuestMemory::new(2 << 20, 0xc000_0000)?;
        lay_out(&memory)?;
        let engine = SoftEngine::promoting(&memory, promote)?;
        if counts {
            engine.count_instructions();
        }
        let cpuid = engine.supported_cpuid()?;
        let features = FeatureSet::from_cpuid(&cpuid);
        let vcpu = engine.create_vcpu(&VcpuConfig { id: 0, count: 1, cpuid })?;
        let bus = Stops::new(vcpu.kicker());
        Ok(Self {
            memory,
            vcpu,
            bus,
            start: bare::state(TABLES, 0x1b, 0xc0f3),
            features,
            _engine: engine,
            promote,
            runs: 0,
            heard: [false; 256],
            translated: 0,
            left: 0,
        })
    }

    pub fn figure(&self, name: &str) -> u64 {
        self.vcpu.stats().exits.get(name).copied().unwrap_or(0)
    }

    pub fn run(&mut self, case: &Case) -> Result<Outcome, Box<dyn Error>> {
        let before = (self.figure("translated_blocks"), self.figure("translated_interpreted"));
        let outcome = self.run_once(case)?;
        let blocks = self.figure("translated_blocks") - before.0;
        let vector = usize::from(outcome.vector.unwrap_or(3));
        // A handler that runs for the first time is translated then, too.
        let new = u64::from(!std::mem::replace(&mut self.heard[vector], true));
        self.translated += u64::from(blocks > new);
        self.left += self.figure("translated_interpreted") - before.1;
        if self.promote == 1 && case.mode == Mode::Bits64 && !crosses_pages(case) && !is_bad_fetch(&outcome) {
            assert!(blocks > 0, "not translated: {:02x?}", case.code);
        }
        Ok(outcome)
    }

    fn run_once(&mut self, case: &Case) -> Result<Outcome, Box<dyn Error>> {
        let mut code = [0xcc; 0x1000];
        let at = (case.state.rip - CODE) as usize;
        code[at..at + case.code.len()].copy_from_slice(&case.code);
        let page = CODE_AT + self.runs % CODE_PAGES * 0x1000;
        self.runs += 1;
        self.memory.write(page, &code)?;
        self.memory.write(CODE_ENTRY, &(page | 7).to_le_bytes())?;
        for (page, gpa) in case.memory.chunks(0x1000).zip(DATA_AT) {
            self.memory.write(gpa, page)?;
        }
        self.bus.arm();
        self.vcpu.set_state(&self.state(case))?;
        let vector = loop {
            match self.vcpu.run(&*self.bus)? {
                Exit::Kicked => {}
                Exit::Crash(info) => return Err(format!("the guest crashed: {info:?}").into()),
            }
            if let Some(port) = self.bus.port() {
                break port as u8;
            }
        };
        self.outcome(case, vector)
    }

    fn state(&self, case: &Case) -> CpuState {
        let mut state = self.start.clone();
        state.gpr = case.state.gpr;
        state.rip = case.state.rip;
        // As on the host, where PUSHF shows it.
        state.rflags = case.state.rflags | 0x200;
        let (selector, rights) = if case.mode == Mode::Bits64 { (0x23, 0xa0fb) } else { (0x2b, 0xc0fb) };
        state.segments[1] = Segment { selector, base: 0, limit: u32::MAX, rights, unusable: false };
        state.xsave = vec![0; 832];
        state.xsave[..416].copy_from_slice(&case.state.fx[..416]);
        state.xsave[512] = 7;
        for (i, upper) in case.state.upper.iter().enumerate() {
            state.xsave[576 + i * 16..][..8].copy_from_slice(&upper[0].to_le_bytes());
            state.xsave[584 + i * 16..][..8].copy_from_slice(&upper[1].to_le_bytes());
        }
        state
    }

    fn outcome(&self, case: &Case, vector: u8) -> Result<Outcome, Box<dyn Error>> {
        let state = self.vcpu.state()?;
        let frame = state.gpr[4] + if matches!(vector, 8 | 10..=14 | 17 | 21) { 8 } else { 0 };
        let mut error = [0; 8];
        self.memory.read(state.gpr[4], &mut error)?;
        let error = u64::from_le_bytes(error);
        let word = |i: u64| -> Result<u64, Box<dyn Error>> {
            let mut bytes = [0; 8];
            self.memory.read(frame + i * 8, &mut bytes)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let mut after = State { gpr: state.gpr, rip: word(0)?, rflags: word(2)?, ..case.state };
        after.gpr[4] = word(3)?;
        after.rip -= u64::from(vector == 3);
        after.fx.copy_from_slice(&state.xsave[..512]);
        for (i, upper) in after.upper.iter_mut().enumerate() {
            let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|b| state.xsave[at + b]));
            *upper = [word(576 + i * 16), word(584 + i * 16)];
        }
        let mut memory = Box::new([0; WINDOW_BYTES]);
        for (page, gpa) in memory.chunks_mut(0x1000).zip(DATA_AT) {
            self.memory.read(gpa, page)?;
        }
        let page_fault = match vector {
            14 => Some((error, state.cr2)),
            _ => None,
        };
        Ok(Outcome { vector: (vector != 3).then_some(vector), page_fault, state: after, memory })
    }
}

/// An instruction over a page's end is a block of its own, which is interpreted.
fn crosses_pages(case: &Case) -> bool {
    case.state.rip & 0xfff > 0x1000 - 15
}

/// The first instruction was not even decoded.
fn is_bad_fetch(outcome: &Outcome) -> bool {
    outcome.vector == Some(14) && outcome.state.rip & !0xfff != CODE
}

impl Executor for Interpreter {
    fn features(&self) -> FeatureSet {
        self.features
    }

    fn step(&mut self, case: &Case) -> Verdict {
        if undefined_result(case) {
            return Verdict::Skipped("result undefined");
        }
        Verdict::Ran(Box::new(self.run(case).expect("the virtual machine")))
    }

    fn undefined_flags(&self, case: &Case) -> u64 {
        status_flags(case.instruction.rflags_undefined()) | shift_flags(case)
    }
}

/// The count of a shift or rotate, as the processor masks it.
fn count(case: &Case) -> Option<(u32, u32)> {
    use Mnemonic as M;
    let insn = &case.instruction;
    if !matches!(
        insn.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    ) {
        return None;
    }
    let last = insn.op_count() - 1;
    let count = insn.try_immediate(last).map_or(case.state.gpr[1] as u32, |i| i as u32) & 0xff;
    let bits = match insn.op0_register().size() {
        0 => insn.memory_size().size() as u32 * 8,
        bytes => bytes as u32 * 8,
    };
    Some((count & if bits == 64 { 63 } else { 31 }, bits))
}

/// Intel SDM vol. 2, SAL/SAR/SHL/SHR: "The OF flag is affected only for 1-bit shifts", AF is undefined for a non-zero
/// count, CF where the count reaches the size; RCL/RCR/ROL/ROR: OF "is undefined" for other counts than 1; SHLD,
/// SHRD likewise.
fn shift_flags(case: &Case) -> u64 {
    use Mnemonic as M;
    let Some((count, bits)) = count(case) else {
        return 0;
    };
    let rotate = matches!(case.instruction.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
    match (count, rotate) {
        (0, _) => 0,
        (1, true) => 0,
        (_, true) => 0x800,
        (1, false) => 0x10,
        (n, false) => 0x810 | u64::from(n >= bits),
    }
}

/// SHLD and SHRD: "If the count is greater than the operand size, the result is undefined".
fn undefined_result(case: &Case) -> bool {
    let double = matches!(case.instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
    // An exchange of the opcode's own making: processors differ in what 66 does to these.
    let vendor = matches!(case.instruction.code(), Code::Movsxd_r16_rm16);
    vendor || (double && count(case).is_some_and(|(count, bits)| count > bits))
}

fn lay_out(memory: &GuestMemory) -> Result<(), Box<dyn Error>> {
    let put = |gpa: u64, value: u64| memory.write(gpa, &value.to_le_bytes());
    for (gpa, word) in bare::segments(STACK_END) {
        put(gpa, word)?;
    }
    for vector in 0..256u64 {
        let handler = HANDLERS + vector * 16;
        for (gpa, word) in bare::gate(vector, handler, 0, if vector == 3 { 0xee } else { 0x8e }) {
            put(gpa, word)?;
        }
        // out vector, al; jmp $
        memory.write(handler, &[0xe6, vector as u8, 0xeb, 0xfe])?;
    }
    // Four levels; the first 2 MiB as they are for privilege 0, then the code and data pages for user mode.
    const USER: u64 = 7;
    let table = |i: u64| TABLES + i * 0x1000;
    let entry = |table: u64, linear: u64, level: u64| table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
    put(entry(table(0), 0, 3), table(1) | USER)?;
    put(entry(table(1), CODE, 2), table(2) | USER)?;
    put(entry(table(1), DATA, 2), table(3) | USER)?;
    put(entry(table(2), 0, 1), 0x83)?;
    put(entry(table(2), CODE, 1), table(4) | USER)?;
    put(entry(table(3), DATA, 1), table(5) | USER)?;
    for (i, gpa) in DATA_AT.into_iter().enumerate() {
        put(entry(table(5), DATA + i as u64 * 0x1000, 0), gpa | USER | 1 << 63)?;
    }
    Ok(())
}
