//! Scrubbing a store without the primary: nothing is repaired, everything that does not fit is named, with
//! the checkpoints that cannot be given out any more.
//!
//! - The index: its own checksums; and those of its copy.
//! - The log: headers, checksums, numbers and chain hashes of all records and commits, over all segments.
//!   What a crash left behind the last commit of the newest segment is no damage.
//! - Before-images, from the oldest checkpoint to the tree: every line; with `read_data` every byte too.
//! - The tree, and what is aside or kept: that each object stands where the index says, with its type, size,
//!   attributes and entries, and that nothing else stands there; with `read_data` every byte is read and
//!   compared with its checksum. A file in the tree that has none, written by a release that kept none, gets those
//!   of what it has, if nothing else is wrong with it.
//!
//! - Images of processes: their descriptions, and with `read_data` every byte.
//!
//! The store must have no owner: the lock is taken. A step that was begun and is not complete leaves the
//! tree between two checkpoints; then it is not looked at, and the report says so.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use bfs_common::record::{CheckpointId, FileKind, Name, ObjectId, Record};
use bfs_common::wire::Position;
use rustix::fs::OFlags;

use super::apply::{Area, CrashPoint, Step};
use super::error::BackupError;
use super::images::{self, Blocks};
use super::index::{self, Base, GroupRow, Index, Node, Place, Rebuilt, View};
use super::past::{Past, Source};
use super::plan::Plan;
use super::process;
use super::store::{self, Store};
use super::sums::{self, SumChange};
use crate::log::segment::{Item, SegmentReader, Tail};
use crate::log::{segment_path, segments};
use crate::tree;

/// Something that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The group; empty for the whole store.
    pub group: String,
    /// The file, or the object and where it stands.
    pub what: String,
    /// What is wrong, and where in it.
    pub why: String,
    /// Kept checkpoints that need it.
    pub generations: Vec<CheckpointId>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.group.is_empty() {
            write!(f, "group {}: ", self.group)?;
        }
        write!(f, "{}: {}", self.what, self.why)?;
        match (self.generations.first(), self.generations.last()) {
            (Some(first), Some(last)) if first != last => {
                write!(f, "; {} checkpoints from {first} to {last} need it", self.generations.len())
            }
            (Some(only), _) => write!(f, "; checkpoint {only} needs it"),
            _ => write!(f, "; no checkpoint that is kept needs it"),
        }
    }
}

/// What was looked at, and what was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What does not fit.
    pub problems: Vec<Problem>,
    /// Records of logs.
    pub records: u64,
    /// Lines of before-images.
    pub lines: u64,
    /// Objects of trees.
    pub objects: u64,
    /// Bytes of trees and images that were read.
    pub bytes: u64,
    /// Files that had no checksums and have them now.
    pub recorded: u64,
    /// Groups whose tree was not looked at, for a step is not complete.
    pub between: Vec<String>,
}

/// Makes the index of a store that nobody owns again, from its copy.
///
/// # Errors
/// [`BackupError::NoRebuild`], or what the disk says; then the index is as it was.
pub fn rebuild(path: &Path) -> Result<Rebuilt, BackupError> {
    let found = store::check_format(path)?;
    if found < store::FORMAT_OF_COPY {
        let why = format!("the store has format {found}, which has no copy of the index");
        return Err(BackupError::NoRebuild { path: path.into(), why });
    }
    index::rebuild(&Store::open(path)?)
}

/// Scrubs a store. `allowed` are the folders outside that `serve --allow-root` has.
///
/// # Errors
/// When the store cannot be opened, or looking fails in another way than by finding damage.
pub fn check(path: &Path, read_data: bool, allowed: &[PathBuf]) -> Result<Report, BackupError> {
    store::check_format(path)?;
    let store = Store::open(path)?;
    let mut report = Report::default();
    let mut of_store = |what: &Path, why: String| {
        let (group, what, generations) = (String::new(), what.display().to_string(), Vec::new());
        report.problems.push(Problem { group, what, why, generations });
    };
    // Before it is opened, which begins a copy anew that does not fit.
    for (file, why) in index::check_copy(store.path())? {
        of_store(&file, why);
    }
    let mut index = Index::open(store.path())?;
    if !index.is_sound()? {
        let why = "its checksums do not fit: --rebuild-index makes it again";
        of_store(&store.path().join("index.redb"), why.into());
    }
    for (name, row) in index.groups()? {
        let maps = row.maps.clone();
        let area = Area::open(&store, &name, &maps, allowed)?;
        let generations = index.generations(row.number)?.into_iter().map(|(number, _)| number).collect();
        let (index, log) = (&index, store.group_dir("log", &name)?);
        let kept =
            index.view(row.number)?.kept()?.into_iter().map(|(o, last)| (o, Kept { last, size: None }));
        let kept = kept.collect();
        let mut group = Group {
            name,
            row,
            index,
            area,
            log,
            generations,
            kept,
            lost: None,
            read_data,
            report: &mut report,
        };
        group.check_index()?;
        group.check_log()?;
        group.check_images()?;
        group.check_tree()?;
        group.check_process()?;
    }
    Ok(report)
}

