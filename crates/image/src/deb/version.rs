use std::{cmp::Ordering, fmt};

/// A package version, ordered as the Debian Policy Manual section 5.6.12 says: `[epoch:]upstream[-revision]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Version(String);

impl Version {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    fn parts(&self) -> (u64, &str, &str) {
        let (epoch, rest) = match self.0.split_once(':') {
            // An epoch that is no number is no valid version; it sorts highest rather than being ignored.
            Some((epoch, rest)) => (epoch.parse().unwrap_or(u64::MAX), rest),
            None => (0, self.0.as_str()),
        };
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
        (epoch, upstream, revision)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        let (epoch_a, upstream_a, revision_a) = self.parts();
        let (epoch_b, upstream_b, revision_b) = other.parts();
        epoch_a
            .cmp(&epoch_b)
            .then_with(|| compare_part(upstream_a, upstream_b))
            .then_with(|| compare_part(revision_a, revision_b))
            // Equal by policy but written differently ("1.0" and "1.00"): keep `Ord` consistent with `Eq`.
            .then_with(|| self.0.cmp(&other.0))
    }
}

impl Version {
    /// Equality as policy means it: `1.0` equals `1.00` and `0:1.0-0`.
    pub fn policy_cmp(&self, other: &Self) -> Ordering {
        let (epoch_a, upstream_a, revision_a) = self.parts();
        let (epoch_b, upstream_b, revision_b) = other.parts();
        epoch_a
            .cmp(&epoch_b)
            .then_with(|| compare_part(upstream_a, upstream_b))
            .then_with(|| compare_part(revision_a, revision_b))
    }
}

/// Alternates between a run of non-digits and a run of digits until the two differ.
fn compare_part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        let (text_a, rest_a) = a.split_at(run(a, |c| !c.is_ascii_digit()));
        let (text_b, rest_b) = b.split_at(run(b, |c| !c.is_ascii_digit()));
        let (digits_a, next_a) = rest_a.split_at(run(rest_a, |c| c.is_ascii_digit()));
        let (digits_b, next_b) = rest_b.split_at(run(rest_b, |c| c.is_ascii_digit()));
        let order = compare_text(text_a, text_b).then_with(|| compare_digits(digits_a, digits_b));
        if order.is_ne() {
            return order;
        }
        (a, b) = (next_a, next_b);
    }
    Ordering::Equal
}

fn run(bytes: &[u8], matches: impl Fn(&u8) -> bool) -> usize {
    bytes.iter().take_while(|c| matches(c)).count()
}

/// `~` sorts before the end of the part, letters before everything else.
fn weight(byte: Option<&u8>) -> i32 {
    match byte {
        Some(b'~') => -1,
        None => 0,
        Some(c) if c.is_ascii_alphabetic() => i32::from(*c),
        Some(c) => i32::from(*c) + 256,
    }
}

fn compare_text(a: &[u8], b: &[u8]) -> Ordering {
    (0..a.len().max(b.len()))
        .map(|i| weight(a.get(i)).cmp(&weight(b.get(i))))
        .find(|order| order.is_ne())
        .unwrap_or(Ordering::Equal)
}

fn compare_digits(a: &[u8], b: &[u8]) -> Ordering {
    let strip = |digits: &[u8]| -> Vec<u8> { digits.iter().copied().skip_while(|c| *c == b'0').collect() };
    let (a, b) = (strip(a), strip(b));
    a.len().cmp(&b.len()).then_with(|| a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v(text: &str) -> Version {
        Version::new(text)
    }

    #[test]
    fn orders_as_policy_says() {
        for (low, high) in [
            ("1.0~rc1", "1.0"),
            ("1.0~~", "1.0~~a"),
            ("1.0~~a", "1.0~"),
            ("1.0", "1.0a"),
            ("1.0a", "1.0+b"),
            ("1.2", "1.10"),
            ("9", "1:0"),
            ("1.0-1", "1.0-2"),
            ("1.0-1", "1.0-1+b1"),
            ("2.36-9+deb12u9", "2.36-9+deb12u14"),
            ("1.0-1~bpo1", "1.0-1"),
            ("6.1.0-9", "6.1.0-47"),
            ("1-2-3", "1-3-0"),
            ("", "1"),
        ] {
            assert_eq!(v(low).policy_cmp(&v(high)), Ordering::Less, "{low} < {high}");
            assert_eq!(v(high).policy_cmp(&v(low)), Ordering::Greater, "{high} > {low}");
        }
    }

    #[test]
    fn equal_in_other_words() {
        for (a, b) in [("1.0", "1.00"), ("0:1.0", "1.0"), ("1.0-0", "1.0"), ("1.01-1", "1.1-1")] {
            assert_eq!(v(a).policy_cmp(&v(b)), Ordering::Equal, "{a} = {b}");
        }
    }

    proptest! {
        #[test]
        fn is_a_total_order(a in "[0-9a-c.+~:-]{0,12}", b in "[0-9a-c.+~:-]{0,12}", c in "[0-9a-c.+~:-]{0,12}") {
            let (a, b, c) = (v(&a), v(&b), v(&c));
            prop_assert_eq!(a.policy_cmp(&b), b.policy_cmp(&a).reverse());
            if a.policy_cmp(&b).is_le() && b.policy_cmp(&c).is_le() {
                prop_assert!(a.policy_cmp(&c).is_le());
            }
        }
    }
}
