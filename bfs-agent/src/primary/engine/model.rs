//! The namespace model: the tree of the replicated set, by object.
//!
//! Invariant: the model *is* the state that the stream has reached. Nothing changes it but the
//! methods here, and each of them puts the record that says the same into the [`Outbox`].
//! Directories have at most one link; an object without a link is an orphan until
//! [`Model::forget_orphans`] lets it go. Pure: no I/O.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bfs_common::abi::InodeId;
use bfs_common::codec::PAYLOAD_MAX;
use bfs_common::record::{FileKind, Identity, Meta, Name, ObjectId, PathBytes, Record};
use bfs_common::wire::CatalogObject;
use bytes::Bytes;
use foldhash::{HashMap, HashSet};

use super::filter::{Filter, Verdict};
use super::host::Stat;
use super::links::Links;
use super::outbox::Outbox;
use super::same::Same;
use super::sent::Sent;
use crate::tree::Xattrs;

/// One object of the group.
#[derive(Clone, Debug)]
pub struct Object {
    /// The inode, as the kernel names it in this boot.
    pub inode: InodeId,
    /// Its type.
    pub kind: FileKind,
    /// Device number (`makedev` form) of a device.
    pub device: u64,
    /// Attributes as last sent.
    pub meta: Meta,
    /// Length of a regular file as the stream has it.
    pub size: u64,
    /// Target of a symlink.
    pub target: Bytes,
    /// Extended attributes as last sent.
    pub xattrs: BTreeMap<String, Bytes>,
    /// Entries of a directory.
    pub entries: BTreeMap<Name, ObjectId>,
    /// Names of the object. A root has none.
    pub links: Links,
}

/// What a new object is made from.
#[derive(Clone, Debug)]
pub struct NewObject {
    /// The inode.
    pub inode: InodeId,
    /// Its type.
    pub kind: FileKind,
    /// Device number of a device.
    pub device: u64,
    /// Attributes.
    pub meta: Meta,
    /// Target of a symlink.
    pub target: Bytes,
}

/// Ties device numbers of this boot to file systems (semantics 1.1: not the device number).
#[derive(Clone, Debug, Default)]
pub struct FileSystems {
    known: Vec<(u32, u128, u64)>,
}

impl FileSystems {
    /// Makes a device known: kernel form of the device, file system UUID, subvolume.
    pub fn add(&mut self, dev: u32, file_system: u128, subvolume: u64) {
        if !self.known.iter().any(|k| k.0 == dev) {
            self.known.push((dev, file_system, subvolume));
        }
    }

    fn identity(&self, inode: InodeId) -> Identity {
        let (_, file_system, subvolume) = self.known.iter().copied().find(|k| k.0 == inode.dev).unwrap_or((
            inode.dev,
            u128::from(inode.dev),
            0,
        ));
        Identity { file_system, subvolume, ino: inode.ino, generation: inode.generation }
    }

    fn inode(&self, identity: &Identity) -> InodeId {
        let dev = self
            .known
            .iter()
            .find(|k| k.1 == identity.file_system && k.2 == identity.subvolume)
            .map_or(0, |k| k.0);
        InodeId { ino: identity.ino, dev, generation: identity.generation }
    }
}

/// The tree.
#[derive(Debug, Default)]
pub struct Model {
    objects: HashMap<ObjectId, Object>,
    by_inode: HashMap<InodeId, ObjectId>,
    roots: Vec<(PathBuf, ObjectId)>,
    /// Objects that are no inode of this host yet: what the stream knows of them is of another one.
    unbound: HashSet<ObjectId>,
    highest: ObjectId,
    orphans: HashSet<ObjectId>,
    /// What the destination is known to have, while that is asked for.
    pub same: Option<Same>,
    /// What the stream has of files that others change.
    pub sent: Sent,
    /// Device numbers and file systems.
    pub file_systems: FileSystems,
    /// What does not belong to the group.
    pub filter: Filter,
    /// Directories that got another place, where that decides about what is below them.
    moved: Vec<ObjectId>,
    /// Objects of which the content changed, or that got a name, since [`Self::take_changed`]; where that is asked for.
    changed: Option<HashSet<ObjectId>>,
}

/// Directories that one path is followed through. (Moves whose order is not known can leave a directory below
/// itself, until they are settled.)
const DEPTH_MAX: usize = 10_000;

impl Model {
    /// The highest number that an object has, or had.
    #[must_use]
    pub const fn highest(&self) -> ObjectId {
        self.highest
    }