/// A file that is kept for generations.
struct Kept {
    /// The last checkpoint that had it.
    last: CheckpointId,
    /// Its size then, as the images say.
    size: Option<u64>,
}

/// What is wrong with an object.
#[derive(Default)]
struct Wrong {
    why: Vec<String>,
    /// If that is all: the bytes that are wrong, offset and end.
    only: Option<Vec<(u64, u64)>>,
}

impl Wrong {
    fn whole(why: Vec<String>) -> Self {
        Self { why, only: None }
    }
}

/// Objects whose new checksums are noted at once.
const RECORD_AT_ONCE: usize = 1024;

struct Group<'a> {
    name: String,
    row: GroupRow,
    index: &'a Index,
    area: Area,
    log: PathBuf,
    /// Kept checkpoints, the oldest first.
    generations: Vec<CheckpointId>,
    kept: BTreeMap<ObjectId, Kept>,
    /// The last images that say of something that it is lost.
    lost: Option<CheckpointId>,
    read_data: bool,
    report: &'a mut Report,
}

impl Group<'_> {
    fn problem(&mut self, what: impl fmt::Display, why: impl fmt::Display, generations: Vec<CheckpointId>) {
        let (group, what, why) = (self.name.clone(), what.to_string(), why.to_string());
        self.report.problems.push(Problem { group, what, why, generations });
    }

    /// Damage becomes a problem, what else goes wrong an error.
    fn damage(&mut self, error: BackupError, generations: Vec<CheckpointId>) -> Result<(), BackupError> {
        match error {
            BackupError::Corrupt { path, why } => self.problem(path.display(), why, generations),
            BackupError::Io { path, error, .. } if error.kind() == std::io::ErrorKind::NotFound => {
                self.problem(path.display(), "is missing", generations);
            }
            BackupError::Io { what, path, error } if error.raw_os_error() == Some(libc::EIO) => {
                self.problem(path.display(), format!("cannot {what} it: {error}"), generations);
            }
            BackupError::Foreign(why) => self.problem("the tree", why, generations),
            other => return Err(other),
        }
        Ok(())
    }

    fn check_index(&mut self) -> Result<(), BackupError> {
        if let Some(why) = images::why_too_old(self.area.images(), self.row.checkpoint)? {
            self.problem("index.redb", why, self.generations.clone());
        }
        Ok(())
    }

    /// Checkpoints that are kept are in the tree and its images: they need no log.
    fn check_log(&mut self) -> Result<(), BackupError> {
        let numbers = match segments(&self.log) {
            Ok(numbers) => numbers,
            Err(error) => return self.damage(error.into(), Vec::new()),
        };
        let mut at: Option<Position> = None;
        for (index, number) in numbers.iter().enumerate() {
            match self.check_segment(*number, at, index + 1 == numbers.len()) {
                Ok(after) => at = Some(after),
                Err(error) => {
                    at = None;
                    self.damage(error, Vec::new())?;
                }
            }
        }
        let applied = self.row.applied.sequence;
        if let Some(at) = at.filter(|at| at.sequence < applied) {
            let why = format!("ends at record {}, but {applied} was applied", at.sequence);
            self.problem(self.log.clone().display(), why, Vec::new());
        }
        Ok(())
    }

    fn check_segment(
        &mut self,
        number: u64,
        before: Option<Position>,
        newest: bool,
    ) -> Result<Position, BackupError> {
        let path = segment_path(&self.log, number);
        let bad = |why: String| BackupError::corrupt(&path, why);
        let mut reader = SegmentReader::open(&self.log, number, self.row.id)?;
        let mut here = reader.header.before;
        if before.is_some_and(|b| (b.sequence, b.chain) != (here.sequence, here.chain)) {
            return Err(bad("does not go on where the segment before it ends".into()));
        }
        loop {
            match reader.next_or_tail()? {
                Ok(Item::Record(found)) => {
                    let sequence = found.encoded.sequence;
                    if sequence != here.sequence.next() {
                        return Err(bad(format!("record {sequence} stands behind {}", here.sequence)));
                    }
                    here.chain = found.encoded.chain(here.chain);
                    here.sequence = sequence;
                    if let Record::EpochBegin { epoch, .. } = found.record {
                        here.epoch = epoch;
                    }
                    let applied: Position = self.row.applied.into();
                    if sequence == applied.sequence && here.chain != applied.chain {
                        return Err(bad(format!("record {sequence} is not the one that was applied")));
                    }
                    self.report.records += 1;
                }
                Ok(Item::Commit { sequence, chain, end }) => {
                    if (sequence, chain) != (here.sequence, here.chain) {
                        return Err(bad(format!("the commit that ends at byte {end} does not fit")));
                    }
                }
                Err(Tail::Clean) => return Ok(here),
                Err(Tail::Torn { at, why }) => {
                    let synced = reader.synced.is_none_or(|synced| at < synced);
                    if !newest || synced || reader.commit_behind(at)? {
                        return Err(bad(format!("at byte {at}: {why}")));
                    }
                    return Ok(here);
                }
            }
        }
    }

    /// The images of processes.
    fn check_process(&mut self) -> Result<(), BackupError> {
        for (at, path, why) in process::check(self.area.process(), self.row.id, self.read_data)? {
            self.problem(path.display(), why, vec![at]);
        }
        Ok(())
    }

    /// A checkpoint needs the images of all steps from it on.
    fn check_images(&mut self) -> Result<(), BackupError> {
        let dir = self.area.images().to_path_buf();
        let mut seen = BTreeSet::new();
        // Steps of images that were merged, while the transaction that drops what they pass by was not done.
        let mut passing = Vec::new();
        for first in self.generations.clone() {
            self.check_chain(&dir, first, &mut seen, &mut passing)?;
        }
        Ok(())
    }

    /// As far as it leads to images that were seen already.
    fn check_chain(
        &mut self,
        dir: &Path,
        mut at: CheckpointId,
        seen: &mut BTreeSet<CheckpointId>,
        passing: &mut Vec<(CheckpointId, CheckpointId)>,
    ) -> Result<(), BackupError> {
        while at < self.row.checkpoint && seen.insert(at) {
            let passed = |g| passing.iter().any(|(from, to)| g <= *from && *from < at && at < *to);
            let needs: Vec<_> =
                self.generations.iter().copied().filter(|g| *g <= at && !passed(*g)).collect();
            let (mut blocks, mut bad) = (Blocks::new(dir), Vec::new());
            let (mut lines, mut bytes, mut buffer) = (0, 0, Vec::new());
            let (read_data, kept, lost) = (self.read_data, &mut self.kept, &mut self.lost);
            let read = images::read(dir, self.row.id, at, |line, block| {
                lines += 1;
                if matches!(line, images::Line::Unknown(..)) {
                    *lost = (*lost).max(Some(at));
                }
                if let images::Line::Object(object, Some(node)) = &line
                    && let Some(kept) = kept.get_mut(object).filter(|kept| kept.last == at)
                {
                    kept.size = Some(node.size);
                }
                if read_data && block.len > 0 {
                    match blocks.read(block, &mut buffer) {
                        Ok(()) => bytes += u64::from(block.len),
                        Err(BackupError::Corrupt { path, why }) => bad.push((path, line, why)),
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            });
            self.report.lines += lines;
            self.report.bytes += bytes;
            for (path, line, why) in bad {
                let of = match line {
                    images::Line::Bytes(object, offset) => {
                        format!("{} (object {object}, from byte {offset} on)", path.display())
                    }
                    _ => path.display().to_string(),
                };
                self.problem(of, why, needs.clone());
            }
            match read {
                Ok(to) if to > at => {
                    if self.generations.iter().any(|g| at < *g && *g < to) {
                        passing.push((at, to));
                    }
                    at = to;
                }
                Ok(_) => {
                    self.problem(images::path(dir, at).display(), "its step ends where it begins", needs);
                    return Ok(());
                }
                Err(error) => {
                    self.damage(error, needs)?;
                    // Where its step ends is not known: the next one that there is.
                    let next = self.generations.iter().copied().find(|g| *g > at);
                    let Some(next) = next.filter(|next| images::path(dir, *next).exists()) else {
                        return Ok(());
                    };
                    at = next;
                }
            }
        }
        Ok(())
    }

    fn check_tree(&mut self) -> Result<(), BackupError> {
        if self.index.plan(self.row.number)?.is_some() {
            self.report.between.push(self.name.clone());
            return Ok(());
        }
        let view = self.index.view(self.row.number)?;
        let mut found: BTreeMap<ObjectId, Wrong> = BTreeMap::new();
        let mut new = Vec::new();
        view.each(|object, node| {
            let (wrong, sums) = self.check_object(&view, object, node)?;
            if !wrong.why.is_empty() {
                found.insert(object, wrong);
            } else if let Some(sums) = sums {
                new.push((object, sums));
            }
            if new.len() >= RECORD_AT_ONCE {
                self.record(&mut new)?;
            }
            Ok(true)
        })?;
        self.record(&mut new)?;
        let lacking = self.lacking()?;
        for (object, kept) in std::mem::take(&mut self.kept) {
            let why = self.check_kept(&view, object, &kept, lacking.contains(&object))?;
            if !why.why.is_empty() {
                found.insert(object, why);
            }
        }
        self.check_lost()?;
        if found.is_empty() {
            return Ok(());
        }
        let needs = self.who_needs(&found)?;
        for (object, wrong) in found {
            let what = format!("object {object}{}", place_of(&view, object)?);
            self.problem(what, wrong.why.join(", "), needs.get(&object).cloned().unwrap_or_default());
        }
        Ok(())
    }

    /// What was lost before it became a before-image.
    fn check_lost(&mut self) -> Result<(), BackupError> {
        let mut lost: BTreeMap<ObjectId, ((u64, u64), Vec<CheckpointId>)> = BTreeMap::new();
        // Those behind the last images that say so stand on none of them: mostly that is all.
        for generation in self.generations.iter().copied().filter(|of| self.lost >= Some(*of)) {
            // With damaged images nobody can tell: then it is named there.
            let source = Source::at_rest(&self.area, self.index, &self.name, &self.row);
            let Ok(past) = Past::open(source, generation) else { continue };
            for object in past.unknown() {
                if let Some(range) = past.lost_of(object)? {
                    lost.entry(object).or_insert((range, Vec::new())).1.push(generation);
                }
            }
        }
        for (object, ((start, end), needs)) in lost {
            let why = format!("bytes {start} to {end} were lost before they were written over");
            self.problem(format!("object {object}"), why, needs);
        }
        Ok(())
    }

    fn record(&mut self, new: &mut Vec<(ObjectId, SumChange)>) -> Result<(), BackupError> {
        if !new.is_empty() {
            self.index.put_sums(self.row.number, new)?;
            self.report.recorded += new.len() as u64;
            new.clear();
        }
        Ok(())
    }

    /// Kept files that are shorter than at the last checkpoint that needs them, and no image has what they lack.
    fn lacking(&self) -> Result<BTreeSet<ObjectId>, BackupError> {
        let mut short: BTreeMap<CheckpointId, Vec<(ObjectId, u64, u64)>> = BTreeMap::new();
        for (object, kept) in &self.kept {
            // What cannot be opened is said later.
            let now = self.area.open_kept(*object).ok().flatten().and_then(|f| tree::stat_fd(f.as_fd()).ok());
            if let Some((now, size)) = now.zip(kept.size).filter(|(now, size)| now.size < *size) {
                short.entry(kept.last).or_default().push((*object, now.size, size));
            }
        }
        let mut lacking = BTreeSet::new();
        for (last, objects) in short {
            let source = Source::at_rest(&self.area, self.index, &self.name, &self.row);
            // With damaged images nobody can tell: then it is named there.
            let Ok(past) = Past::open(source, last) else { continue };
            for (object, now, size) in objects {
                if past.stands_on(object, now, size)? {
                    lacking.insert(object);
                }
            }
        }
        Ok(lacking)
    }

    /// What is wrong with the file of an object that is gone.
    fn check_kept(
        &mut self,
        view: &View,
        object: ObjectId,
        kept: &Kept,
        lacking: bool,
    ) -> Result<Wrong, BackupError> {
        let file = match self.area.open_kept(object) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(Wrong::whole(vec!["is gone, and its file was not kept".into()])),
            Err(BackupError::Io { what, error, .. }) => {
                return Ok(Wrong::whole(vec![format!("cannot {what} it: {error}")]));
            }
            Err(error) => return Err(error),
        };
        // Where its images are damaged, that is named.
        let Some(size) = kept.size else { return Ok(Wrong::default()) };
        let now = match tree::stat_fd(file.as_fd()) {
            Ok(now) => now.size,
            Err(error) => return Ok(Wrong::whole(vec![format!("cannot be read: {error}")])),
        };
        // Where checkpoints behind the last that needs it were dropped, it has the size of a later one. Then images
        // have what it lacks, and its checksums are those of all of it.
        if lacking || (now != size && sums::extent(&view.sums(object))? > sums::blocks(now)) {
            return Ok(Wrong::whole(vec![format!("its kept file has {now} bytes instead of {size}")]));
        }
        if now == size && !self.read_data {
            return Ok(Wrong::default());
        }
        let mut wrong = self.compare(view, object, &file, now)?.0;
        if now != size && !wrong.why.is_empty() {
            wrong.why.insert(0, format!("its kept file has {now} bytes instead of {size}"));
        }
        Ok(wrong)
    }

    /// What is wrong with the file of an object.
    fn check_object(
        &mut self,
        view: &View,
        object: ObjectId,
        node: &Node,
    ) -> Result<(Wrong, Option<SumChange>), BackupError> {
        self.report.objects += 1;
        let (plan, mut never) = (Plan::default(), CrashPoint::default());
        let mut step = Step::new(&self.area, view, &plan, &mut never);
        let readable = matches!(node.kind, FileKind::Regular | FileKind::Directory);
        let fd = match step.open(object, if readable { OFlags::RDONLY } else { OFlags::PATH }) {
            Ok(fd) => fd,
            Err(BackupError::Foreign(why)) => return Ok((Wrong::whole(vec![why]), None)),
            Err(BackupError::Io { what, error, .. }) => {
                return Ok((Wrong::whole(vec![format!("cannot {what} it: {error}")]), None));
            }
            Err(error) => return Err(error),
        };
        drop(step);
        let failed = |error: std::io::Error| vec![format!("cannot be read: {error}")];
        let now = match tree::stat_fd(fd.as_fd()) {
            Ok(now) => now,
            Err(error) => return Ok((Wrong::whole(failed(error)), None)),
        };
        let mut wrong = Vec::new();
        let mut meta = now.meta;
        if node.kind == FileKind::Symlink {
            // They mean nothing (symlink(7)).
            meta.permissions = node.meta.permissions;
            if tree::readlink(fd.as_fd()).is_ok_and(|target| target[..] != node.target[..]) {
                wrong.push("leads elsewhere".to_owned());
            }
        }
        if meta != node.meta {
            wrong.push("mode, owner or time of modification are others".to_owned());
        }
        if node.kind == FileKind::Regular && now.size != node.size {
            wrong.push(format!("has {} bytes instead of {}", now.size, node.size));
        }
        match tree::xattrs(fd.as_fd()) {
            Ok(xattrs) => {
                let same = xattrs.len() == node.xattrs.len()
                    && xattrs.iter().zip(&node.xattrs).all(|(a, b)| a.0 == b.0 && a.1[..] == b.1[..]);
                if !same {
                    wrong.push("extended attributes are others".to_owned());
                }
            }
            Err(error) => wrong.extend(failed(error)),
        }
        if node.kind == FileKind::Directory {
            wrong.extend(self.check_entries(view, object, &fd)?);
        } else if node.kind == FileKind::Regular && self.read_data {
            let (mut bytes, new) = self.compare(view, object, &File::from(fd), node.size)?;
            if !wrong.is_empty() {
                bytes.only = None;
            }
            wrong.append(&mut bytes.why);
            return Ok((Wrong { why: wrong, only: bytes.only }, new));
        }
        Ok((Wrong::whole(wrong), None))
    }

    /// What is wrong with the names in a directory.
    fn check_entries(
        &self,
        view: &View,
        object: ObjectId,
        directory: &std::os::fd::OwnedFd,
    ) -> Result<Vec<String>, BackupError> {
        let failed = |error: rustix::io::Errno| vec![format!("cannot be read: {error}")];
        let names = match rustix::fs::Dir::read_from(directory) {
            Ok(names) => names,
            Err(error) => return Ok(failed(error)),
        };
        let mut wanted: BTreeMap<Name, ObjectId> = view.entries(object)?.into_iter().collect();
        let mut wrong = Vec::new();
        for entry in names {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => return Ok(failed(error)),
            };
            let Some(name) = Name::new(CStr::to_bytes(entry.file_name())) else { continue };
            match wanted.remove(&name) {
                None => wrong.push(format!("has {name:?}, which nobody put there")),
                Some(child) => {
                    let known = view.node(child)?.map(|node| node.ino);
                    if known != Some(entry.ino()) {
                        wrong.push(format!("{name:?} is another file than object {child}"));
                    }
                }
            }
        }
        wrong.extend(wanted.into_keys().map(|name| format!("lacks {name:?}")));
        Ok(wrong)
    }

    /// Reads all of a file: which of its bytes are wrong, else its checksums if it has none.
    fn compare(
        &mut self,
        view: &View,
        object: ObjectId,
        file: &File,
        size: u64,
    ) -> Result<(Wrong, Option<SumChange>), BackupError> {
        let found = sums::compare(&view.sums(object), file, size)?;
        self.report.bytes += found.bytes;
        let (mut why, mut only) = (Vec::new(), Vec::new());
        let known = view.damage(object)?;
        for (start, end) in known.within(0, size) {
            why.push(format!("bytes {start} to {end} are lost, and come again with a checkpoint"));
            only.push((start, end));
        }
        for (start, end) in found.bad.into_iter().flat_map(|(start, end)| known.without(start, end)) {
            why.push(format!("bytes {start} to {end} do not fit their checksums"));
            only.push((start, end));
        }
        for (start, end, error) in found.unreadable {
            why.push(format!("cannot be read at byte {start}: {error}"));
            only.push((start, end));
        }
        if why.is_empty() {
            return Ok((Wrong::default(), found.unknown));
        }
        Ok((Wrong { why, only: Some(only) }, None))
    }

    /// Which kept checkpoints cannot be given out as they were.
    fn who_needs(
        &self,
        objects: &BTreeMap<ObjectId, Wrong>,
    ) -> Result<BTreeMap<ObjectId, Vec<CheckpointId>>, BackupError> {
        let mut needs: BTreeMap<ObjectId, Vec<CheckpointId>> = BTreeMap::new();
        for generation in &self.generations {
            // With damaged images nobody can tell: then it is named there.
            let source = Source::at_rest(&self.area, self.index, &self.name, &self.row);
            let Ok(past) = Past::open(source, *generation) else { continue };
            for (object, wrong) in objects {
                let needed = match &wrong.only {
                    // Before-images may have what is wrong now.
                    Some(ranges) => {
                        let mut any = false;
                        for (start, end) in ranges {
                            any |= past.stands_on(*object, *start, *end)?;
                        }
                        any
                    }
                    None => past.node(*object)?.is_some(),
                };
                if needed {
                    needs.entry(*object).or_default().push(*generation);
                }
            }
        }
        Ok(needs)
    }
}

/// Where an object stands on the primary, for people.
fn place_of(view: &View, object: ObjectId) -> Result<String, BackupError> {
    let (mut at, mut names) = (object, Vec::new());
    loop {
        match view.node(at)?.and_then(|node| node.places.into_iter().next()) {
            Some(Place::Entry(directory, name)) if names.len() < 4096 => {
                names.push(name);
                at = directory;
            }
            Some(Place::Root(root)) => {
                let below: PathBuf = names.iter().rev().map(|name| name.as_os_str()).collect();
                return Ok(format!(" ({})", root.as_path().join(below).display()));
            }
            _ => return Ok(String::new()),
        }
    }
}
