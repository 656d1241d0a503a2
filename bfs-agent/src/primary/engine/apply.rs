//! Acts become records, and what is not exact becomes dirty.

use std::collections::HashSet;
use std::ops::Range;
use std::rc::Rc;

use bfs_common::abi::{Event, InodeAttr, InodeId, flag, kind};
use bfs_common::record::{FileKind, Meta, Name, ObjectId};
use bytes::Bytes;

use super::host::{Host, HostError, OwnedEvent, Stat};
use super::interpret::{Act, CAPABILITY, Thing, has_capability, meta_of, object_at, span_of, touches};
use super::model::NewObject;
use super::recent::{SLACK_NS, Span};
use super::resolve::Place;
use super::{Chunks, Engine, Snapshot};

/// How many moves of directories are remembered.
const MOVES_MAX: usize = 256;

/// xattr that new entries of a directory inherit.
const DEFAULT_ACL: &str = "system.posix_acl_default";

impl Engine {
    /// Takes in an event: the model follows, records go to the outbox, what is not exact becomes
    /// dirty.
    ///
    /// # Errors
    /// [`HostError`] when something had to be read and could not be.
    pub fn consume(&mut self, event: &OwnedEvent, host: &mut dyn Host) -> Result<(), HostError> {
        let Some(parsed) = Event::parse(&event.bytes) else {
            self.stats.malformed += 1;
            self.lost_everything(host.now());
            return Ok(());
        };
        // Before its room in the ring can be given back, so that a successor knows.
        self.note_mappings(&parsed, host)?;
        self.note_foreign(&parsed);
        self.take_in(&parsed, host);
        // A write whose pieces are still arriving must be read again by a successor.
        if self.chunks.is_empty() && self.deferred.is_empty() {
            self.position = Some(event.ring_position);
        }
        self.ship_full(host)
    }

    pub(super) fn take_in(&mut self, event: &Event<'_>, host: &mut dyn Host) {
        let tid = event.header().tid;
        match event {
            Event::Data { event: e, data } => {
                let chunks = self.chunks.entry(tid).or_default();
                if chunks.start_ns != e.header.start_ns {
                    *chunks = Chunks { start_ns: e.header.start_ns, pieces: Vec::new() };
                }
                chunks.pieces.push((e.offset, Bytes::copy_from_slice(data)));
                return;
            }
            Event::Path { event: e, path1, path2 } if e.header.kind == kind::PATH_ENTER => {
                self.entered.insert(tid, (e.header.start_ns, path1.to_vec(), path2.to_vec()));
                return;
            }
            Event::Task { event: e } if e.header.kind == kind::EXIT => {
                self.chunks.remove(&tid);
                self.entered.remove(&tid);
                // The kernel wrote a core by a name of its own.
                if e.value != 0 && e.last_thread != 0 && host.cores_are_files() {
                    self.suspect_everything(e.header.end_ns);
                }
                return;
            }
            _ => {}
        }
        let span = span_of(event);
        let (mut act, way) = self.interpret_surely(event, host, span);
        if way.winding
            && (way.entries.iter().any(|entry| self.is_unsure(entry, span))
                || way.above.iter().any(|(d, n)| self.is_dirty_entry(*d, n)))
        {
            self.stats.ambiguous += 1;
            act = Act::Everything;
        }
        let reached = match event {
            Event::File { event: e, .. } => [e.attr.id, e.parent.id],
            Event::Run { event: e } => [e.attr.id, InodeId::NONE],
            _ => [InodeId::NONE; 2],
        };
        let touches = touches(&act, &way, &self.model);
        // What concerns nothing of the group makes no checkpoint due.
        if !touches.is_empty() {
            self.stats.ops += if let Event::Run { event } = event { u64::from(event.calls) } else { 1 };
        }
        // What these overlap with says nothing: the stores come later.
        let stores = matches!(act, Act::Dirtied { .. } | Act::Mapped { .. });
        tracing::trace!(?span, ?act, "taken in");
        let mut ambiguous = !stores && self.note(&touches, &act, span);
        ambiguous |= self.shared_with_others(&act);
        let astray = self.note_names(&act, &way, event, span, ambiguous);
        self.apply(act, event, span, ambiguous, host);
        if astray {
            self.suspect_everything(span.end_ns);
        }
        // What this very call made is none.
        for inode in reached {
            if inode.is_some() && self.model.find(inode).is_none() {
                self.strangers.note(inode, span.end_ns);
            }
        }
        // What was read from the file system after this call started holds an unknown part of it.
        for thing in &touches {
            if self.reads.after(thing, span.start_ns) {
                self.stain(thing, span.end_ns, false);
            }
        }
        if let Some(watched) = &mut self.watched
            && event.header().flags & flag::FAILED == 0
        {
            touches.iter().for_each(|thing| watched.note(thing));
        }
        self.rescan_moved(span.end_ns);
        self.check_entered(event, host, span);
        self.chunks.remove(&tid);
        // Its paths were resolved at some moment between its ends, in a task that went on.
        if matches!(event, Event::Path { event: e, .. } if e.header.kind == kind::PATH_BEGUN) {
            for thing in &touches {
                self.stain(thing, span.end_ns, false);
            }
        }
    }

