use minicbor::{Decode, Encode};

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Segment {
    #[n(0)]
    pub selector: u16,
    #[n(1)]
    pub base: u64,
    /// In bytes, already scaled by granularity.
    #[n(2)]
    pub limit: u32,
    /// Access rights as in bits 8..=23 of the descriptor's second word, shifted down by 8
    /// (type 0–3, S 4, DPL 5–6, P 7, AVL 12, L 13, D/B 14, G 15).
    #[n(3)]
    pub rights: u16,
    #[n(4)]
    pub unusable: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DescriptorTable {
    #[n(0)]
    pub base: u64,
    #[n(1)]
    pub limit: u16,
}

/// Events that were raised but not yet delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PendingEvents {
    /// Vector of an exception to deliver, with its error code if it has one.
    #[n(0)]
    pub exception: Option<u8>,
    #[n(1)]
    pub error_code: Option<u32>,
    #[n(2)]
    pub nmi: bool,
    #[n(3)]
    pub nmi_masked: bool,
    /// Interrupts are held off for one instruction (after STI or MOV SS).
    #[n(4)]
    pub interrupt_shadow: bool,
    #[n(5)]
    pub halted: bool,
    /// An application processor that has not got its INIT–SIPI yet.
    #[n(6)]
    pub wait_for_sipi: bool,
}

/// The local APIC: its register page as KVM and the manuals lay it out (Intel SDM vol. 3, table 11-1), 1 KiB,
/// 32-bit registers at multiples of 16.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ApicState {
    #[n(0)]
    pub base_msr: u64,
    /// Empty: `set_state` leaves the whole local APIC, its base MSR and its deadline too, as it is.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub registers: Vec<u8>,
    #[n(2)]
    pub tsc_deadline: u64,
}

/// The whole architectural state of one vCPU, shared by both engines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 … R15: the encoding order.
    #[n(0)]
    pub gpr: [u64; 16],
    #[n(1)]
    pub rip: u64,
    #[n(2)]
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: the encoding order.
    #[n(3)]
    pub segments: [Segment; 6],
    #[n(4)]
    pub ldtr: Segment,
    #[n(5)]
    pub tr: Segment,
    #[n(6)]
    pub gdtr: DescriptorTable,
    #[n(7)]
    pub idtr: DescriptorTable,
    #[n(8)]
    pub cr0: u64,
    #[n(9)]
    pub cr2: u64,
    #[n(10)]
    pub cr3: u64,
    #[n(11)]
    pub cr4: u64,
    #[n(12)]
    pub cr8: u64,
    #[n(13)]
    pub efer: u64,
    #[n(14)]
    pub xcr0: u64,
    /// DR0–DR3, DR6, DR7.
    #[n(15)]
    pub debug: [u64; 6],
    /// `(index, value)`, sorted by index; everything not named elsewhere here. `set_state` leaves those
    /// that are not listed as they are.
    #[n(16)]
    pub msrs: Vec<(u32, u64)>,
    /// XSAVE area in the standard (not compacted) format, for the features in `xcr0`.
    #[cbor(n(17), with = "minicbor::bytes")]
    pub xsave: Vec<u8>,
    #[n(18)]
    pub apic: ApicState,
    #[n(19)]
    pub events: PendingEvents,
    /// Guest TSC at the moment of saving. 0: `set_state` leaves the TSC as it is.
    #[n(20)]
    pub tsc: u64,
}

impl Segment {
    /// A flat 64-bit code segment at privilege 0, as the boot protocols want it.
    pub const CODE64: Self = Self { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xa09b, unusable: false };
    /// A flat 32-bit code segment at privilege 0.
    pub const CODE32: Self = Self { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc09b, unusable: false };
    /// A flat data segment at privilege 0.
    pub const DATA: Self = Self { selector: 0x18, base: 0, limit: u32::MAX, rights: 0xc093, unusable: false };
    /// A busy 64-bit TSS.
    pub const TSS: Self = Self { selector: 0x20, base: 0, limit: 0x67, rights: 0x008b, unusable: false };
}

impl CpuState {
    /// The state after power-up and INIT (Intel SDM vol. 3, table 10-1), x87 and SSE initialised.
    pub fn reset() -> Self {
        let data = |selector, rights| Segment { selector, base: 0, limit: 0xffff, rights, unusable: false };
        let mut segments = [data(0, 0x93); 6];
        segments[1] = Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, rights: 0x9b, unusable: false };
        let mut xsave = vec![0; 576];
        xsave[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        xsave[512..520].copy_from_slice(&3u64.to_le_bytes());
        Self {
            rip: 0xfff0,
            rflags: 2,
            segments,
            ldtr: data(0, 0x82),
            tr: data(0, 0x8b),
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            xcr0: 1,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xsave,
            ..Self::default()
        }
    }
}
