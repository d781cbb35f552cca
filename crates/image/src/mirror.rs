//! From the host's apt configuration to verified package indices of one suite.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    apt::sources::{Keys, Source},
    deb::{
        packages::{Index, IndexError},
        release::{Release, ReleaseError},
    },
    fetch::{Cache, FetchError, Http, Wanted},
    progress::Progress,
    verify::{Keyring, VerifyError, clearsigned},
};

/// Why no archive can be used.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error(
        "this host's apt configuration names no Debian archive; name one with --mirror URL or VIREO_DEBIAN_MIRROR (the address that ends where 'dists' begins)"
    )]
    NoSource,
    #[error(
        "no keys to verify a Debian archive with were found; install them: apt-get install debian-archive-keyring (Fedora: dnf install debian-keyring)"
    )]
    NoKeyring,
    #[error("'{0}' is no address of an archive: it must begin with http:// or https://")]
    Address(String),
    #[error("{url} is not a file that may be used")]
    Untrusted { url: String, source: VerifyError },
    #[error("{url} cannot be read")]
    Release { url: String, source: ReleaseError },
    #[error("{url} describes {origin} '{codename}' instead of Debian '{wanted}'")]
    Other { url: String, origin: String, codename: String, wanted: String },
    #[error(
        "{url} expired {days} days ago: the mirror is stale or the connection is tampered with; name another one with --mirror, or check this host's clock"
    )]
    Expired { url: String, days: u64 },
    #[error("{url} is dated in the future: check this host's clock")]
    Future { url: String },
    #[error("{url} lists no '{file}'")]
    NoIndex { url: String, file: String },
    #[error("the package index {url} cannot be used")]
    Index { url: String, source: IndexError },
    #[error("the package index {url} cannot be decompressed")]
    Decompress { url: String, source: std::io::Error },
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// Where to look for one suite of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuiteAddress {
    pub uri: String,
    pub suite: String,
    pub keyring: Keyring,
    pub check_valid_until: bool,
}

/// What the host or the user says about archives.
pub struct Host<'a> {
    pub sources: &'a [Source],
    /// `--mirror`: used instead of the host's sources.
    pub mirror: Option<&'a str>,
    /// Keys instead of the host's.
    pub keyring: Option<&'a Path>,
}

/// Suites of Debian as a source may name them; others are not asked, they belong to someone else.
const KNOWN_SUITES: [&str; 11] = [
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "stable",
    "oldstable",
    "oldoldstable",
    "testing",
    "unstable",
];
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];
const TRUSTED_KEYS: &str = "/etc/apt/trusted.gpg.d";
/// Suffixes by which a source names the suites that go with a release.
const SECURITY: [&str; 2] = ["-security", "/updates"];

impl Host<'_> {
    /// Base addresses that may be a Debian archive, the likeliest first.
    pub fn archives(&self, suite: &str) -> Result<Vec<SuiteAddress>, MirrorError> {
        if let Some(mirror) = self.mirror {
            return Ok(vec![self.address(mirror_address(mirror)?, suite, &Keys::Default, true)?]);
        }
        let is_main = |source: &&Source| {
            KNOWN_SUITES.contains(&source.suite.as_str()) && source.components.iter().any(|c| c == "main")
        };
        let mut sources: Vec<&Source> = self.sources.iter().filter(is_main).collect();
        // An entry for the wanted suite is the best guess, then one with Debian's own keyring.
        sources.sort_by_key(|source| (source.suite != suite, !names_debian_keys(&source.keys)));
        let mut addresses: Vec<SuiteAddress> = Vec::new();
        for source in sources {
            if !addresses.iter().any(|known| known.uri == source.uri) {
                addresses.push(self.address(source.uri.clone(), suite, &source.keys, source.check_valid_until)?);
            }
        }
        if addresses.is_empty() { Err(MirrorError::NoSource) } else { Ok(addresses) }
    }

    /// The archive of security updates: what the host says, else the sibling `…-security` of the archive.
    /// The flag tells whether the host names it, so that it must answer.
    pub fn security(&self, archive: &SuiteAddress, suite: &str) -> Result<(SuiteAddress, bool), MirrorError> {
        let wanted = format!("{suite}-security");
        let is_security = |source: &&Source| {
            let stem = SECURITY.iter().find_map(|suffix| source.suite.strip_suffix(suffix));
            stem.is_some_and(|stem| KNOWN_SUITES.contains(&stem)) && source.components.iter().any(|c| c == "main")
        };
        let named = self.sources.iter().filter(|_| self.mirror.is_none()).filter(is_security);
        if let Some(source) = named.min_by_key(|source| source.suite != wanted) {
            return Ok((self.address(source.uri.clone(), &wanted, &source.keys, source.check_valid_until)?, true));
        }
        let uri = format!("{}-security", archive.uri);
        Ok((SuiteAddress { uri, suite: wanted, ..archive.clone() }, false))
    }

    fn address(
        &self,
        uri: String,
        suite: &str,
        keys: &Keys,
        check_valid_until: bool,
    ) -> Result<SuiteAddress, MirrorError> {
        Ok(SuiteAddress { uri, suite: suite.to_owned(), keyring: self.keyring(keys)?, check_valid_until })
    }

    fn keyring(&self, keys: &Keys) -> Result<Keyring, MirrorError> {
        if let Some(path) = self.keyring {
            return Ok(Keyring { files: vec![path.to_owned()], ..Keyring::default() });
        }
        Ok(match keys {
            Keys::Files(files) => Keyring { files: files.clone(), ..Keyring::default() },
            Keys::Inline(text) => Keyring { inline: vec![text.clone()], ..Keyring::default() },
            Keys::Default => Keyring { files: default_keyrings()?, ..Keyring::default() },
            Keys::Fingerprints(fingerprints) => {
                Keyring { files: default_keyrings()?, fingerprints: fingerprints.clone(), ..Keyring::default() }
            }
        })
    }
}

