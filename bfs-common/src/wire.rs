//! Frames of the connection between agent and replayer.
//!
//! ```text
//! 0  u32  length of the rest of the frame (head length, head and body)   little-endian
//! 4  u32  length of the head
//! 8  head: the Frame as MessagePack
//! .. body: raw bytes (encoded records), may be empty
//! ```
//! Who the peer is was proven before: over TCP by the keys of a TLS connection, over a unix socket by the kernel. Then
//! the replayer sends its [`PREAMBLE`], magic and version, the agent its own, and frames follow.

mod generation;
mod pack;
mod process;
mod promote;
mod status;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::past::{Difference, Look, Seen, VersionLine};
use crate::record::{
    ChainHash, CheckpointId, CheckpointLabel, Epoch, FileKind, GapScope, GroupId, Identity, Meta, Name,
    ObjectId, PathBytes, Sequence,
};
pub use crate::refusal::Refusal;

pub use generation::{
    DIGEST_BLOCK, DIGEST_BYTES, DigestLine, Digests, GenerationLine, NewestFile, TreeObject,
};
pub use pack::{PACK_MAX, pack, unpack};
pub use process::{
    PROCESS_BLOCK, PROCESS_BLOCKS_MAX, PROCESS_DIGEST, PROCESS_FILE_MAX, PROCESS_FILES_MAX, PROCESS_PIECE,
    process_file_is_valid,
};
pub use promote::{History, PromoteStage, Promoter};
pub use status::{AgentStanding, GroupStatus, StoreState};

/// Version of the protocol, with its history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Version {
    /// The first. Peers over TCP proved a secret that they shared, in frames of their own.
    V1 = 1,
    /// Peers over TCP have keys: what came before [`Frame::Hello`] is gone. [`Frame::ReadKeys`],
    /// [`Refusal::NotAllowed`], [`Refusal::KeyChanged`].
    V2 = 2,
    /// Failover: [`Frame::Promote`] and what belongs to it, `adopt` in [`Frame::Welcome`], [`Refusal::Promoted`],
    /// [`Refusal::Attached`], `history` in [`GroupStatus`].
    V3 = 3,
    /// Process state: [`Frame::PutProcess`], [`Frame::GetProcess`] and what belongs to them, `process` in
    /// [`GenerationLine`]. [`Frame::GetNewest`]. [`Frame::Bye`], `agent` and `id` in [`GroupStatus`]. Later `lz4` in [`Frame::Hello`] and
    /// [`Frame::Welcome`] (left out where it is false: nothing changed for peers that do not know it), and [`Frame::Packed`].
    V4 = 4,
}

/// What this build speaks.
pub const VERSION: Version = Version::V4;

/// Magic bytes, then the version (little-endian): the first bytes from either side.
pub const PREAMBLE: [u8; 8] = [b'b', b'f', b's', b'1', VERSION as u8, 0, 0, 0];

/// Longest frame.
pub const FRAME_MAX: usize = 8 << 20;

/// Bytes before the head.
pub const FRAME_PREFIX: usize = 8;

/// Where a destination stands in a group's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Epoch of the last durable record.
    pub epoch: Epoch,
    /// The last durable record.
    pub sequence: Sequence,
    /// Chain hash after it.
    pub chain: ChainHash,
}

impl Position {
    /// Before the first record of a group.
    pub const START: Self = Self { epoch: Epoch(0), sequence: Sequence(0), chain: ChainHash::START };
}

/// One line of the catalogue: an object as the store knows it at its last durable record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogObject {
    /// Its number.
    pub object: ObjectId,
    /// The primary's inode.
    pub identity: Identity,
    /// Its type.
    pub kind: FileKind,
    /// Device number, user-space form.
    pub device: u64,
    /// Attributes.
    pub meta: Meta,
    /// Size of a regular file in bytes, else 0.
    pub size: u64,
    /// Names and values of the extended attributes.
    pub xattrs: Vec<(String, Bytes)>,
    /// Target of a symlink, else empty.
    pub target: Bytes,
    /// Entries of a directory, else empty.
    pub entries: Vec<(Name, ObjectId)>,
}

