//! A process with namespaces of its own in which it is root, on any Linux and without privileges where possible.

use std::{
    env, fs, io,
    io::{Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use crate::state::is_root;

/// Why packages cannot be installed on this host.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error(
        "user '{user}' has no range of 65536 subordinate ids in {file}; give it one: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
    )]
    NoRange { user: String, file: &'static str },
    #[error(
        "the program '{0}' is missing; install it: apt-get install uidmap (Fedora: dnf install shadow-utils), or build the image as root"
    )]
    NoMapper(&'static str),
    #[error("'{program}' refused to map ids: {detail}")]
    Mapping { program: &'static str, detail: String },
    #[error("user {0} is not in /etc/passwd, so no subordinate ids can be found for it; build the image as root")]
    NoUser(u32),
    #[error("this host does not let {who} make namespaces{hint}")]
    Denied { who: &'static str, hint: &'static str, source: io::Error },
    #[error("a process for the build cannot be started")]
    Spawn(#[source] io::Error),
}

/// How root is had within the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// The caller is root.
    Root,
    /// A user namespace in which the caller is root and ids 1 to 65535 are subordinate ids of the caller.
    Mapped { uid: u32, gid: u32, first_uid: u32, first_gid: u32 },
}

const ID_COUNT: u32 = 65_536;
const USER_HINT: &str = "; allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0) or build the image as root";
const ROOT_HINT: &str = "; in a container, grant it CAP_SYS_ADMIN (--privileged), or build the image on the host and mount its state directory";

impl Privilege {
    /// What this process can do; says what is missing before anything is fetched.
    pub fn detect() -> Result<Self, SandboxError> {
        if is_root() {
            return Ok(Self::Root);
        }
        // SAFETY: getuid and getgid have no preconditions and cannot fail.
        let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
        for program in ["newuidmap", "newgidmap"] {
            find_program(program).ok_or(SandboxError::NoMapper(program))?;
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let user = user_name(&passwd, uid).or_else(|| env::var("USER").ok()).ok_or(SandboxError::NoUser(uid))?;
        let range = |file: &'static str| {
            let text = fs::read_to_string(file).unwrap_or_default();
            subordinate_range(&text, &user, uid).ok_or_else(|| SandboxError::NoRange { user: user.clone(), file })
        };
        Ok(Self::Mapped { uid, gid, first_uid: range("/etc/subuid")?, first_gid: range("/etc/subgid")? })
    }
}

/// Looks in `PATH` and in the folders of system programs, which a user's `PATH` may lack.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}

fn user_name(passwd: &str, uid: u32) -> Option<String> {
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find_map(|fields| (fields.get(2)?.parse() == Ok(uid)).then(|| fields[0].to_owned()))
}

/// The first id of a range of at least [`ID_COUNT`] that `/etc/subuid` (subuid(5)) gives to a user.
fn subordinate_range(text: &str, user: &str, uid: u32) -> Option<u32> {
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.trim().split(':').collect();
        let [owner, first, count] = fields[..] else { return None };
        let fits = (owner == user || owner.parse() == Ok(uid)) && count.parse::<u32>().is_ok_and(|c| c >= ID_COUNT);
        if fits { first.parse().ok() } else { None }
    })
}

/// Starts `command` as process 1 of new mount, pid, uts, ipc and network namespaces. It dies with this thread.
///
/// The returned child is a process that waits for it and passes its exit status on.
pub fn spawn(mut command: Command, privilege: &Privilege) -> Result<Child, SandboxError> {
    let mut flags =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;
    let Privilege::Mapped { uid, gid, first_uid, first_gid } = *privilege else {
        // SAFETY: `enter` keeps to async-signal-safe calls, as is due between fork and exec.
        unsafe { command.pre_exec(move || enter(flags, None)) };
        return command.spawn().map_err(|source| started(source, "root", ROOT_HINT));
    };
    flags |= libc::CLONE_NEWUSER;
    let (mut pid_read, pid_write) = io::pipe().map_err(SandboxError::Spawn)?;
    let (go_read, mut go_write) = io::pipe().map_err(SandboxError::Spawn)?;
    let (pid_write, go_read): (OwnedFd, OwnedFd) = (pid_write.into(), go_read.into());
    let fds = (pid_write.as_raw_fd(), go_read.as_raw_fd());
    // SAFETY: as above; the two descriptors stay open until `spawn` has returned.
    unsafe { command.pre_exec(move || enter(flags, Some(fds))) };
    // `Command::spawn` returns after exec, which waits for the maps: another thread writes them.
    let mapper = thread::spawn(move || -> Result<(), SandboxError> {
        let mut pid = [0; 4];
        if pid_read.read_exact(&mut pid).is_err() {
            return Ok(()); // the child failed before; `spawn` says why
        }
        let pid = u32::from_ne_bytes(pid);
        map_ids("newuidmap", pid, uid, first_uid)?;
        map_ids("newgidmap", pid, gid, first_gid)?;
        let _ = go_write.write_all(&[1]);
        Ok(())
    });
    let child = command.spawn();
    drop((pid_write, go_read));
    let mapped = mapper.join().unwrap_or(Ok(()));
    match (child, mapped) {
        (Ok(child), Ok(())) => Ok(child),
        (_, Err(error)) => Err(error),
        (Err(source), Ok(())) => Err(started(source, "unprivileged users", USER_HINT)),
    }
}

