//! The checkpoints that are kept: which there are, and what goes with those that are dropped.

use bfs_common::record::{CheckpointId, ObjectId};
use redb::{ReadableDatabase, ReadableTable};

use super::super::error::BackupError;
use super::change::Change;
use super::copy::Line;
use super::{GENERATIONS, GenerationRow, Index, pack, unpack};

impl Index {
    /// The generations of a group, the oldest first.
    ///
    /// # Errors
    /// If the index fails.
    pub fn generations(&self, group: u32) -> Result<Vec<(CheckpointId, GenerationRow)>, BackupError> {
        self.with(|db| {
            let read = db.begin_read()?;
            let table = read.open_table(GENERATIONS)?;
            let mut found = Vec::new();
            for line in table.range((group, 0)..=(group, u64::MAX))? {
                let (key, row) = line?;
                found.push((CheckpointId(key.value().1), unpack("generation", row.value())?));
            }
            Ok(found)
        })
    }

    /// Drops generations. Returns the oldest that is left, and the objects whose files were kept
    /// only for the others.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn drop_generations(
        &self,
        group: u32,
        drop: &[CheckpointId],
    ) -> Result<(CheckpointId, Vec<ObjectId>), BackupError> {
        self.change(|change| {
            for checkpoint in drop {
                change.put(&Line::Generation(group, checkpoint.0, None))?;
            }
            let all = (group, 0)..=(group, u64::MAX);
            let oldest = match change.tables.generations.range(all.clone())?.next() {
                Some(line) => line?.0.value().1,
                None => u64::MAX,
            };
            let mut gone = Vec::new();
            for line in change.tables.kept.range(all)? {
                let (key, last) = line?;
                if last.value() < oldest {
                    gone.push(ObjectId(key.value().1));
                }
            }
            for object in &gone {
                change.put(&Line::Kept(group, object.0, None))?;
                change.drop_bytes(group, *object)?;
            }
            Ok((CheckpointId(oldest), gone))
        })
    }

    /// Drops generations whose images were merged into those of an older one. What they had changed counts for the
    /// one behind them; files that were kept for them are kept for another one from now on, or for none.
    ///
    /// # Errors
    /// If the index fails; then nothing is changed.
    pub fn merge_generations(
        &self,
        group: u32,
        drop: &[CheckpointId],
        newer: CheckpointId,
        files: &[(ObjectId, Option<CheckpointId>)],
    ) -> Result<(), BackupError> {
        self.change(|change| {
            let (mut changed, mut bytes) = (0, 0);
            let row = |change: &Change<'_, '_>, at: CheckpointId| {
                let row = change.tables.generations.get((group, at.0))?;
                row.map(|row| unpack::<GenerationRow>("generation", row.value())).transpose()
            };
            for checkpoint in drop {
                if let Some(row) = row(change, *checkpoint)? {
                    change.put(&Line::Generation(group, checkpoint.0, None))?;
                    changed += row.changed;
                    bytes += row.bytes;
                }
            }
            if let Some(mut row) = row(change, newer)? {
                row.changed += changed;
                row.bytes += bytes;
                change.put(&Line::Generation(group, newer.0, Some(pack(&row).into())))?;
            }
            for (object, of) in files {
                change.put(&Line::Kept(group, object.0, of.map(|checkpoint| checkpoint.0)))?;
                if of.is_none() {
                    change.drop_bytes(group, *object)?;
                }
            }
            Ok(())
        })
    }
}
