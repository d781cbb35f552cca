use super::*;
use crate::{apt::config::AptConfig, progress::Quiet, testing::Archive};

fn source(uri: &str, suite: &str, component: &str, keys: Keys) -> Source {
    Source {
        uri: uri.to_owned(),
        suite: suite.to_owned(),
        components: vec![component.to_owned()],
        keys,
        check_valid_until: true,
    }
}

fn debian_keys() -> Keys {
    Keys::Files(vec!["/usr/share/keyrings/debian-archive-keyring.gpg".into()])
}

#[test]
fn asks_debian_archives_only_and_the_wanted_suite_first() {
    let sources = [
        source("https://tools.test/apt", "tools-bookworm", "main", Keys::Files(vec!["/k".into()])),
        source("https://engine.test/debian", "bookworm", "stable", Keys::Files(vec!["/k".into()])),
        source("https://vendor.test/debian", "bookworm", "main", Keys::Files(vec!["/k".into()])),
        source("http://mirror.test/debian", "bookworm", "main", debian_keys()),
        source("http://next.test/debian", "trixie", "main", debian_keys()),
        source("http://mirror.test/debian-security", "bookworm-security", "main", debian_keys()),
    ];
    let host = Host { sources: &sources, mirror: None, keyring: None };
    let uris: Vec<String> = host.archives("trixie").unwrap().into_iter().map(|a| a.uri).collect();
    assert_eq!(uris, ["http://next.test/debian", "http://mirror.test/debian", "https://vendor.test/debian"]);
    let archive = &host.archives("bookworm").unwrap()[0];
    let (security, named) = host.security(archive, "bookworm").unwrap();
    assert_eq!(
        (security.uri.as_str(), security.suite.as_str(), named),
        ("http://mirror.test/debian-security", "bookworm-security", true)
    );
}

#[test]
fn a_host_without_debian_is_asked_for_a_mirror() {
    let sources = [source("http://ubuntu.test/ubuntu", "noble", "main", Keys::Default)];
    let host = Host { sources: &sources, mirror: None, keyring: None };
    let error = host.archives("trixie").unwrap_err();
    assert!(matches!(error, MirrorError::NoSource));
    assert!(error.to_string().contains("--mirror"));
}

#[test]
fn a_mirror_that_is_given_replaces_the_hosts() {
    let sources = [source("http://mirror.test/debian-security", "trixie-security", "main", debian_keys())];
    let host =
        Host { sources: &sources, mirror: Some("http://given.test/debian//"), keyring: Some(Path::new("/k.gpg")) };
    let archive = host.archives("trixie").unwrap().remove(0);
    assert_eq!(
        (archive.uri.as_str(), archive.keyring.files.as_slice()),
        ("http://given.test/debian", &["/k.gpg".into()][..])
    );
    let (security, named) = host.security(&archive, "trixie").unwrap();
    assert_eq!((security.uri.as_str(), named), ("http://given.test/debian-security", false));
    for bad in ["", "mirror.test/debian", "ftp://mirror.test", "http://", "http://a b/"] {
        let host = Host { sources: &[], mirror: Some(bad), keyring: Some(Path::new("/k.gpg")) };
        assert!(matches!(host.archives("trixie"), Err(MirrorError::Address(_))), "{bad}");
    }
}

#[test]
fn dates_are_checked() {
    let release = |fields: &str| Release::parse(&format!("{fields}SHA256:\n")).unwrap();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_783_764_997); // Sat, 11 Jul 2026 10:16:37 UTC
    let check = |fields: &str, strict| check_dates(&release(fields), "u", strict, now);
    assert!(check("", true).is_ok());
    assert!(check("Valid-Until: Sat, 11 Jul 2026 10:16:38 UTC\n", true).is_ok());
    assert!(matches!(
        check("Valid-Until: Wed, 01 Jul 2026 00:00:00 UTC\n", true),
        Err(MirrorError::Expired { days: 10, .. })
    ));
    assert!(check("Valid-Until: Wed, 01 Jul 2026 00:00:00 UTC\n", false).is_ok(), "as the host's apt is told");
    assert!(check("Date: Sat, 11 Jul 2026 11:00:00 UTC\n", true).is_ok());
    assert!(matches!(check("Date: Sun, 12 Jul 2026 11:00:00 UTC\n", true), Err(MirrorError::Future { .. })));
}

