//! Control-A, the way out of a guest's terminal.

/// What the user typed, besides bytes for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Control-A X: end the machine.
    Quit,
    /// Control-A H or ?: tell what Control-A can do.
    Help,
}

const CONTROL_A: u8 = 1;

/// Filters what is typed at a raw terminal. Control-A twice sends one to the guest; unknown keys behind it are lost.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Appends to `out` what the guest gets of `typed`; stops at the first command and returns it.
    pub fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> Option<Typed> {
        for byte in typed {
            if !std::mem::take(&mut self.pending) {
                if *byte == CONTROL_A {
                    self.pending = true;
                } else {
                    out.push(*byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => return Some(Typed::Quit),
                b'h' | b'H' | b'?' => return Some(Typed::Help),
                &CONTROL_A | b'a' => out.push(CONTROL_A),
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Typed>) {
        let (mut escape, mut out, mut commands) = (Escape::default(), Vec::new(), Vec::new());
        for piece in pieces {
            commands.extend(escape.filter(piece, &mut out));
        }
        (out, commands)
    }

    #[test]
    fn only_control_a_is_special() {
        assert_eq!(typed(&[b"ls\r\x03\x04\x1b[A"]), (b"ls\r\x03\x04\x1b[A".to_vec(), vec![]));
        assert_eq!(typed(&[b"a\x01", b"x"]), (b"a".to_vec(), vec![Typed::Quit]));
        assert_eq!(typed(&[b"\x01\x01b\x01zc"]), (b"\x01bc".to_vec(), vec![]));
        assert_eq!(typed(&[b"\x01h"]).1, [Typed::Help]);
    }
}
