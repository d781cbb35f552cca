//! Files over HTTP into a cache where each file's name is its SHA-256 sum.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use crate::{
    apt::config::{AptConfig, Proxy},
    digest::Sha256Sum,
    progress::Progress,
    state::FileLock,
};

/// Why a file could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{url} answers with HTTP status {status}")]
    Status { url: String, status: u16 },
    #[error("{url} cannot be fetched")]
    Transport { url: String, source: Box<ureq::Error> },
    #[error("reading {url} failed")]
    Read { url: String, source: io::Error },
    #[error("{url} is larger than it may be ({limit} bytes)")]
    TooLarge { url: String, limit: u64 },
    #[error(
        "{url} is not what the signed index says (size {expected_bytes}, SHA-256 {expected}; got size {bytes}, SHA-256 {got}); the mirror is damaged or being changed: try again later or name another one with --mirror"
    )]
    Mismatch { url: String, expected: Sha256Sum, expected_bytes: u64, got: Sha256Sum, bytes: u64 },
    #[error("the proxy '{0}' of the apt configuration is no address of a proxy")]
    Proxy(String),
    #[error("the cache file '{path}' cannot be used")]
    Cache { path: PathBuf, source: io::Error },
    #[error("the build was cancelled")]
    Cancelled,
}

/// A file to fetch, and what it must be.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub url: String,
    pub sha256: Sha256Sum,
    pub size_bytes: u64,
}

const CONNECTIONS: usize = 6;
const ATTEMPTS: u32 = 5;
const USER_AGENT: &str = concat!("vireo/", env!("CARGO_PKG_VERSION"));
const CA_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// An HTTP client that uses the host's proxies (from apt, else from the environment) and certificates.
pub struct Http {
    config: AptConfig,
    agents: Mutex<HashMap<Proxy, ureq::Agent>>,
}

impl Http {
    pub fn new(config: AptConfig) -> Self {
        Self { config, agents: Mutex::default() }
    }

    fn agent(&self, url: &str) -> Result<ureq::Agent, FetchError> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let authority = rest.split('/').next().unwrap_or_default().rsplit('@').next().unwrap_or_default();
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let proxy = self.config.proxy(scheme, host);
        let mut agents = self.agents.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(agent) = agents.get(&proxy) {
            return Ok(agent.clone());
        }
        let agent = new_agent(&proxy)?;
        agents.insert(proxy, agent.clone());
        Ok(agent)
    }

    /// Fetches a small file whole, such as a signed release file. Its bytes are not checked yet.
    pub fn small(&self, url: &str, limit: u64, progress: &dyn Progress) -> Result<Vec<u8>, FetchError> {
        let agent = self.agent(url)?;
        retry(progress, || {
            let (status, body) = get(&agent, url, 0)?;
            if status != 200 {
                return Err(FetchError::Status { url: url.to_owned(), status });
            }
            let mut bytes = Vec::new();
            let read = body.take(limit + 1).read_to_end(&mut bytes);
            read.map_err(|source| FetchError::Read { url: url.to_owned(), source })?;
            if bytes.len() as u64 > limit {
                return Err(FetchError::TooLarge { url: url.to_owned(), limit });
            }
            Ok(bytes)
        })
    }
}

fn new_agent(proxy: &Proxy) -> Result<ureq::Agent, FetchError> {
    let bad = |text: &str| FetchError::Proxy(text.to_owned());
    let mut config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(USER_AGENT)
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(30)));
    config = match proxy {
        Proxy::Unset => config,
        Proxy::Direct => config.proxy(None),
        Proxy::Via(text) => config.proxy(Some(ureq::Proxy::new(text).map_err(|_| bad(text))?)),
    };
    // The host's own certificates, so that a private mirror works as it does for apt.
    if let Some(pem) = CA_BUNDLES.iter().find_map(|path| fs::read(path).ok()) {
        let certificates: Vec<_> = parse_pem(&pem)
            .filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect();
        config = config.tls_config(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).build());
    }
    Ok(config.build().into())
}

