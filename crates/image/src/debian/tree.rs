//! The file trees of several packages as one tar stream that cannot leave the directory it is unpacked in.

use std::{
    collections::{HashMap, HashSet},
    io::{self, Read, Write},
};

/// Why a package's file tree is not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("its entry '{0}' leaves the root of the package or lies where a file is")]
    Outside(String),
    #[error("its entry '{0}' has a name that is not UTF-8")]
    Name(String),
    #[error("its entry '{0}' goes through more symbolic links than are followed")]
    Loop(String),
    #[error("its entry '{path}' links to '{target}', which is no file of the packages unpacked so far")]
    Link { path: String, target: String },
    #[error("its entry '{0}' is neither a file, a directory nor a link")]
    Kind(String),
    #[error("copying its files failed")]
    Io(#[from] io::Error),
}

const LINK_LIMIT: usize = 40;

/// Writes a tree, entry by entry, with every path already resolved: no path goes through a symbolic link, so whoever
/// unpacks the stream into an empty directory stays within it.
pub struct TreeWriter<W: Write> {
    tar: tar::Builder<W>,
    links: HashMap<String, String>,
    files: HashSet<String>,
    directories: HashSet<String>,
}

/// Owner, permissions and time of a new entry.
fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

impl<W: Write> TreeWriter<W> {
    pub fn new(writer: W) -> Self {
        Self {
            tar: tar::Builder::new(writer),
            links: HashMap::new(),
            files: HashSet::new(),
            directories: HashSet::new(),
        }
    }

    pub fn finish(self) -> io::Result<W> {
        self.tar.into_inner()
    }

    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), TreeError> {
        self.put_directory(path, header(tar::EntryType::Directory, mode))
    }

    pub fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), TreeError> {
        let mut header = header(tar::EntryType::Regular, mode);
        header.set_size(bytes.len() as u64);
        self.put_file(path, header, bytes)
    }

    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), TreeError> {
        self.put_symlink(path, target, header(tar::EntryType::Symlink, 0o777))
    }

    /// Appends what a package's data member holds, except for paths that `leave_out` names.
    pub fn package(&mut self, data: impl Read, leave_out: fn(&str) -> bool) -> Result<(), TreeError> {
        let mut archive = tar::Archive::new(data);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = String::from_utf8(entry.path_bytes().into_owned())
                .map_err(|error| TreeError::Name(String::from_utf8_lossy(error.as_bytes()).into_owned()))?;
            if leave_out(path.trim_start_matches("./").trim_end_matches('/')) {
                continue;
            }
            let target = match entry.link_name_bytes() {
                None => String::new(),
                Some(bytes) => String::from_utf8(bytes.into_owned()).map_err(|_| TreeError::Name(path.clone()))?,
            };
            let kind = entry.header().entry_type();
            let mut header = header(kind, entry.header().mode()? & 0o7777);
            header.set_uid(entry.header().uid()?);
            header.set_gid(entry.header().gid()?);
            header.set_mtime(entry.header().mtime()?);
            match kind {
                tar::EntryType::Directory => self.put_directory(&path, header)?,
                tar::EntryType::Regular | tar::EntryType::Continuous => {
                    header.set_entry_type(tar::EntryType::Regular);
                    header.set_size(entry.size());
                    self.put_file(&path, header, &mut entry)?;
                }
                tar::EntryType::Symlink => self.put_symlink(&path, &target, header)?,
                tar::EntryType::Link => self.put_hard_link(&path, &target, header)?,
                _ => return Err(TreeError::Kind(path)),
            }
        }
        Ok(())
    }

    fn put_directory(&mut self, path: &str, mut header: tar::Header) -> Result<(), TreeError> {
        // A directory where there is a link to one stays the link: `/lib` of old packages in a merged /usr.
        let path = self.resolve(path, true)?;
        self.check_parents(&path)?;
        if self.files.contains(&path) {
            return Err(TreeError::Outside(path));
        }
        if path.is_empty() || !self.directories.insert(path.clone()) {
            return Ok(());
        }
        Ok(self.tar.append_data(&mut header, format!("{path}/"), io::empty())?)
    }

    fn put_file(&mut self, path: &str, mut header: tar::Header, content: impl Read) -> Result<(), TreeError> {
        let path = self.place(path)?;
        self.tar.append_data(&mut header, &path, content)?;
        self.files.insert(path);
        Ok(())
    }

    fn put_symlink(&mut self, path: &str, target: &str, mut header: tar::Header) -> Result<(), TreeError> {
        let known = self.resolve(path, false)?;
        if self.links.get(&known).is_some_and(|existing| existing == target) {
            return Ok(());
        }
        let path = self.place(path)?;
        // Where the link leads is for the guest to follow, inside its own root.
        self.tar.append_link(&mut header, &path, target)?;
        self.links.insert(path, target.to_owned());
        Ok(())
    }

    fn put_hard_link(&mut self, path: &str, target: &str, mut header: tar::Header) -> Result<(), TreeError> {
        let resolved = self.resolve(target, false)?;
        if !self.files.contains(&resolved) {
            return Err(TreeError::Link { path: path.to_owned(), target: target.to_owned() });
        }
        let path = self.place(path)?;
        if path == resolved {
            return Err(TreeError::Link { path, target: target.to_owned() });
        }
        self.tar.append_link(&mut header, &path, &resolved)?;
        self.files.insert(path);
        Ok(())
    }

    /// Where an entry that is no directory goes; it takes the place of a file or link that is there.
    fn place(&mut self, path: &str) -> Result<String, TreeError> {
        let resolved = self.resolve(path, false)?;
        if resolved.is_empty() || self.directories.contains(&resolved) {
            return Err(TreeError::Outside(path.to_owned()));
        }
        self.check_parents(&resolved)?;
        self.links.remove(&resolved);
        self.files.remove(&resolved);
        Ok(resolved)
    }

    /// Nothing lies below a file.
    fn check_parents(&self, path: &str) -> Result<(), TreeError> {
        let below_file = path.match_indices('/').any(|(at, _)| self.files.contains(&path[..at]));
        if below_file { Err(TreeError::Outside(path.to_owned())) } else { Ok(()) }
    }

    /// The path with the links in it followed as they would be inside the root; the last part only if `through_last`.
    fn resolve(&self, path: &str, through_last: bool) -> Result<String, TreeError> {
        let mut pending: Vec<&str> = path.split('/').rev().filter(|part| !part.is_empty() && *part != ".").collect();
        if path.starts_with('/') || pending.contains(&"..") || path.contains('\0') {
            return Err(TreeError::Outside(path.to_owned()));
        }
        let mut resolved: Vec<&str> = Vec::new();
        let mut followed = 0;
        while let Some(part) = pending.pop() {
            if part == ".." {
                resolved.pop();
                continue;
            }
            resolved.push(part);
            if pending.is_empty() && !through_last {
                break;
            }
            if let Some(target) = self.links.get(&resolved.join("/")) {
                followed += 1;
                if followed > LINK_LIMIT {
                    return Err(TreeError::Loop(path.to_owned()));
                }
                if target.starts_with('/') {
                    resolved.clear();
                } else {
                    resolved.pop();
                }
                pending.extend(target.split('/').rev().filter(|part| !part.is_empty() && *part != "."));
            }
        }
        Ok(resolved.join("/"))
    }
}

#[cfg(test)]
mod tests;
