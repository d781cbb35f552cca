//! Where the guest's status flags are while translated code runs, and how they get elsewhere.
//!
//! They are in the host's flags after an instruction that sets them. What comes in between (a look-up in the TLB takes
//! the host's flags) need not save them where they can be made again: by comparing the same registers once more, or
//! from a result. Only an instruction that faults or leaves, or one that reads them, has them made.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{
    block::Work,
    emit::{Emitter, Mem, T0, T1},
    thunks::{FLAGS, state},
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

/// Host code that sets the flags as an earlier instruction did. It may use R15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    code: [u8; 24],
    len: u8,
    /// Host registers that it reads, which must be as the instruction left them.
    pub registers: u16,
}

impl Recipe {
    fn of_bytes(bytes: &[u8], registers: u16) -> Option<Self> {
        let mut code = [0; 24];
        code.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self { code, len: bytes.len() as u8, registers })
    }

    pub fn emit(&self, e: &mut Emitter) {
        e.raw(&self.code[..usize::from(self.len)]);
    }

    /// For an instruction with host registers in its operands, none of them scratch, and its encoding.
    pub fn of(insn: &Instruction, bytes: &[u8]) -> Option<Self> {
        use Mnemonic as M;
        let register =
            |i: u32| (insn.op_kind(i) == OpKind::Register).then(|| insn.op_register(i).full_register().number() as u8);
        let in_memory = insn.op_kinds().any(|k| k == OpKind::Memory);
        let mask = |r: Option<u8>| r.map_or(0, |r| 1u16 << r);
        let second = || if insn.op_count() > 1 { register(1) } else { None };
        match insn.mnemonic() {
            M::Cmp | M::Test if !in_memory => Self::of_bytes(bytes, mask(register(0)) | mask(second())),
            // The flags are those of the result.
            M::And | M::Or | M::Xor => {
                let to = register(0)?;
                let mut e = Emitter::default();
                match insn.op0_register().size() {
                    8 => e.rr(true, &[0x85], to, to),
                    4 => e.rr(false, &[0x85], to, to),
                    _ => return None,
                }
                Self::of_bytes(&e.code, mask(Some(to)))
            }
            // Undone in R15, and done again.
            M::Add | M::Sub if !in_memory => {
                let to = register(0)?;
                let wide = match insn.op0_register().size() {
                    8 => true,
                    4 => false,
                    _ => return None,
                };
                let (undo, again) = if insn.mnemonic() == M::Add { (5, 0) } else { (0, 5) };
                let mut e = Emitter::default();
                e.rr(wide, &[0x89], to, T1);
                match register(1) {
                    Some(from) if from != to => {
                        e.rr(wide, &[undo << 3 | 1], from, T1);
                        e.rr(wide, &[again << 3 | 1], from, T1);
                    }
                    Some(_) => return None,
                    None => {
                        let imm = i32::try_from(insn.immediate(1) as i64)
                            .or_else(|_| if wide { Err(()) } else { Ok(insn.immediate(1) as u32 as i32) });
                        let imm = imm.ok()?;
                        e.group1(wide, undo, T1, imm);
                        e.group1(wide, again, T1, imm);
                    }
                }
                Self::of_bytes(&e.code, mask(Some(to)) | mask(register(1)))
            }
            _ => None,
        }
    }
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
    }
}
