//! Commands of the user before and after each checkpoint, so that a program can bring its files into a state of its
//! own choice for it.
//!
//! The checkpoint's instant comes when the one before has ended well, and the one after begins when that instant is
//! behind us, whatever came of it: also when the one before failed, so that it can undo what that began. The session
//! goes on meanwhile, and checkpoints that are asked for wait for their turn. A file says that a hook after a
//! checkpoint is owed; whoever comes after an agent that was killed runs it.
//!
//! What the hooks change is followed like what any other process changes that is not selected (`--foreign`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::commands::Ask;
use super::state::{self, Selection};
use super::work::Work;
use crate::primary::control::{FailureKind, HookStatus, Reply, State};
use crate::primary::engine::Stop;
use crate::primary::process::{Hook, HookError, Inherited};

/// How long a hook may take unless told otherwise.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A schedule tries again no sooner than this after a hook that failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What is to be run, each a command line of the shell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookOptions {
    /// Before the instant of a checkpoint.
    pub before: Option<String>,
    /// After it.
    pub after: Option<String>,
    /// How long each may take.
    pub limit: Duration,
}

impl Default for HookOptions {
    fn default() -> Self {
        Self { before: None, after: None, limit: LIMIT }
    }
}

impl HookOptions {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.before.is_none() && self.after.is_none()
    }
}

/// The hook after a checkpoint that has to be run, whoever does it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owed {
    command: String,
    limit: Duration,
    occasion: Occasion,
}

/// What hooks are told of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Occasion {
    group: String,
    checkpoint: u64,
    tag: String,
    reason: String,
}

impl Occasion {
    fn variables(&self, result: Option<&'static str>) -> Vec<(&'static str, String)> {
        let mut all = vec![
            ("BFS_GROUP", self.group.clone()),
            ("BFS_CHECKPOINT", self.checkpoint.to_string()),
            ("BFS_TAG", self.tag.clone()),
            ("BFS_REASON", self.reason.clone()),
        ];
        all.extend(result.map(|result| ("BFS_RESULT", result.to_owned())));
        all
    }
}

/// Where it stands.
#[derive(Default)]
enum Stage {
    #[default]
    Rest,
    /// The hook before the checkpoint runs.
    Before(Hook, Ask, Occasion),
    /// The processes stand for a client; the hook after it waits until they go on.
    Standing(Occasion),
    /// The hook after the checkpoint runs.
    After(Hook),
}

/// The hooks of a session.
#[derive(Default)]
pub(super) struct Hooks {
    /// How they are started; `None` in a session that has none.
    inherited: Option<Inherited>,
    queue: VecDeque<Ask>,
    stage: Stage,
    failures: u64,
    last_failure: Option<String>,
    /// When the hook before a checkpoint failed last.
    failed: Option<Instant>,
}

impl Hooks {
    /// One has just failed: what would be tried again at once waits a little.
    pub(super) fn rest(&self) -> bool {
        self.failed.is_some_and(|failed| failed.elapsed() < RETRY_AFTER)
    }
}

impl Work {
    /// From now on checkpoints have their hooks. One that an agent before owes is run at once.
    pub(super) fn start_hooks(&mut self, inherited: &Inherited) {
        let group = &self.options.group;
        if let Some(owed) = state::owed_hook(group) {
            let variables = owed.occasion.variables(Some("unknown"));
            let hook = Hook::start(&owed.command, &variables, owed.limit, Some(inherited));
            self.hooks.stage = Stage::After(hook);
        }
        self.hooks.inherited = Some(inherited.clone());
    }

    /// Whether a checkpoint now has hooks: there is a program for which they could do something.
    fn wants_hooks(&self) -> bool {
        let lives = || {
            self.kept.selection == Selection::Everyone
                || self.link.probes.nobody_is_selected().is_ok_and(|nobody| !nobody)
        };
        self.hooks.inherited.is_some()
            && !self.options.hooks.is_empty()
            && self.detached.is_none()
            && !self.engine.is_noting()
            && lives()
    }

