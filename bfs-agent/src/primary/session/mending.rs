//! Files that come back by themselves, or because a program asked for what was captured last: policies of the recovery
//! classes `automatic` and `request`. One after the other; what takes long is done on a thread (see `mend`).
//!
//! What comes back is what the stream has, so nothing of it is news, and capture takes no notice of what this process
//! writes. The next checkpoint reads it all the same.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use bfs_common::abi::{EventHeader, FailedEvent, InodeId, Plain, counter, kind};
use bfs_common::record::{FileKind, ObjectId};

use super::recoveries::Recovery as Replacing;
use super::reports::not_replicated;
use super::work::Work;
use crate::policy::{Policy, Recovery};
use crate::primary::capture::CaptureError;
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{BadRequest, FailureKind, RecoveryStatus, Replies, Reply};
use crate::primary::engine::host::{Host, HostError};
use crate::primary::failure::NOT_RECOVERED_HINT;
use crate::primary::mend::{self, Asked, Found, MendError, Mode, Standing};

/// How long is waited before the next try; each time twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Errors of a file are told again so long after they were of no use: nothing is to be done by it, or nothing helped.
const TOLD_AGAIN: Duration = Duration::from_secs(1);
const TOLD_AGAIN_FAILED: Duration = Duration::from_secs(60);
/// A file that comes back more often within an hour has a disk that keeps nothing.
const AN_HOUR_MAX: usize = 12;
const HOUR: Duration = Duration::from_secs(3600);
/// Files that wait for their turn.
const WAITING_MAX: usize = 1024;
/// Failures that are shown.
const TROUBLES_MAX: usize = 64;

/// An error of the disk in a record of the ring, if it is one.
pub(super) fn told(record: &[u8]) -> Option<FailedEvent> {
    let of = std::mem::offset_of!(EventHeader, kind);
    let is_one = record.get(of..of + 2) == Some(kind::FAILED.to_ne_bytes().as_slice());
    is_one.then(|| FailedEvent::read_from(record)).flatten()
}

/// Why a try came to nothing.
#[derive(Debug, thiserror::Error)]
enum TryError {
    #[error(transparent)]
    Mend(#[from] MendError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("it has come back {AN_HOUR_MAX} times within an hour: its disk does not keep it")]
    TooOften,
    #[error("cannot note in /run/bfs that it is brought back: {0}")]
    Note(std::io::Error),
    #[error("it was written to all the time")]
    Busy,
    #[error("it is not there any more")]
    Gone,
    #[error("its thread ended")]
    Ended,
}

/// A file that is to come back.
pub(super) struct Job {
    inode: InodeId,
    pub(super) object: ObjectId,
    pub(super) path: PathBuf,
    pub(super) policy: Policy,
    mode: Mode,
    /// Why, in words.
    why: String,
    tries: u32,
    again: Option<Instant>,
    written: u64,
    /// Why not in place.
    failed: Option<String>,
    client: Option<Replies>,
}

impl Job {
    fn new(known: (InodeId, ObjectId), path: PathBuf, policy: Policy, mode: Mode, why: String) -> Self {
        let (inode, object) = known;
        Self {
            inode,
            object,
            path,
            policy,
            mode,
            why,
            tries: 0,
            again: None,
            written: 0,
            failed: None,
            client: None,
        }
    }
}

/// Where a try is.
enum Phase {
    /// It waits for its next try.
    Waiting,
    Looking(Receiver<Result<Found, MendError>>, Arc<File>, Instant),
    Syncing(Receiver<Result<Found, MendError>>, Instant),
}

/// All of it.
#[derive(Default)]
pub(super) struct Mending {
    waiting: VecDeque<Job>,
    current: Option<(Job, Phase)>,
    came_back: HashMap<ObjectId, VecDeque<Instant>>,
    /// Files of which errors are to be told again, and when.
    tell_again: Vec<(InodeId, Instant)>,
    troubles: BTreeMap<PathBuf, String>,
    recovered: u64,
    failures: u64,
}

impl Mending {
    /// Whether something is to be done yet.
    pub(super) fn is_busy(&self) -> bool {
        self.current.is_some() || !self.waiting.is_empty()
    }

    /// What did not come back, each with entry, action and reason.
    pub(super) fn troubles(&self) -> Vec<String> {
        self.troubles.values().cloned().collect()
    }

    fn has(&self, object: ObjectId) -> bool {
        let current = self.current.iter().map(|(job, _)| job);
        current.chain(&self.waiting).any(|job| job.object == object)
    }
}

impl Work {
    /// How recoveries stand.
    pub(super) fn recovery_status(&self) -> RecoveryStatus {
        let lost = self.link.probes.counters().map_or(0, |counters| counters.get(counter::FAILED_LOST));
        RecoveryStatus {
            recovered: self.mending.recovered,
            failures: self.mending.failures,
            waiting: (self.mending.waiting.len() + usize::from(self.mending.current.is_some())) as u64,
            not_told: lost,
            troubles: self.mending.troubles(),
        }
    }

