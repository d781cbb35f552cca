//! Making stubs, and keeping them.

use std::{collections::HashMap, io};

use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, InstructionInfoOptions, OpAccess, OpKind, Register,
};

use super::{
    Unsupported,
    arena::Arena,
    classify::{self, FeatureClass},
    emit::{self, Emitter},
    features::FeatureSet,
    operand,
    special::Special,
};
use crate::regs::Regs;

/// A stub's code: guest registers, and the host address of the memory operand (anything where there is none).
#[cfg(target_arch = "x86_64")]
pub type Entry = unsafe extern "sysv64" fn(*mut Regs, *mut u8);
#[cfg(not(target_arch = "x86_64"))]
pub type Entry = unsafe extern "C" fn(*mut Regs, *mut u8);

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// There is none, or it is only an address (PREFETCH, long NOP).
    None,
    Read,
    Write,
    ReadWrite,
}

/// The bit offset in a register that moves the memory operand of BT, BTS, BTR and BTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitOffset {
    /// Number of the general register.
    pub register: u8,
    /// Operand size: 16, 32 or 64.
    pub bits: u8,
}

/// The memory operand that [`Stub::entry`] wants a host pointer for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOperand {
    pub access: Access,
    /// At most 32.
    pub bytes: u8,
    /// `#GP(0)` where the linear address is not a multiple of it.
    pub alignment: u8,
    pub bit_offset: Option<BitOffset>,
}

/// Guest state that a stub wants in the host's registers.
pub(super) mod uses {
    pub const X87: u8 = 1 << 0;
    pub const MXCSR: u8 = 1 << 1;
    /// Loads the x87 control word from memory, and with it the exception masks.
    pub const CONTROL: u8 = 1 << 2;
}

/// One instruction shape, ready to run.
#[derive(Clone, Copy, Debug)]
pub struct Stub {
    pub entry: Entry,
    pub memory: MemoryOperand,
    pub class: FeatureClass,
    /// The processor looks at pending x87 exceptions first: see `Fpu::pending_x87_exception`.
    pub waits: bool,
    /// The memory operand's read and write are one atomic access.
    pub locked: bool,
    /// x87 opcode for FOP (bits 0–2 of the first byte, then the second), 0 for others.
    pub fop: u16,
    pub(super) uses: u8,
}

impl Stub {
    /// Bytes to add to the effective address for BT, BTS, BTR and BTC with a register bit offset.
    #[inline]
    pub fn bit_displacement(&self, regs: &Regs) -> i64 {
        let Some(BitOffset { register, bits }) = self.memory.bit_offset else {
            return 0;
        };
        let value = regs.gpr[register as usize & 15];
        match bits {
            16 => (value as i16 as i64 >> 4) << 1,
            32 => (value as i32 as i64 >> 5) << 2,
            _ => (value as i64 >> 6) << 3,
        }
    }

    /// Whether it may unmask x87 exceptions.
    pub(crate) fn loads_control(&self) -> bool {
        self.uses & uses::CONTROL != 0
    }

    /// Whether x87 registers, control word or MXCSR take part.
    #[inline]
    pub fn uses_fpu(&self) -> bool {
        self.uses != 0
    }
}

/// How to execute an instruction.
#[derive(Clone, Copy, Debug)]
pub enum Native {
    Stub(Stub),
    Special(Special),
}

/// Everything about an instruction that shapes its stub. How its memory operand is addressed does not.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    code: u16,
    locked: bool,
    /// Register numbers, 0 where the operand is something else; the code tells the cases apart, save register
    /// or memory, which `memory` says.
    registers: [u8; 5],
    memory: bool,
    immediates: u64,
}

impl Shape {
    fn of(insn: &Instruction) -> Self {
        let mut registers = [0; 5];
        let mut immediates = 0u64;
        let mut memory = false;
        for i in 0..insn.op_count().min(5) {
            match insn.op_kind(i) {
                OpKind::Register => registers[i as usize] = insn.op_register(i) as u8,
                OpKind::Memory => memory = true,
                OpKind::Immediate8_2nd => immediates |= u64::from(insn.immediate8_2nd()) << 32,
                _ => immediates |= insn.try_immediate(i).unwrap_or(0),
            }
        }
        Self { code: insn.code() as u16, locked: insn.has_lock_prefix(), registers, memory, immediates }
    }
}

/// The stubs made so far. Belongs to one vCPU, or to several behind a lock.
pub struct StubCache {
    features: FeatureSet,
    stubs: HashMap<Shape, Stub>,
    arena: Option<Arena>,
    info: InstructionInfoFactory,
    encoder: Encoder,
    generation: u64,
}

