//! Updates that a program reports by itself. Their place is looked for below the replicated directories only, so no
//! other file system is asked, and what is found there is suspect until the next checkpoint has read it.

use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use bfs_common::record::{FileKind, Name, ObjectId};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::commands::Awaited;
use super::work::Work;
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{BadRequest, Replies, Reply};

/// What stands at a place.
struct Found {
    /// What it is in the model, if it is in there.
    object: Option<ObjectId>,
    is_directory: bool,
    /// Its size now.
    size: u64,
}

impl Work {
    /// Has the next checkpoint read what was changed; answers when that is durable.
    pub(super) fn report_update(
        &mut self,
        path: &Path,
        bytes: Option<Range<u64>>,
        limit: Duration,
        replies: Replies,
    ) {
        if let Some(why) = self.is_detached() {
            return replies.send(why);
        }
        // Files that were just made are known by what was captured of that.
        self.drain();
        match self.suspect_path(path, bytes, false) {
            Ok(()) => self.wait_for_records(Awaited::Report, limit, replies),
            Err(bad) => replies.send(Reply::bad(bad)),
        }
    }

    /// The replicated directory that a path lies in, and the path below that; empty for the directory itself.
    pub(super) fn root_of<'p>(&self, path: &'p Path) -> Option<(&Path, &'p Path)> {
        self.options.roots.iter().find_map(|root| Some((root.as_path(), path.strip_prefix(root).ok()?)))
    }

    /// Has the next checkpoint read what stands at a path. Where nothing does, and nothing did, that is an error unless
    /// something is going to: `may_come`.
    pub(super) fn suspect_path(
        &mut self,
        path: &Path,
        bytes: Option<Range<u64>>,
        may_come: bool,
    ) -> Result<(), BadRequest> {
        let bad = |why: String, hint: &str| BadRequest::field("path", why, hint);
        let (root, mut at) = self.root_of(path).ok_or_else(|| not_replicated(path))?;
        let failed = |e: Errno| bad(format!("{}: {e}", path.display()), "look at that file");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, root, flags, Mode::empty()).map_err(failed)?;
        let now = monotonic_ns();
        let found = self.look_at_place(&directory, at).map_err(failed)?;
        let exists = found.is_some();
        let mut kind = match &found {
            Some(found) if found.is_directory => FileKind::Directory,
            _ => FileKind::Regular,
        };
        let known = found.and_then(|found| Some((found.object?, found.size)));
        if let Some((object, size)) = known {
            if bytes.is_some() && self.engine.model().kind(object) != Some(FileKind::Regular) {
                let why = format!("{} is no regular file: it has no bytes", path.display());
                return Err(BadRequest::field("offset", why, "leave offset and length out"));
            }
            self.engine.suspect_update(object, bytes, size, now);
        }
        // Its name may be new, or gone; so may be those of directories above it.
        let mut deep = known.is_none();
        while let (Some(parent), Some(name)) = (at.parent(), at.file_name().and_then(name)) {
            let above = self.look_at_place(&directory, parent).map_err(failed)?;
            if let Some(object) = above.and_then(|above| above.object) {
                let model = self.engine.model();
                if !exists && !may_come && deep && model.entry(object, &name).is_none() {
                    let why = format!("{}: there is no such file, and was none", path.display());
                    return Err(bad(why, "give the path of what was changed"));
                }
                if known.is_none() && model.verdict(object, &name).leaves_out(kind) {
                    let why = format!("{} is left out by --include or --exclude", path.display());
                    return Err(bad(why, "report what belongs to the group"));
                }
                self.engine.suspect_name(object, &name, deep, now);
                return Ok(());
            }
            (deep, kind) = (true, FileKind::Directory);
            at = parent;
        }
        if known.is_some() {
            return Ok(());
        }
        Err(bad(format!("{} is not known", path.display()), "look at `bfs-agent path list`"))
    }

    /// What stands below a replicated directory, on its file system; `None` when nothing does.
    fn look_at_place(&self, root: &OwnedFd, below: &Path) -> Result<Option<Found>, Errno> {
        let below = if below.as_os_str().is_empty() { OsStr::new(".") } else { below.as_os_str() };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        let fd = match rustix::fs::openat2(root, below, flags, Mode::empty(), resolve) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(e),
        };
        let io = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let model = self.engine.model();
        let inode = self.link.reader.inode_of(fd.as_fd()).map_err(io)?;
        let object = inode.and_then(|inode| model.find(inode)).filter(|object| model.is_linked(*object));
        let meta = File::from(fd).metadata().map_err(io)?;
        Ok(Some(Found { object, is_directory: meta.is_dir(), size: meta.len() }))
    }
}

/// What is said of a path that no [root](Work::root_of) has.
pub(super) fn not_replicated(path: &Path) -> BadRequest {
    let why = format!("{} lies in none of the replicated directories", path.display());
    BadRequest::field("path", why, "look at `bfs-agent path list`")
}

fn name(name: &OsStr) -> Option<Name> {
    Name::new(name.as_bytes())
}
