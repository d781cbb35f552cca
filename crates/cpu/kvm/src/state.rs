//! `CpuState` to and from KVM's registers.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable, kvm_lapic_state,
    kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vireo_cpu::{ApicState, CpuError, CpuState, DescriptorTable, PendingEvents, Segment};

use crate::{cpuid::xsave_bytes, engine::Vm, host, msr};

const APIC_BYTES: usize = 1024;
const APIC_ISR: usize = 0x100;
const APIC_IRR: usize = 0x200;

/// Interrupt shadow by STI or MOV SS (KVM_X86_SHADOW_INT_*).
const SHADOW_STI: u8 = 2;

pub(crate) fn read(fd: &VcpuFd, vm: &Vm) -> Result<CpuState, CpuError> {
    let sregs = fd.get_sregs().map_err(host("reading a vCPU's control registers"))?;
    let debug = fd.get_debug_regs().map_err(host("reading a vCPU's debug registers"))?;
    let xcr0 = read_xcr0(fd)?;
    let (events, in_delivery) = read_events(fd)?;
    let mut state = CpuState {
        segments: [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs].map(from_segment),
        ldtr: from_segment(sregs.ldt),
        tr: from_segment(sregs.tr),
        gdtr: DescriptorTable { base: sregs.gdt.base, limit: sregs.gdt.limit },
        idtr: DescriptorTable { base: sregs.idt.base, limit: sregs.idt.limit },
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        xcr0,
        debug: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
        msrs: msr::read(fd, &vm.saved_msrs)?,
        xsave: read_xsave(fd, xsave_bytes(&vm.supported, xcr0))?,
        apic: read_apic(fd, sregs.apic_base, in_delivery)?,
        events,
        tsc: one_msr(fd, msr::TSC)?,
        ..CpuState::default()
    };
    let regs = fd.get_regs().map_err(host("reading a vCPU's registers"))?;
    state.gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, //
        regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    (state.rip, state.rflags) = (regs.rip, regs.rflags);
    Ok(state)
}

/// The order is KVM's: control registers first (EFER, CR4 and the APIC base decide what else is legal), then
/// the APIC, then MSRs with the TSC at their head and the deadline at their end, events and run state last.
pub(crate) fn write(fd: &VcpuFd, state: &CpuState) -> Result<(), CpuError> {
    let before = fd.get_sregs().map_err(host("reading a vCPU's control registers"))?;
    let apic = (!state.apic.registers.is_empty()).then_some(&state.apic);
    let sregs = sregs(state, apic.map_or(before.apic_base, |apic| apic.base_msr));
    fd.set_sregs(&sregs).map_err(refused("control or segment registers"))?;
    if let Some(apic) = apic {
        write_apic(fd, apic)?;
    }
    fd.set_regs(&regs(state)).map_err(refused("registers"))?;
    write_xcr0(fd, state.xcr0)?;
    write_xsave(fd, &state.xsave)?;
    let [db0, db1, db2, db3, dr6, dr7] = state.debug;
    let debug = kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..Default::default() };
    fd.set_debug_regs(&debug).map_err(refused("debug registers"))?;
    if state.tsc != 0 {
        msr::write(fd, &[(msr::TSC, state.tsc)])?;
    }
    msr::write(fd, &state.msrs)?;
    if let Some(apic) = apic {
        msr::write(fd, &[(msr::TSC_DEADLINE, apic.tsc_deadline)])?;
    }
    write_events(fd, &state.events)
}

/// KVM says EINVAL for values that the processor cannot have.
fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |e| match e.errno() {
        libc::EINVAL => CpuError::BadState(format!("KVM refuses its {what}")),
        _ => host("setting a vCPU's state")(e),
    }
}

fn one_msr(fd: &VcpuFd, index: u32) -> Result<u64, CpuError> {
    Ok(msr::read(fd, &[index])?.first().map_or(0, |(_, value)| *value))
}

fn regs(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn sregs(state: &CpuState, apic_base: u64) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.segments.map(to_segment);
    let table = |t: DescriptorTable| kvm_dtable { base: t.base, limit: t.limit, ..Default::default() };
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_segment(state.tr),
        ldt: to_segment(state.ldtr),
        gdt: table(state.gdtr),
        idt: table(state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

fn from_segment(s: kvm_segment) -> Segment {
    let field = |value: u8, shift: u32| u16::from(value) << shift;
    let rights = field(s.type_ & 15, 0)
        | field(s.s & 1, 4)
        | field(s.dpl & 3, 5)
        | field(s.present & 1, 7)
        | field(s.avl & 1, 12)
        | field(s.l & 1, 13)
        | field(s.db & 1, 14)
        | field(s.g & 1, 15);
    Segment { selector: s.selector, base: s.base, limit: s.limit, rights, unusable: s.unusable != 0 }
}

fn to_segment(s: Segment) -> kvm_segment {
    let field = |shift: u32, mask: u16| (s.rights >> shift & mask) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: field(0, 15),
        s: field(4, 1),
        dpl: field(5, 3),
        present: field(7, 1),
        avl: field(12, 1),
        l: field(13, 1),
        db: field(14, 1),
        g: field(15, 1),
        unusable: s.unusable.into(),
        padding: 0,
    }
}

fn read_xcr0(fd: &VcpuFd) -> Result<u64, CpuError> {
    let xcrs = fd.get_xcrs().map_err(host("reading a vCPU's XCR0"))?;
    Ok(xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value))
}

