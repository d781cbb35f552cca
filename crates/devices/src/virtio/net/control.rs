use std::sync::Arc;

use vireo_packet::MacAddress;

use super::{device::feature::CTRL_GUEST_OFFLOADS, link::Shared};
use crate::virtio::{DescriptorChain, Queue, QueueError, Reader, ShortChain, serve::Service};

const OK: u8 = 0;
const ERROR: u8 = 1;
/// Addresses in one table of `VIRTIO_NET_CTRL_MAC_TABLE_SET`; a driver with more wants all frames anyway.
const MAX_TABLE: u32 = 1024;

/// Serves the control queue (virtio 1.2, 5.1.6.5).
pub(super) struct Control(pub Arc<Shared>);

impl Service for Control {
    fn serve(&mut self, queue: &mut Queue, chain: DescriptorChain) -> Result<Option<DescriptorChain>, QueueError> {
        let ack = match self.command(chain.reader()) {
            Ok(true) => OK,
            Ok(false) | Err(_) => ERROR,
        };
        let written = chain.writer().write(&[ack]);
        queue.push(chain, written as u32).map(|()| None)
    }
}

impl Control {
    /// Whether the command was carried out.
    fn command(&mut self, mut reader: Reader<'_>) -> Result<bool, ShortChain> {
        let class: u8 = reader.read_pod()?;
        let command: u8 = reader.read_pod()?;
        match (class, command) {
            // CTRL_RX: promiscuous and all-multicast. The backend has one guest behind it and filters nothing,
            // which 5.1.6.5.1 allows: the driver gets at least what it asks for.
            (0, 0 | 1) => reader.read_pod::<u8>().map(|on| on <= 1),
            (1, 0) => {
                let unicast = skip_table(&mut reader)?;
                let multicast = skip_table(&mut reader)?;
                Ok(unicast && multicast)
            }
            (1, 1) => {
                let mac: [u8; 6] = reader.read_pod()?;
                self.0.settings().mac = MacAddress(mac);
                Ok(true)
            }
            (5, 0) => {
                let offloads = u64::from_le(reader.read_pod()?);
                Ok(self.set_guest_offloads(offloads))
            }
            _ => Ok(false),
        }
    }

    fn set_guest_offloads(&self, offloads: u64) -> bool {
        let mut settings = self.0.settings();
        let known = settings.features & CTRL_GUEST_OFFLOADS != 0 && offloads & !settings.features == 0;
        if known {
            settings.guest_offloads = Some(offloads);
            self.0.apply_offloads(&settings);
        }
        known
    }
}

/// `struct virtio_net_ctrl_mac`: a count and as many addresses.
fn skip_table(reader: &mut Reader<'_>) -> Result<bool, ShortChain> {
    let entries = u32::from_le(reader.read_pod()?);
    reader.skip(6 * u64::from(entries))?;
    Ok(entries <= MAX_TABLE)
}
