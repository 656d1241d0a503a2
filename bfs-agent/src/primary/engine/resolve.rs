//! From (base directory, path) to a place in the model.
//!
//! Inside the replicated set every step is taken in the model. Outside of it a path is followed
//! as text, made canonical through the host, until it reaches the absolute path of a root.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, Name, ObjectId};

use super::host::Host;
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

/// Links in `/proc/PID` that lead to where a process has something open: the probe follows those to
/// a descriptor of the task itself, and nobody can follow the others later.
const MAGIC: [&str; 5] = ["fd", "cwd", "root", "task", "map_files"];

/// The starting point of a path.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Directory that a relative path starts from.
    pub base: InodeId,
    /// Root directory of the process.
    pub root: InodeId,
    /// The process, to ask for its working directory when nothing else helps.
    pub tgid: u32,
}

enum At {
    Inside(ObjectId),
    Outside(PathBuf),
}

/// What paths went through in the model on their way to their places.
#[derive(Clone, Debug, Default)]
pub struct Way {
    /// Entries that were followed, but for the last ones.
    pub entries: Vec<(ObjectId, Name)>,
    /// There was a symlink or a `..` on it, or it led out of the set: should the model be behind at one
    /// of the entries, it led somewhere else altogether.
    pub winding: bool,
}

/// Follows a path. `follow`: whether a symlink as the last component is followed.
pub fn resolve(
    model: &Model,
    host: &mut dyn Host,
    start: Start,
    path: &[u8],
    follow: bool,
    way: &mut Way,
) -> Place {
    let place = walk(model, host, start, path, follow, way);
    way.winding |= place == Place::Outside;
    place
}

fn walk(model: &Model, host: &mut dyn Host, start: Start, path: &[u8], follow: bool, way: &mut Way) -> Place {
    let mut todo: VecDeque<Vec<u8>> = components(path).collect();
    let mut at = match begin(model, host, start, path, &todo) {
        Ok(at) => at,
        Err(place) => return place,
    };
    if todo.is_empty() {
        return match at {
            At::Inside(object) => Place::Object(object),
            At::Outside(_) => Place::Outside,
        };
    }
    let mut symlinks = 0;
    while let Some(component) = todo.pop_front() {
        let last = todo.is_empty();
        at = match at {
            At::Outside(mut path) => {
                match component.as_slice() {
                    b".." => {
                        path.pop();
                    }
                    name => path.push(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name)),
                }
                if is_magic(&path) {
                    return Place::Unknown;
                }
                if let Some(root) = root_at(model, &path) {
                    At::Inside(root)
                } else if last {
                    At::Outside(path)
                } else {
                    let path = host.canonical(&path);
                    if is_magic(&path) {
                        return Place::Unknown;
                    }
                    match enter(model, &path, &todo) {
                        Ok(next) => next,
                        Err(place) => return place,
                    }
                }
            }
            At::Inside(directory) => {
                if component == b".." {
                    way.winding = true;
                    match parent(model, directory) {
                        Some(next) => next,
                        None => return Place::Unknown,
                    }
                } else {
                    let Some(name) = Name::new(&component) else { return Place::Outside };
                    match model.entry(directory, &name) {
                        None if last => return Place::Entry(directory, name),
                        None => return missing(directory, name, &todo),
                        Some(object) => {
                            let known = model.get(object);
                            let symlink = known.is_some_and(|o| o.kind == FileKind::Symlink);
                            if !last || symlink && follow {
                                way.entries.push((directory, name.clone()));
                            }
                            if symlink && (!last || follow) {
                                way.winding = true;
                                symlinks += 1;
                                if symlinks > SYMLINKS_MAX {
                                    return Place::Outside;
                                }
                                let target = known.map(|o| o.target.clone()).unwrap_or_default();
                                for piece in components(&target).collect::<Vec<_>>().into_iter().rev() {
                                    todo.push_front(piece);
                                }
                                if target.first() == Some(&b'/') {
                                    match begin(model, host, start, b"/", &todo) {
                                        Ok(next) => next,
                                        Err(place) => return place,
                                    }
                                } else {
                                    At::Inside(directory)
                                }
                            } else if last {
                                return Place::Entry(directory, name);
                            } else if known.is_some_and(|o| o.kind == FileKind::Directory) {
                                At::Inside(object)
                            } else {
                                // The kernel went through it: the model is behind.
                                return missing(directory, name, &todo);
                            }
                        }
                    }
                }
            }
        };
    }
    match at {
        At::Inside(object) => Place::Object(object),
        At::Outside(_) => Place::Outside,
    }
}

