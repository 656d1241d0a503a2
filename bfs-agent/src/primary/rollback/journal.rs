//! The intent of a rollback, durable: everything that finishing it needs, so that no backup is
//! needed any more.
//!
//! ```text
//! BESIDE/.bfs-rollback-GROUP/    beside the subtree, or in it where that is a mount of its own
//!   journal                      "bfsroll1", blake3 of the rest, the Journal as MessagePack
//!   detached                     everything displaced stands in aside/, durably
//!   new/INODE  data/INODE  aside/INODE
//! ```
//! The folder of the first root holds journal and mark; those of roots on other file systems only
//! the rest.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use bfs_common::record::{CheckpointId, FileKind, Meta, Name, PathBytes};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::RollbackError;
use crate::primary::mount_table;

const MAGIC: &[u8; 8] = b"bfsroll1";

/// An inode, in a form that outlives a reboot: a root on its file system, number, generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// Index of the first root on its file system.
    pub root: u32,
    /// Number.
    pub ino: u64,
    /// Generation.
    pub generation: u32,
}

impl Key {
    /// Its name in the staging folder.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}-{}", self.ino, self.generation)
    }
}

/// New bytes of a file that stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytewise {
    /// Ranges (offset and end) whose bytes stand in `data/`, at the same offsets.
    pub ranges: Vec<(u64, u64)>,
}

/// What an object is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Its inode.
    pub key: Key,
    /// Where it stands at the end, for messages.
    pub path: PathBytes,
    /// Type.
    pub kind: FileKind,
    /// Attributes.
    pub meta: Meta,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(String, Bytes)>,
    /// Size of a regular file.
    pub size: u64,
    /// blake3 of its bytes, if it was made; of those in `bytes`, if it stays.
    pub content: Option<[u8; 32]>,
    /// What is written into it; `None` if its bytes are right.
    pub bytes: Option<Bytewise>,
}

/// The intent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// The group.
    pub group: String,
    /// Where it goes back to.
    pub checkpoint: CheckpointId,
    /// The subtrees.
    pub roots: Vec<PathBytes>,
    /// Places that lose what they name: directory, name, what.
    pub detach: Vec<(Key, Name, Key)>,
    /// Places that are filled: directory, name, what, whether that is a directory.
    pub attach: Vec<(Key, Name, Key, bool)>,
    /// Objects whose attributes or bytes are set.
    pub objects: Vec<Wanted>,
}

/// Name of the staging folder.
#[must_use]
pub fn folder_name(group: &str) -> Name {
    Name::new(format!(".bfs-rollback-{group}").as_bytes()).expect("a group's name is a part of a file name")
}

/// Where the staging folder of a root is, or would be.
///
/// # Errors
/// If the root cannot be looked at.
pub fn folder(root: &Path, group: &str) -> io::Result<PathBuf> {
    let name = folder_name(group);
    let own = fs::metadata(root)?.dev();
    let beside = root.parent().filter(|p| fs::metadata(p).is_ok_and(|m| m.dev() == own));
    // A folder beside it on the same device, but over a mount of its own, would not do.
    let beside = beside.filter(|_| !is_mount(root));
    Ok(beside.unwrap_or(root).join(name.as_os_str()))
}

/// Whether something is mounted at a path.
fn is_mount(path: &Path) -> bool {
    mounts().iter().any(|mount| mount == path)
}

/// Where file systems are mounted.
#[must_use]
pub fn mounts() -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    mount_table::lines(&table).map(|line| line.point).collect()
}

/// Makes the folders of staging, empty ones.
///
/// # Errors
/// If that is not possible.
pub fn make_folder(at: &Path) -> Result<(), RollbackError> {
    remove_folder(at)?;
    for path in [at.to_owned(), at.join("new"), at.join("data"), at.join("aside")] {
        DirBuilder::new().mode(0o700).create(&path).map_err(RollbackError::io("make", &path))?;
    }
    Ok(())
}

/// Removes staging: the intent first, so that what is left after a crash means nothing.
///
/// # Errors
/// If that is not possible.
pub fn remove_folder(at: &Path) -> Result<(), RollbackError> {
    let journal = at.join("journal");
    match fs::remove_file(&journal) {
        Ok(()) => sync(at)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(RollbackError::io("remove", &journal)(error)),
    }
    match fs::remove_dir_all(at) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RollbackError::io("remove", at)(e)),
        _ => Ok(()),
    }
}

/// Syncs a directory or file.
///
/// # Errors
/// What the system says.
pub fn sync(path: &Path) -> Result<(), RollbackError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(RollbackError::io("sync", path))
}

impl Journal {
    /// Writes it durably: from here on it is the intent.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), RollbackError> {
        let body = rmp_serde::to_vec_named(self).expect("a journal can be encoded");
        let (new, path) = (folder.join("journal.new"), folder.join("journal"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(MAGIC)?;
            file.write_all(blake3::hash(&body).as_bytes())?;
            file.write_all(&body)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(RollbackError::io("write", &path))?;
        sync(folder)
    }

    /// The intent in a folder; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn read(folder: &Path) -> Result<Option<Self>, RollbackError> {
        let path = folder.join("journal");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(RollbackError::io("read", &path)(error)),
        };
        let bad = |why: &str| RollbackError::Journal { path: path.clone(), why: why.into() };
        if bytes.len() < 40 || bytes[..8] != *MAGIC {
            return Err(bad("it does not begin as a journal does"));
        }
        if blake3::hash(&bytes[40..]).as_bytes()[..] != bytes[8..40] {
            return Err(bad("its checksum does not fit"));
        }
        rmp_serde::from_slice(&bytes[40..]).map(Some).map_err(|e| bad(&e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        let key = |ino| Key { root: 0, ino, generation: 7 };
        let name = Name::new(b"na\xffme").unwrap();
        Journal {
            group: "g".into(),
            checkpoint: CheckpointId(4),
            roots: vec![PathBytes::new("/srv/data".as_ref())],
            detach: vec![(key(1), name.clone(), key(2))],
            attach: vec![(key(1), name, key(3), true)],
            objects: vec![Wanted {
                key: key(3),
                path: PathBytes::new("/srv/data/x".as_ref()),
                kind: FileKind::Regular,
                meta: Meta::default(),
                xattrs: vec![("user.x".into(), Bytes::from_static(b"v"))],
                size: 9,
                content: Some([3; 32]),
                bytes: Some(Bytewise { ranges: vec![(0, 4)] }),
            }],
        }
    }

    #[test]
    fn what_is_written_is_read_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Journal::read(dir.path()).unwrap(), None);
        journal().write(dir.path()).unwrap();
        assert_eq!(Journal::read(dir.path()).unwrap(), Some(journal()));
        let path = dir.path().join("journal");
        let good = fs::read(&path).unwrap();
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            assert!(Journal::read(dir.path()).is_err(), "cut at {cut}");
        }
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &flipped).unwrap();
            assert!(Journal::read(dir.path()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(mounts().contains(&PathBuf::from("/")));
    }
}
