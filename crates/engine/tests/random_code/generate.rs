//! Random instructions of a given `Code`, in states that let them do something.

use iced_x86::{
    Code, CodeSize, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl, Instruction, MemorySize,
    Mnemonic, OpCodeInfo, OpCodeOperandKind as Kind, OpKind, Register,
};
use vireo_engine::native::FeatureSet;

use super::case::{CODE, Case, DATA_END, Mode, STATUS, State, WINDOW, WINDOW_BYTES};
use super::random::Random;

/// Every code that user mode has in this mode and the host's CPUID advertises.
pub fn codes(mode: Mode, features: &FeatureSet) -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let op = code.op_code();
            op.is_instruction()
                && matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && match mode {
                    Mode::Bits64 => op.mode64() && op.long_mode(),
                    Mode::Bits32 => op.mode32() && op.compatibility_mode(),
                }
                && !op.fwait()
                && op.cpl3()
                && !op.is_privileged()
                && !op.is_input_output()
                && features.contains_all(code.cpuid_features())
                && !outside(*code)
        })
        .collect()
}

/// User-mode instructions that one step on the host says nothing about: their result is the system's or the
/// processor's own (CPUID, segments), or they leave user mode or the code segment.
fn outside(code: Code) -> bool {
    let system = matches!(
        code.mnemonic(),
        Mnemonic::Cpuid
            | Mnemonic::Xgetbv
            | Mnemonic::Sgdt
            | Mnemonic::Sidt
            | Mnemonic::Sldt
            | Mnemonic::Str
            | Mnemonic::Smsw
            | Mnemonic::Lar
            | Mnemonic::Lsl
            | Mnemonic::Verr
            | Mnemonic::Verw
            | Mnemonic::Cli
            | Mnemonic::Sti
            | Mnemonic::Hlt
            | Mnemonic::In
            | Mnemonic::Out
            | Mnemonic::Lds
            | Mnemonic::Les
            | Mnemonic::Lfs
            | Mnemonic::Lgs
            | Mnemonic::Lss
            | Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq
            | Mnemonic::Pushf
            | Mnemonic::Pushfd
            | Mnemonic::Pushfq
    );
    // 0F 0D with a register is a NOP on Intel's processors and `#UD` on AMD's.
    let reserved = matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    );
    let op = code.op_code();
    let segment = (0..op.op_count()).any(|i| {
        matches!(op.op_kind(i), Kind::seg_reg | Kind::es | Kind::cs | Kind::ss | Kind::ds | Kind::fs | Kind::gs)
    });
    let jump = match code.flow_control() {
        FlowControl::Next => false,
        FlowControl::Interrupt | FlowControl::XbeginXabortXend => true,
        // Far ones change segments; those of 16 bits cut the instruction pointer, or do not, by vendor.
        _ => {
            let name = format!("{code:?}");
            let far =
                code.is_jmp_far() || code.is_call_far() || code.is_jmp_far_indirect() || code.is_call_far_indirect();
            let other = ["Retf", "Iret", "Sys", "rel16", "rm16", "rel8_16", "Retnw"];
            far || other.iter().any(|part| name.contains(part))
        }
    };
    // AMD's processors read 32 bits where Intel's read 16.
    let sized = code == Code::Movsxd_r16_rm16;
    system || reserved || sized || segment || jump || code.cpuid_features().contains(&CpuidFeature::FSGSBASE)
}

/// A random instruction of this code with a state to run it in; `None` where the dice made none.
pub fn case(code: Code, mode: Mode, random: &mut Random) -> Option<Case> {
    let op = code.op_code();
    let mut state = random_state(mode, random);
    let mut memory = Box::new([0u8; WINDOW_BYTES]);
    fill(&mut memory, random);
    let memory_form = random.chance(60);
    let mut insn = Instruction::default();
    insn.set_code(code);
    let mut used = Vec::new();
    for i in 0..op.op_count() {
        operand(&mut insn, op, i, memory_form, mode, random, &mut used)?;
    }
    let at = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory);
    if at.is_some() && op.can_use_lock_prefix() && insn.op0_kind() == OpKind::Memory && random.chance(40) {
        insn.set_has_lock_prefix(true);
    }
    if insn.is_string_instruction() && random.chance(60) {
        insn.set_has_rep_prefix(op.can_use_rep_prefix());
        if op.can_use_repne_prefix() && random.chance(50) {
            insn.set_has_repne_prefix(true);
        }
    }
    let rip = CODE + 0x100 + random.below(0x38);
    if at.is_some() {
        addressing(&mut insn, op, mode, rip, random);
    }
    let mut encoder = Encoder::new(mode.bitness());
    encoder.encode(&insn, rip).ok()?;
    let bytes = encoder.take_buffer();
    let instruction = Decoder::with_ip(mode.bitness(), &bytes, rip, DecoderOptions::NONE).decode();
    if instruction.is_invalid() || instruction.len() != bytes.len() {
        return None;
    }
    state.rip = rip;
    aim(&instruction, mode, &mut state, random);
    if !special_operands(&instruction, &mut state, &mut memory, random) {
        return None;
    }
    Some(Case { mode, instruction, code: bytes, state, memory })
}

