//! What kind an instruction is: which checks it needs, what it may not do on the host, and how it treats memory.

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::operand;

/// The CR0, CR4 and XCR0 checks that come before an instruction (Intel SDM vol. 2, 2.4–2.6 and vol. 3, table 2-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FeatureClass {
    /// None.
    Integer,
    /// VEX-encoded without vectors (BMI): `#UD` in real and virtual-8086 mode.
    VexInteger,
    /// CR0.EM or TS: `#NM`. Waiting ones: `#MF`.
    X87,
    /// CR0.MP and TS: `#NM`. Then `#MF`.
    Wait,
    /// CR0.EM: `#UD`; TS: `#NM`; `#MF`.
    Mmx,
    /// CR0.EM or no CR4.OSFXSR: `#UD`; TS: `#NM`.
    Sse,
    /// As [`Self::Sse`], then `#MF`.
    SseMmx,
    /// No CR4.OSXSAVE, XCR0\[2:1\] not both set, real or virtual-8086 mode: `#UD`; TS: `#NM`.
    Avx,
    /// CR0.EM or TS: `#NM`, no wait.
    Fxsave,
    /// No CR4.OSXSAVE: `#UD`; TS: `#NM`.
    Xsave,
    /// No CR4.OSXSAVE: `#UD`.
    Xgetbv,
}

impl FeatureClass {
    /// What an instruction's registers and encoding make it.
    pub(super) fn of(insn: &Instruction, vectors: bool, mmx: bool) -> Self {
        let x87 = insn
            .cpuid_features()
            .iter()
            .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387));
        // CVTTSD2SI of memory to a general register names no vector and is an SSE instruction all the same.
        let vectors = vectors || uses_mxcsr(insn);
        match (insn.encoding() == EncodingKind::VEX, vectors, mmx) {
            _ if insn.mnemonic() == Mnemonic::Wait => Self::Wait,
            _ if x87 || insn.mnemonic() == Mnemonic::Fisttp => Self::X87,
            (true, true, _) => Self::Avx,
            (true, false, _) => Self::VexInteger,
            // Conversions between MMX and SSE operands, be the latter in memory.
            (false, true, true) => Self::SseMmx,
            (false, true, false) => Self::Sse,
            (false, false, true) => Self::Mmx,
            (false, false, false) => Self::Integer,
        }
    }
}

/// Sets that came in the place of encodings which older processors take for something else: without the set the
/// instruction is that other thing.
pub(super) fn without_feature(insn: &Instruction) -> Option<Code> {
    Some(match insn.code() {
        Code::Tzcnt_r16_rm16 => Code::Bsf_r16_rm16,
        Code::Tzcnt_r32_rm32 => Code::Bsf_r32_rm32,
        Code::Tzcnt_r64_rm64 => Code::Bsf_r64_rm64,
        Code::Lzcnt_r16_rm16 => Code::Bsr_r16_rm16,
        Code::Lzcnt_r32_rm32 => Code::Bsr_r32_rm32,
        Code::Lzcnt_r64_rm64 => Code::Bsr_r64_rm64,
        _ if is_hint(insn.mnemonic()) => Code::Nopd,
        _ => return None,
    })
}

/// Instructions in the space of NOPs for future use (Intel SDM vol. 2, table A-3: 0F 0D, 0F 18 to 0F 1F): without
/// their feature they do nothing, not even an access.
fn is_hint(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Endbr32
            | Mnemonic::Endbr64
            | Mnemonic::Rdsspd
            | Mnemonic::Rdsspq
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1
            | Mnemonic::Prefetchit0
            | Mnemonic::Prefetchit1
            | Mnemonic::Cldemote
            | Mnemonic::Bndcl
            | Mnemonic::Bndcn
            | Mnemonic::Bndcu
            | Mnemonic::Bndldx
            | Mnemonic::Bndmk
            | Mnemonic::Bndmov
            | Mnemonic::Bndstx
    )
}

