//! Where the guest's status flags are while translated code runs, and how they get elsewhere.
//!
//! They are in the host's flags after an instruction that sets them. What comes in between (a look-up in the TLB takes
//! the host's flags) need not save them where they can be made again: by comparing the same registers once more, or
//! from a result. Only an instruction that faults or leaves, or one that reads them, has them made.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

use super::{
    HOST,
    block::Work,
    emit::{Emitter, Mem, RSP, T0, T1},
    thunks::{FLAGS, gpr, state},
};

/// Which places have the flags; if none, there is a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    pub memory: bool,
    pub host: bool,
}

impl Flags {
    pub const IN_MEMORY: Self = Self { memory: true, host: false };
    pub const IN_HOST: Self = Self { memory: false, host: true };
}

/// Host code that sets the flags as an earlier instruction did. It may use RAX and R15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    code: [u8; 32],
    len: u8,
    /// Registers that it reads, which must be as the instruction left them: see [`register_bit`].
    pub registers: u16,
}

/// A guest register's bit where registers are bits: that of its host register, or one that no guest register has.
pub fn register_bit(guest: u8) -> u16 {
    match (HOST[usize::from(guest)], guest) {
        (Some(host), _) => 1 << host,
        (None, 12) => 1 << T0,
        (None, 13) => 1 << RSP,
        (None, _) => 1 << T1,
    }
}

/// What a recipe is made of.
struct Ingredients<'a> {
    insn: &'a Instruction,
    /// The guest register in memory that a scratch register stands for.
    carried: Option<(u8, u8)>,
    e: Emitter,
    registers: u16,
}

impl<'a> Ingredients<'a> {
    fn new(insn: &'a Instruction, carried: Option<(u8, u8)>) -> Self {
        Self { insn, carried, e: Emitter::default(), registers: 0 }
    }

    /// The width of the destination: 64 or 32 bits.
    fn wide(&self) -> Option<bool> {
        match self.insn.op0_register().size() {
            8 => Some(true),
            4 => Some(false),
            _ => None,
        }
    }

    fn is_register(&self, i: u32) -> bool {
        i < self.insn.op_count() && self.insn.op_kind(i) == OpKind::Register
    }

    /// The register that has operand `i` as it is now: the host's, or `spare`.
    fn register(&mut self, i: u32, spare: u8) -> Option<u8> {
        if !self.is_register(i) {
            return None;
        }
        let host = self.insn.op_register(i).full_register().number() as u8;
        match self.carried {
            Some((guest, of)) if of == host => {
                self.registers |= register_bit(guest);
                self.e.load(spare, gpr(guest));
                Some(spare)
            }
            _ if host == T0 || host == T1 => None,
            _ => {
                self.registers |= 1 << host;
                Some(host)
            }
        }
    }

    fn immediate(&self, wide: bool) -> Option<i32> {
        let imm = self.insn.try_immediate(1).ok()?;
        i32::try_from(imm as i64).ok().or(if wide { None } else { Some(imm as u32 as i32) })
    }

    fn recipe(self) -> Option<Recipe> {
        let mut code = [0; 32];
        code.get_mut(..self.e.code.len())?.copy_from_slice(&self.e.code);
        Some(Recipe { code, len: self.e.code.len() as u8, registers: self.registers })
    }
}

impl Recipe {
    pub fn emit(&self, e: &mut Emitter) {
        e.raw(&self.code[..usize::from(self.len)]);
    }

