use std::{
    hint,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    DescriptorChain, Queue, QueueError, QueueResources, QueueState, VirtioError,
    worker::{Signals, Worker},
};

/// While the ring stays full: how long finished requests may wait for their interrupt, and the order to stop for us.
const BATCH: Duration = Duration::from_micros(200);

/// A virtqueue with the ways to reach its driver.
pub(super) struct Served {
    pub queue: Queue,
    interrupt: Arc<dyn Fn() + Send + Sync>,
    broken: Arc<dyn Fn() + Send + Sync>,
}

impl Served {
    pub fn new(resources: &QueueResources) -> Result<Self, VirtioError> {
        Ok(Self {
            queue: Queue::new(resources)?,
            interrupt: resources.interrupt.clone(),
            broken: resources.broken.clone(),
        })
    }

    /// Interrupts the driver if it wants to know about what was finished since the last call.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        if self.queue.needs_interrupt()? {
            (self.interrupt)();
        }
        Ok(())
    }

    /// Tells the transport that the driver broke the rules.
    pub fn give_up(&self) {
        (self.broken)();
    }
}

/// Serves requests of one queue.
pub(super) trait Service: Send + 'static {
    /// Serves `chain` and pushes it, or pops and pushes more if that is cheaper together. A chain that was popped
    /// and not served is returned and comes again at once.
    fn serve(&mut self, queue: &mut Queue, chain: DescriptorChain) -> Result<Option<DescriptorChain>, QueueError>;
}

/// Watches the ring for a while before its thread sleeps, if that has paid off lately. A wake-up costs the vCPU
/// a system call and the request a trip through the scheduler; a request that comes at once need not pay for it.
pub(super) struct AdaptivePoll {
    window: Duration,
    max: Duration,
}

impl AdaptivePoll {
    const FIRST: Duration = Duration::from_micros(5);

    pub fn new(max: Duration) -> Self {
        // With one core the one who waits keeps the one who works from working.
        let several = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
        Self { window: Duration::ZERO, max: if several { max } else { Duration::ZERO } }
    }

    /// The thread slept this long: had polling caught that?
    pub fn slept(&mut self, time: Duration) {
        if time <= self.max {
            self.window = (self.window * 2).clamp(Self::FIRST.min(self.max), self.max);
        } else {
            self.window = if self.window > Self::FIRST { self.window / 2 } else { Duration::ZERO };
        }
    }

    pub fn poll(&self, queue: &mut Queue) -> Result<Option<DescriptorChain>, QueueError> {
        if self.window.is_zero() {
            return Ok(None);
        }
        let start = Instant::now();
        while start.elapsed() < self.window {
            if let Some(chain) = queue.pop()? {
                return Ok(Some(chain));
            }
            for _ in 0..32 {
                hint::spin_loop();
            }
        }
        Ok(None)
    }
}

/// Starts a thread that serves a queue whose requests come from the driver alone.
pub(super) fn spawn(
    name: String,
    resources: QueueResources,
    service: impl Service,
    poll: AdaptivePoll,
) -> Result<Worker<QueueState>, VirtioError> {
    let served = Served::new(&resources)?;
    Worker::spawn(name, resources.kick, move |signals| run(served, service, poll, &signals))
}

fn run(mut served: Served, mut service: impl Service, mut poll: AdaptivePoll, signals: &Signals) -> QueueState {
    if try_run(&mut served, &mut service, &mut poll, signals).is_err() {
        served.give_up();
        while !signals.wait(None).stop {}
    }
    served.queue.state()
}

fn try_run(
    served: &mut Served,
    service: &mut impl Service,
    poll: &mut AdaptivePoll,
    signals: &Signals,
) -> Result<(), QueueError> {
    loop {
        served.queue.disable_notification()?;
        let mut next = served.queue.pop()?;
        while let Some(chain) = next {
            if drain(served, service, chain, signals)? {
                return Ok(());
            }
            next = poll.poll(&mut served.queue)?;
        }
        if served.queue.enable_notification()? {
            continue;
        }
        let asleep = Instant::now();
        let wake = signals.wait(None);
        if wake.stop {
            return Ok(());
        }
        poll.slept(asleep.elapsed());
    }
}

/// Serves requests from `first` on until the ring is empty; returns whether the thread shall stop.
fn drain(
    served: &mut Served,
    service: &mut impl Service,
    first: DescriptorChain,
    signals: &Signals,
) -> Result<bool, QueueError> {
    let mut since = Instant::now();
    let mut next = Some(first);
    while let Some(chain) = next {
        next = service.serve(&mut served.queue, chain)?;
        if since.elapsed() > BATCH {
            served.signal()?;
            if next.is_none() && signals.stopped() {
                return Ok(true);
            }
            since = Instant::now();
        }
        if next.is_none() {
            next = served.queue.pop()?;
        }
    }
    served.signal()?;
    Ok(false)
}
