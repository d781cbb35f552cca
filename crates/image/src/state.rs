use std::{
    env,
    fs::{self, File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

/// The directory in which Vireo keeps images and caches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir(PathBuf);

impl StateDir {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// `/var/lib/vireo` for root, else `$XDG_DATA_HOME/vireo` or `~/.local/share/vireo`.
    ///
    /// `--state` and `VIREO_STATE` are the command's to look at; they go to [`StateDir::new`].
    pub fn default_for_user() -> Self {
        Self::resolve(is_root(), |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute()))
    }

    fn resolve(root: bool, variable: impl Fn(&str) -> Option<PathBuf>) -> Self {
        let own = || {
            let data = variable("XDG_DATA_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/share")))?;
            Some(data.join("vireo"))
        };
        let path = if root { None } else { own() };
        Self(path.unwrap_or_else(|| PathBuf::from("/var/lib/vireo")))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }
}

pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// An advisory lock on a file, released when it is dropped or its process ends.
#[derive(Debug)]
pub(crate) struct FileLock {
    pub file: File,
}

impl FileLock {
    /// Opens (or makes) the file and locks it. `None` when another process holds it.
    pub fn try_take(path: &Path) -> io::Result<Option<Self>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        // SAFETY: the descriptor is open for as long as `file` lives.
        let result = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
        if result == 0 {
            return Ok(Some(Self { file }));
        }
        let error = io::Error::last_os_error();
        if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) }
    }
}

/// Removes what is there, be it a file or a tree. Nothing there is fine.
pub(crate) fn remove_any(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_user_and_the_xdg_folders() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value))
        };
        let path = |root, pairs| StateDir::resolve(root, env(pairs)).0;
        assert_eq!(path(true, &[("HOME", "/root")]), Path::new("/var/lib/vireo"));
        assert_eq!(path(false, &[("HOME", "/home/u")]), Path::new("/home/u/.local/share/vireo"));
        assert_eq!(path(false, &[("HOME", "/home/u"), ("XDG_DATA_HOME", "/x")]), Path::new("/x/vireo"));
        assert_eq!(path(false, &[]), Path::new("/var/lib/vireo"));
    }

    #[test]
    fn a_lock_excludes_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = FileLock::try_take(&path).unwrap();
        assert!(first.is_some());
        assert!(FileLock::try_take(&path).unwrap().is_none());
        drop(first);
        assert!(FileLock::try_take(&path).unwrap().is_some());
    }
}
