//! One group at work: the gate, the thread that writes its log, the thread that applies.
//!
//! Records pass the gate under the lock of [`State`], go through a bounded queue to the log
//! thread, and count once its sync returns; only then do acknowledgement and applier learn of
//! them. The applier holds the lock of the tree for a whole step; whoever reads the tree or the
//! index together with the log (manifest, catalogue) takes that lock too.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

mod applying;

use bfs_common::codec;
use bfs_common::record::{CheckpointId, CheckpointLabel, Epoch, GroupId, PathBytes, Record, Sequence};
use bfs_common::wire::{GenerationLine, GroupStatus, Position, Refusal};
use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::apply::Area;
use super::error::BackupError;
use super::gate::{Gate, Marker, Verdict};
use super::generations::Past;
use super::index::{GenerationRow, GroupRow, Index};
use super::kinds::Kinds;
use super::retention::Retention;
use crate::log::LogRecord;
use crate::log::writer::{Batch, LogWriter};

/// Batches that wait for the log thread; each is a frame at most.
const QUEUE: usize = 8;
/// Bytes that are synced together at most.
const GROUP_COMMIT_BYTES: usize = 32 << 20;
/// Bytes of the log that may wait for an applier that is in trouble, unless another bound is given.
pub const UNAPPLIED_MAX: u64 = 16 << 30;
/// Nothing is taken with less room than this, or than a twentieth of a small file system: the
/// applier needs some to go on.
const FREE_MIN: u64 = 256 << 20;

/// What agents are told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The last durable record.
    pub durable: Position,
    /// The last durable marker.
    pub confirmed: CheckpointId,
    /// The applied checkpoint.
    pub applied: CheckpointId,
    /// The log takes nothing any more, and why.
    pub refuses: Option<String>,
}

/// The connection that writes a group.
#[derive(Debug)]
pub struct Slot {
    /// Number of the connection.
    pub connection: u64,
    /// Tells it that it lost the group.
    pub fenced: Arc<Notify>,
}

/// What changes with every record.
#[derive(Debug)]
pub struct State {
    /// At the last record that was taken.
    pub gate: Gate,
    /// The newest epoch that was granted.
    pub granted: Epoch,
    /// Steps that were taken and are not applied.
    steps: VecDeque<Taken>,
    /// Who writes.
    pub slot: Option<Slot>,
    applied: (CheckpointId, CheckpointLabel),
    applying: bool,
    log_trouble: Option<String>,
    apply_trouble: Option<String>,
    /// Files that nobody needs may be left: from before the start, or after a failure.
    untidy: bool,
    tidy_trouble: Option<String>,
    pending: (u64, u64),
    stop: bool,
}

/// A step in the log.
#[derive(Debug)]
struct Taken {
    marker: Marker,
    /// Bytes of its records.
    bytes: u64,
}

enum ToLog {
    Append(Batch),
    /// Answers when everything before it is durable, after opening the log again if it failed.
    Drain(oneshot::Sender<Result<(), String>>),
}

/// One group of a store.
#[derive(Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
    number: u32,
    id: GroupId,
    maps: Vec<(PathBytes, PathBytes)>,
    /// The state; never held while something is waited for.
    state: Mutex<State>,
    wake: Condvar,
    /// The row of the index, and with it the right to the tree.
    pub(super) tree: Mutex<GroupRow>,
    /// Told when the slot becomes free.
    pub slot_free: Notify,
    progress: watch::Sender<Progress>,
    to_log: Mutex<Option<mpsc::Sender<ToLog>>>,
    pub(super) index: Arc<Index>,
    pub(super) area: Area,
    pub(super) log: PathBuf,
    unapplied_max: u64,
    retention: Retention,
    /// Generations that are being read, and by how many.
    held: Mutex<BTreeMap<CheckpointId, u32>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A lock that survives a panic of another thread: what it guards is changed in small whole steps.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What opening a log gives: its end, the gate there, the steps that are not applied, and how
/// many records and bytes stand behind the last of them.
type OpenLog = (LogWriter, Gate, VecDeque<Taken>, (u64, u64));