    /// Another thread could change a path while the kernel used it: where the path at the start
    /// differs from the one at the end, both places are suspect.
    fn check_entered(&mut self, event: &Event<'_>, host: &mut dyn Host, span: Span) {
        let Event::Path { event: e, path1, path2 } = event else { return };
        if e.header.kind == kind::PATH_BEGUN {
            return;
        }
        let Some((start_ns, old1, old2)) = self.entered.remove(&span.tid) else {
            // The paths at the start were read by an agent that died.
            if e.header.flags & flag::PATH_SHARED != 0 && self.reads.adopted(span.start_ns) {
                self.suspect_everything(span.end_ns);
            }
            return;
        };
        if start_ns != e.header.start_ns || (old1 == *path1 && old2 == *path2) {
            return;
        }
        self.stats.ambiguous += 1;
        let then = Event::Path { event: *e, path1: &old1, path2: &old2 };
        for other in [&then, event] {
            for thing in self.interpret_surely(other, host, span).0.touches(&self.model) {
                self.stain(&thing, span.end_ns, true);
            }
        }
    }

    /// Makes a thing dirty.
    pub(super) fn stain(&mut self, thing: &Thing, end_ns: u64, deep: bool) {
        match thing {
            Thing::Data(object, range) => self.stain_range(*object, range.clone()),
            Thing::Meta(object) => self.dirty.meta(*object, end_ns),
            Thing::Xattrs(object) => self.dirty.xattrs(*object),
            Thing::Entry(directory, name) => self.dirty.entry(*directory, name, deep),
            Thing::List(directory) => self.dirty.rescan(*directory, false),
            Thing::Way(..) => {}
            Thing::Aside => self.suspect_multiple(end_ns),
            Thing::Everything => self.suspect_everything(end_ns),
        }
    }

    pub(super) fn stain_range(&mut self, object: ObjectId, range: Range<u64>) {
        if range == (0..u64::MAX) {
            self.dirty.whole(object);
        } else {
            self.dirty.range(object, range);
        }
    }

    /// Notes the call among the recent ones; says whether its order against another is unknown.
    /// What the other one did with names is then suspect as well.
    pub(super) fn note(&mut self, touches: &[Thing], act: &Act, span: Span) -> bool {
        let mut ambiguous = false;
        let mut astray = false;
        let names = touches.iter().any(|t| matches!(t, Thing::Entry(..)));
        // An empty one would be made anew for each write.
        let entries: Option<Rc<[Thing]>> =
            names.then(|| touches.iter().filter(|t| matches!(t, Thing::Entry(..))).cloned().collect());
        for thing in touches {
            match thing {
                Thing::Data(object, range) => {
                    ambiguous |= self.recent_data.note(*object, span, range.clone(), ()).any();
                }
                Thing::Way(directory, name) => {
                    let key = (*directory, name.clone());
                    astray |= self.recent_entries.overlaps(&key, span);
                    let _ = self.recent_ways.note(key, span, 0..1, ());
                }
                Thing::Entry(directory, name) => {
                    let key = (*directory, name.clone());
                    astray |= self.recent_ways.overlaps(&key, span);
                    let overlap = self.recent_entries.note(key, span, 0..1, entries.clone());
                    ambiguous |= overlap.any();
                    for other in overlap.with.iter().flatten().flat_map(|o| o.iter()) {
                        self.stain(other, span.end_ns, true);
                        self.suspect_named(other, span.end_ns);
                    }
                }
                Thing::List(_) | Thing::Meta(_) | Thing::Xattrs(_) | Thing::Aside | Thing::Everything => {}
            }
        }
        if astray {
            // Somebody went through the entry while it changed, and may have come out anywhere.
            ambiguous = true;
            self.suspect_everything(span.end_ns);
        }
        // A path that was followed while a directory moved may have led elsewhere. (Creates name
        // their directory's inode, not a path.)
        if names && !matches!(act, Act::Create { .. }) {
            let crossed = self.recent_paths.note((), span, 0..1, ()).any();
            let moving = self.moved_directories(act);
            let mut doubtful = if crossed { moving.clone() } else { Vec::new() };
            doubtful.extend(self.moved.iter().filter(|m| m.1.may_overlap(&span)).map(|m| m.0));
            ambiguous |= !doubtful.is_empty();
            for directory in doubtful {
                self.rescan_below(directory, span.end_ns);
            }
            for object in moving {
                self.moved.push_back((object, span));
                if self.moved.len() > MOVES_MAX {
                    self.moved.pop_front();
                }
            }
        }
        if ambiguous {
            self.stats.ambiguous += 1;
        }
        ambiguous
    }

