//! Taking a stream in. Nothing of the store changes before all of it is there, sound, and fits what the store has.
//!
//! ```text
//! STORE/receive/GROUP/log/NNNN.log     segments, as the group's log would have them next
//! STORE/receive/GROUP/whole            all of it is there: it belongs to the log
//! ```
//! The records become those of a new epoch, numbered on from the last one of the group, and pass a gate of their own. What
//! stands before it that no marker covers is void from then on.
//! Then it is planned as the applier will do it, and there must be room. Only then stands `whole`, durably: from
//! then on the segments go into the log, the oldest first, whatever happens in between, and the checkpoint at their
//! end is confirmed. Before that a start of the replayer throws away what is there.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bfs_common::codec;
use bfs_common::record::{CheckpointId, Epoch, FileKind, GroupId, ObjectId, Record};
use bfs_common::wire::{Position, Refusal};
use bytes::BytesMut;

use super::super::error::BackupError;
use super::super::gate::{Gate, RECEIVED};
use super::super::index::{Base, GroupRow, Place, View};
use super::super::kinds::Kinds;
use super::super::places;
use super::super::plan::{Plan, plan};
use super::super::room::{Disk, Disks, Need};
use super::super::serve::Shared;
use super::super::target::Target;
use crate::durable;
use crate::log::segment::{Item as SegmentItem, SegmentReader};
use crate::log::writer::{Batch, LogWriter, SEGMENT_BYTES};
use crate::log::{LogError, LogRef, segment_path, segments, sync_dir};
use crate::transfer::{Head, Item, Moment, Reader, leads_on};

/// Bytes that are synced together.
const BATCH: usize = 16 << 20;
/// Levels of directories, as the applier follows them.
const DEPTH_MAX: usize = 4096;
/// Number of no group: nothing is in the index for it.
const NO_GROUP: u32 = u32::MAX - 1;

/// The folder of what is being taken in for a group.
#[derive(Clone, Debug)]
pub struct Incoming(PathBuf);

impl Incoming {
    /// Of a group, below the folder of all.
    #[must_use]
    pub fn of(all: &Path, group: &str) -> Self {
        Self(all.join(group))
    }

    fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    fn whole(&self) -> PathBuf {
        self.0.join("whole")
    }

    fn is_whole(&self) -> Result<bool, BackupError> {
        self.whole().try_exists().map_err(BackupError::io("find", self.whole()))
    }

    fn make(&self) -> Result<(), BackupError> {
        if self.is_whole()? {
            return Err(BackupError::Stream("one that was taken in before is not in the log yet".into()));
        }
        self.discard()?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.log())
            .map_err(BackupError::io("make", self.log()))
    }

    fn discard(&self) -> Result<(), BackupError> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(BackupError::io("remove", &self.0)(error))
            }
            _ => Ok(()),
        }
    }

    /// All of it is there and belongs to the log: durable from here on.
    ///
    /// # Errors
    /// If it cannot be written: then it does not belong there, unless it says so all the same.
    pub fn mark(&self) -> Result<(), BackupError> {
        let path = self.whole();
        let make = || -> Result<(), BackupError> {
            sync_dir(&self.log())?;
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            file.and_then(|file| durable::file(&file)).map_err(BackupError::io("make", &path))?;
            sync_dir(&self.0)?;
            Ok(sync_dir(self.0.parent().unwrap_or(&self.0))?)
        };
        make().inspect_err(|_| {
            // Should it come back after a power cut, what was written to the log meanwhile counts.
            let _ = fs::remove_file(&path);
        })
    }

    /// Moves what is whole into a log that ends where it begins; it can be done again. What is not whole goes, and what
    /// the log went on without.
    ///
    /// # Errors
    /// If something cannot be moved.
    pub fn finish(&self, log: &Path, group: GroupId) -> Result<(), BackupError> {
        let from = self.log();
        if !self.is_whole()? || !from.is_dir() {
            return self.discard();
        }
        let all = segments(&from)?;
        if let Some(first) = all.first()
            && !ends_before(log, group, *first)?
        {
            tracing::warn!("{}: the log went on without this: it is thrown away", self.0.display());
            return self.discard();
        }
        for number in all {
            let (old, new) = (segment_path(&from, number), segment_path(log, number));
            fs::rename(&old, &new).map_err(BackupError::io("move", &old))?;
        }
        sync_dir(log)?;
        sync_dir(&from)?;
        self.discard()
    }
}

