//! Writing a generation to another place.
//!
//! Each file stands below the destination at its absolute path of the primary. The destination is
//! ours alone (it was empty), so paths below it lead where we made them.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bfs_common::record::{FileKind, ObjectId};
use bfs_common::wire::Digests;
use rustix::fs::{FileType, Mode};

use super::clones::Clones;
use super::{Client, Object, ReadError, Tree};
use crate::tree;

/// Why a generation could not be written.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The backup does not give it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It cannot be written.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Somebody's files are there.
    #[error("{0} is not empty: give a new or empty directory")]
    NotEmpty(PathBuf),
    /// There is no such path at the checkpoint.
    #[error("{0} does not exist at this checkpoint")]
    NoPath(PathBuf),
    /// The tree does not hang together.
    #[error("what the replayer sent is not a tree: {0}")]
    Tree(String),
}

impl RestoreError {
    pub(super) fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { what, path, error: error.into() }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Files, directories and so on; of hard links each name.
    pub names: u64,
    /// Bytes of files that were copied.
    pub bytes: u64,
    /// Bytes of files that share their blocks with the backup.
    pub shared: u64,
}

/// Writes a tree, or what stands at `only` in it, below `to`, and syncs it. With `clones` files share their blocks with
/// the backup where they can.
///
/// # Errors
/// [`RestoreError`]; what was written stays then.
pub fn restore(
    client: &mut Client,
    group: &str,
    tree: &Tree,
    only: Option<&Path>,
    to: &Path,
    clones: Option<&Clones>,
) -> Result<Restored, RestoreError> {
    match DirBuilder::new().mode(0o700).create(to) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            if fs::read_dir(to).map_err(RestoreError::io("read", to))?.next().is_some() {
                return Err(RestoreError::NotEmpty(to.into()));
            }
        }
        Err(error) => return Err(RestoreError::io("make", to)(error)),
    }
    let mut work = Work::new(tree, clones);
    match only {
        Some(path) => {
            let object = tree.find(path).ok_or_else(|| RestoreError::NoPath(path.into()))?;
            work.top(below(to, path), path, object)?;
        }
        None => {
            for (root, object) in &tree.roots {
                work.top(below(to, root.as_path()), root.as_path(), *object)?;
            }
        }
    }
    work.finish(client, group, to)
}

/// Where an absolute path of the primary stands below a directory.
#[must_use]
pub fn below(to: &Path, path: &Path) -> PathBuf {
    to.join(path.strip_prefix("/").unwrap_or(path))
}

/// Writes parts of a tree.
pub(super) struct Work<'a> {
    tree: &'a Tree,
    clones: Option<&'a Clones>,
    /// Where an object stands.
    made: HashMap<ObjectId, PathBuf>,
    /// Objects in the order in which they were made, with the primary's path that they were found by.
    order: Vec<(ObjectId, PathBuf)>,
    done: Restored,
}

impl<'a> Work<'a> {
    pub(super) fn new(tree: &'a Tree, clones: Option<&'a Clones>) -> Self {
        Self { tree, clones, made: HashMap::new(), order: Vec::new(), done: Restored::default() }
    }

