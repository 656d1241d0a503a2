//! Reading a checkpoint that is kept: the tree as it is now, with the before-images of every step
//! since put over it.
//!
//! Among the images of the steps that start at the generation or later, the one with the smallest
//! start counts, else what stands in the tree. The bytes of a file are cut at its size at the
//! generation; objects are found by number, wherever they stand now, and those that are gone in
//! `kept/`. All of it under the lock of the tree: the applier waits meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;

use bfs_common::record::{CheckpointId, FileKind, GroupId, Name, ObjectId, PathBytes};
use bfs_common::wire::{Digests, Frame, TreeObject};
use bytes::Bytes;
use rustix::fs::OFlags;

use super::apply::{Area, CrashPoint, Step, next_data};
use super::error::BackupError;
use super::images::{self, BLOCK, BlockRef, Blocks, Line};
use super::index::{Base, GenerationRow, GroupRow, Index, Node, View};
use super::plan::Plan;
use super::read::lines_of;
use crate::tree;

/// Bytes of content in a frame.
const CONTENT_BYTES: usize = 1 << 20;
/// About how many bytes of lines a frame gets.
const FRAME_BYTES: usize = 1 << 20;

/// Takes a frame and its body; false gives up.
pub type Send<'a> = &'a mut dyn FnMut(Frame, Bytes) -> bool;

/// What a range of a file held.
#[derive(Clone, Copy, Debug)]
enum Piece {
    Zero,
    /// These bytes, from the so-manieth on.
    Block(BlockRef, u64),
}

/// Ranges of a file that do not overlap: offset to end and what was there.
#[derive(Debug, Default)]
struct Pieces(BTreeMap<u64, (u64, Piece)>);

impl Pieces {
    /// Says what a range held, where nothing is said yet: older images come first, and count.
    fn fill(&mut self, start: u64, end: u64, piece: Piece) {
        let mut at = start;
        if let Some((_, (covered, _))) = self.0.range(..=start).next_back() {
            at = at.max(*covered);
        }
        while at < end {
            let next = self.0.range(at..end).next().map(|(s, (e, _))| (*s, *e));
            let until = next.map_or(end, |(s, _)| s);
            if at < until {
                let piece = match piece {
                    Piece::Block(block, skip) => Piece::Block(block, skip + (at - start)),
                    Piece::Zero => Piece::Zero,
                };
                self.0.insert(at, (until, piece));
            }
            at = next.map_or(end, |(_, e)| e);
        }
    }

    /// What is said about the next range at or after `at`, below `end`.
    fn next(&self, at: u64, end: u64) -> Option<(u64, u64, Piece)> {
        if let Some((start, (e, piece))) = self.0.range(..at).next_back()
            && *e > at
        {
            let piece = match *piece {
                Piece::Block(block, skip) => Piece::Block(block, skip + (at - start)),
                Piece::Zero => Piece::Zero,
            };
            return Some((at, (*e).min(end), piece));
        }
        self.0.range(at..end).next().map(|(s, (e, piece))| (*s, (*e).min(end), *piece))
    }
}

/// A generation, to be read.
#[derive(Debug)]
pub struct Past<'a> {
    area: &'a Area,
    view: View,
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Its label and roots.
    pub row: GenerationRow,
    /// What changed since: as it was.
    nodes: BTreeMap<ObjectId, Option<Node>>,
    entries: BTreeMap<ObjectId, BTreeMap<Name, Option<ObjectId>>>,
    pieces: HashMap<ObjectId, Pieces>,
    blocks: Blocks,
}

impl<'a> Past<'a> {
    /// Opens a generation of a group that stands at `row`. The caller holds the lock of the tree.
    ///
    /// # Errors
    /// [`BackupError::NoGeneration`], [`BackupError::Applying`], or damage.
    pub fn open(
        area: &'a Area,
        index: &Index,
        row: &GroupRow,
        group: &str,
        checkpoint: CheckpointId,
    ) -> Result<Self, BackupError> {
        if index.plan(row.number)?.is_some() {
            return Err(BackupError::Applying(group.into()));
        }
        let all = index.generations(row.number)?;
        let Some((_, generation)) = all.iter().find(|(number, _)| *number == checkpoint) else {
            let range = match (all.first(), all.last()) {
                (Some((first, _)), Some((last, _))) => {
                    format!("kept are {} from {first} to {last}", all.len())
                }
                _ => "none is kept".into(),
            };
            return Err(BackupError::NoGeneration { group: group.into(), checkpoint, range });
        };
        let mut past = Self {
            area,
            view: index.view(row.number)?,
            checkpoint,
            row: generation.clone(),
            nodes: BTreeMap::new(),
            entries: BTreeMap::new(),
            pieces: HashMap::new(),
            blocks: Blocks::new(area.images()),
        };
        past.load(row.id, row.checkpoint)?;
        Ok(past)
    }

