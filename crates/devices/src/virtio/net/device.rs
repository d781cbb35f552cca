use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use vireo_packet::{Backend, MacAddress};

use super::{
    control::Control,
    link::{Link, Shared},
    rx,
    saved::SavedNet,
    tx::Transmit,
};
use crate::virtio::{
    QueueResources, QueueState, VirtioDevice, VirtioError, config, saved,
    serve::{self, AdaptivePoll},
    worker::Worker,
};

const DEVICE_TYPE: u16 = 1;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// Frames of one TCP window follow each other about this fast.
const MAX_POLL: Duration = Duration::from_micros(20);

/// Feature bits, virtio 1.2, 5.1.3.
pub(super) mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
}

const STATUS_LINK_UP: u16 = 1;

/// A virtio network device over any backend.
pub struct Net {
    name: String,
    /// The address to come back to on reset.
    mac: MacAddress,
    shared: Arc<Shared>,
    workers: [Option<Worker<QueueState>>; 3],
}

impl Net {
    /// `name` becomes part of the threads' names, for example `net0`.
    pub fn new(name: &str, mac: MacAddress, backend: Arc<dyn Backend>) -> Self {
        Self { name: name.into(), mac, shared: Arc::new(Shared::new(backend, mac)), workers: [None, None, None] }
    }

    pub fn link(&self) -> Link {
        Link(self.shared.clone())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        use feature::*;
        let offloads = self.shared.backend.offloads();
        let optional = [
            (self.shared.backend.mtu().is_some(), MTU),
            (offloads.checksum_in, CSUM),
            (offloads.checksum_in && offloads.segmentation_in, HOST_TSO4 | HOST_TSO6),
            (offloads.checksum_out, GUEST_CSUM | CTRL_GUEST_OFFLOADS),
            (offloads.checksum_out && offloads.segmentation_out, GUEST_TSO4 | GUEST_TSO6),
        ];
        let offered: u64 = optional.iter().filter(|(able, _)| *able).map(|(_, bits)| bits).sum();
        offered | MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.shared.settings().mac.0);
        let status = if self.shared.up.load(Ordering::Acquire) { STATUS_LINK_UP } else { 0 };
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        space[10..].copy_from_slice(&self.shared.backend.mtu().unwrap_or(0).to_le_bytes());
        config::read(&space, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Nothing in it is writable for a driver of virtio 1.0 and up: it sets the address by the control queue.
    }

    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), VirtioError> {
        let name = |queue| format!("vireo-{}-{queue}", self.name);
        let (features, config_changed) = (resources.features, resources.config_changed.clone());
        self.shared.started(features, config_changed);
        let shared = self.shared.clone();
        let asleep = AdaptivePoll::new(Duration::ZERO);
        let worker = match index {
            RECEIVE => rx::spawn(name("rx"), resources, shared)?,
            TRANSMIT => {
                let service = Transmit::new(shared, features);
                serve::spawn(name("tx"), resources, service, AdaptivePoll::new(MAX_POLL))?
            }
            CONTROL => serve::spawn(name("ctl"), resources, Control(shared), asleep)?,
            _ => return Err(VirtioError::BadRing),
        };
        self.workers[index] = Some(worker);
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        let state = self.workers.get_mut(index)?.take()?.stop();
        if self.workers.iter().all(Option::is_none) {
            self.shared.stopped();
        }
        state
    }

    fn reset(&mut self) {
        let mut settings = self.shared.settings();
        settings.mac = self.mac;
        settings.features = 0;
        settings.guest_offloads = None;
    }

    fn save(&self) -> Vec<u8> {
        let settings = self.shared.settings();
        saved::encode(&SavedNet {
            mac: settings.mac.0,
            link_up: self.shared.up.load(Ordering::Acquire),
            guest_offloads: settings.guest_offloads,
        })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), VirtioError> {
        let saved: SavedNet = saved::decode("net", bytes)?;
        let mut settings = self.shared.settings();
        settings.mac = MacAddress(saved.mac);
        settings.guest_offloads = saved.guest_offloads;
        self.shared.up.store(saved.link_up, Ordering::Release);
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for index in 0..self.workers.len() {
            self.stop_queue(index);
        }
    }
}
