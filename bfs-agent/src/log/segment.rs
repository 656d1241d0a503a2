//! One segment of a log.
//!
//! ```text
//! 0    8   "bfslog1\n"
//! 8    4   version: 1, or 2 in a file that was a segment before     all integers little-endian
//! 12   4   CRC32C over bytes 0..12 and 16..104
//! 16   16  group id
//! 32   8   sequence number of the first record
//! 40   8   epoch before it
//! 48   32  chain hash before it
//! 80   8   in version 2 the mark of its commits, drawn by lot; else zeros
//! 88   16  zeros
//! 104  8   bytes of the file that are known to be synced
//! 112  4   CRC32C over bytes 104..112
//! 116  12  zeros
//! 128      records, as bfs_common::codec lays them out, and behind each batch its commit
//! ```
//! A commit is laid out like a record, with the number of the last record before it, without a
//! head, and with this as its payload:
//!
//! ```text
//! 0    8   "bfscommt"
//! 8    8   number of the segment; in version 2 its mark
//! 16   8   offset of the commit in the file
//! 24   32  chain hash after the last record before it
//! ```
//! It is written and synced together with its batch. Bytes that are no record with a commit
//! somewhere behind them are damage: the batch was written as a whole and may be acknowledged.
//! (A power cut that left the end of a batch on the disk and not its middle looks the same and is
//! refused too; a file grows in order, so this is rare.) Without one they are a torn tail. Whole
//! records are kept either way. The synced length is written with the *next* batch: below it
//! damage is damage whatever the commits say.
//!
//! A file that was a segment before ([`renew`]) is written over in place: the file system then has no blocks to find
//! and no size to note at each sync, which halves what a sync costs. Above the synced length it may hold anything: what it
//! held before, and after a power cut any mixture of that and of the last batch. So only records with a commit
//! behind them are read there, in which the mark keeps what was once written by others from being taken for one; the rest
//! is its end, not damage. What follows in the next segment shows by number and chain hash that nothing is missing. Such
//! a segment is never read ahead of what is durable by a reader that goes on later.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bfs_common::codec::{self, CodecError, Encoded};
use bfs_common::record::{ChainHash, Epoch, GroupId, Sequence};
use bfs_common::wire::Position;
use bytes::Bytes;

use super::{LogError, LogRecord, LogRef, segment_path};
use crate::durable;
use crate::mutant::{self, Mutant};

const MAGIC: [u8; 8] = *b"bfslog1\n";
const VERSION: u32 = 1;
/// Of a file that was a segment before.
const VERSION_RENEWED: u32 = 2;
/// Bytes before the first record.
pub const HEADER: u64 = 128;
const SYNCED_AT: usize = 104;
const COMMIT_MAGIC: [u8; 8] = *b"bfscommt";
/// Bytes of a commit.
pub const COMMIT: usize = codec::PREFIX + 56;
/// How much is read at once: more than the longest record.
const CHUNK: usize = 4 << 20;

/// What a segment says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The group.
    pub group: GroupId,
    /// Number of the first record.
    pub first: Sequence,
    /// Position before the first record.
    pub before: Position,
    /// In a file that was a segment before: what its commits have in place of its number.
    pub mark: Option<u64>,
}

