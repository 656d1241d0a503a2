//! Where a path leads, looked for by the thread of the client: on a file system that does not answer only the client
//! waits.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};

/// The path without symlinks and `..`. What does not exist has those of its directories that do, and the names
/// behind them as they are.
pub(super) fn real_path(path: &Path) -> io::Result<PathBuf> {
    let mut missing: Vec<&OsStr> = Vec::new();
    let mut at = path;
    loop {
        match std::fs::canonicalize(at) {
            Ok(real) => return Ok(missing.iter().rev().fold(real, |path, name| path.join(name))),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                let last = at.components().next_back();
                let (Some(Component::Normal(name)), Some(parent)) = (last, at.parent()) else {
                    return Err(e);
                };
                missing.push(name);
                at = parent;
            }
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_and_what_is_gone_keeps_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::create_dir(real.join("d")).unwrap();
        std::fs::write(real.join("d/f"), "").unwrap();
        std::os::unix::fs::symlink("d", real.join("l")).unwrap();
        std::os::unix::fs::symlink("nowhere", real.join("dangling")).unwrap();
        for (path, leads_to) in [
            ("l/f", "d/f"),
            ("d/../l/./f", "d/f"),
            ("l/new", "d/new"),
            ("l/a/b", "d/a/b"),
            ("d/f/x", "d/f/x"),
            ("dangling", "dangling"),
        ] {
            assert_eq!(real_path(&real.join(path)).unwrap(), real.join(leads_to), "{path}");
        }
        assert!(real_path(&real.join("a/../d")).is_err(), "nobody knows where .. leads there");
    }
}
