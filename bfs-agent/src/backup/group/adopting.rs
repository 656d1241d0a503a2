//! A stream of another store becomes a part of the log: between two batches, by the thread that writes them.

use bfs_common::record::{CheckpointId, Epoch};
use bfs_common::wire::{Position, Refusal};
use std::sync::Arc;
use tokio::sync::oneshot;

use super::super::error::BackupError;
use super::super::gate::Gate;
use super::super::index::GroupRow;
use super::super::transfer::{Whole, follows, moment_of};
use super::promoting::blocking;
use super::{Group, Slot, ToLog, gate_at, locked};
use crate::log::writer::LogWriter;
use crate::transfer::Head;

/// What is to become a part of the log.
#[derive(Debug)]
pub(super) struct Adopt {
    connection: u64,
    base: Position,
    end: Position,
    answer: oneshot::Sender<Result<(), BackupError>>,
}

impl Group {
    /// Where a stream begins that this group takes in: its row, and a gate that stands at its end. Blocks on the disk.
    ///
    /// # Errors
    /// Why it takes none, or not this one.
    pub fn begin_receiving(&self, head: &Head) -> Result<(GroupRow, Gate), Refusal> {
        let bad = |why: String| Err(Refusal::Bad(why));
        let failed = |error: BackupError| Refusal::Store(error.to_string());
        let name = &self.name;
        if self.id != head.id {
            return Err(Refusal::OtherGroup { name: name.clone() });
        }
        if !self.maps.is_empty() {
            return bad(format!("group {name:?} has a --map, which a stream of another store has not"));
        }
        let tree = locked(&self.tree);
        let row = self.index.group(name).map_err(failed)?;
        let stands;
        {
            let state = self.state();
            if state.slot.is_some() {
                return Err(Refusal::Busy { name: name.clone() });
            }
            if let Some(why) = &state.log_trouble {
                return Err(Refusal::Store(why.clone()));
            }
            if !state.steps.is_empty() {
                return bad(format!(
                    "group {name:?} has checkpoints that are not applied yet: try again when they are"
                ));
            }
            stands = state.gate.position;
            // They follow what was captured last, which will not have been.
            if stands != Position::from(row.applied) && state.gate.has_policies {
                return bad(format!(
                    "an agent wrote to group {name:?} behind checkpoint {}, and files of it have followers: a stream \
                     cannot follow what no checkpoint covers",
                    row.checkpoint
                ));
            }
        }
        let newest = self.index.generations(row.number).map_err(failed)?.pop();
        let newest = newest.map(|(checkpoint, row)| moment_of(checkpoint, &row));
        // What follows it is the new primary's, which comes as records.
        if let Some(refusal) = self.state().promoted_at(newest.as_ref().map(|newest| newest.checkpoint)) {
            return Err(refusal);
        }
        follows(name, newest.as_ref(), head).map_err(Refusal::Bad)?;
        let view = self.index.view(row.number).map_err(failed)?;
        let gate = gate_at(&row, &view).map_err(failed)?.behind_void(stands);
        drop(tree);
        Ok((row, gate))
    }

    /// Takes in what is there as a whole; its checkpoint is confirmed then.
    ///
    /// # Errors
    /// Somebody wrote to the group meanwhile, or the disk failed.
    pub async fn adopt(self: &Arc<Self>, connection: u64, whole: &Whole) -> Result<CheckpointId, Refusal> {
        self.take_slot(connection)?;
        let adopted = self.adopt_in_slot(connection, whole).await;
        let mut state = self.state();
        if state.slot.as_ref().is_some_and(|slot| slot.connection == connection) {
            state.slot = None;
            drop(state);
            self.slot_free.notify_waiters();
        }
        adopted
    }

    /// Like an agent: one writes at a time.
    fn take_slot(&self, connection: u64) -> Result<(), Refusal> {
        let mut state = self.state();
        if state.slot.is_some() || state.is_promoting() {
            return Err(Refusal::Busy { name: self.name.clone() });
        }
        state.slot = Some(Slot::of(connection));
        Ok(())
    }

    async fn adopt_in_slot(
        self: &Arc<Self>,
        connection: u64,
        whole: &Whole,
    ) -> Result<CheckpointId, Refusal> {
        let closed = || Refusal::Store("it is being closed".into());
        let group = self.clone();
        let epoch: Epoch =
            blocking(move || group.grant()).await?.map_err(|e| Refusal::Store(e.to_string()))?;
        if epoch != whole.epoch {
            let why =
                format!("an agent wrote to group {:?} meanwhile: nothing was taken, try again", self.name);
            return Err(Refusal::Bad(why));
        }
        let (answer, wait) = oneshot::channel();
        let sender = locked(&self.to_log).clone().ok_or_else(closed)?;
        let adopt = Adopt { connection, base: whole.base, end: whole.end, answer };
        sender.send(ToLog::Adopt(adopt)).await.map_err(|_| closed())?;
        wait.await.map_err(|_| closed())?.map_err(|error| Refusal::Store(error.to_string()))?;
        Ok(whole.head.to.checkpoint)
    }

    /// In the thread of the log.
    pub(super) fn adopt_now(&self, log: &mut LogWriter, failed: &mut bool, adopt: Adopt) {
        let Adopt { connection, base, end, answer } = adopt;
        let stands = {
            let state = self.state();
            let ours = state.slot.as_ref().is_some_and(|slot| slot.connection == connection);
            ours && !*failed && state.steps.is_empty() && state.gate.position == base && log.durable() == base
        };
        let adopted = if stands {
            let (applied, checkpoint) = (locked(&self.tree).applied, self.state().applied.0);
            let void = base.sequence.0 - applied.sequence.0;
            if void > 0 {
                tracing::warn!(
                    "group {}: {void} records behind checkpoint {checkpoint}, which no checkpoint covers, are void: \
                     what follows it is of another store",
                    self.name
                );
            }
            self.incoming.mark().and_then(|()| {
                log.expect(end);
                // Until it is in the log, nothing else may be.
                *failed = true;
                self.reopen(log)?;
                *failed = false;
                Ok(())
            })
        } else {
            let why =
                format!("an agent wrote to group {:?} meanwhile: nothing was taken, try again", self.name);
            Err(BackupError::Stream(why))
        };
        if *failed && let Err(error) = &adopted {
            self.log_failed(error);
        }
        // Whoever asked may be gone.
        let _ = answer.send(adopted);
    }
}
