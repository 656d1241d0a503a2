//! Files that are mapped, shared and writable: stores into them leave no record.
//!
//! What is known is which pages can be stored into. The host records when pages of a file that it follows
//! become dirty, *before* the first store that this allows; and pages that were cleaned cannot be stored into
//! without becoming dirty again. So of each file there is a set of **open** ranges: only what lies there can
//! differ from what the stream says without a record that told so. It begins with the whole file.
//! - [`tend`](Engine::tend_mapped), before the instant of a cut is chosen: open ranges are cleaned. What did
//!   not become dirty again since the cleaning began is not open any more; it is read like anything dirty, and
//!   a record that comes later makes the read void as any call would.
//! - What is still open can be stored into at any moment, so it is read in a stop.
//! - A file that nobody maps any more is read once more where it was open, and needs no stop.
//!
//! A file that the host cannot follow (tmpfs, where stores into pages that are there cause nothing) is open as a
//! whole for as long as it is mapped.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use bfs_common::abi::{Event, InodeId, kind};
use bfs_common::record::{FileKind, ObjectId, Sequence};

use super::Engine;
use super::host::{Host, HostError};
use super::interpret::is_held;
use super::ranges::RangeSet;
use super::recent::SLACK_NS;

/// All of a file, however long it gets.
const WHOLE: Range<u64> = 0..u64::MAX;
/// How many mapped files that are not in the model are remembered.
const STRANGE_MAX: usize = 65_536;
/// Rounds of cleaning and reading before a cut, or a stop.
const TENDS: u32 = 2;
/// About how many open bytes are cleaned at once.
const CLEAN_BYTES: u64 = 16 << 20;
/// After this time nothing more is cleaned for this checkpoint.
const CLEAN_NS_MAX: u64 = 1_000_000_000;
/// For so long a file stays followed after its last mapping ended: it may be mapped again.
const LINGER_NS: u64 = 10_000_000_000;
/// More open ranges than this count as one.
const RANGES_MAX: usize = 65_536;
/// Cleaning that was in vain is left out for up to 2 to this power checkpoints.
const IN_VAIN_MAX: u32 = 5;

/// Numbers of the old `mmap` of the 32-bit table (arch/x86/entry/syscalls/syscall_32.tbl), whose arguments
/// stand in memory, and of `mmap` for x32: no record tells which file. (`mmap2` has a record like the others.)
const COMPAT_MMAP: [u64; 2] = [90, 0x4000_0009];

/// A file that is mapped, or was until lately.
#[derive(Debug)]
struct File {
    inode: InodeId,
    /// The kernel writes to it without a mapping.
    held: bool,
    /// Pages that become dirty are recorded.
    followed: bool,
    /// What can be stored into without a record while there is a mapping.
    open: RangeSet,
    /// What became dirty since the last cleaning began.
    fresh: RangeSet,
    /// When nobody mapped it any more.
    unmapped_ns: Option<u64>,
    /// How often in a row most of what was cleaned became dirty again at once.
    in_vain: u32,
    /// Checkpoints for which it is not cleaned.
    skip: u32,
}

impl File {
    fn new(inode: InodeId, followed: bool) -> Self {
        let mut open = RangeSet::default();
        open.insert(WHOLE);
        Self {
            inode,
            held: false,
            followed,
            open,
            fresh: RangeSet::default(),
            unmapped_ns: None,
            in_vain: 0,
            skip: 0,
        }
    }

    fn silent(&self) -> bool {
        self.unmapped_ns.is_none() && !self.open.is_empty()
    }

    fn open(&mut self, range: Range<u64>) {
        self.fresh.insert(range.clone());
        self.open.insert(range);
        if self.open.len() > RANGES_MAX {
            self.open.insert(WHOLE);
        }
    }

