use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Why a signed file is not believed.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("it is not exactly one message with a signature (InRelease)")]
    NoClearsignedMessage,
    #[error("none of its signatures was made by a key that is trusted ({keyring}); gpgv says: {detail}")]
    Untrusted { keyring: String, detail: String },
    #[error("its signature is wrong: the file was changed after it was signed, or damaged on the way")]
    BadSignature,
    #[error("'{0}' is no OpenPGP keyring")]
    Keyring(PathBuf),
    #[error("the program 'gpgv' cannot be run; install it: apt-get install gpgv (Fedora: dnf install gnupg2)")]
    NoGpgv(#[source] io::Error),
    #[error("checking the signature failed at '{path}'")]
    Io { path: PathBuf, source: io::Error },
}

/// The keys that an archive's signature is checked against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keyring {
    /// Binary or armoured OpenPGP certificates.
    pub files: Vec<PathBuf>,
    /// Armoured certificates that stand in the configuration itself.
    pub inline: Vec<String>,
    /// Unless empty, only these keys of the files count.
    pub fingerprints: Vec<String>,
}

const BEGIN_MESSAGE: &str = "-----BEGIN PGP SIGNED MESSAGE-----";

/// Checks a clear-signed message (RFC 9580 section 7) and returns its text: exactly the part that is signed.
///
/// `gpgv` does the cryptography: every Debian has it, and it knows expiry, revocation and weak digests of the keys in
/// the distribution's keyring. `scratch` is a directory of the caller's for its input and output.
pub fn clearsigned(message: &[u8], keyring: &Keyring, scratch: &Path) -> Result<String, VerifyError> {
    let text = std::str::from_utf8(message).map_err(|_| VerifyError::NoClearsignedMessage)?;
    if !text.starts_with(BEGIN_MESSAGE) || text.matches(BEGIN_MESSAGE).count() != 1 {
        return Err(VerifyError::NoClearsignedMessage);
    }
    let write = |name: &str, bytes: &[u8]| {
        let path = scratch.join(name);
        fs::write(&path, bytes).map_err(|source| VerifyError::Io { path: path.clone(), source })?;
        Ok(path)
    };
    let mut command = Command::new("gpgv");
    for (number, certificates) in certificates(keyring)?.iter().enumerate() {
        command.arg("--keyring").arg(write(&format!("keyring-{number}.gpg"), certificates)?);
    }
    let signed = write("signed", message)?;
    let output = scratch.join("verified");
    let _ = fs::remove_file(&output);
    command.arg("--status-fd=1").arg("--output").arg(&output).arg(&signed);
    let result = command.stdin(Stdio::null()).env("LC_ALL", "C").output().map_err(VerifyError::NoGpgv)?;
    judge(&String::from_utf8_lossy(&result.stdout), &keyring.fingerprints, || VerifyError::Untrusted {
        keyring: describe(keyring),
        detail: String::from_utf8_lossy(&result.stderr).lines().last().unwrap_or("nothing").trim().to_owned(),
    })?;
    fs::read_to_string(&output).map_err(|source| VerifyError::Io { path: output, source })
}

/// Reads gpgv's status lines (GnuPG's doc/DETAILS). One good signature suffices, one bad signature spoils all;
/// signatures by keys that we do not have count for nothing.
fn judge(status: &str, fingerprints: &[String], untrusted: impl Fn() -> VerifyError) -> Result<(), VerifyError> {
    let mut trusted = false;
    let mut good = false;
    for line in status.lines().filter_map(|line| line.strip_prefix("[GNUPG:] ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["BADSIG", ..] => return Err(VerifyError::BadSignature),
            ["NEWSIG", ..] => good = false,
            // Expired and revoked keys say EXPKEYSIG, REVKEYSIG instead.
            ["GOODSIG", ..] => good = true,
            ["VALIDSIG", ref rest @ ..] if good => {
                let by = |wanted: &String| {
                    [rest.first(), rest.last()].iter().flatten().any(|fpr| fpr.ends_with(wanted.as_str()))
                };
                trusted |= fingerprints.is_empty() || fingerprints.iter().any(by);
            }
            _ => {}
        }
    }
    if trusted { Ok(()) } else { Err(untrusted()) }
}

