//! What may enter a group's log: pure decisions over one record at a time.
//!
//! The gate stands at the last record that was *taken*, which may not be durable yet. It lets
//! each record in exactly once and in order, refuses a gap or a fork by its typed name, counts
//! open suspects, and refuses a marker while any is open: promise 3 is checked on this side too.
//! An epoch that does not go on where the one before ended opens everything by itself.

use std::collections::{HashSet, VecDeque};

use bfs_common::codec::Encoded;
use bfs_common::record::{
    ChainHash, CheckpointId, CheckpointLabel, Epoch, GapScope, ObjectId, PathBytes, Record, Sequence,
};
use bfs_common::wire::{Position, Refusal};
use serde::{Deserialize, Serialize};

use super::kinds::Kinds;
use crate::mutant::{self, Mutant};

/// How many records back a resent one can still be compared.
const WINDOW: usize = 65_536;
/// How many scopes of gaps may be open before they are taken as one: everything.
const GAPS_MAX: usize = 4096;
/// How many roots a group may have.
const ROOTS_MAX: usize = 1024;

/// The boot of an epoch that no agent began, but what was taken in of another store. Where records stand before it that no
/// marker covers, they are void: it follows the last marker.
pub const RECEIVED: [u8; 16] = [0; 16];

/// Whether what was taken in of another store begins here.
#[must_use]
pub fn is_received(record: &Record) -> bool {
    matches!(record, Record::EpochBegin { boot_id, .. } if *boot_id == RECEIVED)
}

/// A marker that stands in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// Number of the checkpoint.
    pub checkpoint: CheckpointId,
    /// What people know it by.
    pub label: CheckpointLabel,
    /// Position of the marker itself.
    pub position: PositionRow,
}

/// [`Position`] as it is stored (that type is the wire's).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PositionRow {
    /// Epoch.
    pub epoch: Epoch,
    /// Sequence number.
    pub sequence: Sequence,
    /// Chain hash.
    pub chain: ChainHash,
}

impl From<Position> for PositionRow {
    fn from(p: Position) -> Self {
        Self { epoch: p.epoch, sequence: p.sequence, chain: p.chain }
    }
}

impl From<PositionRow> for Position {
    fn from(p: PositionRow) -> Self {
        Self { epoch: p.epoch, sequence: p.sequence, chain: p.chain }
    }
}

/// What the gate does with a record.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Append it to the log.
    Take,
    /// It is there already, the same.
    Known,
}

/// The state of a group's stream at the last record that was taken.
#[derive(Clone, Debug)]
pub struct Gate {
    /// The last record.
    pub position: Position,
    /// The last marker's number.
    pub checkpoint: CheckpointId,
    /// Highest object number ever seen.
    pub highest_object: ObjectId,
    /// Scopes of gaps that are open: [`GapScope::Everything`] alone, or up to [`GAPS_MAX`] others.
    pub gaps: HashSet<GapScope>,
    /// The group's roots.
    pub roots: Vec<(PathBytes, ObjectId)>,
    /// The boot of the last epoch.
    pub boot_id: [u8; 16],
    /// The primary's files are being brought back to this checkpoint.
    pub rolling_back: Option<CheckpointId>,
    /// There is a policy, or was one: the applier looks whether files have followers.
    pub has_policies: bool,
    /// The objects that live.
    kinds: Kinds,
    /// Chain hashes of the last records, the newest last.
    window: VecDeque<ChainHash>,
}

impl Gate {
    /// At this position, nothing open.
    #[must_use]
    pub fn new(
        position: Position,
        checkpoint: CheckpointId,
        highest_object: ObjectId,
        roots: Vec<(PathBytes, ObjectId)>,
        boot_id: [u8; 16],
        kinds: Kinds,
    ) -> Self {
        let window = VecDeque::from([position.chain]);
        Self {
            position,
            checkpoint,
            highest_object,
            gaps: HashSet::new(),
            roots,
            boot_id,
            rolling_back: None,
            has_policies: false,
            kinds,
            window,
        }
    }

    /// The same further on in the log, behind records that are void.
    #[must_use]
    pub fn behind_void(mut self, position: Position) -> Self {
        self.window = VecDeque::from([position.chain]);
        self.position = position;
        self
    }

