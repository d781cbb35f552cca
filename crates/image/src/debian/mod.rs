//! Builds a Debian image from the archive: verified indices, verified packages, the guest's own dpkg.

pub mod cpio;
pub mod guest;
pub mod initrd;
pub mod install;
pub mod sandbox;
pub mod selection;
pub mod tree;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
    time::SystemTime,
};

use vireo_api::ByteSize;

use crate::{
    apt::{config::AptConfig, sources},
    deb::{
        package_file,
        packages::{Index, Package, Relation},
        resolve::{Selection, resolve},
    },
    error::BuildError,
    fetch::{Cache, FetchError, Http, Wanted},
    mirror::{Host, MirrorError, Reader, Suite},
    progress::{Progress, Step},
    sparse::sum_and_dig,
    store::{FileRecord, Image, ImageRecord, ImageStore, SCHEMA, check_name},
};
use initrd::KernelFiles;
use sandbox::{Privilege, find_program};

/// What to build. `Default` gives the host's own release, or the newest that the host's keys can verify.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// A release's code name; see [`suites`].
    pub suite: Option<String>,
    /// The image's name; `debian-SUITE` where it is missing.
    pub name: Option<String>,
    /// Packages besides the base system.
    pub packages: Vec<String>,
    /// The size of the root disk as the guest sees it. On the host only what is written takes space.
    pub size: ByteSize,
    /// The base address of a Debian archive, instead of the host's apt configuration.
    pub mirror: Option<String>,
    /// Keys that sign the archive, instead of the host's.
    pub keyring: Option<PathBuf>,
    /// The in-guest agent: a static program.
    pub agent: Option<Vec<u8>>,
    pub agent_version: Option<String>,
    pub hostname: String,
    /// Unless given, no password lets root in at the console.
    pub root_password: Option<String>,
    /// Whether to install in memory rather than on the disk; unless given, free memory decides.
    pub in_memory: Option<bool>,
    /// Where the host's apt configuration is.
    pub etc_apt: PathBuf,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            suite: None,
            name: None,
            packages: Vec::new(),
            size: ByteSize(4 << 30),
            mirror: None,
            keyring: None,
            agent: None,
            agent_version: None,
            hostname: "debian".to_owned(),
            root_password: None,
            in_memory: None,
            etc_apt: "/etc/apt".into(),
        }
    }
}

/// A release that can be built.
struct Release {
    name: &'static str,
    number: u32,
    /// Added to [`CMDLINE`].
    cmdline: &'static str,
}

/// The newest first.
const SUITES: [Release; 2] = [
    // systemd from 256 on asks the terminal for its size and name, and waits for an answer that no log file gives.
    Release {
        name: "trixie",
        number: 13,
        cmdline: " systemd.tty.term.console=dumb systemd.tty.term.ttyS0=vt220 systemd.tty.rows.ttyS0=25 systemd.tty.columns.ttyS0=80",
    },
    Release { name: "bookworm", number: 12, cmdline: "" },
];
const ARCHITECTURE: &str = "amd64";

/// The command line with which an image boots: the root disk is the first virtio disk, the console the serial port.
const CMDLINE: &str = "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet";

fn release(suite: &str) -> Option<&'static Release> {
    SUITES.iter().find(|release| release.name == suite)
}

/// The code names of the releases that can be built, the newest first.
pub fn suites() -> impl Iterator<Item = &'static str> {
    SUITES.iter().map(|release| release.name)
}

pub(crate) fn release_number(suite: &str) -> u32 {
    release(suite).map_or(0, |release| release.number)
}

/// Programs of the host that a build runs, with the Debian packages that have them.
const PROGRAMS: [(&str, &str); 5] =
    [("gpgv", "gpgv"), ("mke2fs", "e2fsprogs"), ("tar", "tar"), ("mount", "mount"), ("chroot", "coreutils")];

/// Says what a build on this host lacks, before anything is fetched. Also for `vireo doctor`.
pub fn check_host() -> Result<(), BuildError> {
    let missing: Vec<_> = PROGRAMS.iter().filter(|(program, _)| find_program(program).is_none()).collect();
    if !missing.is_empty() {
        let list = |pick: fn(&(&'static str, &'static str)) -> &'static str| {
            missing.iter().map(|pair| pick(pair)).collect::<Vec<_>>().join(" ")
        };
        return Err(BuildError::MissingPrograms { programs: list(|p| p.0), packages: list(|p| p.1) });
    }
    Privilege::detect()?;
    Ok(())
}

