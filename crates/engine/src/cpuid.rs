//! What the software CPU says it is.
//!
//! About an x86-64-v3 processor, less what the host cannot do natively: SIMD, x87, bit manipulation, AES, SHA and
//! random numbers run on the host's own instructions. The vendor is the host's, because user space picks code by it
//! and because results that the manuals leave open then agree with the identity. The model is one that Linux 6.1
//! and 6.12 know well and run fast on (`arch/x86/kernel/cpu/{common,bugs,amd,intel}.c`):
//!
//! * **AMD**: family 19h model 11h (Zen 4). Linux's list of immune processors holds every AMD for Meltdown, L1TF,
//!   MDS, SWAPGS, ITLB_MULTIHIT, MMIO stale data and BHI; the rest is told by SRSO_NO, BTC_NO, TSA_*_NO and SSB_NO.
//!   Retpolines go by IA32_ARCH_CAPABILITIES.IBRS_ALL, which Linux reads whatever the vendor.
//! * **Intel**: family 6 model 8Fh (Sapphire Rapids), on no list of vulnerable models; IA32_ARCH_CAPABILITIES says
//!   the rest, and BHI_CTRL avoids the software loop that clears the branch history on each system call.
//!
//! What is left in both kernels: "Spectre v1: usercopy/swapgs barriers" (LFENCEs) and stuffing the return buffer at
//! context switches.

use vireo_cpu::cpuid::{CpuidLeaf, CpuidTable};

#[cfg(test)]
mod tests;

/// Physical address bits (MAXPHYADDR). Covers RAM and the 64-bit PCI window with room to spare; Linux's limit for
/// four-level paging.
pub const PHYSICAL_ADDRESS_BITS: u32 = 46;
const LINEAR_ADDRESS_BITS: u32 = 48;

/// The local APIC timer's input clock.
pub const APIC_BUS_KHZ: u32 = 1_000_000;

/// XCR0 bits.
pub mod xcr0 {
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
}

/// Size of the legacy region and header of an XSAVE area; where AVX state lies, and how long it is.
const XSAVE_HEADER_END: u32 = 576;
const AVX_STATE_BYTES: u32 = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Amd,
    Intel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn of(self, leaf: &mut CpuidLeaf) -> &mut u32 {
        match self {
            Eax => &mut leaf.eax,
            Ebx => &mut leaf.ebx,
            Ecx => &mut leaf.ecx,
            Edx => &mut leaf.edx,
        }
    }
}

/// Whose work a feature is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// The interpreter's own.
    Own,
    /// The host's instructions: only where the host has it.
    Native,
    /// As `Native`, and works on YMM registers: only where the host's kernel saves them, too.
    Avx,
    /// A fact told by AMD processors only.
    Amd,
    /// A fact told by Intel processors only.
    Intel,
}
use Run::{Amd, Avx, Intel, Native, Own};

struct Feature {
    leaf: u32,
    index: u32,
    register: Register,
    bit: u32,
    run: Run,
}

const fn f(leaf: u32, index: u32, register: Register, bit: u32, run: Run) -> Feature {
    Feature { leaf, index, register, bit, run }
}

