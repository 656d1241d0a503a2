//! A tree in memory, what programs do to it, and the records that say so: the model that applied checkpoints and
//! generations are compared with.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bfs_common::past::{Difference, Side};
use bfs_common::record::*;

use super::error::BackupError;
use super::index::Base;
use super::past::Past;

/// The only root.
pub(crate) const ROOT: &str = "/r";

/// Its object.
pub(crate) const TOP: ObjectId = ObjectId(1);

/// What may be in the way of a reader.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum May {
    Nothing,
    /// A step is half done, so a file may be nowhere.
    Wait,
    /// And somebody else was at the tree.
    Lose,
}

/// An object.
#[derive(Clone, Debug)]
pub(crate) struct ModelNode {
    pub directory: bool,
    pub data: Vec<u8>,
    pub entries: BTreeMap<Name, ObjectId>,
    pub mtime: i64,
    links: u64,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Model {
    pub nodes: BTreeMap<ObjectId, ModelNode>,
    next: u64,
    clock: i64,
    /// What was done since these were taken away.
    pub records: Vec<(Record, Vec<u8>)>,
}

impl Model {
    pub fn new() -> Self {
        let mut model = Self { nodes: BTreeMap::new(), next: 1, clock: 1000, records: Vec::new() };
        model.create(true);
        model.records.push((Record::Roots { roots: vec![(PathBytes::new(ROOT.as_ref()), TOP)] }, Vec::new()));
        model
    }

    /// What is made here from now on has neither a number nor a time of the other one's. So has what stands here and not
    /// among `known`: it was forgotten there.
    pub fn behind(&mut self, other: &Self, known: &BTreeSet<ObjectId>) {
        self.next = self.next.max(other.next);
        self.clock = self.clock.max(other.clock);
        let forgotten: Vec<ObjectId> =
            self.nodes.keys().filter(|object| !known.contains(object)).copied().collect();
        let mut numbers = BTreeMap::new();
        for object in forgotten {
            let (number, node) = (ObjectId(self.next), self.nodes.remove(&object).unwrap());
            self.next += 1;
            self.nodes.insert(number, node);
            numbers.insert(object, number);
        }
        for object in self.nodes.values_mut().flat_map(|node| node.entries.values_mut()) {
            *object = numbers.get(object).copied().unwrap_or(*object);
        }
    }

    pub fn create(&mut self, directory: bool) -> ObjectId {
        let object = ObjectId(self.next);
        self.next += 1;
        // No two objects have the same time: one that replaced another like it would be no difference.
        self.clock += 1;
        let node =
            ModelNode { directory, data: Vec::new(), entries: BTreeMap::new(), mtime: self.clock, links: 0 };
        let kind = if directory { FileKind::Directory } else { FileKind::Regular };
        let meta = self.meta(node.mtime);
        self.nodes.insert(object, node);
        self.records.push((
            Record::Object { object, identity: Identity::default(), kind, device: 0, meta },
            Vec::new(),
        ));
        object
    }

    pub fn meta(&self, mtime: i64) -> Meta {
        let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Meta { permissions: 0o755, uid: me.0, gid: me.1, mtime_sec: mtime, mtime_nsec: 5 }
    }

    pub fn touch(&mut self, object: ObjectId) {
        self.clock += 1;
        let mtime = self.clock;
        self.nodes.get_mut(&object).unwrap().mtime = mtime;
        self.records.push((Record::Meta { object, meta: self.meta(mtime) }, Vec::new()));
    }

    pub fn link(&mut self, directory: ObjectId, name: Name, object: ObjectId) {
        self.unlink(directory, &name);
        self.nodes.get_mut(&directory).unwrap().entries.insert(name.clone(), object);
        self.nodes.get_mut(&object).unwrap().links += 1;
        self.records.push((Record::EntrySet { directory, name, object }, Vec::new()));
        self.touch(directory);
    }

    /// Removes an entry, and what it named if that has no other.
    pub fn unlink(&mut self, directory: ObjectId, name: &Name) {
        if let Some(gone) = self.detach(directory, name) {
            self.forget(gone);
        }
    }

    fn detach(&mut self, directory: ObjectId, name: &Name) -> Option<ObjectId> {
        let object = self.nodes.get_mut(&directory).unwrap().entries.remove(name)?;
        self.nodes.get_mut(&object).unwrap().links -= 1;
        self.records.push((Record::EntryDelete { directory, name: name.clone() }, Vec::new()));
        self.touch(directory);
        Some(object)
    }

