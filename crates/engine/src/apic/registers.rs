//! Registers, by their offset in the xAPIC page and by x2APIC MSR.

use std::sync::atomic::Ordering;

use super::{
    bus::{Delivery, Destination, Message},
    local::{LVT_MASKED, LocalApic, SVR_ENABLED, base, error, lvt},
};
use crate::{cpuid::PHYSICAL_ADDRESS_BITS, msr::MsrFault};

pub const MSR_APIC_BASE: u32 = 0x1b;
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;

/// Whether [`LocalApic::msr_read`] and [`LocalApic::msr_write`] are in charge.
pub fn is_apic_msr(index: u32) -> bool {
    index == MSR_APIC_BASE || index == MSR_TSC_DEADLINE || MSR_X2APIC.contains(&index)
}

/// Offsets of registers (Intel SDM vol. 3, table 11-1).
pub(super) mod offset {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const RRD: u32 = 0xc0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT: u32 = 0x320;
    pub const LVT_LAST: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Version 0x14 (an integrated APIC), six LVT entries, no suppression of EOI broadcasts.
pub(super) const VERSION: u32 = 0x14 | (lvt::COUNT as u32 - 1) << 16;

/// What can be written in each LVT entry, in register order: timer, thermal, performance, LINT0, LINT1, error.
const LVT_WRITABLE: [u32; lvt::COUNT] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Delivery status and remote IRR: read-only, ignored on writes.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

const SVR_WRITABLE: u32 = 0x3ff;
const ICR_WRITABLE: u32 = 0x000c_cfff;
const ICR_STATUS: u32 = 1 << 12;
const ICR_X2APIC_RESERVED: u64 = 0xfff3_2000;

impl LocalApic {
    /// Reads a 32-bit register of the xAPIC page; `offset` is 0 to 0xfff.
    pub fn mmio_read(&self, offset: u32) -> u32 {
        if self.x2apic() || offset & 15 != 0 {
            return u32::MAX;
        }
        if offset == offset::ICR_HIGH {
            return (self.icr.load(Ordering::Relaxed) >> 32) as u32;
        }
        self.read(offset).unwrap_or_else(|| {
            self.raise_error(error::ILLEGAL_REGISTER);
            0
        })
    }

