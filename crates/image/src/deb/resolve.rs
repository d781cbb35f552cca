use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use super::{
    packages::{Index, IndexError, Package, Relation},
    relation::{Alternatives, Target},
};

/// Why no set of packages could be found.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error("there is no package '{name}' in the archive{hint}")]
    Unknown { name: String, hint: String },
    #[error("package '{package}' needs '{needs}', which the archive does not have")]
    Unsatisfiable { package: String, needs: String },
    #[error(
        "packages '{a}' and '{b}' exclude each other ('{a}' conflicts with or breaks '{relation}'); leave one of them out"
    )]
    Conflict { a: String, b: String, relation: String },
    #[error("the package index cannot be used")]
    Index(#[from] IndexError),
}

/// A closed set of packages: every dependency of each is satisfied by another one of the set.
#[derive(Debug)]
pub struct Selection<'a> {
    packages: BTreeMap<&'a str, &'a Package>,
}

/// Selects `seeds` with all they depend on. Recommended packages are left out.
///
/// Of alternatives the first that a selected package satisfies wins, else the first that the archive can satisfy:
/// what `apt-get` does on an empty system. Seeds are selected before anything else is looked at, so they decide.
pub fn resolve<'a>(index: &'a Index, seeds: &[String]) -> Result<Selection<'a>, ResolveError> {
    let mut selection = Selection { packages: BTreeMap::new() };
    let mut pending = VecDeque::new();
    for name in seeds {
        let package = seed(index, name)?;
        if selection.packages.insert(&package.name, package).is_none() {
            pending.push_back(package);
        }
    }
    while let Some(package) = pending.pop_front() {
        for alternatives in dependencies(package)? {
            if selection.satisfier(&alternatives).is_some() {
                continue;
            }
            let found = alternatives.iter().find_map(|target| index.candidates(target).next());
            let found = found.ok_or_else(|| ResolveError::Unsatisfiable {
                package: package.name.clone(),
                needs: describe(&alternatives),
            })?;
            selection.packages.insert(&found.name, found);
            pending.push_back(found);
        }
    }
    selection.check_conflicts()?;
    Ok(selection)
}

fn seed<'a>(index: &'a Index, name: &str) -> Result<&'a Package, ResolveError> {
    let target = Target { name: name.to_owned(), architecture: None, bound: None };
    index.candidates(&target).next().ok_or_else(|| {
        let near = index.near(name);
        let hint = if near.is_empty() { String::new() } else { format!("; near names: {}", near.join(", ")) };
        ResolveError::Unknown { name: name.to_owned(), hint }
    })
}

fn dependencies(package: &Package) -> Result<Vec<Alternatives>, IndexError> {
    let mut all = package.relation(Relation::PreDepends)?;
    all.extend(package.relation(Relation::Depends)?);
    Ok(all)
}

fn describe(alternatives: &[Target]) -> String {
    alternatives.iter().map(Target::to_string).collect::<Vec<_>>().join(" | ")
}

impl<'a> Selection<'a> {
    pub fn iter(&self) -> impl Iterator<Item = &'a Package> {
        self.packages.values().copied()
    }

    pub fn get(&self, name: &str) -> Option<&'a Package> {
        self.packages.get(name).copied()
    }

    /// How many packages.
    pub fn count(&self) -> usize {
        self.packages.len()
    }

    /// The selected package that satisfies one of `alternatives`, the preferred one first.
    fn satisfier(&self, alternatives: &[Target]) -> Option<&'a Package> {
        alternatives.iter().find_map(|target| {
            let own = self.packages.get(target.name.as_str()).copied().filter(|p| p.satisfies(target));
            own.or_else(|| self.iter().find(|package| package.satisfies(target)))
        })
    }

    fn check_conflicts(&self) -> Result<(), ResolveError> {
        for a in self.iter() {
            for relation in [Relation::Conflicts, Relation::Breaks] {
                for target in a.relation(relation)?.into_iter().flatten() {
                    // A package may conflict with a name that it provides itself (Policy 7.6.2): meant are the others.
                    if let Some(b) = self.iter().find(|b| b.name != a.name && b.satisfies(&target)) {
                        return Err(ResolveError::Conflict {
                            a: a.name.clone(),
                            b: b.name.clone(),
                            relation: target.to_string(),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// `roots` with everything that they depend on, within this selection.
    pub fn closure(&self, roots: impl IntoIterator<Item = &'a Package>) -> Result<HashSet<&'a str>, IndexError> {
        let mut pending: Vec<&Package> = roots.into_iter().collect();
        let mut seen: HashSet<&str> = pending.iter().map(|p| p.name.as_str()).collect();
        while let Some(package) = pending.pop() {
            for alternatives in dependencies(package)? {
                if let Some(found) = self.satisfier(&alternatives)
                    && seen.insert(&found.name)
                {
                    pending.push(found);
                }
            }
        }
        Ok(seen)
    }

    /// The packages outside `installed` in groups that can be unpacked one group after the other: whatever a package
    /// pre-depends on, with all that this needs to be configured, stands in an earlier group.
    pub fn install_order(&self, installed: &HashSet<&str>) -> Result<Vec<Group<'a>>, IndexError> {
        let rest: Vec<&Package> = self.iter().filter(|p| !installed.contains(p.name.as_str())).collect();
        let mut before: HashMap<&str, HashSet<&str>> = HashMap::new();
        for package in &rest {
            let direct: Vec<&Package> = package
                .relation(Relation::PreDepends)?
                .iter()
                .filter_map(|alternatives| self.satisfier(alternatives))
                .filter(|p| !installed.contains(p.name.as_str()))
                .collect();
            let mut needed = self.closure(direct)?;
            needed.retain(|name| *name != package.name && !installed.contains(name));
            before.insert(&package.name, needed);
        }
        let mut level: HashMap<&str, usize> = rest.iter().map(|p| (p.name.as_str(), 0)).collect();
        // Each round raises at least one level; a cycle (against policy) stops at the bound and dpkg judges it.
        for _ in 0..16 {
            let mut raised = false;
            for package in &rest {
                let wanted =
                    before[package.name.as_str()].iter().filter_map(|name| level.get(name)).max().map_or(0, |l| l + 1);
                let current = level.entry(&package.name).or_default();
                raised |= wanted > *current;
                *current = wanted.max(*current);
            }
            if !raised {
                break;
            }
        }
        let mut groups: BTreeMap<usize, Group<'a>> = BTreeMap::new();
        for package in rest {
            let group = groups.entry(level[package.name.as_str()]).or_default();
            group.configured_before.extend(before[package.name.as_str()].iter());
            group.packages.push(package);
        }
        Ok(groups.into_values().collect())
    }
}

/// Packages that are unpacked together.
#[derive(Debug, Default)]
pub struct Group<'a> {
    /// What must be configured first: pre-dependencies and all that they depend on. Earlier groups have them.
    pub configured_before: BTreeSet<&'a str>,
    pub packages: Vec<&'a Package>,
}

#[cfg(test)]
mod tests;