/// All feature bits. OSXSAVE (1:ECX.27) and APIC (1:EDX.9) follow CR4 and IA32_APIC_BASE: the interpreter's work.
#[rustfmt::skip]
const FEATURES: &[Feature] = &[
    f(1, 0, Edx, 0, Native),   // FPU
    f(1, 0, Edx, 3, Own),      // PSE
    f(1, 0, Edx, 4, Own),      // TSC
    f(1, 0, Edx, 5, Own),      // MSR
    f(1, 0, Edx, 6, Own),      // PAE
    f(1, 0, Edx, 7, Own),      // MCE
    f(1, 0, Edx, 8, Own),      // CMPXCHG8B
    f(1, 0, Edx, 9, Own),      // APIC
    f(1, 0, Edx, 11, Own),     // SYSENTER
    f(1, 0, Edx, 12, Own),     // MTRR
    f(1, 0, Edx, 13, Own),     // PGE
    f(1, 0, Edx, 14, Own),     // MCA
    f(1, 0, Edx, 15, Own),     // CMOV
    f(1, 0, Edx, 16, Own),     // PAT
    f(1, 0, Edx, 19, Own),     // CLFLUSH
    f(1, 0, Edx, 23, Native),  // MMX
    f(1, 0, Edx, 24, Own),     // FXSAVE
    f(1, 0, Edx, 25, Native),  // SSE
    f(1, 0, Edx, 26, Native),  // SSE2
    f(1, 0, Ecx, 0, Native),   // SSE3
    f(1, 0, Ecx, 1, Native),   // PCLMULQDQ
    f(1, 0, Ecx, 9, Native),   // SSSE3
    f(1, 0, Ecx, 12, Avx),     // FMA
    f(1, 0, Ecx, 13, Native),  // CMPXCHG16B
    f(1, 0, Ecx, 17, Own),     // PCID
    f(1, 0, Ecx, 19, Native),  // SSE4.1
    f(1, 0, Ecx, 20, Native),  // SSE4.2
    f(1, 0, Ecx, 21, Own),     // x2APIC
    f(1, 0, Ecx, 22, Native),  // MOVBE
    f(1, 0, Ecx, 23, Native),  // POPCNT
    f(1, 0, Ecx, 24, Own),     // TSC deadline
    f(1, 0, Ecx, 25, Native),  // AES
    f(1, 0, Ecx, 26, Own),     // XSAVE
    f(1, 0, Ecx, 28, Avx),     // AVX
    f(1, 0, Ecx, 29, Avx),     // F16C
    f(1, 0, Ecx, 30, Native),  // RDRAND
    f(1, 0, Ecx, 31, Own),     // hypervisor
    f(7, 0, Ebx, 0, Own),      // FSGSBASE
    f(7, 0, Ebx, 1, Own),      // TSC_ADJUST
    f(7, 0, Ebx, 3, Native),   // BMI1
    f(7, 0, Ebx, 5, Avx),      // AVX2
    f(7, 0, Ebx, 7, Own),      // SMEP
    f(7, 0, Ebx, 8, Native),   // BMI2
    f(7, 0, Ebx, 9, Own),      // ERMS
    f(7, 0, Ebx, 10, Own),     // INVPCID
    f(7, 0, Ebx, 18, Native),  // RDSEED
    f(7, 0, Ebx, 19, Native),  // ADX
    f(7, 0, Ebx, 20, Own),     // SMAP
    f(7, 0, Ebx, 23, Own),     // CLFLUSHOPT
    f(7, 0, Ebx, 24, Own),     // CLWB
    f(7, 0, Ebx, 29, Native),  // SHA
    f(7, 0, Edx, 4, Own),      // FSRM
    f(7, 0, Edx, 29, Own),     // IA32_ARCH_CAPABILITIES
    f(7, 2, Edx, 4, Intel),    // BHI_CTRL
    f(0xd, 1, Eax, 0, Own),    // XSAVEOPT
    f(0xd, 1, Eax, 1, Own),    // XSAVEC
    f(0xd, 1, Eax, 2, Own),    // XGETBV with ECX = 1
    f(0x8000_0001, 0, Ecx, 0, Own),    // LAHF in 64-bit mode
    f(0x8000_0001, 0, Ecx, 5, Native), // LZCNT
    f(0x8000_0001, 0, Ecx, 8, Own),    // PREFETCHW
    f(0x8000_0001, 0, Ecx, 22, Amd),   // topology extensions: leaves 0x8000001d and 0x8000001e
    f(0x8000_0001, 0, Edx, 11, Own),   // SYSCALL
    f(0x8000_0001, 0, Edx, 20, Own),   // NX
    f(0x8000_0001, 0, Edx, 26, Own),   // 1 GiB pages
    f(0x8000_0001, 0, Edx, 27, Own),   // RDTSCP
    f(0x8000_0001, 0, Edx, 29, Own),   // long mode
    f(0x8000_0007, 0, Edx, 8, Own),    // invariant TSC
    f(0x8000_0008, 0, Ebx, 2, Amd),    // XSAVE always saves the x87 pointers
    f(0x8000_0008, 0, Ebx, 26, Amd),   // SSB_NO
    f(0x8000_0008, 0, Ebx, 29, Amd),   // BTC_NO (retbleed)
    f(0x8000_0021, 0, Eax, 0, Amd),    // NO_NESTED_DATA_BP
    f(0x8000_0021, 0, Eax, 2, Amd),    // LFENCE is serializing
    f(0x8000_0021, 0, Eax, 6, Amd),    // loading a null selector clears the base
    f(0x8000_0021, 0, Eax, 29, Amd),   // SRSO_NO
    f(0x8000_0021, 0, Eax, 30, Amd),   // SRSO_USER_KERNEL_NO
    f(0x8000_0021, 0, Ecx, 1, Amd),    // TSA_SQ_NO
    f(0x8000_0021, 0, Ecx, 2, Amd),    // TSA_L1_NO
    f(0x8000_0021, 0, Ecx, 7, Amd),    // TSA_FILL_NO
    f(0x4000_0001, 0, Eax, 1, Own),    // KVM: no delays between port accesses
    f(0x4000_0001, 0, Eax, 3, Own),    // KVM: kvmclock, new MSRs
    f(0x4000_0001, 0, Eax, 5, Own),    // KVM: steal time
    f(0x4000_0001, 0, Eax, 9, Own),    // KVM: TLB flushes of vCPUs that do not run
    f(0x4000_0001, 0, Eax, 24, Own),   // KVM: kvmclock is stable across vCPUs
];

