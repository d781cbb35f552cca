use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    time::{Duration, Instant},
};

use super::thread::{Command, Commands};

/// Connections from the guest that wait to be accepted; more are refused.
const BACKLOG: usize = 64;

/// `VMADDR_PORT_ANY`: no port.
const ANY_PORT: u32 = u32::MAX;

/// The ports that host code listens on.
#[derive(Clone, Default)]
pub(super) struct Listeners(Arc<Mutex<HashMap<u32, SyncSender<UnixStream>>>>);

impl Listeners {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, SyncSender<UnixStream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn has(&self, port: u32) -> bool {
        self.lock().contains_key(&port)
    }

    /// Hands a new connection to who listens on `port`; `false` if nobody does or too many wait already.
    pub fn offer(&self, port: u32, stream: UnixStream) -> bool {
        let mut listeners = self.lock();
        match listeners.get(&port).map(|listener| listener.try_send(stream)) {
            Some(Ok(())) => true,
            Some(Err(TrySendError::Disconnected(_))) => {
                listeners.remove(&port);
                false
            }
            Some(Err(TrySendError::Full(_))) | None => false,
        }
    }
}

/// The host's side of a [`super::Vsock`]: opens connections to the guest and accepts them. Cheap to clone.
#[derive(Clone)]
pub struct VsockHost {
    pub(super) commands: Commands,
    pub(super) listeners: Listeners,
}

impl VsockHost {
    /// Connects to `port` in the guest. Waits, up to `timeout`, for the guest's driver to appear and to answer;
    /// `ConnectionRefused` if nobody listens there (yet), `TimedOut` if there is no answer.
    pub fn connect(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        let (answer, answered) = mpsc::sync_channel(1);
        let deadline = Instant::now() + timeout;
        self.commands.send(Command::Connect { port, deadline, answer })?;
        // The thread keeps the deadline; a little more is only for the case that it is held up.
        match answered.recv_timeout(timeout + Duration::from_secs(1)) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Listens on a port of the host, until the listener is dropped. `AddrInUse` if someone does already.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        if port == ANY_PORT {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.listeners.lock().entry(port) {
            Entry::Occupied(_) => Err(io::ErrorKind::AddrInUse.into()),
            Entry::Vacant(slot) => {
                let (streams, incoming) = mpsc::sync_channel(BACKLOG);
                slot.insert(streams);
                Ok(VsockListener { port, incoming, listeners: self.listeners.clone() })
            }
        }
    }
}

/// Accepts connections that the guest opens to one port of the host.
pub struct VsockListener {
    port: u32,
    incoming: Receiver<UnixStream>,
    listeners: Listeners,
}

impl VsockListener {
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The next connection; `TimedOut` if none comes in time.
    pub fn accept(&self, timeout: Duration) -> io::Result<UnixStream> {
        self.incoming.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
            RecvTimeoutError::Disconnected => io::ErrorKind::NotConnected.into(),
        })
    }

    /// All connections to come, for a loop that lives as long as the device.
    pub fn incoming(&self) -> &Receiver<UnixStream> {
        &self.incoming
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.listeners.lock().remove(&self.port);
    }
}
