//! The translator passes the suite that every engine passes, from the first instruction on.

use std::sync::Arc;

use vireo_cpu::Engine;
use vireo_engine::SoftEngine;
use vireo_memory::GuestMemory;

fn engine(memory: &GuestMemory) -> Option<Arc<dyn Engine>> {
    Some(SoftEngine::promoting(memory, 1).expect("the software engine runs on every host"))
}

vireo_conformance::suite!(engine);