    /// A program wants to have what was captured last of a file.
    pub(super) fn recover_newest(&mut self, path: &Path, limit: Duration, replies: Replies) {
        let bad = |why: String, hint: &str| Reply::bad(BadRequest::field("path", why, hint));
        // A file that was just made is known by what was captured of that.
        self.drain();
        let model = self.engine.model();
        let Some((_, _)) = self.root_of(path) else {
            return replies.send(Reply::bad(not_replicated(path)));
        };
        let found = model.at_path(path).and_then(|object| Some((object, model.get(object)?)));
        let Some((object, known)) = found.filter(|(_, known)| known.kind == FileKind::Regular) else {
            let why = format!("{} is no file that stands there", path.display());
            return replies.send(bad(why, "recover it from a checkpoint: leave `at` out, or say which"));
        };
        let inode = known.inode;
        let policy = self.policies.table().holds(path).filter(|policy| !policy.suspended).cloned();
        let Some(mut policy) = policy.filter(|policy| policy.recovery != Recovery::Manual) else {
            let why = format!("no policy says that {} comes back on request", path.display());
            let hint = "add a policy with the recovery `request`, or recover it from a checkpoint";
            return replies.send(bad(why, hint));
        };
        if self.mending.has(object) || self.mending.waiting.len() >= WAITING_MAX {
            let why = format!("{} is being brought back", path.display());
            return replies.send(Reply::failed(FailureKind::Busy, why, "try again when that has ended"));
        }
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        policy.time_limit_ms = policy.time_limit_ms.min(limit_ms.max(1));
        let job = Job::new((inode, object), path.into(), policy, Mode::All, "it was asked for".into());
        self.mending.waiting.push_back(Job { client: Some(replies), ..job });
    }

    /// Takes in what the probes told, and goes on with what is to come back.
    pub(super) fn tend_mending(&mut self) {
        for event in std::mem::take(&mut self.link.failed) {
            self.take_failed(&event);
        }
        if !self.mending.tell_again.is_empty() {
            let now = Instant::now();
            let mut left = std::mem::take(&mut self.mending.tell_again);
            left.retain(|(inode, when)| *when > now || self.link.probes.tell_again(*inode).is_err());
            self.mending.tell_again = left;
        }
        let Some((job, phase)) = self.mending.current.take() else {
            if let Some(job) = self.mending.waiting.pop_front() {
                self.mending.current = Some((job, Phase::Waiting));
            }
            return;
        };
        self.mending.current = self.step_mending(job, phase);
    }

    /// A selected process saw an error of the disk.
    fn take_failed(&mut self, event: &FailedEvent) {
        let error = std::io::Error::from_raw_os_error(i32::try_from(-event.header.ret).unwrap_or(0));
        let (call, tid) = (event.header.nr, event.header.tid);
        let why = format!("system call {call} of thread {tid} saw: {error}");
        self.file_failed(event.id, Mode::Lost { written: !is_read(call) }, why);
    }

    /// The agent before this one was told of errors, and died. Nobody is told of these files again, and of a sync that
    /// failed there is no other sign: so it is seen to now.
    pub(super) fn take_told(&mut self) -> Result<(), CaptureError> {
        for inode in self.link.probes.told()? {
            let why = "the agent before was told of an error of the disk".to_owned();
            self.file_failed(inode, Mode::Lost { written: true }, why);
        }
        Ok(())
    }

    /// A file comes back, if its policy says so; else its next error is told.
    fn file_failed(&mut self, inode: InodeId, mode: Mode, why: String) {
        let again = (inode, Instant::now() + TOLD_AGAIN);
        let model = self.engine.model();
        let found = model.find(inode).and_then(|object| {
            let held = |path: PathBuf| {
                let policy = self.policies.table().holds(&path).filter(|policy| !policy.suspended)?;
                (policy.recovery == Recovery::Automatic).then(|| (object, path, policy.clone()))
            };
            model.paths(object).into_iter().find_map(held)
        });
        let Some((object, path, policy)) = found else {
            return self.mending.tell_again.push(again);
        };
        if self.mending.has(object) || self.mending.waiting.len() >= WAITING_MAX {
            return self.mending.tell_again.push(again);
        }
        tracing::warn!("group {}: {}: {why}", self.options.group, path.display());
        self.mending.waiting.push_back(Job::new((inode, object), path, policy, mode, why));
    }

