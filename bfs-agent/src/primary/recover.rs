//! One file of a kept checkpoint, brought back while programs go on working.
//!
//! 1. [`fetch`], on a thread of its own and for as long as the backup needs: what the file was is written into a file
//!    without a name, on the same file system, and synced. Until here nothing of the program was touched.
//! 2. [`Staged::exchange`], while the selected processes stand: it gets the name, in one step, so whoever opens the
//!    path finds the one file or the other. That is refused where the one that stands there is open or has other
//!    names: who has it open would go on with what is gone, and the names would part.
//! 3. [`Staged::settle`]: the directory is synced.
//!
//! A crash before the second step leaves nothing behind. Within it, one name of the kind [`PREFIX`] can be left.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::past::{Look, Seen};
use bfs_common::record::{CheckpointId, FileKind, Name, ObjectId, Sequence};
use bfs_common::wire::CatalogObject;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::reader::kernel_dev;
use super::rollback::busy::{self, Use};
use super::rollback::stage::ROOM_MIN;
use crate::generation::{At, Client, ReadError};
use crate::tree;

/// A file has such a name, ended by the number of its inode, between two system calls.
pub const PREFIX: &str = ".bfs-recover-";

/// Why a file is not brought back.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The backup does not give it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It is damaged there, or was lost.
    #[error("the backup cannot read it: {0}")]
    Damaged(String),
    /// No kept checkpoint is the one that was asked for.
    #[error("{0}")]
    NoCheckpoint(String),
    /// The checkpoint has nothing of that name.
    #[error("checkpoint {1} has no {0}")]
    NoPath(PathBuf, CheckpointId),
    /// It is something else.
    #[error("{0} is a {1:?} in checkpoint {2}: only regular files are brought back one by one")]
    NoFile(PathBuf, FileKind, CheckpointId),
    /// It shares its content with other names.
    #[error("{path} has {names} names {when}: one of them alone would part from the others")]
    Names {
        /// The file.
        path: PathBuf,
        /// How many.
        names: u64,
        /// Now, or then.
        when: String,
    },
    /// Something that is no regular file has its place.
    #[error("something that is no regular file stands at {0}")]
    InTheWay(PathBuf),
    /// The file that stands there is open.
    #[error("needs close: the file is in use:\n  {}", .0.join("\n  "))]
    Busy(Vec<String>),
    /// Its directory is another one than when this began.
    #[error("the directory of {0} was moved meanwhile")]
    Moved(PathBuf),
    /// The system refuses.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl RecoverError {
    fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |error| Self::Io { what, path: path.into(), error: error.into() }
    }

    /// What to do.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Read(_) | Self::Damaged(_) => "look at `bfs-replayer status`, then try again",
            Self::NoCheckpoint(_) => "look at `bfs-replayer generations`",
            Self::NoPath(..) => "`bfs-replayer versions` lists the checkpoints that have it",
            Self::NoFile(..) | Self::Names { .. } | Self::InTheWay(_) => {
                "`bfs-replayer restore` writes it to another place"
            }
            Self::Busy(_) => "have it closed, then try again",
            Self::Moved(_) => "try again",
            Self::Io { .. } => "look at that file system, then try again",
        }
    }
}

/// Where a file is to stand.
#[derive(Clone, Debug)]
pub struct Place {
    /// The replicated directory that it lies in.
    pub root: PathBuf,
    /// Its path below that; never empty.
    pub below: PathBuf,
}

impl Place {
    fn path(&self) -> PathBuf {
        self.root.join(&self.below)
    }

    /// Its directory, below the root and on its file system, by no symlink.
    fn directory(&self) -> Result<OwnedFd, RecoverError> {
        let above = self.below.parent().filter(|p| !p.as_os_str().is_empty());
        let above = above.unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        let directory = rustix::fs::openat(CWD, &self.root, flags, Mode::empty())
            .and_then(|root| rustix::fs::openat2(root, above, flags, Mode::empty(), resolve));
        directory.map_err(RecoverError::io("open", &self.root.join(above)))
    }

    fn name(&self) -> &OsStr {
        self.below.file_name().unwrap_or_default()
    }
}

/// A file that is as it was, and has no name yet.
#[derive(Debug)]
pub struct Staged {
    place: Place,
    /// Which checkpoint it is of; none: it is what was captured last.
    pub checkpoint: Option<CheckpointId>,
    /// Its size in bytes.
    pub size: u64,
    file: File,
    directory: OwnedFd,
}

