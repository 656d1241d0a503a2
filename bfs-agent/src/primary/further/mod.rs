//! Destinations beside the first.
//!
//! The first destination gets the stream, and what is durable there releases the ring. Each further one gets whole
//! checkpoints, by a courier of its own that nobody waits for:
//!
//! ```text
//! engine ── batch ──> ship: the first destination
//!              └────> keeper ──> steps: the records of the last checkpoints
//!                                  │ what lies between the newest checkpoint there and the newest here
//!                                courier ──> receive: all of it or nothing
//!                                  ▲
//!                     another destination: the same as a difference, or whole, where the steps do not go back so far
//! ```
//! Only checkpoints go there that are *sealed*: durable at the first destination or in the spool. So no destination is ever at
//! a checkpoint that the first one never comes to have, whatever happens to the agent. Each stands at a checkpoint of its own, whatever the others do; what takes a step in checks that it follows
//! what is there (number and time of the checkpoint). Without further destinations nothing of this exists.

mod confirm;
mod courier;
mod steps;

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, ObjectId, PathBytes, Sequence};
use bfs_common::wire::StoreState;

use super::control::Standing;
use super::engine::outbox::Batch;
use super::ship::{Connect, Limit};
use crate::generation::wall_ns;

pub use confirm::{At, Confirm};
#[cfg(test)]
pub(crate) use courier::{Way, from_another, way};
pub(crate) use steps::{Steps, View};

/// Batches that wait for the keeper; each has about 1 MiB at most.
const QUEUE: usize = 64;
/// How often the keeper looks whether the end has come.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long couriers are waited for at the end.
const END_WAIT: Duration = Duration::from_millis(500);

/// What a group's couriers need to know.
#[derive(Clone)]
pub struct FurtherOptions {
    /// Name of the group.
    pub group: String,
    /// Where the records of the last checkpoints stand, in a file without a name.
    pub folder: PathBuf,
    /// Most bytes of it.
    pub bytes_max: u64,
    /// Where the stream goes.
    pub first: Place,
    /// The group's roots where the stream begins.
    pub roots: Vec<(PathBytes, ObjectId)>,
}

impl std::fmt::Debug for FurtherOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FurtherOptions").field("group", &self.group).finish_non_exhaustive()
    }
}

/// A destination.
#[derive(Clone)]
pub struct Place {
    /// As given to `--backup`.
    pub address: String,
    /// How to reach it.
    pub connect: Connect,
    /// Most that it is sent, where it is a further one.
    pub limit: Option<Arc<Limit>>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("address", &self.address).finish_non_exhaustive()
    }
}

/// How a further destination stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leg {
    /// As given to `--backup`.
    pub address: String,
    /// Whether there is a connection now.
    pub connected: bool,
    /// How it stands to this host.
    pub standing: Standing,
    /// Since when, nanoseconds since 1970.
    pub since_ns: i64,
    /// Why, unless it is attached.
    pub why: Option<String>,
    /// The last confirmed checkpoint.
    pub confirmed: CheckpointId,
    /// The last applied checkpoint.
    pub applied: CheckpointId,
    /// Whether it takes more, as far as it said.
    pub store: StoreState,
    /// Bytes that were sent there.
    pub sent_bytes: u64,
    /// How often the connection was made again.
    pub reconnects: u64,
    /// Nothing is sent there, because somebody said so.
    pub paused: bool,
}

impl Leg {
    fn new(address: &str, now_ns: i64) -> Self {
        Self {
            address: address.into(),
            connected: false,
            standing: Standing::Detached,
            since_ns: now_ns,
            why: Some("it was not reached yet".into()),
            confirmed: CheckpointId(0),
            applied: CheckpointId(0),
            store: StoreState::Ready,
            sent_bytes: 0,
            reconnects: 0,
            paused: false,
        }
    }

