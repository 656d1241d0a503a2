//! Before-images on another disk: where, and that it is there.
//!
//! ```text
//! STORE/images-at     "bfs images 1\n", `begun` or `used`, an identity, and the folder: each on a line
//! DIR/bfs-images      "bfs images 1\n", the same identity
//! ```
//! The folder is chosen before the store has any before-image, and stays. What the store says comes first, durably, then
//! the mark in the folder, then that it is used: from then on a folder without the mark is another disk, or none, and
//! nothing is read or written there. The identity tells stores apart, so two do not share a folder.

use std::fs::{self, DirBuilder};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::error::BackupError;
use super::images;
use super::store::write_new;

const FIRST_LINE: &[u8] = b"bfs images 1";
const RECORD: &str = "images-at";
const MARK: &str = "bfs-images";
/// Longest that either file can be.
const LENGTH_MAX: usize = 8192;

/// What the store says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    /// The folder has the mark.
    used: bool,
    /// Hexadecimal.
    identity: String,
    folder: PathBuf,
}

impl Record {
    fn bytes(&self) -> Vec<u8> {
        let state = if self.used { "used" } else { "begun" };
        let parts =
            [FIRST_LINE, state.as_bytes(), self.identity.as_bytes(), self.folder.as_os_str().as_bytes()];
        parts.join(&b'\n')
    }

    fn of(bytes: &[u8]) -> Option<Self> {
        let mut lines = bytes.splitn(4, |byte| *byte == b'\n');
        let (first, state, identity) = (lines.next()?, lines.next()?, lines.next()?);
        let folder = PathBuf::from(std::ffi::OsString::from_vec(lines.next()?.to_vec()));
        let identity = std::str::from_utf8(identity).ok()?.to_owned();
        let sound = identity.len() == 32 && identity.bytes().all(|byte| byte.is_ascii_hexdigit());
        let used = match state {
            b"used" => true,
            b"begun" => false,
            _ => return None,
        };
        (first == FIRST_LINE && sound && folder.is_absolute()).then_some(Self { used, identity, folder })
    }

    fn read(store: &Path) -> Result<Option<Self>, BackupError> {
        let path = store.join(RECORD);
        let Some(bytes) = small(&path)? else { return Ok(None) };
        Self::of(&bytes)
            .map(Some)
            .ok_or_else(|| BackupError::corrupt(&path, "does not say where the images are"))
    }

    fn write(&self, store: &Path) -> Result<(), BackupError> {
        write_new(&store.join(RECORD), &self.bytes())
    }

    fn mark(&self) -> Vec<u8> {
        [FIRST_LINE, self.identity.as_bytes(), b""].join(&b'\n')
    }
}

/// The bytes of a short file; none if it is not there.
fn small(path: &Path) -> Result<Option<Vec<u8>>, BackupError> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(BackupError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(LENGTH_MAX as u64).read_to_end(&mut bytes).map_err(BackupError::io("read", path))?;
    Ok(Some(bytes))
}

fn refused(folder: &Path, why: impl Into<String>) -> BackupError {
    BackupError::Images { folder: folder.into(), why: why.into() }
}

/// Where the before-images of a store are, if they are elsewhere; as it says, without a look there.
///
/// # Errors
/// If what it says cannot be read.
pub fn recorded(store: &Path) -> Result<Option<PathBuf>, BackupError> {
    Ok(Record::read(store)?.map(|record| record.folder))
}

/// Where the before-images of a store that this process owns are. `asked`: where they are to be.
///
/// # Errors
/// [`BackupError::Images`] if they are not there, or cannot be there.
pub fn place(store: &Path, asked: Option<&Path>) -> Result<PathBuf, BackupError> {
    let record = match (Record::read(store)?, asked) {
        (None, None) => return Ok(store.join("images")),
        (Some(record), None) => record,
        (Some(record), Some(asked)) => {
            let asked = fs::canonicalize(asked).unwrap_or_else(|_| asked.into());
            if asked != record.folder {
                let why = format!(
                    "the store has its before-images in {}: start without --images, or with that folder",
                    record.folder.display()
                );
                return Err(refused(&asked, why));
            }
            record
        }
        (None, Some(asked)) => begin(store, asked)?,
    };
    is_there(store, record)
}

/// A store without before-images gets a folder for them.
fn begin(store: &Path, asked: &Path) -> Result<Record, BackupError> {
    DirBuilder::new().recursive(true).mode(0o700).create(asked).map_err(BackupError::io("make", asked))?;
    let folder = fs::canonicalize(asked).map_err(BackupError::io("find", asked))?;
    if folder.starts_with(store) || store.starts_with(&folder) {
        return Err(refused(
            &folder,
            format!("it overlaps the store {}: give a folder outside of it", store.display()),
        ));
    }
    if has_images(&store.join("images"))? {
        let why = "the store has before-images of its own already: --images is for a store that has none yet";
        return Err(refused(&folder, why));
    }
    if folder.join(MARK).exists() {
        return Err(refused(&folder, "another store has its before-images there: give a folder of its own"));
    }
    if !is_empty(&folder)? {
        return Err(refused(&folder, "it is not empty: give a folder of its own"));
    }
    let mut random = [0; 16];
    let source = Path::new("/dev/urandom");
    let drawn = fs::File::open(source).and_then(|mut file| file.read_exact(&mut random));
    drawn.map_err(BackupError::io("read", source))?;
    let identity = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let record = Record { used: false, identity, folder };
    record.write(store)?;
    Ok(record)
}

