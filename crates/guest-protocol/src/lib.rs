//! What the host and the in-guest agent say to each other, over virtio-vsock.
//!
//! When the agent is up it connects to the host ([`HOST_CID`], [`READY_PORT`]) and sends [`FromAgent::Ready`]. It
//! listens on [`SESSION_PORT`]; each connection that the host makes there is one session: one request
//! ([`ToAgent::Exec`] or [`ToAgent::PowerOff`]) and what belongs to it.
//!
//! A frame is a kind (1 byte), the payload's length (4 bytes, little endian, at most [`MAX_PAYLOAD`]) and the
//! payload: raw bytes for streams, CBOR for the rest.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};

use minicbor::{Decode, Encode};

/// The context id under which every guest finds its host (virtio 1.2, 5.10.4).
pub const HOST_CID: u32 = 2;
/// The agent announces itself here, on the host's side.
pub const READY_PORT: u32 = 1023;
/// The agent listens here, on the guest's side.
pub const SESSION_PORT: u32 = 1024;
/// Raised whenever an agent and a host of different versions would misunderstand each other.
pub const VERSION: u32 = 1;
/// The longest payload in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the connection to the guest agent broke")]
    Io(#[from] io::Error),
    #[error("a frame of {0} bytes is longer than the protocol allows")]
    TooLong(usize),
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    #[error("malformed {what} frame")]
    Malformed { what: &'static str },
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct WindowSize {
    #[n(0)]
    pub rows: u16,
    #[n(1)]
    pub columns: u16,
}

/// A command to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Exec {
    /// Program and arguments; empty for the user's login shell.
    #[n(0)]
    pub command: Vec<String>,
    /// Set on top of the agent's default environment.
    #[n(1)]
    pub environment: Vec<(String, String)>,
    /// The user's home where there is none.
    #[n(2)]
    pub directory: Option<String>,
    /// With a terminal of this size; stdout and stderr are then one stream.
    #[n(3)]
    pub terminal: Option<WindowSize>,
    /// A name in the guest's `/etc/passwd`; root where there is none.
    #[n(4)]
    pub user: Option<String>,
    /// Start the command once the guest has a default route, or after this many milliseconds.
    #[n(5)]
    pub network_wait_ms: Option<u32>,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Exit {
    #[n(0)]
    Code(#[n(0)] i32),
    #[n(1)]
    Signal(#[n(0)] i32),
}

impl Exit {
    /// The status as a shell would show it: 128 + n for a signal.
    pub fn status(self) -> i32 {
        match self {
            Self::Code(code) => code,
            // The guest may say any number.
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// What the agent says of itself when it is up.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ready {
    /// [`VERSION`] of the agent.
    #[n(0)]
    pub version: u32,
    /// Milliseconds of guest uptime when the agent came up.
    #[n(1)]
    pub uptime_ms: u64,
}

/// Frames from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    Exec(Exec),
    Stdin(Vec<u8>),
    StdinEnd,
    Resize(WindowSize),
    /// A signal number for the command.
    Signal(u8),
    /// Writes disks back and powers the guest off.
    PowerOff,
}

/// Frames from the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    Ready(Ready),
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Exit(Exit),
    /// The request could not be carried out; one sentence.
    Failed(String),
}

mod kind {
    pub const EXEC: u8 = 1;
    pub const STDIN: u8 = 2;
    pub const STDIN_END: u8 = 3;
    pub const RESIZE: u8 = 4;
    pub const SIGNAL: u8 = 5;
    pub const POWER_OFF: u8 = 6;
    pub const READY: u8 = 64;
    pub const STDOUT: u8 = 65;
    pub const STDERR: u8 = 66;
    pub const EXIT: u8 = 67;
    pub const FAILED: u8 = 68;
}

fn put(to: &mut impl Write, kind: u8, payload: &[u8]) -> Result<(), ProtocolError> {
    if payload.len() > MAX_PAYLOAD {
        return Err(ProtocolError::TooLong(payload.len()));
    }
    // One write for small frames: one packet on the socket.
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)?;
    to.flush()?;
    Ok(())
}

/// Kind and payload of the next frame; `None` where the stream ends between frames.
fn get(from: &mut impl Read) -> Result<Option<(u8, Vec<u8>)>, ProtocolError> {
    let mut header = [0; 5];
    if from.read(&mut header[..1])? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut header[1..])?;
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length > MAX_PAYLOAD {
        return Err(ProtocolError::TooLong(length));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some((header[0], payload)))
}

fn cbor<T: Encode<()>>(value: &T) -> Vec<u8> {
    // Encoding to a vector does not fail.
    minicbor::to_vec(value).unwrap_or_default()
}

fn parse<'a, T: Decode<'a, ()>>(payload: &'a [u8], what: &'static str) -> Result<T, ProtocolError> {
    minicbor::decode(payload).map_err(|_| ProtocolError::Malformed { what })
}

impl ToAgent {
    pub fn write(&self, to: &mut impl Write) -> Result<(), ProtocolError> {
        match self {
            Self::Exec(exec) => put(to, kind::EXEC, &cbor(exec)),
            Self::Stdin(bytes) => put(to, kind::STDIN, bytes),
            Self::StdinEnd => put(to, kind::STDIN_END, &[]),
            Self::Resize(size) => put(to, kind::RESIZE, &cbor(size)),
            Self::Signal(signal) => put(to, kind::SIGNAL, &[*signal]),
            Self::PowerOff => put(to, kind::POWER_OFF, &[]),
        }
    }

    pub fn read(from: &mut impl Read) -> Result<Option<Self>, ProtocolError> {
        let Some((kind, payload)) = get(from)? else { return Ok(None) };
        Ok(Some(match kind {
            kind::EXEC => Self::Exec(parse(&payload, "exec")?),
            kind::STDIN => Self::Stdin(payload),
            kind::STDIN_END => Self::StdinEnd,
            kind::RESIZE => Self::Resize(parse(&payload, "resize")?),
            kind::SIGNAL => match payload[..] {
                [signal] => Self::Signal(signal),
                _ => return Err(ProtocolError::Malformed { what: "signal" }),
            },
            kind::POWER_OFF => Self::PowerOff,
            other => return Err(ProtocolError::UnknownKind(other)),
        }))
    }
}

impl FromAgent {
    pub fn write(&self, to: &mut impl Write) -> Result<(), ProtocolError> {
        match self {
            Self::Ready(ready) => put(to, kind::READY, &cbor(ready)),
            Self::Stdout(bytes) => put(to, kind::STDOUT, bytes),
            Self::Stderr(bytes) => put(to, kind::STDERR, bytes),
            Self::Exit(exit) => put(to, kind::EXIT, &cbor(exit)),
            Self::Failed(why) => put(to, kind::FAILED, why.as_bytes()),
        }
    }

    pub fn read(from: &mut impl Read) -> Result<Option<Self>, ProtocolError> {
        let Some((kind, payload)) = get(from)? else { return Ok(None) };
        Ok(Some(match kind {
            kind::READY => Self::Ready(parse(&payload, "ready")?),
            kind::STDOUT => Self::Stdout(payload),
            kind::STDERR => Self::Stderr(payload),
            kind::EXIT => Self::Exit(parse(&payload, "exit")?),
            kind::FAILED => Self::Failed(String::from_utf8_lossy(&payload).into_owned()),
            other => return Err(ProtocolError::UnknownKind(other)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let to = [
            ToAgent::Exec(Exec {
                command: vec!["ls".into(), "-l".into()],
                environment: vec![("A".into(), "b c".into())],
                directory: Some("/tmp".into()),
                terminal: Some(WindowSize { rows: 24, columns: 80 }),
                user: None,
                network_wait_ms: Some(5000),
            }),
            ToAgent::Stdin(vec![0, 1, 255]),
            ToAgent::StdinEnd,
            ToAgent::Resize(WindowSize { rows: 1, columns: 2 }),
            ToAgent::Signal(15),
            ToAgent::PowerOff,
        ];
        let mut wire = Vec::new();
        to.iter().for_each(|frame| frame.write(&mut wire).unwrap());
        let mut from = &wire[..];
        for frame in &to {
            assert_eq!(ToAgent::read(&mut from).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(ToAgent::read(&mut from).unwrap(), None);

        let said = [
            FromAgent::Ready(Ready { version: VERSION, uptime_ms: 7 }),
            FromAgent::Stdout(b"out".to_vec()),
            FromAgent::Stderr(Vec::new()),
            FromAgent::Exit(Exit::Signal(9)),
            FromAgent::Failed("no such file".into()),
        ];
        let mut wire = Vec::new();
        said.iter().for_each(|frame| frame.write(&mut wire).unwrap());
        let mut from = &wire[..];
        for frame in &said {
            assert_eq!(FromAgent::read(&mut from).unwrap().as_ref(), Some(frame));
        }
    }

    #[test]
    fn a_frame_cut_short_is_an_error_not_an_end() {
        let mut wire = Vec::new();
        ToAgent::Stdin(vec![1; 10]).write(&mut wire).unwrap();
        for length in 1..wire.len() {
            assert!(ToAgent::read(&mut &wire[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn any_signal_has_a_status() {
        assert_eq!(Exit::Signal(9).status(), 137);
        assert_eq!(Exit::Signal(i32::MAX).status(), i32::MAX);
        assert_eq!(Exit::Signal(i32::MIN).status(), i32::MIN + 128);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_allocated() {
        let wire = [kind::STDIN, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(ToAgent::read(&mut &wire[..]), Err(ProtocolError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = ToAgent::read(&mut &bytes[..]);
            let _ = FromAgent::read(&mut &bytes[..]);
        }
    }
}
