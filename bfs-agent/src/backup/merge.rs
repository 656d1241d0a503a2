//! Dropping generations: in the middle their before-images are merged into those of the older neighbour.
//!
//! The images from A on say what A had and later steps changed. When the generations between A and C go, one file
//! of the step from A to C takes the place of all of theirs: of each object, entry and byte the oldest line stays,
//! and what A cannot need (bytes beyond its size, bytes and names in objects that came later) goes. So room is freed.
//! That bytes are lost is such a line too: what a later step had there is not what A had. The images of a step that is
//! under way begin at the newest generation, which stays, and are never merged.
//!
//! Each line is durable before the next begins:
//! 1. the merged file under a name of its own;
//! 2. it is renamed over the file of A. The chain from A now passes by what goes, and the files of that
//!    are still there for themselves: every generation can be read;
//! 3. one transaction of the index: their rows go, and files that were kept for them belong to A or to nobody;
//! 4. files that were kept for them alone are removed, and at last all images that no chain from a generation needs.
//!
//! After a crash the same is done again, to the end of the step that there is now: a merged file is a step like any
//! other. Should something else be dropped then, what was merged stays right, for the images that its
//! chain needs stay.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bfs_common::record::{CheckpointId, FileKind, GroupId, Name, ObjectId};

use super::apply::{Area, CrashPoint};
use super::error::BackupError;
use super::images::{self, BLOCK, BlockRef, Blocks, ImageWriter, Line};
use super::index::{Index, Node};
use super::pieces::{Piece, Pieces};

/// Generations that are merged at once: what their images say is in memory meanwhile.
const MERGED_MAX: usize = 64;

/// Generations that go and stand behind each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The one before them, which stays; none if there is none.
    pub older: Option<CheckpointId>,
    /// Those that go.
    pub gone: Vec<CheckpointId>,
    /// The one behind them, which stays.
    pub newer: CheckpointId,
}

/// Puts those that go together, of `all` (the oldest first); the newest of all never goes.
#[must_use]
pub fn runs(all: &[CheckpointId], gone: &BTreeSet<CheckpointId>) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut older = None;
    let mut together = Vec::new();
    for checkpoint in all {
        if gone.contains(checkpoint) {
            together.push(*checkpoint);
            continue;
        }
        if !together.is_empty() {
            runs.push(Run { older, gone: std::mem::take(&mut together), newer: *checkpoint });
        }
        older = Some(*checkpoint);
    }
    runs
}

/// What the lines of several steps come to.
#[derive(Default)]
struct Merged {
    nodes: BTreeMap<ObjectId, Option<Node>>,
    entries: BTreeMap<(ObjectId, Name), Option<ObjectId>>,
    pieces: BTreeMap<ObjectId, Pieces>,
}

impl Merged {
    fn take(&mut self, line: Line, block: BlockRef) {
        match line {
            Line::Object(object, node) => {
                self.nodes.entry(object).or_insert(node);
            }
            Line::Entry(directory, name, object) => {
                self.entries.entry((directory, name)).or_insert(object);
            }
            Line::Bytes(object, start) => {
                let end = start + u64::from(block.len);
                self.pieces.entry(object).or_default().fill(start, end, Piece::Block(block, 0));
            }
            Line::Zero(object, start, end) => {
                self.pieces.entry(object).or_default().fill(start, end, Piece::Zero);
            }
            Line::Unknown(object, start, end) => {
                self.pieces.entry(object).or_default().fill(start, end, Piece::Unknown);
            }
            Line::End(_) => {}
        }
    }

    /// Whether the object was there at the beginning of the first step.
    fn was_there(&self, object: ObjectId) -> bool {
        self.nodes.get(&object).is_none_or(Option::is_some)
    }

    /// The bytes of a file that the beginning of the first step can need end here.
    fn size(&self, object: ObjectId) -> u64 {
        match self.nodes.get(&object) {
            Some(Some(node)) if node.kind == FileKind::Regular => node.size,
            Some(_) => 0,
            None => u64::MAX,
        }
    }

    fn write(&self, blocks: &mut Blocks, mut writer: ImageWriter) -> Result<(), BackupError> {
        for (object, node) in &self.nodes {
            writer.line(&Line::Object(*object, node.clone()), b"")?;
        }
        let mut buffer = Vec::new();
        for (object, pieces) in &self.pieces {
            let (mut at, size) = (0, self.size(*object));
            while let Some((start, end, piece)) = pieces.next(at, size) {
                match piece {
                    Piece::Zero => writer.line(&Line::Zero(*object, start, end), b"")?,
                    Piece::Unknown => writer.line(&Line::Unknown(*object, start, end), b"")?,
                    Piece::Block(block, skip) => {
                        debug_assert!(end - start <= BLOCK as u64, "a piece lies in its block");
                        let bytes = blocks.part(block, skip, end - start, &mut buffer)?;
                        writer.line(&Line::Bytes(*object, start), bytes)?;
                    }
                }
                at = end;
            }
        }
        for ((directory, name), object) in &self.entries {
            if self.was_there(*directory) {
                writer.line(&Line::Entry(*directory, name.clone(), *object), b"")?;
            }
        }
        writer.seal()
    }
}

/// Where generations are dropped.
#[derive(Clone, Copy, Debug)]
pub struct Dropping<'a> {
    /// Number of the group.
    pub group: u32,
    /// Its identity.
    pub id: GroupId,
    /// The store's index.
    pub index: &'a Index,
    /// The group's folders.
    pub area: &'a Area,
}

