//! An archive on the loopback interface for the tests of this crate.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use crate::{
    deb::package_file::tests::package,
    digest::Sha256Sum,
    progress::{Progress, Step},
};

/// What the server has: path to content. `faults` of a path are answered first, each once.
#[derive(Default)]
pub struct Files {
    pub content: BTreeMap<String, Vec<u8>>,
    pub faults: BTreeMap<String, Vec<Fault>>,
    /// Request lines with their `Range` header.
    pub requests: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Status(u16),
    /// The connection ends after so many bytes of the body.
    CutAfter(usize),
    /// A body of the right length with other content.
    Garbage,
}

/// An HTTP server that ends with its process.
pub struct Server {
    pub url: String,
    pub files: Arc<Mutex<Files>>,
}

impl Server {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let files = Arc::new(Mutex::new(Files::default()));
        let shared = files.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                thread::spawn(move || while answer(&stream, &shared).is_some() {});
            }
        });
        Self { url, files }
    }

    pub fn put(&self, path: &str, content: impl Into<Vec<u8>>) {
        self.files.lock().unwrap().content.insert(path.to_owned(), content.into());
    }

    pub fn fault(&self, path: &str, fault: Fault) {
        self.files.lock().unwrap().faults.entry(path.to_owned()).or_default().push(fault);
    }

    pub fn requests(&self) -> Vec<String> {
        self.files.lock().unwrap().requests.clone()
    }
}

fn answer(stream: &TcpStream, files: &Mutex<Files>) -> Option<()> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let request = lines.next()?;
    let path = request.split(' ').nth(1)?.to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let range = headers.iter().find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("range: bytes=")?.strip_suffix('-')?.parse::<usize>().ok()
    });
    let (content, fault) = {
        let mut files = files.lock().unwrap();
        files.requests.push(format!("{path} {}", range.unwrap_or(0)));
        let fault = files.faults.get_mut(&path).filter(|faults| !faults.is_empty()).map(|faults| faults.remove(0));
        (files.content.get(&path).cloned(), fault)
    };
    let mut out = stream;
    let mut head = |status: &str, length: usize| write!(out, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n").ok();
    let Some(mut content) = content else {
        head("404 Not Found", 0)?;
        return write!(out, "\r\n").ok();
    };
    if let Some(Fault::Status(status)) = fault {
        head(&format!("{status} Fault"), 0)?;
        return write!(out, "\r\n").ok();
    }
    if let Some(Fault::Garbage) = fault {
        content.fill(b'#');
    }
    let total = content.len();
    let from = range.filter(|from| *from < total);
    head(if from.is_some() { "206 Partial Content" } else { "200 OK" }, total - from.unwrap_or(0))?;
    if let Some(from) = from {
        write!(out, "Content-Range: bytes {from}-{}/{total}\r\n", total - 1).ok()?;
    }
    write!(out, "\r\n").ok()?;
    let body = &content[from.unwrap_or(0)..];
    if let Some(Fault::CutAfter(bytes)) = fault {
        let _ = out.write_all(&body[..bytes.min(body.len())]);
        let _ = stream.shutdown(std::net::Shutdown::Both);
        return None;
    }
    out.write_all(body).ok()
}

/// Stops the build when `at` begins; keeps what it was told.
#[derive(Default)]
pub struct Recorder {
    pub cancel_at: Option<Step>,
    pub state: Mutex<(Vec<Step>, Vec<String>)>,
}

impl Progress for Recorder {
    fn step(&self, step: Step, _: u64) {
        self.state.lock().unwrap().0.push(step);
    }

    fn advance(&self, done: u64, total: u64) {
        assert!(done <= total, "{done} of {total}");
    }

    fn note(&self, text: &str) {
        self.state.lock().unwrap().1.push(text.to_owned());
    }

    fn cancelled(&self) -> bool {
        self.state.lock().unwrap().0.last().is_some_and(|step| Some(*step) == self.cancel_at)
    }
}

/// A key of the test's own, made by gpg.
pub struct TestKey {
    home: tempfile::TempDir,
}

