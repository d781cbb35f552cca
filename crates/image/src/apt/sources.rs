use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::deb::control::paragraphs;

/// A source of binary packages that the host's apt uses (sources.list(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The base address without a trailing slash.
    pub uri: String,
    pub suite: String,
    pub components: Vec<String>,
    pub keys: Keys,
    pub check_valid_until: bool,
}

/// Which keys may sign the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// Nothing is said: the keys that the host trusts for Debian.
    Default,
    Files(Vec<PathBuf>),
    /// An armoured key block within the sources file.
    Inline(String),
    /// Keys of the host's default keyrings with one of these fingerprints.
    Fingerprints(Vec<String>),
}

/// Reads `sources.list` and `sources.list.d/*.{list,sources}` below `etc_apt`.
///
/// A line or paragraph that is malformed or disabled is left out: the host's apt judges its configuration, not we.
pub fn read(etc_apt: &Path, architecture: &str) -> Vec<Source> {
    let mut files = vec![etc_apt.join("sources.list")];
    files.extend(list_dir(&etc_apt.join("sources.list.d")));
    let mut sources = Vec::new();
    for path in files {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        match path.extension().and_then(|e| e.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(|line| one_line(line, architecture))),
            Some("sources") => sources.extend(deb822(&text, architecture)),
            _ => {}
        }
    }
    sources
}

/// The files of a directory by name; none where it cannot be read.
pub(super) fn list_dir(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// `deb [arch=amd64 signed-by=/k.gpg] http://… bookworm main`
fn one_line(line: &str, architecture: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let rest = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t', '[']))?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let option = |name: &str| {
        options
            .split_whitespace()
            .filter_map(|o| o.split_once('='))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, v)| v)
    };
    if option("arch").is_some_and(|archs| !archs.split(',').any(|a| a == architecture)) {
        return None;
    }
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    Some(Source {
        uri: resolve_mirror_file(uri)?,
        suite: suite.to_owned(),
        components: words.map(str::to_owned).collect(),
        keys: option("signed-by").map_or(Keys::Default, |value| keys(&value.replace(',', " "))),
        check_valid_until: option("check-valid-until").is_none_or(is_yes),
    })
}

fn deb822(text: &str, architecture: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for paragraph in paragraphs(text).map_while(Result::ok) {
        let enabled = paragraph.get("Enabled").is_none_or(is_yes);
        let archs = paragraph.words("Architectures");
        let fits = archs.is_empty() || archs.contains(&architecture);
        if !enabled || !fits || !paragraph.words("Types").contains(&"deb") {
            continue;
        }
        for uri in paragraph.words("URIs").into_iter().filter_map(resolve_mirror_file) {
            for suite in paragraph.words("Suites") {
                sources.push(Source {
                    uri: uri.clone(),
                    suite: suite.to_owned(),
                    components: paragraph.words("Components").into_iter().map(str::to_owned).collect(),
                    keys: paragraph.get("Signed-By").map_or(Keys::Default, keys),
                    check_valid_until: paragraph.get("Check-Valid-Until").is_none_or(is_yes),
                });
            }
        }
    }
    sources
}

fn is_yes(value: &str) -> bool {
    !["no", "false", "without", "off", "disable", "0"].contains(&value.to_ascii_lowercase().as_str())
}

fn keys(value: &str) -> Keys {
    if value.contains("BEGIN PGP PUBLIC KEY BLOCK") {
        // deb822 writes an empty line of the block as a lone dot.
        return Keys::Inline(
            value.lines().map(|line| if line == "." { "" } else { line }).collect::<Vec<_>>().join("\n"),
        );
    }
    let words: Vec<&str> = value.split_whitespace().collect();
    let files: Vec<PathBuf> = words.iter().filter(|w| w.starts_with('/')).map(PathBuf::from).collect();
    if !files.is_empty() {
        return Keys::Files(files);
    }
    let fingerprints: Vec<String> = words.iter().map(|w| w.trim_end_matches('!').to_ascii_uppercase()).collect();
    if fingerprints.is_empty() { Keys::Default } else { Keys::Fingerprints(fingerprints) }
}

/// `mirror+file:/path` (Debian's own cloud images have it) stands for the first address in that file.
/// Methods that only apt has (cdrom, tor, …) are passed over.
fn resolve_mirror_file(uri: &str) -> Option<String> {
    let plain = |uri: &str| {
        let known = ["http://", "https://"].iter().any(|scheme| uri.starts_with(scheme));
        known.then(|| uri.trim_end_matches('/').to_owned())
    };
    let Some(path) = uri.strip_prefix("mirror+file:") else { return plain(uri) };
    let list = fs::read_to_string(path.replacen("//", "/", 1)).ok()?;
    list.lines().filter_map(|line| line.split_whitespace().next()).find_map(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Vec<Source>) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sources.list.d")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text.replace("@DIR@", dir.path().to_str().unwrap())).unwrap();
        }
        let sources = read(dir.path(), "amd64");
        (dir, sources)
    }

    #[test]
    fn reads_one_line_entries() {
        let (_dir, sources) = host(&[(
            "sources.list",
            "# deb http://off.test/debian sid main\n\
             deb http://mirror.test/debian/ bookworm main contrib # why\n\
             deb-src http://mirror.test/debian bookworm main\n\
             deb [arch=arm64] http://arm.test/debian bookworm main\n\
             deb [ arch=amd64,i386 signed-by=/a.gpg,/b.asc check-valid-until=no ] https://s.test/debian trixie main\n\
             deb cdrom:[Debian 12]/ bookworm main\n\
             broken\n",
        )]);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].uri, "http://mirror.test/debian");
        assert_eq!(sources[0].components, ["main", "contrib"]);
        assert_eq!((&sources[0].keys, sources[0].check_valid_until), (&Keys::Default, true));
        assert_eq!(sources[1].keys, Keys::Files(vec!["/a.gpg".into(), "/b.asc".into()]));
        assert!(!sources[1].check_valid_until);
    }

    #[test]
    fn reads_deb822_entries() {
        let (_dir, sources) = host(&[
            (
                "sources.list.d/debian.sources",
                "Types: deb deb-src\nURIs: http://mirror.test/debian\nSuites: trixie trixie-updates\nComponents: main\n\
                 Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END PGP PUBLIC KEY BLOCK-----\n\n\
                 Types: deb\nEnabled: no\nURIs: http://off.test/debian\nSuites: sid\nComponents: main\n\n\
                 Types: deb\nURIs: mirror+file:@DIR@/mirrors\nSuites: bookworm\nComponents: main\nSigned-By: 0123abcd!\n",
            ),
            ("mirrors", "https://listed.test/debian/ priority:1\nhttps://second.test/\n"),
            ("sources.list.d/ignored.save", "Types: deb\nURIs: http://x.test\nSuites: x\n"),
        ]);
        assert_eq!(sources.len(), 3);
        assert_eq!((sources[0].suite.as_str(), sources[1].suite.as_str()), ("trixie", "trixie-updates"));
        let Keys::Inline(block) = &sources[0].keys else { panic!("{:?}", sources[0].keys) };
        assert!(block.contains("BLOCK-----\n\nabc\n-----END"), "{block}");
        assert_eq!(sources[2].uri, "https://listed.test/debian");
        assert_eq!(sources[2].keys, Keys::Fingerprints(vec!["0123ABCD".to_owned()]));
    }
}