    /// A hook runs, or a checkpoint waits for one.
    pub(super) fn hooks_at_work(&self) -> bool {
        !matches!(self.hooks.stage, Stage::Rest) || !self.hooks.queue.is_empty()
    }

    /// A checkpoint is taken, with its hooks when it is its turn.
    pub(super) fn ask(&mut self, ask: Ask) {
        if let (Some(client), Some(why)) = (&ask.client, self.cannot_take()) {
            return client.replies.send(why);
        }
        if self.hooks_at_work() || self.wants_hooks() {
            if self.state == State::Ending {
                return ask.refused(FailureKind::Ending, "the agent ends", "");
            }
            self.since.tried = Instant::now();
            self.hooks.queue.push_back(ask);
            self.tend_hooks();
        } else {
            let _ = self.take(ask);
        }
    }

    /// Goes on with what can go on.
    pub(super) fn tend_hooks(&mut self) {
        self.answer_late();
        loop {
            match std::mem::take(&mut self.hooks.stage) {
                Stage::Rest => {
                    let Some(ask) = self.hooks.queue.pop_front() else { return };
                    self.begin(ask);
                }
                Stage::Before(hook, ask, occasion) => match hook.ended() {
                    None => {
                        self.hooks.stage = Stage::Before(hook, ask, occasion);
                        return;
                    }
                    Some(Ok(())) => self.take_and_after(ask, occasion),
                    Some(Err(why)) => {
                        let why = self.not_taken(&why);
                        let hint = "look at what the hook says, on the agent's standard error";
                        ask.refused(FailureKind::GivenUp, &why, hint);
                        self.begin_after(&occasion, "failed");
                    }
                },
                Stage::Standing(occasion) => {
                    if self.held.is_some() {
                        self.hooks.stage = Stage::Standing(occasion);
                        return;
                    }
                    self.begin_after(&occasion, "taken");
                }
                Stage::After(hook) => match hook.ended() {
                    None => {
                        self.hooks.stage = Stage::After(hook);
                        return;
                    }
                    Some(ended) => self.after_ended(ended),
                },
            }
        }
    }

    fn begin(&mut self, ask: Ask) {
        if let (Some(client), Some(why)) = (&ask.client, self.cannot_take()) {
            return client.replies.send(why);
        }
        if !self.wants_hooks() {
            let _ = self.take(ask);
            return;
        }
        let occasion = self.occasion(&ask.tag, ask.trigger);
        match self.begin_before(&occasion) {
            Some(hook) => self.hooks.stage = Stage::Before(hook, ask, occasion),
            None => self.take_and_after(ask, occasion),
        }
    }

    fn take_and_after(&mut self, ask: Ask, occasion: Occasion) {
        let taken = self.take(ask);
        if taken && self.held.is_some() {
            self.hooks.stage = Stage::Standing(occasion);
        } else {
            self.begin_after(&occasion, if taken { "taken" } else { "failed" });
        }
    }

    fn occasion(&self, tag: &str, reason: &str) -> Occasion {
        Occasion {
            group: self.options.group.clone(),
            checkpoint: self.engine.last_checkpoint().0 + 1,
            tag: tag.into(),
            reason: reason.into(),
        }
    }

    fn begin_before(&mut self, occasion: &Occasion) -> Option<Hook> {
        let command = self.options.hooks.before.clone()?;
        if let Some(after) = &self.options.hooks.after {
            let limit = self.options.hooks.limit;
            let owed = Owed { command: after.clone(), limit, occasion: occasion.clone() };
            if let Err(e) = state::owe_hook(&self.options.group, Some(&owed)) {
                self.last_error = Some(format!("cannot note in /run/bfs that a hook is owed: {e}"));
            }
        }
        self.start(&command, occasion, None)
    }

    fn start(&self, command: &str, occasion: &Occasion, result: Option<&'static str>) -> Option<Hook> {
        let inherited = self.hooks.inherited.as_ref()?;
        let variables = occasion.variables(result);
        Some(Hook::start(command, &variables, self.options.hooks.limit, Some(inherited)))
    }

