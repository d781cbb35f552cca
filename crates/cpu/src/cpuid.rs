//! CPUID tables: what a guest is told its processor can do.

mod features;
mod topology;

#[cfg(test)]
mod tests;

/// One leaf as CPUID returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidLeaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// The leaves that a vCPU answers, by function and, where the function has them, by index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidTable {
    /// `(function, index or None where the function has no subleaves, registers)`, sorted.
    leaves: Vec<(u32, Option<u32>, CpuidLeaf)>,
}

impl CpuidTable {
    /// Replaces or adds a leaf.
    pub fn set(&mut self, function: u32, index: Option<u32>, leaf: CpuidLeaf) {
        match self.leaves.binary_search_by_key(&(function, index), |l| (l.0, l.1)) {
            Ok(at) => self.leaves[at].2 = leaf,
            Err(at) => self.leaves.insert(at, (function, index, leaf)),
        }
    }

    /// What CPUID with this EAX and ECX returns; all zeroes for leaves that are not there.
    pub fn get(&self, function: u32, index: u32) -> CpuidLeaf {
        self.leaves
            .iter()
            .find(|(f, i, _)| *f == function && i.is_none_or(|i| i == index))
            .map_or_else(CpuidLeaf::default, |(_, _, leaf)| *leaf)
    }

    pub fn iter(&self) -> impl Iterator<Item = &(u32, Option<u32>, CpuidLeaf)> {
        self.leaves.iter()
    }

    /// Takes a function with all its subleaves out: it then reads as zeroes.
    pub fn remove(&mut self, function: u32) {
        self.leaves.retain(|(f, ..)| *f != function);
    }

    /// Changes every leaf of `function` that is there, telling its index (0 where it has no subleaves).
    pub fn update(&mut self, function: u32, mut change: impl FnMut(u32, &mut CpuidLeaf)) {
        for (_, index, leaf) in self.leaves.iter_mut().filter(|(f, ..)| *f == function) {
            change(index.unwrap_or(0), leaf);
        }
    }
}
