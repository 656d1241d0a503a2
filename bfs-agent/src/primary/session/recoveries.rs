//! `recover`: one file brought back while everything goes on. What takes long is done on a thread; the loop only gives
//! the file its name, with the selected processes standing. No probe tells of that, so it is noted as suspect before,
//! durably, and in no checkpoint yet: should the agent be killed right behind it, the next one reads what stands there.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, Name, Sequence};

use super::commands::Awaited;
use super::mending::Job;
use super::reports::not_replicated;
use super::work::Work;
use crate::generation::{At, Client};
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{FailureKind, Replies, Reply};
use crate::primary::engine::host::Host;
use crate::primary::recover::{self, Place, RecoverError, Staged};

/// One that goes on.
pub(super) struct Recovery {
    path: PathBuf,
    deadline: Instant,
    whom: Whom,
    phase: Phase,
}

impl Recovery {
    /// Nobody waits for it but what a policy says.
    pub(super) fn is_by_policy(&self) -> bool {
        matches!(self.whom, Whom::Policy(_))
    }
}

/// Who wants it.
enum Whom {
    /// A client.
    Client(Replies),
    /// A policy, after it could not be brought back in place.
    Policy(Box<Job>),
}

/// What is waited for.
enum Phase {
    /// The thread that fetches it.
    Fetched(Receiver<Outcome>),
    /// The one that syncs what has its name by now.
    Settled(Receiver<Outcome>),
    /// That the note of it is durable, which is the record with this number, taken in after this checkpoint.
    Noted(Box<Staged>, Sequence, CheckpointId),
}

/// What its thread has come to: or why there is nothing of it.
type Outcome = Result<Box<Staged>, Box<Reply>>;

fn ended(path: &Path) -> Box<Reply> {
    let why = format!("{} may not be brought back: its thread ended", path.display());
    Box::new(Reply::failed(FailureKind::Failed, why, "look at the file, then try again"))
}

fn failed(path: &Path, error: &RecoverError) -> Reply {
    let kind = if matches!(error, RecoverError::Busy(_)) { FailureKind::Busy } else { FailureKind::Failed };
    Reply::failed(kind, format!("{} is not brought back: {error}", path.display()), error.hint())
}

impl Work {
    /// Begins to bring a file back.
    pub(super) fn recover(&mut self, path: PathBuf, at: Option<&str>, limit: Duration, replies: Replies) {
        if let Some(why) = self.cannot_take() {
            return replies.send(why);
        }
        if let Some(other) = &self.recovery {
            let why = format!("{} is being brought back", other.path.display());
            return replies.send(Reply::failed(FailureKind::Busy, why, "try again when that has ended"));
        }
        let Some((root, below)) = self.root_of(&path).filter(|(_, below)| below.file_name().is_some()) else {
            return replies.send(Reply::bad(not_replicated(&path)));
        };
        let place = Place { root: root.into(), below: below.into() };
        let at = at.and_then(|at| at.parse::<At>().ok());
        let connect = self.link.shipper.remote().connector();
        let (group, of) = (self.options.group.clone(), path.clone());
        let (to, from) = mpsc::channel();
        std::thread::spawn(move || {
            let outcome = match Client::open(connect()) {
                Err(e) => {
                    let why = format!("{} is not brought back: {e}", of.display());
                    let hint = "look at `bfs-replayer status`, then try again";
                    Err(Box::new(Reply::failed(FailureKind::Failed, why, hint)))
                }
                Ok(mut client) => match recover::fetch(&mut client, &group, at.as_ref(), &place) {
                    Ok(staged) => Ok(Box::new(staged)),
                    Err(e) => Err(Box::new(failed(&of, &e))),
                },
            };
            // Nobody may wait for it any more; then nothing was changed.
            let _ = to.send(outcome);
        });
        let phase = Phase::Fetched(from);
        let whom = Whom::Client(replies);
        self.recovery = Some(Recovery { path, deadline: Instant::now() + limit, whom, phase });
    }

    /// Begins to bring another file in the place of one that its disk does not take in place.
    pub(super) fn replace(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        let place =
            self.root_of(&job.path).map(|(root, below)| Place { root: root.into(), below: below.into() });
        let (Some(place), None) = (place, &self.recovery) else { return Err(job) };
        self.flush();
        let (group, object, at_least) = (self.options.group.clone(), job.object, self.engine.last_sequence());
        let connect = self.link.shipper.remote().connector();
        let (path, deadline) = (job.path.clone(), Instant::now() + job.policy.time_limit());
        let (to, from) = mpsc::channel();
        let of = path.clone();
        std::thread::spawn(move || {
            let failed =
                |e: &dyn std::fmt::Display| Box::new(Reply::failed(FailureKind::Failed, e.to_string(), ""));
            let fetched = Client::open(connect()).map_err(|e| failed(&e)).and_then(|mut client| {
                let staged = recover::fetch_newest(&mut client, &group, object, at_least, &place);
                staged.map(Box::new).map_err(|e| Box::new(self::failed(&of, &e)))
            });
            // Nobody may wait for it any more; then nothing was changed.
            let _ = to.send(fetched);
        });
        let (whom, phase) = (Whom::Policy(job), Phase::Fetched(from));
        self.recovery = Some(Recovery { path, deadline, whom, phase });
        Ok(())
    }

