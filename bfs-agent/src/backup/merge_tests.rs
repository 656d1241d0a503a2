//! Dropping generations against models in memory: in any order, crashed before any change, crashed and then something
//! else is dropped, beside readers that were there before, and beside readers and an applier that are busy.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bfs_common::past::{Event, VersionLine};
use bfs_common::record::*;
use proptest::prelude::*;

use super::apply::{self, Area, CrashPoint};
use super::check;
use super::crash_tests::{Begun, append, compare_sums};
use super::error::BackupError;
use super::gate::Marker;
use super::history::{differences, versions};
use super::images;
use super::index::{GroupRow, Index};
use super::merge::Dropping;
use super::model::{May, Model, TOP};
use super::past::{Loaded, Past, Source};
use super::step::apply_step;
use super::store::Store;
use crate::log::spares::SPARES;
use crate::log::writer::LogWriter;

const GROUP: &str = "g";

/// A store with a generation of each step so far.
struct Kept {
    path: PathBuf,
    store: Store,
    index: Index,
    area: Area,
    log: LogWriter,
    log_dir: PathBuf,
    row: GroupRow,
    model: Model,
    /// The state at each generation there was.
    models: BTreeMap<CheckpointId, Model>,
}

impl Kept {
    fn new(dir: &Path) -> Self {
        let path = dir.join("store");
        let Begun { store, index, row, log, log_dir } = Begun::new(&path);
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        area.seal(row.checkpoint);
        Self { path, store, index, area, log, log_dir, row, model: Model::new(), models: BTreeMap::new() }
    }

    /// The next step.
    fn step(&mut self, does: impl FnOnce(&mut Model)) {
        let marker = self.log_step(does);
        self.apply(marker);
    }

    fn log_step(&mut self, does: impl FnOnce(&mut Model)) -> Marker {
        does(&mut self.model);
        let checkpoint = self.row.checkpoint.next();
        let label = CheckpointLabel::default();
        let mut records = std::mem::take(&mut self.model.records);
        records.push((Record::Checkpoint { checkpoint, label: label.clone() }, Vec::new()));
        self.models.insert(checkpoint, self.model.clone());
        Marker { checkpoint, label, position: append(&mut self.log, records).into() }
    }

    fn apply(&mut self, marker: Marker) {
        self.row = apply_marker(&self.index, &self.area, &self.log_dir, &self.row, marker);
        LogWriter::remove_applied(&self.log_dir, self.row.applied.sequence, SPARES).unwrap();
    }

    fn source(&self) -> Source<'_> {
        source(&self.index, &self.area, self.row.id)
    }

    fn dropping(&self) -> Dropping<'_> {
        Dropping { group: 1, id: self.row.id, index: &self.index, area: &self.area }
    }

    fn all(&self) -> Vec<CheckpointId> {
        self.index.generations(1).unwrap().into_iter().map(|(number, _)| number).collect()
    }

    /// Whether it went to its end.
    fn drops(&self, gone: &BTreeSet<CheckpointId>, left: Option<u64>) -> bool {
        let dropped = self.dropping().drop(&self.all(), gone, &mut |_| true, &mut CrashPoint { left });
        match dropped {
            Ok(()) => true,
            Err(BackupError::Crash) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// What a start of the replayer does.
    fn tidy(&self) {
        let needed = self.dropping().needed().unwrap();
        self.area.sweep(&self.index.view(1).unwrap(), |image| needed.has(image)).unwrap();
    }

    /// Every generation that there is, read whole; and each with the next and the newest.
    fn compare(&self) {
        let all = self.all();
        for (at, number) in all.iter().enumerate() {
            let model = &self.models[number];
            model.compare_past(&mut Past::open(self.source(), *number).unwrap(), May::Nothing);
            for later in all.get(at + 1).into_iter().chain(all.last()) {
                let found = differences(self.source(), *number, *later).unwrap();
                model.compare_differences(&self.models[later], &found);
            }
        }
        for path in ["/r", "/r/n0", "/r/n1"] {
            let lines = versions(self.source(), &PathBytes::new(path.as_ref())).unwrap();
            assert!(lines.iter().all(|line| all.contains(&line.checkpoint)), "{path}: {lines:?}");
        }
    }

    fn images(&self) -> usize {
        fs::read_dir(self.area.images()).unwrap().count()
    }

    /// `bfs-replayer check --read-data` finds nothing; the store is closed for it.
    fn check(self) -> Self {
        let Self { path, store, index, area, log, log_dir, row, model, models } = self;
        drop((store, index, area));
        let report = check::check(&path, true, &[]).unwrap();
        assert_eq!(report.problems, []);
        let store = Store::open(&path).unwrap();
        let index = Index::open(store.path()).unwrap();
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        area.seal(row.checkpoint);
        Self { path, store, index, area, log, log_dir, row, model, models }
    }
}

fn source<'a>(index: &'a Index, area: &'a Area, id: GroupId) -> Source<'a> {
    Source { area, index, group: GROUP, number: 1, id, tree: None }
}

fn apply_marker(index: &Index, area: &Area, log: &Path, row: &GroupRow, marker: Marker) -> GroupRow {
    let row = apply_step(GROUP, row, index, area, log, marker, &mut CrashPoint::default()).unwrap();
    apply::clean(area, &index.view(1).unwrap()).unwrap();
    row
}

/// In memory, where there is such a place.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn ids(all: impl IntoIterator<Item = u64>) -> BTreeSet<CheckpointId> {
    all.into_iter().map(CheckpointId).collect()
}

