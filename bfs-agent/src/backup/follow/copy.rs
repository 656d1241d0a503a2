//! A whole copy: a file as it was at a record, from the tree at the applied checkpoint and the log behind it.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use bfs_common::record::{CheckpointId, FileKind, ObjectId};

use super::super::error::BackupError;
use super::Site;
use super::files::Folder;
use super::names::FileState;
use crate::log::Payloads;
use crate::tree;

/// Where to, and until when.
pub(super) struct Copying<'a> {
    pub(super) folder: &'a Folder,
    pub(super) place: &'a Path,
    pub(super) limit: Instant,
}

impl Copying<'_> {
    fn failed(&self, error: std::io::Error) -> BackupError {
        BackupError::io("write follower", self.place)(error)
    }

    fn late(&self) -> BackupError {
        self.failed(std::io::Error::other("it took longer than the time limit of its policy"))
    }

    /// Makes the follower what the file was. `applied` is the checkpoint of the tree, which rests.
    pub(super) fn copy(
        &self,
        site: &Site<'_>,
        payloads: &mut Payloads,
        applied: CheckpointId,
        object: ObjectId,
        state: &FileState,
    ) -> Result<(), BackupError> {
        let size = state.size();
        (site.room)(size).map_err(|why| self.failed(std::io::Error::other(why)))?;
        let file = self.folder.begin().map_err(|e| self.failed(e))?;
        file.set_len(size).map_err(|e| self.failed(e))?;
        let mut result = Ok(());
        let all = state.bytes(site.source, payloads, applied, object, &mut |at, bytes| {
            result = file.write_all_at(bytes, at);
            result.is_ok() && Instant::now() < self.limit
        })?;
        result.map_err(|e| self.failed(e))?;
        if !all {
            return Err(self.late());
        }
        tree::set_attributes(file.as_fd(), FileKind::Regular, &state.meta, &state.xattrs)
            .map_err(|e| self.failed(e))?;
        self.folder.put(&file, self.place).map_err(|e| self.failed(e))
    }
}
