//! Instructions to choose from.

use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic, OpCodeOperandKind as Kind};
use vireo_engine::native::FeatureSet;

use crate::random_code::{case::Mode, generate, random::Random};

/// Instructions to choose from.
pub struct Pool {
    common: Vec<Code>,
    integer: Vec<Code>,
    vector: Vec<Code>,
    other: Vec<Code>,
    /// What loops are mostly made of, and what has flags of its own.
    hot: Vec<Code>,
    pub(super) jumps: Vec<(Code, Code)>,
}

const COMMON: [Mnemonic; 34] = [
    Mnemonic::Mov,
    Mnemonic::Add,
    Mnemonic::Or,
    Mnemonic::Adc,
    Mnemonic::Sbb,
    Mnemonic::And,
    Mnemonic::Sub,
    Mnemonic::Xor,
    Mnemonic::Cmp,
    Mnemonic::Test,
    Mnemonic::Inc,
    Mnemonic::Dec,
    Mnemonic::Neg,
    Mnemonic::Not,
    Mnemonic::Shl,
    Mnemonic::Shr,
    Mnemonic::Sar,
    Mnemonic::Rol,
    Mnemonic::Rcl,
    Mnemonic::Rcr,
    Mnemonic::Lea,
    Mnemonic::Movzx,
    Mnemonic::Movsx,
    Mnemonic::Movsxd,
    Mnemonic::Imul,
    Mnemonic::Xchg,
    Mnemonic::Xadd,
    Mnemonic::Cmpxchg,
    Mnemonic::Bts,
    Mnemonic::Bt,
    Mnemonic::Push,
    Mnemonic::Pop,
    Mnemonic::Clc,
    Mnemonic::Stc,
];

const HOT: [Mnemonic; 26] = [
    Mnemonic::Inc,
    Mnemonic::Dec,
    Mnemonic::Adc,
    Mnemonic::Sbb,
    Mnemonic::Shl,
    Mnemonic::Shr,
    Mnemonic::Sar,
    Mnemonic::Imul,
    Mnemonic::Mul,
    Mnemonic::Rcl,
    Mnemonic::Rol,
    Mnemonic::Neg,
    Mnemonic::Not,
    Mnemonic::Add,
    Mnemonic::Sub,
    Mnemonic::And,
    Mnemonic::Or,
    Mnemonic::Xor,
    Mnemonic::Cmp,
    Mnemonic::Test,
    Mnemonic::Mov,
    Mnemonic::Lea,
    Mnemonic::Movzx,
    Mnemonic::Xchg,
    Mnemonic::Bt,
    Mnemonic::Cmc,
];

impl Pool {
    pub fn new(features: &FeatureSet) -> Self {
        let mut pool =
            Self { common: vec![], integer: vec![], vector: vec![], other: vec![], hot: vec![], jumps: vec![] };
        let codes = generate::codes(Mode::Bits64, features);
        for &code in &codes {
            if code.flow_control() == FlowControl::ConditionalBranch && code.is_jcc_short() {
                pool.jumps.push((code, code.as_near_branch()));
            }
            if code.flow_control() != FlowControl::Next || is_left_out(code) {
                continue;
            }
            let op = code.op_code();
            let kinds: Vec<Kind> = (0..op.op_count()).map(|i| op.op_kind(i)).collect();
            let has = |names: &[&str]| kinds.iter().any(|k| names.iter().any(|n| format!("{k:?}").starts_with(n)));
            let x87 = code.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::MMX));
            if x87 || has(&["mm_", "st0", "sti"]) {
                pool.other.push(code);
            } else if has(&["xmm", "ymm"]) || code.cpuid_features().contains(&CpuidFeature::AVX) {
                pool.vector.push(code);
            } else {
                let conditional = code.condition_code() != iced_x86::ConditionCode::None;
                if COMMON.contains(&code.mnemonic()) || conditional {
                    pool.common.push(code);
                }
                let narrow = kinds.iter().any(|k| matches!(k, Kind::r8_or_mem | Kind::r16_or_mem));
                if !narrow && (HOT.contains(&code.mnemonic()) || conditional) {
                    pool.hot.push(code);
                }
                pool.integer.push(code);
            }
        }
        pool
    }

    pub(super) fn hot_code(&self, random: &mut Random) -> Code {
        // There are many conditions.
        let wanted = random.pick(&HOT);
        let some: Vec<Code> = self.hot.iter().copied().filter(|code| code.mnemonic() == wanted).collect();
        match random.below(20) {
            0..3 => self.code(random),
            3..5 => random.pick(&self.hot),
            _ if some.is_empty() => random.pick(&self.hot),
            _ => random.pick(&some),
        }
    }

    pub(super) fn code(&self, random: &mut Random) -> Code {
        match random.below(20) {
            0..11 => random.pick(&self.common),
            11..14 => random.pick(&self.integer),
            14..19 => random.pick(&self.vector),
            _ => random.pick(&self.other),
        }
    }
}

/// Results that are the processor's own, depend on where the code is, are undefined, or need operands that chance does
/// not make. Each of them runs alone in the tests of single instructions.
fn is_left_out(code: Code) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    let gathers = (0..op.op_count()).any(|i| format!("{:?}", op.op_kind(i)).contains("vsib"));
    let name = format!("{code:?}");
    gathers
        || ["Fx", "Xsave", "Xrstor", "Fnstenv", "Fnsave", "Fldenv", "Frstor", "Vmaskmov", "Maskmov", "Rd", "Ud"]
            .iter()
            .any(|part| name.starts_with(part) || name.starts_with(&format!("VEX_{part}")))
        || matches!(code, Code::Shld_rm16_r16_imm8 | Code::Shld_rm16_r16_CL)
        || matches!(code, Code::Shrd_rm16_r16_imm8 | Code::Shrd_rm16_r16_CL)
        || matches!(
            code.mnemonic(),
            M::Enter | M::Leave | M::Xlatb | M::Ldmxcsr | M::Vldmxcsr | M::Monitor | M::Mwait | M::Clzero
        )
        || code.instruction_is_string()
}

trait IsString {
    fn instruction_is_string(self) -> bool;
}

impl IsString for Code {
    fn instruction_is_string(self) -> bool {
        let mut insn = Instruction::default();
        insn.set_code(self);
        insn.is_string_instruction()
    }
}
