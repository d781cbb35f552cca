//! DIV and IDIV: the host's would raise a signal where the guest's raises `#DE`.

/// Divides `high:low` by `divisor`, all of `bits` (8, 16, 32 or 64) bits; the quotient and the remainder, or `None`
/// for `#DE`: division by zero or a quotient that does not fit.
pub fn divide(signed: bool, bits: u32, high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    if bits == 64 && !signed && high == 0 {
        return Some((low.checked_div(divisor)?, low.checked_rem(divisor)?));
    }
    let mask = u64::MAX >> (64 - bits.clamp(8, 64));
    let dividend = u128::from(high & mask) << bits | u128::from(low & mask);
    let divisor = u128::from(divisor & mask);
    if !signed {
        let quotient = dividend.checked_div(divisor)?;
        let fits = quotient <= u128::from(mask);
        return fits.then_some((quotient as u64, (dividend % divisor) as u64));
    }
    let extend = |value: u128, from: u32| ((value << (128 - from)) as i128) >> (128 - from);
    let (dividend, divisor) = (extend(dividend, 2 * bits), extend(divisor, bits));
    // `checked_div` also refuses the most negative dividend by -1.
    let quotient = dividend.checked_div(divisor)?;
    let remainder = dividend % divisor;
    let most = i128::from(mask >> 1);
    (-most - 1..=most).contains(&quotient).then_some((quotient as u64 & mask, remainder as u64 & mask))
}
