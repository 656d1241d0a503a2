//! Taking records: from a frame through the gate into the queue of the log.
//!
//! What is taken must be applied one day, so nothing is taken without room for that ([`Room`]): every frame, and
//! above all every marker, is tested against what all that waits is going to need. When it does not fit, the
//! applier drops generations above the floor, and looks at what the records that wait really come to. If that
//! does not help within [`ROOM_WAIT`], the agent is refused; it comes back by itself.
//!
//! [`Room`]: super::super::room::Room

use std::collections::HashSet;
use std::time::Duration;

use bfs_common::codec;
use bfs_common::record::{CheckpointId, Epoch, ObjectId, Record, Sequence};
use bfs_common::wire::{Refusal, StoreState};
use bytes::Bytes;

use super::super::error::BackupError;
use super::super::gate::{Marker, Verdict, is_received};
use super::super::index::{Base, View};
use super::super::plan::plan;
use super::super::room::Need;
use super::super::target::Target;
use super::{Group, State, Taken, ToLog, locked};
use crate::log::read_range;
use crate::log::writer::Batch;

/// How long a frame waits for room before the agent is refused: shorter than it waits for an answer to its pings.
const ROOM_WAIT: Duration = Duration::from_secs(2);
/// Bytes of the log that may wait for a step that cannot be done, whatever else may.
const STUCK_MAX: u64 = 16 << 30;
/// Between two looks for room.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Objects whose size before the step was asked for; the sizes of others are asked for more than once.
const CUT_MAX: usize = 65_536;

/// Records behind the last marker.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub records: u64,
    pub bytes: u64,
    pub need: Need,
    /// The highest object before the step; 0 before the first.
    old: ObjectId,
    /// Objects whose old size is in `need`.
    cut: HashSet<ObjectId>,
}

impl Pending {
    /// Behind a marker at which this was the highest object.
    pub fn behind(old: ObjectId) -> Self {
        Self { old, ..Self::default() }
    }

    /// One more record of `bytes`, `payload` of them payload. `waiting`: bytes of the steps before, which may have
    /// made what the index does not know.
    pub fn add(&mut self, record: &Record, bytes: u64, payload: u64, view: Option<&View>, waiting: u64) {
        self.records += 1;
        self.bytes += bytes;
        let cut = &mut self.cut;
        self.need += Need::of(record, payload, self.old, |object| {
            if cut.len() >= CUT_MAX {
                cut.clear();
            }
            let size = view.and_then(|view| view.node(object).ok()).flatten().map(|node| node.size);
            if cut.insert(object) { size.unwrap_or(waiting) } else { 0 }
        });
    }

    /// The step that ends here, and what is behind it.
    pub fn end(&mut self, marker: Marker, highest: ObjectId) -> Taken {
        let Self { bytes, need, .. } = std::mem::replace(self, Self::behind(highest));
        Taken { marker, bytes, need }
    }
}

impl State {
    /// Bytes of the log that are not applied.
    fn waiting(&self) -> u64 {
        self.steps.iter().map(|s| s.bytes).sum::<u64>() + self.pending.bytes
    }

    /// What everything needs that is not applied, and what is not written to the log yet.
    fn need(&self) -> Need {
        let mut all = self.pending.need;
        all.store = all.store.saturating_add(self.unlogged);
        self.steps.iter().for_each(|step| all += step.need);
        all
    }
}

impl Group {
    /// Takes the records of one frame: through the gate, then to the log.
    ///
    /// # Errors
    /// The refusal for the agent. Records before the refused one are taken.
    pub async fn take(
        &self,
        connection: u64,
        epoch: Epoch,
        first: Sequence,
        count: u32,
        body: Bytes,
    ) -> Result<(), Refusal> {
        self.wait_for_room(body.len() as u64).await?;
        // The place in the queue comes first, so that gate and queue move under one lock: who takes
        // the slot later finds everything that the gate let in queued before its own `Drain`.
        let sender =
            locked(&self.to_log).clone().ok_or_else(|| Refusal::Store("it is being closed".into()))?;
        let place = sender.reserve().await.map_err(|_| Refusal::Store("its log thread ended".into()))?;
        let mut state = self.state();
        if state.is_promoting() {
            return Err(Refusal::Busy { name: self.name.clone() });
        }
        if state.slot.as_ref().is_none_or(|slot| slot.connection != connection) {
            return Err(state.fenced(epoch));
        }
        if let Some(why) = &state.log_trouble {
            return Err(Refusal::Store(why.clone()));
        }
        let before = state.gate.position;
        let mut bytes = Vec::new();
        let refused = self.take_all(&mut state, epoch, first, count, body, &mut bytes).err();
        state.unlogged += bytes.len() as u64;
        self.note_need(&state);
        if !bytes.is_empty() {
            place.send(ToLog::Append(Batch { bytes: bytes.into(), before, after: state.gate.position }));
        }
        refused.map_or(Ok(()), Err)
    }

    /// The account of the store knows what this group needs.
    pub(super) fn note_need(&self, state: &State) {
        self.room.note(self.number, &self.disks, state.need());
    }

