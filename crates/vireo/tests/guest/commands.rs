//! `vireo run IMAGE -- COMMAND`: streams, status and surroundings of a command.

use std::{
    io::{Read, Write},
    process::Stdio,
};

use crate::{
    images::{Image, State},
    process::Guard,
};

/// Bytes without a pattern, the same at each run (xorshift64).
fn noise(bytes: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut words = std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    });
    words.by_ref().take(bytes / 8).flatten().collect()
}

#[test]
fn streams_are_separate_and_binary() {
    let Some(state) = State::with(Image::Bookworm, "streams_are_separate_and_binary") else { return };
    let input = noise(1 << 20);
    let ended = state.run(&[], &["sh", "-c", "cat; printf 'to stderr\\0\\377' >&2; exit 7"], &input);
    assert_eq!(ended.code, Some(7), "{}", ended.stderr);
    assert!(ended.stdout == input, "{} of {} bytes came back", ended.stdout.len(), input.len());
    assert_eq!(ended.stderr, "to stderr\0\u{fffd}");
}

#[test]
fn a_command_has_the_surroundings_it_was_given() {
    let Some(state) = State::with(Image::Trixie, "a_command_has_the_surroundings_it_was_given") else { return };
    let options = ["--env", "COLOUR=deep blue", "--user", "nobody", "--workdir", "/usr/share", "--memory", "768M"];
    let script = "echo $COLOUR; id -un; id -gn; pwd; test -t 0 || echo no terminal; echo $HOME; \
                  nproc; awk '/MemTotal/ { print ($2 > 700000 && $2 < 800000) }' /proc/meminfo; \
                  touch /usr/x 2>/dev/null || echo not allowed";
    let ended = state.run(&options, &["sh", "-c", script], b"");
    let wanted = "deep blue\nnobody\nnogroup\n/usr/share\nno terminal\n/nonexistent\n1\n1\nnot allowed\n";
    assert_eq!((ended.code, ended.text().as_str()), (Some(0), wanted), "{}", ended.stderr);
}

#[test]
fn statuses_are_a_shells() {
    let Some(state) = State::with(Image::Bookworm, "statuses_are_a_shells") else { return };
    let ended = state.run(&[], &["no-such-command"], b"");
    ended.assert_says(127, &["no-such-command"]);
    let ended = state.run(&[], &["sh", "-c", "kill -TERM $$"], b"");
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(128 + 15), ""));
}

#[test]
fn a_command_that_cannot_be_started_says_why() {
    let Some(state) = State::with(Image::Bookworm, "a_command_that_cannot_be_started_says_why") else { return };
    let ended = state.run(&["--user", "mallory"], &["true"], b"");
    ended.assert_says(126, &["no user 'mallory'"]);
    let ended = state.run(&["--workdir", "/nowhere"], &["true"], b"");
    ended.assert_says(126, &["no directory '/nowhere'"]);
}

/// A command that does not read its input, and output that nobody reads: neither hangs.
#[test]
fn streams_may_end_early() {
    let Some(state) = State::with(Image::Bookworm, "streams_may_end_early") else { return };
    let ended = state.run(&[], &["head", "-c", "3"], &noise(32 << 20));
    assert_eq!((ended.code, ended.stdout.len()), (Some(0), 3), "{}", ended.stderr);

    let mut command = state.run_command(&[], &["sh", "-c", "while echo y; do :; done"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut child = Guard(child);
    let mut stdout = child.0.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100]).unwrap();
    drop(stdout);
    let code = child.wait();
    let mut said = String::new();
    child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot write the command's output"), "{said}");
    state.assert_nothing_left();
}

/// What comes in is passed on at once, and what comes out too: a conversation works.
#[test]
fn input_and_output_are_not_held_back() {
    let Some(state) = State::with(Image::Bookworm, "input_and_output_are_not_held_back") else { return };
    let mut command = state.run_command(&[], &["sh", "-c", "while read line; do echo got $line; done; echo end"]);
    let mut child = Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let (mut stdin, mut stdout) = (child.0.stdin.take().unwrap(), child.0.stdout.take().unwrap());
    for word in ["one", "two"] {
        stdin.write_all(format!("{word}\n").as_bytes()).unwrap();
        let wanted = format!("got {word}\n");
        let mut line = vec![0; wanted.len()];
        stdout.read_exact(&mut line).unwrap();
        assert_eq!(line, wanted.as_bytes());
    }
    drop(stdin);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait()), ("end\n", Some(0)));
}
