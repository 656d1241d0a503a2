//! Sending the stream to its destination.
//!
//! A [`Shipper`] has a thread with an event loop of its own; the engine, which is not async, hands
//! batches over with [`Shipper::try_push`] and looks at [`Shipper::progress`]. What is not durable
//! at the destination is retained, bounded, in memory and behind that in the spool; a lost connection is
//! made again, for ever, and the stream goes on behind the destination's last durable record. What can not be healed by trying
//! again (a fork, a newer agent) stands in [`Progress::refusal`], and then nothing more is sent.

mod keeper;
mod leftover;
mod link;
pub(crate) mod queue;
mod rate;
mod remote;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, Epoch, GapScope, GroupId, ObjectId, PathBytes, Sequence};
use bfs_common::wire::{CatalogObject, Frame, Position, Refusal, StoreState};
use tokio::sync::Notify;

pub use keeper::SpoolProgress;
pub use leftover::send_left;
pub use link::Sending;
pub use queue::{BATCHES_MAX, BODY_MAX, Batch};
pub use rate::{Limit, RATE_MIN, Sends};
pub use remote::{Connect, ConnectFuture, Manifest, Remote, RemoteError, network};

use crate::log::LogError;
use crate::net::{ConnectError, FrameError};
use crate::primary::spool::{Left, Spool};
use queue::{Next, Queue};

/// How long a goodbye may take.
const BYE_LIMIT: Duration = Duration::from_millis(500);
/// Answers that wait to be written; a peer that makes more of them is not served.
const ANSWERS_MAX: usize = 64;

/// What a shipper needs to know.
#[derive(Clone)]
pub struct ShipOptions {
    /// How to reach the destination: [`network`], or an in-process replayer.
    pub connect: Connect,
    /// Name of the group.
    pub group: String,
    /// Its identity.
    pub group_id: GroupId,
    /// This boot.
    pub boot_id: [u8; 16],
    /// The epoch to go on in; `None` (a new agent) asks for a new one.
    pub epoch: Option<Epoch>,
    /// The agent before may still seem connected.
    pub take_over: bool,
    /// FROM=TO of `--map`.
    pub maps: Vec<(PathBytes, PathBytes)>,
    /// Most bytes of records that are retained in memory until they are durable; twice as many when the last of
    /// them only say what was touched.
    pub retain_bytes_max: usize,
    /// How long the first connection may take.
    pub start_limit: Duration,
    /// How the stream travels.
    pub sending: Sending,
}

impl std::fmt::Debug for ShipOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShipOptions").field("group", &self.group).finish_non_exhaustive()
    }
}

/// What the destination said at the (first) connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Granted.
    pub epoch: Epoch,
    /// Where to go on.
    pub position: Position,
    /// Last confirmed checkpoint.
    pub confirmed: CheckpointId,
    /// Last applied checkpoint.
    pub applied: CheckpointId,
    /// Highest object number ever seen.
    pub highest_object: ObjectId,
    /// Gaps that are open at `position`.
    pub gaps: Vec<GapScope>,
    /// The group's roots at `position`.
    pub roots: Vec<(PathBytes, ObjectId)>,
    /// The boot in which the last epoch wrote.
    pub boot_id: [u8; 16],
    /// Below this directory stands what was promoted, whatever inodes the store knows.
    pub adopt: Option<PathBytes>,
    /// Records may go packed.
    pub lz4: bool,
}

/// Why the destination is not served.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It broke.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The replayer ended it.
    #[error("the replayer closed the connection")]
    Closed,
    /// The replayer says nothing any more.
    #[error("the replayer was silent for {0} s")]
    Silent(u64),
    /// What was kept cannot be read.
    #[error("what is to be sent cannot be read from the spool: {0}")]
    Spool(#[from] LogError),
    /// Refused, by the replayer or, seeing its position, by us.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// Something that the protocol does not have here.
    #[error("the replayer sent a frame that does not belong here")]
    Unexpected,
    /// No connection within the limit.
    #[error("no connection to the replayer within {0} s")]
    Timeout(u64),
    /// The thread or its event loop cannot be started.
    #[error("cannot start the shipper: {0}")]
    Start(std::io::Error),
}

