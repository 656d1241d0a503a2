//! The applier against a model in memory, with a crash before any of its changes.
//!
//! Random programs of renames, links, exchanges, deletes and writes become records, the records a
//! log, the log steps. Each step crashes a few times at random changes of the tree and is redone;
//! afterwards the tree must be the model: names, types, bytes, link counts, times. And so must every
//! generation be the model as it was at its checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bfs_common::codec;
use bfs_common::past::{Difference, Side};
use bfs_common::record::*;
use bfs_common::wire::Position;
use bytes::BytesMut;
use proptest::prelude::*;
use rustix::fs::OFlags;

use super::apply::{self, Area, CrashPoint, Step};
use super::error::BackupError;
use super::gate::Marker;
use super::history::differences;
use super::index::{Base, GroupRow, Index};
use super::past::{Loaded, Past, Source};
use super::plan::Plan;
use super::step::apply_step;
use super::store::Store;
use super::sums;
use crate::log::writer::{Batch, LogWriter};

const GROUP: &str = "g";
const ROOT: &str = "/r";

#[derive(Clone, Debug)]
struct ModelNode {
    directory: bool,
    data: Vec<u8>,
    entries: BTreeMap<Name, ObjectId>,
    mtime: i64,
    links: u64,
}

#[derive(Clone)]
struct Model {
    nodes: BTreeMap<ObjectId, ModelNode>,
    next: u64,
    clock: i64,
    records: Vec<(Record, Vec<u8>)>,
}

const TOP: ObjectId = ObjectId(1);

impl Model {
    fn new() -> Self {
        let mut model = Self { nodes: BTreeMap::new(), next: 1, clock: 1000, records: Vec::new() };
        model.create(true);
        model.records.push((Record::Roots { roots: vec![(PathBytes::new(ROOT.as_ref()), TOP)] }, Vec::new()));
        model
    }