fn open_log(log: &std::path::Path, row: &GroupRow, index: &Index) -> Result<OpenLog, BackupError> {
    let applied: Position = row.applied.into();
    let mut kinds = Kinds::default();
    index.view(row.number)?.each_kind(|object, kind| kinds.insert(object, kind))?;
    let (roots, highest) = (row.roots.clone(), row.highest_object);
    let mut gate = Gate::new(applied, row.checkpoint, highest, roots, row.boot_id, kinds);
    let mut steps = VecDeque::new();
    let mut pending = (0, 0);
    let (writer, opened) = LogWriter::open(log, row.id, applied, |found: LogRecord| {
        gate.replay(&found.encoded, &found.record).map_err(|refusal| BackupError::corrupt(log, refusal))?;
        pending = (pending.0 + 1, pending.1 + found.encoded.bytes.len() as u64);
        if let Record::Checkpoint { checkpoint, label } = found.record {
            let marker = Marker { checkpoint, label, position: gate.position.into() };
            steps.push_back(Taken { marker, bytes: pending.1 });
            pending = (0, 0);
        }
        Ok::<_, BackupError>(())
    })?;
    if let Some((path, bytes)) = opened.cut {
        tracing::warn!("{}: {bytes} bytes of a torn batch were cut; it was never committed", path.display());
    }
    Ok((writer, gate, steps, pending))
}

impl State {
    /// Why nothing can be taken, if the log grows without being applied.
    fn too_far_behind(&self, max: u64) -> Option<String> {
        let why = self.apply_trouble.as_ref()?;
        let bytes = self.steps.iter().map(|s| s.bytes).sum::<u64>() + self.pending.1;
        (bytes >= max).then(|| format!("{} MiB wait to be applied, and {why}", bytes >> 20))
    }
}

