//! The copy has what the index has, at every crash point; and what comes of it is that, or nothing.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bfs_common::record::*;
use redb::{Database, ReadableDatabase};

use super::super::error::BackupError;
use super::super::gate::Marker;
use super::super::store::Store;
use super::copy::changes::Changes;
use super::copy::{Kind, Line, Mark, files, folder, path};
use super::copying::each_row;
use super::rebuild::build;
use super::{CHANGED, GroupRow, Index, Keeper, Phase, PlanRow, StepResult, mark, open, rebuild};
use crate::simulation::disk::{self, Failure};

fn dump(db: &Database) -> (Mark, Vec<Line>) {
    let read = db.begin_read().unwrap();
    let mut all = Vec::new();
    each_row(&read, &mut |line| {
        all.push(line);
        Ok(true)
    })
    .unwrap();
    (mark(&read.open_table(CHANGED).unwrap()).unwrap(), all)
}

/// In memory, where there is such a place.
fn folder_for_test() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// What would be made of the copy of a store.
fn built(store: &Path) -> Result<(Mark, Vec<Line>), BackupError> {
    let dir = folder_for_test();
    let new = dir.path().join("made.new");
    build(store, &new)?;
    Ok(dump(&open(&new).unwrap()))
}

impl Index {
    fn dump(&self) -> (Mark, Vec<Line>) {
        self.with(|db| Ok(dump(db))).unwrap()
    }

    /// What would be made of the copy is what is here.
    pub(in crate::backup) fn compare_copy(&self) {
        // Where the disk failed while it was written there is none yet, and the status says so.
        if !self.has_copy() {
            return;
        }
        let made = built(self.path.parent().unwrap()).unwrap();
        assert!(made == self.dump(), "the copy is not that of the index");
    }

    /// Files of changes end at this length.
    pub(in crate::backup) fn limit_copy(&self, bytes: u64) {
        self.changes.lock().unwrap().limit_files(bytes);
    }
}

const NAME: &str = "g";

fn node(size: u64) -> super::Node {
    super::Node {
        identity: Identity::default(),
        kind: FileKind::Regular,
        device: 0,
        meta: Meta::default(),
        size,
        xattrs: vec![("user.some".into(), vec![7; size as usize % 90].into())],
        target: bytes::Bytes::new(),
        places: Vec::new(),
        ino: size,
    }
}

/// A step, its plan first.
fn step(index: &Index, n: u64) -> Result<(), BackupError> {
    let row = index.group(NAME)?;
    let to = Marker { checkpoint: CheckpointId(n), label: CheckpointLabel::default(), position: row.applied };
    let plan = PlanRow { from: row.checkpoint, to, phase: Phase::Planned, imaged: n > 1 };
    index.put_plan(row.number, &plan)?;
    index.put_plan(row.number, &PlanRow { phase: Phase::Detached, ..plan })?;
    let name = |n: u64| Name::new(format!("name{n}").as_bytes()).unwrap();
    let mut result = StepResult { extent: (n, n), ..StepResult::default() };
    result.objects = vec![(ObjectId(n), Some(node(n))), (ObjectId(n + 1), Some(node(n + 100)))];
    result.entries = vec![(ObjectId(1), name(n), Some(ObjectId(n)))];
    if n > 2 {
        result.objects.push((ObjectId(n - 1), None));
        result.entries.push((ObjectId(1), name(n - 1), None));
        result.kept = vec![ObjectId(n - 1)];
    }
    index.finish(NAME, &result, n > 1, |row| row.checkpoint = CheckpointId(n))?;
    if n > 4 {
        index.drop_generations(row.number, &[CheckpointId(n - 4)])?;
    }
    Ok(())
}

/// What happens to an index; `granted` gets each epoch that was given out.
fn some_of_all(index: &Index, granted: &mut Vec<Epoch>) -> Result<(), BackupError> {
    if index.groups()?.is_empty() {
        index.put_group(NAME, &GroupRow::new(1, GroupId([1; 16]), Vec::new()))?;
    }
    let from = index.group(NAME)?.checkpoint.0;
    for n in from + 1..from + 7 {
        granted.push(index.grant(NAME)?);
        step(index, n)?;
        if n % 3 == 0 {
            index.copy(&|| true)?;
        }
    }
    Ok(())
}

fn begun(dir: &Path) -> (Store, Index) {
    let store = Store::open(&dir.join("store")).unwrap();
    let index = Index::open(store.path()).unwrap();
    index.limit_copy(700);
    (store, index)
}

#[test]
fn a_copy_follows_each_change() {
    let dir = folder_for_test();
    let (store, index) = begun(dir.path());
    let mut granted = Vec::new();
    for _ in 0..4 {
        some_of_all(&index, &mut granted).unwrap();
        index.compare_copy();
    }
    let copy = folder(store.path());
    let wholes = files(&copy, Kind::Whole).unwrap();
    assert_eq!(wholes.len(), 2, "the last two");
    let changes = files(&copy, Kind::Changes).unwrap();
    assert!(changes[0] <= wholes[0] + 1 && changes[1] > wholes[0] + 1, "{changes:?} for {wholes:?}");
    // One that was begun and not finished is nothing, and goes.
    let stop = AtomicBool::new(false);
    index.copy(&|| !stop.swap(true, Ordering::SeqCst)).unwrap();
    assert_eq!(super::check_copy(store.path()).unwrap(), []);
    drop(index);
    Index::open(store.path()).unwrap().compare_copy();
}

