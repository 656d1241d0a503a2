//! The file of before-images of one step: what the step overwrites, as it was before.
//!
//! ```text
//! images/GROUP/NNNNNNNNNNNNNNNNNNNN.img      NN..: the checkpoint that the step starts from
//!
//! 0   8   "bfsimg1\n"
//! 8   4   version 1
//! 12  4   CRC32C over bytes 16..48
//! 16  16  group id
//! 32  8   checkpoint before the step
//! 40  8   checkpoint after it
//! 48      lines, each:
//!           u32 bytes of the head, u32 bytes of the data,
//!           u32 CRC32C over the data, u32 CRC32C over these 12 bytes and the head,
//!           the head: a Line as MessagePack, the data: raw bytes of a region
//! ```
//! The last line is [`Line::End`] with the number of lines before it: a file without it was never
//! sealed. The file is written and synced before anything in the tree changes, and never again
//! once the plan row says so. Damage is named, never guessed around.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bfs_common::record::{CheckpointId, GroupId, Name, ObjectId};
use serde::{Deserialize, Serialize};

use super::error::BackupError;
use super::index::Node;
use crate::durable;
use crate::log::sync_dir;

const MAGIC: &[u8; 8] = b"bfsimg1\n";
const VERSION: u32 = 1;
const HEADER: usize = 48;
const WRONG_HEADER: &str = "its first bytes are not those of the images of this step";
/// Where the header has the checkpoint after the step.
const END_AT: u64 = 40;
const PREFIX: usize = 16;
/// Longest head of a line: an object with all the extended attributes that the stream takes.
const HEAD_MAX: usize = 64 << 20;
/// Bytes of a region with one checksum.
pub const BLOCK: usize = 64 << 10;

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Line {
    /// The object, as it was; `None` if it did not exist.
    Object(ObjectId, Option<Node>),
    /// The entry, as it was.
    Entry(ObjectId, Name, Option<ObjectId>),
    /// The bytes of a file from here on are the data of the line: at most [`BLOCK`].
    Bytes(ObjectId, u64),
    /// The file had zeros here: offset and end.
    Zero(ObjectId, u64, u64),
    /// What the file had here is lost: offset and end (since store format 3).
    Unknown(ObjectId, u64, u64),
    /// That was all: so many lines.
    End(u64),
}

/// Bytes in a file of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    /// The file, by the checkpoint before its step.
    pub image: CheckpointId,
    /// Where the block stands in the file.
    pub at: u64,
    /// Bytes of the block.
    pub len: u32,
    /// Its checksum.
    pub crc: u32,
}

/// The file of the step that starts from a checkpoint.
#[must_use]
pub fn path(dir: &Path, from: CheckpointId) -> PathBuf {
    dir.join(format!("{:020}.img", from.0))
}

/// Where a file stands until it takes the place of another one.
fn beside(dir: &Path, from: CheckpointId) -> PathBuf {
    path(dir, from).with_extension("new")
}

/// Puts a sealed file in the place of the one that begins at the same checkpoint, durably.
///
/// # Errors
/// If it cannot be renamed or synced.
pub fn put_in_place(dir: &Path, from: CheckpointId) -> Result<(), BackupError> {
    let path = path(dir, from);
    std::fs::rename(beside(dir, from), &path).map_err(BackupError::io("rename to", &path))?;
    Ok(sync_dir(dir)?)
}

/// Removes what was begun beside a file. What cannot be removed is swept up at the next start.
pub fn give_up(dir: &Path, from: CheckpointId) {
    let _ = std::fs::remove_file(beside(dir, from));
}

/// Bytes that a file of images takes on the disk.
#[must_use]
pub fn allocated(dir: &Path, from: CheckpointId) -> u64 {
    std::fs::metadata(path(dir, from)).map_or(0, |meta| std::os::unix::fs::MetadataExt::blocks(&meta) * 512)
}

