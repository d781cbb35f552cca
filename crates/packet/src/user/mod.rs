//! The user-mode network: a router with DHCP, DNS and NAT for one virtual machine, in one thread and without root.
//!
//! TCP ends in a smoltcp socket here and goes on in a socket of the host; UDP and pings likewise. Everything that the
//! guest sends is hostile: queues, tables and buffers are bounded, and nothing is sent in another's name.

mod buffer;
mod checksum;
mod config;
mod dhcp;
mod forward;
mod fragment;
mod icmp;
mod link;
mod neighbor;
mod packet;
mod ping;
mod poller;
mod queues;
mod resolver;
mod route;
mod shared;
mod slots;
mod stack;
mod tcp;
mod udp;

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

pub use self::config::{Forward, ForwardError, Protocol, Subnet, SubnetError, UserNetConfig};
use self::{queues::Queues, stack::Stack};
use crate::{Backend, NetError, Offloads};

/// A user-mode network with its thread. Dropping it ends the thread and closes all connections.
pub struct UserNet {
    queues: Arc<Queues>,
    gauges: Arc<Gauges>,
    forwards: Vec<Forward>,
    mtu: u16,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What goes on in a [`UserNet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserNetStats {
    pub tcp_connections: usize,
    pub udp_flows: usize,
    pub frames_lost_from_guest: u64,
    pub frames_lost_to_guest: u64,
}

#[derive(Default)]
pub(crate) struct Gauges {
    tcp: AtomicUsize,
    udp: AtomicUsize,
}

impl Gauges {
    fn set(&self, tcp: usize, udp: usize) {
        self.tcp.store(tcp, Ordering::Relaxed);
        self.udp.store(udp, Ordering::Relaxed);
    }
}

impl UserNet {
    /// Binds the forwarded ports and starts the network.
    pub fn new(config: UserNetConfig) -> Result<Arc<Self>, NetError> {
        config.check()?;
        let setup = |what| move |source| NetError::Setup { what, source };
        let queues = Arc::new(Queues::new().map_err(setup("creating an eventfd"))?);
        let gauges = Arc::new(Gauges::default());
        let listeners = forward::bind_all(&config)?;
        let forwards = listeners.iter().map(|listener| listener.forward).collect();
        let mtu = config.mtu;
        let stack = Stack::new(config, listeners, queues.clone(), gauges.clone())?;
        let thread = thread::Builder::new()
            .name("net-user".into())
            .spawn(move || stack.run())
            .map_err(setup("starting its thread"))?;
        Ok(Arc::new(Self { queues, gauges, forwards, mtu, thread: Mutex::new(Some(thread)) }))
    }

    /// The port forwards, with the ports that the host chose where the configuration said 0.
    pub fn forwards(&self) -> &[Forward] {
        &self.forwards
    }

    pub fn stats(&self) -> UserNetStats {
        UserNetStats {
            tcp_connections: self.gauges.tcp.load(Ordering::Relaxed),
            udp_flows: self.gauges.udp.load(Ordering::Relaxed),
            frames_lost_from_guest: self.queues.losses.from_guest.load(Ordering::Relaxed),
            frames_lost_to_guest: self.queues.losses.to_guest.load(Ordering::Relaxed),
        }
    }
}

impl Drop for UserNet {
    fn drop(&mut self) {
        self.queues.stop();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

impl Backend for UserNet {
    fn send(&self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        self.queues.push_inbound(frame);
        Ok(())
    }

    fn recv(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
        Ok(self.queues.pop_outbound(buffers))
    }

    fn readable(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as the queues live, which is as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.queues.readable().as_raw_fd()) }
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum_in: true, checksum_out: true, segmentation_in: true, segmentation_out: true }
    }

    fn set_offloads(&self, negotiated: Offloads) {
        self.queues.set_offloads(negotiated);
    }

    fn mtu(&self) -> Option<u16> {
        Some(self.mtu)
    }
}

/// Fills `bytes` from the kernel's random number generator.
pub(crate) fn random_bytes(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        // SAFETY: the pointer and the length are those of one mutable slice.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}