    /// For an instruction with host registers in its operands, and its encoding. `carried`: the guest register in memory
    /// that one of the scratch registers stands for.
    pub fn of(insn: &Instruction, bytes: &[u8], carried: Option<(u8, u8)>) -> Option<Self> {
        use Mnemonic as M;
        let in_memory = insn.op_kinds().any(|k| k == OpKind::Memory);
        let mut r = Ingredients::new(insn, carried);
        match insn.mnemonic() {
            // As it was.
            M::Cmp | M::Test if !in_memory && carried.is_none_or(|(_, host)| host == T1) => {
                r.register(0, T1)?;
                // The same register twice is one.
                if r.is_register(1) && insn.op_register(1).full_register() != insn.op_register(0).full_register() {
                    r.register(1, T1)?;
                }
                r.e.raw(bytes);
            }
            // The flags are those of the result.
            M::And | M::Or | M::Xor => {
                let wide = r.wide()?;
                let to = r.register(0, T1)?;
                r.e.rr(wide, &[0x85], to, to);
            }
            // Undone in R15, and done again.
            M::Add | M::Sub if !in_memory => {
                let wide = r.wide()?;
                let to = r.register(0, T1)?;
                r.e.mov(T1, to);
                let (undo, again) = if insn.mnemonic() == M::Add { (5, 0) } else { (0, 5) };
                if r.is_register(1) {
                    if insn.op0_register() == insn.op1_register() {
                        return None;
                    }
                    let from = r.register(1, T0)?;
                    r.e.rr(wide, &[undo << 3 | 1], from, T1);
                    r.e.rr(wide, &[again << 3 | 1], from, T1);
                } else {
                    let imm = r.immediate(wide)?;
                    r.e.group1(wide, undo, T1, imm);
                    r.e.group1(wide, again, T1, imm);
                }
            }
            // The other way round, twice.
            M::Neg if !in_memory => {
                let wide = r.wide()?;
                let to = r.register(0, T1)?;
                r.e.mov(T1, to);
                r.e.rr(wide, &[0xf7], 3, T1);
                r.e.rr(wide, &[0xf7], 3, T1);
            }
            _ => return None,
        }
        r.recipe()
    }

    /// For INC and DEC where the flags in memory have the carry that they leave alone.
    pub fn of_step(insn: &Instruction, carried: Option<(u8, u8)>) -> Option<Self> {
        let mut r = Ingredients::new(insn, carried);
        let wide = r.wide()?;
        let to = r.register(0, T1)?;
        r.e.mov(T1, to);
        let (undo, again) = if insn.mnemonic() == Mnemonic::Inc { (1, 0) } else { (0, 1) };
        r.e.rr(wide, &[0xff], undo, T1);
        r.e.carry(FLAGS);
        r.e.rr(wide, &[0xff], again, T1);
        r.recipe()
    }

    /// For one that overwrites an operand of its own, which is kept in [`super::State::operand`] then: the host register
    /// that it is in before, and the recipe.
    pub fn with_operand(insn: &Instruction, carried: Option<(u8, u8)>) -> Option<(u8, Self)> {
        use Mnemonic as M;
        if insn.op_kinds().any(|k| k == OpKind::Memory) || insn.op0_kind() != OpKind::Register {
            return None;
        }
        let mut r = Ingredients::new(insn, carried);
        let wide = r.wide()?;
        let to = insn.op0_register().full_register().number() as u8;
        match insn.mnemonic() {
            M::Shl | M::Sal | M::Shr | M::Sar if insn.op1_kind() != OpKind::Register => {
                let which = match insn.mnemonic() {
                    M::Shr => 5,
                    M::Sar => 7,
                    _ => 4,
                };
                let count = insn.try_immediate(1).ok()? as u8;
                // Shifts by one have an encoding, and an OF, of their own.
                if count & if wide { 63 } else { 31 } < 2 {
                    return None;
                }
                r.e.load(T1, OPERAND);
                r.e.shift(wide, which, T1, count);
            }
            M::Imul if insn.op_count() == 2 => {
                if insn.op0_register() == insn.op1_register() {
                    r.e.load(T1, OPERAND);
                    r.e.rr(wide, &[0x0f, 0xaf], T1, T1);
                } else {
                    let from = r.register(1, T0)?;
                    r.e.load(T1, OPERAND);
                    r.e.rr(wide, &[0x0f, 0xaf], T1, from);
                }
            }
            _ => return None,
        }
        Some((to, r.recipe()?))
    }
}

const OPERAND: Mem = state(std::mem::offset_of!(super::State, operand));
const STATUS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// For each of these instructions whether flags that it leaves are likely to be in the way of a memory access before
/// anything reads or overwrites them.
pub fn in_the_way<'a>(instructions: impl DoubleEndedIterator<Item = &'a Instruction>) -> Vec<bool> {
    let mut accessed = false;
    let mut found: Vec<bool> = instructions
        .rev()
        .map(|insn| {
            let here = accessed;
            let memory = insn.op_kinds().any(|k| k == OpKind::Memory) && insn.mnemonic() != Mnemonic::Lea;
            if memory {
                accessed = true;
            } else if insn.rflags_read() & STATUS != 0 || insn.rflags_modified() & STATUS != 0 {
                accessed = false;
            }
            here
        })
        .collect();
    found.reverse();
    found
}

