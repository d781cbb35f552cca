use super::device::feature::{CSUM, HOST_TSO4, HOST_TSO6};

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.2, 5.1.6): flags, gso_type, hdr_len, gso_size, csum_start,
/// csum_offset, num_buffers.
pub const HEADER_BYTES: usize = 12;
/// The largest frame: 64 KiB of IP packet with Ethernet and VLAN headers, and the virtio header before it.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + 14 + 4 + 65536;
const ETHERNET_BYTES: usize = 14;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// Checks and cleans the header of a frame from the driver, so that a backend need not fear it; `false` if the
/// frame is to be dropped (virtio 1.2, 5.1.6.2.1).
pub fn admit(frame: &mut [u8], features: u64) -> bool {
    let Some((header, payload)) = frame.split_first_chunk_mut::<HEADER_BYTES>() else { return false };
    if payload.len() < ETHERNET_BYTES {
        return false;
    }
    let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (gso_size, csum_start, csum_offset) = (field(4), field(6), field(8));
    let partial = header[0] & NEEDS_CSUM != 0;
    if partial && (features & CSUM == 0 || csum_start + csum_offset + 2 > payload.len()) {
        return false;
    }
    let segmentation = match header[1] {
        GSO_NONE => None,
        GSO_TCPV4 => Some(HOST_TSO4),
        GSO_TCPV6 => Some(HOST_TSO6),
        _ => return false,
    };
    if segmentation.is_some_and(|feature| features & feature == 0 || gso_size == 0 || !partial) {
        return false;
    }
    header[0] &= NEEDS_CSUM;
    header[10..].fill(0);
    true
}

/// Writes `num_buffers` into the header of a frame for the driver.
pub fn set_buffers(frame: &mut [u8], count: u16) {
    if let Some(field) = frame.get_mut(10..12) {
        field.copy_from_slice(&count.to_le_bytes());
    }
}
