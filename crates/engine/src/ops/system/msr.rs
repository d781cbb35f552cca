//! Model-specific registers, and the instructions for the bases that are among them.

use super::{After, bytes, put_edx_eax};
use crate::{
    cpu::{Cpu, cr0, cr4, efer, sreg},
    fault::Run,
    mmu::canonical,
    msr::MsrFault,
    steal,
    uop::Uop,
};

pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;

impl Cpu {
    fn msr_fault<T>(&mut self, result: Result<T, MsrFault>) -> Run<T> {
        match result {
            Ok(v) => Ok(v),
            Err(MsrFault) => self.gp(0),
        }
    }

    pub fn read_msr(&mut self, index: u32) -> Run<u64> {
        if let Some(value) = self.clock.msr_read(index) {
            return Ok(value);
        }
        if crate::apic::is_apic_msr(index) {
            let value = self.apic.msr_read(index);
            return self.msr_fault(value);
        }
        if index == steal::MSR && self.tells_steal_time() {
            return Ok(self.steal.msr());
        }
        Ok(match index {
            EFER => self.efer,
            STAR => self.msr.star,
            LSTAR => self.msr.lstar,
            CSTAR => self.msr.cstar,
            SFMASK => self.msr.sfmask,
            FS_BASE => self.seg[sreg::FS].base,
            GS_BASE => self.seg[sreg::GS].base,
            KERNEL_GS_BASE => self.msr.kernel_gs_base,
            TSC_AUX => self.msr.tsc_aux,
            SYSENTER_CS => self.msr.sysenter_cs,
            SYSENTER_ESP => self.msr.sysenter_esp,
            SYSENTER_EIP => self.msr.sysenter_eip,
            _ => {
                let value = self.plain_msrs.read(index);
                return self.msr_fault(value);
            }
        })
    }

    pub fn write_msr(&mut self, index: u32, value: u64) -> Run {
        let memory = self.memory.clone();
        if let Some(result) = self.clock.msr_write(index, value, &memory) {
            if matches!(index, crate::clock::msr::TSC | crate::clock::msr::TSC_ADJUST) {
                self.apic.tsc_changed();
                self.clock.refresh(&memory);
            }
            return self.msr_fault(result);
        }
        if crate::apic::is_apic_msr(index) {
            let result = self.apic.msr_write(index, value);
            if let Some(vector) = self.msr_fault(result)? {
                self.park_fpu();
                self.bus().eoi(vector);
            }
            return Ok(());
        }
        if index == steal::MSR && self.tells_steal_time() {
            let result = self.steal.set(value, &memory);
            return self.msr_fault(result);
        }
        let must_be_canonical =
            matches!(index, LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE | SYSENTER_ESP | SYSENTER_EIP);
        if must_be_canonical && !canonical(value) {
            return self.gp(0);
        }
        match index {
            EFER => return self.write_efer(value),
            STAR => self.msr.star = value,
            LSTAR => self.msr.lstar = value,
            CSTAR => self.msr.cstar = value,
            SFMASK => self.msr.sfmask = value & 0xffff_ffff,
            FS_BASE => self.set_base(sreg::FS, value),
            GS_BASE => self.set_base(sreg::GS, value),
            KERNEL_GS_BASE => self.msr.kernel_gs_base = value,
            TSC_AUX => self.msr.tsc_aux = value & 0xffff_ffff,
            SYSENTER_CS => self.msr.sysenter_cs = value,
            SYSENTER_ESP => self.msr.sysenter_esp = value,
            SYSENTER_EIP => self.msr.sysenter_eip = value,
            _ => {
                let result = self.plain_msrs.write(index, value);
                return self.msr_fault(result);
            }
        }
        if matches!(index, STAR | SFMASK) {
            self.look_at_calls();
        }
        Ok(())
    }

    fn tells_steal_time(&self) -> bool {
        self.cpuid.get(0x4000_0001, 0).eax & 1 << 5 != 0
    }

    fn write_efer(&mut self, value: u64) -> Run {
        let allowed = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        if value & !allowed & !self.efer_extra != 0 || ((value ^ self.efer) & efer::LME != 0 && self.cr0 & cr0::PG != 0)
        {
            return self.gp(0);
        }
        let changed = value ^ self.efer;
        self.efer = value & !efer::LMA | self.efer & efer::LMA;
        if changed & efer::NXE != 0 {
            self.see_letters();
            self.tlb.flush_all();
        }
        self.refresh();
        self.look_at_calls();
        Ok(())
    }

    fn set_base(&mut self, index: usize, value: u64) {
        self.seg[index].base = value;
        self.seg_base[index] = value;
    }
}

pub(super) fn rdmsr(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = cpu.read_msr(cpu.regs.gpr[1] as u32)?;
    put_edx_eax(cpu, value);
    Ok(After::Next)
}

pub(super) fn wrmsr(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = cpu.regs.gpr[2] << 32 | cpu.regs.gpr[0] & 0xffff_ffff;
    cpu.write_msr(cpu.regs.gpr[1] as u32, value)?;
    Ok(After::Leave)
}

pub(super) fn swapgs(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    if !cpu.code64() {
        return cpu.ud();
    }
    cpu.require_ring0()?;
    let old = cpu.seg[sreg::GS].base;
    let new = cpu.msr.kernel_gs_base;
    cpu.set_base(sreg::GS, new);
    cpu.msr.kernel_gs_base = old;
    Ok(After::Next)
}

/// RDFSBASE and RDGSBASE: `src` is the segment.
pub(super) fn read_base(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    if !cpu.code64() || cpu.cr4 & cr4::FSGSBASE == 0 {
        return cpu.ud();
    }
    let base = cpu.seg[op.src as usize].base;
    if bytes(op) == 8 {
        cpu.set_reg(op.dst, base)
    } else {
        cpu.set_reg(op.dst, base as u32)
    }
    Ok(After::Next)
}

pub(super) fn write_base(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    if !cpu.code64() || cpu.cr4 & cr4::FSGSBASE == 0 {
        return cpu.ud();
    }
    let value = if bytes(op) == 8 { cpu.reg::<u64>(op.dst) } else { u64::from(cpu.reg::<u32>(op.dst)) };
    if !canonical(value) {
        return cpu.gp(0);
    }
    cpu.set_base(op.src as usize, value);
    Ok(After::Next)
}
