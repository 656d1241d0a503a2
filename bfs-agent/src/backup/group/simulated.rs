//! A group whose threads are the simulation's: each piece of their work is done when it says so.

use std::path::Path;
use std::sync::Arc;

use bfs_common::record::{CheckpointId, Epoch, GroupId, Sequence};
use bfs_common::wire::{Frame, GenerationLine, History, PromoteStage, Promoter, Refusal};
use bytes::Bytes;
use tokio::sync::mpsc;

use super::super::apply::Area;
use super::super::error::BackupError;
use super::super::index::{GroupRow, Index};
use super::super::past::Past;
use super::super::retention::Retention;
use super::super::room::Room;
use super::super::serve::Shared;
use super::super::store::Store;
use super::super::transfer::{Incoming, Receiver, finish_all, send};
use super::{Group, Limits, Progress, QUEUE, Slot, ToLog, locked};
use crate::log::writer::LogWriter;
use crate::simulation::disk;

/// Name of the only group.
pub(crate) const NAME: &str = "g";

/// See the module.
pub(crate) struct Simulated {
    pub group: Arc<Group>,
    log: LogWriter,
    from_group: mpsc::Receiver<ToLog>,
    failed: bool,
    /// Of the last connection that wrote, which lives until the next.
    slot: Option<Slot>,
    runtime: tokio::runtime::Runtime,
    shared: Arc<Shared>,
}

/// Bytes of a segment of its log.
const SEGMENT: u64 = 1024;

impl Simulated {
    /// Opens or makes a store with its group, as a replayer that starts.
    pub fn open(path: &Path, id: GroupId, retention: Retention) -> Result<Self, BackupError> {
        let store = Store::open(path)?;
        let index = Arc::new(Index::open(store.path())?);
        index.compare_copy();
        index.limit_copy(500);
        let known = index.groups()?.into_iter().find(|(name, _)| name == NAME);
        let row = match known {
            Some((_, row)) => row,
            None => {
                let row = GroupRow::new(1, id, Vec::new());
                index.put_group(NAME, &row)?;
                row
            }
        };
        let area = Area::open(&store, NAME, &[], &[])?;
        let log = store.group_dir("log", NAME)?;
        let receive = store.path().join("receive");
        finish_all(&receive, |name| Ok((name == NAME).then(|| (log.clone(), row.id))))?;
        let incoming = Incoming::of(&receive, NAME);
        let limits = Limits { pending_max: u64::MAX, retention };
        let room = Arc::new(Room::default());
        let (group, mut writer, from_group) =
            Group::assemble(NAME, row, index.clone(), area, (log, incoming), limits, room.clone())?;
        writer.limit_segments(SEGMENT);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(BackupError::io("start", "an event loop"))?;
        let shared = Arc::new(Shared::simulated(store, index, (NAME, &group), room, SEGMENT));
        Ok(Self { group, log: writer, from_group, failed: false, slot: None, runtime, shared })
    }

    /// What the session of a connection does at a Hello of this writer; without an epoch a new one is granted.
    pub fn hello(&mut self, connection: u64, id: GroupId, epoch: Option<Epoch>) -> Result<Epoch, Refusal> {
        self.group.admit_writer(id)?;
        {
            let mut state = self.group.state();
            if let Some(epoch) = epoch {
                state.admit(epoch)?;
            }
            let slot = Slot::of(connection);
            state.slot = Some(slot.clone());
            self.slot = Some(slot);
        }
        let group = self.group.clone();
        self.beside_log(group.drain())?;
        match epoch {
            Some(epoch) => Ok(epoch),
            None => self.group.grant().map_err(|error| Refusal::Store(error.to_string())),
        }
    }

    /// Does something that waits for the log, while that takes all that is queued.
    fn beside_log<T>(&mut self, work: impl Future<Output = T>) -> T {
        let Self { group, log, from_group, failed, runtime, .. } = self;
        let logs = async {
            tokio::task::yield_now().await;
            while let Ok(first) = from_group.try_recv() {
                group.log_together(first, log, from_group, failed);
            }
        };
        // While the queue is full the other makes room.
        runtime.block_on(async { tokio::join!(work, logs).0 })
    }

