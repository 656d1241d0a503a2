//! Promotions in the index: each is one transaction, so it is there, with the fence, or it is not.

use bfs_common::wire::History;

use super::{GroupRow, HistoryRow, Index};
use crate::backup::error::BackupError;

/// Promotions that are remembered; who was primary before the oldest of them is a stranger.
const HISTORIES_MAX: usize = 64;

impl Index {
    /// Begins a history: whoever wrote the group holds an older epoch from now on. Durable.
    ///
    /// # Errors
    /// If the index fails; then [`Self::settled`] says whether it has begun.
    pub fn begin_history(&self, name: &str, history: History) -> Result<GroupRow, BackupError> {
        self.change_row(name, |row| {
            row.granted = row.granted.next();
            if row.histories.len() >= HISTORIES_MAX {
                row.histories.remove(0);
            }
            row.histories.push(HistoryRow { history, epoch: row.granted });
        })
    }

    /// A group's row after a change of it that failed: either that stands there now, or it never will.
    ///
    /// # Errors
    /// If the index or its copy fail still; then nobody knows.
    pub fn settled(&self, name: &str) -> Result<GroupRow, BackupError> {
        self.change(|transaction| {
            transaction.copy.ready()?;
            transaction.group(name)
        })
    }

    /// Changes the newest history, durably.
    ///
    /// # Errors
    /// If the index fails.
    pub fn change_history(
        &self,
        name: &str,
        change: impl FnOnce(&mut History),
    ) -> Result<GroupRow, BackupError> {
        self.change_row(name, |row| {
            if let Some(last) = row.histories.last_mut() {
                change(&mut last.history);
            }
        })
    }

    fn change_row(&self, name: &str, change: impl FnOnce(&mut GroupRow)) -> Result<GroupRow, BackupError> {
        self.change(|transaction| {
            let mut row = transaction.group(name)?;
            change(&mut row);
            transaction.put_group(name, &row)?;
            Ok(row)
        })
    }
}
