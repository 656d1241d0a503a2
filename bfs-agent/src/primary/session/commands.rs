//! What commands and programs ask of a session, and when they are answered. Nothing in it waits for a client.

use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, Sequence};

use super::comparing::Comparing;
use super::destinations::Change as Destination;
use super::link::STOP_LIMITS;
use super::paths::Change;
use super::switching::StopAsked;
use super::work::Work;
use crate::primary::control::{
    FailureKind, Inbound, NEWEST, Replies, Reply, Request as Command, State, Ticket, WaitFor,
};
use crate::primary::engine::Stop;
use crate::primary::policies::Ask as PolicyAsk;
use crate::primary::ship::Progress;
use crate::primary::stop::Limits;

/// Commands that are taken before the loop looks at anything else: who asks without a pause must not keep it from
/// its events.
const COMMANDS_AT_ONCE: usize = 16;

/// A command that waits for a checkpoint.
pub(super) struct Waiter {
    pub(super) replies: Replies,
    what: Awaited,
    pub(super) checkpoint: CheckpointId,
    sequence: Sequence,
    pub(super) deadline: Instant,
    stopped_us: u64,
}

pub(super) enum Awaited {
    Checkpoint(WaitFor),
    Flush,
    Verify(Box<Comparing>),
    Report,
    Policies,
    Recovery { checkpoint: CheckpointId, bytes: u64 },
}

/// A checkpoint that is to be taken.
pub(super) struct Ask {
    /// The user's tag, empty for none.
    pub tag: String,
    /// Why it is taken.
    pub trigger: &'static str,
    /// Whether processes are stopped for it.
    pub stop: Stop,
    /// Who waits for it.
    pub client: Option<Asker>,
}

impl Ask {
    /// It is not taken: whoever waits for it is told why.
    pub(super) fn refused(self, kind: FailureKind, why: &str, hint: &str) {
        if let Some(client) = self.client {
            client.refused(Reply::failed(kind, why, hint));
        }
    }
}

/// Who waits for a checkpoint.
pub(super) struct Asker {
    /// For what.
    pub what: Awaited,
    /// How long.
    pub deadline: Instant,
    /// Where it is told.
    pub replies: Replies,
    /// The processes stand for it, for so long.
    pub holds: Option<(Ticket, Limits)>,
}

impl Asker {
    /// There is no checkpoint; a comparison that has something to say by earlier ones says that.
    pub(super) fn refused(self, why: Reply) {
        let found = match &self.what {
            Awaited::Verify(comparing) => comparing.ends(),
            _ => None,
        };
        self.replies.send(found.unwrap_or(why));
    }
}

/// The processes stand for a client.
pub(super) struct Held {
    ticket: Ticket,
    waiter: Waiter,
}

