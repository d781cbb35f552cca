//! The local APIC timer (Intel SDM vol. 3, 11.5.4): one-shot, periodic and TSC-deadline.
//!
//! Each timer is a timerfd, which its vCPU sets directly, and one thread per machine that sleeps on all of them and
//! raises [`request::TIMER`] where one is due. An idle guest costs nothing; setting a timer is one system call,
//! and none when the one before it was set for earlier (the thread then finds nothing due and goes on waiting).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc},
    thread::{self, JoinHandle},
};

use super::{LocalApic, local::lvt};
use crate::{
    clock::VcpuClock,
    signal::{VcpuSignal, request},
};

/// The shortest period that a periodic timer really has. The input clock is 1 GHz, as KVM and CPUID leaf 0x15 say:
/// a guest can ask for any number of nanoseconds.
const MIN_PERIOD_NS: u64 = 20_000;

/// LVT timer modes.
mod mode {
    pub const PERIODIC: u32 = 1;
    pub const TSC_DEADLINE: u32 = 2;
}

#[derive(Debug, Default)]
struct State {
    mode: u32,
    initial_count: u32,
    divide: u32,
    /// IA32_TSC_DEADLINE; 0 when disarmed or past.
    deadline: u64,
    /// When to interrupt, in [`crate::clock::Clock::ns`].
    due: Option<u64>,
    /// When the timerfd fires; at or before `due`.
    armed: Option<u64>,
    /// Nanoseconds between interrupts of a periodic timer.
    period: u64,
}

#[derive(Debug)]
pub(super) struct Timer {
    fd: OwnedFd,
    signal: Arc<VcpuSignal>,
    clock: Arc<VcpuClock>,
    state: Mutex<State>,
}