/// The host fails at each sync in turn, in each way, and once more while that is made good.
#[test]
fn at_every_crash_point_the_copy_leads_to_what_was_acted_on() {
    for how in [Failure::Kill, Failure::Power, Failure::Once] {
        let (mut refused, mut points) = (0, 0);
        for event in 0.. {
            let dir = folder_for_test();
            let (store, index) = begun(dir.path());
            let mut granted = Vec::new();
            disk::remove_all();
            let host = disk::install(store.path(), event);
            some_of_all(&index, &mut granted).unwrap();
            disk::fail_at(host, event, how);
            let mut done = some_of_all(&index, &mut granted);
            if how == Failure::Once {
                // It goes on, as a replayer does.
                while done.is_err() {
                    done = some_of_all(&index, &mut granted);
                }
                let failed = disk::refused(host) > 0;
                index.compare_copy();
                disk::remove_all();
                if !failed {
                    break;
                }
                points += 1;
                continue;
            }
            drop(index);
            disk::start(host);
            disk::remove_all();
            // Without the index.
            let newest = granted.last().copied();
            match built(store.path()) {
                Ok((_, lines)) => {
                    let Some(Line::Group(_, Some(row))) = lines.first() else { panic!("{lines:?}") };
                    let row: GroupRow = super::unpack("group", row).unwrap();
                    assert!(Some(row.granted) >= newest, "event {event}: an epoch is lost");
                }
                // Bytes of a change that never counted are there, and are not what was written.
                Err(BackupError::NoRebuild { .. }) if how == Failure::Power => refused += 1,
                Err(error) => panic!("event {event}, {how:?}: {error}"),
            }
            // And with it.
            let index = Index::open(store.path()).unwrap();
            index.compare_copy();
            assert!(Some(index.grant(NAME).unwrap()) > newest);
            some_of_all(&index, &mut granted).unwrap();
            index.compare_copy();
            assert!(granted.is_sorted_by(|a, b| a < b), "{granted:?}");
            if done.is_ok() {
                break;
            }
            points += 1;
        }
        assert!(points > 40, "{how:?}: {points} points");
        assert!(refused < points / 3, "{how:?}: {refused} of {points}");
    }
}

/// Each bit that is wrong in any file is noticed, or does not matter.
#[test]
fn what_is_made_of_a_spoiled_copy_is_the_index_or_nothing() {
    let dir = folder_for_test();
    let (store, index) = begun(dir.path());
    let mut granted = Vec::new();
    (0..2).for_each(|_| some_of_all(&index, &mut granted).unwrap());
    some_of_all(&index, &mut granted).unwrap();
    index.grant(NAME).unwrap();
    let right = index.dump();
    drop(index);
    let copy = folder(store.path());
    let (wholes, changes) = (files(&copy, Kind::Whole).unwrap(), files(&copy, Kind::Changes).unwrap());
    let all = wholes.iter().map(|n| (Kind::Whole, *n)).chain(changes.iter().map(|n| (Kind::Changes, *n)));
    let (mut made, mut refused) = (0, 0);
    for (kind, number) in all {
        let place = path(&copy, kind, number);
        let good = fs::read(&place).unwrap();
        for at in (0..good.len()).step_by(if good.len() > 4000 { 29 } else { 7 }) {
            let mut flipped = good.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(&place, &flipped).unwrap();
            match built(store.path()) {
                Ok(found) => {
                    assert!(found == right, "byte {at} of {}", place.display());
                    made += 1;
                }
                Err(BackupError::NoRebuild { .. }) => refused += 1,
                Err(error) => panic!("byte {at} of {}: {error}", place.display()),
            }
            assert!(!super::check_copy(store.path()).unwrap().is_empty(), "byte {at} of {}", place.display());
        }
        // Without it.
        fs::remove_file(&place).unwrap();
        assert!(built(store.path()).map_or(true, |found| found == right), "without {}", place.display());
        fs::write(&place, good).unwrap();
    }
    assert!(made > 0 && refused > 0, "{made} and {refused}");
    assert!(built(store.path()).unwrap() == right);
}

