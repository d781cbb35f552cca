//! An interrupt controller with one pin.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::interrupt::{InterruptLine, InterruptPins};

const PIN: u8 = 4;

/// Counts the edges.
#[derive(Default)]
pub struct FakePin {
    level: AtomicBool,
    edges: AtomicUsize,
}

impl FakePin {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn line(self: &Arc<Self>) -> InterruptLine {
        InterruptLine::new(self.clone(), PIN)
    }

    pub fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    pub fn edges(&self) -> usize {
        self.edges.load(Ordering::SeqCst)
    }
}

impl InterruptPins for FakePin {
    fn set_pin(&self, pin: u8, level: bool) {
        assert_eq!(pin, PIN);
        if !self.level.swap(level, Ordering::SeqCst) && level {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
    }
}
