//! Followers against a model in memory: whatever happens to names and bytes, whenever policies change, steps are applied
//! and crash, and the replayer starts anew, each follower is what its class says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bfs_common::record::*;
use proptest::prelude::*;

use super::apply::{self, Area, CrashPoint};
use super::crash_tests::{Begun, GROUP, append};
use super::error::BackupError;
use super::follow::{Followers, Site};
use super::gate::Marker;
use super::model::{Model, ROOT, TOP};
use super::past::Source;
use super::step::apply_step;
use crate::log::spares::SPARES;
use crate::log::writer::LogWriter;
use crate::policy::{Backup, Policy, Table};

#[derive(Clone, Debug)]
enum Turn {
    /// Something of what the model can do.
    Do((u8, u8, u8, u8)),
    /// A file is closed.
    Close(u8),
    /// Other policies, and every file is closed.
    Policies(u8),
    /// The followers come up with the log.
    Advance,
    /// A checkpoint; its step crashes before some changes, and is done again by a new replayer.
    Step(Vec<u64>),
    /// The replayer starts anew.
    Restart,
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        12 => any::<(u8, u8, u8, u8)>().prop_map(Turn::Do),
        3 => any::<u8>().prop_map(Turn::Close),
        1 => (0..5u8).prop_map(Turn::Policies),
        3 => Just(Turn::Advance),
        2 => prop::collection::vec(0..40u64, 0..3).prop_map(Turn::Step),
        1 => Just(Turn::Restart),
    ]
}

fn table(number: u8) -> Table {
    let policy = |pattern: &str, backup| Policy { backup, ..Policy::new(pattern).unwrap() };
    Table::new(match number {
        0 => Vec::new(),
        1 => vec![policy("*", Backup::Write)],
        2 => vec![policy("n[01]", Backup::Close), policy("/r/n2", Backup::Write)],
        3 => vec![policy("*", Backup::Close), policy("/r/n1/*", Backup::Write)],
        _ => vec![policy("/r/n0", Backup::Close), policy("/r/n1", Backup::Write)],
    })
    .unwrap()
}

/// The regular files by their paths.
fn files(model: &Model) -> BTreeMap<PathBuf, ObjectId> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![(TOP, PathBuf::from(ROOT))]);
    while let Some((object, path)) = todo.pop() {
        let node = &model.nodes[&object];
        if node.directory {
            todo.extend(node.entries.iter().map(|(name, child)| (*child, path.join(name.as_os_str()))));
        } else {
            found.insert(path, object);
        }
    }
    found
}

/// What a follower has: bytes and time.
type Copied = (Vec<u8>, i64);

fn copied(model: &Model, object: ObjectId) -> Copied {
    (model.nodes[&object].data.clone(), model.nodes[&object].mtime)
}

/// What the followers of class `close` have by now.
#[derive(Default)]
struct Closed(BTreeMap<PathBuf, (ObjectId, Copied)>);

impl Closed {
    fn close(&mut self, model: &Model, table: &Table, object: ObjectId) {
        for (path, at) in files(model) {
            if at == object && table.holds(&path).is_some_and(|policy| policy.backup == Backup::Close) {
                self.0.insert(path, (object, copied(model, object)));
            }
        }
    }

    /// Names went, or stand for something else, or have another class.
    fn follow(&mut self, model: &Model, table: &Table) {
        let files = files(model);
        self.0.retain(|path, (object, _)| {
            let class = table.holds(path).map(|policy| policy.backup);
            files.get(path) == Some(object) && class == Some(Backup::Close)
        });
    }
}

fn check(folder: &Path, model: &Model, table: &Table, closed: &Closed) {
    let mut wanted: BTreeMap<PathBuf, Copied> =
        closed.0.iter().map(|(path, (_, copied))| (path.clone(), copied.clone())).collect();
    for (path, object) in files(model) {
        if table.holds(&path).is_some_and(|policy| policy.backup == Backup::Write) {
            wanted.insert(path, copied(model, object));
        }
    }
    let mut found = BTreeMap::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(at) = todo.pop() {
        let meta = fs::symlink_metadata(&at).unwrap();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let path = Path::new("/").join(at.strip_prefix(folder).unwrap());
            found.insert(path, (fs::read(&at).unwrap(), meta.mtime()));
        }
    }
    let names = |all: &BTreeMap<PathBuf, Copied>| all.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&found), names(&wanted));
    for (path, copied) in wanted {
        assert!(found[&path] == copied, "{path:?} is not as it should be");
    }
}

