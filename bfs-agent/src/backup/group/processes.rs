//! The images of processes that belong to checkpoints: taken only for a checkpoint that is confirmed, from the agent that
//! writes the group, and gone with it.

use std::sync::Arc;
use std::time::Duration;

use bfs_common::record::{CheckpointId, CheckpointLabel, Epoch};
use bfs_common::wire::Refusal;

use super::super::error::BackupError;
use super::super::process::Sets;
use super::super::process::put::{Begun, Put, PutError};
use super::{Group, locked};

/// How long images wait for their checkpoint: nothing else is heard on their connection meanwhile.
const CONFIRMED: Duration = Duration::from_secs(5);

/// Who puts images here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Puts {
    /// The agent that writes the group's stream, in this epoch.
    Epoch(Epoch),
    /// One whose checkpoints come here whole: when the checkpoint was made, nanoseconds since 1970.
    Moment(i64),
}

impl Puts {
    /// As [`bfs_common::wire::Frame::PutProcess`] says it.
    #[must_use]
    pub fn of(epoch: Epoch, made_ns: Option<i64>) -> Self {
        made_ns.map_or(Self::Epoch(epoch), Self::Moment)
    }
}

fn refused(group: &str, error: PutError) -> Refusal {
    match error {
        PutError::Busy => Refusal::Busy { name: group.into() },
        PutError::Bad(why) => Refusal::Bad(why),
        PutError::Store(error) => Refusal::Store(error.to_string()),
    }
}

impl Group {
    /// The images.
    #[must_use]
    pub fn process(&self) -> &Arc<Sets> {
        &self.process
    }

    /// Begins to take in the images of a checkpoint, when it is confirmed; none where they are there already.
    ///
    /// # Errors
    /// Why they are not taken.
    pub async fn put_process(
        self: &Arc<Self>,
        by: Puts,
        at: CheckpointId,
    ) -> Result<Option<Box<Put>>, Refusal> {
        self.admit_process(by)?;
        let mut progress = self.progress();
        let confirmed = tokio::time::timeout(CONFIRMED, progress.wait_for(|p| p.confirmed >= at));
        match confirmed.await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(Refusal::Store("it is being closed".into())),
            Err(_) => return Err(Refusal::Behind(format!("checkpoint {at} is not confirmed yet"))),
        }
        // Who was fenced meanwhile may have another checkpoint of this number.
        self.admit_process(by)?;
        let group = Arc::clone(self);
        let begin = move || {
            let label = group.label_of(at).map_err(|error| Refusal::Store(error.to_string()))?;
            let Some(label) = label else {
                return Err(Refusal::Bad(format!("checkpoint {at} is not kept any more")));
            };
            if let Puts::Moment(made_ns) = by
                && made_ns != label.wall_ns
            {
                return Err(Refusal::Bad(format!("checkpoint {at} is another one here")));
            }
            match group.process.begin(at, label.wall_ns) {
                Ok(Begun::There) => Ok(None),
                Ok(Begun::Put(put)) => Ok(Some(put)),
                Err(error) => Err(refused(&group.name, error)),
            }
        };
        tokio::task::spawn_blocking(begin).await.map_err(|error| Refusal::Store(error.to_string()))?
    }

    /// Whether somebody may put images here. Who names the moment of a checkpoint puts what belongs to that one.
    ///
    /// # Errors
    /// The refusal for whoever is fenced.
    pub fn admit_process(&self, by: Puts) -> Result<(), Refusal> {
        match by {
            Puts::Epoch(epoch) => self.state().admit(epoch).map(drop),
            Puts::Moment(_) => Ok(()),
        }
    }

    /// Whether there is room for so many bytes of images.
    ///
    /// # Errors
    /// [`Refusal::Full`].
    pub fn process_room(&self, bytes: u64) -> Result<(), Refusal> {
        self.room.check(&self.disks, bytes).map_err(|short| Refusal::Full(short.to_string()))
    }

    /// Takes more of the images, or ends them.
    ///
    /// # Errors
    /// The refusal for whoever sends them.
    pub fn more_of_process<T>(&self, done: Result<T, PutError>) -> Result<T, Refusal> {
        done.map_err(|error| refused(&self.name, error))
    }

    /// The label of a confirmed checkpoint that is kept, or is going to be applied.
    fn label_of(&self, at: CheckpointId) -> Result<Option<CheckpointLabel>, BackupError> {
        {
            let state = self.state();
            if let Some(step) = state.steps.iter().find(|step| step.marker.checkpoint == at) {
                return Ok(Some(step.marker.label.clone()));
            }
        }
        // It may just have been applied: then it is a generation.
        let all = self.index.generations(self.number)?;
        Ok(all.into_iter().find(|(number, _)| *number == at).map(|(_, row)| row.label))
    }

    /// Drops images of checkpoints that are not kept any more; where they are too much, or room is short, those of the
    /// oldest, whose files stay.
    pub(super) fn retire_process(&self, short: bool, due: bool) -> Result<(), BackupError> {
        let applied = locked(&self.tree).checkpoint;
        let kept = self.index.generations(self.number)?;
        let beyond = if short {
            self.process.beyond(0)
        } else if due && let Some(disk) = self.disks.store.size() {
            // Half of what generations may take.
            self.process.beyond(disk / 200 * u64::from(self.limits.retention.space_percent))
        } else {
            Default::default()
        };
        self.process.retain(|at| {
            let stays = at > applied || kept.binary_search_by_key(&at, |(number, _)| *number).is_ok();
            stays && !beyond.contains(&at)
        })
    }

    /// What they take of the disk of the before-images.
    pub(super) fn process_bytes(&self) -> u64 {
        if self.disks.images_beside_log() { self.process.allocated() } else { 0 }
    }
}
