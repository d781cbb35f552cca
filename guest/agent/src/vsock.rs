//! Stream sockets of the `AF_VSOCK` family (vsock(7)).
#![expect(unsafe_code)] // the standard library has no such sockets

use std::{
    fs::File,
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: plain integers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked and owned.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub struct Listener(OwnedFd);

impl Listener {
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(libc::VMADDR_CID_ANY, port);
        // SAFETY: the address lives through the call and has the length given.
        unsafe {
            check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), LENGTH))?;
            check(libc::listen(socket.as_raw_fd(), 64))?;
        }
        Ok(Self(socket))
    }

    /// The next connection, and the context id of its other end.
    pub fn accept(&self) -> io::Result<(File, u32)> {
        let mut peer = address(0, 0);
        let mut length = LENGTH;
        // SAFETY: `peer` has room for `length` bytes; the result is checked and owned.
        unsafe {
            let fd = libc::accept4(self.0.as_raw_fd(), (&raw mut peer).cast(), &raw mut length, libc::SOCK_CLOEXEC);
            check(fd)?;
            Ok((File::from_raw_fd(fd), peer.svm_cid))
        }
    }
}

pub fn connect(cid: u32, port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: the address lives through the call and has the length given.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) })?;
    Ok(File::from(socket))
}
