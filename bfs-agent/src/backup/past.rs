//! Reading a checkpoint that is kept: the tree as it is now, with the before-images of every step
//! since put over it.
//!
//! Among the images of the steps that start at the generation or later, the one with the smallest
//! start counts, else what stands in the tree. The bytes of a file are cut at its size at the
//! generation; objects are found by number, wherever they stand now, and those that are gone in
//! `kept/`.
//!
//! A reader stands beside the applier and takes no lock. The images of a step are sealed before it
//! changes anything, and the area says how far they are ([`Area::sealed`]). So what was read from
//! the tree is the generation's if no step has sealed its images since those that the reader knows;
//! else it takes them in and looks again. Attributes and entries come from a view of the index
//! that is not newer than the images that are known. A file that was found once is that object's
//! for as long as the generation is held: the applier writes in place, and what it deletes moves.
//! Only when a step has an object between two places does the reader wait for the end of it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, GroupId, Name, ObjectId, PathBytes};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::apply::{Area, CrashPoint, Step, next_data};
use super::error::BackupError;
use super::images::{self, BLOCK, Blocks, Line};
use super::index::{Base, GenerationRow, GroupRow, Index, Node, View};
use super::pieces::{Piece, Pieces};
use super::plan::Plan;

/// How often a reader begins again because images were merged under it.
pub(super) const MERGES_MAX: u32 = 16;
/// How often an object is looked for before the end of the step is waited for.
const LOOKS: u32 = 3;
/// How long a step that failed half way is waited for.
const STEP_WAIT: Duration = Duration::from_secs(30);
/// And how long between two looks.
const STEP_PAUSE: Duration = Duration::from_millis(50);
/// Files held open at once.
const FILES_MAX: usize = 64;

/// Where generations of a group are read from.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The group's folders.
    pub area: &'a Area,
    /// The store's index.
    pub index: &'a Index,
    /// Name of the group.
    pub group: &'a str,
    /// Its number.
    pub number: u32,
    /// Its identity.
    pub id: GroupId,
    /// What the applier holds while it does a step; none where there is no applier.
    pub tree: Option<&'a Mutex<GroupRow>>,
}

impl<'a> Source<'a> {
    /// Of a group that nobody works on.
    #[must_use]
    pub fn at_rest(area: &'a Area, index: &'a Index, group: &'a str, row: &GroupRow) -> Self {
        area.seal(row.checkpoint);
        Self { area, index, group, number: row.number, id: row.id, tree: None }
    }
}

/// What is known of a generation: it may be kept between two readings.
#[derive(Debug)]
pub struct Loaded {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Its label and roots.
    pub row: GenerationRow,
    /// The images of all steps up to here are known.
    upto: CheckpointId,
    /// What changed since: as it was.
    nodes: BTreeMap<ObjectId, Option<Node>>,
    entries: BTreeMap<ObjectId, BTreeMap<Name, Option<ObjectId>>>,
    pieces: HashMap<ObjectId, Pieces>,
    blocks: Blocks,
    files: HashMap<ObjectId, Arc<File>>,
}

impl Loaded {
    /// Takes in the images of all steps up to a checkpoint, the oldest first.
    fn take(&mut self, source: &Source<'_>, upto: CheckpointId) -> Result<(), BackupError> {
        let dir = source.area.images();
        while self.upto < upto {
            let at = self.upto;
            let (nodes, entries, pieces) = (&mut self.nodes, &mut self.entries, &mut self.pieces);
            let to = images::read(dir, source.id, at, |line, block| {
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
            // One that was merged meanwhile may end at a step that was sealed meanwhile.
            let sealed = source.area.sealed();
            if to <= at || to > sealed {
                let why = format!("the step from checkpoint {at} ends at {to}, the tree is at {sealed}");
                return Err(BackupError::corrupt(images::path(dir, at), why));
            }
            self.blocks.expect(at, to);
            self.upto = to;
        }
        Ok(())
    }

    /// Only the files that were found are still known. Of images that were read in part too, nothing may stay:
    /// others may stand in their place the next time.
    fn forget(&mut self, source: &Source<'_>) {
        self.upto = self.checkpoint;
        self.nodes.clear();
        self.entries.clear();
        self.pieces.clear();
        self.blocks = Blocks::new(source.area.images());
    }
}

/// A generation, to be read. Whoever reads holds it, so that it stays.
#[derive(Debug)]
pub struct Past<'a> {
    source: Source<'a>,
    view: View,
    loaded: Loaded,
}

impl<'a> Past<'a> {
    /// Opens a generation.
    ///
    /// # Errors
    /// [`BackupError::NoGeneration`], or damage.
    pub fn open(source: Source<'a>, checkpoint: CheckpointId) -> Result<Self, BackupError> {
        let all = source.index.generations(source.number)?;
        let Some((_, row)) = all.iter().find(|(number, _)| *number == checkpoint) else {
            return Err(no_generation(source.group, checkpoint, &all));
        };
        let loaded = Loaded {
            checkpoint,
            row: row.clone(),
            upto: checkpoint,
            nodes: BTreeMap::new(),
            entries: BTreeMap::new(),
            pieces: HashMap::new(),
            blocks: Blocks::new(source.area.images()),
            files: HashMap::new(),
        };
        Self::again(source, loaded)
    }