    /// Goes on with a file; nothing when it is done with.
    fn step_mending(&mut self, mut job: Job, phase: Phase) -> Option<(Job, Phase)> {
        let next = match phase {
            Phase::Waiting if job.again.is_some_and(|again| again > Instant::now()) => Ok(Phase::Waiting),
            // What it reads would not be of one instant with what is there, or nobody can stand.
            Phase::Waiting if self.held.is_some() || self.recovery.is_some() => Ok(Phase::Waiting),
            Phase::Waiting => self.begin_try(&job),
            Phase::Looking(from, file, limit) => match from.try_recv() {
                Ok(Ok(_)) if Instant::now() >= limit => Err(MendError::Late.into()),
                Ok(Ok(found)) => self.write_found(&mut job, found, file, limit),
                Ok(Err(error)) => Err(error.into()),
                // Its thread comes to an end by itself, and nobody listens to it then.
                Err(TryRecvError::Empty) if Instant::now() >= limit => Err(MendError::Late.into()),
                Err(TryRecvError::Empty) => Ok(Phase::Looking(from, file, limit)),
                Err(TryRecvError::Disconnected) => Err(TryError::Ended),
            },
            Phase::Syncing(from, limit) => match from.try_recv() {
                Ok(Ok(found)) if found.more => {
                    self.came_back(&job, &found);
                    self.begin_try(&job)
                }
                Ok(Ok(found)) => {
                    self.came_back(&job, &found);
                    self.recovered(job, found.size());
                    return None;
                }
                Ok(Err(error)) => Err(error.into()),
                Err(TryRecvError::Empty) if Instant::now() >= limit => Err(MendError::Late.into()),
                Err(TryRecvError::Empty) => Ok(Phase::Syncing(from, limit)),
                Err(TryRecvError::Disconnected) => Err(TryError::Ended),
            },
        };
        match next {
            Ok(phase) => Some((job, phase)),
            Err(error) => self.try_failed(job, &error),
        }
    }

    /// Begins a try.
    fn begin_try(&mut self, job: &Job) -> Result<Phase, TryError> {
        let since = |times: &VecDeque<Instant>| times.iter().filter(|at| at.elapsed() < HOUR).count();
        if job.client.is_none()
            && self.mending.came_back.get(&job.object).is_some_and(|times| since(times) >= AN_HOUR_MAX)
        {
            return Err(TryError::TooOften);
        }
        let file = Arc::new(self.link.reader.open_to_mend(job.inode)?.ok_or(TryError::Gone)?);
        // Should this agent be killed in between, the next one looks at its times.
        self.kept.mending = Some(job.object);
        self.kept.write(&self.options.group).map_err(TryError::Note)?;
        // What the stream does not have yet, as far as it can be read; then what changes from here on is noted.
        self.take_runs();
        self.drain();
        self.engine.watch(job.object);
        match self.engine.read_now(job.object, &mut self.link) {
            Ok(true) => {}
            Ok(false) => tracing::debug!("{} is not settled", job.path.display()),
            Err(e) => tracing::warn!("{}: some of it was not captured yet: {e}", job.path.display()),
        }
        self.flush();
        let limit = Instant::now() + job.policy.time_limit();
        let asked = Asked {
            group: self.options.group.clone(),
            object: job.object,
            at_least: self.engine.last_sequence(),
            limit,
        };
        let connect = self.link.shipper.remote().connector();
        let (to, from) = mpsc::channel();
        let (of, mode) = (Arc::clone(&file), job.mode);
        std::thread::spawn(move || {
            // Nobody may wait for it any more; then nothing was changed.
            let _ = to.send(mend::look(&of, &asked, &connect, mode));
        });
        Ok(Phase::Looking(from, file, limit))
    }

    /// It is known what to write: it is written, while nobody who is selected runs.
    fn write_found(
        &mut self,
        job: &mut Job,
        found: Found,
        file: Arc<File>,
        limit: Instant,
    ) -> Result<Phase, TryError> {
        if !found.is_idle(job.mode) || found.more {
            let stands = self.link.stopper.is_some();
            if stands {
                self.link.stop()?;
            }
            let done = self.write_lost(job, &found, &file);
            if stands {
                self.link.go();
            }
            match done {
                Ok(written) => job.written += written,
                // What came there meanwhile is newer than what was asked for.
                Err(TryError::Busy) if Instant::now() < limit => return self.begin_try(job),
                Err(error) => return Err(error),
            }
        }
        let (to, from) = mpsc::channel();
        std::thread::spawn(move || {
            let synced = mend::sync(&file, &found, limit);
            let _ = to.send(synced.map(|()| found));
        });
        Ok(Phase::Syncing(from, limit))
    }

