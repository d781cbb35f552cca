//! The two bounded queues between the device's threads and the router's thread.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;

use crate::{Offloads, virtio_header};

/// Header, Ethernet header and the largest IP packet.
pub(crate) const LARGEST_FRAME: usize = virtio_header::LEN + 14 + 65535;
const SMALLEST_FRAME: usize = virtio_header::LEN + 14;

const INBOUND_FRAMES: usize = 4096;
const INBOUND_BYTES: usize = 8 << 20;
/// Up to here bulk data is queued; more waits in the sockets' buffers.
const OUTBOUND_FRAMES: usize = 256;
const OUTBOUND_BYTES: usize = 2 << 20;
/// Answers that cannot wait (ARP, RST, DHCP …) may go this far beyond.
const OUTBOUND_EXTRA_FRAMES: usize = 128;
const OUTBOUND_EXTRA_BYTES: usize = 1 << 20;

#[derive(Default)]
struct Inbound {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

#[derive(Default)]
struct Outbound {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The router has more to send and wants to be woken when half of the queue is free.
    router_waits: bool,
}

impl Outbound {
    fn has_room(&self) -> bool {
        self.frames.len() < OUTBOUND_FRAMES && self.bytes < OUTBOUND_BYTES
    }

    fn half_empty(&self) -> bool {
        self.frames.len() <= OUTBOUND_FRAMES / 2 && self.bytes <= OUTBOUND_BYTES / 2
    }
}

/// How many frames were lost, for metrics.
#[derive(Default)]
pub(crate) struct Losses {
    pub from_guest: AtomicU64,
    pub to_guest: AtomicU64,
}

pub(crate) struct Queues {
    inbound: Mutex<Inbound>,
    outbound: Mutex<Outbound>,
    /// Readable while `outbound` holds a frame.
    readable: EventFd,
    /// Wakes the router from its sleep.
    wake: EventFd,
    asleep: AtomicBool,
    stop: AtomicBool,
    offloads: Mutex<Offloads>,
    offloads_changed: AtomicBool,
    pub losses: Losses,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while a lock is held cannot leave a queue half changed, so a poisoned one is as good as any.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queues {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            inbound: Mutex::default(),
            outbound: Mutex::default(),
            readable: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            offloads: Mutex::default(),
            offloads_changed: AtomicBool::new(false),
            losses: Losses::default(),
        })
    }

    pub(crate) fn readable(&self) -> &EventFd {
        &self.readable
    }

    pub(crate) fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    /// From the guest. A frame that is no frame or finds no room is lost.
    pub(crate) fn push_inbound(&self, pieces: &[IoSlice<'_>]) {
        let length: usize = pieces.iter().map(|piece| piece.len()).fold(0, usize::saturating_add);
        if !(SMALLEST_FRAME..=LARGEST_FRAME).contains(&length) || !lock(&self.inbound).has_room_for(length) {
            self.losses.from_guest.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut frame = Vec::with_capacity(length);
        for piece in pieces {
            frame.extend_from_slice(piece);
        }
        {
            let mut inbound = lock(&self.inbound);
            inbound.bytes += length;
            inbound.frames.push_back(frame);
        }
        self.wake_router();
    }

    /// Takes all that came from the guest, in exchange for an empty queue.
    pub(crate) fn take_inbound(&self, taken: &mut VecDeque<Vec<u8>>) {
        let mut inbound = lock(&self.inbound);
        inbound.bytes = 0;
        mem::swap(&mut inbound.frames, taken);
    }

    /// Whether bulk data may be queued for the guest.
    pub(crate) fn outbound_has_room(&self) -> bool {
        lock(&self.outbound).has_room()
    }

    /// To the guest. Lost if even the reserve is used up.
    pub(crate) fn push_outbound(&self, frame: Vec<u8>) {
        let mut outbound = lock(&self.outbound);
        if outbound.frames.len() >= OUTBOUND_FRAMES + OUTBOUND_EXTRA_FRAMES
            || outbound.bytes >= OUTBOUND_BYTES + OUTBOUND_EXTRA_BYTES
        {
            self.losses.to_guest.fetch_add(1, Ordering::Relaxed);
            return;
        }
        outbound.bytes += frame.len();
        outbound.frames.push_back(frame);
        if outbound.frames.len() == 1 {
            // Cannot fail: the counter is at most 1. The lock keeps it in step with the queue.
            let _ = self.readable.write(1);
        }
    }

    /// The next frame for the guest; one that does not fit is lost.
    pub(crate) fn pop_outbound(&self, buffers: &mut [IoSliceMut<'_>]) -> Option<usize> {
        let room: usize = buffers.iter().map(|buffer| buffer.len()).fold(0, usize::saturating_add);
        loop {
            let (frame, wake) = {
                let mut outbound = lock(&self.outbound);
                let frame = outbound.frames.pop_front()?;
                outbound.bytes -= frame.len();
                if outbound.frames.is_empty() {
                    let _ = self.readable.read();
                }
                let wake = outbound.router_waits && outbound.half_empty();
                outbound.router_waits &= !wake;
                (frame, wake)
            };
            if wake {
                self.wake_router();
            }
            if frame.len() <= room {
                scatter(&frame, buffers);
                return Some(frame.len());
            }
            self.losses.to_guest.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Asks to be woken once there is room again; returns false if there is room already.
    pub(crate) fn wait_for_room(&self) -> bool {
        let mut outbound = lock(&self.outbound);
        outbound.router_waits = !outbound.half_empty();
        outbound.router_waits
    }

    /// Before the router sleeps: from now on whoever has something for it wakes it. False if there is work already.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        let idle = lock(&self.inbound).frames.is_empty()
            && !self.stop.load(Ordering::SeqCst)
            && !self.offloads_changed.load(Ordering::SeqCst);
        if !idle {
            self.asleep.store(false, Ordering::SeqCst);
        }
        idle
    }

    pub(crate) fn wake_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    fn wake_router(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            let _ = self.wake.write(1);
        }
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.wake.write(1);
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    pub(crate) fn set_offloads(&self, offloads: Offloads) {
        *lock(&self.offloads) = offloads;
        self.offloads_changed.store(true, Ordering::SeqCst);
        self.wake_router();
    }

    /// What the driver negotiated, if that changed since the last call.
    pub(crate) fn changed_offloads(&self) -> Option<Offloads> {
        self.offloads_changed.swap(false, Ordering::SeqCst).then(|| *lock(&self.offloads))
    }
}

impl Inbound {
    fn has_room_for(&self, length: usize) -> bool {
        self.frames.len() < INBOUND_FRAMES && self.bytes + length <= INBOUND_BYTES
    }
}

fn scatter(mut frame: &[u8], buffers: &mut [IoSliceMut<'_>]) {
    for buffer in buffers {
        let (now, later) = frame.split_at(frame.len().min(buffer.len()));
        buffer[..now.len()].copy_from_slice(now);
        frame = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize) -> Vec<u8> {
        (0..length).map(|i| i as u8).collect()
    }

    fn is_readable(queues: &Queues) -> bool {
        use std::os::fd::AsRawFd;
        let mut poll = libc::pollfd { fd: queues.readable.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, which outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }

    #[test]
    fn readable_is_level_triggered() {
        let queues = Queues::new().unwrap();
        assert!(!is_readable(&queues));
        queues.push_outbound(frame(60));
        queues.push_outbound(frame(61));
        assert!(is_readable(&queues));
        let (mut one, mut two) = ([0; 50], [0; 50]);
        let mut buffers = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
        assert_eq!(queues.pop_outbound(&mut buffers), Some(60));
        assert!(is_readable(&queues));
        assert_eq!(queues.pop_outbound(&mut buffers), Some(61));
        assert!(!is_readable(&queues));
        assert_eq!(queues.pop_outbound(&mut buffers), None);
        assert_eq!([one, two].concat()[..61], frame(61));
    }

    #[test]
    fn a_frame_beyond_the_buffers_is_dropped() {
        let queues = Queues::new().unwrap();
        queues.push_outbound(frame(101));
        queues.push_outbound(frame(99));
        let mut one = [0; 100];
        assert_eq!(queues.pop_outbound(&mut [IoSliceMut::new(&mut one)]), Some(99));
        assert_eq!(queues.losses.to_guest.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn both_queues_are_bounded() {
        let queues = Queues::new().unwrap();
        let one = frame(60_000);
        for _ in 0..2000 {
            queues.push_inbound(&[IoSlice::new(&one)]);
            queues.push_outbound(one.clone());
        }
        assert!(lock(&queues.inbound).bytes <= INBOUND_BYTES);
        assert!(lock(&queues.outbound).bytes <= OUTBOUND_BYTES + OUTBOUND_EXTRA_BYTES + 60_000);
        queues.push_inbound(&[]);
        queues.push_inbound(&[IoSlice::new(&frame(LARGEST_FRAME + 1))]);
    }
}
