//! One local APIC: what is requested, what is in service, and which comes next.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use super::{bus::ApicBus, registers::offset, timer::Timer};
use crate::signal::{VcpuSignal, request};

/// Bits of IA32_APIC_BASE (Intel SDM vol. 3, figure 11-26).
pub(super) mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const EN: u64 = 1 << 11;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    pub const DEFAULT: u64 = 0xfee0_0000;
}

/// Bits of the error status register (Intel SDM vol. 3, 11.5.3).
pub(super) mod error {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

pub(super) const LVT_MASKED: u32 = 1 << 16;
pub(super) const SVR_ENABLED: u32 = 1 << 8;

/// The local vector table, in the order of the registers at 0x320 to 0x370.
pub(super) mod lvt {
    pub const TIMER: usize = 0;
    pub const ERROR: usize = 5;
    pub const COUNT: usize = 6;
}

/// 256 vectors as the eight 32-bit registers that ISR, TMR and IRR are.
pub(super) type Bitmap = [AtomicU32; 8];

fn highest(map: &Bitmap, words: u32) -> Option<u8> {
    let mut left = words;
    while left != 0 {
        let word = 31 - left.leading_zeros();
        let bits = map[word as usize].load(Ordering::SeqCst);
        if bits != 0 {
            return Some((word * 32 + 31 - bits.leading_zeros()) as u8);
        }
        left &= !(1 << word);
    }
    None
}

fn bit(vector: u8) -> (usize, u32) {
    (usize::from(vector >> 5), 1 << (vector & 31))
}

/// The local APIC of one vCPU.
#[derive(Debug)]
pub struct LocalApic {
    pub(super) id: u32,
    pub(super) signal: Arc<VcpuSignal>,
    pub(super) bus: Weak<ApicBus>,
    pub(super) timer: Arc<Timer>,
    pub(super) base: AtomicU64,
    pub(super) irr: Bitmap,
    /// Which words of the IRR may have a bit: one load says that nothing is requested.
    irr_words: AtomicU32,
    pub(super) isr: Bitmap,
    pub(super) tmr: Bitmap,
    /// Processor priority, kept up to date by the owner; other vCPUs read it for arbitration.
    ppr: AtomicU32,
    pub(super) tpr: AtomicU32,
    pub(super) svr: AtomicU32,
    pub(super) ldr: AtomicU32,
    pub(super) dfr: AtomicU32,
    pub(super) esr: AtomicU32,
    /// Errors since the ESR was last written.
    errors: AtomicU32,
    pub(super) icr: AtomicU64,
    pub(super) lvt: [AtomicU32; lvt::COUNT],
}

impl LocalApic {
    pub(super) fn new(id: u32, signal: Arc<VcpuSignal>, bus: Weak<ApicBus>, timer: Arc<Timer>) -> Self {
        let bsp = if id == 0 { base::BSP } else { 0 };
        let apic = Self {
            id,
            signal,
            bus,
            timer,
            base: AtomicU64::new(base::DEFAULT | base::EN | bsp),
            irr: Default::default(),
            irr_words: AtomicU32::new(0),
            isr: Default::default(),
            tmr: Default::default(),
            ppr: AtomicU32::new(0),
            tpr: AtomicU32::new(0),
            svr: AtomicU32::new(0),
            ldr: AtomicU32::new(0),
            dfr: AtomicU32::new(0),
            esr: AtomicU32::new(0),
            errors: AtomicU32::new(0),
            icr: AtomicU64::new(0),
            lvt: Default::default(),
        };
        apic.reset_registers();
        apic
    }

    /// The APIC id: the vCPU's index.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// IA32_APIC_BASE says that there is an APIC (else no interrupt but those of the processor itself arrives).
    pub fn enabled(&self) -> bool {
        self.base.load(Ordering::Relaxed) & base::EN != 0
    }

    pub fn x2apic(&self) -> bool {
        self.base.load(Ordering::Relaxed) & (base::EN | base::EXTD) == base::EN | base::EXTD
    }

    /// Guest-physical address of the 4 KiB register page; `None` while disabled or in x2APIC mode.
    pub fn mmio_base(&self) -> Option<u64> {
        let value = self.base.load(Ordering::Relaxed);
        (value & (base::EN | base::EXTD) == base::EN).then_some(value & base::ADDRESS)
    }

