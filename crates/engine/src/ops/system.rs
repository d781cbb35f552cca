//! Instructions that look at or change the system: rare enough to share one handler and a table.

use crate::{
    cpu::{Cpu, cr0, cr4, efer, rflags, rights, sreg},
    fault::{Fault, Run, vector},
    interrupt::Source,
    mmu::{Access, canonical},
    msr::MsrFault,
    ops::flow::{leave, return_address},
    segment::rpl,
    tlb::PAGE_MASK,
    uop::{Ctl, Uop},
};

/// How the block goes on after a system instruction.
pub enum After {
    Next,
    /// With the next instruction, but looked up anew: modes, translations or pending interrupts may have changed.
    Leave,
    /// At `Cpu::rip`.
    Jumped,
    Halt,
}

type Action = fn(&mut Cpu, &Uop) -> Run<After>;

macro_rules! table {
    ($($name:ident $action:path;)*) => {
        /// [`Uop::aux`] of [`system`], low byte.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum System { $($name),* }
        const TABLE: &[Action] = &[$($action),*];
    };
}

table! {
    Hlt hlt;
    Cli cli;
    Sti sti;
    Cpuid cpuid;
    Rdtsc rdtsc;
    Rdtscp rdtscp;
    Rdpmc rdpmc;
    Rdmsr rdmsr;
    Wrmsr wrmsr;
    Syscall syscall;
    Sysret sysret;
    Sysenter sysenter;
    Sysexit sysexit;
    Int int;
    Int3 int3;
    Int1 int1;
    Into into;
    Iret iret;
    Lgdt lgdt;
    Lidt lidt;
    Sgdt sgdt;
    Sidt sidt;
    Lldt lldt;
    Ltr ltr;
    Sldt sldt;
    Str str;
    Lmsw lmsw;
    Smsw smsw;
    Clts clts;
    Invlpg invlpg;
    Invpcid invpcid;
    Privileged privileged_nothing;
    ReadCr read_cr;
    WriteCr write_cr;
    ReadDr read_dr;
    WriteDr write_dr;
    Swapgs swapgs;
    Rdfsbase read_base;
    Wrfsbase write_base;
    Clac clac;
    Stac stac;
    Lar lar;
    Lsl lsl;
    Verr verr;
    Verw verw;
    Arpl arpl;
    MovSeg mov_seg;
    PopSeg pop_seg;
    LoadFar load_far;
    FarJmp far_jmp;
    FarCall far_call;
    FarRet far_ret;
    Bound bound;
    Xsetbv xsetbv;
    Hypercall hypercall;
    Wait wait_for;
}

/// `aux` bits above the table index: operand size in bytes (0 stands for "register form" where noted).
pub const fn aux(which: System, bytes: usize) -> u16 {
    which as u16 | (bytes as u16) << 8
}

fn bytes(op: &Uop) -> usize {
    (op.aux >> 8) as usize & 15
}

/// Set in the size bits where the operand is memory.
pub const MEMORY: usize = 0x10;

fn in_memory(op: &Uop) -> bool {
    op.aux >> 8 & MEMORY as u16 != 0
}

pub unsafe fn system(cpu: &mut Cpu, op: *const Uop) -> Ctl {
    unsafe {
        let o = &*op;
        match TABLE[(o.aux & 0xff) as usize](cpu, o) {
            Ok(After::Next) => super::next(cpu, op),
            Ok(After::Leave) => leave(cpu, op),
            Ok(After::Jumped) => {
                cpu.next = std::ptr::null();
                cpu.link = std::ptr::null_mut();
                Ctl::Next
            }
            Ok(After::Halt) => {
                leave(cpu, op);
                Ctl::Halt
            }
            Err(_) => super::fault(cpu, op),
        }
    }
}

impl Cpu {
    fn require_ring0(&mut self) -> Run {
        if self.cpl != 0 { self.gp(0) } else { Ok(()) }
    }

    fn read_operand16(&mut self, op: &Uop) -> Run<u16> {
        if !in_memory(op) {
            return Ok(self.reg::<u16>(op.dst));
        }
        let at = self.ea(op, 2, Access::Read)?;
        self.load::<u16>(at)
    }

