//! Makes a machine's devices out of its description: one resolver for each kind of device, and a table of them.

mod block;
mod chipset;
mod console;
mod net;
mod serial;
mod virtio;

use std::sync::Arc;

use vireo_cpu::Engine;
use vireo_devices::{
    bus::DeviceBus,
    ioapic::Ioapic,
    pci::{PciRoot, Windows},
    power::PowerCallback,
    virtio::{console::ConsoleSize, vsock::VsockHost},
};
use vireo_memory::GuestMemory;

use self::serial::SerialReader;
use crate::{
    config::MachineConfig,
    disks::OpenDisk,
    error::MachineError,
    events::{End, Events},
    layout::{PCI_MMIO32_BYTES, PCI_MMIO32_START, PCI_MMIO64_BYTES, PCI_MMIO64_START},
};

/// Makes the devices of one kind that `Board::config` asks for and puts them on the board.
type Resolver = fn(&mut Board<'_>) -> Result<(), MachineError>;

/// In this order: the first NIC is always at the same place, whatever the number of disks, and so on.
const RESOLVERS: &[Resolver] = &[
    chipset::interrupts,
    chipset::power,
    chipset::rtc,
    chipset::pci,
    serial::com1,
    virtio::rng,
    console::console,
    virtio::vsock,
    net::nics,
    block::disks,
];

/// A machine's devices while they are put together.
pub(crate) struct Board<'a> {
    pub config: &'a MachineConfig,
    pub memory: GuestMemory,
    pub engine: Arc<dyn Engine>,
    /// Devices call it from within a guest's instruction.
    pub power: PowerCallback,
    pub bus: DeviceBus,
    pub ioapic: Arc<Ioapic>,
    pub pci: Arc<PciRoot>,
    pub disks: &'a [OpenDisk],
    pub handles: Handles,
    pub serial_input: Option<SerialReader>,
}

/// The host's ends of a machine's devices.
#[derive(Clone, Default)]
pub struct Handles {
    /// Opens and accepts vsock connections.
    pub vsock: Option<VsockHost>,
    /// Tells the guest how large the virtio console's window is.
    pub console_size: Option<ConsoleSize>,
}

/// What a machine keeps of its board.
pub(crate) struct Devices {
    // Goes before the serial port's reader, which may be waiting for room in the port.
    pub bus: Arc<DeviceBus>,
    pub handles: Handles,
    _serial_input: Option<SerialReader>,
}

pub(crate) fn build(
    config: &MachineConfig,
    disks: &[OpenDisk],
    memory: &GuestMemory,
    engine: &Arc<dyn Engine>,
    events: &Arc<Events>,
) -> Result<Devices, MachineError> {
    let mmio32 = PCI_MMIO32_START..PCI_MMIO32_START + PCI_MMIO32_BYTES;
    let mmio64 = PCI_MMIO64_START..PCI_MMIO64_START + PCI_MMIO64_BYTES;
    let mut board = Board {
        config,
        memory: memory.clone(),
        engine: engine.clone(),
        power: power_callback(events.clone()),
        bus: DeviceBus::default(),
        // First of all: on KVM the IOAPIC must have the engine's first lines.
        ioapic: Arc::new(Ioapic::new(&**engine)?),
        pci: Arc::new(PciRoot::new(Windows { mmio32, mmio64 })),
        disks,
        handles: Handles::default(),
        serial_input: None,
    };
    for resolve in RESOLVERS {
        resolve(&mut board)?;
    }
    Ok(Devices { bus: Arc::new(board.bus), handles: board.handles, _serial_input: board.serial_input })
}

fn power_callback(events: Arc<Events>) -> PowerCallback {
    use vireo_devices::power::PowerEvent;
    Arc::new(move |event| match event {
        PowerEvent::PowerOff => events.finish(End::PowerOff),
        PowerEvent::Reset => events.finish(End::Reset),
        PowerEvent::Panic => events.panicked(),
    })
}
