//! A session at work: one loop that takes in events, ships, takes checkpoints when they are due,
//! and looks at commands.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, Epoch, Sequence};
use bfs_common::wire::Refusal;

use super::SessionOptions;
use super::alerts::Alerting;
use super::commands::{Held, Waiter, reached};
use super::comparing::Comparisons;
use super::hooks::Hooks;
use super::link::Link;
use super::mending::Mending;
use super::recoveries::Recovery;
use super::switching::{StopAsked, Switching};
use super::triggers::Since;
use super::watching::Watch;
use crate::backup::ReplayerHandle;
use crate::generation::wall_ns;
use crate::net::Scrape;
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{self, Inbound, Replies, Reply, State, WaitFor};
use crate::primary::engine::host::HostError;
use crate::primary::engine::{CheckpointError, Engine, RECENT_NS, Request, Stop, Taken};
use crate::primary::images::Images;
use crate::primary::policies::Policies;
use crate::primary::ship::Progress;

/// Records wait at most this long for their batch, unless a checkpoint or a command comes: each batch is
/// a sync at the replayer, maybe on the disk that the program works on.
pub(super) const FLUSH_EVERY: Duration = Duration::from_millis(100);
/// The same while the ring fills up: its room comes back only when what it held is durable.
const FLUSH_SOON: Duration = Duration::from_millis(10);
/// How often is looked at what was lost, and forgotten what is old.
const CARE_EVERY: Duration = Duration::from_millis(200);
/// How often files with followers are read, where there are any.
const FOLLOW_EVERY: Duration = Duration::from_millis(50);
/// How long the end of `run` waits for the backup's files once the checkpoint is confirmed.
const APPLIED_WAIT: Duration = Duration::from_secs(10);
/// How long it waits for the spool, where that is to keep what the backup did not take in time.
const SEALED_WAIT: Duration = Duration::from_secs(10);
/// Events that are taken in before the loop looks at anything else.
pub(super) const EVENTS_AT_ONCE: usize = 4096;
/// Between two looks at an empty ring of the usual size; a small one is full sooner.
const LOOK_MIN: Duration = Duration::from_millis(1);
/// A ring that is smaller than this is small.
const SMALL_RING: u64 = 16 << 20;
/// See [`LOOK_MIN`]; when nothing happens for long. Each look costs some 100 us, nearly all of it for waking up: 25 ms leave
/// an idle agent at about half a percent of a CPU, and in 25 ms no program fills a ring of the usual size. A command does not
/// wait for it.
const LOOK_MAX: Duration = Duration::from_millis(25);
/// The same for a small ring, and while somebody waits for a checkpoint.
const LOOK_MAX_SOON: Duration = Duration::from_millis(4);
/// Most recent checkpoints whose instant and tag are remembered.
const REMEMBERED: usize = 4096;

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
    /// The backup was promoted: what the replayer says.
    pub fenced: Option<Refusal>,
    /// Files that did not come back, each with entry, action and reason.
    pub not_recovered: Vec<String>,
}

/// What lives as long as a session.
pub struct Beside {
    /// Answers monitors.
    pub _scrape: Option<Scrape>,
    /// The replayer of a `dir:` destination.
    pub _local: Option<Arc<ReplayerHandle>>,
}

/// A session at work.
pub struct Work {
    pub(super) options: SessionOptions,
    pub(super) policies: Policies,
    _server: control::Server,
    pub(super) inbound: mpsc::Receiver<Inbound>,
    /// A command that ended a pause.
    pub(super) woke: Option<Inbound>,
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
    pub(super) waiters: Vec<Waiter>,
    pub(super) held: Option<Held>,
    pub(super) hooks: Hooks,
    pub(super) alerting: Alerting,
    /// How the backup stands.
    pub(super) watch: Watch,
    /// When that was looked at.
    pub(super) watched: Option<Instant>,
    /// Differences that the last comparison found.
    pub(super) differences: u64,
    /// When the backup was last seen to have all there is; the start of the session, if it never was.
    had_all: Instant,
    last_flush: Instant,
    last_care: Instant,
    last_followed: Instant,
    pub(super) since: Since,
    look: Duration,
    pub(super) stop_asked: Option<StopAsked>,
    /// Somebody waits for the end of the program.
    pub(super) switching: Option<Switching>,
    pub(super) comparisons: Comparisons,
    pub(super) recovery: Option<Recovery>,
    pub(super) mending: Mending,
    /// Process state, where it is wanted.
    pub(super) images: Option<Images>,
    /// Somebody wants to go back with the processes, to this checkpoint.
    pub(super) go_back_asked: Option<(Replies, Option<String>)>,
    /// When the command was restored.
    pub(super) restarted: Vec<Instant>,
    _beside: Beside,
}

