//! Reading checkpoints that are kept, from the other end of a connection: which there are, what a
//! tree held, the bytes of its files. For both roles' commands: `restore` beside the backup,
//! `rollback` on the primary.

mod at;
mod clones;
mod export;
pub mod next;
mod promoted;
mod restore;
mod tar;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use bfs_common::past::{Difference, Look, Seen, VersionLine};
use bfs_common::record::{
    CheckpointId, CheckpointLabel, FileKind, Identity, Meta, Name, ObjectId, PathBytes, Sequence,
};
use bfs_common::wire::{
    DigestLine, Digests, Frame, GenerationLine, GroupStatus, History, NewestFile, PromoteStage, Promoter,
    process_file_is_valid,
};
use bytes::Bytes;

use crate::net::{AskError, ConnectError, Connection};

pub use at::{At, time_text, wall_ns};
pub use clones::Clones;
pub use export::{Exported, export};
pub use promoted::Places;
pub use restore::{RestoreError, Restored, make, restore};

/// How long the replayer may be silent: it may have much to read for one answer.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Files whose bytes are asked for together.
const FILES_AT_ONCE: usize = 512;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No runtime.
    #[error("cannot start an event loop: {0}")]
    Runtime(std::io::Error),
    /// The replayer did not answer as it should.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Nothing came.
    #[error("the replayer said nothing for {0} s")]
    Silent(u64),
    /// What came cannot be written.
    #[error("{0}")]
    Sink(std::io::Error),
}

/// Why there is no connection to read over.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It could not be made.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No event loop.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// An object of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// The primary's inode.
    pub identity: Identity,
    /// Type.
    pub kind: FileKind,
    /// Device number, user-space form.
    pub device: u64,
    /// Attributes.
    pub meta: Meta,
    /// Size of a regular file.
    pub size: u64,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(String, Bytes)>,
    /// Target of a symlink.
    pub target: Bytes,
    /// Entries of a directory.
    pub entries: Vec<(Name, ObjectId)>,
    /// Something about it changed since.
    pub changed: bool,
    /// blake3 of the content, if it was asked for.
    pub content: Option<[u8; 32]>,
}

/// A generation without the bytes of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Its label.
    pub label: CheckpointLabel,
    /// Its roots: the primary's absolute path, and the directory.
    pub roots: Vec<(PathBytes, ObjectId)>,
    /// Its objects.
    pub objects: BTreeMap<ObjectId, Object>,
}

impl Tree {
    /// The object at a path of the primary.
    #[must_use]
    pub fn find(&self, path: &Path) -> Option<ObjectId> {
        let (root, top) = self.roots.iter().find(|(root, _)| path.starts_with(root.as_path()))?;
        let mut at = *top;
        for name in path.strip_prefix(root.as_path()).ok()?.iter() {
            let entries = &self.objects.get(&at)?.entries;
            at = entries.iter().find(|(n, _)| n.as_os_str() == name)?.1;
        }
        Some(at)
    }
}

/// What a file had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// So many zeros.
    Zeros(u64),
    /// That was all.
    End,
}

/// How a promotion stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promotion {
    /// It.
    pub history: History,
    /// Records that no checkpoint covers: they are not given out.
    pub pending_records: u64,
    /// Their bytes.
    pub pending_bytes: u64,
}

