//! Virtio over PCI, modern interface (virtio 1.2, 4.1), interrupts by MSI-X only.

mod layout;
mod registers;
mod saved;

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering},
};

use vireo_cpu::{CpuError, Engine};
use vireo_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{QueueResources, VirtioDevice, VirtioError, features};
use crate::{
    pci::{Bar, ConfigSpace, Msix, PciFunction},
    saved::BadState,
};
use layout::{Access, Region};
use registers::{Effect, NO_VECTOR, QueueRegisters, Registers};

pub use layout::MAX_QUEUES;
pub use saved::{SavedQueue, SavedVirtioPci};

/// Virtio 1.2, 2.1: device status.
mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    #[error("no interrupt lines for a virtio device")]
    Interrupts(#[from] CpuError),
    #[error("cannot create an eventfd for a virtqueue")]
    EventFd(#[source] std::io::Error),
    #[error("a virtio device with {0} queues")]
    TooManyQueues(usize),
    #[error("a virtqueue of {0} entries")]
    BadQueueSize(u16),
    #[error(transparent)]
    State(#[from] BadState),
    #[error("the virtio device does not take its saved state")]
    Device(#[source] VirtioError),
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    memory: GuestMemory,
    engine: Arc<dyn Engine>,
    shared: Arc<Shared>,
    state: Mutex<State>,
}

/// What the queues' threads touch: never locked for long, and never while waiting for such a thread.
struct Shared {
    msix: Mutex<Msix>,
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    kicks: Vec<EventFd>,
}

struct State {
    config: ConfigSpace,
    /// Where the MSI-X and the pci-cfg capabilities are.
    msix_at: u16,
    access_at: u16,
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    paused: bool,
    /// The addresses at which the engine signals a queue's eventfd.
    short_cuts: Vec<(u64, usize)>,
}

impl Shared {
    fn interrupt(&self, isr: u8, vector: &AtomicU16) {
        self.isr.fetch_or(isr, Ordering::AcqRel);
        let vector = vector.load(Ordering::Acquire);
        if vector != NO_VECTOR {
            self.msix().trigger(vector);
        }
    }

    fn interrupt_queue(&self, index: usize) {
        self.interrupt(ISR_QUEUE, &self.queue_vectors[index]);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt(ISR_CONFIG, &self.config_vector);
    }

    /// Virtio 1.2, 2.1.2: the status says so and the driver gets a configuration change notification.
    fn broken(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.config_changed();
        }
    }

    fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioPci {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        engine: Arc<dyn Engine>,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let vectors = Self::vectors(&*device)?;
        let msix = Msix::new(&*engine, vectors)?;
        Ok(Arc::new(Self::build(device, memory, engine, msix)?))
    }

    /// One for each queue and one for the configuration.
    fn vectors(device: &dyn VirtioDevice) -> Result<u16, VirtioPciError> {
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES {
            return Err(VirtioPciError::TooManyQueues(sizes.len()));
        }
        let possible = |size: u16| size.is_power_of_two() && size <= super::MAX_QUEUE_SIZE;
        match sizes.iter().find(|size| !possible(**size)) {
            Some(size) => Err(VirtioPciError::BadQueueSize(*size)),
            None => Ok(sizes.len() as u16 + 1),
        }
    }

    fn build(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        engine: Arc<dyn Engine>,
        msix: Msix,
    ) -> Result<Self, VirtioPciError> {
        let queues = device.queue_sizes().len();
        let kicks = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>();
        let shared = Shared {
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            kicks: kicks.map_err(VirtioPciError::EventFd)?,
            msix: Mutex::new(msix),
        };
        let layout::Space { config, msix_at, access_at } = layout::space(device.device_type(), queues);
        let registers = Registers::new(device.features() | features::TRANSPORT, device.queue_sizes());
        let state = State { config, msix_at, access_at, device, registers, paused: false, short_cuts: Vec::new() };
        Ok(Self { memory, engine, shared: Arc::new(shared), state: Mutex::new(state) })
    }

    /// Stops all queues, each after what it has begun. Until [`Self::resume`] none runs, whatever the driver does.
    pub fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        self.stop_queues(&mut state);
    }

    /// Starts the queues that [`Self::pause`] stopped, from where they were.
    pub fn resume(&self) {
        let mut state = self.lock();
        state.paused = false;
        self.start_queues(&mut state);
    }

    /// Saves transport and device. Queues that run are stopped for it and go on afterwards.
    pub fn save(&self) -> SavedVirtioPci {
        let mut state = self.lock();
        self.stop_queues(&mut state);
        let saved = saved::save(&state, &self.shared);
        if !state.paused {
            self.start_queues(&mut state);
        }
        saved
    }

    /// Builds the function from what was saved; it is paused. `device` is new.
    pub fn restore(
        mut device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        engine: Arc<dyn Engine>,
        saved: SavedVirtioPci,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let vectors = Self::vectors(&*device)?;
        saved::check(&*device, &saved)?;
        device.restore(&saved.device).map_err(VirtioPciError::Device)?;
        let msix = saved::msix(&*engine, vectors, &saved.msix)?;
        let built = Self::build(device, memory, engine, msix)?;
        saved::restore(&mut built.lock(), &built.shared, saved)?;
        Ok(Arc::new(built))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_queues(&self, state: &mut State) {
        for index in 0..state.registers.queues.len() {
            self.start_queue(state, index);
        }
    }

    /// Starts a queue if everything says that it should run.
    fn start_queue(&self, state: &mut State, index: usize) {
        let driver_ok = state.registers.status & status::DRIVER_OK != 0;
        let features = state.registers.driver_features;
        let queue = &mut state.registers.queues[index];
        if !driver_ok || state.paused || !queue.enabled || queue.running {
            return;
        }
        let device = &mut state.device;
        let started = self.resources(index, queue, features).and_then(|resources| device.start_queue(index, resources));
        match started {
            Ok(()) => {
                queue.running = true;
                // What was asked for before a pause or a restore must not wait for the next notification.
                self.kick(index);
            }
            Err(_) => self.shared.broken(),
        }
    }

    fn resources(&self, index: usize, queue: &QueueRegisters, features: u64) -> Result<QueueResources, VirtioError> {
        let told = |tell: fn(&Shared, usize)| -> Arc<dyn Fn() + Send + Sync> {
            let shared = self.shared.clone();
            Arc::new(move || tell(&shared, index))
        };
        Ok(QueueResources {
            memory: self.memory.clone(),
            size: queue.size,
            descriptors: queue.descriptors,
            driver: queue.driver,
            device: queue.device,
            features,
            kick: self.shared.kicks[index].try_clone().map_err(VirtioError::Thread)?,
            interrupt: told(Shared::interrupt_queue),
            config_changed: told(|shared, _| shared.config_changed()),
            broken: told(|shared, _| shared.broken()),
            state: queue.state,
        })
    }

    fn stop_queues(&self, state: &mut State) {
        for index in 0..state.registers.queues.len() {
            Self::stop_queue(state, index);
        }
    }

    fn stop_queue(state: &mut State, index: usize) {
        let queue = &mut state.registers.queues[index];
        if std::mem::take(&mut queue.running) {
            queue.state = state.device.stop_queue(index);
        }
    }

    fn reset(&self, state: &mut State) {
        self.stop_queues(state);
        state.device.reset();
        state.registers.reset(state.device.queue_sizes());
        self.shared.needs_reset.store(false, Ordering::Release);
        self.shared.isr.store(0, Ordering::Release);
        self.shared.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.shared.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        for kick in &self.shared.kicks {
            // Empties it: nothing from before the reset is a notification.
            let _ = kick.read();
        }
    }

    fn kick(&self, index: usize) {
        if let Some(kick) = self.shared.kicks.get(index) {
            // Fails only when the counter is full, that is, when it is signalled already.
            let _ = kick.write(1);
        }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let registers = state.registers.render(&self.shared);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = registers.get((offset as usize).saturating_add(i)).copied().unwrap_or(0);
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match state.registers.write(&self.shared, offset, data) {
            Effect::None => {}
            Effect::Reset => self.reset(&mut state),
            Effect::StartAll => self.start_queues(&mut state),
            Effect::Start(index) => self.start_queue(&mut state, index),
            Effect::ResetQueue(index) => {
                Self::stop_queue(&mut state, index);
                let size = state.device.queue_sizes()[index];
                state.registers.queues[index] = QueueRegisters::new(size);
                self.shared.queue_vectors[index].store(NO_VECTOR, Ordering::Release);
            }
        }
    }

    fn read_region(&self, region: Region, offset: u64, data: &mut [u8]) {
        match region {
            Region::Common => self.read_common(offset, data),
            Region::Isr => {
                data.fill(0);
                if offset == 0 {
                    data[0] = self.shared.isr.swap(0, Ordering::AcqRel);
                }
            }
            Region::Device => self.lock().device.read_config(offset, data),
            Region::Notify => data.fill(0),
            Region::MsixTable => self.shared.msix().read_table(offset, data),
            Region::MsixPending => self.shared.msix().read_pending(offset, data),
        }
    }

    fn write_region(&self, region: Region, offset: u64, data: &[u8]) {
        match region {
            Region::Common => self.write_common(offset, data),
            Region::Device => self.lock().device.write_config(offset, data),
            Region::Notify => self.kick((offset / layout::NOTIFY_STRIDE) as usize),
            Region::MsixTable => self.shared.msix().write_table(offset, data),
            Region::Isr | Region::MsixPending => {}
        }
    }

    fn remove_short_cuts(&self, state: &mut State) {
        for (gpa, index) in state.short_cuts.drain(..) {
            self.engine.remove_ioeventfd(gpa, layout::NOTIFY_BYTES, layout::fd(&self.shared.kicks[index]));
        }
    }

    /// What the pci-cfg capability now points to, if `offset..offset+len` meets its data window.
    fn window(&self, offset: u16, len: usize) -> Option<Access> {
        let state = self.lock();
        layout::Access::of(&state.config, state.access_at, offset, len)
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if let Some(access) = self.window(offset, data.len()) {
            let mut window = [0; 4];
            self.bar_read(0, access.offset, &mut window[..access.len]);
            self.lock().config.write(access.window, &window);
        }
        self.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        {
            let mut state = self.lock();
            state.config.write(offset, data);
            let control = state.msix_at + 2;
            if offset < control + 2 && usize::from(offset) + data.len() > usize::from(control) {
                self.shared.msix().set_control(state.config.read_u16(control));
            }
        }
        if let Some(access) = self.window(offset, data.len()) {
            let window = self.lock().config.read_u32(access.window).to_le_bytes();
            self.bar_write(0, access.offset, &window[..access.len]);
        }
    }

    fn bars(&self) -> Vec<Bar> {
        self.lock().config.bars()
    }

    fn set_bar(&self, index: u8, address: u64) {
        self.lock().config.set_bar(index, address);
    }

    fn bar_moved(&self, _index: u8, address: Option<u64>) {
        let mut state = self.lock();
        self.remove_short_cuts(&mut state);
        let Some(address) = address else { return };
        for (index, kick) in self.shared.kicks.iter().enumerate() {
            let gpa = address + layout::notify_offset(index);
            if self.engine.ioeventfd(gpa, layout::NOTIFY_BYTES, layout::fd(kick)) {
                state.short_cuts.push((gpa, index));
            }
        }
    }

    fn bar_read(&self, _index: u8, offset: u64, data: &mut [u8]) {
        match layout::region(offset) {
            Some((region, offset)) => self.read_region(region, offset, data),
            None => data.fill(0),
        }
    }

    fn bar_write(&self, _index: u8, offset: u64, data: &[u8]) {
        if let Some((region, offset)) = layout::region(offset) {
            self.write_region(region, offset, data);
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut state = self.lock();
        self.stop_queues(&mut state);
        self.remove_short_cuts(&mut state);
    }
}

#[cfg(test)]
mod tests;
