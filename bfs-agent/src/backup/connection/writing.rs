//! How a connection becomes the one that writes a group.

use std::time::Duration;

use bfs_common::record::{Epoch, GroupId, PathBytes};
use bfs_common::wire::{Frame, Refusal, StoreState};
use bytes::Bytes;

use super::super::group::{Group, Slot};
use super::{Session, Writing};

/// How long an agent that ended may keep its group, until its connection is seen to be closed.
const SLOT_WAIT: Duration = Duration::from_secs(2);

impl Session {
    pub(super) async fn hello(
        &mut self,
        name: String,
        id: GroupId,
        epoch: Option<Epoch>,
        (take_over, lz4): (bool, bool),
        maps: Vec<(PathBytes, PathBytes)>,
    ) -> Result<(), Refusal> {
        let shared = self.shared.clone();
        let group = tokio::task::spawn_blocking(move || shared.group_for(&name, id, &maps))
            .await
            .map_err(|e| Refusal::Store(e.to_string()))??;
        let slot = self.occupy(&group, epoch, take_over).await?;
        let idle = tokio::spawn(async {}).abort_handle();
        // From here on the slot is given back when the session ends.
        let (fenced, pulse) = (slot.fenced, slot.pulse);
        let held = epoch.unwrap_or_default();
        self.writing = Some(Writing { group: group.clone(), epoch: held, lz4, fenced, pulse, acks: idle });
        group.drain().await?;
        let epoch = match epoch {
            Some(epoch) => epoch,
            None => {
                let group = group.clone();
                tokio::task::spawn_blocking(move || group.grant())
                    .await
                    .map_err(|e| Refusal::Store(e.to_string()))?
                    .map_err(|e| Refusal::Store(e.to_string()))?
            }
        };
        let mut progress = group.progress();
        let known = progress.borrow_and_update().clone();
        let welcome = {
            let state = group.state();
            // A promotion may have begun meanwhile.
            if state.slot.as_ref().is_none_or(|slot| slot.connection != self.number) {
                return Err(Refusal::Busy { name: group.name.clone() });
            }
            Frame::Welcome {
                epoch,
                position: state.gate.position,
                confirmed: known.confirmed,
                applied: known.applied,
                highest_object: state.gate.highest_object,
                gaps: state.gate.gaps.iter().cloned().collect(),
                roots: state.gate.roots.clone(),
                boot_id: state.gate.boot_id,
                adopt: state.adopts(),
                lz4,
            }
        };
        self.answer(welcome).await;
        let (out, broken) = (self.out.clone(), self.broken.clone());
        let acks = tokio::spawn(async move {
            while progress.changed().await.is_ok() {
                let p = progress.borrow_and_update().clone();
                if p.refuses.is_some() {
                    broken.notify_one();
                    return;
                }
                let ack = Frame::Ack {
                    position: p.durable,
                    confirmed: p.confirmed,
                    applied: p.applied,
                    state: match (p.stuck, p.damaged) {
                        (true, _) => StoreState::Stuck,
                        (false, 0) => StoreState::Ready,
                        (false, _) => StoreState::Damaged,
                    },
                };
                if out.send((ack, Bytes::new())).await.is_err() {
                    return;
                }
            }
        });
        if let Some(writing) = &mut self.writing {
            writing.epoch = epoch;
            writing.acks = acks.abort_handle();
        }
        Ok(())
    }

    /// Becomes the writer of a group.
    async fn occupy(&self, group: &Group, epoch: Option<Epoch>, take_over: bool) -> Result<Slot, Refusal> {
        let deadline = tokio::time::Instant::now() + SLOT_WAIT;
        loop {
            let freed = group.slot_free.notified();
            {
                let mut state = group.state();
                if let Some(epoch) = epoch {
                    state.admit(epoch)?;
                }
                // The same agent over a new connection: the old one is dead, or soon will be.
                let again = epoch.is_some();
                if let Some(old) = &state.slot
                    && (again || take_over)
                {
                    old.fenced.notify_one();
                    state.slot = None;
                }
                if state.slot.is_none() && !state.is_promoting() {
                    let slot = Slot::of(self.number);
                    state.attend(slot.clone());
                    return Ok(slot);
                }
            }
            if tokio::time::timeout_at(deadline, freed).await.is_err() {
                return Err(Refusal::Busy { name: group.name.clone() });
            }
        }
    }
}
