//! What changed between generations: the differences of two, and the generations that changed a path.
//!
//! Both go over the lines of before-images only, so they cost what changed and not what is there. An object
//! is followed by its number: a file that got another name is the same one. What was replaced by another
//! object at the same path (as editors do) counts as changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use bfs_common::past::{Aspect, Difference, Event, Side, VersionLine};
use bfs_common::record::{CheckpointId, FileKind, Name, ObjectId, PathBytes};

use super::error::BackupError;
use super::images::{self, Line};
use super::index::{Base, GenerationRow, Node, Place, View};
use super::past::{MERGES_MAX, Past, Source};
use super::pieces::joined;

/// Levels of directories, a bound for the way up.
const DEPTH_MAX: usize = 4096;
/// Bytes that are compared at once.
const COMPARE_BYTES: u64 = 1 << 20;

/// Ranges of a file in which something was written.
type Ranges = Vec<(u64, u64)>;

/// What steps touched.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Objects, and of files the ranges that were written over or cut off.
    pub objects: BTreeMap<ObjectId, Ranges>,
    /// Entries.
    pub entries: BTreeSet<(ObjectId, Name)>,
}

/// What the steps from one generation to another touched.
///
/// # Errors
/// If images cannot be read.
pub(super) fn changes(
    source: &Source<'_>,
    from: CheckpointId,
    to: CheckpointId,
) -> Result<Changes, BackupError> {
    begin_again(|| {
        let mut all = Changes::default();
        let mut at = from;
        while at < to {
            at = images::read(source.area.images(), source.id, at, |line, block| {
                let found = &mut all.objects;
                match line {
                    Line::Object(object, _) => {
                        found.entry(object).or_default();
                    }
                    Line::Entry(directory, name, _) => {
                        all.entries.insert((directory, name));
                    }
                    Line::Bytes(object, start) => {
                        found.entry(object).or_default().push((start, start + u64::from(block.len)));
                    }
                    Line::Zero(object, start, end) | Line::Unknown(object, start, end) => {
                        found.entry(object).or_default().push((start, end));
                    }
                    Line::End(_) => {}
                }
                Ok(())
            })?;
        }
        Ok(all)
    })
}

/// Does what reads images, until none of them was merged or dropped meanwhile.
fn begin_again<T>(mut read: impl FnMut() -> Result<T, BackupError>) -> Result<T, BackupError> {
    let mut tries = 0;
    loop {
        match read() {
            Err(error) if error.is_merged() && tries < MERGES_MAX => tries += 1,
            other => return other,
        }
    }
}

/// Paths of objects, upwards.
struct Paths<'a, B> {
    base: &'a B,
    directories: HashMap<ObjectId, Option<Vec<u8>>>,
}

impl<'a, B: Base> Paths<'a, B> {
    fn new(base: &'a B) -> Self {
        Self { base, directories: HashMap::new() }
    }

    fn directory(&mut self, object: ObjectId, depth: usize) -> Result<Option<Vec<u8>>, BackupError> {
        if let Some(known) = self.directories.get(&object) {
            return Ok(known.clone());
        }
        if depth > DEPTH_MAX {
            let why = format!("directory {object} lies deeper than {DEPTH_MAX} directories");
            return Err(BackupError::Stream(why));
        }
        let mut path = None;
        if let Some(place) = self.base.node(object)?.and_then(|node| node.places.into_iter().next()) {
            path = self.place(&place, depth + 1)?;
        }
        self.directories.insert(object, path.clone());
        Ok(path)
    }

    fn place(&mut self, place: &Place, depth: usize) -> Result<Option<Vec<u8>>, BackupError> {
        match place {
            Place::Root(path) => Ok(Some(path.0.to_vec())),
            Place::Entry(directory, name) => Ok(self.directory(*directory, depth)?.map(|mut path| {
                if path != b"/" {
                    path.push(b'/');
                }
                path.extend_from_slice(name.as_bytes());
                path
            })),
        }
    }

    /// The object as it is shown; none if it has no name.
    fn side(&mut self, node: Option<&Node>) -> Result<Option<Side>, BackupError> {
        let Some(node) = node else { return Ok(None) };
        let mut paths = Vec::new();
        for place in &node.places {
            paths.extend(self.place(place, 0)?.map(|path| PathBytes(path.into())));
        }
        paths.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let side = Side { paths, kind: node.kind, size: node.size, meta: node.meta };
        Ok((!side.paths.is_empty()).then_some(side))
    }
}

