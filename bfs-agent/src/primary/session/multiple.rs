//! Which objects have several names, for a successor: `/run/bfs/multiple-GROUP` has their numbers, 8 bytes each,
//! little-endian. It may have too many, and is written before the ring space is released by which a successor would have
//! known of them. Where it is missing a successor does not know, and everything is read.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bfs_common::record::{ObjectId, Sequence};
use foldhash::HashSet;

use super::state::{DIRECTORY, make_directory, replace};

/// A list that is shorter, in numbers, is not written anew.
const LEAST: usize = 8192;

fn path(group: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("multiple-{group}"))
}

/// The list of a group.
#[derive(Debug)]
pub(super) struct Multiple {
    path: PathBuf,
    /// `None` where it cannot be kept.
    file: Option<File>,
    /// How many numbers are on it.
    written: usize,
    /// What is gone once so much of the stream is durable.
    forgetting: VecDeque<(Sequence, HashSet<ObjectId>)>,
    /// What is on it, and gone.
    forgotten: HashSet<ObjectId>,
}

impl Multiple {
    /// Begins an empty one, for probes that are new.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn begin(group: &str) -> io::Result<()> {
        make_directory()?;
        replace(&path(group), &[]).map(drop)
    }

    /// The list, and what is on it; nothing where it was not kept.
    pub(super) fn open(group: &str) -> (Self, Option<Vec<ObjectId>>) {
        Self::open_at(path(group))
    }

    fn open_at(path: PathBuf) -> (Self, Option<Vec<ObjectId>>) {
        let file = OpenOptions::new().append(true).open(&path).ok();
        let known = file.as_ref().and_then(|_| numbers(&fs::read(&path).ok()?));
        let file = file.filter(|_| known.is_some());
        let written = known.as_ref().map_or(0, Vec::len);
        (Self { path, file, written, forgetting: VecDeque::new(), forgotten: HashSet::default() }, known)
    }

    /// At a clean end.
    pub(super) fn remove(group: &str) {
        let _ = fs::remove_file(path(group));
    }

    /// More of them. Where they cannot be kept, a successor has to find no list.
    pub(super) fn keep(&mut self, objects: &[ObjectId]) {
        let Some(file) = &mut self.file else { return };
        for object in objects {
            self.forgotten.remove(object);
            for (_, gone) in &mut self.forgetting {
                gone.remove(object);
            }
        }
        if let Err(error) = file.write_all(&bytes(objects)) {
            tracing::warn!("cannot note in {DIRECTORY} which files have several names: {error}");
            self.file = None;
            let _ = fs::remove_file(&self.path);
        }
        self.written += objects.len();
    }

    /// These are gone once the stream is durable up to `sealed`, unless they are kept again.
    pub(super) fn forget(&mut self, objects: Vec<ObjectId>, sealed: Sequence) {
        // Without a list there is nothing to leave.
        if self.file.is_some() {
            self.forgetting.push_back((sealed, objects.into_iter().collect()));
        }
    }

    /// So much of the stream is durable. When half of the list is gone it is written anew, so that its length follows
    /// what there is, and each number costs a bounded share of it.
    pub(super) fn sealed(&mut self, durable: Sequence) {
        while let Some((_, gone)) = self.forgetting.pop_front_if(|(sealed, _)| *sealed <= durable) {
            self.forgotten.extend(gone);
        }
        if self.written < LEAST || self.forgotten.len() < self.written / 2 {
            return;
        }
        if self.file.is_some()
            && let Err(error) = self.write_anew()
        {
            // What is gone stays on it, which is safe.
            tracing::warn!("cannot write {} anew: {error}", self.path.display());
        }
        self.forgotten.clear();
    }

    fn write_anew(&mut self) -> io::Result<()> {
        let mut left = numbers(&fs::read(&self.path)?).ok_or(io::ErrorKind::InvalidData)?;
        left.retain(|object| !self.forgotten.contains(object));
        left.sort_unstable();
        left.dedup();
        (self.file, self.written) = (Some(replace(&self.path, &bytes(&left))?), left.len());
        Ok(())
    }
}

fn bytes(objects: &[ObjectId]) -> Vec<u8> {
    objects.iter().flat_map(|object| object.0.to_le_bytes()).collect()
}

fn numbers(bytes: &[u8]) -> Option<Vec<ObjectId>> {
    let (numbers, rest) = bytes.as_chunks::<8>();
    rest.is_empty().then(|| numbers.iter().map(|number| ObjectId(u64::from_le_bytes(*number))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_counts_as_none() {
        let two = [1u64.to_le_bytes(), 70_000u64.to_le_bytes()].concat();
        assert_eq!(numbers(&two), Some(vec![ObjectId(1), ObjectId(70_000)]));
        assert_eq!((numbers(&two[..15]), numbers(&[])), (None, Some(Vec::new())));
    }

    #[test]
    fn what_is_gone_leaves_the_list_once_it_is_durable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("multiple-x");
        drop(replace(&path, &[]).unwrap());
        let (mut list, known) = Multiple::open_at(path.clone());
        assert_eq!(known, Some(Vec::new()));
        let all: Vec<ObjectId> = (0..LEAST as u64).map(ObjectId).collect();
        list.keep(&all);
        list.forget(all[1..].to_vec(), Sequence(7));
        list.keep(&[ObjectId(3)]);
        let read = || Multiple::open_at(path.clone()).1.unwrap();
        list.sealed(Sequence(6));
        assert_eq!(read().len(), LEAST + 1, "it may be needed still");
        list.sealed(Sequence(7));
        assert_eq!(read(), [ObjectId(0), ObjectId(3)], "what was kept again stays");
        list.keep(&[ObjectId(LEAST as u64)]);
        assert_eq!(read().len(), 3, "it goes on in the new file");
        assert!(!path.with_added_extension("new").exists());
    }

    #[test]
    fn a_list_that_cannot_be_written_anew_keeps_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("multiple-x");
        drop(replace(&path, &[]).unwrap());
        fs::create_dir_all(path.with_added_extension("new")).unwrap();
        let (mut list, _) = Multiple::open_at(path.clone());
        let all: Vec<ObjectId> = (0..LEAST as u64).map(ObjectId).collect();
        list.keep(&all);
        list.forget(all, Sequence(1));
        list.sealed(Sequence(1));
        list.keep(&[ObjectId(u64::MAX)]);
        assert_eq!(Multiple::open_at(path).1.unwrap().len(), LEAST + 1);
    }

    #[test]
    fn without_a_list_nothing_gathers_and_none_comes_to_be() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("multiple-x");
        let (mut list, known) = Multiple::open_at(path.clone());
        assert_eq!(known, None);
        let all: Vec<ObjectId> = (0..2 * LEAST as u64).map(ObjectId).collect();
        list.keep(&all);
        list.forget(all, Sequence(1));
        list.sealed(Sequence(1));
        assert!(list.forgetting.is_empty() && list.forgotten.is_empty());
        assert!(!path.exists());
    }
}