    /// An empty tree; objects get numbers above `highest`.
    #[must_use]
    pub fn new(highest: ObjectId, file_systems: FileSystems) -> Self {
        Self { highest, file_systems, ..Self::default() }
    }

    /// The tree as a replayer's catalogue has it.
    #[must_use]
    pub fn from_catalog(
        highest: ObjectId,
        file_systems: FileSystems,
        roots: &[(PathBytes, ObjectId)],
        catalog: Vec<CatalogObject>,
    ) -> Self {
        let mut model = Self::new(highest, file_systems);
        model.roots = roots.iter().map(|(p, o)| (p.as_path().to_path_buf(), *o)).collect();
        let mut links = Vec::new();
        for line in catalog {
            let inode = model.file_systems.inode(&line.identity);
            for (name, child) in &line.entries {
                links.push((*child, line.object, name.clone()));
            }
            // A large directory comes in several lines of the same number.
            if let Some(known) = model.objects.get_mut(&line.object) {
                known.entries.extend(line.entries);
                known.xattrs.extend(line.xattrs);
                continue;
            }
            model.by_inode.insert(inode, line.object);
            model.objects.insert(
                line.object,
                Object {
                    inode,
                    kind: line.kind,
                    device: line.device,
                    meta: line.meta,
                    size: line.size,
                    target: line.target,
                    xattrs: line.xattrs.into_iter().collect(),
                    entries: line.entries.into_iter().collect(),
                    links: Links::default(),
                },
            );
        }
        for (child, directory, name) in links {
            if let Some(object) = model.objects.get_mut(&child) {
                object.links.add(directory, name);
            }
        }
        // The agent before did not come to say that they are gone.
        let nameless = model.objects.keys().filter(|object| !model.is_linked(**object));
        model.orphans = nameless.copied().collect();
        model
    }

    /// All inodes that the catalogue knows are of another host: each object is to be found by its name.
    pub fn unbind(&mut self) {
        self.unbound = self.objects.keys().copied().collect();
        self.by_inode.clear();
        for object in self.objects.values_mut() {
            object.inode = InodeId { ino: 0, dev: 0, generation: 0 };
        }
    }

    /// Whether the object is to be found by its name.
    #[must_use]
    pub fn is_unbound(&self, object: ObjectId) -> bool {
        self.unbound.contains(&object)
    }

    /// The object is this inode, if it can be: nothing that is said of an object once differs.
    pub fn bind(&mut self, object: ObjectId, stat: &Stat, out: &mut Outbox) -> bool {
        let Some(known) = self.objects.get_mut(&object) else { return false };
        let same =
            known.kind == stat.kind && known.device == stat.device && known.target[..] == stat.target[..];
        if !same || !self.unbound.remove(&object) {
            return false;
        }
        known.inode = stat.inode;
        self.by_inode.insert(stat.inode, object);
        let identity = self.file_systems.identity(stat.inode);
        out.push(&Record::Rebind { object, identity }, b"");
        true
    }

    /// Everything was found, or is gone.
    pub fn bound(&mut self) {
        self.unbound.clear();
    }

    /// The roots: the primary's absolute path and the directory object.
    #[must_use]
    pub fn roots(&self) -> &[(PathBuf, ObjectId)] {
        &self.roots
    }

    /// Replaces the list of roots.
    pub fn set_roots(&mut self, roots: Vec<(PathBuf, ObjectId)>, out: &mut Outbox) {
        let record = Record::Roots { roots: roots.iter().map(|(p, o)| (PathBytes::new(p), *o)).collect() };
        out.push(&record, b"");
        let gone: Vec<_> =
            self.roots.iter().map(|r| r.1).filter(|old| !roots.iter().any(|new| new.1 == *old)).collect();
        self.orphans.extend(gone);
        self.roots = roots;
    }

    /// The object, if it is in the group.
    #[must_use]
    pub fn get(&self, object: ObjectId) -> Option<&Object> {
        self.objects.get(&object)
    }

    /// The object of an inode.
    #[must_use]
    pub fn find(&self, inode: InodeId) -> Option<ObjectId> {
        self.by_inode.get(&inode).copied()
    }

    /// One of the object's paths, from its root on; `None` when it has none.
    fn place(&self, object: ObjectId) -> Option<(ObjectId, PathBuf)> {
        let (mut at, mut names) = (object, Vec::new());
        while !self.is_root(at) {
            let (directory, name) = self.get(at)?.links.first()?;
            names.push(name);
            at = *directory;
            if names.len() > DEPTH_MAX {
                return None;
            }
        }
        Some((at, names.iter().rev().map(|name| name.as_os_str()).collect()))
    }

