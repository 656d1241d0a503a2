//! What was handed over and is not durable at the destination yet. Pure: no I/O, no clock.
//!
//! The queue is bounded in bytes and in batches. It remembers how far the present connection was
//! served, so that nothing is sent twice on it, and after a reconnect it goes on exactly behind
//! the destination's last durable record, which it checks by the chain hash.

use std::collections::VecDeque;

use bfs_common::codec;
use bfs_common::record::{ChainHash, Sequence};
use bfs_common::wire::{Position, Refusal};

pub use super::super::engine::outbox::Batch;

/// Longest body of one frame. Well below what the protocol allows, so that acknowledgements and
/// heartbeats come in between.
pub const BODY_MAX: usize = 4 << 20;

/// Most batches that are retained, whatever their size.
pub const BATCHES_MAX: usize = 1 << 16;

impl Batch {
    /// Cuts the records up to and including `until` off; their chain hash comes with them.
    fn split_after(mut self, until: Sequence, before: ChainHash) -> Option<(Self, Option<Self>)> {
        let mut rest = self.bytes.clone();
        let (mut chain, mut count) = (before, 0);
        while self.first.0 + u64::from(count) <= until.0 {
            chain = codec::take(&mut rest).ok()??.chain(chain);
            count += 1;
        }
        if count == self.count {
            return Some((self, None));
        }
        let tail = Self {
            first: until.next(),
            count: self.count - count,
            ring_position: self.ring_position.take(),
            chain_after: self.chain_after,
            bytes: rest.clone(),
        };
        let head_len = self.bytes.len() - rest.len();
        let head = Self { count, bytes: self.bytes.slice(..head_len), chain_after: chain, ..self };
        Some((head, Some(tail)))
    }
}

/// Batches that are not durable yet.
#[derive(Debug)]
pub struct Queue {
    batches: VecDeque<Batch>,
    bytes: usize,
    bytes_max: usize,
    /// What the destination has made durable.
    durable: Position,
    /// The last record handed over, and the chain hash after it.
    pushed: (Sequence, ChainHash),
    /// Index of the first batch that was not sent on this connection.
    next: usize,
    released: Option<u64>,
}

impl Queue {
    /// An empty queue behind a destination's position.
    #[must_use]
    pub fn new(durable: Position, bytes_max: usize) -> Self {
        Self {
            batches: VecDeque::new(),
            bytes: 0,
            bytes_max,
            durable,
            pushed: (durable.sequence, durable.chain),
            next: 0,
            released: None,
        }
    }

    /// Sets where the destination stands at the first connection.
    ///
    /// # Panics
    /// When something was handed over before.
    pub fn begin(&mut self, position: Position) {
        assert!(self.batches.is_empty() && self.pushed.0 == Sequence(0), "begun twice");
        *self = Self::new(position, self.bytes_max);
    }

    /// Takes a batch, or gives it back when the bound is reached. An empty queue takes any.
    ///
    /// # Panics
    /// When the batch does not follow the one before, or its bytes are not that many records.
    pub fn push(&mut self, batch: Batch) -> Result<(), Batch> {
        assert!(batch.count > 0, "an empty batch");
        assert_eq!(batch.first, self.pushed.0.next(), "batches follow each other");
        let full = self.bytes + batch.bytes.len() > self.bytes_max || self.batches.len() >= BATCHES_MAX;
        if full && !self.batches.is_empty() {
            return Err(batch);
        }
        self.bytes += batch.bytes.len();
        let mut before = self.pushed.1;
        self.pushed = (batch.last(), batch.chain_after);
        let mut rest = Some(batch);
        while let Some(batch) = rest.take() {
            let cut = if batch.bytes.len() > BODY_MAX { first_part(&batch) } else { batch.last() };
            let (head, tail) = batch.split_if_needed(cut, before);
            before = head.chain_after;
            self.batches.push_back(head);
            rest = tail;
        }
        Ok(())
    }

    /// The next batch for this connection. It counts as sent.
    pub fn next_to_send(&mut self) -> Option<Batch> {
        let batch = self.batches.get(self.next)?.clone();
        self.next += 1;
        Some(batch)
    }