pub(super) fn fill(memory: &mut [u8; WINDOW_BYTES], random: &mut Random) {
    let mut pattern = random.vector();
    for (i, chunk) in memory.chunks_exact_mut(8).enumerate() {
        if i % 4 == 0 && random.chance(20) {
            pattern = random.vector();
        }
        chunk.copy_from_slice(&pattern[i % 4].to_le_bytes());
    }
}

pub(super) fn operand(
    insn: &mut Instruction,
    op: &OpCodeInfo,
    i: u32,
    memory_form: bool,
    mode: Mode,
    random: &mut Random,
    used: &mut Vec<u64>,
) -> Option<()> {
    let registers = if mode == Mode::Bits64 { 16 } else { 8 };
    let mut number = random.below(registers);
    if op.requires_unique_reg_nums() {
        while used.contains(&number) {
            number = random.below(registers);
        }
    }
    let register = |first: Register| first + number as u32;
    let byte = |random: &mut Random| match mode {
        Mode::Bits32 => Register::AL + random.below(8) as u32,
        Mode::Bits64 => Register::AL + random.below(20) as u32,
    };
    let (kind, value) = match op.op_kind(i) {
        Kind::r8_or_mem
        | Kind::r16_or_mem
        | Kind::r32_or_mem
        | Kind::r64_or_mem
        | Kind::mm_or_mem
        | Kind::xmm_or_mem
        | Kind::ymm_or_mem
            if memory_form =>
        {
            (OpKind::Memory, Register::None)
        }
        Kind::mem | Kind::mem_offs | Kind::sibmem => (OpKind::Memory, Register::None),
        Kind::mem_vsib32x | Kind::mem_vsib64x | Kind::mem_vsib32y | Kind::mem_vsib64y => {
            let first = match op.op_kind(i) {
                Kind::mem_vsib32x | Kind::mem_vsib64x => Register::XMM0,
                _ => Register::YMM0,
            };
            insn.set_memory_index(register(first));
            used.push(number);
            (OpKind::Memory, Register::None)
        }
        Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => (OpKind::Register, byte(random)),
        Kind::r16_or_mem | Kind::r16_reg | Kind::r16_reg_mem | Kind::r16_rm | Kind::r16_opcode => {
            (OpKind::Register, register(Register::AX))
        }
        Kind::r32_or_mem | Kind::r32_reg | Kind::r32_reg_mem | Kind::r32_rm | Kind::r32_opcode | Kind::r32_vvvv => {
            (OpKind::Register, register(Register::EAX))
        }
        Kind::r64_or_mem | Kind::r64_reg | Kind::r64_reg_mem | Kind::r64_rm | Kind::r64_opcode | Kind::r64_vvvv => {
            (OpKind::Register, register(Register::RAX))
        }
        Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => (OpKind::Register, Register::MM0 + (number % 8) as u32),
        Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => {
            used.push(number);
            (OpKind::Register, register(Register::XMM0))
        }
        Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => {
            used.push(number);
            (OpKind::Register, register(Register::YMM0))
        }
        Kind::al => (OpKind::Register, Register::AL),
        Kind::cl => (OpKind::Register, Register::CL),
        Kind::ax => (OpKind::Register, Register::AX),
        Kind::dx => (OpKind::Register, Register::DX),
        Kind::eax => (OpKind::Register, Register::EAX),
        Kind::rax => (OpKind::Register, Register::RAX),
        Kind::st0 => (OpKind::Register, Register::ST0),
        Kind::sti_opcode => (OpKind::Register, Register::ST0 + (number % 8) as u32),
        Kind::imm8 => {
            let second =
                (0..i).any(|j| insn.op_kind(j) == OpKind::Immediate8 || insn.op_kind(j) == OpKind::Immediate16);
            let value = random.integer() as u8;
            insn.set_op_kind(i, if second { OpKind::Immediate8_2nd } else { OpKind::Immediate8 });
            if second {
                insn.set_immediate8_2nd(value);
            } else {
                insn.set_immediate8(value);
            }
            return Some(());
        }
        Kind::imm8_const_1 => {
            insn.set_op_kind(i, OpKind::Immediate8);
            insn.set_immediate8(1);
            return Some(());
        }
        Kind::imm8sex16 | Kind::imm8sex32 | Kind::imm8sex64 => {
            insn.set_op_kind(
                i,
                match op.op_kind(i) {
                    Kind::imm8sex16 => OpKind::Immediate8to16,
                    Kind::imm8sex32 => OpKind::Immediate8to32,
                    _ => OpKind::Immediate8to64,
                },
            );
            insn.set_immediate8(random.integer() as u8);
            return Some(());
        }
        Kind::imm16 => {
            insn.set_op_kind(i, OpKind::Immediate16);
            insn.set_immediate16(random.integer() as u16);
            return Some(());
        }
        Kind::imm32 => {
            insn.set_op_kind(i, OpKind::Immediate32);
            insn.set_immediate32(random.integer() as u32);
            return Some(());
        }
        Kind::imm32sex64 => {
            insn.set_op_kind(i, OpKind::Immediate32to64);
            insn.set_immediate32(random.integer() as u32);
            return Some(());
        }
        Kind::imm64 => {
            insn.set_op_kind(i, OpKind::Immediate64);
            insn.set_immediate64(random.integer());
            return Some(());
        }
        Kind::br32_1 | Kind::br32_4 | Kind::br64_1 | Kind::br64_4 => {
            let wide = matches!(op.op_kind(i), Kind::br64_1 | Kind::br64_4);
            insn.set_op_kind(i, if wide { OpKind::NearBranch64 } else { OpKind::NearBranch32 });
            insn.set_near_branch64(landing(random));
            return Some(());
        }
        Kind::seg_rSI => {
            (if mode == Mode::Bits64 { OpKind::MemorySegRSI } else { OpKind::MemorySegESI }, Register::None)
        }
        Kind::es_rDI => (if mode == Mode::Bits64 { OpKind::MemoryESRDI } else { OpKind::MemoryESEDI }, Register::None),
        Kind::seg_rDI => {
            (if mode == Mode::Bits64 { OpKind::MemorySegRDI } else { OpKind::MemorySegEDI }, Register::None)
        }
        Kind::seg_rBX_al => {
            insn.set_memory_base(if mode == Mode::Bits64 { Register::RBX } else { Register::EBX });
            insn.set_memory_index(Register::AL);
            (OpKind::Memory, Register::None)
        }
        _ => return None,
    };
    insn.set_op_kind(i, kind);
    if kind == OpKind::Register {
        insn.set_op_register(i, value);
    }
    Some(())
}

