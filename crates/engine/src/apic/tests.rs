use std::{
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use vireo_cpu::{ApicState, MsiMessage};

use super::{registers::offset, *};
use crate::{
    clock::{Clock, VcpuClock},
    msr::MsrFault,
    signal::{VcpuSignal, request},
};

struct Machine {
    bus: Arc<ApicBus>,
    apics: Vec<Arc<LocalApic>>,
    signals: Vec<Arc<VcpuSignal>>,
    clocks: Vec<Arc<VcpuClock>>,
}

const X2APIC: u64 = 0xfee0_0c00;

impl Machine {
    /// vCPUs with their APICs software-enabled, in xAPIC mode.
    fn new(count: u32) -> Self {
        let (bus, vm) = (ApicBus::new().unwrap(), Clock::new());
        let mut machine = Self { bus, apics: vec![], signals: vec![], clocks: vec![] };
        for id in 0..count {
            let (signal, clock) = (Arc::new(VcpuSignal::default()), VcpuClock::new(vm.clone()));
            let apic = machine.bus.add(id, signal.clone(), clock.clone()).unwrap();
            assert_eq!(apic.mmio_write(offset::SVR, 0x1ff), None);
            machine.apics.push(apic);
            machine.signals.push(signal);
            machine.clocks.push(clock);
        }
        machine
    }

    fn x2(count: u32) -> Self {
        let machine = Self::new(count);
        for apic in &machine.apics {
            let bsp = u64::from(apic.id() == 0) << 8;
            apic.msr_write(MSR_APIC_BASE, X2APIC | bsp).unwrap();
        }
        machine
    }

    /// Who has a request for `vector`; takes it back.
    fn got(&self, vector: u8) -> Vec<u32> {
        let has = |apic: &&Arc<LocalApic>| apic.accept() == Some(vector);
        let ids: Vec<u32> = self.apics.iter().filter(has).map(|apic| apic.id()).collect();
        for id in &ids {
            assert_eq!(self.apics[*id as usize].eoi(), None);
        }
        ids
    }

    fn raised(&self, bits: u32) -> Vec<u32> {
        (0..self.signals.len() as u32).filter(|id| self.signals[*id as usize].take(bits) != 0).collect()
    }

    fn msi(&self, address: u64, data: u32) {
        self.bus.deliver_msi(MsiMessage { address, data });
    }
}

/// Waits until the vCPU is asked for `bits`; how long that took.
fn wait(signal: &VcpuSignal, bits: u32) -> Duration {
    let start = Instant::now();
    let end = start + Duration::from_secs(5);
    while signal.take(bits) == 0 {
        assert!(Instant::now() < end, "request {bits:#x} never came");
        signal.take(request::INTERRUPT);
        signal.sleep(Some(end));
    }
    start.elapsed()
}

#[test]
fn the_highest_vector_comes_first_and_nests() {
    let machine = Machine::new(1);
    let (apic, signal) = (&machine.apics[0], &machine.signals[0]);
    assert_eq!((apic.pending(), apic.accept(), apic.eoi()), (None, None, None));
    for vector in [0x31, 0x35, 0x80, 0xfe] {
        apic.deliver(vector, false);
    }
    assert_eq!(signal.take(u32::MAX), request::INTERRUPT);
    assert_eq!(apic.accept(), Some(0xfe));
    assert_eq!(apic.ppr(), 0xf0);
    assert_eq!(apic.pending(), None, "lower classes wait");
    assert_eq!(signal.take(u32::MAX), 0);
    assert_eq!(apic.eoi(), None);
    assert_eq!(signal.take(u32::MAX), request::INTERRUPT, "the end lets the next one in");
    assert_eq!(apic.accept(), Some(0x80));
    apic.deliver(0x8f, false);
    assert_eq!(apic.pending(), None, "same class does not nest");
    apic.deliver(0x90, false);
    assert_eq!(apic.accept(), Some(0x90));
    assert_eq!(apic.mmio_read(offset::ISR + 0x40), 1 << 16 | 1);
    assert_eq!(apic.eoi(), None);
    assert_eq!((apic.ppr(), apic.eoi(), apic.accept()), (0x80, None, Some(0x8f)));
    let _ = apic.eoi();
    assert_eq!((apic.accept(), apic.eoi(), apic.accept()), (Some(0x35), None, Some(0x31)));
    let _ = apic.eoi();
    assert_eq!((apic.ppr(), apic.accept()), (0, None));
}

#[test]
fn task_priority_holds_interrupts_back() {
    let machine = Machine::new(1);
    let (apic, signal) = (&machine.apics[0], &machine.signals[0]);
    apic.set_cr8(5);
    assert_eq!((apic.mmio_read(offset::TPR), apic.cr8(), apic.ppr()), (0x50, 5, 0x50));
    apic.deliver(0x5f, false);
    assert_eq!(apic.pending(), None);
    signal.take(u32::MAX);
    let _ = apic.mmio_write(offset::TPR, 0x4f);
    assert_eq!(signal.take(u32::MAX), request::INTERRUPT);
    assert_eq!((apic.ppr(), apic.accept(), apic.ppr()), (0x4f, Some(0x5f), 0x50));
}

#[test]
fn a_disabled_apic_takes_nothing() {
    let machine = Machine::new(1);
    let apic = &machine.apics[0];
    let _ = apic.mmio_write(offset::LVT + 0x50, 0xfe);
    let _ = apic.mmio_write(offset::SVR, 0xff);
    assert_eq!(apic.mmio_read(offset::LVT + 0x50), 0x100fe, "masked by disabling");
    apic.deliver(0x40, false);
    let _ = apic.mmio_write(offset::LVT + 0x50, 0xfe);
    assert_eq!(apic.mmio_read(offset::LVT + 0x50), 0x100fe, "and stays so");
    let _ = apic.mmio_write(offset::SVR, 0x1ff);
    assert_eq!(apic.accept(), None);
    // a request that was there before is held and comes back
    apic.deliver(0x41, false);
    let _ = apic.mmio_write(offset::SVR, 0xff);
    assert_eq!(apic.pending(), None);
    let _ = apic.mmio_write(offset::SVR, 0x1ff);
    assert_eq!(apic.accept(), Some(0x41));
}

#[test]
fn the_end_of_a_level_interrupt_is_told() {
    let machine = Machine::x2(2);
    // data: level, assert, fixed
    machine.msi(0xfee0_1000, 0xc000 | 0x51);
    let apic = &machine.apics[1];
    assert_eq!(apic.accept(), Some(0x51));
    assert_eq!(apic.msr_read(0x818 + 2), Ok(1 << 17), "TMR");
    assert_eq!(apic.msr_write(0x80b, 0), Ok(Some(0x51)));
    machine.msi(0xfee0_1000, 0x51);
    assert_eq!((apic.accept(), apic.msr_write(0x80b, 0)), (Some(0x51), Ok(None)), "an edge now");
    assert_eq!(apic.msr_write(0x80b, 1), Err(MsrFault));
}

#[test]
fn physical_destinations() {
    let machine = Machine::new(4);
    machine.msi(0xfee0_2000, 0x61);
    assert_eq!(machine.got(0x61), [2]);
    machine.msi(0xfeef_f000, 0x61);
    assert_eq!(machine.got(0x61), [0, 1, 2, 3], "0xff is everyone");
    machine.msi(0xfee0_9000, 0x61);
    machine.msi(0xfed0_2000, 0x61);
    machine.msi(0x1_fee0_2000, 0x61);
    machine.msi(0xfee0_2000, 0x761); // ExtINT
    machine.msi(0xfee0_2000, 0x661); // start-up
    assert_eq!(machine.got(0x61), [] as [u32; 0]);
    machine.raised(u32::MAX);
    machine.msi(0xfee0_3000, 0x400);
    assert_eq!(machine.raised(request::NMI), [3]);
    machine.msi(0xfee0_1000, 0x500);
    assert_eq!(machine.raised(request::INIT), [1]);
}

#[test]
fn logical_destinations_flat_and_cluster() {
    let machine = Machine::new(4);
    for (id, apic) in machine.apics.iter().enumerate() {
        let _ = apic.mmio_write(offset::LDR, 0x0100_0000 << id);
    }
    machine.msi(0xfee0_0004 | 0b1010 << 12, 0x62);
    assert_eq!(machine.got(0x62), [1, 3]);
    for (id, apic) in machine.apics.iter().enumerate() {
        let _ = apic.mmio_write(offset::DFR, 0x0fff_ffff);
        let (cluster, member) = (id as u32 >> 1, 1 << (id & 1));
        let _ = apic.mmio_write(offset::LDR, (cluster << 4 | member) << 24);
    }
    machine.msi(0xfee0_0004 | 0x13 << 12, 0x62);
    assert_eq!(machine.got(0x62), [2, 3]);
    machine.msi(0xfee0_0004 | 0x01 << 12, 0x62);
    assert_eq!(machine.got(0x62), [0]);
    machine.msi(0xfee0_0004 | 0xf2 << 12, 0x62);
    assert_eq!(machine.got(0x62), [1, 3], "every cluster's second");
}

#[test]
fn x2apic_logical_ids_are_fixed() {
    let machine = Machine::x2(18);
    let apic = &machine.apics[17];
    assert_eq!(apic.msr_read(0x80d), Ok(1 << 16 | 2));
    assert_eq!(apic.msr_write(0x80d, 0), Err(MsrFault));
    let icr = |dest: u64, low: u64| machine.apics[0].msr_write(0x830, dest << 32 | low).unwrap();
    icr(0x1_0003, 0x800 | 0x63);
    assert_eq!(machine.got(0x63), [16, 17]);
    icr(0x0_8001, 0x800 | 0x63);
    assert_eq!(machine.got(0x63), [0, 15]);
    icr(17, 0x63);
    assert_eq!(machine.got(0x63), [17]);
    icr(0xff, 0x63);
    assert_eq!(machine.got(0x63), [] as [u32; 0], "no broadcast in x2APIC mode");
    icr(0xffff_ffff, 0x63);
    assert_eq!(machine.got(0x63).len(), 18);
}

#[test]
fn lowest_priority_goes_to_one_that_is_least_busy() {
    let machine = Machine::new(4);
    for (id, apic) in machine.apics.iter().enumerate() {
        let _ = apic.mmio_write(offset::LDR, 0x0100_0000 << id);
        apic.set_tpr(if id == 2 { 0 } else { 0x20 });
    }
    machine.msi(0xfee0_f00c, 0x64); // redirection hint, logical
    machine.msi(0xfee0_f004, 0x175); // delivery mode lowest
    assert_eq!((machine.apics[2].accept(), machine.apics[2].accept()), (Some(0x75), None));
    let _ = machine.apics[2].eoi();
    assert_eq!(machine.got(0x64), [2]);
    // among equals: always one, and not always the same
    machine.apics.iter().for_each(|apic| apic.set_tpr(0));
    let mut all = Vec::new();
    for vector in 0x70..0x78 {
        machine.msi(0xfee0_f004, 0x100 | vector);
        let got = machine.got(vector as u8);
        assert_eq!(got.len(), 1);
        all.extend(got);
    }
    all.sort();
    assert_eq!(all, [0, 0, 1, 1, 2, 2, 3, 3]);
    // a disabled one is no candidate
    let _ = machine.apics[2].mmio_write(offset::SVR, 0xff);
    machine.msi(0xfee0_4004, 0x164);
    assert_eq!(machine.got(0x64), [] as [u32; 0]);
}

#[test]
fn icr_shorthands_and_start_up() {
    let machine = Machine::new(3);
    let icr = |from: usize, dest: u32, low: u32| {
        let apic = &machine.apics[from];
        let _ = apic.mmio_write(offset::ICR_HIGH, dest << 24);
        let _ = apic.mmio_write(offset::ICR, low);
        assert_eq!(apic.mmio_read(offset::ICR), low & !(1 << 12));
        assert_eq!(apic.mmio_read(offset::ICR_HIGH), dest << 24);
    };
    icr(1, 0, 1 << 18 | 0x71);
    assert_eq!(machine.got(0x71), [1], "self");
    icr(1, 0, 2 << 18 | 0x71);
    assert_eq!(machine.got(0x71), [0, 1, 2], "all");
    icr(1, 0, 3 << 18 | 0x71);
    assert_eq!(machine.got(0x71), [0, 2], "all but self");
    icr(1, 0xff, 0x71);
    assert_eq!(machine.got(0x71), [0, 1, 2], "broadcast");
    icr(1, 2, 0x71);
    assert_eq!(machine.got(0x71), [2]);
    machine.raised(u32::MAX);
    icr(0, 0, 3 << 18 | 0x400);
    assert_eq!(machine.raised(request::NMI), [1, 2]);
    icr(0, 0, 3 << 18 | 0xc500);
    assert_eq!(machine.raised(request::INIT), [1, 2]);
    icr(0, 0, 2 << 18 | 0x8500);
    assert_eq!(machine.raised(request::INIT), [] as [u32; 0], "INIT level de-assert");
    icr(0, 1, 0x69a);
    assert_eq!(machine.raised(request::SIPI), [1]);
    assert_eq!(machine.signals[1].sipi_vector.load(std::sync::atomic::Ordering::SeqCst), 0x9a);
}

#[test]
fn illegal_vectors_are_errors() {
    let machine = Machine::new(1);
    let apic = &machine.apics[0];
    let _ = apic.mmio_write(offset::LVT + 0x50, 0xfe);
    machine.msi(0xfee0_0000, 0x0f);
    assert_eq!(apic.accept(), Some(0xfe));
    let _ = apic.eoi();
    let _ = apic.mmio_write(offset::ICR, 1 << 18 | 0x02);
    assert_eq!(apic.mmio_read(offset::ESR), 0, "not before it is written");
    let _ = apic.mmio_write(offset::ESR, 0);
    assert_eq!(apic.mmio_read(offset::ESR), 1 << 5 | 1 << 6);
    let _ = apic.mmio_write(0x40, 7);
    let _ = apic.mmio_write(offset::ESR, 0);
    assert_eq!(apic.mmio_read(offset::ESR), 1 << 7);
    // an illegal vector for the error itself
    let _ = apic.mmio_write(offset::LVT + 0x50, 0x03);
    machine.msi(0xfee0_0000, 0x0f);
    let _ = apic.mmio_write(offset::ESR, 0);
    assert_eq!(apic.mmio_read(offset::ESR), 1 << 6);
}

#[test]
fn base_transitions() {
    const EN: u64 = 1 << 11;
    const EXTD: u64 = 1 << 10;
    let base = 0xfee0_0000;
    // (from, to, allowed), by figure 11-27
    let table = [
        (0, EN, true),
        (0, EN | EXTD, false),
        (0, EXTD, false),
        (EN, 0, true),
        (EN, EN | EXTD, true),
        (EN, EXTD, false),
        (EN | EXTD, EN, false),
        (EN | EXTD, 0, true),
        (EN | EXTD, EXTD, false),
    ];
    for (from, to, allowed) in table {
        let machine = Machine::new(1);
        let apic = &machine.apics[0];
        if from != EN {
            apic.msr_write(MSR_APIC_BASE, base | from).unwrap();
        }
        let done = apic.msr_write(MSR_APIC_BASE, base | to);
        assert_eq!(done.is_ok(), allowed, "{from:#x} to {to:#x}");
        assert_eq!(apic.msr_read(MSR_APIC_BASE).unwrap() & 0xc00, if allowed { to } else { from });
    }
    let machine = Machine::new(2);
    let apic = &machine.apics[1];
    assert_eq!(apic.msr_read(MSR_APIC_BASE), Ok(base | EN));
    assert_eq!(machine.apics[0].msr_read(MSR_APIC_BASE), Ok(base | EN | 1 << 8));
    for reserved in [1, 1 << 9, 1 << 46, 1 << 63] {
        assert_eq!(apic.msr_write(MSR_APIC_BASE, base | EN | reserved), Err(MsrFault));
    }
    assert_eq!(apic.mmio_base(), Some(base));
    assert_eq!(apic.msr_read(0x802), Err(MsrFault), "no x2APIC registers in xAPIC mode");
    apic.msr_write(MSR_APIC_BASE, base | EN | EXTD).unwrap();
    assert_eq!((apic.mmio_base(), apic.msr_read(0x802), apic.msr_read(0x803)), (None, Ok(1), Ok(0x5_0014)));
    assert_eq!(apic.mmio_read(offset::ID), u32::MAX);
    apic.msr_write(MSR_APIC_BASE, base).unwrap();
    assert!(!apic.enabled());
    apic.msr_write(MSR_APIC_BASE, 0x1234_5000 | EN).unwrap();
    assert_eq!((apic.mmio_base(), apic.mmio_read(offset::SVR)), (Some(0x1234_5000), 0xff), "as after reset");
}

#[test]
fn x2apic_registers_fault_where_they_must() {
    let machine = Machine::x2(1);
    let apic = &machine.apics[0];
    for index in [0x800, 0x801, 0x809, 0x80b, 0x80c, 0x80e, 0x829, 0x82f, 0x831, 0x83a, 0x83f, 0x840, 0x8ff] {
        assert_eq!(apic.msr_read(index), Err(MsrFault), "{index:#x}");
    }
    for (index, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x808, 0x100),
        (0x80a, 0),
        (0x80f, 0x400),
        (0x810, 0),
        (0x820, 0),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x832, 1 << 20),
        (0x838, 1 << 32),
        (0x839, 0),
        (0x83e, 4),
        (0x83f, 0x100),
        (0x840, 0),
    ] {
        assert_eq!(apic.msr_write(index, value), Err(MsrFault), "{index:#x}");
    }
    apic.msr_write(0x83f, 0x77).unwrap();
    assert_eq!(machine.got(0x77), [0]);
    assert!(is_apic_msr(0x1b) && is_apic_msr(0x6e0) && is_apic_msr(0x8ff) && !is_apic_msr(0x900));
}

