//! Which engine runs a machine, and why.

use std::{sync::Arc, time::Instant};

use vireo_cpu::{CpuError, Engine};
use vireo_cpu_kvm::{KvmEngine, KvmOptions, KvmProbe, Ring0Speed};
use vireo_engine::SoftEngine;
use vireo_memory::GuestMemory;

use crate::config::Accel;

/// The software engine's own limit, known before there is one.
const SOFT_MAX_VCPUS: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    Kvm,
    Soft,
}

/// An engine and, for people, why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub kind: EngineKind,
    pub why: String,
}

impl EngineKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Soft => "soft",
        }
    }

    /// The most vCPUs that it runs; KVM may find the host to take fewer.
    pub fn max_vcpus(self) -> u32 {
        match self {
            Self::Kvm => vireo_cpu::MAX_VCPUS,
            Self::Soft => SOFT_MAX_VCPUS,
        }
    }

    /// `metrics`: instructions are to be counted. `verify`: see [`SoftEngine::verifying`].
    pub(crate) fn create(self, memory: &GuestMemory, metrics: bool, verify: bool) -> Result<Created, CpuError> {
        Ok(match self {
            Self::Kvm => Created { engine: KvmEngine::new(memory, KvmOptions::default())?, soft: None },
            Self::Soft => {
                let soft = if verify { SoftEngine::verifying(memory)? } else { SoftEngine::new(memory)? };
                if metrics {
                    soft.count_instructions();
                }
                Created { engine: soft.clone(), soft: Some(soft) }
            }
        })
    }
}

/// An engine, and what only the software engine can tell.
pub(crate) struct Created {
    pub engine: Arc<dyn Engine>,
    soft: Option<Arc<SoftEngine>>,
}

impl Created {
    /// Whether the engine itself sees the first instruction of a user process; KVM does not.
    pub fn sees_user_code(&self) -> bool {
        self.soft.is_some()
    }

    /// When that was.
    pub fn first_user_instruction(&self) -> Option<Instant> {
        self.soft.as_ref()?.first_user_instruction()
    }
}

impl Choice {
    /// `probe` is only asked where its answer matters.
    pub fn of(accel: Accel, probe: impl FnOnce() -> KvmProbe) -> Self {
        match accel {
            Accel::Kvm => Self { kind: EngineKind::Kvm, why: "--accel kvm".into() },
            Accel::Soft => Self { kind: EngineKind::Soft, why: "--accel soft".into() },
            Accel::Auto => Self::by_probe(&probe()),
        }
    }

    fn by_probe(probe: &KvmProbe) -> Self {
        match &probe.speed {
            Ring0Speed::Native => {
                Self { kind: EngineKind::Kvm, why: "KVM runs guest kernels at native speed on this host".into() }
            }
            Ring0Speed::Emulated { ns_per_instruction } => Self {
                kind: EngineKind::Soft,
                why: format!("KVM on this host emulates guest kernels, at {ns_per_instruction:.0} ns an instruction"),
            },
            Ring0Speed::Unavailable { why, .. } => Self { kind: EngineKind::Soft, why: format!("no KVM: {why}") },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_kvm_only_where_it_is_native() {
        let choice = |speed| Choice::of(Accel::Auto, || KvmProbe { speed, max_vcpus: 64 });
        assert_eq!(choice(Ring0Speed::Native).kind, EngineKind::Kvm);
        let emulated = choice(Ring0Speed::Emulated { ns_per_instruction: 1900.0 });
        assert_eq!(emulated.kind, EngineKind::Soft);
        assert!(emulated.why.contains("1900 ns"), "{}", emulated.why);
        let missing = choice(Ring0Speed::Unavailable { why: "/dev/kvm is missing".into(), remedy: String::new() });
        assert_eq!(missing.kind, EngineKind::Soft);
        assert!(missing.why.contains("/dev/kvm"));
    }

    #[test]
    fn a_wish_is_not_probed() {
        let never = || unreachable!("not asked");
        assert_eq!(Choice::of(Accel::Soft, never).kind, EngineKind::Soft);
        assert_eq!(Choice::of(Accel::Kvm, never).kind, EngineKind::Kvm);
    }
}