    fn forget(&mut self, object: ObjectId) {
        if self.nodes[&object].links > 0 {
            return;
        }
        for name in self.nodes[&object].entries.keys().cloned().collect::<Vec<_>>() {
            self.unlink(object, &name);
        }
        self.nodes.remove(&object);
        self.records.push((Record::Forget { object }, Vec::new()));
    }

    pub fn write(&mut self, file: ObjectId, offset: u64, data: Vec<u8>) {
        let bytes = &mut self.nodes.get_mut(&file).unwrap().data;
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(&data);
        self.records.push((Record::Write { object: file, offset }, data));
        self.touch(file);
    }

    pub fn below(&self, top: ObjectId, object: ObjectId) -> bool {
        top == object || self.nodes[&top].entries.values().any(|child| self.below(*child, object))
    }

    /// One of [`Self::do_op`], or a write over several blocks.
    pub fn do_op_or_write(&mut self, op: (u8, u8, u8, u8)) {
        let files: Vec<_> = self.nodes.iter().filter(|(_, n)| !n.directory).map(|(o, _)| *o).collect();
        match op {
            (what, a, b, c) if what % 16 == 15 && !files.is_empty() => {
                let file = files[a as usize % files.len()];
                self.write(file, u64::from(c) * 1000, vec![b | 1; 1 + b as usize * 500]);
            }
            _ => self.do_op(op),
        }
    }

    pub fn do_op(&mut self, (op, a, b, c): (u8, u8, u8, u8)) {
        let pick = |list: Vec<ObjectId>, at: u8| list.get(at as usize % list.len().max(1)).copied();
        let dirs: Vec<_> = self.nodes.iter().filter(|(_, n)| n.directory).map(|(o, _)| *o).collect();
        let files: Vec<_> = self.nodes.iter().filter(|(_, n)| !n.directory).map(|(o, _)| *o).collect();
        let (from, to) = (pick(dirs.clone(), a).unwrap(), pick(dirs, b).unwrap());
        let name = Name::new(format!("n{}", c % 4).as_bytes()).unwrap();
        let other = Name::new(format!("n{}", b % 4).as_bytes()).unwrap();
        match op % 8 {
            0 | 1 => {
                let replaced = self.nodes[&from].entries.get(&name).copied();
                if replaced.is_none_or(|r| !self.below(r, from)) {
                    let new = self.create(op % 8 == 0);
                    self.link(from, name, new);
                }
            }
            2 => {
                if let Some(file) = pick(files, a) {
                    let data = vec![c | 1; 1 + b as usize * 40];
                    self.write(file, u64::from(c) * 50, data);
                }
            }
            3 => {
                if let Some(file) = pick(files, a) {
                    let size = u64::from(c) * 30;
                    self.nodes.get_mut(&file).unwrap().data.resize(size as usize, 0);
                    self.records.push((Record::Truncate { object: file, size }, Vec::new()));
                    let (offset, length) = (u64::from(b) * 10, 300);
                    let bytes = &mut self.nodes.get_mut(&file).unwrap().data;
                    let end = (offset + length).min(bytes.len() as u64);
                    for at in offset.min(end)..end {
                        bytes[at as usize] = 0;
                    }
                    self.records.push((Record::Zero { object: file, offset, length }, Vec::new()));
                    self.touch(file);
                }
            }
            4 => self.unlink(from, &name),
            5 => {
                if let Some(file) = pick(files, b)
                    && self.nodes[&from]
                        .entries
                        .get(&name)
                        .is_none_or(|o| !self.below(*o, file) && !self.below(*o, from))
                {
                    self.link(from, name, file);
                }
            }
            _ => self.rename(from, &name, to, &other, op % 8 == 7),
        }
    }

    pub fn rename(&mut self, from: ObjectId, name: &Name, to: ObjectId, other: &Name, exchange: bool) {
        let (Some(object), there) =
            (self.nodes[&from].entries.get(name).copied(), self.nodes[&to].entries.get(other).copied())
        else {
            return;
        };
        let same = (from, name) == (to, other) || there == Some(object);
        if same
            || self.below(object, to)
            || there.is_some_and(|t| self.below(t, from) || self.below(t, object))
        {
            return;
        }
        self.detach(from, name);
        if exchange && let Some(there) = there {
            self.detach(to, other);
            self.link(to, other.clone(), object);
            self.link(from, name.clone(), there);
        } else {
            self.link(to, other.clone(), object);
        }
    }

    /// All bytes of these files again.
    pub fn say_again(&mut self, objects: &[ObjectId]) {
        for object in objects {
            if let Some(node) = self.nodes.get(object).filter(|n| !n.data.is_empty()) {
                let data = node.data.clone();
                self.records.push((Record::Write { object: *object, offset: 0 }, data));
            }
        }
    }

