use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    connection::Answer,
    host::Listeners,
    muxer::{FIRST_TOKEN, Muxer},
};
use crate::virtio::{QueueError, QueueState, serve::Served};

/// Receive, transmit and event queue (virtio 1.2, 5.10.2).
pub const QUEUES: usize = 3;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7)
const TRANSPORT_RESET: u32 = 0;

const WAKE: u64 = 0;
/// Token of queue 0's notifications; the others follow.
const KICK: u64 = 1;

/// What others ask of the device's thread.
pub enum Command {
    Start {
        index: usize,
        served: Box<Served>,
        kick: EventFd,
        reply: SyncSender<io::Result<()>>,
    },
    Stop {
        index: usize,
        reply: SyncSender<Option<QueueState>>,
    },
    Connect {
        port: u32,
        deadline: Instant,
        answer: Answer,
    },
    /// The driver forgot all connections.
    Reset {
        reply: SyncSender<()>,
    },
    /// The driver does not know yet that its connections are gone.
    TellTransportReset,
    Exit,
}

/// The way to the device's thread.
#[derive(Clone)]
pub struct Commands {
    sender: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Commands {
    pub fn send(&self, command: Command) -> io::Result<()> {
        self.sender.send(command).map_err(|_| io::ErrorKind::NotConnected)?;
        self.wake.write(1)
    }
}

/// Starts the thread that serves a device's queues and connections, without any yet.
pub fn spawn(name: String, guest_cid: u64, listeners: Listeners) -> io::Result<(Commands, JoinHandle<()>)> {
    let epoll = Arc::new(Epoll::new()?);
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    add(&epoll, &wake, WAKE)?;
    let (sender, commands) = mpsc::channel();
    let muxer = Muxer::new(guest_cid, epoll.clone(), listeners);
    let pump = Pump { epoll, commands, queues: Default::default(), muxer, transport_reset: false };
    let thread = thread::Builder::new().name(name).spawn(move || pump.run())?;
    Ok((Commands { sender, wake }, thread))
}

/// Edge-triggered: every write to an eventfd is an edge, so that a wake-up costs no read.
fn add(epoll: &Epoll, fd: &EventFd, token: u64) -> io::Result<()> {
    let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
}

struct RunningQueue {
    served: Box<Served>,
    kick: EventFd,
    /// The driver broke its rules; it is left alone until it is stopped.
    broken: bool,
}

struct Pump {
    epoll: Arc<Epoll>,
    commands: Receiver<Command>,
    queues: [Option<RunningQueue>; QUEUES],
    muxer: Muxer,
    transport_reset: bool,
}

impl Pump {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 64];
        let mut busy = false;
        loop {
            let timeout = if busy { 0 } else { self.timeout() };
            let ready = self.epoll.wait(timeout, &mut events).unwrap_or(0);
            for event in &events[..ready] {
                if event.data() >= FIRST_TOKEN {
                    self.muxer.event(event.data(), event.event_set());
                }
            }
            if events[..ready].iter().any(|event| event.data() == WAKE) && !self.obey() {
                return;
            }
            if self.muxer.next_deadline().is_some() {
                self.muxer.expire(Instant::now());
            }
            busy = self.serve();
        }
    }

    /// Milliseconds until the next deadline, rounded up; -1 for none.
    fn timeout(&self) -> i32 {
        self.muxer.next_deadline().map_or(-1, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            i32::try_from(left + 1).unwrap_or(i32::MAX)
        })
    }

    /// Carries out all commands; `false` if the thread shall end.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start { index, served, kick, reply } => {
                    let started = add(&self.epoll, &kick, KICK + index as u64);
                    if started.is_ok() {
                        self.queues[index] = Some(RunningQueue { served, kick, broken: false });
                    }
                    let _ = reply.send(started);
                }
                Command::Stop { index, reply } => {
                    let _ = reply.send(self.stop(index));
                }
                Command::Connect { port, deadline, answer } => self.muxer.connect(port, deadline, answer),
                Command::Reset { reply } => {
                    self.muxer.reset();
                    self.transport_reset = false;
                    let _ = reply.send(());
                }
                Command::TellTransportReset => self.transport_reset = true,
                Command::Exit => return false,
            }
        }
        true
    }

    fn stop(&mut self, index: usize) -> Option<QueueState> {
        let queue = self.queues[index].take()?;
        // By name: the descriptor is a duplicate, so closing it would not remove it.
        let _ = self.epoll.ctl(ControlOperation::Delete, queue.kick.as_raw_fd(), EpollEvent::default());
        Some(queue.served.queue.state())
    }

    /// Does what can be done now on each queue; `true` if there is more.
    fn serve(&mut self) -> bool {
        let muxer = &mut self.muxer;
        let transport_reset = &mut self.transport_reset;
        let [receive, transmit, event] = &mut self.queues;
        let from_guest = guarded(transmit, |served| take_packets(served, muxer));
        let to_guest = guarded(receive, |served| give_packets(served, muxer));
        let event = guarded(event, |served| tell_transport_reset(served, transport_reset));
        // A transmit queue that had to wait for the receive queue may go on once that has moved.
        let stalled = from_guest == Progress::Stalled && muxer.accepts();
        stalled || [from_guest, to_guest, event].contains(&Progress::More)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The driver will notify us.
    Done,
    /// There is more to do at once.
    More,
    /// It depends on another queue.
    Stalled,
}

fn guarded(
    queue: &mut Option<RunningQueue>,
    serve: impl FnOnce(&mut Served) -> Result<Progress, QueueError>,
) -> Progress {
    let Some(queue) = queue.as_mut().filter(|queue| !queue.broken) else { return Progress::Done };
    serve(&mut queue.served).unwrap_or_else(|_| {
        queue.broken = true;
        queue.served.give_up();
        Progress::Done
    })
}

/// Sleep until the driver notifies us, unless it has added something meanwhile.
fn rest(served: &mut Served) -> Result<Progress, QueueError> {
    served.signal()?;
    Ok(if served.queue.enable_notification()? { Progress::More } else { Progress::Done })
}

fn take_packets(served: &mut Served, muxer: &mut Muxer) -> Result<Progress, QueueError> {
    served.queue.disable_notification()?;
    for _ in 0..served.queue.size() {
        if !muxer.accepts() {
            served.signal()?;
            return Ok(Progress::Stalled);
        }
        let Some(chain) = served.queue.pop()? else { return rest(served) };
        muxer.receive(&chain);
        served.queue.push(chain, 0)?;
    }
    served.signal()?;
    Ok(Progress::More)
}

fn give_packets(served: &mut Served, muxer: &mut Muxer) -> Result<Progress, QueueError> {
    served.queue.disable_notification()?;
    for _ in 0..served.queue.size() {
        if !muxer.has_packet() {
            served.signal()?;
            return Ok(Progress::Done);
        }
        let Some(chain) = served.queue.pop()? else { return rest(served) };
        let written = muxer.send(&chain);
        served.queue.push(chain, written)?;
    }
    served.signal()?;
    Ok(Progress::More)
}

fn tell_transport_reset(served: &mut Served, pending: &mut bool) -> Result<Progress, QueueError> {
    if !*pending {
        return Ok(Progress::Done);
    }
    let Some(chain) = served.queue.pop()? else { return rest(served) };
    let written = chain.writer().write(&TRANSPORT_RESET.to_le_bytes());
    *pending = written < size_of_val(&TRANSPORT_RESET);
    served.queue.push(chain, written as u32)?;
    rest(served)
}
