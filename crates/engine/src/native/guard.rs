//! Faults inside stubs, on their way out of the host and into the guest.
//!
//! A stub is meant not to fault, with one exception: SIMD exceptions that the guest has unmasked are left to the
//! host's own detection. Should any other instruction turn out to fault on this host after all, the guest gets the
//! exception and the VMM lives. Signal handlers for the faults are installed once per process; what does not come
//! from a stub goes on to the handler that was there before.
//!
//! A stub has nothing on the stack but its return address, or RBX and then that, so that leaving one half-way
//! is easy: nothing is stored before its instruction has succeeded.

use std::{
    cell::Cell,
    io, ptr,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

/// What stopped a stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// x86 exception vector.
    pub(super) vector: u8,
    /// MXCSR at the fault: for vector 19 with the flags that the exception set.
    pub(super) mxcsr: u32,
}

thread_local! {
    static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Whether the stub that this thread ran last was stopped; says so once.
#[inline(always)]
pub(super) fn take() -> Option<Fault> {
    FAULT.with(|fault| if fault.get().is_none() { None } else { fault.take() })
}

/// Executable views: start address and end, 0 for a free place. A handler can read them at any time.
static VIEWS: [[AtomicUsize; 2]; 256] = [const { [AtomicUsize::new(0), AtomicUsize::new(0)] }; 256];

/// A view's entry in [`VIEWS`].
pub(super) struct Registration(usize);

impl Registration {
    /// Makes faults in this range recoverable. The view starts with a bitmap of where functions begin, a bit for
    /// every `ALIGN` bytes of it.
    pub(super) fn new(start: usize, bytes: usize) -> io::Result<Self> {
        install()?;
        for (i, [from, to]) in VIEWS.iter().enumerate() {
            if from.compare_exchange(0, start, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                to.store(start + bytes, Ordering::SeqCst);
                return Ok(Self(i));
            }
        }
        Err(io::Error::other("too many stub caches in one process"))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        VIEWS[self.0][1].store(0, Ordering::SeqCst);
        VIEWS[self.0][0].store(0, Ordering::SeqCst);
    }
}

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// The handlers that were there before ours.
static PREVIOUS: OnceLock<Result<[libc::sigaction; SIGNALS.len()], i32>> = OnceLock::new();

fn install() -> io::Result<()> {
    let result = PREVIOUS.get_or_init(|| {
        // SAFETY: all-zero is a valid `sigaction`.
        let mut previous: [libc::sigaction; SIGNALS.len()] = unsafe { std::mem::zeroed() };
        if !cfg!(target_arch = "x86_64") {
            return Ok(previous);
        }
        for (signal, old) in SIGNALS.into_iter().zip(&mut previous) {
            // SAFETY: as above; the handler has the signature that SA_SIGINFO asks for.
            let done = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigaction(signal, &action, old)
            };
            if done != 0 {
                return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
            }
        }
        Ok(previous)
    });
    result.as_ref().map(|_| ()).map_err(|code| io::Error::from_raw_os_error(*code))
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's arguments to an SA_SIGINFO handler.
    if unsafe { leave_stub(context) } {
        return;
    }
    let previous = PREVIOUS.get().and_then(|p| p.as_ref().ok()).zip(SIGNALS.iter().position(|s| *s == signal));
    let old = previous.map(|(all, i)| all[i]);
    // SAFETY: calls the handler that was installed before, as the kernel would have, or puts the default action
    // back: the instruction then faults again, for good.
    unsafe {
        match old {
            Some(old) if old.sa_sigaction > 1 && old.sa_flags & libc::SA_SIGINFO != 0 => {
                let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(old.sa_sigaction);
                call(signal, info, context);
            }
            Some(old) if old.sa_sigaction > 1 => {
                let call: extern "C" fn(libc::c_int) = std::mem::transmute(old.sa_sigaction);
                call(signal);
            }
            _ => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, ptr::null_mut());
            }
        }
    }
}

/// If the interrupted code is a stub: notes the fault and lets the stub's caller go on.
///
/// # Safety
/// `context` is a signal handler's.
#[cfg(target_arch = "x86_64")]
unsafe fn leave_stub(context: *mut libc::c_void) -> bool {
    const PUSH_RBX: u8 = 0x53;
    // SAFETY: the caller's word.
    let machine = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext };
    let rip = machine.gregs[libc::REG_RIP as usize] as usize;
    let view = VIEWS.iter().find_map(|[from, to]| {
        let (from, to) = (from.load(Ordering::SeqCst), to.load(Ordering::SeqCst));
        (from <= rip && rip < to).then_some(from)
    });
    let Some(view) = view else { return false };
    let mut unit = (rip - view) / super::arena::ALIGN;
    // SAFETY: the bitmap lies at the start of a mapped, readable view; the first function lies behind it, so that
    // the search ends. A faulting instruction comes after a pushed RBX, and the stack is as the module says.
    unsafe {
        while *((view + unit / 8) as *const u8) >> (unit % 8) & 1 == 0 {
            if unit == 0 {
                return false;
            }
            unit -= 1;
        }
        let mut stack = machine.gregs[libc::REG_RSP as usize] as *const i64;
        if *((view + unit * super::arena::ALIGN) as *const u8) == PUSH_RBX {
            machine.gregs[libc::REG_RBX as usize] = *stack;
            stack = stack.add(1);
        }
        machine.gregs[libc::REG_RIP as usize] = *stack;
        machine.gregs[libc::REG_RSP as usize] = stack.add(1) as i64;
    }
    let vector = machine.gregs[libc::REG_TRAPNO as usize] as u8;
    // SAFETY: where the kernel saved no floating-point state the pointer is null.
    let mxcsr = unsafe { machine.fpregs.as_ref() }.map_or(0, |fp| fp.mxcsr);
    FAULT.with(|fault| fault.set(Some(Fault { vector, mxcsr })));
    true
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn leave_stub(_: *mut libc::c_void) -> bool {
    false
}
