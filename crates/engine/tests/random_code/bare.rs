//! What a virtual machine has that runs nothing but the code under test: descriptors, 64-bit mode, and a bus that
//! stops the vCPU.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use vireo_cpu::{Bus, CpuState, DescriptorTable, Kick, Segment};

// Guest-physical addresses.
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;

/// Code and data of privilege 0, data and code of privilege 3, 32-bit code of privilege 3, the TSS.
const SEGMENTS: [u64; 8] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x0000_8b00_0000_0067 | TSS << 16,
    0,
];

/// The words of the GDT and of a TSS with this stack for privilege 0, and where they go.
pub fn segments(stack: u64) -> impl Iterator<Item = (u64, u64)> {
    (GDT..).step_by(8).zip(SEGMENTS).chain([(TSS + 4, stack)])
}

/// The words of an interrupt gate, and where they go. `rights`: 0x8e, or 0xee where user code may use it too.
pub fn gate(vector: u64, handler: u64, stack_number: u64, rights: u64) -> [(u64, u64); 2] {
    let low = handler & 0xffff | 8 << 16 | stack_number << 32 | rights << 40 | (handler >> 16 & 0xffff) << 48;
    [(IDT + vector * 16, low), (IDT + vector * 16 + 8, 0)]
}

/// 64-bit mode with page tables at `root`; this selector and these rights in all segment registers.
pub fn state(root: u64, selector: u16, rights: u16) -> CpuState {
    let mut state = CpuState::reset();
    state.segments = [Segment { selector, base: 0, limit: u32::MAX, rights, unusable: false }; 6];
    state.tr = Segment { selector: 0x30, base: TSS, limit: 0x67, rights: 0x8b, unusable: false };
    state.ldtr = Segment { unusable: true, ..Segment::default() };
    state.gdtr = DescriptorTable { base: GDT, limit: 0x3f };
    state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    state.cr0 = 0x8001_0033;
    state.cr3 = root;
    // PAE, OSFXSR, OSXMMEXCPT and OSXSAVE.
    state.cr4 = 0x4_0620;
    state.efer = 0xd01;
    state.xcr0 = 7;
    state
}

/// Stops the vCPU where the guest writes to a port.
pub struct Stops {
    port: AtomicU32,
    kick: Arc<dyn Kick>,
}

const NONE: u32 = u32::MAX;

impl Stops {
    pub fn new(kick: Arc<dyn Kick>) -> Arc<Self> {
        Arc::new(Self { port: AtomicU32::new(NONE), kick })
    }

    /// Before the vCPU runs.
    pub fn arm(&self) {
        self.port.store(NONE, Ordering::SeqCst);
    }

    /// The port that was written to.
    pub fn port(&self) -> Option<u32> {
        Some(self.port.load(Ordering::SeqCst)).filter(|port| *port != NONE)
    }
}

impl Bus for Stops {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, port: u16, _: &[u8]) {
        // Later ones are of a guest that has not been stopped yet.
        let _ = self.port.compare_exchange(NONE, port.into(), Ordering::SeqCst, Ordering::SeqCst);
        self.kick.kick();
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn eoi(&self, _: u8) {}
}
