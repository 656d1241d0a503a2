//! A log of records: the replayer's (what was received, durable before it is acknowledged) and the
//! spool of the primary (what could not be sent yet).
//!
//! ```text
//! DIR/NNNNNNNNNNNNNNNNNNNN.log      NN..: sequence number of the first record
//! ```
//! Only the last segment can have a torn tail: bytes that are no record, with no commit behind
//! them. It is cut when the log is opened, and so is what a file that was a segment before has behind its last commit. Everything else that does not fit (a checksum, a number,
//! a chain hash, a record that is not understood, a file that is shorter than what was synced) is
//! damage, named and never repaired by itself. A segment gets its name when its header is synced;
//! before that it is called `*.new`.

pub mod segment;
pub mod spares;
pub mod writer;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bfs_common::codec::Encoded;
use bfs_common::record::{GroupId, Record, Sequence};
use bytes::Bytes;

use segment::SegmentReader;

/// Bytes in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogRef {
    /// Segment, by the sequence number of its first record.
    pub segment: u64,
    /// First byte in the segment's file.
    pub offset: u64,
}

/// What can go wrong in a log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A file or folder could not be read, made or changed.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// What was written is not what is there.
    #[error("the log is damaged: {path}: {why}")]
    Corrupt {
        /// Where.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// A batch that does not follow what is there: a fault of this program.
    #[error("{dir}: records that follow record {follows} cannot stand behind record {stands}")]
    OutOfOrder {
        /// The log.
        dir: PathBuf,
        /// The last record that is there.
        stands: Sequence,
        /// The record that the batch follows.
        follows: Sequence,
    },
}

impl LogError {
    /// For `map_err`: an I/O error with what was tried on what.
    pub(crate) fn io<E: Into<io::Error>>(
        what: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.as_ref().to_path_buf();
        move |error| Self::Io { what, path, error: error.into() }
    }

    pub(crate) fn corrupt(path: impl AsRef<Path>, why: impl ToString) -> Self {
        Self::Corrupt { path: path.as_ref().into(), why: why.to_string() }
    }
}

/// Syncs a directory: its entries survive a crash.
///
/// # Errors
/// What the system says.
pub fn sync_dir(path: &Path) -> Result<(), LogError> {
    crate::durable::directory(path).map_err(LogError::io("sync", path))
}

/// A record of the log, taken apart.
#[derive(Debug)]
pub struct LogRecord {
    /// The bytes as they stand there.
    pub encoded: Encoded,
    /// The record.
    pub record: Record,
    /// Its payload.
    pub payload: Bytes,
    /// Where the payload stands.
    pub at: LogRef,
    /// Where the record ends in its segment.
    pub end: u64,
}

/// Numbers of the segments in a folder, in order.
///
/// # Errors
/// If the folder cannot be read.
pub fn segments(dir: &Path) -> Result<Vec<u64>, LogError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(LogError::io("read", dir))? {
        let name = entry.map_err(LogError::io("read", dir))?.file_name();
        if name.as_encoded_bytes().ends_with(b".new") {
            continue;
        }
        let number = name.to_str().and_then(|n| n.strip_suffix(".log")).and_then(|n| n.parse().ok());
        match number {
            Some(number) => found.push(number),
            None => return Err(LogError::corrupt(dir.join(name), "is not a segment of the log")),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The file of a segment.
#[must_use]
pub fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:020}.log"))
}

/// Reads the records after `after` up to `to` (both durable), in order and without a gap.
///
/// # Errors
/// Damage, or what `each` says.
pub fn read_range<E: From<LogError>>(
    dir: &Path,
    group: GroupId,
    after: Sequence,
    to: Sequence,
    each: impl FnMut(LogRecord) -> Result<(), E>,
) -> Result<(), E> {
    read_on(dir, group, &mut None, after, to, each)
}

/// As [`read_range`], where record `after` was read before: `spot` says where it ends, and then where the last one
/// does that was read, so that nothing is read twice.
///
/// # Errors
/// Damage, or what `each` says.
pub fn read_on<E: From<LogError>>(
    dir: &Path,
    group: GroupId,
    spot: &mut Option<LogRef>,
    after: Sequence,
    to: Sequence,
    mut each: impl FnMut(LogRecord) -> Result<(), E>,
) -> Result<(), E> {
    let all = segments(dir)?;
    let from = all.partition_point(|first| *first <= after.0 + 1).saturating_sub(1);
    let mut next = after.next();
    for number in &all[from.min(all.len())..] {
        if next > to {
            break;
        }
        let mut reader = SegmentReader::open(dir, *number, group)?;
        if let Some(spot) = spot.filter(|spot| spot.segment == *number) {
            reader.skip_to(spot.offset);
        }
        while next <= to {
            let Some(found) = reader.read()? else { break };
            if found.encoded.sequence < next {
                continue;
            }
            if found.encoded.sequence != next {
                let why = format!("record {next} is missing before {}", found.encoded.sequence);
                return Err(LogError::corrupt(segment_path(dir, *number), why).into());
            }
            let end = LogRef { segment: *number, offset: found.end };
            each(found)?;
            *spot = Some(end);
            next = next.next();
        }
    }
    if next <= to {
        return Err(LogError::corrupt(dir, format!("the log ends before record {next}")).into());
    }
    Ok(())
}

/// Reads payloads by where they stand.
#[derive(Debug)]
pub struct Payloads {
    dir: PathBuf,
    segments: HashMap<u64, File>,
    buffer: Vec<u8>,
}

impl Payloads {
    /// Of this log.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), segments: HashMap::new(), buffer: Vec::new() }
    }

    /// So many bytes of the log from here on.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&mut self, from: LogRef, len: usize) -> Result<&[u8], LogError> {
        let path = segment_path(&self.dir, from.segment);
        let file = match self.segments.entry(from.segment) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(free) => {
                let file = segment::open_shared(&path).map_err(LogError::io("open", &path))?;
                segment::read_header(&file, &path, from.segment)?;
                free.insert(file)
            }
        };
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        let buffer = &mut self.buffer[..len];
        file.read_exact_at(buffer, from.offset).map_err(LogError::io("read", &path))?;
        Ok(buffer)
    }
}

/// Writes the bytes of a range once more as they are: after a failed sync they may be in
/// memory only, and count when they were written and synced again.
///
/// # Errors
/// What the system says.
pub fn write_again(file: &File, mut from: u64, to: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    while from < to {
        let len = (to - from).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..len], from)?;
        file.write_all_at(&buffer[..len], from)?;
        from += len as u64;
    }
    Ok(())
}
