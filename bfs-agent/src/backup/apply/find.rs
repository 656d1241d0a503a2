//! Finding objects by number while a step is under way, and opening below the roots only.
//!
//! Before the displaced objects are all aside, an object stands at its old place or aside; after
//! that, in `stage/`, aside, or at its new place. Within each of the two phases the way up from
//! an object is a path of one consistent tree, so the search ends. What is found must be the
//! inode that the index holds for the object; of one that the step makes it holds none, so there
//! what is of another type is somebody else's, and the object is not there.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bfs_common::record::ObjectId;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::super::error::BackupError;
use super::super::index::{Base, Node, Place};
use super::{Step, anchor, show};
use crate::tree::{self, FileStat};

/// Nothing of a path is followed but what lies below the directory, on the same mount.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Of folders above a root.
const MODE_ABOVE: Mode = Mode::from_raw_mode(0o755);

/// Directories held open at once.
const DIRS_MAX: usize = 256;

/// Levels of directories, a bound for the search.
const DEPTH_MAX: usize = 4096;

/// A directory and a name in it.
pub(super) type Spot = (Arc<OwnedFd>, Vec<u8>);

/// Opens an entry of a directory and follows nothing.
pub(in crate::backup) fn open_beneath(dir: impl AsFd, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), BENEATH)
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY);

