//! What is not exact yet: the suspects that a checkpoint has to settle. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

use bfs_common::record::{GapScope, Name, ObjectId};
use foldhash::{HashMap, HashSet};

use super::ranges::RangeSet;

/// Ranges of a file that are told apart; beyond, it is read whole.
const RANGES_MAX: usize = 1 << 16;

/// What of one object has to be read from the file system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// The whole content.
    pub whole: bool,
    /// Byte ranges of the content.
    pub ranges: RangeSet,
    /// Where there may be holes in these ranges: of what was just written it is known that there are none.
    pub holes: RangeSet,
    /// The attributes, since a call that ended then.
    pub meta_since: Option<u64>,
    /// The extended attributes.
    pub xattrs: bool,
    /// Entries of a directory; `true`: whatever stands there is taken whole, with all below.
    pub entries: BTreeMap<Name, bool>,
    /// All entries of a directory, listed; `true` as above.
    pub rescan: Option<bool>,
    /// Asynchronous writes may go on: it is read when no direct I/O is in flight, whatever was
    /// captured since.
    pub restless: bool,
    /// Others than the selected processes may be changing it: it is waited for who holds its lock before it is
    /// read.
    pub foreign: bool,
}

impl Dirty {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Joins what another says is dirty.
    pub fn merge(&mut self, other: Self) {
        self.whole |= other.whole;
        for range in other.ranges.iter() {
            self.ranges.insert(range);
        }
        for range in other.holes.iter() {
            self.holes.insert(range);
        }
        self.meta_since = self.meta_since.max(other.meta_since);
        self.xattrs |= other.xattrs;
        for (name, deep) in other.entries {
            *self.entries.entry(name).or_default() |= deep;
        }
        self.rescan = self.rescan.max(other.rescan);
        self.restless |= other.restless;
        self.foreign |= other.foreign;
    }
}

/// All of it.
#[derive(Debug, Default)]
pub struct DirtySet {
    objects: HashMap<ObjectId, Dirty>,
    unannounced: HashSet<ObjectId>,
    gap_open: bool,
    /// What the stream names as suspect since it was last said to be repaired.
    named: HashSet<GapScope>,
    /// Every object was put in, with all that it has.
    all: bool,
    /// Objects that came or were taken out since.
    not_all: Vec<ObjectId>,
}

impl DirtySet {
    fn at(&mut self, object: ObjectId) -> &mut Dirty {
        self.unannounced.insert(object);
        self.objects.entry(object).or_default()
    }

    /// Everything was put in.
    pub fn set_all(&mut self) {
        self.all = true;
        self.not_all.clear();
    }

    /// When everything was put in: what is not here any more, or not yet. To be put in now, so that
    /// it costs little to suspect everything again and again.
    pub fn all_but(&mut self) -> Option<Vec<ObjectId>> {
        self.all.then(|| std::mem::take(&mut self.not_all))
    }

    /// Nothing is suspect any more, and the set is empty.
    pub fn settled(&mut self) {
        self.all = false;
        self.not_all.clear();
    }

    /// A new object is not here yet.
    pub fn object_came(&mut self, object: ObjectId) {
        if self.all {
            self.not_all.push(object);
        }
    }

    /// The whole content of a file.
    pub fn whole(&mut self, object: ObjectId) {
        self.at(object).whole = true;
    }

    /// A range of a file.
    pub fn range(&mut self, object: ObjectId, range: Range<u64>) {
        self.add_range(object, range, true);
    }

    /// A range of a file, all of which was written.
    pub fn written(&mut self, object: ObjectId, range: Range<u64>) {
        self.add_range(object, range, false);
    }

    fn add_range(&mut self, object: ObjectId, range: Range<u64>, holes: bool) {
        if range.is_empty() {
            return;
        }
        let dirty = self.at(object);
        if holes {
            dirty.holes.insert(range.clone());
        } else {
            dirty.holes.remove(range.clone());
        }
        dirty.ranges.insert(range);
        if dirty.ranges.len() > RANGES_MAX {
            dirty.whole = true;
            dirty.ranges = RangeSet::default();
            dirty.holes = RangeSet::default();
        }
    }

    /// The attributes of an object, changed by a call that ended at `end_ns`.
    pub fn meta(&mut self, object: ObjectId, end_ns: u64) {
        let dirty = self.at(object);
        dirty.meta_since = dirty.meta_since.max(Some(end_ns));
    }

    /// The extended attributes of an object.
    pub fn xattrs(&mut self, object: ObjectId) {
        self.at(object).xattrs = true;
    }

    /// An entry of a directory.
    pub fn entry(&mut self, directory: ObjectId, name: &Name, deep: bool) {
        *self.at(directory).entries.entry(name.clone()).or_default() |= deep;
    }

    /// All entries of a directory.
    pub fn rescan(&mut self, directory: ObjectId, deep: bool) {
        let dirty = self.at(directory);
        dirty.rescan = dirty.rescan.max(Some(deep));
    }

    /// What is dirty of a file is read when no direct I/O is in flight on it.
    pub fn restless(&mut self, object: ObjectId) {
        self.at(object).restless = true;
    }

