//! Taking the before-images of a step, while nothing of it has been done yet.
//!
//! The bytes of an object that goes for good are not copied: its file is kept as it is, and only
//! its node is written down.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bfs_common::record::{CheckpointId, FileKind, GroupId, ObjectId};
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use super::super::damage::Damage;
use super::super::error::BackupError;
use super::super::images::{BLOCK, ImageWriter, Line};
use super::super::index::Place;
use super::super::plan::Touched;
use super::super::sums;
use super::super::target::{self, Content, Source};
use super::Step;
use crate::tree;

impl Step<'_> {
    /// Writes everything that the step changes, as it is now, and seals it. Nothing of the step may
    /// have been done.
    ///
    /// # Errors
    /// Whatever stopped it: then it can be done again from the beginning.
    pub fn take_images(
        mut self,
        dir: &Path,
        group: GroupId,
        from: CheckpointId,
        to: CheckpointId,
    ) -> Result<(), BackupError> {
        self.crash.pass()?;
        let mut writer = ImageWriter::begin(dir, group, from, to)?;
        let plan = self.plan;
        for (object, touched) in &plan.objects {
            self.crash.pass()?;
            writer.line(&Line::Object(*object, touched.before.clone()), b"")?;
            let (Some(before), Some(_)) = (&touched.before, &touched.after) else { continue };
            if before.kind != FileKind::Regular {
                continue;
            }
            let lost = touched.change.content.lost(before.size);
            if lost.is_empty() {
                continue;
            }
            let damage = self.base.damage(*object)?;
            for (start, end) in self.lost_for_good(*object, touched, before.size, &lost, &damage)? {
                writer.line(&Line::Unknown(*object, start, end), b"")?;
            }
            let file = File::from(self.open(*object, OFlags::RDONLY)?);
            for (start, end) in lost.into_iter().flat_map(|(start, end)| damage.without(start, end)) {
                self.region(&mut writer, *object, &file, start, end)?;
            }
        }
        for place in plan.detach.keys().chain(plan.attach.keys().filter(|p| !plan.detach.contains_key(p))) {
            if let Place::Entry(directory, name) = place {
                let had = plan.detach.get(place).copied();
                writer.line(&Line::Entry(*directory, name.clone(), had), b"")?;
            }
        }
        self.crash.pass()?;
        writer.seal()?;
        self.crash.pass()
    }

    /// Which of the bytes that are written over are damaged, so that nobody knows what they were. Where the new bytes
    /// of a block fit its old checksum they were these: then nothing is lost, for the tree has them again. It must be one
    /// of its own: it has none where it was zeros, but also where a step wrote only a part of what was damaged.
    fn lost_for_good(
        &mut self,
        object: ObjectId,
        touched: &Touched,
        size: u64,
        lost: &[(u64, u64)],
        damage: &Damage,
    ) -> Result<Vec<(u64, u64)>, BackupError> {
        let damaged: Vec<_> = lost.iter().flat_map(|(start, end)| damage.within(*start, *end)).collect();
        let mut gone = Vec::new();
        for (block, start, end) in sums::blocks_of(&damaged, size) {
            let old = sums::own(&self.base.sums(object), block)?;
            if old.is_none() || self.rewritten(&touched.change.content, start, end)? != old {
                let here = damaged.iter().map(|(s, e)| (*s.max(&start), *e.min(&end)));
                gone.extend(here.filter(|(s, e)| s < e));
            }
        }
        Ok(gone)
    }

    /// The checksum of bytes as the step writes them; `None` if it does not write all of them.
    fn rewritten(&mut self, content: &Content, start: u64, end: u64) -> Result<Option<u32>, BackupError> {
        let (mut at, mut sum) = (start, 0);
        for (from, to, source) in content.extents.over(start, end) {
            let to = to.min(end);
            if from > at {
                return Ok(None);
            }
            let len = (to - at) as usize;
            sum = match target::shifted(source, at - from) {
                Source::Log(from) => crc32c::crc32c_append(sum, self.logged(from, len)?),
                Source::Zero => crc32c::crc32c_append(sum, &vec![0; len]),
            };
            at = to;
        }
        Ok((at >= end && content.size(0) >= end).then_some(sum))
    }

    fn region(
        &mut self,
        writer: &mut ImageWriter,
        object: ObjectId,
        file: &File,
        start: u64,
        end: u64,
    ) -> Result<(), BackupError> {
        let failed = |error: std::io::Error| BackupError::io("read object", object.to_string())(error);
        let mut at = start;
        while at < end {
            let (data, data_end) = next_data(file, at, end).map_err(|e| failed(e.into()))?;
            if data > at {
                writer.line(&Line::Zero(object, at, data), b"")?;
            }
            at = data;
            while at < data_end {
                // Blocks end at multiples of their size, so that later images cover whole ones.
                let len = ((at / BLOCK as u64 + 1) * BLOCK as u64).min(data_end) - at;
                self.buffer.resize(self.buffer.len().max(BLOCK), 0);
                let buffer = &mut self.buffer[..len as usize];
                file.read_exact_at(buffer, at).map_err(failed)?;
                self.crash.pass()?;
                writer.line(&Line::Bytes(object, at), buffer)?;
                at += len;
            }
        }
        Ok(())
    }
}

/// The next range with data at or after `at`, below `end`; an empty one at `end` if there is none.
///
/// # Errors
/// What the system says.
pub(in crate::backup) fn next_data(file: &File, at: u64, end: u64) -> Result<(u64, u64), Errno> {
    // A file system that knows no holes says that all is data (lseek(2)).
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) if data >= end => Ok((end, end)),
        Ok(data) => {
            let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?;
            Ok((data, hole.min(end)))
        }
        Err(Errno::NXIO) => {
            let size =
                tree::stat_fd(file.as_fd()).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
            // Beyond the end there is nothing, and what should be there is lost.
            if size.size < end { Err(Errno::IO) } else { Ok((end, end)) }
        }
        Err(error) => Err(error),
    }
}
