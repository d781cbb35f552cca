//! Integer arithmetic with its status flags, for each operand size.
//!
//! On an x86-64 host every operation is the host's own instruction followed by LAHF and SETO, so the flags,
//! also those that the manuals leave undefined, are those of a real processor. Other hosts compute them.

use crate::regs::PackedFlags;

pub const CF: PackedFlags = 1 << 8;
pub const PF: PackedFlags = 1 << 10;
#[cfg(not(target_arch = "x86_64"))]
pub const AF: PackedFlags = 1 << 12;
pub const ZF: PackedFlags = 1 << 14;
pub const SF: PackedFlags = 1 << 15;
pub const OF: PackedFlags = 1 << 0;

/// An operand size.
pub trait Int: Copy + Eq + 'static {
    const BYTES: usize;
    const BITS: u32;
    fn from_u64(v: u64) -> Self;
    fn to_u64(self) -> u64;
    fn sext(self) -> i64;

    fn add(self, b: Self, f: &mut PackedFlags) -> Self;
    fn sub(self, b: Self, f: &mut PackedFlags) -> Self;
    fn adc(self, b: Self, f: &mut PackedFlags) -> Self;
    fn sbb(self, b: Self, f: &mut PackedFlags) -> Self;
    fn and(self, b: Self, f: &mut PackedFlags) -> Self;
    fn or(self, b: Self, f: &mut PackedFlags) -> Self;
    fn xor(self, b: Self, f: &mut PackedFlags) -> Self;
    /// INC and DEC keep CF.
    fn inc(self, f: &mut PackedFlags) -> Self;
    fn dec(self, f: &mut PackedFlags) -> Self;
    fn neg(self, f: &mut PackedFlags) -> Self;
    /// Shifts and rotates take the count as it stands in CL; a masked count of 0 changes no flag.
    fn shl(self, count: u8, f: &mut PackedFlags) -> Self;
    fn shr(self, count: u8, f: &mut PackedFlags) -> Self;
    fn sar(self, count: u8, f: &mut PackedFlags) -> Self;
    fn rol(self, count: u8, f: &mut PackedFlags) -> Self;
    fn ror(self, count: u8, f: &mut PackedFlags) -> Self;
    fn rcl(self, count: u8, f: &mut PackedFlags) -> Self;
    fn rcr(self, count: u8, f: &mut PackedFlags) -> Self;
    /// Signed multiplication truncated to the size (two- and three-operand IMUL).
    fn imul(self, b: Self, f: &mut PackedFlags) -> Self;
    /// Unsigned and signed widening multiplication: (low, high).
    fn mul_wide(self, b: Self, f: &mut PackedFlags) -> (Self, Self);
    fn imul_wide(self, b: Self, f: &mut PackedFlags) -> (Self, Self);
}

#[cfg(target_arch = "x86_64")]
mod host {
    use std::arch::asm;

    use super::{CF, Int, PackedFlags};