impl Work {
    #[allow(clippy::too_many_arguments, reason = "the parts that a session is made of, once")]
    pub(super) fn new(
        options: SessionOptions,
        policies: Policies,
        server: control::Server,
        inbound: mpsc::Receiver<Inbound>,
        engine: Engine,
        link: Link,
        epoch: Epoch,
        kept: super::state::State,
        beside: Beside,
    ) -> Self {
        let now = Instant::now();
        let since = Since::new(now, &options.schedule);
        Self {
            options,
            policies,
            _server: server,
            inbound,
            woke: None,
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
            hooks: Hooks::default(),
            alerting: Alerting::default(),
            watch: Watch::new(wall_ns()),
            watched: None,
            differences: 0,
            had_all: now,
            last_flush: now,
            last_care: now,
            last_followed: now,
            since,
            look: LOOK_MIN,
            stop_asked: None,
            switching: None,
            comparisons: Comparisons::new(),
            recovery: None,
            mending: Mending::default(),
            images: None,
            go_back_asked: None,
            restarted: Vec::new(),
            _beside: beside,
        }
    }

    /// Works until `ended` says so or a command asks to stop. The first checkpoint is the first
    /// copy. `ended` hears whether a switchover is under way, which waits itself until nobody is left.
    pub fn follow(&mut self, mut ended: impl FnMut(bool) -> bool) {
        // Short pauses are meant as they are said: the default slack is 50 us (prctl(2)).
        // SAFETY: sets a number of this thread, touches no memory.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000 as libc::c_ulong, 0, 0, 0) };
        self.say_policies();
        if self.tally.taken == 0 {
            self.scheduled("start");
        }
        let mut looked = Instant::now();
        while self.stop_asked.is_none() && self.go_back_asked.is_none() {
            if looked.elapsed() >= Duration::from_millis(5) {
                looked = Instant::now();
                if ended(self.switching.is_some()) {
                    break;
                }
            }
            self.turn();
        }
    }

    /// One turn of the loop.
    pub(super) fn turn(&mut self) {
        self.tend_hooks();
        self.tend_watch();
        self.tend_alerts();
        self.tend_switching();
        self.capture();
        if self.detached.is_none()
            && let Some(trigger) = self.due()
        {
            self.scheduled(trigger);
        }
    }

    /// The last checkpoint is confirmed, and nothing changed since.
    fn has_all(&self, progress: &Progress) -> bool {
        progress.confirmed >= self.engine.last_checkpoint() && self.nothing_new()
    }

    /// How far the backup is behind: for how long there has been something that no confirmed checkpoint has.
    pub(super) fn lag(&self, progress: &Progress) -> Duration {
        if self.has_all(progress) {
            return Duration::ZERO;
        }
        let confirmed = self.marks.iter().rev().find(|mark| mark.checkpoint == progress.confirmed);
        confirmed.map_or(self.had_all, |mark| mark.at.max(self.had_all)).elapsed()
    }

    /// How many differences the last comparison found, if any.
    pub(super) fn differences(&self) -> Option<u64> {
        Some(self.differences).filter(|found| *found > 0)
    }

