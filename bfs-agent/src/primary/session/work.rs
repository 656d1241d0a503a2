//! A session at work: one loop that takes in events, ships, takes checkpoints when they are due,
//! and answers commands. Nothing in it waits for a client.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bfs_common::record::{CheckpointId, Epoch, Sequence};

use super::SessionOptions;
use super::link::{Link, STOP_LIMITS};
use super::paths::Change;
use super::triggers::Since;
use crate::backup::ReplayerHandle;
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{
    self, FailureKind, Inbound, Replies, Reply, Request as Command, State, Ticket, WaitFor,
};
use crate::primary::engine::host::HostError;
use crate::primary::engine::{CheckpointError, Engine, RECENT_NS, Request, Stop, Taken};
use crate::primary::ship::Progress;
use crate::primary::stop::Limits;
use crate::primary::verify;

/// Records wait at most this long for their batch, unless a checkpoint or a command comes: each batch is
/// a sync at the replayer, maybe on the disk that the program works on.
const FLUSH_EVERY: Duration = Duration::from_millis(100);
/// The same while the ring fills up: its room comes back only when what it held is durable.
const FLUSH_SOON: Duration = Duration::from_millis(10);
/// How often is looked at what was lost, and forgotten what is old.
const CARE_EVERY: Duration = Duration::from_millis(200);
/// How long the end of `run` waits for the backup's files once the checkpoint is confirmed.
const APPLIED_WAIT: Duration = Duration::from_secs(10);
/// How long it waits for the spool, where that is to keep what the backup did not take in time.
const SEALED_WAIT: Duration = Duration::from_secs(10);
/// Events that are taken in before the loop looks at anything else.
const EVENTS_AT_ONCE: usize = 4096;
/// Between two looks at an empty ring of the usual size; a small one is full sooner.
const LOOK_MIN: Duration = Duration::from_millis(1);
/// A ring that is smaller than this is small.
const SMALL_RING: u64 = 16 << 20;
/// See [`LOOK_MIN`]; when nothing happens for long.
const LOOK_MAX: Duration = Duration::from_millis(4);
/// Most recent checkpoints whose instant and tag are remembered.
const REMEMBERED: usize = 4096;

/// A command that waits for a checkpoint.
struct Waiter {
    replies: Replies,
    what: Awaited,
    checkpoint: CheckpointId,
    sequence: Sequence,
    deadline: Instant,
    stopped_us: u64,
}

pub(super) enum Awaited {
    Checkpoint(WaitFor),
    Flush,
    Verify,
}

/// The processes stand for a client.
struct Held {
    ticket: Ticket,
    waiter: Waiter,
}

/// A checkpoint that was taken.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub checkpoint: CheckpointId,
    pub sequence: Sequence,
    pub at: Instant,
    pub wall_ns: i64,
    pub tag: String,
}

/// How checkpoints went.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub taken: u64,
    pub late: u64,
    pub given_up: u64,
    pub stopped: u64,
}

/// How the last checkpoint stands at the end.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Where it has come to.
    pub reached: Option<WaitFor>,
    /// Why it is not confirmed.
    pub why: Option<String>,
    /// Where it is sealed: the command that sends it.
    pub send_by: Option<String>,
}

/// A session at work.
pub struct Work {
    pub(super) options: SessionOptions,
    _server: control::Server,
    inbound: mpsc::Receiver<Inbound>,
    pub(super) engine: Engine,
    pub(super) link: Link,
    pub(super) epoch: Epoch,
    pub(super) kept: super::state::State,
    pub(super) state: State,
    pub(super) marks: Vec<Mark>,
    pub(super) tally: Tally,
    pub(super) last_error: Option<String>,
    pub(super) detached: Option<String>,
    pub(super) failing: Option<String>,
    waiters: Vec<Waiter>,
    held: Option<Held>,
    last_flush: Instant,
    last_care: Instant,
    pub(super) since: Since,
    look: Duration,
    stop_asked: Option<(Replies, Duration)>,
    _local: Option<Arc<ReplayerHandle>>,
}

