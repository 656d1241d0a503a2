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
//!
//! Nothing of the tree is given out that does not fit its checksum. The view has the checksums of its own
//! checkpoint, and a step may be changing these blocks: so the images of that one step are put over a block
//! before it is compared. What does not fit is looked for once more while no step runs, and only then named
//! as lost.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, GroupId, Name, ObjectId, PathBytes};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::apply::{Area, CrashPoint, Step};
use super::error::BackupError;
use super::images::{self, BLOCK, Blocks, Line};
use super::index::{Base, GenerationRow, GroupRow, Index, Node, View};
use super::pieces::{Piece, Pieces};
use super::plan::Plan;
use super::sums::{self, Next};
use crate::tree;

/// How often a reader begins again because images were merged under it, or steps went by.
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
    /// The step behind the view, if its images are known: where it begins, and what it writes over.
    running: Option<(CheckpointId, HashMap<ObjectId, Pieces>)>,
    blocks: Blocks,
    files: HashMap<ObjectId, Arc<File>>,
}

impl Loaded {
    /// Takes in the images of all steps up to a checkpoint, the oldest first. `view`: that of the view.
    fn take(
        &mut self,
        source: &Source<'_>,
        view: CheckpointId,
        upto: CheckpointId,
    ) -> Result<(), BackupError> {
        let dir = source.area.images();
        while self.upto < upto {
            let at = self.upto;
            let (nodes, entries, pieces) = (&mut self.nodes, &mut self.entries, &mut self.pieces);
            let mut running = (at >= view).then(HashMap::<ObjectId, Pieces>::new);
            let mut had = |object, start, end, piece| {
                pieces.entry(object).or_default().fill(start, end, piece);
                if let Some(running) = &mut running {
                    running.entry(object).or_default().fill(start, end, piece);
                }
            };
            let to = images::read(dir, source.id, at, |line, block| {
                match line {
                    Line::Object(object, node) => {
                        nodes.entry(object).or_insert(node);
                    }
                    Line::Entry(directory, name, object) => {
                        entries.entry(directory).or_default().entry(name).or_insert(object);
                    }
                    Line::Bytes(object, start) => {
                        had(object, start, start + u64::from(block.len), Piece::Block(block, 0));
                    }
                    Line::Zero(object, start, end) => had(object, start, end, Piece::Zero),
                    Line::Unknown(object, start, end) => had(object, start, end, Piece::Unknown),
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
            self.running = running.map(|running| (at, running));
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
        self.running = None;
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
            running: None,
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

    /// That it cannot give out these bytes.
    const fn lost(&self, object: ObjectId, start: u64, end: u64) -> BackupError {
        BackupError::Lost { checkpoint: self.loaded.checkpoint, object, start, end }
    }

    /// Which bytes of a file it has not any more.
    ///
    /// # Errors
    /// If the index fails.
    pub fn lost_of(&self, object: ObjectId) -> Result<Option<(u64, u64)>, BackupError> {
        let Some(node) = self.node(object)? else { return Ok(None) };
        let mut at = 0;
        while at < node.size
            && let Some((start, end, piece)) = self.next_piece(object, at, node.size)
        {
            if matches!(piece, Piece::Unknown) {
                return Ok(Some((start, end)));
            }
            at = end;
        }
        for (start, end) in self.view.damage(object)?.within(0, node.size) {
            if self.stands_on(object, start, end)? {
                return Ok(Some((start, end)));
            }
        }
        Ok(None)
    }

    /// Files of which images say that something is lost.
    pub fn unknown(&self) -> impl Iterator<Item = ObjectId> + '_ {
        self.loaded.pieces.iter().filter(|(_, pieces)| pieces.has_unknown()).map(|(object, _)| *object)
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
    /// [`BackupError::Lost`] if nobody knows them any more, or if they cannot be read or are damaged.
    pub fn piece<'b>(
        &mut self,
        object: ObjectId,
        (start, end, piece): (u64, u64, Piece),
        buffer: &'b mut Vec<u8>,
    ) -> Result<Option<&'b [u8]>, BackupError> {
        let (block, skip) = match piece {
            Piece::Zero => return Ok(Some(&[])),
            Piece::Unknown => return Err(self.lost(object, start, end)),
            Piece::Block(block, skip) => (block, skip),
        };
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
                let Some(bytes) = self.piece(object, piece, &mut buffer)? else { continue };
                if !bytes.is_empty() && !each(at, bytes) {
                    return Ok(false);
                }
                at = piece.1;
                continue;
            }
            let until = piece.map_or(size, |(start, ..)| start);
            let file = self.file(object)?;
            let found = self.standing(object, &file, at..until, &mut buffer);
            // What the tree had counts only if no step began meanwhile; an error too.
            if self.look_again()? {
                continue;
            }
            let found = match found? {
                Some(Standing::Bad(..)) => self.doubted(object, at, size, &mut buffer)?,
                other => other,
            };
            match found {
                // Something is known now that was not before.
                None => {}
                Some(Standing::Zeros(until)) => at = until,
                Some(Standing::Data(from, part)) => {
                    at = from + part.len() as u64;
                    if !each(from, &buffer[part]) {
                        return Ok(false);
                    }
                }
                Some(Standing::Bad(start, end)) => return Err(self.lost(object, start, end)),
            }
        }
        Ok(true)
    }

    /// The first of these bytes of a file, about which no image says anything, as the file has them; none if the
    /// images were merged meanwhile. It counts only if no other step has begun since.
    fn standing(
        &mut self,
        object: ObjectId,
        file: &File,
        mut wanted: Range<u64>,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Standing>, BackupError> {
        let failed = |error: std::io::Error| BackupError::io("read object", object.to_string())(error);
        let damage = self.view.damage(object)?;
        if let Some((start, end)) = damage.within(wanted.start, wanted.end).next() {
            return Ok(Some(Standing::Bad(start, end)));
        }
        // A block of which a part is damaged has no checksum: nothing vouches for the rest of it.
        let block = |at: u64| (at - at % BLOCK as u64, (at / BLOCK as u64 + 1) * BLOCK as u64);
        let ((first, first_end), (last, last_end)) = (block(wanted.start), block(wanted.end - 1));
        if damage.touches(first, first_end) {
            return Ok(Some(Standing::Bad(wanted.start, first_end.min(wanted.end))));
        }
        if damage.touches(last, last_end) {
            wanted.end = last;
        }
        let size = match self.view.node(object)? {
            Some(node) => node.size,
            None => file.metadata().map_err(failed)?.len(),
        };
        let running = self.loaded.running.as_ref().and_then(|(_, running)| running.get(&object));
        let written = |start, end| running.is_some_and(|pieces| pieces.next(start, end).is_some());
        let next = sums::next(&self.view.sums(object), file, size, wanted.clone(), written)?;
        let (start, end, sum) = match next {
            Next::Zeros(until) => return Ok(Some(Standing::Zeros(until))),
            Next::Bad(start, end) => return Ok(Some(Standing::Bad(start, end))),
            Next::Block(start, end, sum) => (start, end, sum),
        };
        let over: Vec<_> =
            std::iter::successors(running.and_then(|pieces| pieces.next(start, end)), |last| {
                running.and_then(|pieces| pieces.next(last.1, end))
            })
            .collect();
        let bad = Ok(Some(Standing::Bad(start, end)));
        buffer.clear();
        buffer.resize((end - start) as usize, 0);
        let there = start + sums::read_there(file, start, buffer).map_err(failed)? as u64;
        let (from, to) = (start.max(wanted.start), end.min(wanted.end));
        if to > there {
            return bad;
        }
        if let Some(sum) = sum {
            // What the step wrote, or is about to, is put back first.
            let mut before = Vec::new();
            let mut image = Vec::new();
            if !over.is_empty() {
                before.clone_from(buffer);
            }
            for (at, until, piece) in over {
                if matches!(piece, Piece::Unknown) {
                    return bad;
                }
                let Some(bytes) = self.piece(object, (at, until, piece), &mut image)? else {
                    return Ok(None);
                };
                let part = &mut before[(at - start) as usize..(until - start) as usize];
                if bytes.is_empty() { part.fill(0) } else { part.copy_from_slice(bytes) }
            }
            if crc32c::crc32c(if before.is_empty() { buffer } else { &before }) != sum {
                return bad;
            }
        }
        Ok(Some(Standing::Data(from, (from - start) as usize..(to - start) as usize)))
    }

    /// Looks again at what seems to be lost, for the file and its state anew, while no step changes anything.
    fn doubted(
        &mut self,
        object: ObjectId,
        at: u64,
        size: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Standing>, BackupError> {
        self.loaded.files.remove(&object);
        let _step = self.source.tree.map(|tree| tree.lock().unwrap_or_else(PoisonError::into_inner));
        self.view = caught_up(&self.source, &mut self.loaded)?;
        let until = match self.next_piece(object, at, size) {
            Some((start, ..)) if start == at => return Ok(None),
            Some((start, ..)) => start,
            None => size,
        };
        match current(self.source.area, &self.view, object)? {
            Some(file) => self.standing(object, &file, at..until, buffer),
            // Whoever looks for it says why.
            None => Ok(None),
        }
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

/// What a file has, where it stands now.
enum Standing {
    /// Nothing but zeros, up to here.
    Zeros(u64),
    /// Bytes from this offset on: this part of the buffer.
    Data(u64, Range<usize>),
    /// These bytes are not what they should be: offset and end.
    Bad(u64, u64),
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

/// A view of the index, and with it all images that a step has sealed: of one step at most that the view has not.
fn caught_up(source: &Source<'_>, loaded: &mut Loaded) -> Result<View, BackupError> {
    let mut tries = 0;
    loop {
        // In this order: the images go at least as far as the view.
        let view = source.index.view(source.number)?;
        let stands = view.newest().unwrap_or_default();
        let trouble = match loaded.take(source, stands, source.area.sealed()) {
            Ok(()) if loaded.upto == stands => {
                loaded.running = None;
                return Ok(view);
            }
            Ok(()) if loaded.running.as_ref().is_some_and(|(from, _)| *from == stands) => return Ok(view),
            // Several steps went by.
            Ok(()) => BackupError::Applying(source.group.into()),
            Err(error) => {
                loaded.forget(source);
                if !error.is_merged() {
                    return Err(error);
                }
                error
            }
        };
        if tries == MERGES_MAX {
            return Err(trouble);
        }
        tries += 1;
    }
}

/// The file of an object where it stands; none if a step has it between two places.
fn current(area: &Area, view: &View, object: ObjectId) -> Result<Option<File>, BackupError> {
    let node = view.node(object)?;
    if node.is_some() {
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
    let Some(file) = area.open_kept(object)? else { return Ok(None) };
    // One that was made again in the midst of a step is another.
    let failed = |error| BackupError::io("stat object", object.to_string())(error);
    let ino = tree::stat_fd(file.as_fd()).map_err(failed)?.ino;
    Ok(node.is_none_or(|node| node.ino == 0 || node.ino == ino).then_some(file))
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
