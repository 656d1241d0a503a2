//! The shipping side of an agent: the real queue, the real spool and its reader; what the threads around them do
//! is done step by step.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::record::*;
use bfs_common::wire::{Position, Refusal};

use super::couriers::Couriers;
use super::primary::Primary;
use super::stream::{Line, touched};
use super::world::Up;
use crate::backup::group::simulated::NAME;
use crate::log::writer;
use crate::primary::ship::Batch;
use crate::primary::ship::queue::{Next, Queue};
use crate::primary::spool::{Address, Reader, Spool, SpoolOptions};

/// Bytes that memory may hold.
const MEMORY: usize = 3000;

/// What it is busy with.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// Sending what an agent before left, in the epoch of that.
    Left(Epoch),
    /// Asking for an epoch.
    New,
    /// Telling what happens.
    Live,
}

/// See the module.
pub struct Agent {
    /// Whose agent it is.
    id: GroupId,
    disk: usize,
    stage: Stage,
    pub queue: Queue,
    spool: Spool,
    reader: Option<Reader>,
    epoch: Option<Epoch>,
    pub connection: Option<u64>,
    pub is_welcome: bool,
    /// Cut into batches, and not taken by the queue yet.
    held: VecDeque<Batch>,
    /// Objects whose content the stream does not have exactly.
    dirty: BTreeSet<ObjectId>,
    /// The stream has nothing exactly.
    everything: bool,
    /// The last operation that is in the stream, or named there.
    consumed: u64,
    /// How many further destinations there are, where their records stand, and their most bytes.
    further: (usize, PathBuf, u64),
    /// While it tells what happens, where there are further destinations.
    pub couriers: Option<Couriers>,
    /// What the first destination has applied.
    pub first_applied: CheckpointId,
}

impl Agent {
    /// Begins as a process does; `None` when the host fails meanwhile.
    pub fn start(
        (id, disk): (GroupId, usize),
        (folder, further): (&Path, usize),
        boot: u8,
        bytes_max: u64,
        time_max: Duration,
    ) -> Option<Self> {
        let options = SpoolOptions { directory: folder.into(), bytes_max, time_max };
        let before = super::disk::refused(disk);
        let failing = || super::disk::refused(disk) > before || super::disk::has_failed(disk);
        let mut spool = match Spool::open(options, Address::new(NAME, id, [boot; 16])) {
            Ok(spool) => spool,
            Err(_) if failing() => return None,
            Err(error) => panic!("the spool: {error}"),
        };
        let left = match spool.left() {
            Ok(left) => left,
            Err(_) if failing() => return None,
            Err(error) => panic!("what is left in the spool: {error}"),
        };
        let (stage, queue) = match &left {
            Some(left) => (Stage::Left(left.address.epoch), Queue::left(left.begin, left.end, left.bytes)),
            None => (Stage::New, Queue::new(Position::START, MEMORY)),
        };
        Some(Self {
            id,
            disk,
            stage,
            queue,
            spool,
            reader: None,
            epoch: None,
            connection: None,
            is_welcome: false,
            held: VecDeque::new(),
            dirty: BTreeSet::new(),
            everything: false,
            consumed: 0,
            further: (further, folder.into(), bytes_max),
            couriers: None,
            first_applied: CheckpointId(0),
        })
    }

    /// The epoch of the next Hello.
    pub fn hello(&self) -> Option<Epoch> {
        match self.stage {
            Stage::Left(epoch) => Some(epoch),
            _ => self.epoch,
        }
    }

    /// Whether it tells what happens.
    pub fn is_live(&self) -> bool {
        self.stage == Stage::Live
    }

    /// Everything that it told is durable at the destination.
    pub fn is_even(&self, primary: &Primary) -> bool {
        self.is_live()
            && self.held.is_empty()
            && self.queue.durable().sequence == primary.stream.end()
            && self.consumed == primary.last_op()
    }