    /// The directories (or symlinks) that a rename moves.
    fn moved_directories(&self, act: &Act) -> Vec<ObjectId> {
        let Act::Rename { from, to, exchange, .. } = act else { return Vec::new() };
        [Some(from), Some(to).filter(|_| *exchange)]
            .into_iter()
            .flatten()
            .filter_map(|place| object_at(&self.model, place))
            .filter(|o| matches!(self.model.kind(*o), Some(FileKind::Directory | FileKind::Symlink)))
            .collect()
    }

    /// All directories below, listed again, and their attributes: a call may have changed an entry of one.
    fn rescan_below(&mut self, directory: ObjectId, end_ns: u64) {
        let mut todo = vec![directory];
        // Moves whose order is not known can leave a directory below itself, until they are settled.
        let mut seen = HashSet::new();
        while let Some(at) = todo.pop() {
            if !seen.insert(at) {
                continue;
            }
            let Some(o) = self.model.get(at).filter(|o| o.kind == FileKind::Directory) else { continue };
            todo.extend(o.entries.values().copied());
            self.dirty.rescan(at, false);
            self.dirty.meta(at, end_ns);
        }
    }

    /// What stands below directories that got another place may be left out there, and was not here, or the
    /// other way round.
    pub(super) fn rescan_moved(&mut self, end_ns: u64) {
        for directory in self.model.take_moved() {
            self.rescan_below(directory, end_ns);
        }
    }

    fn snapshot(&mut self, object: ObjectId, attr: &InodeAttr, span: Span) {
        self.note_links(object, attr.nlink);
        self.saw(object, meta_of(attr), attr.size, span.end_ns);
    }

    /// Attributes were read from the file system.
    pub(super) fn saw_stat(&mut self, object: ObjectId, stat: &Stat, read_ns: u64) {
        self.note_links(object, stat.links);
        self.saw(object, stat.meta, stat.size, read_ns);
    }

    /// Attributes were seen at `end_ns`; the latest look counts (every call that started before
    /// it and ends after it brings a later one, or makes them dirty).
    fn saw(&mut self, object: ObjectId, meta: Meta, size: u64, end_ns: u64) {
        let seen = self.snapshots.entry(object).or_insert(Snapshot { end_ns: 0, meta, size });
        if end_ns >= seen.end_ns {
            *seen = Snapshot { end_ns, meta, size };
            self.dirty.meta_exact(object, end_ns);
        }
    }

    fn meta_after(&mut self, object: ObjectId, attr: Option<&InodeAttr>, span: Span) {
        match attr {
            Some(attr) => self.snapshot(object, attr, span),
            None => self.dirty.meta(object, span.end_ns),
        }
    }

    /// The directory of a place got another modification time.
    fn parent_after(&mut self, place: &Place, attr: Option<&InodeAttr>, span: Span) {
        match place {
            Place::Entry(directory, _) | Place::LeftOut(Some(directory)) => {
                self.meta_after(*directory, attr, span);
            }
            Place::Missing(directory, name) => {
                self.dirty.meta(*directory, span.end_ns);
                self.dirty.entry(*directory, name, true);
            }
            Place::Unknown => self.suspect_everything(span.end_ns),
            Place::Object(_) | Place::Outside | Place::LeftOut(None) => {}
        }
    }

    /// Whether the model may be wrong about what an entry named when the call used it: what is
    /// derived from it is suspect too.
    fn doubtful(&self, place: &Place, span: Span) -> bool {
        let Place::Entry(directory, name) = place else { return false };
        self.doubtful_entry(*directory, name, span)
    }