/// Whether a log ends right before a record.
fn ends_before(log: &Path, group: GroupId, first: u64) -> Result<bool, BackupError> {
    let Some(last) = segments(log)?.pop() else { return Ok(true) };
    if last >= first {
        // One that was begun has no record.
        return Ok(last == first && SegmentReader::open(log, last, group)?.next_or_tail()?.is_err());
    }
    let mut reader = SegmentReader::open(log, last, group)?;
    let mut end = last - 1;
    while let Ok(item) = reader.next_or_tail()? {
        if let SegmentItem::Record(found) = item {
            end = found.encoded.sequence.0;
        }
    }
    Ok(end + 1 == first)
}

/// What a start of the replayer does, before it opens the logs; `log_of` gives those of groups that there are.
///
/// # Errors
/// If something cannot be moved or removed.
pub fn finish_all(
    all: &Path,
    log_of: impl Fn(&str) -> Result<Option<(PathBuf, GroupId)>, BackupError>,
) -> Result<(), BackupError> {
    for entry in fs::read_dir(all).map_err(BackupError::io("read", all))? {
        let name = entry.map_err(BackupError::io("read", all))?.file_name();
        let Some(group) = name.to_str().filter(|name| places::group_name_is_valid(name)) else { continue };
        let incoming = Incoming::of(all, group);
        match log_of(group)? {
            Some((log, id)) => incoming.finish(&log, id)?,
            None => incoming.discard()?,
        }
    }
    Ok(())
}

/// Groups that something is taken in for.
pub type Busy = Arc<Mutex<BTreeSet<String>>>;

/// The right to take something in for a group. Dropped, what is not whole goes.
#[derive(Debug)]
struct Right {
    busy: Busy,
    group: String,
    incoming: Incoming,
}

impl Drop for Right {
    fn drop(&mut self) {
        let whole = self.incoming.whole().try_exists();
        if matches!(whole, Ok(false)) {
            // What stays is removed at the next start, or by the next who takes something in.
            let _ = self.incoming.discard();
        }
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.group);
    }
}

/// A stream that is there, sound and fits: the log may have it.
#[derive(Debug)]
pub struct Whole {
    /// Name of the group here.
    pub group: String,
    /// What it is.
    pub head: Head,
    /// Its epoch: the next that is granted.
    pub epoch: Epoch,
    /// The position that it follows.
    pub base: Position,
    /// Its end.
    pub end: Position,
    /// Where it stands.
    pub incoming: Incoming,
    _right: Right,
}

/// Takes a stream in, as its bytes come.
#[derive(Debug)]
pub struct Receiver {
    shared: Arc<Shared>,
    /// Another name than the stream has.
    name: Option<String>,
    reader: Reader,
    taking: Option<Taking>,
}

#[derive(Debug)]
struct Taking {
    head: Head,
    row: GroupRow,
    base: Position,
    epoch: Epoch,
    gate: Gate,
    log: LogWriter,
    target: Target,
    batch: BytesMut,
    /// The position before the batch.
    before: Position,
    ended: bool,
    disks: Disks,
    right: Right,
}

fn bad(why: impl Into<String>) -> Refusal {
    Refusal::Bad(why.into())
}

fn failed(error: impl Into<BackupError>) -> Refusal {
    Refusal::Store(error.into().to_string())
}

impl Receiver {
    /// For the group that the stream names, or another one.
    pub async fn begin(shared: Arc<Shared>, name: Option<String>) -> Self {
        shared.open_logs_again().await;
        Self { shared, name, reader: Reader::default(), taking: None }
    }

