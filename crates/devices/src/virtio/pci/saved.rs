use std::sync::atomic::Ordering;

use minicbor::{Decode, Encode};
use vireo_cpu::Engine;

use super::{NO_VECTOR, Shared, State, VirtioPciError, registers::QueueRegisters, status};
use crate::{
    pci::{Msix, MsixRestoreError, SavedMsix},
    saved::BadState,
    virtio::{QueueState, VirtioDevice, features},
};

const NAME: &str = "virtio PCI function";

/// What a snapshot keeps of a [`super::VirtioPci`] and its device.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedVirtioPci {
    #[n(0)]
    pub device_type: u16,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub config: Vec<u8>,
    #[n(2)]
    pub msix: SavedMsix,
    #[n(3)]
    pub isr: u8,
    #[n(4)]
    pub generation: u8,
    #[n(5)]
    pub status: u8,
    #[n(6)]
    pub device_feature_select: u32,
    #[n(7)]
    pub driver_feature_select: u32,
    #[n(8)]
    pub driver_features: u64,
    #[n(9)]
    pub config_vector: u16,
    #[n(10)]
    pub queue_select: u16,
    #[n(11)]
    pub queues: Vec<SavedQueue>,
    /// The device's own state, see [`VirtioDevice::save`].
    #[cbor(n(12), with = "minicbor::bytes")]
    pub device: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedQueue {
    #[n(0)]
    pub size: u16,
    #[n(1)]
    pub enabled: bool,
    #[n(2)]
    pub descriptors: u64,
    #[n(3)]
    pub driver: u64,
    #[n(4)]
    pub device: u64,
    #[n(5)]
    pub vector: u16,
    /// `None` if it never ran.
    #[n(6)]
    pub state: Option<QueueState>,
}

/// All queues are stopped.
pub fn save(state: &State, shared: &Shared) -> SavedVirtioPci {
    let registers = &state.registers;
    let needs_reset = if shared.needs_reset.load(Ordering::Acquire) { status::NEEDS_RESET } else { 0 };
    let queue = |(queue, vector): (&QueueRegisters, &std::sync::atomic::AtomicU16)| SavedQueue {
        size: queue.size,
        enabled: queue.enabled,
        descriptors: queue.descriptors,
        driver: queue.driver,
        device: queue.device,
        vector: vector.load(Ordering::Acquire),
        state: queue.state,
    };
    SavedVirtioPci {
        device_type: state.device.device_type(),
        config: state.config.save(),
        msix: shared.msix().save(),
        isr: shared.isr.load(Ordering::Acquire),
        generation: shared.generation.load(Ordering::Acquire),
        status: registers.status | needs_reset,
        device_feature_select: registers.device_feature_select,
        driver_feature_select: registers.driver_feature_select,
        driver_features: registers.driver_features,
        config_vector: shared.config_vector.load(Ordering::Acquire),
        queue_select: registers.queue_select,
        queues: registers.queues.iter().zip(&shared.queue_vectors).map(queue).collect(),
        device: state.device.save(),
    }
}

fn bad<T>(why: impl Into<String>) -> Result<T, BadState> {
    Err(BadState::new(NAME, why))
}

/// Whether `saved` can be of such a device.
pub fn check(device: &dyn VirtioDevice, saved: &SavedVirtioPci) -> Result<(), BadState> {
    if saved.device_type != device.device_type() {
        return bad(format!("it is of device type {}, not {}", saved.device_type, device.device_type()));
    }
    if saved.queues.len() != device.queue_sizes().len() {
        return bad(format!("{} queues instead of {}", saved.queues.len(), device.queue_sizes().len()));
    }
    let missing = saved.driver_features & !(device.features() | features::TRANSPORT);
    if saved.status & status::FEATURES_OK != 0 && missing != 0 {
        return bad(format!("the driver uses features {missing:#x}, which the device no longer has"));
    }
    if saved.status & (status::DRIVER_OK | status::FEATURES_OK) == status::DRIVER_OK {
        return bad("a driver that is ready without features");
    }
    let vectors = saved.queues.iter().map(|queue| queue.vector).chain([saved.config_vector]);
    for vector in vectors {
        if vector != NO_VECTOR && usize::from(vector) > saved.queues.len() {
            return bad(format!("interrupt vector {vector}"));
        }
    }
    for (queue, most) in saved.queues.iter().zip(device.queue_sizes()) {
        if !QueueRegisters::new(*most).is_possible_size(queue.size) {
            return bad(format!("a queue of {} entries, where {most} is the most", queue.size));
        }
    }
    Ok(())
}

pub fn msix(engine: &dyn Engine, vectors: u16, saved: &SavedMsix) -> Result<Msix, VirtioPciError> {
    Msix::restore(engine, vectors, NAME, saved).map_err(|error| match error {
        MsixRestoreError::State(error) => error.into(),
        MsixRestoreError::Lines(error) => error.into(),
    })
}

/// Puts what [`check`] found fit into a fresh function and leaves it paused.
pub fn restore(state: &mut State, shared: &Shared, saved: SavedVirtioPci) -> Result<(), BadState> {
    state.paused = true;
    state.config.restore(NAME, &saved.config)?;
    if state.config.read_u16(state.msix_at + 2) & 0xc000 != saved.msix.control & 0xc000 {
        return bad("two opinions on whether MSI-X is enabled");
    }
    shared.isr.store(saved.isr, Ordering::Release);
    shared.generation.store(saved.generation, Ordering::Release);
    shared.needs_reset.store(saved.status & status::NEEDS_RESET != 0, Ordering::Release);
    shared.config_vector.store(saved.config_vector, Ordering::Release);
    let registers = &mut state.registers;
    registers.status = saved.status & !status::NEEDS_RESET;
    registers.device_feature_select = saved.device_feature_select;
    registers.driver_feature_select = saved.driver_feature_select;
    registers.driver_features = saved.driver_features;
    registers.queue_select = saved.queue_select;
    for ((queue, vector), saved) in registers.queues.iter_mut().zip(&shared.queue_vectors).zip(saved.queues) {
        vector.store(saved.vector, Ordering::Release);
        queue.size = saved.size;
        queue.enabled = saved.enabled;
        queue.descriptors = saved.descriptors;
        queue.driver = saved.driver;
        queue.device = saved.device;
        queue.state = saved.state;
    }
    Ok(())
}