impl Header {
    /// As bytes, with a synced length of nothing but the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER as usize] {
        let mut out = [0; HEADER as usize];
        out[..8].copy_from_slice(&MAGIC);
        let version = if self.mark.is_some() { VERSION_RENEWED } else { VERSION };
        out[8..12].copy_from_slice(&version.to_le_bytes());
        out[16..32].copy_from_slice(&self.group.0);
        out[32..40].copy_from_slice(&self.first.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.before.epoch.0.to_le_bytes());
        out[48..80].copy_from_slice(&self.before.chain.0);
        out[80..88].copy_from_slice(&self.mark.unwrap_or(0).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out[..12]), &out[16..SYNCED_AT]);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out[SYNCED_AT..SYNCED_AT + 12].copy_from_slice(&encode_synced(HEADER));
        out
    }

    /// From bytes, with the synced length (`None` if that line was torn).
    ///
    /// # Errors
    /// What does not fit, in words.
    pub fn decode(bytes: &[u8; HEADER as usize]) -> Result<(Self, Option<u64>), String> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if bytes[..8] != MAGIC {
            return Err("does not begin like a log segment".into());
        }
        let mark = match u32_at(8) {
            VERSION => None,
            VERSION_RENEWED => Some(u64_at(80)),
            other => {
                return Err(format!(
                    "has version {other}, this release knows {VERSION} and {VERSION_RENEWED}"
                ));
            }
        };
        if u32_at(12) != crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..SYNCED_AT]) {
            return Err("the checksum of its header does not fit".into());
        }
        let first = Sequence(u64_at(32));
        if first.0 == 0 {
            return Err("begins with record 0".into());
        }
        let before = Position {
            epoch: Epoch(u64_at(40)),
            sequence: Sequence(first.0 - 1),
            chain: ChainHash(bytes[48..80].try_into().expect("32 bytes")),
        };
        let group = GroupId(bytes[16..32].try_into().expect("16 bytes"));
        let fits = u32_at(SYNCED_AT + 8) == crc32c::crc32c(&bytes[SYNCED_AT..SYNCED_AT + 8]);
        Ok((Self { group, first, before, mark }, fits.then(|| u64_at(SYNCED_AT))))
    }

    /// What its commits say that they belong to.
    #[must_use]
    pub fn of_commits(&self) -> u64 {
        self.mark.unwrap_or(self.first.0)
    }
}

fn encode_synced(length: u64) -> [u8; 12] {
    let mut out = [0; 12];
    out[..8].copy_from_slice(&length.to_le_bytes());
    let crc = crc32c::crc32c(&out[..8]);
    out[8..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The commit behind a batch that ends at this position, in the segment of this number or mark.
#[must_use]
pub fn encode_commit(segment: u64, at: u64, after: &Position) -> [u8; COMMIT] {
    let mut out = [0; COMMIT];
    out[4..8].copy_from_slice(&((COMMIT - codec::PREFIX) as u32).to_le_bytes());
    out[8..16].copy_from_slice(&after.sequence.0.to_le_bytes());
    let payload = &mut out[codec::PREFIX..];
    payload[..8].copy_from_slice(&COMMIT_MAGIC);
    payload[8..16].copy_from_slice(&segment.to_le_bytes());
    payload[16..24].copy_from_slice(&at.to_le_bytes());
    payload[24..].copy_from_slice(&after.chain.0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&out[..16]), &out[codec::PREFIX..]);
    out[16..20].copy_from_slice(&crc.to_le_bytes());
    out
}

/// What a commit says, if it is one and belongs here.
fn decode_commit(encoded: &Encoded, segment: u64, at: u64) -> Option<(Sequence, ChainHash)> {
    let chain = encoded.bytes.get(COMMIT - 32..)?.try_into().ok()?;
    let after = Position { epoch: Epoch(0), sequence: encoded.sequence, chain: ChainHash(chain) };
    (encoded.bytes[..] == encode_commit(segment, at, &after)).then_some((encoded.sequence, ChainHash(chain)))
}

/// Makes a segment with its header, synced but for its name; takes the place of one that got no
/// record.
///
/// # Errors
/// What the system says.
pub fn create(dir: &Path, header: &Header) -> Result<File, LogError> {
    let path = segment_path(dir, header.first.0);
    let new = path.with_extension("new");
    let make = || -> std::io::Result<File> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all_at(&header.encode(), 0)?;
        durable::file(&file)?;
        std::fs::rename(&new, &path)?;
        Ok(file)
    };
    make().map_err(LogError::io("make", &path))
}

/// As [`create`], in a file that was a segment, is applied, and lies beside the others under this name. Nobody else may
/// have it open, or it stays what it was.
///
/// # Errors
/// What the system says; the file then has its old name, and its bytes may be of both.
pub fn renew(dir: &Path, old: &Path, header: &Header) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(old)?;
    // Whoever reads it has it locked, until the end.
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    // With its new bytes it must not come back under the name that it had as a segment.
    if !mutant::is(Mutant::RenewsBeforeSync) {
        durable::directory(dir)?;
    }
    file.write_all_at(&header.encode(), 0)?;
    durable::data(&file)?;
    std::fs::rename(old, segment_path(dir, header.first.0))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::Unlock)?;
    Ok(file)
}

