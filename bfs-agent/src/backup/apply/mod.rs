//! The applier: does a planned step to the tree, so that every crash converges.
//!
//! Each line is durable before the next begins:
//! 0. the before-images ([`images`]): until they are sealed nothing else changes, so a crash here
//!    only means that they are taken again;
//! 1. the plan row ([`Phase::Planned`]): the images are sealed and never taken again. The index is
//!    at the state before the step, the log holds the records: both stay until the step is
//!    complete, so a redo computes the same plan;
//! 2. every place that loses its object is emptied: the objects go to `aside/N`. Meanwhile an
//!    object is at its old place or aside, so it is found by number ([`find`]);
//! 3. the plan row ([`Phase::Detached`]), if anything was displaced;
//! 4. new objects are made in `stage/N`, data and attributes are written, places are filled,
//!    attributes of directories are set last. Meanwhile an object is at a new place, in `stage/`
//!    or aside, and places only fill, so again it is found by number;
//! 5. `syncfs`;
//! 6. one transaction of the index: objects, entries, applied position, generations, end of the
//!    plan;
//! 7. what is left in `stage/` and `aside/` without being somebody's only place is removed, or
//!    goes to `kept/` if a generation needs it (also at start, so a crash here costs nothing).
//!
//! One `syncfs` instead of one `fsync` a file is sound because nothing counts before it returns:
//! it writes back all data and metadata of the file system that were dirty when it was called,
//! waits for them, and (Linux 5.8 and later) reports a write-back error that happened since its
//! descriptor was opened, which is before the first write of the step. For ten thousand small
//! files it is one journal commit instead of ten thousand.

mod content;
mod find;
mod heal;
mod images;
mod look;

pub(super) use find::open_beneath;
pub(super) use images::next_data;

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bfs_common::record::{CheckpointId, FileKind, ObjectId, PathBytes};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::damage::Damage;
use super::error::BackupError;
use super::index::{Base, Node, Phase, Place, StepResult, View};
use super::places::{self, RootPlace};
use super::plan::Plan;
use super::room::Disk;
use super::store::Store;
use super::sums::SumChange;
use crate::durable;
use crate::log::Payloads;
use crate::mutant::{self, Mutant};
use crate::tree::{self, FileStat};
use find::is_another;

/// The folders that one group's applier works in, all on one file system.
#[derive(Debug)]
pub struct Area {
    tree: Arc<OwnedFd>,
    stage: Arc<OwnedFd>,
    aside: Arc<OwnedFd>,
    kept: Arc<OwnedFd>,
    images: PathBuf,
    now: PathBuf,
    process: PathBuf,
    base: Option<PathBuf>,
    maps: Vec<(PathBytes, PathBytes)>,
    allowed: Vec<PathBuf>,
    log: PathBuf,
    sealed: AtomicU64,
}

impl Area {
    /// Opens the folders of a group.
    ///
    /// # Errors
    /// If they cannot be made, or the maps lead nowhere that is allowed.
    pub fn open(
        store: &Store,
        group: &str,
        maps: &[(PathBytes, PathBytes)],
        allowed: &[PathBuf],
    ) -> Result<Self, BackupError> {
        let mut base = None;
        for (from, _) in maps {
            let place = places::root_place(from.as_path(), maps, allowed)
                .map_err(|e| BackupError::Stream(e.to_string()))?;
            base = base.or(place.base);
        }
        let own = match &base {
            None => store.path().to_path_buf(),
            // Files are moved between these folders and the tree, so they lie on its file system.
            Some(dir) => dir.join(".bfs-replayer"),
        };
        let open = |path: &Path| -> Result<OwnedFd, BackupError> {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).map_err(BackupError::io("open", path))
        };
        let make = |path: PathBuf| -> Result<OwnedFd, BackupError> {
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => open(&path),
                Err(error) => Err(BackupError::io("make", &path)(error)),
            }
        };
        if base.is_some() {
            make(own.clone())?;
            make(own.join("stage"))?;
            make(own.join("aside"))?;
            make(own.join("kept"))?;
        }
        Ok(Self {
            tree: Arc::new(match &base {
                None => open(&store.group_dir("tree", group)?)?,
                Some(dir) => open(dir)?,
            }),
            stage: Arc::new(make(own.join("stage").join(group))?),
            aside: Arc::new(make(own.join("aside").join(group))?),
            kept: Arc::new(make(own.join("kept").join(group))?),
            images: store.group_dir("images", group)?,
            now: store.group_dir("now", group)?,
            process: store.group_dir("process", group)?,
            base,
            maps: maps.to_vec(),
            allowed: allowed.to_vec(),
            log: store.group_dir("log", group)?,
            sealed: AtomicU64::new(0),
        })
    }

    /// Where a root stands.
    ///
    /// # Errors
    /// If that is not allowed or lies on another base than the rest of the group.
    pub fn root_place(&self, root: &Path) -> Result<RootPlace, BackupError> {
        let place = places::root_place(root, &self.maps, &self.allowed)
            .map_err(|e| BackupError::Stream(e.to_string()))?;
        if place.base != self.base {
            let why = format!(
                "root {}: all roots of a group go into the store or below one allowed folder",
                root.display()
            );
            return Err(BackupError::Stream(why));
        }
        Ok(place)
    }
}

