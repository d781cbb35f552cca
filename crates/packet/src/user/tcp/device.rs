//! The stack's view of the link: one packet in, and as many out as there is room for.

use std::num::NonZeroUsize;

use smoltcp::{
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
};

use crate::{
    Offloads,
    user::{
        config::LARGEST_MTU,
        link::{Link, PACKET_START},
    },
};

pub(crate) struct FlowDevice<'a> {
    pub link: &'a mut Link,
    /// The packet to process next.
    pub packet: Option<&'a [u8]>,
    /// Payload bytes of a segment that the guest can take.
    pub segment: usize,
}

pub(crate) fn capabilities(offloads: Offloads) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = LARGEST_MTU.into();
    // What the guest sends did not cross a wire, and with offloads its checksums are not even complete.
    capabilities.checksum.ipv4 = Checksum::Tx;
    capabilities.checksum.tcp = if offloads.checksum_out { Checksum::None } else { Checksum::Tx };
    if offloads.segmentation_out && offloads.checksum_out {
        let largest = NonZeroUsize::new(LARGEST_MTU.into());
        capabilities.segmentation.tcpv4 = largest;
        capabilities.segmentation.tcpv6 = largest;
    }
    capabilities
}

impl Device for FlowDevice<'_> {
    type RxToken<'t>
        = Incoming<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Outgoing<'t>
    where
        Self: 't;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        let packet = self.packet.take()?;
        Some((Incoming(packet), Outgoing { link: self.link, segment: self.segment }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        self.link.has_room().then_some(Outgoing { link: self.link, segment: self.segment })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.link.offloads)
    }
}

pub(crate) struct Incoming<'a>(&'a [u8]);

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, process: F) -> R {
        process(self.0)
    }
}

pub(crate) struct Outgoing<'a> {
    link: &'a mut Link,
    segment: usize,
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; PACKET_START + length];
        let result = fill(&mut frame[PACKET_START..]);
        self.link.send_tcp(frame, self.segment);
        result
    }
}