/// A mirror's address as a person gives it, without the slash at its end.
fn mirror_address(text: &str) -> Result<String, MirrorError> {
    let plain = text.trim().trim_end_matches('/');
    let is_http = ["http://", "https://"].iter().any(|scheme| plain.len() > scheme.len() && plain.starts_with(scheme));
    if !is_http || plain.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(MirrorError::Address(text.to_owned()));
    }
    Ok(plain.to_owned())
}

fn names_debian_keys(keys: &Keys) -> bool {
    matches!(keys, Keys::Files(files) if files.iter().any(|path| path.to_string_lossy().contains("debian-archive")))
}

/// Debian's own keyring where it is installed, else all keys that apt trusts.
fn default_keyrings() -> Result<Vec<PathBuf>, MirrorError> {
    if let Some(path) = KEYRINGS.iter().map(PathBuf::from).find(|path| path.is_file()) {
        return Ok(vec![path]);
    }
    let is_key = |path: &PathBuf| path.extension().is_some_and(|e| e == "gpg" || e == "asc");
    let mut keys: Vec<PathBuf> =
        fs::read_dir(TRUSTED_KEYS).into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_key).collect();
    keys.sort();
    if keys.is_empty() { Err(MirrorError::NoKeyring) } else { Ok(keys) }
}

/// A suite whose release file was verified.
#[derive(Debug)]
pub struct Suite {
    pub address: SuiteAddress,
    pub release: Release,
}

const RELEASE_LIMIT: u64 = 8 << 20;
const INDEX_LIMIT: u64 = 512 << 20;

/// What it takes to read suites.
pub struct Reader<'a> {
    pub http: &'a Http,
    pub cache: &'a Cache,
    pub scratch: &'a Path,
    pub progress: &'a dyn Progress,
}

impl Reader<'_> {
    /// Fetches and verifies the release file of a suite.
    pub fn open(&self, address: &SuiteAddress) -> Result<Suite, MirrorError> {
        let url = format!("{}/dists/{}/InRelease", address.uri, address.suite);
        let message = self.http.small(&url, RELEASE_LIMIT, self.progress)?;
        let text = clearsigned(&message, &address.keyring, self.scratch)
            .map_err(|source| MirrorError::Untrusted { url: url.clone(), source })?;
        let release = Release::parse(&text).map_err(|source| MirrorError::Release { url: url.clone(), source })?;
        check_identity(&release, &url, &address.suite)?;
        check_dates(&release, &url, address.check_valid_until, SystemTime::now())?;
        Ok(Suite { address: address.clone(), release })
    }

    /// Fetches the package index of a suite's `main` and adds it to `index`.
    pub fn read_index(
        &self,
        suite: &Suite,
        number: usize,
        architecture: &str,
        index: &mut Index,
    ) -> Result<(), MirrorError> {
        let base = format!("{}/dists/{}", suite.address.uri, suite.address.suite);
        let dir = format!("main/binary-{architecture}");
        let name = ["xz", "gz"].map(|suffix| format!("{dir}/Packages.{suffix}"));
        let listed = name.iter().find_map(|file| Some((file, suite.release.file(file)?)));
        let Some((file, (sha256, size_bytes))) = listed else {
            return Err(MirrorError::NoIndex { url: format!("{base}/InRelease"), file: name[0].clone() });
        };
        let plain = format!("{base}/{file}");
        let url = if suite.release.by_hash { format!("{base}/{dir}/by-hash/SHA256/{sha256}") } else { plain };
        let wanted = Wanted { url: url.clone(), sha256, size_bytes };
        let path = self.cache.fetch_all(self.http, &[wanted], self.progress)?.remove(0);
        let text = decompress(&path, file).map_err(|source| MirrorError::Decompress { url: url.clone(), source })?;
        index.add(&text, number, architecture).map_err(|source| MirrorError::Index { url, source })
    }
}

fn decompress(path: &Path, name: &str) -> std::io::Result<String> {
    let file = fs::File::open(path)?;
    let reader: Box<dyn Read> = if name.ends_with(".xz") {
        Box::new(xz2::read::XzDecoder::new(file))
    } else {
        Box::new(flate2::read::GzDecoder::new(file))
    };
    let mut text = String::new();
    let bytes = reader.take(INDEX_LIMIT).read_to_string(&mut text)?;
    if bytes as u64 == INDEX_LIMIT {
        return Err(std::io::Error::other("it grows beyond 512 MiB"));
    }
    Ok(text)
}

fn check_identity(release: &Release, url: &str, wanted: &str) -> Result<(), MirrorError> {
    if release.origin == "Debian" && release.codename == wanted {
        return Ok(());
    }
    Err(MirrorError::Other {
        url: url.to_owned(),
        origin: release.origin.clone(),
        codename: release.codename.clone(),
        wanted: wanted.to_owned(),
    })
}

fn check_dates(release: &Release, url: &str, check_valid_until: bool, now: SystemTime) -> Result<(), MirrorError> {
    // Clocks of hosts and mirrors differ a little.
    let tolerance = Duration::from_secs(3600);
    if release.date.is_some_and(|date| date > now + tolerance) {
        return Err(MirrorError::Future { url: url.to_owned() });
    }
    match release.valid_until.map(|until| now.duration_since(until)) {
        Some(Ok(late)) if check_valid_until && late > Duration::ZERO => {
            Err(MirrorError::Expired { url: url.to_owned(), days: late.as_secs() / 86_400 })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
