//! The bytes of files: from the log into the tree, and their checksums.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use bfs_common::record::ObjectId;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::super::error::BackupError;
use super::super::plan::Touched;
use super::super::sums;
use super::super::target::Source;
use super::Step;
use crate::log::LogRef;
use crate::tree;

/// Bytes copied at once from the log to a file.
const COPY: usize = 1 << 20;

impl Step<'_> {
    pub(super) fn content(
        &mut self,
        object: ObjectId,
        fd: &OwnedFd,
        touched: &Touched,
    ) -> Result<(), BackupError> {
        let content = &touched.change.content;
        let failed = |what, error: Errno| BackupError::io(what, format!("object {object}"))(error);
        let now = tree::stat_fd(fd.as_fd()).map_err(BackupError::io("stat", object.to_string()))?.size;
        let size = touched.after.as_ref().map_or(0, |n| n.size);
        // What lies behind its old end somebody else wrote there, or the first try of this step, which is done again.
        let keep = content.keep.min(touched.before.as_ref().map_or(0, |n| n.size));
        if keep < now {
            rustix::fs::ftruncate(fd, keep).map_err(|e| failed("cut", e))?;
        }
        if keep.min(now) != size {
            rustix::fs::ftruncate(fd, size).map_err(|e| failed("set the size of", e))?;
        }
        for (start, end, source) in content.extents.iter() {
            let end = end.min(size);
            if start >= end {
                continue;
            }
            self.crash.pass()?;
            match source {
                Source::Log(from) => self.copy(object, fd, start, end, from)?,
                // All that is kept of a new file is nothing: it has a hole there.
                Source::Zero if start >= content.keep => {}
                Source::Zero => zero(fd, start, end).map_err(|e| failed("make a hole in", e))?,
            }
        }
        Ok(())
    }

    /// Notes what the file has now; a redo does the same.
    pub(super) fn checksums(
        &mut self,
        object: ObjectId,
        fd: &OwnedFd,
        touched: &Touched,
        size: u64,
    ) -> Result<(), BackupError> {
        let file =
            File::from(rustix::io::dup(fd).map_err(BackupError::io("open object", object.to_string()))?);
        let before = touched.before.as_ref().map(|node| node.size);
        let content = &touched.change.content;
        let mut damage = self.base.damage(object)?;
        if !damage.is_empty() {
            content.extents.iter().for_each(|(start, end, _)| damage.remove(start, end));
            damage.remove(content.keep.min(size), u64::MAX);
            self.damage.push((object, damage.clone()));
        }
        let change = sums::of_change(object, &file, content, before, size, &damage, &mut self.buffer)?;
        self.sums.push((object, change));
        Ok(())
    }

    fn copy(
        &mut self,
        object: ObjectId,
        fd: &OwnedFd,
        start: u64,
        end: u64,
        from: LogRef,
    ) -> Result<(), BackupError> {
        let mut at = start;
        while at < end {
            let len = (end - at).min(COPY as u64) as usize;
            let bytes = self.logged(LogRef { offset: from.offset + (at - start), ..from }, len)?;
            write_all_at(fd, bytes, at).map_err(BackupError::io("write object", object.to_string()))?;
            at += len as u64;
        }
        Ok(())
    }

    /// Bytes of the log.
    pub(super) fn logged(&mut self, from: LogRef, len: usize) -> Result<&[u8], BackupError> {
        Ok(self.payloads.read(from, len)?)
    }
}

fn zero(fd: &OwnedFd, start: u64, end: u64) -> Result<(), Errno> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(fd, hole, start, end - start) {
        Err(Errno::OPNOTSUPP) => {
            let zeros = vec![0; COPY];
            let mut at = start;
            while at < end {
                let len = (end - at).min(COPY as u64) as usize;
                write_all_at(fd, &zeros[..len], at)?;
                at += len as u64;
            }
            Ok(())
        }
        other => other,
    }
}

fn write_all_at(fd: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(fd, bytes, at) {
            Ok(len) => {
                bytes = &bytes[len..];
                at += len as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
