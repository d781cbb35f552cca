//! `virtio_net_hdr_v1`, the header before each frame (virtio 1.2, 5.1.6).

/// Bytes of the header.
pub(crate) const LEN: usize = 12;

/// Offset of the number of buffers that the frame is scattered over.
pub(crate) const NUM_BUFFERS: usize = 10;

/// The checksum is the pseudo header's only, and the other side completes it.
pub(crate) const F_NEEDS_CSUM: u8 = 1;

pub(crate) const GSO_TCPV4: u8 = 1;
pub(crate) const GSO_TCPV6: u8 = 4;

/// What the header says of a frame, in host terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VirtioHeader {
    /// Offset of the transport header in the frame and of the checksum within it, if the checksum is partial.
    pub checksum: Option<(u16, u16)>,
    /// Kind, payload bytes per segment and bytes of all headers, if the frame is to be cut into segments.
    pub segmentation: Option<(u8, u16, u16)>,
}

impl VirtioHeader {
    pub(crate) fn write(&self, out: &mut [u8; LEN]) {
        *out = [0; LEN];
        if let Some((start, offset)) = self.checksum {
            out[0] = F_NEEDS_CSUM;
            out[6..8].copy_from_slice(&start.to_le_bytes());
            out[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        if let Some((kind, size, headers)) = self.segmentation {
            out[1] = kind;
            out[2..4].copy_from_slice(&headers.to_le_bytes());
            out[4..6].copy_from_slice(&size.to_le_bytes());
        }
        // num_buffers: one, unless the device scatters the frame over several.
        out[NUM_BUFFERS] = 1;
    }
}
