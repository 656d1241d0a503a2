//! From captured events to ordered records: model, resolver, cut, settling.
//!
//! Data flows one way: event -> [`interpret`](interpret::interpret) (what the call did, in terms
//! of the model) -> [`apply`](Engine::consume) (records, and what is suspect) -> settling reads
//! what is suspect from the file system -> a checkpoint marker. The decisions are free of I/O:
//! everything from outside comes through [`host::Host`].
//!
//! A read of the file system is good for as long as no call touched the same thing before the
//! read ended. [`Reads`] remembers when each thing was read; an event that touches it and
//! started before makes it dirty again, whenever that event is consumed.

pub mod adopt;
mod apply;
mod begun;
mod checkpoint;
mod crossing;
mod cut;
pub mod dirty;
pub mod filter;
mod follow;
pub mod foreign;
pub mod host;
pub mod interpret;
pub mod links;
mod mapped;
pub mod model;
mod multiple;
mod named;
pub mod outbox;
pub mod ranges;
pub mod recent;
mod reported;
pub mod resolve;
pub mod same;
pub mod sent;
mod settle;
#[cfg(test)]
mod simulation;
mod watched;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bfs_common::abi::InodeId;
use bfs_common::record::{CheckpointId, Epoch, GapScope, Meta, Name, ObjectId, PathBytes, Record, Sequence};
use bfs_common::wire::DIGEST_BLOCK;
use bytes::Bytes;
use foldhash::{HashMap, HashMapExt, HashSet};

pub use checkpoint::{AtInstant, CheckpointError, Request, Stop, Taken};
pub use cut::RECENT_NS;
use dirty::DirtySet;
use host::{Host, HostError, OwnedEvent, Stat};
use interpret::Thing;
use mapped::Mapped;
use model::{Model, NewObject};
use multiple::Multiple;
use named::Named;
use outbox::Outbox;
use recent::{CLOCK_SLACK_NS, Recent, SLACK_NS, Span};
use same::Same;

/// Attributes of an object as a probe or a read saw them; the latest counts.
#[derive(Clone, Copy, Debug)]
struct Snapshot {
    end_ns: u64,
    meta: Meta,
    size: u64,
}

/// When things were read from the file system.
#[derive(Debug, Default)]
struct Reads {
    entries: HashMap<(ObjectId, Name), u64>,
    lists: HashMap<ObjectId, u64>,
    data: HashMap<ObjectId, Vec<(Range<u64>, u64)>>,
    meta: HashMap<ObjectId, u64>,
    xattrs: HashMap<ObjectId, u64>,
    /// Everything counts as read then.
    everything: u64,
    /// When the last read ended.
    latest: u64,
}

impl Reads {
    fn entry(&mut self, directory: ObjectId, name: &Name, now: u64) {
        self.entries.insert((directory, name.clone()), now);
        self.latest = self.latest.max(now);
    }

    fn list(&mut self, directory: ObjectId, now: u64) {
        self.lists.insert(directory, now);
        self.latest = self.latest.max(now);
    }

    fn meta(&mut self, object: ObjectId, now: u64) {
        self.meta.insert(object, now);
        self.latest = self.latest.max(now);
    }

    fn xattrs(&mut self, object: ObjectId, now: u64) {
        self.xattrs.insert(object, now);
        self.latest = self.latest.max(now);
    }

    /// A read of content begins: until it ends, whatever touches the range touches the read.
    fn data_begins(&mut self, object: ObjectId, range: Range<u64>) {
        self.data.entry(object).or_default().push((range, u64::MAX));
    }

    /// The reads of the object's content that had begun have ended.
    fn data_ends(&mut self, object: ObjectId, now: u64) {
        for read in self.data.get_mut(&object).into_iter().flatten() {
            read.1 = read.1.min(now);
        }
        self.latest = self.latest.max(now);
    }

