//! Instructions that are copied, with other operands.

use std::{mem::offset_of, ops::Range};

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{
    ACCUMULATOR, HOST, State,
    block::{Work, host_mask},
    emit::{Label, Mem, T0, T1, cc},
    flags::{Flags, Recipe},
    operand::{self, Carried, Copyable, Touch},
    outline::Outline,
    span::Reach,
    thunks::{FLAGS, PAGE, VECTORS, state},
    vectors,
};
use crate::{
    cpu::Cpu,
    native::{self, Access, Environment, FeatureClass, Fpu, Native, Stub},
    uop::Uop,
};

/// Where a copied instruction finds its memory operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    None,
    InT0,
    InT1,
    /// At the sum of T0 and T1.
    Pair,
    /// At its own address and T1.
    Near(Reach),
}

/// A copied instruction's operands.
struct Place {
    /// With its operands renamed.
    insn: Instruction,
    operand: Operand,
    carried: Vec<(Carried, u8)>,
}

impl Place {
    /// Where the operand is on the host.
    fn memory(&self) -> Option<Mem> {
        let insn = &self.insn;
        let base = |register: Register| register.number() as u8;
        match self.operand {
            Operand::None => None,
            Operand::InT0 => Some(Mem::Base(T0, 0)),
            Operand::InT1 => Some(Mem::Base(T1, 0)),
            Operand::Pair => Some(Mem::Indexed(T0, T1, 0, 0)),
            Operand::Near(_) => {
                let disp = insn.memory_displacement64() as i32;
                Some(Mem::Indexed(base(insn.memory_base()), base(insn.memory_index()), 0, disp))
            }
        }
    }
}

/// A field of what FSTENV tells.
fn environment(offset: usize) -> Mem {
    Mem::State(offset_of!(Cpu, fpu) + offset_of!(Fpu, environment) + offset)
}