    /// Decides about the next record of an agent that holds `epoch`; when it is taken, the gate
    /// stands behind it.
    ///
    /// # Errors
    /// The refusal that the agent gets. The gate is then unchanged.
    pub fn take(
        &mut self,
        epoch: Epoch,
        encoded: &Encoded,
        record: &Record,
        payload: &[u8],
    ) -> Result<Verdict, Refusal> {
        self.pass(epoch, encoded, record, Some(payload))
    }

    /// With its payload the record is checked for whether it can be applied.
    fn pass(
        &mut self,
        epoch: Epoch,
        encoded: &Encoded,
        record: &Record,
        payload: Option<&[u8]>,
    ) -> Result<Verdict, Refusal> {
        let (have, got) = (self.position.sequence, encoded.sequence);
        if got <= have {
            return self.compare(encoded);
        }
        if got != have.next() {
            return Err(Refusal::Gap { have, got });
        }
        let begins = matches!(record, Record::EpochBegin { .. });
        if begins != (self.position.epoch < epoch) {
            let what = if begins { "a second beginning of" } else { "a record before the beginning of" };
            return Err(Refusal::Bad(format!("record {got} is {what} epoch {epoch}")));
        }
        if let Some(payload) = payload {
            self.check(record, payload).map_err(|why| Refusal::Bad(format!("record {got}: {why}")))?;
        }
        self.enter(epoch, got, record)?;
        self.kinds.follow(record);
        self.step(encoded.chain(self.position.chain), got);
        Ok(Verdict::Take)
    }

    fn check(&self, record: &Record, payload: &[u8]) -> Result<(), String> {
        self.kinds.check(self.highest_object, record, payload)?;
        let lost = |(_, object): &&(PathBytes, ObjectId)| !self.kinds.is_directory(*object);
        if let Record::Checkpoint { .. } = record
            && let Some((path, object)) = self.roots.iter().find(lost)
        {
            return Err(format!("root {path:?} is object {object}, which is no directory"));
        }
        Ok(())
    }

    fn step(&mut self, chain: ChainHash, sequence: Sequence) {
        self.position.chain = chain;
        self.position.sequence = sequence;
        self.window.push_back(chain);
        if self.window.len() > WINDOW {
            self.window.pop_front();
        }
    }

    /// A record of a number that is there already: the same, or a fork.
    fn compare(&self, encoded: &Encoded) -> Result<Verdict, Refusal> {
        let back = (self.position.sequence.0 - encoded.sequence.0) as usize;
        // The hash before it and the hash after it.
        let newest = self.window.len() - 1;
        if encoded.sequence.0 == 0 || back >= newest {
            return Err(Refusal::Bad(format!(
                "record {} is older than what can still be compared: go on after {}",
                encoded.sequence, self.position.sequence
            )));
        }
        let (before, after) = (self.window[newest - back - 1], self.window[newest - back]);
        if encoded.chain(before) == after {
            Ok(Verdict::Known)
        } else {
            Err(Refusal::Fork { at: encoded.sequence })
        }
    }

    /// What the record means for the state, checked before anything is changed.
    fn enter(&mut self, epoch: Epoch, sequence: Sequence, record: &Record) -> Result<(), Refusal> {
        let bad = |why: String| Err(Refusal::Bad(format!("record {sequence}: {why}")));
        match record {
            Record::EpochBegin { epoch: begun, boot_id, complete } => {
                if *begun != epoch {
                    return bad(format!("it begins epoch {begun}, granted was {epoch}"));
                }
                self.position.epoch = epoch;
                self.boot_id = *boot_id;
                // An agent finishes that before anything else.
                self.rolling_back = None;
                if !complete {
                    self.open_gap(&GapScope::Everything);
                }
            }
            Record::Policies { lines } => self.has_policies |= !lines.is_empty(),
            Record::RollbackIntent { to } => self.rolling_back = Some(*to),
            Record::RollbackDone { .. } => self.rolling_back = None,
            Record::Object { object, .. } => {
                if *object <= self.highest_object {
                    return bad(format!("object number {object} was given before"));
                }
                self.highest_object = *object;
            }
            Record::EntrySet { object, directory, .. } if object == directory => {
                return bad(format!("directory {object} in itself"));
            }
            Record::Roots { roots } => {
                check_roots(roots).map_err(|why| Refusal::Bad(format!("record {sequence}: {why}")))?;
                self.roots.clone_from(roots);
            }
            Record::Gap { scope } => self.open_gap(scope),
            Record::Repaired { scope } => self.gaps.retain(|open| !closes(scope, open)),
            Record::Checkpoint { checkpoint, .. } => {
                if !self.gaps.is_empty() && !mutant::is(Mutant::ConfirmsOverGap) {
                    return Err(Refusal::OpenGap { checkpoint: *checkpoint, open: self.gaps.len() as u64 });
                }
                if *checkpoint <= self.checkpoint {
                    return bad(format!("checkpoint {checkpoint} after checkpoint {}", self.checkpoint));
                }
                self.checkpoint = *checkpoint;
            }
            _ => {}
        }
        Ok(())
    }

