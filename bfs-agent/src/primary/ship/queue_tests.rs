//! The queue alone: bounds, order, forks, and a property test of memory and spool together.

use super::*;
use bfs_common::record::{ObjectId, Record};
use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

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

/// The next batch from memory.
fn next(queue: &mut Queue) -> Option<Batch> {
    match queue.next_to_send(BODY_MAX) {
        Next::Batch(batch) => Some(batch),
        Next::Nothing => None,
        other => panic!("{other:?}"),
    }
}

fn position(at: (Sequence, ChainHash)) -> Position {
    Position { epoch: Epoch(1), sequence: at.0, chain: at.1 }
}

#[test]
fn the_bound_gives_the_batch_back() {
    let mut queue = Queue::new(Position::START, 1000);
    let mut at = start();
    queue.push(batch(&mut at, &[2000]), false).unwrap();
    let first = at;
    let second = batch(&mut at, &[10]);
    assert_eq!(queue.push(second.clone(), false), Err(second.clone()));
    next(&mut queue).unwrap();
    queue.acknowledged(position(first)).unwrap();
    assert_eq!((queue.bytes(), queue.released()), (0, Some(100)));
    queue.push(second, false).unwrap();
}

#[test]
fn a_large_batch_is_cut_between_records() {
    let mut queue = Queue::new(Position::START, 1 << 30);
    let mut at = start();
    let whole = batch(&mut at, &[1 << 20; 9]);
    queue.push(whole.clone(), false).unwrap();
    let mut parts = Vec::new();
    while let Some(part) = next(&mut queue) {
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
    queue.push(first, false).unwrap();
    queue.push(second.clone(), false).unwrap();
    while next(&mut queue).is_some() {}
    queue.reconnected(position(inside)).unwrap();
    let resent = next(&mut queue).unwrap();
    assert_eq!((resent.first, resent.count), (Sequence(4), 2));
    assert!(second.bytes.ends_with(&resent.bytes));
    assert_eq!(next(&mut queue), None);
    assert_eq!(queue.released(), Some(200));
    queue.acknowledged(position(at)).unwrap();
    assert_eq!((queue.bytes(), queue.released()), (0, Some(500)));
}

#[test]
fn a_fork_and_a_loss_are_noticed() {
    let mut queue = Queue::new(Position::START, 1 << 20);
    let mut at = start();
    queue.push(batch(&mut at, &[1, 2]), false).unwrap();
    let good = at;
    next(&mut queue).unwrap();
    let other = Position { chain: ChainHash([9; 32]), ..position(good) };
    assert_eq!(queue.acknowledged(other), Err(Refusal::Fork { at: Sequence(2) }));

    let mut queue = Queue::new(position(good), 1 << 20);
    queue.push(batch(&mut at, &[1]), false).unwrap();
    assert!(matches!(queue.reconnected(Position::START), Err(Refusal::Gap { .. })));
    let ahead = Position { sequence: Sequence(9), ..position(at) };
    assert!(matches!(queue.acknowledged(ahead), Err(Refusal::Gap { .. })));
    let inside = Position { sequence: Sequence(2), chain: ChainHash([1; 32]), epoch: Epoch(1) };
    assert_eq!(queue.reconnected(inside), Err(Refusal::Fork { at: Sequence(2) }));
}

/// What a test does to the queue.
#[derive(Clone, Debug)]
enum Step {
    Push(Vec<usize>),
    /// So many bytes go into the spool, if that works.
    Spool(usize, bool),
    Send(usize),
    /// The destination takes so many of the batches on the wire, and acknowledges so many of these.
    Take(usize, usize),
    /// The connection breaks; so many of the records since its last acknowledgement are there after all.
    Break(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(0..400usize, 1..5).prop_map(Step::Push),
        2 => (1..2000usize, prop::bool::weighted(0.8)).prop_map(|(bytes, works)| Step::Spool(bytes, works)),
        4 => (1..4usize).prop_map(Step::Send),
        3 => (1..5usize, 0..5usize).prop_map(|(take, ack)| Step::Take(take, ack)),
        1 => (0..8usize).prop_map(Step::Break),
    ]
}

/// Everything around a queue.
struct Around {
    queue: Queue,
    /// The position after each record, and its bytes.
    records: Vec<((Sequence, ChainHash), Bytes)>,
    /// Ring positions that come with a record.
    rings: Vec<(Sequence, u64)>,
    /// The records of the spool: behind the first, up to the second.
    spool: (u64, u64),
    wire: VecDeque<Batch>,
    received: u64,
    acknowledged: u64,
}

impl Around {
    fn at(&self, sequence: u64) -> Position {
        match sequence.checked_sub(1) {
            Some(index) => position(self.records[index as usize].0),
            None => Position { epoch: Epoch(1), ..Position::START },
        }
    }

    fn end(&self) -> (Sequence, ChainHash) {
        self.records.last().map_or(start(), |record| record.0)
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Push(lengths) => {
                let before = self.end();
                let mut after = before;
                let batch = batch(&mut after, &lengths);
                if self.queue.push(batch.clone(), false).is_err() {
                    return;
                }
                let (mut rest, mut chain) = (batch.bytes.clone(), before.1);
                while let Some(record) = codec::take(&mut rest).unwrap() {
                    chain = record.chain(chain);
                    self.records.push(((record.sequence, chain), record.bytes.clone()));
                }
                self.rings.extend(batch.ring_position.map(|ring| (batch.last(), ring)));
            }
            Step::Spool(bytes, works) => {
                let Some((before, batches)) = self.queue.to_spool(bytes) else { return };
                assert_eq!(before.chain, self.at(before.sequence.0).chain);
                assert_eq!(batches[0].first, before.sequence.next());
                if self.queue.in_spool().0 == 0 {
                    self.spool = (before.sequence.0, before.sequence.0);
                }
                assert_eq!(self.spool.1, before.sequence.0, "a spool has no holes");
                if works {
                    self.spool.1 = batches.last().unwrap().last().0;
                    self.queue.spooled(&batches);
                }
            }
            Step::Send(count) => (0..count).for_each(|_| self.send()),
            Step::Take(take, acknowledge) => {
                for index in 0..take {
                    let Some(batch) = self.wire.pop_front() else { break };
                    assert_eq!(batch.first.0, self.received + 1, "in order, nothing twice");
                    let sent: Vec<u8> = (batch.first.0..=batch.last().0)
                        .flat_map(|n| self.records[n as usize - 1].1.to_vec())
                        .collect();
                    assert_eq!(batch.bytes, sent);
                    self.received = batch.last().0;
                    if index < acknowledge {
                        self.acknowledged = self.received;
                        self.queue.acknowledged(self.at(self.received)).unwrap();
                    }
                }
            }
            Step::Break(count) => {
                // What was on its way may have come, or only a part of it.
                let sent = self.wire.back().map_or(self.received, |batch| batch.last().0);
                self.wire.clear();
                self.received = sent.min(self.acknowledged + count as u64);
                self.acknowledged = self.received;
                self.queue.reconnected(self.at(self.received)).unwrap();
            }
        }
    }

    fn send(&mut self) {
        // Some in small pieces.
        let bytes_max = if self.received.is_multiple_of(2) { 150 } else { BODY_MAX };
        let has = self.queue.has_to_send();
        let next = self.queue.next_to_send(bytes_max);
        assert_eq!(has, next != Next::Nothing);
        match next {
            Next::Nothing => {}
            Next::Batch(batch) => self.wire.push_back(batch),
            Next::Spooled { after, claimed, to } => {
                assert!(self.spool.0 <= after.0 && to.0 == self.spool.1, "it asks for what is there");
                if let Some(claimed) = claimed {
                    assert_eq!(claimed, self.at(after.0));
                    self.queue.claim_holds(0);
                }
                let last = to.0.min(after.0 + 3);
                let bytes = self.records[after.0 as usize..last as usize].iter();
                let bytes: Vec<u8> = bytes.flat_map(|record| record.1.to_vec()).collect();
                let batch = Batch {
                    first: after.next(),
                    count: (last - after.0) as u32,
                    bytes: bytes.into(),
                    ring_position: None,
                    chain_after: self.at(last).chain,
                };
                self.queue.sent_spooled(&batch);
                self.wire.push_back(batch);
            }
        }
    }

    fn check(&self) {
        let durable = self.queue.durable().sequence.0;
        assert!(durable <= self.received.max(self.acknowledged), "durable is what was acknowledged");
        let sealed = self.queue.sealed().0;
        let safe = durable.max(if self.queue.in_spool().0 > 0 { self.spool.1 } else { 0 });
        assert_eq!(sealed, safe);
        let may = self.rings.iter().filter(|(last, _)| last.0 <= safe).map(|(_, ring)| *ring).max();
        assert!(self.queue.released() <= may, "the ring is held for what is in memory");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_each_record_arrives_once_and_in_order(steps in prop::collection::vec(step(), 1..80)) {
        let begin = Position { epoch: Epoch(1), ..Position::START };
        let mut around = Around {
            queue: Queue::new(begin, 4000),
            records: Vec::new(),
            rings: Vec::new(),
            spool: (0, 0),
            wire: VecDeque::new(),
            received: 0,
            acknowledged: 0,
        };
        for step in steps {
            around.apply(step);
            around.check();
        }
        let all = around.records.len() as u64;
        for _ in 0..all + 1 {
            around.apply(Step::Send(4));
            around.apply(Step::Take(4, 0));
            around.acknowledged = around.received;
            around.queue.acknowledged(around.at(around.received)).unwrap();
            around.check();
        }
        prop_assert_eq!(around.received, all);
        prop_assert_eq!(around.queue.durable(), around.at(all));
        prop_assert_eq!((around.queue.bytes(), around.queue.in_spool()), (0, (0, 0)));
        prop_assert_eq!(around.queue.released(), around.rings.last().map(|(_, ring)| *ring));
    }
}