impl Work {
    pub(super) fn take_commands(&mut self) {
        for _ in 0..COMMANDS_AT_ONCE {
            let Some(inbound) = self.woke.take().or_else(|| self.inbound.try_recv().ok()) else { return };
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

    pub(super) fn let_go(&mut self, held: Held) {
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
                self.ask_for(tag, "manual", Awaited::Checkpoint(wait), deadline, replies);
            }
            Command::CheckpointStopped { tag, wait, timeout_ms, limit_ms } => {
                let deadline = Instant::now() + millis(timeout_ms);
                let stand = millis(limit_ms);
                let limits = Limits { reach: STOP_LIMITS.reach.min(stand), stand };
                let (what, holds) = (Awaited::Checkpoint(wait), Some((ticket, limits)));
                let client = Some(Asker { what, deadline, replies, holds });
                self.ask(Ask { tag, trigger: "manual", stop: Stop::Hold, client });
            }
            Command::ReportUpdate { path, offset, length, timeout_ms } => {
                let bytes = (offset.is_some() || length.is_some()).then(|| {
                    let start = offset.unwrap_or(0);
                    start..length.map_or(u64::MAX, |length| start.saturating_add(length))
                });
                self.report_update(&path, bytes, millis(timeout_ms), replies);
            }
            Command::Recover { path, at, timeout_ms } if at.as_deref() == Some(NEWEST) => {
                self.recover_newest(&path, millis(timeout_ms), replies);
            }
            Command::Recover { path, at, timeout_ms } => {
                self.recover(path, at.as_deref(), millis(timeout_ms), replies);
            }
            Command::GoBack { at, timeout_ms: _ } => self.ask_to_go_back(at, replies),
            Command::Flush { timeout_ms } => {
                if let Some(why) = self.is_detached() {
                    return replies.send(why);
                }
                self.drain();
                self.wait_for_records(Awaited::Flush, millis(timeout_ms), replies);
            }
            Command::Verify { timeout_ms, repair } => {
                let deadline = Instant::now() + millis(timeout_ms);
                let what = Awaited::Verify(Box::new(Comparing::new(repair)));
                self.ask_for(String::new(), "verify", what, deadline, replies);
            }
            Command::PathAdd { path, timeout_ms } => {
                self.change_paths(&Change::Add(path), millis(timeout_ms), replies);
            }
            Command::PathRemove { path, timeout_ms } => {
                self.change_paths(&Change::Remove(path), millis(timeout_ms), replies);
            }
            Command::DestAdd { address } => self.change_destination(Destination::Add, &address, &replies),
            Command::DestRemove { address } => {
                self.change_destination(Destination::Remove, &address, &replies);
            }
            Command::DestPause { address } => self.change_destination(Destination::Pause, &address, &replies),
            Command::DestResume { address } => {
                self.change_destination(Destination::Resume, &address, &replies);
            }
            Command::DestResync { address } => {
                self.change_destination(Destination::Resync, &address, &replies);
            }
            Command::PolicyList => replies.send(self.list_policies()),
            Command::PolicyAdd { pattern, settings, timeout_ms } => match settings.policy(&pattern) {
                Ok(policy) => self.change_policy(&PolicyAsk::Add(policy), millis(timeout_ms), replies),
                Err(bad) => replies.send(Reply::bad(bad.into())),
            },
            Command::PolicySet { pattern, settings, timeout_ms } => {
                self.change_policy(&PolicyAsk::Set(pattern, settings.pairs()), millis(timeout_ms), replies);
            }
            Command::PolicySuspend { pattern, timeout_ms } => {
                self.change_policy(&PolicyAsk::Suspend(pattern, true), millis(timeout_ms), replies);
            }
            Command::PolicyResume { pattern, timeout_ms } => {
                self.change_policy(&PolicyAsk::Suspend(pattern, false), millis(timeout_ms), replies);
            }
            Command::PolicyDelete { pattern, timeout_ms } => {
                self.change_policy(&PolicyAsk::Delete(pattern), millis(timeout_ms), replies);
            }
            Command::Switchover { timeout_ms, signal, kill } => {
                self.begin_switching(millis(timeout_ms), (signal, kill), replies);
            }
            Command::Stop { timeout_ms } => {
                self.stop_asked = Some(StopAsked { replies, limit: millis(timeout_ms), switches: false });
            }
        }
    }

    /// Takes in what was captured until now.
    pub(super) fn drain(&mut self) {
        if let Err(e) = self.engine.drain(&mut self.link) {
            self.host_failed(&e);
        }
    }

    /// Sends what there is, and answers when it is durable.
    pub(super) fn wait_for_records(&mut self, what: Awaited, limit: Duration, replies: Replies) {
        self.flush();
        self.waiters.push(Waiter {
            replies,
            what,
            checkpoint: self.engine.last_checkpoint(),
            sequence: self.engine.last_sequence(),
            deadline: Instant::now() + limit,
            stopped_us: 0,
        });
    }

    /// Why nothing can be asked of the capture any more.
    pub(super) fn is_detached(&self) -> Option<Reply> {
        let why = self.detached.as_ref()?;
        Some(Reply::failed(FailureKind::Failed, why.clone(), "end this agent and start again"))
    }

    /// Why no checkpoint can be taken on demand now.
    pub(super) fn cannot_take(&self) -> Option<Reply> {
        self.is_detached().or_else(|| {
            self.held.as_ref().map(|_| {
                Reply::failed(
                    FailureKind::Busy,
                    "the processes stand for another `checkpoint --stopped`",
                    "try again when it has ended",
                )
            })
        })
    }