/// How far the destination is. Cheap to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Goes up with every change, for [`Shipper::wait_change`].
    pub version: u64,
    /// Whether there is a connection now.
    pub connected: bool,
    /// What is durable there.
    pub durable: Position,
    /// Last confirmed checkpoint.
    pub confirmed: CheckpointId,
    /// Last applied checkpoint.
    pub applied: CheckpointId,
    /// Ring space up to here holds nothing that is not durable.
    pub released_ring_position: Option<u64>,
    /// Whether it takes more, as far as it said.
    pub store: StoreState,
    /// The last record that is durable, there or in the spool.
    pub sealed: Sequence,
    /// How the spool stands; all zero without one.
    pub spool: SpoolProgress,
    /// Bytes of records that are retained in memory.
    pub retained_bytes: usize,
    /// Bytes of records sent, resent ones included.
    pub sent_bytes: u64,
    /// How many of them went over the wire, where some were packed.
    pub wire_bytes: u64,
    /// Records go packed over this connection.
    pub compressed: bool,
    /// How often the connection was made again.
    pub reconnects: u64,
    /// Why there is no connection, or why the one before ended.
    pub last_error: Option<String>,
    /// Nothing more will be sent, because of this.
    pub refusal: Option<Refusal>,
    /// Of the last heartbeat; 0 before the first.
    pub round_trip_us: u64,
    /// More waits than goes soon, because of the limit that the user set.
    pub held_back: bool,
}

/// Why a batch was not taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Full(pub Batch);

/// Sends the stream of one group to one destination. Ends with its drop, without waiting for
/// what is not durable.
#[derive(Debug)]
pub struct Shipper {
    shared: Arc<Shared>,
    remote: Remote,
    thread: Option<JoinHandle<()>>,
    keeper: Option<JoinHandle<Spool>>,
}

/// What the engine's side and the shipper's thread share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// There may be something for the spool.
    keeper: Condvar,
    /// Where the spool is.
    spool: Option<(PathBuf, GroupId)>,
    spool_bytes_max: Option<u64>,
    /// How fast may be sent, if there is a limit.
    limit: Option<Arc<Limit>>,
    /// There is something to write.
    wake: Notify,
    ended: tokio::sync::watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    progress: Progress,
    welcome: Option<Welcome>,
    first_error: Option<ShipError>,
    queue: Queue,
    /// When something became durable, or there was nothing to wait for.
    moved: Instant,
    /// Everything goes into the spool that is not durable.
    seal: bool,
    /// Only what is touched is handed over, no bytes.
    notes: bool,
    answers: VecDeque<Frame>,
    /// The replayer was told that this is the end.
    said_bye: bool,
    ping: (u64, Instant),
    catalog: Catalog,
}

#[derive(Debug)]
enum Catalog {
    None,
    Asked(Vec<CatalogObject>),
    Complete(Vec<CatalogObject>),
}

