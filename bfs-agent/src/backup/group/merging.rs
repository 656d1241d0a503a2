//! Merges that somebody asks for. The thread that applies does them, as it does those of retention: so there is one at
//! a time, and none beside a step.

use std::collections::BTreeSet;

use bfs_common::record::CheckpointId;
use bfs_common::wire::Refusal;
use tokio::sync::oneshot;

use super::super::apply::CrashPoint;
use super::super::error::BackupError;
use super::{Group, locked};

/// A merge that somebody waits for.
#[derive(Debug)]
pub(super) struct Asked {
    from: CheckpointId,
    to: CheckpointId,
    answer: oneshot::Sender<Result<Vec<CheckpointId>, Refusal>>,
}

impl Group {
    /// Makes the generations from one to another one, the newer; gives those that went, the oldest first.
    ///
    /// # Errors
    /// Why they stay, or what failed: then some of them may be gone, and it can be done again.
    pub async fn merge(&self, from: CheckpointId, to: CheckpointId) -> Result<Vec<CheckpointId>, Refusal> {
        let (answer, wait) = oneshot::channel();
        {
            let mut state = self.state();
            if state.stop {
                return Err(Refusal::Store("it is being closed".into()));
            }
            state.merges.push_back(Asked { from, to, answer });
        }
        self.wake.notify_all();
        wait.await.map_err(|_| Refusal::Store("it is being closed".into()))?
    }

    /// Does the merges that were asked for.
    pub(super) fn merge_asked(&self) {
        loop {
            let Some(Asked { from, to, answer }) = self.state().merges.pop_front() else { return };
            let merged = self.merge_now(from, to);
            if merged.is_err() {
                // What it left is looked for.
                self.state().untidy = true;
            }
            // Whoever asked may be gone.
            let _ = answer.send(merged);
        }
    }

    fn merge_now(&self, from: CheckpointId, to: CheckpointId) -> Result<Vec<CheckpointId>, Refusal> {
        let failed = |error: BackupError| Refusal::Bad(error.to_string());
        let (all, gone) = {
            let mut held = locked(&self.held);
            let rows = self.index.generations(self.number).map_err(failed)?;
            let kept = self.kept(&rows, &held, false).map_err(failed)?;
            let gone = self.limits.retention.merged(&kept, from, to).map_err(Refusal::Bad)?;
            held.going.extend(gone.iter().copied());
            (rows.into_iter().map(|(checkpoint, _)| checkpoint).collect::<Vec<_>>(), gone)
        };
        let mut has_room = |bytes| self.room.check_images(&self.disks, bytes).is_ok();
        let dropped = self.dropping().drop(&all, &gone, &mut has_room, &mut CrashPoint::default());
        locked(&self.held).going.clear();
        dropped.map_err(failed)?;
        let left: BTreeSet<CheckpointId> =
            self.index.generations(self.number).map_err(failed)?.into_iter().map(|(n, _)| n).collect();
        if let Some(stays) = gone.iter().find(|checkpoint| left.contains(checkpoint)) {
            let why = format!(
                "there is no room to merge checkpoint {stays} and those behind it: what is merged is written once more \
                 before the old is removed"
            );
            return Err(Refusal::Bad(why));
        }
        Ok(gone.into_iter().collect())
    }
}