/// On AMD these bits of 1:EDX are told again in 0x80000001:EDX (AMD APM vol. 3, E.4.2).
const AMD_MIRRORED: u32 = 0x0183_f3ff;

/// A cache: type (1 data, 2 instruction, 3 unified), level, bytes, ways, and whether all vCPUs share it.
struct Cache {
    kind: u32,
    level: u32,
    bytes: u32,
    ways: u32,
    shared: bool,
}

/// What glibc sizes its copy loops by: a 1 MiB L2 and a 32 MiB L3, where `rep movsb` stays the choice for long.
const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, bytes: 32 << 10, ways: 8, shared: false },
    Cache { kind: 2, level: 1, bytes: 32 << 10, ways: 8, shared: false },
    Cache { kind: 3, level: 2, bytes: 1 << 20, ways: 8, shared: false },
    Cache { kind: 3, level: 3, bytes: 32 << 20, ways: 16, shared: true },
];
const LINE_BYTES: u32 = 64;

/// What the host's processor says.
struct Host {
    vendor: Vendor,
    cpuid: fn(u32, u32) -> CpuidLeaf,
    avx: bool,
}

impl Host {
    #[cfg(target_arch = "x86_64")]
    fn this() -> Self {
        #[allow(unused_unsafe)]
        fn cpuid(leaf: u32, index: u32) -> CpuidLeaf {
            // SAFETY: every x86-64 processor has CPUID.
            let (top, r) = unsafe {
                use std::arch::x86_64::{__cpuid, __cpuid_count};
                (__cpuid(leaf & 0x8000_0000).eax, __cpuid_count(leaf, index))
            };
            if leaf > top {
                return CpuidLeaf::default();
            }
            CpuidLeaf { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
        }
        // "GenuineIntel"; all others with x86-64-v2 and up behave like AMD's or say so
        let vendor = if cpuid(0, 0).ebx == u32::from_le_bytes(*b"Genu") { Vendor::Intel } else { Vendor::Amd };
        Self { vendor, cpuid, avx: std::arch::is_x86_feature_detected!("avx") }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn this() -> Self {
        // No native instructions: everything that would need them is left out.
        Self { vendor: Vendor::Amd, cpuid: |_, _| CpuidLeaf::default(), avx: false }
    }

    fn has(&self, feature: &Feature) -> bool {
        let mut leaf = (self.cpuid)(feature.leaf, feature.index);
        *feature.register.of(&mut leaf) & 1 << feature.bit != 0
    }

    fn allows(&self, feature: &Feature) -> bool {
        match feature.run {
            Own => true,
            Native => self.has(feature),
            Avx => self.avx && self.has(feature),
            Amd => self.vendor == Vendor::Amd,
            Intel => self.vendor == Vendor::Intel,
        }
    }
}

/// What the software CPU supports on this host, with the guest's TSC at `tsc_khz`: a machine of one vCPU.
/// See [`set_topology`] for more.
pub fn soft_cpuid(tsc_khz: u32) -> CpuidTable {
    build(&Host::this(), tsc_khz)
}

/// The bits of XCR0 that a guest may set.
pub fn supported_xcr0(table: &CpuidTable) -> u64 {
    let leaf = table.get(0xd, 0);
    u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
}

fn build(host: &Host, tsc_khz: u32) -> CpuidTable {
    let mut table = CpuidTable::default();
    identity(&mut table, host.vendor);
    extended_state(&mut table, host.avx);
    frequencies(&mut table, tsc_khz);
    table.set(7, Some(0), CpuidLeaf { eax: 2, ..CpuidLeaf::default() });
    let bits = PHYSICAL_ADDRESS_BITS | LINEAR_ADDRESS_BITS << 8;
    table.set(0x8000_0008, None, CpuidLeaf { eax: bits, ..CpuidLeaf::default() });
    features(&mut table, host);
    set_topology(&mut table, 0, 1);
    table
}

/// Leaves with several subleaves.
fn index_of(leaf: u32, index: u32) -> Option<u32> {
    matches!(leaf, 4 | 7 | 0xb | 0xd | 0x8000_001d).then_some(index)
}

fn update(table: &mut CpuidTable, leaf: u32, index: u32, change: impl FnOnce(&mut CpuidLeaf)) {
    let mut value = table.get(leaf, index);
    change(&mut value);
    table.set(leaf, index_of(leaf, index), value);
}

fn features(table: &mut CpuidTable, host: &Host) {
    for feature in FEATURES.iter().filter(|feature| host.allows(feature)) {
        update(table, feature.leaf, feature.index, |leaf| *feature.register.of(leaf) |= 1 << feature.bit);
    }
    if host.vendor == Vendor::Amd {
        let mirrored = table.get(1, 0).edx & AMD_MIRRORED;
        update(table, 0x8000_0001, 0, |leaf| leaf.edx |= mirrored);
    }
}

fn text(bytes: &[u8; 16]) -> CpuidLeaf {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    CpuidLeaf { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12) }
}

fn identity(table: &mut CpuidTable, vendor: Vendor) {
    // maximum leaves, vendor, and family/model/stepping as leaf 1 encodes them
    let (name, signature, highest, extended) = match vendor {
        Vendor::Amd => (b"AuthenticAMD", 0x00a1_0f11, 0x16, 0x8000_0021),
        Vendor::Intel => (b"GenuineIntel", 0x0008_06f8, 0x16, 0x8000_0008),
    };
    let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
    let (ebx, edx, ecx) = (word(0), word(4), word(8));
    table.set(0, None, CpuidLeaf { eax: highest, ebx, ecx, edx });
    // CLFLUSH works on lines of 8 * 8 bytes
    table.set(1, None, CpuidLeaf { eax: signature, ebx: 8 << 8, ..CpuidLeaf::default() });
    let (ext_eax, ext_ebx, ext_ecx, ext_edx) =
        if vendor == Vendor::Amd { (extended, ebx, ecx, edx) } else { (extended, 0, 0, 0) };
    table.set(0x8000_0000, None, CpuidLeaf { eax: ext_eax, ebx: ext_ebx, ecx: ext_ecx, edx: ext_edx });
    let signature = if vendor == Vendor::Amd { signature } else { 0 };
    table.set(0x8000_0001, None, CpuidLeaf { eax: signature, ..CpuidLeaf::default() });
    let brand: &[u8; 48] = b"Vireo software CPU (x86-64)\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    for (at, part) in brand.as_chunks::<16>().0.iter().enumerate() {
        table.set(0x8000_0002 + at as u32, None, text(part));
    }
    // The hypervisor's leaves: the last one, and KVM's signature, so that a guest looks for KVM's clock.
    let mut kvm = text(b"\0\0\0\0KVMKVMKVM\0\0\0");
    kvm.eax = 0x4000_0010;
    table.set(0x4000_0000, None, kvm);
    table.set(0x4000_0001, None, CpuidLeaf::default());
}