fn write_xcr0(fd: &VcpuFd, value: u64) -> Result<(), CpuError> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = value;
    match fd.set_xcrs(&xcrs) {
        // A vCPU without XSAVE has no XCR0; 1 is what having none means.
        Err(e) if e.errno() == libc::EINVAL && value <= 1 => Ok(()),
        result => result.map_err(refused("XCR0")),
    }
}

fn read_xsave(fd: &VcpuFd, bytes: usize) -> Result<Vec<u8>, CpuError> {
    let xsave = fd.get_xsave().map_err(host("reading a vCPU's FPU and vector registers"))?;
    let all: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok(all[..bytes.min(all.len())].to_vec())
}

fn write_xsave(fd: &VcpuFd, area: &[u8]) -> Result<(), CpuError> {
    let mut xsave = kvm_xsave::default();
    if area.is_empty() {
        return Ok(());
    }
    if area.len() < 576 || area.len() > size_of_val(&xsave.region) {
        return Err(CpuError::BadState(format!("its XSAVE area is {} bytes, not 576 to 4096", area.len())));
    }
    for (word, bytes) in xsave.region.iter_mut().zip(area.chunks(4)) {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(padded);
    }
    // SAFETY: KVM reads more than the 4 KiB of `region` only where AMX was asked for, which we never do.
    unsafe { fd.set_xsave(&xsave) }.map_err(refused("FPU and vector registers"))
}

/// `in_delivery` is a vector that the APIC has handed over but the guest has not seen yet: it goes back to
/// where it was before, from ISR to IRR, so that no event hangs between the two.
fn read_apic(fd: &VcpuFd, base_msr: u64, in_delivery: Option<u8>) -> Result<ApicState, CpuError> {
    let lapic = fd.get_lapic().map_err(host("reading a local APIC"))?;
    let mut registers: Vec<u8> = lapic.regs.iter().map(|b| *b as u8).collect();
    if let Some(vector) = in_delivery {
        let at = usize::from(vector / 32) * 16 + usize::from(vector / 8 % 4);
        registers[APIC_ISR + at] &= !(1 << (vector % 8));
        registers[APIC_IRR + at] |= 1 << (vector % 8);
    }
    Ok(ApicState { base_msr, registers, tsc_deadline: one_msr(fd, msr::TSC_DEADLINE)? })
}

fn write_apic(fd: &VcpuFd, apic: &ApicState) -> Result<(), CpuError> {
    if apic.registers.len() != APIC_BYTES {
        return Err(CpuError::BadState(format!("its local APIC is {} bytes, not 1024", apic.registers.len())));
    }
    let mut lapic = kvm_lapic_state::default();
    for (to, from) in lapic.regs.iter_mut().zip(&apic.registers) {
        *to = *from as _;
    }
    fd.set_lapic(&lapic).map_err(refused("local APIC"))
}

/// The pending events, and the vector of an external interrupt that is on its way from the APIC to the guest.
fn read_events(fd: &VcpuFd) -> Result<(PendingEvents, Option<u8>), CpuError> {
    let raw = fd.get_vcpu_events().map_err(host("reading a vCPU's pending events"))?;
    let mp = fd.get_mp_state().map_err(host("reading a vCPU's run state"))?.mp_state;
    let exception = (raw.exception.injected | raw.exception.pending != 0).then_some(raw.exception.nr);
    let events = PendingEvents {
        exception,
        error_code: exception.and((raw.exception.has_error_code != 0).then_some(raw.exception.error_code)),
        nmi: raw.nmi.injected | raw.nmi.pending != 0,
        nmi_masked: raw.nmi.masked != 0,
        interrupt_shadow: raw.interrupt.shadow != 0,
        halted: mp == KVM_MP_STATE_HALTED,
        wait_for_sipi: [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED].contains(&mp),
    };
    // A software interrupt (`soft`) is simply executed again: RIP still stands at it.
    let external = raw.interrupt.injected != 0 && raw.interrupt.soft == 0;
    Ok((events, external.then_some(raw.interrupt.nr)))
}

fn write_events(fd: &VcpuFd, events: &PendingEvents) -> Result<(), CpuError> {
    let mut raw = kvm_vcpu_events::default();
    if let Some(vector) = events.exception {
        raw.exception.injected = 1;
        raw.exception.nr = vector;
        raw.exception.has_error_code = events.error_code.is_some().into();
        raw.exception.error_code = events.error_code.unwrap_or(0);
    }
    raw.nmi.pending = events.nmi.into();
    raw.nmi.masked = events.nmi_masked.into();
    raw.interrupt.shadow = if events.interrupt_shadow { SHADOW_STI } else { 0 };
    raw.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    fd.set_vcpu_events(&raw).map_err(refused("pending events"))?;
    // INIT_RECEIVED rather than UNINITIALIZED: a SIPI starts the vCPU whether or not the INIT came before
    // the state was saved.
    let mp_state = match (events.wait_for_sipi, events.halted) {
        (true, _) => KVM_MP_STATE_INIT_RECEIVED,
        (_, true) => KVM_MP_STATE_HALTED,
        _ => KVM_MP_STATE_RUNNABLE,
    };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(refused("run state"))
}
