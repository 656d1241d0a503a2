//! Names that calls went through while it was not sure what stood there.
//!
//! A path leads through names, and where one of them is a symlink it leads elsewhere altogether: what the call changed may be
//! anything. So a name that a path goes through, and of which the model may be behind, is looked at before the call is taken
//! in. What the look finds is what the call met, unless the name was changed in between: the record of that change comes later,
//! and by its start it shows that. Then, and where nothing stands there any more, everything is suspect.
//!
//! A look costs as much as one when a name is settled, and is needed only where the model is behind: while a tree is read first, or
//! was made suspect.

use bfs_common::abi::{Event, flag};
use bfs_common::record::{FileKind, Name, ObjectId};
use foldhash::{HashMap, HashSet, HashSetExt};

use super::Engine;
use super::host::{Host, Stat};
use super::interpret::{Act, interpret, is_open};
use super::recent::{CLOCK_SLACK_NS, Recent, Span};
use super::resolve::{Place, Way};

/// Most names that are looked at for one call.
const LOOKS_MAX: usize = 256;
/// Most names that are kept.
const NAMES_MAX: usize = 1 << 16;

type Entry = (ObjectId, Name);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// When each was looked at. No change of it was taken in since.
    looked: HashMap<Entry, u64>,
    /// The last call that changed it, as far as those were taken in, put something there that is no symlink: that call.
    solid: HashMap<Entry, Span>,
    /// Calls that went through a name.
    through: Recent<Entry>,
    /// Calls that changed a name where a symlink was, or came to be.
    symlinks: Recent<Entry>,
}

impl Named {
    /// Forgets calls that ended before.
    pub(super) fn prune(&mut self, before: u64) {
        self.through.prune(before);
        self.symlinks.prune(before);
    }

    /// Everything is settled, or suspect.
    pub(super) fn clear(&mut self) {
        self.looked.clear();
        self.solid.clear();
    }

    fn is_sure(&self, entry: &Entry, span: Span) -> bool {
        self.looked.contains_key(entry) || self.is_solid(entry, span)
    }

    /// What stands there was changed by a call that began then; whether that may have been before the look.
    fn changed(&mut self, entry: &Entry, start_ns: u64) -> bool {
        self.solid.remove(entry);
        self.looked.remove(entry).is_some_and(|at| came_before(start_ns, at))
    }

    /// Whether no symlink stood there when a call began that comes behind the one that put there what it is.
    fn is_solid(&self, entry: &Entry, span: Span) -> bool {
        self.solid.get(entry).is_some_and(|by| !by.may_overlap(&span))
    }

    fn put_solid(&mut self, entry: Entry, by: Span) {
        if self.solid.len() >= NAMES_MAX {
            self.solid.clear();
        }
        self.solid.insert(entry, by);
    }
}

impl Engine {
    /// What an event means, when the names that it went through have been looked at where that is needed.
    pub(super) fn interpret_surely(
        &mut self,
        event: &Event<'_>,
        host: &mut dyn Host,
        span: Span,
    ) -> (Act, Way) {
        let failed = event.header().flags & flag::FAILED != 0;
        let mut seen: HashSet<Entry> = HashSet::new();
        loop {
            let (act, way) = interpret(&self.model, host, event);
            let unsure = |entry: &&Entry| {
                !seen.contains(*entry) && !self.named.is_solid(entry, span) && self.is_unsure(entry, span)
            };
            // The kernel went through it, so the model is behind.
            let missed = |entry: &&Entry| !seen.contains(*entry) && !self.named.is_sure(entry, span);
            let next = way.entries.iter().chain(&way.named).find(unsure);
            let Some(entry) = next.or_else(|| way.missing.iter().find(missed)).cloned() else {
                let gone = |entry: &Entry| self.named.looked.contains_key(entry) && !failed;
                let lost = way.missing.iter().any(gone) || self.met_itself(&act, &way, event, span);
                return (if lost { Act::Everything } else { act }, way);
            };
            if seen.len() == LOOKS_MAX || !self.look_at(entry, failed, &mut seen, host) {
                return (Act::Everything, way);
            }
        }
    }