/// Asks for a file from byte `from` on; returns the status and the body.
fn get(agent: &ureq::Agent, url: &str, from: u64) -> Result<(u16, impl Read + use<>), FetchError> {
    let mut request = agent.get(url);
    if from > 0 {
        request = request.header("Range", format!("bytes={from}-"));
    }
    let response =
        request.call().map_err(|error| FetchError::Transport { url: url.to_owned(), source: Box::new(error) })?;
    let mut status = response.status().as_u16();
    if status == 206 {
        // A part that does not begin where it was asked to is of no use.
        let range = response.headers().get("Content-Range").and_then(|value| value.to_str().ok()).unwrap_or_default();
        if !range.starts_with(&format!("bytes {from}-")) {
            status = 416;
        }
    }
    Ok((status, response.into_body().into_with_config().limit(u64::MAX).reader()))
}

/// How many attempts an error is worth.
fn attempts(error: &FetchError) -> u32 {
    match error {
        FetchError::Status { status, .. } if *status >= 500 || [408, 416, 429].contains(status) => ATTEMPTS,
        FetchError::Transport { .. } | FetchError::Read { .. } => ATTEMPTS,
        // Damage on the way is rare; a mirror that has something else will have it again.
        FetchError::Mismatch { .. } => 2,
        _ => 1,
    }
}

fn retry<T>(progress: &dyn Progress, mut attempt: impl FnMut() -> Result<T, FetchError>) -> Result<T, FetchError> {
    for number in 1.. {
        if progress.cancelled() {
            return Err(FetchError::Cancelled);
        }
        match attempt() {
            Err(error) if number < attempts(&error) => {
                // 0.25, 0.5, 1, 2 s: short in total, as an unreachable mirror should be said soon.
                pause(progress, Duration::from_millis(125 << number));
            }
            result => return result,
        }
    }
    Err(FetchError::Cancelled)
}

fn pause(progress: &dyn Progress, mut left: Duration) {
    let slice = Duration::from_millis(50);
    while !left.is_zero() && !progress.cancelled() {
        thread::sleep(slice.min(left));
        left = left.saturating_sub(slice);
    }
}

/// Fetched files, each named by its sum. A file under its final name was checked when it came.
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Makes the directory where it is missing.
    pub fn open(dir: PathBuf) -> Result<Self, FetchError> {
        let dir = dir.join("sha256");
        fs::create_dir_all(&dir).map_err(|source| FetchError::Cache { path: dir.clone(), source })?;
        Ok(Self { dir })
    }

    pub fn path(&self, sum: &Sha256Sum) -> PathBuf {
        self.dir.join(sum.to_string())
    }

    /// Brings all files into the cache, several at a time, and returns their paths in the same order.
    /// What is there already is read again and checked, not trusted.
    pub fn fetch_all(
        &self,
        http: &Http,
        files: &[Wanted],
        progress: &dyn Progress,
    ) -> Result<Vec<PathBuf>, FetchError> {
        let meter = Meter { done: AtomicU64::new(0), total: files.iter().map(|file| file.size_bytes).sum(), progress };
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let failed = || failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        thread::scope(|scope| {
            for _ in 0..CONNECTIONS.min(files.len()) {
                scope.spawn(|| {
                    while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if failed().is_some() {
                            break;
                        }
                        if let Err(error) = self.fetch(http, file, &meter) {
                            failed().get_or_insert(error);
                        }
                    }
                });
            }
        });
        match failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(error) => Err(error),
            None => Ok(files.iter().map(|file| self.path(&file.sha256)).collect()),
        }
    }

    fn fetch(&self, http: &Http, file: &Wanted, meter: &Meter<'_>) -> Result<(), FetchError> {
        let path = self.path(&file.sha256);
        let part = path.with_extension("part");
        let cache_error = |source| FetchError::Cache { path: part.clone(), source };
        let mut lock = loop {
            if meter.progress.cancelled() {
                return Err(FetchError::Cancelled);
            }
            // Another build may be at the same file: wait for it, then find the file whole.
            match FileLock::try_take(&part).map_err(cache_error)? {
                Some(lock) => break lock,
                None => pause(meter.progress, Duration::from_millis(100)),
            }
        };
        if is_whole(&path, file).map_err(cache_error)? {
            let _ = fs::remove_file(&part);
            meter.add(file.size_bytes);
            return Ok(());
        }
        let agent = http.agent(&file.url)?;
        let mut counted = 0;
        retry(meter.progress, || {
            meter.take_back(std::mem::take(&mut counted));
            let result = fill(&agent, file, (&part, &mut lock.file), meter, &mut counted);
            if matches!(result, Err(FetchError::Mismatch { .. } | FetchError::Status { status: 416, .. })) {
                lock.file.set_len(0).map_err(cache_error)?;
            }
            result
        })?;
        fs::rename(&part, &path).map_err(cache_error)
    }
}