#[test]
fn tsc_deadline_fires_in_time_and_never_early() {
    let machine = Machine::x2(1);
    let (apic, signal, clock) = (&machine.apics[0], &machine.signals[0], &machine.clocks[0]);
    clock.set_tsc(1 << 44);
    apic.msr_write(MSR_TSC_DEADLINE, u64::MAX).unwrap();
    assert_eq!(apic.msr_read(MSR_TSC_DEADLINE), Ok(0), "ignored in count mode");
    apic.msr_write(0x832, 2 << 17 | 0xec).unwrap();
    let mut late = Vec::new();
    for _ in 0..20 {
        let deadline = clock.tsc() + clock.vm().ticks_of_ns(2_000_000);
        apic.msr_write(MSR_TSC_DEADLINE, deadline).unwrap();
        assert_eq!(apic.msr_read(MSR_TSC_DEADLINE), Ok(deadline));
        wait(signal, request::TIMER);
        let now = clock.tsc();
        assert!(now >= deadline);
        late.push(clock.vm().ns_of_ticks(now - deadline));
        apic.timer_due();
        assert_eq!(machine.got(0xec), [0]);
        assert_eq!(apic.msr_read(MSR_TSC_DEADLINE), Ok(0));
    }
    late.sort();
    println!("TSC deadline late by ns: median {} worst {}", late[10], late[19]);
    assert!(late[10] < 20_000_000, "median lateness {} ns", late[10]);
    // in the past: at once; 0: never
    apic.msr_write(MSR_TSC_DEADLINE, 1).unwrap();
    assert_eq!(signal.take(request::TIMER), request::TIMER);
    apic.timer_due();
    assert_eq!(machine.got(0xec), [0]);
    apic.msr_write(MSR_TSC_DEADLINE, clock.tsc() + clock.vm().ticks_of_ns(3_000_000)).unwrap();
    apic.msr_write(MSR_TSC_DEADLINE, 0).unwrap();
    sleep(Duration::from_millis(10));
    apic.timer_due();
    assert_eq!(machine.got(0xec), [] as [u32; 0]);
    // moved earlier, then later
    signal.take(u32::MAX);
    for ms in [60_000, 1, 20] {
        apic.msr_write(MSR_TSC_DEADLINE, clock.tsc() + clock.vm().ticks_of_ns(ms * 1_000_000)).unwrap();
    }
    let took = wait(signal, request::TIMER);
    assert!(took >= Duration::from_millis(19) && took < Duration::from_secs(4), "{took:?}");
}