    /// The guest enabled the APIC in the spurious-interrupt vector register, and it is there.
    #[inline]
    pub fn software_enabled(&self) -> bool {
        self.svr.load(Ordering::Relaxed) & SVR_ENABLED != 0 && self.enabled()
    }

    /// Requests a fixed interrupt, from any thread. Lost while the APIC is disabled (11.4.7.2).
    pub fn deliver(&self, vector: u8, level: bool) {
        if !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.raise_error(error::RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        let (word, mask) = bit(vector);
        // The trigger mode must be there before the request that it belongs to.
        if level {
            self.tmr[word].fetch_or(mask, Ordering::SeqCst);
        } else if self.tmr[word].load(Ordering::Relaxed) & mask != 0 {
            self.tmr[word].fetch_and(!mask, Ordering::SeqCst);
        }
        self.irr[word].fetch_or(mask, Ordering::SeqCst);
        self.irr_words.fetch_or(1 << word, Ordering::SeqCst);
        self.signal.raise(request::INTERRUPT);
    }

    pub(super) fn deliver_nmi(&self) {
        if self.enabled() {
            self.signal.raise(request::NMI);
        }
    }

    pub(super) fn deliver_init(&self) {
        if self.enabled() {
            self.signal.raise(request::INIT);
        }
    }

    pub(super) fn deliver_sipi(&self, vector: u8) {
        if self.enabled() {
            self.signal.sipi_vector.store(vector.into(), Ordering::SeqCst);
            self.signal.raise(request::SIPI);
        }
    }

    /// The highest requested vector that outranks the processor's priority. Look here when
    /// [`request::INTERRUPT`] was raised and whenever the guest lets interrupts in again; nothing to do is one load.
    #[inline(always)]
    pub fn pending(&self) -> Option<u8> {
        let words = self.irr_words.load(Ordering::SeqCst);
        if words == 0 { None } else { self.pending_in(words) }
    }

    /// A word that is 0 where no interrupt is requested.
    pub fn word(&self) -> *const AtomicU32 {
        &raw const self.irr_words
    }

    #[cold]
    fn pending_in(&self, words: u32) -> Option<u8> {
        let vector = highest(&self.irr, words)?;
        let outranks = u32::from(vector & 0xf0) > self.ppr.load(Ordering::Relaxed) & 0xf0;
        (outranks && self.software_enabled()).then_some(vector)
    }

    /// Acknowledges the interrupt that [`Self::pending`] shows: it is in service from now on.
    pub fn accept(&self) -> Option<u8> {
        let vector = self.pending()?;
        let (word, mask) = bit(vector);
        self.isr[word].fetch_or(mask, Ordering::Relaxed);
        if self.irr[word].fetch_and(!mask, Ordering::SeqCst) & !mask == 0 {
            self.irr_words.fetch_and(!(1 << word), Ordering::SeqCst);
            // Another one may have come between the two.
            if self.irr[word].load(Ordering::SeqCst) != 0 {
                self.irr_words.fetch_or(1 << word, Ordering::SeqCst);
            }
        }
        self.update_ppr();
        Some(vector)
    }

    /// Ends the highest interrupt in service. Returns its vector if it was level-triggered: the caller then tells
    /// the IOAPIC (`Bus::eoi`).
    #[must_use = "a level-triggered interrupt's end must reach the IOAPIC"]
    pub fn eoi(&self) -> Option<u8> {
        let vector = highest(&self.isr, 0xff)?;
        let (word, mask) = bit(vector);
        self.isr[word].fetch_and(!mask, Ordering::Relaxed);
        self.update_ppr();
        self.raise_if_pending();
        (self.tmr[word].load(Ordering::SeqCst) & mask != 0).then_some(vector)
    }

    pub fn tpr(&self) -> u8 {
        self.tpr.load(Ordering::Relaxed) as u8
    }

    pub fn set_tpr(&self, value: u8) {
        self.tpr.store(value.into(), Ordering::Relaxed);
        self.update_ppr();
        self.raise_if_pending();
    }

    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr() >> 4)
    }