    fn create(&mut self, directory: bool) -> ObjectId {
        let object = ObjectId(self.next);
        self.next += 1;
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

    fn meta(&self, mtime: i64) -> Meta {
        let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Meta { permissions: 0o755, uid: me.0, gid: me.1, mtime_sec: mtime, mtime_nsec: 5 }
    }

    fn touch(&mut self, object: ObjectId) {
        self.clock += 1;
        let mtime = self.clock;
        self.nodes.get_mut(&object).unwrap().mtime = mtime;
        self.records.push((Record::Meta { object, meta: self.meta(mtime) }, Vec::new()));
    }

    fn link(&mut self, directory: ObjectId, name: Name, object: ObjectId) {
        self.unlink(directory, &name);
        self.nodes.get_mut(&directory).unwrap().entries.insert(name.clone(), object);
        self.nodes.get_mut(&object).unwrap().links += 1;
        self.records.push((Record::EntrySet { directory, name, object }, Vec::new()));
        self.touch(directory);
    }

    /// Removes an entry, and what it named if that has no other.
    fn unlink(&mut self, directory: ObjectId, name: &Name) {
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

    fn below(&self, top: ObjectId, object: ObjectId) -> bool {
        top == object || self.nodes[&top].entries.values().any(|child| self.below(*child, object))
    }

    fn do_op(&mut self, (op, a, b, c): (u8, u8, u8, u8)) {
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
                    let offset = u64::from(c) * 50;
                    let bytes = &mut self.nodes.get_mut(&file).unwrap().data;
                    let end = offset as usize + data.len();
                    if bytes.len() < end {
                        bytes.resize(end, 0);
                    }
                    bytes[offset as usize..end].copy_from_slice(&data);
                    self.records.push((Record::Write { object: file, offset }, data));
                    self.touch(file);
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

    fn rename(&mut self, from: ObjectId, name: &Name, to: ObjectId, other: &Name, exchange: bool) {
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

    /// The generation, read as it would be given out. `between`: a step is half done, so a file may be nowhere.
    fn compare_past(&self, past: &mut Past<'_>, between: bool) {
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
                Err(BackupError::Applying(_)) if between => {}
                other => assert!(other.unwrap() && data == model.data, "content of {what}"),
            }
        }
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
    fn compare_differences(&self, later: &Self, found: &[Difference]) {
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

    fn compare(&self, object: ObjectId, path: &Path) {
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

fn append(log: &mut LogWriter, records: Vec<(Record, Vec<u8>)>) -> Position {
    let before = log.durable();
    let mut position = before;
    let mut out = BytesMut::new();
    for (record, payload) in records {
        let start = out.len();
        position.sequence = position.sequence.next();
        codec::encode(&mut out, position.sequence, &record, &payload);
        position.chain = codec::chain(position.chain, &out[start..]);
    }
    log.append(&[Batch { bytes: out.freeze(), before, after: position }]).unwrap();
    position
}

/// Every byte of the tree, and of what is kept, has its checksum.
fn compare_sums(area: &Area, index: &Index) {
    let view = index.view(1).unwrap();
    let (plan, mut never) = (Plan::default(), CrashPoint::default());
    let fits = |object, file: &fs::File, size| {
        let found = sums::compare(&view.sums(object), file, size).unwrap();
        assert_eq!(found, sums::Compared { bytes: found.bytes, ..Default::default() }, "object {object}");
    };
    view.each(|object, node| {
        if node.kind == FileKind::Regular {
            let fd = Step::new(area, &view, &plan, &mut never).open(object, OFlags::RDONLY)?;
            fits(object, &fs::File::from(fd), node.size);
        }
        Ok(true)
    })
    .unwrap();
    for (object, _) in view.kept().unwrap() {
        let file = area.open_kept(object).unwrap().unwrap();
        fits(object, &file, file.metadata().unwrap().len());
    }
    // Nothing is left of what is gone.
    for object in view.with_sums().unwrap() {
        assert!(view.node(object).unwrap().is_some() || view.is_kept(object).unwrap(), "object {object}");
    }
}

/// Whether the last of the crashes came about in any step.
fn check(steps: &[Vec<(u8, u8, u8, u8)>], crashes: &[u64]) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let index = Index::open(store.path()).unwrap();
    let mut row = GroupRow::new(1, GroupId([1; 16]), Vec::new());
    index.put_group(GROUP, &row).unwrap();
    let log_dir = store.group_dir("log", GROUP).unwrap();
    let (mut log, _) =
        LogWriter::open(&log_dir, row.id, Position::START, |_| Ok::<_, BackupError>(())).unwrap();
    log.limit_segments(4096);
    let mut model = Model::new();
    let mut models: Vec<Model> = Vec::new();
    let mut crashed_once = false;
    // What a reader of the first one knew before the step.
    let mut reader: Option<Loaded> = None;
    for (number, ops) in steps.iter().enumerate() {
        for op in ops {
            model.do_op(*op);
        }
        let checkpoint = CheckpointId(number as u64 + 1);
        let label = CheckpointLabel::default();
        let mut records = std::mem::take(&mut model.records);
        records.push((Record::Checkpoint { checkpoint, label: label.clone() }, Vec::new()));
        let marker = Marker { checkpoint, label, position: append(&mut log, records).into() };
        let mut next_crash = crashes.iter().copied();
        let mut crashed = 0;
        row = loop {
            let mut crash = CrashPoint { left: next_crash.next() };
            let area = Area::open(&store, GROUP, &[], &[]).unwrap();
            let begun = index.plan(row.number).unwrap();
            area.seal(begun.map_or(row.checkpoint, |plan| plan.to.checkpoint));
            match apply_step(GROUP, &row, &index, &area, &log_dir, marker.clone(), &mut crash) {
                Ok(row) => break row,
                Err(BackupError::Crash) => crashed += 1,
                Err(error) => panic!("{error}"),
            }
            // A reader beside the applier, at this moment.
            let source =
                Source { area: &area, index: &index, group: GROUP, number: 1, id: row.id, tree: None };
            if let (Some(known), Some(model)) = (reader.take(), models.first()) {
                let mut past = Past::again(source, known).unwrap();
                model.compare_past(&mut past, true);
                reader = Some(past.rest());
            }
            if let Some(model) = models.last() {
                let newest = CheckpointId(models.len() as u64);
                model.compare_past(&mut Past::open(source, newest).unwrap(), true);
            }
        };
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        apply::clean(&area, &index.view(row.number).unwrap()).unwrap();
        model.compare(TOP, &store.path().join("tree/g/r"));
        compare_sums(&area, &index);
        for left in ["stage", "aside"] {
            assert_eq!(fs::read_dir(store.path().join(left).join(GROUP)).unwrap().count(), 0, "{left}");
        }
        LogWriter::remove_applied(&log_dir, row.applied.sequence).unwrap();
        crashed_once |= crashed == crashes.len();
        models.push(model.clone());
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        for (then, model) in (1..).zip(&models) {
            let source = Source::at_rest(&area, &index, GROUP, &row);
            model.compare_past(&mut Past::open(source, CheckpointId(then)).unwrap(), false);
            for (later, other) in (1..).zip(&models).skip(then as usize - 1) {
                let found = differences(source, CheckpointId(then), CheckpointId(later)).unwrap();
                model.compare_differences(other, &found);
            }
        }
        if number == 0 {
            let source = Source::at_rest(&area, &index, GROUP, &row);
            reader = Some(Past::open(source, CheckpointId(1)).unwrap().rest());
        }
    }
    // Dropped, the oldest first, they leave nothing behind, and the others as they were.
    let area = Area::open(&store, GROUP, &[], &[]).unwrap();
    for (then, model) in (1..).zip(&models) {
        let mut past = Past::open(Source::at_rest(&area, &index, GROUP, &row), CheckpointId(then)).unwrap();
        model.compare_past(&mut past, false);
        let (oldest, gone) = index.drop_generations(row.number, &[CheckpointId(then)]).unwrap();
        area.drop_kept(&gone).unwrap();
        area.drop_images(oldest).unwrap();
    }
    compare_sums(&area, &index);
    for left in ["kept", "images"] {
        assert_eq!(fs::read_dir(store.path().join(left).join(GROUP)).unwrap().count(), 0, "{left}");
    }
    crashed_once
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_crash_converges(
        steps in prop::collection::vec(prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..25), 1..5),
        crashes in prop::collection::vec(0..60u64, 0..4),
    ) {
        check(&steps, &crashes);
    }
}

/// Every single crash point of steps that have everything in them, and every second one after it.
#[test]
fn every_crash_point_of_a_busy_step_converges() {
    let first = vec![
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (1, 0, 0, 2),
        (1, 1, 0, 3),
        (2, 0, 9, 1),
        (2, 1, 5, 3),
        (5, 0, 1, 3),
        (0, 2, 0, 2),
    ];
    let second = vec![
        (7, 0, 1, 0),
        (6, 0, 0, 2),
        (4, 1, 0, 3),
        (1, 0, 0, 2),
        (2, 2, 7, 1),
        (3, 0, 3, 9),
        (6, 1, 0, 1),
        (5, 2, 0, 1),
    ];
    // Old bytes are written over, cut, and gone for good; a name is used again.
    let third = vec![
        (2, 0, 3, 0),
        (2, 1, 9, 2),
        (3, 1, 2, 1),
        (4, 0, 0, 1),
        (4, 1, 0, 0),
        (1, 1, 0, 0),
        (7, 1, 0, 2),
        (2, 2, 1, 0),
    ];
    let steps = [first, second, third];
    let mut points = 0;
    while check(&steps, &[points]) {
        points += 1;
    }
    assert!(points > 25, "{points} points");
    // And again a crash while the first one is made good.
    for point in (0..points).step_by(if std::env::var_os("BFS_LONG").is_some() { 1 } else { 11 }) {
        for second in 0.. {
            if !check(&steps, &[point, second]) {
                break;
            }
        }
    }
}
