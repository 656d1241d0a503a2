//! A group's log: what was received, durable before it is acknowledged.
//!
//! ```text
//! log/GROUP/NNNNNNNNNNNNNNNNNNNN.log      NN..: sequence number of the first record
//! ```
//! Only the last segment can have a torn tail: bytes that are no record, with no commit behind
//! them. It is cut when the log is opened. Everything else that does not fit (a checksum, a number,
//! a chain hash, a record that is not understood, a file that is shorter than what was synced) is
//! damage, named and never repaired by itself. A segment gets its name when its header is synced;
//! before that it is called `*.new`.

pub mod segment;
pub mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use bfs_common::codec::Encoded;
use bfs_common::record::{GroupId, Record, Sequence};
use bytes::Bytes;

use super::error::BackupError;
use super::target::LogRef;
use segment::SegmentReader;

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
pub fn segments(dir: &Path) -> Result<Vec<u64>, BackupError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(BackupError::io("read", dir))? {
        let name = entry.map_err(BackupError::io("read", dir))?.file_name();
        if name.as_encoded_bytes().ends_with(b".new") {
            continue;
        }
        let number = name.to_str().and_then(|n| n.strip_suffix(".log")).and_then(|n| n.parse().ok());
        match number {
            Some(number) => found.push(number),
            None => return Err(BackupError::corrupt(dir.join(name), "is not a segment of the log")),
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
pub fn read_range(
    dir: &Path,
    group: GroupId,
    after: Sequence,
    to: Sequence,
    mut each: impl FnMut(LogRecord) -> Result<(), BackupError>,
) -> Result<(), BackupError> {
    let all = segments(dir)?;
    let from = all.partition_point(|first| *first <= after.0 + 1).saturating_sub(1);
    let mut next = after.next();
    for number in &all[from.min(all.len())..] {
        if next > to {
            break;
        }
        let mut reader = SegmentReader::open(dir, *number, group)?;
        while next <= to {
            let Some(found) = reader.read()? else { break };
            if found.encoded.sequence < next {
                continue;
            }
            if found.encoded.sequence != next {
                let why = format!("record {next} is missing before {}", found.encoded.sequence);
                return Err(BackupError::corrupt(segment_path(dir, *number), why));
            }
            each(found)?;
            next = next.next();
        }
    }
    if next <= to {
        return Err(BackupError::corrupt(dir, format!("the log ends before record {next}")));
    }
    Ok(())
}
