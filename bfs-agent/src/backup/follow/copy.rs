//! A whole copy: a file as it was at a record, from the tree at the applied checkpoint and the log behind it.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use bfs_common::record::{CheckpointId, FileKind, ObjectId};

use super::super::error::BackupError;
use super::super::past::Past;
use super::super::target::Source;
use super::Site;
use super::files::{Folder, zero};
use super::names::FileState;
use crate::log::{LogRef, Payloads};
use crate::tree;

/// Bytes of the log that are copied at once.
const COPY: u64 = 1 << 20;

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
        let before = state.before.unwrap_or(0);
        let size = state.content.size(before);
        let keep = state.content.keep.min(before).min(size);
        (site.room)(size).map_err(|why| self.failed(std::io::Error::other(why)))?;
        let file = self.folder.begin().map_err(|e| self.failed(e))?;
        file.set_len(size).map_err(|e| self.failed(e))?;
        if keep > 0 {
            let mut past = Past::open(site.source, applied)?;
            let mut result = Ok(());
            let all = past.content(object, 0, keep, &mut |at, bytes| {
                result = file.write_all_at(bytes, at);
                result.is_ok() && Instant::now() < self.limit
            })?;
            result.map_err(|e| self.failed(e))?;
            if !all {
                return Err(self.late());
            }
        }
        for (start, end, source) in state.content.extents.iter() {
            let (mut at, end) = (start, end.min(size));
            while at < end {
                let to = (at + COPY).min(end);
                match source {
                    Source::Log(from) => {
                        let from = LogRef { offset: from.offset + (at - start), ..from };
                        let bytes = payloads.read(from, (to - at) as usize)?;
                        file.write_all_at(bytes, at).map_err(|e| self.failed(e))?;
                    }
                    // What is new is a hole already.
                    Source::Zero if at >= keep => {}
                    Source::Zero => zero(&file, at, to.min(keep)).map_err(|e| self.failed(e))?,
                }
                at = to;
                if Instant::now() >= self.limit {
                    return Err(self.late());
                }
            }
        }
        tree::set_attributes(file.as_fd(), FileKind::Regular, &state.meta, &state.xattrs)
            .map_err(|e| self.failed(e))?;
        self.folder.put(&file, self.place).map_err(|e| self.failed(e))
    }
}
