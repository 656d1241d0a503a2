//! Room: what the steps that are not applied are going to need, kept free for them.
//!
//! [`Need`] is pure: an upper bound, record by record, of what a step takes until it is applied: new bytes, and
//! before-images of what they overwrite. [`Room`] is the account of a whole store. Groups note what they need, and
//! nothing more is taken, and above all no checkpoint confirmed, unless all of that and a margin are free. The
//! margin is for what no estimate has: journals, directories, the index and its copy.
//!
//! It is an account and not a file with allocated blocks, because such a file holds blocks only: no inodes, no
//! directory blocks, nothing that a copy-on-write file system needs to write in place; and it has to be given
//! back before a step begins, which is when the room is needed. Whoever fills the disk beside us makes a step
//! wait, named, never half done.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bfs_common::record::{FileKind, ObjectId, Record};
use bfs_common::wire::FRAME_MAX;

use super::plan::Plan;

/// So much stays free, or a twentieth of a small file system.
const MARGIN_MAX: u64 = 256 << 20;
/// Inodes that stay free.
const MARGIN_INODES: u64 = 64;
/// What a file system gives out at once.
const BLOCK: u64 = 4096;
/// Bytes of an entry or an attribute in a directory, and of a row of the index, with the pages that are copied for it.
const ROW: u64 = 1024;

/// What is needed until a step is applied, at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Bytes where the tree stands.
    pub tree: u64,
    /// Bytes where images and index stand.
    pub store: u64,
    /// Inodes where the tree stands.
    pub inodes: u64,
}

impl std::ops::AddAssign for Need {
    fn add_assign(&mut self, other: Self) {
        self.tree = self.tree.saturating_add(other.tree);
        self.store = self.store.saturating_add(other.store);
        self.inodes = self.inodes.saturating_add(other.inodes);
    }
}

/// Bytes of the blocks that a range touches; whatever a record says, it does not overflow.
fn blocks(start: u64, end: u64) -> u64 {
    end.div_ceil(BLOCK).saturating_sub(start / BLOCK).saturating_mul(BLOCK)
}

impl Need {
    /// Of one record. Objects up to `old` were there before the step, 0 if there are no images of it; `size` asks
    /// for the size that one had then.
    #[must_use]
    pub fn of(record: &Record, payload: u64, old: ObjectId, size: impl FnOnce(ObjectId) -> u64) -> Self {
        let image = |object: ObjectId, bytes: u64| if object <= old { bytes.saturating_add(ROW) } else { 0 };
        match record {
            Record::Object { kind, .. } => {
                let tree = if *kind == FileKind::Directory { BLOCK } else { payload };
                Self { tree, store: ROW, inodes: 1 }
            }
            Record::EntrySet { .. } | Record::EntryDelete { .. } => Self { tree: ROW, store: ROW, inodes: 0 },
            Record::Write { object, offset } => Self {
                tree: blocks(*offset, offset.saturating_add(payload)),
                store: image(*object, payload),
                inodes: 0,
            },
            // A hole may end in blocks of which the rest stays.
            Record::Zero { object, length, .. } => {
                Self { tree: 2 * BLOCK, store: image(*object, *length), inodes: 0 }
            }
            Record::Truncate { object, .. } if *object <= old => {
                Self { tree: BLOCK, store: size(*object).saturating_add(ROW), inodes: 0 }
            }
            Record::XattrSet { .. } => Self { tree: payload.max(BLOCK), store: payload + ROW, inodes: 0 },
            _ => Self::default(),
        }
    }

    /// Of a step that is planned: what it will really take, where [`Need::of`] counts bytes that were written
    /// twice twice.
    #[must_use]
    pub fn of_plan(plan: &Plan, images: bool) -> Self {
        let mut need = Self::default();
        for touched in plan.objects.values() {
            let size = touched.after.as_ref().map_or(0, |n| n.size);
            let written = touched.change.content.extents.iter();
            let written = written.filter(|(start, ..)| *start < size);
            need.tree += written.map(|(start, end, _)| blocks(start, end.min(size))).sum::<u64>();
            need.tree +=
                touched.change.xattrs.values().flatten().map(|v| v.len() as u64 + BLOCK).sum::<u64>();
            need.store += 2 * ROW;
            match (&touched.before, &touched.after) {
                (Some(before), Some(_)) if images => {
                    need.store +=
                        touched.change.content.lost(before.size).iter().map(|(s, e)| e - s).sum::<u64>();
                }
                (None, Some(after)) => {
                    need.inodes += 1;
                    need.tree += if after.kind == FileKind::Directory { BLOCK } else { 0 };
                }
                _ => {}
            }
        }
        let places = (plan.attach.len() + plan.detach.len()) as u64;
        need.tree += places * ROW;
        need.store += places * ROW;
        need
    }
}

