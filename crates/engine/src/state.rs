//! The architectural state, to and from [`CpuState`].

use vireo_cpu::{CpuError, CpuState, PendingEvents};

use crate::{cpu::Cpu, ops::system::msr, signal::request};

/// MSRs that the core keeps in fields of its own.
const CORE_MSRS: [u32; 14] = [
    crate::clock::msr::TSC_ADJUST,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    crate::clock::msr::KVM_WALL_CLOCK,
    crate::clock::msr::KVM_SYSTEM_TIME,
    crate::steal::MSR,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::TSC_AUX,
    crate::msr::PAT,
];

impl Cpu {
    pub fn save(&mut self) -> CpuState {
        let mut msrs: Vec<(u32, u64)> = self.plain_msrs.iter().collect();
        for index in CORE_MSRS {
            if let Ok(value) = self.read_msr(index) {
                msrs.retain(|(i, _)| *i != index);
                msrs.push((index, value));
            }
        }
        msrs.sort_unstable();
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs.gpr[..16]);
        CpuState {
            gpr,
            rip: self.rip,
            rflags: self.flags(),
            segments: self.seg,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.apic.cr8(),
            efer: self.efer,
            xcr0: self.xcr0,
            debug: self.debug,
            msrs,
            xsave: self.fpu.save_image(&mut self.regs),
            apic: self.apic.save(),
            events: PendingEvents {
                exception: None,
                error_code: None,
                nmi: self.nmi_pending,
                nmi_masked: self.nmi_masked,
                interrupt_shadow: self.shadow,
                halted: self.halted,
                wait_for_sipi: self.wait_for_sipi,
            },
            tsc: self.clock.tsc(),
        }
    }

    pub fn restore(&mut self, state: &CpuState) -> Result<(), CpuError> {
        self.see_letters();
        self.clear_code();
        self.tlb.flush_all();
        self.regs.gpr[..16].copy_from_slice(&state.gpr);
        self.rip = state.rip;
        self.seg = state.segments;
        self.ldtr = state.ldtr;
        self.tr = state.tr;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.cr0 = state.cr0;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.efer = state.efer;
        self.xcr0 = state.xcr0.max(1);
        self.debug = state.debug;
        // Of all privilege fields SS's DPL is the one that always holds the CPL (SDM vol. 3, 6.5).
        self.cpl = if state.cr0 & 1 == 0 {
            0
        } else if state.rflags & crate::cpu::rflags::VM != 0 {
            3
        } else {
            crate::cpu::rights::dpl(state.segments[2].rights)
        };
        self.set_flags(state.rflags);
        if !state.xsave.is_empty() {
            self.fpu
                .load_image(&mut self.regs, &state.xsave)
                .map_err(|e| CpuError::BadState(format!("floating-point state: {e}")))?;
        }
        if state.tsc != 0 {
            self.clock.set_tsc(state.tsc);
        }
        // A machine that starts anew does not know of the old one's record.
        self.steal = crate::steal::StealTime::default();
        for &(index, value) in &state.msrs {
            // A register that this engine does not know stays behind: its feature is not advertised either.
            if self.write_msr(index, value).is_err() && CORE_MSRS.contains(&index) {
                return Err(CpuError::BadState(format!("MSR {index:#x} cannot be {value:#x}")));
            }
        }
        if !state.apic.registers.is_empty() {
            self.apic.restore(&state.apic)?;
        }
        self.apic.set_cr8(state.cr8);
        let events = &state.events;
        self.nmi_pending = events.nmi;
        self.nmi_masked = events.nmi_masked;
        self.shadow = events.interrupt_shadow;
        self.halted = events.halted;
        self.wait_for_sipi = events.wait_for_sipi;
        self.tlb.switch(if self.cr4 & crate::cpu::cr4::PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 }, false);
        self.refresh();
        self.look_at_calls();
        if let Some(vector) = events.exception {
            self.fault = crate::fault::Fault { vector, error: events.error_code, address: self.cr2 };
            self.deliver_fault();
        }
        self.signal.raise(request::INTERRUPT);
        Ok(())
    }

    /// INIT: back to the state after reset; an application processor then waits for its start-up IPI.
    pub fn init(&mut self) {
        let mut state = CpuState::reset();
        state.gpr[2] = u64::from(self.cpuid.get(1, 0).eax);
        state.cr0 = self.cr0 & 0x6000_0000 | 0x10;
        state.tsc = 0;
        state.xsave = Vec::new();
        state.xcr0 = self.xcr0;
        self.apic.init_reset();
        let _ = self.restore(&state);
        self.wait_for_sipi = self.id != 0;
    }

    /// The start-up IPI: real mode at the page that its vector names.
    pub fn start_up(&mut self) {
        let vector = self.signal.sipi_vector.load(std::sync::atomic::Ordering::SeqCst) as u16 & 0xff;
        self.wait_for_sipi = false;
        self.halted = false;
        let cs = &mut self.seg[1];
        cs.selector = vector << 8;
        cs.base = u64::from(vector) << 12;
        self.rip = 0;
        self.refresh();
    }
}
