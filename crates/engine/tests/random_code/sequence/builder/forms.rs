//! What a sequence is made of besides single instructions: jumps, loops, calls, changes of its own code, strings.

use iced_x86::{Code, Instruction, MemoryOperand, MemorySize, OpKind, Register};

use super::{Builder, encodes, with2};
use crate::random_code::{
    case::{Mode, WINDOW},
    generate,
    sequence::What,
};

impl Builder<'_> {
    pub(super) fn branch(&mut self, code: Code, to: usize, keep: bool) {
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_op0_kind(OpKind::NearBranch64);
        self.push(What::Jump(insn), to, keep);
    }

    /// Forward, over a few instructions.
    pub(super) fn jump(&mut self) {
        let (short, near) = self.random.pick(&self.pool.jumps);
        let code = match self.random.below(12) {
            0 => Code::Jmp_rel8_64,
            1 => Code::Jmp_rel32_64,
            2 => Code::Jrcxz_rel8_64,
            3..7 => near,
            _ => short,
        };
        let over = self.random.below(5);
        self.branch(code, usize::MAX, false);
        self.open.push((self.items.len() - 1, over));
    }

    fn body(&mut self, stack: bool) {
        for _ in 0..1 + self.random.below(5) {
            match self.random.below(12) {
                0 => self.jump(),
                1 => self.modify(),
                _ => self.plain(stack),
            }
        }
        self.land(true);
    }

    /// A loop of a few rounds.
    pub(super) fn repeat(&mut self) {
        self.land(true);
        let counter = self.free_register();
        self.reserved |= 1 << counter;
        self.counters |= 1 << counter;
        let rounds = 1 + self.random.below(30);
        let Ok(set) = Instruction::with2(Code::Mov_r32_imm32, Register::EAX + counter, rounds as u32) else { return };
        self.push(What::Plain(set), 0, true);
        let head = self.items.len();
        self.body(false);
        let Ok(count) = Instruction::with2(Code::Sub_rm32_imm8, Register::EAX + counter, 1) else { return };
        self.push(What::Plain(count), 0, true);
        let code = if self.random.chance(50) { Code::Jne_rel8_64 } else { Code::Jne_rel32_64 };
        self.branch(code, head, true);
        self.reserved &= !(1 << counter);
        self.counters &= !(1 << counter);
    }

    /// CALL f; JMP over; f: …; RET; over:
    pub(super) fn call(&mut self) {
        self.land(true);
        let mut calls = Vec::new();
        let twice = self.random.chance(40);
        for _ in 0..1 + u64::from(twice) {
            if self.random.chance(50) {
                self.branch(Code::Call_rel32_64, usize::MAX, false);
                calls.push(self.items.len() - 1);
            } else {
                let register = self.free_register();
                self.address(register);
                calls.push(self.items.len() - 1);
                if let Ok(insn) = Instruction::with1(Code::Call_rm64, Register::RAX + register) {
                    self.push(What::Plain(insn), 0, false);
                }
            }
        }
        self.branch(Code::Jmp_rel32_64, usize::MAX, false);
        let over = self.items.len() - 1;
        let target = self.items.len();
        for call in calls {
            self.items[call].to = target;
        }
        self.body(false);
        if self.undefined != 0 {
            self.push(What::Plain(with2(Code::Test_rm64_r64, Register::RAX, Register::RCX)), 0, false);
        }
        let mut insn = Instruction::default();
        insn.set_code(Code::Retnq);
        self.push(What::Plain(insn), 0, false);
        self.items[over].to = self.items.len();
    }

    fn address(&mut self, register: u32) {
        let mut insn = Instruction::default();
        insn.set_code(Code::Lea_r64_m);
        insn.set_op0_kind(OpKind::Register);
        insn.set_op0_register(Register::RAX + register);
        insn.set_op1_kind(OpKind::Memory);
        insn.set_memory_base(Register::RIP);
        insn.set_memory_displ_size(8);
        self.push(What::Address(insn), 0, false);
    }

    /// Through a register or memory, to the next instruction but some.
    pub(super) fn indirect_jump(&mut self) {
        self.land(true);
        let register = self.free_register();
        self.address(register);
        let from = self.items.len() - 1;
        let (base, value) = self.pointers[0];
        let mut memory = Instruction::default();
        memory.set_memory_base(Register::RAX + base);
        memory.set_memory_displ_size(8);
        memory.set_memory_displacement64((WINDOW + self.random.below(0x3fc) * 8).wrapping_sub(value));
        if self.random.chance(50) {
            let mut store = memory;
            store.set_code(Code::Mov_rm64_r64);
            store.set_op0_kind(OpKind::Memory);
            store.set_op1_kind(OpKind::Register);
            store.set_op1_register(Register::RAX + register);
            self.push(What::Plain(store), 0, false);
            memory.set_code(Code::Jmp_rm64);
            memory.set_op0_kind(OpKind::Memory);
            self.push(What::Plain(memory), 0, false);
        } else if let Ok(insn) = Instruction::with1(Code::Jmp_rm64, Register::RAX + register) {
            self.push(What::Plain(insn), 0, false);
        }
        for _ in 0..self.random.below(3) {
            self.plain(true);
        }
        self.items[from].to = self.items.len();
    }

    /// Changes the constant of an instruction behind it.
    pub(super) fn modify(&mut self) {
        let insn = Instruction::with2(
            self.random.pick(&[Code::Mov_rm8_imm8, Code::Add_rm8_imm8, Code::Xor_rm8_imm8]),
            MemoryOperand::with_base_displ(Register::RIP, 0x4000_0000),
            self.random.below(256) as u32,
        );
        let Ok(mut insn) = insn else { return };
        insn.set_memory_displ_size(8);
        let byte = self.random.below(4);
        self.push(What::Modify(insn, byte), 0, false);
        let from = self.items.len() - 1;
        for _ in 0..self.random.below(4) {
            self.plain(false);
        }
        let register = self.free_register();
        let code = self.random.pick(&[Code::Mov_r32_imm32, Code::Mov_rm64_imm32, Code::Add_rm32_imm32]);
        let insn = if code == Code::Mov_rm64_imm32 {
            Instruction::with2(code, Register::RAX + register, self.random.next() as i32)
        } else {
            Instruction::with2(code, Register::EAX + register, self.random.next() as u32)
        };
        if let Ok(insn) = insn {
            self.push(What::Plain(insn), 0, false);
        }
        self.items[from].to = self.items.len() - 1;
    }

    /// A string instruction after its operands.
    pub(super) fn string(&mut self) {
        self.land(true);
        let reserved = self.reserved >> 1 & 1 | self.reserved >> 6 & 3;
        if reserved != 0 {
            return;
        }
        for register in [Register::RSI, Register::RDI] {
            let place = generate::target(MemorySize::UInt64, self.random);
            if let Ok(insn) = Instruction::with2(Code::Mov_r32_imm32, register.full_register32(), place as u32) {
                self.push(What::Plain(insn), 0, false);
            }
        }
        if let Ok(insn) = Instruction::with2(Code::Mov_r32_imm32, Register::ECX, self.random.below(20) as u32) {
            self.push(What::Plain(insn), 0, false);
        }
        let code = self.random.pick(&[
            Code::Movsb_m8_m8,
            Code::Movsq_m64_m64,
            Code::Stosb_m8_AL,
            Code::Stosq_m64_RAX,
            Code::Lodsb_AL_m8,
            Code::Lodsd_EAX_m32,
            Code::Cmpsb_m8_m8,
            Code::Scasw_AX_m16,
        ]);
        let op = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        for i in 0..op.op_count() {
            let mut used = Vec::new();
            if generate::operand(&mut insn, op, i, true, Mode::Bits64, self.random, &mut used).is_none() {
                return;
            }
        }
        insn.set_has_rep_prefix(self.random.chance(70));
        // RAX, which LODS writes, may be a pointer.
        if encodes(&insn) {
            self.push(What::Plain(insn), 0, false);
        }
    }
}