impl Work {
    #[allow(clippy::too_many_arguments, reason = "the parts that a session is made of, once")]
    pub(super) fn new(
        options: SessionOptions,
        server: control::Server,
        inbound: mpsc::Receiver<Inbound>,
        engine: Engine,
        link: Link,
        epoch: Epoch,
        kept: super::state::State,
        local: Option<Arc<ReplayerHandle>>,
    ) -> Self {
        let now = Instant::now();
        Self {
            options,
            _server: server,
            inbound,
            engine,
            link,
            epoch,
            kept,
            state: State::Copying,
            marks: Vec::new(),
            tally: Tally::default(),
            last_error: None,
            detached: None,
            failing: None,
            waiters: Vec::new(),
            held: None,
            last_flush: now,
            last_care: now,
            since: Since::new(now),
            look: LOOK_MIN,
            stop_asked: None,
            _local: local,
        }
    }

    /// Works until `ended` says so or a command asks to stop. The first checkpoint is the first
    /// copy.
    pub fn follow(&mut self, mut ended: impl FnMut() -> bool) {
        // Short pauses are meant as they are said: the default slack is 50 us (prctl(2)).
        // SAFETY: sets a number of this thread, touches no memory.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000 as libc::c_ulong, 0, 0, 0) };
        if self.tally.taken == 0 {
            self.scheduled("start");
        }
        let mut looked = Instant::now();
        while self.stop_asked.is_none() {
            if looked.elapsed() >= Duration::from_millis(5) {
                looked = Instant::now();
                if ended() {
                    break;
                }
            }
            self.turn();
        }
    }

    /// One turn of the loop.
    pub(super) fn turn(&mut self) {
        self.link.service.alive();
        self.take_commands();
        self.answer_waiters();
        if self.detached.is_some() {
            self.link.discard_ring();
            std::thread::sleep(LOOK_MAX);
            return;
        }
        let taken = match self.engine.take_some(&mut self.link, EVENTS_AT_ONCE) {
            Ok(taken) => taken,
            Err(e) => return self.host_failed(&e),
        };
        if self.last_care.elapsed() >= CARE_EVERY {
            self.last_care = Instant::now();
            self.link.probes.forward_log();
            self.note_no_longer();
            self.engine.prune(monotonic_ns().saturating_sub(RECENT_NS));
            if let Err(e) = self.engine.take_losses(&mut self.link) {
                self.host_failed(&e);
            }
        }
        let ring = self.link.probes.ring();
        let filling = ring.used_bytes() > ring.capacity() / 4;
        let look_min = if ring.capacity() < SMALL_RING { LOOK_MIN / 5 } else { LOOK_MIN };
        let wait = if filling { FLUSH_SOON } else { FLUSH_EVERY };
        if self.engine.needs_flush() && self.last_flush.elapsed() >= wait {
            self.flush();
        }
        self.link.release_ring();
        self.look_at_runs();
        if self.held.is_none()
            && let Some(trigger) = self.due()
        {
            self.scheduled(trigger);
        }
        if taken == 0 {
            std::thread::sleep(self.look);
            self.look = (self.look * 2).min(LOOK_MAX);
        } else {
            self.look = look_min;
        }
    }

    fn flush(&mut self) {
        self.last_flush = Instant::now();
        if let Err(e) = self.engine.flush(&mut self.link) {
            self.host_failed(&e);
        }
    }

    /// Past the bound of what is kept for a destination that is away, the stream is given up:
    /// what the group holds has to be copied again by the next agent.
    pub(super) fn host_failed(&mut self, error: &HostError) {
        self.last_error = Some(error.to_string());
        self.failing = Some(error.to_string());
        if matches!(error, HostError::NoRoom(_)) {
            self.note_only(true);
        }
        if matches!(error, HostError::Detached(_)) && self.detached.is_none() {
            self.detached = Some(error.to_string());
            // From here on events are thrown away. Should that not be written down, nothing may
            // be left that a successor would take for complete.
            self.kept.incomplete = true;
            if self.kept.write(&self.options.group).is_err() {
                super::state::State::remove(&self.options.group);
            }
        }
    }

