use std::path::Path;

use super::*;
use crate::{
    progress::Quiet,
    state::StateDir,
    testing::{Archive, Fault, Recorder},
};

struct Setup {
    archive: Archive,
    _dir: tempfile::TempDir,
    store: ImageStore,
    options: BuildOptions,
}

/// `None` where this host cannot build at all (no gpg, no namespaces): the message says so.
fn setup() -> Option<Setup> {
    let archive = Archive::start()?;
    if let Err(error) = check_host() {
        eprintln!("skipped: {error}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(StateDir::new(dir.path())).unwrap();
    // No proxy of the host's stands between the test and its own server.
    let etc_apt = dir.path().join("apt");
    fs::create_dir(&etc_apt).unwrap();
    fs::write(etc_apt.join("apt.conf"), "Acquire::http::Proxy DIRECT;\n").unwrap();
    let options = BuildOptions {
        suite: Some("bookworm".to_owned()),
        mirror: Some(archive.mirror()),
        keyring: Some(archive.key.keyring()),
        etc_apt,
        ..BuildOptions::default()
    };
    Some(Setup { archive, _dir: dir, store, options })
}

impl Setup {
    fn build(&self, progress: &dyn Progress) -> BuildError {
        self.store.build_debian(&self.options, progress).expect_err("a package of one text file boots nothing")
    }

    /// Neither an image nor a half-made one.
    fn assert_nothing_left(&self) {
        let left: Vec<_> =
            fs::read_dir(self.store.state().images()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".lock"]);
    }
}

#[test]
fn a_package_that_is_not_what_the_index_says_is_refused() {
    let Some(setup) = setup() else { return };
    setup.archive.server.put(&Archive::deb("dbus"), "something else");
    let error = setup.build(&Quiet);
    assert!(matches!(error, BuildError::Fetch(FetchError::Mismatch { .. })), "{error:?}");
    setup.assert_nothing_left();
}

#[test]
fn a_release_that_was_tampered_with_is_refused() {
    let Some(setup) = setup() else { return };
    let path = "/debian/dists/bookworm/InRelease";
    let text = String::from_utf8(setup.archive.server.files.lock().unwrap().content[path].clone()).unwrap();
    setup.archive.server.put(path, text.replace("bookworm", "bookwurm"));
    assert!(matches!(setup.build(&Quiet), BuildError::Mirror(MirrorError::Untrusted { .. })));
    setup.assert_nothing_left();
}

#[test]
fn a_build_that_is_cancelled_leaves_only_its_downloads() {
    let Some(setup) = setup() else { return };
    for step in [Step::Indices, Step::Download, Step::Bootstrap] {
        let progress = Recorder { cancel_at: Some(step), ..Recorder::default() };
        let error = setup.build(&progress);
        assert!(matches!(error, BuildError::Cancelled), "{step:?}: {error:?}");
        setup.assert_nothing_left();
    }
    let before = setup.archive.server.requests().len();
    setup.build(&Quiet);
    let again: Vec<String> = setup.archive.server.requests().split_off(before);
    assert!(!again.iter().any(|request| request.contains(".deb")), "{again:?}");
}

#[test]
fn an_installation_that_fails_says_why_and_leaves_the_old_image() {
    let Some(setup) = setup() else { return };
    let old = setup.store.state().images().join("debian-bookworm");
    fs::create_dir(&old).unwrap();
    fs::write(old.join("image.json"), "old").unwrap();
    let error = setup.build(&Quiet);
    // The packages hold no dpkg, no libc and no kernel: the sandbox's chroot is the first to notice.
    assert!(
        matches!(&error, BuildError::Install { tail, .. } if tail.contains("chroot"))
            || matches!(error, BuildError::Sandbox(_)),
        "{error:?}"
    );
    assert_eq!(fs::read_to_string(old.join("image.json")).unwrap(), "old");
}

#[test]
fn missing_updates_are_noted_and_a_server_error_is_not_taken_for_it() {
    let Some(setup) = setup() else { return };
    let progress = Recorder { cancel_at: Some(Step::Download), ..Recorder::default() };
    setup.build(&progress);
    let notes = progress.state.lock().unwrap().1.join("\n");
    assert!(notes.contains("bookworm-updates") && notes.contains("bookworm-security"), "{notes}");
    let updates = "/debian/dists/bookworm-updates/InRelease";
    setup.archive.server.put(updates, "x");
    for _ in 0..10 {
        setup.archive.server.fault(updates, Fault::Status(500));
    }
    assert!(matches!(
        setup.build(&Quiet),
        BuildError::Mirror(MirrorError::Fetch(FetchError::Status { status: 500, .. }))
    ));
}

#[test]
fn wrong_wishes_are_refused_before_anything_is_fetched() {
    let Some(setup) = setup() else { return };
    let wish = |change: fn(&mut BuildOptions)| {
        let mut options = setup.options.clone();
        change(&mut options);
        setup.store.build_debian(&options, &Quiet).unwrap_err().to_string()
    };
    assert!(wish(|o| o.suite = Some("warty".to_owned())).contains("trixie, bookworm"));
    assert!(wish(|o| o.name = Some("../x".to_owned())).contains("stored"));
    assert!(wish(|o| o.hostname = "a b".to_owned()).contains("host name"));
    assert!(wish(|o| o.size = ByteSize(1 << 20)).contains("--size"));
    assert!(wish(|o| o.root_password = Some("a\nb".to_owned())).contains("one line"));
    assert!(setup.archive.server.requests().is_empty());
    assert!(wish(|o| o.packages = vec!["dish".to_owned()]).contains("do not fit"));
    assert!(setup.archive.server.requests().iter().all(|request| !request.contains(".deb")));
    setup.assert_nothing_left();
}

#[test]
fn the_guests_sources_have_no_password() {
    let address = |uri: &str| crate::mirror::SuiteAddress {
        uri: uri.to_owned(),
        suite: "bookworm".to_owned(),
        keyring: Default::default(),
        check_valid_until: true,
    };
    let release = crate::deb::release::Release::parse("SHA256:\n").unwrap();
    let suites = ["http://user:secret@mirror.test:80/debian", "https://plain.test/debian"]
        .map(|uri| Suite { address: address(uri), release: release.clone() });
    let text = Archives { suite: "bookworm".to_owned(), suites: suites.into() }.guest_sources();
    assert!(
        text.contains("URIs: http://mirror.test:80/debian\n") && text.contains("URIs: https://plain.test/debian\n"),
        "{text}"
    );
    assert!(!text.contains("secret"));
}

#[test]
fn scripts_name_what_they_are_given() {
    // The variables that `install.rs` sets are the ones that the script says it takes.
    let script = include_str!("stage.sh");
    for variable in ["root", "work", "debs", "image", "image_kib", "tmpfs"] {
        assert!(script.contains(&format!("${variable}")), "{variable}");
    }
    for script in ["stage.sh", "init.sh"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/debian").join(script);
        assert!(std::process::Command::new("sh").arg("-n").arg(path).status().unwrap().success(), "{script}");
    }
}
