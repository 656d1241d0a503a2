//! A generation as a stream of bytes, whole or as what differs from an older one: to be written to a file or a
//! pipe, and taken in by another store.
//!
//! ```text
//! 0   8   "bfsgens\n"                      all integers little-endian
//! 8   4   version 1
//! 12  4   length of the head              at most 4 MiB
//! 16  4   CRC32C over bytes 0..16 and the head
//! 20      the head: a Head as MessagePack
//! ..      records as bfs_common::codec lays them out, numbered from 1; the last is the checkpoint
//! ..      the end: u32 0, u32 32, u64 number of the last record, u32 CRC32C over these 16 bytes and the digest,
//!         32 bytes: blake3 of everything before the end
//! ```
//! The end is laid out like a record without a head, as a commit of the log is. Nothing counts without it. The records
//! are those of an agent's stream, so what takes them in is what takes in an agent: gate, log, plan, applier.

use bfs_common::codec::{self, CodecError, HEAD_MAX, PAYLOAD_MAX, PREFIX};
use bfs_common::record::{CheckpointId, CheckpointLabel, GroupId, ObjectId, PathBytes, Record, Sequence};
use bfs_common::wire::GenerationLine;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"bfsgens\n";
const VERSION: u32 = 1;
/// Bytes before the head.
const BEFORE_HEAD: usize = 20;
/// Longest head: two lists of roots, each as long as a record may have it.
const STREAM_HEAD_MAX: usize = 4 << 20;
/// Bytes of the end.
pub(crate) const END: usize = PREFIX + 32;
/// Bytes that are handed on at once.
pub const PIECE: usize = 1 << 20;

/// Why bytes are not such a stream.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StreamError {
    /// Other bytes.
    #[error("it is no stream of `bfs-replayer send`")]
    Magic,
    /// Of another release.
    #[error("it is of version {0}, this release knows {VERSION}: install a newer one")]
    Version(u32),
    /// Its head.
    #[error("its head is damaged: {0}")]
    Head(String),
    /// A record.
    #[error("it is damaged behind record {after}: {why}")]
    Record {
        /// The last one that was sound.
        after: u64,
        /// What is wrong.
        why: CodecError,
    },
    /// Records in another order.
    #[error("it is damaged: record {found} stands where {wanted} should")]
    Order {
        /// What should come.
        wanted: u64,
        /// What came.
        found: u64,
    },
    /// Its end.
    #[error("it is damaged: what came is not what its end says")]
    Digest,
    /// There is no end.
    #[error("it is cut off behind record {0}")]
    CutOff(u64),
    /// Bytes behind the end.
    #[error("something stands behind its end")]
    Behind,
}

/// A generation, as both sides know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Its label. The time in it, to the nanosecond, tells two checkpoints of one number apart.
    pub label: CheckpointLabel,
    /// Its roots.
    pub roots: Vec<(PathBytes, ObjectId)>,
}

impl Moment {
    /// The line that a store has of it once it has it. (What changed with it only that store knows.)
    #[must_use]
    pub fn line(&self) -> GenerationLine {
        let (checkpoint, label) = (self.checkpoint, self.label.clone());
        GenerationLine { checkpoint, label, changed: 0, bytes: 0, process: None }
    }
}

/// What a stream is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Name of the group.
    pub group: String,
    /// Its identity.
    pub id: GroupId,
    /// What it is the difference to; none if it has everything.
    pub from: Option<Moment>,
    /// What it leads to.
    pub to: Moment,
}

/// Whether a record is one of those that lead from one generation to another: what changes files and where they stand. The rest
/// is between an agent and its destination. (The checkpoint at the end is not among them.)
#[must_use]
pub fn leads_on(record: &Record) -> bool {
    matches!(
        record,
        Record::Object { .. }
            | Record::Rebind { .. }
            | Record::Forget { .. }
            | Record::EntrySet { .. }
            | Record::EntryDelete { .. }
            | Record::Write { .. }
            | Record::Zero { .. }
            | Record::Truncate { .. }
            | Record::Meta { .. }
            | Record::XattrSet { .. }
            | Record::XattrRemove { .. }
            | Record::Roots { .. }
    )
}

/// Takes pieces of the stream; false gives up.
pub type Sink<'a> = &'a mut dyn FnMut(Bytes) -> bool;

/// Makes a stream.
pub struct Writer<'a> {
    out: BytesMut,
    hasher: blake3::Hasher,
    records: u64,
    sink: Sink<'a>,
    ended: bool,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("records", &self.records).finish_non_exhaustive()
    }
}

impl<'a> Writer<'a> {
    /// Begins one.
    ///
    /// # Panics
    /// If the head cannot be encoded (all can).
    pub fn begin(head: &Head, sink: Sink<'a>) -> Self {
        let head = rmp_serde::to_vec(head).expect("heads can be encoded");
        let mut out = BytesMut::with_capacity(2 * PIECE);
        out.put_slice(MAGIC);
        out.put_u32_le(VERSION);
        out.put_u32_le(head.len() as u32);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out), &head);
        out.put_u32_le(crc);
        out.put_slice(&head);
        Self { out, hasher: blake3::Hasher::new(), records: 0, sink, ended: false }
    }

    /// Whether nobody takes any more: the rest need not be made.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// The next record.
    pub fn record(&mut self, record: &Record, payload: &[u8]) {
        self.records += 1;
        codec::encode(&mut self.out, Sequence(self.records), record, payload);
        if self.out.len() >= PIECE {
            self.hand_on();
        }
    }

    fn hand_on(&mut self) {
        self.hasher.update(&self.out);
        let piece = self.out.split().freeze();
        if !self.ended {
            self.ended = !(self.sink)(piece);
        }
    }

    /// That was the last one.
    pub fn end(mut self) {
        self.hand_on();
        let digest = self.hasher.finalize();
        self.out.put_u32_le(0);
        self.out.put_u32_le(32);
        self.out.put_u64_le(self.records);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&self.out), digest.as_bytes());
        self.out.put_u32_le(crc);
        self.out.put_slice(digest.as_bytes());
        self.hand_on();
    }
}

