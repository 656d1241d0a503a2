//! The files of followers: made beside and renamed, or changed in place; always below their folder.
//!
//! ```text
//! STORE/now/GROUP/PATH     a follower, at the primary's path or at a place of its policy
//! STORE/now/.new-GROUP     one that is being made
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::super::apply::open_beneath;

/// Of folders above a follower.
const MODE_ABOVE: Mode = Mode::from_raw_mode(0o755);

/// The folder of a group's followers.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    new: PathBuf,
}

impl Folder {
    /// That of a group, which exists.
    pub(super) fn new(path: &Path) -> Self {
        let mut new = std::ffi::OsString::from(".new-");
        new.push(path.file_name().unwrap_or_default());
        Self { path: path.into(), new: path.with_file_name(new) }
    }

    fn top(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.path, flags, Mode::empty())?)
    }

    /// The folder of a place and the name in it; with `make` what is missing is made.
    fn above<'p>(&self, place: &'p Path, make: bool) -> io::Result<(OwnedFd, &'p [u8])> {
        let bad = || io::Error::new(io::ErrorKind::InvalidInput, "it names no file");
        let name = place.file_name().ok_or_else(bad)?.as_bytes();
        let mut dir = self.top()?;
        for above in place.parent().into_iter().flat_map(Path::iter) {
            if make {
                match rustix::fs::mkdirat(&dir, above, MODE_ABOVE) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            dir = open_beneath(&dir, above.as_bytes(), OFlags::PATH | OFlags::DIRECTORY)?;
        }
        Ok((dir, name))
    }

    /// Opens a follower to change it; none if it is not there.
    pub(super) fn open(&self, place: &Path) -> io::Result<Option<File>> {
        let found = self.above(place, false).and_then(|(dir, name)| {
            Ok(File::from(open_beneath(&dir, name, OFlags::RDWR | OFlags::NONBLOCK)?))
        });
        match found {
            Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
            Ok(_) => Ok(None),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes one that was only begun.
    pub(super) fn clean(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Begins one that is going to take a place, beside all of them.
    pub(super) fn begin(&self) -> io::Result<File> {
        self.clean()?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::open(&self.new, flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Gives the one that was begun its place, in one step and durably.
    pub(super) fn put(&self, file: &File, place: &Path) -> io::Result<()> {
        crate::durable::file(file)?;
        let (dir, name) = self.above(place, true)?;
        rustix::fs::renameat(rustix::fs::CWD, &self.new, &dir, name)?;
        // Its folders, too, which may be new: each is an entry of the one above.
        let mut at = place.parent();
        while let Some(above) = at {
            crate::durable::directory(&self.path.join(above))?;
            at = above.parent();
        }
        Ok(())
    }

    /// Removes a follower, and the folders above it that are empty then.
    pub(super) fn remove(&self, place: &Path) -> io::Result<()> {
        let mut at = Some(place);
        let mut flags = AtFlags::empty();
        while let Some(place) = at.filter(|place| !place.as_os_str().is_empty()) {
            let removed = self
                .above(place, false)
                .and_then(|(dir, name)| Ok(rustix::fs::unlinkat(&dir, OsStr::from_bytes(name), flags)?));
            match removed {
                Ok(()) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                // Another follower is in it.
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && flags == AtFlags::REMOVEDIR => {
                    break;
                }
                Err(error) => return Err(error),
            }
            flags = AtFlags::REMOVEDIR;
            at = place.parent();
        }
        Ok(())
    }

    /// The places of all that is there.
    pub(super) fn all(&self) -> io::Result<Vec<PathBuf>> {
        let (mut found, mut todo) = (Vec::new(), vec![PathBuf::new()]);
        while let Some(folder) = todo.pop() {
            for entry in std::fs::read_dir(self.path.join(&folder))? {
                let entry = entry?;
                let place = folder.join(entry.file_name());
                if entry.file_type()?.is_dir() { todo.push(place) } else { found.push(place) }
            }
        }
        Ok(found)
    }
}

/// Makes a range read as zeros; the size stays.
pub(super) fn zero(file: &File, start: u64, end: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file.as_fd(), hole, start, end - start) {
        Err(Errno::OPNOTSUPP) => {
            let zeros = vec![0; 1 << 20];
            let mut at = start;
            while at < end {
                let len = (end - at).min(zeros.len() as u64) as usize;
                file.write_all_at(&zeros[..len], at)?;
                at += len as u64;
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn followers_come_whole_and_go_with_their_folders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("group");
        std::fs::create_dir(&path).unwrap();
        let folder = Folder::new(&path);
        for (place, text) in [("a/b/c", "one"), ("a/b/c", "two"), ("a/d", "three")] {
            let file = folder.begin().unwrap();
            file.write_all_at(text.as_bytes(), 0).unwrap();
            folder.put(&file, Path::new(place)).unwrap();
            assert_eq!(std::fs::read_to_string(path.join(place)).unwrap(), text);
        }
        let mut all = folder.all().unwrap();
        all.sort();
        assert_eq!(all, [Path::new("a/b/c"), Path::new("a/d")]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside them");
        assert!(folder.open(Path::new("a/b/c")).unwrap().is_some());
        assert!(folder.open(Path::new("a/b")).unwrap_or(None).is_none(), "a folder is no follower");
        folder.remove(Path::new("a/b/c")).unwrap();
        assert!(!path.join("a/b").exists() && path.join("a/d").exists());
        folder.remove(Path::new("a/b/c")).unwrap();
        folder.remove(Path::new("a/d")).unwrap();
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn no_symlink_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        let (path, outside) = (dir.path().join("group"), dir.path().join("outside"));
        std::fs::create_dir(&path).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("f"), "kept").unwrap();
        std::os::unix::fs::symlink(&outside, path.join("way")).unwrap();
        let folder = Folder::new(&path);
        let file = folder.begin().unwrap();
        for place in ["way/f", "../outside/f"] {
            assert!(folder.put(&file, Path::new(place)).is_err());
            assert!(!matches!(folder.open(Path::new(place)), Ok(Some(_))));
            let _ = folder.remove(Path::new(place));
        }
        assert_eq!(std::fs::read_to_string(outside.join("f")).unwrap(), "kept");
    }
}
