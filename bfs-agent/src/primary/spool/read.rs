//! Reading the spool back, in order, while it is being written.
//!
//! Only records that are known to be durable are asked for, so what is half written is never looked at.

use std::path::{Path, PathBuf};

use bfs_common::record::{ChainHash, GroupId, Sequence};
use bytes::BytesMut;

use crate::log::segment::{Item, SegmentReader, Tail};
use crate::log::{LogError, LogRecord, segment_path, segments};
use crate::primary::engine::outbox::Batch;

/// Stands behind a record of the spool.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    group: GroupId,
    number: u64,
    segment: SegmentReader,
    /// The last record read, and the chain hash after it.
    at: (Sequence, ChainHash),
    /// Bytes of the records that were passed over, behind the one asked for.
    passed: u64,
}

impl Reader {
    /// Goes to behind record `after`. Of what it passes over it counts the bytes behind record `from`.
    ///
    /// # Errors
    /// Damage, or that it is not there.
    pub fn open(dir: &Path, group: GroupId, after: Sequence, from: Sequence) -> Result<Self, LogError> {
        let all = segments(dir)?;
        let index = all.partition_point(|first| *first <= after.0 + 1);
        let Some(number) = index.checked_sub(1).map(|index| all[index]) else {
            return Err(LogError::corrupt(dir, format!("record {} is missing", after.next())));
        };
        let segment = SegmentReader::open(dir, number, group)?;
        let before = segment.header.before;
        let at = (before.sequence, before.chain);
        let mut reader = Self { dir: dir.into(), group, number, segment, at, passed: 0 };
        // Whole segments before this one are not read again: what is counted of them is an estimate.
        while reader.at.0 < after {
            let record = reader.next(&all)?;
            if record.encoded.sequence > from {
                reader.passed += record.encoded.bytes.len() as u64;
            }
        }
        Ok(reader)
    }

    /// Where it stands.
    #[must_use]
    pub fn at(&self) -> (Sequence, ChainHash) {
        self.at
    }

    /// Bytes that were passed over when it was opened.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.passed
    }

    /// The next records, at least one, up to record `to` and about so many bytes.
    ///
    /// # Errors
    /// Damage, or that there are none.
    pub fn read(&mut self, to: Sequence, bytes_max: usize) -> Result<Batch, LogError> {
        let first = self.at.0.next();
        let (mut bytes, mut count, mut chain_after) = (BytesMut::new(), 0, self.at.1);
        let mut last = first;
        let all = segments(&self.dir)?;
        while count == 0 || (bytes.len() < bytes_max && last < to) {
            let record = self.next(&all)?;
            bytes.extend_from_slice(&record.encoded.bytes);
            (last, chain_after) = self.at;
            count += 1;
        }
        Ok(Batch { first, count, bytes: bytes.freeze(), ring_position: None, chain_after })
    }

    /// The next record; `all` are the segments that there are.
    fn next(&mut self, all: &[u64]) -> Result<LogRecord, LogError> {
        let wanted = self.at.0.next();
        // Not only when this segment is at its end: what was read ahead of a write that failed was cut off, and
        // stands in the next one.
        if self.number != wanted.0 && all.binary_search(&wanted.0).is_ok() {
            self.segment = SegmentReader::open(&self.dir, wanted.0, self.group)?;
            self.number = wanted.0;
        }
        loop {
            match self.segment.next_or_tail()? {
                Ok(Item::Record(found)) => {
                    if found.encoded.sequence != wanted {
                        let why = format!("record {} stands where {wanted} belongs", found.encoded.sequence);
                        return Err(LogError::corrupt(segment_path(&self.dir, self.number), why));
                    }
                    self.at = (wanted, found.encoded.chain(self.at.1));
                    return Ok(found);
                }
                Ok(Item::Commit { .. }) => {}
                // What is asked for is durable.
                Err(tail) => {
                    let why = match tail {
                        Tail::Clean => format!("record {wanted} is missing"),
                        Tail::Torn { at, why } => format!("at byte {at}: {why}"),
                    };
                    return Err(LogError::corrupt(segment_path(&self.dir, self.number), why));
                }
            }
        }
    }
}