    /// One of the object's paths; `None` when it has none.
    #[must_use]
    pub fn path(&self, object: ObjectId) -> Option<PathBuf> {
        let (root, below) = self.place(object)?;
        Some(self.roots.iter().find(|r| r.1 == root)?.0.join(below))
    }

    /// All of the object's paths.
    #[must_use]
    pub fn paths(&self, object: ObjectId) -> Vec<PathBuf> {
        let links = self.get(object).into_iter().flat_map(|o| o.links.iter());
        links.filter_map(|(directory, name)| Some(self.path(*directory)?.join(name.as_os_str()))).collect()
    }

    /// What stands at a path of the group.
    #[must_use]
    pub fn at_path(&self, path: &Path) -> Option<ObjectId> {
        let (below, root) =
            self.roots.iter().find_map(|(root, object)| Some((path.strip_prefix(root).ok()?, *object)))?;
        below.iter().try_fold(root, |at, name| self.entry(at, &Name::new(name.as_encoded_bytes())?))
    }

    /// Whether [`Self::take_changed`] is going to be asked.
    pub fn watch(&mut self, watched: bool) {
        self.changed = watched.then(|| self.changed.take().unwrap_or_default());
    }

    /// Objects of which the content changed, or that got a name, since the last call.
    pub fn take_changed(&mut self) -> Vec<ObjectId> {
        self.changed.as_mut().map(|changed| changed.drain().collect()).unwrap_or_default()
    }

    /// Whether it is one of these.
    #[must_use]
    pub fn has_changed(&self, object: ObjectId) -> bool {
        self.changed.as_ref().is_some_and(|changed| changed.contains(&object))
    }

    fn note_changed(&mut self, object: ObjectId) {
        if let Some(changed) = &mut self.changed {
            changed.insert(object);
        }
    }

    /// Whether an entry belongs to the group.
    #[must_use]
    pub fn verdict(&self, directory: ObjectId, name: &Name) -> Verdict {
        if self.filter.is_empty() {
            return Verdict::Taken;
        }
        self.filter.verdict(name, &|| Some(self.place(directory)?.1.join(name.as_os_str())))
    }

    /// Whether an entry does not belong to the group when it names this object.
    #[must_use]
    pub fn leaves_out(&self, directory: ObjectId, name: &Name, object: ObjectId) -> bool {
        !self.filter.is_empty()
            && self.kind(object).is_some_and(|kind| self.verdict(directory, name).leaves_out(kind))
    }

    /// Directories that got another place since the last call, where that decides about what is below.
    pub fn take_moved(&mut self) -> Vec<ObjectId> {
        std::mem::take(&mut self.moved)
    }

    /// Whether one of the object's names leads down from a root.
    #[must_use]
    pub fn is_reachable(&self, object: ObjectId) -> bool {
        let up = |at: &ObjectId| Some(self.get(*at)?.links.first()?.0);
        if std::iter::successors(Some(object), up).take(DEPTH_MAX).any(|at| self.is_root(at)) {
            return true;
        }
        // A directory can have two names until moves whose order is not known are settled: each is followed.
        let (mut todo, mut seen) = (vec![object], HashSet::from_iter([object]));
        while let Some(at) = todo.pop() {
            if self.is_root(at) {
                return true;
            }
            let links = self.get(at).into_iter().flat_map(|known| known.links.iter());
            todo.extend(links.map(|(directory, _)| *directory).filter(|directory| seen.insert(*directory)));
        }
        false
    }

    /// What an entry names.
    #[must_use]
    pub fn entry(&self, directory: ObjectId, name: &Name) -> Option<ObjectId> {
        self.objects.get(&directory)?.entries.get(name).copied()
    }

    /// Whether the object has a name (or is a root).
    #[must_use]
    pub fn is_linked(&self, object: ObjectId) -> bool {
        self.objects.get(&object).is_some_and(|o| !o.links.is_empty()) || self.is_root(object)
    }

    /// Whether the object is a root of the replicated set.
    #[must_use]
    pub fn is_root(&self, object: ObjectId) -> bool {
        self.roots.iter().any(|r| r.1 == object)
    }