impl Area {
    /// The file system of the tree.
    ///
    /// # Errors
    /// What the system says.
    pub fn disk(&self) -> Result<Disk, BackupError> {
        Disk::of(&*self.tree).map_err(BackupError::io("stat", "the tree"))
    }

    /// The images of all steps up to this checkpoint are sealed: it is the tree's, or that of a step
    /// that may be changing it.
    #[must_use]
    pub fn sealed(&self) -> CheckpointId {
        CheckpointId(self.sealed.load(Ordering::SeqCst))
    }

    /// Says so, before the first change of the step.
    pub fn seal(&self, to: CheckpointId) {
        self.sealed.fetch_max(to.0, Ordering::SeqCst);
    }

    /// The folder of before-images.
    #[must_use]
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// The folder of the images of processes.
    #[must_use]
    pub fn process(&self) -> &Path {
        &self.process
    }

    /// The folder of followers.
    #[must_use]
    pub fn now(&self) -> &Path {
        &self.now
    }

    /// Opens the file of an object that is gone, for reading; `None` if it was not kept.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open_kept(&self, object: ObjectId) -> Result<Option<File>, BackupError> {
        let name = anchor(object);
        // In `aside/` only after a crash, until the next step.
        for dir in [&self.kept, &self.aside] {
            match open_beneath(&**dir, &name, OFlags::RDONLY) {
                Ok(fd) => return Ok(Some(File::from(fd))),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(BackupError::io("open kept object", object.to_string())(error)),
            }
        }
        Ok(None)
    }

    /// Removes the files of objects that no generation needs any more.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn drop_kept(&self, objects: &[ObjectId]) -> Result<(), BackupError> {
        for object in objects {
            match rustix::fs::unlinkat(&*self.kept, anchor(*object), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(BackupError::io("remove kept object", object.to_string())(error)),
            }
        }
        Ok(())
    }

    /// Bytes that the file of an object takes that is gone; none if it was not kept.
    #[must_use]
    pub fn kept_bytes(&self, object: ObjectId) -> u64 {
        let stat = rustix::fs::statat(&*self.kept, anchor(object), AtFlags::SYMLINK_NOFOLLOW);
        stat.map_or(0, |stat| stat.st_blocks as u64 * 512)
    }

    /// Removes all images but those of the steps that begin at a checkpoint that is needed.
    ///
    /// # Errors
    /// If the folder cannot be read or something not be removed.
    pub fn drop_images(&self, is_needed: impl Fn(CheckpointId) -> bool) -> Result<(), BackupError> {
        for entry in std::fs::read_dir(&self.images).map_err(BackupError::io("read", &self.images))? {
            let name = entry.map_err(BackupError::io("read", &self.images))?.file_name();
            if super::images::number(&name).is_none_or(|number| !is_needed(number)) {
                let path = self.images.join(name);
                std::fs::remove_file(&path).map_err(BackupError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Removes what a crash left of generations that were dropped.
    ///
    /// # Errors
    /// If a folder cannot be read or something not be removed.
    pub fn sweep(&self, view: &View, is_needed: impl Fn(CheckpointId) -> bool) -> Result<(), BackupError> {
        for name in names(&self.kept, "kept objects")? {
            let object = name.to_str().ok().and_then(|n| n.parse().ok()).map(ObjectId);
            if !object.map(|o| view.is_kept(o)).transpose()?.unwrap_or(false) {
                find::remove(self.kept.as_fd(), &name)?;
            }
        }
        self.drop_images(is_needed)
    }

    /// The path of the directory of a root.
    ///
    /// # Errors
    /// If it has no place.
    pub fn root_path(&self, root: &Path) -> Result<PathBuf, BackupError> {
        let tree = crate::tree::fd_path(self.tree.as_fd());
        let mut path = std::fs::read_link(&tree).map_err(BackupError::io("read", tree))?;
        path.extend(self.root_place(root)?.names.iter().map(|name| OsStr::from_bytes(name)));
        Ok(path)
    }

    /// Opens the directory of a root (`O_PATH`); `None` if it is not there.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open_root(&self, root: &Path) -> Result<Option<OwnedFd>, BackupError> {
        let mut fd = open_beneath(&*self.tree, b".", OFlags::PATH).map_err(BackupError::io("open", root))?;
        for name in self.root_place(root)?.names {
            fd = match open_beneath(&fd, &name, OFlags::PATH) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => return Ok(None),
                Err(error) => return Err(BackupError::io("open", root)(error)),
            };
        }
        Ok(Some(fd))
    }
}

/// Says whether to go on before each change of the tree: tests crash here.
#[derive(Debug, Default)]
pub struct CrashPoint {
    /// Changes left until the crash.
    #[cfg(test)]
    pub left: Option<u64>,
}

impl CrashPoint {
    #[cfg(test)]
    pub(in crate::backup) fn pass(&mut self) -> Result<(), BackupError> {
        crate::simulation::disk::change().map_err(|_| BackupError::Crash)?;
        match &mut self.left {
            Some(0) => Err(BackupError::Crash),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps, reason = "the test build does something here")]
    pub(in crate::backup) fn pass(&mut self) -> Result<(), BackupError> {
        Ok(())
    }
}

/// Does one step. Made anew for every step, also for a redo.
pub struct Step<'a> {
    area: &'a Area,
    base: &'a View,
    plan: &'a Plan,
    /// Roots before and after: places of root objects are looked up here too.
    detached: bool,
    dirs: HashMap<ObjectId, Arc<OwnedFd>>,
    payloads: Payloads,
    new_inos: HashMap<ObjectId, u64>,
    sums: Vec<(ObjectId, SumChange)>,
    damage: Vec<(ObjectId, Damage)>,
    /// Files that were made again.
    mended: HashMap<ObjectId, u64>,
    /// How many things of others were moved away.
    displaced: u64,
    buffer: Vec<u8>,
    crash: &'a mut CrashPoint,
}

