use std::sync::Mutex;

use super::*;

/// Reads give the offset of each byte; writes are kept.
#[derive(Default)]
struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

impl Mmio for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = offset as u8 + i as u8;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

impl BytePorts for Mutex<Vec<(u16, u8)>> {
    fn read_port(&self, offset: u16) -> u8 {
        offset as u8
    }
    fn write_port(&self, offset: u16, value: u8) {
        self.lock().unwrap().push((offset, value));
    }
}

#[test]
fn accesses_reach_their_device_and_are_cut_at_its_end() {
    let (low, high) = (Arc::new(Probe::default()), Arc::new(Probe::default()));
    let mut bus = DeviceBus::default();
    bus.add_mmio(0x1000, 0x10, low.clone()).unwrap();
    bus.add_mmio(u64::MAX - 3, 4, high.clone()).unwrap();
    let read = |gpa| {
        let mut data = [0; 4];
        bus.mmio_read(gpa, &mut data);
        data
    };
    assert_eq!(read(0x1004), [4, 5, 6, 7]);
    assert_eq!(read(0x100e), [14, 15, 0xff, 0xff]);
    assert_eq!(read(0xffe), [0xff, 0xff, 0, 1]);
    assert_eq!(read(0x1010), [0xff; 4]);
    assert_eq!(read(u64::MAX - 1), [2, 3, 0xff, 0xff]);
    bus.mmio_write(0x1008, &[1, 2, 3, 4]);
    bus.mmio_write(0x100f, &[5, 6]);
    assert_eq!(*low.0.lock().unwrap(), [(8, vec![1, 2, 3, 4]), (15, vec![5])]);
    bus.mmio_write(0x2000, &[1]);
    bus.mmio_read(0x1000, &mut []);
}

#[test]
fn byte_ports_see_bytes() {
    let device = Arc::new(Mutex::new(Vec::new()));
    let mut bus = DeviceBus::default();
    bus.add_ports(0xfffe..=0xffff, device.clone()).unwrap();
    let mut data = [0; 2];
    bus.pio_read(0xfffe, &mut data);
    assert_eq!(data, [0, 1]);
    bus.pio_write(0xfffe, &[7, 8, 9, 10]);
    assert_eq!(*device.lock().unwrap(), [(0, 7), (1, 8)]);
}

#[test]
fn ranges_must_not_meet() {
    let mut bus = DeviceBus::default();
    let probe = Arc::new(Probe::default());
    bus.add_mmio(0x1000, 0x1000, probe.clone()).unwrap();
    for (start, bytes) in [(0x1fff, 1), (0, 0x1001), (0x1800, 1), (0, u64::MAX), (0x5000, 0), (u64::MAX, 2)] {
        assert!(bus.add_mmio(start, bytes, probe.clone()).is_err(), "{start:#x}+{bytes:#x}");
    }
    bus.add_mmio(0x2000, 0x1000, probe.clone()).unwrap();
    bus.add_mmio(0, 0x1000, probe).unwrap();
}
