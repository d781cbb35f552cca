use std::{io, sync::mpsc, thread::JoinHandle};

use super::{
    host::{Listeners, VsockHost},
    saved::SavedVsock,
    thread::{self, Command, QUEUES},
};
use crate::virtio::{QueueResources, QueueState, VirtioDevice, VirtioError, config, saved, serve::Served};

const DEVICE_TYPE: u16 = 19;
const QUEUE_SIZES: [u16; QUEUES] = [128, 128, 16];
/// `VIRTIO_VSOCK_F_STREAM`
const F_STREAM: u64 = 1 << 0;

/// A virtio socket device with stream connections between guest and host code.
pub struct Vsock {
    guest_cid: u64,
    host: VsockHost,
    thread: Option<JoinHandle<()>>,
}

impl Vsock {
    /// `name` becomes part of the thread's name, for example `vsock0`. A guest's CID is 3 or more
    /// (virtio 1.2, 5.10.4), and fits in 32 bits.
    pub fn new(name: &str, guest_cid: u32) -> io::Result<Self> {
        if guest_cid < 3 || guest_cid == u32::MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{guest_cid} cannot be a guest's CID")));
        }
        let listeners = Listeners::default();
        let guest_cid = u64::from(guest_cid);
        let (commands, thread) = thread::spawn(format!("vireo-{name}"), guest_cid, listeners.clone())?;
        Ok(Self { guest_cid, host: VsockHost { commands, listeners }, thread: Some(thread) })
    }

    /// For host code that talks to the guest; stays of use as long as the device lives.
    pub fn host(&self) -> VsockHost {
        self.host.clone()
    }

    /// Gives a command and waits until the thread has carried it out.
    fn ask<T>(&self, command: impl FnOnce(mpsc::SyncSender<T>) -> Command) -> io::Result<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.host.commands.send(command(reply))?;
        answer.recv().map_err(|_| io::ErrorKind::NotConnected.into())
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start_queue(&mut self, index: usize, resources: QueueResources) -> Result<(), VirtioError> {
        if index >= QUEUES {
            return Err(VirtioError::BadRing);
        }
        let served = Box::new(Served::new(&resources)?);
        let kick = resources.kick;
        let started = self.ask(|reply| Command::Start { index, served, kick, reply });
        started.and_then(|result| result).map_err(VirtioError::Thread)
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        if index >= QUEUES {
            return None;
        }
        self.ask(|reply| Command::Stop { index, reply }).ok()?
    }

    fn reset(&mut self) {
        let _ = self.ask(|reply| Command::Reset { reply });
    }

    fn save(&self) -> Vec<u8> {
        saved::encode(&SavedVsock {})
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), VirtioError> {
        let SavedVsock {} = saved::decode("vsock", bytes)?;
        self.host.commands.send(Command::TellTransportReset).map_err(VirtioError::Thread)
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        let _ = self.host.commands.send(Command::Exit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
