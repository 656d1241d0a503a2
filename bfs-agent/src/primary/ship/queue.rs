//! What was handed over and is not durable at the destination yet. Pure: no I/O, no clock.
//!
//! ```text
//! durable at the destination | in the spool | in memory |
//!                        durable         spool.end    pushed
//! ```
//! Either part may be empty. Memory is bounded in bytes and in batches. Its oldest batches go into the
//! spool, and are then read from there. The queue remembers how far the present connection was served, so
//! that nothing is sent twice on it, and after a reconnect it goes on exactly behind the destination's last
//! durable record, which it checks by the chain hash; where only the spool can tell, that is asked.

use std::collections::VecDeque;

use bfs_common::codec;
use bfs_common::record::{ChainHash, Epoch, Sequence};
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

/// What a connection gets next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// This batch.
    Batch(Batch),
    /// Records of the spool behind this position, the last of them being `to`.
    Spooled {
        /// What was sent before, with its chain hash where that is to be checked against the spool.
        after: Sequence,
        /// The destination says that it has this; it counts when the spool has the same.
        claimed: Option<Position>,
        /// The last one that the spool has.
        to: Sequence,
    },
    /// There is nothing to send, or too much is on its way.
    Nothing,
}

/// A batch that was sent on this connection.
#[derive(Clone, Copy, Debug)]
struct Flying {
    last: Sequence,
    chain: ChainHash,
    bytes: u64,
}

/// What stands in the spool and is not durable at the destination.
#[derive(Clone, Copy, Debug)]
struct Spooled {
    end: Position,
    bytes: u64,
}

/// Records that are not durable at the destination yet: first those in the spool, behind them those
/// in memory.
#[derive(Debug)]
pub struct Queue {
    /// Behind the spool, if that has any.
    memory: VecDeque<Batch>,
    bytes: usize,
    bytes_max: usize,
    spool: Option<Spooled>,
    /// The destination's position at the first connection, and the epoch that begins behind it.
    begin: (Position, Epoch),
    /// What the destination has made durable.
    durable: Position,
    /// What it says to have made durable, in the middle of the spool.
    claimed: Option<Position>,
    /// The last record handed over, and the chain hash after it.
    pushed: (Sequence, ChainHash),
    /// The last record sent on this connection.
    sent: Sequence,
    flying: VecDeque<Flying>,
    /// Index in `memory` of the first batch that was not sent on this connection.
    next: usize,
    released: Option<u64>,
}

impl Queue {
    /// An empty queue behind a destination's position.
    #[must_use]
    pub fn new(durable: Position, bytes_max: usize) -> Self {
        Self {
            memory: VecDeque::new(),
            bytes: 0,
            bytes_max,
            spool: None,
            begin: (durable, durable.epoch),
            durable,
            claimed: None,
            pushed: (durable.sequence, durable.chain),
            sent: durable.sequence,
            flying: VecDeque::new(),
            next: 0,
            released: None,
        }
    }

    /// What an agent before left in its spool: the records behind `begin`, up to `end`.
    #[must_use]
    pub fn left(begin: Position, end: Position, bytes: u64) -> Self {
        let spool = Some(Spooled { end, bytes });
        let pushed = (end.sequence, end.chain);
        Self { spool, pushed, begin: (begin, end.epoch), ..Self::new(begin, 0) }
    }

    /// Whether the spool has anything to send.
    #[must_use]
    pub fn is_left(&self) -> bool {
        self.spool.is_some()
    }

    /// The first connection for what an agent before left. That may have sent more than it had in its spool.
    ///
    /// # Errors
    /// As [`Queue::reconnected`].
    pub fn begin_left(&mut self, position: Position) -> Result<(), Refusal> {
        if position.sequence > self.pushed.0 && position.epoch == self.begin.1 {
            *self = Self::new(position, self.bytes_max);
            return Ok(());
        }
        self.reconnected(position)
    }

    /// Sets where the destination stands at the first connection, and the epoch of what comes.
    ///
    /// # Panics
    /// When something was handed over before.
    pub fn begin(&mut self, position: Position, epoch: Epoch) {
        assert!(self.memory.is_empty() && self.pushed.0 == Sequence(0), "begun twice");
        *self = Self { begin: (position, epoch), ..Self::new(position, self.bytes_max) };
    }

