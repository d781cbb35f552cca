use std::{fs, path::Path};

/// The settings of apt.conf(5) that matter here, by lower-case name: `acquire::http::proxy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AptConfig {
    settings: Vec<(String, String)>,
}

impl AptConfig {
    /// Reads `apt.conf.d/*` and then `apt.conf` below `etc_apt`, in apt's order; a missing file is an empty one.
    pub fn read(etc_apt: &Path) -> Self {
        let mut config = Self::default();
        for path in super::sources::list_dir(&etc_apt.join("apt.conf.d")) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // apt reads files without a suffix or with `.conf`.
            if (name.contains('.') && !name.ends_with(".conf")) || name.starts_with('.') {
                continue;
            }
            config.add(&fs::read_to_string(&path).unwrap_or_default());
        }
        config.add(&fs::read_to_string(etc_apt.join("apt.conf")).unwrap_or_default());
        config
    }

    /// Adds settings in either notation: `A::B "x";` and `A { B "x"; };`.
    pub fn add(&mut self, text: &str) {
        let mut scopes: Vec<String> = Vec::new();
        let mut words: Vec<String> = Vec::new();
        for token in tokens(text) {
            match token {
                Token::Word(word) => words.push(word),
                Token::Open => scopes.push(words.drain(..).next().unwrap_or_default()),
                Token::Close => {
                    scopes.pop();
                    words.clear();
                }
                Token::End => {
                    if let [name, value] = &words[..] {
                        let path: Vec<&str> = scopes.iter().map(String::as_str).chain([name.as_str()]).collect();
                        self.settings.push((path.join("::").to_ascii_lowercase(), value.clone()));
                    }
                    words.clear();
                }
            }
        }
    }

    /// The last value set wins.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.settings.iter().rev().find(|(setting, _)| setting.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The proxy for an address, as apt chooses it: per host first; `DIRECT` means none.
    pub fn proxy(&self, scheme: &str, host: &str) -> Proxy {
        let specific = self.get(&format!("Acquire::{scheme}::Proxy::{host}"));
        match specific.or_else(|| self.get(&format!("Acquire::{scheme}::Proxy"))) {
            None | Some("") => Proxy::Unset,
            Some(value) if value.eq_ignore_ascii_case("DIRECT") || value.eq_ignore_ascii_case("false") => Proxy::Direct,
            Some(value) => Proxy::Via(value.to_owned()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Proxy {
    /// apt says nothing; the environment decides.
    Unset,
    Direct,
    Via(String),
}

enum Token {
    Word(String),
    Open,
    Close,
    End,
}

fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let line_end = rest.find('\n').unwrap_or(rest.len());
        if rest.starts_with("//") || rest.starts_with('#') {
            rest = &rest[line_end..];
        } else if let Some(comment) = rest.strip_prefix("/*") {
            rest = comment.split_once("*/").map_or("", |(_, after)| after);
        } else if let Some(quoted) = rest.strip_prefix('"') {
            let (value, after) = quoted.split_once('"').unwrap_or((quoted, ""));
            tokens.push(Token::Word(value.to_owned()));
            rest = after;
        } else if let Some(token) = match c {
            '{' => Some(Token::Open),
            '}' => Some(Token::Close),
            ';' => Some(Token::End),
            _ => None,
        } {
            tokens.push(token);
            rest = &rest[1..];
        } else if c.is_whitespace() {
            rest = &rest[c.len_utf8()..];
        } else {
            let end = rest.find(|c: char| c.is_whitespace() || "{};\"".contains(c)).unwrap_or(rest.len());
            tokens.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_both_notations() {
        let mut config = AptConfig::default();
        config.add(
            "// a comment\nAcquire::http::Proxy \"http://one:1\"; # another\n\
             Acquire { http { Proxy \"http://two:2\"; Proxy::mirror.test DIRECT; }; /* x\n */ Retries 3; };\n",
        );
        assert_eq!(config.get("acquire::retries"), Some("3"));
        assert_eq!(config.proxy("http", "other.test"), Proxy::Via("http://two:2".to_owned()));
        assert_eq!(config.proxy("http", "mirror.test"), Proxy::Direct);
        assert_eq!(config.proxy("https", "mirror.test"), Proxy::Unset);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "[a-z:;{}\"/*# \\n]{0,120}") {
            AptConfig::default().add(&text);
        }
    }
}
