//! Putting back what somebody else took from the tree, as far as the index has it: names, types, attributes, links. Bytes
//! are not in the index: what is not there any more is noted as damaged, and comes with the stream.
//!
//! A crash in the midst of it costs nothing: damage is durable before anything is made, what was made is another
//! inode than the index has until that is noted, and what is looked at again is put right again.

use std::collections::{BTreeSet, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use bfs_common::record::{FileKind, Name, ObjectId};
use rustix::fs::{AtFlags, OFlags, RenameFlags};
use rustix::io::Errno;

use super::super::damage::Damage;
use super::super::error::BackupError;
use super::super::index::{Base, Node, Place};
use super::super::sums;
use super::look::{Found, by_sums, is_as_left, stat};
use super::{Step, anchor, find, names, reopen_dir, show, syncfs};
use crate::tree;

/// Levels of directories that are taken over at once.
const ADOPT_DEPTH_MAX: usize = 256;

/// Makes durable what is damaged.
type Note<'a> = &'a mut dyn FnMut(&[(ObjectId, Damage)]) -> Result<(), BackupError>;

/// What was put back.
#[derive(Debug, Default)]
pub struct Healed {
    /// Objects that have another file now.
    pub inos: Vec<(ObjectId, u64)>,
    /// What was done, for people.
    pub did: Vec<String>,
}

/// What a look at the whole tree found.
#[derive(Default)]
struct Survey {
    missing: BTreeSet<ObjectId>,
    damage: Found,
}

impl Step<'_> {
    /// Puts back what the index has. `note` makes durable what is damaged. `all`: no step is under way, so everything
    /// is compared; else only what is missing is made again. Objects in `suspects` are read as a whole.
    ///
    /// # Errors
    /// Whatever stopped it; it can be done again.
    pub fn heal(
        mut self,
        detached: bool,
        all: bool,
        suspects: &HashSet<ObjectId>,
        note: Note<'_>,
    ) -> Result<Healed, BackupError> {
        self.detached = detached;
        let sync = reopen_dir(&self.area.tree)?;
        let mut healed = Healed::default();
        let survey = self.survey(all, suspects)?;
        for (object, damage) in &survey.damage {
            let lost: u64 = damage.iter().map(|(start, end)| end - start).sum();
            healed.did.push(format!("{lost} bytes of object {object} are damaged"));
        }
        note(&survey.damage)?;
        let mut left = survey.missing;
        while let Some(object) = left.first().copied() {
            self.mend(object, &mut left, &mut healed)?;
        }
        self.links(&mut healed)?;
        if all {
            self.strangers(&mut healed)?;
        }
        self.put_attributes(all)?;
        syncfs(&sync)?;
        healed.inos = self.mended.into_iter().collect();
        Ok(healed)
    }

    /// An object as it should be now; `None` if it is not there in this step.
    fn wanted(&self, object: ObjectId) -> Result<Option<Node>, BackupError> {
        match self.plan.objects.get(&object) {
            Some(touched) if touched.before.is_none() => Ok(None),
            Some(touched) if self.detached => Ok(touched.after.clone()),
            Some(touched) => Ok(touched.before.clone()),
            None => self.base.node(object),
        }
    }

    fn survey(&mut self, all: bool, suspects: &HashSet<ObjectId>) -> Result<Survey, BackupError> {
        let mut survey = Survey::default();
        let base = self.base;
        base.each(|object, before| {
            let Some(node) = self.wanted(object)? else { return Ok(true) };
            let regular = node.kind == FileKind::Regular;
            match self.open(object, if regular && all { OFlags::RDONLY } else { OFlags::PATH }) {
                Ok(fd) if regular && all => {
                    let file = File::from(fd);
                    let now = stat(object, &file)?;
                    let as_left = is_as_left(&now, before);
                    if !as_left || suspects.contains(&object) {
                        // That a peer suspects it makes nothing lost: it would take checkpoints that are kept with it.
                        let damage = by_sums(&base.sums(object), &file, before.size, as_left)?;
                        if !damage.is_empty() {
                            survey.damage.push((object, damage));
                        }
                    }
                }
                Ok(_) => {}
                // A store that was copied has other inodes and all its bytes.
                Err(BackupError::Foreign(_)) if self.adopt(object, 0)? => {}
                Err(BackupError::Foreign(_)) => {
                    survey.missing.insert(object);
                    if regular && before.size > 0 {
                        survey.damage.push((object, Damage::all(before.size)));
                    }
                }
                Err(error) => return Err(error),
            }
            Ok(true)
        })?;
        Ok(survey)
    }

    /// Takes another file for that of an object, if it is as good: of the same type, nobody else's, with the same bytes
    /// as its checksums say. Its directories first.
    fn adopt(&mut self, object: ObjectId, depth: usize) -> Result<bool, BackupError> {
        let Some(node) = self.wanted(object)?.filter(|_| depth < ADOPT_DEPTH_MAX) else { return Ok(false) };
        for place in &node.places {
            if let Place::Entry(directory, _) = place
                && matches!(self.open(*directory, OFlags::PATH), Err(BackupError::Foreign(_)))
                && !self.adopt(*directory, depth + 1)?
            {
                return Ok(false);
            }
        }
        let mut ino = None;
        for place in &node.places {
            let Some((dir, name)) = self.place(place, false)? else { return Ok(false) };
            let Ok(there) = tree::stat_at(dir.as_fd(), &name[..]) else { return Ok(false) };
            let links = node.kind == FileKind::Directory || there.nlink == node.places.len() as u64;
            if there.kind != node.kind || !links || ino.is_some_and(|ino| ino != there.ino) {
                return Ok(false);
            }
            ino = Some(there.ino);
        }
        let (Some(ino), Some(place)) = (ino, node.places.first()) else { return Ok(false) };
        let Some((dir, name)) = self.place(place, false)? else { return Ok(false) };
        let regular = node.kind == FileKind::Regular;
        let flags = if regular { OFlags::RDONLY | OFlags::NONBLOCK } else { OFlags::PATH };
        let fd = find::open_beneath(&*dir, &name, flags).map_err(BackupError::io("open", show(&name)))?;
        let same = match node.kind {
            FileKind::Directory => true,
            FileKind::Regular => {
                let file = File::from(fd);
                let size = self.base.node(object)?.map_or(node.size, |before| before.size);
                let (now, sums) = (stat(object, &file)?, self.base.sums(object));
                let found = sums::compare(&sums, &file, size)?;
                // One without checksums has at least the time that the applier gave it, to the nanosecond.
                let known = found.unknown.is_none() || is_as_left(&now, &Node { size, ..node.clone() });
                now.size == size && known && found.bad.is_empty() && found.unreadable.is_empty()
            }
            FileKind::Symlink => tree::readlink(fd.as_fd()).is_ok_and(|target| target[..] == node.target[..]),
            _ => tree::stat_fd(fd.as_fd()).is_ok_and(|there| there.device == node.device),
        };
        if same {
            self.mended.insert(object, ino);
        }
        Ok(same)
    }

    /// Makes an object again, its directories first.
    fn mend(
        &mut self,
        object: ObjectId,
        left: &mut BTreeSet<ObjectId>,
        healed: &mut Healed,
    ) -> Result<(), BackupError> {
        left.remove(&object);
        let Some(node) = self.wanted(object)? else { return Ok(()) };
        for place in &node.places {
            if let Place::Entry(directory, _) = place
                && left.contains(directory)
            {
                self.mend(*directory, left, healed)?;
            }
        }
        healed.did.push(format!("object {object} was missing or another file and is made again"));
        self.dirs.clear();
        let name = anchor(object);
        for dir in [&self.area.stage, &self.area.aside] {
            let left = CString::new(name.clone()).expect("a number has no zero byte");
            if rustix::fs::statat(&**dir, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                self.crash.pass()?;
                find::remove(dir.as_fd(), &left)?;
            }
        }
        self.crash.pass()?;
        self.make_one(object, &node)?;
        let stage = self.area.stage.clone();
        let made = tree::stat_at(stage.as_fd(), &name[..]).map_err(BackupError::io("stat", show(&name)))?;
        self.mended.insert(object, made.ino);
        if node.kind == FileKind::Regular {
            let fd = find::open_beneath(&*stage, &name, OFlags::WRONLY)
                .map_err(BackupError::io("open", show(&name)))?;
            // Of one that the step changes, as it was before: what it does to it begins there.
            let size = self.base.node(object)?.map_or(node.size, |before| before.size);
            rustix::fs::ftruncate(&fd, size).map_err(BackupError::io("set the size of", show(&name)))?;
        }
        if self.plan.objects.get(&object).is_some_and(|touched| touched.loose) {
            return Ok(());
        }
        if node.places.is_empty() {
            return rustix::fs::renameat(&*stage, &name, &*self.area.aside, &name)
                .map_err(BackupError::io("move aside", show(&name)));
        }
        let mut stands: Option<find::Spot> = None;
        for place in &node.places {
            // A directory that the step makes may not be there yet.
            let Some((to, at)) = self.free(place)? else { continue };
            self.crash.pass()?;
            if let Some((dir, first)) = &stands {
                rustix::fs::linkat(&**dir, &first[..], &*to, &at[..], AtFlags::empty())
                    .map_err(BackupError::io("link", show(&at)))?;
            } else {
                rustix::fs::renameat_with(&*stage, &name, &*to, &at[..], RenameFlags::NOREPLACE)
                    .map_err(BackupError::io("move into place", show(&at)))?;
                stands = Some((to, at));
            }
        }
        Ok(())
    }

    /// A place with nothing in it.
    fn free(&mut self, place: &Place) -> Result<Option<find::Spot>, BackupError> {
        let Some((dir, name)) = self.place(place, true)? else { return Ok(None) };
        if rustix::fs::statat(&*dir, &name[..], AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            self.displace(&dir, &name)?;
        }
        Ok(Some((dir, name)))
    }

    /// Moves what somebody else put somewhere out of the way: it goes when the step is done.
    pub(super) fn displace(&mut self, dir: &OwnedFd, name: &[u8]) -> Result<(), BackupError> {
        self.crash.pass()?;
        loop {
            let to = format!("foreign.{}", self.displaced);
            self.displaced += 1;
            match rustix::fs::renameat_with(dir, name, &*self.area.aside, &to, RenameFlags::NOREPLACE) {
                Ok(()) => break,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(BackupError::io("move away", show(name))(error)),
            }
        }
        tracing::warn!("{:?} stood in the tree and is not of the group: it is removed", show(name));
        Ok(())
    }

    /// Every name of a file with several leads to it.
    fn links(&mut self, healed: &mut Healed) -> Result<(), BackupError> {
        let base = self.base;
        base.each(|object, before| {
            let loose = self.plan.objects.get(&object).is_some_and(|touched| touched.loose);
            if loose || before.kind == FileKind::Directory {
                return Ok(true);
            }
            let Some(node) = self.wanted(object)?.filter(|node| node.places.len() > 1) else {
                return Ok(true);
            };
            let ino = self.mended.get(&object).copied().unwrap_or(node.ino);
            let (mut good, mut bad) = (None, Vec::new());
            for place in &node.places {
                let Some((dir, name)) = self.place(place, false)? else { continue };
                match tree::stat_at(dir.as_fd(), &name[..]) {
                    Ok(stat) if stat.ino == ino && stat.kind == node.kind => good = Some((dir, name)),
                    _ => bad.push(place),
                }
            }
            let Some((from, old)) = good else { return Ok(true) };
            for place in bad {
                let Some((dir, name)) = self.free(place)? else { continue };
                self.crash.pass()?;
                rustix::fs::linkat(&*from, &old[..], &*dir, &name[..], AtFlags::empty())
                    .map_err(BackupError::io("link", show(&name)))?;
                healed.did.push(format!("a name of object {object} is made again"));
            }
            Ok(true)
        })?;
        Ok(())
    }

    /// Nothing but what the index has stands in the directories.
    fn strangers(&mut self, healed: &mut Healed) -> Result<(), BackupError> {
        let base = self.base;
        base.each(|object, node| {
            if node.kind != FileKind::Directory {
                return Ok(true);
            }
            let wanted: HashSet<Name> = base.entries(object)?.into_iter().map(|(name, _)| name).collect();
            let dir = self.open(object, OFlags::RDONLY)?;
            for name in names(&dir, "a directory of the tree")? {
                if Name::new(name.to_bytes()).is_some_and(|name| !wanted.contains(&name)) {
                    self.displace(&dir, name.to_bytes())?;
                    healed.did.push(format!("{name:?} in directory {object} was put there by somebody else"));
                }
            }
            Ok(true)
        })?;
        Ok(())
    }

    /// Sizes and attributes as the index has them, of what was made again or of everything. Directories come last, and all
    /// of them: their times changed when something was put into them, also where a step that is under way does nothing.
    fn put_attributes(&mut self, all: bool) -> Result<(), BackupError> {
        let base = self.base;
        for directories in [false, true] {
            base.each(|object, _| {
                let Some(node) = self.wanted(object)? else { return Ok(true) };
                if !all && node.kind != FileKind::Directory && !self.mended.contains_key(&object) {
                    return Ok(true);
                }
                if (node.kind == FileKind::Directory) != directories {
                    return Ok(true);
                }
                let fd = self.open(object, OFlags::PATH)?;
                let failed =
                    |error| BackupError::io("set the attributes of object", object.to_string())(error);
                let now = tree::stat_fd(fd.as_fd()).map_err(failed)?;
                if all && node.kind == FileKind::Regular && now.size != node.size {
                    self.crash.pass()?;
                    let fd = self.open(object, OFlags::WRONLY)?;
                    rustix::fs::ftruncate(&fd, node.size)
                        .map_err(BackupError::io("set the size of object", object.to_string()))?;
                }
                let xattrs = tree::xattrs(fd.as_fd()).map_err(failed)?;
                let same = now.meta == node.meta
                    && now.size == node.size
                    && xattrs.len() == node.xattrs.len()
                    && xattrs.iter().zip(&node.xattrs).all(|(a, b)| a.0 == b.0 && a.1[..] == b.1[..]);
                if !same {
                    self.crash.pass()?;
                    tree::set_attributes(fd.as_fd(), node.kind, &node.meta, &node.xattrs).map_err(failed)?;
                }
                Ok(true)
            })?;
        }
        Ok(())
    }
}