    /// Takes a batch, or gives it back when the bound (or twice the bound) is reached. An empty queue takes any.
    ///
    /// # Panics
    /// When the batch does not follow the one before, or its bytes are not that many records.
    pub fn push(&mut self, batch: Batch, twice: bool) -> Result<(), Batch> {
        assert!(batch.count > 0, "an empty batch");
        assert_eq!(batch.first, self.pushed.0.next(), "batches follow each other");
        let bytes_max = if twice { self.bytes_max * 2 } else { self.bytes_max };
        let full = self.bytes + batch.bytes.len() > bytes_max || self.memory.len() >= BATCHES_MAX;
        if full && !self.memory.is_empty() {
            return Err(batch);
        }
        self.bytes += batch.bytes.len();
        let mut before = self.pushed.1;
        self.pushed = (batch.last(), batch.chain_after);
        let mut rest = Some(batch);
        while let Some(batch) = rest.take() {
            let cut = if batch.bytes.len() > BODY_MAX { first_part(&batch, BODY_MAX) } else { batch.last() };
            let (head, tail) = batch.split_if_needed(cut, before);
            before = head.chain_after;
            self.memory.push_back(head);
            rest = tail;
        }
        Ok(())
    }

    /// Whether this connection gets anything now.
    #[must_use]
    pub fn has_to_send(&self) -> bool {
        let spooled = self.spool.is_some_and(|spool| self.sent < spool.end.sequence);
        self.flying.len() < BATCHES_MAX && (spooled || self.next < self.memory.len())
    }

    /// What this connection gets next, a batch of about so many bytes at most; the rest of it stays. A batch counts as sent.
    pub fn next_to_send(&mut self, bytes_max: usize) -> Next {
        if self.flying.len() >= BATCHES_MAX {
            return Next::Nothing;
        }
        if let Some(spool) = self.spool.filter(|spool| self.sent < spool.end.sequence) {
            return Next::Spooled { after: self.sent, claimed: self.claimed, to: spool.end.sequence };
        }
        let Some(mut batch) = self.memory.get(self.next).cloned() else { return Next::Nothing };
        if batch.bytes.len() > bytes_max {
            let until = first_part(&batch, bytes_max);
            let (head, tail) = batch.split_if_needed(until, self.chain_before(self.next));
            batch = head;
            if let Some(tail) = tail {
                self.memory[self.next] = batch.clone();
                self.memory.insert(self.next + 1, tail);
            }
        }
        self.next += 1;
        self.flies(&batch);
        Next::Batch(batch)
    }

    /// The spool has what the destination claims; `bytes` of it were not known to be durable there.
    pub fn claim_holds(&mut self, bytes: u64) {
        if let Some(claimed) = self.claimed.take() {
            self.durable = claimed;
            self.left_the_spool(bytes);
        }
    }

    /// A batch from the spool goes to the destination.
    ///
    /// # Panics
    /// When it does not follow what was sent.
    pub fn sent_spooled(&mut self, batch: &Batch) {
        assert_eq!(batch.first, self.sent.next(), "the spool is sent in order");
        self.flies(batch);
        // The spool may have taken what this connection was sent from memory meanwhile.
        self.next = self.memory.partition_point(|b| b.last() <= self.sent);
    }

    fn flies(&mut self, batch: &Batch) {
        self.sent = batch.last();
        let bytes = batch.bytes.len() as u64;
        self.flying.push_back(Flying { last: batch.last(), chain: batch.chain_after, bytes });
    }

    /// The destination says what is durable.
    ///
    /// # Errors
    /// What makes going on impossible: a fork, or a position that was never sent.
    pub fn acknowledged(&mut self, position: Position) -> Result<(), Refusal> {
        if position.sequence < self.durable.sequence || position.sequence > self.sent {
            return Err(Refusal::Gap { have: self.durable.sequence, got: position.sequence });
        }
        while let Some(sent) = self.flying.pop_front_if(|sent| sent.last <= position.sequence) {
            if sent.last == position.sequence && sent.chain != position.chain {
                return Err(Refusal::Fork { at: position.sequence });
            }
            self.left_the_spool(sent.bytes);
            self.durable = Position { sequence: sent.last, chain: sent.chain, ..position };
        }
        self.durable.epoch = position.epoch;
        self.forget_durable();
        Ok(())
    }

    /// A new connection, whose other end stands at `position`: what is behind it is sent (again).
    ///
    /// # Errors
    /// As [`Queue::acknowledged`]; also when the destination lost what it had acknowledged.
    pub fn reconnected(&mut self, position: Position) -> Result<(), Refusal> {
        self.flying.clear();
        self.claimed = None;
        let at = position.sequence;
        if at < self.durable.sequence || at > self.pushed.0 {
            return Err(Refusal::Gap { have: self.durable.sequence, got: at });
        }
        if let Some(spool) = self.spool
            && self.durable.sequence < at
            && at < spool.end.sequence
        {
            // Only the spool can tell.
            self.claimed = Some(position);
        } else {
            let chain = match self.spool {
                Some(spool) if spool.end.sequence == at => Some(spool.end.chain),
                _ if self.durable.sequence == at => Some(self.durable.chain),
                _ => self.cut_memory(at),
            };
            if chain != Some(position.chain) {
                return Err(Refusal::Fork { at });
            }
            self.durable = position;
            self.forget_durable();
        }
        self.sent = at;
        self.next = self.memory.partition_point(|b| b.last() <= at);
        Ok(())
    }