    /// Takes in the images of all steps from the generation to the tree, the oldest first.
    fn load(&mut self, group: GroupId, now: CheckpointId) -> Result<(), BackupError> {
        let dir = self.area.images();
        let mut at = self.checkpoint;
        while at < now {
            let (nodes, entries, pieces) = (&mut self.nodes, &mut self.entries, &mut self.pieces);
            let to = images::read(dir, group, at, |line, block| {
                match line {
                    Line::Object(object, node) => {
                        nodes.entry(object).or_insert(node);
                    }
                    Line::Entry(directory, name, object) => {
                        entries.entry(directory).or_default().entry(name).or_insert(object);
                    }
                    Line::Bytes(object, start) => {
                        let end = start + u64::from(block.len);
                        pieces.entry(object).or_default().fill(start, end, Piece::Block(block, 0));
                    }
                    Line::Zero(object, start, end) => {
                        pieces.entry(object).or_default().fill(start, end, Piece::Zero);
                    }
                    Line::End(_) => {}
                }
                Ok(())
            })?;
            if to <= at || to > now {
                let why = format!("the step from checkpoint {at} ends at {to}, the tree is at {now}");
                return Err(BackupError::corrupt(images::path(dir, at), why));
            }
            at = to;
        }
        Ok(())
    }

    /// The roots at it.
    #[must_use]
    pub fn roots(&self) -> &[(PathBytes, ObjectId)] {
        &self.row.roots
    }

    /// Whether anything about the object changed since.
    #[must_use]
    pub fn is_changed(&self, object: ObjectId) -> bool {
        self.nodes.contains_key(&object)
    }

