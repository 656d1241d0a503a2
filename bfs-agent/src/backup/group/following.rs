//! Followers, in the thread that applies: before each step up to its marker, else as far as the log is durable.

use std::time::Instant;

use bfs_common::record::Sequence;

use super::super::error::BackupError;
use super::super::follow::{Followers, Site, Standing};
use super::super::index::GroupRow;
use super::super::metrics::Following;
use super::super::past::Source;
use super::{Group, State, locked};

impl State {
    /// Whether there is something for followers to do.
    pub(super) fn follows(&self, durable: Sequence) -> bool {
        let again = self.following.again.is_some_and(|again| again <= Instant::now());
        self.gate.has_policies && (self.followed < durable || again)
    }
}

impl Group {
    /// Has the followers repeat the records up to this one. The tree is locked, and at the checkpoint of its row unless
    /// a step is begun: then they wait for its end.
    ///
    /// # Errors
    /// If log or index cannot be read.
    pub(super) fn follow(&self, row: &GroupRow, to: Sequence) -> Result<(), BackupError> {
        if !self.state().gate.has_policies || self.index.plan(row.number)?.is_some() {
            return Ok(());
        }
        // Nobody else is at the tree while its lock is held.
        let source = Source { tree: None, ..self.source() };
        let room = |bytes| self.room.check(&self.disks, bytes).map_err(|short| short.to_string());
        let site = Site { source, log: &self.log, room: &room };
        let mut followers = locked(&self.followers);
        let known = followers.take().filter(|followers| followers.at() >= row.applied.sequence);
        let mut all = match known {
            Some(all) => all,
            None => Followers::new(&site, row)?,
        };
        let done = if to >= all.at() { all.advance(&site, row, to) } else { Ok(()) };
        self.note_followers(&all);
        *followers = Some(all);
        done
    }

    /// A step is done, up to whose marker all was followed.
    pub(super) fn follow_applied(&self, row: &GroupRow) {
        if let Some(all) = locked(&self.followers).as_mut() {
            all.applied(row);
            self.note_followers(all);
        }
    }

    /// How they stand, for monitors.
    pub(in crate::backup) fn following(&self) -> Following {
        let state = self.state();
        let Standing { count, failures, .. } = state.following;
        Following { group: self.name.clone(), followers: count, failures }
    }

    fn note_followers(&self, all: &Followers) {
        let standing: Standing = all.standing();
        let mut state = self.state();
        (state.followed, state.following) = (all.at(), standing);
    }
}
