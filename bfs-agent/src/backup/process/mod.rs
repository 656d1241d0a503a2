//! Images of processes: what CRIU dumped of them at the instant of a checkpoint, kept with the checkpoint.
//!
//! They do not travel in the group's stream but beside it, on a connection of their own, when their checkpoint is
//! confirmed ([`put`]). A set counts when its description stands under its name; before that it is `.new`, and goes
//! with whoever sends it, or at the next start. So a checkpoint has all of its images or none.
//!
//! A block that the newest set before has as well is not sent and not stored again: the description ([`set`]) names the
//! set whose pages have it, always the one that has the bytes, so that reading never goes from one to the next. Pages
//! stay for as long as a description that stays needs them.

pub mod put;
pub mod set;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bfs_common::record::{CheckpointId, GroupId};
use bfs_common::wire::{PROCESS_BLOCK, PROCESS_DIGEST};

use super::error::BackupError;
use set::{SLOT, Set, slot_at, slot_is_sound};

/// Where the bytes of a digest are.
type Digests = HashMap<[u8; PROCESS_DIGEST], (CheckpointId, u32)>;

/// Bytes that pages of other sets may have more than the newest set needs, before a whole set is stored again.
const WASTE_MAX: u64 = 64 << 20;

/// What is known of a set without reading it.
#[derive(Clone, Debug)]
struct Known {
    wall_ns: i64,
    bytes: u64,
    sources: BTreeSet<CheckpointId>,
}

#[derive(Debug, Default)]
struct Inner {
    all: BTreeMap<CheckpointId, Known>,
    /// One is being written.
    writing: bool,
    /// Pages may be there that nobody needs.
    untidy: bool,
    /// Where the blocks of the newest one are.
    newest: Option<(CheckpointId, Arc<Digests>)>,
}

/// The sets of a group.
#[derive(Debug)]
pub struct Sets {
    dir: PathBuf,
    group: GroupId,
    inner: Mutex<Inner>,
}

fn description(dir: &Path, set: CheckpointId) -> PathBuf {
    dir.join(format!("{:020}.set", set.0))
}

fn pages(dir: &Path, set: CheckpointId) -> PathBuf {
    dir.join(format!("{:020}.pages", set.0))
}

/// The checkpoint in a file's name, and what kind of file it is.
fn named(name: &str) -> Option<(CheckpointId, &str)> {
    let (number, kind) = name.split_once('.')?;
    (number.len() == 20).then(|| number.parse().ok().map(|n| (CheckpointId(n), kind))).flatten()
}

fn load(dir: &Path, group: GroupId, at: CheckpointId) -> Result<Set, BackupError> {
    let path = description(dir, at);
    let bytes = fs::read(&path).map_err(BackupError::io("read", &path))?;
    let set = Set::decode(&bytes).map_err(|why| BackupError::corrupt(&path, why))?;
    if set.group != group || set.checkpoint != at {
        return Err(BackupError::corrupt(&path, "it is the set of another checkpoint or group"));
    }
    Ok(set)
}

/// Bytes that files take on the disk.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| std::os::unix::fs::MetadataExt::blocks(&meta) * 512)
}

