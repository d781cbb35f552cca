//! The engine behind the CPU seam.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    os::fd::BorrowedFd,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use vireo_cpu::{
    Bus, CpuError, CpuState, Engine, Exit, Kick, MsiLine, MsiMessage, NoBus, RunStats, Vcpu, VcpuConfig,
    cpuid::CpuidTable,
};
use vireo_memory::GuestMemory;

use crate::{
    apic::ApicBus,
    cache::BlockCache,
    clock::{Clock, VcpuClock},
    cpu::{Counters, Cpu, Msrs},
    cpuid,
    fault::Fault,
    heat::{Pulse, Trace},
    machine::{CodeMail, DeviceWrites, Shared},
    msr::MsrFile,
    native::{FeatureSet, Fpu, StubCache},
    regs::Regs,
    signal::{VcpuSignal, request},
    steal::StealTime,
    tlb::Tlb,
    translate::{self, block::Translator},
    verify,
};

/// vCPUs that the software engine runs at most.
pub const MAX_VCPUS: u32 = 8;

/// The software CPU engine.
pub struct SoftEngine {
    memory: GuestMemory,
    clock: Arc<Clock>,
    apics: Arc<ApicBus>,
    shared: Arc<Shared>,
    promote: u32,
    verify: bool,
    counts: AtomicBool,
    /// Host addresses from the start of each range of RAM that translated code may reach; 0 where that is not checked.
    guards: AtomicU64,
}

impl SoftEngine {
    pub fn new(memory: &GuestMemory) -> Result<Arc<Self>, CpuError> {
        Self::promoting(memory, translate::PROMOTE)
    }

    /// An engine that translates blocks after they ran `promote` times; with 0 it interprets everything. With less than
    /// a real engine's number it does what that does with hot code as often as it can, and has little room for code.
    pub fn promoting(memory: &GuestMemory, promote: u32) -> Result<Arc<Self>, CpuError> {
        Self::with(memory, promote, false)
    }

    /// An engine that runs everything that is translated in the interpreter as well, and compares what comes of it: a
    /// vCPU on which that differs crashes, and tells what and where. Meant for machines with one vCPU. Many times slower.
    pub fn verifying(memory: &GuestMemory) -> Result<Arc<Self>, CpuError> {
        Self::with(memory, verify::PROMOTE, true)
    }

    fn with(memory: &GuestMemory, promote: u32, verify: bool) -> Result<Arc<Self>, CpuError> {
        let apics = ApicBus::new().map_err(|source| CpuError::Host { what: "starting the timer thread", source })?;
        let shared = Arc::new(Shared::default());
        memory.set_watch(Arc::new(DeviceWrites { memory: memory.downgrade(), shared: shared.clone() }));
        Ok(Arc::new(Self {
            memory: memory.clone(),
            clock: Clock::new(),
            apics,
            shared,
            promote,
            verify,
            counts: AtomicBool::new(false),
            guards: AtomicU64::new(0),
        }))
    }

    /// Has vCPUs that are made from now on count the instructions that they run translated. That costs a few percent;
    /// otherwise only those are counted that are interpreted.
    pub fn count_instructions(&self) {
        self.counts.store(true, Ordering::Relaxed);
    }

    /// Has translated code of vCPUs that are made from now on check every address that it is about to read from or write
    /// to: the process dies of an illegal instruction where that is not the guest's RAM, or farther than `bytes` into one
    /// of its ranges. For tests.
    pub fn check_accesses(&self, bytes: u64) {
        self.guards.store(bytes, Ordering::Relaxed);
    }