impl Shipper {
    /// Connects, and returns when the destination has welcomed this group. What an agent before `left` in
    /// the spool is sent, and nothing else can be.
    ///
    /// # Errors
    /// [`ShipError`]: at the start every failure is final, for the user is there to be told.
    pub fn start(
        options: ShipOptions,
        spool: Option<Spool>,
        left: Option<&Left>,
    ) -> Result<(Self, Welcome), ShipError> {
        let mut shared = Shared::new(options.retain_bytes_max);
        shared.spool = spool.as_ref().map(|spool| (spool.log().to_owned(), spool.group()));
        shared.spool_bytes_max = spool.as_ref().map(|spool| spool.options().bytes_max);
        shared.limit = options.sending.rate_limit.map(|rate| Arc::new(Limit::new(rate)));
        if let Some(left) = left {
            shared.change(|state| state.queue = Queue::left(left.begin, left.end, left.bytes));
        }
        let shared = Arc::new(shared);
        let remote = Remote::new(Arc::clone(&options.connect));
        let limit = options.start_limit;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ShipError::Start)?;
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("bfs-ship".into())
            .spawn(move || runtime.block_on(link::run(theirs, options)))
            .map_err(ShipError::Start)?;
        let mut shipper = Self { shared, remote, thread: Some(thread), keeper: None };
        let welcome = shipper.first_welcome(limit)?;
        if let Some(mut spool) = spool {
            spool.set_epoch(welcome.epoch);
            let theirs = Arc::clone(&shipper.shared);
            let keeper = std::thread::Builder::new().name("bfs-spool".into());
            let keeper = keeper.spawn(move || keeper::run(&theirs, spool)).map_err(ShipError::Start)?;
            shipper.keeper = Some(keeper);
        }
        Ok((shipper, welcome))
    }

    fn first_welcome(&self, limit: Duration) -> Result<Welcome, ShipError> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        loop {
            if let Some(welcome) = state.welcome.clone() {
                return Ok(welcome);
            }
            if let Some(error) = state.first_error.take() {
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ShipError::Timeout(limit.as_secs()));
            }
            state = self.shared.wait(state, left);
        }
    }

    /// Hands a batch over. It must begin with the record after the last one handed over (or
    /// after [`Welcome::position`]). `last`: before nothing but notes come, and twice as much may be retained.
    ///
    /// # Errors
    /// [`Full`] gives it back when as much is retained as may be.
    ///
    /// # Panics
    /// When the batch does not follow the one before.
    pub fn try_push(&self, batch: Batch, last: bool) -> Result<(), Full> {
        let mut state = self.shared.lock();
        let twice = last || state.notes;
        state.queue.push(batch, twice).map_err(Full)?;
        state.progress.retained_bytes = state.queue.bytes();
        drop(state);
        self.shared.wake.notify_one();
        self.shared.keeper.notify_one();
        Ok(())
    }

    /// Everything that is not durable goes into the spool from now on.
    pub fn seal(&self) {
        self.shared.lock().seal = true;
        self.shared.keeper.notify_one();
    }

    /// From now on only what is touched is handed over, or bytes again.
    pub fn note_only(&self, notes: bool) {
        self.shared.lock().notes = notes;
        self.shared.keeper.notify_one();
    }

    /// Why nothing but that should be handed over now, if the destination is away and there is no room.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        keeper::shortage(&self.shared.lock(), self.shared.spool_bytes_max)
    }

    /// Whether there is a spool.
    #[must_use]
    pub fn has_spool(&self) -> bool {
        self.shared.spool.is_some()
    }

    /// How fast may be sent there, if there is a limit: for what else is sent to the same destination.
    #[must_use]
    pub fn limit(&self) -> Option<Arc<Limit>> {
        self.shared.limit.clone()
    }

    /// Ends, and gives the spool back.
    #[must_use]
    pub fn end(mut self) -> Option<Spool> {
        self.stop()
    }

    /// Tells the replayer that nobody has to look for this agent, if it can be told at once.
    fn say_bye(&self) {
        let deadline = Instant::now() + BYE_LIMIT;
        let mut state = self.shared.lock();
        if !state.progress.connected {
            return;
        }
        state.answers.push_back(Frame::Bye);
        self.shared.wake.notify_one();
        while state.progress.connected && !state.said_bye {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.shared.wait(state, left);
        }
    }

    fn stop(&mut self) -> Option<Spool> {
        if self.thread.is_some() && !std::thread::panicking() {
            self.say_bye();
        }
        self.shared.ended.send_replace(true);
        self.shared.keeper.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.keeper.take()?.join().ok()
    }

    /// Ring space up to here holds nothing beyond what was pushed so far: it may be released as
    /// soon as that is durable.
    pub fn note_position(&self, position: u64) {
        let mut state = self.shared.lock();
        state.queue.note_position(position);
        state.progress.released_ring_position = state.queue.released();
    }

    /// How far the destination is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.lock().progress.clone()
    }

    /// Waits until the progress is another than at `seen` (a [`Progress::version`]) or the
    /// deadline passes; returns it either way.
    #[must_use]
    pub fn wait_change(&self, seen: u64, deadline: Instant) -> Progress {
        let mut state = self.shared.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.progress.version != seen || left.is_zero() {
                return state.progress.clone();
            }
            state = self.shared.wait(state, left);
        }
    }

    /// Everything that the destination knows of the group at its last durable record. To be
    /// called before the first batch of this agent's life is handed over.
    ///
    /// # Errors
    /// [`ShipError::Refused`] or [`ShipError::Timeout`].
    pub fn catalog(&self, limit: Duration) -> Result<Vec<CatalogObject>, ShipError> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        state.catalog = Catalog::Asked(Vec::new());
        state.answers.push_back(Frame::GetCatalog);
        self.shared.wake.notify_one();
        loop {
            if let Catalog::Complete(objects) = &mut state.catalog {
                let objects = std::mem::take(objects);
                state.catalog = Catalog::None;
                return Ok(objects);
            }
            if let Some(refusal) = &state.progress.refusal {
                return Err(refusal.clone().into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.catalog = Catalog::None;
                return Err(ShipError::Timeout(limit.as_secs()));
            }
            state = self.shared.wait(state, left);
        }
    }

    /// For questions on connections of their own (manifest, status).
    #[must_use]
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn new(bytes_max: usize) -> Self {
        let progress = Progress {
            version: 0,
            connected: false,
            durable: Position::START,
            confirmed: CheckpointId(0),
            applied: CheckpointId(0),
            released_ring_position: None,
            store: StoreState::Ready,
            sealed: Sequence(0),
            spool: SpoolProgress::default(),
            retained_bytes: 0,
            sent_bytes: 0,
            wire_bytes: 0,
            compressed: false,
            reconnects: 0,
            last_error: None,
            refusal: None,
            round_trip_us: 0,
            held_back: false,
        };
        Self {
            state: Mutex::new(State {
                progress,
                welcome: None,
                first_error: None,
                queue: Queue::new(Position::START, bytes_max),
                moved: Instant::now(),
                seal: false,
                notes: false,
                answers: VecDeque::new(),
                said_bye: false,
                ping: (0, Instant::now()),
                catalog: Catalog::None,
            }),
            changed: Condvar::new(),
            keeper: Condvar::new(),
            spool: None,
            spool_bytes_max: None,
            limit: None,
            wake: Notify::new(),
            ended: tokio::sync::watch::Sender::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done by a panic while the lock is held: the asserts of the queue
        // come before its first change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Changes the state, and tells those who wait for it.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        let State { progress, queue, moved, .. } = &mut *state;
        progress.version += 1;
        let waits = queue.bytes() > 0 || queue.is_left();
        if progress.durable != queue.durable() || !waits {
            *moved = Instant::now();
        }
        progress.durable = queue.durable();
        progress.sealed = queue.sealed();
        (progress.spool.records, progress.spool.bytes) = queue.in_spool();
        progress.released_ring_position = queue.released();
        progress.retained_bytes = queue.bytes();
        progress.held_back = self.holds_back(queue);
        drop(state);
        self.changed.notify_all();
        self.keeper.notify_one();
        result
    }

    /// Whether more waits than the limit lets go soon.
    fn holds_back(&self, queue: &Queue) -> bool {
        let waits = queue.bytes() as u64 + queue.in_spool().1;
        self.limit.as_ref().is_some_and(|limit| limit.holds_back(waits))
    }

    async fn until_ended(&self) {
        // The sender is ours, so the wait cannot fail.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    fn held_epoch(&self) -> Option<Epoch> {
        self.lock().welcome.as_ref().map(|w| w.epoch)
    }

    fn was_welcome(&self) -> bool {
        self.lock().welcome.is_some()
    }

    fn welcomed(&self, welcome: &Welcome) -> Result<(), Refusal> {
        self.change(|state| {
            if let Some(first) = &state.welcome {
                if welcome.epoch != first.epoch {
                    return Err(Refusal::Fenced { newest: welcome.epoch });
                }
                state.queue.reconnected(welcome.position)?;
                state.progress.reconnects += 1;
            } else {
                if state.queue.is_left() {
                    state.queue.begin_left(welcome.position)?;
                } else {
                    state.queue.begin(welcome.position, welcome.epoch);
                }
                state.welcome = Some(welcome.clone());
            }
            state.answers.clear();
            if let Catalog::Asked(objects) = &mut state.catalog {
                objects.clear();
                state.answers.push_back(Frame::GetCatalog);
            }
            state.progress.connected = true;
            state.progress.confirmed = welcome.confirmed;
            state.progress.applied = welcome.applied;
            state.progress.compressed = welcome.lz4;
            Ok(())
        })
    }

    fn disconnected(&self, error: ShipError, fatal: bool) {
        self.change(|state| {
            state.progress.connected = false;
            state.progress.last_error = Some(error.to_string());
            match &error {
                ShipError::Refused(Refusal::Full(_)) => state.progress.store = StoreState::Full,
                ShipError::Refused(Refusal::Behind(_)) => state.progress.store = StoreState::Behind,
                ShipError::Refused(Refusal::Store(_)) => state.progress.store = StoreState::LogFailed,
                _ => {}
            }
            if fatal {
                if let ShipError::Refused(refusal)
                | ShipError::Connect(ConnectError::Refused { refusal, .. }) = &error
                {
                    state.progress.refusal = Some(refusal.clone());
                }
                if state.welcome.is_none() {
                    state.first_error = Some(error);
                }
            }
        });
    }

    /// What the destination says of itself.
    fn store_is(&self, store: StoreState) {
        self.lock().progress.store = store;
    }

    fn acknowledged(
        &self,
        position: Position,
        confirmed: CheckpointId,
        applied: CheckpointId,
    ) -> Result<(), Refusal> {
        self.change(|state| {
            state.progress.confirmed = confirmed;
            state.progress.applied = applied;
            state.queue.acknowledged(position)
        })
    }

    fn catalog_part(&self, part: Vec<CatalogObject>, last: bool) {
        self.change(|state| {
            if let Catalog::Asked(objects) = &mut state.catalog {
                objects.extend(part);
                if last {
                    state.catalog = Catalog::Complete(std::mem::take(objects));
                }
            }
        });
    }

    fn answer(&self, frame: Frame) {
        let mut state = self.lock();
        if state.answers.len() < ANSWERS_MAX {
            state.answers.push_back(frame);
        }
        drop(state);
        self.wake.notify_one();
    }

    fn next_answer(&self) -> Option<Frame> {
        self.lock().answers.pop_front()
    }

    fn pinging(&self) -> u64 {
        let mut state = self.lock();
        state.ping = (state.ping.0 + 1, Instant::now());
        state.ping.0
    }

    fn ponged(&self, number: u64) {
        self.change(|state| {
            if state.ping.0 == number {
                let us = state.ping.1.elapsed().as_micros();
                state.progress.round_trip_us = u64::try_from(us).unwrap_or(u64::MAX);
            }
        });
    }

    fn has_to_send(&self) -> bool {
        self.lock().queue.has_to_send()
    }

    /// How much is sent at once.
    fn piece_max(&self) -> usize {
        self.limit.as_ref().map_or(queue::BODY_MAX, |limit| limit.piece_max())
    }

    fn answered(&self, answer: &Frame) {
        if *answer == Frame::Bye {
            self.change(|state| state.said_bye = true);
        }
    }

    fn next_to_send(&self) -> Next {
        self.lock().queue.next_to_send(self.piece_max())
    }

    /// What was read from the spool goes to the destination. Where the spool has what that claimed, it was
    /// `passed` over.
    fn sent_spooled(&self, batch: &Batch, passed: Option<u64>) {
        self.change(|state| {
            if let Some(bytes) = passed {
                state.queue.claim_holds(bytes);
            }
            state.queue.sent_spooled(batch);
        });
    }

    fn durable(&self) -> Sequence {
        self.lock().queue.durable().sequence
    }

    fn sent(&self, batch: &Batch, wire_bytes: usize) {
        let progress = &mut self.lock().progress;
        progress.sent_bytes += batch.bytes.len() as u64;
        progress.wire_bytes += wire_bytes as u64;
    }
}

#[cfg(test)]
mod tests;
