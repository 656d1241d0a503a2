//! Records on their way out: numbers, the chain hash, batches. Pure.
//!
//! The engine pushes records; each gets the next sequence number and is encoded at once. A batch
//! is taken off when it is large enough or its time has come, together with the ring position up
//! to which everything that was consumed is contained in the stream by then.

use bfs_common::codec::{chain, encode};
use bfs_common::record::{ChainHash, Record, Sequence};
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

/// Collects records into batches.
#[derive(Debug)]
pub struct Outbox {
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

impl Outbox {
    /// Goes on after the given place of the stream.
    #[must_use]
    pub fn new(after: Sequence, chain: ChainHash) -> Self {
        let next = after.next();
        Self { next, chain, first: next, buffer: BytesMut::new(), ready: Vec::new(), records: 0, bytes: 0 }
    }

    /// Adds a record; gives its number.
    pub fn push(&mut self, record: &Record, payload: &[u8]) -> Sequence {
        let start = self.buffer.len();
        let sequence = self.next;
        let bytes = encode(&mut self.buffer, sequence, record, payload);
        self.chain = chain(self.chain, &self.buffer[start..]);
        self.next = sequence.next();
        self.records += 1;
        self.bytes += bytes as u64;
        if self.buffer.len() >= BATCH_BYTES {
            self.close(None);
        }
        sequence
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
        let bytes = self.buffer.split().freeze();
        let count = (self.next.0 - self.first.0) as u32;
        self.ready.push(Batch { first: self.first, count, bytes, chain_after: self.chain, ring_position });
        self.first = self.next;
    }

    /// Takes the closed batches, oldest first.
    pub fn take(&mut self) -> Vec<Batch> {
        std::mem::take(&mut self.ready)
    }
}