impl Dropping<'_> {
    /// Drops generations of `all`, the oldest first: these need no room. Those in the middle are merged while there is
    /// room for their bytes once more; without it they wait. What fails does not stop the others.
    ///
    /// # Errors
    /// If something cannot be read, written or removed, the first of it; it can be done again.
    pub fn drop(
        &self,
        all: &[CheckpointId],
        gone: &BTreeSet<CheckpointId>,
        has_room: &mut dyn FnMut(u64) -> bool,
        crash: &mut CrashPoint,
    ) -> Result<(), BackupError> {
        let (mut merges, mut result) = (false, Ok(()));
        for run in runs(all, gone) {
            let dropped = match run.older {
                None => self.oldest(&run.gone),
                Some(older) => {
                    merges = true;
                    self.middle(older, &run, has_room, crash)
                }
            };
            result = result.and(dropped);
        }
        if merges {
            result = result.and(crash.pass().and_then(|()| {
                let needed = self.needed()?;
                self.area.drop_images(|image| needed.has(image))
            }));
        }
        result
    }

    fn oldest(&self, gone: &[CheckpointId]) -> Result<(), BackupError> {
        let (oldest, objects) = self.index.drop_generations(self.group, gone)?;
        self.area.drop_kept(&objects)?;
        self.area.drop_images(|image| image >= oldest)
    }

    fn middle(
        &self,
        older: CheckpointId,
        run: &Run,
        has_room: &mut dyn FnMut(u64) -> bool,
        crash: &mut CrashPoint,
    ) -> Result<(), BackupError> {
        let mut chunks = run.gone.chunks(MERGED_MAX).peekable();
        while let Some(gone) = chunks.next() {
            let newer = chunks.peek().map_or(run.newer, |next| next[0]);
            let both = std::iter::once(&older).chain(gone);
            if !has_room(both.map(|from| images::allocated(self.area.images(), *from)).sum()) {
                break;
            }
            self.merge(older, gone, newer, crash)?;
        }
        Ok(())
    }

    fn merge(
        &self,
        older: CheckpointId,
        gone: &[CheckpointId],
        newer: CheckpointId,
        crash: &mut CrashPoint,
    ) -> Result<(), BackupError> {
        let dir = self.area.images();
        let (mut merged, mut end) = (Merged::default(), older);
        // A merge that was broken off may have got further than this one has to.
        while end < newer {
            end = images::read(dir, self.id, end, |line, block| {
                merged.take(line, block);
                Ok(())
            })?;
        }
        crash.pass()?;
        let writer = ImageWriter::beside(dir, self.id, older, end)?;
        if let Err(error) = merged.write(&mut Blocks::new(dir), writer) {
            images::give_up(dir, older);
            return Err(error);
        }
        crash.pass()?;
        images::put_in_place(dir, older)?;
        crash.pass()?;
        let mut kept = Vec::new();
        for (object, last) in self.index.view(self.group)?.kept()? {
            if last >= gone[0] && last < newer {
                kept.push((object, merged.was_there(object).then_some(older)));
            }
        }
        self.index.merge_generations(self.group, gone, newer, &kept)?;
        crash.pass()?;
        let nobody: Vec<ObjectId> =
            kept.into_iter().filter(|(_, of)| of.is_none()).map(|(object, _)| object).collect();
        self.area.drop_kept(&nobody)
    }

    /// The images that a generation needs.
    ///
    /// # Errors
    /// If the index fails.
    pub fn needed(&self) -> Result<Needed, BackupError> {
        let all: Vec<_> = self.index.generations(self.group)?.into_iter().map(|(number, _)| number).collect();
        Ok(Needed::of(self.area.images(), self.id, &all))
    }
}

/// Images that a generation needs, by the checkpoints that their steps begin at.
#[derive(Debug)]
pub struct Needed {
    images: BTreeSet<CheckpointId>,
    /// And all from here on.
    from: CheckpointId,
}

impl Needed {
    /// Follows the chain from each generation, of `all` (the oldest first).
    fn of(dir: &Path, id: GroupId, all: &[CheckpointId]) -> Self {
        // The images of a step that is under way begin at the newest.
        let from = all.last().copied().unwrap_or(CheckpointId(0));
        let mut needed = Self { images: BTreeSet::new(), from };
        for checkpoint in all {
            let mut at = *checkpoint;
            while at < needed.from && needed.images.insert(at) {
                match images::step_of(dir, id, at) {
                    Ok(end) => at = end,
                    // Where it goes on is not known: nothing behind it may go.
                    Err(_) => needed.from = at,
                }
            }
        }
        needed
    }

    /// Whether they have this one.
    #[must_use]
    pub fn has(&self, image: CheckpointId) -> bool {
        self.images.contains(&image) || image >= self.from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_go_are_put_together() {
        let ids = |all: &[u64]| all.iter().copied().map(CheckpointId).collect::<Vec<_>>();
        let run = |older: u64, gone: &[u64], newer| Run {
            older: Some(CheckpointId(older)).filter(|n| n.0 > 0),
            gone: ids(gone),
            newer: CheckpointId(newer),
        };
        let runs = |gone: &[u64]| runs(&ids(&[1, 2, 3, 5, 8, 9]), &ids(gone).into_iter().collect());
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[1, 2]), [run(0, &[1, 2], 3)]);
        assert_eq!(runs(&[1, 3, 5, 9]), [run(0, &[1], 2), run(2, &[3, 5], 8)]);
    }
}