    pub(super) fn checkpoint(
        &mut self,
        tag: String,
        trigger: &'static str,
        stop: Stop,
    ) -> Result<Taken, CheckpointError> {
        if let Some(why) = &self.detached {
            return Err(HostError::Probes(why.clone()).into());
        }
        self.note_no_longer();
        if self.engine.is_noting() {
            let why = self.link.shipper.progress().spool.trouble.unwrap_or_else(|| "memory is full".into());
            return Err(HostError::NoRoom(why).into());
        }
        let wall_ns = wall_ns();
        let request = Request { tag: tag.clone(), trigger, wall_ns, stop };
        let taken = self.engine.checkpoint(&mut self.link, &request);
        self.since.tried = Instant::now();
        match taken {
            Ok(taken) => {
                tracing::debug!(
                    checkpoint = taken.checkpoint.0,
                    tries = taken.tries,
                    stopped = taken.stopped,
                    took_us = taken.took.as_micros(),
                    "checkpoint"
                );
                self.failing = None;
                self.tally.taken += 1;
                self.tally.stopped += u64::from(taken.stopped);
                self.since.checkpoint(&self.engine.stats);
                if self.state == State::Copying {
                    self.state = State::Following;
                }
                if self.marks.len() >= REMEMBERED {
                    self.marks.remove(0);
                }
                let (checkpoint, sequence) = (taken.checkpoint, taken.sequence);
                self.marks.push(Mark { checkpoint, sequence, at: Instant::now(), wall_ns, tag });
                Ok(taken)
            }
            Err(e) => {
                self.last_error = Some(e.to_string());
                self.failing = Some(e.to_string());
                match &e {
                    CheckpointError::CallInFlight { .. } => self.tally.late += 1,
                    CheckpointError::Host(host) => {
                        self.tally.given_up += 1;
                        self.host_failed(host);
                    }
                    CheckpointError::Unsettled { .. }
                    | CheckpointError::Foreign { .. }
                    | CheckpointError::Crossed { .. } => self.tally.given_up += 1,
                }
                Err(e)
            }
        }
    }

    pub(super) fn take_commands(&mut self) {
        while let Ok(inbound) = self.inbound.try_recv() {
            match inbound {
                Inbound::Go { ticket } => {
                    if self.held.as_ref().is_some_and(|h| h.ticket == ticket)
                        && let Some(held) = self.held.take()
                    {
                        self.let_go(held);
                    }
                }
                Inbound::Request { ticket, request, replies } => self.command(ticket, request, replies),
            }
        }
    }

    fn let_go(&mut self, held: Held) {
        use crate::primary::engine::host::Host;
        self.link.go();
        self.state = State::Following;
        let mut waiter = held.waiter;
        waiter.stopped_us = self.link.stops_us.last().copied().unwrap_or(0);
        match self.link.let_go.take() {
            None => self.waiters.push(waiter),
            Some(why) => waiter.replies.send(Reply::failed(
                FailureKind::GivenUp,
                format!(
                    "checkpoint {} stands, but {why}: what your command did meanwhile is not of that instant",
                    waiter.checkpoint
                ),
                "make the command quicker",
            )),
        }
    }

    fn command(&mut self, ticket: Ticket, request: Command, replies: Replies) {
        let millis = Duration::from_millis;
        match request {
            Command::Status => replies.send(Reply::Status(Box::new(self.status()))),
            Command::Checkpoint { tag, wait, timeout_ms } => {
                let deadline = Instant::now() + millis(timeout_ms);
                self.wait_for_manual(tag, Stop::IfNeeded, Awaited::Checkpoint(wait), deadline, replies);
            }
            Command::CheckpointStopped { tag, wait, timeout_ms, limit_ms } => {
                let deadline = Instant::now() + millis(timeout_ms);
                let stand = millis(limit_ms);
                self.link.limits = Limits { reach: STOP_LIMITS.reach.min(stand), stand };
                let waited = Awaited::Checkpoint(wait);
                if let Some(waiter) = self.manual(tag, Stop::Hold, waited, deadline, replies) {
                    self.state = State::Stopped;
                    let reached_us = self.link.reached.as_micros() as u64;
                    waiter.replies.send(Reply::Standing { checkpoint: waiter.checkpoint, reached_us });
                    self.held = Some(Held { ticket, waiter });
                }
            }
            Command::Flush { .. } if self.detached.is_some() => {
                let why = self.detached.clone().unwrap_or_default();
                replies.send(Reply::failed(FailureKind::Failed, why, "end this agent and start again"));
            }
            Command::Flush { timeout_ms } => {
                if let Err(e) = self.engine.drain(&mut self.link) {
                    self.host_failed(&e);
                }
                self.flush();
                self.waiters.push(Waiter {
                    replies,
                    what: Awaited::Flush,
                    checkpoint: self.engine.last_checkpoint(),
                    sequence: self.engine.last_sequence(),
                    deadline: Instant::now() + millis(timeout_ms),
                    stopped_us: 0,
                });
            }
            Command::Verify { timeout_ms } => {
                let deadline = Instant::now() + millis(timeout_ms);
                self.wait_for_manual(String::new(), Stop::IfNeeded, Awaited::Verify, deadline, replies);
            }
            Command::PathAdd { path, timeout_ms } => {
                self.change_paths(&Change::Add(path), millis(timeout_ms), replies);
            }
            Command::PathRemove { path, timeout_ms } => {
                self.change_paths(&Change::Remove(path), millis(timeout_ms), replies);
            }
            Command::Stop { timeout_ms } => self.stop_asked = Some((replies, millis(timeout_ms))),
        }
    }