    /// The destination is there.
    pub fn welcomed(
        &mut self,
        primary: &mut Primary,
        epoch: Epoch,
        position: Position,
        gaps: &[GapScope],
    ) -> Result<(), Refusal> {
        self.reader = None;
        match self.stage {
            Stage::Left(_) if !self.is_welcome && self.epoch.is_none() => {
                self.epoch = Some(epoch);
                self.queue.begin_left(position)?;
            }
            Stage::New => {
                self.epoch = Some(epoch);
                self.spool.set_epoch(epoch);
                self.queue = Queue::new(Position::START, MEMORY);
                self.queue.begin(position, epoch);
                self.stage = Stage::Live;
                primary.stream.cut(position.sequence);
                let (further, folder, bytes_max) = &self.further;
                if *further > 0 {
                    self.couriers = Some(Couriers::new(folder, *bytes_max, &primary.stream, *further));
                }
                self.take_over(primary, epoch, position, gaps);
            }
            _ => self.queue.reconnected(position)?,
        }
        self.is_welcome = true;
        self.go_on();
        Ok(())
    }

    /// The first records of an agent's life.
    fn take_over(&mut self, primary: &mut Primary, epoch: Epoch, position: Position, gaps: &[GapScope]) {
        assert!(
            position.sequence >= primary.sealed,
            "sealed was {}, left of it is {}",
            primary.sealed,
            position.sequence
        );
        let complete = !primary.has_lost();
        self.everything = !complete || gaps.contains(&GapScope::Everything);
        let mut lines =
            vec![(Record::EpochBegin { epoch, boot_id: [primary.boot; 16], complete }, Vec::new())];
        let named = gaps.iter().filter_map(|gap| match gap {
            GapScope::Object(object) => Some(*object),
            _ => None,
        });
        let ring = primary.ring.iter().flat_map(|op| op.lines.iter().flat_map(|line| touched(&line.0)));
        let suspect: BTreeSet<ObjectId> = named.chain(ring).collect();
        if !self.everything {
            lines.extend(primary.stream.difference(&primary.model, Some(&suspect)));
            lines.extend(repaired(gaps.iter().cloned()));
        }
        self.consumed = primary.last_op();
        primary.tells_loss();
        self.tell(primary, lines);
    }

    fn tell(&mut self, primary: &mut Primary, lines: Vec<Line>) {
        if !lines.is_empty() {
            let batch = primary.stream.batch(lines, Some(self.consumed), &primary.model);
            self.held.push_back(batch);
        }
        self.push();
    }

    /// What is held goes into the queue, as far as that takes it.
    pub fn push(&mut self) {
        while let Some(batch) = self.held.pop_front() {
            let kept = self.couriers.as_ref().map(|_| batch.clone());
            if let Err(batch) = self.queue.push(batch, false) {
                self.held.push_front(batch);
                return;
            }
            if let (Some(couriers), Some(batch)) = (&mut self.couriers, &kept) {
                couriers.take(batch, self.first_applied);
            }
        }
    }

    /// Takes the next operation out of the ring. With `by_reference` the bytes are read later.
    pub fn consume(&mut self, primary: &mut Primary, by_reference: bool) {
        if !self.is_live() || !self.held.is_empty() {
            return;
        }
        let mut lines = Vec::new();
        if primary.tells_loss() {
            self.everything = true;
            lines.push((Record::Gap { scope: GapScope::Everything }, Vec::new()));
        }
        if self.everything {
            self.consumed = primary.last_op();
        }
        let next = primary.ring.iter().find(|op| op.number > self.consumed);
        let all = next.map_or_else(Vec::new, |op| {
            self.consumed = op.number;
            op.lines.clone()
        });
        for line in all {
            if self.everything {
                break;
            }
            match &line.0 {
                Record::Write { object, .. }
                | Record::Zero { object, .. }
                | Record::Truncate { object, .. } => {
                    if by_reference && self.dirty.insert(*object) {
                        lines.push((Record::Gap { scope: GapScope::Object(*object) }, Vec::new()));
                    }
                    if !self.dirty.contains(object) {
                        lines.push(line);
                    }
                }
                _ => lines.push(line),
            }
        }
        self.tell(primary, lines);
        if self.held.is_empty() {
            self.queue.note_position(self.consumed);
        }
    }

