//! Runs the second stage: the guest's own dpkg, in the sandbox, and then mke2fs.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    fs,
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::Path,
    process::{Child, Command, ExitStatus},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::Duration,
};

use vireo_api::ByteSize;

use super::{
    guest::{Guest, is_excluded, write_first, write_last},
    open_data, sandbox,
    sandbox::Privilege,
    selection::{ENABLED_UNITS, is_required},
    tree::{TreeError, TreeWriter},
};
use crate::{
    deb::resolve::Selection,
    error::BuildError,
    progress::{Progress, Step},
};

/// All that the second stage needs.
pub struct Installation<'a> {
    pub selection: &'a Selection<'a>,
    /// Package files by package name.
    pub files: &'a BTreeMap<&'a str, &'a Path>,
    pub guest: Guest<'a>,
    pub root_password: Option<&'a str>,
    pub size: ByteSize,
    pub in_memory: Option<bool>,
    /// A directory for working files.
    pub work: &'a Path,
    /// The disk image to write.
    pub image: &'a Path,
}

const SCRIPT: &str = include_str!("stage.sh");
const TAIL_LINES: usize = 20;
const FAILED_LINES: usize = 6;

impl Installation<'_> {
    pub fn run(&self, privilege: &Privilege, progress: &dyn Progress) -> Result<(), BuildError> {
        let required = self.selection.closure(self.selection.iter().filter(|package| is_required(package)))?;
        self.write_work_files(&required)?;
        progress.step(Step::Bootstrap, required.len() as u64);

        let (reader, writer) = io::pipe().map_err(BuildError::io(self.work))?;
        let mut command = self.command()?;
        command.stdout(writer.try_clone().map_err(BuildError::io(self.work))?).stderr(writer);
        let mut child = Running(sandbox::spawn(command, privilege)?);
        let lines = read_lines(reader);
        let streamed = self.stream_base(&mut child.0, &required, progress);
        if !matches!(streamed, Ok(()) | Err(BuildError::Tree { source: TreeError::Io(_), .. })) {
            return streamed;
        }
        // Where the stream broke off, the other side says why.
        let (status, tail) = self.follow(&mut child.0, &lines, progress)?;
        if progress.cancelled() {
            return Err(BuildError::Cancelled);
        }
        if !status.success() {
            return Err(self.failure(status, tail));
        }
        streamed
    }

    fn command(&self) -> Result<Command, BuildError> {
        let root = self.work.join("root");
        fs::create_dir(&root).map_err(BuildError::io(&root))?;
        let mut command = Command::new("sh");
        command
            .args(["-c", SCRIPT, "vireo-image-build"])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .env("root", root)
            .env("work", self.work)
            .env("debs", self.work.join("debs"))
            .env("image", self.image)
            .env("image_kib", format!("{}k", self.size.0 / 1024))
            .env("tmpfs", self.memory_to_work_in().to_string())
            .stdin(std::process::Stdio::piped());
        Ok(command)
    }

    /// Working in memory spares the disk dpkg's many small synchronous writes; only if there is plenty.
    fn memory_to_work_in(&self) -> u64 {
        let installed: u64 = self.selection.iter().map(|package| package.installed_bytes).sum();
        let wanted = installed + installed / 2 + (256 << 20);
        let in_memory = self.in_memory.unwrap_or_else(|| available_memory() > wanted.saturating_mul(2));
        if in_memory { wanted } else { 0 }
    }

    /// The lists, package files and last tree that `stage.sh` names.
    fn write_work_files(&self, required: &HashSet<&str>) -> Result<(), BuildError> {
        let write = |name: &str, text: String| {
            let path = self.work.join(name);
            fs::write(&path, text).map_err(BuildError::io(&path))
        };
        let lines = |names: &mut dyn Iterator<Item = &str>| names.map(|name| format!("{name}\n")).collect::<String>();
        write(
            "required",
            lines(&mut self.selection.iter().map(|p| p.name.as_str()).filter(|name| required.contains(name))),
        )?;
        for (number, group) in self.selection.install_order(required)?.iter().enumerate() {
            write(&format!("before-{number}"), lines(&mut group.configured_before.iter().copied()))?;
            write(&format!("group-{number}"), lines(&mut group.packages.iter().map(|p| p.name.as_str())))?;
        }
        write("enable", lines(&mut ENABLED_UNITS.into_iter()))?;
        if let Some(password) = self.root_password {
            write("root-password", format!("root:{password}\n"))?;
        }
        let debs = self.work.join("debs");
        fs::create_dir(&debs).map_err(BuildError::io(&debs))?;
        for package in self.selection.iter() {
            let (from, to) = (self.files[package.name.as_str()], debs.join(format!("{}.deb", package.name)));
            fs::hard_link(from, &to).or_else(|_| fs::copy(from, &to).map(|_| ())).map_err(BuildError::io(&to))?;
        }
        let path = self.work.join("guest.tar");
        let file = fs::File::create(&path).map_err(BuildError::io(&path))?;
        let mut tree = TreeWriter::new(BufWriter::new(file));
        let written = write_last(&mut tree, &self.guest).and_then(|()| Ok(tree.finish()?.flush()?));
        written.map_err(|source| BuildError::Tree { package: "guest files".to_owned(), source })
    }

    /// Unpacks the packages that the guest's dpkg needs to run, through the sandbox's tar.
    fn stream_base(
        &self,
        child: &mut Child,
        required: &HashSet<&str>,
        progress: &dyn Progress,
    ) -> Result<(), BuildError> {
        let Some(stdin) = child.stdin.take() else { return Ok(()) };
        let named = |package: &str| {
            let package = package.to_owned();
            move |source| BuildError::Tree { package, source }
        };
        let mut tree = TreeWriter::new(BufWriter::with_capacity(256 << 10, stdin));
        write_first(&mut tree, self.guest.hostname).map_err(named("guest files"))?;
        let packages = self.selection.iter().filter(|package| required.contains(package.name.as_str()));
        for (done, package) in packages.enumerate() {
            if progress.cancelled() {
                return Err(BuildError::Cancelled);
            }
            tree.package(open_data(self.files, &package.name)?, is_excluded).map_err(named(&package.name))?;
            progress.advance(done as u64 + 1, required.len() as u64);
        }
        let finished = tree.finish().and_then(|mut stream| stream.flush());
        finished.map_err(|error| named("guest files")(error.into()))
    }

    /// Follows the script to its end; returns its status and last lines.
    fn follow(
        &self,
        child: &mut Child,
        lines: &Receiver<String>,
        progress: &dyn Progress,
    ) -> Result<(ExitStatus, String), BuildError> {
        let mut tail = VecDeque::new();
        let mut failed = Vec::new();
        let mut seen = HashSet::new();
        let total = 2 * self.selection.count() as u64;
        loop {
            if progress.cancelled() {
                return Err(BuildError::Cancelled);
            }
            let line = match lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            match line.strip_prefix("vireo: ") {
                Some("install") => progress.step(Step::Install, total),
                Some("filesystem") => progress.step(Step::FileSystem, 0),
                Some(_) => {}
                None => {
                    let mut words = line.split_whitespace();
                    let verb = words.next().unwrap_or_default();
                    if matches!(verb, "Unpacking" | "Setting")
                        && seen.insert(line.split(" (").next().unwrap_or_default().to_owned())
                    {
                        progress.advance((seen.len() as u64).min(total), total);
                    }
                    if line.starts_with("dpkg: error processing") {
                        // What the package said stands right before.
                        failed.extend(tail.iter().skip(tail.len().saturating_sub(FAILED_LINES)).cloned());
                        failed.push(line.clone());
                    }
                    tail.push_back(line);
                    if tail.len() > TAIL_LINES {
                        tail.pop_front();
                    }
                }
            }
        }
        let status = child.wait().map_err(BuildError::io(self.work))?;
        failed.extend(tail);
        Ok((status, failed.join("\n")))
    }

    fn failure(&self, status: ExitStatus, tail: String) -> BuildError {
        if tail.contains("Could not allocate block") || tail.contains("Could not allocate inode") {
            return BuildError::TooSmall { size: self.size };
        }
        if tail.contains("No space left on device") {
            return BuildError::NoSpace { path: self.work.to_owned() };
        }
        BuildError::Install { status: status.to_string(), tail }
    }
}

/// A child that does not outlive the build, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            // Its process 1 dies with it, and with that the whole namespace.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn read_lines(reader: io::PipeReader) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    receiver
}

/// What the host, or the container that this runs in, has free.
fn available_memory() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok());
    let limit = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let cgroup = limit("/sys/fs/cgroup/memory.max").or_else(|| limit("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    available.map_or(0, |kib| kib.saturating_mul(1024)).min(cgroup.unwrap_or(u64::MAX))
}