    /// The reads of the object's content count as one: it makes more dirty, and nothing less. Where much is read and
    /// no checkpoint comes they would be ever more.
    fn data_as_one(&mut self, object: ObjectId) {
        if let Some(reads) = self.data.get_mut(&object).filter(|reads| reads.len() > 1) {
            let start = reads.iter().map(|(range, _)| range.start).min().unwrap_or(0);
            let end = reads.iter().map(|(range, _)| range.end).max().unwrap_or(u64::MAX);
            let last = reads.iter().map(|(_, at)| *at).max().unwrap_or(0);
            *reads = vec![(start..end, last)];
        }
    }

    /// Whether the thing was read after `start_ns`, or too close before to tell.
    fn after(&self, thing: &Thing, start_ns: u64) -> bool {
        let late = |read: Option<&u64>| read.is_some_and(|r| r.saturating_add(CLOCK_SLACK_NS) >= start_ns);
        if self.adopted(start_ns) {
            return true;
        }
        match thing {
            Thing::Data(object, range) => self.data.get(object).is_some_and(|reads| {
                reads.iter().any(|(r, at)| r.start < range.end && range.start < r.end && late(Some(at)))
            }),
            Thing::Meta(object) => late(self.meta.get(object)),
            Thing::Xattrs(object) => late(self.xattrs.get(object)),
            Thing::Entry(directory, name) => {
                late(self.lists.get(directory)) || late(self.entries.get(&(*directory, name.clone())))
            }
            Thing::List(directory) => {
                late(self.lists.get(directory))
                    || self.entries.iter().any(|(entry, read)| entry.0 == *directory && late(Some(read)))
            }
            Thing::Way(..) => false,
            Thing::Aside | Thing::Everything => late(Some(&self.latest)),
        }
    }

    /// Whether a call started before the model was taken over.
    fn adopted(&self, start_ns: u64) -> bool {
        self.everything.saturating_add(SLACK_NS) >= start_ns
    }

    /// Whether something was read at or after `t`, or too close before to tell.
    fn any_since(&self, t: u64) -> bool {
        self.latest.saturating_add(CLOCK_SLACK_NS) >= t
    }

    /// All that was read.
    fn all(&self) -> Vec<Thing> {
        let entries = self.entries.keys().map(|(d, n)| Thing::Entry(*d, n.clone()));
        let data = self.data.iter().flat_map(|(o, reads)| reads.iter().map(|r| Thing::Data(*o, r.0.clone())));
        let meta = self.meta.keys().map(|o| Thing::Meta(*o));
        let xattrs = self.xattrs.keys().map(|o| Thing::Xattrs(*o));
        entries.chain(data).chain(meta).chain(xattrs).collect()
    }

    fn clear(&mut self) {
        *self = Self { everything: self.everything, ..Self::default() };
    }
}

/// Bytes of a large write that arrived before its event.
#[derive(Debug, Default)]
struct Chunks {
    start_ns: u64,
    pieces: Vec<(u64, Bytes)>,
}

/// Inodes that were seen and were not in the model. Records can come in the wrong order (by some
/// microseconds): a write before the creation of its file, a creation before that of its
/// directory. When the inode enters the model, what was missed is read.
#[derive(Debug, Default)]
struct Strangers {
    seen: VecDeque<(InodeId, u64)>,
    floor: u64,
}

/// How many strangers are remembered.
const STRANGERS_MAX: usize = 1024;

impl Strangers {
    fn note(&mut self, inode: InodeId, end_ns: u64) {
        if let Some(last) = self.seen.back_mut().filter(|l| l.0 == inode) {
            last.1 = end_ns;
            return;
        }
        if self.seen.len() >= STRANGERS_MAX
            && let Some(old) = self.seen.pop_front()
        {
            self.floor = self.floor.max(old.1);
        }
        self.seen.push_back((inode, end_ns));
    }

    /// Whether a call on the inode may have been missed, given when the call that made it began.
    fn missed(&self, inode: InodeId, start_ns: u64) -> bool {
        let start = start_ns.saturating_sub(SLACK_NS);
        self.floor >= start || self.seen.iter().any(|s| s.1 >= start && s.0 == inode)
    }
}

