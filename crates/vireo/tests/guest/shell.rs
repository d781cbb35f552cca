//! `vireo run IMAGE` on a terminal: a shell as one expects it.

use std::time::Duration;

use crate::{
    images::{Image, RELEASES, State},
    screen::Screen,
};

const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const CTRL_Z: &str = "\x1a";
const PROMPT: &str = "root@debian:~# ";

/// Returns when the program is in the foreground: bash tells nobody when that is.
fn start_sleeping(screen: &mut Screen, seconds: &str) {
    screen.keys(&format!("echo $((40 + 2))now; sleep {seconds}\r"));
    screen.expect("42now");
    std::thread::sleep(Duration::from_secs(1));
}

#[test]
fn an_interactive_shell() {
    for image in RELEASES {
        let Some(state) = State::with(image, "an_interactive_shell") else { return };
        let (mut screen, terminal) = Screen::on_terminal(&state.run_command(&[], &[]), 31, 97);
        screen.expect(PROMPT);
        for complaint in ["job control", "cannot set terminal", "vireo:"] {
            assert!(!screen.shown.contains(complaint), "{}", screen.shown);
        }
        assert!(!terminal.is_as_before());

        // The size, and a new one. What is typed is echoed: only the answers have the figures.
        screen.keys("echo size=$(stty size) $TERM\r");
        screen.expect("size=31 97 dumb");
        screen.expect(PROMPT);
        terminal.resize(44, 123);
        let resized = (0..20).any(|_| {
            screen.keys("echo size=$(stty size)\r");
            screen.appears("size=44 123", Duration::from_secs(5))
        });
        assert!(resized, "{}", screen.shown);
        screen.expect(PROMPT);

        // Ctrl-C ends the program in the foreground and nothing else.
        start_sleeping(&mut screen, "1000");
        screen.keys(CTRL_C);
        screen.expect(PROMPT);
        screen.keys("echo status=$?\r");
        screen.expect("status=130");
        screen.expect(PROMPT);

        // Job control: stop, background, list, end.
        start_sleeping(&mut screen, "2000");
        screen.keys(CTRL_Z);
        screen.expect("Stopped");
        screen.expect(PROMPT);
        screen.keys("bg; jobs\r");
        screen.expect("Running");
        screen.expect(PROMPT);
        screen.keys("kill %1; wait; echo left=$(jobs -r | wc -l)\r");
        screen.expect("left=0");
        screen.expect(PROMPT);

        // Ctrl-D is the end of the input; the shell's status is ours.
        screen.keys("(exit 5)\r");
        screen.expect(PROMPT);
        screen.keys(CTRL_D);
        assert_eq!(screen.child.wait(), Some(5), "{}", screen.shown);
        assert!(terminal.is_as_before());
        state.assert_nothing_left();
    }
}

#[test]
fn a_command_on_a_terminal() {
    let Some(state) = State::with(Image::Bookworm, "a_command_on_a_terminal") else { return };
    let command = state.run_command(&["--tty"], &["sh", "-c", "tty; read -r word; echo word=$word; exit 9"]);
    let (mut screen, terminal) = Screen::on_terminal(&command, 24, 80);
    screen.expect("/dev/pts/");
    screen.keys("blue\r");
    screen.expect("word=blue");
    assert_eq!(screen.child.wait(), Some(9), "{}", screen.shown);
    assert!(terminal.is_as_before());
}

/// Without `--tty` a command has pipes, and Ctrl-C is a signal for it.
#[test]
fn control_c_reaches_a_command_without_a_terminal() {
    let test = "control_c_reaches_a_command_without_a_terminal";
    let Some(state) = State::with(Image::Bookworm, test) else { return };
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.1; done";
    let (mut screen, terminal) = Screen::on_terminal(&state.run_command(&[], &["bash", "-c", script]), 24, 80);
    screen.expect("ready");
    screen.keys(CTRL_C);
    screen.expect("interrupted");
    assert_eq!(screen.child.wait(), Some(3), "{}", screen.shown);
    assert!(terminal.is_as_before());
    state.assert_nothing_left();
}

#[test]
fn the_terminal_is_restored_when_the_guest_panics() {
    let Some(state) = State::with(Image::Bookworm, "the_terminal_is_restored_when_the_guest_panics") else { return };
    let (mut screen, terminal) = Screen::on_terminal(&state.run_command(&[], &[]), 24, 80);
    screen.expect(PROMPT);
    screen.keys("echo c >/proc/sysrq-trigger\r");
    assert_eq!(screen.child.wait(), Some(122), "{}", screen.shown);
    screen.expect("the guest's kernel panicked");
    screen.expect("sysrq triggered crash");
    assert!(terminal.is_as_before());
    state.assert_nothing_left();
}
