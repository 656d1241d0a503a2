//! Digests of the blocks of all files, for an agent that begins anew or has to read everything once more: what it reads
//! and has here already it does not send.
//!
//! They are of the tree; where the records behind the applied checkpoint say something about a block, nothing is known of
//! it. The caller may be slow; the applier waits meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::time::Duration;

use bfs_common::record::{FileKind, ObjectId, Sequence};
use bfs_common::wire::{DIGEST_BLOCK, DIGEST_BYTES, DigestLine, Frame};
use rustix::fs::OFlags;

use super::apply::{CrashPoint, Step};
use super::error::BackupError;
use super::group::Group;
use super::plan::Plan;
use super::target::Target;
use crate::log::read_range;
use crate::tree;

/// How long is waited for the record that they are asked for; without it there are none.
pub const WAIT: Duration = Duration::from_secs(10);
/// About how many bytes of digests a frame gets.
const FRAME_BYTES: usize = 1 << 20;
/// Bytes read at once: whole blocks.
const READ_BYTES: usize = 256 << 10;
/// Stands for a block that is not known: no digest is like that.
const UNKNOWN: [u8; DIGEST_BYTES] = [0; DIGEST_BYTES];

/// Sends the digests of the files as they are after a record. `send` gives up with false.
///
/// # Errors
/// If index, log or tree cannot be read.
pub fn digests(
    group: &Group,
    position: Sequence,
    send: &mut dyn FnMut(Frame) -> bool,
) -> Result<(), BackupError> {
    let row = group.tree.lock().unwrap_or_else(PoisonError::into_inner);
    // A tree that is further on, or between two checkpoints, has nothing to say.
    if row.applied.sequence > position || group.index.plan(row.number)?.is_some() {
        send(Frame::Digests { lines: Vec::new(), last: true });
        return Ok(());
    }
    let mut target = Target::default();
    read_range(&group.log, row.id, row.applied.sequence, position, |found| {
        target.fold(found.record, &found.payload, found.at).map_err(|e| BackupError::Stream(e.to_string()))
    })?;
    let view = group.index.view(row.number)?;
    let (nothing, mut never) = (Plan::default(), CrashPoint::default());
    let mut step = Step::new(&group.area, &view, &nothing, &mut never);
    let mut lines = Lines { lines: Vec::new(), bytes: 0, send };
    let mut buffer = vec![0; READ_BYTES];
    let all = view.each(|object, node| {
        let change = target.objects.get(&object);
        if node.kind != FileKind::Regular || node.size == 0 || change.is_some_and(|change| change.forgotten) {
            return Ok(true);
        }
        let lost = change.map_or_else(Vec::new, |change| change.content.lost(node.size));
        of_file(&mut step, object, (node.size, &lost), &mut buffer, &mut lines)
    })?;
    if all {
        lines.end();
    }
    Ok(())
}

/// The digests of one file, of which these ranges do not count; false if nobody wants more. A file that others changed
/// has none, or others.
fn of_file(
    step: &mut Step<'_>,
    object: ObjectId,
    (size, lost): (u64, &[(u64, u64)]),
    buffer: &mut [u8],
    lines: &mut Lines<'_>,
) -> Result<bool, BackupError> {
    let file = match step.open(object, OFlags::RDONLY) {
        Ok(fd) => File::from(fd),
        Err(BackupError::Foreign(_)) => return Ok(true),
        Err(error) => return Err(error),
    };
    let failed = |error: std::io::Error| BackupError::io("read object", object.to_string())(error);
    if tree::stat_fd(std::os::fd::AsFd::as_fd(&file)).map_err(failed)?.size != size {
        return Ok(true);
    }
    let mut at = 0;
    while at < size {
        let len = (size - at).min(READ_BYTES as u64) as usize;
        file.read_exact_at(&mut buffer[..len], at).map_err(failed)?;
        let mut digests = Vec::with_capacity(len / DIGEST_BLOCK as usize * DIGEST_BYTES + DIGEST_BYTES);
        for (start, block) in
            (at..).step_by(DIGEST_BLOCK as usize).zip(buffer[..len].chunks(DIGEST_BLOCK as usize))
        {
            digests.extend_from_slice(&if meets(lost, start, start + block.len() as u64) {
                UNKNOWN
            } else {
                tree::block_digest(block)
            });
        }
        if !lines.add(object, digests) {
            return Ok(false);
        }
        at += len as u64;
    }
    Ok(true)
}

/// Whether one of the ranges, which are in order, has some of these bytes.
fn meets(ranges: &[(u64, u64)], start: u64, end: u64) -> bool {
    let behind = ranges.partition_point(|(_, until)| *until <= start);
    ranges.get(behind).is_some_and(|(from, _)| *from < end)
}

/// Lines on their way.
struct Lines<'a> {
    lines: Vec<(ObjectId, Vec<u8>)>,
    bytes: usize,
    send: &'a mut dyn FnMut(Frame) -> bool,
}

impl Lines<'_> {
    fn add(&mut self, object: ObjectId, digests: Vec<u8>) -> bool {
        self.bytes += digests.len() + 32;
        match self.lines.last_mut() {
            Some(last) if last.0 == object => last.1.extend_from_slice(&digests),
            _ => self.lines.push((object, digests)),
        }
        self.bytes < FRAME_BYTES || self.frame(false)
    }

    fn frame(&mut self, last: bool) -> bool {
        self.bytes = 0;
        let lines = std::mem::take(&mut self.lines).into_iter();
        let lines = lines.map(|(object, digests)| DigestLine { object, digests: digests.into() });
        (self.send)(Frame::Digests { lines: lines.collect(), last })
    }

    fn end(mut self) {
        self.frame(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_meets_what_has_some_of_its_bytes() {
        let ranges = [(10, 20), (30, 31)];
        for (start, end, expected) in
            [(0, 10, false), (0, 11, true), (19, 25, true), (20, 30, false), (20, 31, true), (31, 99, false)]
        {
            assert_eq!(meets(&ranges, start, end), expected, "{start}..{end}");
        }
        assert!(!meets(&[], 0, u64::MAX));
    }
}
