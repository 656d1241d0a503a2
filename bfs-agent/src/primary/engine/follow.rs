//! Files with followers: what their policies want in the stream before the next checkpoint.
//!
//! A checkpoint reads what is not exact. A follower cannot wait for that: what is written to a file of class `write` is
//! read soon, and of a file of class `close` the stream says when it was closed ([`Record::Closed`]), so that what
//! stands before that record is what the last writer left.
//!
//! **Closed** is a file that no open file of anybody may write to, and no mapping: the kernel counts these by inode
//! (`i_writecount`), whatever copied or handed on a descriptor. So nothing is derived from calls. What is said then is
//! right if the file was closed before all its changes were taken in and read, and is closed after that, and no change
//! came while it was read; else the same is tried again a little later.

use std::collections::BTreeSet;

use bfs_common::abi::InodeId;
use bfs_common::record::{FileKind, ObjectId, Record, Sequence};

use super::Engine;
use super::host::{Host, HostError};
use crate::policy::{Backup, Policy, Table};

/// Dirty objects that are looked at, at most, for whether they have a follower: when there are more, the next
/// checkpoint has them all.
const LOOKED_AT_MAX: usize = 4096;
/// Files that are looked at, at most, at a time, for whether they are closed.
const CLOSED_AT_ONCE: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Follow {
    table: Table,
    /// Files of class `close` of which the stream has something that it does not say to be closed.
    unclosed: BTreeSet<ObjectId>,
    /// Where the next look at these begins.
    next: ObjectId,
}

impl Follow {
    /// Whether there is anything to do for any file.
    fn is_wanted(&self) -> bool {
        self.table.policies().iter().any(|policy| works(Some(policy)).is_some())
    }
}

/// What is done by a policy.
fn works(policy: Option<&Policy>) -> Option<Backup> {
    policy.filter(|policy| !policy.suspended).map(|policy| policy.backup).filter(|b| *b != Backup::Checkpoint)
}

impl Engine {
    /// These policies hold from now on, also for the backup. Files that come under class `close` by that have a copy
    /// when they are closed, which they may be already. `anew`: whatever was said before.
    pub fn set_policies(&mut self, table: &Table, anew: bool) -> Sequence {
        let before = std::mem::replace(&mut self.follow.table, table.clone());
        let before = if anew { Table::default() } else { before };
        self.model.watch(self.follow.is_wanted());
        let sequence =
            self.say(&Record::Policies { lines: table.policies().iter().map(Policy::line).collect() });
        let all: Vec<ObjectId> = if table.has_patterns() {
            self.model.ids().collect()
        } else {
            table.paths().filter_map(|path| self.model.at_path(path)).collect()
        };
        for object in all {
            let comes = |path: &std::path::PathBuf| {
                let now = table.holds(path);
                works(now) == Some(Backup::Close) && now != before.holds(path)
            };
            if self.model.kind(object) == Some(FileKind::Regular)
                && self.model.paths(object).iter().any(comes)
            {
                self.follow.unclosed.insert(object);
            }
        }
        sequence
    }

    /// Whether there are files with followers.
    #[must_use]
    pub fn has_followers(&self) -> bool {
        self.follow.is_wanted()
    }

    /// Reads what followers wait for, and says which files are closed. Between checkpoints, and after the writes that
    /// have no record yet were taken in.
    ///
    /// # Errors
    /// [`HostError`]; what was not done is done by the next call.
    pub fn follow_now(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        if !self.follow.is_wanted() || self.noting || self.standing || !self.deferred.is_empty() {
            return Ok(());
        }
        for object in self.dirty_followed() {
            self.settle_now(object, host)?;
        }
        self.find_changed();
        for object in self.closed(host)? {
            self.follow.unclosed.remove(&object);
            self.send_snapshot(object);
            self.out.push(&Record::Closed { object }, b"");
        }
        Ok(())
    }

    /// Reads what is dirty of a file, as far as it can be read: so that the stream has it. Whether it has all of it now.
    ///
    /// # Errors
    /// [`HostError`], also that it cannot be read; nothing is forgotten then.
    pub fn read_now(&mut self, object: ObjectId, host: &mut dyn Host) -> Result<bool, HostError> {
        if !self.noting && !self.standing && self.deferred.is_empty() {
            self.settle_now(object, host)?;
        }
        Ok(self.dirty.get(object).is_none())
    }

    /// What class the object's names have.
    fn has_class(&self, object: ObjectId, class: Backup) -> bool {
        self.model.kind(object) == Some(FileKind::Regular)
            && self.model.paths(object).iter().any(|path| works(self.follow.table.holds(path)) == Some(class))
    }

