//! One file as the last durable record leaves it: from the tree at the applied checkpoint and the log behind it.
//!
//! For the agent alone, which brings a file back that its disk lost. The tree is locked meanwhile, so that nothing of it
//! changes; a peer that does not read holds the applier up no longer than any other (see `connection`).

use std::sync::PoisonError;

use bfs_common::record::{CheckpointId, ObjectId};
use bfs_common::wire::{Frame, NewestFile};
use bytes::Bytes;

use super::error::BackupError;
use super::follow::{FileState, Pending};
use super::generations::{Contents, Send};
use super::group::Group;
use super::past::{self, Past};
use super::target::{Source, Target};
use crate::log::{LogRef, Payloads, read_range};

/// Bytes of the log that are read at once.
const COPY: u64 = 1 << 20;

impl FileState {
    /// Its size.
    pub(super) fn size(&self) -> u64 {
        self.content.size(self.before.unwrap_or(0))
    }

    /// Its bytes that are not zeros, in order: `each` gets the offset of each piece, and gives up with false. `applied` is
    /// the checkpoint of the tree, which rests.
    pub(super) fn bytes(
        &self,
        source: past::Source<'_>,
        payloads: &mut Payloads,
        applied: CheckpointId,
        object: ObjectId,
        each: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<bool, BackupError> {
        let size = self.size();
        let keep = self.content.keep.min(self.before.unwrap_or(0)).min(size);
        let mut past = if keep > 0 { Some(Past::open(source, applied)?) } else { None };
        let mut kept = |from: u64, to: u64, each: &mut dyn FnMut(u64, &[u8]) -> bool| match &mut past {
            Some(past) if from < to.min(keep) => past.content(object, from, to.min(keep), each),
            _ => Ok(true),
        };
        let mut done = 0;
        for (start, end, from) in self.content.extents.iter() {
            let (mut at, end) = (start, end.min(size));
            if at >= end {
                continue;
            }
            if !kept(done, at, each)? {
                return Ok(false);
            }
            if let Source::Log(log) = from {
                while at < end {
                    let to = (at + COPY).min(end);
                    let place = LogRef { offset: log.offset + (at - start), ..log };
                    if !each(at, payloads.read(place, (to - at) as usize)?) {
                        return Ok(false);
                    }
                    at = to;
                }
            }
            done = end;
        }
        kept(done, size, each)
    }
}

/// Sends a file. `send` gives up with false.
///
/// # Errors
/// If index, log or tree cannot be read.
pub fn newest(group: &Group, object: ObjectId, send: Send<'_>) -> Result<(), BackupError> {
    let row = group.tree.lock().unwrap_or_else(PoisonError::into_inner);
    if group.index.plan(row.number)?.is_some() {
        return Err(BackupError::Stream("a checkpoint is half applied: try again".into()));
    }
    let position = group.progress().borrow().durable.sequence.max(row.applied.sequence);
    let mut target = Target::default();
    read_range(&group.log, row.id, row.applied.sequence, position, |found| {
        target.fold(found.record, &found.payload, found.at).map_err(|e| BackupError::Stream(e.to_string()))
    })?;
    let view = group.index.view(row.number)?;
    let found = Pending { base: &view, target: &target, roots: &row.roots }.file(object)?;
    let file = found.as_ref().map(|state| NewestFile {
        size: state.size(),
        meta: state.meta,
        xattrs: state.xattrs.clone(),
    });
    let goes_on = send(Frame::Newest { position, file }, Bytes::new());
    if let Some(state) = found.filter(|_| goes_on) {
        // Nobody else is at the tree while its lock is held.
        let source = past::Source { tree: None, ..group.source() };
        let mut contents = Contents::new(object, send);
        let mut payloads = Payloads::new(&group.log);
        if state
            .bytes(source, &mut payloads, row.checkpoint, object, &mut |at, some| contents.add(at, some))?
        {
            contents.end();
        }
    }
    Ok(())
}