    /// Whether a call may have changed a name that its own path went through, and that was looked at since.
    fn met_itself(&self, act: &Act, way: &Way, event: &Event<'_>, span: Span) -> bool {
        let Event::Path { path1, path2, .. } = event else { return false };
        let last =
            |path: &[u8]| path.rsplit(|byte| *byte == b'/').find(|name| !name.is_empty()).map(<[u8]>::to_vec);
        // The first path of these is not changed, or none.
        let only_second = matches!(act, Act::Link { .. }) || is_symlink(event);
        let lasts = [last(path1).filter(|_| !only_second), last(path2)];
        let is_last = |name: &Name| lasts.iter().flatten().any(|last| last == name.as_bytes());
        let ways = || way.entries.iter().chain(&way.named).chain(&way.missing);
        changes_names(act, event)
            && ways().any(|entry| {
                let looked = self.named.looked.get(entry);
                looked.is_some_and(|at| came_before(span.start_ns, *at)) && is_last(&entry.1)
            })
    }

    /// Whether the model may be wrong about what a call met at an entry.
    pub(super) fn is_unsure(&self, entry: &Entry, span: Span) -> bool {
        !self.named.looked.contains_key(entry) && self.doubtful_entry(entry.0, &entry.1, span)
    }

    /// What stands at an entry was read: what is known of it is of that moment, and where it is another thing than before the
    /// call that put it there comes later.
    pub(super) fn settle_again(&mut self, entry: Entry, found: Option<Stat>, deep: bool, now: u64) {
        // As nearly always.
        if self.named.looked.is_empty() && self.named.solid.is_empty() {
            return self.settle_entry(entry.0, &entry.1, found, deep);
        }
        let before = self.model.entry(entry.0, &entry.1);
        self.settle_entry(entry.0, &entry.1, found, deep);
        if let Some(at) = self.named.looked.get_mut(&entry) {
            *at = now;
        }
        if self.model.entry(entry.0, &entry.1) != before {
            self.named.solid.remove(&entry);
        }
    }

    /// Looks at an entry. `false` when nobody can tell any more what stood there.
    fn look_at(
        &mut self,
        entry: Entry,
        failed: bool,
        seen: &mut HashSet<Entry>,
        host: &mut dyn Host,
    ) -> bool {
        let mut at = entry;
        // Of what is known by name only the directory is to be found first.
        while self.model.is_unbound(at.0) {
            let Some(above) = self.model.get(at.0).and_then(|o| o.links.first().cloned()) else {
                return false;
            };
            at = above;
            if !seen.insert(at.clone()) {
                return false;
            }
        }
        seen.insert(at.clone());
        let (directory, name) = at.clone();
        let Some(inode) = self.model.get(directory).map(|o| o.inode) else { return false };
        let Ok(found) = host.child(inode, &name) else { return false };
        let now = host.now();
        if !self.model.is_reachable(directory) {
            // What stands where nothing is followed is not kept. A name that is gone is one outside by now.
            return found.is_none_or(|stat| {
                let known =
                    self.model.entry(directory, &name).filter(|o| self.model.find(stat.inode) == Some(*o));
                stat.kind != FileKind::Symlink || known.is_some()
            });
        }
        self.reads.entry(directory, &name, now);
        let there = found.is_some();
        let symlink = found.as_ref().is_some_and(|stat| stat.kind == FileKind::Symlink);
        let dirty = self.dirty.get(directory);
        let deep =
            dirty.is_some_and(|d| d.rescan == Some(true) || d.entries.get(&name).copied().unwrap_or(false));
        let others = dirty.is_some_and(|d| d.foreign);
        self.settle_entry(directory, &name, found, deep);
        // Of what others change there once more nobody tells before it is settled.
        if others {
            return failed || there && !symlink;
        }
        if self.named.looked.len() >= NAMES_MAX {
            return false;
        }
        self.named.looked.insert(at, now);
        there || failed
    }

    /// Notes what a call went through and which names it changed; whether, because of another one, nobody can tell any more where a
    /// path led.
    pub(super) fn note_names(
        &mut self,
        act: &Act,
        way: &Way,
        event: &Event<'_>,
        span: Span,
        ambiguous: bool,
    ) -> bool {
        let astray = self.note_ways(act, way, event, span);
        self.names_change(act, event, span, ambiguous) || astray
    }

    /// Notes what a call went through, and which symlinks it changed; whether another one may have changed a symlink that this
    /// one went through, or the other way round: their order is not known, and neither where the path led.
    fn note_ways(&mut self, act: &Act, way: &Way, event: &Event<'_>, span: Span) -> bool {
        let symlinks = self.symlinks_changed(act, event, span);
        let named = &mut self.named;
        let mut astray = false;
        for entry in way.entries.iter().chain(&way.named).chain(&way.missing) {
            astray |= named.symlinks.overlaps(entry, span);
            let _ = named.through.note(entry.clone(), span, 0..1, ());
        }
        for entry in symlinks {
            astray |= named.through.overlaps(&entry, span);
            let _ = named.symlinks.note(entry, span, 0..1, ());
        }
        astray
    }

