//! From (base directory, path) to a place in the model.
//!
//! Inside the replicated set every step is taken in the model. Outside of it a path is followed through
//! the host, as the process sees it (its root, its mounts), until it reaches a directory of the set: by
//! the path of a root, or, through bind mounts, by the inode. Where that cannot be told any more, the
//! place is unknown, and everything is suspect.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, Name, ObjectId};

use super::host::{Host, Seen};
use super::model::Model;

/// Where a path leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An entry of a directory in the set, present or not.
    Entry(ObjectId, Name),
    /// An object reached without naming an entry (`.`, `..`, a root, an empty path).
    Object(ObjectId),
    /// Not in the replicated set.
    Outside,
    /// A component on the way is missing in the model: the entry that was looked for there.
    Missing(ObjectId, Name),
    /// The start of the path is not known: it may lead anywhere.
    Unknown,
}

impl Place {
    /// The entry that is named or was looked for.
    #[must_use]
    pub fn entry(&self) -> Option<(ObjectId, Name)> {
        match self {
            Self::Entry(directory, name) | Self::Missing(directory, name) => Some((*directory, name.clone())),
            Self::Object(_) | Self::Outside | Self::Unknown => None,
        }
    }
}

/// As the kernel: more symlinks than this are `ELOOP` (`MAXSYMLINKS`, include/linux/namei.h).
const SYMLINKS_MAX: usize = 40;

/// The starting point of a path.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Directory that a relative path starts from.
    pub base: InodeId,
    /// Root directory of the process.
    pub root: InodeId,
    /// The process, to ask for its working directory when nothing else helps.
    pub tgid: u32,
    /// The thread.
    pub tid: u32,
    /// Its mount namespace.
    pub mounts: u32,
}

enum At {
    Inside(ObjectId),
    /// Not in the set: a path as the process sees it, without symlinks.
    Outside(PathBuf),
}

/// Follows a path. `follow`: whether a symlink as the last component is followed.
pub fn resolve(model: &Model, host: &mut dyn Host, start: Start, path: &[u8], follow: bool) -> Place {
    let place = walk(model, host, start, path, follow);
    if place == Place::Unknown {
        tracing::debug!(?start, path = %path.escape_ascii(), "where a path led cannot be told any more");
    }
    place
}

fn walk(model: &Model, host: &mut dyn Host, start: Start, path: &[u8], follow: bool) -> Place {
    let mut at = match begin(model, host, &start, path) {
        Ok(at) => at,
        Err(place) => return place,
    };
    let mut todo: VecDeque<Vec<u8>> = components(path).collect();
    if todo.is_empty() {
        return match at {
            At::Inside(object) => Place::Object(object),
            At::Outside(_) => Place::Outside,
        };
    }
    let mut symlinks = 0;
    while let Some(component) = todo.pop_front() {
        let last = todo.is_empty();
        let next = match at {
            At::Outside(path) => step_outside(model, host, &start, path, &component, !last || follow),
            At::Inside(directory) if component == b".." => {
                above(model, host, &start, directory).map(Step::To)
            }
            At::Inside(directory) => step_inside(model, directory, &component, last, follow),
        };
        at = match next {
            Ok(Step::To(next)) => next,
            Ok(Step::Symlink { target, from }) => {
                symlinks += 1;
                if symlinks > SYMLINKS_MAX {
                    return Place::Outside;
                }
                for piece in components(&target).collect::<Vec<_>>().into_iter().rev() {
                    todo.push_front(piece);
                }
                if target.first() == Some(&b'/') {
                    match begin(model, host, &start, b"/") {
                        Ok(next) => next,
                        Err(place) => return place,
                    }
                } else {
                    from
                }
            }
            Err(place) => return place,
        };
    }
    match at {
        At::Inside(object) => Place::Object(object),
        At::Outside(_) => Place::Outside,
    }
}

enum Step {
    To(At),
    /// A symlink that stands in `from` is followed.
    Symlink {
        target: Vec<u8>,
        from: At,
    },
}

/// One component further, in the model. `Err`: the end.
fn step_inside(
    model: &Model,
    directory: ObjectId,
    component: &[u8],
    last: bool,
    follow: bool,
) -> Result<Step, Place> {
    let Some(name) = Name::new(component) else { return Err(Place::Outside) };
    let Some(object) = model.entry(directory, &name) else {
        return Err(if last { Place::Entry(directory, name) } else { Place::Missing(directory, name) });
    };
    match model.get(object).filter(|o| o.kind == FileKind::Symlink) {
        Some(symlink) if !last || follow => {
            Ok(Step::Symlink { target: symlink.target.to_vec(), from: At::Inside(directory) })
        }
        _ if last => Err(Place::Entry(directory, name)),
        _ => Ok(Step::To(At::Inside(object))),
    }
}

