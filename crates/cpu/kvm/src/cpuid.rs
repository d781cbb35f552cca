//! From what KVM could show a guest to what we show it, and back into KVM's own form.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use vireo_cpu::{
    CpuError,
    cpuid::{CpuidLeaf, CpuidTable},
};

use crate::host;

/// Leaves of which a guest sees nothing.
const HIDDEN: &[u32] = &[
    0x5,         // MONITOR/MWAIT
    0xa,         // PMU
    0xf,         // resource monitoring
    0x10,        // resource allocation
    0x12,        // SGX
    0x14,        // processor trace
    0x17,        // SoC vendor
    0x19,        // key locker
    0x1b,        // PCONFIG
    0x1c,        // last branch records
    0x1d,        // AMX tiles
    0x1e,        // AMX multiplication
    0x23,        // PMU, extended
    0x8000_000a, // SVM
    0x8000_001b, // instruction-based sampling
    0x8000_001c, // lightweight profiling
    0x8000_001f, // SEV
    0x8000_0022, // PMU, extended
];

/// Bits to clear: function, index, then EAX, EBX, ECX, EDX. Nested virtualization, performance counters and
/// tracing, MONITOR, power management, SGX, AMX (needs a permission and 8 KiB more state), CET and user
/// interrupts (not in `CpuState`), and paravirtual features that want answers from the VMM.
#[rustfmt::skip]
const CLEARED: &[(u32, u32, [u32; 4])] = &[
    // ECX: DTES64 MONITOR DS-CPL VMX SMX EIST TM2 CNXT-ID SDBG PDCM DCA; EDX: DS ACPI TM PBE
    (0x1, 0, [0, 0, bits(&[2, 3, 4, 5, 6, 7, 8, 10, 11, 15, 18]), bits(&[21, 22, 29, 31])]),
    (0x6, 0, [!bits(&[2]), !0, !0, !0]), // all but ARAT
    // EBX: SGX PQM PQE PT; ECX: WAITPKG SHSTK KL ENQCMD SGX_LC; EDX: UINTR PCONFIG ARCH_LBR IBT AMX-BF16/TILE/INT8
    (0x7, 0, [0, bits(&[2, 12, 15, 25]), bits(&[5, 7, 23, 29, 30]), bits(&[5, 18, 19, 20, 22, 24, 25])]),
    (0x7, 1, [bits(&[21, 22]), 0, 0, bits(&[4, 5, 7, 8, 17, 18, 19, 20, 21])]), // AMX, FRED, LKGS, APX, AVX10
    (0xd, 0, [bits(&[17, 18, 19]), 0, 0, 0]),
    (0xd, 1, [bits(&[4]), 0, bits(&[8, 10, 11, 12, 13, 14, 15, 16]), 0]),
    (0x4000_0001, 0, [bits(&[16, 17]), 0, 0, 0]), // MAP_GPA_RANGE, MIGRATION_CONTROL
    // ECX: SVM IBS SKINIT WDT LWP PerfCtrCore PerfCtrNB PerfTsc PerfCtrLLC MWAITX
    (0x8000_0001, 0, [0, 0, bits(&[2, 10, 12, 13, 15, 23, 24, 27, 28, 29]), 0]),
];

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;

const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < list.len() {
        mask |= 1 << list[at];
        at += 1;
    }
    mask
}

/// All that a guest may be shown on this host.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuidTable, CpuError> {
    let raw = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("asking KVM for its CPUID leaves"))?;
    let mut table = CpuidTable::default();
    for e in raw.as_slice() {
        let index = (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index);
        table.set(e.function, index, CpuidLeaf { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx });
    }
    for function in HIDDEN {
        table.remove(*function);
    }
    for (function, index, [eax, ebx, ecx, edx]) in CLEARED {
        table.update(*function, |i, leaf| {
            if i == *index {
                leaf.eax &= !eax;
                leaf.ebx &= !ebx;
                leaf.ecx &= !ecx;
                leaf.edx &= !edx;
            }
        });
    }
    // The kernel leaves these to the VMM: they need its in-kernel local APIC, which we always have.
    table.update(1, |_, leaf| leaf.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR);
    table.set_topology(0, 1);
    Ok(table)
}

/// What vCPU `id` of `count` is told: no more than KVM supports.
pub(crate) fn for_vcpu(asked: &CpuidTable, supported: &CpuidTable, id: u32, count: u32) -> Result<CpuId, CpuError> {
    let mut table = asked.clone();
    table.restrict_to(supported);
    table.set_topology(id, count);
    let entries: Vec<kvm_cpuid_entry2> = table
        .iter()
        .map(|(function, index, leaf)| kvm_cpuid_entry2 {
            function: *function,
            index: index.unwrap_or(0),
            flags: index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| CpuError::Other(format!("{} CPUID leaves are more than KVM takes (256)", entries.len())))
}

/// Bytes of the standard-format XSAVE area for the features in `xcr0` (Intel SDM vol. 1, 13.4).
pub(crate) fn xsave_bytes(table: &CpuidTable, xcr0: u64) -> usize {
    let extended = (2..63).filter(|i| xcr0 >> i & 1 != 0).map(|i| {
        let leaf = table.get(0xd, i);
        (leaf.ebx + leaf.eax) as usize
    });
    extended.fold(576, usize::max)
}