    /// Whether a root lies on this device.
    #[must_use]
    pub fn is_device_of_roots(&self, dev: u32) -> bool {
        self.roots.iter().any(|r| self.objects.get(&r.1).is_some_and(|o| o.inode.dev == dev))
    }

    /// How many objects there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// All objects.
    pub fn ids(&self) -> impl Iterator<Item = ObjectId> + '_ {
        self.objects.keys().copied()
    }

    /// An object enters the group. It has no name yet.
    pub fn create(&mut self, new: NewObject, out: &mut Outbox) -> ObjectId {
        self.highest = self.highest.next();
        let object = self.highest;
        let identity = self.file_systems.identity(new.inode);
        let record = Record::Object { object, identity, kind: new.kind, device: new.device, meta: new.meta };
        out.push(&record, &new.target);
        // An inode that is seen again under another object was reused: the old one is history.
        self.by_inode.insert(new.inode, object);
        self.objects.insert(
            object,
            Object {
                inode: new.inode,
                kind: new.kind,
                device: new.device,
                meta: new.meta,
                size: 0,
                target: new.target,
                xattrs: BTreeMap::new(),
                entries: BTreeMap::new(),
                links: Links::default(),
            },
        );
        self.orphans.insert(object);
        object
    }

    /// The type of an object.
    #[must_use]
    pub fn kind(&self, object: ObjectId) -> Option<FileKind> {
        self.objects.get(&object).map(|o| o.kind)
    }

    /// The entry names this object now, or nothing where that is left out. Both must be in the group, the first
    /// a directory; and it cannot name itself.
    pub fn link(&mut self, directory: ObjectId, name: &Name, object: ObjectId, out: &mut Outbox) {
        let before = self.entry(directory, name);
        let is_directory = self.kind(directory) == Some(FileKind::Directory);
        if before == Some(object)
            || !is_directory
            || object == directory
            || !self.objects.contains_key(&object)
        {
            return;
        }
        if self.leaves_out(directory, name, object) {
            return self.unlink(directory, name, out);
        }
        if let Some(before) = before {
            self.drop_link(before, directory, name);
        }
        let Some(parent) = self.objects.get_mut(&directory) else { return };
        parent.entries.insert(name.clone(), object);
        out.push(&Record::EntrySet { directory, name: name.clone(), object }, b"");
        self.note_changed(object);
        let mut left = Links::default();
        if let Some(o) = self.objects.get_mut(&object) {
            if o.kind == FileKind::Directory {
                left = std::mem::take(&mut o.links);
                if self.filter.looks_at_paths() && !(left.is_empty() && o.entries.is_empty()) {
                    self.moved.push(object);
                }
            }
            o.links.add(directory, name.clone());
        }
        self.orphans.remove(&object);
        // A directory has one name: where it stood before, it stands no more.
        for (directory, name) in left.iter() {
            if let Some(parent) = self.objects.get_mut(directory)
                && parent.entries.get(name) == Some(&object)
            {
                parent.entries.remove(name);
                out.push(&Record::EntryDelete { directory: *directory, name: name.clone() }, b"");
            }
        }
    }

    /// The entry is absent now.
    pub fn unlink(&mut self, directory: ObjectId, name: &Name, out: &mut Outbox) {
        let Some(parent) = self.objects.get_mut(&directory) else { return };
        if let Some(object) = parent.entries.remove(name) {
            out.push(&Record::EntryDelete { directory, name: name.clone() }, b"");
            self.drop_link(object, directory, name);
        }
    }

    /// Two entries trade what they name.
    pub fn exchange(&mut self, a: (ObjectId, &Name), b: (ObjectId, &Name), out: &mut Outbox) {
        let (Some(x), Some(y)) = (self.entry(a.0, a.1), self.entry(b.0, b.1)) else { return };
        if x == y {
            return;
        }
        self.drop_link(x, a.0, a.1);
        self.drop_link(y, b.0, b.1);
        for (place, object) in [(a, y), (b, x)] {
            if let Some(parent) = self.objects.get_mut(&place.0) {
                parent.entries.insert(place.1.clone(), object);
            }
            if let Some(o) = self.objects.get_mut(&object) {
                o.links.add(place.0, place.1.clone());
                if self.filter.looks_at_paths() && o.kind == FileKind::Directory {
                    self.moved.push(object);
                }
            }
            self.orphans.remove(&object);
            self.note_changed(object);
            out.push(&Record::EntrySet { directory: place.0, name: place.1.clone(), object }, b"");
        }
    }

    fn drop_link(&mut self, object: ObjectId, directory: ObjectId, name: &Name) {
        if let Some(o) = self.objects.get_mut(&object) {
            o.links.remove(directory, name);
            if o.links.is_empty() {
                self.orphans.insert(object);
            }
        }
    }

    /// A regular file: only these have bytes.
    fn file(&mut self, object: ObjectId) -> Option<&mut Object> {
        self.objects.get_mut(&object).filter(|o| o.kind == FileKind::Regular)
    }

    /// The stream says something about these bytes.
    fn says(&mut self, object: ObjectId, range: std::ops::Range<u64>) {
        self.sent.changed(object, &range);
        self.note_changed(object);
        if let Some(same) = &mut self.same {
            same.changed(object, range);
        }
    }

    /// Bytes of a file are now these.
    pub fn write(&mut self, object: ObjectId, offset: u64, data: &[u8], out: &mut Outbox) {
        let Some(o) = self.file(object) else { return };
        let (before, end) = (o.size, offset + data.len() as u64);
        o.size = before.max(end);
        self.says(object, offset.min(before)..end);
        for (i, piece) in data.chunks(PAYLOAD_MAX).enumerate() {
            let offset = offset + (i * PAYLOAD_MAX) as u64;
            out.push_write(object, offset, piece);
        }
    }

    /// A range of a file reads as zeros now; the file grows if it was shorter.
    pub fn zero(&mut self, object: ObjectId, offset: u64, length: u64, out: &mut Outbox) {
        let Some(o) = self.file(object) else { return };
        let inside = o.size.saturating_sub(offset).min(length);
        if inside > 0 {
            self.says(object, offset..offset + inside);
            out.push(&Record::Zero { object, offset, length: inside }, b"");
        }
        if self.get(object).is_some_and(|o| offset + length > o.size) {
            self.truncate(object, offset + length, out);
        }
    }

    /// A file has this length now.
    pub fn truncate(&mut self, object: ObjectId, size: u64, out: &mut Outbox) {
        let Some(o) = self.file(object) else { return };
        if o.size != size {
            let before = std::mem::replace(&mut o.size, size);
            self.says(object, before.min(size)..u64::MAX);
            out.push(&Record::Truncate { object, size }, b"");
        }
    }

    /// The attributes are these now.
    pub fn set_meta(&mut self, object: ObjectId, meta: Meta, out: &mut Outbox) {
        let Some(o) = self.objects.get_mut(&object) else { return };
        if o.meta != meta {
            o.meta = meta;
            out.push(&Record::Meta { object, meta }, b"");
        }
    }

    /// The extended attributes are exactly these now.
    pub fn set_xattrs(&mut self, object: ObjectId, xattrs: Xattrs, out: &mut Outbox) {
        let Some(o) = self.objects.get_mut(&object) else { return };
        let now: BTreeMap<String, Bytes> = xattrs.into_iter().map(|(n, v)| (n, Bytes::from(v))).collect();
        for name in o.xattrs.keys().filter(|n| !now.contains_key(*n)) {
            out.push(&Record::XattrRemove { object, name: name.clone() }, b"");
        }
        for (name, value) in &now {
            if o.xattrs.get(name) != Some(value) {
                out.push(&Record::XattrSet { object, name: name.clone() }, value);
            }
        }
        o.xattrs = now;
    }

    /// Lets go of objects that have no name any more, and of everything below them. Returns them.
    pub fn forget_orphans(&mut self, out: &mut Outbox) -> Vec<ObjectId> {
        let mut gone = Vec::new();
        let mut todo: Vec<ObjectId> = std::mem::take(&mut self.orphans).into_iter().collect();
        todo.sort_unstable();
        while let Some(object) = todo.pop() {
            if self.is_linked(object) {
                continue;
            }
            let Some(o) = self.objects.remove(&object) else { continue };
            if self.by_inode.get(&o.inode) == Some(&object) {
                self.by_inode.remove(&o.inode);
            }
            for (name, child) in o.entries {
                out.push(&Record::EntryDelete { directory: object, name: name.clone() }, b"");
                if let Some(c) = self.objects.get_mut(&child) {
                    c.links.remove(object, &name);
                    if c.links.is_empty() {
                        todo.push(child);
                    }
                }
            }
            out.push(&Record::Forget { object }, b"");
            self.sent.forget(object);
            if let Some(same) = &mut self.same {
                same.forget(object);
            }
            gone.push(object);
        }
        gone
    }
}
