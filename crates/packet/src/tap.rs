//! Tap devices: frames go to a network interface that the administrator made.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::Arc,
};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::{Backend, NetError, Offloads, virtio_header};

const DEVICE: &str = "/dev/net/tun";
/// The kernel takes no more pieces in one call (UIO_MAXIOV).
const MAX_PIECES: usize = 1024;

// linux/if_tun.h
vmm_sys_util::ioctl_iow_nr!(TUNSETIFF, 84, 202, std::ffi::c_int);
vmm_sys_util::ioctl_iow_nr!(TUNSETOFFLOAD, 84, 208, std::ffi::c_uint);
vmm_sys_util::ioctl_iow_nr!(TUNSETVNETHDRSZ, 84, 216, std::ffi::c_int);
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// An open tap device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: File,
}

impl Tap {
    /// Opens the tap device of this name. As root it is made if there is none, and goes when it is closed.
    pub fn open(name: &str) -> Result<Arc<Self>, NetError> {
        let request = Request::new(name)?;
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(DEVICE);
        let file = file.map_err(explain_device)?;
        // SAFETY: TUNSETIFF takes a struct ifreq, which `request` is laid out as, and it outlives the call.
        if unsafe { ioctl_with_ref(&file, TUNSETIFF(), &request) } < 0 {
            return Err(explain_attach(name, io::Error::last_os_error()));
        }
        let tap = Self { name: name.to_owned(), file };
        let header_size = virtio_header::LEN as std::ffi::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
        if unsafe { ioctl_with_ref(&tap.file, TUNSETVNETHDRSZ(), &header_size) } < 0 {
            return Err(tap.error("setting the size of the frame header"));
        }
        tap.set_device_offloads(Offloads::default()).map_err(|_| tap.error("setting the offloads"))?;
        Ok(Arc::new(tap))
    }

    /// Whether there is an interface of this name, so that [`Tap::open`] would not make one.
    pub fn exists(name: &str) -> Result<bool, NetError> {
        let mut request = Request::new(name)?;
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None);
        let socket =
            socket.map_err(|source| NetError::Tap { name: name.to_owned(), what: "looking for it", source })?;
        // SAFETY: SIOCGIFINDEX fills a struct ifreq, which `request` is laid out as; any socket will do.
        Ok(unsafe { ioctl_with_mut_ref(&socket, libc::SIOCGIFINDEX, &mut request) } >= 0)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn error(&self, what: &'static str) -> NetError {
        NetError::Tap { name: self.name.clone(), what, source: io::Error::last_os_error() }
    }

    fn set_device_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        if offloads.checksum_out {
            flags |= TUN_F_CSUM;
            if offloads.segmentation_out {
                flags |= TUN_F_TSO4 | TUN_F_TSO6;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        match unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), flags.into()) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The MTU of the interface, if it can be asked.
    fn interface_mtu(&self) -> Option<u16> {
        let mut request = Request::new(&self.name).ok()?;
        // SAFETY: SIOCGIFMTU fills a struct ifreq, which `request` is laid out as; any socket will do.
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None).ok()?;
        // SAFETY: as above; the reference is exclusive.
        if unsafe { ioctl_with_mut_ref(&socket, libc::SIOCGIFMTU, &mut request) } < 0 {
            return None;
        }
        let bytes = request.rest.first_chunk::<4>()?;
        u16::try_from(i32::from_ne_bytes(*bytes)).ok()
    }
}

/// `struct ifreq`: a name and a union, of which only the first bytes matter here.
#[repr(C, align(8))]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    rest: [u8; 24],
}

impl Request {
    fn new(name: &str) -> Result<Self, NetError> {
        let wrong = |b: u8| b.is_ascii_whitespace() || b.is_ascii_control() || b"/:%".contains(&b);
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name == "." || name == ".." || name.bytes().any(wrong) {
            return Err(NetError::TapName(name.to_owned()));
        }
        let mut request = Self { name: [0; libc::IFNAMSIZ], rest: [0; 24] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
        request.rest[..2].copy_from_slice(&flags.to_ne_bytes());
        Ok(request)
    }
}

/// The kernel leaves `num_buffers` zero, which the virtio header must not be.
fn set_num_buffers(buffers: &mut [IoSliceMut<'_>]) {
    let mut at = virtio_header::NUM_BUFFERS;
    for buffer in buffers {
        if let Some(byte) = buffer.get_mut(at) {
            *byte = 1;
            return;
        }
        at -= buffer.len();
    }
}

fn explain_device(source: io::Error) -> NetError {
    let advice = match source.kind() {
        ErrorKind::NotFound => "it does not exist; load the module with `modprobe tun`",
        ErrorKind::PermissionDenied => "this user may not open it; its mode should be 0666",
        _ if source.raw_os_error() == Some(libc::ENODEV) => "the kernel has no tun driver; load it with `modprobe tun`",
        _ => "the host does not let us",
    };
    NetError::TunDevice { advice, source }
}

fn explain_attach(name: &str, source: io::Error) -> NetError {
    let is_device = Path::new("/sys/class/net").join(name).exists();
    let is_tap = Path::new("/sys/class/net").join(name).join("tun_flags").exists();
    match source.raw_os_error() {
        Some(libc::EBUSY) => NetError::TapBusy(name.to_owned()),
        Some(libc::EPERM | libc::EACCES) => NetError::TapPermission(name.to_owned()),
        Some(libc::EINVAL) if is_device && !is_tap => NetError::NotATap(name.to_owned()),
        _ => NetError::Tap { name: name.to_owned(), what: "attaching to it", source },
    }
}

impl Backend for Tap {
    fn send(&self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        let written = match frame.len() {
            0..=MAX_PIECES => (&self.file).write_vectored(frame),
            _ => (&self.file).write(&frame.iter().flat_map(|piece| piece.iter().copied()).collect::<Vec<_>>()),
        };
        match written {
            Ok(_) => Ok(()),
            // No room, an interface that is down, or a frame that the kernel takes for malformed: lost, as on a wire.
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::InvalidInput | ErrorKind::Interrupted) =>
            {
                Ok(())
            }
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EIO | libc::EMSGSIZE | libc::ENOBUFS | libc::EFAULT)) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn recv(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
        // readv cannot tell a frame that fits exactly from one that was cut, so there is one byte more to read into.
        let mut beyond = [0; 1];
        let used = buffers.len().min(MAX_PIECES - 1);
        let buffers = &mut buffers[..used];
        let room: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        let mut pieces: Vec<_> = buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
        pieces.push(IoSliceMut::new(&mut beyond));
        loop {
            match (&self.file).read_vectored(&mut pieces) {
                Ok(length) if length > room => {}
                Ok(length) => {
                    drop(pieces);
                    set_num_buffers(buffers);
                    return Ok(Some(length));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum_in: true, checksum_out: true, segmentation_in: true, segmentation_out: true }
    }

    fn set_offloads(&self, negotiated: Offloads) {
        // The kernel took these flags once already; if it refuses now, frames come without offloads, which is correct too.
        let _ = self.set_device_offloads(negotiated);
    }

    fn mtu(&self) -> Option<u16> {
        self.interface_mtu()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}
