//! Followers: second copies of single files, beside the gated tree, that do not wait for a checkpoint.
//!
//! A file of class `write` has a follower that each durable record changes in its order; one of class `close` a follower
//! that becomes, as a whole, what the file was when the stream said that it was closed. Tree and generations know
//! nothing of them. Each is exact for itself, and nothing is promised between two.
//!
//! They are made from what is durable anyway: the tree at the applied checkpoint and the log behind it. So they have no
//! state of their own. After a start those of class `write` are made anew, and those of class `close` are what the last
//! record left, or what the next one says: a step begins only when all records before its marker were followed, and what
//! they made is durable. The thread that applies does it, between two steps, so nobody changes the tree meanwhile; a tree
//! in which a step was begun is not looked at.
//!
//! What goes wrong with a follower is its own trouble: it is tried again, then reported, and never keeps a checkpoint
//! from being applied.

mod copy;
mod files;
mod names;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bfs_common::record::{FileKind, Name, ObjectId, PolicyLine, Record, Sequence};
use bytes::Bytes;

use super::error::BackupError;
use super::index::{GroupRow, View};
use super::past::Source;
use super::target::{Content, Target};
use crate::log::{self, LogRecord, LogRef, Payloads};
use crate::policy::{Backup, Policy, Table};
use crate::tree;
use copy::Copying;
use files::{Folder, zero};
pub(super) use names::{FileState, Pending};

/// How long is waited before a copy is tried again that failed; each time twice as long.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// After all tries: it is tried now and then, so that it goes on by itself.
const RETRY_REPORTED: Duration = Duration::from_secs(60);
/// Followers that are held open.
const OPEN_MAX: usize = 128;
/// Troubles that are told at once.
const TROUBLES_MAX: usize = 8;

/// What a follower waits for.
#[derive(Debug)]
enum Wanted {
    /// The next record of the file.
    Nothing,
    /// A copy of the file as it is.
    Copy,
    /// A copy of the file as it was; and whether it has changed since.
    Closed(Box<FileState>, bool),
}

/// A name that has a follower.
#[derive(Debug)]
struct Follower {
    object: ObjectId,
    policy: Policy,
    wanted: Wanted,
    /// How often the copy failed, when it is tried again, and why.
    tries: u32,
    again: Option<Instant>,
    failed: Option<String>,
}

impl Follower {
    fn works(&self, class: Backup) -> bool {
        self.policy.backup == class && !self.policy.suspended
    }

    fn wants(&mut self, wanted: Wanted) {
        (self.wanted, self.tries, self.again) = (wanted, 0, None);
    }
}

/// Where a group is followed from.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    /// Generations of the group, while nobody else is at the tree.
    pub source: Source<'a>,
    /// Its log.
    pub log: &'a Path,
    /// Whether there is room for so many bytes more.
    pub room: &'a dyn Fn(u64) -> Result<(), String>,
}

/// How followers stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// How many there are.
    pub count: u64,
    /// How many copies were given up so far.
    pub failures: u64,
    /// What is wrong, each with entry, action and reason.
    pub troubles: Vec<String>,
    /// When something is to be tried again.
    pub again: Option<Instant>,
}

/// The followers of a group.
#[derive(Debug)]
pub(super) struct Followers {
    folder: Folder,
    /// Followed up to here.
    at: Sequence,
    spot: Option<LogRef>,
    /// From the applied checkpoint up to there.
    target: Target,
    table: Table,
    /// Lines of the table that are not understood.
    odd: Vec<String>,
    followers: BTreeMap<PathBuf, Follower>,
    by_object: HashMap<ObjectId, BTreeSet<PathBuf>>,
    /// Places where something stands.
    stands: BTreeSet<PathBuf>,
    /// Places whose file went: what comes to the name anew begins with nothing.
    gone: BTreeSet<PathBuf>,
    open: HashMap<PathBuf, File>,
    /// Followers that were changed in place, and so have another time.
    touched: BTreeSet<PathBuf>,
    /// Names came or went.
    renamed: bool,
    failures: u64,
}

impl Followers {
    /// At the applied checkpoint of a group, in which no step is begun.
    pub fn new(site: &Site<'_>, row: &GroupRow) -> Result<Self, BackupError> {
        let folder = Folder::new(site.source.area.now());
        folder.clean().map_err(BackupError::io("clean", site.source.area.now()))?;
        let stands = folder.all().map_err(BackupError::io("read", site.source.area.now()))?;
        let mut all = Self {
            folder,
            at: row.applied.sequence,
            spot: None,
            target: Target::default(),
            table: Table::default(),
            odd: Vec::new(),
            followers: BTreeMap::new(),
            by_object: HashMap::new(),
            stands: stands.into_iter().collect(),
            gone: BTreeSet::new(),
            open: HashMap::new(),
            touched: BTreeSet::new(),
            renamed: true,
            failures: 0,
        };
        let view = site.source.index.view(row.number)?;
        all.policies(&row.policies);
        all.find_all(&view, row)?;
        Ok(all)
    }

