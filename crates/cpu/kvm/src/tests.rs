use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use vireo_cpu::{Bus, CpuError, CpuState, Engine, Exit, Kick, MsiMessage, Vcpu, VcpuConfig};
use vireo_memory::GuestMemory;

use crate::{KvmEngine, KvmOptions, Ring0Speed, probe, probe::probe_device};

/// The engine, or `None` (told by name) where this host has no KVM.
fn engine(test: &str, memory: &GuestMemory) -> Option<Arc<KvmEngine>> {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED {test}: no /dev/kvm");
        return None;
    }
    Some(KvmEngine::new(memory, KvmOptions::default()).unwrap())
}

fn memory_with(code: &[u8]) -> GuestMemory {
    let memory = GuestMemory::new(1 << 20, 1 << 20).unwrap();
    memory.write(0x1000, code).unwrap();
    memory
}

fn vcpu(engine: &KvmEngine, id: u32, count: u32) -> Box<dyn Vcpu> {
    engine.create_vcpu(&VcpuConfig { id, count, cpuid: engine.supported_cpuid().unwrap() }).unwrap()
}

/// Real mode at 0:0x1000.
fn real_mode() -> CpuState {
    let mut state = CpuState::reset();
    state.segments[1] = state.segments[0];
    state.segments[1].rights = 0x9b;
    state.rip = 0x1000;
    state
}

/// Remembers port writes; port 0x21 kicks.
struct Ports {
    written: Mutex<Vec<(u16, Vec<u8>)>>,
    kicker: Arc<dyn Kick>,
}

impl Bus for Ports {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.written.lock().unwrap().push((port, data.to_vec()));
        if port == 0x21 {
            self.kicker.kick();
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn eoi(&self, _vector: u8) {}
}

fn ports(vcpu: &dyn Vcpu) -> Ports {
    Ports { written: Mutex::default(), kicker: vcpu.kicker() }
}

#[test]
fn a_missing_device_is_told_with_its_remedy() {
    let options = KvmOptions { device: "/nonexistent/kvm".into() };
    let memory = GuestMemory::new(4096, 4096).unwrap();
    let error = KvmEngine::new(&memory, options.clone()).err().unwrap().to_string();
    assert!(error.contains("/nonexistent/kvm") && error.contains("modprobe"), "{error}");
    let probed = probe_device(&options);
    assert!(matches!(probed.speed, Ring0Speed::Unavailable { .. }), "{probed:?}");
    // a device that is none
    let zero = probe_device(&KvmOptions { device: "/dev/zero".into() });
    assert!(matches!(zero.speed, Ring0Speed::Unavailable { .. }), "{zero:?}");
}

#[test]
fn the_probe_is_quick_and_says_which() {
    if engine("the_probe_is_quick_and_says_which", &memory_with(&[])).is_none() {
        return;
    }
    let start = Instant::now();
    let probed = probe();
    let took = start.elapsed();
    eprintln!("probe: {probed:?} in {took:?}");
    assert!(!matches!(probed.speed, Ring0Speed::Unavailable { .. }), "{probed:?}");
    assert!(probed.max_vcpus >= 1);
    // 50 ms is the promise on an idle host; tests share theirs.
    assert!(took < Duration::from_millis(500), "{took:?}");
}

#[test]
fn real_mode_hello_through_a_port() {
    #[rustfmt::skip]
    let memory = memory_with(&[
        0xbe, 0x00, 0x20,       // mov si, 0x2000
        0xb9, 0x05, 0x00,       // mov cx, 5
        0xba, 0x20, 0x00,       // mov dx, 0x20
        0xf3, 0x6e,             // rep outsb
        0xed,                   // in ax, dx
        0xe7, 0x20,             // out 0x20, ax
        0xe6, 0x21,             // out 0x21, al
        0xf4,
    ]);
    memory.write(0x2000, b"hello").unwrap();
    let Some(engine) = engine("real_mode_hello_through_a_port", &memory) else { return };
    let mut vcpu = vcpu(&engine, 0, 1);
    vcpu.set_state(&real_mode()).unwrap();
    let bus = ports(&*vcpu);
    assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
    let written = bus.written.lock().unwrap();
    let text: Vec<u8> = written[..5].iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(text, b"hello");
    assert_eq!(written[5], (0x20, vec![0x20, 0x20]));
    assert_eq!(written[6], (0x21, vec![0x20]));
    // a kick inside an exit finishes the instruction first
    assert_eq!(vcpu.state().unwrap().rip, 0x1010);
    assert!(vcpu.stats().exits["port_out"] >= 3);
}

#[test]
fn kicks_reach_a_vcpu_before_during_and_while_halted() {
    for (name, code) in [("spinning", &[0xeb, 0xfe][..]), ("halted", &[0xf4, 0xeb, 0xfd][..])] {
        let memory = memory_with(code);
        let Some(engine) = engine("kicks_reach_a_vcpu_before_during_and_while_halted", &memory) else { return };
        let mut vcpu = vcpu(&engine, 0, 1);
        vcpu.set_state(&real_mode()).unwrap();
        let bus = ports(&*vcpu);
        let kicker = vcpu.kicker();
        kicker.kick();
        assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked, "{name}, before");
        for _ in 0..50 {
            let kicker = vcpu.kicker();
            let other = thread::spawn(move || {
                thread::sleep(Duration::from_millis(1));
                kicker.kick();
            });
            assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked, "{name}, during");
            other.join().unwrap();
        }
        assert_eq!(vcpu.state().unwrap().events.halted, name == "halted");
        drop(vcpu);
        kicker.kick(); // nobody there
    }
}

