//! One virtual CPU's state while it runs.

use std::{collections::HashMap, ptr, sync::Arc};

use vireo_cpu::{Bus, CrashInfo, DescriptorTable};
use vireo_memory::GuestMemory;

use crate::{
    apic::LocalApic,
    cache::{Block, BlockCache},
    clock::VcpuClock,
    fault::{Fault, Run, Stop},
    heat::{Pulse, Trace},
    machine::{CodeMail, Shared},
    msr::MsrFile,
    native::{Fpu, Special, Stub, StubCache},
    regs::{Regs, pack, unpack},
    signal::VcpuSignal,
    steal::StealTime,
    tlb::{CodeSet, DataSet, Tlb},
    translate::{self, block::Translator},
    uop::{Handler, Uop},
    verify::Verifier,
};

pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const PGE: u64 = 1 << 7;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    /// VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP.
    pub const VALID: u64 = 0x0037_07ff;
}

pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

pub mod rflags {
    pub const STATUS: u64 = 0x8d5;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const ID: u64 = 1 << 21;
}

/// Segment registers in encoding order.
pub mod sreg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Bits of [`Cpu::mode`]: what decoding depends on.
pub mod mode {
    /// Code size in bits 0–1.
    pub const CODE16: u8 = 0;
    pub const CODE32: u8 = 1;
    pub const CODE64: u8 = 2;
    pub const CODE: u8 = 3;
    /// The stack segment is a 32-bit one (always clear in 64-bit code).
    pub const STACK32: u8 = 1 << 2;
    /// One instruction to a block (single step, breakpoints).
    pub const SINGLE: u8 = 1 << 3;
    /// With user privilege: what translations know of memory is of one privilege.
    pub const USER: u8 = 1 << 4;
}

pub use vireo_cpu::Segment;

/// Rights bits of [`Segment::rights`].
pub mod rights {
    pub const ACCESSED: u16 = 1;
    /// Writable for data, readable for code.
    pub const WRITE_OR_READ: u16 = 2;
    /// Expand-down for data, conforming for code.
    pub const DOWN_OR_CONFORMING: u16 = 4;
    pub const CODE: u16 = 8;
    pub const S: u16 = 1 << 4;
    pub const PRESENT: u16 = 1 << 7;
    pub const LONG: u16 = 1 << 13;
    pub const BIG: u16 = 1 << 14;
    pub const GRANULAR: u16 = 1 << 15;

    pub const fn dpl(rights: u16) -> u8 {
        (rights >> 5) as u8 & 3
    }
}

/// MSRs that the core itself acts on.
#[derive(Clone, Debug, Default)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
}

/// Slow-path events, for `--metrics`.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub instructions: u64,
    pub blocks: u64,
    pub tlb_misses: u64,
    pub page_faults: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    pub pio: u64,
    pub mmio: u64,
    pub halts: u64,
    /// Flushes of the TLB that others asked for while this vCPU was halted.
    pub flushes_asked: u64,
    pub cr3_loads: u64,
    pub code_writes: u64,
    /// Nanoseconds in which guest code ran, where that is measured.
    pub running: u64,
    pub translated: translate::Counters,
}

#[repr(C)]
pub struct Cpu {
    pub regs: Regs,
    /// The next instruction's address (EIP, without the CS base, in legacy modes); during a block, its start.
    pub rip: u64,
    /// The TLB set of the current privilege, and the one for implicit supervisor accesses.
    pub data: *mut DataSet,
    pub system_data: *mut DataSet,
    /// Where blocks of the current privilege start.
    pub code: *const CodeSet,
    pub block: *const Block,
    pub translated: translate::State,
    /// The block that follows if its link is known, else null.
    pub next: *const Block,
    /// The link to fill when the next block is looked up, or null.
    pub link: *mut *const Block,
    pub ip_mask: u64,
    /// What an effective address in each segment starts from (0 for ES, CS, SS, DS in 64-bit code; `FLAT` too).
    pub seg_base: [u64; 8],
    /// RFLAGS but for the status bits, which are in `regs.flags`.
    pub rflags: u64,
    pub cpl: u8,
    pub mode: u8,
    /// Interrupts are held off for the next block (STI, MOV SS, POP SS).
    pub shadow: bool,
    /// Handlers of the running block's ops while it is to be left at the next one.
    pub suspended: Vec<(*mut Uop, Handler)>,
    /// PAUSE instructions so far.
    pub pauses: u32,
    /// The instruction went through a gate or SYSCALL, or loaded SS: no single-step trap after it.
    pub transferred: bool,
    /// The instruction switched tasks before it faulted: the fault is the new task's, at its own `rip`.
    pub switched: bool,
    pub fault: Fault,

    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0–DR3, DR6, DR7.
    pub debug: [u64; 6],
    pub msr: Msrs,
    pub nmi_pending: bool,
    pub nmi_masked: bool,
    pub halted: bool,
    pub wait_for_sipi: bool,
    pub crash: Option<CrashInfo>,

