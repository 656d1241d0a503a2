//! What others than the selected processes change.
//!
//! Of their calls it is known which objects they changed, and when; not what they did. So each such object becomes
//! dirty, and a checkpoint reads it: a directory is listed, a file is read whole. Cut and reads treat the record as
//! that of any call: it is covered, held back, or makes a read void. Three things are different:
//! - A record stands for all changes of its object from its start until it was taken out of the ring. If it began
//!   before the instant of a cut and was taken out after it, what it stands for may lie on both sides: another
//!   instant is tried.
//! - A file that somebody else has open for writing ([`Foreign::writers`]) can change without a record, within one
//!   tick of the clock after a change of somebody else. Whatever a selected process writes there makes it dirty as a
//!   whole; and whenever it is read, its time is asked for first (from then on every change shows), and then it is
//!   waited for the writer that holds its lock ([`Host::await_others`]).
//! - A stop of the selected processes does not help against them.

use std::collections::BTreeMap;

use bfs_common::abi::{Event, ForeignEvent, InodeId, foreign, kind};
use bfs_common::record::{FileKind, ObjectId};
use foldhash::HashMap;

use super::Engine;
use super::checkpoint::CheckpointError;
use super::host::{Host, HostError};
use super::interpret::{Act, Thing, Things};
use super::recent::Span;

/// What is done with what others change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// It is taken in.
    #[default]
    Follow,
    /// No checkpoint counts after it.
    Refuse,
    /// The content of a file that others changed does not count any more.
    Ignore,
}

/// Somebody who changed something, and what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    tgid: u32,
    inode: InodeId,
}

/// Paths of ignored files that are listed at most.
const LISTED_MAX: usize = 1000;
/// Files that are open for writing are looked at again after this time, or sooner for a checkpoint.
const WRITERS_NS: u64 = 5_000_000_000;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    policy: Policy,
    /// Files that others have open for writing, and who opened each last.
    writers: HashMap<InodeId, u32>,
    /// Nobody knows who has what open: it has to be looked for.
    unknown: bool,
    /// When was last looked for it.
    looked_ns: u64,
    /// Since the instant of the cut that is tried, something came that may lie on both sides of it.
    crossed: bool,
    /// The last change that kept a cut from settling, and of how many tries.
    in_the_way: Option<Change>,
    tries: u32,
    /// [`Policy::Refuse`]: the first change.
    refused: Option<Change>,
    /// [`Policy::Ignore`]: files that others changed.
    ignored: BTreeMap<ObjectId, u32>,
}

impl Foreign {
    /// Whether others may change the file without a record.
    pub(super) fn writes(&self, inode: InodeId) -> bool {
        self.writers.contains_key(&inode)
    }
}

/// What a record of a change by others touches.
pub(super) fn touches(object: ObjectId, kind: Option<FileKind>) -> Things {
    let mut things = Things::new();
    match kind {
        Some(FileKind::Directory) => things.push(Thing::List(object)),
        Some(FileKind::Regular) => things.push(Thing::Data(object, 0..u64::MAX)),
        _ => {}
    }
    things.extend([Thing::Meta(object), Thing::Xattrs(object)]);
    things
}

impl Engine {
    /// What is done with what others change; without it they are followed.
    pub fn set_foreign(&mut self, policy: Policy) {
        self.foreign.policy = policy;
    }

    /// See [`Self::set_foreign`].
    #[must_use]
    pub fn foreign(&self) -> Policy {
        self.foreign.policy
    }

    /// Files that others have open for writing.
    #[must_use]
    pub fn foreign_writers(&self) -> usize {
        self.foreign.writers.len()
    }

    /// The files of which the content does not count, because others changed it; at most [`LISTED_MAX`], and how
    /// many there are.
    #[must_use]
    pub fn ignored(&self) -> (Vec<String>, usize) {
        let path = |o: &ObjectId| self.model.path(*o).map(|p| p.display().to_string());
        let paths = self.foreign.ignored.keys().filter_map(path).take(LISTED_MAX).collect();
        (paths, self.foreign.ignored.len())
    }

    /// Others may have files open for writing of which nobody told.
    pub fn expect_writers(&mut self) {
        self.foreign.unknown = true;
    }

    /// What an event tells of who writes, before it is taken in.
    pub(super) fn note_foreign(&mut self, event: &Event<'_>) {
        match event {
            Event::Task { event: e } if matches!(e.header.kind, kind::LEFT | kind::HANDED) => {
                self.foreign.unknown = true;
            }
            Event::Foreign { event: e } if e.how == foreign::OPENED => {
                self.foreign.writers.insert(e.id, e.header.tgid);
            }
            _ => {}
        }
    }

    /// Something of the object changed by a call of somebody else.
    pub(super) fn foreign_changed(&mut self, object: ObjectId, e: &ForeignEvent, span: Span) {
        let change = Change { tgid: e.header.tgid, inode: e.id };
        let regular = self.model.kind(object) == Some(FileKind::Regular);
        match self.foreign.policy {
            Policy::Refuse => {
                self.foreign.refused.get_or_insert(change);
            }
            Policy::Ignore if regular => {
                self.foreign.ignored.insert(object, change.tgid);
                self.dirty.meta(object, span.end_ns);
                self.dirty.xattrs(object);
                return;
            }
            Policy::Follow | Policy::Ignore => {}
        }
        self.suspect_object(object, span.end_ns);
        self.dirty.foreign(object);
        if self.foreign.writes(e.id) {
            self.dirty.restless(object);
        }
    }