    /// SLDT, STR and SMSW: a zero-extended register or 16 bits of memory.
    fn write_operand16(&mut self, op: &Uop, value: u64) -> Run {
        if in_memory(op) {
            let at = self.ea(op, 2, Access::Write)?;
            return self.store::<u16>(at, value as u16);
        }
        match bytes(op) {
            2 => self.set_reg(op.dst, value as u16),
            4 => self.set_reg(op.dst, value as u32),
            _ => self.set_reg(op.dst, value),
        }
        Ok(())
    }

    /// UMIP: the instructions that tell user code about descriptor tables.
    fn check_umip(&mut self) -> Run {
        if self.cr4 & cr4::UMIP != 0 && self.cpl > 0 { self.gp(0) } else { Ok(()) }
    }

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
        Ok(match index {
            msr::EFER => self.efer,
            msr::STAR => self.msr.star,
            msr::LSTAR => self.msr.lstar,
            msr::CSTAR => self.msr.cstar,
            msr::SFMASK => self.msr.sfmask,
            msr::FS_BASE => self.seg[sreg::FS].base,
            msr::GS_BASE => self.seg[sreg::GS].base,
            msr::KERNEL_GS_BASE => self.msr.kernel_gs_base,
            msr::TSC_AUX => self.msr.tsc_aux,
            msr::SYSENTER_CS => self.msr.sysenter_cs,
            msr::SYSENTER_ESP => self.msr.sysenter_esp,
            msr::SYSENTER_EIP => self.msr.sysenter_eip,
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
        let must_be_canonical = matches!(
            index,
            msr::LSTAR
                | msr::CSTAR
                | msr::FS_BASE
                | msr::GS_BASE
                | msr::KERNEL_GS_BASE
                | msr::SYSENTER_ESP
                | msr::SYSENTER_EIP
        );
        if must_be_canonical && !canonical(value) {
            return self.gp(0);
        }
        match index {
            msr::EFER => return self.write_efer(value),
            msr::STAR => self.msr.star = value,
            msr::LSTAR => self.msr.lstar = value,
            msr::CSTAR => self.msr.cstar = value,
            msr::SFMASK => self.msr.sfmask = value & 0xffff_ffff,
            msr::FS_BASE => self.set_base(sreg::FS, value),
            msr::GS_BASE => self.set_base(sreg::GS, value),
            msr::KERNEL_GS_BASE => self.msr.kernel_gs_base = value,
            msr::TSC_AUX => self.msr.tsc_aux = value & 0xffff_ffff,
            msr::SYSENTER_CS => self.msr.sysenter_cs = value,
            msr::SYSENTER_ESP => self.msr.sysenter_esp = value,
            msr::SYSENTER_EIP => self.msr.sysenter_eip = value,
            _ => {
                let result = self.plain_msrs.write(index, value);
                return self.msr_fault(result);
            }
        }
        Ok(())
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
        Ok(())
    }

    fn set_base(&mut self, index: usize, value: u64) {
        self.seg[index].base = value;
        self.seg_base[index] = value;
    }
}

pub mod msr {
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
}

fn hlt(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    cpu.counters.halts += 1;
    Ok(After::Halt)
}

fn check_if_privilege(cpu: &mut Cpu) -> Run {
    if cpu.protected() && cpu.cpl > cpu.iopl() || cpu.v86() && cpu.iopl() < 3 { cpu.gp(0) } else { Ok(()) }
}

fn cli(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    check_if_privilege(cpu)?;
    cpu.rflags &= !rflags::IF;
    Ok(After::Next)
}

fn sti(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    check_if_privilege(cpu)?;
    if cpu.rflags & rflags::IF != 0 {
        return Ok(After::Next);
    }
    cpu.rflags |= rflags::IF;
    cpu.interrupts_enabled();
    cpu.shadow = true;
    Ok(After::Leave)
}

fn cpuid(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    let (function, index) = (cpu.regs.gpr[0] as u32, cpu.regs.gpr[1] as u32);
    let leaf = cpu.cpuid_leaf(function, index);
    cpu.set_reg(0, leaf.eax);
    cpu.set_reg(24, leaf.ebx);
    cpu.set_reg(8, leaf.ecx);
    cpu.set_reg(16, leaf.edx);
    Ok(After::Next)
}

impl Cpu {
    /// A CPUID leaf with the bits that depend on the current state.
    fn cpuid_leaf(&self, function: u32, index: u32) -> vireo_cpu::cpuid::CpuidLeaf {
        let mut leaf = self.cpuid.get(function, index);
        match (function, index) {
            (1, _) if self.cr4 & cr4::OSXSAVE == 0 => leaf.ecx &= !(1 << 27),
            (1, _) => leaf.ecx |= 1 << 27,
            // The size of the XSAVE area for what XCR0 enables now: legacy and header, then AVX.
            (0xd, 0) => leaf.ebx = if self.xcr0 & 4 != 0 { 832 } else { 576 },
            (0xd, 1) => leaf.ebx = if self.xcr0 & 4 != 0 { 832 } else { 576 },
            _ => {}
        }
        leaf
    }
}

fn check_tsc(cpu: &mut Cpu) -> Run {
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 && cpu.protected() { cpu.gp(0) } else { Ok(()) }
}

fn put_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.set_reg(0, value as u32);
    cpu.set_reg(16, (value >> 32) as u32);
}

