//! Which bits of which leaves promise something, so that one table can be held to another.

use super::{CpuidLeaf, CpuidTable};

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl CpuidLeaf {
    fn register(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// Registers that are bit maps of features (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; for
/// 0x40000001 the kernel's `virt/kvm/x86/cpuid`): a set bit promises something to the guest.
/// The last column is what depends on the guest's own settings (OSXSAVE, OSPKE, APIC enabled) or is
/// topology: never a reason to refuse.
#[rustfmt::skip]
const FEATURES: &[(u32, u32, Register, u32)] = &[
    (0x0000_0001, 0, Register::Ecx, 1 << 27 | 1 << 31),
    (0x0000_0001, 0, Register::Edx, 1 << 9 | 1 << 28),
    (0x0000_0006, 0, Register::Eax, 0),
    (0x0000_0007, 0, Register::Ebx, 0),
    (0x0000_0007, 0, Register::Ecx, 1 << 4),
    (0x0000_0007, 0, Register::Edx, 0),
    (0x0000_0007, 1, Register::Eax, 0),
    (0x0000_0007, 1, Register::Ebx, 0),
    (0x0000_0007, 1, Register::Ecx, 0),
    (0x0000_0007, 1, Register::Edx, 0),
    (0x0000_0007, 2, Register::Edx, 0),
    (0x0000_000d, 0, Register::Eax, 0),
    (0x0000_000d, 0, Register::Edx, 0),
    (0x0000_000d, 1, Register::Eax, 0),
    (0x0000_000d, 1, Register::Ecx, 0),
    (0x0000_000d, 1, Register::Edx, 0),
    (0x4000_0001, 0, Register::Eax, 0),
    (0x8000_0001, 0, Register::Ecx, 1 << 1),
    (0x8000_0001, 0, Register::Edx, 1 << 9),
    (0x8000_0007, 0, Register::Ebx, 0),
    (0x8000_0007, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
    (0x8000_000a, 0, Register::Edx, 0),
    (0x8000_0021, 0, Register::Eax, 0),
];

impl CpuidTable {
    /// Clears every feature that `supported` does not have, leaving names, sizes and topology alone.
    pub fn restrict_to(&mut self, supported: &CpuidTable) {
        for &(function, index, register, free) in FEATURES {
            let mut limit = supported.get(function, index);
            let allowed = *limit.register(register) | free;
            self.update(function, |i, leaf| {
                if i == index {
                    *leaf.register(register) &= allowed;
                }
            });
        }
    }

    /// The features that this table promises and `supported` does not have, as `leaf.index.REGISTER: bits`.
    /// Empty where a guest made for this table can run with `supported`.
    pub fn missing_in(&self, supported: &CpuidTable) -> Vec<String> {
        let missing = |&(function, index, register, free): &(u32, u32, Register, u32)| {
            let asked = *self.get(function, index).register(register);
            let offered = *supported.get(function, index).register(register);
            let bits = asked & !offered & !free;
            let name = ["EAX", "EBX", "ECX", "EDX"][register as usize];
            (bits != 0).then(|| format!("{function:#x}.{index}.{name}: {bits:#x}"))
        };
        FEATURES.iter().filter_map(missing).collect()
    }
}