/// The checkpoint after the step that begins at one.
///
/// # Errors
/// If its file is missing, or its header damaged.
pub fn step_of(dir: &Path, group: GroupId, from: CheckpointId) -> Result<CheckpointId, BackupError> {
    let path = path(dir, from);
    let mut found = [0; HEADER];
    let file = File::open(&path).map_err(BackupError::io("open", &path))?;
    file.read_exact_at(&mut found, 0).map_err(BackupError::io("read", &path))?;
    end_of(&found, group, from)
        .filter(|to| *to > from)
        .ok_or_else(|| BackupError::corrupt(&path, WRONG_HEADER))
}

/// The checkpoint after the step, if this is the header of its images.
fn end_of(found: &[u8; HEADER], group: GroupId, from: CheckpointId) -> Option<CheckpointId> {
    let to = CheckpointId(u64::from_le_bytes(found[40..48].try_into().expect("8 bytes")));
    (*found == header(group, from, to)).then_some(to)
}

/// The number in the name of a file of images.
#[must_use]
pub fn number(name: &std::ffi::OsStr) -> Option<CheckpointId> {
    name.to_str()?.strip_suffix(".img")?.parse().ok().map(CheckpointId)
}

/// Why an index that is at this checkpoint does not fit to the files, if it does not: a step begins at the applied
/// checkpoint, and done again over files of a later one it would take these for its own.
///
/// # Errors
/// If the folder cannot be read.
pub fn why_too_old(dir: &Path, applied: CheckpointId) -> Result<Option<String>, BackupError> {
    let failed = || BackupError::io("read", dir);
    let mut newest = applied;
    for entry in std::fs::read_dir(dir).map_err(failed())? {
        newest = newest.max(number(&entry.map_err(failed())?.file_name()).unwrap_or(applied));
    }
    let why =
        || format!("an older copy of the index, of checkpoint {applied}: checkpoint {newest} was applied");
    Ok((newest > applied).then(why))
}

fn header(group: GroupId, from: CheckpointId, to: CheckpointId) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..32].copy_from_slice(&group.0);
    header[32..40].copy_from_slice(&from.0.to_le_bytes());
    header[40..48].copy_from_slice(&to.0.to_le_bytes());
    let crc = crc32c::crc32c(&header[16..]);
    header[12..16].copy_from_slice(&crc.to_le_bytes());
    header
}

/// Writes the images of a step.
#[derive(Debug)]
pub struct ImageWriter {
    file: BufWriter<File>,
    path: PathBuf,
    lines: u64,
}

impl ImageWriter {
    /// Begins the file, over one that was never sealed.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn begin(
        dir: &Path,
        group: GroupId,
        from: CheckpointId,
        to: CheckpointId,
    ) -> Result<Self, BackupError> {
        Self::at(path(dir, from), group, from, to)
    }

    /// Begins a file that will take the place of another one: [`put_in_place`].
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn beside(
        dir: &Path,
        group: GroupId,
        from: CheckpointId,
        to: CheckpointId,
    ) -> Result<Self, BackupError> {
        Self::at(beside(dir, from), group, from, to)
    }

    fn at(path: PathBuf, group: GroupId, from: CheckpointId, to: CheckpointId) -> Result<Self, BackupError> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(BackupError::io("make", &path))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header(group, from, to)).map_err(BackupError::io("write", &path))?;
        Ok(Self { file, path, lines: 0 })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn line(&mut self, line: &Line, data: &[u8]) -> Result<(), BackupError> {
        let head = rmp_serde::to_vec(line).expect("lines can be encoded");
        let mut prefix = [0; PREFIX];
        prefix[..4].copy_from_slice(&(head.len() as u32).to_le_bytes());
        prefix[4..8].copy_from_slice(&(data.len() as u32).to_le_bytes());
        prefix[8..12].copy_from_slice(&crc32c::crc32c(data).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&prefix[..12]), &head);
        prefix[12..].copy_from_slice(&crc.to_le_bytes());
        self.lines += 1;
        [&prefix[..], &head, data]
            .iter()
            .try_for_each(|part| self.file.write_all(part))
            .map_err(BackupError::io("write", &self.path))
    }

    /// Ends the file, durably.
    ///
    /// # Errors
    /// If it cannot be written or synced.
    pub fn seal(mut self) -> Result<(), BackupError> {
        self.line(&Line::End(self.lines), b"")?;
        let failed = BackupError::io("write", &self.path);
        let file = self.file.into_inner().map_err(|e| failed(e.into_error()))?;
        durable::data(&file).map_err(BackupError::io("sync", &self.path))?;
        Ok(sync_dir(self.path.parent().unwrap_or(&self.path))?)
    }
}