/// That the folder has the mark; one that was begun gets it.
fn is_there(store: &Path, mut record: Record) -> Result<PathBuf, BackupError> {
    let mark = small(&record.folder.join(MARK))?;
    match mark {
        Some(found) if found == record.mark() => {}
        Some(_) => {
            return Err(refused(&record.folder, "another store has its before-images there"));
        }
        None if !record.used && record.folder.is_dir() && is_empty(&record.folder)? => {
            write_new(&record.folder.join(MARK), &record.mark())?;
        }
        None => {
            let why = "the before-images of the store are not there: is the disk mounted?";
            return Err(refused(&record.folder, why));
        }
    }
    if !record.used {
        record.used = true;
        record.write(store)?;
    }
    Ok(record.folder)
}

fn is_empty(folder: &Path) -> Result<bool, BackupError> {
    for entry in fs::read_dir(folder).map_err(BackupError::io("read", folder))? {
        let name = entry.map_err(BackupError::io("read", folder))?.file_name();
        // A mark that was not finished counts for nothing.
        if name != "lost+found" && name != "bfs-images.new" {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a group has before-images below a folder.
fn has_images(folder: &Path) -> Result<bool, BackupError> {
    let names = |folder: &Path| -> Result<Vec<PathBuf>, BackupError> {
        let all = match fs::read_dir(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            all => all.map_err(BackupError::io("read", folder))?,
        };
        all.map(|entry| Ok(entry.map_err(BackupError::io("read", folder))?.path())).collect()
    };
    for group in names(folder)? {
        let found = names(&group)?;
        if found.iter().any(|path| path.file_name().is_some_and(|name| images::number(name).is_some())) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else_is() {
        let record =
            Record { used: true, identity: "0123456789abcdef".repeat(2), folder: "/disk/of\nimages".into() };
        assert_eq!(record.bytes(), b"bfs images 1\nused\n0123456789abcdef0123456789abcdef\n/disk/of\nimages");
        assert_eq!(Record::of(&record.bytes()), Some(record.clone()));
        assert_eq!(
            Record::of(&Record { used: false, ..record.clone() }.bytes()).map(|r| r.used),
            Some(false)
        );
        let text = String::from_utf8(record.bytes()).unwrap();
        for wrong in [
            text.replace("bfs images 1", "bfs images 2"),
            text.replace("used", "use"),
            text.replace("cdef0", "cdeg0"),
            text.replace("/disk", "disk"),
            text[..40].to_owned(),
            String::new(),
        ] {
            assert_eq!(Record::of(wrong.as_bytes()), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_folder_is_one_stores_and_stays_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let (store, other, disk) = (root.join("store"), root.join("other"), root.join("disk"));
        fs::create_dir(&store).unwrap();
        fs::create_dir(&other).unwrap();
        let why = |result: Result<PathBuf, BackupError>| result.unwrap_err().to_string();
        assert_eq!(place(&store, None).unwrap(), store.join("images"));
        for overlapping in [&store, &store.join("x"), &root] {
            assert!(why(place(&store, Some(overlapping))).contains("overlaps the store"), "{overlapping:?}");
        }
        fs::write(root.join("thesis.txt"), "x").unwrap();
        let full = root.join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("thesis.txt"), "x").unwrap();
        assert!(why(place(&store, Some(&full))).contains("not empty"));
        assert_eq!(recorded(&store).unwrap(), None, "what is refused is not recorded");
        assert_eq!(place(&store, Some(&disk)).unwrap(), disk);
        for asked in [None, Some(disk.as_path())] {
            assert_eq!(place(&store, asked).unwrap(), disk);
        }
        assert!(why(place(&store, Some(&full))).contains("has its before-images in"));
        assert!(why(place(&other, Some(&disk))).contains("another store"));
        // Not mounted, or another disk in its place.
        let away = root.join("away");
        fs::rename(&disk, &away).unwrap();
        assert!(why(place(&store, None)).contains("is the disk mounted?"));
        fs::create_dir(&disk).unwrap();
        assert!(why(place(&store, None)).contains("is the disk mounted?"));
        fs::remove_dir(&disk).unwrap();
        assert_eq!(place(&other, Some(&disk)).unwrap(), disk);
        assert!(why(place(&store, None)).contains("another store"));
        fs::remove_dir_all(&disk).unwrap();
        fs::rename(&away, &disk).unwrap();
        assert_eq!(place(&store, None).unwrap(), disk);
    }

    #[test]
    fn what_was_begun_is_finished_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let (store, disk) = (root.join("store"), root.join("disk"));
        fs::create_dir(&store).unwrap();
        let record = begin(&store, &disk).unwrap();
        assert!(!record.used);
        fs::write(disk.join("bfs-images.new"), "bfs").unwrap();
        assert_eq!(place(&store, None).unwrap(), disk);
        fs::remove_file(disk.join(MARK)).unwrap();
        assert!(place(&store, None).is_err(), "it is used");
        // A store with images of its own keeps them.
        let other = root.join("other");
        fs::create_dir_all(other.join("images/g")).unwrap();
        fs::write(other.join("images/g/00000000000000000001.img"), "").unwrap();
        let error = place(&other, Some(&root.join("more"))).unwrap_err();
        assert!(error.to_string().contains("before-images of its own"), "{error}");
    }
}