impl StubCache {
    /// Code bytes before [`Unsupported::Full`]. A guest can fill it with ever new immediates; a stub is about
    /// 60 bytes, and pages cost memory only once used.
    const ARENA_BYTES: usize = 4 << 20;

    /// An empty cache for a guest that may use `features`. Fails where executable memory cannot be had.
    pub fn new(features: FeatureSet) -> io::Result<Self> {
        let arena = if cfg!(target_arch = "x86_64") { Some(Arena::new(Self::ARENA_BYTES)?) } else { None };
        Ok(Self {
            features,
            stubs: HashMap::new(),
            arena,
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
            generation: 0,
        })
    }

    /// How to run `insn`. The answer's entry point stays valid until [`Self::flush`].
    pub fn get(&mut self, insn: &Instruction) -> Result<Native, Unsupported> {
        let shape = Shape::of(insn);
        if let Some(stub) = self.stubs.get(&shape) {
            return Ok(Native::Stub(*stub));
        }
        if self.arena.is_none() || insn.code() == Code::INVALID {
            return Err(Unsupported::NotAdvertised);
        }
        let mut insn = *insn;
        if !self.features.contains_all(insn.cpuid_features()) {
            match classify::without_feature(&insn) {
                Some(Code::Nopd) => insn = nop(),
                Some(code) => insn.set_code(code),
                None => return Err(Unsupported::NotAdvertised),
            }
        }
        if let Some(special) = Special::of(&insn) {
            return Ok(Native::Special(special));
        }
        classify::long_mode_equal(&mut insn);
        if !classify::may_run(&insn) {
            return Err(Unsupported::NotNative);
        }
        let stub = self.build(insn)?;
        self.stubs.insert(shape, stub);
        Ok(Native::Stub(stub))
    }

    /// Forgets all stubs. None that was handed out before may be called afterwards.
    pub fn flush(&mut self) {
        self.stubs.clear();
        if let Some(arena) = &mut self.arena {
            arena.clear();
        }
        self.generation += 1;
    }

    /// Counts flushes: stubs of an older generation are gone.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// Stubs, and bytes of code they take.
    pub fn size(&self) -> (usize, usize) {
        (self.stubs.len(), self.arena.as_ref().map_or(0, Arena::used_bytes))
    }

    fn build(&mut self, mut insn: Instruction) -> Result<Stub, Unsupported> {
        let memory_at = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory);
        operand::without_address(&mut insn, memory_at.is_some());
        let used = Used::of(&mut self.info, &insn, memory_at)?;
        let class = FeatureClass::of(&insn, used.vectors() != 0 || is_vector_only(&insn), used.mmx);
        let bit_offset = memory_at.and_then(|_| bit_offset(&insn));
        let memory = memory_operand(&insn, class, used.memory, bit_offset);

        let mut fpu = 0;
        if used.mmx || matches!(class, FeatureClass::X87) {
            fpu |= uses::X87;
        }
        if classify::uses_mxcsr(&insn) {
            fpu |= uses::MXCSR;
        }
        if insn.code() == Code::Fldcw_m2byte {
            fpu |= uses::CONTROL;
        }
        let nothing = classify::is_nothing(&insn);
        if nothing {
            fpu = 0;
        }

