//! Which instruction sets a guest may use: what its CPUID says, and only what the host can execute.

use std::sync::OnceLock;

use iced_x86::CpuidFeature;
use vireo_cpu::cpuid::CpuidTable;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Output::{Eax, Ebx, Ecx, Edx};

/// What has to be saved with XSAVE for the instructions to work, beside CPUID (Intel SDM vol. 1, 13.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Base,
    Avx,
}
use State::{Avx, Base};

/// `(feature, leaf, subleaf, register, bit, state)`; Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.
const FEATURES: &[(CpuidFeature, u32, u32, Output, u8, State)] = &[
    (CpuidFeature::FPU, 1, 0, Edx, 0, Base),
    (CpuidFeature::CX8, 1, 0, Edx, 8, Base),
    (CpuidFeature::CMOV, 1, 0, Edx, 15, Base),
    (CpuidFeature::CLFSH, 1, 0, Edx, 19, Base),
    (CpuidFeature::MMX, 1, 0, Edx, 23, Base),
    (CpuidFeature::FXSR, 1, 0, Edx, 24, Base),
    (CpuidFeature::SSE, 1, 0, Edx, 25, Base),
    (CpuidFeature::SSE2, 1, 0, Edx, 26, Base),
    (CpuidFeature::SSE3, 1, 0, Ecx, 0, Base),
    (CpuidFeature::PCLMULQDQ, 1, 0, Ecx, 1, Base),
    (CpuidFeature::SSSE3, 1, 0, Ecx, 9, Base),
    (CpuidFeature::FMA, 1, 0, Ecx, 12, Avx),
    (CpuidFeature::CMPXCHG16B, 1, 0, Ecx, 13, Base),
    (CpuidFeature::SSE4_1, 1, 0, Ecx, 19, Base),
    (CpuidFeature::SSE4_2, 1, 0, Ecx, 20, Base),
    (CpuidFeature::MOVBE, 1, 0, Ecx, 22, Base),
    (CpuidFeature::POPCNT, 1, 0, Ecx, 23, Base),
    (CpuidFeature::AES, 1, 0, Ecx, 25, Base),
    (CpuidFeature::XSAVE, 1, 0, Ecx, 26, Base),
    (CpuidFeature::AVX, 1, 0, Ecx, 28, Avx),
    (CpuidFeature::F16C, 1, 0, Ecx, 29, Avx),
    (CpuidFeature::RDRAND, 1, 0, Ecx, 30, Base),
    (CpuidFeature::BMI1, 7, 0, Ebx, 3, Base),
    (CpuidFeature::AVX2, 7, 0, Ebx, 5, Avx),
    (CpuidFeature::BMI2, 7, 0, Ebx, 8, Base),
    (CpuidFeature::RDSEED, 7, 0, Ebx, 18, Base),
    (CpuidFeature::ADX, 7, 0, Ebx, 19, Base),
    (CpuidFeature::CLFLUSHOPT, 7, 0, Ebx, 23, Base),
    (CpuidFeature::CLWB, 7, 0, Ebx, 24, Base),
    (CpuidFeature::SHA, 7, 0, Ebx, 29, Base),
    (CpuidFeature::GFNI, 7, 0, Ecx, 8, Base),
    (CpuidFeature::VAES, 7, 0, Ecx, 9, Avx),
    (CpuidFeature::VPCLMULQDQ, 7, 0, Ecx, 10, Avx),
    (CpuidFeature::AVX_VNNI, 7, 1, Eax, 4, Avx),
    (CpuidFeature::AVX_IFMA, 7, 1, Eax, 23, Avx),
    (CpuidFeature::AVX_VNNI_INT8, 7, 1, Edx, 4, Avx),
    (CpuidFeature::AVX_NE_CONVERT, 7, 1, Edx, 5, Avx),
    (CpuidFeature::AVX_VNNI_INT16, 7, 1, Edx, 10, Avx),
    (CpuidFeature::XSAVEOPT, 0xd, 1, Eax, 0, Base),
    (CpuidFeature::XSAVEC, 0xd, 1, Eax, 1, Base),
    (CpuidFeature::LZCNT, 0x8000_0001, 0, Ecx, 5, Base),
    (CpuidFeature::PREFETCHW, 0x8000_0001, 0, Ecx, 8, Base),
];

/// Sets that every x86-64 processor has and no CPUID bit names.
const ALWAYS: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
];

/// Instruction sets, by iced's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet([u64; 4]);

impl FeatureSet {
    /// What the guest is told it has, less what this host cannot execute.
    pub fn from_cpuid(table: &CpuidTable) -> Self {
        let mut set = Self::host();
        for &(feature, leaf, subleaf, output, bit, _) in FEATURES {
            let found = table.get(leaf, subleaf);
            if !bit_of([found.eax, found.ebx, found.ecx, found.edx], output, bit) {
                set.remove(feature);
            }
        }
        set
    }

