use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use super::{Bar, BarKind, Function};
use crate::bus::{BusError, DeviceBus, Mmio};

pub const SLOTS: u8 = 32;
const FUNCTION_CONFIG_BYTES: u64 = 4096;

/// Where BARs may be: the ranges of guest-physical addresses that lead to the PCI bus.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Below 4 GiB.
    pub mmio32: Range<u64>,
    pub mmio64: Range<u64>,
}

#[derive(Debug, thiserror::Error)]
pub enum PciError {
    #[error("PCI slot {0} does not exist or is taken")]
    BadSlot(u8),
    #[error("all 32 PCI slots are taken")]
    NoSlot,
    #[error("no room for a PCI BAR of {0:#x} bytes")]
    NoRoom(u64),
}

/// A piece of a window that a function answers.
#[derive(Clone)]
struct Mapping {
    start: u64,
    bytes: u64,
    slot: u8,
    bar: u8,
    function: Function,
}

/// PCI bus 0.
pub struct PciRoot {
    windows: Windows,
    slots: RwLock<[Option<Function>; SLOTS as usize]>,
    /// Sorted by start. Guests may let BARs overlap; one of them wins.
    map: RwLock<Vec<Mapping>>,
    /// Held while BARs are looked at and the map is changed accordingly.
    remap: Mutex<()>,
}

impl PciRoot {
    pub fn new(windows: Windows) -> Self {
        Self { windows, slots: RwLock::default(), map: RwLock::default(), remap: Mutex::default() }
    }

    /// Puts the bus where the guest finds it: ECAM at `ecam` and the two windows. Configuration by ports is
    /// [`super::ConfigPorts`].
    pub fn attach(self: &Arc<Self>, bus: &mut DeviceBus, ecam: Range<u64>) -> Result<(), BusError> {
        bus.add_mmio(ecam.start, ecam.end.saturating_sub(ecam.start), Arc::new(Ecam(self.clone())))?;
        for window in [&self.windows.mmio32, &self.windows.mmio64] {
            if !window.is_empty() {
                let shown = Window { root: self.clone(), start: window.start };
                bus.add_mmio(window.start, window.end - window.start, Arc::new(shown))?;
            }
        }
        Ok(())
    }