/// Reads the lines of a sealed file in order; of regions, where their bytes stand. Returns the
/// checkpoint after the step.
///
/// # Errors
/// If it is missing or damaged.
pub fn read(
    dir: &Path,
    group: GroupId,
    from: CheckpointId,
    mut each: impl FnMut(Line, BlockRef) -> Result<(), BackupError>,
) -> Result<CheckpointId, BackupError> {
    let path = path(dir, from);
    let bad = |why: &str| BackupError::corrupt(&path, why);
    let file = File::open(&path).map_err(BackupError::io("open", &path))?;
    let size = file.metadata().map_err(BackupError::io("stat", &path))?.len();
    // Large enough for most lines, and small beside the bytes of a whole block, which are passed over.
    let mut reader = std::io::BufReader::with_capacity(4 << 10, file);
    let failed = |error: std::io::Error| BackupError::io("read", &path)(error);
    let mut found = [0; HEADER];
    reader.read_exact(&mut found).map_err(failed)?;
    let to = end_of(&found, group, from).ok_or_else(|| bad(WRONG_HEADER))?;
    let mut at = HEADER as u64;
    let mut lines = 0;
    loop {
        let mut prefix = [0; PREFIX];
        if size < at + PREFIX as u64 {
            return Err(bad("it ends before its last line"));
        }
        reader.read_exact(&mut prefix).map_err(failed)?;
        let word = |n: usize| u32::from_le_bytes(prefix[n * 4..n * 4 + 4].try_into().expect("4 bytes"));
        let (head_len, data_len) = (word(0) as usize, word(1) as usize);
        let end = at + (PREFIX + head_len + data_len) as u64;
        if head_len > HEAD_MAX || data_len > BLOCK || end > size {
            return Err(bad("a line is longer than the file"));
        }
        let mut head = vec![0; head_len];
        reader.read_exact(&mut head).map_err(failed)?;
        if crc32c::crc32c_append(crc32c::crc32c(&prefix[..12]), &head) != word(3) {
            return Err(bad("the checksum of a line does not fit"));
        }
        let block =
            BlockRef { image: from, at: at + (PREFIX + head_len) as u64, len: data_len as u32, crc: word(2) };
        reader.seek_relative(data_len as i64).map_err(failed)?;
        at = end;
        let line = rmp_serde::from_slice(&head).map_err(|e| bad(&e.to_string()))?;
        if let Line::End(count) = line {
            return if count == lines && at == size { Ok(to) } else { Err(bad("lines are missing")) };
        }
        lines += 1;
        each(line, block)?;
    }
}

/// The bytes of blocks, of files that are held open.
#[derive(Debug)]
pub struct Blocks {
    dir: PathBuf,
    open: HashMap<CheckpointId, File>,
    /// Which step a file is of, by the checkpoint before it.
    steps: HashMap<CheckpointId, CheckpointId>,
}

/// Files of images held open at once.
const OPEN_MAX: usize = 64;

