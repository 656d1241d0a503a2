//! Going back with the processes: what is left of them is ended, the files are brought back, the processes are made
//! again as they were at that instant.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use bfs_common::record::CheckpointId;

use super::program::select;
use super::rollback::{KILL_WAIT, send};
use super::state::Selection;
use super::work::{EVENTS_AT_ONCE, FLUSH_EVERY, Work};
use crate::generation::At;
use crate::primary::control::{FailureKind, FurtherProcess, ProcessStatus, Replies, Reply, State};
use crate::primary::engine::host::Host;
use crate::primary::engine::{CheckpointError, Request, Stop, Taken};
use crate::primary::failure::{Failure, Kind};
use crate::primary::further::{Further, Place};
use crate::primary::images::{By, LIMIT, To};
use crate::primary::rollback::RollbackError;
use crate::primary::stop::Limits;

/// What there is when somebody wanted to go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Processes run, those that were there or those of the checkpoint.
    Runs,
    /// No process runs; the files are as they were, or as at the checkpoint.
    Ended,
    /// No process runs, and files are between the two: the next agent finishes that.
    Unfinished,
}

/// Restarts are counted within this time.
const HOUR: Duration = Duration::from_secs(3600);

impl Work {
    /// Whether the next checkpoint has process state.
    pub(super) fn takes_images(&mut self, stop: Stop, trigger: &str) -> bool {
        let Some(images) = self.images.as_mut().filter(|images| images.lives()) else { return false };
        let may_skip =
            trigger == "every" && self.options.process.as_ref().is_some_and(|process| process.skips);
        let every = self.options.schedule.every.filter(|_| may_skip);
        stop != Stop::Never && !every.is_some_and(|every| images.skips(every))
    }

    /// Sets of images go to the destinations from now on.
    pub(super) fn bring_images(&mut self) {
        let (connect, limit) = (self.link.shipper.remote().connector(), self.link.shipper.limit());
        self.send_images(To { address: None, connect, limit, by: By::Epoch(self.epoch) });
        for place in self.link.further.as_ref().map(Further::places).unwrap_or_default() {
            self.bring_images_to(place);
        }
    }

    /// And to this further one.
    pub(super) fn bring_images_to(&mut self, place: Place) {
        let Place { address, connect, limit } = place;
        self.send_images(To { address: Some(address), connect, limit, by: By::Moment });
    }

    fn send_images(&mut self, to: To) {
        let Some(images) = &mut self.images else { return };
        if let Err(e) = images.couriers.add(to, &self.options.group) {
            self.last_error = Some(format!("process images stay on this host: no thread for them: {e}"));
        }
    }

    /// Takes a checkpoint for which the processes stand until they are dumped: at its instant, before its marker. `stop`
    /// is what was asked for.
    pub(super) fn checkpoint_with_images(
        &mut self,
        request: &Request,
        stop: Stop,
    ) -> Result<Taken, CheckpointError> {
        let Some(images) = &mut self.images else { return self.engine.checkpoint(&mut self.link, request) };
        images.make_room();
        let (engine, link) = (&mut self.engine, &mut self.link);
        // What the program does meanwhile is taken in: a ring is soon full.
        let (mut failed, mut flushed) = (None, Instant::now());
        images.dump_ahead(&mut || {
            link.service.alive();
            let mut took = engine.take_some(link, EVENTS_AT_ONCE).map(drop);
            if took.is_ok() && engine.needs_flush() && flushed.elapsed() >= FLUSH_EVERY {
                flushed = Instant::now();
                took = engine.flush(link);
            }
            link.release_ring();
            failed = took.err().or(failed.take());
        });
        if let Some(failed) = failed {
            return Err(failed.into());
        }
        let Limits { reach, stand } = self.link.limits;
        self.link.limits = Limits { reach, stand: stand.max(LIMIT) };
        let options = self.options.process.as_ref();
        // The last one of all is for the files: nobody can restore the processes when the agent is gone.
        let refuses = options.is_some_and(|process| process.refuses) && request.trigger != "end";
        let mut failure = None;
        let taken = self.engine.checkpoint_with(&mut self.link, request, &mut |host, checkpoint| {
            let Err(why) = images.dump(checkpoint, || host.standing()) else { return Ok(()) };
            if images.failed(checkpoint, &why) {
                return Ok(());
            }
            let why = why.to_string();
            if refuses {
                return Err(why);
            }
            failure = Some(why);
            Ok(())
        });
        let Ok(taken) = taken else {
            images.discard();
            return taken;
        };
        if stop != Stop::Hold {
            self.link.go();
            let stood = self.link.stops_us.last().copied().unwrap_or_default();
            images.tally.stood = (Duration::from_micros(stood), self.link.reached);
        }
        images.tidy(taken.checkpoint, request.wall_ns);
        if let Some(why) = failure {
            let why = format!("checkpoint {} has files only, no process state: {why}", taken.checkpoint);
            if images.tally.failed == 1 {
                eprintln!("bfs-agent: {why}");
            }
            self.last_error = Some(why);
        }
        Ok(taken)
    }

