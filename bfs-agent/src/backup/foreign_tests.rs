//! What others do to the tree of the backup: nothing that they do stops a step, what is lost is named, generations are
//! right or say that they are not, and what is sent again makes the tree right.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use bfs_common::record::*;
use proptest::prelude::*;

use super::apply::{self, Area, CrashPoint};
use super::check;
use super::crash_tests::{Begun, GROUP, SOME_OF_ALL, append, compare_sums};
use super::error::BackupError;
use super::gate::Marker;
use super::history::range;
use super::images;
use super::index::{GroupRow, Index};
use super::merge::Dropping;
use super::model::{May, Model, TOP};
use super::past::{Loaded, Past, Source};
use super::pieces::joined;
use super::step::{self, apply_step};
use super::store::Store;
use super::sums::{SumChange, Sums};
use crate::log::writer::LogWriter;

type Op = (u8, u8, u8, u8);

/// A store with one group, and the model of what is in it.
struct Bench {
    store: Store,
    index: Index,
    area: Area,
    row: GroupRow,
    log: LogWriter,
    log_dir: PathBuf,
    tree: PathBuf,
    model: Model,
    /// As each checkpoint was.
    models: Vec<Model>,
    /// It goes last.
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let Begun { store, index, row, log, log_dir } = Begun::new(&dir.path().join("store"));
        let tree = store.path().join("tree/g/r");
        let area = Area::open(&store, GROUP, &[], &[]).unwrap();
        let (model, models) = (Model::new(), Vec::new());
        Self { store, index, area, row, log, log_dir, tree, model, models, _dir: dir }
    }

    /// Writes what the model did down, as the next checkpoint.
    fn mark(&mut self) -> Marker {
        let checkpoint = CheckpointId(self.models.len() as u64 + 1);
        let label = CheckpointLabel::default();
        let mut records = std::mem::take(&mut self.model.records);
        records.push((Record::Checkpoint { checkpoint, label: label.clone() }, Vec::new()));
        Marker { checkpoint, label, position: append(&mut self.log, records).into() }
    }

    /// Goes on to a checkpoint; false at a crash.
    fn apply(&mut self, marker: &Marker, crash: Option<u64>) -> bool {
        let mut crash = CrashPoint { left: crash };
        let (row, marker) = (&self.row, marker.clone());
        match apply_step(GROUP, row, &self.index, &self.area, &self.log_dir, marker, &mut crash) {
            Ok(row) => self.row = row,
            Err(BackupError::Crash) => return false,
            Err(error) => panic!("checkpoint {}: {error}", self.models.len() + 1),
        }
        apply::clean(&self.area, &self.index.view(self.row.number).unwrap()).unwrap();
        self.models.push(self.model.clone());
        true
    }

    /// Does operations, and applies them.
    fn step(&mut self, ops: &[Op]) {
        self.does(|model| ops.iter().for_each(|op| model.do_op(*op)));
    }

    /// Does something, and applies it.
    fn does(&mut self, does: impl FnOnce(&mut Model)) {
        does(&mut self.model);
        let marker = self.mark();
        assert!(self.apply(&marker, None));
    }

    /// Everything is compared and put back, and what is lost is said again.
    fn repair(&mut self) {
        let all = self.model.nodes.keys().copied().collect();
        step::heal(GROUP, &self.row, &self.index, &self.area, &all).unwrap();
        self.model.say_again(&self.index.view(1).unwrap().damaged().unwrap());
    }

    /// Readers see this while a step may be at work.
    fn source(&self) -> Source<'_> {
        Source { area: &self.area, index: &self.index, group: GROUP, number: 1, id: self.row.id, tree: None }
    }

    fn at_rest(&self) -> Source<'_> {
        Source::at_rest(&self.area, &self.index, GROUP, &self.row)
    }

    /// The tree is the model, and nothing is known to be lost.
    fn is_right(&self) {
        self.model.compare(TOP, &self.tree);
        // What was kept may have been spoiled before.
        compare_sums(&self.area, &self.index, false);
        assert_eq!(self.index.view(1).unwrap().damaged().unwrap(), []);
    }

    /// Checkpoints that are kept.
    fn all(&self) -> Vec<CheckpointId> {
        self.index.generations(1).unwrap().into_iter().map(|(number, _)| number).collect()
    }

    fn model_of(&self, checkpoint: CheckpointId) -> &Model {
        &self.models[checkpoint.0 as usize - 1]
    }

    /// How often each kept checkpoint says that something is lost, read as a whole; all else in them is right.
    fn lost(&self) -> Vec<u64> {
        let named = |then| {
            let mut past = Past::open(self.at_rest(), then).unwrap();
            self.model_of(then).compare_past(&mut past, May::Lose)
        };
        self.all().into_iter().map(named).collect()
    }

    /// Which bytes each kept checkpoint has lost, by file; all others are read and are right.
    fn lost_bytes(&self) -> BTreeMap<CheckpointId, BTreeMap<ObjectId, Ranges>> {
        let of = |then| {
            let mut past = Past::open(self.at_rest(), then).unwrap();
            let files = self.model_of(then).nodes.iter().filter(|(_, node)| !node.directory);
            let lost = files.map(|(file, node)| (*file, lost_of(&mut past, *file, &node.data)));
            (then, lost.filter(|(_, lost)| !lost.is_empty()).collect())
        };
        self.all().into_iter().map(of).collect()
    }

    /// Drops checkpoints; with a crash it is not done to its end.
    fn drops(&self, gone: &BTreeSet<CheckpointId>, left: Option<u64>) {
        let dropping = Dropping { group: 1, id: self.row.id, index: &self.index, area: &self.area };
        match dropping.drop(&self.all(), gone, &mut |_| true, &mut CrashPoint { left }) {
            Ok(()) | Err(BackupError::Crash) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Drops checkpoints while no step is under way: of the others not one byte gets lost, or is found again.
    fn drops_and_loses_nothing(&self, gone: &BTreeSet<CheckpointId>, left: Option<u64>) {
        let before = self.lost_bytes();
        self.drops(gone, left);
        let after = self.lost_bytes();
        let stay: BTreeMap<_, _> = before.into_iter().filter(|(of, _)| after.contains_key(of)).collect();
        assert_eq!(after, stay);
    }
}

/// Bytes of a file: offset and end.
type Ranges = Vec<(u64, u64)>;

/// Which of these bytes of a file a checkpoint has lost; all others are read and are right.
fn lost_of(past: &mut Past<'_>, file: ObjectId, data: &[u8]) -> Ranges {
    let (mut at, size) = (0, data.len() as u64);
    let (mut lost, mut until) = (Vec::new(), size);
    while at < size {
        match range(past, file, at, until) {
            Ok(found) => {
                let (same, at) = (found == data[at as usize..until as usize], past.checkpoint());
                assert!(same, "object {file} at {at}, up to byte {until}");
            }
            // What stands before it is read first.
            Err(BackupError::Lost { start, .. }) if start > at => {
                until = start;
                continue;
            }
            // A block is lost as a whole, but for what images have of it.
            Err(BackupError::Lost { end, .. }) => {
                assert!(end > at, "object {file}: lost up to {end}, asked from {at} on");
                until = end.min(until);
                let image = past.next_piece(file, at, until).map(|(from, ..)| from);
                until = image.filter(|from| *from > at).unwrap_or(until);
                lost.push((at, until));
            }
            Err(BackupError::Foreign(_)) => lost.push((at, until)),
            Err(error) => panic!("object {file} at {}: {error}", past.checkpoint()),
        }
        (at, until) = (until, size);
    }
    joined(lost)
}

/// Somebody else does something to the tree, and to nothing else.
/// In the midst of a step (`within`) nothing is done to bytes: nobody can tell such from the step's own.
fn spoil(tree: &Path, (what, a, b): (u8, u8, u8), within: bool) {
    let mut paths = vec![tree.to_path_buf()];
    let mut at = 0;
    while at < paths.len() {
        if fs::symlink_metadata(&paths[at]).unwrap().is_dir() {
            paths.extend(fs::read_dir(paths[at].clone()).unwrap().map(|e| e.unwrap().path()));
        }
        at += 1;
    }
    paths.sort();
    let path = &paths[a as usize % paths.len()];
    let kind = fs::symlink_metadata(path).unwrap().file_type();
    let directory = kind.is_dir();
    let remove = || if directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match what % 8 {
        // Through links nothing is done.
        3 | 6 | 7 if kind.is_symlink() => {}
        0 => remove().unwrap(),
        1 => {
            remove().unwrap();
            fs::write(path, "another").unwrap();
        }
        2 => {
            remove().unwrap();
            fs::create_dir(path).unwrap();
            fs::write(path.join("n0"), "inside").unwrap();
        }
        3 if directory => {
            let path = path.join(format!("{}{}", if within { "m" } else { "n" }, b % 5));
            if !fs::symlink_metadata(&path).is_ok_and(|there| !there.is_file()) {
                fs::write(path, "more").unwrap();
            }
        }
        3 if within => {}
        3 => fs::write(path, vec![b; b as usize * 40]).unwrap(),
        4 => {
            let to = &paths[b as usize % paths.len()];
            if fs::symlink_metadata(to).unwrap().is_dir() && path != tree {
                // Not below itself.
                let _ = fs::rename(path, to.join("moved"));
            }
        }
        5 => {
            remove().unwrap();
            // It leads nowhere: nothing here may reach beyond the tree through it.
            std::os::unix::fs::symlink("nowhere", path).unwrap();
        }
        6 => fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap(),
        _ if directory || within => {}
        _ => {
            // A byte under the right times.
            let times = fs::metadata(path).unwrap().modified().unwrap();
            let mut data = fs::read(path).unwrap();
            if !data.is_empty() {
                let at = b as usize % data.len();
                data[at] ^= 8;
            }
            let file = fs::File::options().write(true).open(path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &data, 0).unwrap();
            file.set_modified(times).unwrap();
        }
    }
}

/// Which checkpoints go, as bits, and before which change that crashes.
type Dropped = (u16, Option<u64>);

/// Between two steps, or in the midst of one that crashed, somebody else spoils the tree, and checkpoints are dropped.
fn check_spoiled(steps: &[Vec<Op>], spoils: &[(u8, u8, u8)], crashes: &[u64], drops: &[Dropped]) {
    let mut bench = Bench::new();
    let (mut spoils, mut drops) = (spoils.iter(), drops.iter());
    // Somebody reads the first one all the time.
    let gone = |bench: &Bench, mask: u16| {
        let all = bench.all();
        let newest = all.last().copied().unwrap_or_default();
        let goes = |of: &CheckpointId| of.0 > 1 && *of < newest && mask & 1 << (of.0 % 16) != 0;
        all.into_iter().filter(goes).collect::<BTreeSet<_>>()
    };
    let mut reader: Option<Loaded> = None;
    for number in 1.. {
        match steps.get(number - 1) {
            Some(ops) => ops.iter().for_each(|op| bench.model.do_op(*op)),
            None => bench.repair(),
        }
        let marker = bench.mark();
        let mut next_crash = crashes.iter().copied();
        while !bench.apply(&marker, next_crash.next()) {
            if bench.tree.exists()
                && number <= steps.len()
                && let Some(spoiled) = spoils.next()
            {
                spoil(&bench.tree, *spoiled, true);
            }
            if let Some((mask, left)) = drops.next() {
                bench.drops(&gone(&bench, *mask), *left);
            }
            // Readers beside the applier, at this moment: one that knew something before, and a new one.
            if let (Some(known), Some(model)) = (reader.take(), bench.models.first()) {
                let mut past = Past::again(bench.source(), known).unwrap();
                model.compare_past(&mut past, May::Lose);
                reader = Some(past.rest());
            }
            if let Some(model) = bench.models.last() {
                let newest = CheckpointId(bench.models.len() as u64);
                model.compare_past(&mut Past::open(bench.source(), newest).unwrap(), May::Lose);
            }
        }
        if number == 1 {
            reader = Some(Past::open(bench.at_rest(), CheckpointId(1)).unwrap().rest());
        }
        if let Some((mask, left)) = drops.next() {
            bench.drops_and_loses_nothing(&gone(&bench, *mask), *left);
        }
        if number > steps.len() {
            break;
        }
        if fs::symlink_metadata(&bench.tree).is_ok()
            && let Some(spoiled) = spoils.next()
        {
            spoil(&bench.tree, *spoiled, false);
        }
    }
    bench.is_right();
    assert_eq!(bench.lost().last(), Some(&0));
}

/// A store that is copied elsewhere has other inodes: it is taken as it is, and nothing is lost.
#[test]
fn a_copied_store_goes_on() {
    let mut bench = Bench::new();
    bench.step(&SOME_OF_ALL[..7]);
    let away = bench.store.path().join("away");
    fs::rename(&bench.tree, &away).unwrap();
    let copied = std::process::Command::new("cp").arg("-a").arg(&away).arg(&bench.tree).status();
    assert!(copied.unwrap().success());
    bench.step(&[(2, 0, 3, 0), (1, 1, 0, 0)]);
    bench.is_right();
    compare_sums(&bench.area, &bench.index, true);
    assert_eq!(bench.lost(), [0, 0]);
}

/// Where a step makes something new, something of others stands: it is not taken for what the step makes, and nothing
/// is found through it.
#[test]
fn what_stands_at_a_new_name_is_not_taken_for_the_new_object() {
    // A file that is also in a directory that is new itself, where something of another type stands.
    let linked: &[Op] = &[(1, 0, 0, 2), (0, 0, 0, 1), (5, 2, 1, 0)];
    let directory: &[Op] = &[(0, 0, 0, 1), (1, 2, 0, 3), (2, 1, 1, 1)];
    let file: &[Op] = &[(1, 0, 0, 1), (2, 1, 1, 1)];
    for (does, ops) in [("linked", linked), ("directory", directory), ("file", file)] {
        for stands in 0..5 {
            let mut bench = Bench::new();
            bench.step(&[(0, 0, 0, 0), (1, 0, 0, 3), (2, 0, 200, 0)]);
            let at = bench.tree.join("n1");
            match stands {
                0 => fs::write(&at, "another").unwrap(),
                1 => fs::create_dir(&at).unwrap(),
                2 => {
                    fs::create_dir_all(at.join("n3/below")).unwrap();
                    fs::write(at.join("n0"), "inside").unwrap();
                }
                // A name that the backup never had, of a file that it has.
                3 => fs::hard_link(bench.tree.join("n3"), &at).unwrap(),
                _ => std::os::unix::fs::symlink("nowhere", &at).unwrap(),
            }
            bench.step(ops);
            bench.is_right();
            assert_eq!(bench.lost(), [0, 0], "{does}, {stands}");
        }
    }
}

/// A file that is in two directories was looked for through a new one, at whose name something else stood.
#[test]
fn nothing_is_looked_for_through_what_stands_at_a_new_name() {
    let last: &[Op] = &[
        (8, 0, 0, 0),
        (105, 126, 0, 1),
        (184, 62, 0, 4),
        (184, 47, 0, 22),
        (216, 1, 0, 183),
        (221, 39, 7, 3),
    ];
    let steps = [vec![(18, 0, 0, 0)], vec![(184, 0, 0, 3), (24, 55, 0, 2)], last.to_vec()];
    check_spoiled(&steps, &[(100, 0, 0), (250, 20, 4)], &[], &[]);
}

/// A bit of a block changes while nobody looks, and a step writes another part of that block: the block gets no fitting
/// checksum before all of it was said again.
#[test]
fn a_rotten_block_does_not_become_right_by_a_write_into_it() {
    let mut bench = Bench::new();
    bench.step(&[(1, 0, 0, 0), (2, 0, 200, 0)]);
    // It has 8001 bytes; a step will write 41 of them.
    spoil(&bench.tree, (7, 1, 77), false);
    bench.step(&[(2, 0, 1, 9)]);
    let view = bench.index.view(1).unwrap();
    let damaged = view.damaged().unwrap();
    assert_eq!(damaged, [ObjectId(2)]);
    let damage = view.damage(ObjectId(2)).unwrap();
    assert!(damage.touches(77, 78) && !damage.touches(450, 491), "{damage:?}");
    drop(view);
    assert_eq!(bench.lost(), [1, 1]);
    bench.model.say_again(&damaged);
    bench.step(&[]);
    bench.is_right();
    // What the block was before nobody knows: its old checksum went with the write, and nothing shows that these bytes
    // are the same.
    assert_eq!(bench.lost(), [1, 1, 0]);
}

/// A block that had rotten and was written in part has no checksum any more, which else means zeros: neither zeros that
/// are written over it, nor zeros that somebody else makes of it, are taken for what it had.
#[test]
fn zeros_are_not_what_a_block_without_a_checksum_had() {
    for foreign in [false, true] {
        let (mut bench, mut file) = (Bench::new(), TOP);
        bench.does(|model| {
            file = model.create(false);
            model.link(TOP, Name::new(b"f").unwrap(), file);
            model.write(file, 0, vec![1; 200_000]);
        });
        let path = bench.tree.join("f");
        rot(&path, 70_000);
        bench.does(|model| model.write(file, 80_000, vec![2; 100]));
        if foreign {
            fs::write(&path, "").unwrap();
            fs::File::options().write(true).open(&path).unwrap().set_len(200_000).unwrap();
        } else {
            bench.does(|model| model.write(file, 0, vec![0; 200_000]));
        }
        let lost = bench.lost_bytes();
        let all = if foreign { (0, 200_000) } else { (65_536, 131_072) };
        assert!((1..=2).all(|of| lost[&CheckpointId(of)][&file] == [all]), "{lost:?}");
        assert!(lost.get(&CheckpointId(3)).is_none_or(BTreeMap::is_empty), "{lost:?}");
        if foreign {
            // The rest of the block is written: then it has a new checksum, but not of what somebody else did to it.
            bench.does(|model| {
                model.write(file, 65_536, vec![3; 80_000 - 65_536]);
                model.write(file, 80_100, vec![3; 131_072 - 80_100]);
            });
            assert_eq!(bench.lost_bytes()[&CheckpointId(3)][&file], [all]);
        }
    }
}

/// Somebody puts something else in the place of a file, between two steps or in the midst of one: what a step writes to
/// the file never goes into that, above all not into another file of the backup that has got its name.
#[test]
fn what_replaces_a_file_is_not_written_to() {
    use std::os::unix::fs::symlink;
    let build = || {
        let (mut bench, mut files) = (Bench::new(), [TOP; 2]);
        bench.does(|model| {
            for (file, name) in files.iter_mut().zip([b"f", b"g"]) {
                *file = model.create(false);
                model.link(TOP, Name::new(name).unwrap(), *file);
                // Both have the same bytes: these do not say which is which.
                model.write(*file, 0, vec![1; 200_000]);
            }
        });
        (bench, files)
    };
    let replace = |tree: &Path, what: u8| {
        let (f, g) = (tree.join("f"), tree.join("g"));
        fs::remove_file(&f).unwrap();
        let node = |kind| rustix::fs::mknodat(rustix::fs::CWD, &f, kind, 0o600.into(), 0);
        match what {
            0 => fs::hard_link(&g, &f).unwrap(),
            1 => symlink("g", &f).unwrap(),
            2 => symlink(&g, &f).unwrap(),
            3 => node(rustix::fs::FileType::Fifo).unwrap(),
            4 => node(rustix::fs::FileType::Socket).unwrap(),
            5 => fs::create_dir(&f).unwrap(),
            // What its name was taken for stands elsewhere now.
            _ => fs::rename(&g, &f).unwrap(),
        }
    };
    for what in 0..7 {
        for point in 0.. {
            let (mut bench, [f, g]) = build();
            // First of all between two steps.
            let between = point == 0;
            if between {
                replace(&bench.tree, what);
            }
            bench.model.write(f, 70_000, vec![3; 100]);
            bench.model.write(g, 140_000, vec![4; 100]);
            let marker = bench.mark();
            let done = bench.apply(&marker, (!between).then(|| point - 1));
            if !done {
                replace(&bench.tree, what);
                assert!(bench.apply(&marker, None));
            }
            let lost = bench.lost_bytes();
            // The other one is as it was. Where it went itself it is as good as the first, and is taken for it, if the
            // step had not written to it yet.
            let (gone, stays) = if what == 6 { (g, f) } else { (f, g) };
            let has_lost = |lost: &BTreeMap<_, Ranges>, file: ObjectId| lost.contains_key(&file);
            let written = what == 6 && !between;
            assert!(written || !lost.values().any(|lost| has_lost(lost, stays)), "{what}, {point}: {lost:?}");
            assert!(!between || has_lost(&lost[&CheckpointId(1)], gone), "{what}, {point}: {lost:?}");
            let damaged = bench.index.view(1).unwrap().damaged().unwrap();
            bench.model.say_again(&damaged);
            bench.step(&[]);
            bench.is_right();
            assert_eq!(bench.lost_bytes()[&CheckpointId(3)], BTreeMap::new());
            if done && !between {
                break;
            }
        }
    }
}

/// What a peer suspects is lost only if it does not fit its checksums: else a primary could take checkpoints away. Of a
/// file that has none yet its size and time must be those that the applier gave it.
#[test]
fn what_is_suspected_is_not_lost_for_that() {
    let (mut bench, mut file) = (Bench::new(), TOP);
    bench.does(|model| {
        file = model.create(false);
        model.link(TOP, Name::new(b"f").unwrap(), file);
        model.write(file, 0, vec![1; 200_000]);
    });
    let heal = |bench: &Bench| {
        step::heal(GROUP, &bench.row, &bench.index, &bench.area, &HashSet::from([file])).unwrap();
        bench.index.view(1).unwrap().damaged().unwrap()
    };
    assert_eq!(heal(&bench), []);
    // As an earlier release left it.
    bench.index.put_sums(1, &[(file, SumChange::default())]).unwrap();
    assert_eq!(bench.index.view(1).unwrap().sums(file).row(0).unwrap(), None);
    assert_eq!(heal(&bench), []);
    assert_eq!(bench.lost(), [0]);
    fs::File::options().write(true).open(bench.tree.join("f")).unwrap().set_modified(UNIX_EPOCH).unwrap();
    assert_eq!(heal(&bench), [file]);
    assert_eq!(bench.lost(), [1]);
}

/// Changes a byte of a file of the tree under the right times.
fn rot(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let times = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 8], at).unwrap();
    file.set_modified(times).unwrap();
}

