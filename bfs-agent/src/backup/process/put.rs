//! A set of images while it comes in.

use std::collections::{BTreeSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use bfs_common::record::CheckpointId;
use bfs_common::wire::{
    PROCESS_BLOCK, PROCESS_BLOCKS_MAX, PROCESS_DIGEST, PROCESS_FILES_MAX, process_file_is_valid,
};

use super::super::error::BackupError;
use super::set::{ImageFile, PAGES_MAGIC, SLOT, Set, seal_slot};
use super::{Digests, Known, Sets, description, pages};
use crate::durable;
use crate::log::sync_dir;

/// Why images are not taken.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// Other images of this group are just being sent.
    #[error("images of this group are being received already")]
    Busy,
    /// What comes makes no sense.
    #[error("{0}")]
    Bad(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] BackupError),
}

fn bad<T>(why: impl Into<String>) -> Result<T, PutError> {
    Err(PutError::Bad(why.into()))
}

/// How the images of a checkpoint begin.
#[derive(Debug)]
pub enum Begun {
    /// They are there already.
    There,
    /// They can come.
    Put(Box<Put>),
}

/// A set of images while it comes in. Dropped before its end, nothing of it is left.
#[derive(Debug)]
pub struct Put {
    sets: Arc<Sets>,
    set: Set,
    names: BTreeSet<String>,
    out: BufWriter<File>,
    slots: u32,
    known: Arc<Digests>,
    /// Where the blocks of this set are, or will be.
    own: Digests,
    /// Blocks of the current file that are not told yet.
    untold: u64,
    /// Blocks that are wanted, in order: digest, bytes, slot.
    told: VecDeque<([u8; PROCESS_DIGEST], usize, u32)>,
}

impl Sets {
    /// Begins to take the images of a checkpoint in.
    ///
    /// # Errors
    /// [`PutError`].
    pub fn begin(self: &Arc<Self>, at: CheckpointId, wall_ns: i64) -> Result<Begun, PutError> {
        {
            let mut inner = self.inner();
            if inner.all.get(&at).is_some_and(|known| known.wall_ns == wall_ns) {
                return Ok(Begun::There);
            }
            if inner.all.last_key_value().is_some_and(|(last, _)| *last >= at)
                || pages(&self.dir, at).exists()
            {
                return bad(format!("images of checkpoint {at} come too late: there are later ones"));
            }
            if std::mem::replace(&mut inner.writing, true) {
                return Err(PutError::Busy);
            }
        }
        let known = self.known_blocks();
        match Put::new(self, at, wall_ns, known) {
            Ok(put) => Ok(Begun::Put(Box::new(put))),
            Err(error) => {
                self.inner().writing = false;
                Err(error.into())
            }
        }
    }
}

fn create(path: &Path) -> Result<File, BackupError> {
    let _ = fs::remove_file(path);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path).map_err(BackupError::io("make", path))
}

impl Put {
    fn new(
        sets: &Arc<Sets>,
        at: CheckpointId,
        wall_ns: i64,
        known: Arc<Digests>,
    ) -> Result<Self, BackupError> {
        let path = pages(&sets.dir, at).with_extension("pages.new");
        let mut out = BufWriter::with_capacity(1 << 20, create(&path)?);
        out.write_all(PAGES_MAGIC).map_err(BackupError::io("write", &path))?;
        let set = Set { group: sets.group, checkpoint: at, wall_ns, files: Vec::new() };
        Ok(Self {
            sets: Arc::clone(sets),
            set,
            names: BTreeSet::new(),
            out,
            slots: 0,
            known,
            own: Digests::new(),
            untold: 0,
            told: VecDeque::new(),
        })
    }