    fn is_dirty_entry(&self, directory: ObjectId, name: &Name) -> bool {
        self.dirty.get(directory).is_some_and(|d| d.rescan.is_some() || d.entries.contains_key(name))
    }

    pub(super) fn doubtful_entry(&self, directory: ObjectId, name: &Name, span: Span) -> bool {
        self.is_dirty_entry(directory, name)
            || self.reads.after(&Thing::Entry(directory, name.clone()), span.start_ns)
            // A directory that left the set: what happened in it since is not followed.
            || !self.model.is_reachable(directory)
    }

    fn suspect_entry(&mut self, place: &Place, deep: bool) {
        if let Place::Entry(directory, name) = place {
            self.dirty.entry(*directory, name, deep);
        }
    }

    fn apply(&mut self, act: Act, event: &Event<'_>, span: Span, ambiguous: bool, host: &mut dyn Host) {
        match act {
            // The mapping was noted already.
            Act::Nothing | Act::Mapped { .. } => {}
            Act::Everything => self.suspect_everything(span.end_ns),
            Act::Create { parent, parent_attr, name, attr } => {
                let mut missed = false;
                let object = match self.model.find(attr.id) {
                    // Seen by a read before its record came: what follows replays onto it.
                    Some(object) => {
                        self.model.truncate(object, 0, &mut self.out);
                        object
                    }
                    None => {
                        let new = NewObject {
                            inode: attr.id,
                            kind: FileKind::Regular,
                            device: 0,
                            meta: meta_of(&attr),
                            target: Bytes::new(),
                        };
                        let object = self.model.create(new, &mut self.out);
                        self.dirty.object_came(object);
                        if self.inherits_xattrs(parent) {
                            self.dirty.xattrs(object);
                        }
                        self.mark_mapped(object, attr.id);
                        self.mark_foreign(object, attr.id);
                        missed = self.strangers.missed(attr.id, span.start_ns);
                        object
                    }
                };
                if missed {
                    self.suspect_object(object, span.end_ns);
                    self.suspect_new_file(object);
                }
                self.model.link(parent, &name, object, &mut self.out);
                self.snapshot(object, &attr, span);
                self.snapshot(parent, &parent_attr, span);
                if ambiguous {
                    self.dirty.entry(parent, &name, true);
                }
            }
            Act::Seek { object, file } => {
                if self.recent_positions.note(file, span, 0..1, false).with.contains(&true) {
                    self.stats.ambiguous += 1;
                    self.dirty.whole(object);
                }
            }
            Act::Write { object, range, wider, inline, attr, position } => {
                self.meta_after(object, attr.as_ref(), span);
                if has_capability(&self.model, object) {
                    self.dirty.xattrs(object);
                }
                // Positions only go up but for seeks: without one meanwhile, a position that moved by as
                // much as was written moved by this write.
                if let Some(file) = position {
                    let others = self.recent_positions.note(file, span, 0..1, true);
                    if others.forgotten || others.with.contains(&false) {
                        self.stats.ambiguous += 1;
                        self.dirty.whole(object);
                    }
                }
                if range.end < u64::MAX {
                    self.stats.written_bytes += range.end - range.start;
                }
                let whole = self.dirty.get(object).is_some_and(|d| d.whole);
                if inline && !ambiguous && !self.noting && self.write_inline(object, &range, event) {
                    // Of a mapped file it is not known whether a store came later.
                    if !whole && !self.mapped.has(object) {
                        self.dirty.range_exact(object, range);
                    }
                } else if wider {
                    self.stain_range(object, range);
                } else {
                    self.dirty.written(object, range);
                }
            }
            Act::Linger { object, range } => {
                self.dirty.restless(object);
                self.stain_range(object, range);
                self.dirty.meta(object, span.end_ns);
                if has_capability(&self.model, object) {
                    self.dirty.xattrs(object);
                }
            }
            Act::Truncate { object, size, attr, place } => {
                if place.is_some_and(|place| self.doubtful(&place, span)) {
                    self.suspect_multiple(span.end_ns);
                }
                self.model.truncate(object, size, &mut self.out);
                self.meta_after(object, attr.as_ref(), span);
                if has_capability(&self.model, object) {
                    self.dirty.xattrs(object);
                }
                if ambiguous {
                    self.dirty.whole(object);
                } else if !self.mapped.has(object) {
                    self.dirty.range_exact(object, size..u64::MAX);
                }
            }
            Act::Attr { object, attr, xattrs, place } => {
                if place.is_some_and(|place| self.doubtful(&place, span)) {
                    self.suspect_multiple(span.end_ns);
                }
                self.meta_after(object, attr.as_ref(), span);
                if xattrs {
                    self.dirty.xattrs(object);
                }
            }
            Act::Foreign { object } => {
                if let Event::Foreign { event: e } = event {
                    self.foreign_changed(object, e, span);
                }
            }
            Act::Dirtied { object, range } => self.pages_dirtied(object, range, span.end_ns),
            Act::Held { object } => {
                self.held(object);
                self.suspect_object(object, span.end_ns);
            }
            Act::Touch { object } => self.suspect_object(object, span.end_ns),
            Act::Suspect { place, also } => {
                self.suspect_multiple(span.end_ns);
                self.aside_ns = self.aside_ns.max(span.end_ns);
                for place in [Some(place), also].into_iter().flatten() {
                    self.parent_after(&place, None, span);
                    self.suspect_entry(&place, true);
                    if let Some(object) = object_at(&self.model, &place) {
                        self.suspect_object(object, span.end_ns);
                    }
                }
            }
            Act::Unlink { place, parent_attr } => {
                self.parent_after(&place, parent_attr.as_ref(), span);
                if let Place::Entry(directory, name) = &place {
                    if self.model.entry(*directory, name).is_none() || ambiguous {
                        self.dirty.entry(*directory, name, true);
                    }
                    self.model.unlink(*directory, name, &mut self.out);
                }
            }
            Act::Make { place, parent_attr } => {
                self.parent_after(&place, parent_attr.as_ref(), span);
                self.make(&place, ambiguous, span, host);
            }
            Act::Link { object, source, looked, place, parent_attr } => {
                if let Some(object) = object {
                    self.multiple.insert(object);
                }
                // Who changed something by this name, or a name outside, just then may have changed this one by it.
                let aside =
                    place.is_outside(&self.model) && self.aside_ns >= span.start_ns.saturating_sub(SLACK_NS);
                if let Some(object) = object.filter(|_| ambiguous || aside) {
                    self.suspect_object(object, span.end_ns);
                }
                self.parent_after(&place, parent_attr.as_ref(), span);
                if let Place::Entry(directory, name) = &place {
                    if looked || source.is_some_and(|source| self.doubtful(&source, span)) {
                        self.dirty.entry(*directory, name, true);
                    }
                    match object {
                        Some(object) => self.model.link(*directory, name, object, &mut self.out),
                        None => self.dirty.entry(*directory, name, true),
                    }
                    if ambiguous {
                        self.dirty.entry(*directory, name, true);
                    }
                }
            }
            Act::Rename { from, to, exchange, whiteout, from_attr, to_attr } => {
                self.parent_after(&from, from_attr.as_ref(), span);
                self.parent_after(&to, to_attr.as_ref(), span);
                // Should the second name be one of the same inode, nothing was renamed (rename(2)): of a
                // name outside nobody knows.
                let outside = match &to {
                    Place::Outside | Place::LeftOut(_) => true,
                    Place::Entry(directory, name) => object_at(&self.model, &from)
                        .is_some_and(|moved| self.model.leaves_out(*directory, name, moved)),
                    _ => false,
                };
                if outside || ambiguous || self.doubtful(&from, span) || self.doubtful(&to, span) {
                    self.both_suspect(&from, &to);
                }
                if ambiguous {
                    for moved in [&from, &to].into_iter().filter_map(Place::entry) {
                        self.suspect_named(&Thing::Entry(moved.0, moved.1), span.end_ns);
                    }
                }
                // What is exchanged can get new times itself (xfs_cross_rename() in fs/xfs/xfs_inode.c, for the
                // `..` of a directory).
                if exchange {
                    for moved in [&from, &to].into_iter().filter_map(|place| object_at(&self.model, place)) {
                        self.dirty.meta(moved, span.end_ns);
                    }
                }
                self.rename(&from, &to, exchange, whiteout);
            }
        }
    }

