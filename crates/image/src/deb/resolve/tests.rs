use std::fmt::Write;

use proptest::prelude::*;

use super::*;

/// `name version: field=value; field=value` per line, as an index.
fn index(lines: &str) -> Index {
    let mut text = String::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (head, fields) = line.split_once(':').unwrap_or((line, ""));
        let (name, version) = head.split_once(' ').unwrap_or((head, "1"));
        let _ = writeln!(text, "Package: {name}\nVersion: {version}\nArchitecture: amd64");
        let _ = writeln!(text, "Filename: pool/{name}.deb\nSize: 1\nSHA256: {:064}", 0);
        for (field, value) in fields.split(';').filter_map(|f| f.split_once('=')) {
            let _ = writeln!(
                text,
                "{}: {}",
                field.trim(),
                value.replace("ge ", ">= ").replace("eq ", "= ").replace("lt ", "<< ")
            );
        }
        text.push('\n');
    }
    let mut index = Index::default();
    index.add(&text, 0, "amd64").unwrap();
    index
}

fn names(index: &Index, seeds: &[&str]) -> Result<Vec<String>, ResolveError> {
    let seeds: Vec<String> = seeds.iter().map(|s| (*s).to_owned()).collect();
    Ok(resolve(index, &seeds)?.iter().map(|p| p.name.clone()).collect())
}

#[test]
fn follows_depends_and_pre_depends_but_not_recommends() {
    let index = index(
        "app: Depends=lib (ge 2), data; Recommends=extra
         lib 2.1: Pre-Depends=libc
         libc
         data: Depends=app
         extra",
    );
    assert_eq!(names(&index, &["app"]).unwrap(), ["app", "data", "lib", "libc"]);
}

#[test]
fn alternatives_prefer_what_is_selected_then_the_first_that_exists() {
    let index = index(
        "app: Depends=missing | exim | postfix
         exim
         postfix",
    );
    assert_eq!(names(&index, &["app"]).unwrap(), ["app", "exim"]);
    assert_eq!(names(&index, &["app", "postfix"]).unwrap(), ["app", "postfix"]);
}

#[test]
fn provides_satisfy_by_name_and_by_version_only_if_versioned() {
    let index = index(
        "plain: Provides=mta
         versioned: Provides=mta (eq 3)
         wants-any: Depends=mta
         wants-version: Depends=mta (ge 2)
         wants-newer: Depends=mta (ge 4)",
    );
    assert_eq!(names(&index, &["wants-any"]).unwrap(), ["plain", "wants-any"]);
    assert_eq!(names(&index, &["wants-version"]).unwrap(), ["versioned", "wants-version"]);
    let error = names(&index, &["wants-newer"]).unwrap_err();
    assert_eq!(error.to_string(), "package 'wants-newer' needs 'mta (>= 4)', which the archive does not have");
}

#[test]
fn the_higher_version_of_two_archives_wins() {
    let mut index = index("app 1.0-1");
    let security = "Package: app\nVersion: 1.0-1+deb12u1\nArchitecture: amd64\nFilename: s/app.deb\nSize: 1\nSHA256: ";
    index.add(&format!("{security}{:064}\n", 0), 1, "amd64").unwrap();
    assert_eq!(index.get("app").map(|p| (p.version.to_string(), p.archive)), Some(("1.0-1+deb12u1".to_owned(), 1)));
}

#[test]
fn an_unknown_package_names_its_neighbours() {
    let index = index("nginx\n nginx-full\n apache2");
    let error = names(&index, &["ngnix"]).unwrap_err().to_string();
    assert_eq!(error, "there is no package 'ngnix' in the archive; near names: nginx");
    let error = names(&index, &["quux"]).unwrap_err().to_string();
    assert_eq!(error, "there is no package 'quux' in the archive");
}

#[test]
fn conflicting_packages_are_refused_by_name() {
    let index = index(
        "exim: Provides=mta; Conflicts=mta
         postfix: Provides=mta; Conflicts=mta
         old: Breaks=exim (lt 2)",
    );
    assert!(names(&index, &["exim"]).is_ok(), "a package does not conflict with itself");
    assert!(matches!(names(&index, &["exim", "postfix"]), Err(ResolveError::Conflict { .. })));
    assert!(matches!(names(&index, &["exim", "old"]), Err(ResolveError::Conflict { .. })));
}

#[test]
fn a_relation_to_another_architecture_does_not_concern_this_one() {
    let index = index(
        "libc-i386: Conflicts=libc-x32:i386
         libc-x32: Conflicts=libc-i386:x32
         app: Depends=libc-i386:amd64; Breaks=gone:amd64
         other: Depends=libc-i386:x32
         gone",
    );
    assert_eq!(names(&index, &["app", "libc-x32"]).unwrap(), ["app", "libc-i386", "libc-x32"]);
    assert!(matches!(names(&index, &["other"]), Err(ResolveError::Unsatisfiable { .. })));
    assert!(matches!(names(&index, &["app", "gone"]), Err(ResolveError::Conflict { .. })));
}

#[test]
fn what_is_pre_depended_on_is_installed_earlier_with_its_needs() {
    let index = index(
        "base
         systemd: Pre-Depends=shared; Depends=mount
         shared: Depends=crypto, base
         crypto: Pre-Depends=base
         mount
         tool: Depends=systemd
         app: Pre-Depends=systemd",
    );
    let seeds = ["app", "base", "tool"].map(str::to_owned);
    let selection = resolve(&index, &seeds).unwrap();
    let order = selection.install_order(&HashSet::from(["base"])).unwrap();
    let unpacked: Vec<Vec<&str>> = order.iter().map(|g| g.packages.iter().map(|p| p.name.as_str()).collect()).collect();
    assert_eq!(unpacked, [vec!["crypto", "mount", "shared", "tool"], vec!["systemd"], vec!["app"]]);
    // `tool` cannot be configured before systemd is, so nobody asks for it.
    let configured: Vec<Vec<&str>> = order.iter().map(|g| g.configured_before.iter().copied().collect()).collect();
    assert_eq!(configured, [vec![], vec!["crypto", "shared"], vec!["crypto", "mount", "shared", "systemd"]]);
}

proptest! {
    /// Whatever depends on whatever: the answer is closed or names what is missing, and it ends.
    #[test]
    fn selections_are_closed(edges in proptest::collection::vec((0usize..12, 0usize..14, any::<bool>()), 0..40)) {
        let mut lines = String::new();
        for at in 0..12 {
            let field = |pre: bool| edges.iter().filter(|e| e.0 == at && e.2 == pre).map(|e| format!("p{}", e.1)).collect::<Vec<_>>().join(", ");
            lines.push_str(&format!("p{at}: Depends={}; Pre-Depends={}\n", field(false), field(true)));
        }
        let index = index(&lines);
        match resolve(&index, &["p0".to_owned()]) {
            Ok(selection) => {
                for package in selection.iter() {
                    for alternatives in dependencies(package).unwrap() {
                        prop_assert!(selection.satisfier(&alternatives).is_some());
                    }
                }
                let grouped: usize = selection.install_order(&HashSet::new()).unwrap().iter().map(|group| group.packages.len()).sum();
                prop_assert_eq!(grouped, selection.count());
            }
            Err(error) => {
                let named = matches!(error, ResolveError::Unsatisfiable { .. });
                prop_assert!(named, "{error}");
            }
        }
    }
}