    /// Takes more bytes of it.
    ///
    /// # Errors
    /// The refusal; the store is as it was.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.reader.feed(bytes);
        loop {
            let item = self.reader.next_item().map_err(|why| bad(format!("the stream: {why}")))?;
            match (item, &mut self.taking) {
                (None, _) => return Ok(()),
                (Some(Item::Head(head)), None) => {
                    self.taking = Some(Taking::begin(&self.shared, self.name.as_deref(), *head)?);
                }
                (Some(Item::Record(record, payload)), Some(taking)) => {
                    taking.take(&self.shared, &record, &payload)?;
                }
                (Some(Item::End), Some(_)) => {}
                _ => return Err(bad("the stream has no head")),
            }
        }
    }

    /// That was all of it.
    ///
    /// # Errors
    /// The refusal; the store is as it was.
    pub fn finish(self) -> Result<Whole, Refusal> {
        self.reader.finish().map_err(|why| bad(format!("the stream: {why}; nothing of it was taken")))?;
        let taking = self.taking.ok_or_else(|| bad("the stream has no head"))?;
        taking.finish(&self.shared)
    }
}

impl Taking {
    fn begin(shared: &Arc<Shared>, name: Option<&str>, head: Head) -> Result<Self, Refusal> {
        let name = name.unwrap_or(&head.group).to_owned();
        if !places::group_name_is_valid(&name) {
            return Err(bad(format!("{name:?} cannot name a group: give another one with --group")));
        }
        let busy = shared.receiving().clone();
        if !busy.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone()) {
            return Err(bad(format!(
                "another stream is being taken in for group {name:?}: wait for its end"
            )));
        }
        let incoming = Incoming::of(&shared.folder("receive"), &name);
        let right = Right { busy, group: name.clone(), incoming };
        let (row, gate) = match shared.group(&name) {
            None => begin_new(&name, &head)?,
            Some(group) => group.begin_receiving(&head)?,
        };
        let base = gate.position;
        let epoch = row.granted.next();
        right.incoming.make().map_err(failed)?;
        let opened = LogWriter::open(&right.incoming.log(), head.id, base, |_| Ok::<_, LogError>(()));
        let (mut log, _) = opened.map_err(failed)?;
        let disk = || -> Result<Disk, Refusal> {
            let folder = shared.folder("receive");
            let opened = File::open(&folder).map_err(BackupError::io("open", &folder)).map_err(failed)?;
            Disk::of(opened).map_err(BackupError::io("stat", &folder)).map_err(failed)
        };
        let disks = Disks { store: disk()?, tree: disk()?, images: disk()? };
        let all = disks.store.size().unwrap_or(u64::MAX);
        log.limit_segments((all / 64).clamp(1 << 20, SEGMENT_BYTES).min(shared.segments_max()));
        let mut taking = Self {
            head,
            row,
            base,
            epoch,
            gate,
            log,
            target: Target::default(),
            batch: BytesMut::new(),
            before: base,
            ended: false,
            disks,
            right,
        };
        taking.put(&Record::EpochBegin { epoch, boot_id: RECEIVED, complete: true }, b"")?;
        Ok(taking)
    }

    fn take(&mut self, shared: &Shared, record: &Record, payload: &[u8]) -> Result<(), Refusal> {
        if self.ended {
            return Err(bad("the stream: records stand behind its checkpoint"));
        }
        match record {
            record if leads_on(record) => {}
            Record::Checkpoint { checkpoint, label }
                if *checkpoint == self.head.to.checkpoint && *label == self.head.to.label =>
            {
                if self.gate.roots != self.head.to.roots {
                    return Err(bad("the stream: its roots are not those that its head says"));
                }
                self.ended = true;
            }
            _ => return Err(bad("the stream: a record that has no place in it")),
        }
        self.put(record, payload)?;
        let folded =
            self.target.fold(record.clone(), &payload.to_vec().into(), LogRef { segment: 0, offset: 0 });
        folded.map_err(|why| bad(format!("the stream: {why}")))?;
        if self.batch.len() >= BATCH { self.append(shared) } else { Ok(()) }
    }

    /// Lets a record through the gate.
    fn put(&mut self, record: &Record, payload: &[u8]) -> Result<(), Refusal> {
        let mut one = BytesMut::new();
        codec::encode(&mut one, self.gate.position.sequence.next(), record, payload);
        let encoded = codec::take(&mut one.freeze()).map_err(|why| bad(why.to_string()))?;
        let encoded = encoded.ok_or_else(|| bad("an empty record"))?;
        self.gate.take(self.epoch, &encoded, record, payload)?;
        self.batch.extend_from_slice(&encoded.bytes);
        Ok(())
    }

    fn append(&mut self, shared: &Shared) -> Result<(), Refusal> {
        let bytes = self.batch.split().freeze();
        shared.has_room(&self.disks, bytes.len() as u64)?;
        let after = self.gate.position;
        self.log.append(&[Batch { bytes, before: self.before, after }]).map_err(failed)?;
        self.before = after;
        Ok(())
    }

    fn finish(mut self, shared: &Shared) -> Result<Whole, Refusal> {
        if !self.ended {
            return Err(bad("the stream: it has no checkpoint"));
        }
        self.append(shared)?;
        self.log.seal().map_err(failed)?;
        let view = shared.view(self.row.number).map_err(failed)?;
        let planned = plan(&view, &self.row.roots, &self.target).and_then(|plan| {
            hangs_together(&view, &plan)?;
            Ok(plan)
        });
        let planned = planned.map_err(|why| bad(format!("the stream does not make sense: {why}")))?;
        let need = Need::of_plan(&planned, self.row.checkpoint > CheckpointId(0));
        shared.has_room(&self.disks, need.tree.saturating_add(need.store))?;
        let Self { head, base, epoch, gate, right, .. } = self;
        let (group, incoming) = (right.group.clone(), right.incoming.clone());
        Ok(Whole { group, head, epoch, base, end: gate.position, incoming, _right: right })
    }
}