impl Work<'_> {
    pub fn copy(&mut self, insn: &Instruction, op: &Uop, index: usize) -> bool {
        let mut alignment = 1;
        let mut class = FeatureClass::Integer;
        let mut fop = 0;
        let plain = operand::is_plain(insn);
        if !plain {
            let Ok(Native::Stub(stub)) = self.stubs.get(insn) else { return false };
            let Stub { ref memory, class: of, fop: opcode, .. } = stub;
            fop = opcode;
            use FeatureClass as F;
            if !matches!(of, F::Integer | F::VexInteger | F::Sse | F::Avx | F::X87) || stub.loads_control() {
                return false;
            }
            if memory.access == Access::None && insn.op_kinds().any(|k| k == OpKind::Memory) {
                return false;
            }
            alignment = u64::from(memory.alignment);
            class = of;
        }
        // Nothing that the guest was not told of: the host may not have it either.
        if !self.stubs.features().contains_all(insn.cpuid_features()) {
            return false;
        }
        let mut insn = *insn;
        insn.set_code(operand::general(insn.code()));
        let has_memory = insn.op_kinds().any(|k| k == OpKind::Memory);
        native::operand::without_address(&mut insn, has_memory);
        let Some(found) = operand::analyse(&mut self.t.info, &insn) else { return false };
        if !(1..=32).contains(&found.bytes) || (found.vectors && plain) {
            return false;
        }
        if has_memory && self.displacement(op).is_none() {
            return false;
        }
        let reach = if has_memory && alignment == 1 { self.reach(index) } else { None };
        let place = match reach.map(|reach| self.rename(insn, &found, has_memory, Some((op.base, op.disp, reach)))) {
            Some(Some(place)) => Some(place),
            _ => self.rename(insn, &found, has_memory, None),
        };
        let Some((bytes, place)) = place else { return false };

        let wanted = match class {
            FeatureClass::Avx => vectors::AVX,
            FeatureClass::Sse => vectors::SSE,
            _ if found.vectors => vectors::SSE,
            _ => 0,
        };
        let x87 = class == FeatureClass::X87;
        if x87 {
            self.want_x87(self.start as i32 + i32::from(op.off));
            if fop != 0 {
                self.note_x87(fop, op);
            }
        }
        if wanted != 0 {
            self.want_vectors(wanted, self.start as i32 + i32::from(op.off));
        }
        let done = self.e().label();
        let first = self.t.outlines.len();
        self.scatters = found.stores && !found.flags_in && found.bytes > 1;
        self.operands(op, index, &found, &place, alignment, fop != 0, done);
        let scatters = std::mem::take(&mut self.scatters);
        let guard = self.e().here();
        if let (Some(mem), true) = (place.memory(), self.guards) {
            self.guard(mem, found.bytes);
        }
        let guarded = self.e().here();
        if found.accumulator {
            self.e().mov(T0, ACCUMULATOR);
        }
        for (carried, host) in &place.carried {
            if carried.read {
                self.load_guest(*host, carried.guest);
            }
        }
        let (recipe, carry) =
            if found.flags_out { self.recipe_for(&place, &bytes, &found, index) } else { (None, false) };
        self.e().raw(&bytes);
        if scatters {
            self.scatter(first, guard..guarded);
        }
        if found.accumulator {
            self.e().mov(ACCUMULATOR, T0);
        }
        for (carried, host) in &place.carried {
            if carried.write {
                self.store_guest(*host, carried.guest);
            }
        }
        if found.flags_out {
            self.flags_set(Flags::IN_HOST, recipe);
            self.carry = carry;
        } else if found.flags_in {
            self.keep_recipe(host_mask(found.writes));
        } else if self.dead[self.first + index] {
            // What is in memory may be old, but nobody looks before it is overwritten.
            self.flags_set(Flags::IN_MEMORY, None);
        }
        if place.carried.iter().any(|(carried, host)| *host == T1 && !carried.read && !carried.write) {
            self.drop_held();
        }
        if has_memory {
            self.held_wanted(first);
            // An instruction that the interpreter did has left its flags in memory.
            self.flags_wanted(first);
        }
        self.e().bind(done);
        true
    }

    /// The outlines pushed since `first` do the instruction that was just made themselves where its store crosses pages:
    /// as it is made after them, but for the check.
    fn scatter(&mut self, first: usize, check: Range<usize>) {
        for outline in &mut self.t.outlines[first..] {
            if let Outline::Slow { again, scatter, .. }
            | Outline::SlowNear { again, scatter, .. }
            | Outline::Moved { again, scatter, .. } = outline
            {
                let e = &self.t.emitter;
                *scatter = [&e.code[e.place(*again)..check.start], &e.code[check.end..]].concat();
            }
        }
    }

    /// How to make the flags of an instruction again, and whether the flags in memory have its carry. Before it: one of
    /// its operands may be put aside for that.
    fn recipe_for(&mut self, place: &Place, bytes: &[u8], found: &Copyable, index: usize) -> (Option<Recipe>, bool) {
        let carried = match place.carried[..] {
            [] => None,
            [(carried, host)] => Some((carried.guest, host)),
            _ => return (None, false),
        };
        if found.accumulator {
            return (None, false);
        }
        if matches!(place.insn.mnemonic(), Mnemonic::Inc | Mnemonic::Dec) {
            let carry = self.flags.memory || self.carry;
            let has_memory = place.operand != Operand::None;
            let recipe = if carry && !has_memory { Recipe::of_step(&place.insn, carried) } else { None };
            return (recipe, carry);
        }
        if !found.overwrites_flags() {
            return (None, false);
        }
        if let Some(recipe) = Recipe::of(&place.insn, bytes, carried) {
            return (Some(recipe), false);
        }
        if self.in_the_way[self.first + index]
            && let Some((register, recipe)) = Recipe::with_operand(&place.insn, carried)
        {
            self.e().store(register, state(offset_of!(State, operand)));
            return (Some(recipe), false);
        }
        (None, false)
    }

    /// Everything that must be in its place before a copied instruction: flags, and the address of its memory operand.
    /// `x87`: the address is one that FSTENV tells.
    #[expect(clippy::too_many_arguments, reason = "all of one instruction")]
    fn operands(
        &mut self,
        op: &Uop,
        index: usize,
        found: &Copyable,
        place: &Place,
        alignment: u64,
        x87: bool,
        done: Label,
    ) {
        let written = host_mask(found.writes);
        let write = found.touch == Touch::Write;
        if place.operand == Operand::None || place.operand == Operand::Near(Reach::Follow) {
            // The host's flags are left alone.
            if found.flags_in {
                self.flags_for(place);
            } else if !found.flags_out && !self.dead[self.first + index] {
                self.keep_recipe(written);
            }
            if place.operand != Operand::None {
                if x87 {
                    self.note_operand(op, op.disp);
                }
                self.reach_span(index, op.disp, found.bytes, write);
            }
            return;
        }
        if found.flags_in {
            self.pack();
        }
        // Flags that are about to be overwritten must be there for a fault, not for longer.
        let unwanted = found.overwrites_flags() || self.dead[self.first + index];
        self.keep_flags(if unwanted { 0 } else { written });
        let disp = self.displacement(op).unwrap_or_default();
        if x87 {
            self.note_operand(op, disp);
        }
        match place.operand {
            Operand::Near(Reach::Alone) => self.reach_alone(index, op.base, disp, found.bytes, write, done),
            Operand::Near(_) => self.reach_span(index, disp, found.bytes, write),
            _ => {
                self.address(op, disp);
                let pair = place.operand == Operand::Pair;
                self.access_by(index, found.bytes, write, alignment, done, pair);
                if place.operand == Operand::InT1 {
                    self.e().mov(T1, T0);
                }
            }
        }
        if found.flags_in {
            // They are in memory: T1 stays as it is.
            self.flags_for(place);
        }
    }

    /// The flags that an instruction reads or keeps, to the host's. Uses RAX, and R15 if they are not in memory.
    fn flags_for(&mut self, place: &Place) {
        use Mnemonic as M;
        // Of all flags these want the carry, and write the others.
        let carry = matches!(place.insn.mnemonic(), M::Inc | M::Dec | M::Adc | M::Sbb);
        if carry && (self.flags.memory || self.carry) && !self.flags.host {
            self.e().carry(FLAGS);
        } else {
            self.unpack();
        }
    }

    /// The operand's linear address, for FDP. Uses RAX, R15 and the host's flags.
    fn note_operand(&mut self, op: &Uop, disp: i32) {
        self.address(op, disp);
        self.e().store(T0, environment(offset_of!(Environment, operand)));
    }

    /// The instruction with host registers in the place of guest registers.
    ///
    /// `near`: how an operand with that base register and displacement is reached by its difference.
    fn rename(
        &mut self,
        mut insn: Instruction,
        found: &Copyable,
        has_memory: bool,
        near: Option<(u8, i32, Reach)>,
    ) -> Option<(Vec<u8>, Place)> {
        let carries = found.carried.iter().flatten().count();
        // RAX is free once it has been used: for the address, for flags, or as itself.
        let operand = match near {
            _ if !has_memory => Operand::None,
            Some((.., reach)) => Operand::Near(reach),
            None if found.flags_in || found.accumulator => Operand::InT1,
            None if carries == 0 => Operand::Pair,
            None => Operand::InT0,
        };
        let mut free = match operand {
            Operand::None => vec![T1, T0],
            Operand::Near(_) | Operand::InT1 => vec![T0],
            Operand::InT0 => vec![T1],
            Operand::Pair => vec![],
        };
        if found.accumulator {
            free.retain(|r| *r != T0);
        }
        if carries > free.len() {
            return None;
        }
        let carried: Vec<_> = found.carried.iter().flatten().copied().zip(free).collect();
        for i in 0..insn.op_count() {
            if insn.op_kind(i) != OpKind::Register || !insn.op_register(i).is_gpr() {
                continue;
            }
            let register = insn.op_register(i);
            let guest = register.full_register().number();
            let host = match HOST[guest] {
                Some(_) if guest == 0 && found.high => 0,
                Some(host) => host,
                None => carried.iter().find(|(c, _)| usize::from(c.guest) == guest)?.1,
            };
            insn.set_op_register(i, operand::renamed(register, host)?);
        }
        match operand {
            Operand::None => {}
            Operand::InT0 => insn.set_memory_base(Register::RAX),
            Operand::InT1 => insn.set_memory_base(Register::R15),
            Operand::Pair => {
                insn.set_memory_base(Register::RAX);
                insn.set_memory_index(Register::R15);
            }
            Operand::Near(_) => {
                let (base, disp, _) = near?;
                insn.set_memory_base(Register::R15);
                insn.set_memory_index(operand::renamed(Register::RAX, HOST[usize::from(base)]?)?);
                insn.set_memory_displacement64(i64::from(disp) as u64);
                insn.set_memory_displ_size(match disp {
                    0 => 0,
                    -128..128 => 1,
                    _ => 8,
                });
            }
        }
        let encoded = self.t.encoder.encode(&insn, 0);
        // Also what a failed attempt left there: AH and its like cannot go with registers that want a REX prefix.
        let bytes = self.t.encoder.take_buffer();
        encoded.ok()?;
        Some((bytes, Place { insn, operand, carried }))
    }

    fn want_x87(&mut self, at: i32) {
        if self.x87 {
            return;
        }
        self.drop_held();
        self.keep_flags(0);
        let make = self.missing_flags();
        self.e().test_byte(state(offset_of!(State, x87)), 1);
        self.flags.host = false;
        let from = self.e().label();
        self.e().jcc(cc::E, from);
        let back = self.e().mark();
        self.t.outlines.push(Outline::X87 { from, back, at, make });
        self.x87 = true;
    }

    /// Where the instruction is, and what it is: FIP and FOP. Uses RAX.
    fn note_x87(&mut self, opcode: u16, op: &Uop) {
        let at = self.start as i32 + i32::from(op.off);
        self.e().load(T0, PAGE);
        self.e().lea(T0, Mem::Base(T0, at));
        self.e().store(T0, environment(offset_of!(Environment, instruction)));
        let at = environment(offset_of!(Environment, opcode));
        self.e().prefixed(&[0x66], false, &[0xc7], 0, at);
        self.e().raw(&opcode.to_le_bytes());
    }

    pub fn want_vectors(&mut self, wanted: u32, at: i32) {
        if self.vectors & wanted != 0 {
            return;
        }
        self.drop_held();
        // The test below takes the host's flags.
        self.keep_flags(0);
        let make = self.missing_flags();
        self.e().test_byte(VECTORS, wanted as u8);
        self.flags.host = false;
        let from = self.e().label();
        self.e().jcc(cc::E, from);
        let back = self.e().mark();
        self.t.outlines.push(Outline::Vectors { from, back, at, wanted, make });
        self.vectors |= wanted;
    }
}