/// For each of these instructions whether flags that were there before it, if it leaves them alone, are overwritten
/// before anything can look at them.
pub fn dead<'a>(instructions: impl DoubleEndedIterator<Item = &'a Instruction>) -> Vec<bool> {
    use Mnemonic as M;
    let mut overwritten = false;
    let mut found: Vec<bool> = instructions
        .rev()
        .map(|insn| {
            let here = overwritten;
            let registers = insn.op_kinds().all(|k| k != OpKind::Memory)
                && (0..insn.op_count()).all(|i| insn.op_kind(i) != OpKind::Register || insn.op_register(i).size() >= 4);
            overwritten = match insn.mnemonic() {
                M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test => registers,
                M::Mov | M::Movzx | M::Movsx | M::Movsxd if registers => overwritten,
                _ => false,
            };
            here
        })
        .collect();
    found.reverse();
    found
}

/// MOVZX EAX, [flags]; CMP AL, 0x81 (overflows where AL is 1); SAHF.
pub fn unpack(e: &mut Emitter) {
    e.rm(false, &[0x0f, 0xb7], T0, FLAGS);
    e.raw(&[0x3c, 0x81, 0x9e]);
}

/// LAHF; SETO AL; MOV [flags], AX.
fn pack(e: &mut Emitter) {
    e.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
    e.prefixed(&[0x66], false, &[0x89], T0, FLAGS);
}

const SCRATCH: Mem = state(std::mem::offset_of!(super::State, scratch));

/// Makes flags in memory from a recipe, if they are not there. Uses R15; RAX stays as it is.
pub fn make(e: &mut Emitter, recipe: Option<Recipe>) {
    let Some(recipe) = recipe else { return };
    e.store(T0, SCRATCH);
    recipe.emit(e);
    pack(e);
    e.load(T0, SCRATCH);
}

impl Work<'_> {
    /// Flags to memory. Uses RAX and R15; flags in the host's stay there.
    pub fn pack(&mut self) {
        if self.flags.memory {
            return;
        }
        self.remake();
        pack(self.e());
        self.flags.memory = true;
        self.carry = true;
    }

    /// Flags to the host's. Uses RAX and R15.
    pub fn unpack(&mut self) {
        if self.flags.host {
            return;
        }
        if self.flags.memory {
            unpack(self.e());
            self.flags.host = true;
        } else {
            self.remake();
        }
    }

    fn remake(&mut self) {
        if !self.flags.host {
            let recipe = self.recipe.expect("flags are somewhere");
            self.drop_held();
            recipe.emit(self.e());
            self.flags.host = true;
        }
    }

    /// Before code that uses the host's flags and writes these host registers: flags stay in memory, or can be made
    /// again. Uses RAX and R15.
    pub fn keep_flags(&mut self, written: u16) {
        match self.recipe {
            _ if self.flags.memory => self.forget_recipe(written),
            Some(recipe) if recipe.registers & written == 0 => {}
            _ => {
                self.pack();
                self.forget_recipe(written);
            }
        }
    }

    /// Before code that writes these host registers and leaves the host's flags alone.
    pub fn keep_recipe(&mut self, written: u16) {
        if self.recipe.is_some_and(|r| r.registers & written != 0) {
            if !self.flags.memory && !self.flags.host {
                self.pack();
            }
            self.recipe = None;
        }
    }

    fn forget_recipe(&mut self, written: u16) {
        if self.recipe.is_some_and(|r| r.registers & written != 0) {
            self.recipe = None;
        }
    }

    /// What an outline must do for flags to be in memory: nothing if they are.
    pub fn missing_flags(&self) -> Option<Recipe> {
        if self.flags.memory { None } else { self.recipe }
    }

    pub fn flags_set(&mut self, flags: Flags, recipe: Option<Recipe>) {
        self.flags = flags;
        self.recipe = recipe;
        self.carry = flags.memory;
    }
}