    pub id: u32,
    pub memory: GuestMemory,
    pub tlb: Tlb,
    /// Every data access takes the slow path, which looks at alignment and data breakpoints.
    pub inspect: bool,
    /// Data breakpoints that the current instruction hit.
    pub breakpoint_hits: u64,
    pub cache: BlockCache,
    pub fpu: Fpu,
    pub stubs: StubCache,
    /// The stub cache ran full: drop all code before decoding more.
    pub stubs_full: bool,
    /// What uops with native handlers point at.
    pub kept_stubs: HashMap<usize, Box<Stub>>,
    #[allow(clippy::vec_box, reason = "ops point at them")]
    pub kept_specials: Vec<Box<Special>>,
    /// Taken out while it works; `None` also where there is no translator.
    pub translator: Option<Box<Translator>>,
    /// Says when to look for hot code, while the vCPU runs.
    pub pulse: Option<Pulse>,
    pub trace: Trace,
    /// Kept between decodings for its allocation.
    pub scratch_ops: Vec<Uop>,
    pub plain_msrs: MsrFile,
    /// EFER bits beyond the core's own that CPUID tells of and that mean nothing here.
    pub efer_extra: u64,
    pub clock: Arc<VcpuClock>,
    pub steal: StealTime,
    pub signal: Arc<VcpuSignal>,
    pub apic: Arc<LocalApic>,
    pub shared: Arc<Shared>,
    pub mail: Arc<CodeMail>,
    pub cpuid: vireo_cpu::cpuid::CpuidTable,
    /// The bus of the current `run`.
    pub bus: *const dyn Bus,
    /// Translations are compared with the interpreter.
    pub verifier: Option<Box<Verifier>>,
    pub counters: Counters,
}

impl Cpu {
    pub fn bus(&self) -> &dyn Bus {
        // SAFETY: set at the start of `run` to a bus that outlives it; only used within `run`.
        unsafe { &*self.bus }
    }

    /// Notes an exception that ends the current instruction.
    #[cold]
    #[inline(never)]
    pub fn raise<T>(&mut self, fault: Fault) -> Run<T> {
        self.fault = fault;
        Err(Stop)
    }

    pub fn gp<T>(&mut self, error: u32) -> Run<T> {
        self.raise(Fault::gp(error))
    }

    pub fn ud<T>(&mut self) -> Run<T> {
        self.raise(Fault::ud())
    }

    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    pub fn code64(&self) -> bool {
        self.mode & mode::CODE == mode::CODE64
    }

    pub fn real_mode(&self) -> bool {
        self.cr0 & cr0::PE == 0
    }

    /// Virtual-8086 mode.
    pub fn v86(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    pub fn protected(&self) -> bool {
        !self.real_mode() && !self.v86()
    }

    pub fn flags(&self) -> u64 {
        unpack(self.regs.flags) | self.rflags | 2
    }

    /// Sets all of RFLAGS. Privilege has been checked; [`Self::refresh`] follows if VM, AC or TF may change.
    pub fn set_flags(&mut self, value: u64) {
        self.regs.flags = pack(value);
        let enabled = value & !self.rflags & rflags::IF != 0;
        self.rflags = value & !rflags::STATUS & 0x003f_7702 | 2;
        if self.debug[5] & 0xff == 0 {
            // Without breakpoints nothing looks at RF.
            self.rflags &= !rflags::RF;
        }
        if enabled {
            self.interrupts_enabled();
        }
    }

    /// IF went from 0 to 1: what waited in the APIC is looked at before long.
    pub fn interrupts_enabled(&self) {
        if self.apic.pending().is_some() {
            self.signal.raise(crate::signal::request::INTERRUPT);
        }
    }

    pub fn iopl(&self) -> u8 {
        (self.rflags >> 12) as u8 & 3
    }

    /// Recomputes everything that depends on control registers, CS, SS, CPL and RFLAGS.{AC,TF}.
    pub fn refresh(&mut self) {
        let cs = self.seg[sreg::CS].rights;
        let code = if self.long_mode() && cs & rights::LONG != 0 {
            mode::CODE64
        } else if self.protected() && cs & rights::BIG != 0 {
            mode::CODE32
        } else {
            mode::CODE16
        };
        let stack32 = code != mode::CODE64 && self.seg[sreg::SS].rights & rights::BIG != 0;
        let single = self.rflags & rflags::TF != 0 || self.debug[5] & 0xff != 0;
        self.mode = code | if stack32 { mode::STACK32 } else { 0 } | if single { mode::SINGLE } else { 0 };
        self.ip_mask = if code == mode::CODE64 { u64::MAX } else { 0xffff_ffff };
        for i in 0..6 {
            self.seg_base[i] = if code == mode::CODE64 && i < sreg::FS { 0 } else { self.seg[i].base };
        }
        self.seg_base[6] = 0;
        self.select_sets();
    }

    /// Points `data` and `system_data` at the right TLB sets.
    pub fn select_sets(&mut self) {
        let ac = self.rflags & rflags::AC != 0 && self.cr4 & cr4::SMAP != 0;
        self.system_data = &raw mut self.tlb.kernel.data;
        let space = self.tlb.space();
        self.translated.user_pages = &raw const space.supervisor_ac as u64;
        self.translated.user_data = &raw const space.user as u64;
        self.translated.user_code = &raw const space.user_code as u64;
        self.data = if self.cpl == 3 {
            &raw mut space.user
        } else if ac {
            &raw mut space.supervisor_ac
        } else {
            self.system_data
        };
        self.code = &raw const *self.tlb.code(self.cpl == 3);
        self.mode = self.mode & !mode::USER | if self.cpl == 3 { mode::USER } else { 0 };
        let watched = self.debug[5] & 0xff != 0
            && (0..4).any(|i| self.debug[5] >> (i * 2) & 3 != 0 && self.debug[5] >> (16 + i * 4) & 1 != 0);
        let aligned = self.cpl == 3 && self.cr0 & cr0::AM != 0 && self.rflags & rflags::AC != 0;
        self.inspect = watched || aligned;
        if self.inspect {
            self.data = self.tlb.empty();
            self.see_letters();
            self.tlb.windows.forget_all();
        }
        self.translated.window_set = if ac || self.inspect { 0 } else { self.data as u64 };
        self.next = ptr::null();
        self.link = ptr::null_mut();
    }
}