#[test]
fn state_survives_the_way_to_a_fresh_vcpu() {
    let memory = memory_with(&[0xe6, 0x21, 0xf4]);
    let Some(engine) = engine("state_survives_the_way_to_a_fresh_vcpu", &memory) else { return };
    let mut first = vcpu(&engine, 0, 1);
    let mut state = real_mode();
    state.gpr = std::array::from_fn(|i| 0x1111 * i as u64);
    state.cr2 = 0xdead_f000;
    state.debug[0] = 0x1234;
    state.xcr0 = 7;
    state.xsave.resize(832, 0);
    state.xsave[512..520].copy_from_slice(&7u64.to_le_bytes());
    state.xsave[160..416].fill(0x5a); // XMM
    state.xsave[576..832].fill(0xa5); // upper halves of YMM
    state.msrs = vec![(0x174, 0x10), (0xc000_0082, 0xffff_8000_0000_1000), (0x2ff, 0xc06)];
    first.set_state(&state).unwrap();
    let bus = ports(&*first);
    assert_eq!(first.run(&bus).unwrap(), Exit::Kicked);
    let mut saved = first.state().unwrap();
    assert_eq!(saved.rip, 0x1002);
    assert_eq!(saved.gpr, state.gpr);
    assert_eq!(saved.xcr0, 7);
    assert!(saved.xsave.len() == 832 && saved.xsave[160..416] == state.xsave[160..416]);
    assert_eq!(saved.xsave[576..832], state.xsave[576..832]);
    for msr in &state.msrs {
        assert!(saved.msrs.contains(msr), "{msr:x?}");
    }
    saved.events.nmi_masked = true;
    saved.events.halted = true;
    saved.apic.registers[0x80] = 0x20; // TPR
    saved.cr8 = 2;
    saved.apic.registers[0xa0] = 0x20; // PPR follows

    let other = KvmEngine::new(&memory, KvmOptions::default()).unwrap();
    let mut second = vcpu(&other, 0, 1);
    second.set_state(&saved).unwrap();
    let mut again = second.state().unwrap();
    assert!(again.tsc >= saved.tsc);
    again.tsc = saved.tsc;
    assert_eq!(again, saved);
}

#[test]
fn a_bad_state_is_an_error() {
    let memory = memory_with(&[]);
    let Some(engine) = engine("a_bad_state_is_an_error", &memory) else { return };
    let mut vcpu = vcpu(&engine, 0, 1);
    let bad = |change: fn(&mut CpuState)| {
        let mut state = real_mode();
        change(&mut state);
        state
    };
    for state in [
        bad(|s| s.xcr0 = 4),
        bad(|s| s.xsave.truncate(100)),
        bad(|s| s.xsave.resize(10_000, 0)),
        bad(|s| s.apic.registers = vec![0; 3]),
        bad(|s| s.msrs = vec![(0x9999_9999, 1)]),
        bad(|s| s.cr4 = 1 << 40),
    ] {
        let result = vcpu.set_state(&state);
        assert!(matches!(result, Err(CpuError::BadState(_))), "{result:?}");
    }
    assert!(engine.create_vcpu(&VcpuConfig { id: 1, count: 65, cpuid: Default::default() }).is_err());
    assert!(engine.create_vcpu(&VcpuConfig { id: 2, count: 2, cpuid: Default::default() }).is_err());
}