impl Step<'_> {
    /// The directory and name of a place; `None` if the directory is gone for good.
    pub(super) fn place(&mut self, place: &Place, make: bool) -> Result<Option<Spot>, BackupError> {
        self.place_at(place, make, 0)
    }

    fn place_at(&mut self, place: &Place, make: bool, depth: usize) -> Result<Option<Spot>, BackupError> {
        match place {
            Place::Entry(directory, name) => {
                let dir = self.directory(*directory, depth)?;
                Ok(dir.map(|dir| (dir, name.as_bytes().to_vec())))
            }
            Place::Root(path) => self.root(path.as_path(), make),
        }
    }

    fn root(&mut self, path: &std::path::Path, make: bool) -> Result<Option<Spot>, BackupError> {
        let mut names = self.area.root_place(path)?.names;
        let Some(last) = names.pop() else { return Ok(None) };
        let mut dir =
            open_beneath(&*self.area.tree, b".", DIRECTORY).map_err(BackupError::io("open", path))?;
        for name in names {
            if make {
                match rustix::fs::mkdirat(&dir, &name[..], MODE_ABOVE) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(BackupError::io("make a folder above", path)(error)),
                }
            }
            dir = match open_beneath(&dir, &name, DIRECTORY) {
                Ok(dir) => dir,
                Err(Errno::NOENT) => return Ok(None),
                // In the store itself nobody else has anything.
                Err(Errno::NOTDIR | Errno::LOOP) if self.area.base.is_none() => {
                    if !make {
                        return Ok(None);
                    }
                    self.displace(&dir, &name)?;
                    rustix::fs::mkdirat(&dir, &name[..], MODE_ABOVE)
                        .and_then(|()| open_beneath(&dir, &name, DIRECTORY))
                        .map_err(BackupError::io("make a folder above", path))?
                }
                Err(error) => return Err(BackupError::io("open a folder above", path)(error)),
            };
        }
        Ok(Some((Arc::new(dir), last)))
    }

    /// A directory object, opened; `None` if it is gone.
    fn directory(&mut self, object: ObjectId, depth: usize) -> Result<Option<Arc<OwnedFd>>, BackupError> {
        if let Some(dir) = self.dirs.get(&object) {
            return Ok(Some(dir.clone()));
        }
        let Some((parent, name)) = self.locate_at(object, depth + 1)? else { return Ok(None) };
        let dir = match open_beneath(&*parent, &name, DIRECTORY) {
            Ok(dir) => Arc::new(dir),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Err(BackupError::Foreign(format!("object {object} was a directory, found is none")));
            }
            Err(error) => return Err(BackupError::io("open directory", show(&name))(error)),
        };
        self.check(object, dir.as_fd())?;
        if self.dirs.len() >= DIRS_MAX {
            self.dirs.clear();
        }
        self.dirs.insert(object, dir.clone());
        Ok(Some(dir))
    }

    /// Where an object stands now; `None` if it stands nowhere.
    ///
    /// # Errors
    /// [`BackupError::Foreign`] if something else stands where one should that was there before the step.
    pub(super) fn locate(&mut self, object: ObjectId) -> Result<Option<Spot>, BackupError> {
        self.locate_at(object, 0)
    }

    fn locate_at(&mut self, object: ObjectId, depth: usize) -> Result<Option<Spot>, BackupError> {
        if depth > DEPTH_MAX {
            return Err(BackupError::Stream(format!(
                "object {object} lies deeper than {DEPTH_MAX} directories"
            )));
        }
        let plan = self.plan;
        let (node, loose) = match plan.objects.get(&object) {
            Some(touched) => {
                let node = if self.detached { touched.after.as_ref() } else { touched.before.as_ref() };
                (node.map(Cow::Borrowed), touched.loose)
            }
            None => (self.base.node(object)?.map(Cow::Owned), false),
        };
        let homeless = node.as_ref().is_none_or(|n: &Cow<'_, Node>| n.places.is_empty());
        if loose || homeless {
            for dir in [&self.area.stage, &self.area.aside] {
                let name = anchor(object);
                if rustix::fs::statat(&**dir, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                    return Ok(Some((dir.clone(), name)));
                }
            }
        }
        let Some(node) = node else { return Ok(None) };
        let is_new = plan.objects.get(&object).is_some_and(|touched| touched.before.is_none());
        let mut foreign = None;
        for place in &node.places {
            let (dir, name) = match self.place_at(place, false, depth) {
                Ok(Some(spot)) => spot,
                Ok(None) => continue,
                // It may have a name elsewhere.
                Err(BackupError::Foreign(why)) => {
                    foreign.get_or_insert(why);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let Ok(there) = tree::stat_at(dir.as_fd(), &name[..]) else { continue };
            let known = is_new || node.ino == 0 || node.ino == there.ino;
            if there.kind == node.kind && known || self.mended.get(&object) == Some(&there.ino) {
                return Ok(Some((dir, name)));
            }
            if !is_new {
                foreign.get_or_insert_with(|| is_another(object, &node, &there));
            }
        }
        foreign.map_or(Ok(None), |why| Err(BackupError::Foreign(why)))
    }

    /// Opens an object that must be there.
    ///
    /// # Errors
    /// If it is not there, is another file, or cannot be opened.
    pub fn open(&mut self, object: ObjectId, access: OFlags) -> Result<OwnedFd, BackupError> {
        let Some((dir, name)) = self.locate(object)? else {
            return Err(BackupError::Foreign(format!("object {object} is missing")));
        };
        let flags = if access == OFlags::PATH { access } else { access | OFlags::NONBLOCK };
        let fd = match open_beneath(&*dir, &name, flags) {
            Ok(fd) => fd,
            Err(Errno::NOTDIR | Errno::LOOP | Errno::ISDIR | Errno::NXIO) => {
                return Err(BackupError::Foreign(format!("object {object} is a file of another type")));
            }
            Err(error) => return Err(BackupError::io("open", show(&name))(error)),
        };
        self.check(object, fd.as_fd())?;
        Ok(fd)
    }

    /// Whether this is the object's backup file.
    fn check(&mut self, object: ObjectId, fd: BorrowedFd<'_>) -> Result<(), BackupError> {
        let stat = tree::stat_fd(fd).map_err(BackupError::io("stat object", object.to_string()))?;
        let node = match self.plan.objects.get(&object) {
            Some(touched) => touched.before.as_ref().or(touched.after.as_ref()).map(Cow::Borrowed),
            None => self.base.node(object)?.map(Cow::Owned),
        };
        let Some(node) = node else { return Ok(()) };
        if self.mended.get(&object) == Some(&stat.ino) {
            return Ok(());
        }
        if node.kind != stat.kind || (node.ino != 0 && node.ino != stat.ino) {
            return Err(BackupError::Foreign(is_another(object, &node, &stat)));
        }
        if node.ino == 0 {
            self.new_inos.insert(object, stat.ino);
        }
        Ok(())
    }
}

/// That something else stands where an object should.
pub(super) fn is_another(object: ObjectId, node: &Node, found: &FileStat) -> String {
    format!(
        "object {object} was {:?} with inode {}, found is {:?} with inode {}",
        node.kind, node.ino, found.kind, found.ino
    )
}

/// Removes an entry and all below it. A directory below that is not empty is first moved up
/// beside it, so that any depth takes two descriptors and no recursion.
pub(super) fn remove(dir: BorrowedFd<'_>, name: &CStr) -> Result<(), BackupError> {
    let mut to_do = vec![name.to_owned()];
    let mut moved = 0u64;
    while let Some(name) = to_do.pop() {
        let failed = |error: Errno| BackupError::io("remove", show(name.to_bytes()))(error);
        if removed(dir, &name).map_err(failed)? {
            continue;
        }
        let fd = open_beneath(dir, name.to_bytes(), OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed)?;
        for entry in rustix::fs::Dir::read_from(&fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let below = entry.file_name();
            if below == c"." || below == c".." || removed(fd.as_fd(), below).map_err(failed)? {
                continue;
            }
            loop {
                moved += 1;
                let free = CString::new(format!("{moved}.gone")).expect("no zero byte in it");
                match rustix::fs::renameat_with(&fd, below, dir, &free, RenameFlags::NOREPLACE) {
                    Ok(()) => {
                        to_do.push(free);
                        break;
                    }
                    // Left by a crash.
                    Err(Errno::EXIST) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR).map_err(failed)?;
    }
    Ok(())
}

/// Removes an entry; false if it is a directory that is not empty.
fn removed(dir: BorrowedFd<'_>, name: &CStr) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Ok(()) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_tree_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = rustix::fs::open(dir.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let mut at = rustix::io::dup(&top).unwrap();
        for depth in 0..3000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            if depth % 100 == 0 {
                rustix::fs::mkdirat(&at, "empty", Mode::RWXU).unwrap();
            }
            rustix::fs::openat(&at, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
            at = open_beneath(&at, b"d", DIRECTORY).unwrap();
        }
        std::fs::write(dir.path().join("1.gone"), "in the way").unwrap();
        remove(top.as_fd(), c"d").unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }
}
