//! The store's index: what the groups are, and the state of each at its applied checkpoint.
//!
//! One transaction moves the applied position together with every object and entry that the step
//! changed, so the index is at a checkpoint at every moment. The same transaction makes the step's
//! end a generation, and says that the images of the step give the one before.
//!
//! After a failed read, write or sync the database takes nothing until it is opened again, and what it then
//! holds is the state before or after the transaction that failed. So it is closed at once, the next who needs
//! it opens it, and whoever was told of a failure must read again where it stands.
//!
//! Beside it stands a copy of it, in another form (`copy`), which has each change before the index has it.

mod change;
mod copy;
#[cfg(test)]
mod copy_tests;
mod copying;
mod generations;
mod history;
mod rebuild;
mod view;
mod writing;

pub use copying::{Keeper, check as check_copy};
pub use rebuild::{Rebuilt, rebuild};
pub use view::{Base, SumsOf, View};

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

use bfs_common::record::{
    CheckpointId, CheckpointLabel, Epoch, FileKind, GroupId, Identity, Meta, Name, ObjectId, PathBytes,
    PolicyLine,
};
use bfs_common::wire::{History, Position};
use bytes::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::damage::Damage;
use super::error::BackupError;
use super::gate::{Marker, PositionRow};
use super::sums::{SumChange, SumRow};
use crate::log::{sync_dir, write_again};
use change::{Change, Tables};
use copy::Mark;
use copy::changes::Changes;

const GROUPS: TableDefinition<&str, &[u8]> = TableDefinition::new("groups");
/// (group number, object) -> Node
const OBJECTS: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("objects");
/// (group number, directory, name) -> object
const ENTRIES: TableDefinition<(u32, u64, &[u8]), u64> = TableDefinition::new("entries");
/// group number -> PlanRow
const PLANS: TableDefinition<u32, &[u8]> = TableDefinition::new("plans");
/// (group number, checkpoint) -> GenerationRow
const GENERATIONS: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("generations");
/// (group number, object) -> the last checkpoint that had it: its file is kept
const KEPT: TableDefinition<(u32, u64), u64> = TableDefinition::new("kept");

/// (group number, object, row) -> SumRow: checksums of what the object's file has, also of a kept one
const SUMS: TableDefinition<(u32, u64, u64), &[u8]> = TableDefinition::new("sums");

/// (group number, object) -> Damage: bytes that the object's file does not have as it should
const DAMAGE: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("damage");

/// 0 -> Mark: the last change that is in here (since store format 7)
const CHANGED: TableDefinition<u8, &[u8]> = TableDefinition::new("changed");

/// How many tables there are.
const TABLES: usize = 9;

/// Memory for the index's pages.
const CACHE_BYTES: usize = 64 << 20;

/// A group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRow {
    /// Short number of the group in this store.
    pub number: u32,
    /// Its identity.
    pub id: GroupId,
    /// The newest epoch that was granted.
    pub granted: Epoch,
    /// FROM=TO of `--map`.
    pub maps: Vec<(PathBytes, PathBytes)>,
    /// Position of the applied marker.
    pub applied: PositionRow,
    /// The applied checkpoint.
    pub checkpoint: CheckpointId,
    /// Its label.
    pub label: CheckpointLabel,
    /// Highest object number at the applied checkpoint.
    pub highest_object: ObjectId,
    /// Roots at the applied checkpoint.
    pub roots: Vec<(PathBytes, ObjectId)>,
    /// Boot of the last epoch at the applied checkpoint.
    pub boot_id: [u8; 16],
    /// Promotions, the newest last.
    #[serde(default)]
    pub histories: Vec<HistoryRow>,
    /// Policies at the applied checkpoint.
    #[serde(default)]
    pub policies: Vec<PolicyLine>,
}

/// A promotion, and the epoch that it fenced everybody with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRow {
    /// It.
    pub history: History,
    /// Whoever holds an older one is fenced.
    pub epoch: Epoch,
}

/// Where an object is named.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Place {
    /// An entry of a directory.
    Entry(ObjectId, Name),
    /// It is a root; the primary's path.
    Root(PathBytes),
}

/// An object at the applied checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The primary's inode.
    pub identity: Identity,
    /// Type.
    pub kind: FileKind,
    /// Device number, user-space form.
    pub device: u64,
    /// Attributes.
    pub meta: Meta,
    /// Size of a regular file.
    pub size: u64,
    /// Extended attributes.
    pub xattrs: Vec<(String, Bytes)>,
    /// Target of a symlink.
    pub target: Bytes,
    /// Where it is named; with none, its file stands in `aside/`.
    pub places: Vec<Place>,
    /// Inode number of its backup file.
    pub ino: u64,
}

