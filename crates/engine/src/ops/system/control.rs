//! Control and debug registers.

use super::After;
use crate::{
    cpu::{Cpu, cr0, cr4, efer, rights, sreg},
    fault::{Fault, Run, vector},
    tlb::PAGE_MASK,
    uop::Uop,
};

impl Cpu {
    pub fn write_cr0(&mut self, value: u64) -> Run {
        let known =
            cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
        let paging = value & cr0::PG != 0;
        if value >> 32 != 0 || (paging && value & cr0::PE == 0) || value & (cr0::NW | cr0::CD) == cr0::NW {
            return self.gp(0);
        }
        let new = value & known | cr0::ET;
        let changed = new ^ self.cr0;
        if changed & cr0::PG != 0 {
            if paging && self.efer & efer::LME != 0 {
                if self.cr4 & cr4::PAE == 0 || self.seg[sreg::CS].rights & rights::LONG != 0 {
                    return self.gp(0);
                }
                self.efer |= efer::LMA;
            } else if !paging {
                if self.code64() || self.cr4 & cr4::PCIDE != 0 {
                    return self.gp(0);
                }
                self.efer &= !efer::LMA;
            }
        }
        self.cr0 = new;
        if changed & cr0::PE != 0 && new & cr0::PE == 0 {
            self.cpl = 0;
        }
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.see_letters();
            self.tlb.flush_all();
        }
        self.refresh();
        self.look_at_calls();
        Ok(())
    }

    pub fn write_cr3(&mut self, value: u64) -> Run {
        self.counters.cr3_loads += 1;
        let pcids = self.cr4 & cr4::PCIDE != 0;
        let keep = pcids && value >> 63 != 0;
        let value = if pcids { value & !(1 << 63) } else { value };
        if self.long_mode() && value >> crate::mmu::PHYSICAL_BITS != 0 {
            return self.gp(0);
        }
        self.see_letters();
        self.cr3 = value;
        let pcid = if pcids { (value & PAGE_MASK) as u16 } else { 0 };
        self.tlb.switch(pcid, keep);
        self.select_sets();
        Ok(())
    }

    pub fn write_cr4(&mut self, value: u64) -> Run {
        let changed = value ^ self.cr4;
        if value & !self.cr4_allowed() != 0
            || (self.long_mode() && value & cr4::PAE == 0)
            || (changed & value & cr4::PCIDE != 0 && (!self.long_mode() || self.cr3 & PAGE_MASK != 0))
        {
            return self.gp(0);
        }
        self.cr4 = value;
        if changed & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP) != 0 {
            self.see_letters();
            self.tlb.flush_all();
        }
        self.refresh();
        self.look_at_calls();
        Ok(())
    }

    /// CR4 bits whose features CPUID tells.
    fn cr4_allowed(&self) -> u64 {
        let mut allowed = cr4::VALID;
        let leaf1 = self.cpuid.get(1, 0);
        let leaf7 = self.cpuid.get(7, 0);
        for (bit, there) in [
            (cr4::PCIDE, leaf1.ecx & 1 << 17),
            (cr4::OSXSAVE, leaf1.ecx & 1 << 26),
            (cr4::FSGSBASE, leaf7.ebx & 1),
            (cr4::SMEP, leaf7.ebx & 1 << 7),
            (cr4::SMAP, leaf7.ebx & 1 << 20),
        ] {
            if there == 0 {
                allowed &= !bit;
            }
        }
        if leaf7.ecx & 1 << 2 != 0 {
            allowed |= cr4::UMIP;
        }
        allowed
    }
}

pub(super) fn read_cr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = match op.src {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => cpu.apic.cr8(),
        _ => return cpu.ud(),
    };
    if cpu.code64() {
        cpu.set_reg(op.dst, value)
    } else {
        cpu.set_reg(op.dst, value as u32)
    }
    Ok(After::Next)
}

pub(super) fn write_cr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = if cpu.code64() { cpu.reg::<u64>(op.src) } else { u64::from(cpu.reg::<u32>(op.src)) };
    match op.dst {
        0 => cpu.write_cr0(value)?,
        2 => cpu.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        8 => {
            if value > 15 {
                return cpu.gp(0);
            }
            cpu.apic.set_cr8(value);
        }
        _ => return cpu.ud(),
    }
    Ok(After::Leave)
}

pub(super) fn lmsw(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = u64::from(cpu.read_operand16(op)?);
    // It can set PE but not clear it.
    let new = cpu.cr0 & !0xe | value & 0xf;
    cpu.write_cr0(new)?;
    Ok(After::Leave)
}

pub(super) fn smsw(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.check_umip()?;
    cpu.write_operand16(op, cpu.cr0)?;
    Ok(After::Next)
}

pub(super) fn clts(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    cpu.cr0 &= !cr0::TS;
    Ok(After::Next)
}

pub(super) fn xsetbv(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return cpu.ud();
    }
    cpu.require_ring0()?;
    let value = cpu.regs.gpr[2] << 32 | cpu.regs.gpr[0] & 0xffff_ffff;
    let supported = crate::cpuid::supported_xcr0(&cpu.cpuid);
    if cpu.regs.gpr[1] as u32 != 0 || value & !supported != 0 || value & 1 == 0 || value & 6 == 4 {
        return cpu.gp(0);
    }
    cpu.xcr0 = value;
    Ok(After::Next)
}

const DR7_GD: u64 = 1 << 13;

/// Which of `Cpu::debug` DR n is; DR4 and DR5 alias DR6 and DR7 unless CR4.DE.
fn debug_index(cpu: &mut Cpu, number: u8) -> Run<usize> {
    cpu.require_ring0()?;
    if cpu.debug[5] & DR7_GD != 0 {
        cpu.debug[4] |= 1 << 13;
        return cpu.raise(Fault::new(vector::DB));
    }
    match number {
        0..=3 => Ok(number as usize),
        4 | 5 if cpu.cr4 & cr4::DE != 0 => cpu.ud(),
        4 | 6 => Ok(4),
        _ => Ok(5),
    }
}

pub(super) fn read_dr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let index = debug_index(cpu, op.src)?;
    let value = cpu.debug[index];
    if cpu.code64() {
        cpu.set_reg(op.dst, value)
    } else {
        cpu.set_reg(op.dst, value as u32)
    }
    Ok(After::Next)
}

pub(super) fn write_dr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let index = debug_index(cpu, op.dst)?;
    let value = if cpu.code64() { cpu.reg::<u64>(op.src) } else { u64::from(cpu.reg::<u32>(op.src)) };
    if index >= 4 && value >> 32 != 0 {
        return cpu.gp(0);
    }
    cpu.debug[index] = match index {
        4 => value & 0xe00f | 0xffff_0ff0,
        5 => value & 0xffff_2bff | 0x400,
        _ => value,
    };
    cpu.see_letters();
    cpu.tlb.flush_all();
    cpu.refresh();
    Ok(After::Leave)
}