    macro_rules! binary {
        ($name:ident, $ins:literal, $class:ident, $m:literal) => {
            #[inline(always)]
            fn $name(mut self, b: Self, f: &mut PackedFlags) -> Self {
                let packed: u16;
                // SAFETY: pure register arithmetic.
                unsafe {
                    asm!(concat!($ins, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                        a = inout($class) self, b = in($class) b, out("ax") packed, options(pure, nomem, nostack));
                }
                *f = packed;
                self
            }
        };
    }
    macro_rules! with_carry {
        ($name:ident, $ins:literal, $class:ident, $m:literal) => {
            #[inline(always)]
            fn $name(mut self, b: Self, f: &mut PackedFlags) -> Self {
                let mut packed: u16 = *f;
                // SAFETY: pure register arithmetic.
                unsafe {
                    asm!("bt ax, 8", concat!($ins, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                        a = inout($class) self, b = in($class) b, inout("ax") packed, options(pure, nomem, nostack));
                }
                *f = packed;
                self
            }
        };
    }
    macro_rules! unary {
        ($name:ident, $ins:literal, $keep:expr, $class:ident, $m:literal) => {
            #[inline(always)]
            fn $name(mut self, f: &mut PackedFlags) -> Self {
                let packed: u16;
                // SAFETY: pure register arithmetic.
                unsafe {
                    asm!(concat!($ins, " {a", $m, "}"), "lahf", "seto al",
                        a = inout($class) self, out("ax") packed, options(pure, nomem, nostack));
                }
                *f = (packed & !$keep) | (*f & $keep);
                self
            }
        };
    }
    // Shifts and rotates run with the guest's flags loaded, so that a count of 0 (also a count that is 0
    // modulo the rotate's width) and partly written flags come out as on hardware.
    macro_rules! shift {
        ($name:ident, $ins:literal, $class:ident, $m:literal) => {
            #[inline(always)]
            fn $name(mut self, count: u8, f: &mut PackedFlags) -> Self {
                let mut packed: u16 = *f;
                // SAFETY: pure register arithmetic.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!($ins, " {a", $m, "}, cl"), "lahf", "seto al",
                        a = inout($class) self, in("cl") count, inout("ax") packed, options(pure, nomem, nostack));
                }
                *f = packed;
                self
            }
        };
    }
    macro_rules! imul {
        ($class:ident, $m:literal) => {
            #[inline(always)]
            fn imul(mut self, b: Self, f: &mut PackedFlags) -> Self {
                let packed: u16;
                // SAFETY: pure register arithmetic.
                unsafe {
                    asm!(concat!("imul {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                        a = inout($class) self, b = in($class) b, out("ax") packed, options(pure, nomem, nostack));
                }
                *f = packed;
                self
            }
        };
    }
    macro_rules! wide {
        ($name:ident, $ins:literal, $ax:tt, $dx:tt, $m:literal) => {
            #[inline(always)]
            fn $name(self, b: Self, f: &mut PackedFlags) -> (Self, Self) {
                let (mut low, high) = (self, Self::from_u64(0));
                let mut high = high;
                let packed: u16;
                // SAFETY: pure register arithmetic.
                unsafe {
                    asm!(concat!($ins, " {b", $m, "}"), "mov {t:r}, rax", "lahf", "seto al", "mov {p:x}, ax", "mov rax, {t:r}",
                        b = in(reg) b, t = out(reg) _, p = out(reg) packed, inout($ax) low, inout($dx) high,
                        options(pure, nomem, nostack));
                }
                *f = packed;
                (low, high)
            }
        };
    }
    macro_rules! int {
        ($t:ty, $s:ty, $class:ident, $m:literal, { $($extra:item)* }) => {
            impl Int for $t {
                const BYTES: usize = size_of::<$t>();
                const BITS: u32 = <$t>::BITS;
                #[inline(always)]
                fn from_u64(v: u64) -> Self { v as $t }
                #[inline(always)]
                fn to_u64(self) -> u64 { u64::from(self) }
                #[inline(always)]
                fn sext(self) -> i64 { i64::from(self as $s) }
                binary!(add, "add", $class, $m);
                binary!(sub, "sub", $class, $m);
                binary!(and, "and", $class, $m);
                binary!(or, "or", $class, $m);
                binary!(xor, "xor", $class, $m);
                with_carry!(adc, "adc", $class, $m);
                with_carry!(sbb, "sbb", $class, $m);
                unary!(inc, "inc", CF, $class, $m);
                unary!(dec, "dec", CF, $class, $m);
                unary!(neg, "neg", 0, $class, $m);
                shift!(shl, "shl", $class, $m);
                shift!(shr, "shr", $class, $m);
                shift!(sar, "sar", $class, $m);
                shift!(rol, "rol", $class, $m);
                shift!(ror, "ror", $class, $m);
                shift!(rcl, "rcl", $class, $m);
                shift!(rcr, "rcr", $class, $m);
                $($extra)*
            }
        };
    }
    macro_rules! byte_mul {
        ($name:ident, $ins:literal) => {
            #[inline(always)]
            fn $name(self, b: Self, f: &mut PackedFlags) -> (Self, Self) {
                let mut ax = u16::from(self);
                let packed: u16;
                // SAFETY: pure register arithmetic.
                unsafe {
                    asm!(concat!($ins, " {b}"), "mov {t:e}, eax", "lahf", "seto al", "mov {p:x}, ax", "mov eax, {t:e}",
                        b = in(reg_byte) b, t = out(reg) _, p = out(reg) packed, inout("ax") ax,
                        options(pure, nomem, nostack));
                }
                *f = packed;
                (ax as u8, (ax >> 8) as u8)
            }
        };
    }
    int!(u8, i8, reg_byte, "", {
        fn imul(self, b: Self, f: &mut PackedFlags) -> Self {
            self.imul_wide(b, f).0
        }
        byte_mul!(mul_wide, "mul");
        byte_mul!(imul_wide, "imul");
    });
    int!(u16, i16, reg, ":x", {
        imul!(reg, ":x");
        wide!(mul_wide, "mul", "ax", "dx", ":x");
        wide!(imul_wide, "imul", "ax", "dx", ":x");
    });
    int!(u32, i32, reg, ":e", {
        imul!(reg, ":e");
        wide!(mul_wide, "mul", "eax", "edx", ":e");
        wide!(imul_wide, "imul", "eax", "edx", ":e");
    });
    int!(u64, i64, reg, ":r", {
        imul!(reg, ":r");
        wide!(mul_wide, "mul", "rax", "rdx", ":r");
        wide!(imul_wide, "imul", "rax", "rdx", ":r");
    });
}

#[cfg(not(target_arch = "x86_64"))]
mod portable;

/// Whether condition code `CC` (0 = O … 15 = G, the low four bits of the Jcc opcode) holds.
#[inline(always)]
pub fn condition<const CC: u8>(f: PackedFlags) -> bool {
    let less = || ((f >> 15) ^ f) & 1 != 0;
    let yes = match CC >> 1 {
        0 => f & OF != 0,
        1 => f & CF != 0,
        2 => f & ZF != 0,
        3 => f & (CF | ZF) != 0,
        4 => f & SF != 0,
        5 => f & PF != 0,
        6 => less(),
        _ => less() || f & ZF != 0,
    };
    yes ^ (CC & 1 != 0)
}