/// A step writes into a block that had rotten, so its images say that bytes are lost; before it and behind it others
/// write to the same bytes. Whichever checkpoints are dropped then, also in the midst of a step: each that stays has lost
/// the same bytes as before, and not those that an older image has.
#[test]
fn lost_bytes_stay_lost_in_merged_images_and_no_others() {
    const BLOCK: u64 = 64 << 10;
    let build = || {
        let (mut bench, mut file) = (Bench::new(), TOP);
        bench.does(|model| {
            file = model.create(false);
            model.link(TOP, Name::new(b"f").unwrap(), file);
            model.write(file, 0, vec![1; 4 * BLOCK as usize]);
        });
        // An older image than the one that says what is lost.
        bench.does(|model| model.write(file, BLOCK + 1000, vec![2; 100]));
        rot(&bench.tree.join("f"), BLOCK + 9);
        bench.does(|model| model.write(file, BLOCK + 1050, vec![3; 100]));
        bench.does(|model| model.say_again(&[file]));
        // Newer ones, of the bytes that were lost too.
        bench.does(|model| model.write(file, BLOCK, vec![5; 2000]));
        bench.does(|model| model.write(file, BLOCK + 1040, vec![6; 200_000]));
        bench
    };
    let bench = build();
    let file = *bench.model.nodes.keys().last().unwrap();
    let lost = bench.lost_bytes();
    let of = |checkpoint| lost[&CheckpointId(checkpoint)].get(&file).cloned().unwrap_or_default();
    // The block is lost; the first has a part of it in the image of the step behind it.
    assert_eq!(of(1), [(BLOCK, BLOCK + 1000), (BLOCK + 1100, 2 * BLOCK)]);
    assert_eq!(of(2), [(BLOCK, 2 * BLOCK)]);
    // What was written well cannot be told from the rest of its block when that is looked at again.
    assert_eq!(of(3), [(BLOCK, 2 * BLOCK)]);
    assert!((4..=6).all(|checkpoint| of(checkpoint).is_empty()), "{lost:?}");
    for mask in 0..32u64 {
        let gone: BTreeSet<_> = (1..=5).filter(|n| mask & 1 << (n - 1) != 0).map(CheckpointId).collect();
        let bench = build();
        bench.drops_and_loses_nothing(&gone, None);
        let left: Vec<_> = bench.all();
        assert_eq!(left.len() + gone.len(), 6);
        // And once more while a step is under way, whose images are needed to go on.
        for point in 0.. {
            let mut bench = build();
            bench.model.write(file, BLOCK + 70, vec![7; 3000]);
            let marker = bench.mark();
            let done = bench.apply(&marker, Some(point));
            bench.drops(&gone, None);
            let needed = done || bench.index.plan(1).unwrap().is_some();
            assert!(!needed || images::path(bench.area.images(), CheckpointId(6)).exists(), "point {point}");
            for then in bench.all() {
                let mut past = Past::open(bench.source(), then).unwrap();
                bench.model_of(then).compare_past(&mut past, May::Lose);
            }
            if done {
                assert_eq!(bench.lost_bytes()[&CheckpointId(6)], BTreeMap::new());
                break;
            }
            assert!(bench.apply(&marker, None));
            bench.is_right();
            let after = bench.lost_bytes();
            assert!(after.iter().all(|(of, now)| lost.get(of).is_none_or(|lost| lost == now)), "{after:?}");
            // All points are gone through for a few only.
            if ![0b00010, 0b00110, 0b11110].contains(&mask) && point > 2 {
                break;
            }
        }
        // `check` says the same, and nothing else.
        let Bench { store, index, area, _dir, .. } = bench;
        let path = store.path().to_path_buf();
        drop((store, index, area));
        let found = check::check(&path, true, &[]).unwrap().problems;
        let needs: Vec<_> = left.into_iter().filter(|of| of.0 <= 3).collect();
        assert_eq!(found.iter().flat_map(|p| p.generations.clone()).collect::<Vec<_>>(), needs, "{found:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_others_do_to_the_tree_is_named_and_made_good(
        steps in prop::collection::vec(prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..25), 1..5),
        spoils in prop::collection::vec(any::<(u8, u8, u8)>(), 1..6),
        crashes in prop::collection::vec(0..40u64, 0..3),
    ) {
        check_spoiled(&steps, &spoils, &crashes, &[]);
    }

    /// And checkpoints are dropped meanwhile, in the midst of steps and of merges that crash too: the others are right or
    /// say what they have lost, and that are the same bytes as before.
    #[test]
    fn what_is_lost_stays_named_when_checkpoints_are_merged(
        steps in prop::collection::vec(prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..25), 3..8),
        spoils in prop::collection::vec(any::<(u8, u8, u8)>(), 2..8),
        crashes in prop::collection::vec(0..40u64, 0..3),
        drops in prop::collection::vec((any::<u16>(), prop::option::weighted(0.3, 0..10u64)), 1..12),
    ) {
        check_spoiled(&steps, &spoils, &crashes, &drops);
    }
}
