/// Exit codes of the `vireo` command, as documented in `docs/cli.md`.
///
/// `vireo run … -- CMD` returns the status of `CMD` itself, as a shell would; the codes below from 120 up
/// are chosen so that they do not collide with what commands usually return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered itself off, or the command did what was asked.
    Ok = 0,
    /// The operation failed for a reason that the message names (missing image, no space, busy port …).
    Failed = 1,
    /// Wrong usage: unknown flag, malformed value, impossible combination.
    Usage = 2,
    /// A file that the user gave is not what it should be (not a kernel, corrupt disk image …).
    BadInput = 3,
    /// The guest crashed: triple fault or an unrecoverable guest state. The message says where.
    GuestCrash = 120,
    /// The guest asked for a reset and `--no-reboot` was given.
    GuestReset = 121,
    /// The guest reported a kernel panic (pvpanic or the agent) and stopped.
    GuestPanic = 122,
    /// The host failed us: out of memory, an I/O error on a disk image, a KVM error.
    HostFailure = 123,
    /// The in-guest agent did not answer in time.
    AgentTimeout = 124,
}