    /// Another reason of the same state is no change of it.
    fn stands(&mut self, standing: Standing, why: Option<String>) {
        if standing != self.standing {
            self.since_ns = wall_ns();
        }
        (self.standing, self.why) = (standing, why);
    }
}

/// What couriers, the keeper and the session share.
#[derive(Debug)]
struct Shared {
    options: FurtherOptions,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    view: Option<View>,
    /// Where a courier knows itself by the number.
    legs: Vec<(u64, Place, Leg)>,
    next: u64,
    /// What the first destination has applied.
    first_applied: CheckpointId,
    /// What is durable there, or in the spool.
    sealed: Sequence,
    /// The newest kept checkpoint that is sealed.
    ready: Option<CheckpointId>,
    /// Goes up with all that a courier waits for.
    version: u64,
    ended: bool,
}

impl State {
    /// The kept checkpoints that are sealed.
    fn sealed_view(&self) -> Option<View> {
        Some(self.view.clone()?.sealed(self.sealed))
    }

    /// Looks which checkpoint is sealed; true when it is another one than before.
    fn look(&mut self) -> bool {
        let marks = self.view.as_ref().map_or(&[][..], |view| &view.marks);
        let newest = marks.iter().rev().find(|mark| mark.sequence <= self.sealed);
        let ready = newest.map(|mark| mark.moment.checkpoint);
        std::mem::replace(&mut self.ready, ready) != ready
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // What is changed under it is whole after each assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        state.version += 1;
        drop(state);
        self.changed.notify_all();
        result
    }

    /// A courier's own destination; `None` when it is nobody's any more.
    fn leg<T>(&self, id: u64, change: impl FnOnce(&mut Leg) -> T) -> Option<T> {
        let mut state = self.lock();
        if state.ended {
            return None;
        }
        state.legs.iter_mut().find(|leg| leg.0 == id).map(|leg| change(&mut leg.2))
    }

    /// What has to be kept for whoever is to get it.
    fn needed(&self) -> CheckpointId {
        let state = self.lock();
        let waits = state.legs.iter().filter(|(_, _, leg)| leg.standing != Standing::Diverged);
        waits.map(|(_, _, leg)| leg.confirmed).chain([state.first_applied]).min().unwrap_or(CheckpointId(0))
    }
}

/// The further destinations of a group. Dropped, nothing more is sent.
#[derive(Debug)]
pub struct Further {
    shared: Arc<Shared>,
    feed: Option<SyncSender<Batch>>,
    keeper: Option<JoinHandle<()>>,
    couriers: Vec<JoinHandle<()>>,
}

impl Further {
    /// Begins with none. The stream is taken from its next batch on.
    ///
    /// # Errors
    /// If a thread or the file cannot be made.
    pub fn start(options: FurtherOptions) -> io::Result<Self> {
        std::fs::create_dir_all(&options.folder)?;
        let steps = Steps::new(&options.folder, options.bytes_max, options.roots.clone())?;
        let state = State {
            view: None,
            legs: Vec::new(),
            next: 0,
            first_applied: CheckpointId(0),
            sealed: Sequence(0),
            ready: None,
            version: 0,
            ended: false,
        };
        let shared = Arc::new(Shared { options, state: Mutex::new(state), changed: Condvar::new() });
        let (feed, batches) = sync_channel(QUEUE);
        let theirs = Arc::clone(&shared);
        let keeper = std::thread::Builder::new().name("bfs-steps".into());
        let keeper = keeper.spawn(move || keep(&theirs, steps, &batches))?;
        Ok(Self { shared, feed: Some(feed), keeper: Some(keeper), couriers: Vec::new() })
    }

