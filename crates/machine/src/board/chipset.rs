//! What every machine has.

use std::sync::Arc;

use vireo_devices::{
    bus::PortIo,
    interrupt::InterruptLine,
    ioapic,
    pci::{ConfigPorts, HostBridge},
    power::{KeyboardReset, PanicPort, ResetPort, SleepPorts},
    rtc::Rtc,
};

use super::Board;
use crate::{
    error::MachineError,
    layout::{
        IOAPIC_START, PANIC_PORT, PCI_ECAM_BYTES, PCI_ECAM_START, RESET_PORT, RESET_VALUE, RTC_PIN, RTC_PORT,
        SLEEP_CONTROL_PORT, SLEEP_TYPE_S5,
    },
};

const PCI_CONFIG_PORT: u16 = 0xcf8;
const PCI_CONFIG_PORTS: u16 = 8;

pub(super) fn interrupts(board: &mut Board<'_>) -> Result<(), MachineError> {
    board.bus.add_mmio(IOAPIC_START, ioapic::MMIO_BYTES, board.ioapic.clone())?;
    board.bus.set_eoi(board.ioapic.clone());
    Ok(())
}

pub(super) fn power(board: &mut Board<'_>) -> Result<(), MachineError> {
    let power = || board.power.clone();
    let ports: [(u16, u16, Arc<dyn PortIo>); 4] = [
        (SLEEP_CONTROL_PORT, SleepPorts::COUNT, Arc::new(SleepPorts::new(SLEEP_TYPE_S5, power()))),
        (RESET_PORT, 1, Arc::new(ResetPort::new(RESET_VALUE, power()))),
        (KeyboardReset::PORT, 1, Arc::new(KeyboardReset::new(power()))),
        (PANIC_PORT, 1, Arc::new(PanicPort::new(power()))),
    ];
    for (first, count, device) in ports {
        board.bus.add_ports(first..=first + (count - 1), device)?;
    }
    Ok(())
}

pub(super) fn rtc(board: &mut Board<'_>) -> Result<(), MachineError> {
    let rtc = Rtc::new(InterruptLine::new(board.ioapic.clone(), RTC_PIN as u8));
    board.bus.add_ports(RTC_PORT..=RTC_PORT + (Rtc::PORTS - 1), Arc::new(rtc))?;
    Ok(())
}

pub(super) fn pci(board: &mut Board<'_>) -> Result<(), MachineError> {
    board.pci.attach(&mut board.bus, PCI_ECAM_START..PCI_ECAM_START + PCI_ECAM_BYTES)?;
    let ports = ConfigPorts::new(board.pci.clone(), board.power.clone());
    board.bus.add_ports(PCI_CONFIG_PORT..=PCI_CONFIG_PORT + (PCI_CONFIG_PORTS - 1), Arc::new(ports))?;
    board.pci.add(0, Arc::new(HostBridge::default()))?;
    Ok(())
}
