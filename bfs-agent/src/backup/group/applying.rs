//! The thread that applies, and what it tidies up afterwards.
//!
//! Whatever fails is tried again, at first soon and then every few seconds, until it goes: a disk gets room, a
//! device comes back. Before each try the group's row is read from the index, because a transaction that was
//! said to have failed may stand there all the same.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, DISCARDED, ObjectId};

use super::super::apply::{self, CrashPoint};
use super::super::error::BackupError;
use super::super::images;
use super::super::index::GenerationRow;
use super::super::merge::Dropping;
use super::super::retention::{Kept, Space};
use super::super::step::{self, apply_step};
use super::{Group, Held, contained, locked};
use crate::generation::wall_ns;
use crate::log::spares;
use crate::log::writer::LogWriter;

/// How long the applier waits before it tries again what failed; each time twice as long.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// And so long at most.
const RETRY_MAX: Duration = Duration::from_secs(5);

impl Group {
    pub(super) fn run_apply(&self) {
        let mut pause = RETRY_MIN;
        loop {
            let only_follows = {
                let mut state = self.state();
                loop {
                    if state.stop {
                        state.merges.clear();
                        return;
                    }
                    let durable = self.progress.borrow().durable.sequence;
                    state.applying = state.is_due(durable);
                    // After a failure there is something to do, though its step may stand in the index.
                    let again = state.untidy || state.apply_trouble.is_some();
                    if state.applying || again || state.short || !state.merges.is_empty() {
                        state.short = false;
                        break false;
                    }
                    if state.follows(durable) {
                        break true;
                    }
                    state = match state.following.again {
                        Some(again) => {
                            let left = again.saturating_duration_since(Instant::now());
                            self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                        }
                        None => self.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                    };
                }
            };
            let (applied, tidied) = self.turn(only_follows);
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
            if trouble.is_none() && !only_follows {
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

    /// What there is to do once: a step, what was asked for, and what is to be removed then. How the step went, and the
    /// removing.
    pub(super) fn turn(&self, only_follows: bool) -> (Result<(), BackupError>, Result<(), BackupError>) {
        let turn = contained(|| {
            let applied = self.apply_next();
            if self.room.is_short(&self.disks)
                && let Err(error) = self.look_closer()
            {
                tracing::debug!("group {}: what waits cannot be looked at: {error}", self.name);
            }
            self.merge_asked();
            let tidied = if only_follows { Ok(()) } else { self.tidy(applied.is_ok()) };
            (applied, tidied)
        });
        turn.unwrap_or_else(|error| (Err(error), Ok(())))
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
        self.follow(&tree, next.as_ref().map_or(durable, |marker| marker.position.sequence))?;
        if let Some(marker) = next {
            let never = &mut CrashPoint::default();
            let applied = apply_step(&self.name, &tree, &self.index, &self.area, &self.log, marker, never);
            self.note_damage(tree.number)?;
            *tree = applied?;
            self.follow_applied(&tree);
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

    /// Files of the applied checkpoint of which bytes are lost. With `heal` the whole tree is compared with the index
    /// first, what is not as it should be is put back, and the bytes of `suspects` are compared with their checksums.
    ///
    /// # Errors
    /// [`BackupError::Applying`], or what stopped it; it can be done again.
    pub fn damage(&self, heal: bool, suspects: &HashSet<ObjectId>) -> Result<Vec<ObjectId>, BackupError> {
        let mut tree = locked(&self.tree);
        if heal {
            *tree = self.index.group(&self.name)?;
            step::heal(&self.name, &tree, &self.index, &self.area, suspects)?;
            apply::clean(&self.area, &self.index.view(tree.number)?)?;
        }
        self.note_damage(tree.number)
    }

    /// Tells of how many files bytes are lost, and which these are.
    fn note_damage(&self, group: u32) -> Result<Vec<ObjectId>, BackupError> {
        let damaged = self.index.view(group)?.damaged()?;
        let count = damaged.len() as u64;
        self.progress.send_if_modified(|p| std::mem::replace(&mut p.damaged, count) != count);
        Ok(damaged)
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

    /// Drops the generations that are not to be kept, and removes what is applied from the log. A step under way
    /// does not mind: the generation that its images begin from is the newest.
    pub(super) fn tidy(&self, applied: bool) -> Result<(), BackupError> {
        let spares = if self.room.is_short(&self.disks) { 0 } else { self.spares };
        // Before any generation.
        spares::limit_to(&self.log, spares)?;
        self.retire()?;
        if !applied {
            return Ok(());
        }
        let tree = locked(&self.tree);
        Ok(LogWriter::remove_applied(&self.log, tree.applied.sequence, spares)?)
    }

    /// Drops generations. Nobody waits for it but the applier: readers look again. The oldest go at once, which
    /// costs nothing; what is merged goes together, once in a while.
    fn retire(&self) -> Result<(), BackupError> {
        let short = self.room.is_short(&self.disks);
        let due = locked(&self.retired).is_none_or(|then| then.elapsed() >= self.limits.retention.pause);
        let dropping = self.dropping();
        let mut has_room = |bytes| self.room.check_images(&self.disks, bytes).is_ok();
        // What was merged takes room in the older one: so there may still be too much.
        let (mut left, mut again) = (usize::MAX, true);
        while again {
            let (all, gone) = self.going(short, due)?;
            again = !gone.is_empty() && all.len() < left;
            left = all.len();
            let dropped = if again {
                dropping.drop(&all, &gone, &mut has_room, &mut CrashPoint::default())
            } else {
                Ok(())
            };
            locked(&self.held).going.clear();
            dropped?;
        }
        if due {
            *locked(&self.retired) = Some(Instant::now());
        }
        self.retire_process(short, due)?;
        // What was dropped may have failed between the index and the files.
        if self.state().untidy {
            let needed = dropping.needed()?;
            self.area.sweep(&self.index.view(self.number)?, |image| needed.has(image))?;
        }
        Ok(())
    }

    pub(super) fn dropping(&self) -> Dropping<'_> {
        Dropping { group: self.number, id: self.id, index: &self.index, area: &self.area }
    }

    /// All generations, and those that go; nobody begins to read these from now on.
    fn going(
        &self,
        short: bool,
        due: bool,
    ) -> Result<(Vec<CheckpointId>, BTreeSet<CheckpointId>), BackupError> {
        let mut held = locked(&self.held);
        let rows = self.index.generations(self.number)?;
        let kept = self.kept(&rows, &held, due)?;
        let now = wall_ns();
        let space = Space { short, disk_bytes: if due { self.disks.images.size() } else { None } };
        let mut gone = self.limits.retention.gone(&kept, now, space);
        let all: Vec<_> = rows.into_iter().map(|(checkpoint, _)| checkpoint).collect();
        if !short && !due {
            // Only those before which none stays.
            let stays = all.iter().copied().find(|checkpoint| !gone.contains(checkpoint));
            gone.retain(|checkpoint| stays.is_none_or(|stays| *checkpoint < stays));
        }
        held.going.extend(gone.iter().copied());
        Ok((all, gone))
    }

    /// The generations as the decision about them needs them; what they take is asked for only when it matters.
    pub(super) fn kept(
        &self,
        rows: &[(CheckpointId, GenerationRow)],
        held: &Held,
        with_bytes: bool,
    ) -> Result<Vec<Kept>, BackupError> {
        let mut bytes: BTreeMap<CheckpointId, u64> = BTreeMap::new();
        if with_bytes {
            for (object, last) in self.index.view(self.number)?.kept()? {
                *bytes.entry(last).or_default() += self.area.kept_bytes(object);
            }
            for (checkpoint, _) in rows {
                *bytes.entry(*checkpoint).or_default() += images::allocated(self.area.images(), *checkpoint);
            }
        }
        if with_bytes && let Some((newest, _)) = rows.last() {
            // They are bounded by themselves, so they count where nothing goes for them.
            *bytes.entry(*newest).or_default() += self.process_bytes();
        }
        Ok(rows
            .iter()
            .map(|(checkpoint, row)| Kept {
                checkpoint: *checkpoint,
                wall_ns: row.label.wall_ns,
                tagged: !row.label.tag.is_empty(),
                discarded: row.label.trigger == DISCARDED,
                held: held.readers.contains_key(checkpoint),
                bytes: bytes.get(checkpoint).copied().unwrap_or(0),
            })
            .collect())
    }
}