#[test]
fn one_shot_and_periodic_counts() {
    let machine = Machine::new(1);
    let (apic, signal) = (&machine.apics[0], &machine.signals[0]);
    let _ = apic.mmio_write(offset::DIVIDE, 0b1011); // by 1
    let _ = apic.mmio_write(offset::LVT, 0xec);
    let start = Instant::now();
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 5_000_000);
    let left = apic.mmio_read(offset::CURRENT_COUNT);
    assert!(left <= 5_000_000 && left > 0);
    wait(signal, request::TIMER);
    assert!(start.elapsed() >= Duration::from_micros(4990));
    apic.timer_due();
    assert_eq!((machine.got(0xec), apic.mmio_read(offset::CURRENT_COUNT)), (vec![0], 0));
    sleep(Duration::from_millis(8));
    assert_eq!(signal.take(request::TIMER), 0, "one shot only");

    let _ = apic.mmio_write(offset::DIVIDE, 0b0000); // by 2
    let _ = apic.mmio_write(offset::LVT, 1 << 17 | 0xed);
    let start = Instant::now();
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 1_000_000);
    for _ in 0..10 {
        wait(signal, request::TIMER);
        apic.timer_due();
        assert_eq!(machine.got(0xed), [0]);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_micros(19_990), "{took:?}");
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 0);
    sleep(Duration::from_millis(5));
    signal.take(u32::MAX);
    apic.timer_due();
    assert_eq!(machine.got(0xed), [] as [u32; 0], "stopped");
    // masked: it runs, silently
    let _ = apic.mmio_write(offset::LVT, 1 << 16 | 0xec);
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 100);
    wait(signal, request::TIMER);
    apic.timer_due();
    assert_eq!(machine.got(0xec), [] as [u32; 0]);
    for (value, by) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let _ = apic.mmio_write(offset::DIVIDE, value);
        let _ = apic.mmio_write(offset::INITIAL_COUNT, u32::MAX);
        let first = apic.mmio_read(offset::CURRENT_COUNT);
        sleep(Duration::from_millis(2));
        let ns = u64::from(first - apic.mmio_read(offset::CURRENT_COUNT)) * by;
        assert!((1_900_000..500_000_000).contains(&ns), "divide {by}: {ns} ns in 2 ms");
    }
}