    pub(super) fn process_status(&self) -> Option<ProcessStatus> {
        let images = self.images.as_ref()?;
        let (tally, shipped) = (&images.tally, images.couriers.first());
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Some(ProcessStatus {
            criu: images.version(),
            kept: images.kept().to_vec(),
            dumped: tally.dumped,
            failed: tally.failed,
            failure: tally.failure.clone(),
            last_us: us(tally.last),
            last_bytes: tally.bytes,
            tracks_memory: images.tracks_memory(),
            ahead_rounds: tally.ahead.rounds,
            ahead_bytes: tally.ahead.bytes,
            ahead_us: us(tally.ahead.took),
            ahead_failure: tally.ahead.failure.clone(),
            last_stop_us: us(tally.stood.0),
            last_reach_us: us(tally.stood.1),
            outside: tally.outside.clone(),
            kept_outside: images.kept().iter().map(|at| (*at, images.outside_of(*at))).collect(),
            skipped: tally.skipped,
            restored: tally.restored,
            shipped: shipped.last,
            shipped_bytes: shipped.bytes,
            shipped_us: us(shipped.took),
            not_shipped: shipped.skipped,
            ship_failure: shipped.failure,
            further: images
                .couriers
                .further()
                .into_iter()
                .map(|(address, shipped)| FurtherProcess {
                    address,
                    shipped: shipped.last,
                    shipped_bytes: shipped.bytes,
                    not_shipped: shipped.skipped,
                    ship_failure: shipped.failure,
                })
                .collect(),
        })
    }

    /// Whether a command that ended so is to be restored: it was a signal that did not come through the agent, and
    /// there is something to restore.
    pub(super) fn restarts(&mut self, status: ExitStatus, sent: i32) -> bool {
        let (Some(options), Some(images)) = (&self.options.process, &self.images) else { return false };
        let Some(signal) =
            status.signal().or(status.code().filter(|code| *code > 128).map(|code| code - 128))
        else {
            return false;
        };
        if self.stop_asked.is_some() || signal == sent || images.kept().is_empty() {
            return false;
        }
        self.restarted.retain(|at| at.elapsed() < HOUR);
        if options.restarts == 0 {
            return false;
        }
        if self.restarted.len() >= options.restarts as usize {
            eprintln!(
                "bfs-agent: signal {signal} ended the command; it was restored {} times within the hour, which is \
                 the limit (--restart-on-abort)",
                self.restarted.len()
            );
            return false;
        }
        self.restarted.push(Instant::now());
        true
    }

    pub(super) fn ask_to_go_back(&mut self, at: Option<String>, replies: Replies) {
        if let Some(why) = self.cannot_take() {
            return replies.send(why);
        }
        if self.images.is_none() {
            let why = "no process state is kept of this group";
            let hint = "start its command with `bfs-agent run --with-process`, or attach to its cgroup --with-process";
            return replies.send(Reply::failed(FailureKind::Failed, why, hint));
        }
        if self.go_back_asked.is_some() {
            let why = "another going back is under way";
            return replies.send(Reply::failed(FailureKind::Busy, why, "wait for its end"));
        }
        self.go_back_asked = Some((replies, at));
    }