/// What the engine counted since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Calls that changed something of the group.
    pub ops: u64,
    /// Bytes that calls wrote, as far as their number is known.
    pub written_bytes: u64,
    /// Calls whose order or effect had to be settled by reading.
    pub ambiguous: u64,
    /// Times that everything became suspect.
    pub everything: u64,
    /// Events that could not be parsed.
    pub malformed: u64,
    /// Tries of a cut that had to be taken again later.
    pub retries: u64,
}

/// The engine of one group.
pub struct Engine {
    model: Model,
    out: Outbox,
    dirty: DirtySet,
    snapshots: HashMap<ObjectId, Snapshot>,
    recent_data: Recent<ObjectId>,
    recent_entries: Recent<(ObjectId, Name), Option<Rc<[Thing]>>>,
    recent_paths: Recent<()>,
    /// Open files whose position several use: writes at it (`true`) and seeks.
    recent_positions: Recent<u64, bool>,
    /// Entries that winding paths went through.
    recent_ways: Recent<(ObjectId, Name)>,
    moved: VecDeque<(ObjectId, Span)>,
    strangers: Strangers,
    reads: Reads,
    named: Named,
    chunks: HashMap<u32, Chunks>,
    entered: HashMap<u32, (u64, Vec<u8>, Vec<u8>)>,
    deferred: VecDeque<OwnedEvent>,
    /// The buffer of the last event, for the next one.
    spare: OwnedEvent,
    deferred_bytes: usize,
    mapped: Mapped,
    foreign: foreign::Foreign,
    follow: follow::Follow,
    watched: Option<watched::Watched>,
    /// The processes stand for a checkpoint.
    standing: bool,
    /// Objects that were seen with more than one name.
    multiple: Multiple,
    /// When the last call ended that changed something by a name outside.
    aside_ns: u64,
    begun: begun::Begun,
    /// Asynchronous writes that nobody told us of may be in flight, until a stop was made.
    restless: bool,
    /// Asynchronous operations rest in this stop.
    resting: bool,
    /// Asynchronous writes whose end nobody tells were seen: files that are new to the model may
    /// have some in flight.
    lingering: bool,
    /// Behind the last event that was taken in, while none is half taken in.
    position: Option<u64>,
    /// What was handed over of it.
    flushed_position: Option<u64>,
    last_checkpoint: CheckpointId,
    /// Nobody takes bytes now: only what is touched is noted.
    noting: bool,
    /// Bytes of a block that is compared with what the destination has.
    block: u64,
    /// Files of which a destination has lost bytes: they are sent whatever the first one has.
    owed: HashSet<ObjectId>,
    /// The destination is to be asked what it has as of this record, of objects up to this number.
    ask: Option<(Sequence, ObjectId)>,
    /// Counters.
    pub stats: Stats,
}

impl Engine {
    /// An engine over a model and a place in the stream.
    #[must_use]
    pub fn new(model: Model, out: Outbox, last_checkpoint: CheckpointId) -> Self {
        let multiple = Multiple::of(&model);
        Self {
            model,
            out,
            dirty: DirtySet::default(),
            snapshots: HashMap::new(),
            recent_data: Recent::default(),
            recent_entries: Recent::default(),
            recent_paths: Recent::default(),
            recent_positions: Recent::default(),
            recent_ways: Recent::default(),
            moved: VecDeque::new(),
            strangers: Strangers::default(),
            reads: Reads::default(),
            named: Named::default(),
            chunks: HashMap::new(),
            entered: HashMap::new(),
            deferred: VecDeque::new(),
            spare: OwnedEvent::default(),
            deferred_bytes: 0,
            mapped: Mapped::default(),
            foreign: foreign::Foreign::default(),
            follow: follow::Follow::default(),
            watched: None,
            standing: false,
            multiple,
            aside_ns: 0,
            begun: begun::Begun::default(),
            restless: false,
            lingering: false,
            resting: false,
            flushed_position: None,
            position: None,
            last_checkpoint,
            noting: false,
            block: DIGEST_BLOCK,
            owed: HashSet::default(),
            ask: None,
            stats: Stats::default(),
        }
    }

