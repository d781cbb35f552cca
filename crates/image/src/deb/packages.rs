use std::collections::HashMap;

use super::{
    control::{ControlError, Paragraph, paragraphs},
    relation::{self, Alternatives, RelationError, Target},
    version::Version,
};
use crate::digest::Sha256Sum;

/// A binary package as a `Packages` index describes it.
#[derive(Clone, Debug)]
pub struct Package {
    pub name: String,
    pub version: Version,
    pub architecture: String,
    /// What a relation must name if it names an architecture: `all` counts as the one that the index is read for.
    native: String,
    pub priority: String,
    pub essential: bool,
    /// Path below the archive's base address.
    pub filename: String,
    pub size_bytes: u64,
    pub installed_bytes: u64,
    pub sha256: Sha256Sum,
    /// Which archive of the build (index into its list) carries the file.
    pub archive: usize,
    relations: HashMap<Relation, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Relation {
    PreDepends,
    Depends,
    Provides,
    Conflicts,
    Breaks,
}

const RELATIONS: [(&str, Relation); 5] = [
    ("Pre-Depends", Relation::PreDepends),
    ("Depends", Relation::Depends),
    ("Provides", Relation::Provides),
    ("Conflicts", Relation::Conflicts),
    ("Breaks", Relation::Breaks),
];

/// Why an index cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    #[error("the package index is malformed")]
    Malformed(#[from] ControlError),
    #[error("package '{package}' in the index has no usable '{field}' field")]
    Field { package: String, field: &'static str },
    #[error("the '{field}' field of package '{package}' is malformed")]
    Relation { package: String, field: &'static str, source: RelationError },
}

impl Package {
    fn parse(paragraph: &Paragraph<'_>, archive: usize, native: &str) -> Result<Self, IndexError> {
        let package = paragraph.get("Package").unwrap_or_default();
        let bad = |field| IndexError::Field { package: package.to_owned(), field };
        let text = |field| paragraph.get(field).filter(|v| !v.is_empty()).ok_or_else(|| bad(field));
        let filename = text("Filename")?;
        if !is_plain_path(filename) {
            return Err(bad("Filename"));
        }
        Ok(Self {
            name: text("Package").and_then(|n| is_plain_name(n).then_some(n).ok_or_else(|| bad("Package")))?.to_owned(),
            version: Version::new(text("Version")?),
            architecture: text("Architecture")?.to_owned(),
            native: native.to_owned(),
            priority: paragraph.get("Priority").unwrap_or("optional").to_owned(),
            essential: paragraph.get("Essential") == Some("yes"),
            filename: filename.to_owned(),
            size_bytes: text("Size")?.parse().map_err(|_| bad("Size"))?,
            // KiB, an estimate by policy; only used to foresee the space that is needed.
            installed_bytes: paragraph
                .get("Installed-Size")
                .and_then(|v| v.parse::<u64>().ok())
                .map_or(0, |kib| kib.saturating_mul(1024)),
            sha256: text("SHA256")?.parse().map_err(|_| bad("SHA256"))?,
            archive,
            relations: RELATIONS
                .iter()
                .filter_map(|(field, relation)| Some((*relation, paragraph.get(field)?.to_owned())))
                .collect(),
        })
    }

    pub fn relation(&self, relation: Relation) -> Result<Vec<Alternatives>, IndexError> {
        let Some(text) = self.relations.get(&relation) else { return Ok(Vec::new()) };
        let field = RELATIONS.iter().find(|(_, r)| *r == relation).map_or("", |(field, _)| field);
        relation::parse(text).map_err(|source| IndexError::Relation { package: self.name.clone(), field, source })
    }

    /// Whether this package satisfies `target`, by its own name or by one that it provides.
    ///
    /// An unversioned `Provides` satisfies no versioned dependency (Debian Policy Manual section 7.5).
    pub fn satisfies(&self, target: &Target) -> bool {
        if target.architecture.as_ref().is_some_and(|wanted| *wanted != self.native) {
            return false;
        }
        if self.name == target.name {
            return target.accepts(&self.version);
        }
        let Ok(provides) = self.relation(Relation::Provides) else { return false };
        provides.iter().flatten().filter(|p| p.name == target.name).any(|p| match (&p.bound, &target.bound) {
            (_, None) => true,
            (Some((_, version)), Some(_)) => target.accepts(version),
            (None, Some(_)) => false,
        })
    }
}

fn is_plain_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// A relative path of plain components, so that it can be joined to an address or a directory without leaving it.
pub fn is_plain_path(path: &str) -> bool {
    path.split('/').all(|part| {
        !part.is_empty() && part != "." && part != ".." && part.chars().all(|c| c.is_ascii_graphic() && c != '\\')
    })
}

/// The packages of one suite with its updates: of each name the highest version.
#[derive(Debug, Default)]
pub struct Index {
    packages: Vec<Package>,
    by_name: HashMap<String, usize>,
    providers: HashMap<String, Vec<usize>>,
}

impl Index {
    /// Adds the packages of one `Packages` file. Of two versions of a package the higher one stays.
    pub fn add(&mut self, text: &str, archive: usize, architecture: &str) -> Result<(), IndexError> {
        for paragraph in paragraphs(text) {
            let package = Package::parse(&paragraph?, archive, architecture)?;
            if package.architecture != architecture && package.architecture != "all" {
                continue;
            }
            match self.by_name.get(&package.name) {
                Some(&at) if self.packages[at].version.policy_cmp(&package.version).is_ge() => {}
                Some(&at) => self.packages[at] = package,
                None => {
                    self.by_name.insert(package.name.clone(), self.packages.len());
                    self.packages.push(package);
                }
            }
        }
        self.list_providers()
    }

    fn list_providers(&mut self) -> Result<(), IndexError> {
        self.providers.clear();
        for (at, package) in self.packages.iter().enumerate() {
            for provided in package.relation(Relation::Provides)?.into_iter().flatten() {
                self.providers.entry(provided.name).or_default().push(at);
            }
        }
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&Package> {
        self.by_name.get(name).map(|&at| &self.packages[at])
    }

    pub fn iter(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter()
    }

    /// What can satisfy `target`: the package of that name first, then its providers in the order of the index.
    pub fn candidates(&self, target: &Target) -> impl Iterator<Item = &Package> {
        let own = self.get(&target.name).into_iter();
        let providers = self.providers.get(&target.name).into_iter().flatten().map(|&at| &self.packages[at]);
        own.chain(providers).filter(|package| package.satisfies(target))
    }

    /// Up to three names close to `wanted`, for a message.
    pub fn near(&self, wanted: &str) -> Vec<String> {
        let mut near: Vec<(usize, &str)> = self
            .by_name
            .keys()
            .filter(|name| name.len().abs_diff(wanted.len()) <= 8)
            .filter_map(|name| {
                let distance = edit_distance(name, wanted);
                let related = name.starts_with(wanted) || wanted.starts_with(name.as_str());
                (distance <= 2 || (related && name.len() > 2)).then_some((distance, name.as_str()))
            })
            .collect();
        near.sort_unstable();
        near.into_iter().take(3).map(|(_, name)| name.to_owned()).collect()
    }
}

fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