#[test]
fn cpuid_promises_nothing_that_is_not_served() {
    let memory = memory_with(&[]);
    let Some(engine) = engine("cpuid_promises_nothing_that_is_not_served", &memory) else { return };
    let table = engine.supported_cpuid().unwrap();
    let one = table.get(1, 0);
    assert_eq!(one.ecx & (1 << 3 | 1 << 5), 0, "MONITOR, VMX");
    assert_eq!(one.ecx & (1 << 21 | 1 << 24 | 1 << 31), 1 << 21 | 1 << 24 | 1 << 31, "x2APIC, deadline, hypervisor");
    assert_eq!(table.get(0x8000_0001, 0).ecx & 1 << 2, 0, "SVM");
    assert_eq!(table.get(0xa, 0), Default::default());
    assert_eq!(&table.get(0x4000_0000, 0).ebx.to_le_bytes(), b"KVMK");
    assert_ne!(table.get(0x4000_0001, 0).eax & 1 << 3, 0, "kvmclock");
    assert!(table.missing_in(&table).is_empty());
}

#[test]
fn a_masked_line_is_silent_and_lines_can_be_many() {
    let memory = memory_with(&[]);
    let Some(engine) = engine("a_masked_line_is_silent_and_lines_can_be_many", &memory) else { return };
    let vcpu = vcpu(&engine, 0, 1);
    let mut state = vcpu.state().unwrap();
    let message = |vector| MsiMessage { address: 0xfee0_0000, data: vector };
    // the APIC must be on to take anything
    state.apic.registers[0xf1] = 1;
    let mut vcpu = vcpu;
    vcpu.set_state(&state).unwrap();
    let irr = |vcpu: &dyn Vcpu, vector: usize| {
        // injection may be deferred to a kernel thread
        let mut tries = 0;
        loop {
            let regs = vcpu.state().unwrap().apic.registers;
            let set = regs[0x200 + vector / 32 * 16 + vector / 8 % 4] >> (vector % 8) & 1 != 0;
            tries += 1;
            if set || tries > 20 {
                return set;
            }
            thread::sleep(Duration::from_millis(1));
        }
    };
    let line = engine.msi_line().unwrap();
    line.trigger();
    line.set(Some(message(0x40)));
    line.set(None);
    line.trigger();
    assert!(!irr(&*vcpu, 0x40));
    line.set(Some(message(0x41)));
    line.trigger();
    assert!(irr(&*vcpu, 0x41));
    line.set(Some(message(0x8042))); // level-triggered: moves to the IOAPIC's pins
    line.trigger();
    assert!(irr(&*vcpu, 0x42));
    line.set(Some(message(0x43)));
    line.trigger();
    assert!(irr(&*vcpu, 0x43));
    engine.send_msi(message(0x44));
    assert!(irr(&*vcpu, 0x44));
    // more level-triggered lines than pins still work, by ioctl
    let lines: Vec<_> = (0..30).map(|_| engine.msi_line().unwrap()).collect();
    for (i, line) in lines.iter().enumerate() {
        line.set(Some(message(0x8050 + i as u32)));
        line.trigger();
    }
    for i in 0..lines.len() {
        assert!(irr(&*vcpu, 0x50 + i), "line {i}");
    }
}

#[test]
fn an_ioeventfd_takes_writes_from_the_bus_until_it_is_removed() {
    use std::os::fd::{AsRawFd, BorrowedFd};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    // MMIO at 0x90000: RAM ends below it
    let memory = GuestMemory::new(0x80000, 0x80000).unwrap();
    #[rustfmt::skip]
    memory.write(0x1000, &[
        0xb8, 0x00, 0x90,       //    mov ax, 0x9000
        0x8e, 0xd8,             //    mov ds, ax
        0xa2, 0x10, 0x00,       // 1: mov [0x10], al
        0xa3, 0x10, 0x00,       //    mov [0x10], ax
        0xe6, 0x21,             //    out 0x21, al
        0xeb, 0xf6,             //    jmp 1b
    ]).unwrap();
    let Some(engine) = engine("an_ioeventfd_takes_writes_from_the_bus_until_it_is_removed", &memory) else { return };
    let mut vcpu = vcpu(&engine, 0, 1);
    vcpu.set_state(&real_mode()).unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    // SAFETY: `event` outlives the borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    assert!(engine.ioeventfd(0x90010, 2, fd));
    assert!(!engine.ioeventfd(0x90010, 2, fd), "twice");
    let bus = ports(&*vcpu);
    assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
    assert_eq!(event.read().unwrap(), 2);
    assert_eq!(vcpu.stats().exits.get("mmio_write"), None);
    engine.remove_ioeventfd(0x90010, 2, fd);
    assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
    assert!(event.read().is_err());
    assert_eq!(vcpu.stats().exits["mmio_write"], 2);
}