    /// The open ranges in groups of about [`CLEAN_BYTES`].
    fn groups(&self) -> Vec<Vec<Range<u64>>> {
        let mut groups: Vec<Vec<Range<u64>>> = Vec::new();
        let mut bytes = u64::MAX;
        for range in self.open.iter() {
            if bytes >= CLEAN_BYTES {
                groups.push(Vec::new());
                bytes = 0;
            }
            bytes = bytes.saturating_add(range.end - range.start);
            if let Some(group) = groups.last_mut() {
                group.push(range);
            }
        }
        groups
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    files: HashMap<ObjectId, File>,
    /// Files that were mapped before they were in the model, or after they left it; and whether the kernel
    /// writes to them without a mapping.
    strange: HashMap<InodeId, bool>,
    /// Files that nobody maps any more: a successor need not find them once what was read of them is durable.
    gone: HashSet<InodeId>,
    /// There were too many of these: all that enter the model count as mapped.
    unknown: bool,
    /// Processes that mapped something with such a call of which no record tells what, and what they forked:
    /// their mappings are looked at in each stop.
    odd: HashSet<u32>,
}

impl Mapped {
    /// How many files are mapped.
    pub(super) fn len(&self) -> usize {
        self.files.values().filter(|f| f.unmapped_ns.is_none()).count()
    }

    /// Whether a file is mapped, or was until lately.
    pub(super) fn has(&self, object: ObjectId) -> bool {
        self.files.contains_key(&object)
    }

    /// Whether something can be stored into without a record.
    pub(super) fn silent(&self) -> bool {
        !self.odd.is_empty() || self.files.values().any(File::silent)
    }