fn name(of: &str) -> Name {
    Name::new(of.as_bytes()).unwrap()
}

/// A file that grew behind A, and whose new bytes were overwritten later: the image of that step has bytes that lie
/// beyond the end that the file has at A. A merge ends, and A has its bytes only.
#[test]
fn a_piece_that_reaches_past_the_end_of_the_file_ends_with_it() {
    let dir = folder();
    let mut kept = Kept::new(dir.path());
    let mut file = TOP;
    kept.step(|model| {
        file = model.create(false);
        model.link(TOP, name("f"), file);
        model.write(file, 0, vec![1; 10]);
    });
    kept.step(|model| model.write(file, 0, vec![2; 300_000]));
    kept.step(|model| model.write(file, 5, vec![3; 200_000]));
    kept.step(|model| model.write(file, 100_000, vec![4; 10]));
    assert!(kept.drops(&ids([2, 3]), None));
    assert_eq!(kept.all(), [CheckpointId(1), CheckpointId(4)]);
    kept.compare();
    assert_eq!(kept.images(), 1);
    let merged = fs::metadata(images::path(kept.area.images(), CheckpointId(1))).unwrap().len();
    assert!(merged < 2000, "{merged} bytes for a file of 10");
    kept.check();
}

/// A file that is deleted where checkpoints were dropped is kept as it was deleted, with another size than at the
/// checkpoint that needs it; of what was made and deleted between, nothing stays.
#[test]
fn a_deleted_file_belongs_to_the_older_one_and_what_came_between_goes() {
    let dir = folder();
    let mut kept = Kept::new(dir.path());
    let (mut grows, mut shrinks, mut short) = (TOP, TOP, TOP);
    kept.step(|model| {
        for (which, size) in [(&mut grows, 100), (&mut shrinks, 200_000)] {
            *which = model.create(false);
            model.link(TOP, name(&format!("f{size}")), *which);
            model.write(*which, 0, vec![1; size]);
        }
    });
    kept.step(|model| {
        short = model.create(false);
        model.link(TOP, name("short"), short);
        model.write(short, 0, vec![5; 100_000]);
        model.write(grows, 50, vec![2; 150_000]);
        model.nodes.get_mut(&shrinks).unwrap().data.truncate(70_000);
        model.records.push((Record::Truncate { object: shrinks, size: 70_000 }, Vec::new()));
        model.touch(shrinks);
    });
    kept.step(|model| ["f100", "f200000", "short"].iter().for_each(|of| model.unlink(TOP, &name(of))));
    kept.step(|model| model.touch(TOP));
    let in_kept = |kept: &Kept| fs::read_dir(kept.path.join("kept").join(GROUP)).unwrap().count();
    assert_eq!(in_kept(&kept), 3);
    assert!(kept.drops(&ids([2, 3]), None));
    assert_eq!(in_kept(&kept), 2);
    kept.compare();
    let mut kept = kept.check();
    // Damage there is found all the same.
    let file = kept.path.join("kept").join(GROUP).join(shrinks.to_string());
    let bytes = fs::read(&file).unwrap();
    for wrong in
        [&bytes[..69_999], &bytes[..60_000], &[&bytes[..], b"x"].concat(), &[&bytes[1..], b"x"].concat()]
    {
        fs::write(&file, wrong).unwrap();
        let path = kept.path.clone();
        drop((kept.store, kept.index, kept.area));
        let report = check::check(&path, true, &[]).unwrap();
        assert_eq!(report.problems.len(), 1, "{} bytes", wrong.len());
        assert_eq!(report.problems[0].generations, [CheckpointId(1)]);
        kept.store = Store::open(&path).unwrap();
        kept.index = Index::open(kept.store.path()).unwrap();
        kept.area = Area::open(&kept.store, GROUP, &[], &[]).unwrap();
        fs::write(&file, &bytes).unwrap();
    }
}

