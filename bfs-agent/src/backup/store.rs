//! The folder of a store: its layout, its lock, its format.
//!
//! ```text
//! STORE/                mode 0700
//!   bfs.lock            flock: one owner; holds the owner's pid
//!   format              "bfs store 7\n"
//!   index.redb          objects, entries, positions, plans
//!   index-copy/         what a lost index is made again from (`index::copy`)
//!   replayer.sock       the owner's socket
//!   log/GROUP/          segments
//!   tree/GROUP/...      the backup files
//!   stage/GROUP/N       object N while it is made
//!   aside/GROUP/N       object N while it has no entry
//!   kept/GROUP/N        object N, which is gone, while generations need it
//!   images/GROUP/N.img  what the step from checkpoint N overwrote
//!   images-at           where images/ is, if it is elsewhere (`elsewhere`)
//!   now/GROUP/...       followers of single files (`follow`)
//!   process/GROUP/      images of the processes of checkpoints (`process`)
//!   receive/GROUP/      a stream of another store while it is taken in
//! ```

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::elsewhere;
use super::error::BackupError;
use crate::lock::Lock;
use crate::log::sync_dir;

/// Format of the store that this release writes. 1 had no checksums of the tree, and 2 did not say which bytes are
/// lost; 3 did not take streams in, and would not finish one that is there as a whole, nor look for
/// before-images elsewhere; 4 knew no promotions, would let in who is fenced, and had no followers; 5 would keep images of processes
/// for ever; 6 would change the index and not its copy. A store of them is taken over and becomes one of 7, because a release that does not
/// know these things would not keep them true.
pub const FORMAT: u32 = 7;
/// The first that has a copy of the index.
pub(super) const FORMAT_OF_COPY: u32 = 7;
/// The oldest that it takes over.
const FORMAT_OLDEST: u32 = 1;

/// What stands in a store for each group.
const FOLDERS: [&str; 9] = ["log", "tree", "stage", "aside", "kept", "images", "now", "receive", "process"];

/// A store that this process owns.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// The folder of the before-images of all groups.
    images: PathBuf,
    _lock: Lock,
}

impl Store {
    /// Opens a store, or makes one of an empty or missing folder, and takes the lock.
    ///
    /// # Errors
    /// [`BackupError`]: in use, of a newer format, not a store.
    pub fn open(path: &Path) -> Result<Self, BackupError> {
        Self::open_with(path, None)
    }

    /// As [`Self::open`]; one that has no before-images yet gets another folder for them, if that is asked for.
    ///
    /// # Errors
    /// As [`Self::open`], and [`BackupError::Images`].
    pub fn open_with(path: &Path, images: Option<&Path>) -> Result<Self, BackupError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(BackupError::io("make", path))?;
        let path = fs::canonicalize(path).map_err(BackupError::io("find", path))?;
        let format = path.join("format");
        let fresh = !format.exists();
        if fresh && !is_empty_or_begun(&path)? {
            return Err(BackupError::NotAStore(path));
        }
        let lock = take_lock(&path)?;
        if fresh {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))
                .map_err(BackupError::io("set the mode of", &path))?;
            for dir in FOLDERS {
                make_dir(&path.join(dir))?;
            }
            write_new(&format, format!("bfs store {FORMAT}\n").as_bytes())?;
        }
        if check_format(&path)? < FORMAT {
            write_new(&format, format!("bfs store {FORMAT}\n").as_bytes())?;
        }
        // Those that a release before this one did not make.
        for dir in FOLDERS {
            make_dir(&path.join(dir))?;
        }
        let images = elsewhere::place(&path, images)?;
        Ok(Self { path, images, _lock: lock })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A folder of a group in one of the [`FOLDERS`]. Made if it is missing.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn group_dir(&self, kind: &str, group: &str) -> Result<PathBuf, BackupError> {
        let all = if kind == "images" { self.images.clone() } else { self.path.join(kind) };
        let dir = all.join(group);
        make_dir(&dir)?;
        Ok(dir)
    }

    /// The folder of the before-images of all groups.
    #[must_use]
    pub fn images(&self) -> &Path {
        &self.images
    }
}

/// Whether a folder is empty but for what a store that was begun may have in it.
fn is_empty_or_begun(path: &Path) -> Result<bool, BackupError> {
    for entry in fs::read_dir(path).map_err(BackupError::io("read", path))? {
        let entry = entry.map_err(BackupError::io("read", path))?;
        let name = entry.file_name();
        let begun = ["bfs.lock", "format.new", "lost+found"];
        if !begun.iter().chain(&FOLDERS).any(|known| name == *known) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn take_lock(store: &Path) -> Result<Lock, BackupError> {
    let path = store.join("bfs.lock");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(BackupError::io("open", &path))?;
    let lock = match Lock::take(file).map_err(BackupError::io("lock", &path))? {
        Ok(lock) => lock,
        Err(mut file) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            return Err(BackupError::InUse { store: store.into(), pid: pid.trim().into() });
        }
    };
    let mut file = lock.file();
    let write = BackupError::io("write", &path);
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(write)?;
    Ok(lock)
}

/// The format of the store that is there, if we know it.
///
/// # Errors
/// [`BackupError::NoStore`], [`BackupError::NewerFormat`] or what reading it says.
pub fn check_format(store: &Path) -> Result<u32, BackupError> {
    let path = store.join("format");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(BackupError::NoStore(store.into()));
        }
        Err(error) => return Err(BackupError::io("read", &path)(error)),
    };
    let found = text.strip_prefix("bfs store ").and_then(|v| v.trim().parse::<u32>().ok());
    match found {
        Some(found) if (FORMAT_OLDEST..=FORMAT).contains(&found) => Ok(found),
        Some(found) if found > FORMAT => {
            Err(BackupError::NewerFormat { store: store.into(), found, known: FORMAT })
        }
        _ => Err(BackupError::corrupt(&path, format!("holds {text:?}, not a format"))),
    }
}

fn make_dir(path: &Path) -> Result<(), BackupError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        // Made before a sync that failed, it may be there and its name not be durable.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(BackupError::io("make", path)(error)),
    }
    Ok(sync_dir(path.parent().unwrap_or(path))?)
}

/// Writes a small file so that it is there as a whole or not at all.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), BackupError> {
    let new = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(BackupError::io("write", path))?;
    Ok(sync_dir(path.parent().unwrap_or(path))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_has_one_owner_and_a_known_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let store = Store::open(&path).unwrap();
        let error = Store::open(&path).unwrap_err();
        let BackupError::InUse { pid, .. } = error else { panic!("{error}") };
        assert_eq!(pid, std::process::id().to_string());
        drop(store);
        drop(Store::open(&path).unwrap());
        // One of an earlier release becomes one of this.
        for earlier in FORMAT_OLDEST..FORMAT {
            fs::write(path.join("format"), format!("bfs store {earlier}\n")).unwrap();
            assert_eq!(check_format(&path).unwrap(), earlier);
            drop(Store::open(&path).unwrap());
            assert_eq!(check_format(&path).unwrap(), FORMAT);
        }
        fs::write(path.join("format"), "bfs store 99\n").unwrap();
        assert!(matches!(Store::open(&path), Err(BackupError::NewerFormat { found: 99, .. })));
        fs::write(path.join("format"), "junk").unwrap();
        assert!(matches!(Store::open(&path), Err(BackupError::Corrupt { .. })));
    }

    #[test]
    fn somebody_elses_folder_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.txt"), "x").unwrap();
        assert!(matches!(Store::open(dir.path()), Err(BackupError::NotAStore(_))));
    }
}