    /// The chain hash after a record in memory; a batch that goes on behind it is cut there.
    fn cut_memory(&mut self, at: Sequence) -> Option<ChainHash> {
        let index = self.memory.partition_point(|b| b.last() < at);
        let before = self.chain_before(index);
        let (head, tail) = self.memory.get(index)?.clone().split_after(at, before)?;
        let chain = head.chain_after;
        self.memory[index] = head;
        if let Some(tail) = tail {
            self.memory.insert(index + 1, tail);
        }
        Some(chain)
    }

    /// The chain hash before a batch in memory.
    fn chain_before(&self, index: usize) -> ChainHash {
        match index.checked_sub(1) {
            Some(before) => self.memory[before].chain_after,
            None => self.spool.map_or(self.durable.chain, |spool| spool.end.chain),
        }
    }

    /// What the destination has goes.
    fn forget_durable(&mut self) {
        if self.spool.is_some_and(|spool| spool.end.sequence <= self.durable.sequence) {
            self.spool = None;
        }
        self.forget_memory(self.durable.sequence);
    }

    fn forget_memory(&mut self, up_to: Sequence) {
        while let Some(batch) = self.memory.pop_front_if(|b| b.last() <= up_to) {
            self.bytes -= batch.bytes.len();
            self.next = self.next.saturating_sub(1);
            self.released = batch.ring_position.or(self.released);
        }
    }

    fn left_the_spool(&mut self, bytes: u64) {
        if let Some(spool) = &mut self.spool {
            spool.bytes = spool.bytes.saturating_sub(bytes);
        }
    }

    /// Where the spool goes on, and what it takes next: the oldest batches in memory, about as many bytes.
    #[must_use]
    pub fn to_spool(&self, bytes_max: usize) -> Option<(Position, Vec<Batch>)> {
        let first = self.memory.front()?.first;
        let before = match self.spool {
            Some(spool) => spool.end,
            None => self.durable,
        };
        debug_assert_eq!(before.sequence.next(), first, "the spool is followed by memory");
        let mut bytes = 0;
        let fits = |batch: &&Batch| {
            let first = bytes == 0;
            bytes += batch.bytes.len();
            first || bytes <= bytes_max
        };
        Some((before, self.memory.iter().take_while(fits).cloned().collect()))
    }

    /// The position after a record of this queue.
    #[must_use]
    pub fn position(&self, sequence: Sequence, chain: ChainHash) -> Position {
        let (begin, epoch) = self.begin;
        let epoch = if sequence <= begin.sequence { begin.epoch } else { epoch };
        Position { epoch, sequence, chain }
    }

    /// These batches, from [`Queue::to_spool`], are durable in the spool.
    pub fn spooled(&mut self, batches: &[Batch]) {
        let Some(last) = batches.last() else { return };
        let end = self.position(last.last(), last.chain_after);
        let bytes = batches.iter().map(|b| b.bytes.len() as u64).sum::<u64>();
        let before = self.spool.map_or(0, |spool| spool.bytes);
        self.spool = Some(Spooled { end, bytes: before + bytes });
        self.forget_memory(end.sequence);
        // What came back in the meantime.
        self.forget_durable();
    }

    /// Durable at the destination, at a batch's end.
    #[must_use]
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// The last record that is durable, there or in the spool.
    #[must_use]
    pub fn sealed(&self) -> Sequence {
        self.spool.map_or(self.durable.sequence, |spool| spool.end.sequence)
    }

    /// Records and bytes that only the spool has.
    #[must_use]
    pub fn in_spool(&self) -> (u64, u64) {
        let Some(spool) = self.spool else { return (0, 0) };
        (spool.end.sequence.0 - self.durable.sequence.0, spool.bytes)
    }

    /// Ring space up to here holds nothing that is not durable.
    #[must_use]
    pub fn released(&self) -> Option<u64> {
        self.released
    }

    /// Ring space up to here holds nothing beyond what was pushed so far.
    pub fn note_position(&mut self, position: u64) {
        match self.memory.back_mut() {
            Some(last) => last.ring_position = last.ring_position.max(Some(position)),
            None => self.released = self.released.max(Some(position)),
        }
    }

    /// Bytes that are in memory.
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

/// Number of the last record of the first so many bytes of a batch, and of the first record in any case.
fn first_part(batch: &Batch, bytes_max: usize) -> Sequence {
    let mut rest = batch.bytes.clone();
    let mut last = batch.first;
    while let Ok(Some(record)) = codec::take(&mut rest) {
        if batch.bytes.len() - rest.len() > bytes_max {
            break;
        }
        last = record.sequence;
    }
    last
}

#[cfg(test)]
#[path = "queue_tests.rs"]
pub(super) mod tests;
