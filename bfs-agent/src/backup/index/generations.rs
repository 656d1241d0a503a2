//! The checkpoints that are kept: which there are, and what goes with those that are dropped.

use bfs_common::record::{CheckpointId, ObjectId};
use redb::{ReadableDatabase, ReadableTable};

use super::super::error::BackupError;
use super::{DAMAGE, GENERATIONS, GenerationRow, Index, KEPT, SUMS, pack, rows, unpack};

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
        self.with(|db| {
            let write = db.begin_write()?;
            let mut gone = Vec::new();
            let oldest = {
                let mut generations = write.open_table(GENERATIONS)?;
                for checkpoint in drop {
                    generations.remove((group, checkpoint.0))?;
                }
                let oldest = match generations.range((group, 0)..=(group, u64::MAX))?.next() {
                    Some(line) => line?.0.value().1,
                    None => u64::MAX,
                };
                let all = (group, 0)..=(group, u64::MAX);
                write.open_table(KEPT)?.retain_in(all, |(_, object), last| {
                    if last < oldest {
                        gone.push(ObjectId(object));
                    }
                    last >= oldest
                })?;
                let mut sums = write.open_table(SUMS)?;
                let mut damage = write.open_table(DAMAGE)?;
                for object in &gone {
                    sums.retain_in(rows(group, *object, 0, u64::MAX), |_, _| false)?;
                    damage.remove((group, object.0))?;
                }
                CheckpointId(oldest)
            };
            write.commit()?;
            Ok((oldest, gone))
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
        self.with(|db| {
            let write = db.begin_write()?;
            {
                let mut generations = write.open_table(GENERATIONS)?;
                let (mut changed, mut bytes) = (0, 0);
                for checkpoint in drop {
                    if let Some(row) = generations.remove((group, checkpoint.0))? {
                        let row: GenerationRow = unpack("generation", row.value())?;
                        changed += row.changed;
                        bytes += row.bytes;
                    }
                }
                let row = generations.get((group, newer.0))?;
                let row = row.map(|row| unpack::<GenerationRow>("generation", row.value())).transpose()?;
                if let Some(mut row) = row {
                    row.changed += changed;
                    row.bytes += bytes;
                    generations.insert((group, newer.0), &pack(&row)[..])?;
                }
                let mut kept = write.open_table(KEPT)?;
                let mut sums = write.open_table(SUMS)?;
                let mut damage = write.open_table(DAMAGE)?;
                for (object, of) in files {
                    if let Some(checkpoint) = of {
                        kept.insert((group, object.0), checkpoint.0)?;
                    } else {
                        kept.remove((group, object.0))?;
                        sums.retain_in(rows(group, *object, 0, u64::MAX), |_, _| false)?;
                        damage.remove((group, object.0))?;
                    }
                }
            }
            Ok(write.commit()?)
        })
    }
}