fn rdtsc(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    check_tsc(cpu)?;
    let now = cpu.clock.tsc();
    put_edx_eax(cpu, now);
    Ok(After::Next)
}

fn rdtscp(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    rdtsc(cpu, op)?;
    cpu.set_reg(8, cpu.msr.tsc_aux as u32);
    Ok(After::Next)
}

fn rdpmc(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.gp(0)
}

fn rdmsr(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = cpu.read_msr(cpu.regs.gpr[1] as u32)?;
    put_edx_eax(cpu, value);
    Ok(After::Next)
}

fn wrmsr(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = cpu.regs.gpr[2] << 32 | cpu.regs.gpr[0] & 0xffff_ffff;
    cpu.write_msr(cpu.regs.gpr[1] as u32, value)?;
    Ok(After::Leave)
}

fn syscall(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let back = return_address(cpu, op);
    cpu.syscall(back)?;
    cpu.transferred = true;
    Ok(After::Jumped)
}

fn sysret(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.sysret(bytes(op) == 8)?;
    Ok(After::Jumped)
}

fn sysenter(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.sysenter()?;
    cpu.transferred = true;
    Ok(After::Jumped)
}

fn sysexit(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.sysexit(bytes(op) == 8)?;
    Ok(After::Jumped)
}

fn software_interrupt(cpu: &mut Cpu, op: &Uop, number: u8) -> Run<After> {
    let back = return_address(cpu, op);
    cpu.interrupt(number, None, Source::Software, back)?;
    Ok(After::Jumped)
}

fn int(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    software_interrupt(cpu, op, op.imm as u8)
}

fn int3(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let back = return_address(cpu, op);
    // INT3 is not subject to the IOPL check of virtual-8086 mode.
    cpu.interrupt(vector::BP, None, Source::Software, back)?;
    Ok(After::Jumped)
}

fn int1(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let back = return_address(cpu, op);
    cpu.interrupt(vector::DB, None, Source::Exception, back)?;
    Ok(After::Jumped)
}

fn into(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    if cpu.regs.flags & crate::int::OF == 0 {
        return Ok(After::Leave);
    }
    software_interrupt(cpu, op, vector::OF)
}

fn iret(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let next = return_address(cpu, op);
    cpu.interrupt_return(bytes(op), next)?;
    cpu.nmi_masked = false;
    if cpu.nmi_pending {
        cpu.signal.raise(crate::signal::request::NMI);
    }
    Ok(After::Jumped)
}

/// The pseudo-descriptor of LGDT and LIDT.
fn load_table(cpu: &mut Cpu, op: &Uop) -> Run<vireo_cpu::DescriptorTable> {
    cpu.require_ring0()?;
    let size = if cpu.code64() { 10 } else { 6 };
    let at = cpu.ea(op, size, Access::Read)?;
    let limit = cpu.load::<u16>(at)?;
    let base = if size == 10 {
        cpu.load::<u64>(at.wrapping_add(2))?
    } else {
        let mask = if bytes(op) == 2 { 0x00ff_ffff } else { 0xffff_ffff };
        u64::from(cpu.load::<u32>(at.wrapping_add(2))?) & mask
    };
    if !canonical(base) {
        return cpu.gp(0);
    }
    Ok(vireo_cpu::DescriptorTable { base, limit })
}