    /// The entries that a call changes where a symlink may be, before or after.
    fn symlinks_changed(&self, act: &Act, event: &Event<'_>, span: Span) -> Vec<Entry> {
        let can_be = |place: &Place| {
            place.entry().is_none_or(|entry| {
                let there = self.model.entry(entry.0, &entry.1).and_then(|o| self.model.kind(o));
                there == Some(FileKind::Symlink)
                    || !self.named.is_solid(&entry, span) && self.is_unsure(&entry, span)
            })
        };
        let (places, may) = match act {
            Act::Unlink { place, .. } => ([Some(place), None], can_be(place)),
            Act::Make { place, .. } => ([Some(place), None], is_symlink(event)),
            Act::Link { place, source, .. } => ([Some(place), None], source.as_ref().is_none_or(can_be)),
            Act::Rename { from, to, .. } => ([Some(from), Some(to)], can_be(from) || can_be(to)),
            Act::Suspect { place, also } => ([Some(place), also.as_ref()], changes_names(act, event)),
            _ => return Vec::new(),
        };
        places.into_iter().flatten().filter(|_| may).filter_map(Place::entry).collect()
    }

    /// Names are changed by what is taken in; whether a call may have gone through what stood at one of them, and what was
    /// looked at there was what came after.
    fn names_change(&mut self, act: &Act, event: &Event<'_>, span: Span, ambiguous: bool) -> bool {
        let start_ns = span.start_ns;
        let named = &mut self.named;
        match act {
            Act::Foreign { object } => {
                let mut late = false;
                named.solid.retain(|entry, _| entry.0 != *object);
                named.looked.retain(|entry, at| {
                    let other = entry.0 != *object;
                    late |= !other && came_before(start_ns, *at);
                    other
                });
                late
            }
            Act::Suspect { place, also } => {
                let entries = [Some(place), also.as_ref()].into_iter().flatten().filter_map(Place::entry);
                changes_names(act, event)
                    && entries.fold(false, |late, entry| late | named.changed(&entry, start_ns))
            }
            Act::Create { parent, name, .. } => {
                let entry = (*parent, name.clone());
                let late = named.changed(&entry, start_ns);
                if !ambiguous {
                    named.put_solid(entry, span);
                }
                late
            }
            Act::Unlink { place, .. } | Act::Link { place, .. } => {
                place.entry().is_some_and(|entry| named.changed(&entry, start_ns))
            }
            Act::Make { place, .. } => {
                let Some(entry) = place.entry() else { return false };
                let late = named.changed(&entry, start_ns);
                if matches!(place, Place::Entry(..)) && !is_symlink(event) && !ambiguous {
                    named.put_solid(entry, span);
                }
                late
            }
            Act::Rename { from, to, exchange, .. } => {
                let (one, two) = (from.entry(), to.entry());
                let solid = |entry: &Option<Entry>| entry.as_ref().is_some_and(|e| named.is_solid(e, span));
                let is_solid = (solid(&one), solid(&two));
                let mut late = false;
                for entry in [&one, &two].into_iter().flatten() {
                    late |= named.changed(entry, start_ns);
                }
                let there = |place: &Place| matches!(place, Place::Entry(..)) && !ambiguous;
                if let Some(entry) = two.filter(|_| is_solid.0 && there(to)) {
                    named.put_solid(entry, span);
                }
                if let Some(entry) = one.filter(|_| *exchange && is_solid.1 && there(from)) {
                    named.put_solid(entry, span);
                }
                late
            }
            _ => false,
        }
    }
}

/// Whether a call began before something was looked at, or too close to it to tell.
fn came_before(start_ns: u64, looked_ns: u64) -> bool {
    start_ns <= looked_ns.saturating_add(CLOCK_SLACK_NS)
}

/// Whether a call changes names, and not only what stands there.
fn changes_names(act: &Act, event: &Event<'_>) -> bool {
    let header = event.header();
    match act {
        Act::Create { .. }
        | Act::Unlink { .. }
        | Act::Make { .. }
        | Act::Link { .. }
        | Act::Rename { .. } => true,
        Act::Suspect { .. } => header.flags & flag::FAILED != 0 || is_open(i64::from(header.nr)),
        _ => false,
    }
}

fn is_symlink(event: &Event<'_>) -> bool {
    matches!(i64::from(event.header().nr), libc::SYS_symlink | libc::SYS_symlinkat)
}
