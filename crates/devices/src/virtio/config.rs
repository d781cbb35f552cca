/// Reads a device configuration space; what lies past its end reads as zero.
pub(super) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|at| space.get(at..)).unwrap_or_default();
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
    data[len..].fill(0);
}