    fn open_gap(&mut self, scope: &GapScope) {
        if self.gaps.contains(&GapScope::Everything) {
            return;
        }
        let too_many = self.gaps.len() >= GAPS_MAX && !self.gaps.contains(scope);
        if too_many || *scope == GapScope::Everything {
            self.gaps = HashSet::from([GapScope::Everything]);
        } else {
            self.gaps.insert(scope.clone());
        }
    }

    /// Follows a record of our own log, which a gate let in once, maybe that of another release.
    ///
    /// # Errors
    /// The refusal that it would get now: then the log is not what was written.
    pub fn replay(&mut self, encoded: &Encoded, record: &Record) -> Result<(), Refusal> {
        let epoch = match record {
            Record::EpochBegin { epoch, .. } => *epoch,
            _ => self.position.epoch,
        };
        self.pass(epoch, encoded, record, None).map(|_| ())
    }
}

/// Whether a repair of `repaired` closes the gap `open`.
pub(crate) fn closes(repaired: &GapScope, open: &GapScope) -> bool {
    match (repaired, open) {
        (GapScope::Everything, _) => true,
        (GapScope::Object(a), GapScope::Range(b, ..)) => a == b,
        (GapScope::Subtree(a), GapScope::Object(b) | GapScope::Range(b, ..) | GapScope::Entry(b, _)) => {
            a == b
        }
        (GapScope::Range(a, s, e), GapScope::Range(b, os, oe)) => a == b && s <= os && oe <= e,
        _ => repaired == open,
    }
}

