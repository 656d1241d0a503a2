//! From (base directory, path) to a place in the model.
//!
//! Inside the replicated set every step is taken in the model. Outside of it a path is followed through
//! the host, as the process sees it (its root, its mounts), until it reaches a directory of the set: by
//! the path of a root, or, through bind mounts, by the inode. Where that cannot be told any more, the
//! place is unknown, and everything is suspect.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, Name, ObjectId};

use super::filter::Verdict;
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
    /// Below the roots, but left out of the set: an entry of this directory, or somewhere below one.
    LeftOut(Option<ObjectId>),
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
            Self::Object(_) | Self::Outside | Self::LeftOut(_) | Self::Unknown => None,
        }
    }

    /// Whether what stands there is not in the set.
    #[must_use]
    pub fn is_outside(&self, model: &Model) -> bool {
        match self {
            Self::Outside | Self::LeftOut(_) => true,
            // Anything but a directory is left out there.
            Self::Entry(directory, name) => {
                model.verdict(*directory, name) == Verdict::IfDirectory
                    && model.entry(*directory, name).is_none()
            }
            _ => false,
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
    /// Its mount namespace.
    pub mounts: u32,
    /// When the call ended: what was seen at or after that need not be looked at again.
    pub ended_ns: u64,
}

/// A time in an inode may be as much earlier than what it is of: one tick of the slowest clock (current_time() in
/// fs/inode.c, CONFIG_HZ=100).
const STAMP_NS: u64 = 10_000_000;

enum At {
    Inside(ObjectId),
    /// Not in the set: a path as the process sees it, without symlinks.
    Outside(PathBuf),
    Aside(Aside),
}

/// Below a directory of the set, through an entry that is left out: the names on the way.
#[derive(Clone)]
struct Aside {
    directory: ObjectId,
    below: Vec<Vec<u8>>,
    /// How many of them, the last ones, the path itself named. The others are where a directory stands by now:
    /// of moves in what is left out nobody knows, so what is above it then may have been another one.
    named: usize,
}

/// What paths went through in the model on their way to their places.
#[derive(Clone, Debug, Default)]
pub struct Way {
    /// Entries that were followed, but for the last ones.
    pub entries: Vec<(ObjectId, Name)>,
    /// Entries that `..` led back from.
    pub above: Vec<(ObjectId, Name)>,
    /// Further ones at which a symlink would have been followed, and the model has none there.
    pub named: Vec<(ObjectId, Name)>,
    /// Entries that the kernel went through, and the model cannot.
    pub missing: Vec<(ObjectId, Name)>,
    /// There was a symlink or a `..` on it, or it led out of the set: should the model be behind at one
    /// of the entries, it led somewhere else altogether.
    pub winding: bool,
}

impl Way {
    /// What another path went through is looked at as well.
    pub fn also(&mut self, other: Self) {
        self.named.extend(other.entries);
        self.named.extend(other.named);
        self.missing.extend(other.missing);
    }
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
    let mut walk = Walk { model, host, start, way, todo: components(path).collect() };
    let place = walk.run(path, follow).unwrap_or_else(|place| place);
    match place {
        Place::Outside => way.winding = true,
        Place::Unknown => {
            tracing::debug!(?start, path = %path.escape_ascii(), "where a path led cannot be told any more");
        }
        _ => {}
    }
    place
}

/// One path that is being followed.
struct Walk<'a> {
    model: &'a Model,
    host: &'a mut dyn Host,
    start: Start,
    way: &'a mut Way,
    /// Components still to be followed.
    todo: VecDeque<Vec<u8>>,
}

enum Step {
    To(At),
    /// A symlink that stands in `from` is followed.
    Symlink {
        target: Vec<u8>,
        from: At,
    },
}

