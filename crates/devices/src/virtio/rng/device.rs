use std::{io, time::Duration};

use super::saved::SavedRng;
use crate::virtio::{
    DescriptorChain, Queue, QueueError, QueueResources, QueueState, VirtioDevice, VirtioError, saved,
    serve::{self, AdaptivePoll, Service},
    worker::Worker,
};

const DEVICE_TYPE: u16 = 4;
const QUEUE_SIZES: [u16; 1] = [64];
/// What one request gets at most, a multiple of the pieces; a driver that wants more asks again.
const MAX_BYTES: u64 = 64 << 10;
const PIECE_BYTES: usize = 4096;

/// A virtio entropy device over the host's `getrandom(2)`.
pub struct Rng {
    name: String,
    worker: Option<Worker<QueueState>>,
}

impl Rng {
    /// `name` becomes part of the thread's name, for example `rng0`.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), worker: None }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), VirtioError> {
        if index != 0 {
            return Err(VirtioError::BadRing);
        }
        let name = format!("vireo-{}", self.name);
        self.worker = Some(serve::spawn(name, resources, Entropy, AdaptivePoll::new(Duration::ZERO))?);
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        if index == 0 { self.worker.take()?.stop() } else { None }
    }

    fn reset(&mut self) {}

    fn save(&self) -> Vec<u8> {
        saved::encode(&SavedRng {})
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), VirtioError> {
        saved::decode::<SavedRng>("rng", bytes).map(|_| ())
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.stop_queue(0);
    }
}

struct Entropy;

impl Service for Entropy {
    fn serve(&mut self, queue: &mut Queue, chain: DescriptorChain) -> Result<Option<DescriptorChain>, QueueError> {
        let written = fill(&chain).unwrap_or(0);
        queue.push(chain, written).map(|()| None)
    }
}

/// Fills the chain, up to [`MAX_BYTES`]; returns how many bytes it got.
fn fill(chain: &DescriptorChain) -> io::Result<u32> {
    let mut writer = chain.writer();
    let mut piece = [0; PIECE_BYTES];
    while writer.remaining() > 0 && writer.position() < MAX_BYTES {
        let len = writer.remaining().min(PIECE_BYTES as u64) as usize;
        random(&mut piece[..len])?;
        writer.write(&piece[..len]);
    }
    Ok(writer.position() as u32)
}

fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the pointer and length are those of a slice that we may write.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => done += got,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