impl Blocks {
    /// Of the files in this folder.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), open: HashMap::new(), steps: HashMap::new() }
    }

    /// The blocks of the file that begins at a checkpoint are of the step to this one.
    pub fn expect(&mut self, from: CheckpointId, to: CheckpointId) {
        self.steps.insert(from, to);
    }

    /// Reads a block and checks it.
    ///
    /// # Errors
    /// If it cannot be read or is damaged; [`BackupError::Merged`] if another file stands there now.
    pub fn read(&mut self, block: BlockRef, into: &mut Vec<u8>) -> Result<(), BackupError> {
        let path = path(&self.dir, block.image);
        if self.open.len() >= OPEN_MAX && !self.open.contains_key(&block.image) {
            self.open.clear();
        }
        let file = match self.open.entry(block.image) {
            std::collections::hash_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                let file = File::open(&path).map_err(BackupError::io("open", &path))?;
                if let Some(to) = self.steps.get(&block.image) {
                    let mut end = [0; 8];
                    file.read_exact_at(&mut end, END_AT).map_err(BackupError::io("read", &path))?;
                    if u64::from_le_bytes(end) != to.0 {
                        return Err(BackupError::Merged(block.image));
                    }
                }
                free.insert(file)
            }
        };
        into.resize(block.len as usize, 0);
        file.read_exact_at(into, block.at).map_err(BackupError::io("read", &path))?;
        if crc32c::crc32c(into) != block.crc {
            let why = format!("{} bytes at {} do not fit their checksum", block.len, block.at);
            return Err(BackupError::corrupt(&path, why));
        }
        Ok(())
    }

    /// Reads a block and checks it; gives `len` bytes of it, without the first `skip`.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, or too short.
    pub fn part<'a>(
        &mut self,
        block: BlockRef,
        skip: u64,
        len: u64,
        into: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], BackupError> {
        self.read(block, into)?;
        let from = skip as usize;
        into.get(from..from + len as usize)
            .ok_or_else(|| BackupError::corrupt(&self.dir, "a block is too short"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId([7; 16]);
    const FROM: CheckpointId = CheckpointId(3);
    const FILE: ObjectId = ObjectId(9);

    fn lines() -> Vec<(Line, Vec<u8>)> {
        let name = Name::new(b"name").unwrap();
        vec![
            (Line::Object(FILE, None), vec![]),
            (Line::Entry(ObjectId(1), name, Some(FILE)), vec![]),
            (Line::Bytes(FILE, 4096), b"some bytes".to_vec()),
            (Line::Zero(FILE, 10, 20), vec![]),
            (Line::Unknown(FILE, 20, 30), vec![]),
        ]
    }

    fn written(dir: &Path) {
        let mut writer = ImageWriter::begin(dir, GROUP, FROM, CheckpointId(4)).unwrap();
        for (line, data) in lines() {
            writer.line(&line, &data).unwrap();
        }
        writer.seal().unwrap();
    }

    fn all(dir: &Path) -> Result<Vec<(Line, Vec<u8>)>, BackupError> {
        let mut found = Vec::new();
        let mut blocks = Blocks::new(dir);
        read(dir, GROUP, FROM, |line, block| {
            let mut data = Vec::new();
            blocks.read(block, &mut data)?;
            found.push((line, data));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        assert_eq!(all(dir.path()).unwrap(), lines());
    }

    #[test]
    fn golden_bytes() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        let bytes = std::fs::read(path(dir.path(), FROM)).unwrap();
        let hex: String = bytes[48..].iter().take(16 + 14).map(|b| format!("{b:02x}")).collect();
        assert_eq!(&bytes[..12], b"bfsimg1\n\x01\0\0\0");
        assert_eq!(hex, GOLDEN);
    }

    const GOLDEN: &str = "0b00000000000000000000004de6c08a81a64f626a6563749209c0100000";

    /// Every cut and every flipped bit is noticed, or leaves what is read as it was.
    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        let path = path(dir.path(), FROM);
        let good = std::fs::read(&path).unwrap();
        for cut in 0..good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            assert!(all(dir.path()).is_err(), "cut at {cut}");
        }
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            assert!(all(dir.path()).is_err(), "bit {bit}");
        }
    }
}
