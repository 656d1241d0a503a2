//! The index made again from its copy: from the newest whole one that fits, and all changes since.
//!
//! What comes out is the index after the last change that anybody acted on, so the store goes on as after a crash. It is
//! made beside the place of the index, compared with what log, before-images and folders say, and then put there. Where
//! the copy does not lead up to the last change, or the store has something newer, nothing is put there.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bfs_common::record::Record;
use redb::{Database, ReadableDatabase};

use super::super::error::BackupError;
use super::super::images;
use super::super::store::Store;
use super::change::Tables;
use super::copy::{Kind, Mark, Scan, Tail, each_line, files, folder, path, scan};
use super::{CHANGED, GroupRow, groups, mark, open};
use crate::log::segment::SegmentReader;
use crate::log::{segments, sync_dir};

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// The last change of the whole copy that it was made from.
    pub whole: u64,
    /// The last change that it has.
    pub last: u64,
    /// Where the one is that stood there.
    pub aside: Option<PathBuf>,
}

/// Makes the index of a store anew.
///
/// # Errors
/// [`BackupError::NoRebuild`], or what the disk says; then the index is as it was.
pub fn rebuild(store: &Store) -> Result<Rebuilt, BackupError> {
    let index = store.path().join("index.redb");
    let new = index.with_extension("new");
    let made = build(store.path(), &new).and_then(|(whole, last)| {
        fits(store, &open(&new)?, last)?;
        is_not_newer(&index, last)?;
        Ok((whole, last))
    });
    let (whole, last) = made.inspect_err(|_| drop(fs::remove_file(&new)))?;
    // All that was written is on the disk before it counts.
    let synced = fs::File::open(&new).and_then(|file| file.sync_all());
    synced.map_err(BackupError::io("sync", &new))?;
    let aside = index.with_extension("redb.replaced");
    let aside = match fs::rename(&index, &aside) {
        Ok(()) => Some(aside),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(BackupError::io("rename", &index)(error)),
    };
    // Here there is none: a start says so, and this can be done again.
    fs::rename(&new, &index).map_err(BackupError::io("make", &index))?;
    sync_dir(store.path())?;
    Ok(Rebuilt { whole, last: last.number, aside })
}

fn refused(place: &Path, why: impl ToString) -> BackupError {
    BackupError::NoRebuild { path: place.into(), why: why.to_string() }
}

/// Makes it in a file of its own. Returns the number of the whole copy, and the last change.
///
/// # Errors
/// As [`rebuild`].
pub(super) fn build(store: &Path, new: &Path) -> Result<(u64, Mark), BackupError> {
    let dir = folder(store);
    let wholes = files(&dir, Kind::Whole)?;
    let mut why = None;
    for number in wholes.iter().rev() {
        let made = read_changes(&dir, *number).and_then(|changes| build_from(&dir, *number, &changes, new));
        match made {
            Err(BackupError::Corrupt { path, why: found } | BackupError::NoRebuild { path, why: found }) => {
                tracing::warn!("{}: {found}: the whole copy before it is tried", path.display());
                why = why.or(Some((path, found)));
            }
            other => return other.map(|last| (*number, last)),
        }
    }
    let (place, why) = why.unwrap_or_else(|| (dir, "it has no whole copy".into()));
    Err(refused(&place, why))
}

/// The files of changes from this one on, which go on one behind the other up to the last change.
fn read_changes(dir: &Path, from: u64) -> Result<Vec<(u64, Scan)>, BackupError> {
    let all = files(dir, Kind::Changes)?;
    let first = all.partition_point(|first| *first <= from + 1).saturating_sub(1);
    let mut found: Vec<(u64, Scan)> = Vec::new();
    for number in &all[first..] {
        let place = path(dir, Kind::Changes, *number);
        let scanned = scan(&place, Kind::Changes, |_, _| Ok(())).map_err(|error| match error {
            BackupError::Corrupt { path, why } => refused(&path, why),
            other => other,
        })?;
        if found.last().is_some_and(|(_, before)| before.last() != scanned.first()) {
            return Err(refused(&place, "does not go on where the file before ends"));
        }
        // What is behind the end of one that another goes on behind was never a change.
        if Some(number) == all.last() {
            if scanned.goes_on {
                return Err(refused(&place, "the file that goes on behind it is missing"));
            }
            // A torn end was never acted on.
            if let Tail::Bad(why) = &scanned.tail {
                let lost =
                    "a change that may have counted is lost, perhaps that another host is the primary now";
                return Err(refused(&place, format!("{why}: {lost}")));
            }
        }
        found.push((*number, scanned));
    }
    if found.is_empty() {
        return Err(refused(dir, "it has no changes, which go on behind a whole copy"));
    }
    Ok(found)
}