    /// Why no checkpoint can be taken on demand now.
    pub(super) fn cannot_take(&self) -> Option<Reply> {
        if let Some(why) = &self.detached {
            let hint = "end this agent and start again";
            return Some(Reply::failed(FailureKind::Failed, why.clone(), hint));
        }
        self.held.as_ref().map(|_| {
            Reply::failed(
                FailureKind::Busy,
                "the processes stand for another `checkpoint --stopped`",
                "try again when it has ended",
            )
        })
    }

    /// A checkpoint on demand that somebody waits for.
    pub(super) fn wait_for_manual(
        &mut self,
        tag: String,
        stop: Stop,
        what: Awaited,
        deadline: Instant,
        replies: Replies,
    ) {
        let waiter = self.manual(tag, stop, what, deadline, replies);
        self.waiters.extend(waiter);
    }

    /// A checkpoint on demand; refusals are answered here.
    fn manual(
        &mut self,
        tag: String,
        stop: Stop,
        what: Awaited,
        deadline: Instant,
        replies: Replies,
    ) -> Option<Waiter> {
        if let Some(why) = self.cannot_take() {
            replies.send(why);
            return None;
        }
        match self.checkpoint(tag, "manual", stop) {
            Ok(taken) => Some(Waiter {
                replies,
                what,
                checkpoint: taken.checkpoint,
                sequence: taken.sequence,
                deadline,
                stopped_us: if taken.stopped { self.link.stops_us.last().copied().unwrap_or(0) } else { 0 },
            }),
            Err(e) => {
                replies.send(Reply::failed(
                    FailureKind::GivenUp,
                    e.to_string(),
                    "look at `bfs-agent status`",
                ));
                None
            }
        }
    }

    pub(super) fn answer_waiters(&mut self) {
        if self.waiters.is_empty() {
            return;
        }
        let progress = self.link.shipper.progress();
        let now = Instant::now();
        for waiter in std::mem::take(&mut self.waiters) {
            if !self.answered(&waiter, &progress, now) {
                self.waiters.push(waiter);
            }
        }
    }

    fn answered(&mut self, waiter: &Waiter, progress: &Progress, now: Instant) -> bool {
        let reached = reached(waiter.checkpoint, waiter.sequence, progress);
        let done = match &waiter.what {
            Awaited::Checkpoint(wait) => reached >= Some(*wait),
            Awaited::Flush => progress.durable.sequence >= waiter.sequence,
            Awaited::Verify => reached >= Some(WaitFor::Confirmed),
        };
        if done {
            match (&waiter.what, reached) {
                (Awaited::Checkpoint(_), Some(reached)) => waiter.replies.send(Reply::Checkpoint {
                    checkpoint: waiter.checkpoint,
                    reached,
                    stopped_us: waiter.stopped_us,
                }),
                (Awaited::Verify, _) => self.verify(waiter, now),
                _ => waiter.replies.send(Reply::Flushed {
                    durable: progress.durable.sequence,
                    confirmed: progress.confirmed,
                }),
            }
            return true;
        }
        if let Some(refusal) = &progress.refusal {
            waiter.replies.send(Reply::failed(
                FailureKind::Refused,
                format!("the replayer refuses this agent: {refusal}"),
                "look at `bfs-replayer status`, then start again",
            ));
            return true;
        }
        if now < waiter.deadline {
            return false;
        }
        let so_far = reached.map_or("not durable yet", |r| match r {
            WaitFor::Sealed => "sealed",
            WaitFor::Confirmed => "confirmed",
            WaitFor::Applied => "applied",
        });
        let mut message = format!(
            "checkpoint {} was taken, but was no more than {so_far} within the time",
            waiter.checkpoint
        );
        if let Some(error) = &progress.last_error {
            message.push_str(&format!(" ({error})"));
        }
        waiter.replies.send(Reply::failed(
            FailureKind::Timeout,
            message,
            "it goes on by itself: look at `bfs-agent status`, or give a longer --timeout",
        ));
        true
    }

