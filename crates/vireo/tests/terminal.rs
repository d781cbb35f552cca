//! `vireo boot` on a terminal: keys reach the guest, Control-A X ends it, and the terminal is as it was afterwards.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::{Child, Command},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::tcgetattr,
};

#[path = "../../machine/tests/support/mod.rs"]
mod support;

/// Sends back what comes in on COM1, after a first `>`.
#[rustfmt::skip]
const ECHO: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03,       //    mov dx, 0x3f8
    0xb0, b'>', 0xee,             //    mov al, '>'; out dx, al
    0x66, 0xba, 0xfd, 0x03,       // 1: mov dx, 0x3fd
    0xec, 0xa8, 0x01, 0x74, 0xf7, //    in al, dx; test al, 1; jz 1b
    0x66, 0xba, 0xf8, 0x03,       //    mov dx, 0x3f8
    0xec, 0xee, 0xeb, 0xef,       //    in al, dx; out dx, al; jmp 1b
];

const TIMEOUT: Duration = Duration::from_secs(30);

/// A pseudo-terminal with a guest that echoes on it.
struct Session {
    keyboard: File,
    screen: Receiver<u8>,
    terminal: OwnedFd,
    before: String,
    child: Child,
    _folder: tempfile::TempDir,
}

/// Our end of a pseudo-terminal, and the one that programs see.
fn open_terminal() -> (OwnedFd, OwnedFd) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (ours, theirs)
}

/// The modes of a terminal, to be compared.
fn modes(terminal: &OwnedFd) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}

impl Session {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = support::write(folder.path(), "echo", &support::elf_kernel(ECHO));
        let (ours, theirs) = open_terminal();
        let before = modes(&theirs);
        let child = Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(["boot", "--accel", "soft", "--memory", "16M", "--kernel"])
            .arg(kernel)
            .stdin(theirs.try_clone().unwrap())
            .stdout(theirs.try_clone().unwrap())
            .stderr(theirs.try_clone().unwrap())
            .spawn()
            .unwrap();
        let keyboard = File::from(ours);
        let mut reader = keyboard.try_clone().unwrap();
        let (sender, screen) = mpsc::channel();
        thread::spawn(move || {
            let mut byte = [0];
            while reader.read(&mut byte).is_ok_and(|len| len == 1) && sender.send(byte[0]).is_ok() {}
        });
        let mut session = Self { keyboard, screen, terminal: theirs, before, child, _folder: folder };
        session.expect(b">");
        session
    }

    fn expect(&mut self, text: &[u8]) {
        for byte in text {
            assert_eq!(self.screen.recv_timeout(TIMEOUT), Ok(*byte));
        }
    }

    fn wait(&mut self) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < TIMEOUT {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.child.kill().unwrap();
        panic!("vireo does not end");
    }

    fn send_signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }
}

#[test]
fn keys_reach_the_guest_and_control_a_x_ends_it() {
    let mut session = Session::start();
    assert_ne!(modes(&session.terminal), session.before);
    session.keyboard.write_all(b"a\x03\x1a\x04\r\x01\x01b").unwrap();
    session.expect(b"a\x03\x1a\x04\r\x01b");
    session.keyboard.write_all(b"\x01x").unwrap();
    assert_eq!(session.wait(), Some(0));
    assert_eq!(modes(&session.terminal), session.before);
}

#[test]
fn the_terminal_is_restored_when_a_signal_ends_the_run() {
    for (signal, code) in [("-TERM", Some(1)), ("-HUP", Some(1)), ("-ABRT", None), ("-SEGV", None)] {
        let mut session = Session::start();
        session.send_signal(signal);
        assert_eq!(session.wait(), code, "{signal}");
        assert_eq!(modes(&session.terminal), session.before, "{signal}");
    }
}
