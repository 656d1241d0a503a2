//! The thread that applies, and what it tidies up afterwards.
//!
//! Whatever fails is tried again, at first soon and then every few seconds, until it goes: a disk gets room, a
//! device comes back. Before each try the group's row is read from the index, because a transaction that was
//! said to have failed may stand there all the same.

use std::sync::PoisonError;
use std::time::Duration;

use bfs_common::record::DISCARDED;

use super::super::apply::{self, CrashPoint};
use super::super::error::BackupError;
use super::super::index::GroupRow;
use super::super::retention::Kept;
use super::super::step::apply_step;
use super::{Group, locked};
use crate::log::writer::LogWriter;

/// How long the applier waits before it tries again what failed; each time twice as long.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// And so long at most.
const RETRY_MAX: Duration = Duration::from_secs(5);

impl Group {
    pub(super) fn run_apply(&self) {
        let mut pause = RETRY_MIN;
        loop {
            {
                let mut state = self.state();
                loop {
                    if state.stop {
                        return;
                    }
                    let durable = self.progress.borrow().durable.sequence;
                    state.applying = state.is_due(durable);
                    // After a failure there is something to do, though its step may stand in the index.
                    let again = state.untidy || state.apply_trouble.is_some();
                    if state.applying || again || state.short {
                        state.short = false;
                        break;
                    }
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
            let applied = self.apply_next();
            if self.room.is_short(&self.disks)
                && let Err(error) = self.look_closer()
            {
                tracing::debug!("group {}: what waits cannot be looked at: {error}", self.name);
            }
            let tidied = self.tidy(applied.is_ok());
            let mut state = self.state();
            state.applying = false;
            let done = applied.is_ok();
            let failed = !done || tidied.is_err();
            let why = |what: &str, result: Result<(), BackupError>| {
                result.err().map(|error| format!("{what}: {error}; it is tried again"))
            };
            let tidied = if done { tidied } else { Ok(()) };
            let trouble = why("a checkpoint cannot be applied", applied);
            if let Some(trouble) = trouble.as_ref().filter(|_| trouble != state.apply_trouble) {
                tracing::error!("group {}: {trouble}", self.name);
            }
            if trouble.is_none() {
                let left = why("what is not needed any more cannot be removed", tidied);
                if let Some(left) = left.as_ref().filter(|_| left != state.tidy_trouble) {
                    tracing::error!("group {}: {left}", self.name);
                }
                state.untidy = left.is_some();
                state.tidy_trouble = left;
            }
            state.apply_trouble = trouble;
            drop(state);
            if done {
                self.tell_applied();
            } else {
                self.progress.send_if_modified(|p| !std::mem::replace(&mut p.stuck, true));
            }
            if failed {
                let state = self.state();
                // Records that become durable meanwhile change nothing about it.
                let waited = self.wake.wait_timeout_while(state, pause, |state| !state.stop);
                drop(waited.unwrap_or_else(PoisonError::into_inner));
                pause = (pause * 2).min(RETRY_MAX);
            } else {
                pause = RETRY_MIN;
            }
        }
    }

    /// Does the step to the next durable marker, if there is one, to the last name in `stage/` and `aside/`: these
    /// are links that count.
    pub(super) fn apply_next(&self) -> Result<(), BackupError> {
        let mut tree = locked(&self.tree);
        *tree = self.index.group(&self.name)?;
        let durable = self.progress.borrow().durable.sequence;
        let next = {
            let mut state = self.state();
            // The transaction of a step that seemed to fail may have been done.
            while state.steps.front().is_some_and(|s| s.marker.checkpoint <= tree.checkpoint) {
                state.steps.pop_front();
            }
            let next = state.steps.front().map(|s| s.marker.clone());
            next.filter(|marker| marker.position.sequence <= durable)
        };
        if let Some(marker) = next {
            let never = &mut CrashPoint::default();
            *tree = apply_step(&self.name, &tree, &self.index, &self.area, &self.log, marker, never)?;
        }
        {
            let mut state = self.state();
            while state.steps.front().is_some_and(|s| s.marker.checkpoint <= tree.checkpoint) {
                state.steps.pop_front();
            }
            self.note_need(&state);
        }
        if self.index.plan(tree.number)?.is_none() {
            apply::clean(&self.area, &self.index.view(tree.number)?)?;
        }
        Ok(())
    }

    /// The tree stands at the checkpoint of its row.
    pub(super) fn tell_applied(&self) {
        let tree = locked(&self.tree);
        self.state().applied = (tree.checkpoint, tree.label.clone());
        self.progress.send_if_modified(|p| {
            let before = (p.applied, p.confirmed, p.stuck);
            p.stuck = false;
            p.applied = tree.checkpoint;
            p.confirmed = p.confirmed.max(tree.checkpoint);
            before != (p.applied, p.confirmed, p.stuck)
        });
    }

    /// Removes the generations that are not to be kept, all but the floor when room is short, and what is applied
    /// from the log. A step under way does not mind: the generation that its images begin from is the newest.
    pub(super) fn tidy(&self, applied: bool) -> Result<(), BackupError> {
        let tree = locked(&self.tree);
        self.retire(&tree)?;
        if !applied {
            return Ok(());
        }
        Ok(LogWriter::remove_applied(&self.log, tree.applied.sequence)?)
    }

    /// Drops the generations that are not to be kept. The caller holds the lock of the tree.
    fn retire(&self, row: &GroupRow) -> Result<(), BackupError> {
        let held = locked(&self.held);
        let kept: Vec<Kept> = self
            .index
            .generations(row.number)?
            .into_iter()
            .map(|(checkpoint, row)| Kept {
                checkpoint,
                tagged: !row.label.tag.is_empty(),
                discarded: row.label.trigger == DISCARDED,
                held: held.contains_key(&checkpoint),
            })
            .collect();
        let short = self.room.is_short(&self.disks);
        let gone = self.limits.retention.gone(&kept, short);
        if !gone.is_empty() {
            let (oldest, objects) = self.index.drop_generations(row.number, &gone)?;
            self.area.drop_kept(&objects)?;
            self.area.drop_images(oldest)?;
        }
        // What was dropped may have failed between the index and the files.
        if self.state().untidy
            && let Some((oldest, _)) = self.index.generations(row.number)?.first()
        {
            self.area.sweep(&self.index.view(row.number)?, *oldest)?;
        }
        Ok(())
    }
}
