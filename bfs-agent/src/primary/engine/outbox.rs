//! Records on their way out: numbers, the chain hash, batches. Pure.
//!
//! The engine pushes records; each gets the next sequence number and is encoded at once. A batch
//! is taken off when it is large enough or its time has come, together with the ring position up
//! to which everything that was consumed is contained in the stream by then.
//!
//! Writes that continue each other grow into one record while it is the last one: a record costs a
//! head, a checksum, a hash and the work of the replayer, however small it is.

use bfs_common::codec::{Open, begin, chain, finish};
use bfs_common::record::{ChainHash, ObjectId, Record, Sequence};
use bytes::{Bytes, BytesMut};

/// Encoded records, in order and without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Number of the first record.
    pub first: Sequence,
    /// How many records; at least one.
    pub count: u32,
    /// The records as `codec::encode` made them.
    pub bytes: Bytes,
    /// Ring space up to here may be released once these records (and all before) are durable.
    pub ring_position: Option<u64>,
    /// Chain hash after the last record.
    pub chain_after: ChainHash,
}

impl Batch {
    /// Number of the last record.
    #[must_use]
    pub fn last(&self) -> Sequence {
        Sequence(self.first.0 + u64::from(self.count) - 1)
    }
}

/// The last record of the buffer, while it may grow.
#[derive(Clone, Copy, Debug)]
struct Last {
    open: Open,
    /// For a write: the object, where it ends, how many bytes it has.
    grows: Option<(ObjectId, u64, usize)>,
}

/// Collects records into batches.
#[derive(Debug)]
pub struct Outbox {
    /// Its chain hash is not taken yet.
    open: Option<Last>,
    next: Sequence,
    chain: ChainHash,
    first: Sequence,
    buffer: BytesMut,
    ready: Vec<Batch>,
    /// Records pushed since the start, for triggers and status.
    pub records: u64,
    /// Bytes pushed since the start.
    pub bytes: u64,
}

/// A batch is closed when it holds this many bytes.
pub const BATCH_BYTES: usize = 1 << 20;

/// A write grows up to this many bytes.
const GROWN_MAX: usize = 64 << 10;

impl Outbox {
    /// Goes on after the given place of the stream.
    #[must_use]
    pub fn new(after: Sequence, chain: ChainHash) -> Self {
        let next = after.next();
        Self {
            open: None,
            next,
            chain,
            first: next,
            buffer: BytesMut::new(),
            ready: Vec::new(),
            records: 0,
            bytes: 0,
        }
    }

    /// Adds a record; gives its number.
    pub fn push(&mut self, record: &Record, payload: &[u8]) -> Sequence {
        self.add(record, payload, None)
    }

    /// Adds a write; gives the number of the record that holds it.
    pub fn push_write(&mut self, object: ObjectId, offset: u64, data: &[u8]) -> Sequence {
        let end = offset.saturating_add(data.len() as u64);
        if let Some(Last { grows: Some((last, last_end, len)), .. }) = &mut self.open
            && *last == object
            && *last_end == offset
            && *len + data.len() <= GROWN_MAX
        {
            self.buffer.extend_from_slice(data);
            *last_end = end;
            *len += data.len();
            self.bytes += data.len() as u64;
            self.close_if_full();
            return self.last();
        }
        self.add(&Record::Write { object, offset }, data, Some((object, end, data.len())))
    }

    fn add(&mut self, record: &Record, payload: &[u8], grows: Option<(ObjectId, u64, usize)>) -> Sequence {
        self.end_last();
        let (start, sequence) = (self.buffer.len(), self.next);
        let open = begin(&mut self.buffer, sequence, record);
        self.buffer.extend_from_slice(payload);
        self.open = Some(Last { open, grows });
        self.next = sequence.next();
        self.records += 1;
        self.bytes += (self.buffer.len() - start) as u64;
        self.close_if_full();
        sequence
    }

    fn close_if_full(&mut self) {
        if self.buffer.len() >= BATCH_BYTES {
            self.close(None);
        }
    }

