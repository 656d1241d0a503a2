//! Files that share their blocks with the backup (FICLONE), where both stand on one file system that can do that.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bfs_common::record::{FileKind, PathBytes};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Client, Object, ReadError, Tree};

/// The applied tree of a group, on this host.
#[derive(Debug)]
pub struct Clones {
    /// The primary's path of each root, and its directory in the tree.
    roots: Vec<(PathBuf, OwnedFd)>,
}

impl Clones {
    /// Where the roots of a tree stand now: `None` where that is on another host, or nowhere.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn find(client: &mut Client, group: &str, tree: &Tree) -> Result<Option<Self>, ReadError> {
        let places = client.places(group)?;
        let mut roots = Vec::new();
        for (root, object) in &tree.roots {
            let place = places.iter().find(|(known, _)| known == object);
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened =
                place.map(|(_, at): &(_, PathBytes)| rustix::fs::open(at.as_path(), flags, Mode::empty()));
            let Some(Ok(opened)) = opened else { return Ok(None) };
            roots.push((root.as_path().to_owned(), opened));
        }
        Ok(Some(Self { roots }))
    }

    /// The file that the primary had at a path. Nothing outside of the tree is opened, whatever a step does to it.
    fn open(&self, path: &Path) -> io::Result<File> {
        let root = self.roots.iter().find(|(root, _)| path.starts_with(root));
        let (root, directory) = root.ok_or(io::ErrorKind::NotFound)?;
        let below = path.strip_prefix(root).map_err(io::Error::other)?;
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(directory, below, flags, Mode::empty(), resolve)?.into())
    }

    /// Makes an empty file share all blocks of the one that the primary had at a path; false where that cannot be.
    ///
    /// # Errors
    /// What the system says.
    pub fn clone_file(&self, path: &Path, to: &Path) -> io::Result<bool> {
        let from = self.open(path)?;
        let to = File::options().write(true).open(to)?;
        match rustix::fs::ioctl_ficlone(&to, &from) {
            Ok(()) => Ok(true),
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// What files of a tree take in it, and whether they can be shared with a folder: tried with one of them.
    ///
    /// # Errors
    /// What the system says of that folder.
    pub fn cost(&self, tree: &Tree, folder: &Path) -> io::Result<Cost> {
        let mut cost = Cost::default();
        let mut tried = false;
        let mut to_do: Vec<_> =
            tree.roots.iter().map(|(root, object)| (root.as_path().to_owned(), *object)).collect();
        let mut seen = std::collections::HashSet::new();
        while let Some((path, object)) = to_do.pop() {
            let Some(node) = tree.objects.get(&object) else { continue };
            to_do.extend(node.entries.iter().map(|(name, child)| (path.join(name.as_os_str()), *child)));
            if !is_content(node) || !seen.insert(object) {
                continue;
            }
            let Ok(file) = self.open(&path) else {
                cost.bytes += node.size;
                continue;
            };
            use std::os::unix::fs::MetadataExt;
            cost.bytes += (file.metadata()?.blocks() * 512).min(node.size);
            if !tried {
                tried = true;
                let probe = folder.join(OsStr::from_bytes(b"probe"));
                File::create(&probe)?;
                cost.shares = self.clone_file(&path, &probe).unwrap_or(false);
                std::fs::remove_file(&probe)?;
            }
        }
        Ok(cost)
    }
}

fn is_content(node: &Object) -> bool {
    node.kind == FileKind::Regular && node.size > 0
}

/// What a tree costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of its files, without holes.
    pub bytes: u64,
    /// Their blocks can be shared with the backup.
    pub shares: bool,
}
