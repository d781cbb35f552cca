//! Executable memory: one memfd, mapped twice, so that no page is ever writable and executable.

use std::{io, ptr::NonNull};

use super::guard::Registration;

/// The writable and the executable view are different mappings of the same pages, each between inaccessible guard
/// pages.
pub(crate) struct DualMapping {
    writable: View,
    executable: View,
}

/// An append-only code buffer.
pub(super) struct Arena {
    // Dropped before the view that it names.
    _registration: Registration,
    memory: DualMapping,
    used: usize,
}

/// A mapping of `bytes` bytes with a guard page on either side, and `data` bytes of plain memory with one behind.
struct View {
    reserved: NonNull<u8>,
    bytes: usize,
    data: usize,
}

const GUARD: usize = 4096;
/// Entry points start on their own half cache line.
pub(super) const ALIGN: usize = 32;

// SAFETY: the mappings belong to their owner alone and are not tied to a thread.
unsafe impl Send for DualMapping {}

impl DualMapping {
    /// Reserves `bytes` (a multiple of the page size). Pages cost memory only once they are written.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        Self::with_data(bytes, 0)
    }

    /// The same with so many bytes of data behind the executable view and its guard page.
    pub(crate) fn with_data(bytes: usize, data: usize) -> io::Result<Self> {
        let fd = memfd()?;
        // SAFETY: `fd` is a memfd that was just created and is owned here.
        let sized = unsafe { libc::ftruncate(fd, bytes as libc::off_t) };
        let views = if sized == 0 {
            View::new(fd, bytes, libc::PROT_READ | libc::PROT_WRITE, 0)
                .and_then(|w| Ok((w, View::new(fd, bytes, libc::PROT_READ | libc::PROT_EXEC, data)?)))
        } else {
            Err(io::Error::last_os_error())
        };
        // SAFETY: `fd` is owned here and not used again; mappings outlive it.
        unsafe { libc::close(fd) };
        let (writable, executable) = views?;
        Ok(Self { writable, executable })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.writable.bytes
    }

    pub(crate) fn writable(&self) -> *mut u8 {
        self.writable.start()
    }

    pub(crate) fn executable(&self) -> *const u8 {
        self.executable.start()
    }

    /// Where the data are: zeroes at first.
    pub(crate) fn data(&self) -> *mut u8 {
        self.executable.start().wrapping_add(self.executable.bytes + GUARD)
    }
}

impl Arena {
    pub(super) fn new(bytes: usize) -> io::Result<Self> {
        let memory = DualMapping::new(bytes)?;
        let registration = Registration::new(memory.executable() as usize, bytes)?;
        let mut arena = Self { _registration: registration, memory, used: 0 };
        arena.clear();
        Ok(arena)
    }

    /// Bytes at the start that say where functions begin, a bit for every [`ALIGN`] bytes: see `guard`.
    fn map_bytes(&self) -> usize {
        (self.memory.bytes() / ALIGN / 8).next_multiple_of(ALIGN)
    }

    /// Copies `code` in and returns where it can be called, or `None` when it does not fit any more.
    pub(super) fn push(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let at = self.used;
        let end = at.checked_add(code.len())?;
        if end > self.memory.bytes() {
            return None;
        }
        let unit = at / ALIGN;
        // SAFETY: `at..end` lies inside the writable view, and so does the bitmap; nothing else has a reference
        // into it.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.memory.writable().add(at), code.len());
            *self.memory.writable().add(unit / 8) |= 1 << (unit % 8);
        }
        self.used = end.next_multiple_of(ALIGN).min(self.memory.bytes());
        // SAFETY: the executable view is as large as the writable one.
        NonNull::new(unsafe { self.memory.executable().add(at).cast_mut() })
    }

    /// Forgets all code. Nothing that [`Self::push`] returned may be called any more.
    pub(super) fn clear(&mut self) {
        self.used = self.map_bytes();
        // SAFETY: the bitmap is the start of the view.
        unsafe { std::ptr::write_bytes(self.memory.writable(), 0, self.used) };
    }

    pub(super) fn used_bytes(&self) -> usize {
        self.used
    }
}

impl View {
    fn new(fd: libc::c_int, bytes: usize, protection: libc::c_int, data: usize) -> io::Result<Self> {
        // SAFETY: an anonymous reservation at an address of the kernel's choice touches nothing that exists.
        let reserved = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::whole(bytes, data),
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let Some(start) = NonNull::new(reserved.cast::<u8>()) else {
            return Err(io::Error::last_os_error());
        };
        let view = Self { reserved: start, bytes, data };
        // SAFETY: MAP_FIXED replaces a part of the reservation made above and nothing else.
        let mapped =
            unsafe { libc::mmap(view.start().cast(), bytes, protection, libc::MAP_SHARED | libc::MAP_FIXED, fd, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if data != 0 {
            let at = view.start().wrapping_add(bytes + GUARD);
            // SAFETY: another part of the reservation.
            if unsafe { libc::mprotect(at.cast(), data, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(view)
    }

    const fn whole(bytes: usize, data: usize) -> usize {
        bytes + data + if data == 0 { 2 * GUARD } else { 3 * GUARD }
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: the reservation has a guard page before the view.
        unsafe { self.reserved.as_ptr().add(GUARD) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` reserved; the owner is going away.
        unsafe { libc::munmap(self.reserved.as_ptr().cast(), Self::whole(self.bytes, self.data)) };
    }
}

/// A memfd that may be mapped executable. Kernels from 6.3 want to be told (memfd_create(2), MFD_EXEC); older
/// ones refuse the flag.
fn memfd() -> io::Result<libc::c_int> {
    const MFD_EXEC: libc::c_uint = 0x10;
    let name = c"vireo-code";
    for flags in [libc::MFD_CLOEXEC | MFD_EXEC, libc::MFD_CLOEXEC] {
        // SAFETY: the name is a valid C string and the call touches no other memory.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            return Ok(fd);
        }
    }
    Err(io::Error::last_os_error())
}
