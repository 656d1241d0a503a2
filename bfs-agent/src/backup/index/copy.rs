//! The copy of the index: what a lost or spoiled index is made again from.
//!
//! ```text
//! STORE/index-copy/NNNNNNNNNNNNNNNNNNNN.changes    NN..: number of the first change in it
//! STORE/index-copy/NNNNNNNNNNNNNNNNNNNN.whole      NN..: number of the last change that is in it
//!
//! 0   8   "bfsichg\n" or "bfsiall\n"        all integers little-endian
//! 8   4   version 1
//! 12  4   CRC32C over bytes 16..64
//! 16  8   .changes: number of the change before the first; .whole: of the last that is in it
//! 24  32  chain hash after that change
//! 56  8   zeros
//! 64      blocks, each: u32 bytes of the body, u32 kind, u64 number of the change (.whole: as in the header),
//!         u32 CRC32C over the offset of the block in the file (u64) and the 16 bytes before this, u32 CRC32C over the
//!         body; the body:
//!         kind 1: lines ([`Line`]) as MessagePack, one behind the other
//!         kind 2: the end: u64 lines before it, 32 bytes: blake3 of the chain hash before, and of the bodies
//!         kind 3, of .changes only: nothing; another file goes on here, with the change of this number
//! ```
//! Each transaction of the index is a change: its lines are appended and synced *before* the index commits it, with the
//! number and the chain hash of the change in it. So whatever anybody acted on is here, and the index is at the last
//! change that is here or at the one before, which a start makes good. From time to time a whole copy is
//! written beside that (`whole`), so that changes from before it can go. The last two stay.
//!
//! The end of the last file may be torn: a change that has no end block was never acted on. Bytes that are there but do
//! not fit are damage.

pub(super) mod changes;
pub(super) mod whole;

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bfs_common::record::Name;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::error::BackupError;

/// The folder in the store.
const FOLDER: &str = "index-copy";
const VERSION: u32 = 1;
/// Bytes before the first block.
const HEADER: u64 = 64;
const PREFIX: usize = 24;
const LINES: u32 = 1;
const END: u32 = 2;
const GOES_ON: u32 = 3;
const END_LEN: usize = 40;
/// A block is written when it has so many bytes.
const BLOCK: usize = 256 << 10;
/// Longest body: a row with all that the stream lets in, and a block before it.
const BODY_MAX: usize = 80 << 20;

/// What a file is, by its ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Single changes.
    Changes,
    /// All rows.
    Whole,
}

impl Kind {
    const fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Changes => b"bfsichg\n",
            Self::Whole => b"bfsiall\n",
        }
    }

    const fn ending(self) -> &'static str {
        match self {
            Self::Changes => "changes",
            Self::Whole => "whole",
        }
    }
}

/// A row of the index, as it is after a change: packed as in its table, `None` if it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Line {
    /// A group, by name.
    Group(String, Option<Bytes>),
    /// An object, by group number and object.
    Object(u32, u64, Option<Bytes>),
    /// An entry: group number, directory, name, object.
    Entry(u32, u64, Name, Option<u64>),
    /// The plan of a group.
    Plan(u32, Option<Bytes>),
    /// A generation: group number, checkpoint.
    Generation(u32, u64, Option<Bytes>),
    /// A kept file: group number, object, the last checkpoint that had it.
    Kept(u32, u64, Option<u64>),
    /// Checksums: group number, object, row.
    Sums(u32, u64, u64, Option<Bytes>),
    /// What is damaged: group number, object.
    Damage(u32, u64, Option<Bytes>),
}

/// A change, and the chain hash of all up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// Its number; 0 is the empty index, or one that a release without a copy left.
    pub number: u64,
    /// The hash.
    pub chain: [u8; 32],
}

impl Mark {
    /// As a row of the index.
    pub fn encode(&self) -> [u8; 40] {
        let mut out = [0; 40];
        out[..8].copy_from_slice(&self.number.to_le_bytes());
        out[8..].copy_from_slice(&self.chain);
        out
    }

    /// From a row.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 40] = bytes.try_into().ok()?;
        let (number, chain) = bytes.split_at(8);
        Some(Self { number: u64::from_le_bytes(number.try_into().ok()?), chain: chain.try_into().ok()? })
    }
}

/// The folder of the copy.
pub(super) fn folder(store: &Path) -> PathBuf {
    store.join(FOLDER)
}

/// A file of the copy.
pub(super) fn path(dir: &Path, kind: Kind, number: u64) -> PathBuf {
    dir.join(format!("{number:020}.{}", kind.ending()))
}

