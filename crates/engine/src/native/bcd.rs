//! The decimal adjustments, and SALC, which only 16- and 32-bit code has (Intel SDM vol. 2, AAA to AAS, DAA, DAS).

use super::Trap;
use crate::regs::{Regs, pack, unpack};

/// Which one; AAM and AAD with their number base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bcd {
    Aaa,
    Aas,
    Daa,
    Das,
    Aam(u8),
    Aad(u8),
    Salc,
}

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;

/// SF, ZF and PF of a byte.
fn sign_zero_parity(al: u8) -> u64 {
    let pick = |condition: bool, flag| if condition { flag } else { 0 };
    pick(al & 0x80 != 0, SF) | pick(al == 0, ZF) | pick(al.count_ones().is_multiple_of(2), PF)
}

impl Bcd {
    pub(super) fn execute(self, regs: &mut Regs) -> Result<(), Trap> {
        let ax = regs.gpr[0] as u16;
        let [al, ah] = ax.to_le_bytes();
        let flags = unpack(regs.flags);
        let (carry, auxiliary) = (flags & CF != 0, flags & AF != 0);
        let low = al & 0xf > 9 || auxiliary;
        let high = al > 0x99 || carry;
        let szp = |flags: u64, al: u8| flags & !(SF | ZF | PF) | sign_zero_parity(al);
        let both = |flags: u64, set: bool| {
            if set { flags | CF | AF } else { flags & !(CF | AF) }
        };

        let (ax, flags) = match self {
            Self::Salc => (u16::from_le_bytes([if carry { 0xff } else { 0 }, ah]), flags),
            Self::Aaa => {
                let sum = if low { ax.wrapping_add(0x106) } else { ax };
                (sum & 0xff0f, both(flags, low))
            }
            Self::Aas => {
                let difference = if low { ax.wrapping_sub(0x106) } else { ax };
                (difference & 0xff0f, both(flags, low))
            }
            Self::Daa | Self::Das => {
                let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
                let (adjusted, borrow) = match self {
                    Self::Daa => (al.wrapping_add(by), false),
                    _ => (al.wrapping_sub(by), low && al < 6),
                };
                let set = if high || borrow { CF } else { 0 } | if low { AF } else { 0 };
                (u16::from_le_bytes([adjusted, ah]), szp(flags & !(CF | AF) | set, adjusted))
            }
            Self::Aam(base) => {
                let quotient = al.checked_div(base).ok_or(Trap::Divide)?;
                let rest = al % base;
                (u16::from_le_bytes([rest, quotient]), szp(flags, rest))
            }
            Self::Aad(base) => {
                let sum = al.wrapping_add(ah.wrapping_mul(base));
                (u16::from_le_bytes([sum, 0]), szp(flags, sum))
            }
        };
        regs.gpr[0] = regs.gpr[0] & !0xffff | u64::from(ax);
        regs.flags = pack(flags);
        Ok(())
    }
}
