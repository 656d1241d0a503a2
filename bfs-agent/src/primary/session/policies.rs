//! Policies that are changed while a session works: durably written first, then said in the stream, where they count
//! from then on. Nothing else is touched by it.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::commands::Awaited;
use super::work::Work;
use crate::policy::Policy;
use crate::primary::control::{BadRequest, FailureKind, Replies, Reply};
use crate::primary::failure::{Failure, Kind};
use crate::primary::policies::{Ask, Policies, store};

/// What the configuration says of policies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyOptions {
    /// The entries.
    pub entries: Vec<Policy>,
    /// Where it is written what commands change of them.
    pub directory: PathBuf,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self { entries: Vec::new(), directory: store::DIRECTORY.into() }
    }
}

/// The policies of a group, as commands before left them.
///
/// # Errors
/// [`Failure`]: they are not passed over in silence.
pub(super) fn load(options: &PolicyOptions, group: &str) -> Result<Policies, Failure> {
    let changes = store::read(&options.directory, group).map_err(|e| {
        let hint = "remove that file to go back to what the configuration says, and change it anew";
        Failure::new(Kind::Other, format!("policies: {e}"), hint)
    })?;
    Policies::new(options.entries.clone(), changes)
        .map_err(|bad| Failure::new(Kind::Usage, format!("policies: {bad}"), bad.hint))
}

impl Work {
    /// Says which policies hold, at the beginning of a session.
    pub(super) fn say_policies(&mut self) {
        self.engine.set_policies(self.policies.table(), true);
    }

    /// Answers which policies hold.
    pub(super) fn list_policies(&self) -> Reply {
        Reply::Policies { policies: self.policies.table().policies().to_vec() }
    }

    /// Changes a policy, and answers when the stream says so durably.
    pub(super) fn change_policy(&mut self, ask: &Ask, limit: Duration, replies: Replies) {
        if let Some(why) = self.is_detached() {
            return replies.send(why);
        }
        let changed = match self.policies.with(ask) {
            Ok(changed) => changed,
            Err(bad) => return replies.send(Reply::bad(BadRequest::from(bad))),
        };
        let options = &self.options.policies;
        if let Err(e) = store::write(&options.directory, &self.options.group, changed.changes()) {
            let hint = "make room there, or start the agent with another --policies, then try again";
            return replies.send(Reply::failed(FailureKind::Failed, format!("policies: {e}"), hint));
        }
        self.policies = changed;
        // What happened before it is under the policies before.
        self.drain();
        self.engine.set_policies(self.policies.table(), false);
        self.wait_for_records(Awaited::Policies, limit, replies);
    }

    /// Has followers kept up with, between checkpoints.
    pub(super) fn tend_followers(&mut self) {
        if !self.engine.has_followers() || self.tally.taken == 0 {
            return;
        }
        self.take_runs();
        if let Err(e) = self.engine.follow_now(&mut self.link) {
            self.host_failed(&e);
        }
    }
}