fn lgdt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.gdtr = load_table(cpu, op)?;
    Ok(After::Next)
}

fn lidt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.idtr = load_table(cpu, op)?;
    Ok(After::Next)
}

fn store_table(cpu: &mut Cpu, op: &Uop, table: vireo_cpu::DescriptorTable) -> Run<After> {
    cpu.check_umip()?;
    let size = if cpu.code64() { 10 } else { 6 };
    let at = cpu.ea(op, size, Access::Write)?;
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    cpu.write_bytes(at, &image[..size], false)?;
    Ok(After::Next)
}

fn sgdt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    store_table(cpu, op, cpu.gdtr)
}

fn sidt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    store_table(cpu, op, cpu.idtr)
}

fn check_protected(cpu: &mut Cpu) -> Run {
    if cpu.protected() { Ok(()) } else { cpu.ud() }
}

fn lldt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.require_ring0()?;
    let selector = cpu.read_operand16(op)?;
    cpu.load_ldt(selector)?;
    Ok(After::Next)
}

fn ltr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.require_ring0()?;
    let selector = cpu.read_operand16(op)?;
    cpu.load_task(selector)?;
    Ok(After::Next)
}

fn sldt(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.check_umip()?;
    cpu.write_operand16(op, u64::from(cpu.ldtr.selector))?;
    Ok(After::Next)
}

fn str(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    cpu.check_umip()?;
    cpu.write_operand16(op, u64::from(cpu.tr.selector))?;
    Ok(After::Next)
}

fn lmsw(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let value = u64::from(cpu.read_operand16(op)?);
    // It can set PE but not clear it.
    let new = cpu.cr0 & !0xe | value & 0xf;
    cpu.write_cr0(new)?;
    Ok(After::Leave)
}

fn smsw(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.check_umip()?;
    cpu.write_operand16(op, cpu.cr0)?;
    Ok(After::Next)
}

fn clts(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    cpu.cr0 &= !cr0::TS;
    Ok(After::Next)
}

fn invlpg(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let offset = cpu.offset_of(op) & Cpu::address_mask(op);
    let at = offset.wrapping_add(cpu.seg_base[op.seg as usize]);
    cpu.see_letters();
    cpu.tlb.flush_page(at);
    Ok(After::Leave)
}

fn invpcid(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let kind = if cpu.code64() { cpu.reg::<u64>(op.dst) } else { u64::from(cpu.reg::<u32>(op.dst)) };
    let at = cpu.ea(op, 16, Access::Read)?;
    let pcid = cpu.load::<u64>(at)?;
    let linear = cpu.load::<u64>(at.wrapping_add(8))?;
    let pcids = cpu.cr4 & cr4::PCIDE != 0;
    if kind > 3 || (kind < 2 && (pcid >> 12 != 0 || (!pcids && pcid != 0))) || (kind == 0 && !canonical(linear)) {
        return cpu.gp(0);
    }
    cpu.see_letters();
    match kind {
        0 => cpu.tlb.flush_page(linear),
        1 => cpu.tlb.flush_space(pcid as u16),
        _ => cpu.tlb.flush_all(),
    }
    Ok(After::Leave)
}

/// INVD, WBINVD and the like: caches are the host's business.
fn privileged_nothing(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    Ok(After::Next)
}

fn read_cr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
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

fn write_cr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
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

fn read_dr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let index = debug_index(cpu, op.src)?;
    let value = cpu.debug[index];
    if cpu.code64() {
        cpu.set_reg(op.dst, value)
    } else {
        cpu.set_reg(op.dst, value as u32)
    }
    Ok(After::Next)
}

fn write_dr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
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

