//! Instructions that look at or change the system: rare enough to share one handler and a table.

mod control;
pub mod msr;
mod segments;
mod transfer;

use crate::{
    cpu::{Cpu, cr4, rflags},
    fault::{Fault, Run, vector},
    mmu::{Access, canonical},
    ops::flow::leave,
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
    Rdmsr msr::rdmsr;
    Wrmsr msr::wrmsr;
    Syscall transfer::syscall;
    Sysret transfer::sysret;
    Sysenter transfer::sysenter;
    Sysexit transfer::sysexit;
    Int transfer::int;
    Int3 transfer::int3;
    Int1 transfer::int1;
    Into transfer::into;
    Iret transfer::iret;
    Lgdt segments::lgdt;
    Lidt segments::lidt;
    Sgdt segments::sgdt;
    Sidt segments::sidt;
    Lldt segments::lldt;
    Ltr segments::ltr;
    Sldt segments::sldt;
    Str segments::str;
    Lmsw control::lmsw;
    Smsw control::smsw;
    Clts control::clts;
    Invlpg invlpg;
    Invpcid invpcid;
    Privileged privileged_nothing;
    ReadCr control::read_cr;
    WriteCr control::write_cr;
    ReadDr control::read_dr;
    WriteDr control::write_dr;
    Swapgs msr::swapgs;
    Rdfsbase msr::read_base;
    Wrfsbase msr::write_base;
    Clac clac;
    Stac stac;
    Lar segments::lar;
    Lsl segments::lsl;
    Verr segments::verr;
    Verw segments::verw;
    Arpl segments::arpl;
    MovSeg segments::mov_seg;
    PopSeg segments::pop_seg;
    LoadFar segments::load_far;
    FarJmp transfer::far_jmp;
    FarCall transfer::far_call;
    FarRet transfer::far_ret;
    Bound bound;
    Xsetbv control::xsetbv;
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
}

/// A far pointer in memory: offset of the operand size, then a selector.
fn far_pointer(cpu: &mut Cpu, op: &Uop) -> Run<(u16, u64)> {
    let n = bytes(op);
    let at = cpu.ea(op, n + 2, Access::Read)?;
    let offset = cpu.load_sized(at, n)?;
    Ok((cpu.load::<u16>(at.wrapping_add(n as u64))?, offset))
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

fn invlpg(cpu: &mut Cpu, op: &Uop) -> Run<After> {
    cpu.require_ring0()?;
    let offset = cpu.offset_of(op) & Cpu::address_mask(op);
    let at = offset.wrapping_add(cpu.seg_base[op.seg as usize]);
    let at = if cpu.code64() { at } else { at & 0xffff_ffff };
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