/// Images of which the first bytes are damaged: what comes behind them stays, for nobody knows how far they go; those
/// that are whole are merged all the same.
#[test]
fn damage_stops_only_the_merge_that_needs_what_is_damaged() {
    let dir = folder();
    let mut kept = Kept::new(dir.path());
    for n in 0..8u8 {
        kept.step(|model| (0..6).for_each(|m| model.do_op_or_write((m, n, 9, m))));
    }
    let damaged = images::path(kept.area.images(), CheckpointId(3));
    let mut bytes = fs::read(&damaged).unwrap();
    bytes[45] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let gone = ids([1, 3, 6]);
    let error =
        kept.dropping().drop(&kept.all(), &gone, &mut |_| true, &mut CrashPoint::default()).unwrap_err();
    assert!(matches!(&error, BackupError::Corrupt { path, .. } if *path == damaged), "{error}");
    assert_eq!(kept.all(), [2, 3, 4, 5, 7, 8].map(CheckpointId));
    for number in [4, 5, 7, 8].map(CheckpointId) {
        kept.models[&number].compare_past(&mut Past::open(kept.source(), number).unwrap(), May::Nothing);
    }
}

/// Every crash point of merges, and every one of the try after it, also when then something else is dropped.
#[test]
fn every_crash_point_of_a_merge_converges() {
    let busy = [
        (0, 0, 0, 0),
        (1, 0, 0, 2),
        (1, 0, 0, 3),
        (2, 0, 90, 1),
        (15, 1, 200, 3),
        (5, 0, 1, 1),
        (7, 0, 1, 0),
        (2, 0, 9, 9),
        (4, 0, 0, 3),
        (1, 0, 0, 3),
        (15, 1, 99, 70),
        (3, 0, 3, 9),
        (6, 1, 0, 1),
        (15, 0, 255, 60),
        (4, 0, 0, 2),
        (1, 1, 0, 0),
        (2, 1, 7, 1),
        (4, 1, 0, 0),
        (5, 0, 1, 3),
        (15, 1, 30, 100),
        (0, 0, 0, 1),
        (3, 1, 2, 1),
        (7, 1, 0, 2),
        (2, 2, 1, 0),
    ];
    let build = |dir: &Path| {
        let mut kept = Kept::new(dir);
        for ops in busy.chunks(3) {
            kept.step(|model| ops.iter().for_each(|op| model.do_op_or_write(*op)));
        }
        kept
    };
    let gone = ids([2, 3, 5, 7]);
    let others = [gone.clone(), ids([3, 5]), ids([2]), ids([4, 6]), ids([1, 4]), ids([])];
    let mut points = 0;
    loop {
        let mut done = false;
        for other in &others {
            for second in (0..).map(Some).chain([None]) {
                let dir = folder();
                let kept = build(dir.path());
                // What a write that was broken off leaves.
                fs::write(kept.area.images().join("00000000000000000001.new"), "bfsimg1\n torn").unwrap();
                done = kept.drops(&gone, Some(points));
                kept.compare();
                let kept = kept.check();
                let last = kept.drops(other, second);
                kept.compare();
                kept.tidy();
                assert!(other.iter().all(|number| !last || !kept.all().contains(number)));
                kept.compare();
                if last && other == &gone {
                    assert_eq!(kept.images(), kept.all().len() - 1);
                }
                compare_sums(&kept.area, &kept.index, true);
                kept.check();
                if last {
                    break;
                }
            }
        }
        if done {
            break;
        }
        points += 1;
    }
    assert_eq!(points, 13);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 400, ..ProptestConfig::default() })]

    /// Any generations are dropped in any order, some of it broken off by a crash, with steps between: all others
    /// stay as they were, for readers that were there before too, and in the end nothing is left that nobody needs.
    #[test]
    fn whatever_is_dropped_the_others_stay_as_they_were(
        steps in prop::collection::vec(prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..20), 2..10),
        drops in prop::collection::vec((any::<u16>(), prop::option::weighted(0.4, 0..12u64)), 1..8),
        first in 2..10usize,
        scrub in prop::bool::weighted(0.2),
    ) {
        let dir = folder();
        let mut kept = Kept::new(dir.path());
        let mut steps = steps.into_iter();
        for ops in steps.by_ref().take(first) {
            kept.step(|model| ops.iter().for_each(|op| model.do_op_or_write(*op)));
        }
        let mut readers: BTreeMap<CheckpointId, Loaded> = BTreeMap::new();
        for (turn, (mask, crash)) in drops.into_iter().enumerate() {
            for number in kept.all() {
                // One that has read nothing yet, or whatever was read of it before.
                readers.entry(number).or_insert_with(|| {
                    let mut past = Past::open(kept.source(), number).unwrap();
                    if (turn as u64 + number.0).is_multiple_of(2) {
                        kept.models[&number].compare_past(&mut past, May::Nothing);
                    }
                    past.rest()
                });
            }
            let all = kept.all();
            let older = &all[..all.len() - 1];
            let gone = older.iter().copied().filter(|number| mask & 1 << (number.0 % 16) != 0).collect();
            kept.drops(&gone, crash);
            if mask.is_multiple_of(5) {
                kept.tidy();
            }
            if let Some(ops) = steps.next() {
                kept.step(|model| ops.iter().for_each(|op| model.do_op_or_write(*op)));
            }
            kept.compare();
            let all = kept.all();
            readers = readers
                .into_iter()
                .filter(|(number, _)| all.contains(number))
                .map(|(number, loaded)| {
                    let mut past = Past::again(kept.source(), loaded).unwrap();
                    kept.models[&number].compare_past(&mut past, May::Nothing);
                    (number, past.rest())
                })
                .collect();
        }
        kept.tidy();
        if scrub {
            kept = kept.check();
        }
        kept.compare();
        compare_sums(&kept.area, &kept.index, true);
        let needed = kept.dropping().needed().unwrap();
        let files = fs::read_dir(kept.area.images()).unwrap().map(|entry| entry.unwrap().file_name());
        prop_assert!(files.into_iter().all(|file| images::number(&file).is_some_and(|n| needed.has(n))));
        let all = kept.all();
        prop_assert!(kept.drops(&all[..all.len() - 1].iter().copied().collect(), None));
        prop_assert_eq!(kept.images(), 0);
        prop_assert_eq!(fs::read_dir(kept.path.join("kept").join(GROUP)).unwrap().count(), 0);
        kept.compare();
    }
}