    /// Goes on with one that was read before, and held all the time.
    ///
    /// # Errors
    /// If index or images fail.
    pub fn again(source: Source<'a>, mut loaded: Loaded) -> Result<Self, BackupError> {
        let view = caught_up(&source, &mut loaded)?;
        Ok(Self { source, view, loaded })
    }

    /// What is known, for later.
    #[must_use]
    pub fn rest(self) -> Loaded {
        self.loaded
    }

    /// Its number.
    #[must_use]
    pub fn checkpoint(&self) -> CheckpointId {
        self.loaded.checkpoint
    }

    /// Its label and roots.
    #[must_use]
    pub fn row(&self) -> &GenerationRow {
        &self.loaded.row
    }

    /// The roots at it.
    #[must_use]
    pub fn roots(&self) -> &[(PathBytes, ObjectId)] {
        &self.loaded.row.roots
    }

    /// Whether anything about the object changed since.
    #[must_use]
    pub fn is_changed(&self, object: ObjectId) -> bool {
        self.loaded.nodes.contains_key(&object)
    }

    /// Whether it has some of these bytes of a file from where the file stands now, and not from an image.
    ///
    /// # Errors
    /// If the index fails.
    pub fn stands_on(&self, object: ObjectId, start: u64, end: u64) -> Result<bool, BackupError> {
        let Some(node) = self.node(object)? else { return Ok(false) };
        let (mut at, end) = (start, end.min(node.size));
        while at < end {
            match self.next_piece(object, at, end) {
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
        let nodes = &self.loaded.nodes;
        if !self.view.each(|object, node| Ok(nodes.contains_key(&object) || each(object, node)?))? {
            return Ok(false);
        }
        for (object, node) in nodes {
            if let Some(node) = node
                && !each(*object, node)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes in what steps have sealed since; true if there was something.
    fn look_again(&mut self) -> Result<bool, BackupError> {
        if self.source.area.sealed() == self.loaded.upto {
            return Ok(false);
        }
        self.view = caught_up(&self.source, &mut self.loaded)?;
        Ok(true)
    }

    /// The next range at or after `at`, below `end`, where something was written since, and what it had.
    pub fn next_piece(&self, object: ObjectId, at: u64, end: u64) -> Option<(u64, u64, Piece)> {
        self.loaded.pieces.get(&object)?.next(at, end)
    }

    /// The bytes of a piece; none if the images were merged meanwhile: then the pieces are others.
    ///
    /// # Errors
    /// If they cannot be read or are damaged.
    pub fn piece<'b>(
        &mut self,
        piece: (u64, u64, Piece),
        buffer: &'b mut Vec<u8>,
    ) -> Result<Option<&'b [u8]>, BackupError> {
        let (start, end, Piece::Block(block, skip)) = piece else { return Ok(Some(&[])) };
        match self.loaded.blocks.part(block, skip, end - start, buffer) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.is_merged() => {
                self.loaded.forget(&self.source);
                self.view = caught_up(&self.source, &mut self.loaded)?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The bytes of a range of a file that are not zeros, in order: `each` gets the offset of each piece, of at
    /// most 64 KiB, and gives up with false. The range ends with the file, or before.
    ///
    /// # Errors
    /// If they cannot be read or are damaged.
    pub fn content(
        &mut self,
        object: ObjectId,
        mut at: u64,
        size: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<bool, BackupError> {
        let mut buffer = Vec::new();
        while at < size {
            let piece = self.next_piece(object, at, size);
            if let Some(piece) = piece.filter(|(start, ..)| *start == at) {
                let Some(bytes) = self.piece(piece, &mut buffer)? else { continue };
                if !bytes.is_empty() && !each(at, bytes) {
                    return Ok(false);
                }
                at = piece.1;
                continue;
            }
            let until = piece.map_or(size, |(start, ..)| start);
            let file = self.file(object)?;
            let found = read_some(&file, at, until, &mut buffer);
            // What the tree had counts only if no step began meanwhile; an error too.
            if self.look_again()? {
                continue;
            }
            let data = found.map_err(BackupError::io("read object", object.to_string()))?;
            if !buffer.is_empty() && !each(data, &buffer) {
                return Ok(false);
            }
            at = data + buffer.len() as u64;
        }
        Ok(true)
    }

    /// The file of an object as it stands now.
    fn file(&mut self, object: ObjectId) -> Result<Arc<File>, BackupError> {
        if let Some(file) = self.loaded.files.get(&object) {
            return Ok(file.clone());
        }
        let file = Arc::new(self.find(object)?);
        if self.loaded.files.len() >= FILES_MAX {
            self.loaded.files.clear();
        }
        self.loaded.files.insert(object, file.clone());
        Ok(file)
    }

    fn find(&mut self, object: ObjectId) -> Result<File, BackupError> {
        for _ in 0..LOOKS {
            if let Some(file) = current(self.source.area, &self.view, object)? {
                return Ok(file);
            }
            self.view = caught_up(&self.source, &mut self.loaded)?;
        }
        let deadline = Instant::now() + STEP_WAIT;
        loop {
            // The step that is under way ends first.
            let step = self.source.tree.map(|tree| tree.lock().unwrap_or_else(PoisonError::into_inner));
            self.view = caught_up(&self.source, &mut self.loaded)?;
            if let Some(file) = current(self.source.area, &self.view, object)? {
                return Ok(file);
            }
            if self.source.index.plan(self.source.number)?.is_none() {
                let why = format!("object {object} is neither in its place nor kept");
                return Err(BackupError::Foreign(why));
            }
            if step.is_none() || Instant::now() > deadline {
                return Err(BackupError::Applying(self.source.group.into()));
            }
            // It failed half way, and is tried again.
            drop(step);
            std::thread::sleep(STEP_PAUSE);
        }
    }
}

/// That there is no such generation.
pub(super) fn no_generation(
    group: &str,
    checkpoint: CheckpointId,
    all: &[(CheckpointId, GenerationRow)],
) -> BackupError {
    let range = match (all.first(), all.last()) {
        (Some((first, _)), Some((last, _))) => format!("kept are {} from {first} to {last}", all.len()),
        _ => "none is kept".into(),
    };
    BackupError::NoGeneration { group: group.into(), checkpoint, range }
}

/// A view of the index, and with it all images that a step has sealed.
fn caught_up(source: &Source<'_>, loaded: &mut Loaded) -> Result<View, BackupError> {
    let mut tries = 0;
    loop {
        // In this order: the images go at least as far as the view.
        let view = source.index.view(source.number)?;
        match loaded.take(source, source.area.sealed()) {
            Ok(()) => return Ok(view),
            Err(error) => {
                loaded.forget(source);
                if tries == MERGES_MAX || !error.is_merged() {
                    return Err(error);
                }
                tries += 1;
            }
        }
    }
}

/// The file of an object where it stands; none if a step has it between two places.
fn current(area: &Area, view: &View, object: ObjectId) -> Result<Option<File>, BackupError> {
    if view.node(object)?.is_some() {
        let (plan, mut never) = (Plan::default(), CrashPoint::default());
        match Step::new(area, view, &plan, &mut never).open(object, OFlags::RDONLY) {
            Ok(fd) => return Ok(Some(File::from(fd))),
            Err(BackupError::Foreign(_)) => {}
            Err(BackupError::Io { error, .. })
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::AGAIN)
                ) => {}
            Err(error) => return Err(error),
        }
    }
    area.open_kept(object)
}

/// Reads the next bytes of a range that are not in a hole, at most a block; returns where they begin.
fn read_some(file: &File, at: u64, until: u64, buffer: &mut Vec<u8>) -> std::io::Result<u64> {
    buffer.clear();
    let (data, end) = next_data(file, at, until)?;
    buffer.resize((end - data).min(BLOCK as u64) as usize, 0);
    file.read_exact_at(buffer, data)?;
    Ok(data)
}

impl Base for Past<'_> {
    fn node(&self, object: ObjectId) -> Result<Option<Node>, BackupError> {
        match self.loaded.nodes.get(&object) {
            Some(node) => Ok(node.clone()),
            None => self.view.node(object),
        }
    }

    fn entry(&self, directory: ObjectId, name: &Name) -> Result<Option<ObjectId>, BackupError> {
        match self.loaded.entries.get(&directory).and_then(|entries| entries.get(name)) {
            Some(entry) => Ok(*entry),
            None => self.view.entry(directory, name),
        }
    }

    fn entries(&self, directory: ObjectId) -> Result<Vec<(Name, ObjectId)>, BackupError> {
        let now = self.view.entries(directory)?;
        let Some(then) = self.loaded.entries.get(&directory) else { return Ok(now) };
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
