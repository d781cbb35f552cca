use std::{
    io::{self, PipeWriter, Read, Write},
    os::fd::OwnedFd,
    thread,
};

use super::escape::{Escape, Typed};

const HELP: &str =
    "\r\nControl-A X  end the virtual machine\r\nControl-A A  send Control-A\r\nControl-A H  this help\r\n";

#[derive(Debug, thiserror::Error)]
#[error("cannot connect standard input to the guest")]
pub struct InputError(#[source] io::Error);

/// Called when the user typed Control-A X.
pub type Quit = Box<dyn FnOnce() + Send>;

/// Starts to forward standard input to the descriptor that it returns. `quit` is given where standard input is a raw
/// terminal, and makes Control-A special. The thread that does this lives as long as the process, or as there is input.
pub fn forward_stdin(quit: Option<Quit>) -> Result<OwnedFd, InputError> {
    let (reader, writer) = io::pipe().map_err(InputError)?;
    let forward = move || forward(io::stdin(), writer, quit);
    thread::Builder::new().name("vireo-stdin".into()).spawn(forward).map_err(InputError)?;
    Ok(reader.into())
}

fn forward(mut from: impl Read, mut to: PipeWriter, mut quit: Option<Quit>) {
    let mut escape = Escape::default();
    let mut typed = [0; 4096];
    let mut out = Vec::new();
    loop {
        let len = match from.read(&mut typed) {
            Ok(0) => return,
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        out.clear();
        let command = match &quit {
            Some(_) => escape.filter(&typed[..len], &mut out),
            None => {
                out.extend_from_slice(&typed[..len]);
                None
            }
        };
        if to.write_all(&out).is_err() {
            return;
        }
        match command {
            Some(Typed::Quit) => {
                if let Some(quit) = quit.take() {
                    quit();
                }
                return;
            }
            Some(Typed::Help) => {
                let _ = io::stderr().write_all(HELP.as_bytes());
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn forwards_until_control_a_x() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (sender, quitted) = mpsc::channel();
        forward(&b"hello\x01\x01\x01xlost"[..], writer, Some(Box::new(move || sender.send(()).unwrap())));
        quitted.try_recv().unwrap();
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"hello\x01");
    }

    #[test]
    fn without_a_terminal_control_a_is_a_byte_like_any_other() {
        let (mut reader, writer) = io::pipe().unwrap();
        forward(&b"\x01x"[..], writer, None);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"\x01x");
    }
}
