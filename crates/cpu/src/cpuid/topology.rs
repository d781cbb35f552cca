//! Where in the machine a vCPU is: one package, one thread a core, APIC id = vCPU index.

use super::{CpuidLeaf, CpuidTable};

/// Level types of leaves 0xB and 0x1F (Intel SDM vol. 2, CPUID).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

impl CpuidTable {
    /// Makes this the table of vCPU `id` of `count`: APIC ids, core counts and cache sharing, in all the
    /// leaves in which Intel and AMD processors tell them. Both engines call it for each vCPU.
    pub fn set_topology(&mut self, id: u32, count: u32) {
        let count = count.max(1);
        let package_shift = u32::BITS - (count - 1).leading_zeros();
        let many = count > 1;

        self.update(1, |_, leaf| {
            leaf.ebx = (leaf.ebx & 0xff00) | (id & 0xff) << 24 | count.min(255) << 16;
            set_bit(&mut leaf.edx, 28, many); // HTT: the count in EBX means something
        });
        // Deterministic caches: levels 1 and 2 are a core's own, level 3 is everyone's.
        for function in [4, 0x8000_001d] {
            self.update(function, |_, leaf| {
                if leaf.eax & 0x1f == 0 {
                    return;
                }
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                let cores = if function == 4 { ((1 << package_shift) - 1) & 0x3f } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | (sharing & 0xfff) << 14 | cores << 26;
            });
        }
        for function in [0xb, 0x1f] {
            if self.get(0, 0).eax >= function && (function == 0xb || self.has(function)) {
                self.remove(function);
                let level = |index: u32, kind: u32, shift, threads| CpuidLeaf {
                    eax: shift,
                    ebx: threads,
                    ecx: kind << 8 | index,
                    edx: id,
                };
                self.set(function, Some(0), level(0, LEVEL_SMT, 0, 1));
                self.set(function, Some(1), level(1, LEVEL_CORE, package_shift, count));
                self.set(function, Some(2), CpuidLeaf { ecx: 2, edx: id, ..CpuidLeaf::default() });
            }
        }
        if self.is_amd() {
            // AMD APM vol. 3, E.4: CmpLegacy, then core count and APIC id size, then ids for TopologyExtensions.
            self.update(0x8000_0001, |_, leaf| set_bit(&mut leaf.ecx, 1, many));
            self.update(0x8000_0008, |_, leaf| leaf.ecx = (count - 1) & 0xff | package_shift << 12);
            if self.get(0x8000_0001, 0).ecx & 1 << 22 != 0 {
                self.set(0x8000_001e, None, CpuidLeaf { eax: id, ebx: id & 0xff, ecx: 0, edx: 0 });
            }
        } else {
            self.remove(0x8000_001e);
        }
        // Extended topology that repeats all this in more detail: not needed, and the host's own.
        self.remove(0x8000_0026);
    }

    fn has(&self, function: u32) -> bool {
        self.iter().any(|(f, ..)| *f == function)
    }

    /// Whether the vendor is AMD (or Hygon, which follows AMD's leaves).
    pub fn is_amd(&self) -> bool {
        let vendor = self.get(0, 0);
        // EBX of "AuthenticAMD" and "HygonGenuine"
        [*b"Auth", *b"Hygo"].contains(&vendor.ebx.to_le_bytes())
    }
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !(1 << bit) | u32::from(on) << bit;
}
