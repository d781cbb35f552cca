use std::borrow::Cow;

/// One paragraph of a control file (deb822(5)): fields in the order in which they stand.
///
/// Names compare without regard to case. Continuation lines keep their line breaks, without the leading blank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paragraph<'a> {
    fields: Vec<(&'a str, Cow<'a, str>)>,
}

/// A line of a control file that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is neither a field, a continuation nor a comment: '{text}'")]
pub struct ControlError {
    pub line: usize,
    pub text: String,
}

impl<'a> Paragraph<'a> {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_ref())
    }

    /// The words of a field, or none where it is missing.
    pub fn words(&self, name: &str) -> Vec<&str> {
        self.get(name).map(|value| value.split_whitespace().collect()).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }
}

/// Reads the paragraphs of a control file one after the other.
pub struct Paragraphs<'a> {
    lines: std::iter::Enumerate<std::str::Lines<'a>>,
    failed: bool,
}

pub fn paragraphs(text: &str) -> Paragraphs<'_> {
    Paragraphs { lines: text.lines().enumerate(), failed: false }
}

impl<'a> Iterator for Paragraphs<'a> {
    type Item = Result<Paragraph<'a>, ControlError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let mut paragraph = Paragraph::default();
        for (number, line) in self.lines.by_ref() {
            if line.trim().is_empty() {
                if paragraph.is_empty() {
                    continue;
                }
                break;
            }
            if line.starts_with('#') {
                continue;
            }
            if !append(&mut paragraph, line) {
                self.failed = true;
                return Some(Err(ControlError { line: number + 1, text: line.chars().take(80).collect() }));
            }
        }
        (!paragraph.is_empty()).then_some(Ok(paragraph))
    }
}

fn append<'a>(paragraph: &mut Paragraph<'a>, line: &'a str) -> bool {
    if line.starts_with([' ', '\t']) {
        let Some((_, value)) = paragraph.fields.last_mut() else { return false };
        let value = value.to_mut();
        value.push('\n');
        value.push_str(line.trim());
        return true;
    }
    match line.split_once(':') {
        Some((name, value)) if !name.is_empty() && !name.contains(char::is_whitespace) => {
            paragraph.fields.push((name, Cow::Borrowed(value.trim())));
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_fields_continuations_and_comments() {
        let text = "\n# a comment\nPackage: bash\nDepends: a,\n b\n# inside\n\tc\n\n\nPackage: dash\n";
        let all: Vec<_> = paragraphs(text).collect::<Result<_, _>>().unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].get("package"), Some("bash"));
        assert_eq!(all[0].get("Depends"), Some("a,\nb\nc"));
        assert_eq!(all[0].words("DEPENDS"), ["a,", "b", "c"]);
        assert_eq!(all[1].get("Package"), Some("dash"));
        assert_eq!(all[1].get("Depends"), None);
    }

    #[test]
    fn refuses_what_is_no_field() {
        for text in [" orphan continuation", "no colon", ": no name", "two words: x"] {
            assert!(paragraphs(text).any(|p| p.is_err()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_ends(text in "[ -~\\n\\t]{0,300}") {
            prop_assert!(paragraphs(&text).count() <= text.len() + 1);
        }
    }
}