    /// Waits a moment for room; whoever can make some is told.
    async fn wait_for_room(&self, bytes: u64) -> Result<(), Refusal> {
        let deadline = tokio::time::Instant::now() + ROOM_WAIT;
        loop {
            let Err(refused) = self.may_take(bytes) else { return Ok(()) };
            if tokio::time::Instant::now() >= deadline {
                return Err(refused);
            }
            self.state().short = true;
            self.wake.notify_all();
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn may_take(&self, bytes: u64) -> Result<(), Refusal> {
        match self.why_not(&self.state(), bytes) {
            Some((StoreState::Full, why)) => Err(Refusal::Full(why)),
            Some((_, why)) => Err(Refusal::Behind(why)),
            None => Ok(()),
        }
    }

    /// Why nothing more can be taken: the log grows without being applied, or there is no room to apply it.
    pub(super) fn why_not(&self, state: &State, bytes: u64) -> Option<(StoreState, String)> {
        let waiting = state.waiting();
        let stuck_max = if state.apply_trouble.is_some() { STUCK_MAX } else { u64::MAX };
        let max = self.limits.pending_max.min(stuck_max);
        if waiting >= max {
            let why = state.apply_trouble.clone().unwrap_or_else(|| match state.steps.len() {
                0 => "no checkpoint has come yet".into(),
                n => format!("{n} checkpoints are not applied yet"),
            });
            let [waiting, max] = [waiting, max].map(|bytes| bytes.div_ceil(1 << 20));
            let why = format!("{waiting} MiB wait to be applied, {max} may (--pending-max), and {why}");
            return Some((StoreState::Behind, why));
        }
        let short = self.room.check(&self.disks, bytes).err()?;
        Some((StoreState::Full, short.to_string()))
    }

    fn take_all(
        &self,
        state: &mut State,
        epoch: Epoch,
        first: Sequence,
        count: u32,
        mut body: Bytes,
        batch: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let bad = |why: String| Refusal::Bad(format!("records from {first}: {why}"));
        let mut seen = 0;
        // Only a record that cuts a file asks for it. What it does not say the margin is for.
        let mut view = None;
        while let Some(encoded) = codec::take(&mut body).map_err(|e| bad(e.to_string()))? {
            let (record, payload) = encoded.decode().map_err(|e| bad(e.to_string()))?;
            if encoded.sequence.0 != first.0.wrapping_add(u64::from(seen)) {
                return Err(bad(format!("number {} stands in place {seen}", encoded.sequence)));
            }
            if is_received(&record) {
                return Err(bad("an epoch that no agent begins".into()));
            }
            seen += 1;
            // Those of this frame, too, take room in the log.
            let new = encoded.sequence > state.gate.position.sequence;
            if new && matches!(record, Record::Checkpoint { .. }) {
                self.note_need(state);
                if let Some((StoreState::Full, why)) = self.why_not(state, batch.len() as u64) {
                    return Err(Refusal::Full(why));
                }
            }
            if state.gate.take(epoch, &encoded, &record, &payload)? == Verdict::Known {
                continue;
            }
            batch.extend_from_slice(&encoded.bytes);
            if matches!(record, Record::Truncate { .. }) && view.is_none() {
                view = self.index.view(self.number).ok();
            }
            let waiting = state.steps.iter().map(|s| s.bytes).sum();
            let (len, payload) = (encoded.bytes.len() as u64, payload.len() as u64);
            state.pending.add(&record, len, payload, view.as_ref(), waiting);
            if let Record::Checkpoint { checkpoint, label } = record {
                let marker = Marker { checkpoint, label, position: state.gate.position.into() };
                let step = state.pending.end(marker, state.gate.highest_object);
                state.steps.push_back(step);
            }
        }
        if seen == count { Ok(()) } else { Err(bad(format!("{seen} in the frame, {count} announced"))) }
    }

    /// Looks at what the records behind the last marker really come to: bytes that are written again and again
    /// were counted each time. Only when all before them is applied.
    pub(super) fn look_closer(&self) -> Result<(), BackupError> {
        let tree = locked(&self.tree);
        let durable = self.progress.borrow().durable.sequence;
        let stands = |state: &State| state.steps.is_empty() && state.gate.position.sequence == durable;
        {
            let mut state = self.state();
            if !stands(&state) || std::mem::replace(&mut state.looked_at, durable) == durable {
                return Ok(());
            }
        }
        let mut target = Target::default();
        read_range(&self.log, self.id, tree.applied.sequence, durable, |found| {
            let folded = target.fold(found.record, &found.payload, found.at);
            folded.map_err(|e| BackupError::Stream(e.to_string()))
        })?;
        let plan = plan(&self.index.view(tree.number)?, &tree.roots, &target)?;
        let need = Need::of_plan(&plan, tree.checkpoint > CheckpointId(0));
        let mut state = self.state();
        if stands(&state) {
            state.pending.need = need;
            self.note_need(&state);
        }
        Ok(())
    }
}