/// One file of the backup at its applied checkpoint, for verify.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestLine {
    /// Index into the group's list of roots.
    pub root: u32,
    /// Path below the root; empty for the root itself.
    pub path: PathBytes,
    /// Object number.
    pub object: ObjectId,
    /// Type, read from the backup file.
    pub kind: FileKind,
    /// Attributes, read from the backup file.
    pub meta: Meta,
    /// Size of a regular file.
    pub size: u64,
    /// Device number.
    pub device: u64,
    /// blake3 of the content, the symlink target, or nothing.
    pub content: [u8; 32],
    /// blake3 over the sorted extended attributes: for each, u32 length and name, u32 length and
    /// value.
    pub xattrs: [u8; 32],
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame {
    /// Agent: I write this group. The first frame on a writing connection.
    Hello {
        /// Name of the group.
        group: String,
        /// Its identity. On first contact the store binds the name to it.
        group_id: GroupId,
        /// The primary's boot.
        boot_id: [u8; 16],
        /// The epoch that this agent holds, to go on in it after a reconnect; `None` asks for a
        /// new one.
        epoch: Option<Epoch>,
        /// The epoch granted last may be taken away from an agent that is still connected.
        take_over: bool,
        /// FROM=TO of `--map`: the primary's path prefix and the place on the backup (below
        /// `STORE/tree/GROUP` when relative, else absolute and allowed by the replayer).
        maps: Vec<(PathBytes, PathBytes)>,
        /// Records may travel packed, if the replayer says the same. Who does not know that refuses this as [`Refusal::Bad`].
        #[serde(default, skip_serializing_if = "pack::is_false")]
        lz4: bool,
    },
    /// Replayer: you may write.
    Welcome {
        /// Granted or confirmed.
        epoch: Epoch,
        /// Where to go on.
        position: Position,
        /// Last confirmed checkpoint.
        confirmed: CheckpointId,
        /// Last applied checkpoint.
        applied: CheckpointId,
        /// Highest object number ever seen.
        highest_object: ObjectId,
        /// Scopes of gaps that are open at `position`.
        gaps: Vec<GapScope>,
        /// The group's roots at `position`.
        roots: Vec<(PathBytes, ObjectId)>,
        /// The boot in which the last epoch wrote.
        boot_id: [u8; 16],
        /// The backup was promoted, and no checkpoint was taken since: below this directory stands what it gave out, each
        /// file at the absolute path that it had. What the store knows of inodes is of another host.
        adopt: Option<PathBytes>,
        /// [`Frame::Packed`] is understood; only said to who asked.
        #[serde(default, skip_serializing_if = "pack::is_false")]
        lz4: bool,
    },
    /// Agent: encoded records follow as the body, in order and without a gap.
    Records {
        /// Number of the first.
        first: Sequence,
        /// How many.
        count: u32,
    },
    /// Agent: the same, packed by [`pack`]. Only where [`Frame::Welcome`] said that it is understood.
    Packed {
        /// Number of the first.
        first: Sequence,
        /// How many.
        count: u32,
        /// Bytes of the plain body, at most [`PACK_MAX`].
        plain_len: u32,
    },
    /// Replayer: durable up to here.
    Ack {
        /// Position.
        position: Position,
        /// Last confirmed checkpoint.
        confirmed: CheckpointId,
        /// Last applied checkpoint.
        applied: CheckpointId,
        /// Whether the next one can be applied.
        state: StoreState,
    },
    /// Replayer: I refuse, and close the connection.
    Refused(Refusal),
    /// Agent: send the catalogue (the state at the last durable record). Answered by
    /// [`Frame::Catalog`] frames, the last with `last`.
    GetCatalog,
    /// Replayer: objects of the catalogue.
    Catalog {
        /// Some of the objects.
        objects: Vec<CatalogObject>,
        /// No more to come.
        last: bool,
    },
    /// Agent: send the manifest of the applied tree as soon as at least this checkpoint is
    /// applied. Answered by [`Frame::Manifest`] frames.
    GetManifest {
        /// Name of the group.
        group: String,
        /// Applied at least.
        at_least: CheckpointId,
    },
    /// Replayer: lines of the manifest. The applier waits while a manifest is made.
    Manifest {
        /// The checkpoint that it is of.
        checkpoint: CheckpointId,
        /// The group's roots (primary paths).
        roots: Vec<PathBytes>,
        /// Some of the lines.
        lines: Vec<ManifestLine>,
        /// No more to come.
        last: bool,
    },
    /// Agent or command: which generations are there? Answered by [`Frame::Generations`] frames.
    GetGenerations {
        /// Name of the group.
        group: String,
    },
    /// Replayer: some of the generations, the oldest first.
    Generations {
        /// One line each.
        lines: Vec<GenerationLine>,
        /// No more to come.
        last: bool,
    },
    /// Agent or command: send a generation without the bytes of its files. Answered by
    /// [`Frame::Tree`] frames. The generation is held until the connection ends.
    GetTree {
        /// Name of the group.
        group: String,
        /// Its number.
        at: CheckpointId,
        /// What is to be read for it.
        digests: Digests,
    },
    /// Replayer: some of its objects.
    Tree {
        /// Its number.
        checkpoint: CheckpointId,
        /// Its label.
        label: CheckpointLabel,
        /// Its roots.
        roots: Vec<(PathBytes, ObjectId)>,
        /// Some of the objects.
        objects: Vec<TreeObject>,
        /// No more to come.
        last: bool,
    },
    /// Agent or command: send the bytes of these files. Answered by [`Frame::Content`] frames.
    GetContents {
        /// Name of the group.
        group: String,
        /// Number of the generation.
        at: CheckpointId,
        /// Which files, in the order of the answers.
        objects: Vec<ObjectId>,
    },
    /// Replayer: bytes of a file, in the body; between them are zeros.
    Content {
        /// The file.
        object: ObjectId,
        /// Where they begin.
        offset: u64,
        /// No more of this file to come.
        last: bool,
    },
    /// Agent or command: send what these files had where something was written since. Answered by
    /// [`Frame::Change`] frames.
    GetChanges {
        /// Name of the group.
        group: String,
        /// Number of the generation.
        at: CheckpointId,
        /// Which files, in the order of the answers; each is still there.
        objects: Vec<ObjectId>,
    },
    /// Replayer: bytes that a file had, in the body, or that it had zeros; where nothing is said, nothing
    /// was written since, below the size that it had.
    Change {
        /// The file.
        object: ObjectId,
        /// Where they begin.
        offset: u64,
        /// So many zeros, instead of a body.
        zeros: u64,
        /// No more of this file to come.
        last: bool,
    },
    /// Command: what differs between two generations? Answered by [`Frame::Differences`] frames. Both are held until
    /// the connection ends.
    GetDifferences {
        /// Name of the group.
        group: String,
        /// The older one.
        from: CheckpointId,
        /// The newer one.
        to: CheckpointId,
    },
    /// Replayer: some of what differs.
    Differences {
        /// One line an object.
        lines: Vec<Difference>,
        /// No more to come.
        last: bool,
    },
    /// Command: which generations changed what stands at this path? Answered by [`Frame::Versions`] frames.
    GetVersions {
        /// Name of the group.
        group: String,
        /// An absolute path of the primary.
        path: PathBytes,
    },
    /// Replayer: some of them, the oldest first.
    Versions {
        /// One line each.
        lines: Vec<VersionLine>,
        /// No more to come.
        last: bool,
    },
    /// Command: send the stream of a generation, whole or as the difference to an older one. Answered by
    /// [`Frame::Transfer`] frames. Both are held until the connection ends.
    GetTransfer {
        /// Name of the group.
        group: String,
        /// The older one; none for everything.
        from: Option<CheckpointId>,
        /// The newer one.
        to: CheckpointId,
    },
    /// Replayer: bytes of the stream, in the body.
    Transfer {
        /// No more to come.
        last: bool,
    },
    /// Command: the next bytes of such a stream, in the body, for this store. Each is answered by [`Frame::Received`].
    Receive {
        /// Name of the group here, if it is to have another one than in the stream.
        group: Option<String>,
        /// That was all.
        last: bool,
    },
    /// Replayer: they are taken.
    Received {
        /// With the last: the group, and the checkpoint that is confirmed now.
        taken: Option<(String, CheckpointId)>,
    },
    /// Command: make the generations from one to another one, which is the newer. Answered by [`Frame::Merged`].
    Merge {
        /// Name of the group.
        group: String,
        /// The oldest that goes.
        from: CheckpointId,
        /// The one that stays.
        to: CheckpointId,
    },
    /// Replayer: these went.
    Merged {
        /// The oldest first.
        gone: Vec<CheckpointId>,
    },
    /// Command: this host becomes the primary of a group, from its last confirmed checkpoint on. Whoever wrote it before is
    /// fenced, durably, before the answer ([`Frame::Promoted`]). Done again by the same, it goes on with what was begun.
    Promote {
        /// Name of the group.
        group: String,
        /// Who.
        by: Promoter,
        /// Although its agent answers.
        force: bool,
    },
    /// Command: so far is it. Answered by [`Frame::Promoted`].
    PromoteStep {
        /// Name of the group.
        group: String,
        /// Which promotion.
        history: [u8; 16],
        /// How far.
        stage: PromoteStage,
    },
    /// Replayer: how it stands.
    Promoted {
        /// The promotion.
        history: History,
        /// Records behind the checkpoint, which no checkpoint covers: they are not given out.
        pending_records: u64,
        /// And their bytes.
        pending_bytes: u64,
    },
    /// Command on the same host: where do the roots of the applied tree stand? Answered by [`Frame::Places`].
    GetPlaces {
        /// Name of the group.
        group: String,
    },
    /// Replayer: there.
    Places {
        /// The directory of each root.
        roots: Vec<(ObjectId, PathBytes)>,
    },
    /// Command: a look into a generation. Answered by one [`Frame::Seen`]. It is held until the connection ends.
    Look {
        /// Name of the group.
        group: String,
        /// Number of the generation.
        at: CheckpointId,
        /// At what.
        look: Look,
    },
    /// Replayer: what was seen.
    Seen(Seen),
    /// Agent: send digests of the blocks of all files as they were after this record. Answered by
    /// [`Frame::Digests`] frames, without what was not applied then.
    GetDigests {
        /// Name of the group.
        group: String,
        /// The last record that counts.
        position: Sequence,
    },
    /// Replayer: digests of files, in the order of their numbers. The applier waits meanwhile.
    Digests {
        /// Some of the lines.
        lines: Vec<DigestLine>,
        /// No more to come.
        last: bool,
    },
    /// Agent: send this file as the last durable record leaves it, as soon as this one is durable. Answered by
    /// [`Frame::Newest`], and where that has a file by [`Frame::Content`] frames. No reader gets that: it is of no checkpoint.
    GetNewest {
        /// Name of the group.
        group: String,
        /// The file.
        object: ObjectId,
        /// Durable at least.
        at_least: Sequence,
    },
    /// Replayer: the file, without its bytes.
    Newest {
        /// The last record that counts.
        position: Sequence,
        /// None if it is not there, or is no regular file.
        file: Option<NewestFile>,
    },
    /// Agent: of which files of the applied checkpoint are bytes lost? Answered by [`Frame::Damage`] frames.
    GetDamage {
        /// Name of the group.
        group: String,
        /// First compare the whole tree with what is known of it, and put back what is not as it should be.
        heal: bool,
        /// Files whose bytes are then compared with their checksums.
        suspects: Vec<ObjectId>,
    },
    /// Replayer: files of which bytes are lost; they are as they should be when all of them came again.
    Damage {
        /// Some of them.
        objects: Vec<ObjectId>,
        /// No more to come.
        last: bool,
    },
    /// Agent: the images of the processes of this checkpoint follow, on a connection of their own. Answered by
    /// [`Frame::ProcessBegun`] as soon as the checkpoint is confirmed.
    PutProcess {
        /// Name of the group.
        group: String,
        /// The epoch that the agent holds; 0 with `made_ns`.
        epoch: Epoch,
        /// Of which checkpoint.
        checkpoint: CheckpointId,
        /// When it was made, nanoseconds since 1970: by that it is known where it came as a whole, and no stream with an
        /// epoch is written. Left out else.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        made_ns: Option<i64>,
    },
    /// Replayer: go on.
    ProcessBegun,
    /// Agent: digests of the next blocks of a file, in the body. The files come one after another, each from its
    /// beginning on. Answered by [`Frame::ProcessWanted`].
    ProcessBlocks {
        /// Name of the file.
        file: String,
        /// Bytes of the whole file.
        size: u64,
    },
    /// Replayer: a bit for each of these blocks in the body, the lowest first: whether its bytes are wanted.
    ProcessWanted,
    /// Agent: the bytes of the next blocks that are wanted, in the body. Not answered.
    ProcessBytes,
    /// Agent: that was all. Answered by [`Frame::ProcessKept`].
    ProcessEnd,
    /// Replayer: they are durable, and the checkpoint has them.
    ProcessKept,
    /// Command: send the images of the processes of a checkpoint. Answered by [`Frame::ProcessPiece`] frames.
    GetProcess {
        /// Name of the group.
        group: String,
        /// Of which checkpoint.
        at: CheckpointId,
    },
    /// Replayer: the next bytes of a file, in the body.
    ProcessPiece {
        /// Name of the file; empty at the end.
        file: String,
    },
    /// Command on the same host: the keys were changed, so look at them; connections of those that may not be there any more
    /// are ended. Answered by [`Frame::KeysRead`] when they are.
    ReadKeys,
    /// Replayer: the keys count as they are now.
    KeysRead {
        /// Connections that were ended.
        ended: u64,
    },
    /// Anyone who may connect: how do the groups stand? Answered by [`Frame::Status`], with the groups on which the peer
    /// has any right.
    GetStatus,
    /// Replayer: the groups.
    Status {
        /// One line a group.
        groups: Vec<GroupStatus>,
    },
    /// Either side: still there? The other answers with the same number in [`Frame::Pong`].
    Ping(u64),
    /// The answer.
    Pong(u64),
    /// The agent that writes ends, as it was told to: nobody has to look for it.
    Bye,
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// Longer than allowed.
    #[error("a frame of {0} bytes is beyond the limit")]
    TooLong(usize),
    /// Not a frame of this protocol.
    #[error("not a frame of this protocol: {0}")]
    Bad(String),
    /// The first bytes are not ours.
    #[error("the peer does not speak the bfs protocol")]
    NotBfs,
    /// Another version.
    #[error("the peer speaks protocol version {0}, this is version {ours}", ours = VERSION as u32)]
    Version(u32),
}

