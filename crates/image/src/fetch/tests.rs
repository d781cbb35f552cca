use super::*;
use crate::{
    progress::Quiet,
    testing::{Fault, Recorder, Server},
};

struct Setup {
    server: Server,
    dir: tempfile::TempDir,
    cache: Cache,
    http: Http,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let mut config = AptConfig::default();
    config.add("Acquire::http::Proxy DIRECT;");
    Setup { server: Server::start(), cache: Cache::open(dir.path().to_owned()).unwrap(), dir, http: Http::new(config) }
}

impl Setup {
    fn serve(&self, path: &str, content: &[u8]) -> Wanted {
        self.server.put(path, content);
        Wanted {
            url: format!("{}{path}", self.server.url),
            sha256: Sha256Sum::of(content),
            size_bytes: content.len() as u64,
        }
    }

    fn fetch(&self, wanted: &Wanted) -> Result<Vec<u8>, FetchError> {
        let paths = self.cache.fetch_all(&self.http, std::slice::from_ref(wanted), &Quiet)?;
        Ok(fs::read(&paths[0]).unwrap())
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("sha256")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn fetches_many_and_only_once() {
    let setup = setup();
    let files: Vec<Wanted> =
        (0..20).map(|n| setup.serve(&format!("/f{n}"), format!("content {n}").repeat(1000).as_bytes())).collect();
    for _ in 0..2 {
        let paths = setup.cache.fetch_all(&setup.http, &files, &Recorder::default()).unwrap();
        assert!(paths.iter().zip(&files).all(|(path, file)| Sha256Sum::of(&fs::read(path).unwrap()) == file.sha256));
    }
    assert_eq!(setup.server.requests().len(), 20);
    assert!(setup.names().iter().all(|name| name.len() == 64));
}

#[test]
fn goes_on_where_a_connection_broke_off() {
    let setup = setup();
    let content: Vec<u8> = (0..300_000u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    let wanted = setup.serve("/big", &content);
    setup.server.fault("/big", Fault::CutAfter(200_000));
    setup.server.fault("/big", Fault::Status(503));
    assert_eq!(setup.fetch(&wanted).unwrap(), content);
    let requests = setup.server.requests();
    assert_eq!(requests.len(), 3);
    assert_eq!(requests[0], "/big 0");
    assert!(!requests[2].ends_with(" 0"), "{requests:?}");
}

#[test]
fn a_file_with_the_wrong_content_is_never_kept() {
    let setup = setup();
    let wanted = setup.serve("/x", b"right content");
    setup.server.fault("/x", Fault::Garbage);
    assert_eq!(setup.fetch(&wanted).unwrap(), b"right content", "another attempt helps against damage on the way");
    let wanted = Wanted { sha256: Sha256Sum::of(b"something else"), ..wanted };
    assert!(matches!(setup.fetch(&wanted), Err(FetchError::Mismatch { .. })));
    let wanted = Wanted { size_bytes: 5, ..wanted };
    assert!(matches!(setup.fetch(&wanted), Err(FetchError::Mismatch { .. })), "more bytes than announced");
    assert_eq!(setup.names().iter().filter(|name| !name.ends_with(".part")).count(), 1);
}

#[test]
fn a_cached_file_is_checked_again() {
    let setup = setup();
    let wanted = setup.serve("/x", b"right content");
    setup.fetch(&wanted).unwrap();
    fs::write(setup.cache.path(&wanted.sha256), b"wrong content").unwrap();
    assert_eq!(setup.fetch(&wanted).unwrap(), b"right content");
    assert_eq!(setup.server.requests().len(), 2);
}

#[test]
fn what_is_not_there_is_said_at_once() {
    let setup = setup();
    let wanted = Wanted { url: format!("{}/none", setup.server.url), sha256: Sha256Sum::of(b""), size_bytes: 1 };
    assert!(matches!(setup.fetch(&wanted), Err(FetchError::Status { status: 404, .. })));
    assert_eq!(setup.server.requests().len(), 1);
    assert!(matches!(setup.http.small(&wanted.url, 10, &Quiet), Err(FetchError::Status { status: 404, .. })));
    setup.server.put("/none", vec![0; 11]);
    assert!(matches!(setup.http.small(&wanted.url, 10, &Quiet), Err(FetchError::TooLarge { limit: 10, .. })));
}

#[test]
fn two_builds_share_one_cache() {
    let setup = setup();
    let wanted = setup.serve("/x", &vec![7; 1 << 20]);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| setup.fetch(&wanted).unwrap());
        }
    });
    assert_eq!(setup.server.requests().len(), 1);
    assert_eq!(setup.names().len(), 1);
}