/// A file system that a group works on.
#[derive(Debug)]
pub struct Disk {
    fd: std::os::fd::OwnedFd,
    device: u64,
}

impl Disk {
    /// That of this folder.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(folder: impl AsFd) -> std::io::Result<Self> {
        let fd = folder.as_fd().try_clone_to_owned()?;
        let device = rustix::fs::fstat(&fd)?.st_dev;
        Ok(Self { fd, device })
    }

    /// Bytes of the whole file system.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        let now = rustix::fs::fstatvfs(&self.fd).ok()?;
        Some(now.f_blocks * now.f_frsize)
    }

    /// Free bytes, those of them that are the margin, and free inodes. What cannot be asked is found out by
    /// writing.
    fn free(&self) -> Option<(u64, u64, u64)> {
        let now = rustix::fs::fstatvfs(&self.fd).ok()?;
        let (free, all) = (now.f_bavail * now.f_frsize, now.f_blocks * now.f_frsize);
        // Some count no inodes.
        let inodes = if now.f_files == 0 { u64::MAX } else { now.f_favail };
        Some((free, MARGIN_MAX.min(all / 20), inodes))
    }
}

/// The file systems of a group; often the same.
#[derive(Debug)]
pub struct Disks {
    /// Of log and index.
    pub store: Disk,
    /// Of the tree.
    pub tree: Disk,
    /// Of the before-images.
    pub images: Disk,
}

impl Disks {
    /// Whether before-images and log stand on the same one.
    #[must_use]
    pub fn images_beside_log(&self) -> bool {
        self.images.device == self.store.device
    }
}

/// What is too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    /// Bytes (or inodes) that are free.
    pub free: u64,
    /// That have to be.
    pub needed: u64,
    /// They are inodes.
    pub inodes: bool,
}

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { free, needed, inodes } = *self;
        let what = |n: u64| {
            if inodes { format!("{n} inodes") } else { format!("{:.1} MiB", n as f64 / 1_048_576.0) }
        };
        write!(
            f,
            "the disk is full: {} are free, {} are needed to apply what is here; make room, then it goes on by itself",
            what(free),
            what(needed)
        )
    }
}

/// The account of a store.
#[derive(Debug, Default)]
pub struct Room(Mutex<BTreeMap<u32, Vec<(u64, Need)>>>);

impl Room {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Vec<(u64, Need)>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A group needs so much now, for all that it took and did not apply.
    pub fn note(&self, group: u32, disks: &Disks, need: Need) {
        let tree = Need { store: 0, ..need };
        let store = Need { store: need.store, ..Need::default() };
        let mut all = vec![(disks.tree.device, tree), (disks.store.device, store)];
        if disks.images.device != disks.store.device {
            // Which part of it are images is not known: there is room for all of it on both.
            all.push((disks.images.device, store));
        }
        self.lock().insert(group, all);
    }

    /// Whether all that is needed is free where this group works, and `more` bytes for its log or its followers.
    ///
    /// # Errors
    /// What is too little.
    pub fn check(&self, disks: &Disks, more: u64) -> Result<(), Short> {
        self.check_all(&[(&disks.store, more), (&disks.tree, 0), (&disks.images, 0)])
    }

    /// Whether what all groups need on the disk of log and index is free, and `more` bytes.
    ///
    /// # Errors
    /// What is too little.
    pub fn check_store(&self, store: &Disk, more: u64) -> Result<(), Short> {
        self.check_all(&[(store, more)])
    }

