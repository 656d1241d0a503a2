//! Whole copies of the index: all rows as they are at one change.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::super::super::error::BackupError;
use super::{HEADER, Kind, Line, Mark, Part, files, header, path};
use crate::durable;
use crate::log::sync_dir;

/// Bytes that are synced together: so whoever syncs beside it does not wait for all of it.
const SYNC_BYTES: u64 = 8 << 20;

/// A whole copy that is being written, beside the place that it will have.
#[derive(Debug)]
pub(in super::super) struct Writer<'a> {
    dir: &'a Path,
    mark: Mark,
    file: File,
    part: Part,
    synced: u64,
}

impl<'a> Writer<'a> {
    /// Begins one that has all changes up to this.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn begin(dir: &'a Path, mark: Mark) -> Result<Self, BackupError> {
        let new = path(dir, Kind::Whole, mark.number).with_extension("new-whole");
        let make = || -> std::io::Result<File> {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all_at(&header(Kind::Whole, &mark), 0)?;
            Ok(file)
        };
        let file = make().map_err(BackupError::io("make", &new))?;
        Ok(Self { dir, mark, file, part: Part::new(mark.number, &mark.chain, HEADER), synced: 0 })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn line(&mut self, line: &Line) -> Result<(), BackupError> {
        let mut written = self.part.line(&self.file, line);
        if self.part.at() - self.synced >= SYNC_BYTES {
            self.synced = self.part.at();
            written = written.and_then(|()| durable::data(&self.file));
        }
        written.map_err(BackupError::io("write", path(self.dir, Kind::Whole, self.mark.number)))
    }

    /// It is complete: durably there under its name. Returns its bytes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn seal(self) -> Result<u64, BackupError> {
        let place = path(self.dir, Kind::Whole, self.mark.number);
        let new = place.with_extension("new-whole");
        let Self { part, file, .. } = self;
        let write = || -> std::io::Result<u64> {
            let (end, _) = part.end(&file)?;
            durable::file(&file)?;
            std::fs::rename(&new, &place)?;
            Ok(end)
        };
        let end = write().map_err(BackupError::io("write", &place))?;
        sync_dir(self.dir)?;
        Ok(end)
    }
}

/// Removes all but the last two, and what was begun. Returns the number of the older one.
///
/// # Errors
/// What the system says.
pub(in super::super) fn keep_two(dir: &Path) -> Result<Option<u64>, BackupError> {
    let all = files(dir, Kind::Whole)?;
    for number in &all[..all.len().saturating_sub(2)] {
        let place = path(dir, Kind::Whole, *number);
        std::fs::remove_file(&place).map_err(BackupError::io("remove", place))?;
    }
    remove_begun(dir)?;
    Ok(all.iter().rev().take(2).next_back().copied())
}

/// Removes what was begun of whole copies.
///
/// # Errors
/// What the system says.
pub(in super::super) fn remove_begun(dir: &Path) -> Result<(), BackupError> {
    for entry in std::fs::read_dir(dir).map_err(BackupError::io("read", dir))? {
        let place = entry.map_err(BackupError::io("read", dir))?.path();
        if place.extension().is_some_and(|ending| ending == "new-whole") {
            std::fs::remove_file(&place).map_err(BackupError::io("remove", place))?;
        }
    }
    Ok(())
}