    /// Whether it has some of these bytes of a file from where the file stands now, and not from an image.
    ///
    /// # Errors
    /// If the index fails.
    pub fn stands_on(&self, object: ObjectId, start: u64, end: u64) -> Result<bool, BackupError> {
        let Some(node) = self.node(object)? else { return Ok(false) };
        let (mut at, end) = (start, end.min(node.size));
        while at < end {
            match self.pieces.get(&object).and_then(|pieces| pieces.next(at, end)) {
                Some((start, end, _)) if start == at => at = end,
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// All objects; false if `each` gave up.
    ///
    /// # Errors
    /// If the index fails, or what `each` says.
    pub fn each(
        &self,
        each: &mut dyn FnMut(ObjectId, &Node) -> Result<bool, BackupError>,
    ) -> Result<bool, BackupError> {
        if !self.view.each(|object, node| Ok(self.nodes.contains_key(&object) || each(object, node)?))? {
            return Ok(false);
        }
        for (object, node) in &self.nodes {
            if let Some(node) = node
                && !each(*object, node)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The bytes of a file that are not zeros, in order: `each` gets the offset of each piece, of at
    /// most 64 KiB, and gives up with false.
    ///
    /// # Errors
    /// If they cannot be read or are damaged.
    pub fn content(
        &mut self,
        object: ObjectId,
        size: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<bool, BackupError> {
        let mut buffer = Vec::new();
        let none = Pieces::default();
        let pieces = self.pieces.get(&object).unwrap_or(&none);
        let mut file = None;
        let mut at = 0;
        while at < size {
            let (start, end, piece) = match pieces.next(at, size) {
                Some((start, end, piece)) => (start, end, Some(piece)),
                None => (size, size, None),
            };
            if at < start {
                let file = match &file {
                    Some(file) => file,
                    None => file.insert(current(self.area, &self.view, object)?),
                };
                if !copy(object, file, at, start, &mut buffer, each)? {
                    return Ok(false);
                }
            }
            if let Some(Piece::Block(block, skip)) = piece
                && !each(start, self.blocks.part(block, skip, end - start, &mut buffer)?)
            {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    fn digest(&mut self, object: ObjectId, size: u64) -> Result<[u8; 32], BackupError> {
        let mut hasher = blake3::Hasher::new();
        let mut done = 0;
        self.content(object, size, &mut |at, bytes| {
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
        let (checkpoint, label, roots) = (self.checkpoint, self.row.label.clone(), self.row.roots.clone());
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
        let none = Pieces::default();
        let mut buffer = Vec::new();
        for object in objects {
            let object = *object;
            let Some(node) = self.node(object)?.filter(|n| n.kind == FileKind::Regular) else {
                let why = format!("object {object} is no file at checkpoint {}", self.checkpoint);
                return Err(BackupError::Stream(why));
            };
            let pieces = self.pieces.get(&object).unwrap_or(&none);
            let mut frame = |offset, zeros, last, body| {
                send(Frame::Change { object, offset, zeros, last }, Bytes::from(body))
            };
            let mut waiting: (u64, Vec<u8>) = (0, Vec::new());
            let mut at = 0;
            // A file that grew and was cut again has pieces beyond its size.
            while at < node.size
                && let Some((start, end, piece)) = pieces.next(at, node.size)
            {
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
                    Piece::Zero => {}
                    Piece::Block(block, skip) => {
                        let bytes = self.blocks.part(block, skip, end - start, &mut buffer)?;
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
                let why = format!("object {object} is no file at checkpoint {}", self.checkpoint);
                return Err(BackupError::Stream(why));
            };
            let mut waiting: (u64, Vec<u8>) = (0, Vec::new());
            let goes_on = self.content(*object, node.size, &mut |at, bytes| {
                let follows = waiting.0 + waiting.1.len() as u64 == at;
                if !waiting.1.is_empty() && (!follows || waiting.1.len() + bytes.len() > CONTENT_BYTES) {
                    let frame = Frame::Content { object: *object, offset: waiting.0, last: false };
                    if !send(frame, std::mem::take(&mut waiting.1).into()) {
                        return false;
                    }
                }
                if waiting.1.is_empty() {
                    waiting.0 = at;
                }
                waiting.1.extend_from_slice(bytes);
                true
            })?;
            let frame = Frame::Content { object: *object, offset: waiting.0, last: true };
            if !goes_on || !send(frame, waiting.1.into()) {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The file of an object as it stands now.
fn current(area: &Area, view: &View, object: ObjectId) -> Result<File, BackupError> {
    if view.node(object)?.is_some() {
        let (plan, mut never) = (Plan::default(), CrashPoint::default());
        return Step::new(area, view, &plan, &mut never).open(object, OFlags::RDONLY).map(File::from);
    }
    match area.open_kept(object)? {
        Some(file) => Ok(file),
        None => Err(BackupError::Foreign(format!("object {object} is gone, and its file was not kept"))),
    }
}

/// Gives out the data of a range.
fn copy(
    object: ObjectId,
    file: &File,
    mut at: u64,
    end: u64,
    buffer: &mut Vec<u8>,
    each: &mut dyn FnMut(u64, &[u8]) -> bool,
) -> Result<bool, BackupError> {
    let failed = |error: std::io::Error| BackupError::io("read object", object.to_string())(error);
    while at < end {
        let (data, data_end) = next_data(file, at, end).map_err(|e| failed(e.into()))?;
        at = data;
        while at < data_end {
            let len = (data_end - at).min(BLOCK as u64) as usize;
            buffer.resize(len, 0);
            file.read_exact_at(buffer, at).map_err(failed)?;
            if !each(at, buffer) {
                return Ok(false);
            }
            at += len as u64;
        }
    }
    Ok(true)
}

impl Base for Past<'_> {
    fn node(&self, object: ObjectId) -> Result<Option<Node>, BackupError> {
        match self.nodes.get(&object) {
            Some(node) => Ok(node.clone()),
            None => self.view.node(object),
        }
    }

    fn entry(&self, directory: ObjectId, name: &Name) -> Result<Option<ObjectId>, BackupError> {
        match self.entries.get(&directory).and_then(|entries| entries.get(name)) {
            Some(entry) => Ok(*entry),
            None => self.view.entry(directory, name),
        }
    }

    fn entries(&self, directory: ObjectId) -> Result<Vec<(Name, ObjectId)>, BackupError> {
        let now = self.view.entries(directory)?;
        let Some(then) = self.entries.get(&directory) else { return Ok(now) };
        let mut all: BTreeMap<Name, ObjectId> = now.into_iter().collect();
        for (name, object) in then {
            match object {
                Some(object) => all.insert(name.clone(), *object),
                None => all.remove(name),
            };
        }
        Ok(all.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The first that says something about a byte counts.
        #[test]
        fn older_pieces_count(ranges in prop::collection::vec((0..60u64, 1..30u64), 0..12)) {
            let mut model = [None; 100];
            let mut pieces = Pieces::default();
            for (index, (start, len)) in ranges.iter().enumerate() {
                let block = BlockRef { image: CheckpointId(index as u64), at: 0, len: 0, crc: 0 };
                pieces.fill(*start, start + len, Piece::Block(block, 0));
                for at in *start..start + len {
                    model[at as usize].get_or_insert((index as u64, at - start));
                }
            }
            let mut found = [None; 100];
            let mut at = 0;
            while let Some((start, end, piece)) = pieces.next(at, 95) {
                let Piece::Block(block, skip) = piece else { panic!() };
                for here in start..end {
                    found[here as usize] = Some((block.image.0, skip + (here - start)));
                }
                at = end;
            }
            prop_assert_eq!(found, model);
        }
    }
}
