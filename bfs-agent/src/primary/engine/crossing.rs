//! What calls on both sides of a cut share: whether a covered call may have been overtaken by a later one, and
//! whether what was read holds something of a later one.

use std::collections::HashMap;

use bfs_common::abi::Event;
use bfs_common::record::{FileKind, Name, ObjectId};
use smallvec::{SmallVec, smallvec};

use super::Engine;
use super::host::Host;
use super::interpret::{Act, Thing, Things, interpret, span_of, touches};
use super::recent::Span;
use super::resolve::Way;

/// What a covered call that was running at the instant touched, and when it ended.
pub(super) struct Crossing {
    /// The task whose other calls came before or after it. None for a run of writes: what its record tells may have
    /// been seen at the end of a later call of the same task.
    pub tid: Option<u32>,
    pub touches: Things,
    pub until_ns: u64,
}

/// The two calls that changed something first, by their place among those held back and their start.
#[derive(Default)]
struct Earliest(SmallVec<[(usize, u64); 3]>);

impl Earliest {
    fn note(&mut self, index: usize, start_ns: u64) {
        self.0.push((index, start_ns));
        self.0.sort_unstable_by_key(|change| change.1);
        self.0.truncate(2);
    }

    /// Whether another call than this one started its change before that time.
    fn other_before(&self, index: usize, end_ns: u64) -> bool {
        self.0.iter().any(|change| change.0 != index && change.1 <= end_ns)
    }
}

impl Engine {
    /// What the calls that are held back touch, as far as that can be told before they are taken
    /// in: what a path leads to after another one of them changed a name on it cannot.
    fn deferred_touches(&self, host: &mut dyn Host) -> Vec<(Span, Things)> {
        let mut changed: HashMap<(ObjectId, Name), Earliest> = HashMap::new();
        let mut directories_changed = Earliest::default();
        // What is inside got a name outside.
        let mut taken_out = Earliest::default();
        // By others: any entry.
        let mut lists: HashMap<ObjectId, Earliest> = HashMap::new();
        let mut all = Vec::with_capacity(self.deferred.len());
        for (index, event) in self.deferred.iter().enumerate() {
            let Some(parsed) = Event::parse(&event.bytes) else {
                all.push((Span::default(), smallvec![Thing::Everything], None));
                continue;
            };
            let (act, way) = interpret(&self.model, host, &parsed);
            let span = span_of(&parsed);
            if let Act::Foreign { object } = act
                && self.model.kind(object) == Some(FileKind::Directory)
            {
                lists.entry(object).or_default().note(index, span.start_ns);
            }
            let mut takes_out = false;
            for (place, object) in act.changes(&self.model) {
                if object.is_none_or(|kind| matches!(kind, FileKind::Directory | FileKind::Symlink)) {
                    directories_changed.note(index, span.start_ns);
                }
                if object.is_some() && place.is_outside(&self.model) {
                    taken_out.note(index, span.start_ns);
                    takes_out = true;
                }
                if let Some(entry) = place.entry() {
                    changed.entry(entry).or_default().note(index, span.start_ns);
                }
            }
            let mut touches = self.cut_touches(&act, &way);
            if takes_out {
                // What came outside by it a covered call may have reached there.
                touches.push(Thing::Aside);
            }
            all.push((span, touches, Some((act, way))));
        }
        // What was read since the call began may be what it left behind: led by that, its path leads elsewhere.
        let read_since = |entry: &(ObjectId, Name), span: Span| {
            self.reads.after(&Thing::Entry(entry.0, entry.1.clone()), span.start_ns)
        };
        let resolve_again = |index: usize, span: Span, act: &Act, way: &Way| {
            if way.winding && way.entries.iter().chain(&way.above).any(|entry| read_since(entry, span)) {
                return true;
            }
            // Records stand in the order of their ends: a call that overlaps may stand behind.
            let by_another = |changes: &Earliest| changes.other_before(index, span.end_ns);
            let entry = |entry: &(ObjectId, Name)| {
                changed.get(entry).is_some_and(by_another) || lists.get(&entry.0).is_some_and(by_another)
            };
            // By a name outside it may reach what was inside at the instant.
            let reaches_out = act.reaches_outside(&self.model) && by_another(&taken_out);
            reaches_out
                || way.entries.iter().chain(&way.named).chain(&way.missing).any(entry)
                || act.reaches_by().is_some_and(|place| {
                    by_another(&directories_changed) || place.entry().is_some_and(|e| entry(&e))
                })
        };
        let mut found = Vec::with_capacity(all.len());
        for (index, (span, mut touches, how)) in all.into_iter().enumerate() {
            if how.is_some_and(|(act, way)| resolve_again(index, span, &act, &way)) {
                touches.push(Thing::Everything);
            }
            found.push((span, touches));
        }
        found
    }

    /// Whether a call that is held back shares something with a covered one that it may have
    /// overtaken.
    pub(super) fn crosses(&mut self, host: &mut dyn Host, crossing: &[Crossing]) -> bool {
        if crossing.is_empty() {
            return false;
        }
        // The calls of one task follow each other.
        self.deferred_touches(host).iter().any(|(span, touches)| {
            crossing
                .iter()
                .filter(|c| c.tid != Some(span.tid) && span.start_ns <= c.until_ns)
                .any(|c| c.touches.iter().any(|a| touches.iter().any(|b| self.share(a, b))))
        })
    }

    /// What an act touches, with what it may reach by a name outside.
    pub(super) fn cut_touches(&self, act: &Act, way: &Way) -> Things {
        let mut things = touches(act, way, &self.model);
        if act.reaches_outside(&self.model) {
            things.push(Thing::Aside);
        }
        things
    }

    fn share(&self, a: &Thing, b: &Thing) -> bool {
        let named_outside = |one: &Thing, other: &Thing| *one == Thing::Aside && self.is_multiple(other);
        a.shares(b) || named_outside(a, b) || named_outside(b, a)
    }

    /// Whether it belongs to an object that may have a name outside.
    fn is_multiple(&self, thing: &Thing) -> bool {
        match thing {
            Thing::Data(object, _) | Thing::Meta(object) | Thing::Xattrs(object) => {
                self.multiple.contains(*object)
            }
            _ => false,
        }
    }

    /// What was read and then touched by a call outside the cut, before the reading ended, is
    /// dirty again.
    pub(super) fn stain_reads(&mut self, host: &mut dyn Host) {
        for (span, touches) in self.deferred_touches(host) {
            for thing in touches {
                if !self.reads.after(&thing, span.start_ns) {
                    continue;
                }
                if thing == Thing::Aside {
                    for read in self.reads.all() {
                        if self.is_multiple(&read) && self.reads.after(&read, span.start_ns) {
                            self.stain(&read, span.end_ns, false);
                        }
                    }
                } else if thing == Thing::Everything {
                    for read in self.reads.all() {
                        self.stain(&read, span.end_ns, false);
                    }
                    for directory in self.reads.lists.keys() {
                        self.dirty.rescan(*directory, false);
                    }
                } else {
                    self.stain(&thing, span.end_ns, false);
                }
            }
        }
    }
}
