//! Saving and restoring a local APIC in KVM's register page.

use std::sync::atomic::Ordering;

use vireo_cpu::{ApicState, CpuError};

use super::{
    local::{LocalApic, base},
    registers::{VERSION, offset},
    timer::TimerState,
};

/// Length of the page as `KVM_GET_LAPIC` gives it.
const PAGE_BYTES: usize = 0x400;

struct Page(Vec<u8>);

impl Page {
    fn get(&self, at: u32) -> u32 {
        let at = at as usize;
        self.0.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    fn set(&mut self, at: u32, value: u32) {
        let at = at as usize;
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

impl LocalApic {
    /// Registers that are kept as they are.
    fn plain(&self) -> [(u32, &std::sync::atomic::AtomicU32); 5] {
        [
            (offset::TPR, &self.tpr),
            (offset::LDR, &self.ldr),
            (offset::DFR, &self.dfr),
            (offset::SVR, &self.svr),
            (offset::ESR, &self.esr),
        ]
    }

    /// The whole state; only while the vCPU does not run.
    pub fn save(&self) -> ApicState {
        let mut page = Page(vec![0; PAGE_BYTES]);
        page.set(offset::ID, self.id_register());
        page.set(offset::VERSION, VERSION);
        page.set(offset::PPR, self.ppr().into());
        for (at, register) in self.plain() {
            page.set(at, register.load(Ordering::Relaxed));
        }
        for at in (offset::ISR..offset::ESR).step_by(16) {
            page.set(at, self.bitmap(at).map_or(0, |word| word.load(Ordering::SeqCst)));
        }
        let icr = self.icr.load(Ordering::Relaxed);
        page.set(offset::ICR, icr as u32);
        page.set(offset::ICR_HIGH, (icr >> 32) as u32);
        for (entry, value) in self.lvt.iter().enumerate() {
            page.set(offset::LVT + 16 * entry as u32, value.load(Ordering::Relaxed));
        }
        let timer = self.timer.save();
        page.set(offset::INITIAL_COUNT, timer.initial_count);
        page.set(offset::CURRENT_COUNT, timer.current_count);
        page.set(offset::DIVIDE, timer.divide);
        ApicState { base_msr: self.base.load(Ordering::Relaxed), registers: page.0, tsc_deadline: timer.deadline }
    }

    /// Takes over a saved state; only while the vCPU does not run, and after its clock was restored.
    pub fn restore(&self, saved: &ApicState) -> Result<(), CpuError> {
        let bad = |what: &str| CpuError::BadState(format!("local APIC {}: {what}", self.id));
        if saved.registers.len() != PAGE_BYTES {
            return Err(bad("the register page is not 1024 bytes long"));
        }
        let mode = saved.base_msr & (base::EN | base::EXTD);
        if mode == base::EXTD {
            return Err(bad("IA32_APIC_BASE has the invalid mode"));
        }
        let page = Page(saved.registers.clone());
        let id = if mode & base::EXTD != 0 { page.get(offset::ID) } else { page.get(offset::ID) >> 24 };
        if mode != 0 && id != self.id {
            return Err(bad(&format!("the state is that of APIC {id}")));
        }
        self.base.store(saved.base_msr, Ordering::Relaxed);
        self.reset_registers();
        for (at, register) in self.plain() {
            register.store(page.get(at), Ordering::Relaxed);
        }
        for at in (offset::ISR..offset::ESR).step_by(16) {
            if let Some(word) = self.bitmap(at) {
                word.store(page.get(at), Ordering::SeqCst);
            }
        }
        if self.x2apic() {
            self.ldr.store(self.x2apic_ldr(), Ordering::Relaxed);
        }
        let icr = u64::from(page.get(offset::ICR_HIGH)) << 32 | u64::from(page.get(offset::ICR));
        self.icr.store(icr, Ordering::Relaxed);
        for (entry, value) in self.lvt.iter().enumerate() {
            value.store(page.get(offset::LVT + 16 * entry as u32), Ordering::Relaxed);
        }
        self.timer.restore(&TimerState {
            mode: page.get(offset::LVT) >> 17 & 3,
            divide: page.get(offset::DIVIDE),
            initial_count: page.get(offset::INITIAL_COUNT),
            current_count: page.get(offset::CURRENT_COUNT),
            deadline: saved.tsc_deadline,
        });
        self.update_irr_words();
        self.update_ppr();
        self.raise_if_pending();
        Ok(())
    }
}