/// In what two states differ, apart from names and content.
fn attributes(before: &Node, after: &Node) -> Vec<Aspect> {
    let (a, b) = (&before.meta, &after.meta);
    let all = [
        (Aspect::Mode, a.permissions != b.permissions),
        (Aspect::Owner, (a.uid, a.gid) != (b.uid, b.gid)),
        (Aspect::Time, (a.mtime_sec, a.mtime_nsec) != (b.mtime_sec, b.mtime_nsec)),
        (Aspect::Xattrs, before.xattrs != after.xattrs),
    ];
    all.into_iter().filter(|(_, differs)| *differs).map(|(aspect, _)| aspect).collect()
}

/// What differs between two generations, sorted by path. Both are held.
///
/// # Errors
/// If index, images or tree cannot be read.
pub fn differences(
    source: Source<'_>,
    from: CheckpointId,
    to: CheckpointId,
) -> Result<Vec<Difference>, BackupError> {
    let touched = changes(&source, from, to)?.objects;
    let mut older = Past::open(source, from)?;
    let mut newer = Past::open(source, to)?;
    let mut all = Vec::new();
    let (mut gone, mut come) = (BTreeMap::new(), BTreeMap::new());
    for (object, ranges) in touched {
        let (before, after) = (older.node(object)?, newer.node(object)?);
        let side_before = Paths::new(&older).side(before.as_ref())?;
        let side_after = Paths::new(&newer).side(after.as_ref())?;
        match (side_before, side_after) {
            (None, None) => {}
            (Some(before), None) => {
                gone.insert(object, before);
            }
            (None, Some(after)) => {
                come.insert(object, after);
            }
            (Some(side_before), Some(side_after)) => {
                let (Some(before), Some(after)) = (before, after) else { continue };
                let pair = [(&mut older, object, &before), (&mut newer, object, &after)];
                all.extend(difference(pair, side_before, side_after, Some(ranges))?);
            }
        }
    }
    // What was replaced at its path by another object of the same type.
    let mut at_path: HashMap<PathBytes, ObjectId> = HashMap::new();
    for (object, side) in &gone {
        at_path.insert(side.paths[0].clone(), *object);
    }
    for (object, after) in come {
        let was = at_path.get(&after.paths[0]).copied();
        let same = was.filter(|was| gone.get(was).is_some_and(|before| before.kind == after.kind));
        let before = same.and_then(|was| gone.remove(&was).map(|side| (was, side)));
        let Some((was, before)) = before else {
            all.push(Difference { before: None, bytes: after.size, after: Some(after), changed: Vec::new() });
            continue;
        };
        let (Some(old), Some(new)) = (older.node(was)?, newer.node(object)?) else { continue };
        all.extend(difference([(&mut older, was, &old), (&mut newer, object, &new)], before, after, None)?);
    }
    all.extend(gone.into_values().map(|before| Difference {
        bytes: before.size,
        before: Some(before),
        after: None,
        changed: Vec::new(),
    }));
    let path = |d: &Difference| {
        d.before.iter().chain(&d.after).map(|side| side.paths[0].0.clone()).next().unwrap_or_default()
    };
    all.sort_by_cached_key(path);
    Ok(all)
}