    /// The last record that was followed.
    pub const fn at(&self) -> Sequence {
        self.at
    }

    /// How they stand.
    pub fn standing(&self) -> Standing {
        let failed = self.followers.iter().filter_map(|(path, follower)| {
            let why = follower.failed.as_ref()?;
            Some(format!("policy {:?}, backup of {}: {why}", follower.policy.pattern, path.display()))
        });
        Standing {
            count: self.followers.len() as u64,
            failures: self.failures,
            troubles: self.odd.iter().cloned().chain(failed).take(TROUBLES_MAX).collect(),
            again: self.followers.values().filter_map(|follower| follower.again).min(),
        }
    }

    /// Follows all records up to this one, which is durable. `row` is the group's row, and no step is begun.
    ///
    /// # Errors
    /// If log or index cannot be read; what a follower has of trouble is in [`Self::standing`].
    pub fn advance(&mut self, site: &Site<'_>, row: &GroupRow, to: Sequence) -> Result<(), BackupError> {
        let view = site.source.index.view(row.number)?;
        let (mut spot, after) = (self.spot, self.at);
        log::read_on(site.log, site.source.id, &mut spot, after, to, |found| self.take(&view, row, found))?;
        self.spot = spot;
        self.settle(site, &view, row)
    }

    /// The step to this checkpoint is done: the tree is where the followers are.
    pub fn applied(&mut self, row: &GroupRow) {
        if self.at != row.applied.sequence {
            return;
        }
        self.target = Target::default();
        for follower in self.followers.values_mut() {
            let Wanted::Closed(state, changed) = &mut follower.wanted else { continue };
            // The tree has it; if not any more, nobody has.
            if *changed {
                let why =
                    "the file was changed and applied before a copy could be made; the next close counts";
                follower.failed = Some(match &follower.failed {
                    Some(before) => format!("{before}; {why}"),
                    None => why.into(),
                });
                follower.wants(Wanted::Nothing);
            } else {
                let size = state.content.size(state.before.unwrap_or(0));
                (state.before, state.content) = (Some(size), Content::default());
            }
        }
    }