    /// Digests of the next blocks of a file; gives a bit for each, whether it is wanted, and how many bytes these are.
    ///
    /// # Errors
    /// [`PutError::Bad`].
    pub fn blocks(&mut self, name: &str, size: u64, digests: &[u8]) -> Result<(Vec<u8>, u64), PutError> {
        if !self.told.is_empty() {
            return bad("blocks that are wanted did not come");
        }
        let (digests, rest) = digests.as_chunks::<PROCESS_DIGEST>();
        if !rest.is_empty() || digests.len() > PROCESS_BLOCKS_MAX {
            return bad("digests of blocks are cut off, or too many");
        }
        if self.untold == 0 {
            if !process_file_is_valid(name)
                || self.names.len() >= PROCESS_FILES_MAX
                || !self.names.insert(name.to_owned())
            {
                return bad(format!("a file of the images is called {name:?}"));
            }
            let file = ImageFile { name: name.into(), size, runs: Vec::new() };
            self.untold = file.blocks();
            self.set.files.push(file);
        }
        let Some(file) = self.set.files.last_mut().filter(|file| file.name == name && file.size == size)
        else {
            return bad(format!("{name:?} begins before the file before it has ended"));
        };
        let count = digests.len() as u64;
        if count > self.untold || (count == 0 && size > 0) {
            return bad(format!("{name:?} has more or fewer blocks than its size says"));
        }
        let mut wanted = vec![0u8; digests.len().div_ceil(8)];
        let (mut bytes, mut place_next) = (0u64, self.slots);
        for (index, digest) in digests.iter().enumerate() {
            self.untold -= 1;
            let tail = size % PROCESS_BLOCK as u64;
            let length = if self.untold == 0 && tail > 0 { tail as usize } else { PROCESS_BLOCK };
            let there = self.own.get(digest).or_else(|| self.known.get(digest)).copied();
            let place = there.unwrap_or((self.set.checkpoint, place_next));
            file.push(place.0, place.1);
            self.own.insert(*digest, place);
            if there.is_none() {
                wanted[index / 8] |= 1 << (index % 8);
                bytes += length as u64;
                self.told.push_back((*digest, length, place_next));
                let Some(next) = place_next.checked_add(1) else { return bad("the images are too large") };
                place_next = next;
            }
        }
        Ok((wanted, bytes))
    }

    /// Bytes of blocks that are wanted.
    ///
    /// # Errors
    /// [`PutError`].
    pub fn bytes(&mut self, mut bytes: &[u8]) -> Result<(), PutError> {
        while !bytes.is_empty() {
            let Some((digest, length, slot)) = self.told.pop_front() else {
                return bad("blocks come that nobody wants");
            };
            let Some((block, rest)) = bytes.split_at_checked(length) else {
                return bad("a block is cut off");
            };
            bytes = rest;
            if blake3::hash(block) != digest {
                return bad("a block does not fit its digest");
            }
            let mut whole = [0; SLOT];
            whole[..length].copy_from_slice(block);
            seal_slot(slot, &mut whole);
            self.out.write_all(&whole).map_err(|error| {
                PutError::Store(BackupError::io("write", pages(&self.sets.dir, self.set.checkpoint))(error))
            })?;
            self.slots = slot + 1;
        }
        Ok(())
    }

    /// That was all: from now on the checkpoint has it, durably.
    ///
    /// # Errors
    /// [`PutError`]; then there is nothing of it.
    pub fn end(mut self) -> Result<(), PutError> {
        if self.untold > 0 || !self.told.is_empty() || self.set.files.is_empty() {
            return bad("the images end before all of them came");
        }
        let at = self.set.checkpoint;
        let (own_pages, own_set) = (pages(&self.sets.dir, at), description(&self.sets.dir, at));
        let (new_pages, new_set) = (own_pages.with_extension("pages.new"), own_set.with_extension("set.new"));
        let Some(bytes) = self.set.encode() else { return bad("the images are too large") };
        self.out.flush().map_err(BackupError::io("write", &new_pages))?;
        durable::data(self.out.get_ref()).map_err(BackupError::io("sync", &new_pages))?;
        let mut file = create(&new_set)?;
        file.write_all(&bytes).map_err(BackupError::io("write", &new_set))?;
        durable::data(&file).map_err(BackupError::io("sync", &new_set))?;
        // The pages first: a description is never there without them.
        fs::rename(&new_pages, &own_pages).map_err(BackupError::io("rename to", &own_pages))?;
        fs::rename(&new_set, &own_set).map_err(BackupError::io("rename to", &own_set))?;
        sync_dir(&self.sets.dir).map_err(BackupError::from)?;
        let (bytes, sources) = (self.set.bytes(), self.set.sources());
        let known = Known { wall_ns: self.set.wall_ns, bytes, sources };
        let mut inner = self.sets.inner();
        inner.all.insert(at, known);
        // What the next one is compared with.
        inner.newest = Some((at, Arc::new(std::mem::take(&mut self.own))));
        drop(inner);
        Ok(())
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        let at = self.set.checkpoint;
        // What cannot be removed goes at the next start.
        let _ = fs::remove_file(pages(&self.sets.dir, at).with_extension("pages.new"));
        let _ = fs::remove_file(description(&self.sets.dir, at).with_extension("set.new"));
        self.sets.inner().writing = false;
    }
}