    fn object(&self, object: ObjectId) -> Result<&'a Object, RestoreError> {
        let found = self.tree.objects.get(&object);
        found.ok_or_else(|| RestoreError::Tree(format!("object {object} is missing")))
    }

    /// An object that the primary had at `path`, and everything below it, at another place.
    pub(super) fn top(&mut self, at: PathBuf, path: &Path, object: ObjectId) -> Result<(), RestoreError> {
        if let Some(above) = at.parent() {
            fs::create_dir_all(above).map_err(RestoreError::io("make", above))?;
        }
        let mut to_do = vec![(object, at, path.to_owned())];
        while let Some((object, at, path)) = to_do.pop() {
            let node = self.object(object)?;
            self.done.names += 1;
            if let Some(first) = self.made.get(&object) {
                if node.kind == FileKind::Directory {
                    return Err(RestoreError::Tree(format!("directory {object} has two names")));
                }
                fs::hard_link(first, &at).map_err(RestoreError::io("link", &at))?;
                continue;
            }
            make(node, &at).map_err(RestoreError::io("make", &at))?;
            to_do.extend(node.entries.iter().map(|(name, child)| {
                let name = name.as_os_str();
                (*child, at.join(name), path.join(name))
            }));
            self.made.insert(object, at);
            self.order.push((object, path));
        }
        Ok(())
    }

    /// Content and attributes of all that was made, and the sync of it.
    pub(super) fn finish(
        mut self,
        client: &mut Client,
        group: &str,
        to: &Path,
    ) -> Result<Restored, RestoreError> {
        self.contents(client, group)?;
        self.attributes()?;
        let sync = File::open(to).map_err(RestoreError::io("open", to))?;
        rustix::fs::syncfs(&sync).map_err(RestoreError::io("sync", to))?;
        Ok(self.done)
    }

    fn contents(&mut self, client: &mut Client, group: &str) -> Result<(), RestoreError> {
        let mut files = Vec::new();
        let mut cloned = HashSet::new();
        let mut clones = self.clones;
        for (object, path) in &self.order {
            let node = self.object(*object)?;
            if node.kind != FileKind::Regular || node.size == 0 {
                continue;
            }
            files.push(*object);
            if let Some(from) = clones.filter(|_| !node.changed) {
                let at = &self.made[object];
                match from.clone_file(path, at) {
                    Ok(true) => {
                        cloned.insert(*object);
                    }
                    Ok(false) => clones = None,
                    // It may be between two places in a step.
                    Err(error) => tracing::debug!("{} is copied: {error}", at.display()),
                }
            }
        }
        if !cloned.is_empty() {
            // What a step wrote over before it was cloned has a before-image by now.
            let now = client.tree(group, self.tree.checkpoint, Digests::None)?;
            for object in std::mem::take(&mut cloned) {
                let (then, at) = (self.object(object)?, &self.made[&object]);
                let now = now.objects.get(&object);
                if now.is_some_and(|now| !now.changed) {
                    cloned.insert(object);
                } else {
                    let file = File::options().write(true).open(at).map_err(RestoreError::io("open", at))?;
                    let empty = file.set_len(0).and_then(|()| file.set_len(then.size));
                    empty.map_err(RestoreError::io("cut", at))?;
                }
            }
        }
        let mut open: Option<(ObjectId, File)> = None;
        let done = &mut self.done;
        let made = &self.made;
        client.contents(group, self.tree.checkpoint, &files, |object, offset, bytes| {
            if bytes.is_empty() {
                open = None;
                return Ok(());
            }
            if cloned.contains(&object) {
                // The replayer has compared these bytes with their checksums: that is what it was asked for.
                done.shared += bytes.len() as u64;
                return Ok(());
            }
            let file = match &mut open {
                Some((of, file)) if *of == object => file,
                other => {
                    let path = made.get(&object).ok_or(io::ErrorKind::NotFound)?;
                    &mut other.insert((object, File::options().write(true).open(path)?)).1
                }
            };
            done.bytes += bytes.len() as u64;
            file.write_all_at(bytes, offset)
        })?;
        Ok(())
    }

    /// Of directories last, the deepest first: each entry that is made moves their times.
    fn attributes(&self) -> Result<(), RestoreError> {
        for directories in [false, true] {
            for (object, _) in self.order.iter().rev() {
                let node = self.object(*object)?;
                if (node.kind == FileKind::Directory) != directories {
                    continue;
                }
                let at = &self.made[object];
                let fd = tree::open_path(at).map_err(RestoreError::io("open", at))?;
                tree::set_attributes(fd.as_fd(), node.kind, &node.meta, &node.xattrs)
                    .map_err(RestoreError::io("set the attributes of", at))?;
            }
        }
        Ok(())
    }
}

/// Makes an object, private and without content; a file has its size.
///
/// # Errors
/// What the system says.
pub fn make(node: &Object, at: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let special = |kind| {
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, at, kind, mode, node.device).map_err(io::Error::from)
    };
    match node.kind {
        FileKind::Regular => {
            let mut options = OpenOptions::new();
            let file = options.write(true).create_new(true).mode(0o600).open(at)?;
            file.set_len(node.size)
        }
        FileKind::Directory => DirBuilder::new().mode(0o700).create(at),
        FileKind::Symlink => std::os::unix::fs::symlink(OsStr::from_bytes(&node.target), at),
        FileKind::Fifo => special(FileType::Fifo),
        FileKind::Socket => special(FileType::Socket),
        FileKind::CharDevice => special(FileType::CharacterDevice),
        FileKind::BlockDevice => special(FileType::BlockDevice),
    }
}