impl<'a> Step<'a> {
    /// Prepares a step.
    pub fn new(area: &'a Area, base: &'a View, plan: &'a Plan, crash: &'a mut CrashPoint) -> Self {
        Self {
            area,
            base,
            plan,
            detached: false,
            dirs: HashMap::new(),
            payloads: Payloads::new(&area.log),
            new_inos: HashMap::new(),
            sums: Vec::new(),
            damage: Vec::new(),
            mended: HashMap::new(),
            displaced: 0,
            buffer: Vec::new(),
            crash,
        }
    }

    /// Does the step from where it stands. `detached` is called when all displaced objects are
    /// aside and synced; it makes that durable.
    ///
    /// # Errors
    /// Whatever stopped it; the step can be done again.
    pub fn run(
        mut self,
        phase: Phase,
        detached: impl FnOnce() -> Result<(), BackupError>,
    ) -> Result<StepResult, BackupError> {
        // Opened before the first change: its syncfs reports every write-back error after this.
        let sync = reopen_dir(&self.area.tree)?;
        let by_name = mutant::is(Mutant::RedoesByName);
        if (phase == Phase::Planned || by_name) && !self.plan.detach.is_empty() {
            self.detach()?;
            syncfs(&sync)?;
            self.crash.pass()?;
            detached()?;
            self.crash.pass()?;
        }
        self.detached = true;
        self.dirs.clear();
        self.make()?;
        self.write()?;
        self.attach()?;
        self.directories()?;
        if !mutant::is(Mutant::MovesPositionBeforeSync) {
            syncfs(&sync)?;
        }
        self.crash.pass()?;
        self.result()
    }

    /// Empties every place that loses its object.
    fn detach(&mut self) -> Result<(), BackupError> {
        for (place, object) in &self.plan.detach {
            let Some((dir, name)) = self.place(place, false)? else { continue };
            let stat = match tree::stat_at(dir.as_fd(), &name[..]) {
                Ok(stat) => stat,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(BackupError::io("stat", show(&name))(error)),
            };
            if let Err(foreign) = self.check_own(*object, &stat) {
                match self.open(*object, OFlags::PATH) {
                    // It has another name, and this is what somebody put here instead.
                    Ok(_) => self.displace(&dir, &name)?,
                    Err(BackupError::Foreign(_)) => return Err(foreign),
                    Err(error) => return Err(error),
                }
                continue;
            }
            self.crash.pass()?;
            let anchor = anchor(*object);
            let moved = rustix::fs::renameat_with(
                &*dir,
                &name[..],
                &self.area.aside,
                &anchor,
                RenameFlags::NOREPLACE,
            );
            match moved {
                Ok(()) => {}
                // A second link of the same file: it is held aside already.
                Err(Errno::EXIST) if stat.kind != FileKind::Directory => {
                    let aside = tree::stat_at(self.area.aside.as_fd(), &anchor[..])
                        .map_err(BackupError::io("stat", "aside"))?;
                    self.check_own(*object, &aside)?;
                    rustix::fs::unlinkat(&*dir, &name[..], AtFlags::empty())
                        .map_err(BackupError::io("unlink", show(&name)))?;
                }
                Err(error) => return Err(BackupError::io("move aside", show(&name))(error)),
            }
        }
        Ok(())
    }