/// Checks the other side's [`PREAMBLE`].
///
/// # Errors
/// [`WireError::NotBfs`] or [`WireError::Version`].
pub fn check_preamble(theirs: [u8; 8]) -> Result<(), WireError> {
    if theirs[..4] != PREAMBLE[..4] {
        return Err(WireError::NotBfs);
    }
    let version = u32::from_le_bytes(theirs[4..].try_into().expect("4 bytes"));
    if version == VERSION as u32 { Ok(()) } else { Err(WireError::Version(version)) }
}

/// A frame as bytes.
///
/// # Panics
/// If the frame would be longer than [`FRAME_MAX`] (senders keep batches below it).
#[must_use]
pub fn encode_frame(frame: &Frame, body: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(FRAME_PREFIX + 64 + body.len());
    out.put_bytes(0, FRAME_PREFIX);
    rmp_serde::encode::write(&mut (&mut out).writer(), frame).expect("frames can be encoded");
    let head = out.len() - FRAME_PREFIX;
    out.put_slice(body);
    assert!(out.len() <= FRAME_MAX, "frame of {} bytes", out.len());
    let rest = out.len() - 4;
    out[..4].copy_from_slice(&(rest as u32).to_le_bytes());
    out[4..8].copy_from_slice(&(head as u32).to_le_bytes());
    out.freeze()
}

/// How many bytes the whole frame has, from its first four.
///
/// # Errors
/// [`WireError::TooLong`] beyond [`FRAME_MAX`].
pub fn frame_len(prefix: [u8; 4]) -> Result<usize, WireError> {
    let len = (u32::from_le_bytes(prefix) as usize).saturating_add(4);
    if !(FRAME_PREFIX..=FRAME_MAX).contains(&len) {
        return Err(WireError::TooLong(len));
    }
    Ok(len)
}

/// Takes a whole frame apart.
///
/// # Errors
/// [`WireError::Bad`] if it is not one.
pub fn decode_frame(mut bytes: Bytes) -> Result<(Frame, Bytes), WireError> {
    if bytes.len() < FRAME_PREFIX {
        return Err(WireError::Bad("too short".into()));
    }
    let head = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes")) as usize;
    if bytes.len() - FRAME_PREFIX < head {
        return Err(WireError::Bad("its head is longer than the frame".into()));
    }
    let body = bytes.split_off(FRAME_PREFIX + head);
    let frame = rmp_serde::from_slice(&bytes[FRAME_PREFIX..]).map_err(|e| WireError::Bad(e.to_string()))?;
    Ok((frame, body))
}

#[cfg(test)]
mod tests;