/// Encodings that 64-bit mode lacks, and their equal that it has.
pub(super) fn long_mode_equal(insn: &mut Instruction) {
    let equal = match insn.code() {
        Code::Inc_r16 => Some(Code::Inc_rm16),
        Code::Inc_r32 => Some(Code::Inc_rm32),
        Code::Dec_r16 => Some(Code::Dec_rm16),
        Code::Dec_r32 => Some(Code::Dec_rm32),
        // Nothing is extended. AMD's processors read four bytes all the same, which may not be there.
        Code::Movsxd_r16_rm16 => Some(Code::Mov_r16_rm16),
        _ => None,
    };
    let alias = match insn.code() {
        Code::Add_rm8_imm8_82 => Some(Code::Add_rm8_imm8),
        Code::Or_rm8_imm8_82 => Some(Code::Or_rm8_imm8),
        Code::Adc_rm8_imm8_82 => Some(Code::Adc_rm8_imm8),
        Code::Sbb_rm8_imm8_82 => Some(Code::Sbb_rm8_imm8),
        Code::And_rm8_imm8_82 => Some(Code::And_rm8_imm8),
        Code::Sub_rm8_imm8_82 => Some(Code::Sub_rm8_imm8),
        Code::Xor_rm8_imm8_82 => Some(Code::Xor_rm8_imm8),
        Code::Cmp_rm8_imm8_82 => Some(Code::Cmp_rm8_imm8),
        _ => None,
    };
    // An absolute address has no place for `[rsi]`.
    let absolute = match insn.code() {
        Code::Mov_AL_moffs8 => Some(Code::Mov_r8_rm8),
        Code::Mov_AX_moffs16 => Some(Code::Mov_r16_rm16),
        Code::Mov_EAX_moffs32 => Some(Code::Mov_r32_rm32),
        Code::Mov_RAX_moffs64 => Some(Code::Mov_r64_rm64),
        Code::Mov_moffs8_AL => Some(Code::Mov_rm8_r8),
        Code::Mov_moffs16_AX => Some(Code::Mov_rm16_r16),
        Code::Mov_moffs32_EAX => Some(Code::Mov_rm32_r32),
        Code::Mov_moffs64_RAX => Some(Code::Mov_rm64_r64),
        _ => None,
    };
    if let Some(code) = equal.or(alias).or(absolute) {
        insn.set_code(code);
    }
    if insn.code() == Code::Xlat_m8 {
        // AL := [rBX + AL]: the address is the caller's, the rest is a move.
        insn.set_code(Code::Mov_r8_rm8);
        insn.set_op0_kind(OpKind::Register);
        insn.set_op0_register(Register::AL);
        insn.set_op1_kind(OpKind::Memory);
    }
}

/// Whether the host may execute the instruction for the guest, its memory operand aside.
pub(super) fn may_run(insn: &Instruction) -> bool {
    operand::are_known(insn)
        && matches!(insn.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && insn.flow_control() == FlowControl::Next
        && !insn.is_stack_instruction()
        && !insn.is_string_instruction()
        && !insn.is_privileged()
        && !SYSTEM.contains(&insn.mnemonic())
}

/// What depends on more than general registers, vectors, flags and one memory operand, and no iced predicate says.
const SYSTEM: &[Mnemonic] = &[
    Mnemonic::Lea,
    Mnemonic::Cpuid,
    Mnemonic::Rdtsc,
    Mnemonic::Rdtscp,
    Mnemonic::Rdpmc,
    Mnemonic::Rdpid,
    Mnemonic::In,
    Mnemonic::Out,
    Mnemonic::Cli,
    Mnemonic::Sti,
    Mnemonic::Cld,
    Mnemonic::Std,
    Mnemonic::Hlt,
    Mnemonic::Pause,
    Mnemonic::Sgdt,
    Mnemonic::Sidt,
    Mnemonic::Sldt,
    Mnemonic::Str,
    Mnemonic::Smsw,
    Mnemonic::Lar,
    Mnemonic::Lsl,
    Mnemonic::Verr,
    Mnemonic::Verw,
    Mnemonic::Arpl,
    Mnemonic::Bound,
    Mnemonic::Lds,
    Mnemonic::Les,
    Mnemonic::Lss,
    Mnemonic::Lfs,
    Mnemonic::Lgs,
    Mnemonic::Div,
    Mnemonic::Idiv,
    Mnemonic::Aam,
    Mnemonic::Aad,
    Mnemonic::Aaa,
    Mnemonic::Aas,
    Mnemonic::Daa,
    Mnemonic::Das,
    Mnemonic::Salc,
];

/// Executes as nothing at all, beyond what its memory operand may fault with.
pub(super) fn is_nothing(insn: &Instruction) -> bool {
    matches!(
        insn.mnemonic(),
        Mnemonic::Nop
            // Intel's NOPs for future use; AMD has `#UD` for the register form of 0F 0D.
            | Mnemonic::Reservednop
            | Mnemonic::Wait
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetch
            | Mnemonic::Fneni
            | Mnemonic::Fndisi
            | Mnemonic::Fnsetpm
    ) || is_cache_line(insn)
}

/// Cache line flushes: guest memory is coherent for everyone who looks at it, so that only the access check is left.
pub(super) fn is_cache_line(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb)
}