/// Numbers of the files of a kind, in order; none if there is no folder.
///
/// # Errors
/// If the folder cannot be read.
pub(super) fn files(dir: &Path, kind: Kind) -> Result<Vec<u64>, BackupError> {
    let mut found = Vec::new();
    let all = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        all => all.map_err(BackupError::io("read", dir))?,
    };
    for entry in all {
        let name = entry.map_err(BackupError::io("read", dir))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(kind.ending())?.strip_suffix('.'));
        found.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Whether there is anything of a copy: then there was an index.
///
/// # Errors
/// If the folder cannot be read.
pub(super) fn is_begun(dir: &Path) -> Result<bool, BackupError> {
    Ok(!files(dir, Kind::Changes)?.is_empty() || !files(dir, Kind::Whole)?.is_empty())
}

fn header(kind: Kind, mark: &Mark) -> [u8; HEADER as usize] {
    let mut out = [0; HEADER as usize];
    out[..8].copy_from_slice(kind.magic());
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[16..56].copy_from_slice(&mark.encode());
    let crc = crc32c::crc32c(&out[16..]);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The first bytes of a block, with a checksum of their own: a length that is wrong would make of what is damaged
/// something that was cut off.
fn prefix(at: u64, kind: u32, number: u64, body: &[u8]) -> [u8; PREFIX] {
    let mut out = [0; PREFIX];
    out[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
    out[4..8].copy_from_slice(&kind.to_le_bytes());
    out[8..16].copy_from_slice(&number.to_le_bytes());
    let crc = prefix_crc(at, &out);
    out[16..20].copy_from_slice(&crc.to_le_bytes());
    out[20..].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    out
}

fn prefix_crc(at: u64, prefix: &[u8; PREFIX]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&at.to_le_bytes()), &prefix[..16])
}

/// The block that says that another file goes on with a change, where a file ends at `at`.
pub(super) fn goes_on(at: u64, number: u64) -> [u8; PREFIX] {
    prefix(at, GOES_ON, number, &[])
}

/// Lines that belong together, on their way into a file.
#[derive(Debug)]
pub(super) struct Part {
    number: u64,
    hasher: blake3::Hasher,
    lines: u64,
    body: Vec<u8>,
    at: u64,
}

impl Part {
    /// The lines of this change go behind `at`; `before` is the chain hash up to them.
    pub fn new(number: u64, before: &[u8; 32], at: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(before);
        Self { number, hasher, lines: 0, body: Vec::new(), at }
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn line(&mut self, file: &File, line: &Line) -> std::io::Result<()> {
        rmp_serde::encode::write(&mut self.body, line).expect("lines can be encoded");
        self.lines += 1;
        if self.body.len() >= BLOCK { self.flush(file) } else { Ok(()) }
    }

    fn flush(&mut self, file: &File) -> std::io::Result<()> {
        if !self.body.is_empty() {
            self.hasher.update(&self.body);
            let body = std::mem::take(&mut self.body);
            self.block(file, LINES, &body)?;
            self.body = body;
            self.body.clear();
        }
        Ok(())
    }

    fn block(&mut self, file: &File, kind: u32, body: &[u8]) -> std::io::Result<()> {
        let mut out = Vec::with_capacity(PREFIX + body.len());
        out.extend_from_slice(&prefix(self.at, kind, self.number, body));
        out.extend_from_slice(body);
        file.write_all_at(&out, self.at)?;
        self.at += out.len() as u64;
        Ok(())
    }

    /// Writes what is left, and the end. Returns where the file ends, and the chain hash.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn end(mut self, file: &File) -> std::io::Result<(u64, [u8; 32])> {
        self.flush(file)?;
        let chain = *self.hasher.finalize().as_bytes();
        let mut body = [0; END_LEN];
        body[..8].copy_from_slice(&self.lines.to_le_bytes());
        body[8..].copy_from_slice(&chain);
        self.block(file, END, &body)?;
        Ok((self.at, chain))
    }

    /// Bytes of the file up to here.
    pub const fn at(&self) -> u64 {
        self.at
    }
}

/// How a file ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// With the end of a change.
    Whole,
    /// In the middle of a change, which is cut off.
    Torn,
    /// With bytes that do not fit, and where these are.
    Bad(String),
}

/// What a file has.
#[derive(Debug)]
pub(super) struct Scan {
    /// The change before the first, and all that are whole.
    pub marks: Vec<Mark>,
    /// Where the last one begins.
    pub begin: u64,
    /// And ends.
    pub end: u64,
    /// What is behind it.
    pub tail: Tail,
    /// Another file goes on there.
    pub goes_on: bool,
}

impl Scan {
    /// The change before the first.
    pub fn first(&self) -> Mark {
        self.marks[0]
    }

    /// The last whole one, or the one before the first.
    pub fn last(&self) -> Mark {
        self.marks[self.marks.len() - 1]
    }
}