/// In what two objects differ, if they do; bytes are compared in the ranges, or everywhere.
fn difference(
    [(older, was, before), (newer, is, after)]: [(&mut Past<'_>, ObjectId, &Node); 2],
    side_before: Side,
    side_after: Side,
    ranges: Option<Ranges>,
) -> Result<Option<Difference>, BackupError> {
    let mut changed = attributes(before, after);
    let mut bytes = before.size.abs_diff(after.size);
    if after.kind == FileKind::Regular {
        let both = before.size.min(after.size);
        for (start, end) in joined(ranges.unwrap_or_else(|| vec![(0, both)])) {
            let mut at = start;
            while at < end.min(both) {
                let until = (at + COMPARE_BYTES).min(end).min(both);
                let (differ, to) = compared([(older, was), (newer, is)], at, until)?;
                bytes += differ;
                at = to;
            }
        }
    }
    if bytes > 0 || before.target != after.target || before.device != after.device {
        changed.push(Aspect::Content);
    }
    // A name of an object is its entry in a directory: what lies below one that was renamed has its own still.
    let renamed = if was == is {
        let places = |node: &Node| node.places.iter().cloned().collect::<BTreeSet<_>>();
        places(before) != places(after)
    } else {
        side_before.paths != side_after.paths
    };
    if renamed {
        changed.push(Aspect::Names);
    }
    changed.sort_unstable();
    let (before, after) = (Some(side_before), Some(side_after));
    Ok((!changed.is_empty()).then_some(Difference { before, after, changed, bytes }))
}

/// How many bytes of a range differ, from its begin up to where. What one of the two has lost counts as different.
fn compared(
    [(older, was), (newer, is)]: [(&mut Past<'_>, ObjectId); 2],
    at: u64,
    mut until: u64,
) -> Result<(u64, u64), BackupError> {
    loop {
        let both = range(older, was, at, until).and_then(|a| Ok((a, range(newer, is, at, until)?)));
        match both {
            Ok((a, b)) => return Ok((a.iter().zip(&b).filter(|(a, b)| a != b).count() as u64, until)),
            // What stands before it is compared first.
            Err(BackupError::Lost { start, .. }) if start > at && start < until => until = start,
            Err(BackupError::Lost { checkpoint, object, start, end }) => {
                tracing::warn!("checkpoint {checkpoint}: bytes {start} to {end} of object {object} are lost");
                let to = if end > at { end.min(until) } else { until };
                return Ok((to - at, to));
            }
            Err(error) => return Err(error),
        }
    }
}

/// The bytes of a range that lies in the file.
pub(super) fn range(
    past: &mut Past<'_>,
    object: ObjectId,
    start: u64,
    end: u64,
) -> Result<Vec<u8>, BackupError> {
    let mut bytes = vec![0; (end - start) as usize];
    past.content(object, start, end, &mut |at, some| {
        let from = (at - start) as usize;
        bytes[from..from + some.len()].copy_from_slice(some);
        true
    })?;
    Ok(bytes)
}

/// The state at one generation after the other, from the tree backwards.
struct Backward<'a> {
    view: &'a View,
    nodes: HashMap<ObjectId, Option<Node>>,
    entries: HashMap<ObjectId, HashMap<Name, Option<ObjectId>>>,
}

impl Backward<'_> {
    /// Goes back over the step that begins at a generation and ends at another, where that is known; says what it
    /// touched, and whether bytes of it.
    fn back(
        &mut self,
        source: &Source<'_>,
        from: CheckpointId,
        to: Option<CheckpointId>,
    ) -> Result<HashMap<ObjectId, bool>, BackupError> {
        let mut touched: HashMap<ObjectId, bool> = HashMap::new();
        let end = images::read(source.area.images(), source.id, from, |line, _| {
            match line {
                Line::Object(object, node) => {
                    touched.entry(object).or_default();
                    self.nodes.insert(object, node);
                }
                Line::Entry(directory, name, object) => {
                    self.entries.entry(directory).or_default().insert(name, object);
                }
                Line::Bytes(object, _) | Line::Zero(object, ..) | Line::Unknown(object, ..) => {
                    touched.insert(object, true);
                }
                Line::End(_) => {}
            }
            Ok(())
        })?;
        if to.is_some_and(|to| to != end) {
            return Err(BackupError::Merged(from));
        }
        Ok(touched)
    }

    /// The object, or what else stands at the path.
    fn follow(
        &self,
        roots: &[(PathBytes, ObjectId)],
        object: Option<ObjectId>,
        path: &PathBytes,
    ) -> Result<Option<Found>, BackupError> {
        for object in object.into_iter().chain(self.resolve(roots, path.as_path())?) {
            if let Some(node) = self.node(object)?
                && let Some(side) = Paths::new(self).side(Some(&node))?
            {
                return Ok(Some(Found { object, node, side }));
            }
        }
        Ok(None)
    }

    fn resolve(&self, roots: &[(PathBytes, ObjectId)], path: &Path) -> Result<Option<ObjectId>, BackupError> {
        let above = roots.iter().filter(|(root, _)| path.starts_with(root.as_path()));
        let Some((root, top)) = above.max_by_key(|(root, _)| root.0.len()) else { return Ok(None) };
        let mut at = *top;
        for name in path.strip_prefix(root.as_path()).into_iter().flatten() {
            let name = Name::new(std::os::unix::ffi::OsStrExt::as_bytes(name));
            let Some(next) = name.map(|name| self.entry(at, &name)).transpose()?.flatten() else {
                return Ok(None);
            };
            at = next;
        }
        Ok(Some(at))
    }
}

impl Base for Backward<'_> {
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
        // Nobody goes down here.
        self.view.entries(directory)
    }
}

/// What stands at a path, or where the object that is followed stands.
struct Found {
    object: ObjectId,
    node: Node,
    side: Side,
}

