//! The software engine passes the suite that every engine passes.

use std::sync::Arc;

use vireo_cpu::Engine;
use vireo_engine::SoftEngine;
use vireo_memory::GuestMemory;

fn engine(memory: &GuestMemory) -> Option<Arc<dyn Engine>> {
    Some(SoftEngine::new(memory).expect("the software engine runs on every host"))
}

vireo_conformance::suite!(engine);
