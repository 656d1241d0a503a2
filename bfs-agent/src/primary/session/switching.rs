//! A planned change of the primary: the program ends first, then the last checkpoint is taken and confirmed, and the agent
//! ends. So the other host can be promoted, and nothing is lost.

use std::time::{Duration, Instant};

use super::rollback::send;
use super::work::Work;
use crate::primary::control::{FailureKind, Replies, Reply};

/// How long processes have for ending by themselves before they are killed, where that is wanted.
const TERM_WAIT: Duration = Duration::from_secs(5);
/// Between two looks whether they have.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Somebody waits for the end of the program, and of the agent.
pub(super) struct Switching {
    replies: Replies,
    deadline: Instant,
    /// When those that still run are killed.
    kill_at: Option<Instant>,
    looked: Instant,
}

/// The end of the agent was asked for.
pub(super) struct StopAsked {
    pub replies: Replies,
    /// How long the last checkpoint may take.
    pub limit: Duration,
    /// The first destination is to be the primary: what the others have does not matter.
    pub switches: bool,
}

impl Switching {
    /// It does not come about.
    pub fn give_up(self, why: &str, hint: &str) {
        self.replies.send(Reply::failed(FailureKind::Timeout, why.to_owned(), hint));
    }
}

impl Work {
    /// Begins: the selected processes are told to end (`signal`), and killed if they do not (`kill`).
    pub(super) fn begin_switching(
        &mut self,
        limit: Duration,
        (signal, kill): (bool, bool),
        replies: Replies,
    ) {
        let progress = self.link.shipper.progress();
        let refuse = |replies: &Replies, why: String, hint: &str| {
            replies.send(Reply::failed(FailureKind::Failed, why, hint));
        };
        if let Some(why) = self.is_detached() {
            return replies.send(why);
        }
        if self.switching.is_some() {
            return refuse(&replies, "a switchover is under way".into(), "wait for it");
        }
        if let Some(refusal) = &progress.refusal {
            let why = format!("the replayer refuses this agent: {refusal}");
            return refuse(&replies, why, "look at `bfs-agent status`");
        }
        if !progress.connected {
            let why = "the backup is not connected: the program was left alone".into();
            return refuse(&replies, why, "try again when `bfs-agent status` says connected");
        }
        if self.link.stopper.is_none() {
            let why = "nobody is followed who could be ended (--everyone)".into();
            return refuse(&replies, why, "end the program yourself, then `bfs-agent stop`");
        }
        if signal {
            send(&self.link.probes, libc::SIGTERM);
        }
        let now = Instant::now();
        let kill_at = kill.then_some(now + TERM_WAIT);
        self.switching = Some(Switching { replies, deadline: now + limit, kill_at, looked: now });
    }

    /// Looks whether the program has ended.
    pub(super) fn tend_switching(&mut self) {
        let now = Instant::now();
        let Some(switching) = &mut self.switching else { return };
        if now.duration_since(switching.looked) < LOOK_EVERY {
            return;
        }
        switching.looked = now;
        if switching.kill_at.is_some_and(|at| now >= at) {
            switching.kill_at = None;
            send(&self.link.probes, libc::SIGKILL);
        }
        if self.link.probes.nobody_is_selected().is_ok_and(|nobody| nobody) {
            if let Some(Switching { replies, deadline, .. }) = self.switching.take() {
                let limit = deadline.saturating_duration_since(now);
                self.stop_asked = Some(StopAsked { replies, limit, switches: true });
            }
        } else if now >= switching.deadline
            && let Some(switching) = self.switching.take()
        {
            let left = self.link.probes.selected_processes().unwrap_or_default();
            let hint = "it is followed as before; end it, or give --kill or a longer --timeout";
            switching.give_up(&format!("the program did not end: processes {left:?}"), hint);
        }
    }
}