/// Intel SDM vol. 1, 13.2: standard-format sizes; the compacted format is not larger.
fn extended_state(table: &mut CpuidTable, avx: bool) {
    let all = if avx { xcr0::X87 | xcr0::SSE | xcr0::AVX } else { xcr0::X87 | xcr0::SSE };
    let bytes = XSAVE_HEADER_END + if avx { AVX_STATE_BYTES } else { 0 };
    // EBX is the size for what XCR0 enables now: the interpreter knows, this is for all.
    table.set(0xd, Some(0), CpuidLeaf { eax: all as u32, ebx: bytes, ecx: bytes, edx: 0 });
    table.set(0xd, Some(1), CpuidLeaf { ebx: bytes, ..CpuidLeaf::default() });
    if avx {
        let part = CpuidLeaf { eax: AVX_STATE_BYTES, ebx: XSAVE_HEADER_END, ..CpuidLeaf::default() };
        table.set(0xd, Some(2), part);
    }
}

fn frequencies(table: &mut CpuidTable, tsc_khz: u32) {
    // The crystal is also the local APIC timer's clock (Intel SDM vol. 3, 11.5.4): 1 GHz.
    let crystal = CpuidLeaf { eax: APIC_BUS_KHZ, ebx: tsc_khz, ecx: APIC_BUS_KHZ * 1000, edx: 0 };
    table.set(0x15, None, crystal);
    let mhz = tsc_khz.div_ceil(1000) & 0xffff;
    table.set(0x16, None, CpuidLeaf { eax: mhz, ebx: mhz, ecx: 100, edx: 0 });
    table.set(0x4000_0010, None, CpuidLeaf { eax: tsc_khz, ebx: APIC_BUS_KHZ, ecx: 0, edx: 0 });
}

