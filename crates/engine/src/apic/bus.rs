//! All local APICs of a machine, and who of them a message is for.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use vireo_cpu::{CpuError, MAX_VCPUS, MsiLine, MsiMessage};

use super::{
    local::LocalApic,
    timer::{Timer, TimerThread},
};
use crate::{clock::VcpuClock, signal::VcpuSignal};

/// Delivery modes (Intel SDM vol. 3, 11.6.1). SMI, reserved ones and ExtINT have no meaning here and are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    Fixed,
    Lowest,
    Nmi,
    Init,
    StartUp,
}

impl Delivery {
    /// By the three bits in the ICR or in a message's data.
    pub fn of_mode(mode: u32) -> Option<Self> {
        Some(match mode {
            0 => Self::Fixed,
            1 => Self::Lowest,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    All,
    AllBut(u32),
    Physical(u32),
    Logical(u32),
}

/// A message on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub destination: Destination,
    pub delivery: Delivery,
    pub vector: u8,
    pub level: bool,
    /// A vCPU's word to others.
    pub between_vcpus: bool,
}

impl Message {
    /// What a device's write means (11.11); `None` where it is no interrupt.
    pub fn of_msi(msi: MsiMessage) -> Option<Self> {
        if msi.address >> 20 != 0xfee {
            return None;
        }
        let id = (msi.address >> 12 & 0xff) as u32;
        let (redirect, logical) = (msi.address & 8 != 0, msi.address & 4 != 0);
        let mode = Delivery::of_mode(msi.data >> 8 & 7)?;
        // Start-up messages come from processors only.
        if mode == Delivery::StartUp {
            return None;
        }
        let delivery = if redirect && logical && mode == Delivery::Fixed { Delivery::Lowest } else { mode };
        let destination = match (id, logical) {
            (0xff, _) => Destination::All,
            (id, true) => Destination::Logical(id),
            (id, false) => Destination::Physical(id),
        };
        Some(Self {
            destination,
            delivery,
            vector: msi.data as u8,
            level: msi.data & 1 << 15 != 0,
            between_vcpus: false,
        })
    }
}

impl LocalApic {
    fn take(&self, message: Message) {
        if message.between_vcpus {
            self.signal.called();
        }
        match message.delivery {
            Delivery::Fixed | Delivery::Lowest => self.deliver(message.vector, message.level),
            Delivery::Nmi => self.deliver_nmi(),
            Delivery::Init => self.deliver_init(),
            Delivery::StartUp => self.deliver_sipi(message.vector),
        }
    }

    fn is_for(&self, destination: Destination) -> bool {
        match destination {
            Destination::All => true,
            Destination::AllBut(id) => self.id != id,
            Destination::Physical(id) => self.id == id,
            Destination::Logical(set) if self.x2apic() => {
                let ldr = self.ldr.load(Ordering::Relaxed);
                ldr >> 16 == set >> 16 && ldr & set & 0xffff != 0
            }
            Destination::Logical(set) => {
                let ldr = self.ldr.load(Ordering::Relaxed) >> 24;
                if self.dfr.load(Ordering::Relaxed) >> 28 == 0xf {
                    return ldr & set & 0xff != 0;
                }
                // cluster model: an address in the high four bits, a set in the low
                (set >> 4 & 0xf == 0xf || ldr >> 4 == set >> 4 & 0xf) && ldr & set & 0xf != 0
            }
        }
    }
}

/// All local APICs of one machine.
#[derive(Debug)]
pub struct ApicBus {
    slots: [OnceLock<Arc<LocalApic>>; MAX_VCPUS as usize],
    /// Bit n: slot n is taken.
    present: AtomicU64,
    timers: TimerThread,
}

const _: () = assert!(MAX_VCPUS <= u64::BITS);

impl ApicBus {
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            slots: [const { OnceLock::new() }; MAX_VCPUS as usize],
            present: AtomicU64::new(0),
            timers: TimerThread::start()?,
        }))
    }

    /// Makes the local APIC of vCPU `id`; APIC 0 is the boot processor's.
    pub fn add(
        self: &Arc<Self>,
        id: u32,
        signal: Arc<VcpuSignal>,
        clock: Arc<VcpuClock>,
    ) -> Result<Arc<LocalApic>, CpuError> {
        let too_many = CpuError::TooManyVcpus { engine: "soft", asked: id.saturating_add(1), most: MAX_VCPUS };
        let Some(slot) = self.slots.get(id as usize) else {
            return Err(too_many);
        };
        let timer = Timer::new(signal.clone(), clock);
        let timer = timer.map_err(|source| CpuError::Host { what: "creating a timer", source })?;
        let apic = Arc::new(LocalApic::new(id, signal, Arc::downgrade(self), timer.clone()));
        slot.set(apic.clone()).map_err(|_| CpuError::BadState(format!("there is already a vCPU {id}")))?;
        self.timers.watch(&timer).map_err(|source| CpuError::Host { what: "watching a timer", source })?;
        self.present.fetch_or(1 << id, Ordering::SeqCst);
        Ok(apic)
    }

    pub fn get(&self, id: u32) -> Option<&Arc<LocalApic>> {
        self.slots.get(id as usize)?.get()
    }

    fn targets(&self, destination: Destination) -> impl Iterator<Item = &Arc<LocalApic>> {
        let present = self.present.load(Ordering::SeqCst);
        (0..MAX_VCPUS)
            .filter(move |id| present & 1 << id != 0)
            .filter_map(|id| self.get(id))
            .filter(move |apic| apic.is_for(destination))
    }

    /// Brings a message to all whom it is for.
    pub fn send(&self, message: Message) {
        if let (Destination::Physical(id), Delivery::Fixed) = (message.destination, message.delivery) {
            if let Some(apic) = self.get(id) {
                apic.take(message);
            }
            return;
        }
        if message.delivery == Delivery::Lowest {
            if let Some(apic) = self.lowest(message) {
                apic.take(message);
            }
            return;
        }
        self.targets(message.destination).for_each(|apic| apic.take(message));
    }

    /// Arbitration of lowest priority (11.6.2.4): the processor with the lowest priority; among equals the vector
    /// decides, so that one source keeps to one processor and different sources spread.
    fn lowest(&self, message: Message) -> Option<&Arc<LocalApic>> {
        let able = || self.targets(message.destination).filter(|apic| apic.software_enabled());
        let class = able().map(|apic| apic.ppr() >> 4).min()?;
        let equals = || able().filter(|apic| apic.ppr() >> 4 <= class);
        let count = equals().count();
        // Priorities change while we look: fall back to the first.
        equals().nth(usize::from(message.vector) % count.max(1)).or_else(|| able().next())
    }

    /// Delivers a message-signalled interrupt.
    pub fn deliver_msi(&self, msi: MsiMessage) {
        if let Some(message) = Message::of_msi(msi) {
            self.send(message);
        }
    }

    /// A source of message-signalled interrupts on this bus.
    pub fn msi_line(self: &Arc<Self>) -> Arc<dyn MsiLine> {
        Arc::new(Line { bus: self.clone(), message: AtomicU64::new(Line::MASKED) })
    }
}

/// An [`MsiLine`] that delivers at once, in the caller's thread.
struct Line {
    bus: Arc<ApicBus>,
    /// Low 32 bits of the address, then the data.
    message: AtomicU64,
}

impl Line {
    /// No interrupt has address 0.
    const MASKED: u64 = 0;
}

impl MsiLine for Line {
    fn set(&self, message: Option<MsiMessage>) {
        let packed = match message {
            Some(MsiMessage { address, data }) if address >> 32 == 0 => address << 32 | u64::from(data),
            _ => Self::MASKED,
        };
        self.message.store(packed, Ordering::Release);
    }

    fn trigger(&self) {
        let packed = self.message.load(Ordering::Acquire);
        self.bus.deliver_msi(MsiMessage { address: packed >> 32, data: packed as u32 });
    }
}
