use std::sync::Arc;

use vireo_devices::virtio::net::Net;
use vireo_packet::{Backend, MacAddress, NetError, Tap, UserNet};

use super::Board;
use crate::{
    config::{NicBackend, NicConfig},
    error::MachineError,
};

/// The first five bytes of a NIC's address, as QEMU's users know them; the last one counts from 0x56.
const MAC_PREFIX: [u8; 5] = [0x52, 0x54, 0x00, 0x12, 0x34];
const FIRST_MAC: u8 = 0x56;

pub(super) fn nics(board: &mut Board<'_>) -> Result<(), MachineError> {
    for (index, nic) in board.config.nics.iter().enumerate() {
        let mac = nic.mac.unwrap_or_else(|| default_mac(index));
        let device = Net::new(&format!("net{index}"), mac, backend(nic)?);
        board.plug(device)?;
    }
    Ok(())
}

fn default_mac(index: usize) -> MacAddress {
    let [a, b, c, d, e] = MAC_PREFIX;
    MacAddress([a, b, c, d, e, FIRST_MAC.wrapping_add(index as u8)])
}

fn backend(nic: &NicConfig) -> Result<Arc<dyn Backend>, MachineError> {
    Ok(match &nic.backend {
        NicBackend::User(config) => UserNet::new((**config).clone())?,
        // One that is made by opening it leads nowhere.
        NicBackend::Tap(name) if !Tap::exists(name)? => return Err(NetError::NoTap(name.clone()).into()),
        NicBackend::Tap(name) => Tap::open(name)?,
    })
}
