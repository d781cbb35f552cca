use std::ops::Range;

use crate::virtio::DescriptorChain;

/// Requests and the disk's size count in these (virtio 1.2, 5.2.2).
pub const SECTOR_BYTES: u64 = 512;
/// `VIRTIO_BLK_ID_BYTES`
pub const ID_BYTES: usize = 20;
pub const HEADER_BYTES: u64 = 16;
const STATUS_BYTES: u64 = 1;
const RANGE_BYTES: u64 = 16;

/// The largest segment that the configuration space tells the driver of. With as many segments as a queue has room
/// for it stays below [`MAX_TRANSFER_BYTES`].
pub const MAX_SEGMENT_BYTES: u32 = 128 << 10;
/// No driver that keeps to the limits transfers more at once. One that does not gets an error: a queue is stopped
/// between requests, so that none may take long.
pub const MAX_TRANSFER_BYTES: u64 = 64 << 20;

/// Limits for discard and write-zeroes that the configuration space tells the driver. One request of the
/// largest size takes a host that has to write the zeroes a moment, not minutes.
pub const MAX_RANGES: u32 = 16;
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`
const UNMAP: u32 = 1;

/// The last byte of each request (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What decides whether a request can be served.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub size_bytes: u64,
    pub read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Bytes of the disk; they fill all of the writable part but the status byte.
    Read(Range<u64>),
    /// All of the readable part after the header.
    Write(Range<u64>),
    Flush,
    GetId,
    Discard(Vec<Extent>),
    WriteZeroes(Vec<Extent>),
}

/// A range of a discard or write-zeroes request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
    pub unmap: bool,
}

impl Request {
    /// Reads the header and checks everything that does not need the disk itself. The caller has made sure
    /// that there is room for the status byte.
    pub fn parse(chain: &DescriptorChain, limits: Limits) -> Result<Self, Status> {
        let mut reader = chain.reader();
        let short = |_| Status::IoError;
        let kind = u32::from_le(reader.read_pod().map_err(short)?);
        let _reserved: u32 = reader.read_pod().map_err(short)?;
        let sector = u64::from_le(reader.read_pod().map_err(short)?);
        match kind {
            0 => limits.range(sector, chain.writable_bytes().saturating_sub(STATUS_BYTES)).map(Self::Read),
            1 => {
                limits.writable()?;
                limits.range(sector, reader.remaining()).map(Self::Write)
            }
            4 => Ok(Self::Flush),
            8 => Ok(Self::GetId),
            11 => limits.extents(reader, MAX_DISCARD_SECTORS, 0).map(Self::Discard),
            13 => limits.extents(reader, MAX_WRITE_ZEROES_SECTORS, UNMAP).map(Self::WriteZeroes),
            _ => Err(Status::Unsupported),
        }
    }
}

impl Limits {
    fn writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoError) } else { Ok(()) }
    }

    fn range(&self, sector: u64, len: u64) -> Result<Range<u64>, Status> {
        let start = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = start.checked_add(len).ok_or(Status::IoError)?;
        if !len.is_multiple_of(SECTOR_BYTES) || len > MAX_TRANSFER_BYTES || end > self.size_bytes {
            return Err(Status::IoError);
        }
        Ok(start..end)
    }

    /// `struct virtio_blk_discard_write_zeroes[]` (virtio 1.2, 5.2.6).
    fn extents(
        &self,
        mut reader: crate::virtio::Reader<'_>,
        max_sectors: u32,
        known_flags: u32,
    ) -> Result<Vec<Extent>, Status> {
        self.writable()?;
        let bytes = reader.remaining();
        if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES) || bytes / RANGE_BYTES > u64::from(MAX_RANGES) {
            return Err(Status::IoError);
        }
        let short = |_| Status::IoError;
        let mut extents = Vec::with_capacity(MAX_RANGES as usize);
        while reader.remaining() > 0 {
            let sector = u64::from_le(reader.read_pod().map_err(short)?);
            let sectors = u32::from_le(reader.read_pod().map_err(short)?);
            let flags = u32::from_le(reader.read_pod().map_err(short)?);
            if flags & !known_flags != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Status::IoError);
            }
            let range = self.range(sector, u64::from(sectors) * SECTOR_BYTES)?;
            extents.push(Extent { offset: range.start, len: range.end - range.start, unmap: flags & UNMAP != 0 });
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_has_a_limit_that_no_honest_driver_meets() {
        let limits = Limits { size_bytes: 1 << 40, read_only: false };
        assert_eq!(limits.range(8, MAX_TRANSFER_BYTES), Ok(4096..4096 + MAX_TRANSFER_BYTES));
        assert_eq!(limits.range(8, MAX_TRANSFER_BYTES + SECTOR_BYTES), Err(Status::IoError));
        let honest = u64::from(crate::virtio::block::device::QUEUE_SIZE - 2) * u64::from(MAX_SEGMENT_BYTES);
        assert!(honest <= MAX_TRANSFER_BYTES);
    }
}