/// Readers of generations that stay, in threads of their own, while steps are applied and what is dropped is merged.
#[test]
fn readers_beside_applier_and_merging_see_their_generation() {
    const STEPS: u64 = 60;
    let dir = folder();
    let mut kept = Kept::new(dir.path());
    let (mut often, mut once) = (TOP, TOP);
    kept.step(|model| {
        for (which, of) in [(&mut often, "often"), (&mut once, "once")] {
            *which = model.create(false);
            model.link(TOP, name(of), *which);
            model.write(*which, 0, vec![1; 100_000]);
        }
    });
    let step = |number: u64| {
        move |model: &mut Model| {
            let byte = number as u8 | 1;
            model.write(often, number * 7_000 % 90_000, vec![byte; 30_000]);
            if number == 9 {
                model.write(once, 10, vec![9; 10]);
            }
            // Others come, are replaced and go, and change places.
            let (new, of) = (model.create(false), |n: u64| name(&format!("n{}", n % 5)));
            model.link(TOP, of(number), new);
            model.write(new, 0, vec![byte; number as usize * 100]);
            model.rename(TOP, &of(number + 2), TOP, &of(number + 3), true);
            model.unlink(TOP, &of(number * number));
        }
    };
    let held = [1, 4, 12].map(CheckpointId);
    for number in 2..=12 {
        kept.step(step(number));
    }
    let markers: Vec<_> = (13..=STEPS)
        .map(|number| {
            let marker = kept.log_step(step(number));
            kept.row.checkpoint = marker.checkpoint;
            marker
        })
        .collect();
    kept.row = kept.index.group(GROUP).unwrap();
    let tree = std::sync::Mutex::new(kept.row.clone());
    let done = AtomicBool::new(false);
    let (kept, tree, done, held) = (&kept, &tree, &done, &held);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for marker in markers {
                let checkpoint = marker.checkpoint;
                {
                    let mut row = tree.lock().unwrap();
                    *row = apply_marker(&kept.index, &kept.area, &kept.log_dir, &row, marker);
                }
                // The newest three, what is held, and one in ten stay.
                let stays = |of: &CheckpointId| {
                    held.contains(of) || of.0 + 3 > checkpoint.0 || of.0.is_multiple_of(10)
                };
                let all = kept.all();
                let gone = all.iter().copied().filter(|of| !stays(of)).collect();
                kept.dropping().drop(&all, &gone, &mut |_| true, &mut CrashPoint::default()).unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        for reader in 0..3 {
            scope.spawn(move || {
                let source = Source { tree: Some(tree), ..kept.source() };
                let mut known: BTreeMap<CheckpointId, Loaded> = BTreeMap::new();
                for round in 0.. {
                    let last = done.load(Ordering::SeqCst);
                    for number in held {
                        let mut past = match known.remove(number).filter(|_| round % 4 != 0) {
                            Some(loaded) => Past::again(source, loaded).unwrap(),
                            None => Past::open(source, *number).unwrap(),
                        };
                        kept.models[number].compare_past(&mut past, May::Nothing);
                        known.insert(*number, past.rest());
                    }
                    let (from, to) = (held[reader % 2], held[2]);
                    let found = differences(source, from, to).unwrap();
                    kept.models[&from].compare_differences(&kept.models[&to], &found);
                    let changed = |path: &str| {
                        let lines = versions(source, &PathBytes::new(path.as_ref())).unwrap();
                        let changed = |line: &VersionLine| (line.checkpoint, line.event);
                        lines.iter().map(changed).collect::<Vec<_>>()
                    };
                    // Changed at 9, which is dropped: so at the next one that is there.
                    let lines = changed("/r/once");
                    assert_eq!(lines.len(), 2, "{lines:?}");
                    assert_eq!(lines[0], (CheckpointId(1), Event::Oldest));
                    let next = lines[1].0.0;
                    assert!((9..=12).contains(&next) && lines[1].1 == Event::Changed, "{lines:?}");
                    let lines = changed("/r/often");
                    assert!(held.iter().all(|of| lines.iter().any(|line| line.0 == *of)), "{lines:?}");
                    if last {
                        break;
                    }
                }
            });
        }
    });
    assert_eq!(kept.images(), kept.all().len() - 1);
    kept.compare();
}
