//! Writing a generation to another place.
//!
//! Each file stands below the destination at its absolute path of the primary. The destination is
//! ours alone (it was empty), so paths below it lead where we made them.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bfs_common::record::{FileKind, ObjectId};
use rustix::fs::{FileType, Mode};

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
    fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { what, path, error: error.into() }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Files, directories and so on; of hard links each name.
    pub names: u64,
    /// Bytes of files.
    pub bytes: u64,
}

/// Writes a tree, or what stands at `only` in it, below `to`, and syncs it.
///
/// # Errors
/// [`RestoreError`]; what was written stays then.
pub fn restore(
    client: &mut Client,
    group: &str,
    tree: &Tree,
    only: Option<&Path>,
    to: &Path,
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
    let mut work = Work { tree, made: HashMap::new(), order: Vec::new(), done: Restored::default() };
    match only {
        Some(path) => {
            let object = tree.find(path).ok_or_else(|| RestoreError::NoPath(path.into()))?;
            work.top(to, path, object)?;
        }
        None => {
            for (root, object) in &tree.roots {
                work.top(to, root.as_path(), *object)?;
            }
        }
    }
    work.contents(client, group)?;
    work.attributes()?;
    let sync = File::open(to).map_err(RestoreError::io("open", to))?;
    rustix::fs::syncfs(&sync).map_err(RestoreError::io("sync", to))?;
    Ok(work.done)
}

struct Work<'a> {
    tree: &'a Tree,
    /// Where an object stands.
    made: HashMap<ObjectId, PathBuf>,
    /// Objects in the order in which they were made.
    order: Vec<ObjectId>,
    done: Restored,
}

impl<'a> Work<'a> {
    fn object(&self, object: ObjectId) -> Result<&'a Object, RestoreError> {
        let found = self.tree.objects.get(&object);
        found.ok_or_else(|| RestoreError::Tree(format!("object {object} is missing")))
    }

    /// An object at its absolute path below `to`, and everything below it.
    fn top(&mut self, to: &Path, path: &Path, object: ObjectId) -> Result<(), RestoreError> {
        let at = to.join(path.strip_prefix("/").unwrap_or(path));
        if let Some(above) = at.parent() {
            fs::create_dir_all(above).map_err(RestoreError::io("make", above))?;
        }
        let mut to_do = vec![(object, at)];
        while let Some((object, at)) = to_do.pop() {
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
            to_do.extend(node.entries.iter().map(|(name, child)| (*child, at.join(name.as_os_str()))));
            self.made.insert(object, at);
            self.order.push(object);
        }
        Ok(())
    }

    fn contents(&mut self, client: &mut Client, group: &str) -> Result<(), RestoreError> {
        let mut files = Vec::new();
        for object in &self.order {
            let node = self.object(*object)?;
            if node.kind == FileKind::Regular && node.size > 0 {
                files.push(*object);
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
            for object in self.order.iter().rev() {
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
