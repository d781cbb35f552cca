//! Getting a vCPU thread out of KVM_RUN, from any thread and at any time.
//!
//! Three things together leave no gap: a flag that outlives the call, KVM's `immediate_exit` byte for a kick
//! that comes just before KVM_RUN, and a signal for one that comes during it.

use std::{
    io, mem,
    os::fd::AsRawFd,
    ptr,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vireo_cpu::{CpuError, Kick};

const PAGE: usize = 4096;

fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: libc::c_int) {}

/// The signal must have a handler, or it would end the process. Device code on a vCPU thread restarts its
/// system calls (SA_RESTART); KVM_RUN returns EINTR all the same.
pub(crate) fn install_signal_handler() -> Result<(), CpuError> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: an all-zero sigaction is a valid one; the handler touches nothing.
        let result = unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal(), &action, ptr::null_mut())
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    });
    done.map_err(|e| CpuError::Host { what: "installing the vCPU signal", source: io::Error::from_raw_os_error(e) })
}

pub(crate) struct Kicker {
    pending: AtomicBool,
    /// The thread inside `run`, if one is.
    thread: Mutex<Option<libc::pthread_t>>,
    run: RunPage,
}

/// Our own view of the vCPU's `kvm_run`, so that no reference of kvm-ioctls' is in the way.
struct RunPage(*mut libc::c_void);

// SAFETY: only the `immediate_exit` byte is touched, as an atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn new(fd: &VcpuFd) -> Result<Self, CpuError> {
        // SAFETY: a new mapping of the first page of the vCPU's file; the result is checked.
        let page = unsafe {
            libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        if page == libc::MAP_FAILED {
            return Err(CpuError::Host { what: "mapping a vCPU's run structure", source: io::Error::last_os_error() });
        }
        Ok(Self(page))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped for as long as `self`, and the byte lies within it.
        unsafe { AtomicU8::from_ptr(self.0.cast::<u8>().add(mem::offset_of!(kvm_run, immediate_exit))) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length.
        unsafe { libc::munmap(self.0, PAGE) };
    }
}

impl Kicker {
    pub fn new(fd: &VcpuFd) -> Result<Self, CpuError> {
        Ok(Self { pending: AtomicBool::new(false), thread: Mutex::new(None), run: RunPage::new(fd)? })
    }

    /// From here until the guard is dropped, kicks reach this thread.
    pub fn enter(&self) -> Entered<'_> {
        unblock_signal();
        // SAFETY: always succeeds.
        let me = unsafe { libc::pthread_self() };
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(me);
        self.run.immediate_exit().store(self.pending.load(Ordering::SeqCst).into(), Ordering::SeqCst);
        Entered(self)
    }

    /// After KVM_RUN returned EINTR: was that us? Takes the kick. The order matters: a kick that comes in
    /// between raises the byte again and is seen at the next entry at the latest.
    pub fn take(&self) -> bool {
        self.run.immediate_exit().store(0, Ordering::SeqCst);
        self.pending.swap(false, Ordering::SeqCst)
    }
}

pub(crate) struct Entered<'a>(&'a Kicker);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *self.0.thread.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn unblock_signal() {
    // SAFETY: the set is initialised before use; only this thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.pending.store(true, Ordering::SeqCst);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = *thread {
            self.run.immediate_exit().store(1, Ordering::SeqCst);
            // SAFETY: the thread is alive: it cannot leave `run` without taking the lock that we hold.
            unsafe { libc::pthread_kill(thread, signal()) };
        }
    }
}