#[test]
fn an_absurdly_short_period_does_not_hang_anything() {
    let machine = Machine::new(1);
    let (apic, signal) = (&machine.apics[0], &machine.signals[0]);
    let _ = apic.mmio_write(offset::LVT, 1 << 17 | 0xec);
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 1);
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(20) {
        wait(signal, request::TIMER);
        apic.timer_due();
        count += machine.got(0xec).len();
    }
    let most = start.elapsed().as_micros() as usize / 20 + 1;
    assert!((1..=most).contains(&count), "{count} interrupts where {most} are the most");
}

#[test]
fn a_sleeping_vcpu_wakes_by_its_timer_and_by_others() {
    let machine = Machine::x2(1);
    let (apic, signal) = (machine.apics[0].clone(), machine.signals[0].clone());
    apic.msr_write(0x832, 0xec).unwrap();
    apic.msr_write(0x838, 10_000_000).unwrap();
    let start = Instant::now();
    signal.sleep(None);
    assert!(start.elapsed() >= Duration::from_millis(9) && signal.take(u32::MAX) == request::TIMER);
    apic.timer_due();
    assert_eq!(machine.got(0xec), [0]);
    signal.take(u32::MAX);
    let line = machine.bus.msi_line();
    line.set(Some(MsiMessage { address: 0xfee0_0000, data: 0x41 }));
    let device = std::thread::spawn(move || {
        sleep(Duration::from_millis(5));
        line.trigger();
        line.set(None);
        line.trigger();
    });
    signal.sleep(None);
    assert_eq!(apic.accept(), Some(0x41));
    device.join().unwrap();
    let _ = apic.eoi();
    assert_eq!(apic.pending(), None);
}

