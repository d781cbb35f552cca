//! Loops of many rounds, of what translated code keeps track of most closely: flags that may have to be made again, the
//! carry that INC and DEC leave alone, registers that live in memory, and accesses that move.

use iced_x86::{Code, Instruction, OpCodeOperandKind as Kind, OpKind, Register};

use super::{Builder, encodes};
use crate::random_code::sequence::What;

/// Registers that the translator has in memory, and some that it has not.
const FAVOURITES: [u32; 8] = [12, 13, 15, 12, 13, 15, 3, 9];

impl Builder<'_> {
    /// Set-up, then a loop that is closed at its end, or one that is closed anywhere and left at its head.
    pub(super) fn rounds(&mut self) {
        for _ in 0..self.random.below(4) {
            self.hot();
        }
        let counter = self.favourite();
        self.reserved |= 1 << counter;
        self.counters |= 1 << counter;
        let rounds = 4 + self.random.below(60);
        let Ok(set) = Instruction::with2(Code::Mov_r32_imm32, Register::EAX + counter, rounds as u32) else { return };
        self.push(What::Plain(set), 0, true);
        let head = self.items.len();
        if self.random.chance(50) {
            self.blocks(None);
            self.count(counter);
            let code = self.random.pick(&[Code::Jne_rel8_64, Code::Jne_rel32_64, Code::Jg_rel32_64]);
            self.branch(code, head, true);
        } else {
            self.count(counter);
            let code = self.random.pick(&[Code::Je_rel8_64, Code::Je_rel32_64, Code::Jle_rel32_64]);
            self.branch(code, usize::MAX, true);
            let out = self.items.len() - 1;
            self.blocks(Some(head));
            self.branch(Code::Jmp_rel32_64, head, true);
            self.items[out].to = self.items.len();
        }
        self.reserved &= !(1 << counter);
        self.counters &= !(1 << counter);
    }

    fn count(&mut self, counter: u32) {
        let (narrow, wide) = (Register::EAX + counter, Register::RAX + counter);
        let count = match self.random.below(4) {
            0 => Instruction::with1(Code::Dec_rm32, narrow),
            1 => Instruction::with1(Code::Dec_rm64, wide),
            2 => Instruction::with2(Code::Sub_rm64_imm8, wide, 1),
            _ => Instruction::with2(Code::Add_rm32_imm8, narrow, -1),
        };
        if let Ok(count) = count {
            self.push(What::Plain(count), 0, true);
        }
    }

    /// Instructions with jumps over some of them, or `back`.
    fn blocks(&mut self, back: Option<usize>) {
        for _ in 0..2 + self.random.below(16) {
            match (self.random.below(20), back) {
                (0..4, _) => {
                    let (short, near) = self.random.pick(&self.pool.jumps);
                    let code = if self.random.chance(50) { short } else { near };
                    self.branch(code, usize::MAX, false);
                    let over = self.random.below(6);
                    self.open.push((self.items.len() - 1, over));
                }
                (4, Some(head)) => {
                    let (_, near) = self.random.pick(&self.pool.jumps);
                    self.branch(near, head, true);
                }
                (5, _) => self.call(),
                (6 | 7, _) => self.advance(),
                (8, _) => self.plain(true),
                _ => self.hot(),
            }
        }
        self.land(true);
    }

    /// A pointer moves on: over the pages' ends, too.
    fn advance(&mut self) {
        let (pointer, _) = self.pointers[self.random.below(self.pointers.len() as u64) as usize];
        if self.counters >> pointer & 1 != 0 {
            return;
        }
        let register = Register::RAX + pointer;
        let by = self.random.below(49) as i32 - 24;
        let insn = match self.random.below(4) {
            0 => Instruction::with2(Code::Add_rm64_imm8, register, by),
            1 => Instruction::with2(Code::Sub_rm64_imm8, register, by),
            2 => Instruction::with1(Code::Inc_rm64, register),
            _ => Instruction::with1(Code::Dec_rm64, register),
        };
        if let Ok(insn) = insn {
            self.push(What::Plain(insn), 0, false);
        }
    }

    fn favourite(&mut self) -> u32 {
        let register = self.random.pick(&FAVOURITES);
        if self.reserved >> register & 1 == 0 { register } else { self.free_register() }
    }

    /// One instruction, mostly of registers of which there are few.
    fn hot(&mut self) {
        for _ in 0..50 {
            let code = self.pool.hot_code(self.random);
            let Some(mut insn) = self.instruction(code) else { continue };
            let op = code.op_code();
            for i in 0..op.op_count() {
                if insn.op_kind(i) != OpKind::Register || self.random.chance(30) {
                    continue;
                }
                let first = match op.op_kind(i) {
                    Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm => Register::EAX,
                    Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm => Register::RAX,
                    _ => continue,
                };
                insn.set_op_register(i, first + self.favourite());
            }
            if self.harms(&insn) || !encodes(&insn) {
                continue;
            }
            return self.push(What::Plain(insn), 0, false);
        }
    }

    /// Whether it writes a register that is to stay what it is.
    fn harms(&mut self, insn: &Instruction) -> bool {
        let reserved = self.reserved;
        let used = self.info.info(insn);
        used.used_registers().iter().any(|u| {
            let written = !matches!(
                u.access(),
                iced_x86::OpAccess::Read | iced_x86::OpAccess::CondRead | iced_x86::OpAccess::NoMemAccess
            );
            u.register().is_gpr() && written && reserved >> u.register().full_register().number() & 1 != 0
        })
    }
}