/// Completes the partial file `part` from where it ends, and checks the whole.
fn fill(
    agent: &ureq::Agent,
    file: &Wanted,
    (path, part): (&Path, &mut File),
    meter: &Meter<'_>,
    counted: &mut u64,
) -> Result<(), FetchError> {
    let read_error = |source| FetchError::Read { url: file.url.clone(), source };
    let cache_error = |source| FetchError::Cache { path: path.to_owned(), source };
    let mut have = part.seek(SeekFrom::End(0)).map_err(cache_error)?;
    if have > file.size_bytes {
        part.set_len(0).map_err(cache_error)?;
        have = part.seek(SeekFrom::Start(0)).map_err(cache_error)?;
    }
    if have < file.size_bytes {
        let (status, mut body) = get(agent, &file.url, have)?;
        match status {
            200 => {
                part.set_len(0).map_err(cache_error)?;
                have = part.seek(SeekFrom::Start(0)).map_err(cache_error)?;
            }
            206 => {}
            status => return Err(FetchError::Status { url: file.url.clone(), status }),
        }
        *counted = have;
        meter.add(have);
        let mut buffer = vec![0; 128 << 10];
        loop {
            if meter.progress.cancelled() {
                return Err(FetchError::Cancelled);
            }
            let bytes = body.read(&mut buffer).map_err(read_error)?;
            if bytes == 0 {
                break;
            }
            have += bytes as u64;
            if have > file.size_bytes {
                break;
            }
            part.write_all(&buffer[..bytes]).map_err(cache_error)?;
            *counted += bytes as u64;
            meter.add(bytes as u64);
        }
        // A connection that ends early is a read error, to be resumed. A body that ended as announced is judged.
    } else {
        *counted = have;
        meter.add(have);
    }
    part.seek(SeekFrom::Start(0)).map_err(cache_error)?;
    let (got, bytes) = Sha256Sum::of_reader(&mut *part).map_err(cache_error)?;
    if got != file.sha256 || bytes != file.size_bytes {
        let (expected, expected_bytes) = (file.sha256, file.size_bytes);
        return Err(FetchError::Mismatch { url: file.url.clone(), expected, expected_bytes, got, bytes });
    }
    Ok(())
}

/// Checks a cached file again; a damaged one is removed.
fn is_whole(path: &Path, file: &Wanted) -> io::Result<bool> {
    let cached = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    if Sha256Sum::of_reader(cached)? == (file.sha256, file.size_bytes) {
        return Ok(true);
    }
    fs::remove_file(path)?;
    Ok(false)
}

struct Meter<'p> {
    done: AtomicU64,
    total: u64,
    progress: &'p dyn Progress,
}

impl Meter<'_> {
    fn add(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        self.progress.advance(before + bytes, self.total);
    }

    fn take_back(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