    fn recovery_failed(&mut self, whom: Whom, why: Reply) {
        match (whom, why) {
            (Whom::Client(replies), why) => replies.send(why),
            (Whom::Policy(job), Reply::Failed { message, .. }) => self.not_replaced(*job, &message),
            (Whom::Policy(job), _) => self.not_replaced(*job, "it did not come about"),
        }
    }

    /// Goes on with what is being brought back.
    pub(super) fn tend_recovery(&mut self) {
        let Some(recovery) = self.recovery.take() else { return };
        let Recovery { path, deadline, whom, phase } = recovery;
        let by_policy = matches!(whom, Whom::Policy(_));
        let next = match phase {
            Phase::Fetched(from) => match from.try_recv() {
                Ok(Ok(staged)) => self.note(&path, staged, by_policy),
                Ok(Err(why)) => Err(why),
                Err(TryRecvError::Empty) => Ok(Phase::Fetched(from)),
                Err(TryRecvError::Disconnected) => Err(ended(&path)),
            },
            Phase::Settled(from) => match from.try_recv() {
                Ok(Ok(staged)) => {
                    let replies = match whom {
                        Whom::Policy(job) => return self.recovered(*job, Some(staged.size)),
                        Whom::Client(replies) => replies,
                    };
                    let checkpoint = staged.checkpoint.unwrap_or_default();
                    let what = Awaited::Recovery { checkpoint, bytes: staged.size };
                    let rest = deadline.saturating_duration_since(Instant::now());
                    return self.wait_for_records(what, rest, replies);
                }
                Ok(Err(why)) => Err(why),
                Err(TryRecvError::Empty) => Ok(Phase::Settled(from)),
                Err(TryRecvError::Disconnected) => Err(ended(&path)),
            },
            // A checkpoint came in between, which has what stood there: from then on the note counts no more.
            Phase::Noted(staged, _, before) if self.engine.last_checkpoint() != before => {
                self.note(&path, staged, by_policy)
            }
            Phase::Noted(staged, note, _) if self.link.progress().sealed >= note => {
                self.exchange(&path, staged, by_policy)
            }
            noted @ Phase::Noted(..) => Ok(noted),
        };
        match next {
            Err(why) => self.recovery_failed(whom, *why),
            Ok(Phase::Fetched(_) | Phase::Noted(..)) if Instant::now() >= deadline => {
                let why = format!("{} was not brought back within the time", path.display());
                let hint = "look at `bfs-replayer status`, or give a longer --timeout";
                self.recovery_failed(whom, Reply::failed(FailureKind::Timeout, why, hint));
            }
            Ok(phase) => self.recovery = Some(Recovery { path, deadline, whom, phase }),
        }
    }

    /// Says in the stream that what stands there is suspect.
    fn note(&mut self, path: &Path, staged: Box<Staged>, by_policy: bool) -> Result<Phase, Box<Reply>> {
        self.drain();
        self.suspect_place(path, by_policy)?;
        self.flush();
        Ok(Phase::Noted(staged, self.engine.last_sequence(), self.engine.last_checkpoint()))
    }

    fn suspect_place(&mut self, path: &Path, by_policy: bool) -> Result<(), Box<Reply>> {
        if !by_policy {
            return self.suspect_path(path, None, true).map_err(|bad| Box::new(Reply::bad(bad)));
        }
        // Only the name: the file that has it now cannot be read, and nothing would come of it for as long as it has.
        let model = self.engine.model();
        let name = path.file_name().and_then(|name| Name::new(name.as_bytes()));
        if let (Some(directory), Some(name)) = (path.parent().and_then(|above| model.at_path(above)), name) {
            self.engine.suspect_name(directory, &name, false, monotonic_ns());
        }
        Ok(())
    }

    /// Gives it its name. Whatever comes of it: the next checkpoint reads what stands there.
    fn exchange(&mut self, path: &Path, staged: Box<Staged>, by_policy: bool) -> Result<Phase, Box<Reply>> {
        if let Some(why) = self.cannot_take() {
            return Err(Box::new(why));
        }
        // With --everyone there is nobody to stop: who opens it in just that moment has the old one.
        let stands = self.link.stopper.is_some();
        if stands && let Err(e) = self.link.stop() {
            return Err(Box::new(Reply::failed(FailureKind::GivenUp, e.to_string(), "try again")));
        }
        let done = staged.exchange();
        if stands {
            self.link.go();
        }
        self.drain();
        let noted = self.suspect_place(path, by_policy);
        done.map_err(|e| Box::new(failed(path, &e)))?;
        noted?;
        let (to, from) = mpsc::channel();
        let path = path.to_owned();
        std::thread::spawn(move || {
            let settled = staged.settle();
            let _ = to.send(match settled {
                Ok(()) => Ok(staged),
                Err(e) => {
                    let why = format!("{} is brought back, but a power cut may undo it: {e}", path.display());
                    Err(Box::new(Reply::failed(FailureKind::Failed, why, e.hint())))
                }
            });
        });
        Ok(Phase::Settled(from))
    }
}