/// Builds an image and puts it under its name. See [`ImageStore::build_debian`].
pub fn build(store: &ImageStore, options: &BuildOptions, progress: &dyn Progress) -> Result<Image, BuildError> {
    check_options(options)?;
    check_host()?;
    let privilege = Privilege::detect()?;
    let stage = store.stage()?;
    let config = AptConfig::read(&options.etc_apt);
    let http = Http::new(config);
    let cache = Cache::open(store.state().cache())?;

    progress.step(Step::Indices, 0);
    let reader = Reader { http: &http, cache: &cache, scratch: &stage.path, progress };
    let archives = open_archives(&reader, options)?;
    let mut index = Index::default();
    for (number, suite) in archives.suites.iter().enumerate() {
        reader.read_index(suite, number, ARCHITECTURE, &mut index)?;
    }

    progress.step(Step::Resolve, 0);
    let plan = Plan::new(&index, &archives.suite, options)?;

    let files = plan.downloads(&archives.suites);
    progress.step(Step::Download, files.iter().map(|file| file.size_bytes).sum());
    let paths = cache.fetch_all(&http, &files, progress)?;
    let package_files: BTreeMap<&str, &Path> =
        plan.packages().map(|package| package.name.as_str()).zip(paths.iter().map(PathBuf::as_path)).collect();

    let image = stage.path.join("image");
    fs::create_dir(&image).map_err(BuildError::io(&image))?;
    let name = options.name.clone().unwrap_or_else(|| format!("debian-{}", archives.suite));
    let kernel_version = thread::scope(|scope| {
        // Reading the kernel package takes seconds of its own: a second core does it meanwhile.
        let boot_files = scope.spawn(|| write_boot_files(&plan, &package_files, &image));
        let installation = install::Installation {
            selection: &plan.selection,
            files: &package_files,
            guest: guest::Guest {
                hostname: &options.hostname,
                sources: &archives.guest_sources(),
                agent: options.agent.as_deref(),
                has_ssh_server: plan.selection.get("openssh-server").is_some(),
            },
            root_password: options.root_password.as_deref(),
            size: options.size,
            in_memory: options.in_memory,
            work: &stage.path,
            image: &image.join("root.raw"),
        };
        let installed = installation.run(&privilege, progress);
        let boot_files = boot_files.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        installed.and(boot_files)
    })?;

    progress.step(Step::Finish, 0);
    let record = ImageRecord {
        schema: SCHEMA,
        name,
        distribution: "debian".to_owned(),
        suite: archives.suite.clone(),
        architecture: ARCHITECTURE.to_owned(),
        kernel_version,
        cmdline: format!("{CMDLINE}{}", release(&archives.suite).map_or("", |release| release.cmdline)),
        created: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        agent: options.agent.as_ref().map(|_| options.agent_version.clone().unwrap_or_else(|| "unknown".to_owned())),
        root_bytes: options.size.0,
        files: ["kernel", "initrd", "root.raw"]
            .into_iter()
            .map(|file| Ok((file.to_owned(), file_record(&image.join(file))?)))
            .collect::<Result<_, BuildError>>()?,
        packages: plan.selection.iter().map(|package| (package.name.clone(), package.version.to_string())).collect(),
    };
    if progress.cancelled() {
        return Err(BuildError::Cancelled);
    }
    Ok(store.commit(&image, &record)?)
}

fn check_options(options: &BuildOptions) -> Result<(), BuildError> {
    if let Some(name) = &options.name {
        check_name(name)?;
    }
    if let Some(suite) = &options.suite
        && release(suite).is_none()
    {
        return Err(BuildError::UnknownSuite(suite.clone(), suites().collect::<Vec<_>>().join(", ")));
    }
    // RFC 1123 section 2.1.
    let host = &options.hostname;
    let valid = (1..=63).contains(&host.len())
        && host.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        && !host.starts_with('-')
        && !host.ends_with('-');
    if !valid {
        return Err(BuildError::Hostname(host.clone()));
    }
    if options.size.0 < 256 << 20 {
        return Err(BuildError::TooSmall { size: options.size });
    }
    // chpasswd(8) reads lines.
    if options.root_password.as_ref().is_some_and(|password| password.is_empty() || password.contains(['\n', '\0'])) {
        return Err(BuildError::Password);
    }
    Ok(())
}

fn file_record(path: &Path) -> Result<FileRecord, BuildError> {
    let sum = File::options().read(true).write(true).open(path).and_then(|mut file| sum_and_dig(&mut file));
    let (sha256, size_bytes) = sum.map_err(BuildError::io(path))?;
    Ok(FileRecord { size_bytes, sha256 })
}

/// The suites of one release: the release itself, its updates and its security updates.
struct Archives {
    suite: String,
    suites: Vec<Suite>,
}

fn open_archives(reader: &Reader<'_>, options: &BuildOptions) -> Result<Archives, BuildError> {
    let list = sources::read(&options.etc_apt, ARCHITECTURE);
    let host = Host { sources: &list, mirror: options.mirror.as_deref(), keyring: options.keyring.as_deref() };
    let candidates = match &options.suite {
        Some(suite) => vec![suite.clone()],
        None => default_suites(),
    };
    let mut last = MirrorError::NoSource;
    for suite in candidates {
        match open_release(reader, &host, &suite) {
            // A keyring that is older than the release: an older release may do.
            Err(error @ MirrorError::Untrusted { .. }) => last = error,
            result => return Ok(Archives { suites: result?, suite }),
        }
    }
    Err(last.into())
}

