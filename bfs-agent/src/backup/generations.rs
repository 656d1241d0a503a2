//! What is sent of a generation: its objects, the bytes of its files, what changed since.

use bfs_common::record::{FileKind, ObjectId};
use bfs_common::wire::{Digests, Frame, TreeObject};
use bytes::Bytes;

use super::error::BackupError;
use super::index::Base;
use super::past::Past;
use super::pieces::Piece;
use super::read::lines_of;
use crate::tree;

/// Bytes of content in a frame.
const CONTENT_BYTES: usize = 1 << 20;
/// About how many bytes of lines a frame gets.
const FRAME_BYTES: usize = 1 << 20;

/// Takes a frame and its body; false gives up.
pub type Send<'a> = &'a mut dyn FnMut(Frame, Bytes) -> bool;

impl Past<'_> {
    fn digest(&mut self, object: ObjectId, size: u64) -> Result<[u8; 32], BackupError> {
        let mut hasher = blake3::Hasher::new();
        let mut done = 0;
        self.content(object, 0, size, &mut |at, bytes| {
            tree::hash_zeros(&mut hasher, at.saturating_sub(done));
            hasher.update(bytes);
            done = at + bytes.len() as u64;
            true
        })?;
        tree::hash_zeros(&mut hasher, size.saturating_sub(done));
        Ok(*hasher.finalize().as_bytes())
    }

    /// Sends all objects with their attributes and entries, and digests of what is asked for.
    ///
    /// # Errors
    /// If something cannot be read.
    pub fn send_tree(&mut self, digests: Digests, send: Send<'_>) -> Result<(), BackupError> {
        let mut all = Vec::new();
        self.each(&mut |object, node| {
            all.push((object, node.clone()));
            Ok(true)
        })?;
        let (checkpoint, label, roots) = (self.checkpoint(), self.row().label.clone(), self.roots().to_vec());
        let frame = |objects, last| {
            let (label, roots) = (label.clone(), roots.clone());
            Frame::Tree { checkpoint, label, roots, objects, last }
        };
        let mut objects = Vec::new();
        let mut bytes = 0;
        for (object, node) in all {
            let changed = self.is_changed(object);
            let wanted = node.kind == FileKind::Regular
                && match digests {
                    Digests::None => false,
                    Digests::Changed => changed,
                    Digests::All => true,
                };
            let content = if wanted { Some(self.digest(object, node.size)?) } else { None };
            let entries = if node.kind == FileKind::Directory { self.entries(object)? } else { Vec::new() };
            for (line, len) in lines_of(object, &node, &entries) {
                objects.push(TreeObject { object: line, changed, content });
                bytes += len + 40;
                if bytes >= FRAME_BYTES {
                    bytes = 0;
                    if !send(frame(std::mem::take(&mut objects), false), Bytes::new()) {
                        return Ok(());
                    }
                }
            }
        }
        send(frame(objects, true), Bytes::new());
        Ok(())
    }

    /// Sends what files had where something was written since.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn send_changes(&mut self, objects: &[ObjectId], send: Send<'_>) -> Result<(), BackupError> {
        let mut buffer = Vec::new();
        for object in objects {
            let object = *object;
            let Some(node) = self.node(object)?.filter(|n| n.kind == FileKind::Regular) else {
                let why = format!("object {object} is no file at checkpoint {}", self.checkpoint());
                return Err(BackupError::Stream(why));
            };
            let mut frame = |offset, zeros, last, body| {
                send(Frame::Change { object, offset, zeros, last }, Bytes::from(body))
            };
            let mut waiting: (u64, Vec<u8>) = (0, Vec::new());
            let mut at = 0;
            // A file that grew and was cut again has pieces beyond its size.
            while at < node.size
                && let Some((start, end, piece)) = self.next_piece(object, at, node.size)
            {
                let Some(bytes) = self.piece(object, (start, end, piece), &mut buffer)? else { continue };
                at = end;
                let follows = waiting.0 + waiting.1.len() as u64 == start;
                let zeros = matches!(piece, Piece::Zero);
                if !waiting.1.is_empty()
                    && (zeros || !follows || waiting.1.len() as u64 + (end - start) > CONTENT_BYTES as u64)
                    && !frame(waiting.0, 0, false, std::mem::take(&mut waiting.1))
                {
                    return Ok(());
                }
                match piece {
                    Piece::Zero if !frame(start, end - start, false, Vec::new()) => return Ok(()),
                    Piece::Zero | Piece::Unknown => {}
                    Piece::Block(..) => {
                        if waiting.1.is_empty() {
                            waiting.0 = start;
                        }
                        waiting.1.extend_from_slice(bytes);
                    }
                }
            }
            if !frame(waiting.0, 0, true, waiting.1) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends the bytes of files.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn send_contents(&mut self, objects: &[ObjectId], send: Send<'_>) -> Result<(), BackupError> {
        for object in objects {
            let Some(node) = self.node(*object)?.filter(|n| n.kind == FileKind::Regular) else {
                let why = format!("object {object} is no file at checkpoint {}", self.checkpoint());
                return Err(BackupError::Stream(why));
            };
            let mut contents = Contents::new(*object, send);
            let goes_on = self.content(*object, 0, node.size, &mut |at, bytes| contents.add(at, bytes))?;
            if !goes_on || !contents.end() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The bytes of a file on their way, put together into frames.
pub(super) struct Contents<'a> {
    object: ObjectId,
    offset: u64,
    waiting: Vec<u8>,
    send: Send<'a>,
}

impl<'a> Contents<'a> {
    /// Of this file.
    pub(super) fn new(object: ObjectId, send: Send<'a>) -> Self {
        Self { object, offset: 0, waiting: Vec::new(), send }
    }

    fn frame(&mut self, last: bool) -> bool {
        let frame = Frame::Content { object: self.object, offset: self.offset, last };
        (self.send)(frame, std::mem::take(&mut self.waiting).into())
    }

    /// The next of its bytes; false gives up.
    pub(super) fn add(&mut self, at: u64, bytes: &[u8]) -> bool {
        let follows = self.offset + self.waiting.len() as u64 == at;
        let is_full = !follows || self.waiting.len() + bytes.len() > CONTENT_BYTES;
        if !self.waiting.is_empty() && is_full && !self.frame(false) {
            return false;
        }
        if self.waiting.is_empty() {
            self.offset = at;
        }
        self.waiting.extend_from_slice(bytes);
        true
    }

    /// That was all of it.
    pub(super) fn end(mut self) -> bool {
        self.frame(true)
    }
}