impl Group {
    /// Opens a group and starts its threads.
    ///
    /// # Errors
    /// If its log is damaged or its folders cannot be opened.
    pub fn open(
        name: &str,
        row: GroupRow,
        index: Arc<Index>,
        area: Area,
        log: PathBuf,
        unapplied_max: u64,
        retention: Retention,
    ) -> Result<Arc<Self>, BackupError> {
        let (writer, gate, steps, pending) = open_log(&log, &row, &index)?;
        let confirmed = steps.back().map_or(row.checkpoint, |s| s.marker.checkpoint);
        let progress = Progress { durable: gate.position, confirmed, applied: row.checkpoint, refuses: None };
        let state = State {
            gate,
            granted: row.granted,
            steps,
            slot: None,
            applied: (row.checkpoint, row.label.clone()),
            applying: false,
            log_trouble: None,
            apply_trouble: None,
            untidy: true,
            tidy_trouble: None,
            pending,
            stop: false,
        };
        let (to_log, from_group) = mpsc::channel(QUEUE);
        let group = Arc::new(Self {
            name: name.into(),
            number: row.number,
            id: row.id,
            maps: row.maps.clone(),
            state: Mutex::new(state),
            wake: Condvar::new(),
            tree: Mutex::new(row),
            slot_free: Notify::new(),
            progress: watch::Sender::new(progress),
            to_log: Mutex::new(Some(to_log)),
            index,
            area,
            log,
            unapplied_max,
            retention,
            held: Mutex::new(BTreeMap::new()),
            threads: Mutex::new(Vec::new()),
        });
        let spawn = |what: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(format!("{what} {name}"))
                // The search for a directory goes up its parents by recursion.
                .stack_size(32 << 20)
                .spawn(work)
                .map_err(BackupError::io("start a thread for group", name))
        };
        let (for_log, for_apply) = (group.clone(), group.clone());
        let log_thread = spawn("log", Box::new(move || for_log.run_log(writer, from_group)))?;
        let apply_thread = spawn("apply", Box::new(move || for_apply.run_apply()))?;
        locked(&group.threads).extend([log_thread, apply_thread]);
        Ok(group)
    }

    /// The state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Identity and maps, which never change.
    #[must_use]
    pub fn identity(&self) -> (GroupId, &[(PathBytes, PathBytes)]) {
        (self.id, &self.maps)
    }

    /// To follow what agents are told.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Takes the records of one frame: through the gate, then to the log.
    ///
    /// # Errors
    /// The refusal for the agent. Records before the refused one are taken.
    pub async fn take(
        &self,
        connection: u64,
        epoch: Epoch,
        first: Sequence,
        count: u32,
        mut body: Bytes,
    ) -> Result<(), Refusal> {
        // The place in the queue comes first, so that gate and queue move under one lock: who takes
        // the slot later finds everything that the gate let in queued before its own `Drain`.
        let full = self.no_room();
        let sender =
            locked(&self.to_log).clone().ok_or_else(|| Refusal::Store("it is being closed".into()))?;
        let place = sender.reserve().await.map_err(|_| Refusal::Store("its log thread ended".into()))?;
        let mut state = self.state();
        if state.slot.as_ref().is_none_or(|slot| slot.connection != connection) {
            return Err(Refusal::Fenced { newest: state.granted });
        }
        if let Some(why) = &state.log_trouble {
            return Err(Refusal::Store(why.clone()));
        }
        if let Some(why) = state.too_far_behind(self.unapplied_max).or(full) {
            return Err(Refusal::Store(why));
        }
        let before = state.gate.position;
        let mut bytes = Vec::new();
        let refused = take_all(&mut state, epoch, first, count, &mut body, &mut bytes).err();
        if !bytes.is_empty() {
            place.send(ToLog::Append(Batch { bytes: bytes.into(), before, after: state.gate.position }));
        }
        refused.map_or(Ok(()), Err)
    }

    /// How many bytes are free on the file system of the log, and how many have to stay so. What
    /// cannot be asked is found out by writing.
    fn free(&self) -> Option<(u64, u64)> {
        let now = rustix::fs::statvfs(&self.log).ok()?;
        let (free, all) = (now.f_bavail * now.f_frsize, now.f_blocks * now.f_frsize);
        Some((free, FREE_MIN.min(all / 20)))
    }

    /// Why nothing can be taken, if the file system of the log is full but for the reserve.
    fn no_room(&self) -> Option<String> {
        let (free, reserve) = self.free()?;
        (free < reserve)
            .then(|| format!("{} MiB are left on its file system: make room, then it goes on", free >> 20))
    }

    /// Waits until everything that was taken is durable; opens a log again that had failed.
    ///
    /// # Errors
    /// If the log takes nothing.
    pub async fn drain(&self) -> Result<(), Refusal> {
        let (answer, wait) = oneshot::channel();
        let closed = || Refusal::Store("it is being closed".into());
        let sender = locked(&self.to_log).clone().ok_or_else(closed)?;
        sender.send(ToLog::Drain(answer)).await.map_err(|_| closed())?;
        wait.await.map_err(|_| closed())?.map_err(Refusal::Store)
    }

    fn run_log(&self, mut log: LogWriter, mut from_group: mpsc::Receiver<ToLog>) {
        let mut failed = false;
        while let Some(first) = from_group.blocking_recv() {
            let mut batches = Vec::new();
            let mut drains = Vec::new();
            let mut bytes_total = 0;
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    ToLog::Append(batch) => {
                        bytes_total += batch.bytes.len();
                        batches.push(batch);
                    }
                    ToLog::Drain(answer) => drains.push(answer),
                }
                next = if bytes_total < GROUP_COMMIT_BYTES { from_group.try_recv().ok() } else { None };
            }
            // After a failure the batches do not count either: the gate goes back when it is over.
            if !failed {
                match log.append(&batches) {
                    Ok(()) if batches.is_empty() => {}
                    Ok(()) => self.durable(log.durable()),
                    Err(error) => {
                        self.log_failed(&error.into());
                        failed = true;
                    }
                }
            }
            if failed && !drains.is_empty() {
                match self.reopen(&mut log) {
                    Ok(()) => failed = false,
                    Err(error) => self.log_failed(&error),
                }
            }
            for answer in drains {
                let trouble = self.state().log_trouble.clone();
                // The connection may have ended meanwhile.
                let _ = answer.send(trouble.map_or(Ok(()), Err));
            }
        }
        if !failed && let Err(error) = log.seal() {
            tracing::warn!("group {}: {error}", self.name);
        }
    }

    fn durable(&self, position: Position) {
        // All under the lock: the applier looks at both and then waits, without a moment between.
        let state = self.state();
        let durable = state.steps.iter().rev().find(|s| s.marker.position.sequence <= position.sequence);
        let confirmed = durable.map_or(state.applied.0, |s| s.marker.checkpoint);
        self.progress.send_modify(|p| {
            p.durable = position;
            p.confirmed = p.confirmed.max(confirmed);
        });
        self.wake.notify_all();
    }

    fn log_failed(&self, error: &BackupError) {
        let why = format!("{error}; nothing is acknowledged until the agent connects again and this is gone");
        tracing::error!("group {}: {why}", self.name);
        self.state().log_trouble = Some(why.clone());
        self.progress.send_modify(|p| p.refuses = Some(why));
    }

    /// After a failure: back to the last record that was synced, and on in a new segment.
    fn reopen(&self, failed: &mut LogWriter) -> Result<(), BackupError> {
        let mut row = locked(&self.tree);
        *row = self.index.group(&self.name)?;
        failed.settle()?;
        let (mut log, gate, steps, pending) = open_log(&self.log, &row, &self.index)?;
        let (durable, known) = (gate.position, failed.durable());
        if durable != known {
            let why =
                format!("ends at record {}, but {} was the last synced", durable.sequence, known.sequence);
            return Err(BackupError::corrupt(&self.log, why));
        }
        log.begin_new();
        *failed = log;
        {
            let mut state = self.state();
            state.gate = gate;
            state.steps = steps;
            state.pending = pending;
            state.log_trouble = None;
        }
        drop(row);
        self.progress.send_modify(|p| p.refuses = None);
        self.durable(durable);
        Ok(())
    }

    /// Gives a generation to `read`. It stays until [`Self::release`].
    ///
    /// # Errors
    /// [`BackupError::NoGeneration`], [`BackupError::Applying`], or what `read` says.
    pub fn hold(
        &self,
        checkpoint: CheckpointId,
        read: impl FnOnce(&mut Past<'_>) -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        let row = locked(&self.tree);
        let mut past = Past::open(&self.area, &self.index, &row, &self.name, checkpoint)?;
        *locked(&self.held).entry(checkpoint).or_default() += 1;
        let done = read(&mut past);
        if done.is_err() {
            self.release(checkpoint);
        }
        done
    }

    /// Nobody reads it any more, of those who called [`Self::hold`] once.
    pub fn release(&self, checkpoint: CheckpointId) {
        let mut held = locked(&self.held);
        if let Some(count) = held.get_mut(&checkpoint) {
            *count -= 1;
            if *count == 0 {
                held.remove(&checkpoint);
            }
        }
    }

    /// The generations, the oldest first.
    ///
    /// # Errors
    /// If the index fails.
    pub fn generations(&self) -> Result<Vec<GenerationLine>, BackupError> {
        let all = self.index.generations(self.number)?;
        let line = |(checkpoint, row): (CheckpointId, GenerationRow)| GenerationLine {
            checkpoint,
            label: row.label,
            changed: row.changed,
            bytes: row.bytes,
        };
        Ok(all.into_iter().map(line).collect())
    }

    /// Grants the next epoch, durably. Blocks on the disk.
    ///
    /// # Errors
    /// If the index fails; then none is granted.
    pub fn grant(&self) -> Result<Epoch, BackupError> {
        let epoch = self.index.grant(&self.name)?;
        let mut state = self.state();
        state.granted = state.granted.max(epoch);
        Ok(epoch)
    }

    /// How it stands.
    #[must_use]
    pub fn status(&self) -> GroupStatus {
        let full = self.no_room();
        let state = self.state();
        let progress = self.progress.borrow().clone();
        GroupStatus {
            group: self.name.clone(),
            durable: progress.durable.sequence,
            epoch: progress.durable.epoch,
            confirmed: progress.confirmed,
            applied: state.applied.0,
            applied_label: state.applied.1.clone(),
            applying: state.applying,
            pending_bytes: state.pending.1,
            pending_records: state.pending.0,
            open_gaps: state.gate.gaps.len() as u64,
            attached: state.slot.is_some(),
            rolling_back: state.gate.rolling_back,
            trouble: state
                .log_trouble
                .clone()
                .or_else(|| state.apply_trouble.clone())
                .or(full)
                .or_else(|| state.tidy_trouble.clone()),
        }
    }

    /// Ends the threads: what was taken is synced, a step that runs is finished.
    pub fn stop(&self) {
        self.state().stop = true;
        self.wake.notify_all();
        locked(&self.to_log).take();
        for thread in std::mem::take(&mut *locked(&self.threads)) {
            if thread.join().is_err() {
                tracing::error!("group {}: a thread had ended by a panic", self.name);
            }
        }
    }
}

