//! The guests that both engines must run alike, on KVM.

use std::{
    fs::File,
    sync::{Arc, OnceLock},
};

use vireo_cpu::Engine;
use vireo_cpu_kvm::{KvmEngine, KvmOptions, Ring0Speed, probe};
use vireo_memory::GuestMemory;

/// `None` where this host has no KVM: the suite then says of each guest that it is skipped.
fn engine(memory: &GuestMemory) -> Option<Arc<dyn Engine>> {
    File::options().read(true).write(true).open("/dev/kvm").ok()?;
    Some(KvmEngine::new(memory, KvmOptions::default()).unwrap())
}

/// Whether this host's KVM emulates guest kernel code.
fn emulated() -> bool {
    static EMULATED: OnceLock<bool> = OnceLock::new();
    *EMULATED.get_or_init(|| matches!(probe().speed, Ring0Speed::Emulated { .. }))
}

vireo_conformance::suite!(engine, emulated());
