//! One group at work: the gate, the thread that writes its log, the thread that applies.
//!
//! Records pass the gate under the lock of [`State`], go through a bounded queue to the log
//! thread, and count once its sync returns; only then do acknowledgement and applier learn of
//! them. The applier holds the lock of the tree for a whole step; whoever reads the tree or the
//! index together with the log (manifest, catalogue) takes that lock too.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

mod adopting;
mod applying;
mod attending;
mod following;
mod logging;
mod merging;
mod processes;
mod promoting;
#[cfg(test)]
pub(crate) mod simulated;
mod taking;

use bfs_common::record::{CheckpointId, CheckpointLabel, Epoch, GroupId, PathBytes, Record, Sequence};
use bfs_common::wire::{GenerationLine, GroupStatus, Position, Refusal, StoreState};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::apply::Area;
use super::error::BackupError;
use super::follow::{Followers, Standing};
use super::gate::{Gate, Marker, is_received};
use super::index::{GenerationRow, GroupRow, HistoryRow, Index, View};
use super::kinds::Kinds;
use super::past::{self, Source};
use super::process::Sets;
use super::retention::Retention;
use super::room::{Disk, Disks, Need, Room};
use super::transfer::Incoming;
use crate::log::writer::{Batch, LogWriter, SEGMENT_BYTES};
use crate::log::{LogRecord, spares};
use attending::Attendance;
pub use attending::{Leave, Pulse, Slot};
pub use processes::Puts;
use promoting::Promoting;
use taking::Pending;

/// Batches that wait for the log thread; each is a frame at most.
const QUEUE: usize = 8;

/// What a group may take and keep.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of its log that may wait to be applied.
    pub pending_max: u64,
    /// How many generations are kept.
    pub retention: Retention,
}

/// What agents are told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The last durable record.
    pub durable: Position,
    /// The last durable marker.
    pub confirmed: CheckpointId,
    /// The applied checkpoint.
    pub applied: CheckpointId,
    /// The applied one cannot be followed by the next.
    pub stuck: bool,
    /// Files of which bytes are lost.
    pub damaged: u64,
    /// The log takes nothing any more, and why.
    pub refuses: Option<String>,
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
    /// The agent that came last.
    attendance: Attendance,
    /// Promotions, the newest last.
    histories: Vec<HistoryRow>,
    /// Whether one is being begun.
    promoting: Promoting,
    applied: (CheckpointId, CheckpointLabel),
    applying: bool,
    log_trouble: Option<String>,
    apply_trouble: Option<String>,
    /// Files that nobody needs may be left: from before the start, or after a failure.
    untidy: bool,
    tidy_trouble: Option<String>,
    pending: Pending,
    /// Followers are up to here.
    followed: Sequence,
    /// And stand like this.
    following: Standing,
    /// An agent waits for room.
    short: bool,
    /// Merges that somebody waits for.
    merges: VecDeque<merging::Asked>,
    /// Bytes that are on their way to the log.
    unlogged: u64,
    /// Up to here it is known what the records that wait come to.
    looked_at: Sequence,
    stop: bool,
}

impl State {
    /// At the end of a log, with nothing that waits.
    fn new(
        gate: Gate,
        granted: Epoch,
        applied: (CheckpointId, CheckpointLabel),
        histories: Vec<HistoryRow>,
    ) -> Self {
        Self {
            gate,
            granted,
            steps: VecDeque::new(),
            slot: None,
            attendance: Attendance::default(),
            histories,
            promoting: Promoting::No,
            applied,
            applying: false,
            log_trouble: None,
            apply_trouble: None,
            untidy: true,
            tidy_trouble: None,
            pending: Pending::default(),
            followed: Sequence(0),
            following: Standing::default(),
            short: false,
            merges: VecDeque::new(),
            unlogged: 0,
            looked_at: Sequence(0),
            stop: false,
        }
    }

    /// Whether an agent may go on in an epoch that it says it was granted.
    ///
    /// # Errors
    /// The refusal for the agent.
    pub fn admit(&self, epoch: Epoch) -> Result<(), Refusal> {
        if epoch < self.granted {
            return Err(self.fenced(epoch));
        }
        if epoch > self.granted || epoch == Epoch(0) {
            return Err(Refusal::Bad(format!("epoch {epoch} was never granted")));
        }
        Ok(())
    }

    /// Whether the next step can be done: what it ends with is durable up to here.
    fn is_due(&self, durable: Sequence) -> bool {
        self.steps.front().is_some_and(|step| step.marker.position.sequence <= durable)
    }
}

/// A step in the log.
#[derive(Debug)]
struct Taken {
    marker: Marker,
    /// Bytes of its records.
    bytes: u64,
    /// What it needs to be applied, at most.
    need: Need,
}

enum ToLog {
    Append(Batch),
    /// A stream that was taken in stands ready.
    Adopt(adopting::Adopt),
    /// Answers when everything before it is durable, after opening the log again if it failed.
    Drain(oneshot::Sender<Result<(), String>>),
}

