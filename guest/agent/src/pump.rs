//! From a command's output to the host, a frame a read.

use std::{
    fs::File,
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use vireo_guest_protocol::FromAgent;

/// The connection's writing side, shared by the pumps.
pub type Out = Arc<Mutex<File>>;

pub fn send(out: &Out, frame: &FromAgent) -> bool {
    frame.write(&mut *out.lock().unwrap_or_else(PoisonError::into_inner)).is_ok()
}

/// Copies until the source ends (a terminal's end is EIO) or the host is gone.
pub fn start(mut from: impl Read + Send + 'static, out: Out, wrap: fn(Vec<u8>) -> FromAgent) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) if send(&out, &wrap(buffer[..n].to_vec())) => {}
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}