impl TestKey {
    /// `None` where gpg or gpgv is not installed; the test then says that it was skipped.
    pub fn new() -> Option<Self> {
        // gpg-agent's socket has a short path limit.
        let key = Self { home: tempfile::Builder::new().prefix("vk").tempdir_in("/tmp").unwrap() };
        let has_gpgv = Command::new("gpgv").arg("--version").stdout(Stdio::null()).status().is_ok();
        let made = key
            .gpg(&["--quick-generate-key", "--passphrase", "", "Archive <archive@test>", "ed25519", "sign", "1d"], b"");
        if made.is_none() || !has_gpgv {
            eprintln!("skipped: gpg and gpgv are needed to sign a test archive (apt-get install gnupg gpgv)");
            return None;
        }
        fs::write(key.keyring(), key.gpg(&["--export"], b"")?).unwrap();
        Some(key)
    }

    pub fn keyring(&self) -> PathBuf {
        self.home.path().join("archive.gpg")
    }

    pub fn armoured(&self) -> Vec<u8> {
        self.gpg(&["--armor", "--export"], b"").unwrap()
    }

    pub fn clearsign(&self, text: &str) -> Vec<u8> {
        self.gpg(&["--clearsign", "--digest-algo", "SHA512"], text.as_bytes()).unwrap()
    }

    fn gpg(&self, args: &[&str], input: &[u8]) -> Option<Vec<u8>> {
        let mut command = Command::new("gpg");
        command
            .arg("--homedir")
            .arg(self.home.path())
            .args(["--batch", "--quiet", "--pinentry-mode", "loopback"])
            .args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().ok()?;
        child.stdin.take()?.write_all(input).ok()?;
        let output = child.wait_with_output().ok()?;
        output.status.success().then_some(output.stdout)
    }
}

impl Drop for TestKey {
    fn drop(&mut self) {
        let _ = Command::new("gpgconf").arg("--homedir").arg(self.home.path()).args(["--kill", "all"]).status();
    }
}

/// A small archive of bookworm with all that a build asks for by name. Its packages hold one file each.
pub struct Archive {
    pub server: Server,
    pub key: TestKey,
}

const NAMES: [&str; 12] = [
    "ca-certificates",
    "dbus",
    "iproute2",
    "iputils-ping",
    "libnss-myhostname",
    "procps",
    "systemd-resolved",
    "systemd-sysv",
    "busybox-static",
    "linux-image-cloud-amd64",
    "linux-image-6.1-cloud-amd64",
    "dash",
];

impl Archive {
    pub fn start() -> Option<Self> {
        let archive = Self { server: Server::start(), key: TestKey::new()? };
        archive.publish(|release| release);
        Some(archive)
    }

    pub fn deb(name: &str) -> String {
        format!("/debian/pool/{name}.deb")
    }

    /// Writes pool, index and signed release; `change` may alter the release's text before it is signed.
    pub fn publish(&self, change: impl Fn(String) -> String) {
        let mut index = String::new();
        for name in NAMES {
            let mut tree = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(4);
            header.set_mode(0o755);
            tree.append_data(&mut header, format!("./usr/bin/{name}"), &b"test"[..]).unwrap();
            let file = package("data.tar", &tree.into_inner().unwrap());
            let depends = if name == "linux-image-cloud-amd64" { "Depends: linux-image-6.1-cloud-amd64\n" } else { "" };
            let priority = if name == "dash" { "required" } else { "optional" };
            index.push_str(&format!(
                "Package: {name}\nVersion: 1\nArchitecture: amd64\nPriority: {priority}\n{depends}Filename: pool/{name}.deb\nSize: {}\nSHA256: {}\n\n",
                file.len(),
                Sha256Sum::of(&file)
            ));
            self.server.put(&Self::deb(name), file);
        }
        let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(index.as_bytes()).unwrap();
        let xz = xz.finish().unwrap();
        self.server.put("/debian/dists/bookworm/main/binary-amd64/Packages.xz", xz.clone());
        let release = format!(
            "Origin: Debian\nSuite: oldstable\nCodename: bookworm\nDate: Sat, 11 Jul 2020 10:16:37 UTC\nSHA256:\n {} {} main/binary-amd64/Packages.xz\n",
            Sha256Sum::of(&xz),
            xz.len()
        );
        self.server.put("/debian/dists/bookworm/InRelease", self.key.clearsign(&change(release)));
    }

    pub fn mirror(&self) -> String {
        format!("{}/debian/", self.server.url)
    }
}