        let mut emitter = Emitter::default();
        let mut fop = 0;
        if nothing {
            emitter.ret();
        } else {
            fop = self.emit(&mut emitter, insn, &used, memory_at.is_some(), bit_offset)?;
        }
        let arena = self.arena.as_mut().ok_or(Unsupported::NotNative)?;
        let code = arena.push(&emitter.code).ok_or(Unsupported::Full)?;
        // SAFETY: `code` points to a complete function of this type, made by `emit`; callers keep to `flush`'s rule.
        let entry = unsafe { std::mem::transmute::<*mut u8, Entry>(code.as_ptr()) };
        Ok(Stub {
            entry,
            memory,
            class,
            waits: matches!(class, FeatureClass::X87 | FeatureClass::Wait | FeatureClass::Mmx | FeatureClass::SseMmx)
                && !classify::is_no_wait(&insn),
            locked: insn.has_lock_prefix() || (memory_at.is_some() && insn.mnemonic() == iced_x86::Mnemonic::Xchg),
            fop: if class == FeatureClass::X87 { fop } else { 0 },
            uses: fpu,
        })
    }

    /// Writes the stub; returns the x87 opcode, should it be one.
    fn emit(
        &mut self,
        e: &mut Emitter,
        mut insn: Instruction,
        used: &Used,
        has_memory: bool,
        bit_offset: Option<BitOffset>,
    ) -> Result<u16, Unsupported> {
        let map = assign(&insn, used, bit_offset)?;
        for i in 0..insn.op_count() {
            if insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr() {
                let register = insn.op_register(i);
                let host = map[register.full_register().number() & 15];
                insn.set_op_register(i, host.map_or(register, |host| operand::part(register, host)));
            }
        }
        if has_memory {
            insn.set_memory_base(Register::RSI);
        }
        let length = self.encoder.encode(&insn, 0);
        let body = self.encoder.take_buffer();
        if length.is_err() {
            return Err(Unsupported::NotNative);
        }

        let vex = insn.encoding() == iced_x86::EncodingKind::VEX;
        let wide = insn
            .op_kinds()
            .enumerate()
            .any(|(i, kind)| kind == OpKind::Register && insn.op_register(i as u32).is_ymm());
        let saves_rbx = map.contains(&Some(emit::RBX));
        if saves_rbx {
            e.push_rbx();
        }
        if let Some(BitOffset { register, bits }) = bit_offset {
            e.load_gpr(emit::R8, register);
            e.mask_r8(bits - 1);
        }
        if used.flags_in {
            e.load_flags();
        }
        for (guest, host) in map.iter().enumerate().filter_map(|(g, h)| Some((g as u8, (*h)?))) {
            if bit_offset.is_none() {
                e.load_gpr(host, guest);
            }
        }
        for register in (0..16).filter(|r| used.vector_in >> r & 1 == 1) {
            if vex { e.load_vector(register, wide) } else { e.load_xmm(register) }
        }
        e.raw(&body);
        for (guest, host) in map.iter().enumerate().filter_map(|(g, h)| Some((g as u8, (*h)?))) {
            if used.gpr_out >> guest & 1 == 1 {
                e.store_gpr(host, guest);
            }
        }
        for register in (0..16).filter(|r| used.vector_out >> r & 1 == 1) {
            if vex { e.store_vector(register) } else { e.store_xmm(register) }
        }
        if used.flags_out {
            e.store_flags();
        }
        if saves_rbx {
            e.pop_rbx();
        }
        if vex && wide {
            e.vzeroupper();
        }
        e.ret();
        Ok(x87_opcode(&body))
    }
}

/// FOP: the low 3 bits of the first opcode byte and the whole second byte (Intel SDM vol. 1, 8.1.9).
fn x87_opcode(body: &[u8]) -> u16 {
    match body.iter().position(|b| b & 0xf8 == 0xd8).map(|at| &body[at..]) {
        Some([first, second, ..]) => u16::from(first & 7) << 8 | u16::from(*second),
        _ => 0,
    }
}

fn nop() -> Instruction {
    Instruction::with(Code::Nopd)
}

/// The vector instructions without a vector register in iced's list of used ones.
fn is_vector_only(insn: &Instruction) -> bool {
    insn.op_kinds()
        .enumerate()
        .any(|(i, kind)| kind == OpKind::Register && insn.op_register(i as u32).is_vector_register())
}

fn bit_offset(insn: &Instruction) -> Option<BitOffset> {
    use Code::*;
    let bits = match insn.code() {
        Bt_rm16_r16 | Bts_rm16_r16 | Btr_rm16_r16 | Btc_rm16_r16 => 16,
        Bt_rm32_r32 | Bts_rm32_r32 | Btr_rm32_r32 | Btc_rm32_r32 => 32,
        Bt_rm64_r64 | Bts_rm64_r64 | Btr_rm64_r64 | Btc_rm64_r64 => 64,
        _ => return None,
    };
    Some(BitOffset { register: insn.op_register(1).full_register().number() as u8, bits })
}

fn memory_operand(
    insn: &Instruction,
    class: FeatureClass,
    access: Access,
    bit_offset: Option<BitOffset>,
) -> MemoryOperand {
    if classify::is_cache_line(insn) {
        return MemoryOperand { access: Access::Read, bytes: 1, alignment: 1, bit_offset: None };
    }
    let bytes = if access == Access::None { 0 } else { insn.memory_size().size().min(32) as u8 };
    MemoryOperand { access, bytes, alignment: classify::alignment(insn, class, bytes).max(1), bit_offset }
}

/// The state that an instruction reads and writes, its memory address aside. Bit n stands for register n.
struct Used {
    gpr: u16,
    gpr_out: u16,
    vector_in: u16,
    vector_out: u16,
    mmx: bool,
    flags_in: bool,
    flags_out: bool,
    memory: Access,
}

