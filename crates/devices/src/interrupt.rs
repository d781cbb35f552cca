use std::sync::Arc;

/// Something with numbered interrupt inputs: the IOAPIC.
pub trait InterruptPins: Send + Sync {
    fn set_pin(&self, pin: u8, level: bool);
}

/// A device's wire to an interrupt controller. Clones are the same wire; one device owns it.
#[derive(Clone)]
pub struct InterruptLine {
    pins: Arc<dyn InterruptPins>,
    pin: u8,
}

impl InterruptLine {
    pub fn new(pins: Arc<dyn InterruptPins>, pin: u8) -> Self {
        Self { pins, pin }
    }

    /// Asserts or releases the line; saying the same again does nothing.
    pub fn set_level(&self, level: bool) {
        self.pins.set_pin(self.pin, level);
    }

    /// One edge.
    pub fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}