/// Makes the table that of vCPU `id` among `count`: one package, a core for each, no threads.
pub fn set_topology(table: &mut CpuidTable, id: u32, count: u32) {
    let count = count.max(1);
    // bits of an APIC id that tell cores apart
    let shift = count.next_power_of_two().trailing_zeros();
    let amd = table.get(0, 0).ebx == u32::from_le_bytes(*b"Auth");
    update(table, 1, 0, |leaf| {
        leaf.ebx = leaf.ebx & 0xffff | count.min(255) << 16 | (id & 0xff) << 24;
        leaf.edx = leaf.edx & !(1 << 28) | u32::from(count > 1) << 28;
    });
    // Intel SDM vol. 2, CPUID leaf 0xb: threads (type 1), cores (type 2), end
    table.set(0xb, Some(0), CpuidLeaf { eax: 0, ebx: 1, ecx: 1 << 8, edx: id });
    table.set(0xb, Some(1), CpuidLeaf { eax: shift, ebx: count, ecx: 2 << 8 | 1, edx: id });
    table.set(0xb, Some(2), CpuidLeaf { eax: 0, ebx: 0, ecx: 2, edx: id });
    let leaf = if amd { 0x8000_001d } else { 4 };
    for (at, cache) in CACHES.iter().enumerate() {
        table.set(leaf, Some(at as u32), cache_leaf(cache, count, if amd { 0 } else { (1 << shift) - 1 }));
    }
    if amd {
        amd_topology(table, id, count, shift);
    }
}

/// Intel SDM vol. 2, CPUID leaf 4; AMD APM vol. 3, E.4.15 has the same layout less the cores in the package.
fn cache_leaf(cache: &Cache, count: u32, cores: u32) -> CpuidLeaf {
    let sharing = if cache.shared { count - 1 } else { 0 };
    let sets = cache.bytes / cache.ways / LINE_BYTES;
    const SELF_INITIALIZING: u32 = 1 << 8;
    CpuidLeaf {
        eax: cache.kind | cache.level << 5 | SELF_INITIALIZING | (sharing & 0xfff) << 14 | (cores & 0x3f) << 26,
        ebx: (LINE_BYTES - 1) | (cache.ways - 1) << 22,
        ecx: sets - 1,
        edx: 0,
    }
}

/// AMD APM vol. 3, E.4.4 to E.4.7 and E.4.16.
fn amd_topology(table: &mut CpuidTable, id: u32, count: u32, shift: u32) {
    let [l1d, l1i, l2, l3] = &CACHES;
    let l1 = |cache: &Cache| cache.bytes >> 10 << 24 | cache.ways << 16 | 1 << 8 | LINE_BYTES;
    // 64 TLB entries for each page size; ways of L2 and L3 in AMD's code: 6 is 8 ways, 8 is 16
    let leaf5 = CpuidLeaf { eax: 0xff40_ff40, ebx: 0xff40_ff40, ecx: l1(l1d), edx: l1(l1i) };
    table.set(0x8000_0005, None, leaf5);
    let leaf6 = CpuidLeaf {
        eax: 0x6400_6400,
        ebx: 0x6400_6400,
        ecx: l2.bytes >> 10 << 16 | 6 << 12 | 1 << 8 | LINE_BYTES,
        edx: l3.bytes >> 19 << 18 | 8 << 12 | 1 << 8 | LINE_BYTES,
    };
    table.set(0x8000_0006, None, leaf6);
    update(table, 0x8000_0008, 0, |leaf| leaf.ecx = shift << 12 | (count - 1) & 0xff);
    table.set(0x8000_001e, None, CpuidLeaf { eax: id, ebx: id & 0xff, ecx: 0, edx: 0 });
}