/// A place for a jump to go to: INT3, and near enough for a byte's displacement.
fn landing(random: &mut Random) -> u64 {
    CODE + if random.chance(50) { 0xc0 + random.below(0x40) } else { 0x148 + random.below(0x38) }
}

/// Gives a memory operand a base, an index, a scale and a displacement.
fn addressing(insn: &mut Instruction, op: &OpCodeInfo, mode: Mode, rip: u64, random: &mut Random) {
    if insn.mnemonic() == Mnemonic::Xlatb {
        return;
    }
    let long = mode == Mode::Bits64;
    let absolute = (0..op.op_count()).any(|i| op.op_kind(i) == Kind::mem_offs);
    let vsib = insn.memory_index().is_vector_register();
    let target = target(insn.memory_size(), random);
    if absolute || (!vsib && random.chance(4)) {
        insn.set_memory_displ_size(if long { 8 } else { 4 });
        insn.set_memory_displacement64(target);
        if !absolute {
            insn.set_memory_displ_size(4);
        }
        return;
    }
    if long && !vsib && random.chance(6) {
        let _ = rip;
        insn.set_memory_base(Register::RIP);
        insn.set_memory_displ_size(8);
        insn.set_memory_displacement64(target);
        return;
    }
    let registers = if long { 16 } else { 8 };
    // A 32-bit address in 64-bit mode, now and then.
    let wide = long && !random.chance(10);
    let first = if wide { Register::RAX } else { Register::EAX };
    let base = random.below(registers) as u32;
    insn.set_memory_base(first + base);
    if vsib {
        insn.set_memory_index_scale(1 << random.below(4));
    } else if random.chance(40) {
        let index = random.below(registers) as u32;
        if index != 4 && index != base {
            insn.set_memory_index(first + index);
            insn.set_memory_index_scale(1 << random.below(4));
        }
    }
    let displacement = match random.below(3) {
        0 => 0,
        1 => random.below(256) as i64 - 128,
        _ => random.below(0x1000_0000) as i64 - 0x800_0000,
    };
    insn.set_memory_displ_size(if wide { 8 } else { 4 });
    let value = if wide { displacement as u64 } else { u64::from(displacement as u32) };
    insn.set_memory_displacement64(value);
    if displacement == 0 {
        insn.set_memory_displ_size(0);
    } else if (-128..128).contains(&displacement) {
        insn.set_memory_displ_size(1);
    }
}

