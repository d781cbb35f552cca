//! Socket buffers that take host memory only where they were touched.

use std::{io, ptr::NonNull};

/// What all TCP buffers together may hold before new connections get the smallest ones.
const BUDGET: usize = 64 << 20;
const LARGEST: usize = 512 << 10;
const SMALLEST: usize = 32 << 10;

/// The size of the two buffers of the next connection if those of the others hold `used` bytes: large for the first
/// ones, which may want to be fast, and less and less as the budget runs out.
pub(crate) fn size_for(used: usize) -> usize {
    let share = BUDGET.saturating_sub(used) / 16;
    let size = share.clamp(SMALLEST, LARGEST);
    1 << size.ilog2()
}

/// Zeroed anonymous memory. The allocator would do, were it not that it keeps and clears what was freed once.
pub(crate) struct Region {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a region is plain memory that nothing else refers to but the slice that `Region::new` handed out, which is
// itself Send.
unsafe impl Send for Region {}

impl Region {
    /// The memory and the only reference to it.
    ///
    /// # Safety
    /// The reference must not be used once the region is dropped.
    pub(crate) unsafe fn new(len: usize) -> io::Result<(Self, &'static mut [u8])> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the mapping is `len` readable and writable zeroed bytes, and this is the only reference to it. The
        // caller promised not to use it after the region is gone.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) };
        Ok((Self { start, len }, bytes))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this range, and its only reference is no longer used, as its caller promised.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_connections_stay_within_bounds() {
        let mut used = 0;
        for connection in 0..1024 {
            let size = size_for(used);
            assert!(connection > 0 || size == LARGEST);
            used += 2 * size;
        }
        assert!(used <= BUDGET + 1024 * 2 * SMALLEST, "{used}");
    }
}
