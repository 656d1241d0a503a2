//! The applier against a model in memory, with a crash before any of its changes.
//!
//! Random programs of renames, links, exchanges, deletes and writes become records, the records a
//! log, the log steps. Each step crashes a few times at random changes of the tree and is redone;
//! afterwards the tree must be the model: names, types, bytes, link counts, times. And so must every
//! generation be the model as it was at its checkpoint.

use std::fs;
use std::path::{Path, PathBuf};

use bfs_common::codec;
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
use super::model::{May, Model, TOP};
use super::past::{Loaded, Past, Source};
use super::plan::Plan;
use super::step::apply_step;
use super::store::Store;
use super::sums;
use crate::log::spares::SPARES;
use crate::log::writer::{Batch, LogWriter};

pub(super) const GROUP: &str = "g";

pub(super) fn append(log: &mut LogWriter, records: Vec<(Record, Vec<u8>)>) -> Position {
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

/// A store with a group that has got nothing yet.
pub(super) struct Begun {
    pub store: Store,
    pub index: Index,
    pub row: GroupRow,
    pub log: LogWriter,
    pub log_dir: PathBuf,
}

impl Begun {
    pub fn new(path: &Path) -> Self {
        let store = Store::open(path).unwrap();
        let index = Index::open(store.path()).unwrap();
        let row = GroupRow::new(1, GroupId([1; 16]), Vec::new());
        index.put_group(GROUP, &row).unwrap();
        let log_dir = store.group_dir("log", GROUP).unwrap();
        let (log, _) =
            LogWriter::open(&log_dir, row.id, Position::START, |_| Ok::<_, BackupError>(())).unwrap();
        Self { store, index, row, log, log_dir }
    }
}

/// Every byte of the tree, and of what is kept if that is wanted, has its checksum.
pub(super) fn compare_sums(area: &Area, index: &Index, kept: bool) {
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
    for (object, _) in view.kept().unwrap().into_iter().filter(|_| kept) {
        let file = area.open_kept(object).unwrap().unwrap();
        fits(object, &file, file.metadata().unwrap().len());
    }
    // Nothing is left of what is gone.
    for object in view.with_sums().unwrap() {
        assert!(view.node(object).unwrap().is_some() || view.is_kept(object).unwrap(), "object {object}");
    }
}

/// What a step does to the model.
pub(super) type Does<'a> = &'a dyn Fn(&mut Model);

/// Whether the last of the crashes came about in any step.
fn check(steps: &[Vec<(u8, u8, u8, u8)>], crashes: &[u64]) -> bool {
    let does: Vec<_> =
        steps.iter().map(|ops| move |model: &mut Model| ops.iter().for_each(|op| model.do_op(*op))).collect();
    let does: Vec<Does> = does.iter().map(|does| does as Does).collect();
    converges(&does, 0, crashes)
}

/// As [`check`], of any steps; those before `from` do not crash.
pub(super) fn converges(steps: &[Does], from: usize, crashes: &[u64]) -> bool {
    // In memory, where there is such a place.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let Begun { store, index, mut row, mut log, log_dir } = Begun::new(&dir.path().join("store"));
    log.limit_segments(4096);
    let mut model = Model::new();
    let mut models: Vec<Model> = Vec::new();
    let mut crashed_once = false;
    // What a reader of the first one knew before the step.
    let mut reader: Option<Loaded> = None;
    for (number, does) in steps.iter().enumerate() {
        does(&mut model);
        let checkpoint = CheckpointId(number as u64 + 1);
        let label = CheckpointLabel::default();
        let mut records = std::mem::take(&mut model.records);
        records.push((Record::Checkpoint { checkpoint, label: label.clone() }, Vec::new()));
        let marker = Marker { checkpoint, label, position: append(&mut log, records).into() };
        let crashes = if number < from { &[][..] } else { crashes };
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
            index.compare_copy();
            // A reader beside the applier, at this moment.
            let source =
                Source { area: &area, index: &index, group: GROUP, number: 1, id: row.id, tree: None };
            if let (Some(known), Some(model)) = (reader.take(), models.first()) {
                let mut past = Past::again(source, known).unwrap();
                model.compare_past(&mut past, May::Wait);
                reader = Some(past.rest());
            }
            if let Some(model) = models.last() {
                let newest = CheckpointId(models.len() as u64);
                model.compare_past(&mut Past::open(source, newest).unwrap(), May::Wait);
            }
        };
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        apply::clean(&area, &index.view(row.number).unwrap()).unwrap();
        model.compare(TOP, &store.path().join("tree/g/r"));
        compare_sums(&area, &index, true);
        for left in ["stage", "aside"] {
            assert_eq!(fs::read_dir(store.path().join(left).join(GROUP)).unwrap().count(), 0, "{left}");
        }
        LogWriter::remove_applied(&log_dir, row.applied.sequence, SPARES).unwrap();
        index.compare_copy();
        if number % 2 == 1 {
            assert!(index.copy(&|| true).unwrap());
        }
        crashed_once |= number >= from && crashed == crashes.len();
        models.push(model.clone());
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        for (then, model) in (1..).zip(&models) {
            let source = Source::at_rest(&area, &index, GROUP, &row);
            model.compare_past(&mut Past::open(source, CheckpointId(then)).unwrap(), May::Nothing);
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
        model.compare_past(&mut past, May::Nothing);
        let (oldest, gone) = index.drop_generations(row.number, &[CheckpointId(then)]).unwrap();
        area.drop_kept(&gone).unwrap();
        area.drop_images(|image| image >= oldest).unwrap();
    }
    index.compare_copy();
    compare_sums(&area, &index, true);
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

/// A step that makes some of everything.
pub(super) const SOME_OF_ALL: [(u8, u8, u8, u8); 8] = [
    (0, 0, 0, 0),
    (0, 1, 0, 1),
    (1, 0, 0, 2),
    (1, 1, 0, 3),
    (2, 0, 9, 1),
    (2, 1, 5, 3),
    (5, 0, 1, 3),
    (0, 2, 0, 2),
];

/// Every single crash point of steps that have everything in them, and every second one after it.
#[test]
fn every_crash_point_of_a_busy_step_converges() {
    let first = SOME_OF_ALL.to_vec();
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
