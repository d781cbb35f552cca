//! The in-guest agent that this binary carries.

use vireo_guest_protocol::VERSION;

/// A static Linux program for the guest's architecture, which is the host's.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vireo-agent"));

/// What an image records of the agent in it: this binary's version and the protocol's.
pub fn version() -> String {
    format!("{}/{VERSION}", env!("CARGO_PKG_VERSION"))
}

/// Whether an image's agent speaks our protocol.
pub fn speaks_with(recorded: Option<&str>) -> bool {
    recorded.and_then(|text| text.rsplit_once('/')).is_some_and(|(_, protocol)| protocol == VERSION.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_a_static_elf_program() {
        assert_eq!(&PROGRAM[..4], b"\x7fELF");
        let half = |at: usize| usize::from(u16::from_le_bytes([PROGRAM[at], PROGRAM[at + 1]]));
        // e_phentsize, e_phnum; e_phoff is right behind the header. A dynamic program names its loader in PT_INTERP.
        let (size, count) = (half(54), half(56));
        let types: Vec<usize> = (0..count).map(|i| half(64 + i * size)).collect();
        assert!(types.contains(&1) && !types.contains(&3), "{types:?}");
        assert!(PROGRAM.len() < 2 << 20, "{} bytes", PROGRAM.len());
    }

    #[test]
    fn protocols_are_compared_not_releases() {
        assert!(speaks_with(Some(&version())));
        assert!(speaks_with(Some("9.9.9/1")));
        assert!(!speaks_with(Some("0.1.0/0")));
        assert!(!speaks_with(Some("0.1.0")));
        assert!(!speaks_with(None));
    }
}