    fn inherits_xattrs(&self, parent: ObjectId) -> bool {
        let labelled = |o: ObjectId| {
            self.model
                .get(o)
                .is_some_and(|o| o.xattrs.keys().any(|n| n.starts_with("security.") && n != CAPABILITY))
        };
        self.dirty.get(parent).is_some_and(|d| d.xattrs)
            || self.model.get(parent).is_none_or(|o| o.xattrs.contains_key(DEFAULT_ACL))
            || labelled(parent)
    }

    /// Puts the bytes of an inline write into the stream; `false` if they are not all there.
    fn write_inline(&mut self, object: ObjectId, range: &Range<u64>, event: &Event<'_>) -> bool {
        let Event::File { event: e, data, .. } = event else { return false };
        let chunks = self.chunks.remove(&e.header.tid).filter(|c| c.start_ns == e.header.start_ns);
        let pieces = chunks.map(|c| c.pieces).unwrap_or_default();
        let carried: u64 = pieces.iter().map(|p| p.1.len() as u64).sum();
        if carried + data.len() as u64 != range.end - range.start {
            return false;
        }
        if e.header.flags & flag::UNLINKED != 0 && !self.model.is_linked(object) {
            return true;
        }
        for (offset, bytes) in &pieces {
            self.model.write(object, range.start + offset, bytes, &mut self.out);
        }
        if !data.is_empty() {
            self.model.write(object, range.start + carried, data, &mut self.out);
        }
        true
    }

