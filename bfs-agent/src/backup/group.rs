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
use std::time::Duration;

use bfs_common::codec;
use bfs_common::record::{CheckpointId, CheckpointLabel, Epoch, GroupId, PathBytes, Record, Sequence};
use bfs_common::wire::{GenerationLine, GroupStatus, Position, Refusal};
use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::apply::{self, Area, CrashPoint, Step};
use super::error::BackupError;
use super::gate::{Gate, Marker, Verdict};
use super::generations::Past;
use super::index::{GenerationRow, GroupRow, Index, Phase, PlanRow};
use super::kinds::Kinds;
use super::plan::plan;
use super::retention::{Kept, Retention};
use super::target::Target;
use crate::log::writer::{Batch, LogWriter};
use crate::log::{LogRecord, read_range};

/// Batches that wait for the log thread; each is a frame at most.
const QUEUE: usize = 8;
/// Bytes that are synced together at most.
const GROUP_COMMIT_BYTES: usize = 32 << 20;
/// Bytes of the log that may wait for an applier that is in trouble, unless another bound is given.
pub const UNAPPLIED_MAX: u64 = 16 << 30;
/// Nothing is taken with less room than this, or than a twentieth of a small file system: the
/// applier needs some to go on.
const FREE_MIN: u64 = 256 << 20;
/// How long the applier waits before it tries a step again that failed.
const RETRY: Duration = Duration::from_secs(5);

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
        if let Some((oldest, _)) = index.generations(row.number)?.first() {
            area.sweep(&index.view(row.number)?, *oldest)?;
        }
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

    /// Its short number in the store.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
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
        let row = locked(&self.tree);
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

    fn run_apply(&self) {
        loop {
            {
                let mut state = self.state();
                loop {
                    if state.stop {
                        return;
                    }
                    let durable = self.progress.borrow().durable.sequence;
                    if state.steps.front().is_some_and(|s| s.marker.position.sequence <= durable) {
                        break;
                    }
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.applying = true;
            }
            let result = self.apply_next(&mut CrashPoint::default());
            let mut state = self.state();
            state.applying = false;
            match result {
                Ok(()) => state.apply_trouble = None,
                Err(error) => {
                    tracing::error!("group {}: a checkpoint cannot be applied: {error}", self.name);
                    state.apply_trouble = Some(format!("a checkpoint cannot be applied: {error}"));
                    // Records that become durable meanwhile change nothing about it.
                    let waited = self.wake.wait_timeout_while(state, RETRY, |state| !state.stop);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    /// Does the step to the next durable marker.
    fn apply_next(&self, crash: &mut CrashPoint) -> Result<(), BackupError> {
        let mut tree = locked(&self.tree);
        let Some(marker) = self.state().steps.front().map(|s| s.marker.clone()) else { return Ok(()) };
        let row = apply_step(&self.name, &tree, &self.index, &self.area, &self.log, marker, crash)?;
        *tree = row;
        let mut state = self.state();
        while state.steps.front().is_some_and(|s| s.marker.checkpoint <= tree.checkpoint) {
            state.steps.pop_front();
        }
        state.applied = (tree.checkpoint, tree.label.clone());
        drop(state);
        let retired = self.retire(&tree);
        self.progress.send_modify(|p| {
            p.applied = tree.checkpoint;
            p.confirmed = p.confirmed.max(tree.checkpoint);
        });
        retired?;
        Ok(LogWriter::remove_applied(&self.log, tree.applied.sequence)?)
    }

    /// Drops the generations that are not to be kept. The caller holds the lock of the tree.
    fn retire(&self, row: &GroupRow) -> Result<(), BackupError> {
        let held = locked(&self.held);
        let kept: Vec<Kept> = self
            .index
            .generations(row.number)?
            .into_iter()
            .map(|(checkpoint, row)| Kept {
                checkpoint,
                tagged: !row.label.tag.is_empty(),
                discarded: row.label.trigger == bfs_common::record::DISCARDED,
                held: held.contains_key(&checkpoint),
            })
            .collect();
        let short = self.free().is_some_and(|(free, reserve)| free < reserve * 2);
        let gone = self.retention.gone(&kept, short);
        if gone.is_empty() {
            return Ok(());
        }
        let (oldest, objects) = self.index.drop_generations(row.number, &gone)?;
        self.area.drop_kept(&objects)?;
        self.area.drop_images(oldest)
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
            trouble: state.log_trouble.clone().or_else(|| state.apply_trouble.clone()).or(full),
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

/// Does one step: from the applied checkpoint to this marker, or goes on with one that was begun.
pub(super) fn apply_step(
    name: &str,
    row: &GroupRow,
    index: &Index,
    area: &Area,
    log: &std::path::Path,
    marker: Marker,
    crash: &mut CrashPoint,
) -> Result<GroupRow, BackupError> {
    let begun = index.plan(row.number)?;
    let (to, phase) = begun.as_ref().map_or((marker, None), |plan| (plan.to.clone(), Some(plan.phase)));
    let mut target = Target::default();
    let (mut highest, mut boot_id) = (row.highest_object, row.boot_id);
    read_range(log, row.id, row.applied.sequence, to.position.sequence, |found| {
        match &found.record {
            Record::Object { object, .. } => highest = highest.max(*object),
            Record::EpochBegin { boot_id: id, .. } => boot_id = *id,
            _ => {}
        }
        target
            .fold(found.record, &found.payload, found.at)
            .map_err(|e| BackupError::Stream(format!("record {}: {e}", found.encoded.sequence)))
    })?;
    let view = index.view(row.number)?;
    let plan = plan(&view, &row.roots, &target)?;
    let mut plan_row = begun.unwrap_or_else(|| PlanRow {
        from: row.checkpoint,
        to: to.clone(),
        phase: Phase::Planned,
        // There is nothing before the first checkpoint.
        imaged: row.checkpoint > CheckpointId(0),
    });
    if phase.is_none() {
        // Left by the step before, if it crashed after its transaction.
        apply::clean(area, &view)?;
        if plan_row.imaged {
            Step::new(area, &view, &plan, crash).take_images(
                area.images(),
                row.id,
                row.checkpoint,
                to.checkpoint,
            )?;
        }
        index.put_plan(row.number, &plan_row)?;
    }
    let result = Step::new(area, &view, &plan, crash).run(phase.unwrap_or(Phase::Planned), || {
        plan_row.phase = Phase::Detached;
        index.put_plan(row.number, &plan_row)
    })?;
    let row = index.finish(name, &result, plan_row.imaged, |row| {
        row.applied = to.position;
        row.checkpoint = to.checkpoint;
        row.label = to.label;
        row.highest_object = highest;
        row.boot_id = boot_id;
        if let Some(roots) = target.roots {
            row.roots = roots;
        }
    })?;
    apply::clean(area, &index.view(row.number)?)?;
    Ok(row)
}