/// What stands next in a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// What it is.
    Head(Box<Head>),
    /// A record and its payload.
    Record(Box<Record>, Bytes),
    /// Its end.
    End,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Head,
    Records,
    Ended,
}

/// Takes a stream apart, as its bytes come. What it gives is sound for itself; all of it counts only with the end.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: BytesMut,
    hasher: blake3::Hasher,
    stage: Stage,
    records: u64,
}

impl Reader {
    /// More bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next item; none if it needs more bytes.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn next_item(&mut self) -> Result<Option<Item>, StreamError> {
        match self.stage {
            Stage::Head => self.head(),
            Stage::Records => self.record(),
            Stage::Ended if self.buffer.is_empty() => Ok(None),
            Stage::Ended => Err(StreamError::Behind),
        }
    }

    /// That was all.
    ///
    /// # Errors
    /// [`StreamError`], if it should not have been.
    pub fn finish(&self) -> Result<(), StreamError> {
        match self.stage {
            Stage::Ended if self.buffer.is_empty() => Ok(()),
            Stage::Ended => Err(StreamError::Behind),
            Stage::Head | Stage::Records => Err(StreamError::CutOff(self.records)),
        }
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.buffer[at..at + 4].try_into().expect("4 bytes"))
    }

    fn head(&mut self) -> Result<Option<Item>, StreamError> {
        let known = self.buffer.len().min(MAGIC.len());
        if self.buffer[..known] != MAGIC[..known] {
            return Err(StreamError::Magic);
        }
        if self.buffer.len() < BEFORE_HEAD {
            return Ok(None);
        }
        let (version, len) = (self.word(8), self.word(12) as usize);
        if version != VERSION {
            return Err(StreamError::Version(version));
        }
        if len > STREAM_HEAD_MAX {
            return Err(StreamError::Head(format!("it has {len} bytes")));
        }
        if self.buffer.len() < BEFORE_HEAD + len {
            return Ok(None);
        }
        let head = &self.buffer[BEFORE_HEAD..BEFORE_HEAD + len];
        if crc32c::crc32c_append(crc32c::crc32c(&self.buffer[..16]), head) != self.word(16) {
            return Err(StreamError::Head("its checksum does not fit".into()));
        }
        let head = rmp_serde::from_slice(head).map_err(|error| StreamError::Head(error.to_string()))?;
        self.pass(BEFORE_HEAD + len);
        self.stage = Stage::Records;
        Ok(Some(Item::Head(head)))
    }

    fn record(&mut self) -> Result<Option<Item>, StreamError> {
        if self.buffer.len() < PREFIX {
            return Ok(None);
        }
        let (head, payload) = (self.word(0) as usize, self.word(4) as usize);
        if head == 0 {
            return self.end(payload);
        }
        let bad = |after, why| StreamError::Record { after, why };
        if head > HEAD_MAX || payload > PAYLOAD_MAX {
            return Err(bad(self.records, CodecError::TooLong { head, payload }));
        }
        if self.buffer.len() < PREFIX + head + payload {
            return Ok(None);
        }
        let mut bytes = self.pass(PREFIX + head + payload);
        let after = self.records;
        let encoded = codec::take(&mut bytes).map_err(|why| bad(after, why))?;
        let encoded = encoded.ok_or(StreamError::CutOff(after))?;
        if encoded.sequence.0 != after + 1 {
            return Err(StreamError::Order { wanted: after + 1, found: encoded.sequence.0 });
        }
        let (record, payload) = encoded.decode().map_err(|why| bad(after, why))?;
        self.records += 1;
        Ok(Some(Item::Record(Box::new(record), payload)))
    }

    fn end(&mut self, payload: usize) -> Result<Option<Item>, StreamError> {
        if payload != 32 {
            return Err(StreamError::Digest);
        }
        if self.buffer.len() < END {
            return Ok(None);
        }
        let records = u64::from_le_bytes(self.buffer[8..16].try_into().expect("8 bytes"));
        let crc = crc32c::crc32c_append(crc32c::crc32c(&self.buffer[..16]), &self.buffer[PREFIX..END]);
        let digest = self.hasher.finalize();
        if records != self.records
            || crc != self.word(16)
            || self.buffer[PREFIX..END] != digest.as_bytes()[..]
        {
            return Err(StreamError::Digest);
        }
        self.buffer.advance(END);
        self.stage = Stage::Ended;
        Ok(Some(Item::End))
    }

    /// Takes sound bytes off.
    fn pass(&mut self, len: usize) -> Bytes {
        let bytes = self.buffer.split_to(len).freeze();
        self.hasher.update(&bytes);
        bytes
    }
}
