//! Runs cases on the host CPU, in a child process that can do nothing else.
//!
//! The child lives in its signal handler: it fills in the next case's registers in the signal frame and returns;
//! the kernel loads them, the instruction runs, and INT3 behind it (or the fault it caused) comes back with the
//! registers after it. So a case sees every register at a value of its own, the stack pointer too.

use std::{
    io, ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use super::case::{CODE, CODE_BYTES, Case, DATA, DATA_END, Mode, Outcome, State, WINDOW, WINDOW_BYTES};

/// Cases in one child.
pub const BATCH: usize = 128;

#[repr(C)]
struct Slot {
    code: [u8; CODE_BYTES],
    length: u64,
    narrow: bool,
    before: State,
    after: State,
    memory: [u8; WINDOW_BYTES],
    vector: u64,
    error: u64,
    address: u64,
    done: bool,
}

#[repr(C)]
struct Shared {
    next: AtomicU64,
    count: u64,
    slots: [Slot; BATCH],
}

/// A child's way of telling: memory that parent and child share.
pub struct Host {
    shared: *mut Shared,
}

impl Host {
    pub fn new() -> io::Result<Self> {
        // SAFETY: a fresh anonymous mapping.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { shared: at.cast() }) }
    }

    /// What the host makes of the cases, at most [`BATCH`]; `None` where the child died of one.
    pub fn run(&mut self, cases: &[Case]) -> io::Result<Vec<Option<Outcome>>> {
        assert!(cases.len() <= BATCH);
        // SAFETY: zeroed memory is a valid `Shared`; no child is running now.
        let shared = unsafe { &mut *self.shared };
        for (slot, case) in shared.slots.iter_mut().zip(cases) {
            slot.code[..case.code.len()].copy_from_slice(&case.code);
            slot.length = case.code.len() as u64;
            slot.narrow = case.mode == Mode::Bits32;
            slot.before = case.state;
            slot.memory = *case.memory;
            slot.done = false;
        }
        shared.count = cases.len() as u64;
        shared.next.store(0, Ordering::SeqCst);
        loop {
            self.one_child()?;
            // SAFETY: the child is gone.
            let shared = unsafe { &mut *self.shared };
            if shared.next.load(Ordering::SeqCst) >= shared.count {
                break;
            }
            // The child died of the case it was at: leave it out and go on behind it.
            shared.next.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: as above.
        let shared = unsafe { &*self.shared };
        Ok(shared.slots[..cases.len()].iter().map(outcome).collect())
    }

    fn one_child(&mut self) -> io::Result<()> {
        // SAFETY: the child calls nothing but system calls and its own handler, all of it async-signal-safe.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => child(self.shared),
            pid => {
                let mut status = 0;
                // SAFETY: `pid` is the child just made.
                while unsafe { libc::waitpid(pid, &mut status, 0) } < 0 {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) > 1 {
                    let what = ["", "", "mapping", "signals", "seccomp"][libc::WEXITSTATUS(status) as usize & 3];
                    return Err(io::Error::other(format!("the sandboxed child cannot be set up: {what}")));
                }
                Ok(())
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, not used any more.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

fn outcome(slot: &Slot) -> Option<Outcome> {
    let finished = slot.vector == 3;
    slot.done.then(|| Outcome {
        vector: (!finished).then_some(slot.vector as u8),
        page_fault: (slot.vector == 14).then_some((slot.error, slot.address)),
        state: slot.after,
        memory: Box::new(slot.memory),
    })
}

static mut SHARED: *mut Shared = ptr::null_mut();
static mut STARTED: bool = false;

const STACK_BYTES: usize = 128 << 10;

fn child(shared: *mut Shared) -> ! {
    // SAFETY: single-threaded from here on; all mappings are new or fixed at addresses that the parent's address
    // space leaves free (low, below the executable and heap of a position-independent binary).
    unsafe {
        SHARED = shared;
        let fixed = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let code = libc::mmap(CODE as *mut _, 4096, rw | libc::PROT_EXEC, fixed, -1, 0);
        let data = libc::mmap(DATA as *mut _, (DATA_END - DATA) as usize, rw, fixed, -1, 0);
        let stack = libc::mmap(ptr::null_mut(), STACK_BYTES, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        if code as u64 != CODE || data as u64 != DATA || stack == libc::MAP_FAILED {
            libc::_exit(2);
        }
        ptr::write_bytes(CODE as *mut u8, 0xcc, 4096);
        let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK_BYTES };
        libc::sigaltstack(&alternate, ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE] {
            if libc::sigaction(signal, &action, ptr::null_mut()) != 0 {
                libc::_exit(3);
            }
        }
        libc::alarm(20);
        if !seal() {
            libc::_exit(4);
        }
        // Long mode leaves these empty; 32-bit code wants the flat segment in them.
        core::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", "int3", in(reg) 0x2b);
        libc::_exit(5)
    }
}

/// From here on only returning from signals and exiting are allowed.
fn seal() -> bool {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUALS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let filter = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        filter(LOAD_NUMBER, 0, 0, 0),
        filter(EQUALS, 2, 0, libc::SYS_rt_sigreturn as u32),
        filter(EQUALS, 1, 0, libc::SYS_exit_group as u32),
        filter(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        filter(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program outlives the call.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    }
}

/// `gregs` index of each general register in encoding order.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Linux' selectors for user code and data.
const CS64: i64 = 0x33;
const CS32: i64 = 0x23;
const SELECTORS: i64 = 0x2b << 48;

extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel's frame, on a stack of its own; the shared slots are this process' alone while it runs.
    unsafe {
        let shared = &mut *SHARED;
        let context = &mut (*context).uc_mcontext;
        let registers = &mut context.gregs;
        let fx = context.fpregs.cast::<u8>();
        // The standard XSAVE format: legacy area, header, upper halves of YMM.
        let upper = fx.add(576).cast::<[[u64; 2]; 16]>();
        let next = shared.next.load(Ordering::Relaxed);
        if STARTED {
            let slot = &mut shared.slots[next as usize];
            slot.vector = registers[libc::REG_TRAPNO as usize] as u64;
            slot.error = registers[libc::REG_ERR as usize] as u64;
            slot.address = registers[libc::REG_CR2 as usize] as u64;
            for (value, at) in slot.after.gpr.iter_mut().zip(GREGS) {
                *value = registers[at as usize] as u64;
            }
            slot.after.rip = registers[libc::REG_RIP as usize] as u64 - u64::from(slot.vector == 3);
            slot.after.rflags = registers[libc::REG_EFL as usize] as u64;
            ptr::copy_nonoverlapping(fx, slot.after.fx.as_mut_ptr(), 512);
            slot.after.upper = if *fx.add(512) & 4 != 0 { *upper } else { [[0; 2]; 16] };
            if *fx.add(512) & 2 == 0 {
                slot.after.fx[160..416].fill(0);
            }
            if *fx.add(512) & 1 == 0 {
                slot.after.fx[..24].fill(0);
                slot.after.fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
                slot.after.fx[32..160].fill(0);
            }
            ptr::copy_nonoverlapping(WINDOW as *const u8, slot.memory.as_mut_ptr(), WINDOW_BYTES);
            slot.done = true;
            shared.next.store(next + 1, Ordering::SeqCst);
        }
        STARTED = true;
        let next = shared.next.load(Ordering::Relaxed);
        if next >= shared.count {
            libc::syscall(libc::SYS_exit_group, 0);
        }
        let slot = &shared.slots[next as usize];
        ptr::copy_nonoverlapping(slot.memory.as_ptr(), WINDOW as *mut u8, WINDOW_BYTES);
        ptr::write_bytes(CODE as *mut u8, 0xcc, 4096);
        ptr::copy_nonoverlapping(slot.code.as_ptr(), slot.before.rip as *mut u8, slot.length as usize);
        for (value, at) in slot.before.gpr.iter().zip(GREGS) {
            registers[at as usize] = *value as i64;
        }
        registers[libc::REG_RIP as usize] = slot.before.rip as i64;
        registers[libc::REG_EFL as usize] = slot.before.rflags as i64;
        registers[libc::REG_CSGSFS as usize] = if slot.narrow { CS32 } else { CS64 } | SELECTORS;
        // Bytes 464 and up are the kernel's notes about the frame.
        ptr::copy_nonoverlapping(slot.before.fx.as_ptr(), fx, 416);
        *upper = slot.before.upper;
        *fx.add(512) |= 7;
    }
}
