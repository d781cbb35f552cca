use std::{slice, sync::Arc};

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vireo_cpu::{Bus, CpuError, CpuState, CrashInfo, Exit, Kick, RunStats, Vcpu, VcpuConfig};

use crate::{cpuid, engine::Vm, host, kick::Kicker, state};

pub(crate) struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    kicker: Arc<Kicker>,
    exits: [u64; KINDS.len()],
    vm: Arc<Vm>,
}

/// Kinds of exits that are counted, in the order of [`KINDS`].
#[derive(Clone, Copy)]
enum Kind {
    PortIn,
    PortOut,
    MmioRead,
    MmioWrite,
    IoapicEoi,
    Signal,
    Other,
}

const KINDS: [&str; 7] = ["port_in", "port_out", "mmio_read", "mmio_write", "ioapic_eoi", "signal", "other"];

impl KvmVcpu {
    pub fn new(vm: Arc<Vm>, config: &VcpuConfig) -> Result<Self, CpuError> {
        let fd = vm.fd.create_vcpu(config.id.into()).map_err(host("creating a KVM vCPU"))?;
        let cpuid = cpuid::for_vcpu(&config.cpuid, &vm.supported, config.id, config.count)?;
        fd.set_cpuid2(&cpuid).map_err(host("giving a vCPU its CPUID leaves"))?;
        let kicker = Arc::new(Kicker::new(&fd)?);
        Ok(Self { id: config.id, fd, kicker, exits: Default::default(), vm })
    }

    fn crash(&self, reason: String) -> Result<Exit, CpuError> {
        let regs = self.fd.get_regs().map_err(host("reading a vCPU's registers"))?;
        let sregs = self.fd.get_sregs().map_err(host("reading a vCPU's control registers"))?;
        Ok(Exit::Crash(CrashInfo { vcpu: self.id, reason, rip: regs.rip, rsp: regs.rsp, cr3: sregs.cr3 }))
    }

    /// After a shutdown, KVM on AMD processors has put the vCPU through INIT already, as their manual
    /// leaves no state to look at (APM vol. 2, 15.14.3): then there is nothing to tell.
    fn triple_fault(&self) -> Result<Exit, CpuError> {
        let sregs = self.fd.get_sregs().map_err(host("reading a vCPU's control registers"))?;
        let rip = self.fd.get_regs().map_err(host("reading a vCPU's registers"))?.rip;
        let reset = rip == 0xfff0 && sregs.cs.base == 0xffff_0000 && sregs.cr0 & 1 == 0;
        self.crash(
            if reset { "triple fault (KVM on this processor does not tell where)" } else { "triple fault" }.into(),
        )
    }

    fn internal_error(&mut self) -> Result<Exit, CpuError> {
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let (internal, emulation) = unsafe {
            let run = self.fd.get_kvm_run();
            (run.__bindgen_anon_1.internal, run.__bindgen_anon_1.emulation_failure)
        };
        if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
            let data: Vec<String> =
                internal.data.iter().take(internal.ndata as usize).map(|word| format!("{word:#x}")).collect();
            return self.crash(format!("KVM internal error {} ({})", internal.suberror, data.join(" ")));
        }
        // SAFETY: the union has this one member.
        let code = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
        let has_bytes = emulation.ndata > 0 && emulation.flags & 1 != 0;
        let len = if has_bytes { usize::from(code.insn_size).min(code.insn_bytes.len()) } else { 0 };
        let bytes: Vec<String> = code.insn_bytes[..len].iter().map(|b| format!("{b:02x}")).collect();
        self.crash(format!("KVM cannot emulate the instruction at this address (bytes: {})", bytes.join(" ")))
    }

    /// Serves one port access; `data` holds all items of a string instruction.
    fn port(&mut self, bus: &dyn Bus, port: u16, data: *mut u8, bytes: usize, write: bool) {
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let size = usize::from(unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size }).max(1);
        // SAFETY: kvm-ioctls made this slice of the mapped run structure, which lives as long as `fd`; nothing
        // else refers to it before the next KVM_RUN.
        let data = unsafe { slice::from_raw_parts_mut(data, bytes) };
        for item in data.chunks_exact_mut(size) {
            if write { bus.pio_write(port, item) } else { bus.pio_read(port, item) }
        }
    }
}

/// The natural pieces (1, 2, 4 or 8 bytes, aligned) of an access that KVM cut at a page border.
fn pieces(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len - at;
        if left == 0 {
            return None;
        }
        let whole = at == 0 && [1, 2, 4, 8].contains(&left);
        let aligned = 1 << (gpa + at as u64).trailing_zeros().min(3);
        let size = if whole { left } else { aligned.min(1 << left.ilog2()) };
        at += size;
        Some((at - size, size))
    })
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, CpuError> {
        let kicker = self.kicker.clone();
        let _entered = kicker.enter();
        loop {
            let kind = match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let (data, bytes) = (data.as_ptr().cast_mut(), data.len());
                    self.port(bus, port, data, bytes, true);
                    Kind::PortOut
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let (data, bytes) = (data.as_mut_ptr(), data.len());
                    self.port(bus, port, data, bytes, false);
                    Kind::PortIn
                }
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    for (at, size) in pieces(gpa, data.len()) {
                        bus.mmio_read(gpa + at as u64, &mut data[at..at + size]);
                    }
                    Kind::MmioRead
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    for (at, size) in pieces(gpa, data.len()) {
                        bus.mmio_write(gpa + at as u64, &data[at..at + size]);
                    }
                    Kind::MmioWrite
                }
                Ok(VcpuExit::IoapicEoi(vector)) => {
                    bus.eoi(vector);
                    Kind::IoapicEoi
                }
                // With the local APIC in the kernel, HLT waits there and these do not come; going on is right.
                Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => Kind::Other,
                Ok(VcpuExit::Shutdown) => return self.triple_fault(),
                Ok(VcpuExit::InternalError) => return self.internal_error(),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return self.crash(format!("host CPU {cpu} refused to enter the guest, reason {reason:#x}"));
                }
                Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                    return self.crash(format!("the host cannot provide guest memory {gpa:#x}+{size:#x}"));
                }
                Ok(other) => {
                    let reason = format!("KVM came back with {other:?}, for which there is no use here");
                    return self.crash(reason);
                }
                Err(e) if e.errno() == libc::EINTR => {
                    self.exits[Kind::Signal as usize] += 1;
                    if self.kicker.take() {
                        return Ok(Exit::Kicked);
                    }
                    continue;
                }
                // A vCPU that waited for its start-up IPI has something to look at.
                Err(e) if e.errno() == libc::EAGAIN => Kind::Other,
                Err(e) => return Err(host("running a KVM vCPU")(e)),
            };
            self.exits[kind as usize] += 1;
        }
    }

    fn state(&self) -> Result<CpuState, CpuError> {
        state::read(&self.fd, &self.vm)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), CpuError> {
        state::write(&self.fd, state)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }

    fn stats(&self) -> RunStats {
        let counted = KINDS.into_iter().zip(self.exits).filter(|(_, count)| *count > 0);
        RunStats { instructions: None, exits: counted.collect() }
    }
}
