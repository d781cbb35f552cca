/// Everything around the CPUs: port I/O and memory-mapped I/O outside RAM. Called from vCPU threads, several
/// at once; every access comes from a guest and must neither panic nor block for long.
///
/// `data` is 1, 2, 4 or 8 bytes (port I/O: 1, 2 or 4). Where nothing answers, reads are all ones and writes are lost.
pub trait Bus: Send + Sync {
    fn pio_read(&self, port: u16, data: &mut [u8]);
    fn pio_write(&self, port: u16, data: &[u8]);
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// A local APIC ended a level-triggered interrupt with this vector: the IOAPIC re-evaluates its pins.
    fn eoi(&self, vector: u8);
}

/// A bus with nothing on it.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBus;

impl Bus for NoBus {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn eoi(&self, _vector: u8) {}
}