/// An address for an operand of this size: at the page's end, across its end or the middle, aligned or not.
pub(super) fn target(size: MemorySize, random: &mut Random) -> u64 {
    let bytes = (size.size() as u64).max(1);
    let middle = DATA_END - 0x1000;
    match random.below(20) {
        0..6 => DATA_END - bytes,
        6 => DATA_END - random.below(bytes + 1),
        7..9 => middle - random.below(bytes + 1),
        9..15 => WINDOW + random.below(WINDOW_BYTES as u64 / 64 - 20) * 64,
        _ => WINDOW + random.below(WINDOW_BYTES as u64 - 1024),
    }
}

pub(super) fn number(register: Register) -> usize {
    register.full_register().number() & 15
}

/// Sets registers so that the memory operand is where it should be.
fn aim(insn: &Instruction, mode: Mode, state: &mut State, random: &mut Random) {
    let string = insn.is_string_instruction();
    if string || insn.op_kinds().any(|k| matches!(k, OpKind::MemorySegRDI | OpKind::MemorySegEDI)) {
        for register in [6, 7] {
            state.gpr[register] = target(insn.memory_size(), random);
        }
        if random.chance(30) {
            state.gpr[6] = state.gpr[7].wrapping_add(random.below(32)).wrapping_sub(16);
        }
        if string {
            state.gpr[1] = random.below(40);
        }
        return;
    }
    if insn.is_stack_instruction() {
        state.gpr[4] = (WINDOW + 0x300 + random.below(0x200)) & if random.chance(80) { !7 } else { !0 };
        state.gpr[5] = WINDOW + 0x300 + random.below(0x200);
    }
    if !insn.op_kinds().any(|k| k == OpKind::Memory) || insn.is_ip_rel_memory_operand() {
        return;
    }
    let base = insn.memory_base();
    if base == Register::None || random.chance(1) {
        return;
    }
    let index = insn.memory_index();
    let mut wanted = target(insn.memory_size(), random);
    let narrow = base.size() == 4;
    if index.is_vector_register() {
        wanted = WINDOW + 0x200;
        let spread = 0x400 / u64::from(insn.memory_index_scale());
        let mut draw = || match random.chance(3) {
            true => random.next(),
            false => random.below(spread).wrapping_sub(0x80),
        };
        let by_dword = insn.is_vsib32();
        let elements = std::array::from_fn(|_| match by_dword {
            true => u64::from(draw() as u32) | draw() << 32,
            false => draw(),
        });
        state.set_vector(number(index), elements);
    }
    let scaled = match index {
        Register::None => 0,
        _ if index.is_vector_register() => 0,
        Register::AL => state.gpr[0] & 0xff,
        _ => state.gpr[number(index)].wrapping_mul(insn.memory_index_scale().into()),
    };
    let mut value = wanted.wrapping_sub(scaled).wrapping_sub(insn.memory_displacement64());
    if narrow {
        value = value & 0xffff_ffff | if mode == Mode::Bits64 { state.gpr[number(base)] & !0xffff_ffff } else { 0 };
    }
    state.gpr[number(base)] = value;
}