#[test]
fn an_index_that_lacks_the_last_change_gets_it_and_an_older_one_is_refused() {
    let dir = folder_for_test();
    let (store, index) = begun(dir.path());
    let mut granted = Vec::new();
    some_of_all(&index, &mut granted).unwrap();
    drop(index);
    let place = store.path().join("index.redb");
    let mut olds = Vec::new();
    for _ in 0..3 {
        olds.push(fs::read(&place).unwrap());
        granted.push(Index::open(store.path()).unwrap().grant(NAME).unwrap());
    }
    let right = Index::open(store.path()).unwrap().dump();
    let sound = fs::read(&place).unwrap();
    for old in &olds[..2] {
        fs::write(&place, old).unwrap();
        let error = Index::open(store.path()).unwrap_err();
        assert!(matches!(&error, BackupError::IndexUnusable { .. }), "{error}");
        assert!(error.to_string().contains("older copy") && error.to_string().contains("--rebuild-index"));
    }
    fs::write(&place, &olds[2]).unwrap();
    let index = Index::open(store.path()).unwrap();
    assert!(index.dump() == right);
    drop(index);
    // A copy that is behind by more than a crash leaves is begun anew.
    let copy = folder(store.path());
    let aside = dir.path().join("aside");
    fs::rename(&copy, &aside).unwrap();
    fs::write(&place, &sound).unwrap();
    let index = Index::open(store.path()).unwrap();
    assert!(matches!(built(store.path()), Err(BackupError::NoRebuild { .. })));
    index.grant(NAME).unwrap();
    index.grant(NAME).unwrap();
    index.copy(&|| true).unwrap();
    index.compare_copy();
    drop(index);
    fs::remove_dir_all(&copy).unwrap();
    fs::rename(&aside, &copy).unwrap();
    // What stands there is newer than that copy.
    let error = rebuild(&store).unwrap_err();
    assert!(
        matches!(&error, BackupError::NoRebuild { .. }) && error.to_string().contains("newer"),
        "{error}"
    );
    let index = Index::open(store.path()).unwrap();
    assert_eq!(files(&copy, Kind::Whole).unwrap(), [0; 0]);
    index.copy(&|| true).unwrap();
    index.compare_copy();
}

#[test]
fn an_index_is_made_again_where_the_store_has_nothing_newer() {
    let dir = folder_for_test();
    let (store, index) = begun(dir.path());
    let mut granted = Vec::new();
    some_of_all(&index, &mut granted).unwrap();
    let right = index.dump();
    drop(index);
    let place = store.path().join("index.redb");
    let sound = fs::read(&place).unwrap();
    let spoiled = [vec![0xff; 4096], sound[4096..].to_vec()].concat();
    for bytes in [None, Some(Vec::new()), Some(b"junk".to_vec()), Some(spoiled), Some(sound.clone())] {
        match &bytes {
            Some(bytes) => fs::write(&place, bytes).unwrap(),
            None => fs::remove_file(&place).unwrap(),
        }
        let made = rebuild(&store).unwrap();
        assert_eq!(made.last, right.0.number);
        assert_eq!(made.aside.is_some(), bytes.is_some());
        if let (Some(aside), Some(bytes)) = (&made.aside, bytes.filter(|bytes| *bytes != sound)) {
            assert!(fs::read(aside).unwrap() == bytes);
        }
        let index = Index::open(store.path()).unwrap();
        assert!(index.dump() == right);
    }
    fs::remove_file(&place).unwrap();
    // A group that the copy does not know, and before-images of a later step.
    fs::create_dir(store.path().join("tree/other")).unwrap();
    let error = rebuild(&store).unwrap_err().to_string();
    assert!(error.contains("knows no group \"other\""), "{error}");
    fs::remove_dir(store.path().join("tree/other")).unwrap();
    let images = store.group_dir("images", NAME).unwrap();
    fs::write(images.join("00000000000000000099.img"), "").unwrap();
    let error = rebuild(&store).unwrap_err().to_string();
    assert!(error.contains("checkpoint 99"), "{error}");
    fs::remove_file(images.join("00000000000000000099.img")).unwrap();
    assert!(!place.exists() && !place.with_extension("new").exists(), "nothing was put there");
    // Broken off between the two names.
    fs::write(place.with_extension("new"), "half of it").unwrap();
    rebuild(&store).unwrap();
    assert!(Index::open(store.path()).unwrap().dump() == right);
}

#[test]
fn a_whole_copy_that_fails_is_named_and_tried_again() {
    let dir = folder_for_test();
    let (store, index) = begun(dir.path());
    let mut granted = Vec::new();
    some_of_all(&index, &mut granted).unwrap();
    drop(index);
    let copy = folder(store.path());
    for number in files(&copy, Kind::Whole).unwrap() {
        fs::remove_file(path(&copy, Kind::Whole, number)).unwrap();
    }
    let index = Arc::new(Index::open(store.path()).unwrap());
    let full = Arc::new(AtomicBool::new(true));
    let of_keeper = full.clone();
    let keeper = Keeper::start(index.clone(), move |_| {
        if of_keeper.load(Ordering::SeqCst) { Err("the disk is full".into()) } else { Ok(()) }
    });
    let keeper = keeper.unwrap();
    let wait = |what: &dyn Fn() -> bool| {
        let end = Instant::now() + Duration::from_secs(30);
        while !what() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait(&|| index.copy_trouble().is_some_and(|why| why.contains("the disk is full")));
    // Everything goes on meanwhile.
    for n in 7..9 {
        index.grant(NAME).unwrap();
        step(&index, n).unwrap();
    }
    assert!(!index.has_copy());
    full.store(false, Ordering::SeqCst);
    wait(&|| index.copy_trouble().is_none() && index.has_copy());
    index.compare_copy();
    drop(keeper);
    assert!(Changes::find(&copy).unwrap().is_ok());
}