    /// A checkpoint, if all was consumed. Without `settles` an engine that is wrong: the replayer has to refuse.
    pub fn checkpoint(&mut self, primary: &mut Primary, settles: bool) {
        if !self.is_live()
            || !self.held.is_empty()
            || self.consumed != primary.last_op()
            || primary.must_tell()
        {
            return;
        }
        let mut lines = Vec::new();
        if settles {
            if self.everything {
                lines = primary.stream.difference(&primary.model, None);
                lines.extend(repaired([GapScope::Everything]));
            } else {
                lines = primary.stream.difference(&primary.model, Some(&self.dirty));
                lines.extend(repaired(self.dirty.iter().map(|object| GapScope::Object(*object))));
            }
            self.everything = false;
            self.dirty.clear();
        }
        let checkpoint = primary.stream.checkpoint().next();
        // Those with a tag stay: so others are dropped in the middle.
        let tag = if checkpoint.0.is_multiple_of(3) { "kept".into() } else { String::new() };
        let label = CheckpointLabel { wall_ns: primary.wall_ns, tag, ..CheckpointLabel::default() };
        lines.push((Record::Checkpoint { checkpoint, label }, Vec::new()));
        self.tell(primary, lines);
    }

    /// Whether the next marker would stand over a gap.
    pub fn has_gaps(&self) -> bool {
        self.everything || !self.dirty.is_empty()
    }

    /// What the connection gets next.
    pub fn send(&mut self) -> Option<Up> {
        let batch = match self.queue.next_to_send(600) {
            Next::Nothing => return None,
            Next::Batch(batch) => batch,
            Next::Spooled { after, claimed, to } => {
                let durable = self.queue.durable().sequence;
                let opened = self.reader.take().filter(|reader| reader.at().0 == after && claimed.is_none());
                let mut reader = opened.unwrap_or_else(|| {
                    Reader::open(self.spool.log(), self.id, after, durable).expect("what is in the spool")
                });
                if let Some(claimed) = claimed {
                    assert_eq!(
                        (claimed.sequence, claimed.chain),
                        reader.at(),
                        "the destination has our records"
                    );
                    self.queue.claim_holds(reader.passed());
                }
                let batch = reader.read(to, 600).expect("what is in the spool");
                self.queue.sent_spooled(&batch);
                self.reader = Some(reader);
                batch
            }
        };
        Some(Up::Records(batch.first, batch.count, batch.bytes))
    }

    /// The keeper's turn: `takes` moves memory into the spool. False when the host failed.
    pub fn keep(&mut self, takes: bool) -> bool {
        let durable = self.queue.durable().sequence;
        if self.queue.in_spool().0 == 0 && !self.spool.is_empty() {
            self.reader = None;
            let cleared = self.spool.clear().is_ok();
            self.go_on();
            return cleared;
        }
        self.go_on();
        if self.spool.has_done(durable) {
            return self.spool.acknowledged(durable).is_ok();
        }
        if !takes || !self.is_live() {
            return true;
        }
        let Some((before, batches)) = self.queue.to_spool(500) else { return true };
        let mut stands = before;
        let mut lines = Vec::new();
        for batch in &batches {
            let after = self.queue.position(batch.last(), batch.chain_after);
            lines.push(writer::Batch { bytes: batch.bytes.clone(), before: stands, after });
            stands = after;
        }
        if self.spool.append(before, &lines, false).is_ok() {
            self.queue.spooled(&batches);
            self.push();
        }
        true
    }

    /// The destination says what it has.
    pub fn acknowledged(&mut self, position: Position) -> Result<(), Refusal> {
        self.queue.acknowledged(position)?;
        self.push();
        self.go_on();
        Ok(())
    }

    /// When what was left is sent, an epoch is asked for.
    fn go_on(&mut self) {
        if matches!(self.stage, Stage::Left(_)) && self.queue.in_spool().0 == 0 && self.spool.clear().is_ok()
        {
            self.stage = Stage::New;
            self.epoch = None;
            self.is_welcome = false;
            self.connection = None;
        }
    }

    /// What cannot be sent is thrown away.
    pub fn throw_away(&mut self) {
        // Where a call failed it is tried again.
        let cleared = self.spool.clear().or_else(|_| self.spool.clear());
        assert!(cleared.is_ok() || super::disk::has_failed(self.disk), "{cleared:?}");
    }
}

fn repaired(scopes: impl IntoIterator<Item = GapScope>) -> impl Iterator<Item = Line> {
    scopes.into_iter().map(|scope| (Record::Repaired { scope }, Vec::new()))
}