    /// The destination says what is durable.
    ///
    /// # Errors
    /// What makes going on impossible: a fork, or a position that was never sent.
    pub fn acknowledged(&mut self, position: Position) -> Result<(), Refusal> {
        if position.sequence < self.durable.sequence || position.sequence > self.pushed.0 {
            return Err(Refusal::Gap { have: self.durable.sequence, got: position.sequence });
        }
        while self.batches.front().is_some_and(|b| b.last() <= position.sequence) {
            let Some(batch) = self.batches.pop_front() else { break };
            self.bytes -= batch.bytes.len();
            self.next = self.next.saturating_sub(1);
            self.released = batch.ring_position.or(self.released);
            if batch.last() == position.sequence && batch.chain_after != position.chain {
                return Err(Refusal::Fork { at: position.sequence });
            }
            self.durable = Position { sequence: batch.last(), chain: batch.chain_after, ..position };
        }
        self.durable.epoch = position.epoch;
        Ok(())
    }

    /// A new connection, whose other end stands at `position`: what is behind it is sent (again).
    ///
    /// # Errors
    /// As [`Queue::acknowledged`]; also when the destination lost what it had acknowledged.
    pub fn reconnected(&mut self, position: Position) -> Result<(), Refusal> {
        self.next = 0;
        self.acknowledged(position)?;
        let fork = Refusal::Fork { at: position.sequence };
        if self.durable.sequence == position.sequence {
            return if self.durable.chain == position.chain { Ok(()) } else { Err(fork) };
        }
        // In the middle of a batch: its durable part goes.
        let Some(batch) = self.batches.pop_front() else { return Err(fork) };
        let whole = batch.bytes.len();
        match batch.split_after(position.sequence, self.durable.chain) {
            Some((head, Some(tail))) if head.chain_after == position.chain => {
                self.bytes -= whole - tail.bytes.len();
                self.batches.push_front(tail);
                self.durable = position;
                Ok(())
            }
            _ => Err(fork),
        }
    }

    /// Durable at the destination, at a batch's end.
    #[must_use]
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// Ring space up to here holds nothing that is not durable.
    #[must_use]
    pub fn released(&self) -> Option<u64> {
        self.released
    }

    /// Ring space up to here holds nothing beyond what was pushed so far.
    pub fn note_position(&mut self, position: u64) {
        match self.batches.back_mut() {
            Some(last) => last.ring_position = last.ring_position.max(Some(position)),
            None => self.released = self.released.max(Some(position)),
        }
    }

    /// Bytes that are retained.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Batch {
    fn split_if_needed(self, until: Sequence, before: ChainHash) -> (Self, Option<Self>) {
        if until == self.last() {
            return (self, None);
        }
        self.split_after(until, before).expect("a batch holds as many sound records as it says")
    }
}