/// Goes over a file: `each` gets the number of a change, and lines of it as they stand there, also those of the last one
/// if that has no end.
///
/// # Errors
/// If its header does not fit, it cannot be read, or what `each` says.
pub(super) fn scan(
    path: &Path,
    kind: Kind,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), BackupError>,
) -> Result<Scan, BackupError> {
    let file = File::open(path).map_err(BackupError::io("open", path))?;
    let size = file.metadata().map_err(BackupError::io("stat", path))?.len();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut take = |bytes: &mut [u8]| reader.read_exact(bytes).map_err(BackupError::io("read", path));
    let mut found = [0; HEADER as usize];
    if size < HEADER {
        return Err(BackupError::corrupt(path, "is shorter than its header"));
    }
    take(&mut found)?;
    let first = Mark::decode(&found[16..56]).filter(|mark| found == header(kind, mark));
    let first =
        first.ok_or_else(|| BackupError::corrupt(path, "its first bytes are not those of its kind"))?;
    let mut scan = Scan { marks: vec![first], begin: HEADER, end: HEADER, tail: Tail::Whole, goes_on: false };
    let (mut at, mut body) = (HEADER, Vec::new());
    // The change that is being read: its hash and its lines so far.
    let mut part: Option<(blake3::Hasher, u64)> = None;
    loop {
        let left = size - at;
        if left == 0 {
            scan.tail = if part.is_some() { Tail::Torn } else { Tail::Whole };
            return Ok(scan);
        }
        if left < PREFIX as u64 {
            scan.tail = Tail::Torn;
            return Ok(scan);
        }
        let mut prefix = [0; PREFIX];
        take(&mut prefix)?;
        let word = |n: usize| u32::from_le_bytes(prefix[n * 4..n * 4 + 4].try_into().expect("4 bytes"));
        let number = u64::from_le_bytes(prefix[8..16].try_into().expect("8 bytes"));
        let (len, what) = (word(0) as usize, word(1));
        let begins = at;
        let bad = |why: &str| Tail::Bad(format!("at byte {begins}: {why}"));
        let wanted = if kind == Kind::Whole { first.number } else { scan.last().number + 1 };
        if prefix_crc(at, &prefix) != word(4)
            || len > BODY_MAX
            || number != wanted
            || !matches!(what, LINES | END | GOES_ON)
        {
            scan.tail = bad("the beginning of a block does not fit");
            return Ok(scan);
        }
        if left < (PREFIX + len) as u64 {
            scan.tail = Tail::Torn;
            return Ok(scan);
        }
        body.resize(len, 0);
        take(&mut body)?;
        if crc32c::crc32c(&body) != word(5) {
            scan.tail = bad("the checksum of a block does not fit");
            return Ok(scan);
        }
        at += (PREFIX + len) as u64;
        if what == GOES_ON {
            if part.is_some() || kind != Kind::Changes || at != size {
                scan.tail = bad("another file cannot go on here");
            }
            scan.goes_on = true;
            return Ok(scan);
        }
        let (hasher, lines) = part.get_or_insert_with(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&scan.last().chain);
            (hasher, 0)
        });
        if what == LINES {
            hasher.update(&body);
            *lines += count(&body).ok_or_else(|| BackupError::corrupt(path, "has lines that are none"))?;
            each(number, &body)?;
            continue;
        }
        let chain = *hasher.finalize().as_bytes();
        if body.len() != END_LEN || body[..8] != lines.to_le_bytes() || body[8..] != chain {
            scan.tail = bad("the end of a change does not fit to it");
            return Ok(scan);
        }
        part = None;
        scan.marks.push(Mark { number, chain });
        (scan.begin, scan.end) = (scan.end, at);
        if kind == Kind::Whole {
            scan.tail = if at == size { Tail::Whole } else { bad("something stands behind the end") };
            return Ok(scan);
        }
    }
}

/// How many lines these are; `None` if they are none.
fn count(body: &[u8]) -> Option<u64> {
    let mut lines = 0;
    each_line(body, |_| {
        lines += 1;
        Ok::<_, BackupError>(())
    })
    .ok()?;
    Some(lines)
}

/// The lines of a block.
///
/// # Errors
/// If they are none, or what `each` says.
pub(super) fn each_line(
    body: &[u8],
    mut each: impl FnMut(Line) -> Result<(), BackupError>,
) -> Result<(), BackupError> {
    let mut from = rmp_serde::Deserializer::new(body);
    while !from.get_ref().is_empty() {
        let line = Line::deserialize(&mut from);
        each(line.map_err(|error| BackupError::corrupt(FOLDER, error))?)?;
    }
    Ok(())
}
