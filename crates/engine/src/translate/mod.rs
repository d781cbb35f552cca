//! The translator: hot blocks as host machine code.
//!
//! A block that ran often enough is translated ([`block`]): instructions are copied, with guest registers renamed to
//! the host registers that stand for them and memory operands replaced by an inline look-up in the soft TLB. What
//! cannot be copied is left to the interpreter's handler, one instruction at a time ([`leave`]).
//!
//! While translated code runs
//! * thirteen guest registers live in host registers ([`HOST`]), the other three in [`Regs`](crate::regs::Regs);
//!   RAX and R15 are scratch, GS points at the [`Cpu`], RSP is the host's stack;
//! * the status flags are in the host's at places that the translator knows, and in [`Regs`](crate::regs::Regs) at
//!   the start of every block and at every instruction that may fault or leave: nothing is ever guessed;
//! * vectors and MXCSR are in the host's registers while [`State::vectors`] says so;
//! * the linear address of the running code is [`State::page`] plus a constant: translations belong to
//!   guest-physical code, whatever it is mapped at.
//!
//! Jumps within a page are patched to lead from translation to translation; all others look their target up in the
//! table of the current address space and privilege, in line. Code that was written to is cut off at its entry.

mod access;
mod apart;
pub mod block;
mod calls;
pub mod code;
mod copy;
pub mod emit;
mod flags;
mod jump;
pub mod leave;
mod operand;
mod outline;
mod privileged;
pub mod span;
mod special;
mod strings;
mod thunks;
pub mod window;

use std::sync::atomic::AtomicU32;

use vireo_cpu::Segment;

use crate::{
    cache::Block,
    uop::{Ctl, Uop},
};

/// The host register that each guest register lives in; `None`: in memory.
///
/// The three are those that compilers take last.
pub const HOST: [Option<u8>; 16] = [
    Some(12),
    Some(1),
    Some(2),
    Some(3),
    Some(13),
    Some(5),
    Some(6),
    Some(7),
    Some(8),
    Some(9),
    Some(10),
    Some(11),
    None,
    None,
    Some(14),
    None,
];
/// The host register of the guest's RAX.
pub const ACCUMULATOR: u8 = 12;
/// The host register of the guest's RSP.
pub const STACK: u8 = 13;

/// Runs of a block before it is translated.
pub const PROMOTE: u32 = 24;

/// Jumps to other pages that are looked up before one is patched.
pub const PATIENCE: i32 = 16;

/// Bits of [`State::vectors`].
pub mod vectors {
    /// SSE instructions may run.
    pub const SSE: u32 = 1;
    /// AVX instructions may run.
    pub const AVX: u32 = 2;
}

/// Why translated code came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Left {
    /// To go on at `Cpu::rip`.
    Next,
    /// To go on at `Cpu::rip`; the jump at [`State::site`] may be patched.
    Link,
    /// To go on at `Cpu::rip`; the jump to another page whose data are at [`State::site`] may be patched.
    Cross,
    /// The instruction at `Cpu::rip` is one for the interpreter.
    Interpret,
    /// As a handler returned it: [`State::ctl`].
    Handler,
}

/// Ranges of host memory that translated code may reach where that is checked: RAM in two parts, and
/// [`State::gathered`].
pub const GUARDED: usize = 3;

/// Aligned for every access of its size.
#[repr(C, align(32))]
pub struct Gathered(pub [u8; 32]);

/// What SYSCALL and SYSRET do, as the MSRs say.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub struct Calls {
    /// They are as kernels have them; else the interpreter looks.
    pub usual: u32,
    /// What SYSCALL leaves of RFLAGS, and of the packed flags.
    pub keeps: u64,
    pub keeps_packed: u32,
    /// CS and SS.
    pub kernel: [Segment; 2],
    pub user: [Segment; 2],
}