    fn write_lost(&mut self, job: &Job, found: &Found, file: &File) -> Result<u64, TryError> {
        // Writes that were going on have their record now.
        let taken = self.engine.take_runs(&mut self.link);
        self.link.join_writes();
        taken?;
        let changed = self.engine.has_changed_at_all();
        // Of what is asked for anything may be meant: then nothing of it may have changed.
        if job.mode == Mode::All && changed || found.ranges().any(|range| self.engine.has_changed(&range)) {
            return Err(TryError::Busy);
        }
        let others = super::foreign::writers(&self.link)?.iter().any(|(inode, _)| *inode == job.inode);
        Ok(mend::rewrite(file, found, job.mode, Standing { changed, others })?)
    }

    /// What was written is read again for the next checkpoint.
    fn came_back(&mut self, job: &Job, found: &Found) {
        let ranges: Vec<(u64, u64)> = found.ranges().map(|range| (range.start, range.end)).collect();
        self.engine.suspect_ranges(job.object, &ranges, monotonic_ns());
    }

    /// It came back.
    pub(super) fn recovered(&mut self, job: Job, size: Option<u64>) {
        self.engine.watch_nothing();
        // Should that not be written, one look too many is made.
        self.kept.mending = None;
        let _ = self.kept.write(&self.options.group);
        self.mending.recovered += 1;
        self.mending.troubles.remove(&job.path);
        let now = Instant::now();
        self.mending.came_back.retain(|_, times| {
            times.retain(|at| at.elapsed() < HOUR);
            !times.is_empty()
        });
        self.mending.came_back.entry(job.object).or_default().push_back(now);
        self.mending.tell_again.push((job.inode, now));
        let (path, written) = (job.path.display(), job.written);
        tracing::info!("group {}: {path} is brought back, {written} bytes: {}", self.options.group, job.why);
        if let Some(replies) = job.client {
            replies.send(Reply::BroughtBack { bytes: size.unwrap_or_default(), written });
        }
    }

    fn try_failed(&mut self, mut job: Job, error: &TryError) -> Option<(Job, Phase)> {
        self.engine.watch_nothing();
        self.engine.suspect_ranges(job.object, &[], monotonic_ns());
        if matches!(error, TryError::Gone) && job.client.is_none() {
            return None;
        }
        job.tries += 1;
        let is_final = matches!(error, TryError::TooOften | TryError::Gone);
        if job.tries <= job.policy.retries && !is_final && self.detached.is_none() {
            let pause = PAUSE_MIN * 2u32.saturating_pow(job.tries - 1).min(1 << 10);
            tracing::debug!("{}: {error}; it is tried again", job.path.display());
            job.again = Some(Instant::now() + pause);
            return Some((job, Phase::Waiting));
        }
        let reason = error.to_string();
        // The disk does not take it: another file is made of it elsewhere there, if nobody has this one open.
        if matches!(error, TryError::Mend(MendError::Disk { .. } | MendError::NeedsClose)) {
            job.failed = Some(reason);
            match self.replace(Box::new(job)) {
                Ok(()) => return None,
                Err(back) => job = *back,
            }
        }
        let reason = job.failed.take().unwrap_or_else(|| error.to_string());
        self.not_recovered(job, &reason);
        None
    }

    /// No other file came in its place either.
    pub(super) fn not_replaced(&mut self, mut job: Job, why: &str) {
        let first = job.failed.take().unwrap_or_default();
        self.not_recovered(job, &format!("{first}; and another file in its place: {why}"));
    }

    fn not_recovered(&mut self, job: Job, reason: &str) {
        let (pattern, path) = (&job.policy.pattern, job.path.display());
        let text = format!(
            "policy {pattern:?}, recovery of {path}: {reason}; tried {} times, because {}",
            job.tries, job.why
        );
        tracing::error!("group {}: {text}", self.options.group);
        self.mending.failures += 1;
        self.last_error = Some(text.clone());
        self.mending.tell_again.push((job.inode, Instant::now() + TOLD_AGAIN_FAILED));
        match job.client {
            Some(replies) => {
                replies.send(Reply::failed(FailureKind::Failed, text, NOT_RECOVERED_HINT));
            }
            None => {
                self.mending.troubles.insert(job.path, text);
                if self.mending.troubles.len() > TROUBLES_MAX {
                    self.mending.troubles.pop_first();
                }
            }
        }
    }

    /// Lets end what is being brought back, for a time.
    pub(super) fn finish_mending(&mut self, deadline: Instant) {
        let replaces = |work: &Self| work.recovery.as_ref().is_some_and(Replacing::is_by_policy);
        while (self.mending.is_busy() || replaces(self))
            && self.detached.is_none()
            && Instant::now() < deadline
        {
            self.capture();
        }
    }
}

/// Whether a call that saw an error only reads: `read` `pread64` `readv` `sendfile` `preadv` `preadv2`. One that copies
/// within the kernel may have seen it at either side.
fn is_read(call: u32) -> bool {
    matches!(call, 0 | 17 | 19 | 40 | 295 | 327)
}
