//! Pseudo-terminals for interactive commands (pty(7)).
#![expect(unsafe_code)] // terminal and process-group calls

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::OpenOptionsExt,
    },
};

use vireo_guest_protocol::WindowSize;

/// Both ends of a new pseudo-terminal: ours, and the command's.
pub fn open(size: WindowSize) -> io::Result<(File, File)> {
    // SAFETY: posix_openpt and the calls on its result have no preconditions; results are checked.
    let ours = unsafe {
        let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let ours = File::from_raw_fd(fd);
        if libc::grantpt(fd) < 0 || libc::unlockpt(fd) < 0 {
            return Err(io::Error::last_os_error());
        }
        ours
    };
    let mut number: libc::c_int = 0;
    // SAFETY: TIOCGPTN writes an int.
    if unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTN, &raw mut number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // Not ours: we lead a session, and would be hung up on when the terminal goes.
    let mut options = OpenOptions::new();
    let theirs = options.read(true).write(true).custom_flags(libc::O_NOCTTY).open(format!("/dev/pts/{number}"))?;
    resize(&ours, size)?;
    Ok((ours, theirs))
}

pub fn resize(terminal: &File, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// In the child: a session of its own, with standard input as its controlling terminal if it has one.
pub fn new_session(with_terminal: bool) -> io::Result<()> {
    // SAFETY: async-signal-safe calls without pointers.
    unsafe {
        if libc::setsid() < 0 {
            return Err(io::Error::last_os_error());
        }
        if with_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// In the child: gives up the agent's privileges.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: `groups` lives through the call; the rest has no pointers.
    unsafe {
        if libc::setgroups(groups.len(), groups.as_ptr()) < 0 || libc::setgid(gid) < 0 || libc::setuid(uid) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Sends a signal to the command's whole session.
pub fn signal(pid: u32, signal: u8) {
    // SAFETY: no pointers. The child leads its own process group, and is not yet reaped while sessions hold it.
    unsafe { libc::kill(-(pid as libc::pid_t), signal.into()) };
}

/// Writes disks back and powers off; returns only if that fails.
pub fn power_off() -> io::Error {
    // SAFETY: no pointers.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    io::Error::last_os_error()
}

/// Runs `in_child` between fork and exec.
pub fn before_exec(
    command: &mut std::process::Command,
    in_child: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closures that `session` passes make system calls only.
    unsafe { command.pre_exec(in_child) };
}