    /// The first record of an agent's life. Without a complete hand-over everything is suspect
    /// from here on (semantics 1.5), and the stream says so before anything else: should this
    /// agent die while it copies, its successor knows.
    pub fn begin_epoch(&mut self, epoch: Epoch, boot_id: [u8; 16], complete: bool, now: u64) {
        self.out.push(&Record::EpochBegin { epoch, boot_id, complete }, b"");
        if !complete {
            self.out.push(&Record::Gap { scope: GapScope::Everything }, b"");
            self.dirty.adopt_gap();
            self.suspect_everything(now);
        }
    }

    /// The roots of the group, as the stream has them.
    #[must_use]
    pub fn roots(&self) -> Vec<(PathBytes, ObjectId)> {
        self.model.roots().iter().map(|(path, object)| (PathBytes::new(path), *object)).collect()
    }

    /// Sets the roots of the group; what is below them is settled with the next checkpoint.
    /// Roots that the model has already keep their objects.
    pub fn set_roots(&mut self, roots: Vec<(PathBuf, Stat)>) {
        let mut list = Vec::new();
        for (path, stat) in roots {
            let known = self
                .model
                .find(stat.inode)
                .filter(|o| self.model.get(*o).is_some_and(|known| known.kind == stat.kind));
            let object = known.unwrap_or_else(|| self.create_root(&stat));
            list.push((path, object));
        }
        if self.model.roots() != list.as_slice() {
            self.model.set_roots(list, &mut self.out);
        }
    }

    /// A root that is new to the group: all of it is read before the next checkpoint.
    fn create_root(&mut self, stat: &Stat) -> ObjectId {
        let object = self.create(stat, 0);
        self.suspect(&GapScope::Subtree(object), u64::MAX);
        object
    }

    /// Makes a device known: see [`FileSystems`](model::FileSystems).
    pub fn add_file_system(&mut self, dev: u32, file_system: u128, subvolume: u64) {
        self.model.file_systems.add(dev, file_system, subvolume);
    }

    /// A further subtree belongs to the group from the next checkpoint on; `false` when it does already, by
    /// another path.
    pub fn add_root(&mut self, path: PathBuf, stat: &Stat) -> bool {
        let object = match self.model.find(stat.inode) {
            Some(object) if self.model.is_linked(object) => return false,
            // It was a root until lately.
            Some(object) => {
                self.suspect(&GapScope::Subtree(object), u64::MAX);
                object
            }
            None => self.create_root(stat),
        };
        let mut roots = self.model.roots().to_vec();
        roots.push((path, object));
        self.model.set_roots(roots, &mut self.out);
        self.stats.ops += 1;
        true
    }

    /// A subtree does not belong to the group any more, from the next checkpoint on.
    pub fn remove_root(&mut self, path: &Path) {
        let mut roots = self.model.roots().to_vec();
        roots.retain(|root| root.0 != path);
        self.model.set_roots(roots, &mut self.out);
        self.stats.ops += 1;
    }

    /// Puts a record into the stream that changes nothing of the model; gives its number.
    pub fn say(&mut self, record: &Record) -> Sequence {
        self.out.push(record, b"")
    }

    /// What the destination has is asked for until the first checkpoint: blocks of this many bytes that
    /// are read and are there already are not sent.
    pub fn compare_blocks(&mut self, bytes: u64) {
        self.block = bytes;
        self.compare();
    }

    /// From here on what is read is compared with what the destination has as of the last record.
    fn compare(&mut self) {
        let mut same = Same::new(self.block);
        self.owed.iter().for_each(|object| same.put(*object, Vec::new()));
        self.model.same = Some(same);
        self.ask = Some((self.out.last(), self.model.highest()));
    }