/// The generations that changed what stands at a path of the primary, the oldest first. The newest of them at
/// which something stands there says which object is followed: to newer ones under its other names, to older
/// ones, and there on to what it replaced.
///
/// # Errors
/// If index or images cannot be read.
pub fn versions(source: Source<'_>, path: &PathBytes) -> Result<Vec<VersionLine>, BackupError> {
    begin_again(|| {
        let mut object = None;
        // First where something stands at the path at all, then all of it once more with that object.
        walk(&source, &mut |state, row, _| {
            object = state.follow(&row.1.roots, None, path)?.map(|found| found.object);
            Ok(object.is_none())
        })?;
        if object.is_none() {
            return Ok(Vec::new());
        }
        let mut lines = Vec::new();
        let mut path = path.clone();
        let mut newer: Option<(CheckpointId, GenerationRow, Option<Found>)> = None;
        walk(&source, &mut |state, (checkpoint, row), touched| {
            let followed = newer.as_ref().and_then(|(.., found)| found.as_ref()).map(|f| f.object);
            let found = state.follow(&row.roots, followed.or(object), &path)?;
            if let Some(found) = &found
                && !found.side.paths.contains(&path)
            {
                path = found.side.paths[0].clone();
            }
            if let Some((checkpoint, row, after)) = newer.take() {
                lines.extend(version(checkpoint, row, found.as_ref(), after, touched));
            }
            newer = Some((*checkpoint, row.clone(), found));
            Ok(true)
        })?;
        if let Some((checkpoint, row, Some(found))) = newer {
            let (event, changed) = (Event::Oldest, Vec::new());
            lines.push(VersionLine { checkpoint, label: row.label, event, after: Some(found.side), changed });
        }
        lines.reverse();
        Ok(lines)
    })
}

/// What a generation did to what is followed, if anything.
fn version(
    checkpoint: CheckpointId,
    row: GenerationRow,
    before: Option<&Found>,
    after: Option<Found>,
    touched: &HashMap<ObjectId, bool>,
) -> Option<VersionLine> {
    let mut changed = Vec::new();
    let event = match (before, &after) {
        (None, None) => return None,
        (None, Some(_)) => Event::Created,
        (Some(_), None) => Event::Removed,
        (Some(before), Some(after)) => {
            let same = before.object == after.object;
            changed = attributes(&before.node, &after.node);
            let written = touched.get(&after.object).copied().unwrap_or(false);
            if written || !same || before.node.size != after.node.size {
                changed.push(Aspect::Content);
            }
            if before.side.paths != after.side.paths {
                changed.push(Aspect::Names);
            }
            changed.sort_unstable();
            if changed.is_empty() {
                return None;
            }
            if same { Event::Changed } else { Event::Replaced }
        }
    };
    let after = after.map(|found| found.side);
    Some(VersionLine { checkpoint, label: row.label, event, after, changed })
}

/// Takes the state at a generation, its row, and what the step behind it touched; false ends it.
type Visit<'v> = &'v mut dyn FnMut(
    &Backward<'_>,
    &(CheckpointId, GenerationRow),
    &HashMap<ObjectId, bool>,
) -> Result<bool, BackupError>;

/// Goes over all generations, the newest first.
fn walk(source: &Source<'_>, visit: Visit<'_>) -> Result<(), BackupError> {
    // In this order: the view is not older than the rows, and the images go as far as the view.
    let rows = source.index.generations(source.number)?;
    let view = source.index.view(source.number)?;
    let sealed = source.area.sealed();
    let (Some((oldest, _)), Some(newest)) = (rows.first(), rows.last()) else { return Ok(()) };
    let mut steps = Vec::new();
    let mut at = *oldest;
    while at < sealed {
        steps.push(at);
        at = images::step_of(source.area.images(), source.id, at)?;
    }
    let mut state = Backward { view: &view, nodes: HashMap::new(), entries: HashMap::new() };
    // By the steps since the row behind.
    let mut touched = HashMap::new();
    if newest.0 >= sealed && !visit(&state, newest, &touched)? {
        return Ok(());
    }
    let mut end = None;
    for from in steps.into_iter().rev() {
        for (object, written) in state.back(source, from, end)? {
            *touched.entry(object).or_default() |= written;
        }
        end = Some(from);
        // A generation that the steps pass by is just being dropped.
        if let Ok(at) = rows.binary_search_by_key(&from, |(number, _)| *number) {
            if !visit(&state, &rows[at], &touched)? {
                return Ok(());
            }
            touched.clear();
        }
    }
    Ok(())
}