    /// Others may be changing the object.
    pub fn foreign(&mut self, object: ObjectId) {
        self.at(object).foreign = true;
    }

    /// The dirty objects with asynchronous writes.
    #[must_use]
    pub fn all_restless(&self) -> Vec<ObjectId> {
        let mut ids: Vec<_> = self.objects.iter().filter(|(_, d)| d.restless).map(|(o, _)| *o).collect();
        ids.sort_unstable();
        ids
    }

    /// Up to `max` objects of which attributes are dirty, and not all of it; the last ones first.
    #[must_use]
    pub fn attributes(&self, max: usize) -> Vec<ObjectId> {
        let mut since: Vec<_> = self
            .objects
            .iter()
            .filter(|(_, d)| !d.whole)
            .filter_map(|(o, d)| Some((d.meta_since?, *o)))
            .collect();
        since.sort_unstable_by(|a, b| b.cmp(a));
        since.into_iter().take(max).map(|(_, object)| object).collect()
    }

    /// Puts back what could not be settled.
    pub fn put(&mut self, object: ObjectId, dirty: Dirty) {
        if !dirty.is_empty() {
            self.at(object).merge(dirty);
        }
    }

    /// What is dirty of an object.
    #[must_use]
    pub fn get(&self, object: ObjectId) -> Option<&Dirty> {
        self.objects.get(&object)
    }

    /// A range was captured exactly after all.
    pub fn range_exact(&mut self, object: ObjectId, range: Range<u64>) {
        if let Some(dirty) = self.objects.get_mut(&object).filter(|d| !d.restless) {
            dirty.ranges.remove(range.clone());
            dirty.holes.remove(range);
            self.drop_if_empty(object);
        }
    }

    /// The attributes were read by a probe at `end_ns`: what changed them before is in there.
    pub fn meta_exact(&mut self, object: ObjectId, end_ns: u64) {
        if let Some(dirty) = self.objects.get_mut(&object)
            && dirty.meta_since.is_some_and(|since| since < end_ns)
            && !dirty.restless
        {
            dirty.meta_since = None;
            self.drop_if_empty(object);
        }
    }

    fn drop_if_empty(&mut self, object: ObjectId) {
        if self.objects.get(&object).is_some_and(Dirty::is_empty) {
            self.objects.remove(&object);
            self.unannounced.remove(&object);
        }
    }

    /// Forgets an object that left the group.
    pub fn forget(&mut self, object: ObjectId) {
        self.objects.remove(&object);
        self.unannounced.remove(&object);
    }

    /// Takes what is dirty of one object out, to settle it.
    pub fn take(&mut self, object: ObjectId) -> Option<Dirty> {
        self.object_came(object);
        self.unannounced.remove(&object);
        self.objects.remove(&object)
    }

    /// All dirty objects.
    #[must_use]
    pub fn ids(&self) -> Vec<ObjectId> {
        let mut ids: Vec<_> = self.objects.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// How many objects are dirty.
    #[must_use]
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether nothing is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// About how much there is to read: bytes, and things that each cost a few calls.
    #[must_use]
    pub fn weight(&self, size_of: impl Fn(ObjectId) -> u64) -> (u64, usize) {
        let mut bytes = 0u64;
        let mut things = 0;
        for (object, dirty) in &self.objects {
            // What was written to a file that is taken whole may not stand in its size yet.
            let written = dirty.ranges.bytes();
            bytes = bytes.saturating_add(if dirty.whole { size_of(*object).max(written) } else { written });
            // What a directory that is taken whole holds is not known before it was read.
            things += 1 + dirty.entries.len() + if dirty.rescan.is_some() { 10_000 } else { 0 };
        }
        (bytes, things)
    }

    /// The gap records that name what became dirty since the last call (semantics 1.5): with
    /// them in the stream, the ring records that told us may be released.
    pub fn announce(&mut self) -> Vec<GapScope> {
        let mut scopes = Vec::new();
        let mut ids: Vec<_> = self.unannounced.drain().collect();
        ids.sort_unstable();
        for object in ids {
            let Some(dirty) = self.objects.get(&object) else { continue };
            if dirty.rescan.is_some() {
                scopes.push(GapScope::Subtree(object));
                continue;
            }
            if dirty.whole || dirty.meta_since.is_some() || dirty.xattrs || !dirty.ranges.is_empty() {
                scopes.push(GapScope::Object(object));
            }
            scopes.extend(dirty.entries.keys().map(|name| GapScope::Entry(object, name.clone())));
        }
        // A gap stays open until all are closed: naming it once is enough.
        scopes.retain(|scope| {
            let below = match scope {
                GapScope::Object(object) | GapScope::Entry(object, _) => {
                    self.named.contains(&GapScope::Subtree(*object))
                }
                _ => false,
            };
            !below && self.named.insert(scope.clone())
        });
        self.gap_open |= !scopes.is_empty();
        scopes
    }

    /// Whether the stream has an open gap; it counts as closed from now on.
    pub fn close_gap(&mut self) -> bool {
        self.named.clear();
        std::mem::take(&mut self.gap_open)
    }

    /// The stream had open gaps when we took it over.
    pub fn adopt_gap(&mut self) {
        self.gap_open = true;
    }
}