    /// Everything in the group is suspect: it is all read before the next checkpoint.
    #[track_caller]
    pub fn suspect_everything(&mut self, now: u64) {
        self.stats.everything += 1;
        tracing::debug!(now, by = %std::panic::Location::caller(), "everything is suspect");
        self.named.clear();
        if self.model.same.is_none() && self.last_checkpoint > CheckpointId(0) {
            // Most of what is going to be read did not change, and is there.
            self.compare();
        }
        let ids = self.dirty.all_but().unwrap_or_else(|| self.model.ids().collect());
        for object in ids {
            // No snapshot makes that exact: there may be another cause, later, by the time it comes.
            self.suspect_object(object, u64::MAX);
        }
        let roots: Vec<_> = self.model.roots().iter().map(|r| r.1).collect();
        for root in roots {
            self.dirty.rescan(root, true);
        }
        self.dirty.set_all();
    }

    /// Events were lost that nobody can name.
    fn lost_everything(&mut self, now: u64) {
        self.mapped.lost_all();
        self.suspect_everything(now);
    }

    /// Events that started before `t` are already in what the model was made from, or not: what
    /// they touch is read.
    pub fn suspect_events_before(&mut self, t: u64) {
        self.reads.everything = t;
        // What happened to an inode before the record of its creation an agent that died may have taken in.
        self.strangers.floor = self.strangers.floor.max(t);
        self.aside_ns = self.aside_ns.max(t);
    }

    /// Asynchronous operations may be in flight that began before anybody followed the processes:
    /// the first checkpoint is taken in a stop, and files are read when direct I/O on them is at rest.
    pub fn expect_asynchronous(&mut self) {
        self.restless = true;
    }

    /// A gap is open in the stream that was taken over.
    pub fn adopt_gaps(&mut self, gaps: &[GapScope], now: u64) {
        for gap in gaps {
            self.dirty.adopt_gap();
            // The one before may have known that it is being written.
            if let GapScope::Object(object) | GapScope::Range(object, ..) = gap {
                self.dirty.restless(*object);
            }
            self.suspect(gap, now);
        }
    }

    /// The backup has lost bytes of a file: it is read before the next checkpoint, and all of it is sent, also what the
    /// stream has.
    pub fn send_again(&mut self, object: ObjectId, now: u64) {
        self.model.sent.forget(object);
        self.owed.insert(object);
        if let Some(same) = &mut self.model.same {
            same.put(object, Vec::new());
        }
        self.suspect(&GapScope::Object(object), now);
    }

    /// Something changed that no event tells of: it is read before the next checkpoint.
    pub fn suspect(&mut self, scope: &GapScope, now: u64) {
        match scope {
            GapScope::Everything => self.suspect_everything(now),
            GapScope::Subtree(object) => {
                self.suspect_object(*object, now);
                self.dirty.rescan(*object, true);
            }
            GapScope::Object(object) | GapScope::Range(object, ..) => {
                self.suspect_object(*object, now);
            }
            GapScope::Entry(directory, name) => self.dirty.entry(*directory, name, true),
        }
    }

    /// The same for some bytes of a file that kept its size, and for its attributes.
    pub fn suspect_ranges(&mut self, object: ObjectId, ranges: &[(u64, u64)], now: u64) {
        for (start, end) in ranges {
            self.dirty.range(object, *start..*end);
        }
        self.dirty.meta(object, now);
        self.dirty.xattrs(object);
    }

    fn suspect_object(&mut self, object: ObjectId, now: u64) {
        use bfs_common::record::FileKind;
        match self.model.kind(object) {
            Some(FileKind::Regular) => self.dirty.whole(object),
            Some(FileKind::Directory) => self.dirty.rescan(object, false),
            Some(_) => {}
            None => return,
        }
        self.dirty.meta(object, now);
        self.dirty.xattrs(object);
    }