    /// Whether what was found is the object. An inode number is given again when a file was removed, also to a directory.
    fn check_own(&self, object: ObjectId, found: &FileStat) -> Result<(), BackupError> {
        let known = self.plan.objects.get(&object).and_then(|touched| touched.before.as_ref());
        match known {
            Some(known)
                if (known.ino, known.kind) != (found.ino, found.kind)
                    && !mutant::is(Mutant::RedoesByName) =>
            {
                Err(BackupError::Foreign(is_another(object, known, found)))
            }
            _ => Ok(()),
        }
    }

    /// Makes new objects in `stage/`, unless a redo finds them.
    fn make(&mut self) -> Result<(), BackupError> {
        let plan = self.plan;
        for (object, touched) in &plan.objects {
            let (None, Some(after)) = (&touched.before, &touched.after) else { continue };
            if let Some((dir, name)) = self.locate(*object)? {
                if tree::stat_at(dir.as_fd(), &name[..]).is_ok_and(|there| there.kind == after.kind) {
                    continue;
                }
                self.displace(&dir, &name)?;
            }
            self.crash.pass()?;
            self.make_one(*object, after)?;
        }
        Ok(())
    }

    /// Makes an object in `stage/`, empty and private.
    fn make_one(&self, object: ObjectId, wanted: &Node) -> Result<(), BackupError> {
        let (stage, name) = (&*self.area.stage, anchor(object));
        let private = Mode::RUSR | Mode::WUSR;
        let node = |kind| rustix::fs::mknodat(stage, &name, kind, private, wanted.device);
        let made = match wanted.kind {
            FileKind::Regular => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(stage, &name, flags, private).map(drop)
            }
            FileKind::Directory => rustix::fs::mkdirat(stage, &name, Mode::RWXU),
            FileKind::Symlink => rustix::fs::symlinkat(&wanted.target[..], stage, &name),
            FileKind::Fifo => node(FileType::Fifo),
            FileKind::Socket => node(FileType::Socket),
            FileKind::CharDevice => node(FileType::CharacterDevice),
            FileKind::BlockDevice => node(FileType::BlockDevice),
        };
        made.map_err(BackupError::io("make object", object.to_string()))
    }

    /// Data and attributes of everything but directories.
    fn write(&mut self) -> Result<(), BackupError> {
        let plan = self.plan;
        for (object, touched) in &plan.objects {
            let Some(after) = &touched.after else { continue };
            if after.kind == FileKind::Directory || !touched.attributes {
                continue;
            }
            let content = after.kind == FileKind::Regular
                && (touched.before.is_none() || !touched.change.content.is_empty());
            let access = if content { OFlags::RDWR } else { OFlags::PATH };
            let fd = self.open(*object, access)?;
            self.crash.pass()?;
            if content {
                self.content(*object, &fd, touched)?;
                self.checksums(*object, &fd, touched, after.size)?;
            }
            tree::set_attributes(fd.as_fd(), after.kind, &after.meta, &after.xattrs)
                .map_err(BackupError::io("set the attributes of object", object.to_string()))?;
        }
        Ok(())
    }

    /// Fills the places.
    fn attach(&mut self) -> Result<(), BackupError> {
        let plan = self.plan;
        for (place, object) in &plan.attach {
            let Some((dir, name)) = self.place(place, true)? else {
                return Err(BackupError::Foreign(format!(
                    "the directory that object {object} goes into is missing"
                )));
            };
            let places =
                plan.objects.get(object).and_then(|t| t.after.as_ref()).map_or(0, |n| n.places.len());
            if let Ok(there) = tree::stat_at(dir.as_fd(), &name[..]) {
                let ours = self.open(*object, OFlags::PATH)?;
                let ours = tree::stat_fd(ours.as_fd())
                    .map_err(BackupError::io("stat object", object.to_string()))?;
                // A redo: it is there already.
                if ours.ino == there.ino {
                    continue;
                }
                // Something that we did not put there.
                self.displace(&dir, &name)?;
            }
            let Some((from, old)) = self.locate(*object)? else {
                return Err(BackupError::Foreign(format!("object {object} is missing")));
            };
            self.crash.pass()?;
            if places > 1 {
                // Its other names are made or kept too; what is left in stage or aside goes at
                // the end.
                rustix::fs::linkat(&*from, &old[..], &*dir, &name[..], AtFlags::empty())
                    .map_err(BackupError::io("link", show(&name)))?;
            } else {
                rustix::fs::renameat_with(&*from, &old[..], &*dir, &name[..], RenameFlags::NOREPLACE)
                    .map_err(BackupError::io("move into place", show(&name)))?;
            }
        }
        Ok(())
    }

    /// Attributes of directories, after their last entry.
    fn directories(&mut self) -> Result<(), BackupError> {
        let plan = self.plan;
        for (object, touched) in &plan.objects {
            let Some(after) = &touched.after else { continue };
            if after.kind == FileKind::Directory && touched.attributes {
                let fd = self.open(*object, OFlags::PATH)?;
                self.crash.pass()?;
                tree::set_attributes(fd.as_fd(), after.kind, &after.meta, &after.xattrs)
                    .map_err(BackupError::io("set the attributes of directory", object.to_string()))?;
            }
        }
        Ok(())
    }

    /// What the index will hold.
    fn result(mut self) -> Result<StepResult, BackupError> {
        let plan = self.plan;
        let mut result = StepResult::default();
        for (object, touched) in &plan.objects {
            let mut after = touched.after.clone();
            if let (None, Some(node)) = (&touched.before, &mut after) {
                node.ino = match self.new_inos.get(object) {
                    Some(ino) => *ino,
                    None => {
                        let fd = self.open(*object, OFlags::PATH)?;
                        tree::stat_fd(fd.as_fd())
                            .map_err(BackupError::io("stat object", object.to_string()))?
                            .ino
                    }
                };
            }
            result.objects.push((*object, after));
        }
        result.kept = plan.kept();
        result.sums = self.sums;
        result.damage = self.damage;
        result.extent = plan.extent();
        for place in plan.detach.keys().filter(|p| !plan.attach.contains_key(p)) {
            if let Place::Entry(directory, name) = place {
                result.entries.push((*directory, name.clone(), None));
            }
        }
        for (place, object) in &plan.attach {
            if let Place::Entry(directory, name) = place {
                result.entries.push((*directory, name.clone(), Some(*object)));
            }
        }
        Ok(result)
    }
}