fn swapgs(cpu: &mut Cpu, _: &Uop) -> Run<After> {
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
fn read_base(cpu: &mut Cpu, op: &Uop) -> Run<After> {
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

fn write_base(cpu: &mut Cpu, op: &Uop) -> Run<After> {
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

fn set_ac(cpu: &mut Cpu, set: bool) -> Run<After> {
    if cpu.cpl != 0 || cpu.cpuid.get(7, 0).ebx & 1 << 20 == 0 {
        return cpu.ud();
    }
    cpu.rflags = cpu.rflags & !rflags::AC | if set { rflags::AC } else { 0 };
    // The TLB set changes; translations and code do not, so the block can go on.
    cpu.select_sets();
    Ok(After::Next)
}

fn clac(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    set_ac(cpu, false)
}

fn stac(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    set_ac(cpu, true)
}

/// The descriptor that LAR, LSL, VERR and VERW may look at, if any.
fn visible(cpu: &mut Cpu, selector: u16, system_types: u16) -> Run<Option<crate::segment::Descriptor>> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    let before = cpu.fault;
    let d = match cpu.descriptor(selector, vector::GP) {
        Ok(d) => d,
        Err(stop) if cpu.fault.vector == vector::PF => return Err(stop),
        Err(_) => {
            cpu.fault = before;
            return Ok(None);
        }
    };
    let type_ok = d.is_segment() || system_types & 1 << d.kind() != 0;
    let reachable = d.is_code() && d.conforming() || (cpu.cpl <= d.dpl() && rpl(selector) <= d.dpl());
    Ok((type_ok && reachable).then_some(d))
}

fn set_zero_flag(cpu: &mut Cpu, set: bool) {
    cpu.regs.flags = cpu.regs.flags & !crate::int::ZF | if set { crate::int::ZF } else { 0 };
}

fn load_descriptor_field(
    cpu: &mut Cpu,
    op: &Uop,
    types: u16,
    field: impl Fn(crate::segment::Descriptor) -> u32,
) -> Run<After> {
    check_protected(cpu)?;
    let selector = if in_memory(op) {
        let at = cpu.ea(op, 2, Access::Read)?;
        cpu.load::<u16>(at)?
    } else {
        cpu.reg::<u16>(op.src)
    };
    let found = visible(cpu, selector, types)?;
    if let Some(d) = found {
        match bytes(op) {
            2 => cpu.set_reg(op.dst, field(d) as u16),
            4 => cpu.set_reg(op.dst, field(d)),
            _ => cpu.set_reg(op.dst, u64::from(field(d))),
        }
    }
    set_zero_flag(cpu, found.is_some());
    Ok(After::Next)
}

fn lar(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    // Types 1–5, 9, 11, 12; in long mode 2, 9, 11, 12.
    let types = if cpu.long_mode() { 0b0001_1010_0000_0100 } else { 0b0001_1010_0011_1110 };
    load_descriptor_field(cpu, op, types, |d| (d.raw >> 32) as u32 & 0x00ff_ff00)
}

fn lsl(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    // Types 1–3, 9, 11; in long mode 2, 9, 11.
    let types = if cpu.long_mode() { 0b1010_0000_0100 } else { 0b1010_0000_1110 };
    load_descriptor_field(cpu, op, types, |d| d.limit())
}

fn verify(cpu: &mut Cpu, op: &Uop, write: bool) -> Run<After> {
    check_protected(cpu)?;
    let selector = cpu.read_operand16(op)?;
    let ok = visible(cpu, selector, 0)?.is_some_and(|d| {
        let flag = d.rights() & rights::WRITE_OR_READ != 0;
        if write { !d.is_code() && flag } else { !d.is_code() || flag }
    });
    set_zero_flag(cpu, ok);
    Ok(After::Next)
}

fn verr(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    verify(cpu, op, false)
}

fn verw(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    verify(cpu, op, true)
}

fn arpl(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    check_protected(cpu)?;
    let wanted = cpu.reg::<u16>(op.src) & 3;
    if in_memory(op) {
        let at = cpu.ea(op, 2, Access::Write)?;
        cpu.check_writable(at, 2)?;
        let selector = cpu.load::<u16>(at)?;
        let raise = selector & 3 < wanted;
        if raise {
            cpu.store::<u16>(at, selector & !3 | wanted)?;
        }
        set_zero_flag(cpu, raise);
        return Ok(After::Next);
    }
    let selector = cpu.reg::<u16>(op.dst);
    let raise = selector & 3 < wanted;
    if raise {
        cpu.set_reg(op.dst, selector & !3 | wanted);
    }
    set_zero_flag(cpu, raise);
    Ok(After::Next)
}

/// Loads segment register `index`; SS holds interrupts off for an instruction, and has no single-step trap
/// (Intel SDM vol. 3, 7.8.3).
fn load_segment(cpu: &mut Cpu, index: usize, selector: u16) -> Run<After> {
    let before = cpu.mode;
    cpu.load_data_segment(index, selector)?;
    if index == sreg::SS {
        cpu.shadow = true;
        cpu.transferred = true;
        return Ok(After::Leave);
    }
    Ok(if cpu.mode == before { After::Next } else { After::Leave })
}

/// MOV Sreg, r/m16: `src` is the segment.
fn mov_seg(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let selector = cpu.read_operand16(op)?;
    load_segment(cpu, op.src as usize, selector)
}

fn pop_seg(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let sp = cpu.regs.gpr[4];
    let selector = cpu.pop(bytes(op))? as u16;
    match load_segment(cpu, op.src as usize, selector) {
        Ok(after) => Ok(after),
        Err(stop) => {
            cpu.regs.gpr[4] = sp;
            Err(stop)
        }
    }
}

/// A far pointer in memory: offset of the operand size, then a selector.
fn far_pointer(cpu: &mut Cpu, op: &Uop) -> Run<(u16, u64)> {
    let n = bytes(op);
    let at = cpu.ea(op, n + 2, Access::Read)?;
    let offset = cpu.load_sized(at, n)?;
    Ok((cpu.load::<u16>(at.wrapping_add(n as u64))?, offset))
}

/// LDS, LES, LFS, LGS, LSS: `src` is the segment.
fn load_far(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let (selector, offset) = far_pointer(cpu, op)?;
    let after = load_segment(cpu, op.src as usize, selector)?;
    match bytes(op) {
        2 => cpu.set_reg(op.dst, offset as u16),
        4 => cpu.set_reg(op.dst, offset as u32),
        _ => cpu.set_reg(op.dst, offset),
    }
    Ok(after)
}

/// The far pointer of JMP and CALL: immediate (selector in bits 32–47 of `imm`) or memory.
fn far_target(cpu: &mut Cpu, op: &Uop) -> Run<(u16, u64)> {
    if in_memory(op) { far_pointer(cpu, op) } else { Ok(((op.imm >> 32) as u16, op.imm & 0xffff_ffff)) }
}

fn far_jmp(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let (selector, offset) = far_target(cpu, op)?;
    let next = return_address(cpu, op);
    cpu.far_transfer(selector, offset, bytes(op), next, false)?;
    Ok(After::Jumped)
}

fn far_call(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let (selector, offset) = far_target(cpu, op)?;
    let back = return_address(cpu, op);
    cpu.far_transfer(selector, offset, bytes(op), back, true)?;
    Ok(After::Jumped)
}

fn far_ret(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.far_return(bytes(op), op.imm)?;
    Ok(After::Jumped)
}

fn bound(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    let n = bytes(op);
    let at = cpu.ea(op, n * 2, Access::Read)?;
    let low = cpu.load_sized(at, n)?;
    let high = cpu.load_sized(at.wrapping_add(n as u64), n)?;
    let outside = if n == 2 {
        let index = cpu.reg::<u16>(op.dst) as i16;
        index < low as i16 || index > high as i16
    } else {
        let index = cpu.reg::<u32>(op.dst) as i32;
        index < low as i32 || index > high as i32
    };
    if outside { cpu.raise(Fault::new(vector::BR)) } else { Ok(After::Next) }
}

fn xsetbv(cpu: &mut Cpu, _: &Uop) -> Run<After> {
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

/// VMCALL and VMMCALL: KVM's hypercalls, none of which CPUID offers. The answer is -ENOSYS.
fn hypercall(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    if !cpu.protected() || cpu.cpl != 0 {
        return cpu.ud();
    }
    cpu.regs.gpr[0] = (-1000i64) as u64;
    Ok(After::Next)
}

/// PAUSEs between two offers of the host's core to other threads.
const PATIENCE: u32 = 64;

/// PAUSE: the vCPU or device thread that is waited for may need this host core.
fn wait_for(cpu: &mut Cpu, _: &Uop) -> Run<After> {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(PATIENCE) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
    Ok(After::Next)
}
