//! The end of the copy: each change of the index is appended here, durably, before the index has it.
//!
//! After a failed write or sync nothing since the last good one counts: the file is cut there before anything
//! else is written, and a new one begins.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use super::super::super::error::BackupError;
use super::{HEADER, Kind, Line, Mark, Part, Scan, Tail, files, goes_on, header, path, scan};
use crate::durable;
use crate::log::{sync_dir, write_again};

/// A file is ended when it is longer than this, and has room for so much from its beginning: what makes room on a full
/// disk is a change as well.
const FILE_BYTES: u64 = 1 << 20;

/// The end of the copy.
#[derive(Debug)]
pub(in super::super) struct Changes {
    dir: PathBuf,
    /// The last change.
    mark: Mark,
    /// The one before it, as far as that is known.
    before: Mark,
    open: Option<Open>,
    /// A file that failed, and is not cut yet where it was last synced.
    stump: Option<Open>,
    /// The change that is being written.
    part: Option<Part>,
    file_bytes: u64,
    /// Bytes of changes since the last whole copy.
    since: u64,
    /// The last file as it was found, before it is gone on with.
    found: Option<Found>,
}

#[derive(Debug)]
struct Found {
    number: u64,
    scanned: Scan,
    /// The file before, and its end, where a crash came before that said that another one goes on.
    unended: Option<(u64, u64)>,
}

#[derive(Debug)]
struct Open {
    file: File,
    number: u64,
    /// Bytes that are synced.
    synced: u64,
}

impl Changes {
    /// Finds the end, and changes nothing; `Err` where there is none that can be gone on with, with the reason if there
    /// was one.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn find(dir: &Path) -> Result<Result<Self, Option<String>>, BackupError> {
        let all = files(dir, Kind::Changes)?;
        let Some(number) = all.last().copied() else { return Ok(Err(None)) };
        let place = path(dir, Kind::Changes, number);
        let found = match scan(&place, Kind::Changes, |_, _| Ok(())) {
            Ok(found) if found.first().number + 1 == number => found,
            Ok(_) => return Ok(Err(Some(format!("{} has another name", place.display())))),
            Err(BackupError::Corrupt { why, .. }) => {
                return Ok(Err(Some(format!("{} {why}", place.display()))));
            }
            Err(error) => return Err(error),
        };
        let (mut before, mut unended) = (found.marks.iter().rev().nth(1).copied(), None);
        if before.is_none()
            && let Some(other) = all.iter().rev().nth(1)
            // Where it does not fit, nothing is made good with it.
            && let Ok(scanned) = scan(&path(dir, Kind::Changes, *other), Kind::Changes, |_, _| Ok(()))
            && scanned.last() == found.first()
        {
            before = scanned.marks.iter().rev().nth(1).copied();
            unended = (!scanned.goes_on).then_some((*other, scanned.end));
        }
        let wholes = files(dir, Kind::Whole)?;
        let newest = wholes.last().copied();
        let since = all.iter().filter(|first| newest.is_none_or(|newest| **first > newest));
        let size = |first: &u64| std::fs::metadata(path(dir, Kind::Changes, *first)).map_or(0, |m| m.len());
        let since = since.map(size).sum();
        let mut changes = Self::begin(dir, found.last());
        (changes.before, changes.since) = (before.unwrap_or(found.last()), since);
        changes.found = Some(Found { number, scanned: found, unended });
        Ok(Ok(changes))
    }

    /// Goes on with what was found: a torn end is cut off.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn take_over(&mut self) -> Result<(), BackupError> {
        if let Some(Found { number, scanned, unended }) = &self.found {
            if let Some((other, end)) = unended {
                let place = path(&self.dir, Kind::Changes, *other);
                let file = OpenOptions::new().write(true).open(&place);
                let file = file.map_err(BackupError::io("open", &place))?;
                let cut = file.set_len(*end).and_then(|()| put_goes_on(&file, *end, *number));
                cut.map_err(BackupError::io("end", place))?;
            }
            let place = path(&self.dir, Kind::Changes, *number);
            // Of one that another was to go on with all is there, as the index has it.
            self.open = if scanned.goes_on { None } else { Some(taken_over(&place, *number, scanned)?) };
            // A crash may have come between its name and the sync of that.
            sync_dir(&self.dir)?;
            self.found = None;
        }
        Ok(())
    }

    /// Behind this change, with nothing before it.
    pub fn begin(dir: &Path, mark: Mark) -> Self {
        let dir = dir.to_path_buf();
        Self {
            dir,
            mark,
            before: mark,
            open: None,
            stump: None,
            part: None,
            file_bytes: FILE_BYTES,
            since: 0,
            found: None,
        }
    }

    /// The last change.
    pub const fn mark(&self) -> Mark {
        self.mark
    }

    /// The one before it, as far as that is known.
    pub const fn before(&self) -> Mark {
        self.before
    }

    /// Bytes of changes since the last whole copy.
    pub const fn since(&self) -> u64 {
        self.since
    }

    /// There is a whole copy, of so far back.
    pub const fn copied(&mut self) {
        self.since = 0;
    }

    /// Adds a line to the change that is being written.
    ///
    /// # Errors
    /// If it cannot be written; then nothing of the change counts.
    pub fn line(&mut self, line: &Line) -> Result<(), BackupError> {
        if self.part.is_none() {
            self.ready()?;
        }
        let Some(open) = &self.open else { return Ok(()) };
        let (number, chain) = (self.mark.number + 1, self.mark.chain);
        let part = self.part.get_or_insert_with(|| Part::new(number, &chain, open.synced));
        let written = part.line(&open.file, line);
        written.map_err(BackupError::io("write", path(&self.dir, Kind::Changes, open.number)))
    }

    /// Ends the change, durably; `None` if it has no lines.
    ///
    /// # Errors
    /// If it cannot be written or synced; then nothing of it counts.
    pub fn end(&mut self) -> Result<Option<Mark>, BackupError> {
        let (Some(part), Some(open)) = (self.part.take(), &mut self.open) else { return Ok(None) };
        let number = self.mark.number + 1;
        let written = part.end(&open.file).and_then(|(end, chain)| {
            durable::data(&open.file)?;
            Ok((end, Mark { number, chain }))
        });
        match written {
            Ok((end, mark)) => {
                self.since += end - open.synced;
                open.synced = end;
                (self.before, self.mark) = (self.mark, mark);
                Ok(Some(mark))
            }
            Err(error) => {
                let failed = BackupError::io("write", path(&self.dir, Kind::Changes, open.number));
                self.stump = self.open.take();
                Err(failed(error))
            }
        }
    }

    /// Nothing of the change that is being written counts.
    pub fn abandon(&mut self) {
        if self.part.take().is_some()
            && self.open.as_ref().is_some_and(|open| open.file.set_len(open.synced).is_err())
        {
            self.stump = self.open.take();
        }
    }

    /// There is a file that can be appended to.
    ///
    /// # Errors
    /// If that cannot be made.
    pub fn ready(&mut self) -> Result<(), BackupError> {
        self.take_over()?;
        if let Some(stump) = &self.stump {
            let place = path(&self.dir, Kind::Changes, stump.number);
            let cut = stump.file.set_len(stump.synced).and_then(|()| durable::file(&stump.file));
            cut.map_err(BackupError::io("cut", place))?;
        } else if self.open.as_ref().is_some_and(|open| open.synced < self.file_bytes) {
            return Ok(());
        }
        make_folder(&self.dir)?;
        let number = self.mark.number + 1;
        let place = path(&self.dir, Kind::Changes, number);
        let new = place.with_extension("new");
        let make = || -> std::io::Result<File> {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            // Where that cannot be had it is found out by writing.
            let _ = rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, FILE_BYTES);
            file.write_all_at(&header(Kind::Changes, &self.mark), 0)?;
            durable::file(&file)?;
            std::fs::rename(&new, &place)?;
            Ok(file)
        };
        let file = make().map_err(BackupError::io("make", &place))?;
        sync_dir(&self.dir)?;
        // From here on a store that lacks the new file is known to lack it.
        if let Some(ended) = self.stump.as_ref().or(self.open.as_ref()).filter(|ended| ended.number != number)
        {
            let end = put_goes_on(&ended.file, ended.synced, number);
            end.map_err(BackupError::io("end", path(&self.dir, Kind::Changes, ended.number)))?;
        }
        self.stump = None;
        self.open = Some(Open { file, number, synced: HEADER });
        Ok(())
    }

    /// Files end at this length.
    #[cfg(test)]
    pub fn limit_files(&mut self, bytes: u64) {
        self.file_bytes = bytes;
    }
}