/// Name of an object in `stage/` and `aside/`.
fn anchor(object: ObjectId) -> Vec<u8> {
    object.0.to_string().into_bytes()
}

fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn syncfs(fd: &OwnedFd) -> Result<(), BackupError> {
    durable::file_system(fd).map_err(BackupError::io("sync", "the file system of the tree"))
}

fn reopen_dir(fd: &OwnedFd) -> Result<OwnedFd, BackupError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(fd, c".", flags, Mode::empty()).map_err(BackupError::io("open", "the tree"))
}

/// Tidies up after a finished step in `stage/` and `aside/`: everything goes but objects that have
/// no place. Only when no plan is open.
///
/// # Errors
/// If a folder cannot be read or something not be removed.
pub fn clean(area: &Area, view: &View) -> Result<(), BackupError> {
    for (fd, stage) in [(&area.stage, true), (&area.aside, false)] {
        for name in names(fd, "stage or aside")? {
            let object = name.to_str().ok().and_then(|n| n.parse().ok()).map(ObjectId);
            let node = object.map(|o| view.node(o)).transpose()?.flatten();
            let to = match (node, object) {
                (Some(node), _) if node.places.is_empty() => stage.then_some(&area.aside),
                (None, Some(object)) if view.is_kept(object)? => Some(&area.kept),
                _ => {
                    find::remove(fd.as_fd(), &name)?;
                    None
                }
            };
            if let Some(to) = to {
                rustix::fs::renameat(&**fd, &name, &**to, &name)
                    .map_err(BackupError::io("move away", show(name.to_bytes())))?;
            }
        }
    }
    Ok(())
}

/// The names in a folder.
fn names(fd: &OwnedFd, what: &'static str) -> Result<Vec<CString>, BackupError> {
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::read_from(fd).map_err(BackupError::io("read", what))? {
        let entry = entry.map_err(BackupError::io("read", what))?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}