impl Used {
    fn of(info: &mut InstructionInfoFactory, insn: &Instruction, memory_at: Option<u32>) -> Result<Self, Unsupported> {
        let vex = insn.encoding() == iced_x86::EncodingKind::VEX;
        let found = info.info_options(insn, InstructionInfoOptions::NO_MEMORY_USAGE);
        let memory = match memory_at.map(|at| found.op_access(at)) {
            None | Some(OpAccess::None | OpAccess::NoMemAccess) => Access::None,
            Some(OpAccess::Read | OpAccess::CondRead) => Access::Read,
            // A conditional write (CMPXCHG that fails) is a write cycle all the same.
            Some(OpAccess::Write | OpAccess::CondWrite) => Access::Write,
            Some(OpAccess::ReadWrite | OpAccess::ReadCondWrite) => Access::ReadWrite,
        };
        let mut used = Self {
            gpr: 0,
            gpr_out: 0,
            vector_in: 0,
            vector_out: 0,
            mmx: insn.mnemonic() == iced_x86::Mnemonic::Emms,
            flags_in: false,
            flags_out: false,
            memory,
        };
        for register in found.used_registers() {
            let (register, access) = (register.register(), register.access());
            let writes = operand::writes(access);
            let bit = 1u16 << (register.full_register().number() & 15);
            if register.is_gpr() {
                used.gpr |= bit;
                used.gpr_out |= if writes { bit } else { 0 };
            } else if register.is_vector_register() {
                // What a legacy instruction writes it may write in part.
                used.vector_in |= if vex && access == OpAccess::Write { 0 } else { bit };
                used.vector_out |= if writes { bit } else { 0 };
            } else if register.is_mm() {
                used.mmx = true;
            } else if register.is_st() || register.is_segment_register() || register == Register::None {
                // Segments are the memory operand's.
            } else {
                return Err(Unsupported::NotNative);
            }
        }
        let status = {
            use iced_x86::RflagsBits as F;
            F::OF | F::SF | F::ZF | F::AF | F::CF | F::PF
        };
        let defined = (insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set()) & status;
        used.flags_out = insn.rflags_modified() & status != 0;
        // Undefined flags, and those of a shift by a count that may be 0, may keep their old value.
        used.flags_in =
            insn.rflags_read() & status != 0 || (used.flags_out && (defined != status || operand::counts_by_cl(insn)));
        Ok(used)
    }

    fn vectors(&self) -> u16 {
        self.vector_in | self.vector_out
    }
}

/// Which host register stands for each guest general register that takes part. RDI and RSI are the stub's own
/// and RSP is the host's; RAX, RCX and RDX stand for themselves, for they may be implicit, and so does RBX where
/// it is implicit or half of it is named. Any other explicit register moves to one that a call may clobber.
fn assign(insn: &Instruction, used: &Used, bit_offset: Option<BitOffset>) -> Result<[Option<u8>; 16], Unsupported> {
    let mut map = [None; 16];
    if let Some(bits) = bit_offset {
        map[bits.register as usize & 15] = Some(emit::R8);
        return Ok(map);
    }
    let explicit: Vec<Register> = (0..insn.op_count())
        .filter(|&i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr())
        .map(|i| insn.op_register(i))
        .collect();
    let number = |r: Register| r.full_register().number() as u8;
    let explicit_mask = explicit.iter().fold(0u16, |mask, &r| mask | 1 << number(r));
    let halves = explicit.iter().filter(|r| operand::is_high_byte(**r)).fold(0u16, |mask, &r| mask | 1 << number(r));
    let fixed = (used.gpr & !explicit_mask) | halves | 0b0111;
    // AH … BH and a REX prefix exclude each other, and with it R8 and up.
    let free: Vec<u8> = if halves == 0 {
        (emit::R8..=emit::R11).collect()
    } else {
        [emit::RAX, emit::RCX, emit::RDX, emit::RBX].into_iter().filter(|r| used.gpr >> r & 1 == 0).collect()
    };
    let mut free = free.into_iter();
    for guest in (0..16u8).filter(|g| (used.gpr | explicit_mask) >> g & 1 == 1) {
        map[guest as usize] = if fixed >> guest & 1 == 1 {
            match guest {
                emit::RAX | emit::RCX | emit::RDX | emit::RBX => Some(guest),
                _ => return Err(Unsupported::NotNative),
            }
        } else {
            Some(free.next().ok_or(Unsupported::NotNative)?)
        };
    }
    Ok(map)
}
