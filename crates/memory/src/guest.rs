use std::{
    fmt, io, ptr,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
    },
};

use vireo_api::ByteSize;

use crate::slice::{GuestSlice, Pod};

pub const PAGE_BYTES: u64 = 4096;
/// Where RAM goes on above the PCI hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Inaccessible address space on either side of RAM: whoever runs past its end is stopped by the host, not let into
/// what happens to lie there. As large as a huge page, so that RAM begins on one where the host starts mappings so.
const GUARD_BYTES: usize = 2 << 20;

/// Bytes of a page that one bit of its watch stands for.
const CHUNK_BYTES: u64 = PAGE_BYTES / 64;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot reserve {bytes} of guest memory on this host", bytes = ByteSize(*.bytes))]
    Map {
        bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("guest memory must be a non-zero multiple of 4096 bytes, not {0}")]
    Unaligned(u64),
    #[error("guest-physical range {gpa:#x}+{len:#x} is not RAM")]
    OutOfRange { gpa: u64, len: u64 },
}

/// Told when a watched page is written through [`GuestMemory`] (by a device or a loader).
pub trait PageWatch: Send + Sync {
    /// `gpa..gpa+len` lies in one page; the bytes have changed already.
    fn page_written(&self, gpa: u64, len: u64);
}

/// The RAM of one guest. Cheap to clone; all clones are the same memory.
#[derive(Clone)]
pub struct GuestMemory(Arc<Inner>);

/// Guest memory that this does not keep alive: what a [`PageWatch`] holds, which guest memory itself keeps.
#[derive(Clone)]
pub struct WeakGuestMemory(Weak<Inner>);

impl WeakGuestMemory {
    /// `None` once all [`GuestMemory`] clones are gone.
    pub fn upgrade(&self) -> Option<GuestMemory> {
        self.0.upgrade().map(GuestMemory)
    }
}

struct Inner {
    base: *mut u8,
    bytes: u64,
    /// RAM below the PCI hole; what is more starts at [`HIGH_RAM_START`].
    low_bytes: u64,
    /// Of each page, which chunks of it are watched.
    watched: Box<[AtomicU64]>,
    watch: OnceLock<Arc<dyn PageWatch>>,
}

// SAFETY: `base` lies in a mapping owned by `Inner` and unmapped on drop; all access through it is
// volatile or atomic.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the reservation was made by `reserve` with this address and length.
        unsafe { libc::munmap(self.base.sub(GUARD_BYTES).cast(), self.bytes as usize + 2 * GUARD_BYTES) };
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("bytes", &self.0.bytes).field("low_bytes", &self.0.low_bytes).finish()
    }
}

