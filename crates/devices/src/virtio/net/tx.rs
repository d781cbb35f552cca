use std::{
    io::IoSlice,
    sync::{Arc, atomic::Ordering},
};

use super::{
    header::{self, MAX_FRAME_BYTES},
    link::Shared,
};
use crate::virtio::{DescriptorChain, Queue, QueueError, serve::Service};

/// Serves the transmit queue.
///
/// Frames are copied once before anyone looks at them: the guest cannot change them between check and use.
pub(super) struct Transmit {
    shared: Arc<Shared>,
    features: u64,
    frame: Box<[u8]>,
}

impl Transmit {
    pub fn new(shared: Arc<Shared>, features: u64) -> Self {
        Self { shared, features, frame: vec![0; MAX_FRAME_BYTES].into() }
    }

    fn send(&mut self, chain: &DescriptorChain) {
        if chain.readable_bytes() > MAX_FRAME_BYTES as u64 || !self.shared.up.load(Ordering::Acquire) {
            return;
        }
        let len = chain.reader().read(&mut self.frame);
        let frame = &mut self.frame[..len];
        if header::admit(frame, self.features) {
            // A frame that cannot be sent is lost, as on a wire.
            let _ = self.shared.backend.send(&[IoSlice::new(frame)]);
        }
    }
}

impl Service for Transmit {
    fn serve(&mut self, queue: &mut Queue, chain: DescriptorChain) -> Result<Option<DescriptorChain>, QueueError> {
        self.send(&chain);
        queue.push(chain, 0).map(|()| None)
    }
}
