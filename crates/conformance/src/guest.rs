use vireo_cpu::cpuid::CpuidTable;

/// In what state a guest's boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// 16-bit real mode at 0x1000:0, all segments 0x1000.
    Real,
    /// 32-bit protected mode, flat, paging off, with the 32-bit exception runtime.
    Protected,
    /// 64-bit mode with paging and the 64-bit exception runtime.
    Long,
}

/// What must come of it.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// Exactly these reports, in this order.
    Reports(&'static [u32]),
    /// What hangs on the engine's own CPUID: the reports are handed to this function, which says what is wrong.
    Checked(fn(&CpuidTable, &[u32]) -> Result<(), String>),
    /// These reports and then a crash that says this.
    Crash(&'static [u32], &'static str),
}

/// One small program and what it must report.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    pub name: &'static str,
    /// Loaded at [`crate::machine::CODE`].
    pub code: &'static [u8],
    pub start: Start,
    pub vcpus: u32,
    pub expected: Expected,
    /// CPUID features that it uses: function, index, register (0 to 3: EAX, EBX, ECX, EDX), bit.
    pub needs: &'static [(u32, u32, usize, u32)],
    /// What the instruction emulator of KVM without VT-x or AMD-V is known to do otherwise than a processor.
    pub emulator_errs: Option<&'static str>,
}

impl Guest {
    /// The first needed feature that is not in the table.
    pub fn lacks(&self, cpuid: &CpuidTable) -> Option<String> {
        self.needs.iter().find_map(|&(function, index, register, bit)| {
            let leaf = cpuid.get(function, index);
            let word = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][register];
            let name = ["EAX", "EBX", "ECX", "EDX"][register];
            (word >> bit & 1 == 0).then(|| format!("CPUID {function:#x}.{index}.{name} bit {bit}"))
        })
    }
}
