//! Compressed streams as kernels and initrds use them, told apart by their magic.

use std::io::{self, BufRead, Read};

use xz2::stream::{Action, Status, Stream};

/// Memory that a decoder may use: the largest dictionaries in the field are 128 MiB (`zstd -22 --ultra`, `xz` of recent kernels).
const DECODER_MEMORY_BYTES: u64 = 160 << 20;
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// An LZ4 legacy block holds 8 MiB of data; compressed, it is at most this long (`LZ4_compressBound`).
const LZ4_BLOCK_BYTES: usize = 8 << 20;
const LZ4_COMPRESSED_MAX: usize = LZ4_BLOCK_BYTES + LZ4_BLOCK_BYTES / 255 + 16;
const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Gzip,
    Xz,
    Lzma,
    Lz4,
    Zstd,
}

/// What the Linux decompressors go by (`lib/decompress.c`).
const MAGICS: &[(&[u8], Compression)] = &[
    (b"\x1f\x8b", Compression::Gzip),
    (b"\xfd7zXZ\0", Compression::Xz),
    (b"\x5d\0\0", Compression::Lzma),
    (b"\x02\x21\x4c\x18", Compression::Lz4),
    (b"\x28\xb5\x2f\xfd", Compression::Zstd),
];

/// Bytes that [`Compression::detect`] needs to see.
pub const MAGIC_BYTES: usize = 6;

impl Compression {
    /// The format of a stream that begins with `head`, if it is one that we can decode.
    pub fn detect(head: &[u8]) -> Option<Self> {
        MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, format)| *format)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Decodes one stream from `input` and leaves `input` right behind it.
    pub fn decode<'a, R: BufRead + 'a>(self, input: R) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::GzDecoder::new(input)),
            Self::Xz => Box::new(Lzma::new(input, Stream::new_stream_decoder(DECODER_MEMORY_BYTES, 0)?)),
            Self::Lzma => Box::new(Lzma::new(input, Stream::new_lzma_decoder(DECODER_MEMORY_BYTES)?)),
            Self::Lz4 => Box::new(Lz4Legacy::new(input)?),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
        })
    }
}

/// One xz or lzma stream. (The reader of the `xz2` crate fails when it is asked again at the end of a stream
/// that is followed by other data.)
struct Lzma<R> {
    input: R,
    stream: Stream,
    ended: bool,
}

impl<R: BufRead> Lzma<R> {
    fn new(input: R, stream: Stream) -> Self {
        Self { input, stream, ended: false }
    }
}

impl<R: BufRead> Read for Lzma<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while !self.ended && !out.is_empty() {
            let input = self.input.fill_buf()?;
            let at_end = input.is_empty();
            let (in_before, out_before) = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.process(input, out, if at_end { Action::Finish } else { Action::Run })?;
            let consumed = (self.stream.total_in() - in_before) as usize;
            let produced = (self.stream.total_out() - out_before) as usize;
            self.input.consume(consumed);
            self.ended = status == Status::StreamEnd;
            if produced > 0 {
                return Ok(produced);
            }
            if !self.ended && at_end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !self.ended && consumed == 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the decoder makes no progress"));
            }
        }
        Ok(0)
    }
}

/// The legacy LZ4 frame (`lz4 -l`), the only one that Linux reads: magic, then blocks of a 32-bit length and data.
/// It has no end mark: a length of zero or the end of the input ends it.
struct Lz4Legacy<R> {
    input: R,
    compressed: Vec<u8>,
    block: Vec<u8>,
    at: usize,
    ended: bool,
}

impl<R: BufRead> Lz4Legacy<R> {
    fn new(mut input: R) -> io::Result<Self> {
        let mut magic = [0; 4];
        input.read_exact(&mut magic)?;
        Ok(Self { input, compressed: Vec::new(), block: Vec::new(), at: 0, ended: false })
    }

    /// Decodes the next block; leaves `block` empty at the end.
    fn next_block(&mut self) -> io::Result<()> {
        self.at = 0;
        self.block.clear();
        while !self.ended {
            let Some(length) = self.block_length()? else {
                self.ended = true;
                break;
            };
            if length == LZ4_LEGACY_MAGIC {
                continue; // frames may follow each other
            }
            let length = length as usize;
            if length > LZ4_COMPRESSED_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "an lz4 block is longer than 8 MiB"));
            }
            self.compressed.resize(length, 0);
            self.input.read_exact(&mut self.compressed)?;
            self.block.resize(LZ4_BLOCK_BYTES, 0);
            let decoded = lz4_flex::block::decompress_into(&self.compressed, &mut self.block)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            self.block.truncate(decoded);
            if decoded > 0 {
                break;
            }
        }
        Ok(())
    }

    fn block_length(&mut self) -> io::Result<Option<u32>> {
        if self.input.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let mut length = [0; 4];
        self.input.read_exact(&mut length)?;
        Ok(Some(u32::from_le_bytes(length)).filter(|l| *l != 0))
    }
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() {
            self.next_block()?;
        }
        let rest = self.block.get(self.at..).unwrap_or_default();
        let len = rest.len().min(out.len());
        out[..len].copy_from_slice(&rest[..len]);
        self.at += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests;