    /// Goes back, if somebody asked for that, and answers.
    pub(super) fn go_back_as_asked(&mut self) -> Option<After> {
        let (replies, at) = self.go_back_asked.take()?;
        let went = self.find(at.as_deref()).and_then(|to| self.go_back_with_processes(to));
        let after = match &went {
            Err(failure) if failure.kind == Kind::RollbackUnfinished => After::Unfinished,
            _ if self.images.as_ref().is_some_and(|images| images.lives()) => After::Runs,
            _ => After::Ended,
        };
        let outside = self.images.as_ref().map(|images| images.tally.outside.clone()).unwrap_or_default();
        replies.send(match went {
            Ok(checkpoint) => Reply::WentBack { checkpoint, outside },
            Err(e) => Reply::failed(FailureKind::GivenUp, e.message, e.hint),
        });
        Some(after)
    }

    /// The checkpoint that is meant.
    fn find(&self, at: Option<&str>) -> Result<Option<CheckpointId>, Failure> {
        let Some(at) = at else { return Ok(None) };
        let none = |why| Failure::new(Kind::Refused, why, "look at `bfs-replayer generations`");
        let at: At = at.parse().map_err(none)?;
        let all = self.reader_client()?.generations(&self.options.group).map_err(RollbackError::from)?;
        at.find(&all).map(Some).map_err(none)
    }

    /// Goes back to a checkpoint that has process state, the newest one unless it is said, with the processes.
    ///
    /// # Errors
    /// [`Failure`]: a checkpoint that has none leaves everything as it is; else no process may be left.
    pub(super) fn go_back_with_processes(
        &mut self,
        to: Option<CheckpointId>,
    ) -> Result<CheckpointId, Failure> {
        let fail = |e: crate::primary::images::ImagesError| Failure::new(Kind::GivenUp, e.to_string(), "");
        let Some(images) = &self.images else {
            return Err(Failure::new(Kind::Usage, "no process state is kept", "run it --with-process"));
        };
        let to = images.choose(to).map_err(fail)?;
        images.may_restore(to).map_err(fail)?;
        self.end_processes()?;
        let done = self.bring_back(to);
        self.state = State::Following;
        done.map(|()| to).map_err(|mut failure| {
            if matches!(self.kept.selection, Selection::Attached(_)) && failure.hint.is_empty() {
                failure.hint =
                    "the processes have ended; when the cause is gone, the same command makes them again"
                        .into();
            }
            failure
        })
    }

    /// Files and processes, when none is left of those that ran.
    fn bring_back(&mut self, to: CheckpointId) -> Result<(), Failure> {
        let fail = |e: crate::primary::images::ImagesError| Failure::new(Kind::GivenUp, e.to_string(), "");
        if let Some(images) = &self.images {
            images.wait_until_free(to).map_err(fail)?;
        }
        self.roll_back(to, false)?;
        let (Selection::Cgroup(cgroup) | Selection::Attached(cgroup)) = self.kept.selection.clone() else {
            return Err(Failure::new(Kind::Other, "the command has no cgroup of its own", ""));
        };
        let probes = &self.link.probes;
        let Some(images) = &mut self.images else {
            return Err(Failure::new(Kind::Other, "no process state is kept", ""));
        };
        images.restore(to, || select(probes, &cgroup)).map_err(fail)
    }

    /// Ends what is left of the processes.
    fn end_processes(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + KILL_WAIT;
        loop {
            send(&self.link.probes, libc::SIGKILL);
            self.capture();
            let gone = self.link.probes.nobody_is_selected()?;
            if gone && !self.images.as_ref().is_some_and(|images| images.lives()) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let left = self.link.probes.selected_processes()?;
                return Err(Failure::new(
                    Kind::GivenUp,
                    format!("processes do not end: {left:?}"),
                    "end them, then try again",
                ));
            }
        }
    }
}
