//! Dispatch of port and memory-mapped I/O to devices.
//!
//! Devices lock themselves: accesses to different devices never wait for each other.

use std::{ops::RangeInclusive, sync::Arc};

use vireo_cpu::Bus;

/// A device behind I/O ports. `offset` counts from the first port of its range; the access lies within it.
pub trait PortIo: Send + Sync {
    fn read(&self, offset: u16, data: &mut [u8]);
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device whose ports are one byte wide each: wider accesses reach one port after the other.
pub trait BytePorts: Send + Sync {
    fn read_port(&self, offset: u16) -> u8;
    fn write_port(&self, offset: u16, value: u8);
}

impl<T: BytePorts> PortIo for T {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_port(offset + i as u16);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            self.write_port(offset + i as u16, *byte);
        }
    }
}

/// A device behind memory addresses. `offset` counts from the start of its range; the access lies within it.
pub trait Mmio: Send + Sync {
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
}

/// Learns that a level-triggered interrupt was ended.
pub trait EndOfInterrupt: Send + Sync {
    fn eoi(&self, vector: u8);
}

#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("the {kind} range {start:#x}..={end:#x} is taken already")]
    Taken { kind: &'static str, start: u64, end: u64 },
    #[error("the {kind} range {start:#x}..={end:#x} is empty")]
    Empty { kind: &'static str, start: u64, end: u64 },
}

struct Slot<D: ?Sized> {
    start: u64,
    end: u64,
    device: Arc<D>,
}

/// Disjoint ranges, sorted.
struct Ranges<D: ?Sized> {
    kind: &'static str,
    slots: Vec<Slot<D>>,
}

impl<D: ?Sized> Ranges<D> {
    fn new(kind: &'static str) -> Self {
        Self { kind, slots: Vec::new() }
    }

    fn add(&mut self, start: u64, end: u64, device: Arc<D>) -> Result<(), BusError> {
        if start > end {
            return Err(BusError::Empty { kind: self.kind, start, end });
        }
        if self.slots.iter().any(|slot| slot.start <= end && start <= slot.end) {
            return Err(BusError::Taken { kind: self.kind, start, end });
        }
        let at = self.slots.partition_point(|slot| slot.start < start);
        self.slots.insert(at, Slot { start, end, device });
        Ok(())
    }

    /// The device that has all of `address..address + len`, and the offset in it.
    #[inline]
    fn find(&self, address: u64, len: usize) -> Option<(&D, u64)> {
        let after = self.slots.partition_point(|slot| slot.start <= address);
        let slot = self.slots[..after].last()?;
        let last = address.checked_add(len as u64 - 1)?;
        (last <= slot.end).then(|| (&*slot.device, address - slot.start))
    }
}

/// The machine's buses. Built once; the guest cannot move what is on it, except PCI devices inside the PCI
/// windows, which [`crate::pci`] looks after.
pub struct DeviceBus {
    ports: Ranges<dyn PortIo>,
    mmio: Ranges<dyn Mmio>,
    eoi: Option<Arc<dyn EndOfInterrupt>>,
}

impl Default for DeviceBus {
    fn default() -> Self {
        Self { ports: Ranges::new("port"), mmio: Ranges::new("memory-mapped I/O"), eoi: None }
    }
}

impl DeviceBus {
    pub fn add_ports(&mut self, ports: RangeInclusive<u16>, device: Arc<dyn PortIo>) -> Result<(), BusError> {
        self.ports.add(u64::from(*ports.start()), u64::from(*ports.end()), device)
    }

    pub fn add_mmio(&mut self, start: u64, bytes: u64, device: Arc<dyn Mmio>) -> Result<(), BusError> {
        let end = bytes.checked_sub(1).and_then(|last| start.checked_add(last));
        let end = end.ok_or(BusError::Empty { kind: self.mmio.kind, start, end: start.wrapping_add(bytes) })?;
        self.mmio.add(start, end, device)
    }

    /// Who learns about ended interrupts.
    pub fn set_eoi(&mut self, device: Arc<dyn EndOfInterrupt>) {
        self.eoi = Some(device);
    }
}

/// An access that no device has as a whole is cut into bytes, each with its own device or none.
macro_rules! dispatch_read {
    ($ranges:expr, $address:expr, $data:expr) => {{
        let (ranges, address, data): (_, u64, &mut [u8]) = (&$ranges, $address, $data);
        if data.is_empty() {
        } else if let Some((device, offset)) = ranges.find(address, data.len()) {
            device.read(offset as _, data);
        } else {
            for (i, byte) in data.iter_mut().enumerate() {
                match ranges.find(address.wrapping_add(i as u64), 1) {
                    Some((device, offset)) => device.read(offset as _, std::slice::from_mut(byte)),
                    None => *byte = 0xff,
                }
            }
        }
    }};
}

macro_rules! dispatch_write {
    ($ranges:expr, $address:expr, $data:expr) => {{
        let (ranges, address, data): (_, u64, &[u8]) = (&$ranges, $address, $data);
        if data.is_empty() {
        } else if let Some((device, offset)) = ranges.find(address, data.len()) {
            device.write(offset as _, data);
        } else {
            for (i, byte) in data.iter().enumerate() {
                if let Some((device, offset)) = ranges.find(address.wrapping_add(i as u64), 1) {
                    device.write(offset as _, std::slice::from_ref(byte));
                }
            }
        }
    }};
}

impl Bus for DeviceBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        dispatch_read!(self.ports, u64::from(port), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        dispatch_write!(self.ports, u64::from(port), data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        dispatch_read!(self.mmio, gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        dispatch_write!(self.mmio, gpa, data);
    }

    fn eoi(&self, vector: u8) {
        if let Some(device) = &self.eoi {
            device.eoi(vector);
        }
    }
}

#[cfg(test)]
mod tests;