/// How far the redo of a step has come for certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// The plan is durable; objects are on their way to `aside/`.
    Planned,
    /// Everything that is displaced stands in `aside/`, durably.
    Detached,
}

/// A step that was begun: from the applied checkpoint to this marker. What it does follows from
/// the log and the index, neither of which changes before the step is complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanRow {
    /// From which checkpoint.
    pub from: CheckpointId,
    /// The marker at the end.
    pub to: Marker,
    /// How far it is.
    pub phase: Phase,
    /// The before-images of the step are sealed.
    #[serde(default)]
    pub imaged: bool,
}

/// A checkpoint that is kept. The newest stands in the tree, the others behind it: each is the one
/// after it with the images of that step put over it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationRow {
    /// Its label.
    pub label: CheckpointLabel,
    /// The roots at it.
    pub roots: Vec<(PathBytes, ObjectId)>,
    /// Objects that changed since the applied checkpoint before.
    pub changed: u64,
    /// Bytes of files that were written since.
    pub bytes: u64,
}

/// What a finished step changes in the index.
#[derive(Debug, Default)]
pub struct StepResult {
    /// New or changed objects; `None` for gone ones.
    pub objects: Vec<(ObjectId, Option<Node>)>,
    /// New or changed entries; `None` for gone ones.
    pub entries: Vec<(ObjectId, Name, Option<ObjectId>)>,
    /// Objects that are gone but whose files older generations need.
    pub kept: Vec<ObjectId>,
    /// Checksums of files that were written.
    pub sums: Vec<(ObjectId, SumChange)>,
    /// What is still damaged of files that were.
    pub damage: Vec<(ObjectId, Damage)>,
    /// Objects that changed, and bytes that were written.
    pub extent: (u64, u64),
}

/// The index of a store.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    /// The folder of the copy.
    folder: PathBuf,
    db: RwLock<Open>,
    /// The end of the copy. Locked behind `db`.
    changes: Mutex<Changes>,
    copying: Mutex<copying::State>,
}

/// The database, and how often it was opened. `None` after a failure.
#[derive(Debug)]
struct Open {
    db: Option<Database>,
    times: u64,
}

fn pack<T: Serialize>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(value).expect("rows of the index can be encoded")
}

fn unpack<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T, BackupError> {
    rmp_serde::from_slice(bytes).map_err(|e| BackupError::corrupt("index.redb", format!("{what}: {e}")))
}

