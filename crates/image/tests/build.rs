//! Whole images from the archive that this host's apt configuration names. Needs the network, half a minute per release,
//! and root or subordinate ids; where the host lacks them, the test says by name what was skipped and why.
//!
//! `VIREO_STATE` names the state directory whose cache of downloads is used.

use std::{
    env, fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::Instant,
};

use vireo_image::{
    BuildError, BuildOptions, DiskFormat, Image, ImageStore, MirrorError, Progress, StateDir, Step, StoreError,
    check_host,
};

/// Cancels when the guest's dpkg has done a few packages.
struct Interrupt(Mutex<Option<Step>>);

impl Progress for Interrupt {
    fn step(&self, step: Step, _: u64) {
        *self.0.lock().unwrap() = Some(step);
    }

    fn advance(&self, done: u64, _: u64) {
        let mut step = self.0.lock().unwrap();
        if *step == Some(Step::Install) && done > 5 {
            *step = None;
        }
    }

    fn note(&self, _: &str) {}

    fn cancelled(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }
}

/// Counts what a build tells.
#[derive(Default)]
struct Watch(Mutex<(Vec<Step>, u64, u64)>);

impl Progress for Watch {
    fn step(&self, step: Step, _: u64) {
        self.0.lock().unwrap().0.push(step);
    }

    fn advance(&self, done: u64, total: u64) {
        let mut state = self.0.lock().unwrap();
        (state.1, state.2) = (done, total);
    }

    fn note(&self, _: &str) {}
}

const AGENT: &[u8] = b"#!/bin/sh\nexec sleep infinity\n";

fn build(suite: &str) {
    if let Err(error) = check_host() {
        return eprintln!("skipped: {suite} is not built: {error}");
    }
    let state =
        env::var_os("VIREO_STATE").map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("state"), PathBuf::from);
    let store = ImageStore::open(StateDir::new(state)).unwrap();
    let name = format!("test-{suite}-{}", std::process::id());
    let options = BuildOptions {
        suite: Some(suite.to_owned()),
        name: Some(name.clone()),
        packages: vec!["sl".to_owned()],
        mirror: env::var("VIREO_DEBIAN_MIRROR").ok(),
        agent: Some(AGENT.to_vec()),
        agent_version: Some("test".to_owned()),
        root_password: Some("secret".to_owned()),
        ..BuildOptions::default()
    };
    match store.build_debian(&options, &Interrupt(Mutex::new(Some(Step::Indices)))) {
        Err(BuildError::Cancelled) => {}
        Err(BuildError::Mirror(error @ (MirrorError::NoSource | MirrorError::NoKeyring))) => {
            return eprintln!("skipped: {suite} is not built: {error}");
        }
        Err(BuildError::Sandbox(error)) => return eprintln!("skipped: {suite} is not built: {error}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(store.inspect(&name), Err(StoreError::NotFound { .. })), "half an image is under its name");
    let own_stage = format!(".stage-{}", std::process::id());
    let stages = fs::read_dir(store.state().images())
        .unwrap()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(&own_stage));
    // The build of the other release may be running in this process.
    assert!(stages.count() <= 1);

    let start = Instant::now();
    let watch = Watch::default();
    let image = store.build_debian(&options, &watch).unwrap_or_else(|error| panic!("{error:?}"));
    eprintln!(
        "{suite}: {} packages, {} MiB, {:.0} s",
        image.record.packages.len(),
        image.disk_usage_bytes() >> 20,
        start.elapsed().as_secs_f32()
    );
    check_image(&image, suite);
    check_guest(&image);
    let state = watch.0.into_inner().unwrap();
    assert_eq!(
        state.0,
        [Step::Indices, Step::Resolve, Step::Download, Step::Bootstrap, Step::Install, Step::FileSystem, Step::Finish]
    );
    assert_eq!((state.1, state.2), (2 * image.record.packages.len() as u64, 2 * image.record.packages.len() as u64));
    store.verify(&name).unwrap();
    store.remove(&name).unwrap();
}

fn read_at(path: &Path, offset: u64, bytes: usize) -> Vec<u8> {
    let mut file = fs::File::open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    let mut buffer = vec![0; bytes];
    file.read_exact(&mut buffer).unwrap();
    buffer
}

fn check_image(image: &Image, suite: &str) {
    assert_eq!(image.record.suite, suite);
    assert_eq!(image.record.agent.as_deref(), Some("test"));
    assert!(image.record.packages.contains_key("systemd") && image.record.packages.contains_key("sl"));
    assert!(image.record.packages.keys().any(|name| *name == format!("linux-image-{}", image.record.kernel_version)));
    assert_eq!(image.format, DiskFormat::Raw);
    // Linux Documentation/arch/x86/boot.rst: the setup header's magic.
    assert_eq!(read_at(&image.kernel, 0x202, 4), b"HdrS");
    assert_eq!(read_at(&image.initrd, 0, 6), b"070701");
    // ext4's magic and label, in its superblock at 1024.
    assert_eq!(read_at(&image.root, 1024 + 0x38, 2), [0x53, 0xef]);
    assert_eq!(read_at(&image.root, 1024 + 0x78, 5), b"root\0");
    assert!(image.disk_usage_bytes() < 400 << 20, "{} MiB", image.disk_usage_bytes() >> 20);
    assert!(fs::metadata(&image.initrd).unwrap().len() < 4 << 20);
}

fn debugfs(image: &Image, request: &str) -> String {
    let output = Command::new("/sbin/debugfs").args(["-R", request]).arg(&image.root).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Looks into the guest's file system without mounting it.
fn check_guest(image: &Image) {
    let owner = |path: &str| {
        let text = debugfs(image, &format!("stat {path}"));
        let value = |key: &str| {
            text.split(key).nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap_or_default().to_owned()
        };
        (value("Mode:"), value("User:"), value("Group:"))
    };
    let is = |mode: &str, user: &str, group: &str| (mode.to_owned(), user.to_owned(), group.to_owned());
    assert_eq!(owner("/usr/lib/vireo/agent"), is("0755", "0", "0"));
    assert_eq!(owner("/etc/shadow"), is("0640", "0", "42"), "ids of the guest, not of the host");
    assert_eq!(owner("/usr/bin/passwd").0, "04755");
    assert_eq!(debugfs(image, "cat /usr/lib/vireo/agent").as_bytes(), AGENT);
    assert_eq!(debugfs(image, "cat /etc/machine-id"), "", "each machine makes its own");
    let root =
        debugfs(image, "cat /etc/shadow").lines().find(|line| line.starts_with("root:")).unwrap_or_default().to_owned();
    assert!(root.starts_with("root:$"), "{root}");
    let status = debugfs(image, "cat /var/lib/dpkg/status");
    let states: Vec<&str> = status.lines().filter_map(|line| line.strip_prefix("Status: ")).collect();
    assert_eq!(states.len(), image.record.packages.len());
    assert!(states.iter().all(|state| *state == "install ok installed"), "{states:?}");
    assert!(
        debugfs(image, "ls -p /dev").lines().filter(|line| !line.is_empty()).count() <= 2,
        "nothing of the build is left in /dev"
    );
    assert!(!debugfs(image, "ls -p /usr/sbin").contains("policy-rc.d"));
    // Alternatives may have links there, but there are no pages.
    assert!(!debugfs(image, "ls -p /usr/share/man/man1").contains("/ls.1.gz/"));
}

#[test]
fn bookworm() {
    build("bookworm");
}

#[test]
fn trixie() {
    build("trixie");
}