/// Fetches what stood at a place in a checkpoint, the newest if `at` does not say otherwise. What stands there now is
/// looked at, too, so that what cannot be done is said before much is fetched.
///
/// # Errors
/// [`RecoverError`]; nothing was changed then.
pub fn fetch(
    client: &mut Client,
    group: &str,
    at: Option<&At>,
    place: &Place,
) -> Result<Staged, RecoverError> {
    let path = place.path();
    let all = client.generations(group)?;
    let newest = || all.last().map(|g| g.checkpoint).ok_or_else(|| "no checkpoint is kept yet".into());
    let checkpoint = at.map_or_else(newest, |at| at.find(&all)).map_err(RecoverError::NoCheckpoint)?;
    let mut past = Past { client, group, checkpoint };
    let (object, names) = past.find(place)?.ok_or_else(|| RecoverError::NoPath(path.clone(), checkpoint))?;
    if object.kind != FileKind::Regular {
        return Err(RecoverError::NoFile(path, object.kind, checkpoint));
    }
    if names > 1 {
        let when = format!("in checkpoint {checkpoint}");
        return Err(RecoverError::Names { path, names: names.into(), when });
    }
    let directory = place.directory()?;
    look(directory.as_fd(), place)?;
    let file = past.write(&object, directory.as_fd(), &path)?;
    Ok(Staged { place: place.clone(), checkpoint: Some(checkpoint), size: object.size, file, directory })
}

/// The same with what was captured last of a file, when all up to a record is on the backup.
///
/// # Errors
/// [`RecoverError`]; nothing was changed then.
pub fn fetch_newest(
    client: &mut Client,
    group: &str,
    object: ObjectId,
    at_least: Sequence,
    place: &Place,
) -> Result<Staged, RecoverError> {
    let path = place.path();
    let directory = place.directory()?;
    look(directory.as_fd(), place)?;
    let file = nameless(&directory, &path)?;
    let given = client.newest(group, object, at_least, |at, bytes| file.write_all_at(bytes, at))?;
    let Some(newest) = given.1 else {
        return Err(RecoverError::Damaged("it does not have it yet".into()));
    };
    let done = file.set_len(newest.size).and_then(|()| {
        tree::set_attributes(file.as_fd(), FileKind::Regular, &newest.meta, &newest.xattrs)?;
        file.sync_all()
    });
    done.map_err(RecoverError::io("stage", &path))?;
    Ok(Staged { place: place.clone(), checkpoint: None, size: newest.size, file, directory })
}

/// A file without a name.
fn nameless(directory: impl AsFd, path: &Path) -> Result<File, RecoverError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = rustix::fs::openat(directory, ".", flags, Mode::RUSR | Mode::WUSR);
    made.map(File::from).map_err(RecoverError::io("stage", path))
}

/// Whether the file that stands at a place, if there is one, may be replaced.
fn look(directory: impl AsFd, place: &Place) -> Result<bool, RecoverError> {
    let path = place.path();
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match rustix::fs::openat(directory, place.name(), flags, Mode::empty()) {
        Ok(found) => File::from(found).metadata().map_err(RecoverError::io("look at", &path))?,
        Err(Errno::NOENT) => return Ok(false),
        Err(e) => return Err(RecoverError::io("look at", &path)(e)),
    };
    if !found.is_file() {
        return Err(RecoverError::InTheWay(path));
    }
    if found.nlink() > 1 {
        return Err(RecoverError::Names { path, names: found.nlink(), when: "now".into() });
    }
    let inode = InodeId { dev: kernel_dev(found.dev()), ino: found.ino(), generation: 0 };
    let users = busy::users([inode].into_iter(), [].into_iter(), Use::Any);
    if users.is_empty() { Ok(true) } else { Err(RecoverError::Busy(users)) }
}

/// A checkpoint on the backup.
struct Past<'a> {
    client: &'a mut Client,
    group: &'a str,
    checkpoint: CheckpointId,
}