/// Generations that are being read, and those that go.
#[derive(Debug, Default)]
struct Held {
    /// By how many.
    readers: BTreeMap<CheckpointId, u32>,
    /// Nobody begins to read these.
    going: BTreeSet<CheckpointId>,
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
    /// What is taken in of a stream, before the log has it.
    incoming: Incoming,
    limits: Limits,
    /// How many files of applied segments stay to be written over.
    spares: usize,
    room: Arc<Room>,
    disks: Disks,
    /// Images of processes.
    process: Arc<Sets>,
    /// Second copies of single files; none before there is a policy.
    followers: Mutex<Option<Followers>>,
    /// Which generations must stay.
    held: Mutex<Held>,
    /// When it was last looked which ones go.
    retired: Mutex<Option<Instant>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A lock that survives a panic of another thread: what it guards is changed in small whole steps.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something of which a panic is an error like any other: the thread goes on, and tries it again.
fn contained<T>(work: impl FnOnce() -> T) -> Result<T, BackupError> {
    // What it was doing is read again from index and log before the next try.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        BackupError::Panicked(text.unwrap_or_else(|| "a panic without words".into()))
    })
}

/// What opening a log gives: its end, the gate there, the steps that are not applied, and how
/// stands behind the last of them.
type OpenLog = (LogWriter, Gate, VecDeque<Taken>, Pending);

/// A gate at the applied checkpoint.
fn gate_at(row: &GroupRow, view: &View) -> Result<Gate, BackupError> {
    let mut kinds = Kinds::default();
    view.each_kind(|object, kind| kinds.insert(object, kind))?;
    let (roots, highest) = (row.roots.clone(), row.highest_object);
    let mut gate = Gate::new(row.applied.into(), row.checkpoint, highest, roots, row.boot_id, kinds);
    gate.has_policies = !row.policies.is_empty();
    Ok(gate)
}