    /// A selected process changed bytes of a file: where others write too, what it wrote need not be what stands
    /// there. Whether that is so.
    pub(super) fn shared_with_others(&mut self, act: &Act) -> bool {
        if self.foreign.writers.is_empty() || self.foreign.policy == Policy::Ignore {
            return false;
        }
        let object = match act {
            Act::Write { object, .. }
            | Act::Truncate { object, .. }
            | Act::Touch { object }
            | Act::Linger { object, .. } => *object,
            _ => return false,
        };
        if !self.model.get(object).is_some_and(|o| self.foreign.writes(o.inode)) {
            return false;
        }
        self.dirty.whole(object);
        self.dirty.foreign(object);
        self.dirty.restless(object);
        true
    }

    /// An object entered the model: others may have it open.
    pub(super) fn mark_foreign(&mut self, object: ObjectId, inode: InodeId) {
        if self.foreign.writes(inode) {
            self.dirty.foreign(object);
            self.dirty.restless(object);
        }
    }

    /// Before the instant of a cut: who has what open for writing, and whether anything forbids a checkpoint.
    pub(super) fn tend_foreign(&mut self, host: &mut dyn Host) -> Result<(), CheckpointError> {
        self.foreign.tries = 0;
        self.foreign.in_the_way = None;
        self.drain(host)?;
        if self.foreign.unknown {
            self.foreign.unknown = false;
            self.look_for_writers(host)?;
        }
        let mut inodes: Vec<_> = self.foreign.writers.keys().copied().collect();
        inodes.sort_unstable();
        for inode in inodes {
            let object = self.model.find(inode);
            if host.open_for_writing(inode)? == Some(0) {
                self.foreign.writers.remove(&inode);
                // What was written last may have had no record.
                if let Some(object) = object {
                    self.suspect_written(object, host.now());
                }
            } else if let Some(object) = object
                && host.writable_mappings(inode)? != Some(0)
            {
                // What is stored there has no record.
                self.suspect_written(object, host.now());
            }
        }
        if !self.foreign.writers.is_empty() && host.now().saturating_sub(self.foreign.looked_ns) > WRITERS_NS
        {
            self.look_for_writers(host)?;
        }
        self.is_refused(host)
    }

    fn suspect_written(&mut self, object: ObjectId, now: u64) {
        if self.foreign.policy == Policy::Ignore {
            return;
        }
        self.dirty.whole(object);
        self.dirty.meta(object, now);
        self.dirty.foreign(object);
        self.dirty.restless(object);
    }

    fn look_for_writers(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        let found = host.foreign_writers()?;
        let now = host.now();
        let before = std::mem::take(&mut self.foreign.writers);
        for inode in before.into_keys().filter(|inode| !found.iter().any(|f| f.0 == *inode)) {
            if let Some(object) = self.model.find(inode) {
                self.suspect_written(object, now);
            }
        }
        for (inode, tgid) in found {
            if let Some(object) = self.model.find(inode) {
                self.suspect_written(object, now);
                if self.foreign.policy == Policy::Refuse {
                    self.foreign.refused.get_or_insert(Change { tgid, inode });
                }
            }
            self.foreign.writers.insert(inode, tgid);
        }
        self.foreign.looked_ns = now;
        Ok(())
    }

    /// [`Policy::Refuse`]: once others changed something, no checkpoint counts.
    pub(super) fn is_refused(&self, host: &mut dyn Host) -> Result<(), CheckpointError> {
        let Some(change) = self.foreign.refused else { return Ok(()) };
        let (process, what) = self.words(host, change);
        Err(CheckpointError::Foreign { process, what })
    }

    fn words(&self, host: &mut dyn Host, change: Change) -> (String, String) {
        let process = match host.command_of(change.tgid) {
            Some(command) => format!("{} ({command})", change.tgid),
            None => change.tgid.to_string(),
        };
        let path = self.model.find(change.inode).and_then(|object| self.model.path(object));
        let what = path.map_or_else(|| format!("inode {}", change.inode.ino), |p| p.display().to_string());
        (process, what)
    }

    /// An event was taken out of the ring after the instant of a cut, of changes that began before it.
    pub(super) fn crosses_foreign(&mut self, event: &Event<'_>) {
        if let Event::Foreign { event: e } = event
            && self.model.find(e.id).is_some()
        {
            self.foreign.crossed = true;
            self.foreign.in_the_way = Some(Change { tgid: e.header.tgid, inode: e.id });
        }
    }

    /// Whether what others did lies on both sides of the instant.
    pub(super) fn others_crossed(&mut self, t: u64) -> bool {
        let mut crossed = std::mem::take(&mut self.foreign.crossed);
        for event in &self.deferred {
            if let Some(Event::Foreign { event: e }) = Event::parse(&event.bytes)
                && self.model.find(e.id).is_some()
            {
                self.foreign.in_the_way = Some(Change { tgid: e.header.tgid, inode: e.id });
                crossed |= e.header.start_ns <= t;
            }
        }
        crossed
    }

    /// A cut did not settle.
    pub(super) fn tried_in_vain(&mut self) {
        self.foreign.tries += u32::from(self.foreign.in_the_way.is_some());
    }

    /// Why a stop would be of no use: others were in the way of most of the tries.
    pub(super) fn others_in_the_way(&self, host: &mut dyn Host, tries: u32) -> Option<CheckpointError> {
        let change = self.foreign.in_the_way.filter(|_| self.foreign.tries > tries / 2)?;
        let (process, what) = self.words(host, change);
        Some(CheckpointError::Crossed { process, what })
    }
}