fn started(source: io::Error, who: &'static str, hint: &'static str) -> SandboxError {
    let denied = [libc::EPERM, libc::EACCES, libc::ENOSPC, libc::EINVAL, libc::EUSERS];
    match source.raw_os_error() {
        Some(code) if denied.contains(&code) => SandboxError::Denied { who, hint, source },
        _ => SandboxError::Spawn(source),
    }
}

/// Inside, id 0 is the caller and 1 to 65535 are its subordinate ids.
fn map_ids(program: &'static str, pid: u32, own: u32, first: u32) -> Result<(), SandboxError> {
    let path = find_program(program).ok_or(SandboxError::NoMapper(program))?;
    let numbers = [pid, 0, own, 1, 1, first, ID_COUNT - 1].map(|number| number.to_string());
    let output = Command::new(path).args(numbers).stdin(Stdio::null()).output().map_err(SandboxError::Spawn)?;
    if output.status.success() {
        return Ok(());
    }
    Err(SandboxError::Mapping { program, detail: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

/// Runs in the forked child before exec; returns only in the process that shall exec. Async-signal-safe throughout.
fn enter(flags: libc::c_int, maps: Option<(libc::c_int, libc::c_int)>) -> io::Result<()> {
    // SAFETY: plain system calls on values and on buffers of this frame.
    unsafe {
        // getpid before the new pid namespace takes effect: the number that newuidmap needs.
        let pid = (libc::getpid() as u32).to_ne_bytes();
        check(libc::unshare(flags))?;
        if let Some((pid_write, go_read)) = maps {
            let mut go = 0u8;
            let told = libc::write(pid_write, pid.as_ptr().cast(), pid.len());
            // The parent holds the write end of `go_read`'s pipe only until the maps failed: then this reads nothing.
            if told != pid.len() as isize || libc::read(go_read, (&raw mut go).cast(), 1) != 1 {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(0, 0, 0))?;
            check(libc::setresuid(0, 0, 0))?;
        }
        // No terminal: a Ctrl-C is for the build, which ends this in its own way. It fails only for a group's leader.
        libc::setsid();
        // Nothing that is mounted here may show on the host.
        check(libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        ))?;
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        match libc::fork() {
            -1 => Err(io::Error::last_os_error()),
            0 => check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)),
            child => wait_for(child),
        }
    }
}

/// Waits for process 1 of the new namespace and ends with its status.
///
/// # Safety
/// Only for the child side of a fork: it closes every descriptor and never returns.
unsafe fn wait_for(child: libc::pid_t) -> ! {
    // SAFETY: system calls only; the descriptors closed are this process's copies, none is used again. Among them is
    // the pipe by which the parent learns of the exec, which must not stay open here.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        let mut status = 0;
        while libc::waitpid(child, &raw mut status, 0) == -1 && *libc::__errno_location() == libc::EINTR {}
        libc::_exit(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Removes a tree that has files of mapped ids, which only the sandbox's root may remove.
pub fn remove_tree(path: &Path, privilege: &Privilege) -> io::Result<()> {
    let first = crate::state::remove_any(path);
    if first.is_ok() || *privilege == Privilege::Root {
        return first;
    }
    let mut command = Command::new("rm");
    command.arg("-rf").arg("--one-file-system").arg("--").arg(path).stdin(Stdio::null()).stdout(Stdio::null());
    let status = spawn(command, privilege).map_err(io::Error::other)?.wait()?;
    if status.success() { Ok(()) } else { first }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_range_of_a_user() {
        let text = "other:100000:65536\nuser:1:10\nuser:231072:65536\n1001:300000:70000\n";
        assert_eq!(subordinate_range(text, "user", 1000), Some(231_072));
        assert_eq!(subordinate_range(text, "third", 1001), Some(300_000));
        assert_eq!(subordinate_range(text, "nobody", 2), None);
        assert_eq!(user_name("root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n", 1000).as_deref(), Some("user"));
    }

    /// Inside it is root and process 1, and what it mounts is not seen outside. Where the host forbids it, the error
    /// must say what to do.
    #[test]
    fn is_root_and_alone() {
        let privilege = match Privilege::detect() {
            Ok(privilege) => privilege,
            Err(error) => {
                assert!(error.to_string().contains("as root") || error.to_string().contains("usermod"), "{error}");
                return;
            }
        };
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "mount -t tmpfs x \"$1\" && touch \"$1/seen\" && chown 7:7 \"$1/seen\" && echo \"$(id -u) $$\"; exit 7",
            "sh",
        ]);
        command.arg(dir.path()).stdout(Stdio::piped());
        match spawn(command, &privilege) {
            Ok(child) => {
                let output = child.wait_with_output().unwrap();
                assert_eq!(String::from_utf8_lossy(&output.stdout), "0 1\n");
                assert_eq!(output.status.code(), Some(7));
                assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
            }
            Err(error) => {
                assert!(matches!(error, SandboxError::Denied { .. } | SandboxError::Mapping { .. }), "{error}")
            }
        }
    }
}