/// Maps `bytes` of zeroed memory between guards; the mapping is all of it, guards included.
fn reserve(bytes: usize) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let all = bytes.checked_add(2 * GUARD_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a fresh anonymous mapping; the result is checked.
    let start = unsafe { libc::mmap(ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the guards and `bytes` between them make up the mapping.
    let base = unsafe { start.cast::<u8>().add(GUARD_BYTES) };
    // SAFETY: within the mapping above, which is ours alone.
    if unsafe { libc::mprotect(base.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
        let error = io::Error::last_os_error();
        // SAFETY: the mapping made above, which nobody has seen.
        unsafe { libc::munmap(start, all) };
        return Err(error);
    }
    Ok(base)
}

/// As many atomic zeroes, in memory that the host gives only where they are used.
fn zeroes(count: usize) -> Box<[AtomicU64]> {
    let plain = Box::into_raw(vec![0u64; count].into_boxed_slice());
    // SAFETY: an atomic integer is laid out as the plain one.
    unsafe { Box::from_raw(plain as *mut [AtomicU64]) }
}

/// The chunks of its page that `gpa..gpa+len` touches; it lies in one page.
#[inline]
fn chunks(gpa: u64, len: u64) -> u64 {
    let first = (gpa & (PAGE_BYTES - 1)) / CHUNK_BYTES;
    let last = ((gpa & (PAGE_BYTES - 1)).saturating_add(len.max(1) - 1) / CHUNK_BYTES).min(63);
    u64::MAX << first & u64::MAX >> (63 - last)
}

impl GuestMemory {
    /// `bytes` of zeroed RAM, of which at most `low_limit` lie below the PCI hole.
    pub fn new(bytes: u64, low_limit: u64) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::Unaligned(bytes));
        }
        let base = reserve(bytes as usize).map_err(|source| MemoryError::Map { bytes, source })?;
        let watched = zeroes((bytes / PAGE_BYTES) as usize);
        let low_bytes = bytes.min(low_limit);
        Ok(Self(Arc::new(Inner { base, bytes, low_bytes, watched, watch: OnceLock::new() })))
    }

    pub fn downgrade(&self) -> WeakGuestMemory {
        WeakGuestMemory(Arc::downgrade(&self.0))
    }

    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// RAM below the PCI hole, starting at address 0.
    pub fn low_bytes(&self) -> u64 {
        self.0.low_bytes
    }

    /// RAM at [`HIGH_RAM_START`] and up; may be 0.
    pub fn high_bytes(&self) -> u64 {
        self.0.bytes - self.0.low_bytes
    }

    /// `(guest-physical start, host address, bytes)` of each range of RAM.
    pub fn ranges(&self) -> Vec<(u64, *mut u8, u64)> {
        let mut all = vec![(0, self.0.base, self.low_bytes())];
        if self.high_bytes() > 0 {
            // SAFETY: low_bytes is within the mapping.
            all.push((HIGH_RAM_START, unsafe { self.0.base.add(self.low_bytes() as usize) }, self.high_bytes()));
        }
        all
    }

    #[inline]
    fn offset(&self, gpa: u64) -> Option<u64> {
        let inner = &*self.0;
        if gpa < inner.low_bytes {
            Some(gpa)
        } else if gpa >= HIGH_RAM_START && gpa - HIGH_RAM_START < inner.bytes - inner.low_bytes {
            Some(gpa - HIGH_RAM_START + inner.low_bytes)
        } else {
            None
        }
    }

    /// Offset of `gpa..gpa+len` in the mapping; the range must lie in one range of RAM.
    #[inline]
    fn range(&self, gpa: u64, len: u64) -> Result<u64, MemoryError> {
        let fault = MemoryError::OutOfRange { gpa, len };
        let Some(offset) = self.offset(gpa) else { return Err(fault) };
        let end = if offset < self.0.low_bytes { self.0.low_bytes } else { self.0.bytes };
        if len > end - offset { Err(fault) } else { Ok(offset) }
    }

    /// Host address of the page that holds `gpa`, or `None` where no RAM is. Valid as long as the memory lives.
    #[inline]
    pub fn host_page(&self, gpa: u64) -> Option<*mut u8> {
        let offset = self.offset(gpa & !(PAGE_BYTES - 1))?;
        // SAFETY: the offset lies within the mapping.
        Some(unsafe { self.0.base.add(offset as usize) })
    }

    /// The piece of RAM at `gpa..gpa+len`. After writing through it, call [`Self::written`].
    pub fn slice(&self, gpa: u64, len: u64) -> Result<GuestSlice<'_>, MemoryError> {
        let offset = self.range(gpa, len)?;
        // SAFETY: `range` checked that the bytes lie within the mapping, which lives as long as `self`.
        Ok(unsafe { GuestSlice::new(self.0.base.add(offset as usize), len as usize) })
    }

    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.slice(gpa, out.len() as u64)?.copy_to(out);
        Ok(())
    }

    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.slice(gpa, data.len() as u64)?.copy_from(data);
        self.written(gpa, data.len() as u64);
        Ok(())
    }

    pub fn read_pod<T: Pod>(&self, gpa: u64) -> Result<T, MemoryError> {
        let slice = self.slice(gpa, size_of::<T>() as u64)?;
        // SAFETY: the slice covers a `T`; any bit pattern is a `T`.
        Ok(unsafe { ptr::read_unaligned(slice.as_ptr().cast::<T>()) })
    }

    pub fn write_pod<T: Pod>(&self, gpa: u64, value: T) -> Result<(), MemoryError> {
        let slice = self.slice(gpa, size_of::<T>() as u64)?;
        // SAFETY: the slice covers a `T`.
        unsafe { ptr::write_unaligned(slice.as_ptr().cast::<T>(), value) };
        self.written(gpa, size_of::<T>() as u64);
        Ok(())
    }

    /// Says that a device changed `gpa..gpa+len` (for writes that did not go through [`Self::write`]).
    #[inline]
    pub fn written(&self, gpa: u64, len: u64) {
        // Whoever watches reads afterwards; here it is the other way round, so that one sees the other.
        fence(Ordering::SeqCst);
        let end = gpa.saturating_add(len);
        let mut at = gpa;
        while at < end {
            let next = ((at | (PAGE_BYTES - 1)) + 1).min(end);
            if self.is_watched_at(at, next - at)
                && let Some(watch) = self.0.watch.get()
            {
                watch.page_written(at, next - at);
            }
            at = next;
        }
    }

    /// Installs the one listener for watched pages; later calls are ignored. A listener that needs the memory holds it
    /// by [`Self::downgrade`], or it would keep the memory, and thereby itself, for ever.
    pub fn set_watch(&self, watch: Arc<dyn PageWatch>) {
        let _ = self.0.watch.set(watch);
    }

    /// From now on writes to this page are reported. Returns whether the page was watched before.
    pub fn watch_page(&self, gpa: u64) -> bool {
        self.watch(gpa & !(PAGE_BYTES - 1), PAGE_BYTES)
    }

    /// The same for the part of a page that is `gpa..gpa+len` (and for what is in the same 64 bytes as its ends).
    /// Returns whether anything of the page was watched before.
    pub fn watch(&self, gpa: u64, len: u64) -> bool {
        self.watched_chunks(gpa).is_some_and(|w| w.fetch_or(chunks(gpa, len), Ordering::SeqCst) != 0)
    }

    /// Ends the watch of all of the page.
    pub fn unwatch_page(&self, gpa: u64) {
        if let Some(watched) = self.watched_chunks(gpa) {
            watched.store(0, Ordering::SeqCst);
        }
    }

    /// Whether anything of the page is watched.
    #[inline]
    pub fn is_watched(&self, gpa: u64) -> bool {
        self.watched_chunks(gpa).is_some_and(|w| w.load(Ordering::Acquire) != 0)
    }

    /// Whether a write to `gpa..gpa+len`, which lies in one page, is one to watched bytes.
    #[inline]
    pub fn is_watched_at(&self, gpa: u64, len: u64) -> bool {
        self.watched_chunks(gpa).is_some_and(|w| w.load(Ordering::Acquire) & chunks(gpa, len) != 0)
    }

    #[inline]
    fn watched_chunks(&self, gpa: u64) -> Option<&AtomicU64> {
        self.offset(gpa).map(|offset| &self.0.watched[(offset / PAGE_BYTES) as usize])
    }
}