/// x87 instructions that do not look at pending exceptions (Intel SDM vol. 1, 8.3.11).
pub(super) fn is_no_wait(insn: &Instruction) -> bool {
    matches!(
        insn.mnemonic(),
        Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Fnstcw
            | Mnemonic::Fnstsw
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
            | Mnemonic::Fneni
            | Mnemonic::Fndisi
            | Mnemonic::Fnsetpm
    )
}

/// What a memory operand of `bytes` bytes must be aligned to: every 16-byte operand of a legacy SSE instruction
/// except a few, and the moves that say so (Intel SDM vol. 1, 4.1.1 and 14.9).
pub(super) fn alignment(insn: &Instruction, class: FeatureClass, bytes: u8) -> u8 {
    let unaligned = matches!(
        insn.mnemonic(),
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm64
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    );
    let aligned = matches!(
        insn.mnemonic(),
        Mnemonic::Vmovaps
            | Mnemonic::Vmovapd
            | Mnemonic::Vmovdqa
            | Mnemonic::Vmovntps
            | Mnemonic::Vmovntpd
            | Mnemonic::Vmovntdq
            | Mnemonic::Vmovntdqa
            | Mnemonic::Cmpxchg16b
    );
    let unaligned = unaligned || (insn.cpuid_features().contains(&CpuidFeature::SHA) && host_is_amd());
    let legacy = matches!(class, FeatureClass::Sse | FeatureClass::SseMmx) && bytes == 16 && !unaligned;
    if legacy || aligned { bytes } else { 1 }
}

/// AMD's processors take unaligned operands of SHA instructions, Intel's do not: guests see what the host does.
fn host_is_amd() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static AMD: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *AMD.get_or_init(|| {
            let leaf = std::arch::x86_64::__cpuid(0);
            [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether MXCSR bears on the instruction: its rounding, its masks or its flags (Intel SDM vol. 1, 11.5 and
/// vol. 2, 2.4, exception types 2, 3 and 11). A superset does no harm.
pub(super) fn uses_mxcsr(insn: &Instruction) -> bool {
    insn.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::FMA | CpuidFeature::F16C))
        || ARITHMETIC.contains(&insn.mnemonic())
}

macro_rules! mnemonics {
    ($($name:ident)*) => { &[$(Mnemonic::$name),*] };
}

#[rustfmt::skip]
const ARITHMETIC: &[Mnemonic] = mnemonics!(
    Addps Addss Addpd Addsd Vaddps Vaddss Vaddpd Vaddsd
    Subps Subss Subpd Subsd Vsubps Vsubss Vsubpd Vsubsd
    Mulps Mulss Mulpd Mulsd Vmulps Vmulss Vmulpd Vmulsd
    Divps Divss Divpd Divsd Vdivps Vdivss Vdivpd Vdivsd
    Sqrtps Sqrtss Sqrtpd Sqrtsd Vsqrtps Vsqrtss Vsqrtpd Vsqrtsd
    Minps Minss Minpd Minsd Vminps Vminss Vminpd Vminsd
    Maxps Maxss Maxpd Maxsd Vmaxps Vmaxss Vmaxpd Vmaxsd
    Cmpps Cmpss Cmppd Cmpsd Vcmpps Vcmpss Vcmppd Vcmpsd
    Comiss Comisd Ucomiss Ucomisd Vcomiss Vcomisd Vucomiss Vucomisd
    Addsubps Addsubpd Vaddsubps Vaddsubpd
    Haddps Haddpd Hsubps Hsubpd Vhaddps Vhaddpd Vhsubps Vhsubpd
    Dpps Dppd Vdpps Vdppd
    Roundps Roundpd Roundss Roundsd Vroundps Vroundpd Vroundss Vroundsd
    Cvtpi2ps Cvtpi2pd Cvtps2pi Cvttps2pi Cvtpd2pi Cvttpd2pi
    Cvtsi2ss Cvtsi2sd Vcvtsi2ss Vcvtsi2sd
    Cvtss2si Cvttss2si Cvtsd2si Cvttsd2si Vcvtss2si Vcvttss2si Vcvtsd2si Vcvttsd2si
    Cvtdq2ps Cvtdq2pd Vcvtdq2ps Vcvtdq2pd
    Cvtps2dq Cvttps2dq Cvtpd2dq Cvttpd2dq Vcvtps2dq Vcvttps2dq Vcvtpd2dq Vcvttpd2dq
    Cvtps2pd Cvtpd2ps Cvtss2sd Cvtsd2ss Vcvtps2pd Vcvtpd2ps Vcvtss2sd Vcvtsd2ss
);
