//! Instructions of the one handler for what looks at or changes the system.

use iced_x86::{Code, Mnemonic};

use super::Lower;
use crate::{
    ops::system::{self, MEMORY, System, aux},
    uop::Handler,
};

impl Lower<'_> {
    pub(super) fn system(&mut self, which: System, bytes: usize) -> Option<Handler> {
        self.op.aux = aux(which, bytes);
        Some(system::system)
    }

    pub(super) fn system_end(&mut self, which: System, bytes: usize) -> Option<Handler> {
        self.ends = true;
        self.system(which, bytes)
    }

    /// A system instruction with one 16-bit (or wider register) operand.
    fn system_operand(&mut self, which: System) -> Option<Handler> {
        if self.is_reg(0) {
            self.op.dst = self.reg(0);
            let n = self.insn.op0_register().size();
            return self.system(which, n);
        }
        self.system(which, MEMORY | 2)
    }

    fn lar_lsl(&mut self, which: System) -> Option<Handler> {
        self.op.dst = self.reg(0);
        let n = self.insn.op0_register().size();
        if self.is_reg(1) {
            self.op.src = self.reg(1);
            return self.system(which, n);
        }
        self.system(which, MEMORY | n)
    }

    fn base(&mut self, which: System, segment: u8) -> Option<Handler> {
        self.op.dst = self.reg(0);
        self.op.src = segment;
        let n = self.insn.op0_register().size();
        self.system(which, n)
    }

    fn load_far(&mut self, segment: u8) -> Option<Handler> {
        self.op.dst = self.reg(0);
        self.op.src = segment;
        let n = self.insn.op0_register().size();
        self.system(System::LoadFar, n)
    }

    fn table_bytes(&self) -> usize {
        // 16-bit operands take 24 bits of the base.
        match self.insn.code() {
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
            _ => 4,
        }
    }

    pub(super) fn system_handler(&mut self) -> Option<Handler> {
        use Mnemonic as M;
        let insn = self.insn;
        match insn.mnemonic() {
            M::Hlt => self.system_end(System::Hlt, 0),
            M::Cli => self.system(System::Cli, 0),
            M::Sti => self.system(System::Sti, 0),
            M::Cpuid => self.system(System::Cpuid, 0),
            M::Rdtsc => self.system(System::Rdtsc, 0),
            M::Rdtscp => self.system(System::Rdtscp, 0),
            M::Rdpmc => self.system(System::Rdpmc, 0),
            M::Rdmsr => self.system(System::Rdmsr, 0),
            M::Wrmsr => self.system_end(System::Wrmsr, 0),
            M::Syscall => self.system_end(System::Syscall, 0),
            M::Sysret => self.system_end(System::Sysret, 4),
            M::Sysretq => self.system_end(System::Sysret, 8),
            M::Sysenter => self.system_end(System::Sysenter, 0),
            M::Sysexit => self.system_end(System::Sysexit, 4),
            M::Sysexitq => self.system_end(System::Sysexit, 8),
            M::Int => {
                self.op.imm = u64::from(insn.immediate8());
                self.system_end(System::Int, 0)
            }
            M::Int3 => self.system_end(System::Int3, 0),
            M::Int1 => self.system_end(System::Int1, 0),
            M::Into => self.system_end(System::Into, 0),
            M::Iret => self.system_end(System::Iret, 2),
            M::Iretd => self.system_end(System::Iret, 4),
            M::Iretq => self.system_end(System::Iret, 8),
            M::Lgdt => self.system(System::Lgdt, self.table_bytes()),
            M::Lidt => self.system(System::Lidt, self.table_bytes()),
            M::Sgdt => self.system(System::Sgdt, 0),
            M::Sidt => self.system(System::Sidt, 0),
            M::Lldt => self.system_operand(System::Lldt),
            M::Ltr => self.system_operand(System::Ltr),
            M::Sldt => self.system_operand(System::Sldt),
            M::Str => self.system_operand(System::Str),
            M::Smsw => self.system_operand(System::Smsw),
            M::Lmsw => {
                self.ends = true;
                self.system_operand(System::Lmsw)
            }
            M::Clts => self.system(System::Clts, 0),
            M::Invlpg => self.system_end(System::Invlpg, 0),
            M::Invpcid => {
                self.op.dst = self.reg(0);
                self.system_end(System::Invpcid, 0)
            }
            M::Invd | M::Wbinvd | M::Wbnoinvd => self.system(System::Privileged, 0),
            M::Swapgs => self.system(System::Swapgs, 0),
            M::Rdfsbase => self.base(System::Rdfsbase, 4),
            M::Rdgsbase => self.base(System::Rdfsbase, 5),
            M::Wrfsbase => self.base(System::Wrfsbase, 4),
            M::Wrgsbase => self.base(System::Wrfsbase, 5),
            M::Clac => self.system(System::Clac, 0),
            M::Stac => self.system(System::Stac, 0),
            M::Lar => self.lar_lsl(System::Lar),
            M::Lsl => self.lar_lsl(System::Lsl),
            M::Verr => self.system_operand(System::Verr),
            M::Verw => self.system_operand(System::Verw),
            M::Arpl => {
                self.op.src = self.reg(1);
                self.system_operand(System::Arpl)
            }
            M::Les => self.load_far(0),
            M::Lss => self.load_far(2),
            M::Lds => self.load_far(3),
            M::Lfs => self.load_far(4),
            M::Lgs => self.load_far(5),
            M::Bound => {
                self.op.dst = self.reg(0);
                let n = insn.op0_register().size();
                self.system(System::Bound, n)
            }
            M::Xsetbv => self.system(System::Xsetbv, 0),
            M::Vmcall | M::Vmmcall => self.system(System::Hypercall, 0),
            _ => None,
        }
    }
}
