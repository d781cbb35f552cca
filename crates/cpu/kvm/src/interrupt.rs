//! Message-signalled interrupts: each line is an eventfd that KVM reads (irqfd), routed by a GSI of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_msi};
use kvm_ioctls::VmFd;
use vireo_cpu::{CpuError, MsiLine, MsiMessage};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::Vm;

/// GSIs below this are the pins of the IOAPIC: only for these does KVM tell us of the end of a
/// level-triggered interrupt.
pub(crate) const IOAPIC_PINS: u32 = 24;

/// Trigger mode bit of an MSI's data (Intel SDM vol. 3, 11.11.2).
const LEVEL_TRIGGERED: u32 = 1 << 15;

/// The GSI routing table of one VM.
pub(crate) struct Routes(Mutex<Table>);

struct Table {
    messages: BTreeMap<u32, MsiMessage>,
    free_pins: BTreeSet<u32>,
    free_others: BTreeSet<u32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Routes {
    /// `routes` as KVM_CAP_IRQ_ROUTING tells them.
    pub fn new(routes: i32) -> Self {
        let end = (routes.max(0) as u32).clamp(IOAPIC_PINS, 4096);
        Self(Mutex::new(Table {
            messages: BTreeMap::new(),
            free_pins: (0..IOAPIC_PINS).collect(),
            free_others: (IOAPIC_PINS..end).collect(),
        }))
    }

    fn take(&self, level: bool) -> Option<u32> {
        let mut table = lock(&self.0);
        if level { table.free_pins.pop_first() } else { table.free_others.pop_first() }
    }

    fn give_back(&self, gsi: u32) {
        let mut table = lock(&self.0);
        if gsi < IOAPIC_PINS {
            table.free_pins.insert(gsi)
        } else {
            table.free_others.insert(gsi)
        };
    }

    /// Routes `gsi` to `message` or nowhere. `false` where the kernel refuses the table.
    fn route(&self, fd: &VmFd, gsi: u32, message: Option<MsiMessage>) -> bool {
        let mut table = lock(&self.0);
        let before = match message {
            Some(message) => table.messages.insert(gsi, message),
            None => table.messages.remove(&gsi),
        };
        if before == message {
            return true;
        }
        let entries: Vec<_> = table.messages.iter().map(|(gsi, message)| entry(*gsi, *message)).collect();
        let done = KvmIrqRouting::from_entries(&entries).is_ok_and(|routing| fd.set_gsi_routing(&routing).is_ok());
        if !done {
            match before {
                Some(before) => table.messages.insert(gsi, before),
                None => table.messages.remove(&gsi),
            };
        }
        done
    }
}

fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// Delivers one message. A message that no local APIC takes is lost, as on the wire.
pub(crate) fn signal_msi(fd: &VmFd, message: MsiMessage) {
    let _ = fd.signal_msi(kvm_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    });
}

/// One interrupt source. It takes a GSI when it is first unmasked: among the IOAPIC's pins if its message is
/// level-triggered, else above them.
pub(crate) struct Line {
    vm: Arc<Vm>,
    event: EventFd,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    message: Option<MsiMessage>,
    gsi: Option<u32>,
    /// Whether the kernel has the route. If not (no GSI left), each trigger is an ioctl of its own.
    routed: bool,
}

impl Line {
    pub fn new(vm: Arc<Vm>) -> Result<Self, CpuError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| CpuError::Host { what: "making an eventfd for an interrupt line", source })?;
        Ok(Self { vm, event, now: Mutex::default() })
    }

    fn attach(&self, level: bool) -> Option<u32> {
        let gsi = self.vm.routes.take(level)?;
        if self.vm.fd.register_irqfd(&self.event, gsi).is_err() {
            self.vm.routes.give_back(gsi);
            return None;
        }
        Some(gsi)
    }

    fn detach(&self, gsi: u32) {
        let _ = self.vm.fd.unregister_irqfd(&self.event, gsi);
        self.vm.routes.route(&self.vm.fd, gsi, None);
        self.vm.routes.give_back(gsi);
    }
}

impl MsiLine for Line {
    fn set(&self, message: Option<MsiMessage>) {
        let mut now = lock(&self.now);
        now.message = message;
        if let Some(message) = message {
            let level = message.data & LEVEL_TRIGGERED != 0;
            if let Some(gsi) = now.gsi.take_if(|gsi| (*gsi < IOAPIC_PINS) != level) {
                self.detach(gsi);
            }
            now.gsi = now.gsi.or_else(|| self.attach(level));
        }
        now.routed = now.gsi.is_some_and(|gsi| self.vm.routes.route(&self.vm.fd, gsi, message));
    }

    fn trigger(&self) {
        let now = lock(&self.now);
        match now.message {
            Some(_) if now.routed => {
                let _ = self.event.write(1);
            }
            Some(message) => signal_msi(&self.vm.fd, message),
            None => {}
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let gsi = lock(&self.now).gsi.take();
        if let Some(gsi) = gsi {
            self.detach(gsi);
        }
    }
}