/// Operands that would nearly always fault, or say nothing, if they were left to chance.
fn special_operands(
    insn: &Instruction,
    state: &mut State,
    memory: &mut [u8; WINDOW_BYTES],
    random: &mut Random,
) -> bool {
    let has_memory = insn.op_kinds().any(|k| k == OpKind::Memory);
    let offset = address(insn, state).wrapping_sub(WINDOW);
    let place = |bytes: u64| (offset <= WINDOW_BYTES as u64 - bytes).then_some(offset as usize);
    match insn.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            if has_memory && insn.op1_kind() == OpKind::Register =>
        {
            let register = number(insn.op1_register());
            if register != number(insn.memory_base()) && register != number(insn.memory_index()) {
                let bits = random.below(2048) as i64 - 1024;
                let width = insn.op1_register().size() * 8;
                let low = u64::MAX >> (64 - width);
                state.gpr[register] = state.gpr[register] & !low | bits as u64 & low;
            }
        }
        Mnemonic::Div | Mnemonic::Idiv if random.chance(80) => {
            let (rax, rdx) = (state.gpr[0], state.gpr[2]);
            let involved =
                |n: usize| has_memory && (number(insn.memory_base()) == n || number(insn.memory_index()) == n);
            if !involved(2) {
                state.gpr[2] = match (insn.mnemonic(), random.chance(30)) {
                    (_, true) => rdx & 0xf,
                    (Mnemonic::Idiv, _) => (rax as i64 >> 63) as u64,
                    _ => 0,
                };
            }
            if !involved(0) && random.chance(30) {
                state.gpr[0] = rax & 0xff;
            }
        }
        Mnemonic::Cmpxchg if has_memory && random.chance(50) => {
            if let Some(at) = place(8) {
                let value = u64::from_le_bytes(std::array::from_fn(|i| memory[at + i]));
                if number(insn.memory_base()) != 0 && number(insn.memory_index()) != 0 {
                    state.gpr[0] = value;
                }
            }
        }
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if random.chance(60) => {
            let half = insn.memory_size().size() / 2;
            if let Some(at) = place(16).filter(|_| ![0, 2].contains(&number(insn.memory_base()))) {
                let word = |from: usize| {
                    let mut bytes = [0; 8];
                    bytes[..half].copy_from_slice(&memory[from..from + half]);
                    u64::from_le_bytes(bytes)
                };
                (state.gpr[0], state.gpr[2]) = (word(at), word(at + half));
            }
        }
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
            if let Some(at) = place(4) {
                // AMD has a use for one of the reserved bits.
                memory[at + 2] &= !2;
                if random.chance(80) {
                    memory[at + 2..at + 4].fill(0);
                }
            }
        }
        Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xsaveopt
        | Mnemonic::Xsaveopt64
        | Mnemonic::Xsavec
        | Mnemonic::Xsavec64
        | Mnemonic::Xrstor
        | Mnemonic::Xrstor64
        | Mnemonic::Fxrstor
        | Mnemonic::Fxrstor64
        | Mnemonic::Fxsave
        | Mnemonic::Fxsave64 => {
            return image_operand(insn, state, memory, random);
        }
        Mnemonic::Fldcw | Mnemonic::Fldenv | Mnemonic::Frstor if random.chance(70) => {
            if let Some(at) = place(2) {
                memory[at] |= 0x3f;
            }
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz
            if random.chance(60) =>
        {
            state.gpr[1] = random.below(3);
        }
        _ => {}
    }
    let target = landing(random);
    let wide = if insn.code_size() == CodeSize::Code64 { 8 } else { 4 };
    let mut store = |at: u64, bytes: usize| {
        if let Some(slot) = memory.get_mut(at as usize..).and_then(|m| m.get_mut(..bytes)) {
            slot.copy_from_slice(&target.to_le_bytes()[..bytes]);
        }
    };
    match insn.flow_control() {
        FlowControl::Return => store(state.gpr[4].wrapping_sub(WINDOW), wide),
        FlowControl::IndirectBranch | FlowControl::IndirectCall if has_memory => store(offset, wide),
        FlowControl::IndirectBranch | FlowControl::IndirectCall => state.gpr[number(insn.op0_register())] = target,
        _ => {}
    }
    true
}

/// The memory operand's effective address in this state.
pub fn address(insn: &Instruction, state: &State) -> u64 {
    insn.virtual_address(
        (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory).unwrap_or(0),
        0,
        |r, _, _| Some(if r.is_segment_register() { 0 } else { state.gpr[number(r)] & mask(r) }),
    )
    .unwrap_or(0)
}

