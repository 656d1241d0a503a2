//! The tree of a checkpoint that was promoted, put where a program expects it: each root at the place that it had,
//! below a directory.
//!
//! It is written as a whole into a folder *inside* of each place (which may be a mount), and synced. What is moved up
//! from there is whole, and until all of it was, the place is closed to everybody but root. Which of the two is being done
//! is written down by whoever owns the store ([`PromoteStage`]), so that it can be gone on with after a crash: before
//! that nothing stands in the places but our folders, and what they have is thrown away; from then on what is left in
//! them is moved.
//!
//! [`PromoteStage`]: bfs_common::wire::PromoteStage

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bfs_common::record::ObjectId;
use rustix::fs::{CWD, RenameFlags};

use super::clones::{Clones, Cost};
use super::restore::{RestoreError, Restored, Work, below};
use super::{Client, Tree};
use crate::tree;

/// What mkfs makes in the directory that a file system is mounted on.
const LOST_FOUND: &str = "lost+found";

/// The places of the roots of a tree.
#[derive(Debug)]
pub struct Places {
    folder: String,
    all: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    root: PathBuf,
    object: ObjectId,
    at: PathBuf,
}

impl Places {
    /// Those of a group below `to`.
    #[must_use]
    pub fn of(group: &str, tree: &Tree, to: &Path) -> Self {
        let place = |(root, object): &(bfs_common::record::PathBytes, ObjectId)| {
            let root = root.as_path().to_owned();
            Place { at: below(to, &root), root, object: *object }
        };
        Self { folder: format!(".bfs-promote-{group}"), all: tree.roots.iter().map(place).collect() }
    }

    /// Each of them.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.all.iter().map(|place| place.at.as_path())
    }

    /// Each root as it was on the primary, and its place here.
    pub fn pairs(&self) -> impl Iterator<Item = (&Path, &Path)> {
        self.all.iter().map(|place| (place.root.as_path(), place.at.as_path()))
    }

    /// Makes the places, with an empty folder of ours in each. Nothing else may stand there.
    ///
    /// # Errors
    /// [`RestoreError::NotEmpty`], or what the system says.
    pub fn begin(&self) -> Result<(), RestoreError> {
        for Place { at, .. } in &self.all {
            if let Some(above) = at.parent() {
                fs::create_dir_all(above).map_err(RestoreError::io("make", above))?;
            }
            match DirBuilder::new().mode(0o700).create(at) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(RestoreError::io("make", at)(e));
                }
                _ => {}
            }
            for entry in fs::read_dir(at).map_err(RestoreError::io("read", at))? {
                let name = entry.map_err(RestoreError::io("read", at))?.file_name();
                let bare = name == LOST_FOUND && is_empty(&at.join(LOST_FOUND));
                if name != *self.folder && !bare {
                    return Err(RestoreError::NotEmpty(at.clone()));
                }
            }
        }
        for Place { at, .. } in &self.all {
            let folder = at.join(&self.folder);
            match fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(RestoreError::io("remove", &folder)(e));
                }
                _ => {}
            }
            DirBuilder::new().mode(0o700).create(&folder).map_err(RestoreError::io("make", &folder))?;
        }
        Ok(())
    }

    /// What a tree is going to cost here, and the bytes that are free. After [`Self::begin`].
    ///
    /// # Errors
    /// What the system says.
    pub fn cost(&self, tree: &Tree, clones: Option<&Clones>) -> Result<(Cost, u64), RestoreError> {
        let Some(place) = self.all.first() else { return Ok((Cost::default(), u64::MAX)) };
        let folder = place.at.join(&self.folder);
        let cost = match clones {
            Some(clones) => clones.cost(tree, &folder).map_err(RestoreError::io("read", &folder))?,
            // Where holes are is not known from afar.
            None => Cost { bytes: 0, shares: false },
        };
        let disk = rustix::fs::statvfs(&folder).map_err(RestoreError::io("stat", &folder))?;
        Ok((cost, disk.f_bavail.saturating_mul(disk.f_frsize)))
    }

    /// Takes our folders away again.
    pub fn give_up(&self) {
        for Place { at, .. } in &self.all {
            // Whoever comes next removes what stays.
            let _ = fs::remove_dir_all(at.join(&self.folder));
        }
    }

    /// Writes the tree into our folders, durably. After [`Self::begin`].
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn write(
        &self,
        client: &mut Client,
        group: &str,
        tree: &Tree,
        clones: Option<&Clones>,
    ) -> Result<Restored, RestoreError> {
        let mut work = Work::new(tree, clones);
        for place in &self.all {
            work.top(self.tree_of(place), &place.root, place.object)?;
        }
        let Some(first) = self.all.first() else { return Ok(Restored::default()) };
        let done = work.finish(client, group, &first.at)?;
        self.sync()?;
        Ok(done)
    }

    fn tree_of(&self, place: &Place) -> PathBuf {
        place.at.join(&self.folder).join("tree")
    }

    /// The places may lie on several file systems.
    fn sync(&self) -> Result<(), RestoreError> {
        for Place { at, .. } in &self.all {
            let sync = File::open(at).map_err(RestoreError::io("open", at))?;
            rustix::fs::syncfs(&sync).map_err(RestoreError::io("sync", at))?;
        }
        Ok(())
    }

    /// Moves what was written to where it belongs, durably; goes on where that was begun.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn put(&self, tree: &Tree) -> Result<(), RestoreError> {
        for place in &self.all {
            let (at, from) = (&place.at, self.tree_of(place));
            match fs::read_dir(&from) {
                Ok(entries) => {
                    for entry in entries {
                        let name = entry.map_err(RestoreError::io("read", &from))?.file_name();
                        let flags = if name == LOST_FOUND && is_empty(&at.join(&name)) {
                            RenameFlags::empty()
                        } else {
                            RenameFlags::NOREPLACE
                        };
                        let (old, new) = (from.join(&name), at.join(&name));
                        rustix::fs::renameat_with(CWD, &old, CWD, &new, flags)
                            .map_err(RestoreError::io("make", &new))?;
                    }
                    fs::remove_dir(&from).map_err(RestoreError::io("remove", &from))?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(RestoreError::io("read", &from)(error)),
            }
            let folder = at.join(&self.folder);
            match fs::remove_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(RestoreError::io("remove", &folder)(error));
                }
                _ => {}
            }
            let node = tree.objects.get(&place.object);
            let node = node.ok_or_else(|| RestoreError::Tree(format!("root {} is missing", place.object)))?;
            let fd = tree::open_path(at).map_err(RestoreError::io("open", at))?;
            tree::set_attributes(fd.as_fd(), node.kind, &node.meta, &node.xattrs)
                .map_err(RestoreError::io("set the attributes of", at))?;
        }
        self.sync()
    }
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}