    /// When the first instruction with user privilege ran, on any vCPU.
    pub fn first_user_instruction(&self) -> Option<Instant> {
        self.shared.first_user.get().copied()
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn create_vcpu(&self, config: &VcpuConfig) -> Result<Box<dyn Vcpu>, CpuError> {
        if config.count > MAX_VCPUS || config.id >= config.count {
            return Err(CpuError::TooManyVcpus { engine: "the software engine", asked: config.count, most: MAX_VCPUS });
        }
        let signal = Arc::new(VcpuSignal::default());
        let clock = VcpuClock::new(self.clock.clone());
        let apic = self.apics.add(config.id, signal.clone(), clock.clone())?;
        let mail = Arc::new(CodeMail::default());
        self.shared.join(config.id, signal.clone(), mail.clone());
        let mut table = config.cpuid.clone();
        cpuid::set_topology(&mut table, config.id, config.count);
        let features = FeatureSet::from_cpuid(&table);
        let stubs = StubCache::new(features)
            .map_err(|source| CpuError::Host { what: "mapping memory for native stubs", source })?;
        let bus: *const dyn Bus = &raw const NO_BUS;
        let eager = (2..translate::PROMOTE).contains(&self.promote);
        let mut cpu = Box::new(Cpu {
            regs: Regs::default(),
            rip: 0,
            data: ptr::null_mut(),
            system_data: ptr::null_mut(),
            code: ptr::null(),
            block: ptr::null(),
            translated: translate::State::default(),
            next: ptr::null(),
            link: ptr::null_mut(),
            ip_mask: 0,
            seg_base: [0; 8],
            rflags: 2,
            cpl: 0,
            mode: 0,
            shadow: false,
            suspended: Vec::new(),
            pauses: 0,
            transferred: false,
            switched: false,
            fault: Fault::ud(),
            seg: Default::default(),
            ldtr: Default::default(),
            tr: Default::default(),
            gdtr: Default::default(),
            idtr: Default::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            debug: [0; 6],
            msr: Msrs::default(),
            nmi_pending: false,
            nmi_masked: false,
            halted: false,
            wait_for_sipi: false,
            crash: None,
            id: config.id,
            memory: self.memory.clone(),
            tlb: Tlb::default(),
            inspect: false,
            breakpoint_hits: 0,
            cache: BlockCache::new(config.count, eager && !self.verify)
                .map_err(|source| CpuError::Host { what: "mapping memory for translated code", source })?,
            fpu: Fpu::default(),
            stubs,
            stubs_full: false,
            kept_stubs: Default::default(),
            kept_specials: Vec::new(),
            translator: cfg!(target_arch = "x86_64").then(|| Box::new(Translator::new())),
            pulse: None,
            trace: Trace::default(),
            scratch_ops: Vec::new(),
            plain_msrs: MsrFile::default(),
            efer_extra: efer_extra(&table),
            clock,
            steal: StealTime::default(),
            signal,
            apic,
            shared: self.shared.clone(),
            mail,
            cpuid: table,
            bus,
            verifier: self.verify.then(Box::default),
            counters: Counters::default(),
        });
        cpu.cache.promote = self.promote;
        cpu.trace.eager = eager;
        // SAFETY: once, and both are the same `Cpu`'s.
        cpu.tlb.windows = unsafe { cpu.cache.code.windows() };
        cpu.translated.counts = self.counts.load(Ordering::Relaxed);
        let most = self.guards.load(Ordering::Relaxed);
        cpu.translated.guards = most != 0;
        let gathered = &raw const cpu.translated.gathered;
        let ram = self.memory.ranges().into_iter().map(|(_, host, bytes)| [host as u64, bytes.min(most)]);
        let own = [gathered as u64, size_of_val(&cpu.translated.gathered) as u64];
        for (guarded, range) in cpu.translated.guarded.iter_mut().zip(ram.chain([own])) {
            *guarded = range;
        }
        cpu.translated.cpu = &raw const *cpu as u64;
        cpu.translated.requests = cpu.signal.word();
        cpu.translated.interrupts = cpu.apic.word();
        cpu.translated.kernel_code = &raw const cpu.tlb.kernel.code as u64;
        cpu.restore(&CpuState::reset())?;
        cpu.wait_for_sipi = config.id != 0;
        Ok(Box::new(SoftVcpu { cpu: RefCell::new(cpu) }))
    }

    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, CpuError> {
        Ok(self.apics.msi_line())
    }

    fn send_msi(&self, message: MsiMessage) {
        self.apics.deliver_msi(message);
    }

    fn ioeventfd(&self, _gpa: u64, _len: u32, _fd: BorrowedFd<'_>) -> bool {
        false
    }

    fn remove_ioeventfd(&self, _gpa: u64, _len: u32, _fd: BorrowedFd<'_>) {}

    fn supported_cpuid(&self) -> Result<CpuidTable, CpuError> {
        Ok(cpuid::soft_cpuid(self.clock.tsc_khz()))
    }
}

static NO_BUS: NoBus = NoBus;

/// One vCPU of the software engine.
pub struct SoftVcpu {
    cpu: RefCell<Box<Cpu>>,
}

struct SoftKick(Arc<VcpuSignal>);

impl Kick for SoftKick {
    fn kick(&self) {
        self.0.raise(request::KICK);
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, CpuError> {
        let bus: *const (dyn Bus + '_) = bus;
        // SAFETY: only the lifetime changes; the pointer is replaced before this call, and with it the borrow, ends.
        let cpu = self.cpu.get_mut();
        cpu.bus = unsafe { std::mem::transmute::<*const (dyn Bus + '_), *const (dyn Bus + 'static)>(bus) };
        // Where there is no such timer, nothing is hot.
        // SAFETY: the vCPU's own word, and the timer goes before this returns.
        cpu.pulse = if cpu.cache.promote > 1 { unsafe { Pulse::new(cpu.signal.word()) }.ok() } else { None };
        if cpu.trace.eager {
            cpu.look_eagerly();
        }
        let exit = cpu.run_loop();
        cpu.pulse = None;
        cpu.park_fpu();
        cpu.bus = &raw const NO_BUS;
        Ok(exit)
    }

    fn state(&self) -> Result<CpuState, CpuError> {
        Ok(self.cpu.borrow_mut().save())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), CpuError> {
        self.cpu.get_mut().restore(state)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(SoftKick(self.cpu.borrow().signal.clone()))
    }

    fn stats(&self) -> RunStats {
        let cpu = self.cpu.borrow();
        let c = &cpu.counters;
        let t = &c.translated;
        let mut exits = BTreeMap::from([
            ("blocks", c.blocks),
            ("translated_blocks", t.blocks),
            ("translated_instructions", t.instructions),
            ("translated_entries", t.entries),
            ("translated_links", t.links),
            ("translated_hot_blocks", t.hot),
            ("translated_paths", t.paths),
            ("translated_windowless_accesses", t.windowless),
            ("windows", cpu.tlb.windows.count()),
            ("translated_bytes", cpu.cache.code.used() as u64),
            ("translated_slow_accesses", t.slow_accesses),
            ("translated_interpreted", t.interpreted),
            ("translation_microseconds", t.nanoseconds / 1000),
            ("translated_microseconds", t.running / 1000),
            ("running_microseconds", c.running / 1000),
            ("decoded_instructions", cpu.cache.decoded),
            ("code_cache_clears", cpu.cache.clears),
            ("code_cache_collections", cpu.cache.collections),
            ("invalidated_blocks", cpu.cache.invalidated),
            ("code_writes", c.code_writes),
            ("tlb_misses", c.tlb_misses),
            ("tlb_flushes", cpu.tlb.flushes),
            ("cr3_loads", c.cr3_loads),
            ("page_faults", c.page_faults),
            ("exceptions", c.exceptions),
            ("interrupts", c.interrupts),
            ("port_io", c.pio),
            ("mmio", c.mmio),
            ("halts", c.halts),
            ("flushes_while_halted", c.flushes_asked),
        ]);
        exits.extend(cpu.verifier.iter().flat_map(|v| v.figures()));
        let instructions = cpu.translated.counts.then_some(c.instructions);
        RunStats { instructions, exits }
    }
}

/// EFER bits that the guest may set and that need nothing here: automatic IBRS (leaf 0x80000021, EAX bit 8).
fn efer_extra(table: &CpuidTable) -> u64 {
    if table.get(0x8000_0021, 0).eax & 1 << 8 != 0 { 1 << 21 } else { 0 }
}
