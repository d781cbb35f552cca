//! Running `vireo` to its end.

use std::{
    io::{Read, Write},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// More than a boot takes on a busy host with an unoptimised program.
pub const TIMEOUT: Duration = Duration::from_secs(300);

pub struct Ended {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ended {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// One message of our own, in one line, with these words in it; and this code.
    #[track_caller]
    pub fn assert_says(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}{}", self.text(), self.stderr);
        let said = self.stderr.lines().find(|line| line.starts_with("vireo: ") || line.starts_with("error: "));
        let said = said.unwrap_or_else(|| panic!("no message in: {}", self.stderr));
        for word in words {
            assert!(self.stderr.contains(word), "'{word}' is missing in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked at"), "{}", self.stderr);
        assert!(said.len() < 600, "{said}");
    }
}

/// The command with nothing of this host's settings.
pub fn vireo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.env_remove("VIREO_STATE").env_remove("VIREO_DEBIAN_MIRROR");
    command
}

/// Ends the process if a test fails while it runs.
pub struct Guard(pub Child);

impl Guard {
    pub fn signal(&self, name: &str) {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    #[track_caller]
    pub fn wait(&mut self) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < TIMEOUT {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("vireo does not end");
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs to the end with this on standard input, which then closes; what is not read of it is no matter.
#[track_caller]
pub fn run(command: &mut Command, input: &[u8]) -> Ended {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut child = Guard(child);
    let (stdin, stdout, stderr) = (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take());
    thread::scope(|scope| {
        scope.spawn(move || {
            let _ = stdin.unwrap().write_all(input);
        });
        let stdout = scope.spawn(move || read(stdout.unwrap()));
        let stderr = scope.spawn(move || read(stderr.unwrap()));
        let start = Instant::now();
        let code = loop {
            if let Some(status) = child.0.try_wait().unwrap() {
                break status.code();
            }
            if start.elapsed() > TIMEOUT {
                let _ = child.0.kill();
                let said = [stdout.join().unwrap(), stderr.join().unwrap()].concat();
                panic!("vireo does not end; it said: {}", String::from_utf8_lossy(&said));
            }
            thread::sleep(Duration::from_millis(5));
        };
        let stderr = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
        Ended { code, stdout: stdout.join().unwrap(), stderr }
    })
}

fn read(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    bytes
}
