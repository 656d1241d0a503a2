//! Which calls overlapped: the recent calls on each thing. Pure.
//!
//! Two calls of different tasks whose times overlap and that share a thing have an order that
//! their records do not tell. Stamps closer than [`SLACK_NS`] count as overlapping (capture rule
//! 3.5: ring order and stamps were seen inverted by up to 19 us).

use std::hash::Hash;
use std::ops::Range;

use foldhash::{HashMap, HashMapExt};

/// Stamps closer than this are not told apart.
pub const SLACK_NS: u64 = 50_000;

/// How far the clocks of two CPUs may be apart (`ktime_get_mono_fast_ns`, kernel/time/timekeeping.c:
/// a change of frequency shows on one CPU a moment later, by microseconds at most). Where two stamps each
/// stand right at what they tell (the start of a call, the end of a look of the agent's own), this is all that
/// can be wrong with their order.
pub const CLOCK_SLACK_NS: u64 = 10_000;

/// When a call ran and who made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Thread.
    pub tid: u32,
    /// Start.
    pub start_ns: u64,
    /// End.
    pub end_ns: u64,
    /// When the probe had read what its record tells; from `end_ns` on.
    pub seen_ns: u64,
}

impl Span {
    /// Whether this call may still have run when another task's later call started.
    #[must_use]
    pub fn may_overlap(&self, later: &Self) -> bool {
        self.tid != later.tid && self.end_ns >= later.start_ns.saturating_sub(SLACK_NS)
    }
}

#[derive(Clone, Debug)]
struct Op<W> {
    span: Span,
    range: Range<u64>,
    with: W,
}

/// How many calls are kept for one thing; older ones count by their end only.
const OPS_MAX: usize = 8;

/// For how long calls are kept.
const KEEP_NS: u64 = 1_000_000_000;

#[derive(Clone, Debug)]
struct Thing<W> {
    ops: Vec<Op<W>>,
    floor: u64,
}

/// The recent calls on things of one kind, each `with` something that its caller wants back.
#[derive(Debug)]
pub struct Recent<K, W = ()> {
    things: HashMap<K, Thing<W>>,
    floor: u64,
}

/// With what a call overlapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap<W> {
    /// Calls of other tasks that it overlapped with.
    pub with: Vec<W>,
    /// It may have overlapped with others that are not kept any more.
    pub forgotten: bool,
}

impl<W> Overlap<W> {
    /// Whether the order of the call is unknown.
    #[must_use]
    pub fn any(&self) -> bool {
        self.forgotten || !self.with.is_empty()
    }
}

impl<K, W> Default for Recent<K, W> {
    fn default() -> Self {
        Self { things: HashMap::new(), floor: 0 }
    }
}

impl<K: Hash + Eq, W: Clone> Recent<K, W> {
    /// Whether a call of another task, noted before, may have overlapped with this one.
    #[must_use]
    pub fn overlaps(&self, key: &K, span: Span) -> bool {
        span.start_ns < self.floor
            || self.things.get(key).is_some_and(|thing| {
                span.start_ns < thing.floor || thing.ops.iter().any(|op| op.span.may_overlap(&span))
            })
    }

    /// Notes a call on a range of a thing; gives the calls of other tasks, noted before, that it
    /// may have overlapped with in time and in bytes.
    pub fn note(&mut self, key: K, span: Span, range: Range<u64>, with: W) -> Overlap<W> {
        let thing = self.things.entry(key).or_insert_with(|| Thing { ops: Vec::new(), floor: 0 });
        let overlapped = thing
            .ops
            .iter()
            .filter(|op| op.span.may_overlap(&span))
            .filter(|op| op.range.start < range.end && range.start < op.range.end)
            .map(|op| op.with.clone())
            .collect();
        // Of calls that are not kept any more only the end is known. The calls of one task start
        // after the end of the one before, so this is no false alarm for them.
        let forgotten = span.start_ns < thing.floor || span.start_ns < self.floor;
        let old = thing.ops.iter().filter(|op| op.span.end_ns + KEEP_NS < span.start_ns).count();
        let surplus = old.max((thing.ops.len() + 1).saturating_sub(OPS_MAX));
        for op in thing.ops.drain(..surplus) {
            thing.floor = thing.floor.max(op.span.end_ns);
        }
        thing.ops.push(Op { span, range, with });
        Overlap { with: overlapped, forgotten }
    }

    /// Forgets calls that ended before `before`.
    pub fn prune(&mut self, before: u64) {
        self.things.retain(|_, thing| thing.ops.last().is_some_and(|op| op.span.end_ns >= before));
        self.floor = self.floor.max(before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(tid: u32, start_us: u64, end_us: u64) -> Span {
        Span { tid, start_ns: start_us * 1000, end_ns: end_us * 1000, seen_ns: end_us * 1000 }
    }

    #[test]
    fn overlap_needs_another_task_shared_bytes_and_time() {
        let mut recent = Recent::default();
        assert!(!recent.note(1, span(1, 1000, 1100), 0..10, ()).any());
        assert!(!recent.note(1, span(1, 1101, 1110), 0..10, ()).any(), "the same task");
        assert!(!recent.note(1, span(2, 1105, 1120), 10..20, ()).any(), "other bytes");
        assert!(!recent.note(2, span(2, 1105, 1120), 0..10, ()).any(), "another thing");
        assert!(recent.note(1, span(2, 1105, 1120), 5..8, ()).any());
        assert!(recent.note(1, span(3, 1150, 1160), 15..16, ()).any(), "closer than the slack");
        assert!(!recent.note(1, span(3, 1300, 1310), 0..99, ()).any());
    }

    #[test]
    fn what_was_forgotten_counts_as_overlapping() {
        let mut recent = Recent::default();
        recent.prune(5_000_000);
        assert!(recent.note(1, span(1, 4000, 9000), 0..1, ()).any());
        assert!(!recent.note(1, span(1, 9001, 9002), 0..1, ()).any());
    }
}