    /// `value` above 15 is the caller's #GP.
    pub fn set_cr8(&self, value: u64) {
        self.set_tpr(((value & 15) << 4) as u8);
    }

    pub fn ppr(&self) -> u8 {
        self.ppr.load(Ordering::Relaxed) as u8
    }

    /// Task priority or the class of what is in service, whichever is higher (11.8.3.1).
    pub(super) fn update_ppr(&self) {
        let tpr = self.tpr.load(Ordering::Relaxed);
        let serving = highest(&self.isr, 0xff).map_or(0, u32::from);
        let ppr = if tpr & 0xf0 >= serving & 0xf0 { tpr } else { serving & 0xf0 };
        self.ppr.store(ppr, Ordering::Relaxed);
    }

    /// Whoever lowered the priority has the run loop look again.
    pub(super) fn raise_if_pending(&self) {
        if self.pending().is_some() {
            self.signal.raise(request::INTERRUPT);
        }
    }

    /// After restoring the IRR: which words have bits.
    pub(super) fn update_irr_words(&self) {
        let words = (0..8).filter(|w| self.irr[*w].load(Ordering::SeqCst) != 0).fold(0, |all, w| all | 1 << w);
        self.irr_words.store(words, Ordering::SeqCst);
    }

    /// Delivers what a local vector table entry says (fixed mode; the others have no source here).
    pub(super) fn deliver_local(&self, entry: usize) {
        let value = self.lvt[entry].load(Ordering::Relaxed);
        if value & LVT_MASKED == 0 {
            self.deliver(value as u8, false);
        }
    }

    /// Notes an error and, where the guest wants to know, interrupts it.
    pub(super) fn raise_error(&self, error: u32) {
        let before = self.errors.fetch_or(error, Ordering::SeqCst);
        // An illegal vector in the error entry itself must not recurse.
        let entry = self.lvt[lvt::ERROR].load(Ordering::Relaxed);
        if before & error == 0 && entry & LVT_MASKED == 0 && entry as u8 >= 16 {
            self.deliver(entry as u8, false);
        }
    }

    /// Writing the ESR shows the errors since the last write (11.5.3).
    pub(super) fn latch_errors(&self) {
        self.esr.store(self.errors.swap(0, Ordering::SeqCst), Ordering::Relaxed);
    }

    /// The registers after power-up, INIT, or enabling from disabled; identity and base stay (11.4.7.1, 11.4.7.3).
    pub(super) fn reset_registers(&self) {
        self.timer.stop();
        self.timer.set_initial_count(0);
        self.timer.set_divide(0);
        for map in [&self.irr, &self.isr, &self.tmr] {
            map.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        }
        self.irr_words.store(0, Ordering::SeqCst);
        for register in [&self.ppr, &self.tpr, &self.esr, &self.errors] {
            register.store(0, Ordering::Relaxed);
        }
        self.icr.store(0, Ordering::Relaxed);
        self.lvt.iter().for_each(|entry| entry.store(LVT_MASKED, Ordering::Relaxed));
        self.svr.store(0xff, Ordering::Relaxed);
        self.dfr.store(u32::MAX, Ordering::Relaxed);
        self.ldr.store(if self.x2apic() { self.x2apic_ldr() } else { 0 }, Ordering::Relaxed);
    }

    /// INIT arrived: the registers are reset, mode and base stay.
    pub fn init_reset(&self) {
        self.reset_registers();
    }

    /// Cluster and bit are fixed by the id (11.12.10.2).
    pub(super) fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    /// The ID register: the id in the top byte, or all of it in x2APIC mode.
    pub(super) fn id_register(&self) -> u32 {
        if self.x2apic() { self.id } else { self.id << 24 }
    }

    /// Words of a bitmap register by its offset.
    pub(super) fn bitmap(&self, at: u32) -> Option<&AtomicU32> {
        let word = ((at & 0x70) >> 4) as usize;
        match at & !0x70 {
            offset::ISR => Some(&self.isr[word]),
            offset::TMR => Some(&self.tmr[word]),
            offset::IRR => Some(&self.irr[word]),
            _ => None,
        }
    }
}