    /// Everything that stubs can run on this host. Asked of the host once: under a hypervisor each CPUID
    /// costs tens of microseconds.
    pub fn host() -> Self {
        static HOST: OnceLock<FeatureSet> = OnceLock::new();
        *HOST.get_or_init(|| {
            let mut set = Self::default();
            if !cfg!(target_arch = "x86_64") {
                return set;
            }
            for feature in ALWAYS {
                set.insert(*feature);
            }
            let host = host::Leaves::read();
            for &(feature, leaf, subleaf, output, bit, state) in FEATURES {
                if bit_of(host.get(leaf, subleaf), output, bit) && (state == Base || host.avx_state) {
                    set.insert(feature);
                }
            }
            set
        })
    }

    fn insert(&mut self, feature: CpuidFeature) {
        let at = feature as usize;
        self.0[at / 64] |= 1 << (at % 64);
    }

    /// Takes one set away, for tests and for CPU models with less.
    pub fn remove(&mut self, feature: CpuidFeature) {
        let at = feature as usize;
        self.0[at / 64] &= !(1 << (at % 64));
    }

    pub fn contains(&self, feature: CpuidFeature) -> bool {
        let at = feature as usize;
        self.0[at / 64] >> (at % 64) & 1 == 1
    }

    /// Whether an instruction that needs all of `features` may run.
    pub fn contains_all(&self, features: &[CpuidFeature]) -> bool {
        features.iter().all(|f| self.contains(*f))
    }
}

/// Sets the CPUID bit of every instruction set that stubs can run on this host, and of no other.
pub fn advertise(table: &mut CpuidTable) {
    let host = FeatureSet::host();
    for &(feature, leaf, subleaf, output, bit, _) in FEATURES {
        if !host.contains(feature) {
            continue;
        }
        let index = matches!(leaf, 7 | 0xd).then_some(subleaf);
        let mut found = table.get(leaf, subleaf);
        let word = match output {
            Eax => &mut found.eax,
            Ebx => &mut found.ebx,
            Ecx => &mut found.ecx,
            Edx => &mut found.edx,
        };
        *word |= 1 << bit;
        table.set(leaf, index, found);
    }
}

fn bit_of(leaf: [u32; 4], output: Output, bit: u8) -> bool {
    leaf[output as usize] >> bit & 1 == 1
}

#[cfg(target_arch = "x86_64")]
mod host {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    use super::{Ecx, FEATURES, bit_of};

    /// The leaves that [`FEATURES`] names, as the host answers them.
    pub(super) struct Leaves {
        found: Vec<((u32, u32), [u32; 4])>,
        /// The operating system switches YMM state (Intel SDM vol. 1, 14.3).
        pub(super) avx_state: bool,
    }

    impl Leaves {
        pub(super) fn read() -> Self {
            let mut wanted: Vec<(u32, u32)> = FEATURES.iter().map(|row| (row.1, row.2)).collect();
            wanted.sort_unstable();
            wanted.dedup();
            let most = [__cpuid(0).eax, __cpuid(0x8000_0000).eax];
            let most_of_7 = if most[0] >= 7 { __cpuid_count(7, 0).eax } else { 0 };
            let exists =
                |leaf: u32, subleaf: u32| leaf <= most[(leaf >> 31) as usize] && (leaf != 7 || subleaf <= most_of_7);
            let found: Vec<_> = wanted
                .into_iter()
                .filter(|&(leaf, subleaf)| exists(leaf, subleaf))
                .map(|(leaf, subleaf)| {
                    let r = __cpuid_count(leaf, subleaf);
                    ((leaf, subleaf), [r.eax, r.ebx, r.ecx, r.edx])
                })
                .collect();
            let mut leaves = Self { found, avx_state: false };
            leaves.avx_state = bit_of(leaves.get(1, 0), Ecx, 27)
                // SAFETY: OSXSAVE (bit 27) was checked first.
                && unsafe { xcr0() } & 6 == 6;
            leaves
        }

        pub(super) fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
            self.found.iter().find(|(at, _)| *at == (leaf, subleaf)).map_or([0; 4], |(_, r)| *r)
        }
    }

    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: only called when CPUID says that the operating system has enabled XGETBV.
        unsafe { _xgetbv(0) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod host {
    /// Nothing: no stub runs on another architecture.
    pub(super) struct Leaves {
        pub(super) avx_state: bool,
    }

    impl Leaves {
        pub(super) fn read() -> Self {
            Self { avx_state: false }
        }

        pub(super) fn get(&self, _: u32, _: u32) -> [u32; 4] {
            [0; 4]
        }
    }
}