    /// Compares on a thread of its own.
    fn verify(&self, waiter: &Waiter, now: Instant) {
        let remote = self.link.shipper.remote();
        let replies = waiter.replies.clone();
        let group = self.options.group.clone();
        let filter = self.options.filter.clone();
        let checkpoint = waiter.checkpoint;
        let limit = waiter.deadline.saturating_duration_since(now);
        let walls: Vec<(CheckpointId, i64)> = self.marks.iter().map(|m| (m.checkpoint, m.wall_ns)).collect();
        std::thread::spawn(move || {
            let reply = match remote.manifest(&group, checkpoint, limit) {
                Ok(manifest) => {
                    let wall = walls.iter().find(|w| w.0 == manifest.checkpoint).map(|w| w.1);
                    Reply::Verified(verify::compare(&manifest, wall, &filter))
                }
                Err(e) => Reply::failed(
                    FailureKind::Failed,
                    format!("the backup's list of files: {e}"),
                    "look at `bfs-replayer status`, then try again",
                ),
            };
            replies.send(reply);
        });
    }

    /// The last checkpoint, and the wait for it. Also answers the command that asked for the end.
    pub fn finish(&mut self) -> Ending {
        self.state = State::Ending;
        if let Some(held) = self.held.take() {
            self.let_go(held);
        }
        let asked = self.stop_asked.take();
        let limit = asked.as_ref().map_or(self.options.final_wait, |a| a.1);
        let deadline = Instant::now() + limit;
        let mut why = None;
        let mut taken = self.checkpoint(String::new(), "end", Stop::IfNeeded);
        while let Err(e) = &taken {
            why = Some(e.to_string());
            if Instant::now() >= deadline || self.detached.is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
            taken = self.checkpoint(String::new(), "end", Stop::IfNeeded);
        }
        let checkpoint = self.engine.last_checkpoint();
        let mut ending = Ending { checkpoint, reached: None, why, send_by: None };
        if let Ok(taken) = taken {
            ending = self.wait_end(&taken, deadline);
        }
        self.answer_waiters();
        if let Some((replies, _)) = asked {
            let Ending { checkpoint, reached, send_by, .. } = ending.clone();
            replies.send(Reply::Ended { checkpoint, reached, send_by });
        }
        ending
    }

    fn wait_end(&mut self, taken: &Taken, mut deadline: Instant) -> Ending {
        let (mut confirmed, mut sealing) = (false, false);
        loop {
            let progress = self.link.shipper.progress();
            let reached = reached(taken.checkpoint, taken.sequence, &progress);
            if reached == Some(WaitFor::Confirmed) && !confirmed {
                confirmed = true;
                deadline = deadline.min(Instant::now() + APPLIED_WAIT);
            }
            let over = Instant::now() >= deadline || progress.refusal.is_some();
            // A backup that is slow has its time; then the rest is kept for it.
            if over
                && reached.is_none()
                && !sealing
                && progress.refusal.is_none()
                && self.link.shipper.has_spool()
            {
                sealing = true;
                self.link.shipper.seal();
                deadline = Instant::now() + SEALED_WAIT;
                continue;
            }
            if reached == Some(WaitFor::Applied) || over || (sealing && reached.is_some()) {
                let why = progress.refusal.map(|r| r.to_string()).or(progress.last_error);
                let send_by = (reached == Some(WaitFor::Sealed)).then(|| self.send_by());
                return Ending { checkpoint: taken.checkpoint, reached, why, send_by };
            }
            self.take_commands();
            self.answer_waiters();
            let _ =
                self.link.shipper.wait_change(progress.version, Instant::now() + Duration::from_millis(50));
        }
    }

    /// Ends the capture: nothing is left for a successor.
    pub fn close(mut self) {
        self.link.probes.forward_log();
        let pin_dir = self.link.probes.pin_dir().to_owned();
        if let Err(e) = self.link.probes.unpin() {
            tracing::warn!("cannot remove the probes at {}: {e}", Path::new(&pin_dir).display());
        }
        super::state::State::remove(&self.options.group);
    }
}

/// How far a checkpoint has come.
pub(super) fn reached(checkpoint: CheckpointId, marker: Sequence, progress: &Progress) -> Option<WaitFor> {
    if progress.applied >= checkpoint {
        Some(WaitFor::Applied)
    } else if progress.confirmed >= checkpoint {
        Some(WaitFor::Confirmed)
    } else if progress.sealed >= marker {
        Some(WaitFor::Sealed)
    } else {
        None
    }
}

fn wall_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
