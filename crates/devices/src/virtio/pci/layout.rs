//! What the function looks like on the bus: one BAR with all structures, and the capabilities that point into it.

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

use crate::pci::{BarKind, ConfigSpace, Identity};

/// So that the MSI-X table fits into its part of the BAR.
pub const MAX_QUEUES: usize = 512;

const BAR_BYTES: u64 = 0x8000;
pub const NOTIFY_STRIDE: u64 = 4;
/// Drivers notify with the 16-bit index of the queue (virtio 1.2, 4.1.5.2).
pub const NOTIFY_BYTES: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

/// Where each structure is in the BAR, and its size.
const REGIONS: [(Region, u64, u64); 6] = [
    (Region::Common, 0x0000, 0x1000),
    (Region::Isr, 0x1000, 0x1000),
    (Region::Device, 0x2000, 0x1000),
    (Region::Notify, 0x3000, 0x1000),
    (Region::MsixTable, 0x4000, 0x3000),
    (Region::MsixPending, 0x7000, 0x1000),
];

fn place(region: Region) -> (u64, u64) {
    let found = REGIONS.iter().find(|entry| entry.0 == region);
    found.map_or((0, 0), |(_, start, bytes)| (*start, *bytes))
}

/// The structure at an offset in the BAR, and the offset in it.
pub fn region(offset: u64) -> Option<(Region, u64)> {
    let found = REGIONS.iter().find(|(_, start, bytes)| (*start..start + bytes).contains(&offset));
    found.map(|(region, start, _)| (*region, offset - start))
}

pub fn notify_offset(queue: usize) -> u64 {
    place(Region::Notify).0 + NOTIFY_STRIDE * queue as u64
}

pub fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

const VENDOR: u16 = 0x1af4;
/// Virtio 1.2, 4.1.2: device id 0x1040 and up by device type, revision at least 1.
const FIRST_DEVICE: u16 = 0x1040;
/// Class by device type; others are "unassigned".
const CLASSES: [(u16, u32); 5] = [(1, 0x02_00_00), (2, 0x01_80_00), (3, 0x07_80_00), (4, 0x10_80_00), (19, 0x07_80_00)];
const CLASS_UNASSIGNED: u32 = 0xff_00_00;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

// Virtio 1.2, 4.1.4: `cfg_type`
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// A function's configuration space and where to find things in it.
pub struct Space {
    pub config: ConfigSpace,
    pub msix_at: u16,
    pub access_at: u16,
}

/// The configuration space of a device with so many queues.
pub fn space(device_type: u16, queues: usize) -> Space {
    let class = CLASSES.iter().find(|entry| entry.0 == device_type).map_or(CLASS_UNASSIGNED, |entry| entry.1);
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + device_type,
        subsystem_vendor: VENDOR,
        subsystem: FIRST_DEVICE + device_type,
        class,
        revision: 1,
    });
    config.add_bar(0, BAR_BYTES, BarKind::Memory32);

    // Message control (enable and mask-all are writable), table and PBA with BAR 0 in the low bits.
    let mut msix = (queues as u16).to_le_bytes().to_vec();
    msix.extend((place(Region::MsixTable).0 as u32).to_le_bytes());
    msix.extend((place(Region::MsixPending).0 as u32).to_le_bytes());
    let msix_at = config.add_capability(CAP_MSIX, &msix, &[0, 0xc0]);

    let structures = [(CFG_COMMON, Region::Common), (CFG_ISR, Region::Isr), (CFG_DEVICE, Region::Device)];
    for (kind, region) in structures {
        let (start, bytes) = place(region);
        config.add_capability(CAP_VENDOR, &capability(kind, start, bytes, &[]), &[]);
    }
    let (start, _) = place(Region::Notify);
    let notify = capability(CFG_NOTIFY, start, NOTIFY_STRIDE * queues as u64, &(NOTIFY_STRIDE as u32).to_le_bytes());
    config.add_capability(CAP_VENDOR, &notify, &[]);
    let access = capability(CFG_PCI, 0, 0, &[0; 4]);
    // BAR, offset, length and the data window are the driver's.
    let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let access_at = config.add_capability(CAP_VENDOR, &access, &writable);
    Space { config, msix_at, access_at }
}

/// A `virtio_pci_cap` without its first two bytes.
fn capability(kind: u8, start: u64, bytes: u64, more: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + more.len()) as u8, kind, 0, 0, 0, 0];
    body.extend((start as u32).to_le_bytes());
    body.extend((bytes as u32).to_le_bytes());
    body.extend(more);
    body
}

/// An access to the BAR by way of configuration space (virtio 1.2, 4.1.4.9).
pub struct Access {
    /// Where the data window is in configuration space.
    pub window: u16,
    /// Offset in the BAR.
    pub offset: u64,
    /// 1, 2 or 4
    pub len: usize,
}

impl Access {
    /// What the capability at `at` says, if the configuration access at `offset` meets its data window.
    pub fn of(config: &ConfigSpace, at: u16, offset: u16, len: usize) -> Option<Self> {
        let window = at + 16;
        if offset >= window + 4 || usize::from(offset) + len <= usize::from(window) {
            return None;
        }
        let mut bar = [0];
        config.read(at + 4, &mut bar);
        let (offset, len) = (u64::from(config.read_u32(at + 8)), config.read_u32(at + 12));
        let valid = bar[0] == 0 && matches!(len, 1 | 2 | 4) && offset + u64::from(len) <= BAR_BYTES;
        valid.then_some(Self { window, offset, len: len as usize })
    }
}