fn open_log(log: &std::path::Path, row: &GroupRow, index: &Index) -> Result<OpenLog, BackupError> {
    let applied: Position = row.applied.into();
    let view = index.view(row.number)?;
    let mut gate = gate_at(row, &view)?;
    let mut steps = VecDeque::new();
    let mut pending = Pending::behind(row.highest_object);
    let mut waiting = 0;
    let (mut writer, opened) = LogWriter::open(log, row.id, applied, |found: LogRecord| {
        if is_received(&found.record) && gate.position != applied {
            gate = gate_at(row, &view)?.behind_void(gate.position);
            pending = Pending::behind(row.highest_object);
        }
        gate.replay(&found.encoded, &found.record).map_err(|refusal| BackupError::corrupt(log, refusal))?;
        let (len, payload) = (found.encoded.bytes.len() as u64, found.payload.len() as u64);
        pending.add(&found.record, len, payload, Some(&view), waiting);
        if let Record::Checkpoint { checkpoint, label } = found.record {
            let marker = Marker { checkpoint, label, position: gate.position.into() };
            let step = pending.end(marker, gate.highest_object);
            waiting += step.bytes;
            steps.push_back(step);
        }
        Ok::<_, BackupError>(())
    })?;
    if let Ok(disk) = rustix::fs::statvfs(log) {
        writer.limit_segments((disk.f_blocks * disk.f_frsize / 64).clamp(1 << 20, SEGMENT_BYTES));
    }
    if let Some((path, bytes)) = opened.cut {
        tracing::warn!("{}: {bytes} bytes of a torn batch were cut; it was never committed", path.display());
    }
    Ok((writer, gate, steps, pending))
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
        (log, incoming): (PathBuf, Incoming),
        limits: Limits,
        room: Arc<Room>,
    ) -> Result<Arc<Self>, BackupError> {
        let (group, writer, from_group) =
            Self::assemble(name, row, index, area, (log, incoming), limits, room)?;
        let spawn = |what: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(format!("{what} {name}"))
                // The search for a directory goes up its parents by recursion.
                .stack_size(32 << 20)
                .spawn(work)
                .map_err(BackupError::io("start a thread for group", name))
        };
        let (for_log, for_apply) = (group.clone(), group.clone());
        let clock = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let clock = clock.map_err(BackupError::io("start the clock of group", name))?;
        let log_thread = spawn("log", Box::new(move || for_log.run_log(writer, from_group, &clock)))?;
        let apply_thread = spawn("apply", Box::new(move || for_apply.run_apply()))?;
        locked(&group.threads).extend([log_thread, apply_thread]);
        Ok(group)
    }

    /// All of a group but its threads, and what these work with.
    fn assemble(
        name: &str,
        row: GroupRow,
        index: Arc<Index>,
        area: Area,
        (log, incoming): (PathBuf, Incoming),
        limits: Limits,
        room: Arc<Room>,
    ) -> Result<(Arc<Self>, LogWriter, mpsc::Receiver<ToLog>), BackupError> {
        let folder = std::fs::File::open(&log).map_err(BackupError::io("open", &log))?;
        let store = Disk::of(folder).map_err(BackupError::io("stat", &log))?;
        let images = std::fs::File::open(area.images()).map_err(BackupError::io("open", area.images()))?;
        let images = Disk::of(images).map_err(BackupError::io("stat", area.images()))?;
        let disks = Disks { store, tree: area.disk()?, images };
        let (writer, mut gate, steps, pending) = open_log(&log, &row, &index)?;
        // Followers of policies that are no more may be left.
        gate.has_policies |=
            std::fs::read_dir(area.now()).map_err(BackupError::io("read", area.now()))?.next().is_some();
        let begun = index.plan(row.number)?;
        area.seal(begun.map_or(row.checkpoint, |plan| plan.to.checkpoint));
        let confirmed = steps.back().map_or(row.checkpoint, |s| s.marker.checkpoint);
        let progress = Progress {
            durable: gate.position,
            confirmed,
            applied: row.checkpoint,
            stuck: false,
            damaged: index.view(row.number)?.damaged()?.len() as u64,
            refuses: None,
        };
        let applied = (row.checkpoint, row.label.clone());
        let mut state = State::new(gate, row.granted, applied, row.histories.clone());
        (state.steps, state.pending) = (steps, pending);
        let spares = spares::limit(&log);
        let process = Arc::new(Sets::open(area.process().to_owned(), row.id)?);
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
            incoming,
            limits,
            spares,
            room,
            disks,
            process,
            followers: Mutex::default(),
            held: Mutex::default(),
            retired: Mutex::new(None),
            threads: Mutex::new(Vec::new()),
        });
        group.note_need(&group.state());
        Ok((group, writer, from_group))
    }

    /// The state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Its maps, which never change.
    #[must_use]
    pub fn maps(&self) -> &[(PathBytes, PathBytes)] {
        &self.maps
    }

    /// To follow what agents are told.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
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

    /// Where generations are read from.
    #[must_use]
    pub fn source(&self) -> Source<'_> {
        Source {
            area: &self.area,
            index: &self.index,
            group: &self.name,
            number: self.number,
            id: self.id,
            tree: Some(&self.tree),
        }
    }

    /// Keeps a generation until [`Self::release`].
    ///
    /// # Errors
    /// [`BackupError::NoGeneration`].
    pub fn hold(&self, checkpoint: CheckpointId) -> Result<(), BackupError> {
        let mut held = locked(&self.held);
        let all = self.index.generations(self.number)?;
        if held.going.contains(&checkpoint) || !all.iter().any(|(number, _)| *number == checkpoint) {
            return Err(past::no_generation(&self.name, checkpoint, &all));
        }
        *held.readers.entry(checkpoint).or_default() += 1;
        Ok(())
    }

    /// Nobody reads it any more, of those who called [`Self::hold`] once.
    pub fn release(&self, checkpoint: CheckpointId) {
        let mut held = locked(&self.held);
        if let Some(count) = held.readers.get_mut(&checkpoint) {
            *count -= 1;
            if *count == 0 {
                held.readers.remove(&checkpoint);
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
            process: self.process.bytes(checkpoint, row.label.wall_ns),
            label: row.label,
            changed: row.changed,
            bytes: row.bytes,
        };
        Ok(all.into_iter().map(line).collect())
    }

    /// Whether its log takes nothing before it was opened again.
    pub fn is_troubled(&self) -> bool {
        self.state().log_trouble.is_some()
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
        let state = self.state();
        let why_not = self.why_not(&state, 0);
        let progress = self.progress.borrow().clone();
        GroupStatus {
            group: self.name.clone(),
            id: self.id,
            durable: progress.durable.sequence,
            epoch: progress.durable.epoch,
            confirmed: progress.confirmed,
            applied: state.applied.0,
            applied_label: state.applied.1.clone(),
            applying: state.applying,
            pending_bytes: state.pending.bytes,
            pending_records: state.pending.records,
            open_gaps: state.gate.gaps.len() as u64,
            attached: state.slot.is_some(),
            agent: state.agent(),
            rolling_back: state.gate.rolling_back,
            history: state.histories.last().map(|row| row.history.clone()),
            state: match (&state.log_trouble, &why_not, &state.apply_trouble) {
                (Some(_), ..) => StoreState::LogFailed,
                (None, Some((why_not, _)), _) => *why_not,
                (None, None, Some(_)) => StoreState::Stuck,
                (None, None, None) if progress.damaged > 0 => StoreState::Damaged,
                (None, None, None) => StoreState::Ready,
            },
            trouble: {
                let why_not = why_not.map(|(_, why)| why);
                let damaged = (progress.damaged > 0).then(|| {
                    let n = progress.damaged;
                    format!(
                        "bytes of {n} backup files are lost: others changed them, or the disk did; they come again \
                         with a checkpoint of a running agent, and `bfs-replayer check` names them"
                    )
                });
                let (tidy, copy) = (&state.tidy_trouble, &self.index.copy_trouble());
                let all = [&state.log_trouble, &why_not, &state.apply_trouble, &damaged, tidy, copy];
                let all = all.into_iter().flatten().chain(&state.following.troubles);
                let all: Vec<&str> = all.map(String::as_str).collect();
                (!all.is_empty()).then(|| all.join("; "))
            },
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