    pub(super) fn ids(&self) -> Vec<ObjectId> {
        let mut ids: Vec<_> = self.files.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    fn remember(&mut self, inode: InodeId, held: bool) {
        if self.strange.len() >= STRANGE_MAX {
            self.unknown = true;
        } else {
            *self.strange.entry(inode).or_default() |= held;
        }
    }

    /// What was recorded of the file's pages may be incomplete.
    pub(super) fn lost(&mut self, object: ObjectId) {
        if let Some(file) = self.files.get_mut(&object) {
            file.open(WHOLE);
        }
    }

    /// The same for all files.
    pub(super) fn lost_all(&mut self) {
        for file in self.files.values_mut() {
            file.open(WHOLE);
        }
    }
}

impl Engine {
    /// What an event tells of mappings.
    ///
    /// # Errors
    /// [`HostError`].
    pub(super) fn note_mappings(&mut self, event: &Event<'_>, host: &mut dyn Host) -> Result<(), HostError> {
        match event {
            Event::File { event: e, .. } if e.header.kind == kind::MAPPED && is_held(e) => {
                if self.model.find(e.attr.id).is_none() {
                    self.mapped.remember(e.attr.id, true);
                }
                Ok(())
            }
            Event::File { event: e, .. } if e.header.kind == kind::MAPPED => {
                self.note_mapped(e.attr.id, host)
            }
            Event::Task { event: e } => {
                let (tid, tgid) = (e.header.tid, e.header.tgid);
                match e.header.kind {
                    kind::JOINED => self.note_mappings_of(tgid, host)?,
                    kind::COMPAT if COMPAT_MMAP.contains(&e.value) => drop(self.mapped.odd.insert(tgid)),
                    kind::FORK if tid == tgid && !self.mapped.odd.is_empty() => {
                        self.mapped.odd.insert(tgid);
                    }
                    kind::EXEC => drop(self.mapped.odd.remove(&tgid)),
                    kind::EXIT if e.last_thread == 1 => drop(self.mapped.odd.remove(&tgid)),
                    _ => {}
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Whatever a process has mapped.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn note_mappings_of(&mut self, process: u32, host: &mut dyn Host) -> Result<(), HostError> {
        match host.mapped_by(process)? {
            Some(files) => files.into_iter().try_for_each(|inode| self.note_mapped(inode, host)),
            None => {
                self.mappings_unknown();
                Ok(())
            }
        }
    }

    /// A file is mapped, shared and writable, or was when the call that mapped it ended.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn note_mapped(&mut self, inode: InodeId, host: &mut dyn Host) -> Result<(), HostError> {
        let known = self.model.find(inode);
        self.mapped.gone.remove(&inode);
        let followed = host.follow_mapped(inode, known.is_some())?;
        match known {
            Some(object) => self.mapped_now(object, inode, followed, host.now()),
            None => self.mapped.remember(inode, false),
        }
        Ok(())
    }

    /// It cannot be told what is mapped: for now everything counts as that.
    fn mappings_unknown(&mut self) {
        self.mapped.unknown = true;
        let files: Vec<_> = self.model.ids().filter_map(|o| Some((o, self.model.get(o)?))).collect();
        let files: Vec<_> = files
            .into_iter()
            .filter(|(_, o)| o.kind == FileKind::Regular)
            .map(|(id, o)| (id, o.inode))
            .collect();
        for (object, inode) in files {
            self.mapped.files.entry(object).or_insert_with(|| File::new(inode, false));
        }
    }

    fn mapped_now(&mut self, object: ObjectId, inode: InodeId, followed: bool, now: u64) {
        let file = self.mapped.files.entry(object).or_insert_with(|| File::new(inode, followed));
        file.unmapped_ns = None;
        if file.followed != followed && !file.held {
            file.followed = followed;
            file.open(WHOLE);
        }
        if !followed {
            // Nothing else tells a successor.
            self.suspect_content(object, now);
        }
        if self.standing {
            self.suspect_open_of(object, now);
        }
    }

    /// The kernel writes to a file of its own accord, from now on and for ever.
    pub(super) fn held(&mut self, object: ObjectId) {
        let Some(inode) = self.model.get(object).map(|o| o.inode) else { return };
        let file = self.mapped.files.entry(object).or_insert_with(|| File::new(inode, false));
        (file.held, file.followed, file.unmapped_ns) = (true, false, None);
        file.open(WHOLE);
    }

    fn suspect_content(&mut self, object: ObjectId, now: u64) {
        self.dirty.whole(object);
        self.dirty.meta(object, now);
    }

    /// An object entered the model; it may have been mapped before.
    pub(super) fn mark_mapped(&mut self, object: ObjectId, inode: InodeId) {
        let known = self.mapped.strange.remove(&inode);
        if known.is_some() || self.mapped.unknown {
            // Whether it is followed is found out when it is tended.
            let held = known.unwrap_or_default();
            self.mapped.files.insert(object, File { held, ..File::new(inode, false) });
        }
    }

    /// An object left the model.
    pub(super) fn forget_mapped(&mut self, object: ObjectId) {
        if let Some(file) = self.mapped.files.remove(&object) {
            self.mapped.remember(file.inode, file.held);
        }
    }

    /// Pages of a file became dirty.
    pub(super) fn pages_dirtied(&mut self, object: ObjectId, range: Range<u64>, now: u64) {
        let Some(file) = self.mapped.files.get_mut(&object) else { return };
        file.open(range.clone());
        // Before the mapping was seen to be gone, and taken in after that.
        let late = file.unmapped_ns.is_some_and(|since| now <= since.saturating_add(SLACK_NS));
        if late || self.standing && file.silent() {
            self.stain_range(object, range);
            self.dirty.meta(object, now);
        }
    }

    /// Makes as little open as can be, and reads what is not: before the instant of a cut is chosen.
    pub(super) fn tend_mapped(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        if self.mapped.files.is_empty() && self.mapped.strange.is_empty() {
            return Ok(());
        }
        for round in 0..TENDS {
            self.drain(host)?;
            self.find_unmapped(host)?;
            self.clean_mapped(host, round == 0)?;
            self.read_ahead(host)?;
            if !self.mapped.silent() {
                break;
            }
        }
        Ok(())
    }

    /// Looks an object up by a name: tmpfs finds an inode by its number only after that was done once.
    pub(super) fn look_up(&self, object: ObjectId, host: &mut dyn Host) -> Result<(), HostError> {
        if let Some((directory, name)) = self.model.get(object).and_then(|o| o.links.first().cloned())
            && let Some(directory) = self.model.get(directory).map(|o| o.inode)
        {
            host.child(directory, &name)?;
        }
        Ok(())
    }

    /// Where nobody maps a file any more, the stores are over.
    pub(super) fn find_unmapped(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        for object in self.mapped.ids() {
            let Some(inode) = self.mapped.files.get(&object).filter(|f| !f.held).map(|f| f.inode) else {
                continue;
            };
            let mut mappings = host.writable_mappings(inode)?;
            if mappings.is_none() {
                self.look_up(object, host)?;
                mappings = host.writable_mappings(inode)?;
            }
            let now = host.now();
            let Some(file) = self.mapped.files.get_mut(&object) else { continue };
            if mappings != Some(0) {
                file.unmapped_ns = None;
                if !file.followed && host.follow_mapped(inode, true)? {
                    file.followed = true;
                    file.open(WHOLE);
                }
                continue;
            }
            if file.unmapped_ns.is_none() {
                file.unmapped_ns = Some(now);
                let open: Vec<_> = file.open.iter().collect();
                for range in open {
                    self.stain_range(object, range);
                }
                self.dirty.meta(object, now);
            }
            let file = &self.mapped.files[&object];
            if !file.followed || file.unmapped_ns.is_some_and(|since| now > since + LINGER_NS) {
                self.mapped.files.remove(&object);
                self.mapped.gone.insert(inode);
            }
        }
        // These are few: files that were unlinked, and such as lie outside of the subtrees.
        let strange: Vec<_> = self.mapped.strange.iter().filter(|s| !s.1).map(|s| *s.0).collect();
        for inode in strange {
            match host.writable_mappings(inode)? {
                // Only kept in mind, should it have been in the model before.
                Some(1..) => drop(host.follow_mapped(inode, false)?),
                mappings => {
                    self.mapped.unknown |= mappings.is_none();
                    self.mapped.strange.remove(&inode);
                    self.mapped.gone.insert(inode);
                }
            }
        }
        Ok(())
    }

    fn clean_mapped(&mut self, host: &mut dyn Host, first: bool) -> Result<(), HostError> {
        let begun = host.now();
        for object in self.mapped.ids() {
            let Some(file) = self.mapped.files.get_mut(&object).filter(|f| f.followed && f.silent()) else {
                continue;
            };
            let inode = file.inode;
            if file.skip > 0 {
                file.skip -= u32::from(first);
                continue;
            }
            let before = file.open.bytes();
            file.fresh = RangeSet::default();
            let mut clean = Vec::new();
            for group in file.groups() {
                clean.extend(host.clean(inode, &group)?);
                // The ring must not fill up meanwhile.
                self.drain(host)?;
                if host.now().saturating_sub(begun) > CLEAN_NS_MAX {
                    break;
                }
            }
            self.close(object, &clean, host.now());
            let Some(file) = self.mapped.files.get_mut(&object) else { continue };
            if first && file.open.bytes() > before / 2 {
                file.in_vain = (file.in_vain + 1).min(IN_VAIN_MAX);
                file.skip = (1 << file.in_vain) - 1;
            } else if first {
                file.in_vain = 0;
            }
        }
        Ok(())
    }

    /// What was cleaned, and did not become dirty again since the cleaning began, as far as records of that can
    /// be in the ring by now, cannot be stored into without a record.
    fn close(&mut self, object: ObjectId, clean: &[Range<u64>], now: u64) {
        let Some(file) = self.mapped.files.get_mut(&object) else { return };
        let mut closed = RangeSet::default();
        for range in clean {
            closed.insert(range.clone());
        }
        for range in file.fresh.iter() {
            closed.remove(range);
        }
        for range in closed.iter() {
            file.open.remove(range);
        }
        for range in closed.iter() {
            self.stain_range(object, range);
        }
        if !closed.is_empty() {
            self.dirty.meta(object, now);
        }
    }

    /// The processes stand: what is open is read.
    pub(super) fn suspect_open(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        let odd: Vec<_> = self.mapped.odd.iter().copied().collect();
        for process in odd {
            self.note_mappings_of(process, host)?;
        }
        let now = host.now();
        for object in self.mapped.ids() {
            self.suspect_open_of(object, now);
        }
        Ok(())
    }

    fn suspect_open_of(&mut self, object: ObjectId, now: u64) {
        let Some(file) = self.mapped.files.get(&object).filter(|f| f.silent()) else { return };
        let open: Vec<_> = file.open.iter().collect();
        for range in open {
            self.stain_range(object, range);
        }
        self.dirty.meta(object, now);
    }

    /// Behind the marker with this number: what nobody maps any more was read before it.
    pub(super) fn let_go_of_unmapped(&mut self, marker: Sequence, host: &mut dyn Host) {
        if !self.mapped.gone.is_empty() {
            host.forget_mapped(self.mapped.gone.drain().collect(), marker);
        }
    }

    /// Behind a marker: stores into what the host does not follow can come at any moment, and a successor has to
    /// know.
    pub(super) fn suspect_unfollowed(&mut self, now: u64) {
        for object in self.mapped.ids() {
            let unfollowed = self.mapped.files.get(&object).is_some_and(|f| !f.followed && f.silent());
            if unfollowed && self.model.get(object).is_some() {
                self.suspect_content(object, now);
            }
        }
    }
}