/// The methods give `Err` where the path ends before its components do.
impl Walk<'_> {
    fn run(&mut self, path: &[u8], follow: bool) -> Result<Place, Place> {
        let mut at = self.begin(path.first() == Some(&b'/'), follow)?;
        let mut symlinks = 0;
        while let Some(component) = self.todo.pop_front() {
            let last = self.todo.is_empty();
            let next = match at {
                At::Outside(path) => self.step_outside(path, &component, !last || follow)?,
                At::Inside(directory) if component == b".." => Step::To(self.above(directory)?),
                At::Inside(directory) => self.step_inside(directory, &component, last, follow)?,
                At::Aside(aside) if component == b".." => Step::To(self.back_from(aside)?),
                At::Aside(aside) => self.step_aside(aside, component, !last || follow)?,
            };
            at = match next {
                Step::To(next) => next,
                Step::Symlink { target, from } => {
                    symlinks += 1;
                    if symlinks > SYMLINKS_MAX {
                        return Err(Place::Outside);
                    }
                    for piece in components(&target).collect::<Vec<_>>().into_iter().rev() {
                        self.todo.push_front(piece);
                    }
                    if target.first() == Some(&b'/') { self.begin(true, follow)? } else { from }
                }
            };
        }
        match at {
            At::Inside(object) => Ok(Place::Object(object)),
            At::Outside(_) => Ok(Place::Outside),
            At::Aside(aside) => Ok(Place::LeftOut((aside.below.len() == 1).then_some(aside.directory))),
        }
    }

    /// Where a path starts: an absolute one, or a relative one.
    fn begin(&mut self, absolute: bool, follow: bool) -> Result<At, Place> {
        let from = if absolute { self.start.root } else { self.start.base };
        if let Some(object) = self.model.find(from) {
            return Ok(At::Inside(object));
        }
        let same_mounts = self.host.same_mounts(&self.start);
        if absolute && (self.host.is_host_root(from) || !same_mounts) {
            return Ok(At::Outside(PathBuf::from("/")));
        }
        let Some(path) = self.host.outside_path(from, &self.start) else {
            return Err(self.in_unknown(follow));
        };
        if same_mounts { self.not_in_model(path) } else { Ok(At::Outside(path)) }
    }

    /// One component further, in the model.
    fn step_inside(
        &mut self,
        directory: ObjectId,
        component: &[u8],
        last: bool,
        follow: bool,
    ) -> Result<Step, Place> {
        let Some(name) = Name::new(component) else { return Err(Place::Outside) };
        let verdict = self.model.verdict(directory, &name);
        if verdict == Verdict::LeftOut {
            let aside = Aside { directory, below: Vec::new(), named: 0 };
            return self.step_aside(aside, component.to_vec(), !last || follow);
        }
        if verdict == Verdict::IfDirectory
            && (!last || follow)
            && self.model.entry(directory, &name).is_none()
            && let Seen::Symlink { target, changed_ns } =
                self.look_aside(&Aside { directory, below: vec![component.to_vec()], named: 1 })
        {
            self.way.winding = true;
            return self.followed(target, changed_ns, At::Inside(directory));
        }
        let Some(object) = self.model.entry(directory, &name) else {
            if last && follow {
                self.way.named.push((directory, name.clone()));
            }
            return Err(if last { Place::Entry(directory, name) } else { self.missing(directory, name) });
        };
        let known = self.model.get(object);
        let symlink = known.filter(|o| o.kind == FileKind::Symlink && (!last || follow));
        if !last || symlink.is_some() {
            self.way.entries.push((directory, name.clone()));
        }
        match symlink {
            Some(symlink) => {
                self.way.winding = true;
                Ok(Step::Symlink { target: symlink.target.to_vec(), from: At::Inside(directory) })
            }
            None if last => {
                if follow {
                    self.way.named.push((directory, name.clone()));
                }
                Err(Place::Entry(directory, name))
            }
            None if known.is_some_and(|o| o.kind == FileKind::Directory) => Ok(Step::To(At::Inside(object))),
            // The kernel went through it: the model is behind.
            None => Err(self.missing(directory, name)),
        }
    }

    /// One component further, below an entry that is left out. `follow`: where a symlink or a mount leads counts.
    fn step_aside(&mut self, mut to: Aside, component: Vec<u8>, follow: bool) -> Result<Step, Place> {
        to.below.push(component);
        to.named += 1;
        match if follow { self.look_aside(&to) } else { Seen::Nothing } {
            Seen::Symlink { target, changed_ns } => {
                self.way.winding = true;
                to.below.pop();
                to.named -= 1;
                self.followed(target, changed_ns, Self::at(to))
            }
            Seen::Directory(inode) if let Some(object) = self.model.find(inode) => {
                self.way.winding = true;
                Ok(Step::To(At::Inside(object)))
            }
            Seen::Unknown => Err(Place::Unknown),
            Seen::Directory(_) | Seen::Leaf(_) | Seen::Nothing => Ok(Step::To(At::Aside(to))),
        }
    }

    /// What `..` is there.
    fn back_from(&mut self, mut aside: Aside) -> Result<At, Place> {
        self.way.winding = true;
        let top = self.path_of(&aside).is_some_and(|path| self.is_root(&path));
        if !top {
            aside.named = aside.named.checked_sub(1).ok_or(Place::Unknown)?;
            aside.below.pop();
        }
        Ok(Self::at(aside))
    }

    fn at(aside: Aside) -> At {
        if aside.below.is_empty() { At::Inside(aside.directory) } else { At::Aside(aside) }
    }

    fn path_of(&self, aside: &Aside) -> Option<PathBuf> {
        let below: PathBuf = aside.below.iter().map(|name| OsStr::from_bytes(name)).collect();
        Some(self.model.path(aside.directory)?.join(below))
    }

    /// What stands below an entry that is left out: by its path, which sees mounts; for a process with mounts of
    /// its own by inode.
    fn look_aside(&mut self, aside: &Aside) -> Seen {
        if self.host.same_mounts(&self.start) {
            let Some(path) = self.path_of(aside) else { return Seen::Nothing };
            return self.host.look(&self.start, &path);
        }
        let Some(mut inode) = self.model.get(aside.directory).map(|o| o.inode) else { return Seen::Nothing };
        let mut seen = Seen::Nothing;
        for component in &aside.below {
            let Some(name) = Name::new(component) else { return Seen::Unknown };
            seen = match self.host.child(inode, &name) {
                Ok(Some(stat)) if stat.kind == FileKind::Symlink => {
                    Seen::Symlink { target: stat.target, changed_ns: 0 }
                }
                Ok(Some(stat)) => {
                    inode = stat.inode;
                    Seen::Leaf(InodeId::NONE)
                }
                Ok(None) => return Seen::Nothing,
                Err(_) => return Seen::Unknown,
            };
        }
        seen
    }

    /// One component further, in the files. What is a directory of the set leads inside, by whatever
    /// name and mount it is reached.
    fn step_outside(&mut self, from: PathBuf, component: &[u8], follow: bool) -> Result<Step, Place> {
        let same_mounts = self.host.same_mounts(&self.start);
        let mut path = from.clone();
        if component == b".." {
            if same_mounts && self.is_root(&path) {
                return Ok(Step::To(At::Outside(path)));
            }
            path.pop();
        } else {
            path.push(OsStr::from_bytes(component));
        }
        if is_magic(&path) {
            return Err(Place::Unknown);
        }
        if same_mounts && let Some(root) = root_at(self.model, &path) {
            return Ok(Step::To(At::Inside(root)));
        }
        match self.host.look(&self.start, &path) {
            Seen::Directory(inode) => match self.model.find(inode) {
                Some(object) => Ok(Step::To(At::Inside(object))),
                // It may be one of the set that is not known yet.
                None if self.model.is_device_of_roots(inode.dev) => {
                    let real = self.host.real_path(inode).ok_or(Place::Unknown)?;
                    Ok(Step::To(match self.not_in_model(real)? {
                        At::Outside(_) => At::Outside(path),
                        aside => aside,
                    }))
                }
                None => Ok(Step::To(At::Outside(path))),
            },
            Seen::Leaf(inode) => match self.model.find(inode) {
                Some(object) => Err(Place::Object(object)),
                None => Ok(Step::To(At::Outside(path))),
            },
            Seen::Symlink { target, changed_ns } if follow => {
                self.followed(target, changed_ns, At::Outside(from))
            }
            Seen::Symlink { .. } | Seen::Nothing => Ok(Step::To(At::Outside(path))),
            Seen::Unknown => Err(Place::Unknown),
        }
    }

    /// Where a symlink leads that a look has seen. One that was changed since the call may have led elsewhere then: nobody
    /// can tell where.
    fn followed(&self, target: Vec<u8>, changed_ns: u64, from: At) -> Result<Step, Place> {
        if changed_ns > self.start.ended_ns.saturating_sub(STAMP_NS) {
            return Err(Place::Unknown);
        }
        Ok(Step::Symlink { target, from })
    }

    /// What `..` of a directory of the set is.
    fn above(&mut self, directory: ObjectId) -> Result<At, Place> {
        self.way.winding = true;
        let object = self.model.get(directory).ok_or(Place::Unknown)?;
        if object.inode == self.start.root {
            return Ok(At::Inside(directory));
        }
        if !self.host.same_mounts(&self.start) {
            return Err(Place::Unknown);
        }
        if let Some((path, _)) = self.model.roots().iter().find(|r| r.1 == directory) {
            let above = path.parent().unwrap_or(Path::new("/"));
            return Ok(At::Outside(above.to_path_buf()));
        }
        if self.host.is_bound(object.inode) {
            return Err(Place::Unknown);
        }
        let (above, name) = object.links.first().ok_or(Place::Unknown)?;
        self.way.above.push((*above, name.clone()));
        Ok(At::Inside(*above))
    }

    /// Whether this path outside is the root directory of the process: nothing is above it.
    fn is_root(&mut self, path: &Path) -> bool {
        path == Path::new("/")
            || !self.host.is_host_root(self.start.root)
                && matches!(self.host.look(&self.start, path), Seen::Directory(inode) if inode == self.start.root)
    }

    /// Where a directory that the model does not have, at this path of the host, stands: outside the set, or left
    /// out of it. Else it is one that the model has not got yet.
    fn not_in_model(&mut self, path: PathBuf) -> Result<At, Place> {
        let Some((root, object)) = self.model.roots().iter().find(|r| path.starts_with(&r.0)) else {
            return Ok(At::Outside(path));
        };
        let mut at = *object;
        let mut below = path.strip_prefix(root).unwrap_or(Path::new("")).components().peekable();
        while let Some(component) = below.next() {
            let name = Name::new(component.as_os_str().as_bytes()).ok_or(Place::Unknown)?;
            if self.model.verdict(at, &name) == Verdict::LeftOut {
                let names = std::iter::once(component).chain(below);
                let below = names.map(|c| c.as_os_str().as_bytes().to_vec()).collect();
                return Ok(At::Aside(Aside { directory: at, below, named: 0 }));
            }
            let is_directory = |o: &ObjectId| self.model.kind(*o) == Some(FileKind::Directory);
            // What the model has at the end of the path is another one.
            match self.model.entry(at, &name).filter(is_directory) {
                Some(next) if below.peek().is_some() => at = next,
                _ => return Err(self.missing(at, name)),
            }
        }
        // The root itself, which is another one now.
        Err(Place::Unknown)
    }

    /// Where a path leads that starts in a directory that nobody can find any more. A directory of the set
    /// that the model does not have stands below something that is going to be read, so a name right in it
    /// needs no place. What is behind that name may be anywhere.
    fn in_unknown(&self, follow: bool) -> Place {
        match self.todo.len() {
            1 if !follow && self.todo[0] != b".." => Place::Outside,
            _ => Place::Unknown,
        }
    }

    /// Where a path leads that goes through an entry of which the model does not know what it named: what
    /// it changed lies below, and is taken with the entry. But nobody knows whither `..` leads from there.
    fn missing(&mut self, directory: ObjectId, name: Name) -> Place {
        self.way.missing.push((directory, name.clone()));
        if self.todo.iter().any(|component| component == b"..") {
            return Place::Unknown;
        }
        Place::Missing(directory, name)
    }
}

