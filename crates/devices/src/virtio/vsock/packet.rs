use crate::virtio::{Reader, ShortChain};

/// `struct virtio_vsock_hdr` (virtio 1.2, 5.10.6).
pub const HEADER_BYTES: usize = 44;
/// The host's address (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;
pub const STREAM: u16 = 1;

/// Operations, virtio 1.2, 5.10.6.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown: the sender will not receive or not send any more (virtio 1.2, 5.10.6.5).
pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;

/// The header of every packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// The sender's room for one connection, and how much it has taken out of it so far.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, ShortChain> {
        Ok(Self {
            src_cid: u64::from_le(reader.read_pod()?),
            dst_cid: u64::from_le(reader.read_pod()?),
            src_port: u32::from_le(reader.read_pod()?),
            dst_port: u32::from_le(reader.read_pod()?),
            len: u32::from_le(reader.read_pod()?),
            kind: u16::from_le(reader.read_pod()?),
            op: u16::from_le(reader.read_pod()?),
            flags: u32::from_le(reader.read_pod()?),
            buf_alloc: u32::from_le(reader.read_pod()?),
            fwd_cnt: u32::from_le(reader.read_pod()?),
        })
    }

    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        out
    }

    /// The answer to a packet that belongs to no connection.
    pub fn reset_of(self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}
