//! The store's index: what the groups are, and the state of each at its applied checkpoint.
//!
//! One transaction moves the applied position together with every object and entry that the step
//! changed, so the index is at a checkpoint at every moment. The same transaction makes the step's
//! end a generation, and says that the images of the step give the one before.
//!
//! After a failed read, write or sync the database takes nothing until it is opened again, and what it then
//! holds is the state before or after the transaction that failed. So it is closed at once, the next who needs
//! it opens it, and whoever was told of a failure must read again where it stands.

mod generations;
mod history;
mod view;

pub use view::{Base, SumsOf, View};

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

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
use super::sums::{Edit, SumChange, SumRow};
use crate::log::{sync_dir, write_again};

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

/// How many tables there are.
const TABLES: usize = 8;

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
    db: RwLock<Open>,
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
        let db = open(&path)?;
        Ok(Self { path, db: RwLock::new(Open { db: Some(db), times: 1 }) })
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
                closed.db = Some(open(&self.path)?);
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
        self.with(|db| {
            let read = db.begin_read()?;
            let table = read.open_table(GROUPS)?;
            let mut found = Vec::new();
            for line in table.iter()? {
                let (name, row) = line?;
                found.push((name.value().to_owned(), unpack("group", row.value())?));
            }
            Ok(found)
        })
    }

    /// A group's row as it is now.
    ///
    /// # Errors
    /// If the index fails.
    pub fn group(&self, name: &str) -> Result<GroupRow, BackupError> {
        self.with(|db| group_row(&db.begin_read()?.open_table(GROUPS)?, name))
    }

    /// Puts a group in, durably.
    ///
    /// # Errors
    /// If the index fails.
    pub fn put_group(&self, name: &str, row: &GroupRow) -> Result<(), BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            write.open_table(GROUPS)?.insert(name, &pack(row)[..])?;
            Ok(write.commit()?)
        })
    }

    /// Grants the next epoch, durably.
    ///
    /// # Errors
    /// If the index fails; then none is granted.
    pub fn grant(&self, name: &str) -> Result<Epoch, BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            let epoch = {
                let mut table = write.open_table(GROUPS)?;
                let mut row = group_row(&table, name)?;
                row.granted = row.granted.next();
                table.insert(name, &pack(&row)[..])?;
                row.granted
            };
            write.commit()?;
            Ok(epoch)
        })
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

    /// Notes a plan or its next phase, durably.
    ///
    /// # Errors
    /// If the index fails.
    pub fn put_plan(&self, group: u32, plan: &PlanRow) -> Result<(), BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            write.open_table(PLANS)?.insert(group, &pack(plan)[..])?;
            Ok(write.commit()?)
        })
    }

    /// Ends a step: objects, entries, applied position, generations and the end of the plan in
    /// one transaction. `update` changes the group's row. `imaged`: the images of the step are
    /// sealed; without them nothing before it can be read any more.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn finish(
        &self,
        name: &str,
        result: &StepResult,
        imaged: bool,
        update: impl FnOnce(&mut GroupRow),
    ) -> Result<GroupRow, BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            let row = {
                let mut groups = write.open_table(GROUPS)?;
                let mut row = group_row(&groups, name)?;
                let mut generations = write.open_table(GENERATIONS)?;
                let mut kept = write.open_table(KEPT)?;
                if imaged {
                    let before = (row.number, row.checkpoint.0);
                    if generations.get(before)?.is_none() {
                        // Applied by a release that kept none.
                        let (label, roots) = (row.label.clone(), row.roots.clone());
                        generations.insert(
                            before,
                            &pack(&GenerationRow { label, roots, changed: 0, bytes: 0 })[..],
                        )?;
                    }
                    for object in &result.kept {
                        kept.insert((row.number, object.0), row.checkpoint.0)?;
                    }
                } else {
                    // Before the first checkpoint nothing is kept, so there are no checksums of it either.
                    let all = (row.number, 0)..=(row.number, u64::MAX);
                    generations.retain_in(all.clone(), |_, _| false)?;
                    kept.retain_in(all, |_, _| false)?;
                }
                update(&mut row);
                let (changed, bytes) = result.extent;
                let newest =
                    GenerationRow { label: row.label.clone(), roots: row.roots.clone(), changed, bytes };
                generations.insert((row.number, row.checkpoint.0), &pack(&newest)[..])?;
                groups.insert(name, &pack(&row)[..])?;
                let mut objects = write.open_table(OBJECTS)?;
                for (object, node) in &result.objects {
                    match node {
                        Some(node) => objects.insert((row.number, object.0), &pack(node)[..])?,
                        None => objects.remove((row.number, object.0))?,
                    };
                }
                let mut sums = write.open_table(SUMS)?;
                let mut damage = write.open_table(DAMAGE)?;
                for (object, _) in result.objects.iter().filter(|(_, node)| node.is_none()) {
                    if !imaged || !result.kept.contains(object) {
                        sums.retain_in(rows(row.number, *object, 0, u64::MAX), |_, _| false)?;
                        damage.remove((row.number, object.0))?;
                    }
                }
                for (object, left) in &result.damage {
                    put_damage(&mut damage, row.number, *object, left)?;
                }
                for (object, change) in &result.sums {
                    change_sums(&mut sums, row.number, *object, change)?;
                }
                let mut entries = write.open_table(ENTRIES)?;
                for (directory, name, object) in &result.entries {
                    let key = (row.number, directory.0, name.as_bytes());
                    match object {
                        Some(object) => entries.insert(key, object.0)?,
                        None => entries.remove(key)?,
                    };
                }
                write.open_table(PLANS)?.remove(row.number)?;
                row
            };
            write.commit()?;
            Ok(row)
        })
    }

    /// Notes checksums of files, durably: of files that had none.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn put_sums(&self, group: u32, sums: &[(ObjectId, SumChange)]) -> Result<(), BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            {
                let mut table = write.open_table(SUMS)?;
                for (object, change) in sums {
                    change_sums(&mut table, group, *object, change)?;
                }
            }
            Ok(write.commit()?)
        })
    }

    /// Notes what is damaged of files, beside what was noted before, durably.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn add_damage(&self, group: u32, found: &[(ObjectId, Damage)]) -> Result<(), BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            {
                let mut table = write.open_table(DAMAGE)?;
                for (object, more) in found {
                    let had = table.get((group, object.0))?;
                    let mut all: Damage =
                        had.map_or(Ok(Damage::default()), |row| unpack("damage", row.value()))?;
                    more.iter().for_each(|(start, end)| all.add(start, end));
                    put_damage(&mut table, group, *object, &all)?;
                }
            }
            Ok(write.commit()?)
        })
    }

    /// Notes the files that objects have now, durably.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn put_inos(&self, group: u32, inos: &[(ObjectId, u64)]) -> Result<(), BackupError> {
        self.with(|db| {
            let write = db.begin_write()?;
            {
                let mut objects = write.open_table(OBJECTS)?;
                for (object, ino) in inos {
                    let row = objects.get((group, object.0))?;
                    let node = row.map(|row| unpack::<Node>("object", row.value())).transpose()?;
                    let Some(node) = node else { continue };
                    objects.insert((group, object.0), &pack(&Node { ino: *ino, ..node })[..])?;
                }
            }
            Ok(write.commit()?)
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
    write.commit()?;
    Ok(db)
}

/// The keys of some rows of checksums of an object: first and end.
fn rows(group: u32, object: ObjectId, first: u64, end: u64) -> std::ops::Range<(u32, u64, u64)> {
    (group, object.0, first)..(group, object.0, end)
}

/// Changes the checksums of an object.
fn change_sums(
    table: &mut redb::Table<'_, (u32, u64, u64), &'static [u8]>,
    group: u32,
    object: ObjectId,
    change: &SumChange,
) -> Result<(), BackupError> {
    let edit = Edit::of(change);
    for (first, end) in edit.gone {
        table.retain_in(rows(group, object, first, end), |_, _| false)?;
    }
    for number in edit.rows {
        let key = (group, object.0, number);
        let before = table.get(key)?.map(|row| sum_row(row.value())).transpose()?;
        match change.row(number, before.as_ref()) {
            Some(row) => table.insert(key, &row.encode()[..])?,
            None => table.remove(key)?,
        };
    }
    Ok(())
}

fn put_damage(
    table: &mut redb::Table<'_, (u32, u64), &'static [u8]>,
    group: u32,
    object: ObjectId,
    damage: &Damage,
) -> Result<(), BackupError> {
    if damage.is_empty() {
        table.remove((group, object.0))?;
    } else {
        table.insert((group, object.0), &pack(damage)[..])?;
    }
    Ok(())
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
