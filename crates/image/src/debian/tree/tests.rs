use proptest::prelude::*;

use super::*;

/// A data member with entries `(kind, path, target or content)`; names are written as they are, however hostile.
fn data(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, path, text) in entries {
        let mut header = header(*kind, 0o644);
        let field = &mut header.as_old_mut().name;
        field[..path.len()].copy_from_slice(path.as_bytes());
        let content = if *kind == tar::EntryType::Regular { text.as_bytes() } else { b"" };
        if content.is_empty() {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpack(packages: &[Vec<u8>]) -> Result<Vec<(String, String)>, TreeError> {
    let mut writer = TreeWriter::new(Vec::new());
    for package in packages {
        writer.package(&package[..], |path| path == "out")?;
    }
    let stream = writer.finish()?;
    let mut archive = tar::Archive::new(&stream[..]);
    let entries = archive.entries()?.map(|entry| {
        let entry = entry?;
        let link = entry.link_name()?.map(|l| l.display().to_string()).unwrap_or_default();
        Ok((entry.path()?.display().to_string(), link))
    });
    Ok(entries.collect::<io::Result<_>>()?)
}

use tar::EntryType::{Block, Directory, Fifo, Link, Regular, Symlink};

#[test]
fn keeps_a_plain_tree() {
    let tree = data(&[
        (Directory, "./", ""),
        (Directory, "./usr/", ""),
        (Regular, "./usr/tool", "x"),
        (Link, "./usr/same", "./usr/tool"),
        (Symlink, "./usr/other", "/etc/alternatives/other"),
        (Regular, "./out", "x"),
    ]);
    let wanted = [("usr/", ""), ("usr/tool", ""), ("usr/same", "usr/tool"), ("usr/other", "/etc/alternatives/other")];
    let wanted: Vec<_> = wanted.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    assert_eq!(unpack(&[tree]).unwrap(), wanted);
}

#[test]
fn refuses_to_leave_the_root() {
    for entry in [
        (Regular, "../evil", "x"),
        (Regular, "./a/../../evil", "x"),
        (Regular, "/etc/evil", "x"),
        (Directory, "../evil/", ""),
        (Symlink, "a/../../evil", "x"),
        (Link, "./evil", "/etc/passwd"),
        (Link, "./evil", "../../etc/passwd"),
        (Link, "./evil", "etc/passwd"),
        (Regular, ".", "x"),
        (Fifo, "./pipe", ""),
        (Block, "./disk", ""),
    ] {
        assert!(unpack(&[data(&[entry])]).is_err(), "{entry:?}");
    }
}

#[test]
fn links_are_followed_inside_the_root_only() {
    let merged = data(&[(Symlink, "./lib", "usr/lib"), (Symlink, "./up", "../../.."), (Symlink, "./abs", "/srv")]);
    let second = data(&[
        (Directory, "./lib/", ""),
        (Regular, "./lib/x.so", "x"),
        (Regular, "./up/etc/evil", "x"),
        (Regular, "./abs/evil", "x"),
    ]);
    let paths: Vec<String> = unpack(&[merged, second]).unwrap().into_iter().map(|(path, _)| path).collect();
    assert_eq!(paths, ["lib", "up", "abs", "usr/lib/", "usr/lib/x.so", "etc/evil", "srv/evil"]);
}

#[test]
fn a_link_that_is_replaced_is_no_longer_followed_and_loops_end() {
    let first = data(&[(Symlink, "./a", "b"), (Regular, "./a", "x"), (Symlink, "./x", "y"), (Symlink, "./y", "x")]);
    assert!(matches!(unpack(&[first.clone(), data(&[(Regular, "./x/f", "1")])]), Err(TreeError::Loop(_))));
    assert!(unpack(&[first, data(&[(Link, "./c", "./a")])]).is_ok());
}

proptest! {
    /// Whatever a package names, what comes out never has `..`, never is absolute, and never goes through a link.
    #[test]
    fn output_paths_are_plain(entries in proptest::collection::vec((0usize..4, "[ab./]{1,8}", "[ab./]{1,8}"), 1..12)) {
        let kinds = [Directory, Regular, Symlink, Link];
        let entries: Vec<_> = entries.iter().map(|(kind, path, text)| (kinds[*kind], path.as_str(), text.as_str())).collect();
        if let Ok(written) = unpack(&[data(&entries)]) {
            let mut links = HashSet::new();
            for (path, link) in written {
                let path = path.trim_end_matches('/').to_owned();
                prop_assert!(!path.starts_with('/') && path.split('/').all(|part| part != ".." && part != "." && !part.is_empty()), "{path}");
                let parents: Vec<_> = path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect();
                prop_assert!(parents.iter().all(|parent| !links.contains(parent)), "{path} goes through a link");
                if !link.is_empty() { links.insert(path); } else { links.remove(&path); }
            }
        }
    }
}