impl Sets {
    /// The sets in the folder of a group. What was not complete is removed.
    ///
    /// # Errors
    /// If the folder cannot be read. A set that is damaged is not there, and `check` names it.
    pub fn open(dir: PathBuf, group: GroupId) -> Result<Self, BackupError> {
        let mut inner = Inner { untidy: true, ..Inner::default() };
        for entry in fs::read_dir(&dir).map_err(BackupError::io("read", &dir))? {
            let path = entry.map_err(BackupError::io("read", &dir))?.path();
            match path.file_name().and_then(|name| named(name.to_str()?)) {
                Some((at, "set")) => match load(&dir, group, at) {
                    Ok(set) => {
                        let (bytes, sources) = (set.bytes(), set.sources());
                        inner.all.insert(at, Known { wall_ns: set.wall_ns, bytes, sources });
                    }
                    Err(error) => tracing::error!("{error}"),
                },
                Some((_, "set.new" | "pages.new")) => {
                    fs::remove_file(&path).map_err(BackupError::io("remove", &path))?;
                }
                _ => {}
            }
        }
        Ok(Self { dir, group, inner: Mutex::new(inner) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the images of a checkpoint; none if it has none.
    #[must_use]
    pub fn bytes(&self, at: CheckpointId, wall_ns: i64) -> Option<u64> {
        self.inner().all.get(&at).filter(|known| known.wall_ns == wall_ns).map(|known| known.bytes)
    }

    /// Bytes on the disk of all sets.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        let Ok(entries) = fs::read_dir(&self.dir) else { return 0 };
        entries.flatten().map(|entry| allocated(&entry.path())).sum()
    }

    /// Removes the sets that are not to stay, and pages that nobody needs any more.
    ///
    /// # Errors
    /// If a file cannot be removed; it is tried again with the next.
    pub fn retain(&self, stays: impl Fn(CheckpointId) -> bool) -> Result<(), BackupError> {
        let mut inner = self.inner();
        let gone: Vec<_> = inner.all.keys().copied().filter(|at| !stays(*at)).collect();
        for at in &gone {
            inner.untidy = true;
            remove(&description(&self.dir, *at))?;
            inner.all.remove(at);
            inner.newest.take_if(|(newest, _)| newest == at);
        }
        // What is being written may need any pages.
        if inner.writing || !inner.untidy {
            return Ok(());
        }
        let needed = needed(&inner.all);
        for entry in fs::read_dir(&self.dir).map_err(BackupError::io("read", &self.dir))? {
            let path = entry.map_err(BackupError::io("read", &self.dir))?.path();
            if let Some((at, "pages")) = path.file_name().and_then(|name| named(name.to_str()?))
                && !needed.contains(&at)
            {
                remove(&path)?;
            }
        }
        inner.untidy = false;
        Ok(())
    }

    /// Which of the oldest have to go so that all together take at most so many bytes. The newest always stays.
    #[must_use]
    pub fn beyond(&self, bytes_max: u64) -> BTreeSet<CheckpointId> {
        let mut left = self.inner().all.clone();
        let mut gone = BTreeSet::new();
        loop {
            let sets = left.keys().map(|at| allocated(&description(&self.dir, *at))).sum::<u64>();
            let sum = sets + needed(&left).iter().map(|at| allocated(&pages(&self.dir, *at))).sum::<u64>();
            if sum <= bytes_max || left.len() <= 1 {
                return gone;
            }
            gone.extend(left.pop_first().map(|(at, _)| at));
        }
    }

    /// Where the blocks of the newest set are; empty where it is better to store all of it again.
    fn known_blocks(&self) -> Arc<Digests> {
        let (at, known) = match self.inner().all.last_key_value() {
            Some((at, known)) => (*at, known.clone()),
            None => return Arc::default(),
        };
        let held = known.sources.iter().chain([&at]).map(|at| allocated(&pages(&self.dir, *at)));
        if held.sum::<u64>() > known.bytes.saturating_mul(2).saturating_add(WASTE_MAX) {
            return Arc::default();
        }
        if let Some((of, digests)) = &self.inner().newest
            && *of == at
        {
            return Arc::clone(digests);
        }
        let mut digests = Digests::new();
        let read = self.each_block(at, |_, place, block| {
            digests.insert(*blake3::hash(block).as_bytes(), place);
            true
        });
        match read {
            Ok(()) => Arc::new(digests),
            Err(error) => {
                tracing::warn!("{error}; the next images are stored as a whole");
                Arc::default()
            }
        }
    }

    /// Reads all blocks of a set, each compared with its checksum: `each` gets the file, where the block stands, and
    /// its bytes; false ends it. An empty file has one empty block.
    fn each_block(
        &self,
        at: CheckpointId,
        mut each: impl FnMut(&str, (CheckpointId, u32), &[u8]) -> bool,
    ) -> Result<(), BackupError> {
        let set = load(&self.dir, self.group, at)?;
        let mut sources: BTreeMap<CheckpointId, File> = BTreeMap::new();
        let mut whole = [0; SLOT];
        for file in &set.files {
            let mut left = file.size;
            if left == 0 && !each(&file.name, (at, 0), &[]) {
                return Ok(());
            }
            for run in &file.runs {
                let path = pages(&self.dir, run.set);
                let source = match sources.entry(run.set) {
                    Entry::Occupied(open) => open.into_mut(),
                    Entry::Vacant(new) => {
                        new.insert(File::open(&path).map_err(BackupError::io("open", &path))?)
                    }
                };
                for slot in run.slot..run.slot.saturating_add(run.count) {
                    source
                        .read_exact_at(&mut whole, slot_at(slot))
                        .map_err(BackupError::io("read", &path))?;
                    if !slot_is_sound(slot, &whole) {
                        let why = format!("the checksum of slot {slot} does not fit its bytes");
                        return Err(BackupError::corrupt(&path, why));
                    }
                    let length = left.min(PROCESS_BLOCK as u64) as usize;
                    left -= length as u64;
                    if !each(&file.name, (run.set, slot), &whole[..length]) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives the images of a checkpoint: `each` gets the name of a file and its next bytes; false ends it.
    ///
    /// # Errors
    /// If there are none, or bytes of them are lost.
    pub fn read(
        &self,
        at: CheckpointId,
        mut each: impl FnMut(&str, &[u8]) -> bool,
    ) -> Result<(), BackupError> {
        self.each_block(at, |file, _, bytes| each(file, bytes))
    }
}

/// The sets whose pages are needed.
fn needed(all: &BTreeMap<CheckpointId, Known>) -> BTreeSet<CheckpointId> {
    all.iter().flat_map(|(at, known)| known.sources.iter().chain([at])).copied().collect()
}

fn remove(path: &Path) -> Result<(), BackupError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BackupError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// What is wrong with the sets of a folder, each with the checkpoint whose images it is about. With `read_data` all
/// bytes are read.
///
/// # Errors
/// If the folder cannot be read.
pub fn check(
    dir: &Path,
    group: GroupId,
    read_data: bool,
) -> Result<Vec<(CheckpointId, PathBuf, String)>, BackupError> {
    let sets = Sets { dir: dir.into(), group, inner: Mutex::default() };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(BackupError::io("read", dir))? {
        let path = entry.map_err(BackupError::io("read", dir))?.path();
        let Some((at, "set")) = path.file_name().and_then(|name| named(name.to_str()?)) else { continue };
        let looked = if read_data {
            sets.each_block(at, |_, _, _| true)
        } else {
            load(dir, group, at).and_then(|set| {
                set.sources().into_iter().chain([at]).try_for_each(|source| {
                    let path = pages(dir, source);
                    fs::metadata(&path).map(drop).map_err(BackupError::io("find", &path))
                })
            })
        };
        match looked {
            Ok(()) => {}
            Err(BackupError::Corrupt { path, why }) => found.push((at, path, why)),
            Err(BackupError::Io { path, error, .. }) => found.push((at, path, error.to_string())),
            Err(error) => return Err(error),
        }
    }
    found.sort();
    Ok(found)
}