impl Index {
    /// Opens the index of a store, or makes that of one which has no groups yet: without it nobody knows which object a
    /// backup file is, and a start would remove what an empty one does not name.
    ///
    /// # Errors
    /// If it is missing, damaged or cannot be written.
    pub fn open(store: &Path) -> Result<Self, BackupError> {
        let path = store.join("index.redb");
        if !path.try_exists().map_err(BackupError::io("find", &path))? {
            if let Some(group) = any_group(store)? {
                return Err(BackupError::NoIndex { path, group });
            }
            if copy::is_begun(&copy::folder(store))? {
                return Err(BackupError::IndexUnusable { path, why: "it is missing".into() });
            }
            // As a whole or not at all: one that was only begun is no database.
            let new = path.with_extension("new");
            match std::fs::remove_file(&new) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(BackupError::io("remove", &new)(error));
                }
                _ => {}
            }
            drop(open(&new)?);
            std::fs::rename(&new, &path).map_err(BackupError::io("make", &path))?;
            sync_dir(store)?;
        }
        let unusable = |why: String| BackupError::IndexUnusable { path: path.clone(), why };
        let db = open(&path).map_err(|error| match error {
            BackupError::Corrupt { why, .. } => unusable(why),
            BackupError::Index(error) if is_no_database(&error) => unusable(error.to_string()),
            other => other,
        })?;
        let folder = copy::folder(store);
        let changes = copying::attach(&db, &folder, &path)?;
        let copying = Mutex::new(copying::State::of(&folder)?);
        let (db, changes) = (RwLock::new(Open { db: Some(db), times: 1 }), Mutex::new(changes));
        let index = Self { path, folder, db, changes, copying };
        if index.groups()?.is_empty()
            && !index.has_copy()
            && let Err(error) = index.copy(&|| true)
        {
            tracing::warn!("{error}: the index is copied later");
        }
        Ok(index)
    }

    /// Changes something, in one transaction, which the copy has first. When that was said to have failed it may stand
    /// there all the same.
    fn change<T>(
        &self,
        work: impl FnOnce(&mut Change<'_, '_>) -> Result<T, BackupError>,
    ) -> Result<T, BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            let mut copy = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            // Left by a panic.
            copy.abandon();
            if mark(&write.open_table(CHANGED)?)? != copy.mark() {
                // The transaction of the last change failed: it is done again when the database is opened.
                return Err(redb::StorageError::PreviousIo.into());
            }
            let done = work(&mut Change { tables: Tables::of(&write)?, copy: &mut copy });
            let done = match done {
                Ok(done) => done,
                Err(error) => {
                    copy.abandon();
                    return Err(error);
                }
            };
            if let Some(mark) = copy.end()? {
                write.open_table(CHANGED)?.insert(0, &mark.encode()[..])?;
                write.commit()?;
            }
            Ok(done)
        })
    }

    /// Works with the database, opened again if it had failed. If it fails it is closed.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, BackupError>) -> Result<T, BackupError> {
        let mut guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
        if guard.db.is_none() {
            drop(guard);
            let mut closed = self.db.write().unwrap_or_else(PoisonError::into_inner);
            if closed.db.is_none() {
                // What it has may be in memory only, left by a sync that failed: it counts once it was
                // written and synced again.
                rewritten(&self.path)?;
                // While somebody still holds a view of the one that failed, this says that it is open.
                let db = open(&self.path)?;
                let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
                copying::catch_up(&db, &changes, &self.folder)?;
                drop(changes);
                closed.db = Some(db);
                closed.times += 1;
            }
            drop(closed);
            guard = self.db.read().unwrap_or_else(PoisonError::into_inner);
        }
        let Some(db) = &guard.db else {
            // It failed again, for somebody else, between the two locks.
            return Err(BackupError::Index(Box::new(redb::Error::PreviousIo)));
        };
        let (times, result) = (guard.times, work(db));
        drop(guard);
        if let Err(BackupError::Index(error)) = &result
            && matches!(**error, redb::Error::Io(_) | redb::Error::PreviousIo | redb::Error::DatabaseClosed)
        {
            let mut open = self.db.write().unwrap_or_else(PoisonError::into_inner);
            if open.times == times {
                open.db = None;
            }
        }
        result
    }

    /// Whether its own checksums fit, all of them.
    ///
    /// # Errors
    /// If it cannot be read, or is beyond that.
    pub fn is_sound(&mut self) -> Result<bool, BackupError> {
        let open = self.db.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(db) = &mut open.db else { return Err(redb::StorageError::PreviousIo.into()) };
        match db.check_integrity() {
            Ok(sound) => Ok(sound),
            Err(redb::DatabaseError::Storage(redb::StorageError::Corrupted(why))) => {
                Err(BackupError::corrupt("index.redb", why))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// All groups by name.
    ///
    /// # Errors
    /// If the index fails.
    pub fn groups(&self) -> Result<Vec<(String, GroupRow)>, BackupError> {
        self.with(groups)
    }

    /// A group's row as it is now.
    ///
    /// # Errors
    /// If the index fails.
    pub fn group(&self, name: &str) -> Result<GroupRow, BackupError> {
        self.with(|db| group_row(&db.begin_read()?.open_table(GROUPS)?, name))
    }

    /// The step of a group that was begun and is not complete.
    ///
    /// # Errors
    /// If the index fails.
    pub fn plan(&self, group: u32) -> Result<Option<PlanRow>, BackupError> {
        self.with(|db| {
            let read = db.begin_read()?;
            let table = read.open_table(PLANS)?;
            table.get(group)?.map(|row| unpack("plan", row.value())).transpose()
        })
    }

    /// A view of one group's objects that does not change while it is held.
    ///
    /// # Errors
    /// If the index fails.
    pub fn view(&self, group: u32) -> Result<View, BackupError> {
        self.with(|db| {
            let read = db.begin_read()?;
            let newest = read.open_table(GENERATIONS)?.range((group, 0)..=(group, u64::MAX))?.next_back();
            Ok(View {
                newest: newest.transpose()?.map(|(key, _)| CheckpointId(key.value().1)),
                objects: read.open_table(OBJECTS)?,
                entries: read.open_table(ENTRIES)?,
                kept: read.open_table(KEPT)?,
                sums: read.open_table(SUMS)?,
                damage: read.open_table(DAMAGE)?,
                group,
            })
        })
    }
}

/// Writes the file once more as it is, durably.
fn rewritten(path: &Path) -> Result<(), BackupError> {
    let again = || -> std::io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        write_again(&file, 0, file.metadata()?.len())?;
        file.sync_all()
    };
    again().map_err(BackupError::io("write", path))
}

/// A group that has a log or backup files.
fn any_group(store: &Path) -> Result<Option<String>, BackupError> {
    for folder in ["log", "tree"].map(|name| store.join(name)) {
        let failed = BackupError::io("read", &folder);
        match std::fs::read_dir(&folder).and_then(|mut all| all.next().transpose()) {
            Ok(Some(group)) => return Ok(Some(group.file_name().to_string_lossy().into_owned())),
            Ok(None) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(None)
}

/// Opens or makes the file; a table that is missing is made.
fn open(path: &Path) -> Result<Database, BackupError> {
    // Of an empty file a database would be made, as of none.
    let is_begun = path.extension().is_some_and(|e| e == "new");
    if !is_begun && std::fs::metadata(path).map_err(BackupError::io("stat", path))?.len() == 0 {
        return Err(BackupError::corrupt(path, "is empty"));
    }
    let db = redb::Builder::new().set_cache_size(CACHE_BYTES).create(path).map_err(|e| match e {
        redb::DatabaseError::Storage(redb::StorageError::Corrupted(why)) => BackupError::corrupt(path, why),
        other => other.into(),
    })?;
    let write = db.begin_write()?;
    if write.list_tables()?.count() == TABLES {
        // Nothing is written: a full disk does not keep a replayer from its start.
        write.abort()?;
        return Ok(db);
    }
    write.open_table(GROUPS)?;
    write.open_table(OBJECTS)?;
    write.open_table(ENTRIES)?;
    write.open_table(PLANS)?;
    write.open_table(GENERATIONS)?;
    write.open_table(KEPT)?;
    write.open_table(SUMS)?;
    write.open_table(DAMAGE)?;
    write.open_table(CHANGED)?;
    write.commit()?;
    Ok(db)
}

/// Whether an error of opening says that the file is none of a database, and not that it could not be read.
fn is_no_database(error: &redb::Error) -> bool {
    match error {
        redb::Error::Io(error) => error.raw_os_error().is_none(),
        redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) | redb::Error::RepairAborted => true,
        _ => false,
    }
}

/// All groups of a database by name.
fn groups(db: &Database) -> Result<Vec<(String, GroupRow)>, BackupError> {
    let read = db.begin_read()?;
    let table = read.open_table(GROUPS)?;
    let mut found = Vec::new();
    for line in table.iter()? {
        let (name, row) = line?;
        found.push((name.value().to_owned(), unpack("group", row.value())?));
    }
    Ok(found)
}

/// The last change that a database has.
fn mark(table: &impl ReadableTable<u8, &'static [u8]>) -> Result<Mark, BackupError> {
    let row = table.get(0)?;
    row.map_or(Ok(Mark::default()), |row| {
        Mark::decode(row.value()).ok_or_else(|| BackupError::corrupt("index.redb", "its last change is none"))
    })
}

/// The keys of some rows of checksums of an object: first and end.
fn rows(group: u32, object: ObjectId, first: u64, end: u64) -> std::ops::Range<(u32, u64, u64)> {
    (group, object.0, first)..(group, object.0, end)
}

fn sum_row(bytes: &[u8]) -> Result<SumRow, BackupError> {
    SumRow::decode(bytes).ok_or_else(|| BackupError::corrupt("index.redb", "a row of checksums is none"))
}

fn group_row(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<GroupRow, BackupError> {
    let row = table.get(name)?;
    let row = row.ok_or_else(|| BackupError::corrupt("index.redb", format!("no group {name:?}")))?;
    unpack("group", row.value())
}

impl GroupRow {
    /// A group that has nothing yet.
    #[must_use]
    pub fn new(number: u32, id: GroupId, maps: Vec<(PathBytes, PathBytes)>) -> Self {
        Self {
            number,
            id,
            granted: Epoch(0),
            maps,
            applied: Position::START.into(),
            checkpoint: CheckpointId(0),
            label: CheckpointLabel::default(),
            highest_object: ObjectId(0),
            roots: Vec::new(),
            boot_id: [0; 16],
            histories: Vec::new(),
            policies: Vec::new(),
        }
    }
}