/// Opens a segment to read it: as long as the handle lives it is not renewed.
///
/// # Errors
/// What the system says, also if it is being renewed.
pub(super) fn open_shared(path: &Path) -> std::io::Result<File> {
    let file = File::open(path)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared) {
        Err(error @ rustix::io::Errno::WOULDBLOCK) => Err(error.into()),
        // Where there are no locks nothing is renewed.
        _ => Ok(file),
    }
}

/// Reads the header of a segment, which has to be of this number.
pub(super) fn read_header(file: &File, path: &Path, number: u64) -> Result<(Header, Option<u64>), LogError> {
    let mut bytes = [0; HEADER as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|_| LogError::corrupt(path, "is shorter than its header"))?;
    let (header, synced) = Header::decode(&bytes).map_err(|why| LogError::corrupt(path, why))?;
    if header.first.0 != number {
        return Err(LogError::corrupt(path, "belongs to another group or another place"));
    }
    Ok((header, synced))
}

/// Notes in the header how many bytes are synced (durable with the next sync).
///
/// # Errors
/// What the system says.
pub fn note_synced(file: &File, length: u64) -> std::io::Result<()> {
    file.write_all_at(&encode_synced(length), SYNCED_AT as u64)
}

/// Reads the records of a segment in order.
#[derive(Debug)]
pub struct SegmentReader {
    file: File,
    path: PathBuf,
    number: u64,
    /// What it says about itself.
    pub header: Header,
    /// Bytes that are known to be synced.
    pub synced: Option<u64>,
    buffer: Bytes,
    /// Offset in the file of the first byte of `buffer`.
    at: u64,
    /// Number of the next record, if it is known.
    expected: Option<Sequence>,
    /// In a renewed file: records without a commit so far.
    held: VecDeque<Item>,
    /// Records with a commit behind them, and that.
    ready: VecDeque<Item>,
}

/// What stands in a segment.
#[derive(Debug)]
pub enum Item {
    /// A record.
    Record(LogRecord),
    /// The end of a batch.
    Commit {
        /// The last record before it.
        sequence: Sequence,
        /// Chain hash after that.
        chain: ChainHash,
        /// Where the commit ends.
        end: u64,
    },
}

/// How a segment ends.
#[derive(Debug)]
pub enum Tail {
    /// After a whole record; in a renewed file also with what it held before.
    Clean,
    /// With bytes that are no record, from here.
    Torn {
        /// Offset of the first bad byte.
        at: u64,
        /// What is wrong with them.
        why: CodecError,
    },
}

impl SegmentReader {
    /// Opens a segment and checks its header.
    ///
    /// # Errors
    /// [`LogError::Corrupt`] or what the system says.
    pub fn open(dir: &Path, number: u64, group: GroupId) -> Result<Self, LogError> {
        let path = segment_path(dir, number);
        let file = open_shared(&path).map_err(LogError::io("open", &path))?;
        let (header, synced) = read_header(&file, &path, number)?;
        if header.group != group {
            return Err(LogError::corrupt(&path, "belongs to another group or another place"));
        }
        let (buffer, expected) = (Bytes::new(), Some(header.first));
        let (held, ready) = Default::default();
        Ok(Self { file, path, number, header, synced, buffer, at: HEADER, expected, held, ready })
    }

    /// Goes on at this offset, where a record begins.
    pub fn skip_to(&mut self, offset: u64) {
        self.at = offset;
        self.buffer = Bytes::new();
        self.expected = None;
        self.held.clear();
        self.ready.clear();
    }