    /// Takes in what is there, and answers who asks.
    pub(super) fn capture(&mut self) {
        self.link.service.alive();
        self.take_commands();
        self.answer_waiters();
        self.take_compared();
        self.tend_recovery();
        self.tend_mending();
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
            self.ask_for_damage();
            if self.has_all(&self.link.progress()) {
                self.had_all = Instant::now();
            }
            self.engine.prune(monotonic_ns().saturating_sub(RECENT_NS));
            if let Err(e) = self.engine.take_losses(&mut self.link) {
                self.host_failed(&e);
            }
        }
        let ring = self.link.probes.ring();
        let filling = ring.used_bytes() > ring.capacity() / 4;
        let small = ring.capacity() < SMALL_RING;
        let (look_min, look_max) = if small { (LOOK_MIN / 5, LOOK_MAX_SOON) } else { (LOOK_MIN, LOOK_MAX) };
        let wait = if filling { FLUSH_SOON } else { FLUSH_EVERY };
        if self.engine.needs_flush() && self.last_flush.elapsed() >= wait {
            self.flush();
        }
        if self.last_followed.elapsed() >= FOLLOW_EVERY {
            self.last_followed = Instant::now();
            self.tend_followers();
        }
        self.link.release_ring();
        self.look_at_runs();
        if taken == 0 {
            // Who waits is told soon.
            self.rest(if self.waiters.is_empty() { self.look } else { self.look.min(LOOK_MAX_SOON) });
            self.look = (self.look * 2).min(look_max);
        } else {
            self.look = look_min;
        }
    }

    /// Nothing is to be done for so long, but what is asked for.
    fn rest(&mut self, time: Duration) {
        match self.inbound.recv_timeout(time) {
            Ok(inbound) => self.woke = Some(inbound),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => std::thread::sleep(time),
        }
    }

    pub(super) fn flush(&mut self) {
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
            let why = self.link.progress().spool.trouble.unwrap_or_else(|| "memory is full".into());
            return Err(HostError::NoRoom(why).into());
        }
        let wall_ns = wall_ns();
        let with_images = self.takes_images(stop, trigger);
        let held = if with_images { Stop::Hold } else { stop };
        let request = Request { tag: tag.clone(), trigger, wall_ns, stop: held };
        let went_on = self.link.went_on();
        let taken = if with_images {
            self.checkpoint_with_images(&request, stop)
        } else {
            self.engine.checkpoint(&mut self.link, &request)
        };
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
                self.link.reader.keep(|dev| self.engine.model().is_device_of_roots(dev));
                self.tally.taken += 1;
                self.tally.stopped += u64::from(taken.stopped);
                self.since.checkpoint(&taken, went_on);
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
                    | CheckpointError::Processes(_)
                    | CheckpointError::Foreign { .. }
                    | CheckpointError::Crossed { .. } => self.tally.given_up += 1,
                }
                Err(e)
            }
        }
    }

    /// The last checkpoint, and the wait for it. Also answers the command that asked for the end.
    pub fn finish(&mut self) -> Ending {
        self.state = State::Ending;
        if let Some(held) = self.held.take() {
            self.let_go(held);
        }
        self.end_hooks();
        if let Some(switching) = self.switching.take() {
            switching.give_up(
                "the agent was told to end before all processes had",
                "end them, then promote the backup",
            );
        }
        let asked = self.stop_asked.take();
        let switches = asked.as_ref().is_some_and(|asked| asked.switches);
        let limit = asked.as_ref().map_or(self.options.final_wait, |asked| asked.limit);
        let deadline = Instant::now() + limit;
        self.finish_mending(deadline);
        let taken = self.with_hooks("end", |work| work.take_last(deadline));
        let ending = match taken {
            Ok(taken) => self.wait_end(&taken, deadline, switches),
            Err(why) => {
                let checkpoint = self.engine.last_checkpoint();
                let fenced = self.fenced_by();
                let not_recovered = self.mending.troubles();
                Ending { checkpoint, reached: None, why: Some(why), send_by: None, fenced, not_recovered }
            }
        };
        self.answer_waiters();
        if let Some(StopAsked { replies, .. }) = asked {
            let Ending { checkpoint, reached, send_by, not_recovered, .. } = ending.clone();
            replies.send(Reply::Ended { checkpoint, reached, send_by, not_recovered });
        }
        ending
    }

    fn fenced_by(&self) -> Option<Refusal> {
        let refusal = self.link.progress().refusal;
        refusal.filter(|refusal| matches!(refusal, Refusal::Promoted { .. }))
    }

    fn take_last(&mut self, deadline: Instant) -> Result<Taken, String> {
        loop {
            match self.checkpoint(String::new(), "end", Stop::IfNeeded) {
                Ok(taken) => return Ok(taken),
                Err(e) if Instant::now() >= deadline || self.detached.is_some() => return Err(e.to_string()),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// `switches`: the first destination is to be the primary.
    fn wait_end(&mut self, taken: &Taken, mut deadline: Instant, switches: bool) -> Ending {
        let (mut confirmed, mut sealing) = (false, false);
        loop {
            let progress = if switches { self.link.shipper.progress() } else { self.link.progress() };
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
                let fenced = self.fenced_by();
                let send_by = (reached == Some(WaitFor::Sealed) && fenced.is_none()).then(|| self.send_by());
                let (checkpoint, not_recovered) = (taken.checkpoint, self.mending.troubles());
                return Ending { checkpoint, reached, why, send_by, fenced, not_recovered };
            }
            self.take_commands();
            self.answer_waiters();
            self.take_compared();
            self.link.release_ring();
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