impl Past<'_> {
    fn look(&mut self, look: Look) -> Result<(Seen, bytes::Bytes), RecoverError> {
        match self.client.look(self.group, self.checkpoint, look)? {
            (Seen::Failed(why), _) => Err(RecoverError::Damaged(why)),
            seen => Ok(seen),
        }
    }

    fn object(&mut self, look: Look) -> Result<Option<(CatalogObject, u32)>, RecoverError> {
        match self.look(look)?.0 {
            Seen::Object(found) => Ok(found),
            other => Err(RecoverError::Damaged(format!("it answers {other:?}"))),
        }
    }

    /// What stands at a place, and how many names it has.
    fn find(&mut self, place: &Place) -> Result<Option<(CatalogObject, u32)>, RecoverError> {
        let Seen::Roots(_, roots) = self.look(Look::Roots)?.0 else { return Ok(None) };
        let Some((_, root)) = roots.into_iter().find(|(path, _)| path.as_path() == place.root) else {
            return Ok(None);
        };
        let mut at = root;
        let mut found = None;
        for name in &place.below {
            let Some(name) = Name::new(name.as_bytes()) else { return Ok(None) };
            let Some(next) = self.object(Look::Entry(at, name))? else { return Ok(None) };
            at = next.0.object;
            found = Some(next);
        }
        Ok(found)
    }

    /// Writes it into a file without a name.
    fn write(
        &mut self,
        object: &CatalogObject,
        directory: impl AsFd,
        path: &Path,
    ) -> Result<File, RecoverError> {
        let room = rustix::fs::fstatvfs(&directory).map_err(RecoverError::io("stage", path))?;
        if room.f_bavail * room.f_frsize < object.size.saturating_add(ROOM_MIN) {
            return Err(RecoverError::io("stage", path)(io::Error::from(io::ErrorKind::StorageFull)));
        }
        let mut xattrs = Vec::with_capacity(object.xattrs.len());
        for (name, _) in &object.xattrs {
            match self.look(Look::Xattr(object.object, name.clone()))? {
                (Seen::Bytes(true), value) => xattrs.push((name.clone(), value)),
                (other, _) => return Err(RecoverError::Damaged(format!("it answers {other:?} of {name}"))),
            }
        }
        let file = nameless(directory, path)?;
        file.set_len(object.size).map_err(RecoverError::io("stage", path))?;
        if object.size > 0 {
            let (group, at) = (self.group, self.checkpoint);
            self.client
                .contents(group, at, &[object.object], |_, offset, bytes| file.write_all_at(bytes, offset))?;
        }
        tree::set_attributes(file.as_fd(), object.kind, &object.meta, &xattrs)
            .map_err(RecoverError::io("stage", path))?;
        file.sync_all().map_err(RecoverError::io("stage", path))?;
        Ok(file)
    }
}

impl Staged {
    /// Gives it its name, instead of the file that has it. While it is called nobody who could open that may run.
    ///
    /// # Errors
    /// [`RecoverError`]; nothing was changed then.
    pub fn exchange(&self) -> Result<(), RecoverError> {
        let path = self.place.path();
        let now = self.place.directory()?;
        let id = |directory: &OwnedFd| rustix::fs::fstat(directory).map(|stat| (stat.st_dev, stat.st_ino));
        if id(&now).map_err(RecoverError::io("look at", &path))?
            != id(&self.directory).map_err(RecoverError::io("look at", &path))?
        {
            return Err(RecoverError::Moved(path));
        }
        let own = tree::fd_path(self.file.as_fd());
        let link =
            |name: &OsStr| rustix::fs::linkat(CWD, &own, &self.directory, name, AtFlags::SYMLINK_FOLLOW);
        if !look(&self.directory, &self.place)? {
            // Should there be one by now, this fails.
            return link(self.place.name()).map_err(RecoverError::io("make", &path));
        }
        let ino = self.file.metadata().map_err(RecoverError::io("look at", &path))?.ino();
        let between = OsString::from(format!("{PREFIX}{ino}"));
        link(&between).map_err(RecoverError::io("make the other one of", &path))?;
        let (from, to) = (&self.directory, &self.directory);
        rustix::fs::renameat_with(from, &between, to, self.place.name(), RenameFlags::empty()).map_err(|e| {
            // It has no name but this one, which nobody uses.
            let _ = rustix::fs::unlinkat(&self.directory, &between, AtFlags::empty());
            RecoverError::io("replace", &path)(e)
        })
    }

    /// Makes the name durable.
    ///
    /// # Errors
    /// What the system says.
    pub fn settle(&self) -> Result<(), RecoverError> {
        rustix::fs::fsync(&self.directory)
            .map_err(RecoverError::io("sync the directory of", &self.place.path()))
    }
}