    /// The files of class `write` that are not exact. Those of class `close` wait for being closed from now on.
    fn dirty_followed(&mut self) -> Vec<ObjectId> {
        let mut dirty: Vec<ObjectId> = if !self.follow.table.has_patterns() {
            self.follow.table.paths().filter_map(|path| self.model.at_path(path)).collect()
        } else if self.dirty.len() <= LOOKED_AT_MAX {
            self.dirty.ids()
        } else {
            Vec::new()
        };
        dirty.retain(|object| self.dirty.get(*object).is_some());
        dirty.sort_unstable();
        dirty.dedup();
        // What is stored into a mapping has no record.
        for object in self.mapped.ids().iter().chain(&dirty) {
            if self.has_class(*object, Backup::Close) {
                self.follow.unclosed.insert(*object);
            }
        }
        dirty.retain(|object| self.has_class(*object, Backup::Write));
        dirty
    }

    /// Notes the files of class `close` that changed, or got a name, since the last look.
    fn find_changed(&mut self) {
        let mut todo = self.model.take_changed();
        let mut seen = BTreeSet::new();
        while let Some(object) = todo.pop() {
            if !seen.insert(object) {
                continue;
            }
            match self.model.get(object).map(|o| o.kind) {
                // It stands elsewhere, with all below it.
                Some(FileKind::Directory) => {
                    todo.extend(self.model.get(object).into_iter().flat_map(|o| o.entries.values().copied()));
                }
                Some(FileKind::Regular) if self.has_class(object, Backup::Close) => {
                    self.follow.unclosed.insert(object);
                }
                _ => {}
            }
        }
    }

    /// Reads what is dirty of an object.
    fn settle_now(&mut self, object: ObjectId, host: &mut dyn Host) -> Result<(), HostError> {
        let Some(dirty) = self.dirty.take(object) else { return Ok(()) };
        let Some(inode) = self.model.get(object).map(|o| o.inode) else { return Ok(()) };
        let settled = match if dirty.restless || self.restless { host.is_at_rest(inode) } else { Ok(true) } {
            Ok(true) => self.settle_object(object, &dirty, host, true),
            other => other,
        };
        if !matches!(settled, Ok(true)) {
            self.dirty.put(object, dirty);
        }
        self.reads.data_as_one(object);
        self.rescan_moved(host.now());
        settled.map(drop)
    }

    /// The files that nobody can write to, and that the stream has as they were when that began.
    fn closed(&mut self, host: &mut dyn Host) -> Result<Vec<ObjectId>, HostError> {
        let mut found = Vec::new();
        for object in self.some_unclosed() {
            match self.model.get(object).map(|o| o.inode).filter(|_| self.model.is_linked(object)) {
                Some(inode) if self.writers(object, inode, host)? == Some(0) => found.push((object, inode)),
                Some(_) => {}
                None => drop(self.follow.unclosed.remove(&object)),
            }
        }
        if found.is_empty() {
            return Ok(Vec::new());
        }
        // Whatever was written is in the ring by now, or in runs, or was stored into a mapping that is gone.
        self.take_all_in(host)?;
        if found.iter().any(|(object, _)| self.mapped.has(*object)) {
            self.find_unmapped(host)?;
        }
        for (object, _) in &found {
            self.settle_now(*object, host)?;
        }
        self.find_changed();
        // What began before all was read.
        self.take_all_in(host)?;
        let mut closed = Vec::new();
        for (object, inode) in found {
            let changed = self.model.has_changed(object) || self.dirty.get(object).is_some();
            if !changed && self.writers(object, inode, host)? == Some(0) {
                closed.push(object);
            }
        }
        Ok(closed)
    }

    /// How many open files may write to a file; `None` when that cannot be told.
    fn writers(
        &self,
        object: ObjectId,
        inode: InodeId,
        host: &mut dyn Host,
    ) -> Result<Option<u32>, HostError> {
        let writers = host.open_for_writing(inode)?;
        if writers.is_some() {
            return Ok(writers);
        }
        self.look_up(object, host)?;
        host.open_for_writing(inode)
    }

    fn take_all_in(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        let taken = self.take_runs(host);
        host.join_writes();
        taken
    }

    /// Some of the files that wait, others each time.
    fn some_unclosed(&mut self) -> Vec<ObjectId> {
        let from = self.follow.next;
        let behind = self.follow.unclosed.range(from..).chain(self.follow.unclosed.range(..from));
        let some: Vec<ObjectId> = behind.copied().take(CLOSED_AT_ONCE).collect();
        self.follow.next = some.last().map_or(ObjectId(0), |last| last.next());
        some
    }
}