    fn pending<'a>(&'a self, view: &'a View, row: &'a GroupRow) -> Pending<'a, View> {
        Pending { base: view, target: &self.target, roots: &row.roots }
    }

    fn take(&mut self, view: &View, row: &GroupRow, found: LogRecord) -> Result<(), BackupError> {
        let LogRecord { encoded, record, payload, at, .. } = found;
        let failed = |e: super::target::TargetError| BackupError::Stream(e.to_string());
        self.target.fold(record.clone(), &payload, at).map_err(failed)?;
        self.at = encoded.sequence;
        match &record {
            Record::Policies { lines } => {
                self.policies(lines);
                self.find_all(view, row)?;
            }
            Record::Roots { .. } => self.find_all(view, row)?,
            Record::EntrySet { directory, name, object } => {
                self.named(view, row, *directory, name, Some(*object))?
            }
            Record::EntryDelete { directory, name } => self.named(view, row, *directory, name, None)?,
            Record::Write { object, .. }
            | Record::Zero { object, .. }
            | Record::Truncate { object, .. }
            | Record::Meta { object, .. }
            | Record::XattrSet { object, .. }
            | Record::XattrRemove { object, .. } => self.changed(*object, &record, &payload),
            Record::Closed { object } => self.closed(view, row, *object)?,
            _ => {}
        }
        Ok(())
    }

    /// Takes a table; lines that are not understood are named and left out.
    fn policies(&mut self, lines: &[PolicyLine]) {
        self.odd.clear();
        let mut policies = Vec::new();
        for line in lines {
            match Policy::from_line(line) {
                Ok(policy) => policies.push(policy),
                Err(bad) => self.odd.push(format!("policy {:?} is not understood: {bad}", line.pattern)),
            }
        }
        self.table = Table::new(policies).unwrap_or_else(|bad| {
            self.odd.push(format!("the policies are not understood: {bad}"));
            Table::default()
        });
    }

    /// Which names have followers, all of them anew.
    fn find_all(&mut self, view: &View, row: &GroupRow) -> Result<(), BackupError> {
        let mut found: Vec<(PathBuf, ObjectId)> = Vec::new();
        if self.table.has_followers() {
            let pending = self.pending(view, row);
            let mut add = |path, object| found.push((path, object));
            if self.table.has_patterns() {
                for (root, object) in pending.roots() {
                    pending.files(*object, root.as_path().into(), &mut add)?;
                }
            } else {
                for path in self.table.paths() {
                    if let Some(object) = pending.at_path(path)?
                        && pending.kind(object)? == Some(FileKind::Regular)
                    {
                        add(path.into(), object);
                    }
                }
            }
        }
        let mut gone: BTreeSet<PathBuf> = self.followers.keys().cloned().collect();
        for (path, object) in found {
            if self.name(path.clone(), object) {
                gone.remove(&path);
            }
        }
        gone.into_iter().for_each(|path| self.forget(&path));
        Ok(())
    }

    /// A file has its name no more.
    fn goes(&mut self, path: &Path) {
        if let Some(follower) = self.followers.get(path) {
            self.gone.insert(follower.policy.place_of(path));
            self.forget(path);
        }
    }

    /// An entry is another object, or gone.
    fn named(
        &mut self,
        view: &View,
        row: &GroupRow,
        directory: ObjectId,
        name: &Name,
        object: Option<ObjectId>,
    ) -> Result<(), BackupError> {
        if !self.table.has_followers() {
            return Ok(());
        }
        let pending = self.pending(view, row);
        let Some(path) = pending.path(directory)?.map(|above| above.join(name.as_os_str())) else {
            return Ok(());
        };
        let mut found = Vec::new();
        if let Some(object) = object {
            pending.files(object, path.clone(), &mut |path, object| found.push((path, object)))?;
        }
        let below = self.followers.range(path.clone()..).take_while(|(at, _)| at.starts_with(&path));
        let mut gone: BTreeSet<PathBuf> = below.map(|(at, _)| at.clone()).collect();
        for (path, object) in found {
            if self.name(path.clone(), object) {
                gone.remove(&path);
            }
        }
        gone.into_iter().for_each(|path| self.goes(&path));
        Ok(())
    }

    /// A file stands at a path; whether it has a follower there.
    fn name(&mut self, path: PathBuf, object: ObjectId) -> bool {
        let Some(policy) = self.table.holds(&path).filter(|policy| policy.backup != Backup::Checkpoint)
        else {
            return false;
        };
        if self.followers.get(&path).is_some_and(|known| known.object == object && known.policy == *policy) {
            return true;
        }
        let (policy, wanted) = match policy.backup {
            Backup::Write if !policy.suspended => (policy.clone(), Wanted::Copy),
            // What it has is what was closed last, until the stream says that this one is.
            _ => (policy.clone(), Wanted::Nothing),
        };
        self.forget(&path);
        self.by_object.entry(object).or_default().insert(path.clone());
        let follower = Follower { object, policy, wanted, tries: 0, again: None, failed: None };
        self.followers.insert(path, follower);
        true
    }

    fn forget(&mut self, path: &Path) {
        let Some(follower) = self.followers.remove(path) else { return };
        if let Some(paths) = self.by_object.get_mut(&follower.object) {
            paths.remove(path);
            if paths.is_empty() {
                self.by_object.remove(&follower.object);
            }
        }
        self.open.remove(path);
        self.touched.remove(path);
        self.renamed = true;
    }

    /// Something of a file changed: followers of class `write` repeat it.
    fn changed(&mut self, object: ObjectId, record: &Record, payload: &Bytes) {
        let Some(paths) = self.by_object.get(&object) else { return };
        for path in paths.clone() {
            let Some(follower) = self.followers.get_mut(&path) else { continue };
            if let Wanted::Closed(_, changed) = &mut follower.wanted {
                *changed |=
                    matches!(record, Record::Write { .. } | Record::Zero { .. } | Record::Truncate { .. });
            }
            if !follower.works(Backup::Write) || !matches!(follower.wanted, Wanted::Nothing) {
                continue;
            }
            if self.repeat(&path, record, payload).is_err()
                && let Some(follower) = self.followers.get_mut(&path)
            {
                // Whatever went wrong, a copy says again or makes good.
                follower.wants(Wanted::Copy);
            }
        }
    }

    /// Does to a follower what a record says.
    fn repeat(&mut self, path: &Path, record: &Record, payload: &Bytes) -> std::io::Result<()> {
        let gone = || std::io::Error::from(std::io::ErrorKind::NotFound);
        if !self.open.contains_key(path) {
            let place =
                self.followers.get(path).map(|follower| follower.policy.place_of(path)).ok_or_else(gone)?;
            let file = self.folder.open(&place)?.ok_or_else(gone)?;
            if self.open.len() >= OPEN_MAX {
                self.open.clear();
            }
            self.open.insert(path.into(), file);
        }
        let file = self.open.get(path).ok_or_else(gone)?;
        self.touched.insert(path.into());
        match record {
            Record::Write { offset, .. } => file.write_all_at(payload, *offset),
            Record::Truncate { size, .. } => file.set_len(*size),
            Record::Zero { offset, length, .. } => {
                let end = offset.saturating_add(*length).min(file.metadata()?.len());
                if *offset < end { zero(file, *offset, end) } else { Ok(()) }
            }
            // Attributes are set together, behind all bytes.
            _ => Ok(()),
        }
    }

    /// Nobody can write to a file any more.
    fn closed(&mut self, view: &View, row: &GroupRow, object: ObjectId) -> Result<(), BackupError> {
        if !self.by_object.contains_key(&object) {
            return Ok(());
        }
        let Some(state) = self.pending(view, row).file(object)? else { return Ok(()) };
        for path in self.by_object.get(&object).cloned().unwrap_or_default() {
            if let Some(follower) = self.followers.get_mut(&path).filter(|f| f.works(Backup::Close)) {
                follower.wants(Wanted::Closed(Box::new(state.clone()), false));
            }
        }
        Ok(())
    }

    /// Makes the copies that are wanted, and removes what nobody wants any more.
    fn settle(&mut self, site: &Site<'_>, view: &View, row: &GroupRow) -> Result<(), BackupError> {
        if std::mem::take(&mut self.renamed) {
            self.remove_others();
        }
        for path in std::mem::take(&mut self.touched) {
            let Some(follower) = self.followers.get(&path) else { continue };
            let state = self.pending(view, row).file(follower.object)?;
            if let (Some(file), Some(state)) = (self.open.get(&path), state) {
                let set = tree::set_attributes(file.as_fd(), FileKind::Regular, &state.meta, &state.xattrs);
                if set.is_err()
                    && let Some(follower) = self.followers.get_mut(&path)
                {
                    follower.wants(Wanted::Copy);
                }
            }
        }
        let now = Instant::now();
        let due = |follower: &Follower| {
            !matches!(follower.wanted, Wanted::Nothing) && follower.again.is_none_or(|again| again <= now)
        };
        let paths: Vec<PathBuf> = self
            .followers
            .iter()
            .filter(|(_, follower)| due(follower))
            .map(|(path, _)| path.clone())
            .collect();
        let mut payloads = Payloads::new(site.log);
        for path in paths {
            let Some(follower) = self.followers.get(&path) else { continue };
            let (object, limit) = (follower.object, Instant::now() + follower.policy.time_limit());
            let state = match &follower.wanted {
                Wanted::Closed(state, _) => Some((**state).clone()),
                _ => self.pending(view, row).file(object)?,
            };
            let place = follower.policy.place_of(&path);
            let made = match state {
                Some(_) if self.has_two(&place) => {
                    let why = std::io::Error::other("another file has this place: give one of them another");
                    Err(BackupError::io("write follower", &place)(why))
                }
                Some(state) => {
                    let to = Copying { folder: &self.folder, place: &place, limit };
                    to.copy(site, &mut payloads, row.checkpoint, object, &state)
                }
                None => Ok(()),
            };
            self.open.remove(&path);
            let Some(follower) = self.followers.get_mut(&path) else { continue };
            match made {
                Ok(()) => {
                    follower.failed = None;
                    follower.wants(Wanted::Nothing);
                    self.stands.insert(place);
                }
                Err(error) => {
                    follower.tries += 1;
                    let mut pause = RETRY_MIN * 2u32.saturating_pow(follower.tries - 1).min(1 << 10);
                    if follower.tries > follower.policy.retries {
                        pause = RETRY_REPORTED;
                        self.failures += 1;
                        tracing::error!(
                            "group {}: policy {:?}, backup of {}: {error}; tried {} times",
                            site.source.group,
                            follower.policy.pattern,
                            path.display(),
                            follower.tries
                        );
                        follower.failed = Some(error.to_string());
                    }
                    follower.again = Some(Instant::now() + pause);
                }
            }
        }
        Ok(())
    }

    /// Whether two files have one place.
    fn has_two(&self, place: &Path) -> bool {
        let has = |(path, follower): &(&PathBuf, &Follower)| follower.policy.place_of(path) == place;
        self.followers.iter().filter(has).take(2).count() > 1
    }

    /// Removes what stands where no follower does.
    fn remove_others(&mut self) {
        let wanted: BTreeSet<PathBuf> =
            self.followers.iter().map(|(path, follower)| follower.policy.place_of(path)).collect();
        let gone = std::mem::take(&mut self.gone);
        let mut left = BTreeSet::new();
        for place in std::mem::take(&mut self.stands) {
            if wanted.contains(&place) && !gone.contains(&place) {
                left.insert(place);
            } else if let Err(error) = self.folder.remove(&place) {
                tracing::warn!("cannot remove the follower {}: {error}; it is tried again", place.display());
                self.renamed = true;
                if gone.contains(&place) {
                    self.gone.insert(place.clone());
                }
                left.insert(place);
            }
        }
        self.stands = left;
    }
}