#[test]
fn nothing_is_lost_between_threads() {
    let machine = Machine::x2(2);
    let senders: Vec<_> = (0..4u8)
        .map(|n| {
            let apic = machine.apics[1].clone();
            std::thread::spawn(move || {
                for _ in 0..20_000 {
                    apic.deliver(0x20 + n * 0x30, false);
                    while apic.irr[usize::from((0x20 + n * 0x30) >> 5)].load(std::sync::atomic::Ordering::SeqCst)
                        & 1 << ((0x20 + n * 0x30) & 31)
                        != 0
                    {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let (apic, signal, mut count) = (&machine.apics[1], &machine.signals[1], 0);
    while count < 80_000 {
        signal.sleep(Some(Instant::now() + Duration::from_secs(5)));
        assert_eq!(signal.take(u32::MAX), request::INTERRUPT, "lost after {count}");
        while apic.accept().is_some() {
            count += 1;
            let _ = apic.eoi();
        }
    }
    senders.into_iter().for_each(|sender| sender.join().unwrap());
}

/// Brings an APIC into a state in which everything is something.
fn busy(machine: &Machine) -> Arc<LocalApic> {
    let apic = machine.apics[1].clone();
    let _ = apic.mmio_write(offset::LDR, 0x0200_0000);
    let _ = apic.mmio_write(offset::DFR, 0);
    let _ = apic.mmio_write(offset::LVT + 0x30, 0x8700);
    let _ = apic.mmio_write(offset::LVT + 0x40, 0x400);
    let _ = apic.mmio_write(offset::ICR_HIGH, 0x0900_0000);
    let _ = apic.mmio_write(offset::ICR, 0x44);
    let _ = apic.mmio_write(0x40, 0);
    let _ = apic.mmio_write(offset::ESR, 0);
    apic.deliver(0x99, true);
    apic.accept().unwrap();
    apic.deliver(0x33, false);
    apic.deliver(0xe3, true);
    apic.set_tpr(0x21);
    apic
}

#[test]
fn save_and_restore_are_equal() {
    let machine = Machine::new(2);
    let apic = busy(&machine);
    let _ = apic.mmio_write(offset::LVT, 1 << 16 | 0xec);
    let mut saved = apic.save();
    let other = Machine::new(2);
    other.signals[1].take(u32::MAX);
    other.apics[1].restore(&saved).unwrap();
    assert_eq!(other.apics[1].save(), saved);
    assert_eq!(other.signals[1].take(u32::MAX), request::INTERRUPT, "0xe3 waits");
    assert_eq!(
        (other.apics[1].accept(), other.apics[1].eoi(), other.apics[1].eoi()),
        (Some(0xe3), Some(0xe3), Some(0x99))
    );
    // through bytes, and in x2APIC mode with a deadline
    apic.msr_write(MSR_APIC_BASE, X2APIC).unwrap();
    apic.msr_write(0x832, 2 << 17 | 0xec).unwrap();
    apic.msr_write(MSR_TSC_DEADLINE, u64::MAX / 2).unwrap();
    saved = minicbor::decode(&minicbor::to_vec(apic.save()).unwrap()).unwrap();
    other.apics[1].restore(&saved).unwrap();
    assert_eq!((saved.tsc_deadline, other.apics[1].save()), (u64::MAX / 2, saved));
}

#[test]
fn a_running_timer_goes_on_after_restore() {
    let machine = Machine::new(1);
    let apic = &machine.apics[0];
    let _ = apic.mmio_write(offset::DIVIDE, 0b1011);
    let _ = apic.mmio_write(offset::LVT, 1 << 17 | 0xec);
    let _ = apic.mmio_write(offset::INITIAL_COUNT, 20_000_000);
    sleep(Duration::from_millis(5));
    let saved = apic.save();
    let count = |state: &ApicState| u32::from_le_bytes(state.registers[0x390..0x394].try_into().unwrap());
    assert!((1..=15_000_000).contains(&count(&saved)), "{} left of 20 ms after 5", count(&saved));
    let other = Machine::new(1);
    let start = Instant::now();
    other.apics[0].restore(&saved).unwrap();
    wait(&other.signals[0], request::TIMER);
    assert!(start.elapsed() >= Duration::from_nanos(count(&saved).into()), "{:?}", start.elapsed());
    other.apics[0].timer_due();
    assert_eq!(other.got(0xec), [0]);
    wait(&other.signals[0], request::TIMER);
    // one that was due when it was saved fires at once
    sleep(Duration::from_millis(20));
    let saved = apic.save();
    assert_eq!(count(&saved), 1);
    other.apics[0].restore(&saved).unwrap();
    wait(&other.signals[0], request::TIMER);
    other.apics[0].timer_due();
    assert_eq!(other.got(0xec), [0]);
}

#[test]
fn bad_states_are_refused() {
    let machine = Machine::new(2);
    let apic = &machine.apics[0];
    let good = apic.save();
    let refused = |state: ApicState| apic.restore(&state).unwrap_err().to_string();
    assert!(refused(ApicState { registers: vec![0; 10], ..good.clone() }).contains("1024"));
    assert!(refused(ApicState { base_msr: 0xfee0_0400, ..good.clone() }).contains("mode"));
    assert!(refused(machine.apics[1].save()).contains("APIC 1"));
    assert_eq!(apic.save(), good);
    assert!(machine.bus.add(1, machine.signals[1].clone(), machine.clocks[1].clone()).is_err());
    assert!(machine.bus.add(64, machine.signals[1].clone(), machine.clocks[1].clone()).is_err());
}

#[test]
fn init_resets_registers_but_not_identity() {
    let machine = Machine::new(2);
    let apic = busy(&machine);
    apic.init_reset();
    let fresh = ApicBus::new().unwrap();
    let fresh = fresh.add(1, machine.signals[1].clone(), machine.clocks[1].clone()).unwrap();
    assert_eq!(apic.save(), fresh.save());
}

#[test]
fn garbage_never_panics() {
    let machine = Machine::new(2);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..200_000 {
        let apic = &machine.apics[(random() & 1) as usize];
        let (at, value) = ((random() & 0xfff) as u32, random());
        match random() % 8 {
            0 => _ = apic.mmio_read(at & 0xff0),
            1 => _ = apic.mmio_write(at & 0xff0, value as u32),
            2 => _ = apic.msr_read(0x800 + (at & 0xff)),
            3 => _ = apic.msr_write(0x800 + (at & 0x3f), value >> (random() & 63)),
            4 => _ = apic.msr_write(MSR_APIC_BASE, 0xfee0_0000 | value & 0xc00),
            5 => _ = apic.msr_write(MSR_TSC_DEADLINE, value >> (random() & 63)),
            6 => machine.msi(0xfee0_0000 | value & 0xf_ffff, (value >> 32) as u32),
            _ => {
                apic.accept();
                apic.timer_due();
                let _ = apic.save();
            }
        }
    }
}
