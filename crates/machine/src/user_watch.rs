//! Finds out when a guest runs its first user process, on an engine that does not see it: vCPUs are interrupted now
//! and then, and looked at. The answer is never too early, and late by as long as no look meets user code.

use std::{
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use vireo_cpu::Vcpu;

use crate::events::Events;

const LOOK_EVERY: Duration = Duration::from_millis(5);
const CS: usize = 1;

#[derive(Default)]
pub(crate) struct UserWatch {
    seen: OnceLock<Instant>,
}

impl UserWatch {
    /// Starts to interrupt vCPUs, until user code was seen or the run ends.
    pub fn start(self: &Arc<Self>, events: Arc<Events>) {
        let watch = self.clone();
        let look = move || {
            while watch.seen.get().is_none() && !events.stopping() {
                thread::sleep(LOOK_EVERY);
                events.kick_all();
            }
        };
        // Without the thread there is no answer, which is an answer.
        let _ = thread::Builder::new().name("vireo-watch".into()).spawn(look);
    }

    /// Looks at a vCPU that came out of the engine.
    pub fn look(&self, vcpu: &dyn Vcpu) {
        if self.seen.get().is_none()
            && let Ok(state) = vcpu.state()
            && state.segments[CS].selector & 3 == 3
        {
            let _ = self.seen.set(Instant::now());
        }
    }

    pub fn seen(&self) -> Option<Instant> {
        self.seen.get().copied()
    }
}