/// Everything between a signature and a package index, against an archive that is signed by a key of this test.
#[test]
fn only_what_the_key_signed_is_read() {
    let Some(archive) = Archive::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = AptConfig::default();
    config.add("Acquire::http::Proxy DIRECT;");
    let (http, cache) = (Http::new(config), Cache::open(dir.path().to_owned()).unwrap());
    let reader = Reader { http: &http, cache: &cache, scratch: dir.path(), progress: &Quiet };
    let mirror = archive.mirror();
    let open_with = |keyring: &Path| {
        let host = Host { sources: &[], mirror: Some(&mirror), keyring: Some(keyring) };
        reader.open(&host.archives("bookworm")?[0])
    };
    let open = || open_with(&archive.key.keyring());
    let release_path = "/debian/dists/bookworm/InRelease";
    let release = |text: &str| archive.server.put(release_path, text);
    let good = String::from_utf8(archive.server.files.lock().unwrap().content[release_path].clone()).unwrap();

    let suite = open().unwrap();
    let mut index = Index::default();
    reader.read_index(&suite, 0, "amd64", &mut index).unwrap();
    assert_eq!(index.get("dash").map(|p| p.filename.as_str()), Some("pool/dash.deb"));

    let armoured = dir.path().join("key.asc");
    fs::write(&armoured, archive.key.armoured()).unwrap();
    assert!(open_with(&armoured).is_ok());

    release(&good.replace("oldstable", "oldstablf"));
    assert!(matches!(open(), Err(MirrorError::Untrusted { source: VerifyError::BadSignature, .. })));
    release(&format!("Origin: Debian\n{good}"));
    assert!(matches!(open(), Err(MirrorError::Untrusted { source: VerifyError::NoClearsignedMessage, .. })));
    release(&format!("{good}\nCodename: trixie\nSHA256:\n"));
    assert_eq!(open().unwrap().release.codename, "bookworm", "what follows the signature is not read");
    release(&good);
    let Some(stranger) = crate::testing::TestKey::new() else { return };
    assert!(matches!(
        open_with(&stranger.keyring()),
        Err(MirrorError::Untrusted { source: VerifyError::Untrusted { .. }, .. })
    ));

    archive.publish(|text| text.replace("Origin: Debian", "Origin: Other"));
    assert!(matches!(open(), Err(MirrorError::Other { .. })));
    archive.publish(|text| text.replace("Codename: bookworm", "Codename: buster"));
    assert!(matches!(open(), Err(MirrorError::Other { .. })));
    archive.publish(|text| format!("Valid-Until: Sat, 18 Jul 2020 10:16:37 UTC\n{text}"));
    assert!(matches!(open(), Err(MirrorError::Expired { .. })));

    archive.publish(|text| text);
    let suite = open().unwrap();
    let packages = "/debian/dists/bookworm/main/binary-amd64/Packages.xz";
    let index_bytes = archive.server.files.lock().unwrap().content[packages].clone();
    let mut tampered = index_bytes;
    let last = tampered.len() - 1;
    tampered[last] ^= 1;
    archive.server.put(packages, tampered);
    fs::remove_dir_all(dir.path().join("sha256")).unwrap();
    let cache = Cache::open(dir.path().to_owned()).unwrap();
    let reader = Reader { cache: &cache, ..reader };
    let error = reader.read_index(&suite, 0, "amd64", &mut Index::default()).unwrap_err();
    assert!(matches!(error, MirrorError::Fetch(FetchError::Mismatch { .. })), "{error}");
}
