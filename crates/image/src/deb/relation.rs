use std::cmp::Ordering;

use super::version::Version;

/// How a dependency bounds the version (Debian Policy Manual section 7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    Earlier,
    EarlierOrEqual,
    Equal,
    LaterOrEqual,
    Later,
}

const BOUNDS: [(&str, Bound); 7] = [
    ("<<", Bound::Earlier),
    ("<=", Bound::EarlierOrEqual),
    (">=", Bound::LaterOrEqual),
    (">>", Bound::Later),
    ("=", Bound::Equal),
    // The deprecated single signs mean "or equal".
    ("<", Bound::EarlierOrEqual),
    (">", Bound::LaterOrEqual),
];

impl Bound {
    fn allows(self, order: Ordering) -> bool {
        match self {
            Bound::Earlier => order.is_lt(),
            Bound::EarlierOrEqual => order.is_le(),
            Bound::Equal => order.is_eq(),
            Bound::LaterOrEqual => order.is_ge(),
            Bound::Later => order.is_gt(),
        }
    }
}

/// One package that a dependency names: `libc6 (>= 2.36)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub name: String,
    /// The architecture that is meant, where one is named (`libc6-x32:i386`). `:any` names none: there is only one here.
    pub architecture: Option<String>,
    pub bound: Option<(Bound, Version)>,
}

impl Target {
    pub fn accepts(&self, version: &Version) -> bool {
        self.bound.as_ref().is_none_or(|(bound, wanted)| bound.allows(version.policy_cmp(wanted)))
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        if let Some(architecture) = &self.architecture {
            write!(f, ":{architecture}")?;
        }
        if let Some((bound, version)) = &self.bound {
            let sign = BOUNDS.iter().find(|(_, b)| b == bound).map_or("?", |(sign, _)| sign);
            write!(f, " ({sign} {version})")?;
        }
        Ok(())
    }
}

/// Alternatives, the preferred one first: `a | b (>= 2)`.
pub type Alternatives = Vec<Target>;

/// A relationship field that does not follow the syntax of the Debian Policy Manual section 7.1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no package relationship")]
pub struct RelationError(pub String);

/// Parses a field such as `Depends`. Architecture and build-profile restrictions do not occur in binary packages.
pub fn parse(field: &str) -> Result<Vec<Alternatives>, RelationError> {
    field
        .split(',')
        .map(str::trim)
        .filter(|clause| !clause.is_empty())
        .map(|clause| clause.split('|').map(target).collect())
        .collect()
}

fn target(text: &str) -> Result<Target, RelationError> {
    let text = text.trim();
    let bad = || RelationError(text.chars().take(80).collect());
    let (name, bound) = match text.split_once('(') {
        Some((name, rest)) => (name.trim(), Some(rest.trim_end().strip_suffix(')').ok_or_else(bad)?.trim())),
        None => (text, None),
    };
    let (name, architecture) = match name.split_once(':') {
        Some((name, architecture)) => (name, Some(architecture)),
        None => (name, None),
    };
    let valid = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    if !valid(name) || !architecture.is_none_or(valid) {
        return Err(bad());
    }
    let architecture = architecture.filter(|a| !["any", "native"].contains(a)).map(str::to_owned);
    let bound = bound.map(|bound| parse_bound(bound).ok_or_else(bad)).transpose()?;
    Ok(Target { name: name.to_owned(), architecture, bound })
}

fn parse_bound(text: &str) -> Option<(Bound, Version)> {
    let (sign, bound) = BOUNDS.iter().find(|(sign, _)| text.starts_with(sign))?;
    let version = text[sign.len()..].trim();
    (!version.is_empty() && !version.contains(char::is_whitespace)).then(|| (*bound, Version::new(version)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_versions_alternatives_and_qualifiers() {
        let all = parse("libc6 (>= 2.36), perl:any, a | b (<< 2~) | c (= 1:1-1),\n d(>2)").unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!(all[0][0].to_string(), "libc6 (>= 2.36)");
        assert_eq!((all[1][0].name.as_str(), &all[1][0].architecture), ("perl", &None));
        assert_eq!(all[2].iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(all[2][1].bound.as_ref().unwrap().0, Bound::Earlier);
        assert_eq!(all[3][0].bound.as_ref().unwrap().0, Bound::LaterOrEqual);
        assert_eq!(parse("a:x32 (= 1)").unwrap()[0][0].to_string(), "a:x32 (= 1)");
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn bounds_decide() {
        let accepts =
            |bound: &str, version: &str| parse(&format!("x ({bound})")).unwrap()[0][0].accepts(&Version::new(version));
        for (bound, version, wanted) in [
            (">= 2", "2", true),
            (">= 2", "2~rc", false),
            ("<< 2", "2~rc", true),
            ("= 2", "2-0", true),
            (">> 2", "2", false),
            ("<= 2", "2", true),
        ] {
            assert_eq!(accepts(bound, version), wanted, "{version} {bound}");
        }
    }

    #[test]
    fn refuses_malformed_relations() {
        for text in ["a |", "a (>= )", "a (2)", "a (>= 1", "../x", "a b", "a (>= 1 2)", "a:", ":amd64"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "[ -~]{0,80}") {
            let _ = parse(&text);
        }
    }
}
