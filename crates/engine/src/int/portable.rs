//! Flags computed in plain Rust, for hosts that are no x86-64.

use super::{AF, CF, Int, OF, PF, PackedFlags, SF, ZF};

fn result<T: Int>(r: T) -> PackedFlags {
    let v = r.to_u64();
    let mut f = 0x0200;
    if v == 0 {
        f |= ZF;
    }
    if r.sext() < 0 {
        f |= SF;
    }
    if (v as u8).count_ones() % 2 == 0 {
        f |= PF;
    }
    f
}

fn bit(set: bool, flag: PackedFlags) -> PackedFlags {
    if set { flag } else { 0 }
}

fn top<T: Int>(v: u64) -> bool {
    (v >> (T::BITS - 1)) & 1 != 0
}

/// `carries` holds, for each bit, whether it carried (or borrowed) out.
fn arithmetic<T: Int>(r: T, carries: u64) -> PackedFlags {
    let out = (carries >> (T::BITS - 1)) & 1;
    let into = (carries >> (T::BITS - 2)) & 1;
    result(r) | bit(carries & 8 != 0, AF) | bit(out != 0, CF) | bit(out != into, OF)
}

fn plus<T: Int>(a: T, b: T, carry: u64, f: &mut PackedFlags) -> T {
    let (x, y) = (a.to_u64(), b.to_u64());
    let r = T::from_u64(x.wrapping_add(y).wrapping_add(carry));
    *f = arithmetic(r, (x & y) | ((x | y) & !r.to_u64()));
    r
}

fn minus<T: Int>(a: T, b: T, borrow: u64, f: &mut PackedFlags) -> T {
    let (x, y) = (a.to_u64(), b.to_u64());
    let r = T::from_u64(x.wrapping_sub(y).wrapping_sub(borrow));
    *f = arithmetic(r, (!x & y) | ((!x | y) & r.to_u64()));
    r
}

fn logic<T: Int>(v: u64, f: &mut PackedFlags) -> T {
    let r = T::from_u64(v);
    *f = result(r);
    r
}

fn masked<T: Int>(count: u8) -> u32 {
    u32::from(count) & if T::BITS == 64 { 63 } else { 31 }
}