fn certificates(keyring: &Keyring) -> Result<Vec<Vec<u8>>, VerifyError> {
    let mut all = Vec::new();
    for path in &keyring.files {
        let bytes = fs::read(path).map_err(|source| VerifyError::Io { path: path.clone(), source })?;
        let armoured = std::str::from_utf8(&bytes).ok().filter(|text| text.contains(BEGIN_KEY));
        all.push(match armoured {
            Some(text) => dearmour(text).ok_or_else(|| VerifyError::Keyring(path.clone()))?,
            None => bytes,
        });
    }
    for text in &keyring.inline {
        all.push(dearmour(text).ok_or_else(|| VerifyError::Keyring("Signed-By".into()))?);
    }
    Ok(all)
}

const BEGIN_KEY: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
const END_KEY: &str = "-----END PGP PUBLIC KEY BLOCK-----";

/// gpgv reads binary keyrings only; this takes the armour of RFC 9580 section 6.2 off, block after block.
fn dearmour(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(BEGIN_KEY) {
        let (block, next) = after.split_once(END_KEY)?;
        let mut lines = block.lines().map(str::trim).skip(1);
        // Armour headers end at the first empty line.
        lines.by_ref().find(|line| line.is_empty())?;
        let body: String = lines.take_while(|line| !line.starts_with('=')).collect();
        bytes.extend(base64(&body)?);
        rest = next;
    }
    (!bytes.is_empty()).then_some(bytes)
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

fn describe(keyring: &Keyring) -> String {
    let mut names: Vec<String> = keyring.files.iter().map(|path| path.display().to_string()).collect();
    names.extend(keyring.inline.iter().map(|_| "a key within the sources file".to_owned()));
    names.extend(keyring.fingerprints.iter().map(|fpr| format!("key {fpr}")));
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untrusted() -> VerifyError {
        VerifyError::Untrusted { keyring: String::new(), detail: String::new() }
    }

    #[test]
    fn one_good_signature_suffices_and_one_bad_one_spoils() {
        let good = "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG 1 a\n[GNUPG:] VALIDSIG AAFF 2026 1 0 4 0 1 8 01 BBEE\n";
        let missing = "[GNUPG:] NEWSIG\n[GNUPG:] ERRSIG 2 1 8 01 1 9 -\n[GNUPG:] NO_PUBKEY 2\n";
        let bad = "[GNUPG:] NEWSIG\n[GNUPG:] BADSIG 1 a\n";
        let expired = "[GNUPG:] NEWSIG\n[GNUPG:] EXPKEYSIG 1 a\n[GNUPG:] VALIDSIG AAFF 2026 1 0 4 0 1 8 01 BBEE\n";
        let says = |status: String, only: &[&str]| {
            judge(&status, &only.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>(), untrusted)
        };
        assert!(says(good.to_owned(), &[]).is_ok());
        assert!(says(format!("{missing}{good}{missing}"), &[]).is_ok());
        assert!(says(good.to_owned(), &["BBEE"]).is_ok());
        assert!(matches!(says(good.to_owned(), &["CC"]), Err(VerifyError::Untrusted { .. })));
        assert!(matches!(says(format!("{good}{bad}"), &[]), Err(VerifyError::BadSignature)));
        assert!(matches!(says(missing.to_owned(), &[]), Err(VerifyError::Untrusted { .. })));
        assert!(matches!(
            says(format!("{good}{expired}").replace("GOODSIG", "REVKEYSIG"), &[]),
            Err(VerifyError::Untrusted { .. })
        ));
        assert!(matches!(says(expired.to_owned(), &[]), Err(VerifyError::Untrusted { .. })));
    }

    #[test]
    fn takes_armour_off() {
        let text =
            format!("x\n{BEGIN_KEY}\nComment: hi\n\naGVs\nbG8h\n=abcd\n{END_KEY}\n{BEGIN_KEY}\n\nPw==\n{END_KEY}\n");
        assert_eq!(dearmour(&text).unwrap(), b"hello!?");
        assert_eq!(dearmour(BEGIN_KEY), None);
        assert_eq!(dearmour(&format!("{BEGIN_KEY}\n\na*b\n{END_KEY}")), None);
    }

    #[test]
    fn only_one_whole_message_is_looked_at() {
        let scratch = tempfile::tempdir().unwrap();
        for message in [&b"Origin: Debian\n"[..], b"\xff\xfe", format!("{BEGIN_MESSAGE}\n{BEGIN_MESSAGE}\n").as_bytes()]
        {
            let result = clearsigned(message, &Keyring::default(), scratch.path());
            assert!(matches!(result, Err(VerifyError::NoClearsignedMessage)));
        }
    }
}