impl Timer {
    pub fn new(signal: Arc<VcpuSignal>, clock: Arc<VcpuClock>) -> io::Result<Arc<Self>> {
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Arc::new(Self { fd, signal, clock, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Disarms and goes back to one-shot mode.
    pub fn stop(&self) {
        let mut state = self.state();
        *state = State { armed: state.armed, ..State::default() };
    }

    pub fn set_mode(&self, new: u32) {
        let mut state = self.state();
        // Between count modes the timer goes on; to or from TSC-deadline mode it is disarmed (11.5.4.1).
        if (state.mode == mode::TSC_DEADLINE) != (new == mode::TSC_DEADLINE) {
            state.due = None;
            state.deadline = 0;
            state.initial_count = 0;
        }
        state.mode = new;
    }

    /// Input clocks per count (figure 11-10): bits 0, 1 and 3 are log2 of it less one, 7 being 1.
    fn divider(state: &State) -> u64 {
        1 << (((state.divide & 3 | state.divide >> 1 & 4) + 1) & 7)
    }

    pub fn divide(&self) -> u32 {
        self.state().divide
    }

    pub fn set_divide(&self, value: u32) {
        let mut state = self.state();
        let count = self.remaining(&state);
        state.divide = value;
        if state.due.is_some() && state.mode != mode::TSC_DEADLINE {
            state.period = u64::from(state.initial_count) * Self::divider(&state);
            let due = self.clock.vm().ns() + count * Self::divider(&state);
            self.arm(&mut state, due);
        }
    }

    pub fn initial_count(&self) -> u32 {
        self.state().initial_count
    }

    pub fn set_initial_count(&self, value: u32) {
        self.state().initial_count = value;
    }

    /// Writing the initial count starts the timer, 0 stops it; in TSC-deadline mode it is ignored.
    pub fn start_count(&self, value: u32) {
        let mut state = self.state();
        if state.mode == mode::TSC_DEADLINE {
            return;
        }
        state.initial_count = value;
        self.start(&mut state, value);
    }

    /// Lets `count` run down to the next interrupt.
    fn start(&self, state: &mut State, count: u32) {
        state.period = u64::from(state.initial_count) * Self::divider(state);
        if count == 0 {
            state.due = None;
            return;
        }
        let due = self.clock.vm().ns() + u64::from(count) * Self::divider(state);
        self.arm(state, due);
    }

    /// Counts left, rounded up.
    fn remaining(&self, state: &State) -> u64 {
        match state.due {
            Some(due) if state.mode != mode::TSC_DEADLINE => {
                due.saturating_sub(self.clock.vm().ns()).div_ceil(Self::divider(state))
            }
            _ => 0,
        }
    }

    pub fn current_count(&self) -> u32 {
        let state = self.state();
        let left = self.remaining(&state);
        if left == 0 && state.due.is_some() && state.mode == mode::PERIODIC && state.period != 0 {
            // Due but not handled yet: the next period runs already.
            let late = self.clock.vm().ns().saturating_sub(state.due.unwrap_or(0));
            return ((state.period - late % state.period) / Self::divider(&state)) as u32;
        }
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    /// IA32_TSC_DEADLINE; 0 outside TSC-deadline mode and once it is past.
    pub fn deadline(&self) -> u64 {
        self.state().deadline
    }

    pub fn set_deadline(&self, value: u64) {
        let mut state = self.state();
        if state.mode != mode::TSC_DEADLINE {
            return;
        }
        state.deadline = value;
        self.arm_deadline(&mut state);
    }

    fn arm_deadline(&self, state: &mut State) {
        if state.deadline == 0 {
            state.due = None;
            return;
        }
        let ticks = state.deadline.saturating_sub(self.clock.tsc());
        let wait = if ticks == 0 { 0 } else { self.clock.vm().ns_of_ticks(ticks) };
        let due = self.clock.vm().ns().saturating_add(wait);
        self.arm(state, due);
    }

    /// The vCPU's TSC was written.
    pub fn tsc_changed(&self) {
        let mut state = self.state();
        if state.mode == mode::TSC_DEADLINE {
            self.arm_deadline(&mut state);
        }
    }

    fn arm(&self, state: &mut State, due: u64) {
        state.due = Some(due);
        let now = self.clock.vm().ns();
        if due <= now {
            self.signal.raise(request::TIMER);
        } else if state.armed.is_none_or(|armed| armed > due) {
            self.set_fd(due - now);
            state.armed = Some(due);
        }
    }

    fn set_fd(&self, ns: u64) {
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let after = libc::timespec {
            // a century is never for a timer whose deadline is checked again when it fires
            tv_sec: (ns / 1_000_000_000).min(100 * 365 * 86_400) as libc::time_t,
            tv_nsec: (ns % 1_000_000_000) as libc::c_long,
        };
        let spec = libc::itimerspec { it_interval: zero, it_value: after };
        // SAFETY: the descriptor is a timerfd that lives as long as `self`; `spec` is valid.
        unsafe { libc::timerfd_settime(self.fd.as_raw_fd(), 0, &spec, ptr::null_mut()) };
    }

    /// The timerfd fired: raise the request, or wait on where the timer was moved meanwhile.
    fn fired(&self) {
        let mut count = [0u8; 8];
        // SAFETY: reads at most the length of `count`; the descriptor does not block.
        unsafe { libc::read(self.fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        let mut state = self.state();
        let now = self.clock.vm().ns();
        // A vCPU may have set it anew between the expiry and here.
        if state.armed.is_some_and(|armed| armed > now) {
            if let Some(due) = state.due {
                self.set_fd(due.saturating_sub(now).max(1));
                state.armed = Some(due);
            }
            return;
        }
        state.armed = None;
        if let Some(due) = state.due {
            self.arm(&mut state, due);
        }
    }

    /// Takes what is due; whether the LVT's vector is to be delivered. Sets a periodic timer anew.
    fn take_due(&self) -> bool {
        let mut state = self.state();
        let now = self.clock.vm().ns();
        match state.due {
            None => return false,
            Some(due) if due > now => {
                self.arm(&mut state, due);
                return false;
            }
            Some(due) => {
                state.due = None;
                state.deadline = 0;
                if state.mode == mode::PERIODIC && state.period != 0 {
                    // Interrupts that nobody could take are lost, as in hardware; the phase stays. A guest that
                    // asks for nanoseconds gets what a host can do.
                    let period = state.period.max(MIN_PERIOD_NS);
                    let next = now + period - (now - due) % period;
                    self.arm(&mut state, next);
                }
            }
        }
        true
    }
}

/// The state of a timer as it is saved.
pub(super) struct TimerState {
    pub mode: u32,
    pub divide: u32,
    pub initial_count: u32,
    pub current_count: u32,
    pub deadline: u64,
}

impl Timer {
    /// A count that ran out and was not handled yet is saved as 1: it is due at once again when restored.
    pub fn save(&self) -> TimerState {
        let state = self.state();
        let counting = state.due.is_some() && state.mode != mode::TSC_DEADLINE;
        let left = u32::try_from(self.remaining(&state)).unwrap_or(u32::MAX);
        TimerState {
            mode: state.mode,
            divide: state.divide,
            initial_count: state.initial_count,
            current_count: if counting { left.max(1) } else { 0 },
            deadline: state.deadline,
        }
    }

    pub fn restore(&self, saved: &TimerState) {
        let mut state = self.state();
        *state = State {
            mode: saved.mode,
            divide: saved.divide & 0xb,
            initial_count: saved.initial_count,
            deadline: if saved.mode == mode::TSC_DEADLINE { saved.deadline } else { 0 },
            armed: state.armed,
            ..State::default()
        };
        match saved.mode {
            mode::TSC_DEADLINE => self.arm_deadline(&mut state),
            _ => self.start(&mut state, saved.current_count),
        }
    }
}

impl LocalApic {
    /// To be called on [`request::TIMER`]: delivers the timer's vector if it is due.
    pub fn timer_due(&self) {
        if self.timer.take_due() {
            self.deliver_local(lvt::TIMER);
        }
    }

    /// To be called when the vCPU's TSC was written.
    pub fn tsc_changed(&self) {
        self.timer.tsc_changed();
    }
}

/// The thread that sleeps until one of a machine's timers is due. Ends when dropped.
#[derive(Debug)]
pub(super) struct TimerThread {
    epoll: Arc<OwnedFd>,
    stop: OwnedFd,
    timers: mpsc::Sender<(u64, Weak<Timer>)>,
    thread: Option<JoinHandle<()>>,
}

/// `epoll_event.u64` of the descriptor that says stop; timers have their file descriptor's number.
const STOP: u64 = u64::MAX;

impl TimerThread {
    pub fn start() -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: as above.
        let stop = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        add(&epoll, &stop, STOP)?;
        let (timers, new) = mpsc::channel();
        let epoll = Arc::new(epoll);
        let waits = epoll.clone();
        let thread =
            thread::Builder::new().name("apic-timer".into()).stack_size(64 << 10).spawn(move || run(&waits, &new))?;
        Ok(Self { epoll, stop, timers, thread: Some(thread) })
    }

    pub fn watch(&self, timer: &Arc<Timer>) -> io::Result<()> {
        let key = timer.fd.as_raw_fd() as u64;
        // The thread learns of the timer before its first event can come.
        let _ = self.timers.send((key, Arc::downgrade(timer)));
        add(&self.epoll, &timer.fd, key)
    }
}

impl Drop for TimerThread {
    fn drop(&mut self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes the eight bytes of `one` to an eventfd.
        unsafe { libc::write(self.stop.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        // The last owner of the bus can be a timer's own thread only if someone upgraded there: nobody does.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn add(epoll: &OwnedFd, fd: &OwnedFd, key: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: key };
    // SAFETY: both descriptors are open; `event` is valid.
    let done = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &mut event) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn run(epoll: &OwnedFd, new: &mpsc::Receiver<(u64, Weak<Timer>)>) {
    let mut timers: Vec<(u64, Weak<Timer>)> = Vec::new();
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    loop {
        // SAFETY: `events` has room for as many events as are asked for.
        let count =
            unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as libc::c_int, -1) };
        timers.extend(new.try_iter());
        for event in &events[..usize::try_from(count).unwrap_or(0)] {
            let key = event.u64;
            if key == STOP {
                return;
            }
            timers.retain(|(_, timer)| timer.strong_count() > 0);
            if let Some(timer) = timers.iter().find(|(k, _)| *k == key).and_then(|(_, timer)| timer.upgrade()) {
                timer.fired();
            }
        }
    }
}