    fn begin_after(&mut self, occasion: &Occasion, result: &'static str) {
        if let Some(command) = self.options.hooks.after.clone() {
            let hook = self.start(&command, occasion, Some(result));
            self.hooks.stage = hook.map_or(Stage::Rest, Stage::After);
        }
    }

    fn after_ended(&mut self, ended: Result<(), HookError>) {
        if let Err(e) = state::owe_hook(&self.options.group, None) {
            self.last_error = Some(format!("cannot note in /run/bfs that no hook is owed any more: {e}"));
        }
        if let Err(why) = ended {
            let _ = self.hook_failed(format!("the hook after a checkpoint: {why}"));
        }
    }

    fn hook_failed(&mut self, why: String) -> String {
        self.hooks.failures += 1;
        self.hooks.last_failure = Some(why.clone());
        self.last_error = Some(why.clone());
        why
    }

    fn not_taken(&mut self, why: &HookError) -> String {
        let why = self.hook_failed(format!("the hook before the checkpoint: {why}; it was not taken"));
        self.tally.given_up += 1;
        self.failing = Some(why.clone());
        self.since.tried = Instant::now();
        self.hooks.failed = Some(Instant::now());
        why
    }

    /// Clients that wait longer than they wanted are told so. A checkpoint that a hook runs for is taken all the same.
    fn answer_late(&mut self) {
        let now = Instant::now();
        let late = |ask: &Ask| ask.client.as_ref().is_some_and(|client| client.deadline <= now);
        let hint = "look at `bfs-agent status`, or give a longer --timeout";
        if let Stage::Before(_, ask, _) = &mut self.hooks.stage
            && late(ask)
            && let Some(client) = ask.client.take()
        {
            // Nobody is there any more for whom the processes should stand.
            ask.stop = Stop::IfNeeded;
            let why = "the hook before the checkpoint did not end within the time; it is taken when it has";
            client.refused(Reply::failed(FailureKind::Timeout, why, hint));
        }
        let (gone, stay): (VecDeque<Ask>, _) = self.hooks.queue.drain(..).partition(late);
        self.hooks.queue = stay;
        for ask in gone {
            let why = "hooks of other checkpoints did not end within the time; it was not taken";
            ask.refused(FailureKind::Timeout, why, hint);
        }
    }

    /// At the end: what has begun comes to its end, what waits is told that there is none for it.
    pub(super) fn end_hooks(&mut self) {
        let waiting = std::mem::take(&mut self.hooks.queue);
        for ask in waiting {
            ask.refused(FailureKind::Ending, "the agent ends", "");
        }
        while self.hooks_at_work() {
            self.tend_hooks();
            self.capture();
        }
    }

    /// The hooks of the last checkpoint, around what takes it. Who waits for it waits for them.
    pub(super) fn with_hooks<T>(
        &mut self,
        reason: &'static str,
        take: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        if !self.wants_hooks() {
            return take(self);
        }
        let occasion = self.occasion("", reason);
        let before = self.begin_before(&occasion).map_or(Ok(()), |hook| self.wait_hook(&hook));
        let taken = match before {
            Ok(()) => take(self),
            Err(why) => Err(self.not_taken(&why)),
        };
        self.begin_after(&occasion, if taken.is_ok() { "taken" } else { "failed" });
        self.end_hooks();
        taken
    }

    fn wait_hook(&mut self, hook: &Hook) -> Result<(), HookError> {
        loop {
            if let Some(ended) = hook.ended() {
                return ended;
            }
            self.capture();
        }
    }

    pub(super) fn hook_status(&self) -> HookStatus {
        let (running, since) = match &self.hooks.stage {
            Stage::Rest | Stage::Standing(_) => (None, None),
            Stage::Before(hook, ..) => (Some("before"), Some(hook.since)),
            Stage::After(hook) => (Some("after"), Some(hook.since)),
        };
        HookStatus {
            before: self.options.hooks.before.clone(),
            after: self.options.hooks.after.clone(),
            running: running.map(str::to_owned),
            running_ms: since.map_or(0, |since| since.elapsed().as_millis() as u64),
            failures: self.hooks.failures,
            last_failure: self.hooks.last_failure.clone(),
        }
    }
}
