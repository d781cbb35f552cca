//! The common configuration structure (virtio 1.2, 4.1.4.3).

use std::sync::atomic::Ordering;

use super::{Shared, status};
use crate::virtio::{QueueState, features};

pub const NO_VECTOR: u16 = 0xffff;
const BYTES: usize = 64;

mod at {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    pub const QUEUE_RESET: u64 = 58;
}

/// What a write leads to beyond the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    Reset,
    StartAll,
    Start(usize),
    ResetQueue(usize),
}

#[derive(Clone, Debug)]
pub struct QueueRegisters {
    pub size: u16,
    max_size: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    /// Where it stopped; `None` before it ran.
    pub state: Option<QueueState>,
    /// Whether the device serves it now.
    pub running: bool,
}

impl QueueRegisters {
    pub fn new(max_size: u16) -> Self {
        let (enabled, running, state) = (false, false, None);
        Self { size: max_size, max_size, enabled, descriptors: 0, driver: 0, device: 0, state, running }
    }

    pub fn is_possible_size(&self, size: u16) -> bool {
        size.is_power_of_two() && size <= self.max_size
    }
}

pub struct Registers {
    pub offered: u64,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    /// Without `NEEDS_RESET`, which [`Shared`] knows.
    pub status: u8,
    pub queue_select: u16,
    pub queues: Vec<QueueRegisters>,
}

impl Registers {
    pub fn new(offered: u64, sizes: &[u16]) -> Self {
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: sizes.iter().map(|size| QueueRegisters::new(*size)).collect(),
        }
    }

    pub fn reset(&mut self, sizes: &[u16]) {
        *self = Self::new(self.offered, sizes);
    }

    /// The structure as it reads now.
    pub fn render(&self, shared: &Shared) -> [u8; BYTES] {
        let mut out = [0; BYTES];
        let mut put = |at: u64, bytes: &[u8]| out[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        let needs_reset = if shared.needs_reset.load(Ordering::Acquire) { status::NEEDS_RESET } else { 0 };
        put(at::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(at::DEVICE_FEATURE, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(at::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(at::DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(at::CONFIG_VECTOR, &shared.config_vector.load(Ordering::Acquire).to_le_bytes());
        put(at::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(at::STATUS, &[self.status | needs_reset]);
        put(at::GENERATION, &[shared.generation.load(Ordering::Acquire)]);
        put(at::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (4.1.4.3.1).
        let index = usize::from(self.queue_select);
        if let (Some(queue), Some(vector)) = (self.queues.get(index), shared.queue_vectors.get(index)) {
            put(at::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(at::QUEUE_VECTOR, &vector.load(Ordering::Acquire).to_le_bytes());
            put(at::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(at::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(at::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(at::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(at::QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        out
    }

    /// Takes a write of a field's own width, or of half of a 64-bit field (4.1.3.1); others are lost.
    pub fn write(&mut self, shared: &Shared, offset: u64, data: &[u8]) -> Effect {
        match *data {
            [value] if offset == at::STATUS => return self.write_status(value),
            [a, b] => return self.write_16(shared, offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset >= at::QUEUE_DESC => {
                self.write_32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // A driver must not clear bits (2.1.1), so they stay; NEEDS_RESET is the device's to set.
        let mut set = value & !self.status & !status::NEEDS_RESET;
        if set & status::FEATURES_OK != 0 && !self.features_acceptable() {
            set &= !status::FEATURES_OK;
        }
        if (self.status | set) & status::FEATURES_OK == 0 {
            set &= !status::DRIVER_OK;
        }
        self.status |= set;
        if set & status::DRIVER_OK != 0 { Effect::StartAll } else { Effect::None }
    }

    /// Only what was offered, and never the legacy interface.
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0 && self.driver_features & features::VERSION_1 != 0
    }

    fn write_16(&mut self, shared: &Shared, offset: u64, value: u16) -> Effect {
        let vector = |value: u16| if value < shared.msix().vectors() { value } else { NO_VECTOR };
        match offset {
            at::CONFIG_VECTOR => shared.config_vector.store(vector(value), Ordering::Release),
            at::QUEUE_SELECT => self.queue_select = value,
            _ => return self.write_queue_16(shared, offset, value, vector),
        }
        Effect::None
    }

    fn write_queue_16(&mut self, shared: &Shared, offset: u64, value: u16, vector: impl Fn(u16) -> u16) -> Effect {
        let index = usize::from(self.queue_select);
        let Some(queue) = self.queues.get_mut(index) else { return Effect::None };
        match offset {
            at::QUEUE_SIZE if !queue.enabled && queue.is_possible_size(value) => queue.size = value,
            at::QUEUE_VECTOR => shared.queue_vectors[index].store(vector(value), Ordering::Release),
            // Disabling is what reset is for (4.1.4.3.2).
            at::QUEUE_ENABLE if value == 1 && !queue.enabled => {
                queue.enabled = true;
                return Effect::Start(index);
            }
            at::QUEUE_RESET if value == 1 && self.driver_features & features::RING_RESET != 0 => {
                return Effect::ResetQueue(index);
            }
            _ => {}
        }
        Effect::None
    }

    fn write_32(&mut self, offset: u64, value: u32) {
        match offset {
            at::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            at::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            // What was agreed on stays.
            at::DRIVER_FEATURE if self.status & status::FEATURES_OK == 0 => match self.driver_feature_select {
                0 => set_half(&mut self.driver_features, false, value),
                1 => set_half(&mut self.driver_features, true, value),
                _ => {}
            },
            _ => self.write_ring(offset, value),
        }
    }

    fn write_ring(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled) else {
            return;
        };
        let high = offset & 4 != 0;
        match offset & !4 {
            at::QUEUE_DESC => set_half(&mut queue.descriptors, high, value),
            at::QUEUE_DRIVER => set_half(&mut queue.driver, high, value),
            at::QUEUE_DEVICE => set_half(&mut queue.device, high, value),
            _ => {}
        }
    }
}

fn set_half(field: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *field = *field & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
}