/// One component further, in the files. What is a directory of the set leads inside, by whatever name
/// and mount it is reached.
fn step_outside(
    model: &Model,
    host: &mut dyn Host,
    start: &Start,
    from: PathBuf,
    component: &[u8],
    follow: bool,
) -> Result<Step, Place> {
    let mut path = from.clone();
    if component == b".." {
        if host.same_mounts(start) && is_root_of(host, start, &path) {
            return Ok(Step::To(At::Outside(path)));
        }
        path.pop();
    } else {
        path.push(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(component));
    }
    if host.same_mounts(start)
        && let Some(root) = root_at(model, &path)
    {
        return Ok(Step::To(At::Inside(root)));
    }
    match host.look(start, &path) {
        Seen::Directory(inode) => match model.find(inode) {
            Some(object) => Ok(Step::To(At::Inside(object))),
            // It may be one of the set that is not known yet.
            None if model.is_device_of_roots(inode.dev) => {
                let real = host.real_path(inode).ok_or(Place::Unknown)?;
                match enter(model, real)? {
                    At::Outside(_) => Ok(Step::To(At::Outside(path))),
                    inside => Ok(Step::To(inside)),
                }
            }
            None => Ok(Step::To(At::Outside(path))),
        },
        Seen::Leaf(inode) => match model.find(inode) {
            Some(object) => Err(Place::Object(object)),
            None => Ok(Step::To(At::Outside(path))),
        },
        Seen::Symlink(target) if follow => Ok(Step::Symlink { target, from: At::Outside(from) }),
        Seen::Symlink(_) | Seen::Nothing => Ok(Step::To(At::Outside(path))),
        Seen::Unknown => Err(Place::Unknown),
    }
}

/// Whether this path outside is the root directory of the process: nothing is above it.
fn is_root_of(host: &mut dyn Host, start: &Start, path: &Path) -> bool {
    path == Path::new("/")
        || !host.is_host_root(start.root)
            && matches!(host.look(start, path), Seen::Directory(inode) if inode == start.root)
}

fn components(path: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    path.split(|b| *b == b'/').filter(|c| !c.is_empty() && *c != b".").map(<[u8]>::to_vec)
}

fn begin(model: &Model, host: &mut dyn Host, start: &Start, path: &[u8]) -> Result<At, Place> {
    let absolute = path.first() == Some(&b'/');
    let from = if absolute { start.root } else { start.base };
    if let Some(object) = model.find(from) {
        return Ok(At::Inside(object));
    }
    if absolute && (host.is_host_root(from) || !host.same_mounts(start)) {
        return Ok(At::Outside(PathBuf::from("/")));
    }
    let path = host.outside_path(from, start).ok_or(Place::Unknown)?;
    if host.same_mounts(start) { enter(model, path) } else { Ok(At::Outside(path)) }
}

/// Where a canonical path of the host stands: inside when it is a root or below one, as far as the
/// model knows it.
fn enter(model: &Model, path: PathBuf) -> Result<At, Place> {
    let Some((root_path, root)) = model.roots().iter().find(|r| path.starts_with(&r.0)) else {
        return Ok(At::Outside(path));
    };
    let mut at = *root;
    for component in path.strip_prefix(root_path).unwrap_or(Path::new("")).components() {
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(component.as_os_str());
        let Some(name) = Name::new(bytes) else { return Err(Place::Unknown) };
        match model.entry(at, &name) {
            Some(next) => at = next,
            None => return Err(Place::Missing(at, name)),
        }
    }
    Ok(At::Inside(at))
}

fn root_at(model: &Model, path: &Path) -> Option<ObjectId> {
    model.roots().iter().find(|r| r.0 == path).map(|r| r.1)
}

/// What `..` of a directory of the set is.
fn above(model: &Model, host: &mut dyn Host, start: &Start, directory: ObjectId) -> Result<At, Place> {
    let object = model.get(directory).ok_or(Place::Unknown)?;
    if object.inode == start.root {
        return Ok(At::Inside(directory));
    }
    if !host.same_mounts(start) {
        return Err(Place::Unknown);
    }
    if let Some((path, _)) = model.roots().iter().find(|r| r.1 == directory) {
        let above = path.parent().unwrap_or(Path::new("/"));
        return Ok(At::Outside(above.to_path_buf()));
    }
    if host.is_bound(object.inode) {
        return Err(Place::Unknown);
    }
    object.links.first().map(|l| At::Inside(l.0)).ok_or(Place::Unknown)
}