    /// Writes a 32-bit register of the xAPIC page. Returns the vector to pass to `Bus::eoi`, if any.
    #[must_use = "a level-triggered interrupt's end must reach the IOAPIC"]
    pub fn mmio_write(&self, offset: u32, value: u32) -> Option<u8> {
        if self.x2apic() || offset & 15 != 0 {
            return None;
        }
        match offset {
            offset::EOI => return self.eoi(),
            offset::LDR => self.ldr.store(value & 0xff00_0000, Ordering::Relaxed),
            offset::DFR => self.dfr.store(value | 0x0fff_ffff, Ordering::Relaxed),
            offset::ICR => {
                let high = self.icr.load(Ordering::Relaxed) & !0xffff_ffff;
                let icr = high | u64::from(value & ICR_WRITABLE & !ICR_STATUS);
                self.icr.store(icr, Ordering::Relaxed);
                self.send_ipi(icr as u32, (icr >> 56) as u32, 0xff);
            }
            offset::ICR_HIGH => {
                let low = self.icr.load(Ordering::Relaxed) & 0xffff_ffff;
                self.icr.store(u64::from(value & 0xff00_0000) << 32 | low, Ordering::Relaxed);
            }
            // read-only registers swallow writes; the id is one of them on processors with x2APIC
            offset::ID | offset::VERSION | offset::APR | offset::PPR | offset::RRD | offset::CURRENT_COUNT => {}
            _ if self.bitmap(offset).is_some() => {}
            _ if self.write(offset, value) => {}
            _ => self.raise_error(error::ILLEGAL_REGISTER),
        }
        None
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    pub fn msr_read(&self, index: u32) -> Result<u64, MsrFault> {
        match index {
            MSR_APIC_BASE => return Ok(self.base.load(Ordering::Relaxed)),
            MSR_TSC_DEADLINE => return Ok(self.timer.deadline()),
            _ => {}
        }
        let at = self.x2apic_offset(index)?;
        match at {
            offset::ICR => Ok(self.icr.load(Ordering::Relaxed)),
            offset::EOI | offset::SELF_IPI | offset::ICR_HIGH | offset::DFR | offset::APR | offset::RRD => {
                Err(MsrFault)
            }
            _ => self.read(at).map(u64::from).ok_or(MsrFault),
        }
    }

    /// Writes one of them. `Ok` carries the vector to pass to `Bus::eoi`, if any.
    pub fn msr_write(&self, index: u32, value: u64) -> Result<Option<u8>, MsrFault> {
        match index {
            MSR_APIC_BASE => return self.write_base(value).map(|()| None),
            MSR_TSC_DEADLINE => {
                self.timer.set_deadline(value);
                return Ok(None);
            }
            _ => {}
        }
        let at = self.x2apic_offset(index)?;
        if at == offset::ICR {
            return self.write_x2apic_icr(value).map(|()| None);
        }
        let value = u32::try_from(value).map_err(|_| MsrFault)?;
        match at {
            offset::EOI if value == 0 => return Ok(self.eoi()),
            offset::SELF_IPI if value <= 0xff => self.self_ipi(value as u8),
            offset::TPR if value <= 0xff => self.set_tpr(value as u8),
            offset::ESR if value == 0 => self.latch_errors(),
            offset::SVR if value & !SVR_WRITABLE == 0 => self.write_svr(value),
            offset::DIVIDE if value & !0xb == 0 => self.timer.set_divide(value),
            offset::INITIAL_COUNT => self.timer.start_count(value),
            offset::LVT..=offset::LVT_LAST => {
                let entry = ((at - offset::LVT) >> 4) as usize;
                if value & !(LVT_WRITABLE[entry] | LVT_READ_ONLY) != 0 {
                    return Err(MsrFault);
                }
                self.write_lvt(entry, value);
            }
            _ => return Err(MsrFault),
        }
        Ok(None)
    }

    /// Offset of an x2APIC register; #GP outside x2APIC mode (11.12.1.2).
    fn x2apic_offset(&self, index: u32) -> Result<u32, MsrFault> {
        if !self.x2apic() || !MSR_X2APIC.contains(&index) || index > 0x83f {
            return Err(MsrFault);
        }
        Ok((index - MSR_X2APIC.start()) << 4)
    }

    /// Registers that read the same in both modes; `None` where there is none.
    fn read(&self, at: u32) -> Option<u32> {
        if let Some(word) = self.bitmap(at) {
            return Some(word.load(Ordering::SeqCst));
        }
        Some(match at {
            offset::ID => self.id_register(),
            offset::VERSION => VERSION,
            offset::TPR => self.tpr.load(Ordering::Relaxed),
            offset::APR | offset::RRD | offset::EOI => 0,
            offset::PPR => self.ppr().into(),
            offset::LDR => self.ldr.load(Ordering::Relaxed),
            offset::DFR => self.dfr.load(Ordering::Relaxed),
            offset::SVR => self.svr.load(Ordering::Relaxed),
            offset::ESR => self.esr.load(Ordering::Relaxed),
            offset::ICR => self.icr.load(Ordering::Relaxed) as u32,
            offset::LVT..=offset::LVT_LAST if at & 15 == 0 => {
                self.lvt[((at - offset::LVT) >> 4) as usize].load(Ordering::Relaxed)
            }
            offset::INITIAL_COUNT => self.timer.initial_count(),
            offset::CURRENT_COUNT => self.timer.current_count(),
            offset::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Registers that are written in xAPIC mode without further ado; whether there is one.
    fn write(&self, at: u32, value: u32) -> bool {
        match at {
            offset::TPR => self.set_tpr(value as u8),
            offset::SVR => self.write_svr(value & SVR_WRITABLE),
            offset::ESR => self.latch_errors(),
            offset::LVT..=offset::LVT_LAST => self.write_lvt(((at - offset::LVT) >> 4) as usize, value),
            offset::INITIAL_COUNT => self.timer.start_count(value),
            offset::DIVIDE => self.timer.set_divide(value & 0xb),
            _ => return false,
        }
        true
    }

    /// Disabling by software masks the local vector table (11.4.7.2).
    fn write_svr(&self, value: u32) {
        self.svr.store(value, Ordering::Relaxed);
        if value & SVR_ENABLED == 0 {
            self.lvt.iter().for_each(|entry| {
                entry.fetch_or(LVT_MASKED, Ordering::Relaxed);
            });
        }
        self.raise_if_pending();
    }

    fn write_lvt(&self, entry: usize, value: u32) {
        let mut value = value & LVT_WRITABLE[entry];
        if self.svr.load(Ordering::Relaxed) & SVR_ENABLED == 0 {
            value |= LVT_MASKED;
        }
        if entry == lvt::TIMER {
            // A count that ran out until now did so under the entry as it was: masked, perhaps.
            self.timer_due();
        }
        self.lvt[entry].store(value, Ordering::Relaxed);
        if entry == lvt::TIMER {
            self.timer.set_mode(value >> 17 & 3);
        }
    }

    fn write_x2apic_icr(&self, value: u64) -> Result<(), MsrFault> {
        if value & ICR_X2APIC_RESERVED != 0 {
            return Err(MsrFault);
        }
        self.icr.store(value & !u64::from(ICR_STATUS), Ordering::Relaxed);
        self.send_ipi(value as u32, (value >> 32) as u32, u32::MAX);
        Ok(())
    }

    fn self_ipi(&self, vector: u8) {
        if vector < 16 {
            self.raise_error(error::SEND_ILLEGAL_VECTOR);
        }
        self.deliver(vector, false);
    }

    /// Sends what the interrupt command register says (11.6.1).
    fn send_ipi(&self, icr: u32, id: u32, broadcast: u32) {
        let vector = icr as u8;
        let Some(delivery) = Delivery::of_mode(icr >> 8 & 7) else {
            return;
        };
        if matches!(delivery, Delivery::Fixed | Delivery::Lowest) && vector < 16 {
            self.raise_error(error::SEND_ILLEGAL_VECTOR);
            return;
        }
        let (assert, level) = (icr & 1 << 14 != 0, icr & 1 << 15 != 0);
        // INIT level de-assert: an order to long-gone APICs, ignored since the Pentium 4.
        if delivery == Delivery::Init && level && !assert {
            return;
        }
        let destination = match icr >> 18 & 3 {
            1 => {
                if delivery == Delivery::Fixed {
                    self.deliver(vector, false);
                }
                return;
            }
            2 => Destination::All,
            3 => Destination::AllBut(self.id),
            _ if id == broadcast => Destination::All,
            _ if icr & 1 << 11 != 0 => Destination::Logical(id),
            _ => Destination::Physical(id),
        };
        // The trigger mode counts for INIT only: IPIs are always edges.
        if let Some(bus) = self.bus.upgrade() {
            bus.send(Message { destination, delivery, vector, level: false, between_vcpus: true });
        }
    }

    /// Writes IA32_APIC_BASE: only the transitions of figure 11-27 are allowed.
    fn write_base(&self, value: u64) -> Result<(), MsrFault> {
        let reserved = !(base::BSP | base::EXTD | base::EN | (((1 << PHYSICAL_ADDRESS_BITS) - 1) & base::ADDRESS));
        let mode = |value: u64| (value & base::EN != 0, value & base::EXTD != 0);
        let (old, new) = (mode(self.base.load(Ordering::Relaxed)), mode(value));
        const DISABLED: (bool, bool) = (false, false);
        const XAPIC: (bool, bool) = (true, false);
        const X2APIC: (bool, bool) = (true, true);
        let allowed = match new {
            DISABLED => true,
            XAPIC => old != X2APIC,
            X2APIC => old != DISABLED,
            _ => false,
        };
        if value & reserved != 0 || !allowed {
            return Err(MsrFault);
        }
        self.base.store(value, Ordering::Relaxed);
        match (old, new) {
            (XAPIC, X2APIC) => {
                self.icr.store(self.icr.load(Ordering::Relaxed) & 0xffff_ffff, Ordering::Relaxed);
                self.ldr.store(self.x2apic_ldr(), Ordering::Relaxed);
            }
            (DISABLED, XAPIC) | (XAPIC | X2APIC, DISABLED) => self.reset_registers(),
            _ => {}
        }
        Ok(())
    }
}