/// What translated code keeps in the [`Cpu`](crate::cpu::Cpu).
#[repr(C)]
pub struct State {
    /// Linear address of the page that the running code is in.
    pub page: u64,
    /// [`crate::tlb::CodeSet::generation`] of the set that code is fetched by.
    pub generation: u64,
    /// The `Cpu` itself.
    pub cpu: u64,
    /// The vCPU's request word.
    pub requests: *const AtomicU32,
    /// A word of the vCPU's APIC that is 0 where no interrupt waits in it.
    pub interrupts: *const AtomicU32,
    /// The TLB set for the kernel while it may reach user pages, and those of user code.
    pub user_pages: u64,
    pub user_data: u64,
    pub user_code: u64,
    /// Where the kernel's code is.
    pub kernel_code: u64,
    /// SYSCALL and SYSRET, if they may be done as 64-bit kernels have them.
    pub calls: Calls,
    /// The TLB set that windows may be moved by, if that is the current one; else 0.
    pub window_set: u64,
    /// The window that missed last.
    pub window: u64,
    /// An indirect call's target while its return address is pushed; the guest-physical page that a jump to be patched
    /// is in; the page offset of an instruction that wants vectors.
    pub target: u64,
    /// RAX, while flags are made again.
    pub scratch: u64,
    /// What an instruction overwrote whose flags may have to be made again.
    pub operand: u64,
    /// What an access read that crosses pages, or is about to write.
    pub gathered: Gathered,
    /// Where it is to be written, and how many bytes there.
    pub scattered: [[u64; 2]; 2],
    pub scatters: bool,
    /// For each span of the running block, from linear addresses to the host's.
    pub spans: [u64; span::SLOTS],
    /// Of a span that is looked up: where it begins, from the operand that leads it, and its size.
    pub span_from: i32,
    pub span_bytes: u32,
    /// How often news of code were worked off: what is known of pages in the middle of a block is void then.
    pub news: u32,
    /// Jumps to other pages that may miss before one leaves to be patched.
    pub patience: i32,
    /// Where in the code buffer a jump waits to be patched.
    pub site: u64,
    /// See [`vectors`]; 0 while the guest's vectors are in memory.
    pub vectors: u32,
    /// What the guest's TSC is ahead of the host's, if it may be read so.
    pub tsc_offset: u64,
    pub tsc_direct: u32,
    /// The guest's x87 state is in the host's registers, and x87 instructions may run.
    pub x87: u32,
    pub left: Left,
    pub ctl: Ctl,
    /// The instruction ran to its end.
    pub stopped: bool,
    /// The op that runs alone, as its index in the block.
    pub alone: Option<usize>,
    /// A copy of it, and the end.
    pub single: [Uop; 2],
    /// The next block is to be interpreted.
    pub interpret: bool,
    /// Translated code is running.
    pub running: bool,
    /// Blocks to be translated once more.
    pub again: Vec<*mut Block>,
    /// Translations count their instructions.
    pub counts: bool,
    /// Translations check where they read and write: inside of `guarded`.
    pub guards: bool,
    /// Start and length of each.
    pub guarded: [[u64; 2]; GUARDED],
    /// `BlockCache::clears` when translated code last left.
    pub clears: u64,
}

/// Has GS point at the `Cpu` that this thread runs.
pub fn point_gs(cpu: u64) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        const ARCH_SET_GS: u64 = 0x1001;
        // SAFETY: nothing but translated code uses GS on x86-64 Linux; the call changes no memory.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, cpu) };
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let _ = cpu;
}

/// Runs translated code until it leaves.
///
/// # Safety
/// `thunk` is [`code::CodeBuffer::thunks`]'s `enter`, `code` a translation in the same buffer, and GS points at the
/// `Cpu` that both belong to.
pub unsafe fn enter(thunk: u64, cpu: *mut crate::cpu::Cpu, code: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the caller's word.
        let enter = unsafe { std::mem::transmute::<u64, unsafe extern "C" fn(*mut crate::cpu::Cpu, *const u8)>(thunk) };
        // SAFETY: as above; the thunk keeps to the calling convention. The `Cpu` is passed so that the compiler knows
        // that it changes.
        unsafe { enter(cpu, code) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (thunk, cpu, code);
}

/// Figures for `--metrics`.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub blocks: u64,
    pub instructions: u64,
    pub entries: u64,
    pub slow_accesses: u64,
    pub interpreted: u64,
    pub links: u64,
    /// Translations of hot blocks, and of several blocks together.
    pub hot: u64,
    pub paths: u64,
    /// Accesses that had a window but do without now.
    pub windowless: u64,
    pub nanoseconds: u64,
    /// Nanoseconds in translated code, where that is measured.
    pub running: u64,
}