/// The host's own release where it is one that can be built, else all, the newest first.
fn default_suites() -> Vec<String> {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(|v| v.trim_matches('"'))
    };
    match (value("ID"), value("VERSION_CODENAME")) {
        (Some("debian"), Some(suite)) if release(suite).is_some() => vec![suite.to_owned()],
        _ => suites().map(str::to_owned).collect(),
    }
}

fn open_release(reader: &Reader<'_>, host: &Host<'_>, suite: &str) -> Result<Vec<Suite>, MirrorError> {
    let mut last = MirrorError::NoSource;
    for address in host.archives(suite)? {
        let release = match reader.open(&address) {
            Ok(release) => release,
            Err(error @ MirrorError::Fetch(FetchError::Cancelled)) => return Err(error),
            Err(error) => {
                last = error;
                continue;
            }
        };
        let mut updates = address.clone();
        updates.suite = format!("{suite}-updates");
        let (security, named) = host.security(&address, suite)?;
        let mut suites = vec![release];
        for (address, must_exist) in [(updates, false), (security, named)] {
            match reader.open(&address) {
                Ok(found) => suites.push(found),
                Err(MirrorError::Fetch(FetchError::Status { url, status: 403 | 404 })) if !must_exist => {
                    reader
                        .progress
                        .note(&format!("{url} does not exist; the image is built without '{}'", address.suite));
                }
                Err(error) => return Err(error),
            }
        }
        return Ok(suites);
    }
    Err(last)
}

impl Archives {
    /// The guest's own apt sources: the same archives, without a user or password that the host may use.
    fn guest_sources(&self) -> String {
        let stanzas = self.suites.iter().map(|suite| {
            let uri = &suite.address.uri;
            let plain = match uri.split_once("://") {
                Some((scheme, rest)) => {
                    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
                    let host = authority.rsplit('@').next().unwrap_or_default();
                    format!("{scheme}://{host}/{path}")
                }
                None => uri.clone(),
            };
            format!(
                "Types: deb\nURIs: {plain}\nSuites: {}\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
                suite.address.suite
            )
        });
        stanzas.collect::<Vec<_>>().join("\n")
    }
}

/// What goes into the image.
struct Plan<'a> {
    selection: Selection<'a>,
    kernel: &'a Package,
    /// Only its program is used, in the initrd.
    busybox: &'a Package,
}

impl<'a> Plan<'a> {
    fn new(index: &'a Index, suite: &str, options: &BuildOptions) -> Result<Self, BuildError> {
        let no_kernel = || BuildError::NoKernel(suite.to_owned(), selection::KERNELS.join(", "));
        let meta = selection::KERNELS.iter().find_map(|name| index.get(name)).ok_or_else(no_kernel)?;
        // The kernel itself, not the package that follows new ones: the machine boots the kernel in the image.
        let kernel = meta
            .relation(Relation::Depends)?
            .into_iter()
            .flatten()
            .find_map(|target| index.candidates(&target).next())
            .ok_or_else(no_kernel)?;
        let mut seeds: Vec<String> =
            index.iter().filter(|package| selection::is_base(package)).map(|p| p.name.clone()).collect();
        seeds.sort();
        seeds.extend(selection::machine_packages().map(str::to_owned));
        seeds.push(kernel.name.clone());
        seeds.extend(options.packages.iter().cloned());
        let busybox = resolve(index, &["busybox-static".to_owned()])?;
        let busybox = busybox.get("busybox-static").ok_or_else(no_kernel)?;
        Ok(Self { selection: resolve(index, &seeds)?, kernel, busybox })
    }

    /// All packages to fetch, each once.
    fn packages(&self) -> impl Iterator<Item = &'a Package> {
        let extra = self.selection.get(&self.busybox.name).is_none().then_some(self.busybox);
        self.selection.iter().chain(extra)
    }

    fn downloads(&self, suites: &[Suite]) -> Vec<Wanted> {
        let wanted = |package: &Package| Wanted {
            url: format!("{}/{}", suites[package.archive].address.uri, package.filename),
            sha256: package.sha256,
            size_bytes: package.size_bytes,
        };
        self.packages().map(wanted).collect()
    }
}

/// Writes `kernel` and `initrd`; returns the kernel's version.
fn write_boot_files(plan: &Plan<'_>, files: &BTreeMap<&str, &Path>, image: &Path) -> Result<String, BuildError> {
    let kernel = KernelFiles::read(open_data(files, &plan.kernel.name)?)?;
    let busybox = initrd::busybox(open_data(files, &plan.busybox.name)?)?;
    for (file, bytes) in [("kernel", &kernel.vmlinuz), ("initrd", &kernel.initrd(&busybox)?)] {
        let path = image.join(file);
        fs::write(&path, bytes).map_err(BuildError::io(&path))?;
    }
    Ok(kernel.version)
}

/// The file tree of a downloaded package.
fn open_data(files: &BTreeMap<&str, &Path>, name: &str) -> Result<Box<dyn std::io::Read>, BuildError> {
    let path = files[name];
    let file = File::open(path).map_err(BuildError::io(path))?;
    package_file::data(file).map_err(|source| BuildError::Package { package: name.to_owned(), source })
}

#[cfg(test)]
mod tests;