/// Says durably in a file that another one goes on.
fn put_goes_on(file: &File, end: u64, number: u64) -> std::io::Result<()> {
    file.write_all_at(&goes_on(end, number), end)?;
    durable::data(file)
}

/// The file, cut where its last change ends.
fn taken_over(place: &Path, number: u64, found: &Scan) -> Result<Open, BackupError> {
    let file = OpenOptions::new().read(true).write(true).open(place);
    let file = file.map_err(BackupError::io("open", place))?;
    if let Tail::Bad(why) = &found.tail {
        tracing::warn!("{}: {why}; it is cut off: the index has all that was done", place.display());
    }
    if found.tail != Tail::Whole {
        file.set_len(found.end).map_err(BackupError::io("cut", place))?;
    }
    // What was found may only be in memory, left by a sync that failed: it counts once it was written and synced again.
    // What is before the last change was synced before that was written.
    let again = write_again(&file, found.begin, found.end).and_then(|()| durable::file(&file));
    again.map_err(BackupError::io("write", place))?;
    Ok(Open { file, number, synced: found.end })
}

/// The folder of the copy.
///
/// # Errors
/// If it cannot be made.
pub(in super::super) fn make_folder(dir: &Path) -> Result<(), BackupError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(sync_dir(dir.parent().unwrap_or(dir))?),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(BackupError::io("make", dir)(error)),
    }
}

/// Removes files of which every change is in the whole copy of this one; never the last file.
///
/// # Errors
/// What the system says.
pub(in super::super) fn remove_before(dir: &Path, number: u64) -> Result<(), BackupError> {
    for pair in files(dir, Kind::Changes)?.windows(2) {
        if pair[1] > number + 1 {
            break;
        }
        let place = path(dir, Kind::Changes, pair[0]);
        std::fs::remove_file(&place).map_err(BackupError::io("remove", place))?;
    }
    Ok(())
}