fn run(turns: &[Turn]) {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let Begun { store, index, mut row, mut log, log_dir } = Begun::new(&dir.path().join("store"));
    log.limit_segments(4096);
    let (mut model, mut policies, mut closed) = (Model::new(), Table::default(), Closed::default());
    let mut checkpoint = CheckpointId(0);
    let mut followers: Option<Followers> = None;
    let now = store.path().join("now").join(GROUP);
    for turn in turns.iter().chain([&Turn::Advance, &Turn::Step(vec![3]), &Turn::Restart]) {
        let step = match turn {
            Turn::Do(op) => {
                model.do_op_or_write(*op);
                closed.follow(&model, &policies);
                continue;
            }
            Turn::Close(at) => {
                let all: Vec<ObjectId> = files(&model).into_values().collect();
                if let Some(object) = all.get(*at as usize % all.len().max(1)) {
                    model.records.push((Record::Closed { object: *object }, Vec::new()));
                    closed.close(&model, &policies, *object);
                }
                continue;
            }
            Turn::Policies(number) => {
                policies = table(*number);
                let lines = policies.policies().iter().map(Policy::line).collect();
                model.records.push((Record::Policies { lines }, Vec::new()));
                closed.follow(&model, &policies);
                for object in files(&model).into_values().collect::<BTreeSet<_>>() {
                    model.records.push((Record::Closed { object }, Vec::new()));
                    closed.close(&model, &policies, object);
                }
                continue;
            }
            Turn::Advance => None,
            Turn::Step(crashes) => {
                checkpoint = checkpoint.next();
                let label = CheckpointLabel::default();
                model.records.push((Record::Checkpoint { checkpoint, label }, Vec::new()));
                Some(crashes)
            }
            Turn::Restart => {
                followers = None;
                None
            }
        };
        let records = std::mem::take(&mut model.records);
        let position = if records.is_empty() { log.durable() } else { append(&mut log, records) };
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        area.seal(row.checkpoint);
        let source = Source { area: &area, index: &index, group: GROUP, number: 1, id: row.id, tree: None };
        let site = Site { source, log: &log_dir, room: &|_| Ok(()) };
        let all = match &mut followers {
            Some(all) => all,
            none => none.insert(Followers::new(&site, &row).unwrap()),
        };
        all.advance(&site, &row, position.sequence).unwrap();
        assert_eq!(all.standing().troubles, Vec::<String>::new());
        check(&now, &model, &policies, &closed);
        let Some(crashes) = step else { continue };
        let label = CheckpointLabel::default();
        let marker = Marker { checkpoint, label, position: position.into() };
        let mut crashes = crashes.iter().copied();
        row = loop {
            let mut crash = CrashPoint { left: crashes.next() };
            let area = Area::open(&store, GROUP, &[], &[]).unwrap();
            area.seal(index.plan(row.number).unwrap().map_or(row.checkpoint, |plan| plan.to.checkpoint));
            match apply_step(GROUP, &row, &index, &area, &log_dir, marker.clone(), &mut crash) {
                Ok(row) => break row,
                Err(BackupError::Crash) => followers = None,
                Err(error) => panic!("{error}"),
            }
        };
        apply::clean(&area, &index.view(row.number).unwrap()).unwrap();
        LogWriter::remove_applied(&log_dir, row.applied.sequence, SPARES).unwrap();
        if let Some(all) = &mut followers {
            all.applied(&row);
        }
        check(&now, &model, &policies, &closed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 1000, ..ProptestConfig::default() })]

    #[test]
    fn followers_are_what_their_class_says(turns in prop::collection::vec(turn(), 1..60)) {
        run(&turns);
    }
}

#[test]
fn a_copy_that_fails_is_tried_again_and_then_reported() {
    let dir = tempfile::tempdir().unwrap();
    let Begun { store, index, row, mut log, log_dir } = Begun::new(&dir.path().join("store"));
    let mut model = Model::new();
    let file = model.create(false);
    model.link(TOP, Name::new(b"f").unwrap(), file);
    model.write(file, 0, b"bytes".to_vec());
    let policy = Policy { backup: Backup::Write, retries: 2, ..Policy::new("/r/f").unwrap() };
    model.records.push((Record::Policies { lines: vec![policy.line()] }, Vec::new()));
    let at = append(&mut log, std::mem::take(&mut model.records)).sequence;
    let area = Area::open(&store, GROUP, &[], &[]).unwrap();
    let source = Source { area: &area, index: &index, group: GROUP, number: 1, id: row.id, tree: None };
    let full = Site { source, log: &log_dir, room: &|_| Err("the disk is full".into()) };
    let mut followers = Followers::new(&full, &row).unwrap();
    let mut tried = 0;
    while followers.standing().troubles.is_empty() {
        if let Some(again) = followers.standing().again {
            std::thread::sleep(again.saturating_duration_since(std::time::Instant::now()));
        }
        followers.advance(&full, &row, at).unwrap();
        tried += 1;
        assert!(tried <= 3, "the first try and two more");
    }
    let standing = followers.standing();
    assert_eq!((tried, standing.failures, standing.count), (3, 1, 1));
    let trouble = &standing.troubles[0];
    for part in ["policy \"/r/f\"", "backup of /r/f", "the disk is full"] {
        assert!(trouble.contains(part), "{trouble}");
    }
    // The next record is no reason to try at once; a new replayer is.
    let site = Site { room: &|_| Ok(()), ..full };
    let mut followers = Followers::new(&site, &row).unwrap();
    followers.advance(&site, &row, at).unwrap();
    assert_eq!(followers.standing().troubles, Vec::<String>::new());
    assert_eq!(fs::read(store.path().join("now/g/r/f")).unwrap(), b"bytes");
}

/// A newer agent may say what this release does not know.
#[test]
fn what_is_not_understood_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let Begun { store, index, row, mut log, log_dir } = Begun::new(&dir.path().join("store"));
    let mut model = Model::new();
    let line = PolicyLine { pattern: "/r/f".into(), settings: vec![("colour".into(), "red".into())] };
    model.records.push((Record::Policies { lines: vec![line] }, Vec::new()));
    let at = append(&mut log, std::mem::take(&mut model.records)).sequence;
    let area = Area::open(&store, GROUP, &[], &[]).unwrap();
    let source = Source { area: &area, index: &index, group: GROUP, number: 1, id: row.id, tree: None };
    let site = Site { source, log: &log_dir, room: &|_| Ok(()) };
    let mut followers = Followers::new(&site, &row).unwrap();
    followers.advance(&site, &row, at).unwrap();
    assert!(followers.standing().troubles[0].contains("colour"));
}