macro_rules! atomics {
    ($($load:ident $store:ident $int:ty, $atomic:ty;)*) => { impl GuestMemory { $(
        /// Atomic load of a naturally aligned value.
        pub fn $load(&self, gpa: u64, order: Ordering) -> Result<$int, MemoryError> {
            Ok(self.atomic::<$atomic>(gpa)?.load(order))
        }
        /// Atomic store of a naturally aligned value.
        pub fn $store(&self, gpa: u64, value: $int, order: Ordering) -> Result<(), MemoryError> {
            self.atomic::<$atomic>(gpa)?.store(value, order);
            self.written(gpa, size_of::<$int>() as u64);
            Ok(())
        }
    )* } };
}
atomics! {
    load_u16 store_u16 u16, AtomicU16;
    load_u32 store_u32 u32, AtomicU32;
    load_u64 store_u64 u64, AtomicU64;
}

impl GuestMemory {
    /// Atomic exchange; what was there before.
    pub fn swap_u8(&self, gpa: u64, value: u8, order: Ordering) -> Result<u8, MemoryError> {
        let before = self.atomic::<AtomicU8>(gpa)?.swap(value, order);
        self.written(gpa, 1);
        Ok(before)
    }

    /// `A` must be one of the standard atomic integers; a misaligned address counts as out of range.
    fn atomic<A>(&self, gpa: u64) -> Result<&A, MemoryError> {
        let len = size_of::<A>() as u64;
        if !gpa.is_multiple_of(len) {
            return Err(MemoryError::OutOfRange { gpa, len });
        }
        let slice = self.slice(gpa, len)?;
        // SAFETY: in range, aligned (the mapping is page aligned), and atomics take any bit pattern.
        Ok(unsafe { &*slice.as_ptr().cast::<A>() })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn the_hole_is_no_ram() {
        let memory = GuestMemory::new(64 << 12, 16 << 12).unwrap();
        assert_eq!(memory.high_bytes(), 48 << 12);
        memory.write(HIGH_RAM_START + 8, b"high").unwrap();
        memory.write((16 << 12) - 4, b"edge").unwrap();
        let mut out = [0; 4];
        memory.read(HIGH_RAM_START + 8, &mut out).unwrap();
        assert_eq!(&out, b"high");
        // neither across the end of low RAM, nor in the hole, nor past the end, nor around the address space
        for gpa in [(16 << 12) - 3, 16 << 12, HIGH_RAM_START - 1, HIGH_RAM_START + (48 << 12) - 3, u64::MAX - 1] {
            assert!(memory.read(gpa, &mut out).is_err(), "{gpa:#x}");
        }
    }

    #[test]
    fn watched_pages_report_writes_and_only_those() {
        #[derive(Default)]
        struct Log(Mutex<Vec<(u64, u64)>>);
        impl PageWatch for Log {
            fn page_written(&self, gpa: u64, len: u64) {
                self.0.lock().unwrap().push((gpa, len));
            }
        }
        let memory = GuestMemory::new(4 << 12, 4 << 12).unwrap();
        let log = Arc::new(Log::default());
        memory.set_watch(log.clone());
        assert!(!memory.watch_page(0x1000));
        assert!(memory.watch_page(0x1fff));
        memory.write(0xff0, &[1; 0x1020]).unwrap();
        memory.write_pod(0x2000u64, 1u32).unwrap();
        memory.unwatch_page(0x1000);
        memory.write(0x1000, &[1]).unwrap();
        assert_eq!(*log.0.lock().unwrap(), [(0x1000, 0x1000)]);
    }

    #[test]
    fn a_watch_is_of_the_bytes_that_it_names_and_their_neighbours() {
        let memory = GuestMemory::new(4 << 12, 4 << 12).unwrap();
        assert!(!memory.watch(0x1ffc, 4));
        assert!(memory.watch(0x1040, 65));
        assert!(memory.is_watched(0x1000) && !memory.is_watched(0x2000));
        let watched = |gpa, len| memory.is_watched_at(gpa, len);
        assert!(watched(0x1fc0, 1) && !watched(0x1fbf, 1) && watched(0x1fbf, 2));
        assert!(!watched(0x1000, 0x40) && watched(0x103f, 2) && watched(0x10bf, 1) && !watched(0x10c0, 0xf00));
        assert!(watched(0x1000, 0x1000));
        memory.unwatch_page(0x1234);
        assert!(!watched(0x1000, 0x1000) && !memory.is_watched(0x1000));
    }

    #[test]
    fn ram_lies_between_guards() {
        let memory = GuestMemory::new(4 << 12, 4 << 12).unwrap();
        let (_, base, bytes) = memory.ranges()[0];
        // The kernel copies from where this process may read: it is asked, so that nothing faults here.
        let readable = |at: *const u8| {
            let mut pipe = [0; 2];
            // SAFETY: a pipe of our own; write(2) fails with EFAULT on what cannot be read.
            unsafe {
                assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
                let written = libc::write(pipe[1], at.cast(), 1);
                for fd in pipe {
                    libc::close(fd);
                }
                written == 1
            }
        };
        let at = |offset: isize| base.wrapping_offset(offset).cast_const();
        let end = bytes as isize;
        assert!(readable(at(0)) && readable(at(end - 1)));
        for outside in [-1, -(GUARD_BYTES as isize), end, end + GUARD_BYTES as isize - 1] {
            assert!(!readable(at(outside)), "{outside:#x}");
        }
    }

    #[test]
    fn atomics_want_alignment() {
        let memory = GuestMemory::new(1 << 12, 1 << 12).unwrap();
        memory.store_u16(2, 0xbeef, Ordering::Release).unwrap();
        assert_eq!(memory.load_u16(2, Ordering::Acquire).unwrap(), 0xbeef);
        assert_eq!(memory.swap_u8(3, 0x11, Ordering::SeqCst).unwrap(), 0xbe);
        assert_eq!(memory.load_u16(2, Ordering::Acquire).unwrap(), 0x11ef);
        assert!(memory.swap_u8(memory.bytes(), 0, Ordering::SeqCst).is_err());
        assert!(memory.load_u32(2, Ordering::Acquire).is_err());
        assert!(memory.load_u32(4094, Ordering::Acquire).is_err());
    }
}