/// A connection that reads.
pub struct Client {
    runtime: tokio::runtime::Runtime,
    connection: Connection,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("peer", &self.connection.peer).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// What `connect` says, or that no event loop can be started.
    pub fn open(connect: impl Future<Output = Result<Connection, ConnectError>>) -> Result<Self, OpenError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ReadError::Runtime)?;
        let connection = runtime.block_on(connect)?;
        Ok(Self { runtime, connection })
    }

    /// An answer of several frames, each with some lines and whether it is the last.
    fn lines<T>(
        &mut self,
        ask: &Frame,
        some: impl Fn(Frame) -> Option<(Vec<T>, bool)>,
    ) -> Result<Vec<T>, ReadError> {
        let mut all = Vec::new();
        self.ask(ask, |frame, _| {
            let (lines, last) = some(frame).ok_or(AskError::Unexpected)?;
            all.extend(lines);
            Ok(last)
        })?;
        Ok(all)
    }

    /// The generations of a group, the oldest first.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn generations(&mut self, group: &str) -> Result<Vec<GenerationLine>, ReadError> {
        self.lines(&Frame::GetGenerations { group: group.into() }, |frame| match frame {
            Frame::Generations { lines, last } => Some((lines, last)),
            _ => None,
        })
    }

    /// What differs between two generations, sorted by path; the older one first.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn differences(
        &mut self,
        group: &str,
        from: CheckpointId,
        to: CheckpointId,
    ) -> Result<Vec<Difference>, ReadError> {
        self.lines(&Frame::GetDifferences { group: group.into(), from, to }, |frame| match frame {
            Frame::Differences { lines, last } => Some((lines, last)),
            _ => None,
        })
    }

    /// The generations that changed what stands at a path of the primary, the oldest first.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn versions(&mut self, group: &str, path: &Path) -> Result<Vec<VersionLine>, ReadError> {
        let path = PathBytes::new(path);
        self.lines(&Frame::GetVersions { group: group.into(), path }, |frame| match frame {
            Frame::Versions { lines, last } => Some((lines, last)),
            _ => None,
        })
    }

    /// The stream of a generation, whole or as the difference to an older one: `each` gets its bytes.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::Sink`] for what `each` says.
    pub fn transfer(
        &mut self,
        group: &str,
        from: Option<CheckpointId>,
        to: CheckpointId,
        mut each: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), ReadError> {
        self.ask(&Frame::GetTransfer { group: group.into(), from, to }, |frame, body| match frame {
            Frame::Transfer { last } => {
                each(&body).map_err(ReadError::Sink)?;
                Ok(last)
            }
            _ => Err(AskError::Unexpected.into()),
        })
    }

    /// Sends a stream into a store: `next` fills in its next bytes, none at its end. Gives the group, and the
    /// checkpoint that is confirmed now.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::Sink`] for what `next` says. The store is as it was then.
    pub fn receive(
        &mut self,
        name: Option<String>,
        next: &mut dyn FnMut(&mut Vec<u8>) -> std::io::Result<()>,
    ) -> Result<(String, CheckpointId), ReadError> {
        let mut piece = Vec::new();
        loop {
            next(&mut piece).map_err(ReadError::Sink)?;
            let frame = Frame::Receive { group: name.clone(), last: piece.is_empty() };
            let mut done = None;
            self.ask_with(&frame, &piece, |frame, _| match frame {
                Frame::Received { taken } => {
                    done = taken;
                    Ok(true)
                }
                _ => Err(AskError::Unexpected.into()),
            })?;
            match done {
                Some(done) => return Ok(done),
                None if piece.is_empty() => return Err(AskError::Unexpected.into()),
                None => {}
            }
        }
    }

    /// The images of the processes of a checkpoint: `each` gets the name of a file and its next bytes.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::Sink`] for what `each` says.
    pub fn process(
        &mut self,
        group: &str,
        at: CheckpointId,
        mut each: impl FnMut(&str, &[u8]) -> std::io::Result<()>,
    ) -> Result<(), ReadError> {
        self.ask(&Frame::GetProcess { group: group.into(), at }, |frame, body| match frame {
            Frame::ProcessPiece { file } if file.is_empty() => Ok(true),
            Frame::ProcessPiece { file } if process_file_is_valid(&file) => {
                each(&file, &body).map_err(ReadError::Sink)?;
                Ok(false)
            }
            _ => Err(AskError::Unexpected.into()),
        })
    }

    /// How the groups of the store stand.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn status(&mut self) -> Result<Vec<GroupStatus>, ReadError> {
        self.lines(&Frame::GetStatus, |frame| match frame {
            Frame::Status { groups } => Some((groups, true)),
            _ => None,
        })
    }

    /// Makes the generations from one to another one, the newer; gives those that went.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn merge(
        &mut self,
        group: &str,
        from: CheckpointId,
        to: CheckpointId,
    ) -> Result<Vec<CheckpointId>, ReadError> {
        self.lines(&Frame::Merge { group: group.into(), from, to }, |frame| match frame {
            Frame::Merged { gone } => Some((gone, true)),
            _ => None,
        })
    }

    /// Begins a promotion, or goes on with one.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn promote(&mut self, group: &str, by: Promoter, force: bool) -> Result<Promotion, ReadError> {
        self.promotion(&Frame::Promote { group: group.into(), by, force })
    }

    /// Says how far a promotion is.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn promote_step(
        &mut self,
        group: &str,
        history: [u8; 16],
        stage: PromoteStage,
    ) -> Result<Promotion, ReadError> {
        self.promotion(&Frame::PromoteStep { group: group.into(), history, stage })
    }

    fn promotion(&mut self, ask: &Frame) -> Result<Promotion, ReadError> {
        let mut found = None;
        self.ask(ask, |frame, _| match frame {
            Frame::Promoted { history, pending_records, pending_bytes } => {
                found = Some(Promotion { history, pending_records, pending_bytes });
                Ok(true)
            }
            _ => Err(AskError::Unexpected.into()),
        })?;
        found.ok_or_else(|| AskError::Unexpected.into())
    }

    /// Where the roots of the applied tree stand on this host.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn places(&mut self, group: &str) -> Result<Vec<(ObjectId, PathBytes)>, ReadError> {
        self.lines(&Frame::GetPlaces { group: group.into() }, |frame| match frame {
            Frame::Places { roots } => Some((roots, true)),
            _ => None,
        })
    }

    /// A look into a generation, and the bytes that were asked for. It is held until the client is dropped.
    ///
    /// # Errors
    /// [`ReadError`]; what cannot be read of it is an answer, too.
    pub fn look(&mut self, group: &str, at: CheckpointId, look: Look) -> Result<(Seen, Bytes), ReadError> {
        let mut answer = None;
        self.ask(&Frame::Look { group: group.into(), at, look }, |frame, body| match frame {
            Frame::Seen(seen) => {
                answer = Some((seen, body));
                Ok(true)
            }
            _ => Err(AskError::Unexpected.into()),
        })?;
        answer.ok_or_else(|| AskError::Unexpected.into())
    }

    /// A generation without the bytes of its files. It is held until the client is dropped.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn tree(&mut self, group: &str, at: CheckpointId, digests: Digests) -> Result<Tree, ReadError> {
        let mut tree = Tree {
            checkpoint: at,
            label: CheckpointLabel::default(),
            roots: Vec::new(),
            objects: BTreeMap::new(),
        };
        self.ask(&Frame::GetTree { group: group.into(), at, digests }, |frame, _| match frame {
            Frame::Tree { label, roots, objects, last, .. } => {
                (tree.label, tree.roots) = (label, roots);
                for line in objects {
                    let o = line.object;
                    let object = tree.objects.entry(o.object).or_insert_with(|| Object {
                        identity: o.identity,
                        kind: o.kind,
                        device: o.device,
                        meta: o.meta,
                        size: o.size,
                        xattrs: Vec::new(),
                        target: o.target,
                        entries: Vec::new(),
                        changed: line.changed,
                        content: line.content,
                    });
                    object.xattrs.extend(o.xattrs);
                    object.entries.extend(o.entries);
                }
                Ok(last)
            }
            _ => Err(AskError::Unexpected.into()),
        })?;
        Ok(tree)
    }

    /// The bytes of files that are not zeros: `each` gets object, offset and bytes, and after the
    /// last of an object no bytes.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::Sink`] for what `each` says.
    pub fn contents(
        &mut self,
        group: &str,
        at: CheckpointId,
        objects: &[ObjectId],
        mut each: impl FnMut(ObjectId, u64, &[u8]) -> std::io::Result<()>,
    ) -> Result<(), ReadError> {
        for some in objects.chunks(FILES_AT_ONCE) {
            let mut left = some.iter();
            let mut next = left.next();
            let ask = Frame::GetContents { group: group.into(), at, objects: some.to_vec() };
            self.ask(&ask, |frame, body| match frame {
                Frame::Content { object, offset, last } if Some(&object) == next => {
                    if !body.is_empty() {
                        each(object, offset, &body).map_err(ReadError::Sink)?;
                    }
                    if last {
                        each(object, offset, b"").map_err(ReadError::Sink)?;
                        next = left.next();
                    }
                    Ok(next.is_none())
                }
                _ => Err(AskError::Unexpected.into()),
            })?;
        }
        Ok(())
    }

    /// A file as the last durable record leaves it, when this one is durable: which record that is, and the file, if it is
    /// there. Its bytes that are not zeros go to `each`, in order.
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::Sink`] for what `each` says.
    pub fn newest(
        &mut self,
        group: &str,
        object: ObjectId,
        at_least: Sequence,
        mut each: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
    ) -> Result<(Sequence, Option<NewestFile>), ReadError> {
        let mut found = None;
        self.ask(&Frame::GetNewest { group: group.into(), object, at_least }, |frame, body| match frame {
            Frame::Newest { position, file } if found.is_none() => {
                let is_all = file.is_none();
                found = Some((position, file));
                Ok(is_all)
            }
            Frame::Content { object: of, offset, last } if of == object && found.is_some() => {
                each(offset, &body).map_err(ReadError::Sink)?;
                Ok(last)
            }
            _ => Err(AskError::Unexpected.into()),
        })?;
        found.ok_or_else(|| AskError::Unexpected.into())
    }

    /// What files had where something was written since: `each` gets object, offset and what was there,
    /// and after the last of an object [`Change::End`].
    ///
    /// # Errors
    /// [`ReadError`]; [`ReadError::Sink`] for what `each` says.
    pub fn changes(
        &mut self,
        group: &str,
        at: CheckpointId,
        objects: &[ObjectId],
        mut each: impl FnMut(ObjectId, u64, Change<'_>) -> std::io::Result<()>,
    ) -> Result<(), ReadError> {
        for some in objects.chunks(FILES_AT_ONCE) {
            let mut left = some.iter();
            let mut next = left.next();
            let ask = Frame::GetChanges { group: group.into(), at, objects: some.to_vec() };
            self.ask(&ask, |frame, body| match frame {
                Frame::Change { object, offset, zeros, last } if Some(&object) == next => {
                    if !body.is_empty() {
                        each(object, offset, Change::Bytes(&body)).map_err(ReadError::Sink)?;
                    }
                    if zeros > 0 {
                        each(object, offset, Change::Zeros(zeros)).map_err(ReadError::Sink)?;
                    }
                    if last {
                        each(object, offset, Change::End).map_err(ReadError::Sink)?;
                        next = left.next();
                    }
                    Ok(next.is_none())
                }
                _ => Err(AskError::Unexpected.into()),
            })?;
        }
        Ok(())
    }

    /// Digests of the blocks of files as they were after a record of the stream.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn digests(
        &mut self,
        group: &str,
        position: Sequence,
        mut each: impl FnMut(DigestLine),
    ) -> Result<(), ReadError> {
        self.ask(&Frame::GetDigests { group: group.into(), position }, |frame, _| match frame {
            Frame::Digests { lines, last } => {
                lines.into_iter().for_each(&mut each);
                Ok(last)
            }
            _ => Err(AskError::Unexpected.into()),
        })
    }

    /// Sends a question, and gives the answers to `take` until it says that it was the last.
    fn ask(
        &mut self,
        question: &Frame,
        take: impl FnMut(Frame, Bytes) -> Result<bool, ReadError>,
    ) -> Result<(), ReadError> {
        self.ask_with(question, b"", take)
    }

    /// As [`Self::ask`], with a body.
    fn ask_with(
        &mut self,
        question: &Frame,
        body: &[u8],
        mut take: impl FnMut(Frame, Bytes) -> Result<bool, ReadError>,
    ) -> Result<(), ReadError> {
        let connection = &mut self.connection;
        self.runtime.block_on(async {
            connection.writer.send(question, body).await.map_err(AskError::from)?;
            loop {
                let answer = tokio::time::timeout(SILENCE_MAX, connection.answer()).await;
                let (frame, body) = answer.map_err(|_| ReadError::Silent(SILENCE_MAX.as_secs()))??;
                if take(frame, body)? {
                    return Ok(());
                }
            }
        })
    }
}