    fn end_last(&mut self) {
        if let Some(last) = self.open.take() {
            self.chain = chain(self.chain, finish(&mut self.buffer, last.open));
        }
    }

    /// The last number given.
    #[must_use]
    pub fn last(&self) -> Sequence {
        Sequence(self.next.0 - 1)
    }

    /// Whether records wait for a batch.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Bytes that were pushed and not taken yet.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.buffer.len() + self.ready.iter().map(|b| b.bytes.len()).sum::<usize>()
    }

    /// Closes the batch: everything up to here may be sent, and once it is durable the ring may
    /// be released up to `ring_position`.
    pub fn close(&mut self, ring_position: Option<u64>) {
        if self.buffer.is_empty() {
            return;
        }
        self.end_last();
        let bytes = self.buffer.split().freeze();
        let count = (self.next.0 - self.first.0) as u32;
        self.ready.push(Batch { first: self.first, count, bytes, chain_after: self.chain, ring_position });
        self.first = self.next;
    }

    /// Whether there are closed batches.
    #[must_use]
    pub fn has_closed(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Takes the closed batches, oldest first.
    pub fn take(&mut self) -> Vec<Batch> {
        std::mem::take(&mut self.ready)
    }
}

#[cfg(test)]
mod tests {
    use bfs_common::codec;

    use super::*;

    /// The records of a batch, checked against its chain.
    fn records(batch: &Batch) -> Vec<(Record, Bytes)> {
        let (mut bytes, mut at, mut all) = (batch.bytes.clone(), ChainHash::START, Vec::new());
        while let Some(encoded) = codec::take(&mut bytes).unwrap() {
            assert_eq!(encoded.sequence, Sequence(batch.first.0 + all.len() as u64));
            at = encoded.chain(at);
            all.push(encoded.decode().unwrap());
        }
        assert_eq!((all.len() as u32, at), (batch.count, batch.chain_after));
        all
    }

    #[test]
    fn writes_that_continue_each_other_are_one_record() {
        let (a, b) = (ObjectId(1), ObjectId(2));
        let mut out = Outbox::new(Sequence(0), ChainHash::START);
        assert_eq!(out.push_write(a, 10, b"one"), Sequence(1));
        assert_eq!(out.push_write(a, 13, b"two"), Sequence(1));
        assert_eq!(out.push_write(a, 17, b"behind a gap"), Sequence(2));
        assert_eq!(out.push_write(b, 29, b"another file"), Sequence(3));
        assert_eq!(out.push(&Record::Truncate { object: b, size: 41 }, b""), Sequence(4));
        assert_eq!(out.push_write(b, 41, b"behind another record"), Sequence(5));
        assert_eq!((out.last(), out.records), (Sequence(5), 5));
        out.close(Some(7));
        let batches = out.take();
        assert_eq!(batches.len(), 1);
        assert_eq!(out.bytes, batches[0].bytes.len() as u64);
        let write = |object, offset, data: &'static [u8]| {
            (Record::Write { object, offset }, Bytes::from_static(data))
        };
        let expected = [
            write(a, 10, b"onetwo"),
            write(a, 17, b"behind a gap"),
            write(b, 29, b"another file"),
            (Record::Truncate { object: b, size: 41 }, Bytes::new()),
            write(b, 41, b"behind another record"),
        ];
        assert_eq!(records(&batches[0]), expected);
        // What was closed does not grow.
        assert_eq!(out.push_write(b, 62, b"next batch"), Sequence(6));
    }

    #[test]
    fn a_write_grows_up_to_a_bound() {
        let mut out = Outbox::new(Sequence(0), ChainHash::START);
        let piece = [7; 1000];
        for i in 0..200 {
            out.push_write(ObjectId(1), i * 1000, &piece);
        }
        out.close(None);
        let lengths: Vec<_> = records(&out.take()[0]).iter().map(|r| r.1.len()).collect();
        assert_eq!(lengths.iter().sum::<usize>(), 200_000);
        assert!(lengths.len() == 4 && lengths.iter().all(|l| *l <= GROWN_MAX), "{lengths:?}");
    }
}