    /// As [`Self::check`], with `more` bytes for before-images.
    ///
    /// # Errors
    /// What is too little.
    pub fn check_images(&self, disks: &Disks, more: u64) -> Result<(), Short> {
        self.check_all(&[(&disks.store, 0), (&disks.tree, 0), (&disks.images, more)])
    }

    fn check_all(&self, disks: &[(&Disk, u64)]) -> Result<(), Short> {
        for (disk, more) in disks {
            let Some((free, margin, inodes)) = disk.free() else { continue };
            let mut all = Need::default();
            for (_, need) in self.lock().values().flatten().filter(|(device, _)| *device == disk.device) {
                all += *need;
            }
            let needed = all.tree.saturating_add(all.store).saturating_add(margin + *more);
            if free < needed {
                return Err(Short { free, needed, inodes: false });
            }
            if all.inodes > 0 && inodes < all.inodes + MARGIN_INODES {
                return Err(Short { free: inodes, needed: all.inodes + MARGIN_INODES, inodes: true });
            }
        }
        Ok(())
    }

    /// Whether room is so short that only generations that must be kept should stay: beyond what is needed there
    /// is less than a second margin, or than a frame.
    #[must_use]
    pub fn is_short(&self, disks: &Disks) -> bool {
        let margin = |disk: &Disk| disk.free().map_or(0, |(_, margin, _)| margin).max(FRAME_MAX as u64);
        let (store, images) = (margin(&disks.store), margin(&disks.images));
        self.check_all(&[(&disks.store, store), (&disks.tree, 0), (&disks.images, images)]).is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::{Identity, Meta, Name};

    const OLD: ObjectId = ObjectId(9);

    fn of(record: &Record, payload: u64) -> Need {
        Need::of(record, payload, OLD, |_| 5000)
    }

    #[test]
    fn what_is_overwritten_is_needed_twice_and_what_is_new_once() {
        let write = |object, offset| Record::Write { object: ObjectId(object), offset };
        assert_eq!(of(&write(9, 4000), 200), Need { tree: 8192, store: 200 + ROW, inodes: 0 });
        assert_eq!(of(&write(10, 0), 4096), Need { tree: 4096, store: 0, inodes: 0 });
        assert_eq!(of(&write(10, u64::MAX - 5), 4096), Need { tree: 4096, store: 0, inodes: 0 });
        let hole = Record::Zero { object: ObjectId(9), offset: 0, length: u64::MAX };
        assert_eq!(of(&hole, 0).store, u64::MAX);
        let cut = |object| Record::Truncate { object: ObjectId(object), size: 0 };
        assert_eq!(of(&cut(3), 0).store, 5000 + ROW);
        assert_eq!(of(&cut(10), 0), Need::default());
        let name = Name::new(b"n").unwrap();
        let entry = Record::EntrySet { directory: OLD, name, object: OLD };
        assert_eq!(of(&entry, 0), Need { tree: ROW, store: ROW, inodes: 0 });
        let new = Record::Object {
            object: ObjectId(10),
            identity: Identity::default(),
            kind: FileKind::Directory,
            device: 0,
            meta: Meta::default(),
        };
        assert_eq!(of(&new, 0), Need { tree: BLOCK, store: ROW, inodes: 1 });
    }

    #[test]
    fn groups_share_an_account() {
        let dir = tempfile::tempdir().unwrap();
        let disk = || Disk::of(std::fs::File::open(dir.path()).unwrap()).unwrap();
        let disks = Disks { store: disk(), tree: disk(), images: disk() };
        let room = Room::default();
        let (free, margin, _) = disks.store.free().unwrap();
        assert_eq!(room.check(&disks, 0), Ok(()), "{free} bytes are free: the test needs some");
        let half = Need { tree: (free - margin) / 2, store: 0, inodes: 0 };
        room.note(1, &disks, half);
        assert_eq!(room.check(&disks, 0), Ok(()));
        room.note(2, &disks, Need { store: half.tree + (64 << 20), ..Need::default() });
        let short = room.check(&disks, 0).unwrap_err();
        assert!(short.needed > short.free && !short.inodes && short.to_string().contains("disk is full"));
        room.note(1, &disks, Need::default());
        assert_eq!(room.check(&disks, 0), Ok(()));
        assert!(room.check(&disks, free).is_err() && !room.is_short(&disks));
    }
}