    /// The next record; `None` at the end of the file.
    ///
    /// # Errors
    /// [`LogError::Corrupt`] for anything that is not a whole, sound record.
    pub fn read(&mut self) -> Result<Option<LogRecord>, LogError> {
        loop {
            match self.next_or_tail()? {
                Ok(Item::Record(found)) => return Ok(Some(found)),
                Ok(Item::Commit { .. }) => {}
                Err(Tail::Clean) => return Ok(None),
                Err(Tail::Torn { at, why }) => {
                    return Err(LogError::corrupt(&self.path, format!("at byte {at}: {why}")));
                }
            }
        }
    }

    /// The next record or commit, or how the segment ends: a renewed file ends behind its last commit.
    ///
    /// # Errors
    /// What the system says.
    pub fn next_or_tail(&mut self) -> Result<Result<Item, Tail>, LogError> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Ok(Ok(item));
            }
            match self.parse()? {
                Ok(item) => {
                    let waits = self.header.mark.is_some() && matches!(item, Item::Record(_));
                    self.held.push_back(item);
                    if !waits {
                        self.ready.append(&mut self.held);
                    }
                }
                Err(tail) => return Ok(Err(tail)),
            }
        }
    }

    fn parse(&mut self) -> Result<Result<Item, Tail>, LogError> {
        loop {
            match codec::take(&mut self.buffer) {
                Ok(Some(encoded)) => {
                    let end = self.at + encoded.bytes.len() as u64;
                    if let Some((sequence, chain)) =
                        decode_commit(&encoded, self.header.of_commits(), self.at)
                    {
                        self.at = end;
                        return Ok(Ok(Item::Commit { sequence, chain, end }));
                    }
                    if self.may_be_old() && self.expected.is_some_and(|next| next != encoded.sequence) {
                        return Ok(Err(Tail::Clean));
                    }
                    let (record, payload) = match encoded.decode() {
                        Ok(found) => found,
                        Err(why) => return Ok(Err(Tail::Torn { at: self.at, why })),
                    };
                    self.expected = Some(encoded.sequence.next());
                    self.at = end;
                    let at = LogRef { segment: self.number, offset: end - payload.len() as u64 };
                    return Ok(Ok(Item::Record(LogRecord { encoded, record, payload, at, end })));
                }
                Ok(None) => {
                    if !self.more()? {
                        return Ok(Err(Tail::Clean));
                    }
                }
                Err(why @ CodecError::Truncated { .. }) => {
                    if !self.more()? {
                        return Ok(Err(self.torn(why)));
                    }
                }
                Err(why) => return Ok(Err(self.torn(why))),
            }
        }
    }

    /// Whether what stands here may be left of what the file was before, or of a batch that a power cut tore.
    fn may_be_old(&self) -> bool {
        self.header.mark.is_some() && self.synced.is_none_or(|synced| self.at >= synced)
    }

    fn torn(&self, why: CodecError) -> Tail {
        if self.may_be_old() { Tail::Clean } else { Tail::Torn { at: self.at, why } }
    }

    /// Whether a commit stands anywhere behind this offset.
    ///
    /// # Errors
    /// What the system says.
    pub fn commit_behind(&mut self, from: u64) -> Result<bool, LogError> {
        self.skip_to(from);
        // As long as a segment at most, and only after a crash.
        while self.more()? {}
        let at_magic = |at: &usize| self.buffer[*at..].starts_with(&COMMIT_MAGIC);
        let starts = (codec::PREFIX..self.buffer.len()).filter(at_magic).map(|at| at - codec::PREFIX);
        for start in starts {
            let found = codec::take(&mut self.buffer.slice(start..)).ok().flatten();
            if found.is_some_and(|found| {
                decode_commit(&found, self.header.of_commits(), from + start as u64).is_some()
            }) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Reads on behind what is in the buffer; false at the end of the file.
    fn more(&mut self) -> Result<bool, LogError> {
        let have = self.buffer.len();
        let mut bytes = vec![0; have + CHUNK];
        bytes[..have].copy_from_slice(&self.buffer);
        let mut len = have;
        while len < bytes.len() {
            match self.file.read_at(&mut bytes[len..], self.at + len as u64) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LogError::io("read", &self.path)(error)),
            }
        }
        bytes.truncate(len);
        self.buffer = bytes.into();
        Ok(len > have)
    }
}
