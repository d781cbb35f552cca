//! A right translation passes, a wrong one is found.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vireo_cpu::{Bus, CpuState, Engine, Exit, Kick, Segment, VcpuConfig};
use vireo_memory::GuestMemory;

use crate::SoftEngine;

thread_local! {
    /// Bytes of translations that are replaced, and what by.
    static SPOILED: Cell<Option<(&'static [u8], &'static [u8])>> = const { Cell::new(None) };
}

/// Has a translation do something else, where a test asked for that.
pub fn spoil(code: &mut [u8]) {
    let Some((from, to)) = SPOILED.get() else { return };
    for at in 0..(code.len() + 1).saturating_sub(from.len()) {
        if code[at..].starts_with(from) {
            code[at..at + to.len()].copy_from_slice(to);
        }
    }
}

/// Ends the run at any port.
struct Ends {
    kick: Arc<dyn Kick>,
    done: AtomicBool,
}

impl Bus for Ends {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {
        self.done.store(true, Ordering::Relaxed);
        self.kick.kick();
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn eoi(&self, _: u8) {}
}

const TABLES: u64 = 0x1000;
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x20_0000;

#[rustfmt::skip]
const LOOP: &[u8] = &[
    0xb9, 0xe8, 0x03, 0, 0,                     // mov ecx, 1000
    // 0x10005:
    0x48, 0x01, 0xcb,                           // add rbx, rcx
    0xc7, 0x47, 8, 0x67, 0x45, 0x23, 0x01,      // mov dword [rdi + 8], 0x1234567
    0x48, 0x89, 0x1f,                           // mov [rdi], rbx
    0x48, 0x83, 0xc7, 8,                        // add rdi, 8
    0x48, 0x31, 0xda,                           // xor rdx, rbx
    0xff, 0xc9,                                 // dec ecx
    0x75, 0xe8,                                 // jnz 0x10005
    0xe6, 0x80,                                 // out 0x80, al
    0xeb, 0xfe,                                 // jmp $
];

/// The loop above: how it ended, and one of the figures that its run left.
fn run(spoiled: Option<(&'static [u8], &'static [u8])>) -> (Exit, impl Fn(&str) -> u64) {
    let memory = GuestMemory::new(4 << 20, 0xc000_0000).unwrap();
    for (at, entry) in [(TABLES, TABLES + 0x1003), (TABLES + 0x1000, TABLES + 0x2003), (TABLES + 0x2000, 0x83)] {
        memory.write(at, &u64::to_le_bytes(entry)).unwrap();
    }
    memory.write(TABLES + 0x2008, &u64::to_le_bytes(DATA | 0x83)).unwrap();
    memory.write(CODE, LOOP).unwrap();
    let engine = SoftEngine::verifying(&memory).unwrap();
    let cpuid = engine.supported_cpuid().unwrap();
    let mut vcpu = engine.create_vcpu(&VcpuConfig { id: 0, count: 1, cpuid }).unwrap();
    let mut state = CpuState::reset();
    let segment = |selector, rights| Segment { selector, base: 0, limit: u32::MAX, rights, unusable: false };
    state.segments = [segment(16, 0xc093); 6];
    state.segments[1] = segment(8, 0xa09b);
    (state.cr0, state.cr3, state.cr4, state.efer) = (0x8001_0033, TABLES, 0x620, 0x501);
    (state.rip, state.gpr[7], state.gpr[4]) = (CODE, DATA, DATA);
    vcpu.set_state(&state).unwrap();
    let bus = Ends { kick: vcpu.kicker(), done: AtomicBool::new(false) };
    SPOILED.set(spoiled);
    let exit = vcpu.run(&bus).unwrap();
    SPOILED.set(None);
    assert_eq!(matches!(exit, Exit::Kicked), bus.done.load(Ordering::Relaxed));
    let figures = vcpu.stats().exits;
    (exit, move |name: &str| figures.get(name).copied().unwrap_or_default())
}

#[test]
fn right_translations_are_verified() {
    let (exit, figure) = run(None);
    assert!(matches!(exit, Exit::Kicked), "{exit:?}");
    assert!(figure("verified_blocks") > 900, "only {} blocks", figure("verified_blocks"));
    assert_eq!(figure("verified_runs_again"), 0);
}

fn found(from: &'static [u8], to: &'static [u8]) -> String {
    match run(Some((from, to))).0 {
        Exit::Crash(info) => info.reason,
        exit => panic!("the wrong translation was not found: {exit:?}"),
    }
}

#[test]
fn a_wrong_register_is_found() {
    // XOR becomes OR.
    let reason = found(&[0x48, 0x31, 0xda], &[0x48, 0x09, 0xda]);
    assert!(reason.contains("in the block at 0x10005"), "{reason}");
    assert!(reason.contains("\n  rdx: was ") && !reason.contains("\n  rbx: was "), "{reason}");
    assert!(reason.contains("0x10016 xor rdx,rbx"), "{reason}");
}

#[test]
fn a_wrong_store_is_found() {
    let reason = found(&[0x67, 0x45, 0x23, 0x01], &[0x67, 0x45, 0x24, 0x01]);
    assert!(reason.contains("\n  RAM at 0x20") && reason.contains("interpreted 0x23, translated 0x24"), "{reason}");
}

#[test]
fn a_wrong_way_is_found() {
    // DEC becomes INC: the loop goes on for ever, or nearly so.
    let reason = found(&[0xff, 0xc9], &[0xff, 0xc1]);
    assert!(reason.contains("in the block at 0x10005") && reason.contains("\n  rcx: was "), "{reason}");
}
