use super::*;

fn store() -> (tempfile::TempDir, ImageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(StateDir::new(dir.path())).unwrap();
    (dir, store)
}

fn add(store: &ImageStore, name: &str, suite: &str, content: &str) -> Image {
    let stage = store.stage().unwrap();
    let prepared = stage.path.join("image");
    fs::create_dir(&prepared).unwrap();
    let mut files = BTreeMap::new();
    for file in ["kernel", "initrd", "root.raw"] {
        fs::write(prepared.join(file), content).unwrap();
        let record = FileRecord { size_bytes: content.len() as u64, sha256: Sha256Sum::of(content.as_bytes()) };
        files.insert(file.to_owned(), record);
    }
    let record = ImageRecord {
        schema: SCHEMA,
        name: name.to_owned(),
        distribution: "debian".to_owned(),
        suite: suite.to_owned(),
        architecture: "amd64".to_owned(),
        kernel_version: "6.1".to_owned(),
        cmdline: "root=/dev/vda".to_owned(),
        created: 1,
        agent: None,
        root_bytes: content.len() as u64,
        files,
        packages: BTreeMap::new(),
    };
    store.commit(&prepared, &record).unwrap()
}

fn entries(store: &ImageStore) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(store.dir()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_image_is_stored_replaced_and_removed() {
    let (_dir, store) = store();
    let first = add(&store, "debian", "bookworm", "one");
    let open = File::open(&first.root).unwrap();
    let second = add(&store, "debian", "bookworm", "two");
    assert_eq!(fs::read_to_string(&second.root).unwrap(), "two");
    assert_eq!(io::read_to_string(open).unwrap(), "one", "a machine that runs keeps its disk");
    assert_eq!(entries(&store), [".lock", "debian"]);
    store.verify("debian").unwrap();
    store.remove("debian").unwrap();
    assert_eq!(entries(&store), [".lock"]);
    assert!(matches!(store.remove("debian"), Err(StoreError::NotFound { .. })));
}

#[test]
fn names_cannot_leave_the_store() {
    let (_dir, store) = store();
    for name in ["", ".", "..", "../x", "a/b", ".hidden", "UPPER", "-x", &"x".repeat(65), "a\0"] {
        assert!(matches!(store.inspect(name), Err(StoreError::Name(_))), "{name}");
        assert!(matches!(store.remove(name), Err(StoreError::Name(_))), "{name}");
    }
}

#[test]
fn references_find_the_newest_release() {
    let (_dir, store) = store();
    let name = |reference: &str| store.find(reference).map(|image| image.name).map_err(|error| error.to_string());
    assert!(name("debian").unwrap_err().contains("vireo image build debian"));
    add(&store, "debian-bookworm", "bookworm", "12");
    add(&store, "debian-trixie", "trixie", "13");
    add(&store, "web", "trixie", "13");
    assert_eq!(name("debian").unwrap(), "debian-trixie");
    assert_eq!(name("debian:bookworm").unwrap(), "debian-bookworm");
    assert_eq!(name("web").unwrap(), "web");
    assert!(name("other").unwrap_err().contains("debian-bookworm, debian-trixie, web"));
    add(&store, "debian", "bookworm", "own");
    assert_eq!(name("debian").unwrap(), "debian");
}

#[test]
fn damage_is_named_and_does_not_hide_the_others() {
    let (_dir, store) = store();
    for name in ["a", "b", "c", "d", "e"] {
        add(&store, name, "trixie", "x");
    }
    fs::remove_file(store.dir().join("a/kernel")).unwrap();
    fs::write(store.dir().join("b/root.raw"), "longer").unwrap();
    fs::write(store.dir().join("c/image.json"), "{").unwrap();
    let record = fs::read_to_string(store.dir().join("d/image.json")).unwrap();
    fs::write(store.dir().join("d/image.json"), record.replace("\"schema\": 1", "\"schema\": 99")).unwrap();
    fs::write(store.dir().join("e/kernel"), "y").unwrap();
    let list = store.list().unwrap();
    let damaged: Vec<String> =
        list.iter().filter_map(|listed| Some(listed.image.as_ref().err()?.to_string())).collect();
    assert_eq!((list.len(), damaged.len()), (5, 4));
    for (message, word) in damaged.iter().zip(["'kernel' is missing", "6 bytes", "malformed", "newer Vireo"]) {
        assert!(message.contains(word), "{message}");
    }
    assert!(store.inspect("e").is_ok());
    assert!(matches!(store.verify("e"), Err(StoreError::Damaged { .. })), "its size is right, its content is not");
}

#[test]
fn stages_of_dead_builds_vanish_and_living_ones_stay() {
    let (dir, store) = store();
    let living = store.stage().unwrap();
    let dead = store.dir().join(".stage-1-0");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("root.raw"), "half").unwrap();
    let again = ImageStore::open(StateDir::new(dir.path())).unwrap();
    assert!(living.path.exists());
    assert!(!dead.exists());
    assert!(again.list().unwrap().is_empty());
}