    /// The generation, read as it would be given out; how often bytes were named as lost.
    pub fn compare_past(&self, past: &mut Past<'_>, may: May) -> u64 {
        let mut named = 0;
        assert_eq!(past.roots(), [(PathBytes::new(ROOT.as_ref()), TOP)]);
        let mut found = Vec::new();
        past.each(&mut |object, node| {
            found.push((object, node.clone()));
            Ok(true)
        })
        .unwrap();
        found.sort_by_key(|(object, _)| *object);
        assert_eq!(
            found.iter().map(|(o, _)| *o).collect::<Vec<_>>(),
            self.nodes.keys().copied().collect::<Vec<_>>(),
            "objects at {}",
            past.checkpoint()
        );
        for (object, node) in found {
            let what = format!("object {object} at {}", past.checkpoint());
            let model = &self.nodes[&object];
            assert_eq!(node.kind == FileKind::Directory, model.directory, "{what}");
            assert_eq!((node.meta.mtime_sec, node.meta.mtime_nsec), (model.mtime, 5), "{what}");
            if model.directory {
                let entries: BTreeMap<_, _> = past.entries(object).unwrap().into_iter().collect();
                assert_eq!(entries, model.entries, "{what}");
                continue;
            }
            assert_eq!(node.places.len() as u64, model.links, "{what}");
            let mut data = vec![0; node.size as usize];
            let read = past.content(object, 0, node.size, &mut |at, bytes| {
                data[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
                true
            });
            match read {
                Err(BackupError::Applying(_)) if may != May::Nothing => {}
                Err(BackupError::Lost { .. } | BackupError::Foreign(_)) if may == May::Lose => named += 1,
                other => assert!(other.unwrap() && data == model.data, "content of {what}"),
            }
        }
        named
    }

    /// The places of all objects that have one, and their paths.
    fn places(&self) -> BTreeMap<ObjectId, BTreeMap<(ObjectId, Name), PathBytes>> {
        let mut all: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        let top = (TOP, Name::new(b"top").unwrap());
        all.entry(TOP).or_default().insert(top, PathBytes::new(ROOT.as_ref()));
        let mut to_do = vec![(TOP, PathBuf::from(ROOT))];
        while let Some((directory, path)) = to_do.pop() {
            for (name, object) in &self.nodes[&directory].entries {
                let path = path.join(name.as_os_str());
                let place = (directory, name.clone());
                all.entry(*object).or_default().insert(place, PathBytes::new(&path));
                if self.nodes[object].directory {
                    to_do.push((*object, path));
                }
            }
        }
        all
    }

    /// What was found to differ from a later state is what differs.
    pub fn compare_differences(&self, later: &Self, found: &[Difference]) {
        let (before, after) = (self.places(), later.places());
        for object in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
            let state = |model: &Self, places: &BTreeMap<ObjectId, BTreeMap<_, _>>| {
                let places: Vec<_> = places.get(object)?.keys().cloned().collect();
                let node = &model.nodes[object];
                Some((places, node.data.clone(), node.mtime))
            };
            let differs = state(self, &before) != state(later, &after);
            let named = |side: &Option<Side>, all: &BTreeMap<ObjectId, BTreeMap<_, PathBytes>>| {
                let paths: Option<Vec<_>> = all.get(object).map(|places| places.values().collect());
                side.as_ref().zip(paths).is_some_and(|(s, paths)| s.paths.iter().any(|p| paths.contains(&p)))
            };
            let said =
                found.iter().any(|d| match (before.contains_key(object), after.contains_key(object)) {
                    (true, _) => named(&d.before, &before),
                    (false, _) => named(&d.after, &after),
                });
            assert_eq!(said, differs, "object {object} in {found:#?}");
        }
    }

    /// Whether this is the same state.
    pub fn is(&self, other: &Self) -> bool {
        self.clock == other.clock && self.next == other.next
    }

    pub fn compare(&self, object: ObjectId, path: &Path) {
        let node = &self.nodes[&object];
        let meta = fs::symlink_metadata(path).unwrap();
        assert_eq!(meta.is_dir(), node.directory, "{path:?}");
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (node.mtime, 5), "{path:?}");
        if !node.directory {
            assert_eq!(meta.nlink(), node.links, "{path:?}");
            assert!(fs::read(path).unwrap() == node.data, "content of {path:?}");
            return;
        }
        let mut found: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
        found.sort();
        let expected: Vec<_> = node.entries.keys().map(|n| n.as_os_str().to_owned()).collect();
        assert_eq!(found, expected, "{path:?}");
        for (name, child) in &node.entries {
            self.compare(*child, &path.join(name.as_os_str()));
        }
    }
}