    fn create(&mut self, stat: &Stat, read_ns: u64) -> ObjectId {
        let new = NewObject {
            inode: stat.inode,
            kind: stat.kind,
            device: stat.device,
            meta: stat.meta,
            target: Bytes::copy_from_slice(&stat.target),
        };
        let object = self.model.create(new, &mut self.out);
        self.dirty.object_came(object);
        self.mark_mapped(object, stat.inode);
        self.mark_foreign(object, stat.inode);
        if read_ns > 0 {
            self.reads.meta(object, read_ns);
        }
        object
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The last sequence number given.
    #[must_use]
    pub fn last_sequence(&self) -> Sequence {
        self.out.last()
    }

    /// Records and bytes pushed so far.
    #[must_use]
    pub fn pushed(&self) -> (u64, u64) {
        (self.out.records, self.out.bytes)
    }

    /// The last checkpoint that was put into the stream.
    #[must_use]
    pub fn last_checkpoint(&self) -> CheckpointId {
        self.last_checkpoint
    }

    /// How many objects wait to be settled.
    #[must_use]
    pub fn suspects(&self) -> usize {
        self.dirty.len()
    }

    /// Files with a writable shared mapping.
    #[must_use]
    pub fn mapped(&self) -> usize {
        self.mapped.len()
    }

    /// Whether a file can be changed through a mapping without a record.
    #[must_use]
    pub fn silent(&self) -> bool {
        self.mapped.silent()
    }

    /// From now on only what is touched is noted: names and sizes go into the stream as always, of content and
    /// attributes only that they are suspect. No checkpoint should be taken until that ends; the next one
    /// reads what was noted.
    pub fn note_only(&mut self, noting: bool) {
        self.noting = noting;
    }

    /// See [`Engine::note_only`].
    #[must_use]
    pub fn is_noting(&self) -> bool {
        self.noting
    }

    /// Sends what has been collected. What is not exact is named in the stream first, so that
    /// the ring can be released.
    ///
    /// # Errors
    /// [`HostError::Detached`].
    pub fn flush(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        if self.noting {
            self.note_snapshots();
        } else if self.deferred.is_empty() {
            self.send_snapshots();
        }
        if self.deferred.is_empty() && self.dirty.is_empty() {
            self.forget_orphans();
        }
        for scope in self.dirty.announce() {
            self.out.push(&Record::Gap { scope }, b"");
        }
        self.out.close(self.position);
        self.hand_over(host)?;
        // Also events that left nothing in the stream give their room back.
        if let Some(position) = self.position {
            host.ship_position(position);
            self.flushed_position = Some(position);
        }
        Ok(())
    }

    fn forget_orphans(&mut self) {
        for object in self.model.forget_orphans(&mut self.out) {
            self.dirty.forget(object);
            self.snapshots.remove(&object);
            self.forget_mapped(object);
            self.multiple.remove(object);
        }
    }

    /// Forgets what can matter to no call that is still to come, as far as that is known without
    /// a checkpoint: calls that last longer than `horizon` says count as overlapping.
    pub fn prune(&mut self, horizon: u64) {
        self.recent_data.prune(horizon);
        self.recent_entries.prune(horizon);
        self.recent_paths.prune(horizon);
        self.recent_positions.prune(horizon);
        self.recent_ways.prune(horizon);
        self.named.prune(horizon);
        self.moved.retain(|m| m.1.end_ns >= horizon);
    }

    /// Whether something waits to be flushed.
    #[must_use]
    pub fn needs_flush(&self) -> bool {
        self.out.is_dirty() || !self.snapshots.is_empty() || self.position != self.flushed_position
    }

    /// Ships full batches only.
    ///
    /// # Errors
    /// [`HostError::Detached`].
    fn ship_full(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        if self.out.has_closed() { self.hand_over(host) } else { Ok(()) }
    }

    /// Attributes that the stream does not have are suspect; a later look makes them exact again.
    fn note_snapshots(&mut self) {
        for (object, seen) in &self.snapshots {
            if self.model.get(*object).is_some_and(|known| known.meta != seen.meta) {
                self.dirty.meta(*object, seen.end_ns);
            }
        }
    }

    fn send_snapshots(&mut self) {
        let mut ids: Vec<_> = self.snapshots.keys().copied().collect();
        ids.sort_unstable();
        for object in ids {
            self.send_snapshot(object);
        }
    }

    fn send_snapshot(&mut self, object: ObjectId) {
        if let Some(seen) = self.snapshots.get(&object) {
            self.model.set_meta(object, seen.meta, &mut self.out);
        }
    }
}