    /// One more.
    ///
    /// # Errors
    /// If its thread cannot be started; then it is not one.
    pub fn add(&mut self, place: Place) -> io::Result<()> {
        let id = self.shared.changes(|state| {
            let id = state.next;
            state.next += 1;
            let leg = Leg::new(&place.address, wall_ns());
            state.legs.push((id, place.clone(), leg));
            id
        });
        let theirs = Arc::clone(&self.shared);
        let courier = std::thread::Builder::new().name("bfs-further".into());
        match courier.spawn(move || courier::run(&theirs, id, &place)) {
            Ok(thread) => {
                self.couriers.retain(|courier| !courier.is_finished());
                self.couriers.push(thread);
                Ok(())
            }
            Err(error) => {
                self.shared.changes(|state| state.legs.retain(|leg| leg.0 != id));
                Err(error)
            }
        }
    }

    /// One less; whether there was one. What it has it keeps.
    pub fn remove(&self, address: &str) -> bool {
        self.shared.changes(|state| {
            let before = state.legs.len();
            state.legs.retain(|(_, place, _)| place.address != address);
            state.legs.len() < before
        })
    }

    /// Nothing more is sent there, or it goes on; whether there is such a destination.
    pub fn pause(&self, address: &str, pause: bool) -> bool {
        self.change(address, |leg| leg.paused = pause)
    }

    fn change(&self, address: &str, change: impl FnOnce(&mut Leg)) -> bool {
        self.shared.changes(|state| {
            let found = state.legs.iter_mut().find(|(_, place, _)| place.address == address);
            found.map(|(_, _, leg)| change(leg)).is_some()
        })
    }

    /// It is looked at anew what it has, and it is brought to what the others have; whether there is such a destination.
    ///
    /// # Errors
    /// If its thread cannot be started; then it is none any more.
    pub fn look_again(&mut self, address: &str) -> io::Result<bool> {
        // Its courier finds that it has no destination any more, and another one begins.
        let place = self.shared.changes(|state| {
            let at = state.legs.iter().position(|(_, place, _)| place.address == address)?;
            Some(state.legs.remove(at).1)
        });
        place.map_or(Ok(false), |place| self.add(place).map(|()| true))
    }

    /// More of the stream. Never waits: where the keeper cannot follow, it begins again behind a later marker.
    pub fn take(&self, batch: &Batch) {
        if let Some(feed) = &self.feed {
            let _ = feed.try_send(batch.clone());
        }
    }

    /// How far the first destination and the spool are.
    pub fn first_has(&self, sealed: Sequence, applied: CheckpointId) {
        let mut state = self.shared.lock();
        state.first_applied = applied;
        if state.sealed != sealed {
            state.sealed = sealed;
            if state.look() {
                state.version += 1;
                drop(state);
                self.shared.changed.notify_all();
            }
        }
    }

    /// Where they are.
    #[must_use]
    pub fn places(&self) -> Vec<Place> {
        self.shared.lock().legs.iter().map(|(_, place, _)| place.clone()).collect()
    }

    /// How they stand.
    #[must_use]
    pub fn legs(&self) -> Vec<Leg> {
        self.shared.lock().legs.iter().map(|(_, _, leg)| leg.clone()).collect()
    }
}

impl Drop for Further {
    fn drop(&mut self) {
        self.shared.changes(|state| state.ended = true);
        self.feed = None;
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
        // A courier may wait for a peer that says nothing: what it is about is all there or not at all.
        let deadline = Instant::now() + END_WAIT;
        for courier in self.couriers.drain(..) {
            while !courier.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            if courier.is_finished() {
                let _ = courier.join();
            }
        }
    }
}

/// Keeps what comes, until the end.
fn keep(shared: &Shared, mut steps: Steps, batches: &Receiver<Batch>) {
    loop {
        let batch = match batches.recv_timeout(LOOK_EVERY) {
            Ok(batch) => batch,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        match steps.take(&batch) {
            Ok(false) => continue,
            Ok(true) => {}
            Err(error) => tracing::warn!("further destinations of group {}: {error}", shared.options.group),
        }
        steps.trim(shared.needed());
        let view = Some(steps.view());
        let mut state = shared.lock();
        state.view = view;
        if state.look() {
            state.version += 1;
            drop(state);
            shared.changed.notify_all();
        }
    }
}