    /// A checkpoint that somebody waits for.
    pub(super) fn ask_for(
        &mut self,
        tag: String,
        trigger: &'static str,
        what: Awaited,
        deadline: Instant,
        replies: Replies,
    ) {
        let client = Some(Asker { what, deadline, replies, holds: None });
        self.ask(Ask { tag, trigger, stop: Stop::IfNeeded, client });
    }

    /// Takes a checkpoint now; whoever asked waits from now on, or is told why there is none.
    pub(super) fn take(&mut self, ask: Ask) -> bool {
        if let Some((_, limits)) = ask.client.as_ref().and_then(|client| client.holds) {
            self.link.limits = limits;
        }
        match (self.checkpoint(ask.tag, ask.trigger, ask.stop), ask.client) {
            (Ok(taken), Some(Asker { what, deadline, replies, holds })) => {
                let stopped_us =
                    if taken.stopped { self.link.stops_us.last().copied().unwrap_or(0) } else { 0 };
                let (checkpoint, sequence) = (taken.checkpoint, taken.sequence);
                let waiter = Waiter { replies, what, checkpoint, sequence, deadline, stopped_us };
                if let Some((ticket, _)) = holds {
                    self.state = State::Stopped;
                    let reached_us = self.link.reached.as_micros() as u64;
                    waiter.replies.send(Reply::Standing { checkpoint, reached_us });
                    self.held = Some(Held { ticket, waiter });
                } else {
                    self.waiters.push(waiter);
                }
                true
            }
            (Err(e), Some(client)) => {
                let hint = "look at `bfs-agent status`";
                client.refused(Reply::failed(FailureKind::GivenUp, e.to_string(), hint));
                false
            }
            (taken, None) => taken.is_ok(),
        }
    }

    pub(super) fn answer_waiters(&mut self) {
        if self.waiters.is_empty() {
            return;
        }
        let progress = self.link.progress();
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
            Awaited::Checkpoint(wait) => reached.unwrap_or(WaitFor::Taken) >= *wait,
            Awaited::Report | Awaited::Policies | Awaited::Recovery { .. } => {
                progress.sealed >= waiter.sequence
            }
            Awaited::Flush => progress.durable.sequence >= waiter.sequence,
            Awaited::Verify(_) => reached >= Some(WaitFor::Confirmed),
        };
        if done {
            match &waiter.what {
                Awaited::Checkpoint(_) => waiter.replies.send(Reply::Checkpoint {
                    checkpoint: waiter.checkpoint,
                    reached: reached.unwrap_or(WaitFor::Taken),
                    stopped_us: waiter.stopped_us,
                }),
                Awaited::Report => {
                    waiter.replies.send(Reply::Reported { after: waiter.checkpoint });
                }
                Awaited::Policies => waiter.replies.send(self.list_policies()),
                Awaited::Recovery { checkpoint, bytes } => waiter.replies.send(Reply::Recovered {
                    checkpoint: *checkpoint,
                    bytes: *bytes,
                    after: waiter.checkpoint,
                }),
                Awaited::Verify(comparing) => self.compare(waiter, comparing),
                Awaited::Flush => waiter.replies.send(Reply::Flushed {
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
        if let Awaited::Verify(comparing) = &waiter.what
            && let Some(report) = comparing.ends()
        {
            waiter.replies.send(report);
            return true;
        }
        let so_far = reached.map_or("not durable yet", |r| match r {
            WaitFor::Taken => "taken",
            WaitFor::Sealed => "sealed",
            WaitFor::Confirmed => "confirmed",
            WaitFor::Applied => "applied",
        });
        let mut message = match waiter.what {
            Awaited::Report => "the update is noted, but that was not durable within the time".to_owned(),
            Awaited::Policies => {
                "the policy is changed, but that was not durable in the stream within the time".to_owned()
            }
            Awaited::Recovery { .. } => {
                "the file is brought back, but that is not noted durably for the next checkpoint yet"
                    .to_owned()
            }
            Awaited::Flush => "what was captured was not durable within the time".to_owned(),
            Awaited::Checkpoint(_) | Awaited::Verify(_) => format!(
                "checkpoint {} was taken, but was no more than {so_far} within the time",
                waiter.checkpoint
            ),
        };
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