/// Whether a path outside goes through one of the [`MAGIC`] links of a process, wherever /proc is.
fn is_magic(path: &Path) -> bool {
    let components: Vec<&[u8]> = path.components().map(|c| c.as_os_str().as_bytes()).collect();
    components.windows(3).any(|w| {
        let of_one = matches!(w[1], b"self" | b"thread-self") || w[1].iter().all(u8::is_ascii_digit);
        w[0] == b"proc" && of_one && MAGIC.iter().any(|m| m.as_bytes() == w[2])
    })
}

fn components(path: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    path.split(|b| *b == b'/').filter(|c| !c.is_empty() && *c != b".").map(<[u8]>::to_vec)
}

fn root_at(model: &Model, path: &Path) -> Option<ObjectId> {
    model.roots().iter().find(|r| r.0 == path).map(|r| r.1)
}

/// What follows the link to a descriptor that a path begins with.
#[must_use]
pub fn behind_descriptor(path: &[u8]) -> &[u8] {
    const BEFORE: &[u8] = b"/fd/";
    let number =
        path.windows(BEFORE.len()).position(|w| w == BEFORE).map_or(path.len(), |at| at + BEFORE.len());
    let rest = &path[number..];
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    let rest = &rest[digits..];
    let slashes = rest.iter().take_while(|b| **b == b'/').count();
    &rest[slashes..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_processes_are_known() {
        for path in
            ["/proc/self/cwd/a", "/proc/12/fd/3", "/srv/jail/proc/thread-self/root", "/proc/7/task/7/cwd"]
        {
            assert!(is_magic(Path::new(path)), "{path}");
        }
        for path in ["/proc/self/status", "/proc/sys/fs", "/proc/self", "/srv/proc/of/fd/1"] {
            assert!(!is_magic(Path::new(path)), "{path}");
        }
    }
}