pub fn mask(register: Register) -> u64 {
    match register.size() {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// An image that can mostly be loaded, at an address where it can be.
fn image_operand(insn: &Instruction, state: &mut State, memory: &mut [u8; WINDOW_BYTES], random: &mut Random) -> bool {
    // EDX:EAX asks for components; those beyond AVX are the host's business.
    if [insn.memory_base(), insn.memory_index()].iter().any(|r| r.is_gpr() && [0, 2].contains(&number(*r))) {
        return false;
    }
    state.gpr[0] = random.below(8);
    state.gpr[2] = 0;
    let base = insn.memory_base();
    let loose = [Register::None, Register::RIP, Register::EIP].contains(&base);
    let mut at = 64 * random.below(WINDOW_BYTES as u64 / 64 - 16) as usize;
    if loose {
        at = address(insn, state).wrapping_sub(WINDOW) as usize;
    } else {
        if random.chance(3) {
            at += 8;
        }
        let now = address(insn, state);
        let moved = state.gpr[number(base)].wrapping_add((WINDOW + at as u64).wrapping_sub(now));
        let keep = if base.size() == 4 { state.gpr[number(base)] & !0xffff_ffff } else { 0 };
        state.gpr[number(base)] = moved & mask(base) | keep;
    }
    let Some(image) = memory.get_mut(at..at.wrapping_add(832)) else {
        return true;
    };
    let fx = random_fx(random);
    image[..512].copy_from_slice(&fx);
    image[512..576].fill(0);
    image[512] = random.below(8) as u8;
    match random.below(20) {
        0 => image[513] = 1,
        1 => image[520] = 1,
        2 => image[530] = 1,
        3 => image[27] = 1,
        4..8 => {
            image[520] = image[512] | random.below(8) as u8;
            image[527] = 0x80;
        }
        _ => {}
    }
    true
}

pub(super) fn random_state(mode: Mode, random: &mut Random) -> State {
    let mut state = State::ZERO;
    for value in &mut state.gpr {
        *value = random.integer();
    }
    if mode == Mode::Bits32 {
        state.gpr.iter_mut().for_each(|v| *v &= 0xffff_ffff);
        state.gpr[8..].fill(0);
    }
    state.rflags = 2 | random.next() & STATUS | if random.chance(25) { 0x400 } else { 0 };
    let fx = random_fx(random);
    state.fx = fx;
    let equal = random.chance(15);
    let first = random.vector();
    for i in 0..16 {
        let value = if equal && random.chance(50) { first } else { random.vector() };
        state.set_vector(i, value);
    }
    state
}

/// x87 state and MXCSR, mostly with all exceptions masked.
fn random_fx(random: &mut Random) -> [u8; 512] {
    let mut fx = [0u8; 512];
    let mut fcw = 0x037f;
    if random.chance(40) {
        fcw = 0x7f | random.pick(&[0u16, 2, 3]) << 8 | (random.below(4) as u16) << 10;
    }
    if random.chance(12) {
        fcw &= !(random.next() as u16 & 0x3f);
    }
    let mut fsw = (random.next() as u16) & 0x7f00;
    if random.chance(30) {
        fsw |= random.next() as u16 & 0x7f;
    }
    if fsw & !fcw & 0x3f != 0 && random.chance(80) {
        fsw &= !0x3f | fcw;
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    let tags = match random.below(4) {
        0 => 0,
        1 => random.next() as u8,
        _ => 0xff,
    };
    fx[0..2].copy_from_slice(&fcw.to_le_bytes());
    fx[2..4].copy_from_slice(&fsw.to_le_bytes());
    fx[4] = tags;
    let mut mxcsr = 0x1f80;
    if random.chance(40) {
        mxcsr |= random.next() as u32 & 0xe07f;
    }
    if random.chance(15) {
        mxcsr &= !(random.next() as u32 & 0x1f80);
    }
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for i in 0..8 {
        let at = 32 + i * 16;
        let (sign_exponent, mantissa) = random.float80();
        fx[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
        fx[at + 8..at + 10].copy_from_slice(&sign_exponent.to_le_bytes());
    }
    for i in 0..16 {
        let value = random.vector();
        fx[160 + i * 16..][..8].copy_from_slice(&value[0].to_le_bytes());
        fx[168 + i * 16..][..8].copy_from_slice(&value[1].to_le_bytes());
    }
    fx
}
