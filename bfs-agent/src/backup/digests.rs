//! Digests of the blocks of all files, for an agent that begins anew: what it reads and has here already
//! it does not send.
//!
//! They are of the tree, so only of files about which the records behind the applied checkpoint say
//! nothing. The caller may be slow; the applier waits meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;

use bfs_common::record::{FileKind, ObjectId, Sequence};
use bfs_common::wire::{DIGEST_BLOCK, DIGEST_BYTES, DigestLine, Frame};
use rustix::fs::OFlags;

use super::apply::{CrashPoint, Step};
use super::error::BackupError;
use super::group::Group;
use super::plan::{Plan, plan};
use super::target::Target;
use crate::log::read_range;
use crate::tree;

/// About how many bytes of digests a frame gets.
const FRAME_BYTES: usize = 1 << 20;
/// Bytes read at once: whole blocks.
const READ_BYTES: usize = 256 << 10;

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
    let touched = plan(&view, &row.roots, &target)?.objects;
    let (nothing, mut never) = (Plan::default(), CrashPoint::default());
    let mut step = Step::new(&group.area, &view, &nothing, &mut never);
    let mut lines = Lines { lines: Vec::new(), bytes: 0, send };
    let mut buffer = vec![0; READ_BYTES];
    let all = view.each(|object, node| {
        if node.kind != FileKind::Regular || node.size == 0 || touched.contains_key(&object) {
            return Ok(true);
        }
        of_file(&mut step, object, node.size, &mut buffer, &mut lines)
    })?;
    if all {
        lines.end();
    }
    Ok(())
}

/// The digests of one file; false if nobody wants more. A file that others changed has none, or others.
fn of_file(
    step: &mut Step<'_>,
    object: ObjectId,
    size: u64,
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
        for block in buffer[..len].chunks(DIGEST_BLOCK as usize) {
            digests.extend_from_slice(&tree::block_digest(block));
        }
        if !lines.add(object, digests) {
            return Ok(false);
        }
        at += len as u64;
    }
    Ok(true)
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