/// Where a path leads that goes through an entry of which the model does not know what it named: what
/// it changed lies below, and is taken with the entry. But nobody knows whither `..` leads from there.
fn missing(directory: ObjectId, name: Name, rest: &VecDeque<Vec<u8>>) -> Place {
    if rest.iter().any(|component| component == b"..") {
        return Place::Unknown;
    }
    Place::Missing(directory, name)
}

/// Whether a path outside goes through one of the [`MAGIC`] links.
fn is_magic(path: &Path) -> bool {
    let Ok(below) = path.strip_prefix("/proc") else { return false };
    let mut components = below.components().map(|c| c.as_os_str().to_string_lossy());
    let (Some(process), Some(link)) = (components.next(), components.next()) else { return false };
    let of_one = process == "self" || process == "thread-self" || process.parse::<u32>().is_ok();
    of_one && MAGIC.contains(&link.as_ref())
}

fn components(path: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    path.split(|b| *b == b'/').filter(|c| !c.is_empty() && *c != b".").map(<[u8]>::to_vec)
}

fn begin(
    model: &Model,
    host: &mut dyn Host,
    start: Start,
    path: &[u8],
    rest: &VecDeque<Vec<u8>>,
) -> Result<At, Place> {
    let from = if path.first() == Some(&b'/') { start.root } else { start.base };
    if let Some(object) = model.find(from) {
        return Ok(At::Inside(object));
    }
    if path.first() == Some(&b'/') && host.is_host_root(from) {
        return Ok(At::Outside(PathBuf::from("/")));
    }
    let path = host.outside_path(from, start.tgid).ok_or(Place::Unknown)?;
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Ok(At::Outside(path)) };
    match enter(model, above, rest)? {
        // It stands in a directory that the model knows, where the model has nothing or another one.
        At::Inside(directory) => {
            let name = Name::new(std::os::unix::ffi::OsStrExt::as_bytes(name));
            Err(name.map_or(Place::Unknown, |name| missing(directory, name, rest)))
        }
        At::Outside(_) => Ok(At::Outside(path)),
    }
}

/// Where a canonical path stands: inside when it is a root or below one, as far as the model
/// knows it.
fn enter(model: &Model, path: &Path, rest: &VecDeque<Vec<u8>>) -> Result<At, Place> {
    let Some((root_path, root)) = model.roots().iter().find(|r| path.starts_with(&r.0)) else {
        return Ok(At::Outside(path.to_path_buf()));
    };
    let mut at = *root;
    for component in path.strip_prefix(root_path).unwrap_or(Path::new("")).components() {
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(component.as_os_str());
        let Some(name) = Name::new(bytes) else { return Err(Place::Unknown) };
        let next = model.entry(at, &name);
        let directory = |o: &ObjectId| model.kind(*o) == Some(FileKind::Directory);
        match next.filter(directory) {
            Some(next) => at = next,
            None => return Err(missing(at, name, rest)),
        }
    }
    Ok(At::Inside(at))
}

fn root_at(model: &Model, path: &Path) -> Option<ObjectId> {
    model.roots().iter().find(|r| r.0 == path).map(|r| r.1)
}

fn parent(model: &Model, directory: ObjectId) -> Option<At> {
    if let Some((path, _)) = model.roots().iter().find(|r| r.1 == directory) {
        let above = path.parent().unwrap_or(Path::new("/"));
        return Some(At::Outside(above.to_path_buf()));
    }
    model.get(directory)?.links.first().map(|l| At::Inside(l.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_processes_are_known() {
        for path in ["/proc/self/cwd/a", "/proc/12/fd/3", "/proc/thread-self/root", "/proc/7/task/7/cwd"] {
            assert!(is_magic(Path::new(path)), "{path}");
        }
        for path in ["/proc/self/status", "/proc/sys/fs", "/proc/self", "/srv/proc/self/fd/1"] {
            assert!(!is_magic(Path::new(path)), "{path}");
        }
    }
}