fn build_from(dir: &Path, number: u64, changes: &[(u64, Scan)], new: &Path) -> Result<Mark, BackupError> {
    let place = path(dir, Kind::Whole, number);
    match fs::remove_file(new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(BackupError::io("remove", new)(error));
        }
        _ => {}
    }
    let db = open(new)?;
    let write = db.begin_write()?;
    let last = {
        let mut tables = Tables::of(&write)?;
        let found = scan(&place, Kind::Whole, |_, body| each_line(body, |line| tables.put(&line)))?;
        if found.marks.len() != 2 || found.tail != Tail::Whole || found.first().number != number {
            let why = if let Tail::Bad(why) = found.tail { why } else { "is not complete".into() };
            return Err(BackupError::corrupt(&place, why));
        }
        if !changes.iter().any(|(_, scanned)| scanned.marks.contains(&found.first())) {
            return Err(refused(&place, "the changes that go on behind it are missing"));
        }
        let last = changes.last().map_or(found.first(), |(_, scanned)| scanned.last());
        for (first, _) in changes {
            scan(&path(dir, Kind::Changes, *first), Kind::Changes, |at, body| {
                if at <= number || at > last.number {
                    return Ok(());
                }
                each_line(body, |line| tables.put(&line))
            })?;
        }
        write.open_table(CHANGED)?.insert(0, &last.encode()[..])?;
        last
    };
    write.commit()?;
    Ok(last)
}

/// That the store has nothing that is newer.
fn fits(store: &Store, db: &Database, last: Mark) -> Result<(), BackupError> {
    let copy = folder(store.path());
    let known = groups(db)?;
    let names: BTreeSet<_> = known.iter().map(|(name, _)| std::ffi::OsString::from(name)).collect();
    for kind in ["log", "tree"].map(|kind| store.path().join(kind)) {
        for entry in fs::read_dir(&kind).map_err(BackupError::io("read", &kind))? {
            let name = entry.map_err(BackupError::io("read", &kind))?.file_name();
            if !names.contains(&name) {
                let name = name.to_string_lossy();
                return Err(refused(
                    &copy,
                    format!("it ends with change {} and knows no group {name:?}", last.number),
                ));
            }
        }
    }
    for (name, row) in &known {
        let folder = store.images().join(name);
        if folder.exists()
            && let Some(why) = images::why_too_old(&folder, row.checkpoint)?
        {
            return Err(refused(&copy, format!("group {name:?} would have {why}")));
        }
        if let Some(why) = why_behind(&store.path().join("log").join(name), row)? {
            return Err(refused(&copy, format!("group {name:?}: {why}")));
        }
    }
    Ok(())
}

/// Why a group's log is of later, if it is.
fn why_behind(log: &Path, row: &GroupRow) -> Result<Option<String>, BackupError> {
    if !log.exists() {
        return Ok(None);
    }
    let all = segments(log)?;
    let (Some(first), Some(last)) = (all.first(), all.last()) else { return Ok(None) };
    let applied = row.applied.sequence;
    if *first > applied.0 + 1 {
        return Ok(Some(format!(
            "its log begins with record {first}, and {applied} is the last that was applied"
        )));
    }
    let mut reader = SegmentReader::open(log, *last, row.id)?;
    let mut epoch = reader.header.before.epoch;
    // What does not fit in the log is named by a start.
    while let Ok(Some(found)) = reader.read() {
        if let Record::EpochBegin { epoch: begun, .. } = found.record {
            epoch = epoch.max(begun);
        }
    }
    let why = || format!("its log has epoch {epoch}, and {} is the last that was granted", row.granted);
    Ok((epoch > row.granted).then(why))
}

/// That the index that stands there has not more than the copy. One that cannot be read says nothing.
fn is_not_newer(index: &Path, last: Mark) -> Result<(), BackupError> {
    if fs::metadata(index).map_or(true, |meta| meta.len() == 0) {
        return Ok(());
    }
    // What is spoiled in a database may be noticed by no more than a panic.
    let found = catch_unwind(AssertUnwindSafe(|| mark(&open(index)?.begin_read()?.open_table(CHANGED)?)));
    match found {
        Ok(Ok(at)) if at.number > last.number => {
            let why = format!(
                "it has change {}, and its copy only {}: it is newer, and not replaced",
                at.number, last.number
            );
            Err(refused(index, why))
        }
        _ => Ok(()),
    }
}