    /// A new entry whose inode the record does not name: a look right away mostly finds it.
    fn make(&mut self, place: &Place, ambiguous: bool, span: Span, host: &mut dyn Host) {
        let Place::Entry(directory, name) = place else { return };
        let Some(inode) = self.model.get(*directory).map(|o| o.inode) else { return };
        let found = host.child(inode, name);
        let read_ns = host.now();
        match found {
            Ok(Some(stat))
                if self.model.verdict(*directory, name).leaves_out(stat.kind)
                    && self.model.entry(*directory, name).is_none() =>
            {
                self.reads.entry(*directory, name, read_ns);
            }
            Ok(Some(stat)) if stat.kind != FileKind::Regular && !ambiguous => {
                let object = self.model.find(stat.inode).unwrap_or_else(|| {
                    let object = self.create(&stat, read_ns);
                    if self.inherits_xattrs(*directory) {
                        self.dirty.xattrs(object);
                    }
                    if self.strangers.missed(stat.inode, span.start_ns) {
                        self.dirty.rescan(object, true);
                    }
                    object
                });
                self.model.link(*directory, name, object, &mut self.out);
                self.saw_stat(object, &stat, read_ns);
                self.reads.meta(object, read_ns);
                self.reads.entry(*directory, name, read_ns);
            }
            _ => {
                self.reads.entry(*directory, name, read_ns);
                self.dirty.entry(*directory, name, true);
            }
        }
    }

    fn rename(&mut self, from: &Place, to: &Place, exchange: bool, whiteout: bool) {
        let moved = match from {
            Place::Entry(directory, name) => self.model.entry(*directory, name),
            _ => None,
        };
        match (from, to) {
            (Place::Entry(d1, n1), Place::Entry(d2, n2)) => {
                let other = self.model.entry(*d2, n2);
                match moved {
                    // No directory goes into itself: the model is behind.
                    Some(object) if object == *d2 || exchange && other == Some(*d1) => {
                        self.both_suspect(from, to);
                    }
                    Some(object) if exchange => {
                        if other.is_none_or(|other| self.model.leaves_out(*d1, n1, other))
                            || self.model.leaves_out(*d2, n2, object)
                        {
                            self.both_suspect(from, to);
                        } else if other != Some(object) {
                            self.model.exchange((*d1, n1), (*d2, n2), &mut self.out);
                        }
                    }
                    // Two names of one inode: rename does nothing (rename(2)). Unless the second
                    // name is known from a look after this very rename.
                    Some(object) if other == Some(object) => self.both_suspect(from, to),
                    Some(object) => {
                        self.model.link(*d2, n2, object, &mut self.out);
                        self.model.unlink(*d1, n1, &mut self.out);
                        if whiteout {
                            self.dirty.entry(*d1, n1, true);
                        }
                    }
                    None => self.both_suspect(from, to),
                }
            }
            (Place::Entry(directory, name), Place::Outside | Place::LeftOut(_)) if !exchange => {
                self.model.unlink(*directory, name, &mut self.out);
                if moved.is_none() || whiteout {
                    self.dirty.entry(*directory, name, true);
                }
            }
            _ => self.both_suspect(from, to),
        }
    }

    fn both_suspect(&mut self, from: &Place, to: &Place) {
        self.suspect_entry(from, true);
        self.suspect_entry(to, true);
    }

    /// Names of an object that nobody can find any more.
    pub(super) fn suspect_names(&mut self, object: ObjectId) {
        for (directory, name) in self.model.get(object).iter().flat_map(|o| o.links.iter()) {
            self.dirty.entry(*directory, name, true);
        }
    }
}
