use vireo_memory::{GuestSlice, Pod};

/// The chain has fewer bytes than the device needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request's buffers are too short: {wanted} bytes wanted, {left} left")]
pub struct ShortChain {
    pub wanted: u64,
    pub left: u64,
}

/// A position in a list of slices.
#[derive(Clone)]
struct Cursor<'a> {
    slices: &'a [GuestSlice<'a>],
    /// Bytes of `slices[0]` that are done.
    offset: usize,
    done: u64,
    left: u64,
}

impl<'a> Cursor<'a> {
    fn new(slices: &'a [GuestSlice<'a>]) -> Self {
        Self { slices, offset: 0, done: 0, left: slices.iter().map(|s| s.len() as u64).sum() }
    }

    /// Visits the pieces that make up the next `len` bytes and moves past them.
    fn advance(&mut self, len: u64, mut piece: impl FnMut(GuestSlice<'a>)) -> Result<(), ShortChain> {
        if len > self.left {
            return Err(ShortChain { wanted: len, left: self.left });
        }
        let mut todo = len;
        while todo > 0 {
            let Some(first) = self.slices.first() else { break };
            let room = first.len() - self.offset;
            let take = (room as u64).min(todo) as usize;
            if let Some(part) = first.sub(self.offset, take)
                && take > 0
            {
                piece(part);
            }
            todo -= take as u64;
            if take == room {
                self.slices = &self.slices[1..];
                self.offset = 0;
            } else {
                self.offset += take;
            }
        }
        self.done += len;
        self.left -= len;
        Ok(())
    }
}

macro_rules! cursor {
    ($name:ident) => {
        impl<'a> $name<'a> {
            pub fn new(slices: &'a [GuestSlice<'a>]) -> Self {
                Self(Cursor::new(slices))
            }

            /// Bytes from here to the end.
            pub fn remaining(&self) -> u64 {
                self.0.left
            }

            /// Bytes from the start to here.
            pub fn position(&self) -> u64 {
                self.0.done
            }

            pub fn skip(&mut self, len: u64) -> Result<(), ShortChain> {
                self.0.advance(len, |_| ())
            }

            /// Appends the slices that cover the next `len` bytes to `out` and moves past them.
            pub fn take(&mut self, len: u64, out: &mut Vec<GuestSlice<'a>>) -> Result<(), ShortChain> {
                self.0.advance(len, |piece| out.push(piece))
            }
        }
    };
}

/// Reads the device-readable part of a chain from its start, however the driver cut it.
#[derive(Clone)]
pub struct Reader<'a>(Cursor<'a>);
cursor!(Reader);

impl Reader<'_> {
    pub fn read_exact(&mut self, out: &mut [u8]) -> Result<(), ShortChain> {
        let mut at = 0;
        self.0.advance(out.len() as u64, |piece| at += piece.copy_to(&mut out[at..]))
    }

    /// As many bytes as there are, at most all of `out`.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let len = (out.len() as u64).min(self.remaining()) as usize;
        match self.read_exact(&mut out[..len]) {
            Ok(()) => len,
            Err(_) => 0,
        }
    }

    /// A little-endian structure of plain data.
    pub fn read_pod<T: Pod>(&mut self) -> Result<T, ShortChain> {
        let mut value = std::mem::MaybeUninit::<T>::zeroed();
        // SAFETY: the bytes of `value` are zeroed, so initialised, and stay so; nothing else refers to them.
        let bytes = unsafe { std::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>()) };
        self.read_exact(bytes)?;
        // SAFETY: all bytes are initialised and any bit pattern is a `T`.
        Ok(unsafe { value.assume_init() })
    }
}

/// Writes the device-writable part of a chain from its start, however the driver cut it.
#[derive(Clone)]
pub struct Writer<'a>(Cursor<'a>);
cursor!(Writer);

impl Writer<'_> {
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), ShortChain> {
        let mut at = 0;
        self.0.advance(data.len() as u64, |piece| at += piece.copy_from(&data[at..]))
    }

    /// As many bytes as there is room for.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let len = (data.len() as u64).min(self.remaining()) as usize;
        match self.write_all(&data[..len]) {
            Ok(()) => len,
            Err(_) => 0,
        }
    }

    pub fn write_pod<T: Pod>(&mut self, value: T) -> Result<(), ShortChain> {
        // SAFETY: plain data has no padding that matters and `value` lives on this stack until the end.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const value).cast::<u8>(), size_of::<T>()) };
        self.write_all(bytes)
    }

    pub fn fill(&mut self, byte: u8, len: u64) -> Result<(), ShortChain> {
        self.0.advance(len, |piece| piece.fill(byte))
    }
}