    pub fn free_slot(&self) -> Result<u8, PciError> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().position(Option::is_none).map(|slot| slot as u8).ok_or(PciError::NoSlot)
    }

    /// Plugs a new function in and gives an address to each of its BARs.
    pub fn add(&self, slot: u8, function: Function) -> Result<(), PciError> {
        self.plug(slot, &function)?;
        for bar in function.bars() {
            function.set_bar(bar.index, self.allocate(bar)?);
        }
        self.remap(slot, &function);
        Ok(())
    }

    /// Plugs a restored function in: its BARs are where the guest left them.
    pub fn add_restored(&self, slot: u8, function: Function) -> Result<(), PciError> {
        self.plug(slot, &function)?;
        self.remap(slot, &function);
        Ok(())
    }

    fn plug(&self, slot: u8, function: &Function) -> Result<(), PciError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        match slots.get_mut(usize::from(slot)) {
            Some(free @ None) => *free = Some(function.clone()),
            _ => return Err(PciError::BadSlot(slot)),
        }
        Ok(())
    }

    fn allocate(&self, bar: Bar) -> Result<u64, PciError> {
        let window = match bar.kind {
            BarKind::Memory64 if !self.windows.mmio64.is_empty() => &self.windows.mmio64,
            _ => &self.windows.mmio32,
        };
        let mut taken: Vec<_> = self.functions().flat_map(|(_, function)| function.bars()).collect();
        taken.sort_by_key(|other| other.address);
        let mut start = window.start.next_multiple_of(bar.bytes);
        for other in taken {
            if start < other.address.saturating_add(other.bytes) && other.address < start.saturating_add(bar.bytes) {
                start = other.address.saturating_add(other.bytes).next_multiple_of(bar.bytes);
            }
        }
        if start.checked_add(bar.bytes).is_some_and(|end| end <= window.end) {
            Ok(start)
        } else {
            Err(PciError::NoRoom(bar.bytes))
        }
    }

    fn functions(&self) -> impl Iterator<Item = (u8, Function)> + use<> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner).clone();
        (0..).zip(slots).filter_map(|(slot, function)| Some((slot, function?)))
    }

    /// Only function 0 of each slot exists.
    fn function(&self, device: u16) -> Option<Function> {
        let (slot, function) = (usize::from(device >> 3), device & 7);
        if function != 0 {
            return None;
        }
        self.slots.read().unwrap_or_else(PoisonError::into_inner).get(slot)?.clone()
    }

    /// Reads the configuration space of `device`: bus in bits 15:8, slot in 7:3, function in 2:0.
    pub fn config_read(&self, device: u16, register: u16, data: &mut [u8]) {
        match self.function(device) {
            Some(function) if in_config(register, data.len()) => function.config_read(register, data),
            _ => data.fill(0xff),
        }
    }

    pub fn config_write(&self, device: u16, register: u16, data: &[u8]) {
        let Some(function) = self.function(device).filter(|_| in_config(register, data.len())) else { return };
        function.config_write(register, data);
        // Command and BARs decide on the map.
        let end = usize::from(register) + data.len();
        if register < 0x28 && end > 0x10 || register < 0x06 && end > 0x04 {
            self.remap((device >> 3) as u8, &function);
        }
    }

    /// Brings the map in line with what the function's registers say.
    fn remap(&self, slot: u8, function: &Function) {
        let _one_at_a_time = self.remap.lock().unwrap_or_else(PoisonError::into_inner);
        let now: Vec<_> = function.bars().into_iter().map(|bar| (bar, self.effective(bar))).collect();
        let mut moved = Vec::new();
        {
            let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
            for (bar, start) in now {
                let old = map.iter().position(|m| (m.slot, m.bar) == (slot, bar.index));
                if old.map(|at| map[at].start) == start {
                    continue;
                }
                if let Some(at) = old {
                    map.remove(at);
                }
                if let Some(start) = start {
                    let (bytes, function) = (bar.bytes, function.clone());
                    map.push(Mapping { start, bytes, slot, bar: bar.index, function });
                }
                moved.push((bar.index, start));
            }
            map.sort_by_key(|mapping| mapping.start);
        }
        for (index, start) in moved {
            function.bar_moved(index, start);
        }
    }

    /// Where a BAR is reached, if it is: enabled and inside a window.
    fn effective(&self, bar: Bar) -> Option<u64> {
        let end = bar.address.checked_add(bar.bytes)?;
        let windows = [&self.windows.mmio32, &self.windows.mmio64];
        let inside = windows.iter().any(|window| window.start <= bar.address && end <= window.end);
        (bar.decoded && inside).then_some(bar.address)
    }

    fn mapping(&self, gpa: u64, len: usize) -> Option<(Function, u8, u64)> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let after = map.partition_point(|mapping| mapping.start <= gpa);
        let mapping = map[..after].last()?;
        let offset = gpa - mapping.start;
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= mapping.bytes);
        fits.then(|| (mapping.function.clone(), mapping.bar, offset))
    }
}

fn in_config(register: u16, len: usize) -> bool {
    u64::from(register) + len as u64 <= FUNCTION_CONFIG_BYTES
}

/// The configuration spaces in memory (PCI Express base 5.0, 7.2.2): 4 KiB for each function of each bus.
pub struct Ecam(Arc<PciRoot>);

impl Ecam {
    fn target(offset: u64) -> Option<(u16, u16)> {
        let device = u16::try_from(offset >> 12).ok()?;
        Some((device, (offset & (FUNCTION_CONFIG_BYTES - 1)) as u16))
    }
}

impl Mmio for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((device, register)) => self.0.config_read(device, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, register)) = Self::target(offset) {
            self.0.config_write(device, register, data);
        }
    }
}

struct Window {
    root: Arc<PciRoot>,
    start: u64,
}

impl Mmio for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.root.mapping(self.start + offset, data.len()) {
            Some((function, bar, at)) => function.bar_read(bar, at, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, bar, at)) = self.root.mapping(self.start + offset, data.len()) {
            function.bar_write(bar, at, data);
        }
    }
}
