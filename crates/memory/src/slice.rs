use std::{marker::PhantomData, ptr};

/// Plain data: any bit pattern is a value, no padding matters, no pointers. For structures shared with a guest.
///
/// # Safety
/// Every bit pattern of the right size must be a valid `Self`.
pub unsafe trait Pod: Copy + 'static {}

macro_rules! pod {
    ($($t:ty),*) => { $(
        // SAFETY: integers take any bit pattern.
        unsafe impl Pod for $t {}
    )* };
}
pod!(u8, u16, u32, u64, u128, i8, i16, i32, i64);
// SAFETY: an array of plain data is plain data.
unsafe impl<T: Pod, const N: usize> Pod for [T; N] {}

/// A contiguous piece of guest RAM, in host memory. The guest may change it at any time, so it is only
/// ever copied from and to, or handed to the kernel as an `iovec`.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'a> {
    ptr: *mut u8,
    len: usize,
    memory: PhantomData<&'a ()>,
}

// SAFETY: the pointer leads into a mapping that lives for 'a; all access is by volatile copy.
unsafe impl Send for GuestSlice<'_> {}
// SAFETY: as above; racing copies yield torn bytes at worst, which guest data may always be.
unsafe impl Sync for GuestSlice<'_> {}

impl<'a> GuestSlice<'a> {
    /// # Safety
    /// `ptr..ptr+len` must stay mapped, readable and writable for `'a`, and not be covered by any Rust
    /// reference while this slice is used.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        Self { ptr, len, memory: PhantomData }
    }

    /// A slice over host memory that the caller owns, for code that serves guest and host buffers alike.
    pub fn from_host(bytes: &'a mut [u8]) -> Self {
        Self { ptr: bytes.as_mut_ptr(), len: bytes.len(), memory: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The part that starts at `offset` and is `len` long; `None` where it does not fit.
    pub fn sub(&self, offset: usize, len: usize) -> Option<GuestSlice<'a>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: within the slice, by the check above.
        Some(Self { ptr: unsafe { self.ptr.add(offset) }, len, memory: PhantomData })
    }

    /// Copies to `out`; returns how many bytes (the shorter of the two).
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let len = self.len.min(out.len());
        // SAFETY: both sides are valid for `len`; a `&mut [u8]` cannot overlap guest RAM.
        unsafe { ptr::copy_nonoverlapping(self.ptr, out.as_mut_ptr(), len) };
        len
    }

    /// Copies from `data`; returns how many bytes (the shorter of the two).
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let len = self.len.min(data.len());
        // SAFETY: both sides are valid for `len`; a `&[u8]` cannot overlap guest RAM.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), self.ptr, len) };
        len
    }

    pub fn fill(&self, byte: u8) {
        // SAFETY: the slice is valid for its length.
        unsafe { ptr::write_bytes(self.ptr, byte, self.len) };
    }

    /// For `preadv`, `writev` and friends.
    pub fn as_iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.ptr.cast(), iov_len: self.len }
    }
}