macro_rules! int {
    ($t:ty, $s:ty, $w:ty, $sw:ty) => {
        impl Int for $t {
            const BYTES: usize = size_of::<$t>();
            const BITS: u32 = <$t>::BITS;
            fn from_u64(v: u64) -> Self {
                v as $t
            }
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            fn sext(self) -> i64 {
                i64::from(self as $s)
            }
            fn add(self, b: Self, f: &mut PackedFlags) -> Self {
                plus(self, b, 0, f)
            }
            fn sub(self, b: Self, f: &mut PackedFlags) -> Self {
                minus(self, b, 0, f)
            }
            fn adc(self, b: Self, f: &mut PackedFlags) -> Self {
                plus(self, b, u64::from(*f & CF != 0), f)
            }
            fn sbb(self, b: Self, f: &mut PackedFlags) -> Self {
                minus(self, b, u64::from(*f & CF != 0), f)
            }
            fn and(self, b: Self, f: &mut PackedFlags) -> Self {
                logic(self.to_u64() & b.to_u64(), f)
            }
            fn or(self, b: Self, f: &mut PackedFlags) -> Self {
                logic(self.to_u64() | b.to_u64(), f)
            }
            fn xor(self, b: Self, f: &mut PackedFlags) -> Self {
                logic(self.to_u64() ^ b.to_u64(), f)
            }
            fn inc(self, f: &mut PackedFlags) -> Self {
                let carry = *f & CF;
                let r = plus(self, 1, 0, f);
                *f = (*f & !CF) | carry;
                r
            }
            fn dec(self, f: &mut PackedFlags) -> Self {
                let carry = *f & CF;
                let r = minus(self, 1, 0, f);
                *f = (*f & !CF) | carry;
                r
            }
            fn neg(self, f: &mut PackedFlags) -> Self {
                minus(0, self, 0, f)
            }
            fn shl(self, count: u8, f: &mut PackedFlags) -> Self {
                let n = masked::<Self>(count);
                if n == 0 {
                    return self;
                }
                let wide = u128::from(self) << n;
                let r = wide as Self;
                let carry = (wide >> Self::BITS) & 1 != 0;
                *f = result(r) | bit(carry, CF) | bit(carry != top::<Self>(u64::from(r)), OF);
                r
            }
            fn shr(self, count: u8, f: &mut PackedFlags) -> Self {
                let n = masked::<Self>(count);
                if n == 0 {
                    return self;
                }
                let r = (u128::from(self) >> n) as Self;
                let carry = (u128::from(self) >> (n - 1)) & 1 != 0;
                *f = result(r) | bit(carry, CF) | bit(top::<Self>(u64::from(self)), OF);
                r
            }
            fn sar(self, count: u8, f: &mut PackedFlags) -> Self {
                let n = masked::<Self>(count);
                if n == 0 {
                    return self;
                }
                let wide = i128::from(self as $s);
                let r = (wide >> n) as Self;
                *f = result(r) | bit((wide >> (n - 1)) & 1 != 0, CF);
                r
            }
            fn rol(self, count: u8, f: &mut PackedFlags) -> Self {
                if masked::<Self>(count) == 0 {
                    return self;
                }
                let r = self.rotate_left(masked::<Self>(count) % Self::BITS);
                let carry = r & 1 != 0;
                *f = (*f & !(CF | OF)) | bit(carry, CF) | bit(carry != top::<Self>(u64::from(r)), OF);
                r
            }
            fn ror(self, count: u8, f: &mut PackedFlags) -> Self {
                if masked::<Self>(count) == 0 {
                    return self;
                }
                let r = self.rotate_right(masked::<Self>(count) % Self::BITS);
                let high = top::<Self>(u64::from(r));
                *f = (*f & !(CF | OF)) | bit(high, CF) | bit(high != top::<Self>(u64::from(r) << 1), OF);
                r
            }
            fn rcl(self, count: u8, f: &mut PackedFlags) -> Self {
                let n = masked::<Self>(count);
                let mut r = self;
                let mut carry = *f & CF != 0;
                for _ in 0..n {
                    let out = top::<Self>(u64::from(r));
                    r = (r << 1) | Self::from(carry);
                    carry = out;
                }
                if n != 0 {
                    *f = (*f & !(CF | OF)) | bit(carry, CF) | bit(carry != top::<Self>(u64::from(r)), OF);
                }
                r
            }
            fn rcr(self, count: u8, f: &mut PackedFlags) -> Self {
                let n = masked::<Self>(count);
                let mut r = self;
                let mut carry = *f & CF != 0;
                for _ in 0..n {
                    let out = r & 1 != 0;
                    r = (r >> 1) | (Self::from(carry) << (Self::BITS - 1));
                    carry = out;
                }
                if n != 0 {
                    let high = top::<Self>(u64::from(r));
                    *f = (*f & !(CF | OF)) | bit(carry, CF) | bit(high != top::<Self>(u64::from(r) << 1), OF);
                }
                r
            }
            fn imul(self, b: Self, f: &mut PackedFlags) -> Self {
                self.imul_wide(b, f).0
            }
            fn mul_wide(self, b: Self, f: &mut PackedFlags) -> (Self, Self) {
                let wide = u128::from(self) * u128::from(b);
                let (low, high) = (wide as Self, (wide >> Self::BITS) as Self);
                *f = result(low) | bit(high != 0, CF | OF);
                (low, high)
            }
            fn imul_wide(self, b: Self, f: &mut PackedFlags) -> (Self, Self) {
                let wide = i128::from(self as $s) * i128::from(b as $s);
                let low = wide as Self;
                *f = result(low) | bit(i128::from(low as $s) != wide, CF | OF);
                (low, (wide >> Self::BITS) as Self)
            }
        }
    };
}
int!(u8, i8, u16, i16);
int!(u16, i16, u32, i32);
int!(u32, i32, u64, i64);
int!(u64, i64, u128, i128);