/// Absolute, plain paths, none inside another.
fn check_roots(roots: &[(PathBytes, ObjectId)]) -> Result<(), String> {
    if roots.len() > ROOTS_MAX {
        return Err(format!("{} roots", roots.len()));
    }
    for (index, (path, object)) in roots.iter().enumerate() {
        super::places::components(path.as_path()).ok_or_else(|| format!("{path:?} cannot be a root"))?;
        for (other, twin) in &roots[index + 1..] {
            let (a, b) = (path.as_path(), other.as_path());
            if a.starts_with(b) || b.starts_with(a) || object == twin {
                return Err(format!("roots {path:?} and {other:?} are one inside the other"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::codec;
    use bytes::BytesMut;

    fn encoded(sequence: u64, record: &Record) -> Encoded {
        let mut out = BytesMut::new();
        codec::encode(&mut out, Sequence(sequence), record, b"");
        codec::take(&mut out.freeze()).unwrap().unwrap()
    }

    fn gate() -> Gate {
        Gate::new(Position::START, CheckpointId(0), ObjectId(0), Vec::new(), [0; 16], Kinds::default())
    }

    fn give(gate: &mut Gate, epoch: u64, sequence: u64, record: &Record) -> Result<Verdict, Refusal> {
        gate.take(Epoch(epoch), &encoded(sequence, record), record, b"")
    }

    fn begin(epoch: u64) -> Record {
        Record::EpochBegin { epoch: Epoch(epoch), boot_id: [1; 16], complete: true }
    }

    fn marker(n: u64) -> Record {
        Record::Checkpoint { checkpoint: CheckpointId(n), label: CheckpointLabel::default() }
    }

    #[test]
    fn records_enter_once_and_in_order() {
        let mut gate = gate();
        assert_eq!(give(&mut gate, 1, 1, &begin(1)), Ok(Verdict::Take));
        assert_eq!(give(&mut gate, 1, 2, &marker(1)), Ok(Verdict::Take));
        assert_eq!(give(&mut gate, 1, 2, &marker(1)), Ok(Verdict::Known));
        assert_eq!(give(&mut gate, 1, 1, &begin(1)), Ok(Verdict::Known));
        assert_eq!(give(&mut gate, 1, 2, &marker(2)), Err(Refusal::Fork { at: Sequence(2) }));
        let gap = Refusal::Gap { have: Sequence(2), got: Sequence(4) };
        assert_eq!(give(&mut gate, 1, 4, &marker(2)), Err(gap));
        assert!(matches!(give(&mut gate, 1, 3, &marker(1)), Err(Refusal::Bad(_))));
    }

    #[test]
    fn an_epoch_begins_exactly_once() {
        let mut gate = gate();
        assert!(matches!(give(&mut gate, 1, 1, &marker(1)), Err(Refusal::Bad(_))));
        give(&mut gate, 1, 1, &begin(1)).unwrap();
        assert!(matches!(give(&mut gate, 1, 2, &begin(1)), Err(Refusal::Bad(_))));
        assert_eq!(give(&mut gate, 2, 2, &begin(2)), Ok(Verdict::Take));
        assert_eq!(gate.position.epoch, Epoch(2));
    }

    #[test]
    fn a_marker_over_an_open_gap_is_refused() {
        let mut gate = gate();
        give(&mut gate, 1, 1, &begin(1)).unwrap();
        let scope = GapScope::Range(ObjectId(3), 10, 20);
        give(&mut gate, 1, 2, &Record::Gap { scope }).unwrap();
        let refusal = Refusal::OpenGap { checkpoint: CheckpointId(1), open: 1 };
        assert_eq!(give(&mut gate, 1, 3, &marker(1)), Err(refusal));
        give(&mut gate, 1, 3, &Record::Repaired { scope: GapScope::Object(ObjectId(3)) }).unwrap();
        assert_eq!(give(&mut gate, 1, 4, &marker(1)), Ok(Verdict::Take));
    }

    #[test]
    fn an_epoch_with_a_hole_before_it_is_suspect_as_a_whole() {
        let mut gate = gate();
        let begin = |epoch, complete| Record::EpochBegin { epoch: Epoch(epoch), boot_id: [1; 16], complete };
        let refusal = Err(Refusal::OpenGap { checkpoint: CheckpointId(1), open: 1 });
        let object = GapScope::Object(ObjectId(3));
        give(&mut gate, 1, 1, &begin(1, false)).unwrap();
        assert_eq!(give(&mut gate, 1, 2, &marker(1)), refusal);
        give(&mut gate, 1, 2, &Record::Repaired { scope: object.clone() }).unwrap();
        assert_eq!(give(&mut gate, 1, 3, &marker(1)), refusal);
        // A complete hand-over closes nothing.
        give(&mut gate, 2, 3, &begin(2, true)).unwrap();
        give(&mut gate, 2, 4, &Record::Gap { scope: object }).unwrap();
        assert_eq!(give(&mut gate, 2, 5, &marker(1)), refusal);
        give(&mut gate, 2, 5, &Record::Repaired { scope: GapScope::Everything }).unwrap();
        assert_eq!(give(&mut gate, 2, 6, &marker(1)), Ok(Verdict::Take));
    }

    #[test]
    fn very_many_gaps_are_one() {
        let mut gate = gate();
        give(&mut gate, 1, 1, &begin(1)).unwrap();
        for n in 0..=GAPS_MAX as u64 {
            give(&mut gate, 1, n + 2, &Record::Gap { scope: GapScope::Object(ObjectId(n)) }).unwrap();
        }
        assert_eq!(gate.gaps, HashSet::from([GapScope::Everything]));
    }

    #[test]
    fn roots_that_could_leave_their_place_are_refused() {
        let mut gate = gate();
        give(&mut gate, 1, 1, &begin(1)).unwrap();
        let roots = |paths: &[&str]| Record::Roots {
            roots: paths
                .iter()
                .enumerate()
                .map(|(i, p)| (PathBytes::new(p.as_ref()), ObjectId(i as u64 + 1)))
                .collect(),
        };
        for bad in [&["/"][..], &["a/b"], &["/a/../b"], &["/a", "/a/b"], &["/a", "/a"], &["/a/./b"]] {
            assert!(matches!(give(&mut gate, 1, 2, &roots(bad)), Err(Refusal::Bad(_))), "{bad:?}");
        }
        give(&mut gate, 1, 2, &roots(&["/a", "/ab"])).unwrap();
    }
}