fn take_all(
    state: &mut State,
    epoch: Epoch,
    first: Sequence,
    count: u32,
    body: &mut Bytes,
    batch: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let bad = |why: String| Refusal::Bad(format!("records from {first}: {why}"));
    let mut seen = 0;
    while let Some(encoded) = codec::take(body).map_err(|e| bad(e.to_string()))? {
        let (record, payload) = encoded.decode().map_err(|e| bad(e.to_string()))?;
        if encoded.sequence.0 != first.0.wrapping_add(u64::from(seen)) {
            return Err(bad(format!("number {} stands in place {seen}", encoded.sequence)));
        }
        seen += 1;
        if state.gate.take(epoch, &encoded, &record, &payload)? == Verdict::Known {
            continue;
        }
        batch.extend_from_slice(&encoded.bytes);
        state.pending = (state.pending.0 + 1, state.pending.1 + encoded.bytes.len() as u64);
        if let Record::Checkpoint { checkpoint, label } = record {
            let marker = Marker { checkpoint, label, position: state.gate.position.into() };
            let bytes = state.pending.1;
            state.steps.push_back(Taken { marker, bytes });
            state.pending = (0, 0);
        }
    }
    if seen == count { Ok(()) } else { Err(bad(format!("{seen} in the frame, {count} announced"))) }
}