/// A group that this store does not have.
fn begin_new(name: &str, head: &Head) -> Result<(GroupRow, Gate), Refusal> {
    if let Some(from) = &head.from {
        return Err(bad(format!(
            "the stream is the difference to checkpoint {}, and there is no group {name:?} here: send all of it first",
            from.checkpoint
        )));
    }
    let row = GroupRow::new(NO_GROUP, head.id, Vec::new());
    Ok((row, Gate::new(Position::START, CheckpointId(0), ObjectId(0), Vec::new(), [0; 16], Kinds::default())))
}

/// Whether a stream follows what a group has.
///
/// # Errors
/// Why not, in words.
pub fn follows(name: &str, newest: Option<&Moment>, head: &Head) -> Result<(), String> {
    match (&head.from, newest) {
        (None, None) => Ok(()),
        (None, Some(newest)) => Err(format!(
            "group {name:?} has checkpoint {} already: send the difference to it (--from {0}), or give another --group",
            newest.checkpoint
        )),
        (Some(from), None) => Err(format!(
            "the stream is the difference to checkpoint {}, and group {name:?} has none: send all of it first",
            from.checkpoint
        )),
        (Some(from), Some(newest)) if from == newest => Ok(()),
        (Some(from), Some(newest)) if from.checkpoint == newest.checkpoint => Err(format!(
            "the stream is the difference to another checkpoint {} than the one of group {name:?}: they have only the \
             number in common",
            from.checkpoint
        )),
        (Some(from), Some(newest)) => Err(format!(
            "the stream is the difference to checkpoint {}, and the newest of group {name:?} is {}: send the \
             difference to that",
            from.checkpoint, newest.checkpoint
        )),
    }
}

/// That no directory is below itself or too deep: the gate looks at one record at a time.
fn hangs_together(view: &View, plan: &Plan) -> Result<(), BackupError> {
    let place = |object: ObjectId| -> Result<Option<Place>, BackupError> {
        let node = match plan.objects.get(&object) {
            Some(touched) => touched.after.clone(),
            None => view.node(object)?,
        };
        Ok(node.and_then(|node| node.places.into_iter().next()))
    };
    let mut good = BTreeSet::new();
    for object in plan.attach.values() {
        let node = plan.objects.get(object).and_then(|touched| touched.after.as_ref());
        if node.is_none_or(|node| node.kind != FileKind::Directory) {
            continue;
        }
        let (mut at, mut way) = (*object, BTreeSet::new());
        while !good.contains(&at) {
            if !way.insert(at) || way.len() > DEPTH_MAX {
                return Err(BackupError::Stream(format!("directory {object} is below itself, or too deep")));
            }
            match place(at)? {
                Some(Place::Entry(parent, _)) => at = parent,
                _ => break,
            }
        }
        good.extend(way);
    }
    Ok(())
}