    /// Another writer takes over, also from one that answers; what is not finished before goes on.
    pub fn promote(&mut self, by: Promoter) -> Result<History, Refusal> {
        let group = self.group.clone();
        match self.beside_log(group.promote(by, true))? {
            Frame::Promoted { history, .. } => Ok(history),
            other => panic!("{other:?}"),
        }
    }

    /// The newest promotion.
    pub fn newest_promotion(&self) -> Result<Option<History>, Refusal> {
        self.group.settle()?;
        Ok(self.group.state().history().map(|row| row.history.clone()))
    }

    /// The new writer has its files.
    pub fn promotion_is_done(&self, history: &History) -> Result<(), Refusal> {
        self.group.promote_step(history.history, PromoteStage::Done).map(drop)
    }

    /// A frame can be taken without waiting for the log.
    pub fn has_room(&self) -> bool {
        self.from_group.len() < QUEUE
    }

    /// A frame of records.
    pub fn take(
        &mut self,
        connection: u64,
        epoch: Epoch,
        first: Sequence,
        count: u32,
        body: Bytes,
    ) -> Result<(), Refusal> {
        self.runtime.block_on(self.group.take(connection, epoch, first, count, body))
    }

    /// What the session of a connection does with a stream of another store, or with as much of it as came.
    pub fn receive(&mut self, connection: u64, stream: &[Bytes]) -> Result<CheckpointId, Refusal> {
        let begins = Receiver::begin(self.shared.clone(), None);
        let mut receiver = self.beside_log(begins);
        stream.iter().try_for_each(|piece| receiver.feed(piece))?;
        let whole = receiver.finish()?;
        let group = self.group.clone();
        self.beside_log(group.adopt(connection, &whole))
    }

    /// The stream that another store gets of a checkpoint, as the difference to an older one or whole.
    pub fn send(&self, from: Option<CheckpointId>, to: CheckpointId) -> Result<Vec<Bytes>, BackupError> {
        let mut pieces = Vec::new();
        send(self.group.source(), from, to, &mut |piece| {
            pieces.push(piece);
            true
        })?;
        Ok(pieces)
    }

    /// The log thread's turn.
    pub fn log(&mut self) {
        if let Ok(first) = self.from_group.try_recv() {
            disk::panics(|| {
                self.group.log_contained(first, &mut self.log, &mut self.from_group, &mut self.failed);
            });
        } else if !self.failed {
            // As after a pause.
            let _ = self.log.seal();
        }
    }

    /// The applier's turn; false when there is nothing to do.
    pub fn apply(&self) -> Result<bool, BackupError> {
        {
            let durable = self.progress().durable.sequence;
            let mut state = self.group.state();
            if !state.is_due(durable) && !state.untidy {
                return Ok(false);
            }
            // Until all of it has worked.
            state.untidy = true;
        }
        let (applied, tidied) = disk::panics(|| self.group.turn(false));
        applied?;
        self.group.tell_applied();
        tidied?;
        self.group.state().untidy = false;
        self.group.index.copy(&|| true)?;
        Ok(true)
    }

    /// What agents are told.
    pub fn progress(&self) -> Progress {
        self.group.progress.borrow().clone()
    }

    /// Whether a step is half done.
    pub fn is_applying(&self) -> bool {
        let number = locked(&self.group.tree).number;
        self.group.index.plan(number).map_or(true, |plan| plan.is_some())
    }

    /// The applied checkpoint, and those that are kept.
    pub fn kept(&self) -> Result<(CheckpointId, Vec<CheckpointId>), BackupError> {
        let row = self.group.index.group(NAME)?;
        let kept = self.group.index.generations(row.number)?;
        Ok((row.checkpoint, kept.into_iter().map(|(checkpoint, _)| checkpoint).collect()))
    }

    /// What others are told of those.
    pub fn lines(&self) -> Result<Vec<GenerationLine>, BackupError> {
        self.group.generations()
    }

    /// Reads a generation.
    pub fn read(
        &self,
        checkpoint: CheckpointId,
        read: impl FnOnce(&mut Past<'_>) -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        self.group.hold(checkpoint)?;
        let done = Past::open(self.group.source(), checkpoint).and_then(|mut past| read(&mut past));
        self.group.release(checkpoint);
        done
    }
}