/// Number of the last record of the first frame's worth of a batch.
fn first_part(batch: &Batch) -> Sequence {
    let mut rest = batch.bytes.clone();
    let mut last = batch.first;
    while let Ok(Some(record)) = codec::take(&mut rest) {
        if batch.bytes.len() - rest.len() > BODY_MAX {
            break;
        }
        last = record.sequence;
    }
    last
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use bfs_common::record::{Epoch, ObjectId, Record};
    use bytes::BytesMut;

    /// Batches of records with payloads of these lengths, behind `(sequence, chain)`.
    pub fn batch(after: &mut (Sequence, ChainHash), lengths: &[usize]) -> Batch {
        let mut bytes = BytesMut::new();
        let first = after.0.next();
        for length in lengths {
            let start = bytes.len();
            after.0 = after.0.next();
            let record = Record::Write { object: ObjectId(1), offset: after.0.0 };
            codec::encode(&mut bytes, after.0, &record, &vec![7; *length]);
            after.1 = codec::chain(after.1, &bytes[start..]);
        }
        Batch {
            first,
            count: lengths.len() as u32,
            bytes: bytes.freeze(),
            ring_position: Some(after.0.0 * 100),
            chain_after: after.1,
        }
    }

    fn start() -> (Sequence, ChainHash) {
        (Sequence(0), ChainHash::START)
    }

    fn position(at: (Sequence, ChainHash)) -> Position {
        Position { epoch: Epoch(1), sequence: at.0, chain: at.1 }
    }

    #[test]
    fn the_bound_gives_the_batch_back() {
        let mut queue = Queue::new(Position::START, 1000);
        let mut at = start();
        queue.push(batch(&mut at, &[2000])).unwrap();
        let first = at;
        let second = batch(&mut at, &[10]);
        assert_eq!(queue.push(second.clone()), Err(second.clone()));
        queue.acknowledged(position(first)).unwrap();
        assert_eq!((queue.bytes(), queue.released()), (0, Some(100)));
        queue.push(second).unwrap();
    }

    #[test]
    fn a_large_batch_is_cut_between_records() {
        let mut queue = Queue::new(Position::START, 1 << 30);
        let mut at = start();
        let whole = batch(&mut at, &[1 << 20; 9]);
        queue.push(whole.clone()).unwrap();
        let mut parts = Vec::new();
        while let Some(part) = queue.next_to_send() {
            assert!(part.bytes.len() <= BODY_MAX);
            parts.push(part);
        }
        assert_eq!(parts.len(), 3);
        assert_eq!(parts.concat_bytes(), whole.bytes);
        assert_eq!(parts[2].chain_after, whole.chain_after);
        assert_eq!(parts[0].ring_position, None);
        assert_eq!(parts[2].ring_position, whole.ring_position);
        let middle = Position { epoch: Epoch(1), sequence: parts[0].last(), chain: parts[0].chain_after };
        queue.acknowledged(middle).unwrap();
        assert_eq!(queue.released(), None, "the ring is held until all of it is durable");
    }

    trait Concat {
        fn concat_bytes(&self) -> Vec<u8>;
    }
    impl Concat for Vec<Batch> {
        fn concat_bytes(&self) -> Vec<u8> {
            self.iter().flat_map(|b| b.bytes.to_vec()).collect()
        }
    }

    #[test]
    fn after_a_reconnect_exactly_the_rest_is_sent() {
        let mut queue = Queue::new(Position::START, 1 << 20);
        let mut at = start();
        let first = batch(&mut at, &[1, 2]);
        let mut inside = at;
        let second = batch(&mut at, &[3, 4, 5]);
        batch(&mut inside, &[3]);
        queue.push(first).unwrap();
        queue.push(second.clone()).unwrap();
        while queue.next_to_send().is_some() {}
        queue.reconnected(position(inside)).unwrap();
        let resent = queue.next_to_send().unwrap();
        assert_eq!((resent.first, resent.count), (Sequence(4), 2));
        assert!(second.bytes.ends_with(&resent.bytes));
        assert_eq!(queue.next_to_send(), None);
        assert_eq!(queue.released(), Some(200));
        queue.acknowledged(position(at)).unwrap();
        assert_eq!((queue.bytes(), queue.released()), (0, Some(500)));
    }

    #[test]
    fn a_fork_and_a_loss_are_noticed() {
        let mut queue = Queue::new(Position::START, 1 << 20);
        let mut at = start();
        queue.push(batch(&mut at, &[1, 2])).unwrap();
        let good = at;
        let other = Position { chain: ChainHash([9; 32]), ..position(good) };
        assert_eq!(queue.acknowledged(other), Err(Refusal::Fork { at: Sequence(2) }));

        let mut queue = Queue::new(position(good), 1 << 20);
        queue.push(batch(&mut at, &[1])).unwrap();
        assert!(matches!(queue.reconnected(Position::START), Err(Refusal::Gap { .. })));
        let ahead = Position { sequence: Sequence(9), ..position(at) };
        assert!(matches!(queue.acknowledged(ahead), Err(Refusal::Gap { .. })));
        let inside = Position { sequence: Sequence(2), chain: ChainHash([1; 32]), epoch: Epoch(1) };
        assert_eq!(queue.reconnected(inside), Err(Refusal::Fork { at: Sequence(2) }));
    }
}
